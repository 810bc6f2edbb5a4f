"""Octave features under ordinary torch functions and modules."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octvideo import Octaves
from octvideo.octaves import average_pool, upsample


@pytest.fixture
def x():
    torch.manual_seed(0)
    return Octaves(torch.randn(2, 6, 4, 8, 7), torch.randn(2, 2, 4, 4, 4))


def test_answers_as_the_vanilla_tensor(x):
    assert x.shape == (2, 8, 4, 8, 7)
    assert x.size() == x.shape
    assert x.size(1) == 8
    assert x.dim() == 5
    assert x.dtype == torch.float32
    assert x.device == torch.device("cpu")
    high, low = x
    assert high is x.high
    assert low is x.low


def test_merge_upsamples_the_low_map_behind_the_high_one(x):
    merged = x.merge()
    assert merged.shape == x.shape
    assert torch.equal(merged[:, :6], x.high)
    assert torch.equal(merged[:, 6:, :, 5, 6], x.low[:, :, :, 2, 3])


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Hardswish()]
)
def test_activations_apply_to_each_map(x, module):
    high, low = x.high.clone(), x.low.clone()
    y = module(x)
    assert torch.equal(y.high, module(high))
    assert torch.equal(y.low, module(low))


def test_batch_norm_normalises_each_map_with_its_channels(x):
    norm = nn.BatchNorm3d(8)
    nn.init.uniform_(norm.weight)
    high, low = nn.BatchNorm3d(6), nn.BatchNorm3d(2)
    high.weight.data, low.weight.data = norm.weight[:6].clone(), norm.weight[6:].clone()
    y = norm(x)
    torch.testing.assert_close(y.high, high(x.high))
    torch.testing.assert_close(y.low, low(x.low))
    torch.testing.assert_close(norm.running_var, torch.cat((high.running_var, low.running_var)))
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.eval()(x).low, low.eval()(x.low))


def test_batch_norm_after_cat_keeps_the_vanilla_order_of_statistics(x):
    both = torch.cat((x, x * 3), 1)
    norm, single, triple = nn.BatchNorm3d(16), nn.BatchNorm3d(8), nn.BatchNorm3d(8)
    norm(both), single(x), triple(x * 3)
    torch.testing.assert_close(norm.running_mean, torch.cat((single.running_mean, triple.running_mean)))
    torch.testing.assert_close(norm.running_var, torch.cat((single.running_var, triple.running_var)))


def test_instance_norm_and_dropout_apply_to_each_map(x):
    y = nn.InstanceNorm3d(8, affine=True)(x)
    torch.testing.assert_close(y.low, F.instance_norm(x.low))
    assert nn.Dropout(0.5).eval()(x).shape == x.shape
    assert nn.Dropout3d(1.0)(x).low.abs().max() == 0


def test_pooling_keeps_the_maps_aligned(x):
    y = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))(x)
    assert torch.equal(y.low, F.max_pool3d(x.low, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
    assert y.merge().shape == y.shape
    assert nn.MaxPool3d((2, 1, 1))(x).shape == (2, 8, 2, 8, 7)
    assert nn.Upsample(scale_factor=(1, 2, 2))(Octaves(x.high[..., :6], x.low[..., :3])).shape == (2, 8, 4, 16, 12)
    with pytest.raises(ValueError, match="do not match"):
        nn.MaxPool3d((1, 2, 2))(Octaves(torch.zeros(1, 1, 1, 6, 6), torch.zeros(1, 1, 1, 3, 3)))


@pytest.mark.parametrize(
    "reduce",
    [
        nn.AdaptiveAvgPool3d(1),
        nn.AvgPool3d((4, 8, 7)),
        lambda x: x.mean([2, 3, 4], keepdim=True),
        lambda x: torch.mean(x, (-1, -2, -3), True),
    ],
)
def test_global_pooling_gives_a_tensor_with_all_channels(x, reduce):
    y = reduce(x)
    torch.testing.assert_close(y[:, :6], x.high.mean((2, 3, 4), keepdim=True))
    torch.testing.assert_close(y[:, 6:], x.low.mean((2, 3, 4), keepdim=True))


def test_mean_over_space_alone_keeps_time(x):
    assert x.mean((3, 4)).shape == (2, 8, 4)


def test_arithmetic_with_octaves_scalars_and_tensors(x):
    y = Octaves(torch.randn_like(x.high), torch.randn_like(x.low))
    assert torch.equal((x + y).low, x.low + y.low)
    assert torch.equal((x - y).high, x.high - y.high)
    assert torch.equal((2 * x / 4).low, 2 * x.low / 4)
    assert torch.equal((1 - x).low, 1 - x.low)
    assert torch.equal((-x).high, -x.high)
    full = torch.randn(x.shape)
    for z in (x + full, full + x, torch.add(full, x)):
        torch.testing.assert_close(z.high, x.high + full[:, :6])
        torch.testing.assert_close(z.low, x.low + average_pool(full[:, 6:], (1, 2, 2)))
    gate = torch.rand(2, 8, 1, 1, 1)
    octave_gate = Octaves(gate[:, :6], gate[:, 6:])  # as an octave convolution of a pooled map makes it
    for z in (x * gate, gate * x, x * octave_gate, octave_gate * x):
        torch.testing.assert_close(z.high, x.high * gate[:, :6])
        torch.testing.assert_close(z.low, x.low * gate[:, 6:])


def test_cat_keeps_the_vanilla_order_of_channels(x):
    full = torch.randn(2, 3, 4, 8, 7)
    y = torch.cat((x, full, x), dim=1)
    assert y.parts == ((6, 2), (3, 0), (6, 2))
    torch.testing.assert_close(y.merge(), torch.cat((x.merge(), full, x.merge()), 1))
    torch.testing.assert_close(
        y.mean((2, 3, 4)), torch.cat((x.mean((2, 3, 4)), full.mean((2, 3, 4)), x.mean((2, 3, 4))), 1)
    )
    gate = torch.rand(1, 19, 1, 1, 1)
    torch.testing.assert_close((y * gate).merge(), y.merge() * gate)


def test_copies_keep_the_parts(x):
    y = torch.cat((x, x), 1)
    for z in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.utils._pytree.tree_map(lambda map_: map_, y)):
        assert type(z) is Octaves
        assert z.parts == y.parts
        assert torch.equal(z.low, y.low)


@pytest.mark.parametrize(
    "call", [lambda x: nn.Conv3d(8, 8, 1)(x), lambda x: torch.flatten(x, 1), lambda x: F.softmax(x, 1)]
)
def test_an_undefined_function_says_its_name_and_the_way_out(x, call):
    with pytest.raises(TypeError, match=r"(conv3d|flatten|softmax).*\(2, 8, 4, 8, 7\).*\.merge\(\)"):
        call(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x + torch.cat((x, x), 1), ValueError, "same alpha"),
        (lambda x: x + torch.zeros(2, 8, 4, 5, 5), ValueError, r"Tensor of shape \(2, 8, 4, 5, 5\) meets"),
        (lambda x: torch.zeros(2, 8, 4, 8, 7).add_(x), TypeError, "into a Tensor"),
        (lambda x: torch.cat((x, x), 0), TypeError, "on channels, not dim 0"),
        (lambda x: torch.cat((x, Octaves(x.high, torch.zeros(2, 2, 2, 4, 4))), 1), ValueError, "different factors"),
        (lambda x: nn.AdaptiveAvgPool3d(2)(x), TypeError, "only 1 is defined"),
        (lambda x: x.mean(1), TypeError, "mean over dimensions 1"),
        (lambda x: x.mean(2), TypeError, "mean over dimensions 2"),
        (lambda x: upsample(x.low, (4, 20, 20)), ValueError, "not half of"),
    ],
)
def test_mismatches_are_errors_with_the_numbers(x, call, error, message):
    with pytest.raises(error, match=message):
        call(x)


def test_pool_of_odd_sizes_averages_what_the_border_has():
    y = average_pool(torch.arange(7.0).view(1, 1, 1, 1, 7), (1, 2, 2))
    assert y.flatten().tolist() == [0.5, 2.5, 4.5, 6.0]
    assert upsample(y, (1, 1, 7)).flatten().tolist() == [0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.0]
