"""Octave features under ordinary torch functions and modules."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octvideo import Octaves, OctConv2d
from octvideo.layers.functions import normalize_maps
from octvideo.layers.parts import join_by_parts, join_pieces, split_by_parts
from octvideo.layers.resampling import average_pool, upsample


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


def test_batch_norm_functions_get_contiguous_statistics_of_grouped_features():
    """cuDNN would update a copy of others, and the running statistics would stand still."""
    x = Octaves(torch.randn(2, 6, 4, 8, 8), torch.randn(2, 2, 4, 4, 4), ((3, 1), (3, 1)))
    seen = []

    def norm(x, mean, var, *rest, **options):
        seen.extend((mean, var))
        return F.batch_norm(x, mean, var, *rest, **options)

    mean, var = torch.zeros(8), torch.ones(8)
    normalize_maps(norm, x, mean, var, training=True)
    assert all(statistic.is_contiguous() for statistic in seen)
    assert (mean != 0).all()
    assert torch.allclose(mean[3], 0.1 * x.low[:, 0].mean())


def test_parts_may_be_lists_and_comparisons_with_none_are_refused():
    x = Octaves(torch.randn(2, 3, 4, 8, 8), torch.randn(2, 1, 4, 4, 4), [(3, 1)])
    assert (x + Octaves(*x)).parts == ((3, 1),)
    with pytest.raises(TypeError):
        x == None  # noqa: B015, E711


def test_a_low_map_too_small_for_batch_norm_is_named():
    x = Octaves(torch.randn(1, 6, 2, 2), torch.randn(1, 2, 1, 1))
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 1\): Expected more than 1 value.*alpha 0 here"):
        nn.BatchNorm2d(8)(x)


def test_instance_norm_and_dropout_apply_to_each_map(x):
    even = Octaves(x.high[..., :6], x.low[..., :3])
    y = nn.InstanceNorm3d(8, affine=True)(even)
    torch.testing.assert_close(y.low, F.instance_norm(even.low))
    assert nn.Dropout(0.5).eval()(x).shape == x.shape
    assert nn.Dropout3d(1.0)(x).low.abs().max() == 0


def test_pooling_keeps_the_maps_aligned(x):
    y = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))(x)
    assert torch.equal(y.low, F.max_pool3d(x.low, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
    assert y.merge().shape == y.shape
    assert nn.MaxPool3d((2, 1, 1))(x).shape == (2, 8, 2, 8, 7)
    assert nn.Upsample(scale_factor=(1, 2, 2))(Octaves(x.high[..., :6], x.low[..., :3])).shape == (2, 8, 4, 16, 12)


@pytest.mark.parametrize("size", [5, 6, 7, 8, 10, 14])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2)])
def test_pools_round_the_low_map_as_the_high_one_needs(size, pool):
    """14 -> 7 cells need 4 low ones, which 7 // 2 would not give; the last window averages what it has."""
    x = Octaves(torch.randn(1, 2, size, size), torch.randn(1, 2, (size + 1) // 2, (size + 1) // 2))
    y = pool(x)
    assert torch.equal(y.high, pool(x.high))
    assert y.merge().shape == y.shape == pool(torch.zeros(x.shape)).shape
    rounded_up = type(pool)(pool.kernel_size, pool.stride, pool.padding, ceil_mode=True)
    low = pool(x.low) if pool(x.low).shape == y.low.shape else rounded_up(x.low)
    torch.testing.assert_close(y.low, low)


def test_a_pool_that_rounds_up_repeats_the_low_maps_last_cell():
    """30 -> 15 by windows of 3, the last one of cells 28 and 29, which are low cell 14."""
    x = Octaves(torch.randn(1, 2, 30, 30), torch.randn(1, 2, 15, 15))
    y = nn.MaxPool2d(3, 2, ceil_mode=True)(x)
    assert torch.equal(y.high, F.max_pool2d(x.high, 3, 2, ceil_mode=True))
    assert torch.equal(y.low[..., :7, :7], F.max_pool2d(x.low, 3, 2))
    assert torch.equal(y.low[..., 7, 7], x.low[..., 14, 14])


@pytest.mark.parametrize(
    "module",
    [
        nn.AvgPool3d((4, 8, 7)),
        nn.AvgPool3d((1, 2, 2)),
        nn.AdaptiveAvgPool3d((None, 1, 1)),
        nn.AdaptiveMaxPool3d(1),
        nn.MaxPool3d(2),
        nn.Upsample(scale_factor=2),
        nn.Upsample((4, 5, 5)),
    ],
    ids=str,
)
def test_pools_of_a_map_without_channels(module):
    """At alpha 1 no channel is high, and at alpha 0 beside octaves none is low."""
    for high, low in ((0, 3), (3, 0)):
        y = module(Octaves(torch.randn(2, high, 4, 8, 7), torch.randn(2, low, 4, 4, 4)))
        assert y.shape == module(torch.zeros(2, 3, 4, 8, 7)).shape


def test_resizing_one_cell_gives_a_plain_tensor():
    x = Octaves(torch.randn(1, 3, 1, 1), torch.randn(1, 1, 1, 1))
    assert torch.equal(F.interpolate(x, (4, 5)), x.merge().expand(1, 4, 4, 5))


def test_windows_that_part_the_maps_act_on_the_vanilla_tensor(x):
    for pool in (nn.MaxPool3d((1, 2, 2), 1), nn.AvgPool3d((1, 5, 5), 1)):
        with pytest.warns(UserWarning, match=r"\.(max|avg)_pool3d merges octave features of shape \(2, 8, 4, 8, 7\)"):
            assert torch.equal(pool(x), pool(x.merge()))


def test_interpolation_by_factor_and_to_a_size_keeps_the_maps_aligned(x):
    y = F.interpolate(x, scale_factor=(1, 2, 2))
    assert torch.equal(y.high, F.interpolate(x.high, scale_factor=(1, 2, 2)))
    assert torch.equal(y.low, F.interpolate(x.low, scale_factor=(1, 2, 2))[..., :7])
    y = F.interpolate(x, (4, 5, 9))
    assert torch.equal(y.low, F.interpolate(x.low, (4, 3, 5)))
    x = Octaves(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 1, 1))
    assert type(F.interpolate(x, scale_factor=1.5)) is torch.Tensor


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


def test_reductions_over_space_alone_keep_time(x):
    torch.testing.assert_close(x.mean((3, 4)), torch.cat((x.high.mean((3, 4)), x.low.mean((3, 4))), 1))
    torch.testing.assert_close(x.amax((3, 4)), torch.cat((x.high.amax((3, 4)), x.low.amax((3, 4))), 1))
    y = F.adaptive_avg_pool3d(x, (None, 1, 1))
    torch.testing.assert_close(y, x.mean((3, 4), keepdim=True))
    torch.testing.assert_close(F.adaptive_max_pool3d(x, (4, 1, 1)), x.amax((3, 4), keepdim=True))
    y = nn.AvgPool3d((2, 8, 7), stride=1)(x)  # torchvision's S3D ends like this
    torch.testing.assert_close(y[:, 6:], F.avg_pool3d(x.low, (2, 4, 4), 1))


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
    assert y.parts == ((6, 2), (3 + 6, 2))
    assert torch.cat((full, x), 1).parts == ((3 + 6, 2),)
    torch.testing.assert_close(y.merge(), torch.cat((x.merge(), full, x.merge()), 1))
    torch.testing.assert_close(
        y.mean((2, 3, 4)), torch.cat((x.mean((2, 3, 4)), full.mean((2, 3, 4)), x.mean((2, 3, 4))), 1)
    )
    gate = torch.rand(1, 19, 1, 1, 1)
    torch.testing.assert_close((y * gate).merge(), y.merge() * gate)


def test_copies_keep_the_parts(x):
    y = torch.cat((x, x), 1)
    for z in (
        copy.copy(y),
        copy.deepcopy(y),
        pickle.loads(pickle.dumps(y)),
        torch.utils._pytree.tree_map(lambda map_: map_, y),
        type(y)(*y),  # as FSDP does
    ):
        assert isinstance(z, Octaves)
        assert z.parts == y.parts
        assert torch.equal(z.low, y.low)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x + torch.cat((x, x), 1), RuntimeError, r"\(8\) must match .* \(16\)"),
        (
            lambda x: x + torch.zeros(2, 8, 4, 5, 5),
            RuntimeError,
            r"\(8\) must match .* \(5\)|\(7\) must match .* \(5\)",
        ),
        (lambda x: x.view(2, 9, -1), RuntimeError, r"octave features of shape \(2, 8, 4, 8, 7\)"),
        (lambda x: upsample(x.low, (4, 20, 20)), ValueError, "not half of"),
    ],
)
def test_mismatches_are_errors_with_the_numbers(x, call, error, message):
    with pytest.raises(error, match=message):
        call(x)


def test_pool_of_odd_sizes_averages_what_the_border_has():
    y = average_pool(torch.arange(7.0).view(1, 1, 1, 1, 7), (1, 2, 2))
    assert y.flatten().tolist() == [0.5, 2.5, 4.5, 6.0]
    assert torch.equal(average_pool(y.expand(1, 1, 3, 1, 4), (2, 1, 2))[0, 0, :, 0, 0], torch.tensor([1.5, 1.5]))
    assert upsample(y, (1, 1, 7)).flatten().tolist() == [0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.0]


@pytest.mark.parametrize(
    "spelling",
    [torch.relu, F.relu, lambda x: x.relu(), lambda x: x.relu_(), lambda x: F.relu_(x), lambda x: x.clamp(min=0)],
)
def test_every_spelling_of_a_function_is_the_function(x, spelling):
    high, low = x.high.relu(), x.low.relu()
    y = spelling(x)
    assert type(y) is Octaves
    assert torch.equal(y.high, high)
    assert torch.equal(y.low, low)


def test_methods_and_operators_are_the_tensors_own(x):
    for y, function in (
        (x + 1, lambda z: z + 1),
        (x**2, lambda z: z**2),
        (1 / x, lambda z: 1 / z),
        (np.float32(2) * x, lambda z: 2 * z),
        (2**x, lambda z: 2**z),
        (3 - x, lambda z: 3 - z),
        (-x, lambda z: -z),
        (x != 0, lambda z: z != 0),
        (x <= 0, lambda z: z <= 0),
        (abs(x), abs),
        (x > 0, lambda z: z > 0),
        (x == 0, lambda z: z == 0),
        (x.double(), lambda z: z.double()),
        (x.mul(2).sigmoid(), lambda z: (2 * z).sigmoid()),
        (torch.where(x > 0, x, 0 * x), lambda z: z.relu()),
        (torch.zeros_like(x), torch.zeros_like),
    ):
        assert torch.equal(y.high, function(x.high))
        assert torch.equal(y.low, function(x.low))
    assert x.ndim == 5
    assert not x.requires_grad
    assert x.new_zeros((2, 1)).shape == (2, 1)
    torch.testing.assert_close(x.mean([2, 3, 4]), F.adaptive_avg_pool3d(x, 1).flatten(1))


def test_assigning_operators_write_into_the_maps_and_a_tensor_becomes_octaves(x):
    y = Octaves(x.high.clone(), x.low.clone())
    before = y.high
    y += x
    y *= 2
    y -= x
    y /= 3
    assert y.high is before
    torch.testing.assert_close(y.low, x.low)
    full = torch.randn(2, 8, 4, 8, 7)
    z = full.clone()
    z += x
    torch.testing.assert_close(z.low, x.low + average_pool(full[:, 6:], (1, 2, 2)))


def first(x):
    return x[0]


def test_a_slice_or_numbers_choose_clips_of_the_batch(x):
    for index in (slice(1, 2), [1], torch.tensor([1]), torch.tensor([False, True])):
        assert torch.equal(x[index].low, x.low[1:2])
    for index in (0, 1, -1):
        assert torch.equal(x.select(0, index).merge(), x.merge()[index])
    assert torch.equal(first(x).merge(), x.merge()[0])
    with pytest.warns(UserWarning, match=r"x\[0\] of octave features is taken for all"):
        all_of_it = x[0] if isinstance(x, tuple) else x
    assert torch.equal(all_of_it, x.merge())


def test_features_are_true_and_comparisons_neither_true_nor_false(x):
    assert x
    with pytest.raises(RuntimeError, match=r"\(2, 8, 4, 8, 7\) are neither true nor false"):
        bool(x > 0)


def test_unknown_attributes_name_the_way_out(x):
    assert not hasattr(x, "no_such_thing")
    with pytest.raises(AttributeError, match=r"no attribute 'grad_fn'.*\.merge\(\)"):
        x.grad_fn  # noqa: B018


def test_maps_of_one_cell_are_the_vanilla_tensor_for_any_function():
    x = Octaves(torch.randn(2, 3, 4, 1, 1), torch.randn(2, 1, 4, 1, 1), ((2, 1), (1, 0)))
    assert torch.equal(x.flatten(2), x.merge().flatten(2))
    assert torch.equal(x.permute(0, 2, 3, 4, 1).merge(), x.merge().permute(0, 2, 3, 4, 1))


def test_gates_broadcast_in_batch_space_and_pieces(x):
    cat = torch.cat((x, x), 1)
    gate = Octaves(torch.rand(2, 12, 1, 1, 1), torch.rand(2, 4, 1, 1, 1))  # of one piece, as a convolution gives it
    torch.testing.assert_close((cat * gate).merge(), cat.merge() * gate.merge())
    torch.testing.assert_close((gate * cat).merge(), cat.merge() * gate.merge())
    for shape in ((8, 1, 1, 1), (1, 8, 4, 1, 1), (2, 1, 1, 1, 1), (2, 8, 1, 1, 1)):
        value = torch.rand(shape)
        torch.testing.assert_close((x * value).merge(), x.merge() * value)
    row = torch.rand(1, 8, 1, 8, 1)
    torch.testing.assert_close((x * row).low, x.low * average_pool(row[:, 6:], (1, 2, 1)))


def test_a_gate_of_octaves_on_a_plain_tensor_gives_a_plain_tensor():
    gate = Octaves(torch.rand(2, 6, 1, 1, 1), torch.rand(2, 2, 1, 1, 1))
    full = torch.randn(2, 8, 4, 8, 7)
    for y in (full * gate, gate * full, full * gate.expand_as(full)):
        assert torch.equal(y, full * gate.merge())


def test_a_gate_expands_to_octaves(x):
    gate = torch.rand(2, 8, 1, 1, 1)
    for y in (gate, Octaves(gate[:, :6], gate[:, 6:])):
        torch.testing.assert_close((x * y.expand_as(x)).merge(), x.merge() * gate)


def test_prelu_splits_its_slopes(x):
    module = nn.PReLU(8)
    nn.init.uniform_(module.weight)
    y = module(x)
    torch.testing.assert_close(y.high, F.prelu(x.high, module.weight[:6]))
    torch.testing.assert_close(y.low, F.prelu(x.low, module.weight[6:]))
    torch.testing.assert_close(nn.PReLU()(x).low, F.prelu(x.low, torch.tensor([0.25])))


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.5), nn.Dropout3d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)]
)
def test_dropouts_drop_in_training_only(x, module):
    y = module(x)
    assert not torch.equal(y.high, x.high)
    assert not torch.equal(y.low, x.low)
    assert torch.equal(module.eval()(x).low, x.low)


def test_sync_batch_norm_of_one_process_is_batch_norm(x):
    norm, sync = nn.BatchNorm3d(8), nn.SyncBatchNorm(8)
    y, z = norm(x), sync(x)
    torch.testing.assert_close(z.low, y.low)
    torch.testing.assert_close(sync.running_var, norm.running_var)


@pytest.mark.parametrize(
    "parts", [((6, 2),), ((3, 1), (3, 1)), ((5, 1), (1, 1)), ((8, 0),), ((2, 0), (6, 0)), ((0, 8),)]
)
def test_splitting_and_joining_by_parts_are_inverse(parts):
    whole = torch.arange(8)
    high, low = split_by_parts(whole, parts, 0)
    assert torch.equal(join_by_parts(high, low, parts, 0), whole)
    kinds = torch.tensor([kind for pair in parts for kind, size in enumerate(pair) for _ in range(size)])
    assert torch.equal(high, whole[kinds == 0])
    assert torch.equal(low, whole[kinds == 1])


def test_equal_orders_of_channels_have_equal_parts():
    assert join_pieces([(3, 0), (3, 2)]) == ((6, 2),)
    assert join_pieces([(3, 2), (0, 1)]) == ((3, 3),)
    assert join_pieces([(3, 2), (1, 0), (1, 1)]) == ((3, 2), (2, 1))
    assert join_pieces([(0, 0), (1, 1)]) == ((1, 1),)


def test_full_backward_hooks_keep_the_order_of_channels():
    torch.manual_seed(0)
    network = nn.Sequential(
        OctConv2d(4, 16, 1, alpha=0.5), OctConv2d(16, 16, 1, groups=4, alpha=0.5), OctConv2d(16, 4, 1, alpha=0)
    )
    x = torch.randn(1, 4, 4, 4)
    wanted = network(x)
    seen = []
    network[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append(len(outputs)))
    y = network(x)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert seen == [2]


def test_octaves_unpack_into_two_maps(x):
    high, low = torch.cat((x, x), 1)
    assert (high.shape[1], low.shape[1]) == (12, 4)
