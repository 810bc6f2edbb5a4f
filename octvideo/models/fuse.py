"""The form of a network for inference: batch norms folded into the convolutions before them."""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from octvideo.errors import UserError


def fuse(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Folds every batch norm that follows a convolution into its weight and bias, for inference.

    An octave convolution has one weight in the vanilla order of channels, and so has its batch norm: the folded weight
    still serves every alpha, and state_dicts are plain. With torch.compile, `torch._inductor.config.freezing = True`
    then turns the slices of the weight into constants. Which batch norm follows which convolution is seen in a run, and
    the fused network is compared with the model, both in 32 bits at least.

    Args:
        model: a network of ordinary modules; it is not changed.
        example: an input of the network, a Tensor. Default: a clip of (1, C, 16, 64, 64) or an image of (1, C, 64, 64).

    Returns:
        A copy in evaluation mode whose parameters want no gradients. The logits are the model's up to rounding. Batch
        norms with a forward pass of their own and those behind something else than a convolution stay.

    Raises:
        ValueError: a network that does not take the example or gives no Tensor, that has no batch norm behind a
            convolution, or that is not the same with them folded, as where a convolution's output is used elsewhere.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    dtypes = {name: tensor.dtype for name, tensor in _state(fused)}
    if any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes.values()):
        fused.float()
    clip = _example(fused) if example is None else example
    clip = clip.float() if clip.dtype in (torch.float16, torch.bfloat16) else clip
    pairs, wanted = _pairs(fused, clip)
    if not pairs:
        raise UserError(f"{type(model).__name__} has no batch norm with statistics that follows a convolution")
    for norm, convolution in pairs.items():
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    for module in fused.modules():
        for name, child in module.named_children():
            if child in pairs:
                setattr(module, name, nn.Identity())
    fused.requires_grad_(False)
    _compare(_run(fused, clip), wanted)
    for name, tensor in _state(fused):
        tensor.data = tensor.to(dtypes[name] if name in dtypes else dtypes[re.sub("bias$", "weight", name)])
    return fused


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of parameters and buffers."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _run(model: nn.Module, clip: Tensor) -> list[Tensor]:
    """The Tensors that a network gives; without the 10 bits that convolutions on GPUs may have."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        leaves = torch.utils._pytree.tree_leaves(model(clip))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _example(model: nn.Module) -> Tensor:
    """A random input of a network whose first convolution reads it; other random numbers stay as they would be."""
    first = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    if first is None:
        raise UserError(f"{type(model).__name__} has no convolution")
    size = (16, 64, 64)[3 - len(first.kernel_size) :]
    clip = torch.randn(1, first.in_channels, *size, generator=torch.Generator().manual_seed(0))
    return clip.to(first.weight)


def _pairs(model: nn.Module, clip: Tensor) -> tuple[dict[Any, Any], list[Tensor]]:
    """The convolution before each batch norm that always and only follows it, and what the network gives."""
    outputs: dict[int, tuple[nn.Module, Any]] = {}  # kept, so that no other object gets its number
    calls: dict[nn.Module, int] = defaultdict(int)
    read: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[id(output)] = (module, output)
        calls[module] += 1

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        number = id(args[0] if args else kwargs["input"])
        read[module].append(outputs[number][0] if number in outputs else None)

    hooks = []
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not is_parametrized(module):
            hooks.append(module.register_forward_hook(keep))
        elif _is_plain_norm(module):
            hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        given = _run(model, clip)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UserError(
            f"{type(model).__name__} does not take an example of shape {tuple(clip.shape)}; give fuse one that it "
            f"takes: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not any(tensor.is_floating_point() for tensor in given):
        raise UserError(f"{type(model).__name__} gives no floating-point Tensor to compare the fused network by")
    pairs = {}
    for norm, convolutions in read.items():
        convolution = convolutions[0]
        if convolution is not None and set(convolutions) == {convolution} and calls[convolution] == len(convolutions):
            pairs[norm] = convolution
    return pairs, given


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics, and no more; timm's, for one, has an activation inside."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
        return False
    forward: Any = type(module).forward
    return forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def _compare(given: list[Tensor], wanted: list[Tensor]) -> None:
    """Raises ValueError where the fused network differs by more than rounding."""
    for have, want in zip(given, wanted, strict=True):
        if not want.is_floating_point():
            continue  # made from those that are
        scale = want.abs().max().clamp(min=torch.finfo(want.dtype).tiny)
        error = float((have - want).abs().max() / scale)
        if not error < 5000 * torch.finfo(want.dtype).eps:
            raise UserError(
                f"the fused network's output differs from the model's by {error:.1g} of its largest value: the output "
                "of a convolution is used elsewhere than in the batch norm behind it, or a hook changes it"
            )
