"""Which convolutions share an alpha, what each one's alpha does, and the choice under a budget."""

import math
import random

import pytest
import torch
import torchvision
from torch import nn

from octvideo import OctConv3d, create_model, octavize
from octvideo.models.allocation import Sensitivity, allocate, groups_that_add, mapping_of, measure_sensitivities
from octvideo.models.cost import count_macs
from octvideo.models.zoo import set_alpha

CLIP = (3, 4, 32, 32)
SAMPLE = torch.empty(1, *CLIP)
MIDDLE = [("1",), ("2",), ("3",)]  # groups of `chain`


def small(name="i3d_r50", **options):
    return create_model(name, num_classes=2, width=8, **options).eval()


def chain(channels=8):
    """Three convolutions in a row, of which the second one costs 9 times as much as the others."""
    middle = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
    layers = [nn.Conv3d(3, channels, 1), nn.Conv3d(channels, channels, 1), middle, nn.Conv3d(channels, channels, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())


def test_convolutions_whose_outputs_are_added_are_one_group():
    groups = groups_that_add(small(), SAMPLE)
    stage = "blocks.3.res_blocks"
    added = [f"{stage}.0.branch1_conv", *(f"{stage}.{block}.branch2.conv_c" for block in range(4))]
    assert tuple(added) in groups
    assert (f"{stage}.1.branch2.conv_a",) in groups
    assert sorted(map(len, groups)) == [1] * 32 + [4, 4, 5, 7]
    assert not any("blocks.0.conv" in group for group in groups)  # it reads the input


def test_a_depthwise_convolution_goes_with_the_one_before_it():
    groups = groups_that_add(small("x3d_s"), SAMPLE)
    group = next(group for group in groups if "blocks.1.res_blocks.1.branch2.conv_a" in group)
    assert "blocks.1.res_blocks.1.branch2.conv_b" in group


def test_what_is_joined_side_by_side_is_alone():
    groups = groups_that_add(torchvision.models.densenet121(), torch.empty(1, 3, 64, 64))
    assert {len(group) for group in groups} == {1}
    assert len(groups) == 119  # of 120, less the stem


def test_functions_of_two_maps_bind_whatever_they_are_called():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two, self.three = (nn.Conv3d(n, 8, 1) for n in (3, 8, 8, 8))

        def forward(self, x):
            x = self.stem(x)
            y = torch.mul(self.one(x).relu(), other=torch.sigmoid(input=self.two(x)))
            y += self.three(y)
            return y

    assert groups_that_add(Gate(), torch.empty(1, 3, 2, 8, 8)) == [("one", "two", "three")]


@pytest.mark.parametrize(
    ("name", "clip"), [("i3d_r50", CLIP), ("slowfast_r50", (3, 8, 64, 64)), ("x3d_s", CLIP), ("i3d_r50_nonlocal", CLIP)]
)
def test_any_alphas_of_the_groups_run(name, clip):
    network, draw = small(name), random.Random(0)
    groups = groups_that_add(network, torch.empty(1, *clip))
    for _ in range(2):
        alphas = {name: alpha for group in groups for alpha in [draw.choice((0, 0.25, 0.5))] for name in group}
        set_alpha(network, mapping_of(alphas))
        chosen = {name: m.alpha for name, m in network.named_modules() if isinstance(m, OctConv3d) and m.alpha}
        assert chosen == {name: alpha for name, alpha in alphas.items() if alpha}
        with torch.no_grad():
            assert network(torch.randn(1, *clip)).isfinite().all()


def test_a_mapping_is_an_alpha_of_octavize_and_of_create_model():
    mapping = mapping_of({"blocks.1.res_blocks.0.branch2.conv_a": 0.5})
    for network in (octavize(small(), mapping), small(alpha=mapping)):
        assert [(entry.name, entry.alpha) for entry in network.octave_report.assignments if not entry.reason] == [
            ("blocks.1.res_blocks.0.branch2.conv_a", 0.5)
        ]
    with pytest.raises(ValueError, match=r"no convolution of Net has a name that matches 'res9'"):
        small(alpha={"res9": 0.5})
    with pytest.raises(ValueError, match=r"invalid regex '\(': "):
        small(alpha={"(": 0.5})
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        small(alpha={"blocks": 2})


def test_each_group_is_octave_alone_and_the_network_as_before_in_the_end():
    network = small(downsample="pool")
    groups = groups_that_add(network, SAMPLE)
    tries = [(group, alpha) for group in groups[:3] for alpha in (0.25, 0.5)]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen = []

    def loss(network):
        seen.append({name: m.alpha for name, m in network.named_modules() if getattr(m, "alpha", 0)})
        return 7.0 + len(seen[-1])

    found = list(measure_sensitivities(network, groups, tries, loss, SAMPLE, network.octave_options))
    assert [(entry.names, entry.alpha) for entry in found] == tries
    assert [entry.loss for entry in found] == [len(entry.names) for entry in found]
    assert seen == [{}, *(dict.fromkeys(entry.names, entry.alpha) for entry in found)]
    for entry in found:
        octave = small(downsample="pool", alpha=mapping_of(dict.fromkeys(entry.names, entry.alpha)))
        assert entry.macs == count_macs(small(), CLIP) - count_macs(octave, CLIP) > 0
    assert not any(getattr(module, "alpha", 0) for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_what_channel_groups_do_not_divide_is_left_out():
    network = nn.Sequential(nn.Conv3d(3, 32, 1), nn.Conv3d(32, 32, 3, padding=1, groups=8), nn.Conv3d(32, 8, 1))
    groups = groups_that_add(network, SAMPLE)
    assert groups == [("1",), ("2",)]
    tries = [(("1",), 0.125), (("1",), 0.5), (("2",), 0.125)]  # of groups of 4 channels
    found = measure_sensitivities(network, groups, tries, lambda network: 0.0, SAMPLE)
    assert [(entry.names, entry.alpha) for entry in found] == tries[1:]


def test_convolutions_that_are_not_tried_pool_too():
    network = small(downsample="pool")
    groups = groups_that_add(network, SAMPLE)
    seen = []

    def loss(network):
        seen.append({m.downsample for m in network.modules() if isinstance(m, OctConv3d) and 2 in m.stride[1:]})
        return 0.0

    (found,) = measure_sensitivities(network, groups, [(groups[0], 0.5)], loss, SAMPLE, network.octave_options)
    chosen = allocate(network, groups, [found], 0.99, SAMPLE, network.octave_options)
    set_alpha(network, chosen)
    loss(network)
    stem = {"conv"}  # no group has it
    assert seen == [stem | {"pool"}] * 3


@pytest.mark.parametrize("losses", [[math.nan], [0.0, math.inf]])
def test_a_loss_that_is_no_number_is_refused(losses):
    network, left = chain(), iter(losses)
    groups = groups_that_add(network, SAMPLE)
    where = "at alpha 0" if len(losses) == 1 else "with alpha 0.5 in 1"
    with pytest.raises(ValueError, match=f"the loss is {losses[-1]} {where}"):
        list(measure_sensitivities(network, groups, [(("1",), 0.5)], lambda network: next(left), SAMPLE))
    assert not any(getattr(module, "alpha", 0) for module in network.modules())


def test_the_choice_takes_what_costs_least_loss_for_what_it_saves():
    network = chain()
    octave = {alpha: count_macs(octavize(chain(), {r"^2$": alpha}), CLIP) for alpha in (0.0, 0.25, 0.5)}
    saved = {alpha: octave[0.0] - macs for alpha, macs in octave.items()}
    sensitivities = [
        Sensitivity(("1",), 0.5, 0.5, saved[0.25] // 2),  # dear
        Sensitivity(("2",), 0.25, 0.1, saved[0.25]),
        Sensitivity(("2",), 0.5, 0.3, saved[0.5]),
        Sensitivity(("3",), 0.5, 9.0, saved[0.25] // 2),
    ]
    first = allocate(network, MIDDLE, sensitivities, octave[0.25] / octave[0.0], SAMPLE)
    assert first == {"^1$": 0, "^2$": 0.25, "^3$": 0}
    assert allocate(network, MIDDLE, sensitivities, 1, SAMPLE) == dict.fromkeys(first, 0)
    second = allocate(network, MIDDLE, sensitivities, octave[0.5] / octave[0.0], SAMPLE)
    assert second == {"^1$": 0, "^2$": 0.5, "^3$": 0}
    third = allocate(network, MIDDLE, sensitivities, octave[0.5] / octave[0.0] - 1e-6, SAMPLE)
    assert third == {"^1$": 0.5, "^2$": 0.5, "^3$": 0}
    assert not any(hasattr(module, "alpha") for module in network.modules())


def test_a_loss_that_falls_counts_as_none_so_the_one_that_saves_more_goes_first():
    macs = count_macs(chain(), CLIP)
    sensitivities = [Sensitivity(("1",), 0.5, -5.0, 10), Sensitivity(("2",), 0.5, -0.1, 20)]
    assert allocate(chain(), MIDDLE, sensitivities, 1 - 1 / macs, SAMPLE) == {"^1$": 0, "^2$": 0.5, "^3$": 0}


def test_a_budget_out_of_reach_or_range_is_refused():
    sensitivities = [Sensitivity(("2",), 0.5, 0.1, 10)]
    left = count_macs(octavize(chain(), {"^2$": 0.5}), CLIP) / count_macs(chain(), CLIP)
    with pytest.raises(ValueError, match=r"0.1 of the multiply-adds is out of reach: at their highest"):
        allocate(chain(), MIDDLE, sensitivities, 0.1, SAMPLE)
    with pytest.raises(ValueError, match=f"leave {left:.3f}"):
        allocate(chain(), MIDDLE, sensitivities, 0.1, SAMPLE)
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got 0"):
        allocate(chain(), MIDDLE, sensitivities, 0, SAMPLE)
