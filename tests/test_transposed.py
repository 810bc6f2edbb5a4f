"""Transposed and 1-D octave convolutions against float64 references of their equations."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from test_convolution import reference_pool, reference_upsample
from torch import nn

from octvideo import Octaves, OctConv1d, OctConv2d, OctConvTranspose2d, OctConvTranspose3d
from octvideo.layers.convolution import OctaveOptions
from octvideo.layers.shares import split_channels

DOUBLE = {"dtype": torch.float64}


def reference_transposed(x, weight, stride, padding, dilation, size):
    """A dense transposed convolution of (C, T, H, W) to a size: every input position is added where the kernel lies."""
    kernel = weight.shape[2:]
    spread = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(x.shape[1:], stride, dilation, kernel, strict=True)]
    ends = [max(have, p + n) for have, p, n in zip(spread, padding, size, strict=True)]
    out = np.zeros((weight.shape[1], *ends))
    for offset in itertools.product(*map(range, kernel)):
        steps = zip(offset, dilation, stride, x.shape[1:], strict=True)
        where = (slice(None), *(slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, s, n in steps))
        out[where] += np.einsum("io,ithw->othw", weight[(slice(None), slice(None), *offset)], x)
    return out[(slice(None), *(slice(p, p + n) for p, n in zip(padding, size, strict=True)))]


CASES = [
    # kernel, stride, padding, output padding, dilation, alpha, (T, H, W), temporal
    ((1, 2, 2), (1, 2, 2), (0, 0, 0), (0, 0, 0), (1, 1, 1), 0.25, (2, 5, 6), False),
    ((3, 4, 4), (1, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), 0.5, (3, 4, 5), False),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1), 0.25, (2, 3, 4), True),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), 0.75, (3, 4, 5), True),
    ((1, 3, 3), (1, 1, 1), (0, 2, 2), (0, 0, 0), (1, 2, 2), 0.25, (1, 5, 4), False),
    ((4, 5, 4), (3, 3, 4), (0, 1, 0), (2, 0, 1), (1, 1, 1), 0.0, (2, 3, 4), False),
    ((2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0), (1, 1, 1), 1.0, (1, 1, 1), False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_layer_equals_the_float64_reference(case):
    kernel, stride, padding, extra, dilation, alpha, size, temporal = case
    torch.manual_seed(0)
    layer = OctConvTranspose3d(
        8, 12, kernel, stride, padding, extra, dilation=dilation, alpha=alpha, temporal=temporal, **DOUBLE
    )
    half = [-(-n // 2) if temporal or axis else n for axis, n in enumerate(size)]
    x = Octaves(torch.randn(1, 6, *size, **DOUBLE), torch.randn(1, 2, *half, **DOUBLE))
    y = layer(x)
    vanilla = nn.ConvTranspose3d(8, 12, kernel, stride, padding, extra, dilation=dilation, **DOUBLE)
    vanilla.load_state_dict(layer.state_dict())
    assert y.shape == vanilla(x.merge()).shape
    y = y if isinstance(y, Octaves) else Octaves(y, y[:, :0, :, ::2, ::2])
    low_size = [-(-n // 2) if temporal or axis else n for axis, n in enumerate(y.high.shape[2:])]
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()[:, None, None, None]
    high, low, n = x.high[0].numpy(), x.low[0].numpy(), y.high.shape[1]

    def f(x, columns, rows, to):
        return reference_transposed(x, weight[columns][:, rows], stride, padding, dilation, to)

    high_out, low_out = slice(n), slice(n, None)
    wanted = f(high, slice(6), high_out, y.high.shape[2:]) + bias[:n]
    wanted += reference_upsample(f(low, slice(6, 8), high_out, low_size), y.high.shape[2:])
    np.testing.assert_allclose(y.high[0].detach().numpy(), wanted, rtol=0, atol=1e-10)
    wanted = f(low, slice(6, 8), low_out, low_size) + f(reference_pool(high, temporal), slice(6), low_out, low_size)
    if low_out.start < 12:
        assert list(y.low.shape[2:]) == low_size
        np.testing.assert_allclose(y.low[0].detach().numpy(), wanted + bias[n:], rtol=0, atol=1e-10)


def test_transposed_layer_of_alpha_zero_is_the_vanilla_one_bit_for_bit():
    torch.manual_seed(0)
    for octave, plain in ((OctConvTranspose2d, nn.ConvTranspose2d), (OctConvTranspose3d, nn.ConvTranspose3d)):
        layer, vanilla = octave(4, 6, 3, 2, 1, groups=2, alpha=0), plain(4, 6, 3, 2, 1, groups=2)
        layer.load_state_dict(vanilla.state_dict())
        x = torch.randn(2, 4, *(3, 4, 5)[3 - len(layer.kernel_size) :])
        assert torch.equal(layer(x), vanilla(x))
        size = [2 * n for n in x.shape[2:]]
        assert torch.equal(layer(x, size), vanilla(x, output_size=size))


def test_output_size_reaches_both_maps():
    torch.manual_seed(0)
    layer = OctConvTranspose2d(8, 8, 3, 2, 1, alpha=0.25)
    x = Octaves(torch.randn(1, 6, 5, 4), torch.randn(1, 2, 3, 2))
    wanted = copy.deepcopy(layer)
    wanted.output_padding = (1, 0)
    y = layer(x, output_size=(10, 7))
    assert (y.high.shape[2:], y.low.shape[2:]) == ((10, 7), (5, 4))
    assert all(torch.equal(*maps) for maps in zip(y, wanted(x), strict=True))
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=(12, 7))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_and_depthwise_transposed_layers_keep_the_meaning_of_their_channels(groups):
    """Features that are constant over blocks of two give the vanilla means away from the border."""
    torch.manual_seed(0)
    layer = OctConvTranspose2d(8, 16, 4, 2, 1, groups=groups, alpha=0.5, **DOUBLE)
    vanilla = nn.ConvTranspose2d(8, 16, 4, 2, 1, groups=groups, **DOUBLE)
    vanilla.load_state_dict(layer.state_dict())
    x = Octaves(*(torch.randn(1, 4, 1, 1, **DOUBLE).expand(1, 4, n, n) for n in (8, 4)))
    means = [torch.nn.functional.avg_pool2d(y, 4)[..., 1:-1, 1:-1] for y in (layer(x).merge(), vanilla(x.merge()))]
    torch.testing.assert_close(*means, rtol=0, atol=1e-12)


def test_gradients_of_a_transposed_layer_are_right():
    torch.manual_seed(0)
    layer = OctConvTranspose2d(4, 4, 3, 2, 1, 1, alpha=0.25, **DOUBLE)
    maps = torch.randn(1, 3, 3, 4, **DOUBLE), torch.randn(1, 1, 2, 2, **DOUBLE)
    inputs = (*(x.requires_grad_() for x in maps), *layer.parameters())

    def apply(high, low, weight, bias):
        return tuple(torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (Octaves(high, low),)))

    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)


def test_a_transposed_layer_that_would_shift_the_maps_says_the_numbers():
    layer = OctConvTranspose2d(8, 8, 5, 2, alpha=0.25)
    x = Octaves(torch.randn(1, 6, 4, 4), torch.randn(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"transposed kernel \(5, 5\) with stride \(2, 2\) .* wants \[1.5, 1.5\]"):
        layer(x)
    layer.set_options(OctaveOptions(0))
    vanilla = nn.ConvTranspose2d(8, 8, 5, 2)
    vanilla.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), vanilla(x.merge()))


def test_transposed_layers_are_copied_pickled_compiled_and_exported():
    torch.manual_seed(0)
    network = nn.Sequential(
        OctConv2d(3, 8, 3, padding=1, alpha=0.25),
        OctConvTranspose2d(8, 8, 2, 2, alpha=0.5),
        OctConvTranspose2d(8, 4, 3, 1, 1, alpha=0),
    )
    x = torch.randn(1, 3, 5, 6)
    y = network(x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), y)
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_one_dimensional_layer_is_the_two_dimensional_one_of_height_one(groups, mode):
    torch.manual_seed(0)
    for alpha, stride, n in ((0.25, 1, 9), (0.25, 2, 9), (0, 1, 8)):
        line = OctConv1d(16, 16, 3, stride, 1, groups=groups, padding_mode=mode, alpha=alpha)
        flat = OctConv2d(16, 16, (1, 3), (1, stride), (0, 1), groups=groups, padding_mode=mode, alpha=alpha)
        flat.load_state_dict({"weight": line.weight[:, :, None], "bias": line.bias})
        high, low = split_channels(16, 0.25)
        x = Octaves(torch.randn(2, high, n), torch.randn(2, low, -(-n // 2)))
        y, wanted = line(x), flat(x.merge()[:, :, None]) if alpha == 0 else None
        assert y.shape == nn.Conv1d(16, 16, 3, stride, 1)(x.merge()).shape
        if wanted is not None:
            assert y.shape == wanted[:, :, 0].shape
        # Repeated to a height of 2, which averages to itself, the low map is halved in both dimensions.
        x = Octaves(*(m[:, :, None].expand(-1, -1, rows, -1) for m, rows in zip(x, (2, 1), strict=True)))
        z = flat(x)
        for map_, other in zip(*([y, z] if alpha else [(y,), (z,)]), strict=True):
            torch.testing.assert_close(map_, other[:, :, 0])


def test_one_dimensional_layers_merge_pool_and_agree_on_constant_features():
    torch.manual_seed(0)
    first = OctConv1d(3, 8, 3, padding=1, padding_mode="circular", alpha=0.25, **DOUBLE)
    last = OctConv1d(8, 4, 3, 2, 1, padding_mode="circular", alpha=0, **DOUBLE)
    x = torch.randn(2, 3, 1, **DOUBLE).expand(2, 3, 8)
    y = last(first(x) + 1)
    first.set_options(OctaveOptions(0))
    torch.testing.assert_close(y, last(first(x) + 1), rtol=0, atol=1e-12)
    assert isinstance(OctConv1d(3, 8, 1)(torch.zeros(1, 3, 7)) + torch.ones(1, 8, 7), Octaves)
    with pytest.raises(ValueError, match=r"expected \(B, 3, L\), got \(1, 4, 7\)"):
        OctConv1d(3, 8, 1)(torch.zeros(1, 4, 7))
