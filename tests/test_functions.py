"""Functions between convolutions mean on octave features what they mean on the vanilla tensor."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octvideo import Octaves, OctConv3d
from octvideo.layers import merging


def features(size, low_size, parts=((6, 2),), batch=2):
    """Octaves in float64 of the given parts; a function that is exact on them agrees with their merged tensor."""
    high, low = (sum(part[kind] for part in parts) for kind in (0, 1))
    torch.manual_seed(0)
    return Octaves(
        torch.randn(batch, high, *size, dtype=torch.float64),
        torch.randn(batch, low, *low_size, dtype=torch.float64),
        parts,
    )


IMAGES = {
    "even": features((8, 12), (4, 6)),
    "odd": features((7, 9), (4, 5)),
    "pieces": features((8, 8), (4, 4), ((3, 1), (3, 1))),
    "uneven": features((8, 8), (4, 4), ((4, 1), (1, 2))),
}
CLIPS = {
    "even": features((4, 8, 12), (4, 4, 6)),
    "odd": features((5, 7, 9), (5, 4, 5)),
    "temporal": features((4, 8, 8), (2, 4, 4)),
}


def shift(x, folds=4):
    """TSM's shift of channels along time, for clips that were folded into the batch."""
    clips = x.view(-1, 2, *x.shape[1:])
    fold = clips.shape[2] // folds
    out = torch.zeros_like(clips)
    out[:, :-1, :fold] = clips[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return out.view(x.shape)


def shuffle(x, groups=2):
    batch, channels, *space = x.shape
    x = x.view(batch, groups, channels // groups, *space)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, *space)


def radix_sum(x):
    return x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).sum(1)


class Views(nn.Module):
    """A gate made by views, and a classifier behind a view, as much code has them."""

    def __init__(self):
        super().__init__()
        self.layer, self.classifier = OctConv3d(3, 8, 3, padding=1, alpha=0.25), nn.Linear(8 * 2 * 8 * 8, 5)

    def forward(self, x):
        x = self.layer(x)
        gate = x.view(*x.shape[:2], -1).mean(2).sigmoid()
        x = shuffle(x * gate.view(*x.shape[:2], 1, 1, 1))
        return self.classifier(x.view(x.size(0), x.numel() // x.size(0)))


@pytest.mark.filterwarnings("ignore:.*merges octave features:UserWarning")
def test_views_leave_the_batch_free_in_torch_export():
    network = Views().eval()
    sizes = {"x": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(network, (torch.randn(2, 3, 2, 8, 8),), dynamic_shapes=sizes).module()
    for batch in (1, 3):
        clips = torch.randn(batch, 3, 2, 8, 8)
        torch.testing.assert_close(program(clips), network(clips))


ANY = {  # on images and clips, of any parts and size: what comes out is exact, and nothing is merged
    "split": lambda x: torch.split(x, 3, 1)[1],
    "split sizes": lambda x: x.split([2, 5, 1], dim=1)[1],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "tensor_split": lambda x: x.tensor_split(3, 1)[2],
    "slice": lambda x: x[:, 2:7],
    "steps": lambda x: x[:, 1::2],
    "ellipsis": lambda x: x[:, ..., None][..., 0],
    "list": lambda x: x[:, [7, 0, 3]],
    "index": lambda x: x.index_select(1, torch.tensor([5, 1, 6])),
    "narrow": lambda x: x.narrow(1, 3, 4),
    "new dimension": lambda x: x[:, None].squeeze(1),
    "shuffle": shuffle,
    "shuffle 4": lambda x: shuffle(x, 4),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: torch.roll(x, 3, 1),
    "batch": lambda x: x[1:],
    "cat": lambda x: torch.cat([x[:, 4:], x, x[:, :2]], 1),
    "cat of the batch": lambda x: torch.cat((x, x * 2), 0),
    "stack": lambda x: torch.stack([x, x + 1], 1).sum(1),
    "stack last": lambda x: torch.stack([x, x], -1)[..., 1],
    "unbind": lambda x: torch.stack(torch.stack((x, 2 * x), 0).unbind(0), 0)[1],
    "chained cat": lambda x: torch.cat([torch.cat(x.chunk(4, 1)[1:], 1), x[:, :3]], 1).flip(1),
    "repeat": lambda x: x.repeat(1, 2, *(1,) * (x.dim() - 2)),
    "permute": lambda x: x.permute(0, *range(2, x.dim()), 1).movedim(-1, 1),
    "channels last gelu": lambda x: F.gelu(x.permute(0, *range(2, x.dim()), 1)).permute(0, -1, *range(1, x.dim() - 1)),
    "fold": lambda x: (x[:, None] * 2).flatten(0, 1).unflatten(0, (-1, 1)).squeeze(1),
    "shift": shift,
    "select": lambda x: torch.stack([x.select(1, 2), x.select(1, 7)], 1),
    "shape": lambda x: x.view(x.size(0), *x.shape[1:]).reshape(x.shape),
    "sum of channels": lambda x: x.sum(1, keepdim=True),
    "mean of channels": lambda x: x.mean(1, keepdim=True),
    "max of channels": lambda x: x.amax(1, keepdim=True),
    "min of channels": lambda x: x.amin(dim=(1,)),
    "sum of space": lambda x: x.sum((-2, -1)),
    "sum of all": lambda x: x.sum(),
    "mean of all": lambda x: x.mean(),
    "max of all": lambda x: x.max(),
    "max of space": lambda x: x.amax((-2, -1), True),
    "variance of space": lambda x: x.var(tuple(range(2, x.dim()))),
    "deviation of all": lambda x: x.std(),
    "variance": lambda x: torch.var(x, dim=(1, -2, -1), correction=0, keepdim=True) if x.dim() == 4 else x.var(),
    "norm of space": lambda x: x.norm(p=2, dim=tuple(range(2, x.dim())), keepdim=True),
    "norm of channels": lambda x: torch.linalg.vector_norm(x, dim=1),
    "norm of all": lambda x: torch.norm(x),
    "group norm": lambda x: F.group_norm(x, 2, torch.arange(8.0).double(), torch.ones(8).double()),
    "group norm 1": lambda x: F.group_norm(x, 1),
    "group norm 8": lambda x: F.group_norm(x, 8),
    "instance norm": F.instance_norm,
    "crop": lambda x: x[..., :6, 2:8],
    "crop odd": lambda x: x[..., 2:5, :3],
    "crop by pad": lambda x: F.pad(x, (-2, -1, 0, -3)),
    "pad before": lambda x: F.pad(x, (2, 0)) if x.shape[-1] % 2 == 0 else x,
    "one": lambda x: torch.cat([x], 1),
    "expand": lambda x: x[:, None].expand(-1, 3, *(-1,) * (x.dim() - 1)).flatten(0, 1),
    "pool whole": lambda x: F.adaptive_max_pool2d(x, 1) if x.dim() == 4 else F.adaptive_max_pool3d(x, (None, 1, 1)),
}
EVEN = {  # in even sizes
    "flip space": lambda x: x.flip(-1),
    "roll space": lambda x: x.roll(2, -1),
    "pad": lambda x: F.pad(x, (2, 4, 0, 2)),
    "pad odd after": lambda x: F.pad(x, (0, 1, 2, 3), value=0.5),
    "pad replicate": lambda x: F.pad(x, (2, 2, 2, 0, *(0, 0) * (x.dim() - 4)), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (2, 2, 2, 0, *(0, 0) * (x.dim() - 4)), mode="circular"),
    "split space": lambda x: x.split(4, -1)[1],
    "cat space": lambda x: torch.cat((x, x + 1), -1),
    "windows": lambda x: F.adaptive_avg_pool2d(x, (2, 2)) if x.dim() == 4 else F.adaptive_avg_pool3d(x, (None, 2, 2)),
    "strips": lambda x: F.adaptive_avg_pool2d(x, (None, 1)) if x.dim() == 4 else x.mean(-1),
    "mean of rows": lambda x: x.mean(-2, keepdim=True),
}
TIME = {  # of clips whose octaves are in space alone
    "mean": lambda x: x.mean(2),
    "sum": lambda x: x.sum(2, keepdim=True),
    "max": lambda x: x.max(2).values,
    "min": lambda x: x.min(dim=2, keepdim=True)[0],
    "std": lambda x: x.std(2),
    "fold": lambda x: x.transpose(1, 2).flatten(0, 1),
    "fold and unfold": lambda x: x.transpose(1, 2).reshape(-1, 8, *x.shape[3:]).view(2, -1, 8, *x.shape[3:]).mean(1),
    "unbind": lambda x: x.unbind(2)[1],
    "frame": lambda x: x[:, :, -1],
    "frames": lambda x: x[:, :, ::2],
    "chosen frames": lambda x: x[:, :, [0, 3, 1]],
    "index": lambda x: x.index_select(2, torch.tensor([0, 2])),
    "difference": lambda x: x[:, :, 1:] - x[:, :, :-1],
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pad replicate": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"),
    "roll": lambda x: torch.roll(x, 1, 2),
    "flip": lambda x: torch.flip(x, (2,)),
    "softmax": lambda x: x.softmax(2),
    "cumsum": lambda x: torch.cumsum(x, dim=2),
    "cat": lambda x: torch.cat((x, x[:, :, :1]), 2),
    "cat with a tensor": lambda x: torch.cat((x, torch.zeros(2, 8, 1, *x.shape[3:]).double()), 2),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 4, -1, -1),
    "weights of frames": lambda x: (x * x.amax((3, 4)).softmax(-1)[..., None, None]).sum(2),
}
CASES = [
    pytest.param(function, x, id=f"{name}-{x.dim() - 2}d-{kind}")
    for functions, kinds in (
        (ANY, [*IMAGES.items(), *CLIPS.items()]),
        (EVEN, [(kind, x) for kind, x in (*IMAGES.items(), *CLIPS.items()) if kind != "odd"]),
        (TIME, [(kind, x) for kind, x in CLIPS.items() if kind != "temporal"]),
    )
    for name, function in functions.items()
    for kind, x in kinds
]


def whole(x):
    return x.merge() if hasattr(x, "merge") else x


@pytest.mark.parametrize(("function", "x"), CASES)
def test_functions_are_exact_and_merge_nothing(function, x):
    wanted = function(x.merge())
    with merging.collected() as merges:
        found = function(x)
    assert not merges
    assert found.shape == wanted.shape
    torch.testing.assert_close(whole(found), wanted, rtol=1e-10, atol=1e-10)


KEPT = ["slice", "steps", "shuffle", "shuffle 4", "cat", "stack", "shift", "permute", "group norm", "repeat"]


@pytest.mark.parametrize("name", KEPT)
def test_what_works_on_channels_gives_octaves(name):
    for x in (*IMAGES.values(), *CLIPS.values()):
        y = ANY[name](x)
        y = y[-1] if isinstance(y, tuple) and not isinstance(y, Octaves) else y
        assert isinstance(y, Octaves)
        assert y.ratios == x.ratios


def test_a_norm_of_channels_gives_low_ones_the_mean_of_the_vanilla_results():
    for x in (*IMAGES.values(), CLIPS["even"]):
        norm = nn.LayerNorm(8, dtype=torch.float64)
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
        last = (0, *range(2, x.dim()), 1)
        y = norm(x.permute(last))
        wanted = x.alike(norm(x.merge().permute(last)).movedim(-1, 1))
        torch.testing.assert_close(y.movedim(-1, 1).merge(), wanted.merge(), rtol=1e-10, atol=1e-10)
        for function in (
            lambda x: x.softmax(1),
            lambda x: F.normalize(x),
            lambda x: F.local_response_norm(x, 3),
        ):
            found, wanted = function(x), x.alike(function(x.merge()))
            torch.testing.assert_close(found.merge(), wanted.merge(), rtol=1e-10, atol=1e-10)


MERGING = {
    "flatten": lambda x: x.flatten(2),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "odd pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "every second position": lambda x: x[:, :, ::2, 1::2],
    "softmax of rows": lambda x: x.softmax(-1),
    "argmax": lambda x: x.argmax(1),
    "max of channels": lambda x: x.max(1)[1],
    "topk": lambda x: x.topk(2, 1).values,
    "pool to 3": lambda x: F.adaptive_avg_pool2d(x, 3),
    "pool of odd windows": lambda x: F.max_pool2d(x, 2, 1),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[1],
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "unfold": lambda x: F.unfold(x, 3),
    "norm": lambda x: torch.linalg.vector_norm(x, 1, dim=1),
    "other features": lambda x: x + torch.cat((x[:, 4:], x[:, :4]), 1) * 1,
    "a mask": lambda x: x.masked_fill(torch.eye(12)[:8].bool(), 0),
    "into a tensor": lambda x: torch.zeros(x.shape).double().add_(x),
    "written": lambda x: torch.zeros(2, 9, 8, 12).double().index_copy(1, torch.arange(8), x),
    "list of batches": lambda x: torch.cat((x, torch.cat((x[:, 4:], x[:, :4]), 1)), 0),
}


@pytest.mark.parametrize("function", MERGING.values(), ids=MERGING)
def test_anything_else_acts_on_the_vanilla_tensor_and_is_recorded(function):
    x = IMAGES["even"]
    with merging.collected() as merges:
        found = function(x)
    assert merges
    if not isinstance(found, Octaves):
        torch.testing.assert_close(found, function(x.merge()))


def test_sums_of_features_with_other_parts_keep_the_larger_one():
    x = IMAGES["even"]
    y = features((8, 12), (4, 6), ((4, 4),))
    with merging.collected() as merges:
        for total in (x + y, y + x):
            assert total.parts == x.parts
            assert torch.equal(total.high, x.high + y.merge()[:, :6])
            torch.testing.assert_close(total.low, x.low + y.low[:, 2:])
    assert [merge.function for merge in merges] == ["add", "add"]


def test_writing_into_features():
    for x in IMAGES.values():
        y, wanted = Octaves(*(z.clone() for z in x), x.parts), x.merge()
        y[:, 1:4] = x[:, 2:5]
        wanted[:, 1:4] = x.merge()[:, 2:5] if y.parts != x.parts else wanted[:, 1:4]
        y[:1, 5:] = 0
        wanted[:1, 5:] = 0
        assert torch.equal(y.merge()[:, 4:], wanted[:, 4:])
        y[:, [0, 7]] = 1.5
        assert (y.merge()[:, [0, 7]] == 1.5).all()
        with pytest.raises(TypeError, match="cannot be written at"):
            y[:, :, 1:3] = 0


def test_gradients_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("shuffle", "shift", "group norm", "stack", "variance of space", "mean of channels"):
            for x in (IMAGES["uneven"], IMAGES["odd"]):
                maps = [z.clone().requires_grad_() for z in x]
                assert torch.autograd.gradcheck(
                    lambda high, low, f=ANY[name], p=x.parts: whole(f(Octaves(high, low, p))), maps, fast_mode=True
                ), name


COMPILED = ["shuffle", "shift", "group norm", "stack", "split", "cat", "mean of channels", "permute", "fold", "roll"]


@pytest.mark.parametrize("name", COMPILED)
def test_functions_compile_in_one_graph(name):
    torch._dynamo.reset()
    x = IMAGES["uneven"]
    call = lambda high, low: whole(ANY[name](Octaves(high, low, x.parts)))  # noqa: E731
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(*x), whole(ANY[name](x)))


def test_compiled_code_takes_octaves_and_goes_on_after_a_graph_break():
    torch._dynamo.reset()
    norm = nn.BatchNorm2d(8, dtype=torch.float64).eval()
    nn.init.uniform_(norm.weight)

    def call(x):
        x = torch.relu(norm(x))
        torch._dynamo.graph_break()
        return torch.cat((x, x[:, 2:]), 1)  # a tuple breaks the graph too

    for x in (IMAGES["even"], IMAGES["pieces"], IMAGES["uneven"]):
        found, wanted = torch.compile(call, backend="eager")(x), call(x)
        assert found.parts == wanted.parts
        assert torch.equal(found.merge(), wanted.merge())


def test_a_dropped_batch_dimension_leaves_space_first():
    x = features((8, 12), (4, 6), batch=1).permute(0, 3, 2, 1).reshape(-1, 8, 8)  # (W, H, C), as an LSTM takes rows
    wanted = features((8, 12), (4, 6), batch=1).merge().permute(0, 3, 2, 1).reshape(-1, 8, 8)
    assert torch.equal(x.merge(), wanted)
    torch.testing.assert_close(x.alike(wanted).low, x.low)
    with merging.collected():
        torch.testing.assert_close(x.sum(0).merge(), wanted.sum(0))


def test_any_order_of_all_channels_is_kept():
    for x in IMAGES.values():
        for order in ([1, 0, 2, 3, 4, 5, 6, 7], list(range(8)), [7, 6, 5, 4, 3, 2, 1, 7]):
            assert torch.equal(x[:, order].merge(), x.merge()[:, order])
        assert x[:, 8:].shape == x.merge()[:, 8:].shape


def test_functions_in_place_reach_the_features_even_where_they_merge():
    mask = (torch.arange(96).reshape(8, 12) % 5 == 0).expand(2, 8, 8, 12)
    for write in (
        lambda x: x.masked_fill_(mask, 3.0),
        lambda x: x.index_fill_(2, torch.tensor([1]), 0.5),
        lambda x: torch.relu_(input=x),
    ):
        x = Octaves(*(z.clone() for z in IMAGES["even"]))
        wanted = x.alike(write(x.merge().clone()))
        with merging.collected():
            write(x)
        torch.testing.assert_close(x.merge(), wanted.merge())
    with merging.collected(), pytest.raises(TypeError, match=r"unsqueeze_ cannot change .* in place: call it on"):
        Octaves(*IMAGES["even"]).unsqueeze_(0)
