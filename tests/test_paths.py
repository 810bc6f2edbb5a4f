"""The fast paths of an octave convolution against plain ones, and the gradient of their own."""

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from memory import count_saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from octvideo import Octaves, OctConv2d, OctConv3d
from octvideo.layers.paths import Kernel, Paths
from octvideo.layers.resampling import add_upsampled, average_pool, lay_channels_last, upsample

DOUBLE = {"dtype": torch.float64}
LAYERS = {
    "1 x 3 x 3": OctConv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), alpha=0.25, **DOUBLE),
    "1 x 3 x 3, stride 2": OctConv3d(8, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), alpha=0.5, **DOUBLE),
    "3 x 1 x 1": OctConv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), alpha=0.25, **DOUBLE),
    "3 x 1 x 1, stride 2 in time": OctConv3d(8, 8, (3, 1, 1), (2, 1, 1), (1, 0, 0), alpha=0.5, **DOUBLE),
    "3 x 3 x 3": OctConv3d(8, 8, 3, padding=1, alpha=0.25, **DOUBLE),
    "3 x 3 x 3, stride 2, temporal": OctConv3d(8, 8, 3, (1, 2, 2), 1, alpha=0.5, temporal=True, **DOUBLE),
    "1 x 1 x 1, no bias": OctConv3d(8, 8, 1, bias=False, alpha=0.25, **DOUBLE),
    "the last": OctConv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), alpha=0, **DOUBLE),
    "3 x 3": OctConv2d(8, 8, 3, padding=1, alpha=0.25, **DOUBLE),
    "3 x 3, dilated": OctConv2d(8, 8, 3, padding=2, dilation=2, alpha=0.25, **DOUBLE),
    "same": OctConv2d(8, 8, 3, padding="same", alpha=0.25, **DOUBLE),
}
PIECES = (((6, 2),), ((3, 1), (3, 1)), ((8, 0),))


def features(layer, parts, requires_grad=True):
    torch.manual_seed(0)
    size = (3, 5, 6) if len(layer.kernel_size) == 3 else (5, 6)
    half = [-(-n // factor) for n, factor in zip(size, layer._plan.paths.factors, strict=True)]
    high, low = (sum(piece[i] for piece in parts) for i in (0, 1))
    maps = [torch.randn(2, high, *size, **DOUBLE), torch.randn(2, low, *half, **DOUBLE)]
    return [x.requires_grad_(requires_grad) for x in maps]


def call(layer, parts, high, low, weight=None, bias=None):
    """The layer's output maps; a Tensor has no low one."""
    given = {} if weight is None else {"weight": weight} | ({} if bias is None else {"bias": bias})
    y = torch.func.functional_call(layer, given, (Octaves(high, low, parts),))
    return tuple(y) if isinstance(y, Octaves) else (y,)


def made_by(y):
    """The name of the function that y is from, before it was laid out as the weight is."""
    node = y.grad_fn
    return type(node.next_functions[0][0] if "Clone" in type(node).__name__ else node).__name__


@pytest.mark.parametrize("parts", PIECES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_paths_own_gradient_equals_autograds(name, parts, monkeypatch):
    layer = LAYERS[name]
    high, low = features(layer, parts)
    inputs = [x for x in (high, low, *layer.parameters()) if x.numel()]
    outputs = call(layer, parts, high, low)
    assert "_Summed" in made_by(outputs[0])
    weights = [torch.randn_like(y) for y in outputs]
    found = torch.autograd.grad(outputs, inputs, weights)
    monkeypatch.setattr(Paths, "_has_own_gradient", lambda *_: False)
    plain = call(layer, parts, high, low)
    assert "_Summed" not in made_by(plain[0])
    for y, wanted in zip(outputs, plain, strict=True):
        torch.testing.assert_close(y, wanted)
    for gradient, wanted in zip(found, torch.autograd.grad(plain, inputs, weights), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", ["1 x 3 x 3, stride 2", "3 x 1 x 1, stride 2 in time", "1 x 1 x 1, no bias", "3 x 3"])
def test_the_own_gradient_has_a_gradient(name):
    layer = LAYERS[name]
    high, low = features(layer, ((6, 2),))
    parameters = [x.detach().clone().requires_grad_() for x in layer.parameters()]
    assert torch.autograd.gradgradcheck(
        lambda *values: call(layer, ((6, 2),), *values), (high, low, *parameters), fast_mode=True
    )


@pytest.mark.parametrize("wanted", ["high", "low", "weight", "bias"])
def test_a_single_gradient_can_be_wanted(wanted):
    layer = LAYERS["1 x 3 x 3"]
    high, low = features(layer, ((6, 2),), requires_grad=False)
    values = {"high": high, "low": low, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
    everything = {key: value.detach().clone().requires_grad_() for key, value in values.items()}
    outputs = call(layer, ((6, 2),), **everything)
    sum(y.square().sum() for y in outputs).backward()
    values[wanted] = values[wanted].clone().requires_grad_()
    outputs = call(layer, ((6, 2),), **values)
    sum(y.square().sum() for y in outputs).backward()
    torch.testing.assert_close(values[wanted].grad, everything[wanted].grad)


@pytest.mark.parametrize("map_", ["high", "low"])
def test_gradients_of_one_output_map_alone_are_enough(map_, monkeypatch):
    layer = LAYERS["1 x 3 x 3"]
    high, low = features(layer, ((6, 2),))
    inputs = (high, low, layer.weight)
    found = torch.autograd.grad(getattr(layer(Octaves(high, low)), map_).square().sum(), inputs)
    monkeypatch.setattr(Paths, "_has_own_gradient", lambda *_: False)
    plain = getattr(layer(Octaves(high, low)), map_).square().sum()
    for gradient, wanted in zip(found, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_can_be_changed_in_place(name):
    layer = LAYERS[name]
    high, low = features(layer, ((6, 2),))
    nn.Sequential(layer, nn.ReLU(inplace=True))(Octaves(high, low))
    y = layer(Octaves(high, low))
    y += y
    sum(z.sum() for z in (y if isinstance(y, Octaves) else (y,))).backward()
    assert high.grad.isfinite().all()


def test_gradients_can_be_batched():
    layer = LAYERS["1 x 3 x 3"]
    high, low = features(layer, ((6, 2),))
    y = layer(Octaves(high, low)).low
    several = torch.randn(3, *y.shape, **DOUBLE)
    (found,) = torch.autograd.grad(y, high, several, is_grads_batched=True, retain_graph=True)
    for gradient, direction in zip(found, several, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, high, direction, retain_graph=True)[0])

    def loss(clip):
        return layer(clip[None]).high.square().sum()

    clips = torch.randn(3, 8, 3, 4, 6, **DOUBLE)
    each = torch.vmap(torch.func.grad(loss))(clips)
    for gradient, clip in zip(each, clips, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(clip))


def test_selective_checkpointing_may_keep_the_convolutions():
    layer = LAYERS["1 x 3 x 3"]
    high, low = features(layer, ((6, 2),))
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=keep)):
        y = run(Octaves(high, low))
        gradients.append(torch.autograd.grad(y.high.square().sum() + y.low.sum(), (high, low, layer.weight)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_leaves_float64_alone():
    layer = LAYERS["1 x 3 x 3"]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(Octaves(*features(layer, ((6, 2),)))).dtype == torch.float64


def test_torch_func_and_forward_mode_gradients_work():
    layer = LAYERS["1 x 3 x 3"]
    high, low = features(layer, ((6, 2),), requires_grad=False)

    def loss(high):
        return sum(y.square().sum() for y in call(layer, ((6, 2),), high, low))

    tracked = high.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(tracked), tracked)
    torch.testing.assert_close(torch.func.grad(loss)(high), wanted)
    direction = torch.randn_like(high)
    with torch.autograd.forward_ad.dual_level():
        value = loss(torch.autograd.forward_ad.make_dual(high, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(value).tangent, (wanted * direction).sum())


@pytest.mark.parametrize("name", ["1 x 3 x 3", "3 x 1 x 1", "3 x 3 x 3", "3 x 3"])
def test_autocast_keeps_bfloat16_maps_for_the_gradient(name):
    layer = copy.deepcopy(LAYERS[name]).to(torch.float32)
    high, low = (x.detach().float().requires_grad_() for x in features(layer, ((6, 2),)))
    saved = []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.dtype) or x, lambda x: x):
            y = layer(Octaves(high, low))
        inside = torch.autograd.grad(y.high.sum() + y.low.sum(), (high, layer.weight), retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in inside)
    assert y.dtype == torch.bfloat16
    assert set(saved) == {torch.bfloat16}
    wanted = layer(Octaves(high, low))
    gradients = []
    for maps in (y, wanted):
        gradients.append(torch.autograd.grad([maps.high.float().sum(), maps.low.float().sum()], (high, layer.weight)))
    for gradient, right in zip(*gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, right, rtol=0.05, atol=0.05 * float(right.abs().max()))


def test_a_layer_keeps_only_its_input_maps_for_the_gradient():
    torch.manual_seed(0)
    layer = OctConv3d(16, 16, (1, 3, 3), padding=(0, 1, 1), alpha=0.5)
    x = Octaves(*(lay_channels_last(y) for y in (torch.randn(1, 8, 2, 8, 8), torch.randn(1, 8, 2, 4, 4))))
    vanilla = nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1))
    full = torch.randn(1, 16, 2, 8, 8)
    kept = count_saved_bytes(layer, lambda: sum(y.sum() for y in layer(x)))
    assert (
        kept == 4 * (x.high.numel() + x.low.numel()) == 0.625 * count_saved_bytes(vanilla, lambda: vanilla(full).sum())
    )


def test_changing_an_input_map_before_the_gradient_is_an_error():
    layer = LAYERS["1 x 3 x 3"]
    high, low = features(layer, ((6, 2),), requires_grad=False)
    high, low = lay_channels_last(high), lay_channels_last(low)
    y = layer(Octaves(high, low))
    high.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.high.sum().backward()


@pytest.mark.parametrize("size", [(4, 6, 8), (4, 5, 7), (3, 6, 8), (1, 1, 1)])
@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("last", [True, False])
def test_adding_an_upsampled_map_equals_the_sum(size, factors, last):
    torch.manual_seed(0)
    high = torch.randn(2, 3, *size)
    low = torch.randn(2, 3, *(-(-n // factor) for n, factor in zip(size, factors, strict=True)))
    high, low = (lay_channels_last(high), lay_channels_last(low)) if last else (high, low)
    wanted = high + upsample(low, size)
    y = add_upsampled(high, low)
    assert torch.equal(y, wanted)
    assert y is high


def test_sums_of_windows_are_the_gradient_of_upsampling():
    for size in ((4, 6, 8), (3, 5, 7)):
        low = torch.randn(2, 3, *(-(-n // 2) for n in size), requires_grad=True)
        gradient = torch.randn(2, 3, *size)
        (wanted,) = torch.autograd.grad(upsample(low, size), low, gradient)
        torch.testing.assert_close(average_pool(gradient, (2, 2, 2), sums=True), wanted)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups", "flat"),
    [
        ((1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1), 1, True),
        ((1, 3, 3), (1, 1, 1), (0, 2, 2), (1, 2, 2), 2, True),
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1, True),
        ((1, 1, 1), (1, 2, 2), (0, 0, 0), (1, 1, 1), 4, True),
        ((3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1, True),
        ((3, 1, 1), (2, 1, 1), (2, 0, 0), (2, 1, 1), 2, True),
        ((7, 1, 1), (4, 1, 1), (3, 0, 0), (1, 1, 1), 4, True),
        ((3, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1, False),
        ((1, 3, 3), (2, 1, 1), (0, 1, 1), (1, 1, 1), 1, False),
        ((1, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1, False),
        ((3, 1, 1), (1, 2, 2), (1, 0, 0), (1, 1, 1), 1, False),
        ((3, 3, 3), (1, 2, 2), (1, 1, 1), (1, 1, 1), 1, False),
    ],
)
def test_factorised_convolutions_run_in_2d_and_equal_conv3d(kernel, stride, padding, dilation, groups, flat):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 10, 11, dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    wanted = F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    with (
        mock.patch.object(F, "conv2d", wraps=F.conv2d) as images,
        mock.patch.object(F, "conv3d", wraps=F.conv3d) as clips,
    ):
        y = Kernel(kernel, stride, padding, dilation).convolve(lay_channels_last(x), weight, bias, groups)
    assert (images.call_count, clips.call_count) == ((1, 0) if flat else (0, 1))
    torch.testing.assert_close(y, wanted)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_single_clip_keeps_its_layout_in_convolutions_over_time():
    clip = torch.randn(1, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    odd = clip.as_strided(clip.shape, (4, *clip.stride()[1:]))  # as elementwise functions leave a batch of one
    kernel = Kernel((3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1))
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as images:
        kernel.convolve(odd, torch.randn(8, 4, 3, 1, 1), None)
    assert images.call_args.args[0].stride() == (3 * 30 * 4, 1, 30 * 4, 4)


def test_octave_maps_come_out_channels_last_whatever_the_input_is():
    for layer, size, last in (
        (OctConv3d(4, 8, 3, padding=1, alpha=0.5), (2, 4, 6), torch.channels_last_3d),
        (OctConv2d(4, 8, 3, padding=1, alpha=0.5), (4, 6), torch.channels_last),
        (OctConv3d(4, 8, (3, 1, 1), padding=(1, 0, 0), alpha=0.5), (2, 4, 6), torch.channels_last_3d),
        (OctConv3d(4, 8, (3, 1, 1), padding=(1, 0, 0), groups=2, alpha=0.5), (2, 4, 6), torch.channels_last_3d),
    ):
        x = layer(torch.randn(1, 4, *size))
        x = type(layer)(8, 8, layer.kernel_size, padding=layer.padding, groups=layer.groups, alpha=0.25)(x)
        assert x.high.is_contiguous(memory_format=last)
        assert x.low.is_contiguous(memory_format=last)


def test_shortcuts_with_a_stride_in_time_have_the_vanilla_gradients():
    """torch 2.14 writes out of bounds in the gradient of such a weight, in channels_last."""
    torch.manual_seed(0)
    layer = OctConv3d(8, 8, 1, stride=(2, 1, 1), alpha=0.25, dtype=torch.float64)
    vanilla = nn.Conv3d(8, 8, 1, stride=(2, 1, 1), dtype=torch.float64)
    vanilla.load_state_dict(layer.state_dict())
    frames = torch.randn(2, 8, 5, 1, 1, dtype=torch.float64)  # constant in space: the same at both resolutions
    clip = frames.expand(2, 8, 5, 4, 6).clone().requires_grad_()
    twin = clip.detach().clone().requires_grad_()
    layer(clip).merge().square().sum().backward()
    vanilla(twin).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, vanilla.weight.grad)
    torch.testing.assert_close(clip.grad.sum((3, 4)), twin.grad.sum((3, 4)))
