"""The form of a network for inference: batch norms folded into the convolutions before them."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from octvideo.errors import UserError

HALF = (torch.float16, torch.bfloat16)


def fuse(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Folds every batch norm that follows a convolution into its weight and bias, for inference.

    The folded weight, like the octave convolution's, is in the vanilla order of channels: it serves every alpha. With
    torch.compile, `torch._inductor.config.freezing = True` then turns its slices into constants. Which batch norm
    follows which convolution is observed in a forward pass, and the result is compared with the model's, in 32 bits.

    Args:
        model: a network of ordinary modules; it is not changed.
        example: an input of the network. Default: a clip of (1, C, 16, 64, 64) or an image of (1, C, 64, 64).

    Returns:
        A copy in evaluation mode without gradients, whose logits are the model's up to rounding. Batch norms with a
        forward pass of their own, and those that do not follow a convolution, stay.

    Raises:
        UserError: a network that does not take the example or returns no Tensor, that has no batch norm behind a
            convolution, or that changes by folding, because a convolution's output is used elsewhere too.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    dtypes = {name: tensor.dtype for name, tensor in _state(fused)}
    fused = fused.float() if any(dtype in HALF for dtype in dtypes.values()) else fused
    clip = _example(fused) if example is None else example
    clip = clip.float() if clip.dtype in HALF else clip
    pairs, wanted = _pairs(fused, clip)
    if not pairs:
        raise UserError(f"{type(model).__name__} has no batch norm with statistics that follows a convolution")
    for norm, convolution in pairs.items():
        folded = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = folded.weight, folded.bias
    for module in fused.modules():
        for name, child in module.named_children():
            if child in pairs:
                setattr(module, name, nn.Identity())
    fused.requires_grad_(False)
    for have, want in zip(_run(fused, clip), wanted, strict=True):
        if want.is_floating_point():
            error = float((have - want).abs().max() / want.abs().max().clamp(min=torch.finfo(want.dtype).tiny))
            if not error < 5000 * torch.finfo(want.dtype).eps:
                raise UserError(
                    f"the fused network's output differs from the model's by {error:.1g} of its largest value: the "
                    "output of a convolution is used elsewhere than in the batch norm behind it, or a hook changes it"
                )
    for name, tensor in _state(fused):
        tensor.data = tensor.to(dtypes[name] if name in dtypes else dtypes[re.sub("bias$", "weight", name)])
    return fused


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _run(model: nn.Module, clip: Tensor) -> list[Tensor]:
    """The Tensors that a network returns; without TF32, which would leave convolutions on GPUs 10 bits."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        leaves = torch.utils._pytree.tree_leaves(model(clip))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _example(model: nn.Module) -> Tensor:
    """A random input for the first convolution, made without touching the global random state."""
    first = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    if first is None:
        raise UserError(f"{type(model).__name__} has no convolution")
    size = (1, first.in_channels, *(16, 64, 64)[3 - len(first.kernel_size) :])
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(first.weight)


def _pairs(model: nn.Module, clip: Tensor) -> tuple[dict[Any, Any], list[Tensor]]:
    """The convolution before each batch norm that always and only follows it, and what the network returns."""
    outputs: dict[int, tuple[nn.Module, Any]] = {}  # kept alive, so that no other object gets its id
    calls: dict[nn.Module, int] = defaultdict(int)
    read: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[id(output)] = (module, output)
        calls[module] += 1

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        read[module].append(outputs.get(id(args[0] if args else kwargs["input"]), (None, None))[0])

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not is_parametrized(module):
            hooks.append(module.register_forward_hook(keep))
        elif _is_plain_norm(module):
            hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        returned = _run(model, clip)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UserError(
            f"{type(model).__name__} does not take an example of shape {tuple(clip.shape)}; give fuse one that it "
            f"takes: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not any(tensor.is_floating_point() for tensor in returned):
        raise UserError(f"{type(model).__name__} gives no floating-point Tensor to compare the fused network by")
    pairs = {}
    for norm, (first, *others) in read.items():
        if first is not None and {first, *others} == {first} and calls[first] == 1 + len(others):
            pairs[norm] = first
    return pairs, returned


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics, and no more; timm's, for one, has an activation inside."""
    forward: Any = type(module).forward
    own = forward not in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and not own
