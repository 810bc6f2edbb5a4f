"""Several octaves: shares of the channels at half, a quarter, an eighth ... of the resolution."""

import copy
import inspect
import itertools
import json
import pickle
import warnings

import pytest
import several_octaves
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.checkpoint import checkpoint

from octvideo import (
    Octaves,
    OctConv1d,
    OctConv2d,
    OctConv3d,
    OctConvTranspose2d,
    OctConvTranspose3d,
    create_model,
    fuse,
    octavize,
)
from octvideo.evaluation.feature_maps import maps_of
from octvideo.evaluation.report import say_alpha
from octvideo.layers import normalize
from octvideo.layers.shares import split_octaves
from octvideo.models.cost import count_cost, count_macs_of
from octvideo.training.precise_bn import estimate_statistics
from octvideo.training.recognizer import Recognizer

ALPHAS = [0.25, (0.25, 0.125), (0.25, 0.125, 0.125), (0, 0.25), (0.5, 0.25, 0.25)]
SHAPES = [
    (4, 32, 32),
    (2, 31, 17),
    (3, 15, 15),
    (2, 7, 9),
    (1, 5, 6),
    (2, 4, 3),
    (2, 2, 3),
    (1, 2, 1),
    (2, 1, 5),
    (3, 1, 1),
]


@pytest.fixture(autouse=True)
def _few_threads_and_no_merges(one_thread):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*merge.*octave features")
        yield


def network(alpha, temporal=False):
    """With groups, depthwise layers, strides, odd pools, a residual, gates, a join and a slice of channels."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"padding": 1, "padding_mode": "circular", "alpha": alpha, "temporal": temporal}
            self.stem = nn.Sequential(OctConv3d(3, 16, 3, **options), nn.BatchNorm3d(16), nn.ReLU(inplace=True))
            self.strided = OctConv3d(16, 16, 3, (1, 2, 2), **options)
            self.same = OctConv3d(16, 16, 1, alpha=alpha, temporal=temporal)
            self.grouped = OctConv3d(16, 16, 3, groups=2, **options)
            self.depthwise = OctConv3d(16, 16, 3, (1, 2, 2), groups=16, **options)
            self.pool = nn.MaxPool3d((1, 2, 2), ceil_mode=True)
            self.last = OctConv3d(31, 8, 1, alpha=0, temporal=temporal)
            self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4))

        def forward(self, x):
            x = self.strided(self.stem(x))
            x = self.grouped(x + F.silu(self.same(x)) * x.mean((2, 3, 4), keepdim=True))
            x = torch.cat([self.pool(x), self.depthwise(x)], 1)
            return self.head(self.last(x[:, 1:]))

    torch.manual_seed(0)
    return Network()


# Acceptance


@pytest.mark.parametrize("temporal", [False, True])
def test_a_clip_constant_in_space_has_the_same_logits_at_every_alpha(temporal):
    """The ten shapes of SHAPES, odd ones and 1 x 1 among them; with temporal octaves it is constant in time too."""
    vanilla = network(0).double().eval()
    for shape, alpha in itertools.product(SHAPES, ALPHAS):
        octave = network(alpha, temporal).double().eval()
        clip = torch.randn(2, 3, 1 if temporal else shape[0], 1, 1, dtype=torch.float64).expand(2, 3, *shape)
        with torch.no_grad():
            difference = (octave(clip) - vanilla(clip)).abs().max()
        assert difference < 1e-10, (shape, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("alpha_in", [0, *ALPHAS])
def test_macs_equal_the_formula(alpha_in, alpha):
    """A path from resolution i to resolution j has 4 ** -max(i, j) of the arithmetic of its channels."""
    shares_in, shares = ([n / 64 for n in split_octaves(64, a)] for a in (alpha_in, alpha))
    wanted = sum(
        a * b / 4 ** max(i, j) for (i, a), (j, b) in itertools.product(enumerate(shares_in), enumerate(shares))
    )
    network = nn.Sequential(
        OctConv3d(3, 64, 1, alpha=alpha_in), OctConv3d(64, 64, (1, 3, 3), padding=(0, 1, 1), alpha=alpha)
    )
    clip = torch.zeros(1, 3, 2, 32, 32)
    vanilla = 64 * 64 * 9 * 2 * 32 * 32
    x = network[0](clip)
    assert count_macs_of(lambda: network[1](x)) == wanted * vanilla
    assert count_cost(network, (3, 2, 32, 32))["1"].macs == wanted * vanilla


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5])
def test_a_last_share_of_0_changes_nothing(alpha):
    clip, states = torch.randn(2, 3, 4, 17, 22), []
    for alphas in (alpha, (alpha, 0), [alpha, 0.0, 0]):
        model = network(alphas)
        logits = model(clip)
        logits.square().sum().backward()
        assert model.strided.alpha == alpha
        states.append([logits, *(parameter.grad for parameter in model.parameters())])
    for x, *others in zip(*states, strict=True):
        assert all(torch.equal(x, other) for other in others)


def test_onnx_and_torch_export_give_the_same_logits(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, image = small((0.25, 0.25)).eval(), torch.randn(2, 3, 37, 22)
    wanted, program = model(image), torch.export.export(model, (image,))
    torch.testing.assert_close(program.module()(image), wanted)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted.detach(), rtol=1e-4, atol=1e-5)


# The layer, against all its paths one by one


def pooled(x, dims):
    """Means of pairs along dimensions; a border without a partner stays."""
    for dim in dims:
        first, second = x.movedim(dim, 0)[0::2], x.movedim(dim, 0)[1::2]
        x = torch.cat(((first[: len(second)] + second) / 2, first[len(second) :])).movedim(0, dim)
    return x


def repeated(x, dims, like):
    for dim in dims:
        x = x.repeat_interleave(2, dim).narrow(dim, 0, like[dim])
    return x


def reference(maps, splits_in, weight, bias, splits, convolution, strided, temporal):
    """Every path from resolution i to resolution j: pooled, convolved, upsampled; `weight` is dense."""
    dims = weight.dim()
    space, outputs = range(max(2, dims - 2), dims), []
    time = [2] if temporal else []
    frame = [maps[0].shape]  # the sizes at each resolution, from the full one
    for step in range(len(maps) + len(splits) + 1):
        frame.append(pooled(torch.empty(frame[-1], device="meta"), [*(time if step == 0 else ()), *space]).shape)
    rows, columns = weight.split(splits, 0), bias.split(splits)
    for j, (of_rows, of_bias) in enumerate(zip(rows, columns, strict=True)):
        place, total = j + strided, 0
        for i, (x, block) in enumerate(zip(maps, of_rows.split(splits_in, 1), strict=True)):
            late, early = time if i > 0 == j else [], time if j > 0 == i else []
            x = pooled(x, early)
            for _ in range(i, place):
                x = pooled(x, space)
            y = convolution(x, block) if block.numel() else x.new_zeros((len(x), len(block), *x.shape[2:]))
            for k in range(i, place, -1):
                y = repeated(y, space, frame[k - 1])
            total = total + repeated(y, late, frame[0])
        outputs.append(total + of_bias.view(-1, *(1,) * (dims - 2)))
    return outputs


def as_octaves(maps):
    return maps[0] if len(maps) == 1 else Octaves(maps[0], as_octaves(maps[1:]))


def as_maps(x):
    return [x.high, *as_maps(x.low)] if isinstance(x, Octaves) else [x]


def maps_of_shares(counts, size, temporal):
    """Random maps, each half the size of the one above, in time once."""
    maps = []
    for i, count in enumerate(counts):
        maps.append(torch.randn(2, count, *size, dtype=torch.float64, requires_grad=True))
        first = len(size) - 2 if len(size) > 1 and not (temporal and i == 0) else 0
        size = [*size[:first], *(-(-n // 2) for n in size[first:])]
    return maps


CASES = [  # class, kernel, padding, size
    (OctConv3d, (3, 3, 3), 1, (4, 15, 13)),
    (OctConv3d, (1, 3, 3), (0, 1, 1), (2, 5, 1)),
    (OctConv2d, 3, 1, (15, 22)),
    (OctConv1d, 5, 2, (37,)),
]


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_all_paths(case, stride, temporal):
    kind, kernel, padding, size = case
    if temporal and kind is not OctConv3d:
        pytest.skip("no time")
    strides = (1, stride, stride)[-len(size) :]
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    for alpha_in, alpha in itertools.product(
        [0, 0.5, (0.25, 0.25), (0.25, 0, 0.25)], [0, 0.25, (0.25, 0.25), (0.5, 0.25, 0.25)]
    ):
        if stride == 2 and not alpha_in and not alpha:
            continue  # strides as nn.Conv3d does
        splits_in, splits = split_octaves(8, alpha_in), split_octaves(12, alpha)
        layer = kind(8, 12, kernel, strides, padding, alpha=alpha, temporal=temporal).double()
        maps = maps_of_shares(splits_in, size, temporal)
        y = layer(as_octaves(maps))
        wanted = reference(
            maps,
            splits_in,
            layer.weight,
            layer.bias,
            splits,
            lambda x, w: convolution(x, w, padding=padding),
            stride - 1,
            temporal,
        )
        assert len(as_maps(y)) == len(wanted)
        gradients = [torch.randn_like(x) for x in wanted if x.shape[1]]
        sources = [*(x for x in maps if x.shape[1]), layer.weight, layer.bias]
        outputs = ([x for x in every if x.shape[1]] for every in (as_maps(y), wanted))
        found = [torch.autograd.grad(some, sources, gradients) for some in outputs]
        for have, want in zip((*as_maps(y), *found[0]), (*wanted, *found[1]), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [(0.25, 0.25), (0.5, 0.25)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_layer_is_the_dense_one_of_a_block_diagonal_weight(groups, stride, alpha):
    x = OctConv2d(4, 16, 1, alpha=alpha).double()(torch.randn(2, 4, 15, 13, dtype=torch.float64))
    layer = OctConv2d(16, 16, 3, stride, 1, groups=groups, alpha=alpha).double()
    dense = OctConv2d(16, 16, 3, stride, 1, alpha=alpha).double()
    width, counts = 16 // groups, split_octaves(16, alpha)
    weight = torch.block_diag(*layer.weight.detach().flatten(2).unbind(2)[0].split(width))[..., None, None].repeat(
        1, 1, 3, 3
    )
    for i, (rows, of_dense) in enumerate(zip(layer.weight.detach().split(width), weight.split(width), strict=True)):
        of_dense[:, i * width : (i + 1) * width] = rows
    # In the dense layer the rows of all groups at one resolution lie together.
    places, parts = torch.arange(16).view(groups, -1).split([n // groups for n in counts], 1), []
    order = torch.cat([part.flatten() for part in places])
    dense.weight.data, dense.bias.data = weight[order], layer.bias.detach()[order]
    for have, want in zip(as_maps(layer(x)), as_maps(dense(x)), strict=True):
        torch.testing.assert_close(have, want)
        parts.append(have.shape[1])
    assert tuple(parts) == counts


@pytest.mark.parametrize("kind", [OctConvTranspose2d, OctConvTranspose3d])
@pytest.mark.parametrize("alpha", [0, 0.5, (0.25, 0.25)])
def test_transposed_layers_are_convolutions_of_each_path(kind, alpha):
    size = (3, 8, 12)[-len(kind(1, 1, 1).kernel_size) :]
    convolution = F.conv_transpose2d if len(size) == 2 else F.conv_transpose3d
    splits_in, splits = split_octaves(8, (0.25, 0.25)), split_octaves(12, alpha)
    stride, kernel, padding = ((1, 2, 2)[-len(size) :], (1, 4, 4)[-len(size) :], (0, 1, 1)[-len(size) :])
    layer = kind(8, 12, kernel, stride, padding, alpha=alpha).double()
    maps, outputs = (
        maps_of_shares(splits_in, size, False),
        as_maps(layer(as_octaves(maps_of_shares(splits_in, size, False)))),
    )
    assert len(outputs) == len(splits)
    outputs = as_maps(layer(as_octaves(maps)))
    for j, (rows, bias) in enumerate(zip(layer.weight.split(splits, 1), layer.bias.split(splits), strict=True)):
        total = bias.view(-1, *(1,) * len(size))
        for i, (x, block) in enumerate(zip(maps, rows.split(splits_in, 0), strict=True)):
            for _ in range(i, j):
                x = pooled(x, (-2, -1))
            y = convolution(x, block, stride=stride, padding=padding)
            for _ in range(j, i):
                y = y.repeat_interleave(2, -1).repeat_interleave(2, -2)
            total = total + y
        torch.testing.assert_close(outputs[j], total)
    odd = layer(as_octaves(maps_of_shares(splits_in, (*size[:-2], 7, 5), False)))  # cropped or filled
    assert odd.shape[-2:] == (14, 10)
    assert all(low.shape[-2:] in ((7, 5), (4, 3)) for low in as_maps(odd)[1:])
    wanted = nn.ConvTranspose3d if len(size) == 3 else nn.ConvTranspose2d
    assert layer.state_dict().keys() == wanted(8, 12, 1).state_dict().keys()


# Functions and modules


@pytest.fixture
def x():
    torch.manual_seed(0)
    low = Octaves(torch.randn(4, 4, 3, 8, 7), torch.randn(4, 2, 3, 4, 4))
    return Octaves(torch.randn(4, 6, 3, 16, 14), low)


def test_it_answers_as_the_vanilla_tensor(x):
    assert x.shape == x.merge().shape == (4, 12, 3, 16, 14)
    assert (x.counts, x.low.counts, x.ratios) == ((6, 4, 2), (4, 2), (1, 1, 1, 2, 2))
    assert torch.equal(x.merge()[:, 11, 0, 7, 6], x.low.low[:, 1, 0, 1, 1])
    assert torch.equal(copy.deepcopy(x).merge(), x.merge())
    assert torch.equal(pickle.loads(pickle.dumps(x)).merge(), x.merge())
    assert x.alike(x.merge()).counts == x.counts


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: x.clone().relu_(),
        lambda x: x.add_(1).sub_(1),
        lambda x: x.detach().clone().double(),
        lambda x: x * 2 - x / (1 + x.abs()),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x * x.amax((2, 3, 4), keepdim=True),
        lambda x: x[:, 2:11],
        lambda x: x.flip(1),
        lambda x: torch.cat([x, x[:, :5]], 1),
        lambda x: torch.cat([x, x], 0),
        lambda x: torch.stack([x, x], 2).flatten(1, 2),
        lambda x: x.transpose(1, 2).reshape(12, 12, 16, 14),
        lambda x: x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2),  # a channel shuffle
        lambda x: x.permute(0, 2, 3, 4, 1),
        lambda x: torch.cat(x.chunk(3, 1), 1),
        lambda x: x.amax(2),
        lambda x: x.max(2).values,
        lambda x: x.cumsum(2),
        lambda x: x.sum((1, 3)),
        lambda x: x.sum((2, 3, 4)),
        lambda x: x.var((2, 3, 4)),
        lambda x: x.norm(),
        lambda x: F.interpolate(x, scale_factor=(1, 2, 2)),
        lambda x: F.group_norm(x, 3),
        lambda x: F.prelu(x, torch.arange(12.0)),
        lambda x: nn.BatchNorm3d(12).eval()(x),
        lambda x: F.adaptive_avg_pool3d(x[..., :8], 1),
        lambda x: F.adaptive_max_pool3d(x, (None, 1, 1)),
        lambda x: F.max_pool3d(x, (3, 1, 1)),
    ],
)
def test_functions_give_what_the_merged_tensor_gives(x, function):
    wanted = function(x.merge())
    found = function(x)
    found = found.merge() if isinstance(found, Octaves) else found
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_functions_keep_both_octaves(x):
    for y in (
        x.relu(),
        x + x,
        x[:, 1:],
        torch.cat([x, x], 1),
        nn.BatchNorm3d(12)(x),
        F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ):
        assert len(y.counts) == 3
    assert [m.shape[3:] for m in as_maps(F.max_pool3d(x, (1, 2, 2)))] == [(8, 7), (4, 4), (2, 2)]  # 7 low ones become 4
    plain = torch.randn(4, 12, 3, 16, 14)
    torch.testing.assert_close((plain + x).low.low, x.low.low + pooled(pooled(plain[:, 10:], (3, 4)), (3, 4)))
    one = Octaves(plain[:, :6], pooled(plain[:, 6:], (3, 4)))  # of the same first split
    torch.testing.assert_close((one + x).merge(), (plain + x).merge())
    x += 1
    x[:, 7:] = 0
    assert x.low.low.abs().max() == 0 < x.low.high[:, 0].abs().max()


def test_batch_norms_have_the_statistics_of_each_map(x):
    norm = nn.BatchNorm3d(12, momentum=1.0)
    y = norm(x)
    torch.testing.assert_close(norm.running_mean, torch.cat([m.mean((0, 2, 3, 4)) for m in as_maps(x)]))
    torch.testing.assert_close(y.low.low, nn.BatchNorm3d(2)(x.low.low))
    sub = normalize(nn.Sequential(copy.deepcopy(norm)), "sub", splits=2)(x)
    torch.testing.assert_close(sub.low.low[2:], nn.BatchNorm3d(2)(x.low.low[2:]))
    assert normalize(nn.Sequential(norm), "sync")(x).counts == (6, 4, 2)


def test_gradients_hooks_checkpointing_and_autocast():
    model, clip = network((0.25, 0.25)), torch.randn(2, 3, 4, 22, 17)
    seen = []
    maps = model.stem(clip)
    maps.retain_grad()
    maps.register_hook(lambda gradient: seen.append(gradient))
    maps.merge().square().sum().backward()
    torch.testing.assert_close(seen[0], 2 * maps.merge())
    torch.testing.assert_close(maps.grad, seen[0])
    model.zero_grad()
    model(clip).sum().backward()
    other = network((0.25, 0.25))
    other.strided.forward = lambda x, run=other.strided.forward: checkpoint(run, x, use_reentrant=False)
    other(clip).sum().backward()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.eval()(clip) - other.eval()(clip)).abs().max() < 0.05


def small(alpha):
    torch.manual_seed(0)
    layers = OctConv2d(3, 8, 1, alpha=alpha), nn.BatchNorm2d(8), nn.MaxPool2d(2), OctConv2d(8, 8, 3, 2, 1, alpha=alpha)
    return nn.Sequential(*layers, nn.ReLU(), OctConv2d(8, 4, 1, alpha=0))


def test_torch_compile_takes_it_in_one_graph():
    model, image = small((0.25, 0.25)), torch.randn(2, 3, 21, 38)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    wanted, found = model(image), compiled(image)
    torch.testing.assert_close(found, wanted)
    wanted.sum().backward(), found.sum().backward()
    for mine, its in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-4)


# Networks


def test_octavize_takes_shares_and_says_what_it_made():
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
    )
    image = torch.randn(2, 3, 20, 22)
    wanted = plain.eval()(image)
    model = octavize(plain, (0.25, 0.125), sample=image)
    text = str(model.octave_report)
    assert "2  alpha 0.25 + 0.125: 10 high + 4 at 1/2 + 2 at 1/4 channels; MACs" in text
    assert "3 of 3" not in text, text  # the first reads the input
    assert model(image).shape == (2, 4, 20, 22)
    assert model.octave_report.assignments[1].low == 6
    octavize(model, {"2": [0.25, 0.25], "3": 0.5})
    assert (model[2].alpha, model[3].alpha, model[0].alpha) == ((0.25, 0.25), 0.5, 0)
    assert torch.equal(octavize(model, 0)(image), wanted)
    with pytest.raises(ValueError, match=r"groups 4 must divide all"):
        octavize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4)), {"1": (0.5, 0.25)})


def test_the_zoo_takes_shares_for_each_stage():
    model = create_model("c2d_r50", alpha=[[0.25, 0.125], 0.25, (0.25, 0.25), 0], width=8, num_classes=5)
    clip = torch.randn(2, 3, 2, 104, 90)
    estimate_statistics(model, [clip], model)
    model.eval()
    torch.testing.assert_close(fuse(model, clip)(clip), model(clip), rtol=1e-3, atol=1e-4)
    assert not model.octave_report.merges
    (maps,) = maps_of(model, "blocks.1", clip[0])
    assert [(m.kind, m.size) for m in maps] == [("high", (2, 26, 23)), ("low", (2, 13, 12)), ("1/4", (2, 7, 6))]
    assert maps[2].values.shape == (4, 2, 26, 23)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ((0.7, 0.4), r"must add up to at most 1, got \(0.7, 0.4\)"),
        ((0.5, -0.1), r"alpha must lie in \[0, 1\], got \(0.5, -0.1\)"),
        ((), r"alpha must lie in \[0, 1\], got \(\)"),
    ],
)
def test_bad_shares_are_refused(alpha, message):
    for build in (lambda: OctConv2d(4, 4, 1, alpha=alpha), lambda: octavize(nn.Conv2d(4, 4, 1), alpha)):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match="one number or four"):
        create_model("c2d_r50", alpha=(0.25, 0.125))


def test_yaml_may_give_shares_for_each_stage_or_name():
    parser = ArgumentParser()
    parser.add_argument("--alpha", type=inspect.signature(Recognizer.__init__).parameters["alpha"].annotation)
    assert parser.parse_args(["--alpha=[[.25,.125],.25,.25,0]"]).alpha == [[0.25, 0.125], 0.25, 0.25, 0]
    assert parser.parse_args(['--alpha={"conv": [.25,.125]}']).alpha == {"conv": [0.25, 0.125]}
    assert say_alpha([[0.25, 0.125], 0.25, 0.25, 0]) == "0.25 + 0.125, 0.25, 0.25, 0"


def test_the_experiment_measures_two_octaves_beside_one(tmp_path, capsys):
    options = ["--models", "c2d_r50", "--alphas", ".5,.25+.25", "--size", "2x32x32", "--width", "8", "--rounds", "1"]
    several_octaves.main([*options, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["alpha"] for row in rows] == [0, 0.5, [0.25, 0.25]]
    assert 1 > rows[1]["mac_ratio"] > rows[2]["mac_ratio"]
    assert "| c2d_r50 | 0.25 + 0.25 | " in capsys.readouterr().out


def test_shares_are_rounded_from_the_lowest_resolution_on():
    assert split_octaves(64, (0.25, 0.125)) == (40, 16, 8)
    assert split_octaves(7, (0.3, 0.3)) == (3, 2, 2)
    assert split_octaves(8, (0.25, 0.01)) == (6, 2)
    assert split_octaves(8, (0, 0.25)) == (6, 0, 2)
    assert split_octaves(8, (0.5, 0.25, 0.25)) == (0, 4, 2, 2)
    assert split_octaves(64, (0.25, 0.125), 16) == (32, 16, 16)
    assert split_octaves(32, (0.25, 0.125), 16) == (16, 16)


def test_maps_of_the_wrong_sizes_are_named():
    x = Octaves(torch.zeros(1, 2, 8, 8), Octaves(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3)))
    with pytest.raises(ValueError, match=r"a low map of size \(2, 2\) beside a high map of \(4, 4\), got \(3, 3\)"):
        OctConv2d(4, 4, 1, alpha=(0.25, 0.25))(x)
