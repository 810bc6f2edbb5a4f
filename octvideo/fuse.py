"""The form of a network for inference: batch norms folded into the convolutions before them."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized


def fuse(model: nn.Module, example: Any = None) -> nn.Module:
    """Folds every batch norm that follows a convolution into its weight and bias, for inference.

    An octave convolution has one weight in the vanilla order of channels, and so has its batch norm: the folded weight
    still serves every alpha, and state_dicts are plain. With torch.compile, `torch._inductor.config.freezing = True`
    then turns the slices of the weight into constants. Which batch norm follows which convolution is seen in a run, and
    the fused network is compared with the model.

    Args:
        model: a network of ordinary modules; it is not changed.
        example: an input of the network. Default: a clip of (1, C, 16, 64, 64), or an image of (1, C, 64, 64).

    Returns:
        A copy in evaluation mode whose parameters want no gradients. The logits are the model's up to rounding.

    Raises:
        ValueError: a network that the default example does not fit, that has no batch norm behind a convolution, or
            that uses the output of a convolution elsewhere than in its batch norm.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    clip = _example(fused) if example is None else example
    pairs, wanted = _pairs(fused, clip)
    if not pairs:
        raise ValueError(f"{type(model).__name__} has no batch norm with statistics that follows a convolution")
    for norm, convolution in pairs.items():
        bias = convolution.bias
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    for module in fused.modules():
        for name, child in module.named_children():
            if child in pairs:
                setattr(module, name, nn.Identity())
    fused.requires_grad_(False)
    _compare(_run(fused, clip), wanted)
    return fused


def _run(model: nn.Module, clip: Any) -> list[Tensor]:
    """The Tensors that a network gives."""
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(model(clip))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _example(model: nn.Module) -> Tensor:
    """A random input of a network whose first convolution reads it."""
    first = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no convolution")
    size = (16, 64, 64)[3 - len(first.kernel_size) :]
    return torch.randn(1, first.in_channels, *size, dtype=first.weight.dtype, device=first.weight.device)


def _pairs(model: nn.Module, clip: Any) -> tuple[dict[Any, Any], list[Tensor]]:
    """The convolution before each batch norm that always and only follows it, and what the network gives."""
    outputs: dict[int, tuple[nn.Module, Any]] = {}  # kept, so that no other object gets its number
    calls: dict[nn.Module, int] = defaultdict(int)
    read: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[id(output)] = (module, output)
        calls[module] += 1

    def look(module: nn.Module, args: Any) -> None:
        read[module].append(outputs[id(args[0])][0] if id(args[0]) in outputs else None)

    hooks = []
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not is_parametrized(module):
            hooks.append(module.register_forward_hook(keep))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(look))
    try:
        given = _run(model, clip)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"{type(model).__name__} does not take an example of shape {tuple(getattr(clip, 'shape', ()))}; "
            f"give fuse one that it takes: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    pairs = {}
    for norm, convolutions in read.items():
        convolution = convolutions[0]
        if convolution is not None and set(convolutions) == {convolution} and calls[convolution] == len(convolutions):
            pairs[norm] = convolution
    return pairs, given


def _compare(given: list[Tensor], wanted: list[Tensor]) -> None:
    """Raises ValueError where the fused network differs by more than rounding."""
    for have, want in zip(given, wanted, strict=True):
        precision = max(torch.finfo(want.dtype).eps, torch.finfo(torch.float32).eps)
        scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        error = float((have - want).abs().max() / scale)
        if not error < 5000 * precision:
            raise ValueError(
                f"the fused network's output differs from the model's by {error:.1g} of its largest value: the output "
                "of a convolution is used elsewhere than in the batch norm behind it"
            )
