"""The form of a network for inference: batch norms folded into the convolutions before them."""

import copy
import re
from collections import Counter, defaultdict
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from octvideo.errors import UserError

HALF = {torch.float16, torch.bfloat16}


def fuse(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy for inference, in which every batch norm that follows a convolution is folded into its weight and bias.

    The folded weight, like the octave convolution's, is in the vanilla order of channels: it serves every alpha. With
    torch.compile, `torch._inductor.config.freezing = True` then turns its slices into constants. Which batch norm
    follows which convolution is observed in a forward pass on `example` (default: a clip of (1, C, 16, 64, 64) or an
    image of (1, C, 64, 64)), and the logits are compared with the model's, in 32 bits. Others, and those with a forward
    pass of their own, stay. Raises UserError for a network that does not take the example or returns no Tensor, that
    has no such batch norm, or that changes by folding, because a convolution's output is used elsewhere too.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    dtypes = {name: tensor.dtype for name, tensor in chain(fused.named_parameters(), fused.named_buffers())}
    fused = fused.float() if HALF & set(dtypes.values()) else fused
    clip = _example(fused) if example is None else example
    clip = clip.float() if clip.dtype in HALF else clip
    pairs, wanted = _pairs(fused, clip)
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
                differs = f"the fused network's output differs from the model's by {error:.1g} of its largest value"
                elsewhere = "the output of a convolution is used elsewhere than in the batch norm behind it"
                raise UserError(f"{differs}: {elsewhere}, or a hook changes it")
    for name, tensor in chain(fused.named_parameters(), fused.named_buffers()):  # a new bias takes its weight's dtype
        tensor.data = tensor.to(dtypes[name] if name in dtypes else dtypes[re.sub("bias$", "weight", name)])
    return fused


def _run(model: nn.Module, clip: Tensor) -> list[Tensor]:
    """The Tensors that a network returns; without TF32, which would leave convolutions on GPUs 10 bits."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        leaves = torch.utils._pytree.tree_leaves(model(clip))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _example(model: nn.Module) -> Tensor:
    """A random input for the first convolution, made without touching the global random state."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            size = (1, module.in_channels, *(16, 64, 64)[3 - len(module.kernel_size) :])
            return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(module.weight)
    raise UserError(f"{type(model).__name__} has no convolution")


def _pairs(model: nn.Module, clip: Tensor) -> tuple[dict[Any, Any], list[Tensor]]:
    """The convolution before each batch norm that always and only follows it, and what the network returns."""
    outputs: dict[int, tuple[nn.Module, Any]] = {}  # kept alive, so that no other object gets its id
    calls: Counter[nn.Module | None] = Counter()
    read: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)
    plain = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # timm's batch norm, for one, has an activation inside
    name = type(model).__name__

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[id(output)] = (module, output)
        calls[module] += 1

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        read[module].append(outputs.get(id(args[0] if args else kwargs["input"]), (None, None))[0])

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not is_parametrized(module):
                hooks.enter_context(module.register_forward_hook(keep))
            elif isinstance(module, _BatchNorm) and module.running_mean is not None and type(module).forward in plain:
                hooks.enter_context(module.register_forward_pre_hook(look, with_kwargs=True))
        try:
            returned = _run(model, clip)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            advice = f"give fuse one that it takes: {error}"
            raise UserError(f"{name} does not take an example of shape {tuple(clip.shape)}; {advice}") from error
    if not any(tensor.is_floating_point() for tensor in returned):
        raise UserError(f"{name} gives no floating-point Tensor to compare the fused network by")
    pairs = {norm: b[0] for norm, b in read.items() if b[0] and set(b) == {b[0]} and calls[b[0]] == len(b)}
    if not pairs:
        raise UserError(f"{name} has no batch norm with statistics that follows a convolution")
    return pairs, returned
