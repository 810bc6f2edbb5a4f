"""Fused passes: what follows the convolutions of an octave layer (sums, batch norm, activation, pool), in one pass.

Two operators of the namespace `octvideo`, each with an eager reference, a fake implementation and, in `kernels`, one
in Triton for GPUs. The maps are channels_last.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from octvideo.errors import UserError
from octvideo.layers.resampling import average_pool, factors_between, lay_channels_last, runs_as_called, upsample

Mode = Literal["auto", "on", "off"]
ACTIVATIONS = ("none", "relu", "silu", "relu6")
_mode: Mode = "off"


def use_fused_passes(mode: Mode) -> Mode:
    """Chooses where octave layers leave sums, batch norm and activation to one pass; returns the mode until then.

    "auto": on CUDA devices where Triton is installed, in eager mode; "on": in eager mode on any device (CPUs run the
    eager reference, which tests use and which is no faster); "off": nowhere. Results are equal up to rounding.
    """
    global _mode
    if mode not in get_args(Mode):
        raise UserError(f"fused passes are one of {', '.join(get_args(Mode))}, got {mode!r}")
    before, _mode = _mode, mode
    return before


def passes_fused(x: Tensor) -> bool:
    """Whether features like `x` wait for a fused pass."""
    if _mode == "off" or x.dim() not in (4, 5) or not x.is_floating_point() or (x.is_cuda and x.dtype == torch.float64):
        return False
    return (_mode == "on" or (x.is_cuda and _has_triton())) and runs_as_called()


@cache
def _has_triton() -> bool:  # on a GPU that it knows; asking takes longer than a kernel
    from torch.utils._triton import has_triton

    return has_triton()


# What the operators take; their implementations below unpack it in this order.
_library = torch.library.Library("octvideo", "FRAGMENT")
_MAPS = "Tensor high, Tensor? add, Tensor low, Tensor? low_add"
_NORM = "Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps"
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum"
_library.define(f"statistics({_MAPS}, {_RUNNING}) -> (Tensor, Tensor)")
_library.define(
    f"finish({_MAPS}, {_NORM}, Tensor? plus_high, Tensor? plus_low, bool of_batch, str activation, bool pool) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"finish_backward(Tensor? grad_high, Tensor? grad_low, Tensor? grad_pooled, {_MAPS}, {_NORM}, Tensor? out_high, "
    "Tensor? out_low, bool plus, bool of_batch, str activation) -> Tensor[]"
)


def _shares(add: Tensor | None, low_add: Tensor | None, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the high and to the low map; an `add` of all channels holds both."""
    if add is not None and add.shape[1] > channels:
        return add[:, :channels], add[:, channels:]
    return add, low_add


def _sums(high: Tensor, add: Tensor | None, low: Tensor, low_add: Tensor | None) -> tuple[Tensor, Tensor]:
    add, low_add = _shares(add, low_add, high.shape[1])
    high = high if add is None else high + upsample(add, high.shape[2:])
    return high, low if low_add is None else low + low_add


def _statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Means and variances (C,) of the batch, in 32 bits at least, which move the running ones as F.batch_norm does."""
    *maps, running_mean, running_var, momentum = arguments
    variances, means, factors = list[Tensor](), list[Tensor](), list[Tensor]()
    for x in _sums(*maps):
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide.transpose(0, 1).flatten(1), 1, correction=0)
        count = x.numel() // x.shape[1]
        variances += [variance]
        means += [mean]
        factors += [mean.new_full((x.shape[1],), count / max(1, count - 1))]
    mean, variance = torch.cat(means), torch.cat(variances)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((variance * torch.cat(factors)).to(running_var.dtype), momentum)
    return mean, variance


def _activate(x: Tensor, activation: str) -> Tensor:
    return x if activation == "none" else getattr(F, activation)(x)


def _finished(
    maps: Any, norm: Any, pluses: Any, of_batch: bool, activation: str, factors: tuple[int, ...] | None
) -> tuple[Tensor, ...]:
    """The eager reference, whose gradient is autograd's: normalise with statistics of the batch itself `of_batch`."""
    mean, var, weight, bias, eps = norm
    outputs, at = [], 0
    for x, plus in zip(_sums(*maps), pluses, strict=True):
        rows, y = slice(at, at := at + x.shape[1]), x
        if mean is not None:
            mine: Any = [None if part is None else part[rows] for part in (mean, var, weight, bias)]
            if of_batch:
                mine[:2] = [None, None]
            y = F.batch_norm(x, mine[0], mine[1], mine[2], mine[3], of_batch, 0.0, eps)
        outputs.append(lay_channels_last(_activate(y if plus is None else y + plus, activation)))
    pooled = average_pool(outputs[0], factors) if factors else outputs[0].new_empty(0)
    return (*outputs, pooled)


def _factors(high: Tensor, low: Tensor) -> tuple[int, ...]:
    return factors_between(high.shape[2:], low.shape[2:])


def _finish(*arguments: Any) -> tuple[Tensor, ...]:
    """(high, low, pooled) of act(norm(sum) + plus); `pooled`, the mean of high over each low position, if asked for."""
    maps, norm, pluses, (of_batch, activation, pool) = (arguments[i:j] for i, j in ((0, 4), (4, 9), (9, 11), (11, 14)))
    with torch.no_grad():
        return _finished(maps, norm, pluses, of_batch, activation, _factors(maps[0], maps[2]) if pool else None)


def _finish_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of high, add, low (low_add's is the same), weight, bias and both pluses; empty where there are none.

    By autograd, and with a graph of their own where gradients are recorded.
    """
    grads, maps, (mean, var, *affine, eps) = arguments[:3], arguments[3:7], arguments[7:12]
    out_high, out_low, plus, of_batch, activation = arguments[12:]
    (high, _, low, _), graph = maps, torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = (*maps, *affine)
        leaves = [x if x is None or (graph and x.requires_grad) else x.detach().requires_grad_() for x in tensors]
        affine = leaves[4:]
        pluses = [torch.zeros_like(x, requires_grad=True) if plus else None for x in (high, low)]
        # The derivative of an activation behind a residual follows from its output: relu's and relu6's alone.
        masked = plus and activation != "none"
        norm, kind = (mean, var, *affine, eps), "none" if masked else activation
        outputs = list(_finished(leaves[:4], norm, pluses, of_batch, kind, None)[:2])
        if masked:
            saved: Any = (out_high, out_low)
            outs = ((out > 0) & (out < 6) if activation == "relu6" else out > 0 for out in saved)
            outputs = [y * mask for y, mask in zip(outputs, outs, strict=True)]
        outputs.append(average_pool(outputs[0], _factors(high, low)))
    given = [(y, x) for y, x in zip(outputs, grads, strict=True) if x is not None]
    wanted = [x for x in (*leaves[:3], *affine, *pluses) if x is not None]
    numbers = {"allow_unused": True, "materialize_grads": True, "create_graph": graph}
    found = iter(torch.autograd.grad([y for y, _ in given], wanted, [x for _, x in given], **numbers))
    empty = high.new_empty(0)
    return [empty if x is None else next(found) for x in (*leaves[:3], *affine, *pluses)]


def _fake_statistics(high: Tensor, add: Any, low: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    channels = high.shape[1] + low.shape[1]
    wide = torch.float64 if high.dtype == torch.float64 else torch.float32
    mean, var = (high.new_empty(channels, dtype=wide) for _ in range(2))
    return mean, var


def _fake_finish(high: Tensor, add: Any, low: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    pooled = lay_channels_last(high.new_empty((*high.shape[:2], *low.shape[2:]))) if rest[-1] else high.new_empty(0)
    return torch.empty_like(high), torch.empty_like(low), pooled


def _fake_backward(grad_high: Any, grad_low: Any, grad_pooled: Any, *rest: Any) -> list[Tensor]:
    high, add, low, _, _, _, weight, bias, *_, plus, _, _ = rest
    grads = [None if x is None else torch.empty_like(x) for x in (high, add, low, weight, bias)]
    grads += [torch.empty_like(x) if plus else None for x in (high, low)]
    return [high.new_empty(0) if x is None else x for x in grads]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *maps, mean, var, weight, bias, eps, plus_high, _, of_batch, activation, _ = inputs
    ctx.numbers = (eps, plus_high is not None, of_batch, activation)
    outs = output[:2] if plus_high is not None and activation != "none" else (None, None)
    ctx.save_for_backward(*maps, mean, var, weight, bias, *outs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_high: Any, grad_low: Any, grad_pooled: Any) -> tuple[Any, ...]:
    eps, plus, of_batch, activation = ctx.numbers
    *saved, out_high, out_low = ctx.saved_tensors
    grads: Any = (grad_high, grad_low, grad_pooled)
    rest: Any = (eps, out_high, out_low, plus, of_batch, activation)
    batched = any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in grads)
    if torch.is_grad_enabled() or batched:
        results = _finish_backward(*grads, *cast(Any, saved), *rest)
    else:
        grads = tuple([x if x is None else lay_channels_last(x) for x in grads])
        results = [lay_channels_last(x) if x.dim() > 3 else x for x in finish_backward(*grads, *saved, *rest)]
    high, add, low, weight, bias, plus_high, plus_low = (x if x.dim() > 1 or x.numel() else None for x in results)
    low_add = low if saved[3] is not None else None
    return high, add, low, low_add, None, None, weight, bias, None, plus_high, plus_low, None, None, None


def _in_triton(name: str, reference: Any) -> Any:
    def call(*arguments: Any) -> Any:
        if not _has_triton():
            return reference(*arguments)
        from octvideo.layers import kernels

        return getattr(kernels, name)(*arguments)

    return call


for _name, _reference, _fake in (
    ("statistics", _statistics, _fake_statistics),
    ("finish", _finish, _fake_finish),
    ("finish_backward", _finish_backward, _fake_backward),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    _library.impl(_name, _in_triton(_name, _reference), "CUDA")
    torch.library.register_fake(f"octvideo::{_name}", _fake, lib=_library)
torch.library.register_autograd("octvideo::finish", _backward, setup_context=_setup, lib=_library)

finish = torch.ops.octvideo.finish.default
finish_backward = torch.ops.octvideo.finish_backward.default
statistics = torch.ops.octvideo.statistics.default
