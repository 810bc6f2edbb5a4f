"""The layer against an independent float64 reference of the paper's equations."""

import copy
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from octvideo import Octaves, OctConv2d, OctConv3d
from octvideo.layers.convolution import OctaveOptions
from octvideo.layers.parts import groups_alike
from octvideo.layers.shares import split_channels

PAD = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def reference_convolution(x, weight, stride, padding, dilation, padding_mode="zeros"):
    """A dense convolution of (C, T, H, W) by loops over the kernel, in numpy."""
    kernel = weight.shape[2:]
    x = np.pad(x, [(0, 0)] + [(p, p) if isinstance(p, int) else p for p in padding], mode=PAD[padding_mode])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[1:], kernel, stride, dilation, strict=True)]
    out = np.zeros((weight.shape[0], *sizes))
    for offset in itertools.product(*map(range, kernel)):
        window = x[
            (
                slice(None),
                *(
                    slice(o * d, o * d + (n - 1) * s + 1, s)
                    for o, d, n, s in zip(offset, dilation, sizes, stride, strict=True)
                ),
            )
        ]
        out += np.einsum("oc,cthw->othw", weight[(slice(None), slice(None), *offset)], window)
    return out


def reference_pool(x, temporal=False):
    """Means of 2 x 2 cells; a cut window has the mean of what it has."""
    cells = (
        [range(0, n, 2) for n in x.shape[1:]]
        if temporal
        else [range(x.shape[1]), *(range(0, n, 2) for n in x.shape[2:])]
    )
    out = np.zeros((x.shape[0], *map(len, cells)))
    for (i, t), (j, h), (k, w) in itertools.product(*map(enumerate, cells)):
        out[:, i, j, k] = x[:, t : t + (2 if temporal else 1), h : h + 2, w : w + 2].mean((1, 2, 3))
    return out


def reference_upsample(x, size):
    for axis, n in enumerate(size, 1):
        if x.shape[axis] != n:
            x = np.repeat(x, 2, axis).take(range(n), axis)
    return x


def reference_octconv(high, low, weight, bias, high_out, stride, padding, dilation, temporal=False):
    """Equations 3 and 4 of the paper for one clip: Y^H = f(X^H) + up(f(X^L)), Y^L = f(X^L) + f(pool(X^H))."""
    time_stride = (stride[0], 1, 1)

    def f(x, rows, columns):
        return reference_convolution(x, weight[rows, columns], time_stride, padding, dilation)

    columns_high, columns_low = slice(high.shape[0]), slice(high.shape[0], None)
    rows_high, rows_low = slice(high_out), slice(high_out, None)
    low_to_high = f(low, rows_high, columns_low)
    if stride[1] == 2:  # the official rule: pool both maps first
        shape = high.shape
        high, low = reference_pool(high), reference_pool(low)
        assert high.shape[2:] == tuple(-(-n // 2) for n in shape[2:])
    out_high = f(high, rows_high, columns_high)
    out_high += reference_upsample(low_to_high, out_high.shape[1:]) + bias[:high_out, None, None, None]
    out_low = f(low, rows_low, columns_low) + f(reference_pool(high, temporal), rows_low, columns_high)
    return out_high, out_low + bias[high_out:, None, None, None]


CASES = [
    # in, out, kernel, stride, dilation, alpha in, alpha out, (T, H, W), temporal
    (8, 12, (3, 3, 3), (1, 1, 1), (1, 1, 1), 0.25, 0.25, (4, 8, 8), False),
    (8, 12, (1, 3, 3), (1, 1, 1), (1, 1, 1), 0.5, 0.25, (3, 7, 9), False),
    (7, 5, (3, 1, 1), (1, 1, 1), (1, 1, 1), 0.3, 0.6, (5, 6, 5), False),
    (8, 8, (1, 3, 3), (1, 2, 2), (1, 1, 1), 0.25, 0.5, (2, 8, 8), False),
    (8, 8, (3, 3, 3), (2, 2, 2), (1, 1, 1), 0.25, 0.5, (5, 7, 13), False),
    (8, 8, (7, 1, 1), (4, 1, 1), (1, 1, 1), 0.25, 0.25, (9, 4, 4), False),
    (8, 8, (1, 3, 3), (1, 1, 1), (1, 2, 2), 0.25, 0.25, (2, 9, 8), False),
    (8, 8, (1, 1, 1), (1, 1, 1), (1, 1, 1), 0.25, 0.25, (1, 1, 1), False),
    (8, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1), 0.25, 0.5, (5, 6, 7), True),
    (8, 8, (3, 3, 3), (2, 2, 2), (1, 1, 1), 0.5, 0.25, (6, 9, 8), True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_float64_reference_of_the_equations(case):
    channels, filters, kernel, stride, dilation, alpha_in, alpha, size, temporal = case
    torch.manual_seed(0)
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    layer = OctConv3d(
        channels, filters, kernel, stride, padding, dilation, dtype=torch.float64, alpha=alpha, temporal=temporal
    )
    high_in, low_in = split_channels(channels, alpha_in)
    half = [-(-n // 2) if temporal or axis else n for axis, n in enumerate(size)]
    x = Octaves(torch.randn(2, high_in, *size).double(), torch.randn(2, low_in, *half).double())
    y = layer(x)
    high_out, low_out = split_channels(filters, alpha)
    assert (y.high.shape[1], y.low.shape[1]) == (high_out, low_out)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    for clip in range(2):
        high, low = reference_octconv(
            x.high[clip].numpy(), x.low[clip].numpy(), weight, bias, high_out, stride, padding, dilation, temporal
        )
        np.testing.assert_allclose(y.high[clip].detach().numpy(), high, rtol=0, atol=1e-10)
        np.testing.assert_allclose(y.low[clip].detach().numpy(), low, rtol=0, atol=1e-10)
    vanilla = nn.Conv3d(channels, filters, kernel, stride, padding, dilation)
    assert y.shape == vanilla(torch.zeros(2, channels, *size)).shape


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_first_and_last_layer_are_the_reference_with_one_side_empty(alpha):
    torch.manual_seed(0)
    first = OctConv3d(6, 8, 3, padding=1, dtype=torch.float64, alpha=alpha)
    last = OctConv3d(8, 4, 3, padding=1, dtype=torch.float64, alpha=0)
    x = torch.randn(1, 6, 3, 7, 8).double()
    middle = first(x)
    out = last(middle)
    assert isinstance(middle, Octaves)
    assert isinstance(out, torch.Tensor)
    ones = {"stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1)}
    high_out = split_channels(8, alpha)[0]
    high, low = reference_octconv(
        x[0].numpy(),
        np.zeros((0, 3, 4, 4)),
        first.weight.detach().numpy(),
        first.bias.detach().numpy(),
        high_out,
        **ones,
    )
    np.testing.assert_allclose(middle.high[0].detach().numpy(), high, rtol=0, atol=1e-10)
    np.testing.assert_allclose(middle.low[0].detach().numpy(), low, rtol=0, atol=1e-10)
    high, low = reference_octconv(high, low, last.weight.detach().numpy(), last.bias.detach().numpy(), 4, **ones)
    np.testing.assert_allclose(out[0].detach().numpy(), high, rtol=0, atol=1e-10)
    assert low.shape[0] == 0


def test_two_dimensional_layer_is_the_three_dimensional_one_on_a_single_frame():
    torch.manual_seed(0)
    flat = OctConv2d(8, 8, 3, stride=2, padding=1, alpha=0.5)
    deep = OctConv3d(8, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), alpha=0.5)
    deep.load_state_dict({"weight": flat.weight[:, :, None], "bias": flat.bias})
    x = Octaves(torch.randn(2, 6, 9, 10), torch.randn(2, 2, 5, 5))
    y, z = flat(x), deep(Octaves(x.high[:, :, None], x.low[:, :, None]))
    torch.testing.assert_close(y.high, z.high[:, :, 0])
    torch.testing.assert_close(y.low, z.low[:, :, 0])


def test_alpha_zero_on_a_tensor_is_nn_conv3d_bit_for_bit():
    torch.manual_seed(0)
    layer = OctConv3d(6, 8, 3, 2, 1, alpha=0)
    vanilla = nn.Conv3d(6, 8, 3, 2, 1)
    vanilla.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 5, 11, 8)
    assert torch.equal(layer(x), vanilla(x))


@pytest.mark.parametrize("alpha", [0.125, 0.25, 0.5, 0.75, 0.875, 1.0])
def test_cost_is_the_papers_formula_exactly(alpha):
    """Table 1 of the paper: 1 - 0.75 a (2 - a) of the dense multiply-adds."""
    layer = OctConv3d(32, 64, (1, 3, 3), padding=(0, 1, 1), bias=False, alpha=alpha)
    high, low = split_channels(32, alpha)
    x = Octaves(torch.zeros(1, high, 4, 8, 8), torch.zeros(1, low, 4, 4, 4))
    with FlopCounterMode(display=False) as counter:
        layer(x)
    dense = 2 * 64 * 32 * 9 * 4 * 8 * 8
    assert counter.get_total_flops() == dense * (1 - 0.75 * alpha * (2 - alpha))


@pytest.mark.parametrize(
    ("kernel", "padding", "temporal"),
    [
        ((1, 3, 3), (0, 1, 1), False),
        ((1, 3, 3), (0, 1, 1), True),
        ((1, 3, 3), (1, 1, 1), False),  # adds frames
        ((1, 3, 3), "same", False),
        ((1, 1, 1), 0, True),
        ((3, 3, 3), (1, 1, 1), True),
        ((3, 3, 3), (0, 1, 1), False),
    ],
)
def test_the_memory_layout_does_not_change_the_result(kernel, padding, temporal):
    torch.manual_seed(0)
    layer = OctConv3d(8, 8, kernel, padding=padding, alpha=0.25, temporal=temporal)
    x = Octaves(torch.randn(2, 6, 4, 7, 8), torch.randn(2, 2, 2 if temporal else 4, 4, 4))
    y = layer(x)
    z = layer(Octaves(*(map_.contiguous(memory_format=torch.channels_last_3d) for map_ in x)))
    torch.testing.assert_close(z.high, y.high)
    torch.testing.assert_close(z.low, y.low)


def dense_weight(layer):
    """A grouped weight as the block-diagonal weight of a dense convolution, with the same vanilla channels."""
    weight = layer.weight.detach().numpy()
    dense = np.zeros((layer.out_channels, layer.in_channels, *weight.shape[2:]))
    rows, columns = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for group in range(layer.groups):
        here = slice(group * rows, (group + 1) * rows)
        dense[here, group * columns : (group + 1) * columns] = weight[here]
    return dense


def low_outputs(layer, low_inputs):
    """Which output channels are low: the last ones of each group; of a depthwise layer those of low inputs."""
    low = split_channels(layer.out_channels, layer.alpha)[1]
    if layer.groups == layer.in_channels > 1:
        return np.repeat(low_inputs, layer.out_channels // layer.in_channels) & (low > 0)
    rows = layer.out_channels // layer.groups
    return np.arange(layer.out_channels) % rows >= rows - low // layer.groups


def reference_layer(layer, high, low, low_inputs):
    """The layer in numpy: the dense equations on the channels that are high and those that are low, for one clip."""
    weight = dense_weight(layer)
    if weight.ndim == 4:
        weight, high, low = weight[:, :, None], high[:, None], low[:, None]
    spatial = len(layer.kernel_size) == 2
    padding = layer.padding
    if padding == "same":  # of an odd sum the larger half comes behind
        sums = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = [(both // 2, both - both // 2) for both in sums]
    stride, padding, dilation = (
        (filler, *value) if spatial else value
        for filler, value in ((1, layer.stride), (0, padding), (1, layer.dilation))
    )
    low_rows = low_outputs(layer, low_inputs)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().numpy()

    def f(x, rows, columns):
        time = (stride[0], 1, 1)
        return reference_convolution(x, weight[rows][:, columns], time, padding, dilation, layer.padding_mode)

    from_low = f(low, ~low_rows, low_inputs)  # at the low input's resolution, which a stride does not change
    pooled_high, pooled_low = high, low
    for axis in (2, 3):
        if stride[axis - 1] == 2:
            pooled_high, pooled_low = pool_axis(pooled_high, axis), pool_axis(pooled_low, axis)
    out_high = f(pooled_high, ~low_rows, ~low_inputs)
    out_high = out_high + reference_upsample(from_low, out_high.shape[1:]) + bias[~low_rows, None, None, None]
    down = pool_axis(pool_axis(pooled_high, 2), 3)
    down = pool_axis(down, 1) if layer.temporal else down
    out_low = f(down, low_rows, ~low_inputs) + f(pooled_low, low_rows, low_inputs) + bias[low_rows, None, None, None]
    return (out_high[:, 0], out_low[:, 0]) if spatial else (out_high, out_low)


def pool_axis(x, axis):
    """Means of two neighbours along an axis; a last one without a neighbour is its own mean."""
    pairs = [x.take(range(i, min(i + 2, x.shape[axis])), axis).mean(axis) for i in range(0, x.shape[axis], 2)]
    return np.stack(pairs, axis)


@st.composite
def layers(draw):
    """Any layer, and the size and share of its input."""
    dimensions = draw(st.sampled_from([2, 3]))
    kind = draw(st.sampled_from(["dense", "dense", "grouped", "depthwise"]))
    alpha = draw(st.sampled_from([0.0, 0.125, 0.25, 0.3, 0.5, 0.75, 1.0]))
    if kind == "dense":
        groups, channels, filters = 1, draw(st.integers(1, 64)), draw(st.integers(1, 64))
    elif kind == "grouped":
        groups = draw(st.sampled_from([2, 3, 4]))
        channels, filters = groups * draw(st.integers(2, 16)), groups * draw(st.integers(1, 16))
        assume(split_channels(filters, alpha)[1] % groups == 0)
    else:
        groups = channels = draw(st.integers(2, 64))
        filters = channels * draw(st.integers(1, 2))
        assume(split_channels(filters, alpha)[1] % (filters // channels) == 0)
    same = draw(st.booleans())
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 4] if same else [1, 3, 5])) for _ in range(dimensions))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dimensions))
    stride = tuple(draw(st.integers(1, 3 if dimensions == 3 and axis == 0 else 2)) for axis in range(dimensions))
    size = tuple(draw(st.integers(1, 7)) for _ in range(dimensions))
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    if same:
        stride, padding = (1,) * dimensions, "same"
    layer = (OctConv3d if dimensions == 3 else OctConv2d)(
        channels,
        filters,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(list(PAD))),
        dtype=torch.float64,
        alpha=alpha,
        temporal=dimensions == 3 and draw(st.booleans()),
    )
    share = alpha if kind == "depthwise" and alpha > 0 else draw(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]))
    return layer, split_channels(channels, share)[1], size, draw(st.booleans())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layers())
def test_any_layer_equals_the_float64_reference_and_has_the_vanilla_shape(case):
    layer, low_in, size, last_format = case
    torch.manual_seed(0)
    half = [-(-n // factor) for n, factor in zip(size, layer._plan.paths.factors, strict=True)]
    high = torch.randn(1, layer.in_channels - low_in, *size, dtype=torch.float64)
    low = torch.randn(1, low_in, *half, dtype=torch.float64)
    x = Octaves(high, low)
    if last_format and len(size) == 3:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    y = layer(x)
    low_inputs = np.arange(layer.in_channels) >= layer.in_channels - low_in
    wanted_high, wanted_low = reference_layer(layer, high[0].numpy(), low[0].numpy(), low_inputs)
    if not isinstance(y, Octaves):
        y, wanted_low = Octaves(y, y[:, :0]), y[0, :0].detach().numpy()
    if wanted_high.size:
        np.testing.assert_allclose(y.high[0].detach().numpy(), wanted_high, rtol=0, atol=1e-10)
    if wanted_low.size:
        np.testing.assert_allclose(y.low[0].detach().numpy(), wanted_low, rtol=0, atol=1e-10)
    kinds = [kind for pair in y.parts for kind, count in enumerate(pair) for _ in range(count)]
    assert np.array_equal(np.array(kinds, bool), low_outputs(layer, low_inputs))
    vanilla = (nn.Conv2d if len(size) == 2 else nn.Conv3d)(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    assert y.shape == vanilla(torch.zeros(1, layer.in_channels, *size)).shape


@pytest.mark.parametrize(
    ("arguments", "alpha_in", "size"),
    [
        ({"kernel_size": 3, "padding": 1}, 0.25, (2, 3, 4)),
        ({"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "stride": (1, 2, 2)}, 0.5, (1, 5, 4)),
        ({"kernel_size": 3, "padding": "same", "padding_mode": "circular"}, 0.25, (2, 3, 3)),
        ({"kernel_size": 3, "padding": 1, "stride": (2, 1, 1), "temporal": True}, 0.5, (3, 3, 4)),
        ({"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "groups": 2, "alpha": 0.5}, 0.25, (1, 3, 4)),
        ({"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "groups": 4}, 0.25, (1, 3, 4)),
        ({"kernel_size": 1, "alpha": 1.0}, 1.0, (1, 3, 3)),
    ],
    ids=str,
)
def test_gradients_are_right(arguments, alpha_in, size):
    torch.manual_seed(0)
    layer = OctConv3d(4, 4, dtype=torch.float64, **{"alpha": 0.25} | arguments)
    high_in, low_in = split_channels(4, alpha_in)
    half = [-(-n // factor) for n, factor in zip(size, layer._plan.paths.factors, strict=True)]
    high = torch.randn(2, high_in, *size, dtype=torch.float64, requires_grad=True)
    low = torch.randn(2, low_in, *half, dtype=torch.float64, requires_grad=True)

    def apply(high, low, weight, bias):
        return tuple(torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (Octaves(high, low),)))

    assert torch.autograd.gradcheck(apply, (high, low, layer.weight, layer.bias))


@pytest.mark.parametrize("cases", [(8, 4, 0.5), (32, 4, 0.25), (24, 2, 0.25)], ids=str)
def test_grouped_layer_costs_what_a_dense_one_does_in_proportion(cases):
    channels, groups, alpha = cases
    layer = OctConv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), groups=groups, alpha=alpha)
    high, low = split_channels(channels, alpha)
    with FlopCounterMode(display=False) as counter:
        layer(Octaves(torch.zeros(1, high, 2, 8, 8), torch.zeros(1, low, 2, 4, 4)))
    dense = 2 * channels * channels // groups * 9 * 2 * 8 * 8
    assert counter.get_total_flops() == dense * (1 - 0.75 * alpha * (2 - alpha))


@pytest.mark.parametrize(
    ("parts", "groups", "runs"),
    [
        (((6, 2),), 1, ((1, ((6, 2),)),)),
        (((6, 2),), 2, ((1, ((4, 0),)), (1, ((2, 2),)))),
        (((6, 2),), 4, ((3, ((2, 0),)), (1, ((0, 2),)))),
        (((3, 1), (3, 1)), 2, ((2, ((3, 1),)),)),
        (((3, 1), (3, 1)), 1, ((1, ((3, 1), (3, 1))),)),
        (((5, 1), (2, 4)), 3, ((1, ((4, 0),)), (1, ((1, 1), (2, 0))), (1, ((0, 4),)))),
    ],
)
def test_groups_alike_follow_the_vanilla_order(parts, groups, runs):
    assert groups_alike(parts, groups) == runs


def test_depthwise_layer_keeps_each_channel_in_its_octave():
    torch.manual_seed(0)
    layer = OctConv3d(8, 8, 3, padding=1, groups=8, alpha=0.25)
    x = Octaves(torch.randn(1, 6, 3, 8, 8), torch.randn(1, 2, 3, 4, 4))
    y = layer(x)
    vanilla = nn.Conv3d(2, 2, 3, padding=1, groups=2)
    vanilla.load_state_dict({"weight": layer.weight[6:], "bias": layer.bias[6:]})
    torch.testing.assert_close(y.low, vanilla(x.low))
    assert y.high.shape == x.high.shape
    plain = layer(torch.randn(1, 8, 3, 8, 8))
    assert plain.low.shape == (1, 2, 3, 4, 4)
    layer.set_options(OctaveOptions(0))
    assert layer(x).shape == (1, 8, 3, 8, 8)


@pytest.mark.parametrize("alpha", ["0.1", "0.125", "0.2", "0.25", "0.3", "0.5", "0.75", "0.8", "0.9", "1"])
def test_split_is_exact_and_the_same_everywhere(alpha):
    for channels in range(1, 257):
        high, low = split_channels(channels, float(alpha))
        assert high + low == channels
        assert low == math.floor(Fraction(alpha) * channels)
        x = torch.zeros(1, 1, 2, 2)
        y = nn.BatchNorm2d(channels).eval()(OctConv2d(1, channels, 1, alpha=float(alpha))(x))
        assert y.shape == (1, channels, 2, 2)
        z = OctConv2d(channels, channels, 1, alpha=float(alpha))(y)
        if low:
            assert y.high.shape[1] == z.high.shape[1] == high
            assert y.low.shape[1] == z.low.shape[1] == low
        depthwise = OctConv2d(channels, channels, 1, groups=channels, alpha=float(alpha))(y)
        assert depthwise.shape == y.shape


def test_split_is_not_fooled_by_float_rounding():
    assert split_channels(10, 0.3) == (7, 3)
    assert split_channels(15, 0.2) == (12, 3)


def test_low_channels_can_be_rounded_to_a_multiple_that_leaves_some_of_either_kind():
    assert [split_channels(channels, 0.1, 16)[1] for channels in (64, 128, 256, 512, 1024)] == [16, 16, 32, 48, 96]
    assert split_channels(64, 0.375, 16) == (32, 32)  # 24 lies between: up
    assert split_channels(64, 0.95, 16) == (16, 48)
    assert split_channels(40, 0.9, 16) == (24, 16)  # low in multiples, whatever is left
    assert split_channels(31, 0.5, 16) == (16, 15)  # no two multiples: as without
    assert split_channels(64, 0, 16) == (64, 0)
    assert split_channels(60, 1, 16) == (0, 60)
    for channels, alpha in itertools.product(range(1, 130), (0.1, 0.25, 0.5, 0.9)):
        assert split_channels(channels, alpha, 1) == split_channels(channels, alpha)


def test_a_depthwise_layer_takes_any_split_of_its_input():
    torch.manual_seed(0)
    layer = OctConv2d(64, 64, 3, padding=1, groups=64, alpha=0.5, round_to=16)
    vanilla = nn.Conv2d(64, 64, 3, padding=1, groups=64)
    vanilla.load_state_dict(layer.state_dict())
    for high in (44, 0, 64):
        x = Octaves(torch.randn(1, high, 4, 4), torch.randn(1, 64 - high, 2, 2))
        y = layer(x)
        assert (y.high.shape[1], y.low.shape[1]) == (high, 64 - high)
        torch.testing.assert_close(y.high, vanilla(x.merge())[:, :high])
    with pytest.raises(ValueError, match="round_to 16 gives 16 low output channels, but 4 low input channels"):
        OctConv3d(16, 32, 3, padding=1, groups=16, alpha=0.25, round_to=16)


def test_rounded_layers_follow_each_other():
    torch.manual_seed(0)
    first = OctConv3d(3, 64, 1, alpha=0.1, round_to=16)
    depthwise = OctConv3d(64, 64, 3, padding=1, groups=64, alpha=0.1, round_to=16)
    last = OctConv3d(64, 32, 1, groups=2, alpha=0.3, round_to=16)
    x = last(depthwise(first(torch.randn(1, 3, 2, 8, 8))))
    assert (x.high.shape[1], x.low.shape[1]) == (16, 16)
    assert "round_to=16" in str(first)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_channels(8, 1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: split_channels(0, 0.5), "channels and round_to must be at least 1, got 0 and 1"),
        (lambda: split_channels(8, 0.5, 0), "channels and round_to must be at least 1, got 8 and 0"),
        (lambda: OctConv3d(8, 8, 1, groups=4, alpha=0.25), "alpha 0.25 splits 8 output channels into 6 high and 2 low"),
        (lambda: OctConv2d(8, 8, 1, downsample="avg"), r"downsample must be \"conv\" or \"pool\", got 'avg'"),
        (lambda: OctConv2d(8, 8, 1, temporal=True), "temporal=True needs a 3-D convolution"),
        (
            lambda: OctConv3d(8, 8, 3, stride=3, padding=1)(torch.zeros(1, 8, 4, 9, 9)),
            r"stride of 1 or 2, got stride \(3",
        ),
        (lambda: OctConv3d(8, 8, 3)(torch.zeros(1, 8, 4, 9, 9)), "padding that keeps the size"),
        (
            lambda: OctConv3d(8, 8, 1, temporal=True)(Octaves(torch.zeros(1, 6, 4, 8, 8), torch.zeros(1, 2, 4, 4, 4))),
            r"temporal=True wants a low map of size \(2, 4, 4\)",
        ),
        (
            lambda: OctConv3d(8, 8, 1)(Octaves(torch.zeros(1, 8, 4, 8, 8), torch.zeros(1, 2, 4, 4, 4))),
            r"expected \(B, 8, T, H, W\), got \(1, 10, 4, 8, 8\)",
        ),
        (lambda: OctConv2d(8, 8, 1)(torch.zeros(1, 4, 9, 9)), r"expected \(B, 8, H, W\), got \(1, 4, 9, 9\)"),
        (lambda: OctConv3d(8, 8, 1)(torch.zeros(8, 4, 9, 9)), r"expected \(B, 8, T, H, W\), got \(8, 4, 9, 9\)"),
        (
            lambda: OctConv3d(4, 12, 1, groups=4, alpha=0.4)(torch.zeros(1, 4, 4, 8, 8)),
            "gives 4 low output channels, but 1 low input channels of a depthwise convolution with 3 outputs",
        ),
    ],
)
def test_impossible_layers_say_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_printing_a_layer_shows_its_alpha():
    assert "alpha=0.25" in repr(OctConv3d(8, 8, 1))
    assert "temporal=True" in repr(OctConv3d(8, 8, 1, temporal=True))


@pytest.mark.parametrize("alpha", [0.125, 0.25, 0.5])
def test_default_initialisation_keeps_the_vanilla_variance_on_white_noise(alpha):
    torch.manual_seed(0)
    layer, vanilla = OctConv3d(64, 64, 3, padding=1, alpha=alpha), nn.Conv3d(64, 64, 3, padding=1)
    high, low = split_channels(64, alpha)
    y = layer(Octaves(torch.randn(4, high, 8, 16, 16), torch.randn(4, low, 8, 8, 8)))
    wanted = vanilla(torch.randn(4, 64, 8, 16, 16)).var()
    torch.testing.assert_close(y.high.var(), wanted, rtol=0.1, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_bias_is_added_exactly_once(groups):
    layer = OctConv3d(8, 8, 3, padding=1, groups=groups, alpha=0.5)
    nn.init.zeros_(layer.weight)
    for x in (torch.randn(1, 8, 2, 4, 4), Octaves(torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 2, 2, 2))):
        assert torch.equal(layer(x).merge(), layer.bias.view(1, 8, 1, 1, 1).expand(1, 8, 2, 4, 4))


@pytest.mark.parametrize("channels", [(3, 8, 1), (8, 8, 1), (8, 8, 2), (8, 8, 8)])
def test_an_empty_batch_gives_empty_maps(channels):
    channels, filters, groups = channels
    layer = OctConv3d(channels, filters, 3, (1, 2, 2), 1, groups=groups, alpha=0.5)
    y = layer(torch.zeros(0, channels, 4, 7, 8))
    assert (y.high.shape, y.low.shape) == ((0, filters // 2, 4, 4, 4), (0, filters // 2, 4, 2, 2))
    assert layer.set_options(OctaveOptions(0)) is None
    if channels == filters:
        assert layer(y).shape == (0, filters, 4, 2, 2)


def test_grouped_layers_keep_the_vanilla_meaning_of_their_channels():
    torch.manual_seed(0)
    network = nn.Sequential(
        OctConv2d(4, 16, 1, alpha=0.25),
        OctConv2d(16, 32, 3, padding=1, groups=4, padding_mode="circular", alpha=0.5),
        OctConv2d(32, 16, 3, padding=1, groups=2, padding_mode="circular", alpha=0.25),
        OctConv2d(16, 8, 1, alpha=0),
    ).double()
    x = torch.randn(2, 4, 1, 1, dtype=torch.float64).expand(2, 4, 6, 5)
    y = network(x)
    for layer in network:
        layer.set_options(OctaveOptions(0))
    torch.testing.assert_close(y, network(x), rtol=1e-12, atol=1e-12)


def test_depthwise_layers_follow_the_pieces_of_a_concatenation():
    torch.manual_seed(0)
    layer = OctConv2d(12, 12, 3, padding=1, groups=12, alpha=0.25)
    x = Octaves(torch.randn(1, 9, 6, 6), torch.randn(1, 3, 3, 3), ((4, 1), (5, 2)))
    y = layer(x)
    assert y.parts == x.parts
    vanilla = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    vanilla.load_state_dict(layer.state_dict())
    only_high = vanilla(Octaves(x.high, torch.zeros_like(x.low), x.parts).merge())
    torch.testing.assert_close(y.merge()[:, :4], only_high[:, :4])
    torch.testing.assert_close(y.merge()[:, 5:10], only_high[:, 5:10])


def test_downsample_pool_averages_between_plain_tensors_too():
    torch.manual_seed(0)
    layer = OctConv3d(4, 4, 3, (1, 2, 2), 1, alpha=0, downsample="pool")
    x = torch.randn(1, 4, 3, 7, 8)
    strided = nn.Conv3d(4, 4, 3, 1, 1)
    strided.load_state_dict(layer.state_dict())
    pooled = torch.nn.functional.avg_pool3d(x, (1, 2, 2), ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(layer(x), strided(pooled))
    assert "downsample='pool'" in repr(layer)


def test_a_plain_tuple_is_no_input():
    with pytest.raises(TypeError, match="expected a Tensor or Octaves, got tuple"):
        OctConv3d(8, 8, 1)((torch.zeros(1, 6, 1, 4, 4), torch.zeros(1, 2, 1, 2, 2)))


def test_arguments_of_nn_conv3d_may_change_after_the_octave_options():
    torch.manual_seed(0)
    layer, wanted = OctConv3d(8, 8, 3, padding=1, alpha=0.5), OctConv3d(8, 8, 3, (1, 2, 2), 1, alpha=0.5)
    wanted.load_state_dict(layer.state_dict())
    layer.stride = (1, 2, 2)
    x = torch.randn(1, 8, 2, 8, 8)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(torch.equal(*maps) for maps in zip(other(x), wanted(x), strict=True))


def test_options_that_do_not_fit_change_nothing():
    layer = OctConv3d(8, 8, 1, groups=2, alpha=0.5)
    with pytest.raises(ValueError, match="groups 2 must divide both"):
        layer.set_options(OctaveOptions(0.125))
    assert layer(torch.randn(1, 8, 2, 4, 4)).low.shape[1] == 4


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("alpha", [0, 0.5])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_code_may_edit_the_arguments_that_forward_reads(groups, alpha, before, mode):
    """As dilated backbones do, without nn.Conv2d's `_reversed_padding_repeated_twice`, which only other modes read."""
    torch.manual_seed(0)
    layer, vanilla = (
        kind(8, 8, 3, 2, 1, groups=groups, padding_mode=mode, **options)
        for kind, options in ((OctConv2d, {"alpha": 0.5}), (nn.Conv2d, {}))
    )
    vanilla.load_state_dict(layer.state_dict())
    options = OctaveOptions(alpha, channels_last=True)
    if before:
        layer.set_options(options)
    edits = {"stride": 1, "dilation": [2, 2], "padding": (2, 2)} if mode == "zeros" else {"stride": (1, 1)}
    for name, value in edits.items():
        setattr(layer, name, value)
        setattr(vanilla, name, value)
    layer.set_options(options)
    x = Octaves(torch.randn(1, 4, 9, 8), torch.randn(1, 4, 5, 4))
    for input in (x, x.merge()):
        y = layer(input)
        assert y.shape == vanilla(x.merge()).shape
        if not alpha and input is not x:
            torch.testing.assert_close(y, vanilla(input))


@pytest.mark.parametrize("groups", [1, 8])
def test_a_strided_convolution_can_be_kept_vanilla(groups):
    torch.manual_seed(0)
    layer = OctConv3d(8, 8, 3, (1, 2, 2), 1, groups=groups, alpha=0.5, strided="keep")
    vanilla = nn.Conv3d(8, 8, 3, (1, 2, 2), 1, groups=groups)
    vanilla.load_state_dict(layer.state_dict())
    x = Octaves(torch.randn(1, 4, 2, 7, 8), torch.randn(1, 4, 2, 4, 4))
    for input in (x, x.merge()):
        assert torch.equal(layer(input), vanilla(x.merge()))
    assert "strided='keep'" in str(layer)
    layer.stride = (2, 1, 1)  # no stride in space
    assert isinstance(layer(x), Octaves)
    with pytest.raises(ValueError, match='strided must be "pool" or "keep", got 2'):
        OctaveOptions(strided=2)
