"""F.conv2d and its like on octave features, and convolutions with a forward pass of their own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from octvideo import Octaves, OctConv1d, OctConv2d, OctConv3d, OctConvTranspose2d, OctConvTranspose3d
from octvideo.layers import octave_class, restore
from octvideo.layers.convolution import OctaveOptions
from octvideo.layers.merging import collected
from octvideo.layers.swapping import swap_class

DOUBLE = {"dtype": torch.float64}


class Standardized(nn.Conv2d):
    """Weight standardisation, as in timm's StdConv2d."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """TensorFlow's "same" padding, as in timm's Conv2dSame: odd amounts in front of a convolution without padding."""

    def forward(self, x):
        amounts = []
        for n, k, s, d in zip(x.shape[-1:-3:-1], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            amounts += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, amounts), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """Overrides what nn.Conv2d calls, and has a property that networks may read."""

    double = property(lambda self: 2 * self.out_channels)

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class Named(nn.Conv2d):
    """A subclass that convolves as its base does."""

    double = property(lambda self: 2 * self.out_channels)


def octave(module, alpha=0.25, **options):
    swap_class(module, octave_class(module))
    module.set_options(OctaveOptions(alpha, **options))
    return module


def features(channels=8, size=(6, 7), alpha=0.25):
    low = int(alpha * channels)
    half = [-(-n // 2) for n in size]
    return Octaves(torch.randn(2, channels - low, *size, **DOUBLE), torch.randn(2, low, *half, **DOUBLE))


def assert_same(y, wanted):
    assert type(y).__name__ == type(wanted).__name__
    for one, other in zip(*(x if isinstance(x, Octaves) else [x] for x in (y, wanted)), strict=True):
        torch.testing.assert_close(one, other)


CALLS = [
    (F.conv1d, OctConv1d, (9,), {"padding": 1}),
    (F.conv2d, OctConv2d, (6, 7), {"padding": 1}),
    (torch.conv2d, OctConv2d, (6, 7), {"padding": "same", "dilation": 2}),
    (F.conv2d, OctConv2d, (6, 7), {"padding": 1, "stride": 2, "groups": 2}),
    (F.conv2d, OctConv2d, (6, 7), {"padding": [1], "groups": 16}),
    (F.conv3d, OctConv3d, (3, 6, 7), {"padding": 1, "stride": (2, 1, 1)}),
    (F.conv_transpose2d, OctConvTranspose2d, (6, 7), {"stride": 2, "padding": 1, "output_padding": 1}),
    (F.conv_transpose3d, OctConvTranspose3d, (3, 4, 5), {"stride": (1, 2, 2), "padding": (0, 1, 1), "groups": 2}),
]


@pytest.mark.parametrize(("function", "kind", "size", "named"), CALLS)
def test_a_called_convolution_keeps_the_share_of_low_channels(function, kind, size, named):
    torch.manual_seed(0)
    layer = kind(16, 32, 3, **{k: v[0] if isinstance(v, list) else v for k, v in named.items()}, alpha=0.5, **DOUBLE)
    half = [n if len(size) == 3 and axis == 0 else -(-n // 2) for axis, n in enumerate(size)]
    x = Octaves(torch.randn(1, 8, *size, **DOUBLE), torch.randn(1, 8, *half, **DOUBLE))
    y = function(x, layer.weight, layer.bias, **named)
    assert y.low.shape[1] == 16
    assert_same(y, layer(x))


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        ((8, 8, 3, 3), {}),  # the size changes
        ((8, 8, 4, 4), {"stride": 4}),
        ((8, 2, 3, 3), {"padding": 1, "groups": 4}),  # 2 low channels in 4 groups
        ((8, 8, 2, 2), {"stride": 2}),
    ],
)
def test_a_called_convolution_that_cannot_keep_the_maps_apart_merges(weight, named):
    torch.manual_seed(0)
    x, weight = features(), torch.randn(*weight, **DOUBLE)
    with collected() as merges:
        y = F.conv2d(x, weight, **named)
    assert [merge.function for merge in merges] == ["conv2d"]
    assert torch.equal(y, F.conv2d(x.merge(), weight, **named))


def test_convolutions_follow_the_temporal_kind_of_their_input():
    torch.manual_seed(0)
    layer = OctConv3d(8, 8, 3, padding=1, alpha=0.25, temporal=True, **DOUBLE)
    x = Octaves(torch.randn(1, 6, 4, 6, 6, **DOUBLE), torch.randn(1, 2, 2, 3, 3, **DOUBLE))
    assert_same(F.conv3d(x, layer.weight, layer.bias, padding=1), layer(x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_zeros_that_a_forward_pass_pads_are_left_to_the_convolution(kernel, stride):
    torch.manual_seed(0)
    module = octave(Same(8, 8, kernel, stride, **DOUBLE))
    layer = OctConv2d(8, 8, kernel, stride, kernel // 2, alpha=0.25, **DOUBLE)
    layer.load_state_dict(module.state_dict())
    for size in ((6, 8), (7, 9)):
        x = features(size=size)
        with collected() as merges:
            assert_same(module(x), layer(x))
            assert_same(module(x.merge()), layer(x.merge()))
        assert not merges
    layer.set_options(OctaveOptions(0))
    module.set_options(OctaveOptions(0))
    assert_same(module(x), layer(x))


def test_even_kernels_pad_the_larger_half_behind():
    torch.manual_seed(0)
    module, layer = octave(Same(8, 8, 4, **DOUBLE)), OctConv2d(8, 8, 4, padding="same", alpha=0.25, **DOUBLE)
    layer.load_state_dict(module.state_dict())
    x = features()
    assert_same(module(x), layer(x))


def test_a_forward_pass_of_its_own_is_octave_by_the_modules_options():
    torch.manual_seed(0)
    module = Standardized(8, 16, 3, padding=1, **DOUBLE)
    vanilla, x = copy.deepcopy(module), features()
    octave(module)
    layer = OctConv2d(8, 16, 3, padding=1, alpha=0.25, **DOUBLE)
    weight = module.weight.detach()
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    layer.load_state_dict({"weight": weight, "bias": module.bias})
    for input in (x, x.merge()):
        assert_same(module(input), layer(input))
    y = module(x)
    (y.high.square().sum() + y.low.square().sum()).backward()
    assert module.weight.grad.abs().min() > 0
    module.set_options(OctaveOptions(0))
    layer.set_options(OctaveOptions(0))
    assert_same(module(x), layer(x))
    assert torch.equal(module(x.merge()), vanilla(x.merge()))
    assert module.state_dict().keys() == vanilla.state_dict().keys()


def test_a_forward_pass_that_would_shift_the_maps_merges():
    torch.manual_seed(0)
    module, x = octave(Standardized(8, 8, 3, **DOUBLE)), features()
    vanilla = copy.deepcopy(module)
    restore(vanilla)
    with collected() as merges:
        assert torch.equal(module(x), vanilla(x.merge()))
    assert len(merges) == 1
    assert torch.equal(module(x.merge()), vanilla(x.merge()))


@pytest.mark.parametrize("kind", [Standardized, Same, Scaled, Named])
def test_the_class_of_a_subclass_comes_and_goes(kind):
    torch.manual_seed(0)
    module, x = kind(8, 8, 3, padding=0 if kind is Same else 1), torch.randn(1, 8, 6, 6)
    wanted = module(x)
    octave(module)
    assert type(module).__name__ == kind.__name__
    assert isinstance(module, kind)
    assert octave_class(module) is type(module) is type(octave(kind(8, 8, 3, padding=1)))
    y = module(x)
    assert y.low.shape[1] == 2
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert_same(other(x), y)
        restore(other)
        assert type(other) is kind
        assert torch.equal(other(x), wanted)
        assert not {"options", "_plan", "_original_class"} & other.__dict__.keys()


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_normalised_weights_are_computed_once_and_octave(norm):
    torch.manual_seed(0)
    module, x = norm(nn.Conv2d(8, 8, 3, padding=1)).eval(), torch.randn(1, 8, 6, 6)
    kind, wanted, keys = type(module), module(x), module.state_dict().keys()
    octave(module)
    layer = OctConv2d(8, 8, 3, padding=1, alpha=0.25)
    layer.load_state_dict({"weight": module.weight.detach(), "bias": module.bias})
    assert_same(module(x), layer(x))
    assert isinstance(module, kind)
    assert module.state_dict().keys() == keys
    if norm is not nn.utils.weight_norm:  # torch copies no weights that a hook computes
        assert_same(copy.deepcopy(module)(x), layer(x))
    restore(module)
    assert type(module) is kind
    assert torch.equal(module(x), wanted)


def test_weights_parametrised_after_the_swap_stay_so():
    torch.manual_seed(0)
    module, x = octave(nn.Conv2d(8, 8, 1)), torch.randn(1, 8, 6, 6)
    parametrizations.weight_norm(module)
    assert module(x).low.shape[1] == 2
    restore(module)
    assert parametrize.is_parametrized(module)
    assert isinstance(module(x), torch.Tensor)


def test_what_cannot_become_octave_has_no_octave_class():
    patched = nn.Conv2d(8, 8, 1)
    patched.forward = patched.forward
    assert [octave_class(m) for m in (nn.Linear(1, 1), nn.LazyConv2d(8, 1), nn.ConvTranspose1d(1, 1, 1), patched)] == [
        None
    ] * 4
    assert octave_class(nn.ConvTranspose2d(1, 1, 1)) is OctConvTranspose2d
    assert octave_class(nn.Conv1d(1, 1, 1)) is OctConv1d


def test_own_forward_passes_compile_and_export():
    torch.manual_seed(0)
    network = nn.Sequential(
        OctConv2d(3, 8, 1, alpha=0.25),
        octave(Standardized(8, 8, 3, padding=1)),
        octave(Same(8, 8, 3, 2)),
        parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
        octave(Scaled(8, 8, 1), 0),
    )
    octave(network[3])
    x = torch.randn(1, 3, 8, 8)
    y = network(x)
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), y)
