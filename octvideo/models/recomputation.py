"""Activation checkpointing: residual blocks keep only their input for the backward pass, and compute the rest again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pytorchvideo.models.resnet import ResBlock
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from octvideo.errors import UserError
from octvideo.layers.octaves import Octaves
from octvideo.layers.pending import Pending
from octvideo.layers.swapping import swap_class
from octvideo.models.zoo import NonLocalResBlock


class _Recomputed(nn.Module):
    """In front of a block's class among the bases: checkpoints what that class does in training."""

    def forward(self, x: Tensor | Octaves) -> Any:  # Tensor or Octaves
        block: Any = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return block(x)
        if torch.compiler.is_compiling():  # updates statistics once however often it computes, and has no contexts
            if isinstance(x, Octaves):  # an input of compiled code would be merged
                maps, spec = tree_flatten(x)
                return checkpoint(lambda *maps: block(tree_unflatten(maps, spec)), *maps, use_reentrant=False)
            return checkpoint(block, x, use_reentrant=False)
        if isinstance(x, Pending):
            x.ready(pool=True)  # outside of what is computed again

        def made(x: Any) -> Any:
            output = block(x)
            if isinstance(output, Pending):
                output.ready(pool=True)
            return output

        return checkpoint(made, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _spare_buffers(self)))


class RecomputedResBlock(_Recomputed, ResBlock):  # type: ignore[misc]
    """A residual block that is computed again in the backward pass."""


class RecomputedNonLocalResBlock(_Recomputed, NonLocalResBlock):
    """A residual block and the non-local block behind it, both computed again in the backward pass."""


def recompute(network: nn.Module) -> int:
    """Switches on activation checkpointing for a network's residual and non-local blocks, in place; returns how many.

    In training, only a block's input is kept for the backward pass, which costs another forward pass of the blocks.
    Gradients, batch-norm statistics and dropout are the same, bit for bit; names, weights and state_dict stay. Where
    torch.compile breaks the graph inside a block, statistics are updated twice a step: compile such networks without.
    Raises UserError for a network without pytorchvideo's `ResBlock`s.
    """
    kinds = {ResBlock: RecomputedResBlock, NonLocalResBlock: RecomputedNonLocalResBlock}
    for module in network.modules():
        swap_class(module, kinds.get(type(module), type(module)))
    count = sum(isinstance(module, _Recomputed) for module in network.modules())
    if not count:
        raise UserError(f"{type(network).__name__} has no residual blocks (pytorchvideo's ResBlock) to recompute")
    return count


@contextmanager
def _spare_buffers(block: nn.Module) -> Iterator[None]:
    # The forward pass has already updated the running statistics, so the block gets copies to write to. Without any,
    # batch norms would keep fewer tensors than in the forward pass, which checkpointing refuses.
    with ExitStack() as stack:
        for module in block.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                stack.callback(setattr, module, name, buffer)
                setattr(module, name, buffer.clone())
        yield
