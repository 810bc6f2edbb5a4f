"""Activation checkpointing: residual blocks that keep their input for the backward pass, and compute the rest again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from pytorchvideo.models.resnet import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from octvideo.errors import UserError
from octvideo.layers.octaves import Octaves
from octvideo.models.zoo import NonLocalResBlock


class _Recomputed(nn.Module):
    """What makes a block one that is computed again; in front of the block's class among the bases."""

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        if torch.compiler.is_compiling():  # it writes statistics once whatever is computed again, and knows no contexts
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[misc, no-any-return]
        contexts = functools.partial(_contexts, self)
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=contexts)  # type: ignore[misc, no-any-return]


class RecomputedResBlock(_Recomputed, ResBlock):  # type: ignore[misc]
    """A residual block that is computed again in the backward pass."""


class RecomputedNonLocalResBlock(_Recomputed, NonLocalResBlock):
    """A residual block with a non-local block behind it, both computed again in the backward pass."""


_RECOMPUTED: dict[type[nn.Module], type[nn.Module]] = {
    ResBlock: RecomputedResBlock,
    NonLocalResBlock: RecomputedNonLocalResBlock,
}


def recompute(network: nn.Module) -> int:
    """Lets the residual and non-local blocks of a network compute their activations again, in place.

    In training only a block's input is kept for the backward pass, which costs another forward pass of the blocks.
    Gradients, batch-norm statistics and dropout are the same, bit for bit. Names, weights and state_dict stay. Where
    torch.compile breaks the graph inside a block, statistics move twice a step: compile such networks without this.

    Args:
        network: one of `octvideo.models.zoo`, or another of pytorchvideo's `ResBlock`s.

    Returns:
        The number of blocks.

    Raises:
        ValueError: the network has none.
    """
    for module in network.modules():
        if type(module) in _RECOMPUTED:
            module.__class__ = _RECOMPUTED[type(module)]
    count = sum(isinstance(module, _Recomputed) for module in network.modules())
    if count == 0:
        raise UserError(f"{type(network).__name__} has no residual blocks (pytorchvideo's ResBlock) to recompute")
    return count


def _contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    return contextlib.nullcontext(), _spare_buffers(block)


@contextlib.contextmanager
def _spare_buffers(block: nn.Module) -> Iterator[None]:
    """Gives the block copies of its buffers to write to.

    The forward pass has already updated the running statistics. Without any (track_running_stats False), batch norms
    would keep fewer tensors than in the forward pass, which checkpointing refuses.
    """
    buffers = [
        (module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in buffers:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
