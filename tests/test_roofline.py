"""Predicted time: what a hand computes, machines as users name them, and alphas chosen by it."""

import itertools

import pytest
import torch
from pytorchvideo.models import resnet
from torch import nn

from octvideo import create_model, octavize
from octvideo.errors import UserError
from octvideo.models import choose_alpha as choosing
from octvideo.models.choose_alpha import choose_alpha
from octvideo.models.cost import Cost, count_macs
from octvideo.models.roofline import MACHINES, Machine, machine_of, measure_machine
from octvideo.models.zoo import set_alpha

FP32 = torch.float32
ARITHMETIC = Machine("arithmetic", {FP32: 1e9}, 1e15, 0)  # where bytes and launches cost nothing
LAUNCHES = Machine("launches", {FP32: 1e15}, 1e15, 1e-3)


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic_and_a_launch():
    machine = Machine("mine", {FP32: 20.0}, 8.0, 0.25)
    assert machine.seconds(Cost([(40, 8), (0, 24)]), FP32) == 4 + 3 + 2 * 0.25
    assert machine.seconds(Cost(), FP32) == 0
    with pytest.raises(UserError, match=r"machine mine has no torch.bfloat16: choose fp32"):
        machine.seconds(Cost(), torch.bfloat16)


def test_a_better_machine_is_never_slower():
    cost = Cost([(10**9, 10**6), (0, 10**8), (10**6, 10**7)])
    base = Machine("base", {FP32: 1e12}, 1e11, 1e-5)
    for better in (
        Machine("flops", {FP32: 2e12}, 1e11, 1e-5),
        Machine("bandwidth", {FP32: 1e12}, 2e11, 1e-5),
        Machine("launch", {FP32: 1e12}, 1e11, 1e-6),
    ):
        assert better.seconds(cost, FP32) < base.seconds(cost, FP32)
    more = Cost([*cost.operations, (0, 8)])
    assert base.seconds(more, FP32) > base.seconds(cost, FP32)
    assert (
        MACHINES["h100"].seconds(cost, FP32) < MACHINES["a100"].seconds(cost, FP32) < MACHINES["t4"].seconds(cost, FP32)
    )


def test_machines_are_presets_numbers_or_this_one():
    assert machine_of("t4") is MACHINES["t4"]
    mine = machine_of("600e12,2.8e12,4e-6")
    assert (mine.flops[torch.bfloat16], mine.bandwidth, mine.launch) == (600e12, 2.8e12, 4e-6)
    for text in ("h1000", "1,2", "1,2,x", "0,1,1", "1,1,-1", "nan,1,1"):
        with pytest.raises(UserError, match=rf"machine must be h100, a100, t4, laptop-cpu, here, .* got '{text}'"):
            machine_of(text)


def test_this_machine_is_measured():
    here = measure_machine(FP32)
    assert 1e9 < here.flops[FP32] < 1e14
    assert 1e8 < here.bandwidth < 1e13
    assert 1e-8 < here.launch < 1e-3


def test_the_report_says_which_layers_are_slower_and_which_are_not():
    def reported(channels, size):
        layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        return octavize(nn.Sequential(nn.Conv2d(3, channels, 1), *layers), 0.5, sample=torch.zeros(1, 3, size, size))

    report = reported(8, 8).octave_report
    before, after = report.seconds()
    assert f", slower on h100: {1e6 * before:.1f} -> {1e6 * after:.1f} us ({after / before:.2f})" in report.summary()
    assert "slower on h100" in str(report).splitlines()[3]
    before, after = report.assignments[2].seconds(ARITHMETIC)
    assert after < before
    large = reported(1024, 256).octave_report
    assert "slower on h100" not in large.summary()
    assert "slower on h100" not in str(large).splitlines()[3]


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setitem(resnet._MODEL_STAGE_DEPTH, 50, (1, 1, 1, 1))
    with torch.device("meta"):
        return create_model("i3d_r50", alpha=0.25, width=8)


def test_where_arithmetic_is_all_every_stage_becomes_octave(network):
    state = [module.alpha for module in network.modules() if hasattr(module, "alpha")]
    chosen = choose_alpha(network, ARITHMETIC, (3, 4, 64, 64), alphas=(0.5,))
    assert chosen.alpha == {rf"^blocks\.{i}\.": 0.5 for i in (1, 3, 4, 5)}
    assert [module.alpha for module in network.modules() if hasattr(module, "alpha")] == state
    counts = [count_macs(set_alpha(network, alpha), (3, 4, 64, 64)) for alpha in (0, chosen.alpha)]
    assert chosen.seconds / chosen.vanilla == pytest.approx(counts[1] / counts[0])
    assert chosen.seconds < chosen.vanilla


def test_where_launches_are_all_no_stage_does(network):
    chosen = choose_alpha(network, LAUNCHES, (3, 4, 64, 64), alphas=(0.5,))
    assert chosen.alpha == {}
    assert chosen.seconds == chosen.vanilla


def seconds_of(*weights, merge):
    """What `choose_alpha` counts, in seconds: 100, less what each stage saves, and more for a merge between stages."""

    def count_cost(network, clip_size, **_):
        shares = [getattr(network.blocks[i].res_blocks[0].branch2.conv_b, "alpha", 0) for i in (1, 3, 4, 5)]
        merges = sum(one != other for one, other in itertools.pairwise((0, *shares, 0)))
        saved = sum(weight * share for weight, share in zip(weights, shares, strict=True))
        return {"": Cost([(round(1e6 * (100 - saved + merge * merges)), 0)])}

    return count_cost


MICROSECONDS = Machine("counted", {FP32: 2e6}, 1, 0)


@pytest.mark.parametrize(
    ("weights", "merge", "budget", "alpha"),
    [
        ((20, 20, 20, 20), 1, None, {1: 0.5, 3: 0.5, 4: 0.5, 5: 0.5}),
        ((20, 20, 20, -20), 1, None, {1: 0.5, 3: 0.5, 4: 0.5}),  # a stage that would get slower
        ((4, 4, 4, 4), 1.5, None, {1: 0.5, 3: 0.5, 4: 0.5, 5: 0.5}),  # gain together, though no stage does alone
        ((4, 4, 4, 4), 5, None, {}),
        ((0, 0, 40, 0), 1, None, {4: 0.5}),
        ((40, 20, 0, 0), 0, 0.8, {1: 0.5}),  # the fastest takes .7: the stage that gains least goes
        ((40, 20, 0, 0), 0, 0.85, {1: 0.5}),
        ((40, 20, 0, 0), 0, 0.9, {1: 0.25}),
    ],
)
def test_the_fastest_alphas_and_the_smallest_within_a_budget(network, monkeypatch, weights, merge, budget, alpha):
    monkeypatch.setattr(choosing, "count_cost", seconds_of(*weights, merge=merge))
    chosen = choose_alpha(network, MICROSECONDS, alphas=(0.25, 0.5), budget=budget)
    assert chosen.alpha == {rf"^blocks\.{i}\.": value for i, value in alpha.items()}
    assert chosen.vanilla == 100
    assert chosen.seconds <= 100 * (budget or 1)


def test_a_budget_that_nothing_meets_is_an_error(network, monkeypatch):
    monkeypatch.setattr(choosing, "count_cost", seconds_of(20, 20, 20, 20, merge=0))
    with pytest.raises(UserError, match=r"no choice meets .* of 0.5 on counted: the fastest alphas take 0.600 of"):
        choose_alpha(network, MICROSECONDS, budget=0.5)


def test_pathways_of_slowfast_choose_by_themselves(monkeypatch):
    def count_cost(network, clip_size, **_):
        slow, fast = (network.blocks[1].multipathway_blocks[i].res_blocks[0].branch2.conv_b for i in (0, 1))
        return {"": Cost([(round(1e6 * (100 - 10 * getattr(slow, "alpha", 0) + getattr(fast, "alpha", 0))), 0)])}

    monkeypatch.setattr(choosing, "count_cost", count_cost)
    monkeypatch.setitem(resnet._MODEL_STAGE_DEPTH, 50, (1, 1, 1, 1))
    with torch.device("meta"):
        network = create_model("slowfast_r50")
    chosen = choose_alpha(network, MICROSECONDS, alphas=(0.5,))
    assert chosen.alpha[r"^blocks\.1\.multipathway_blocks\.0\."] == 0.5
    assert r"^blocks\.1\.multipathway_blocks\.1\." not in chosen.alpha
    assert chosen.seconds == 95
    set_alpha(network, chosen.alpha)


def test_only_networks_of_the_zoo_have_stages():
    with pytest.raises(UserError, match="set_alpha takes a network that create_model built"):
        choose_alpha(nn.Conv3d(3, 3, 1), ARITHMETIC)
