"""The memory of a training step: numbers that a hand can count."""

import pytest
import torch
import torch.nn.functional as F
from memory import count_saved_bytes, measure_peak_bytes
from torch import nn

FLOAT = 4  # bytes


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_bytes_are_what_a_call_allocates():
    size = 1 << 24
    assert measure_peak_bytes(lambda: F.relu(torch.ones(size, device="cuda"))) == 2 * size * FLOAT
