"""What costs: numbers that a hand can count, and measurements in turn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octvideo import create_model, octavize
from octvideo.errors import UserError
from octvideo.models.cost import (
    CostCounter,
    count_compiled_kernels,
    count_cost,
    count_macs,
    count_macs_of,
    run,
    time_interleaved,
    total,
)

BF16 = torch.bfloat16
POSITIONS = 5 * 2 * 4 * 4


def costs(network, **options):
    return {name: cost.operations for name, cost in count_cost(network, (3, 2, 4, 4), batch=5, **options).items()}


def tiny():
    return nn.Sequential(nn.Conv3d(3, 8, 1, bias=False), nn.BatchNorm3d(8), nn.ReLU())


def test_inference_moves_the_bytes_that_a_hand_counts():
    clip, weight, x = 2 * 3 * POSITIONS, 2 * 24, 2 * 8 * POSITIONS
    assert costs(tiny(), dtype=BF16) == {
        "0": [(3 * 8 * POSITIONS, clip + weight + x)],
        "1": [(0, 2 * x + 4 * 2 * 8)],  # weight, bias, mean and variance of 8 channels
        "2": [(0, 2 * x)],
    }
    assert costs(tiny())["2"] == [(0, 4 * x)]  # in float32


def test_a_training_step_counts_casts_and_gradients_with_their_module():
    clip, weight, x = 2 * 3 * POSITIONS, 2 * 24, 2 * 8 * POSITIONS
    found = costs(tiny(), dtype=BF16, train=True)
    macs = 3 * 8 * POSITIONS
    assert found["0"] == [
        (0, 3 * weight),  # from float32
        (0, 3 * clip),
        (macs, clip + weight + x),
        (macs, x + clip + weight + weight),  # nobody wants the clip's gradient
        (0, 3 * weight),
    ]
    number, forward, backward = found["1"]
    assert number == (0, 2 * 8)  # num_batches_tracked
    assert 0 < forward[1] - 2 * x <= 6 * 4 * 8
    assert 0 < backward[1] - 3 * x <= 7 * 4 * 8
    assert found["2"] == [(0, 2 * x), (0, 3 * x)]


def test_writing_is_not_reading():
    x, y = torch.ones(8), torch.zeros(8)
    with CostCounter() as counter:
        x.copy_(y)
        x.zero_()
        torch.zeros_like(x)
        x.add_(y)
        x.view(2, 4)
        x.unsqueeze_(0)
    assert counter.costs[""].operations == [(0, 64), (0, 32), (0, 32), (0, 96)]


def test_counting_follows_what_runs_on_data():
    network = octavize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), 0.5)
    network = network.to(memory_format=torch.channels_last)
    for train in (False, True):
        clip = torch.rand(2, 3, 9, 9).to(memory_format=torch.channels_last)
        with CostCounter.of(network) as counter:
            run(network.train(train), clip, torch.float32, train)
        network.zero_grad()
        assert count_cost(network, (3, 9, 9), batch=2, train=train) == counter.costs


def test_an_operator_of_ours_is_one_kernel():
    @torch.library.custom_op("octvideo_test::triple", mutates_args=())
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x + x + x

    @torch.library.custom_op("octvideo_test::negate_into", mutates_args=("y",))
    def negate_into(x: torch.Tensor, y: torch.Tensor) -> None:
        y.copy_(-x)

    x, y = torch.ones(8), torch.ones(8)
    with CostCounter() as counter:
        triple(x)
        negate_into(x, y)
    assert counter.costs[""].operations == [(0, 64), (0, 96)]


def test_compiled_kernels_are_counted_and_the_model_is_left_alone(one_thread):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    state = {name: x.clone() for name, x in network.state_dict().items()}
    assert 1 <= count_compiled_kernels(network, (3, 8, 8)) <= 3
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())


def test_attention_counts_its_products():
    class Attends(nn.Module):
        def forward(self, x):
            x = x.flatten(2).transpose(1, 2).unsqueeze(1)
            return F.scaled_dot_product_attention(x, x, x)

    assert count_macs(Attends(), (8, 4, 4)) == 2 * 16 * 16 * 8


def test_the_published_network_moves_what_design_says():
    def cost(alpha, train=False):
        with torch.device("meta"):
            network = create_model("i3d_r50", alpha=alpha)
        return total(count_cost(network, batch=8, dtype=BF16, train=train))

    vanilla, octave = cost(0), cost(0.25)
    assert vanilla.bytes_moved == pytest.approx(8.0e9, rel=0.01)
    assert 176 <= vanilla.kernels <= 179
    assert vanilla.macs == pytest.approx(8 * 28.408e9, rel=1e-3)
    assert octave.macs < 0.8 * vanilla.macs
    assert octave.kernels > vanilla.kernels


def test_macs_of_a_call_are_those_of_its_convolution():
    layer = nn.Conv3d(6, 10, (1, 3, 3), padding=(0, 1, 1))
    assert count_macs_of(lambda: layer(torch.ones(2, 6, 4, 5, 7))) == 2 * 10 * 6 * 9 * 4 * 5 * 7


def test_a_clip_that_a_network_does_not_take_is_an_error_of_the_user():
    with pytest.raises(UserError, match=r"the network does not take clips of 1 x 4 x 4: .*smaller than kernel size"):
        count_macs(torch.nn.AvgPool3d((2, 1, 1)), (3, 1, 4, 4))


def test_functions_are_timed_in_turn_after_the_warm_up(monkeypatch):
    clock, called = [0.0], []

    def call(name, seconds):
        def run():
            called.append(name)
            clock[0] += seconds

        return run

    def after_each():
        called.append(".")
        clock[0] += 100

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    calls = [call("A", 1), call("B", 2), call("C", 4)]
    seconds = time_interleaved(calls, rounds=2, warmup=1, after_each=after_each)
    assert "".join(called) == "A.B.C." * 3
    assert seconds == [[1, 1], [2, 2], [4, 4]]


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_impossible_rounds_are_refused(rounds, warmup):
    with pytest.raises(ValueError, match=f"got {rounds} and {warmup}"):
        time_interleaved([], rounds=rounds, warmup=warmup)
