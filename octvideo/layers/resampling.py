"""TODO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from octvideo.errors import UserError

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> bool:
    """Whether clips lie in memory as (B, T, H, W, C), or images as (B, H, W, C); inside torch.func nobody can say."""
    return x.dim() in _LAST and not _transformed(x) and x.is_contiguous(memory_format=_LAST[x.dim()])


def lay_channels_last(x: Tensor) -> Tensor:
    """Gives clips or images channels last in memory; the same Tensor if they are.

    Octave layers do so with their maps: there a clip is a batch of images without a copy, and on a CPU pooling is up to
    37 times faster than avg_pool3d, which loses this layout too, and adding an upsampled map up to 13 times.
    """
    return x if _transformed(x) else x.contiguous(memory_format=_LAST[x.dim()])


def _transformed(x: Tensor) -> bool:
    """Whether torch.func transforms, such as vmap, are at work on a Tensor, or batched gradients: it has no layout."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(x)


def keep_layout(y: Tensor, x: Tensor) -> Tensor:
    """Gives `y` channels last if `x` has them so: torch's convolutions of small inputs on a CPU lose that layout."""
    return lay_channels_last(y) if channels_last(x) else y


def fold_time(x: Tensor) -> Tensor:
    """Views clips (B, C, T, H, W) as images: (B T, C, H, W) if channels come last in memory, else (B, C T, H, W).

    What treats every frame and channel alike is faster in 2-D: on a CPU avg_pool2d runs up to 37 times faster than
    avg_pool3d, which also loses the channels_last_3d layout and knows no bfloat16.
    """
    return x.transpose(1, 2).flatten(0, 1) if channels_last(x) else x.flatten(1, 2)


def unfold_time(images: Tensor, clips: Tensor) -> Tensor:
    """Undoes `fold_time` for images made from `clips`; height, width and (channels last) channels may differ."""
    if channels_last(clips):
        return images.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)
    return images.unflatten(1, (clips.shape[1], clips.shape[2]))


def average_pool(x: Tensor, factors: Sequence[int], *, sums: bool = False) -> Tensor:
    """Averages windows of `factors` cells; a window cut by the border averages the cells it has.

    Rounding the size up (7 -> 4) keeps cell i of the result over cells 2i and 2i + 1 of the input at every size.
    Always by 2-D pools: avg_pool3d loses the channels_last_3d layout and knows no bfloat16.

    Args:
        x: (B, C, T, H, W) or (B, C, H, W).
        factors: 1 or 2 for each dimension after the channels.
        sums: add up the cells of a window instead.

    Returns:
        A Tensor of ceil(size / factor) cells in each of those dimensions.
    """
    if max(factors) == 1:
        return x
    if x.shape[1] == 0:  # torch pools refuse a map without channels
        return x.new_zeros(
            (*x.shape[:2], *(-(-size // factor) for size, factor in zip(x.shape[2:], factors, strict=True)))
        )
    divisor = 1 if sums else None
    window = tuple(factors[-2:])
    if len(factors) == 2:
        return F.avg_pool2d(x, window, None, 0, True, False, divisor)
    if max(window) > 1:
        x = unfold_time(F.avg_pool2d(fold_time(x), window, None, 0, True, False, divisor), x)
    if factors[0] == 1:
        return x
    # All windows of two frames have as many cells in the one as in the other, so the mean of two means is the mean.
    frames = x.flatten(3)  # (B, C, T, H W)
    return F.avg_pool2d(frames, (factors[0], 1), None, 0, True, False, divisor).unflatten(3, x.shape[3:])


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeats every cell twice in the dimensions that are smaller than `size`, and crops to `size`.

    Args:
        x: (B, C, T, H, W) or (B, C, H, W).
        size: the wanted size of the dimensions after the channels; each is the present one, or half of it rounded up.

    Raises:
        ValueError: a dimension is neither `size` nor half of it.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if len(size) == 3 and x.shape[2] == size[0]:
        return unfold_time(upsample(fold_time(x), size[1:]), x)
    factors = [1 if have == want else 2 for have, want in zip(x.shape[2:], size, strict=True)]
    if any(-(-want // factor) != have for have, want, factor in zip(x.shape[2:], size, factors, strict=True)):
        raise UserError(f"a map of {tuple(x.shape[2:])} cells is not half of {tuple(size)}, rounded up")
    x = F.interpolate(x, scale_factor=[float(factor) for factor in factors], mode="nearest")
    for dim, want in enumerate(size, 2):
        x = x.narrow(dim, 0, want)
    return x


def add_upsampled(high: Tensor, low: Tensor, scale: float = 1) -> Tensor:
    """`high + scale * upsample(low)`, written into `high` where no gradient or compiler follows.

    Adds each low cell to the cells that it covers, without an upsampled map: 2 to 13 times faster on a CPU.

    Args:
        high: (B, C, T, H, W) or (B, C, H, W), a result that nothing else reads.
        low: the same with the dimensions after the channels halved, rounded up, or not.
        scale: of the low map.
    """
    size = high.shape[2:]
    wants_gradient = torch.is_grad_enabled() and (high.requires_grad or low.requires_grad)
    if wants_gradient or _transformed(low) or not runs_as_called():
        return torch.add(high, upsample(low, size), alpha=scale)
    factors = [1 if have == want else 2 for have, want in zip(low.shape[2:], size, strict=True)]
    if not channels_last(high) or any(cells % factor for cells, factor in zip(size, factors, strict=True)):
        return high.add_(upsample(low, size), alpha=scale)
    cells, sums = low.movedim(1, -1), high.movedim(1, -1)  # (B, T, H, W, C), the order in memory
    for axis in range(len(factors), 0, -1):
        if factors[axis - 1] == 2:  # to (..., H / 2, 1, ...) and (..., H / 2, 2, ...)
            cells, sums = cells.unsqueeze(axis + 1), sums.unflatten(axis, (-1, 2))
    sums.add_(cells, alpha=scale)
    return high


def runs_as_called() -> bool:
    """Whether operations run one by one on plain values.

    No compiler, tracer, torch.func transform or dispatch mode takes them up; selective checkpointing, a dispatch mode,
    keeps results that must not be written to.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
