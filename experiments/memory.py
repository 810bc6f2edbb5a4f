"""The memory of a training step: what is kept for the backward pass, and the most that a call needs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def count_saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without parameters and buffers.

    Counts what autograd saves: the clip where a convolution needs it, and under autocast the copies of weights; not
    what an autograd function keeps in other ways than `save_for_backward`. `forward` runs the model with gradients on,
    and returns something that depends on all it computed, such as a loss.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()  # keeps the graph, or a storage freed meanwhile could be counted as another
    del kept
    return sum(size for pointer, size in saved.items() if pointer not in own)


def measure_peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of CUDA memory that a call needs, beyond those allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
