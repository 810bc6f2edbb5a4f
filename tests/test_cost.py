"""What costs: numbers that a hand can count, and measurements in turn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octvideo.models.cost import count_macs_of, count_saved_bytes, measure_peak_bytes, time_interleaved

FLOAT = 4  # bytes


def test_macs_of_a_call_are_those_of_its_convolution():
    layer = nn.Conv3d(6, 10, (1, 3, 3), padding=(0, 1, 1))
    assert count_macs_of(lambda: layer(torch.ones(2, 6, 4, 5, 7))) == 2 * 10 * 6 * 9 * 4 * 5 * 7


def test_saved_bytes_are_what_backward_reads_without_the_parameters():
    network = nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 2, 1))
    clip = torch.ones(2, 3, 4, 5, 6)
    cells = 2 * 4 * 5 * 6
    # The clip for the first weight's gradient, and ReLU's output once, though ReLU and the second convolution save it.
    assert count_saved_bytes(network, lambda: network(clip).sum()) == cells * (3 + 8) * FLOAT


def test_saved_bytes_count_a_view_as_all_of_its_memory_and_buffers_not_at_all():
    network = nn.BatchNorm3d(4)
    values = torch.ones(2, 8, 1, 3, 3, requires_grad=True)
    assert count_saved_bytes(network.eval(), lambda: network(values[:, :4])) == values.nbytes
    assert count_saved_bytes(network, lambda: values[:, :4] * values[:, 4:]) == values.nbytes


def test_nothing_is_saved_without_gradients():
    network = nn.Conv3d(3, 8, 1)
    with torch.no_grad():
        assert count_saved_bytes(network, lambda: network(torch.ones(1, 3, 2, 2, 2))) == 0


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_bytes_are_what_a_call_allocates():
    size = 1 << 24
    assert measure_peak_bytes(lambda: F.relu(torch.ones(size, device="cuda"))) == 2 * size * FLOAT
