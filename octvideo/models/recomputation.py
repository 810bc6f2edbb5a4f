"""Activation checkpointing: residual blocks keep only their input for the backward pass, and compute the rest again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pytorchvideo.models.resnet import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from octvideo.errors import UserError
from octvideo.layers.octaves import Octaves
from octvideo.layers.swapping import swap_class
from octvideo.models.zoo import NonLocalResBlock


class _Recomputed(nn.Module):
    """In front of a block's class among the bases: checkpoints what that class does in training."""

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        block: Any = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return block(x)
        if torch.compiler.is_compiling():  # updates statistics once however often it computes, and has no contexts
            return checkpoint(block, x, use_reentrant=False)

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), _spare_buffers(self)

        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


class RecomputedResBlock(_Recomputed, ResBlock):  # type: ignore[misc]
    """A residual block that is computed again in the backward pass."""


class RecomputedNonLocalResBlock(_Recomputed, NonLocalResBlock):
    """A residual block with a non-local block behind it, both computed again in the backward pass."""


def recompute(network: nn.Module) -> int:
    """Switches on activation checkpointing for the residual and non-local blocks of a network, in place.

    In training, only a block's input is kept for the backward pass, which costs another forward pass of the blocks.
    Gradients, batch-norm statistics and dropout are the same, bit for bit; names, weights and state_dict stay. Where
    torch.compile breaks the graph inside a block, statistics are updated twice a step: compile such networks without.

    Args:
        network: one of `octvideo.models.zoo`, or any with pytorchvideo's `ResBlock`s.

    Returns:
        The number of blocks.

    Raises:
        UserError: the network has none.
    """
    kinds = {ResBlock: RecomputedResBlock, NonLocalResBlock: RecomputedNonLocalResBlock}
    for module in network.modules():
        swap_class(module, kinds.get(type(module), type(module)))
    count = sum(isinstance(module, _Recomputed) for module in network.modules())
    if count == 0:
        raise UserError(f"{type(network).__name__} has no residual blocks (pytorchvideo's ResBlock) to recompute")
    return count


@contextlib.contextmanager
def _spare_buffers(block: nn.Module) -> Iterator[None]:
    """Gives the block copies of its buffers to write to: the forward pass has already updated the running statistics.

    (Without any, batch norms would keep fewer tensors than in the forward pass, which checkpointing refuses.)
    """
    places = [(module, *place) for module in block.modules() for place in module.named_buffers(recurse=False)]
    for module, name, buffer in places:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in places:
            setattr(module, name, buffer)
