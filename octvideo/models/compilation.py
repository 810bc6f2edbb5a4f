"""Compilation of a network by torch.compile: as a whole, or block by block in a fraction of the time."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from pytorchvideo.models.resnet import ResBlock
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from octvideo.errors import UserError


def compile_network(network: nn.Module, how: bool | str | None) -> None:
    """Compiles a network in place: block by block ("blocks"), as a whole (True or "true"), or not at all."""
    if how == "blocks":
        compile_blocks(network)
    elif how:
        network.compile()


def compile_blocks(network: nn.Module, **options: Any) -> int:
    """Compiles a network's residual blocks in place, each kind of them once; returns how many kinds there are.

    Blocks are pytorchvideo's `ResBlock`s and, in any network, the outermost modules of a class of which it has two that
    are alike, such as torchvision's `Bottleneck`; everything else runs as before. Clips of the first shape get code of
    their own, in training and in evaluation, and all other shapes share code for any shape. `options` are those of
    torch.compile. Names, weights and state_dict stay; copies and pickles are not compiled. Raises UserError for a
    network without such blocks.
    """
    kinds: dict[str, _Kind] = {}
    for block in _blocks(network):
        kind = kinds.setdefault(repr(block), _Kind(f"{type(block).__name__}_{len(kinds)}", options))
        block._compiled_call_impl = partial(kind, block)  # what nn.Module.compile sets
    if not kinds:
        raise UserError(f"{type(network).__name__} has no repeated blocks to compile")
    return len(kinds)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost residual blocks, and those of a class of which two are alike."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    nested = [x for x in network.modules() if any(x.children()) and not isinstance(x, containers)]
    counts = Counter((type(module), repr(module)) for module in nested)
    repeated = {kind for (kind, _), count in counts.items() if count > 1}

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        if type(module) in repeated or isinstance(module, ResBlock):
            yield module
        else:
            for child in module.children():
                yield from outermost(child)

    return outermost(network)


class _Kind:
    """The compiled code of blocks that are alike."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options
        self.first: dict[bool, list[torch.Size]] = {}
        self.compiled: dict[tuple[bool, bool], Any] = {}

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        args, kwargs = tree_unflatten(leaves, form)  # octaves that waited to be made are plain ones now
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        shapes = [x.shape for x in inputs]
        mode = block.training, self.first.setdefault(block.training, shapes) != shapes
        if mode not in self.compiled:
            # torch.compile limits the codes for each code object: equal ones of several kinds would use it up.
            name = f"{self.name}_{'train' if mode[0] else 'eval'}_{'any' if mode[1] else 'first'}"
            own = FunctionType(_call.__code__.replace(co_name=name), _call.__globals__, name)
            self.compiled[mode] = torch.compile(own, dynamic=None if mode[1] else False, **self.options)
        if mode[1]:  # all but the channels at once, not one after the other as they happen to change
            for x in inputs:
                torch._dynamo.maybe_mark_dynamic(x, [0, *range(2, x.dim())])
        return self.compiled[mode](block, *args, **kwargs)


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)
