"""The layer against an independent float64 reference of the paper's equations."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from octvideo import Octaves, OctConv2d, OctConv3d
from octvideo.conv import split_channels


def reference_convolution(x, weight, stride, padding, dilation):
    """A dense convolution of (C, T, H, W) by loops over the kernel, in numpy."""
    kernel = weight.shape[2:]
    x = np.pad(x, [(0, 0)] + [(p, p) for p in padding])
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


def test_grouped_layer_costs_a_groups_share_and_matches_grouped_paths():
    torch.manual_seed(0)
    layer = OctConv3d(16, 16, (1, 3, 3), padding=(0, 1, 1), groups=4, alpha=0.5)
    x = Octaves(torch.randn(1, 8, 2, 6, 6), torch.randn(1, 8, 2, 3, 3))
    y = layer(x)
    path = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), groups=4)
    path.load_state_dict({"weight": layer.weight[:8, :2], "bias": layer.bias[:8]})
    low_path = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), groups=4, bias=False)
    low_path.load_state_dict({"weight": layer.weight[:8, 2:]})
    wanted = path(x.high) + low_path(x.low).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(y.high, wanted)


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
    layer.set_alpha(0)
    assert layer(x).shape == (1, 8, 3, 8, 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 15, 64, 100, 255])
@pytest.mark.parametrize("alpha", [0, 0.1, 0.125, 0.2, 0.25, 0.3, 0.5, 0.75, 0.8, 0.9, 1])
def test_split_sums_to_the_channels_and_rounds_down(channels, alpha):
    high, low = split_channels(channels, alpha)
    assert high + low == channels
    assert alpha * channels - 1 < low <= alpha * channels + 1e-6


def test_split_is_not_fooled_by_float_rounding():
    assert split_channels(10, 0.3) == (7, 3)
    assert split_channels(15, 0.2) == (12, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_channels(8, 1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: split_channels(0, 0.5), "channels must be at least 1, got 0"),
        (lambda: OctConv3d(8, 8, 1, groups=4, alpha=0.25), "alpha 0.25 splits 8 output channels into 6 high and 2 low"),
        (lambda: OctConv2d(8, 8, 1, temporal=True), "temporal=True needs a 3-D convolution"),
        (
            lambda: OctConv3d(8, 8, 3, stride=3, padding=1)(torch.zeros(1, 8, 4, 9, 9)),
            r"stride of 1 or 2, got stride \(3",
        ),
        (lambda: OctConv3d(8, 8, 3)(torch.zeros(1, 8, 4, 9, 9)), "padding that keeps the size"),
        (
            lambda: OctConv3d(8, 8, 1, temporal=True)(Octaves(torch.zeros(1, 6, 4, 8, 8), torch.zeros(1, 2, 4, 4, 4))),
            r"temporal=True wants a low map of \(2, 4, 4\)",
        ),
        (
            lambda: OctConv3d(8, 8, 1)(Octaves(torch.zeros(1, 8, 4, 8, 8), torch.zeros(1, 2, 4, 4, 4))),
            "expected 8 input channels, got 10",
        ),
        (
            lambda: OctConv3d(8, 8, 1, groups=2, alpha=0.5)(
                Octaves(torch.zeros(1, 5, 4, 8, 8), torch.zeros(1, 3, 4, 4, 4))
            ),
            "groups 2 must divide the 5 high and the 3 low input channels",
        ),
        (
            lambda: OctConv3d(4, 12, 1, groups=4, alpha=0.4)(torch.zeros(1, 4, 4, 8, 8)),
            "gives 8 high output channels, not a multiple of the 3",
        ),
        (
            lambda: OctConv3d(8, 8, 1, groups=8, alpha=0.5)(
                Octaves(torch.zeros(1, 6, 4, 8, 8), torch.zeros(1, 2, 4, 4, 4))
            ),
            "wants 4 high and 4 low input channels",
        ),
    ],
)
def test_impossible_layers_say_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_printing_a_layer_shows_its_alpha():
    assert "alpha=0.25" in repr(OctConv3d(8, 8, 1))
    assert "temporal=True" in repr(OctConv3d(8, 8, 1, temporal=True))
