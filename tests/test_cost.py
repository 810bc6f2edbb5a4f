"""What costs: numbers that a hand can count, and measurements in turn."""

import pytest
import torch
from torch import nn

from octvideo.errors import UserError
from octvideo.models.cost import count_macs, count_macs_of, time_interleaved


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
