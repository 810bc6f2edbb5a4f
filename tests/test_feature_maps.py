"""Feature maps as pictures: which maps a layer has, of what size, and how they are coloured."""

import numpy as np
import pytest
import torch
from conftest import settle
from torch import nn

from experiments.spectrum import stage_features
from octvideo import create_model
from octvideo.evaluation.feature_maps import COLOURS, Maps, heat, layers_of, maps_of
from octvideo.layers.octaves import Octaves


def network_and_clip(name="i3d_r50", alpha=0.25, frames=4, size=40):
    """A small network with random weights, and a clip (3, T, H, W)."""
    torch.manual_seed(0)
    return settle(create_model(name, alpha=alpha, num_classes=3, width=8)), torch.randn(3, frames, size, size)


def test_low_maps_are_repeated_to_the_cells_of_the_high_ones():
    network, clip = network_and_clip()
    ((high, low),) = maps_of(network, "blocks.1", clip)
    (features,) = stage_features(network, ["blocks.1"], [clip[None]])
    wanted = features["blocks.1"]
    assert isinstance(wanted, Octaves)
    assert (high.kind, high.size) == ("high", (4, 10, 10))
    assert (low.kind, low.size) == ("low", (4, 5, 5))
    torch.testing.assert_close(high.values, wanted.high[0])
    torch.testing.assert_close(low.values, wanted.low[0].repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert len(low.values) == 8  # a quarter of 32


def test_low_maps_of_an_odd_size_end_where_the_high_ones_do():
    network, clip = network_and_clip(size=36)  # 9 cells
    ((high, low),) = maps_of(network, "blocks.1", clip)
    assert low.size == (4, 5, 5)
    assert low.values.shape[1:] == high.values.shape[1:] == (4, 9, 9)
    assert (low.values[..., 0::2][..., :4] == low.values[..., 1::2]).all()


@pytest.mark.parametrize(("alpha", "kinds"), [(0, ["all"]), (0.5, ["high", "low"]), (1, ["low"])])
def test_a_layer_has_the_kinds_of_maps_that_its_alpha_gives_it(alpha, kinds):
    network, clip = network_and_clip(alpha=alpha)
    (groups,) = maps_of(network, "blocks.1", clip)
    assert [group.kind for group in groups] == kinds
    assert sum(len(group.values) for group in groups) == 32


def test_the_stages_of_slowfast_have_two_pathways_and_its_convolutions_one():
    network, clip = network_and_clip("slowfast_r50", frames=8)
    slow, fast = maps_of(network, layers_of(network)["res2"], clip)
    assert [group.size for group in slow] == [(2, 10, 10), (2, 5, 5)]
    assert [group.size for group in fast] == [(8, 10, 10), (8, 5, 5)]
    name = next(name for label, name in layers_of(network).items() if label.startswith("res3 ") and "conv_b" in name)
    assert len(maps_of(network, name, clip)) == 1


@pytest.mark.parametrize("name", ["i3d_r50", "slowfast_r50", "x3d_s"])
def test_the_layers_are_the_stages_and_their_convolutions(name):
    network = create_model(name, num_classes=3, width=8)
    layers = layers_of(network)
    assert [label for label in layers if " " not in label] == ["res2", "res3", "res4", "res5"]
    parts = dict(network.named_modules())
    for label, part in layers.items():
        assert part in parts
        assert (" " in label) == isinstance(parts[part], nn.Conv3d)
    inside = [part for part, module in parts.items() if isinstance(module, nn.Conv3d) and part.split(".")[1] in "1234"]
    assert set(inside) <= set(layers.values())


def test_the_strongest_channels_are_those_farthest_from_0_in_the_middle_frame():
    values = torch.zeros(4, 3, 2, 2)
    values[:, 1] = torch.tensor([1.0, -3.0, 0.0, 2.0])[:, None, None]
    values[2, [0, 2]] = 9
    maps = Maps("all", values, (3, 2, 2))
    assert maps.strongest(3) == [1, 3, 0]
    assert maps.strongest(9) == [1, 3, 0, 2]
    assert maps.magnitudes()[:, 0, 0].tolist() == [1, 3, 0, 2]


def test_colours_run_from_the_smallest_value_to_the_largest():
    steps = len(COLOURS) - 1
    found = heat(torch.arange(-2.0, 2 * steps - 1).view(1, -1))
    np.testing.assert_array_equal(found[0, ::2], COLOURS)
    between = (COLOURS[:-1] + COLOURS[1:]) / 2
    np.testing.assert_allclose(found[0, 1::2], between, atol=0.5)
    lightness = COLOURS @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()


def test_a_map_without_a_pattern_is_dark():
    assert (heat(torch.full((3, 3), 7.0)) == COLOURS[0]).all()
