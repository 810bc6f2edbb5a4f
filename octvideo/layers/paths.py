"""The four paths of an octave convolution, made fast, and their gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octvideo.layers.octaves import Parts, join_by_parts, split_by_parts
from octvideo.layers.resampling import (
    add_upsampled,
    average_pool,
    channels_last,
    fold_time,
    keep_layout,
    lay_channels_last,
    runs_as_called,
    unfold_time,
    upsample,
)


class _Flat(NamedTuple):
    """How a factorised 3-D convolution of clips is a 2-D one of images."""

    fold: Callable[[Tensor], Tensor]
    unfold: Callable[[Tensor, Tensor], Tensor]  # of images that were made from the second argument
    axis: int  # of the weight, where the kernel has one cell
    kept: slice  # of stride, padding and dilation


def _fold_space(x: Tensor) -> Tensor:
    """Views clips that lie channels last as images of T x (H W) cells.

    By way of the order in memory: the stride of a batch of one is arbitrary, and torch's convolutions take images whose
    stride is another than they would give it for channels-first ones, and copy them.
    """
    return x.movedim(1, -1).flatten(2, 3).movedim(-1, 1)


_FRAME_BY_FRAME = _Flat(fold_time, unfold_time, 2, slice(1, 3))
_CELL_BY_CELL = _Flat(_fold_space, lambda y, x: y.unflatten(3, x.shape[3:]), 4, slice(0, 2))


@dataclass(frozen=True)
class Kernel:
    """How a convolution slides: everything about it but its channels and weight.

    Args:
        stride: of each dimension.
        padding: cells on either side of each dimension, or "same" where the two sides differ.
        dilation: of each dimension.
        padding_mode: as nn.Conv3d's.
        amounts: padding as F.pad takes it, for the modes other than "zeros".
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    amounts: tuple[int, ...]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        """F.conv2d or F.conv3d; a factorised convolution of clips that lie channels last runs as a 2-D one.

        On a CPU that was never slower for the layers of I3D and SlowFast, and up to 5 times faster for one clip, for
        which conv3d often takes a kernel without vector instructions that loses the layout too.

        Args:
            x: (B, C, T, H, W) or (B, C, H, W).
            weight: the same number of dimensions, (C_out, C / groups, ...); C_out may be 0.
            bias: (C_out,) or None.
            groups: of the convolution.
        """
        if weight.shape[0] == 0:  # torch refuses
            return x.new_zeros((x.shape[0], 0, *self.output_size(x, weight)))
        padding, layout = self.padding, x
        if self.padding_mode != "zeros":
            x, padding = _pad(x, self.amounts, self.padding_mode), (0,) * len(self.stride)
        flat = _flat(x, weight, self.stride, padding)
        if flat is None:
            function: Callable[..., Tensor] = F.conv2d if x.dim() == 4 else F.conv3d
            return keep_layout(function(x, weight, bias, self.stride, padding, self.dilation, groups), layout)
        stride, padding, dilation = self.stride[flat.kept], padding[flat.kept], self.dilation[flat.kept]
        images = F.conv2d(flat.fold(x), weight.squeeze(flat.axis), bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
        return keep_layout(flat.unfold(images, x), layout)

    def backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of `convolve` (one group, zero padding) for x, weight and bias; undefined where not wanted."""
        gradient = lay_channels_last(gradient)
        flat = _flat(x, weight, self.stride, self.padding) if channels_last(gradient) else None
        shape, images, numbers = weight.shape, x, [self.stride, self.padding, self.dilation]
        if flat is not None:
            gradient, images, weight = flat.fold(gradient), flat.fold(x), weight.squeeze(flat.axis)
            numbers = [n[flat.kept] for n in numbers]
        transposed_and_groups = (False, (0,) * len(numbers[0]), 1)
        to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
            gradient, images, weight, [weight.shape[0]], *numbers, *transposed_and_groups, wanted
        )
        if flat is not None:
            to_x = flat.unfold(to_x, x) if wanted[0] else to_x
        # With the strides of a fresh tensor in dimensions of one cell too: DDP's buckets warn of others, and copy them.
        to_weight = to_weight.reshape(-1).view(shape) if wanted[1] else to_weight
        return lay_channels_last(to_x) if wanted[0] else to_x, to_weight, to_bias

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """The size of the convolution's output for `x`, of which it keeps the spatial size."""
        if x.dim() == 4 or isinstance(self.padding, str):
            return tuple(x.shape[2:])
        reach = self.dilation[0] * (weight.shape[2] - 1)
        return (-(-(x.shape[2] + 2 * self.padding[0] - reach) // self.stride[0]), *x.shape[3:])


def _flat(x: Tensor, weight: Tensor, stride: Sequence[int], padding: str | Sequence[int]) -> _Flat | None:
    """How a convolution can run as a 2-D one; None if it cannot."""
    if x.dim() == 4 or isinstance(padding, str) or not channels_last(x):
        return None
    if (weight.shape[2], stride[0], padding[0]) == (1, 1, 0):
        return _FRAME_BY_FRAME
    cell_by_cell = (*weight.shape[3:], *stride[1:], *padding[1:]) == (1, 1, 1, 1, 0, 0)
    return _CELL_BY_CELL if cell_by_cell else None


def _pad(x: Tensor, amounts: Sequence[int], mode: str) -> Tensor:
    """F.pad; where a low map is too small for it, the circle or the mirror goes round more than once."""
    pairs = list(zip(amounts[0::2], amounts[1::2], strict=True))[::-1]
    if mode == "replicate" or all(max(pair) < size for pair, size in zip(pairs, x.shape[2:], strict=True)):
        return F.pad(x, tuple(amounts), mode=mode)
    for dim, (before, after) in enumerate(pairs, 2):
        size = x.shape[dim]
        cells = torch.arange(-before, size + after, device=x.device)
        period = size if mode == "circular" else max(1, 2 * (size - 1))
        cells = cells % period
        x = x.index_select(dim, cells if mode == "circular" else torch.minimum(cells, period - cells))
    return x


@dataclass(frozen=True)
class Paths:
    """high_to_high + low_to_high, and high_to_low + low_to_low, of some groups of a convolution that are alike.

    Section 3.2 of Chen et al., ICCV 2019. Maps are channels last inside, and come out so.

    Args:
        kernel: of each path, its spatial stride 1.
        pool: the factors to average by in place of the spatial stride: strided convolutions would shift the two maps
            against each other.
        factors: what each dimension is divided by in low maps.
        parts: of one group's input.
        rows: (high, low) output channels of one group.
        groups: how many these are.
    """

    kernel: Kernel
    pool: tuple[int, ...]
    factors: tuple[int, ...]
    parts: Parts
    rows: tuple[int, int]
    groups: int = 1

    def __call__(self, high: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolves.

        Args:
            high: (B, C_high, T, H, W) or (B, C_high, H, W).
            low: the same with C_low channels and the dimensions after them divided by `factors`, rounded up.
            weight: (C_out, (C_high + C_low) / groups, ...), the vanilla order in both directions.
            bias: (C_out,) or None.

        Returns:
            The high and the low output map, either of which may have no channels.
        """
        high, low = lay_channels_last(high), lay_channels_last(low)
        if not self._has_own_gradient(high, low, weight):
            return self.convolve(high, low, weight, bias)
        kind = high.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)  # here, so that the gradient of the casts is autograd's
            high, low, weight = _lower(high, dtype), _lower(low, dtype), _lower(weight, dtype)
            bias = None if bias is None else _lower(bias, dtype)
        with _without_autocast(kind):
            return _OwnGradient.apply(self, high, low, weight, bias)  # type: ignore[no-any-return]

    def _has_own_gradient(self, high: Tensor, low: Tensor, weight: Tensor) -> bool:
        """Whether gradients are wanted that `backward` knows of; autograd makes the others."""
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (high, low, weight))
        known = self.groups == 1 and high.shape[1] > 0 and self.rows[0] > 0
        plain = self.kernel.padding_mode == "zeros" and not isinstance(self.kernel.padding, str)
        return wanted and known and plain and runs_as_called()

    def convolve(self, high: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As the call, of maps that lie channels last; the gradient is autograd's."""
        rows_high, rows_low = split_by_parts(weight, (self.rows,) * self.groups, 0)
        bias_high, bias_low = (None, None) if bias is None else split_by_parts(bias, (self.rows,) * self.groups, 0)
        # A low map that is not pooled has the size of the strided high map: no upsampling in low_to_high then.
        high = average_pool(high, self.pool)
        size = self.kernel.output_size(high, weight)
        high_to_high, low_to_high = split_by_parts(rows_high, self.parts, 1)
        if not self.rows[0]:
            out_high = high.new_zeros((high.shape[0], 0, *size))
        elif low.shape[1] == 0:
            out_high = self.kernel.convolve(high, high_to_high, bias_high, self.groups)
        elif high.shape[1] == 0:
            out_high = upsample(self.kernel.convolve(low, low_to_high, bias_high, self.groups), size)
        else:
            from_high = self.kernel.convolve(high, high_to_high, bias_high, self.groups)
            out_high = add_upsampled(from_high, self.kernel.convolve(low, low_to_high, None, self.groups))
        if not self.rows[1]:
            return out_high, out_high.new_zeros((out_high.shape[0], 0, *size))
        # One convolution over all channels at low resolution is both paths at once.
        return out_high, self.kernel.convolve(self._all_at_low(high, low), rows_low, bias_low, self.groups)

    def _all_at_low(self, high: Tensor, low: Tensor) -> Tensor:
        """All input channels at the low output's resolution, in the vanilla order; `high` is pooled for the stride."""
        if low.shape[1] == 0:
            return average_pool(high, self.factors)
        if high.shape[1] == 0:
            return average_pool(low, self.pool)
        # Joined in the order of memory: torch.cat gives the maps of one clip another layout.
        high, low = average_pool(high, self.factors).movedim(1, -1), average_pool(low, self.pool).movedim(1, -1)
        return join_by_parts(high, low, self.parts * self.groups, high.dim() - 1).movedim(-1, 1)

    def backward(
        self, grad_high: Tensor, grad_low: Tensor, high: Tensor, low: Tensor, weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of one group for high, low, weight and bias.

        Args:
            grad_high: of the high output map, as `grad_low` of the low one.
            high: the input, as `low`.
            weight: of the layer.
            wanted: whether gradients are wanted for the maps, the weight and the bias; others are None.
        """
        rows_high, rows_low = weight.split(self.rows)
        high_to_high, low_to_high = split_by_parts(rows_high, self.parts, 1)
        pooled = average_pool(high, self.pool)
        to_pooled, to_rows, to_bias = self.kernel.backward(grad_high, pooled, high_to_high, wanted)
        to_low = torch.zeros_like(low)
        if low.shape[1]:
            sizes = zip(self.kernel.output_size(low, weight), grad_high.shape[2:], strict=True)
            upsampled = [1 if have == want else 2 for have, want in sizes]
            grad_from_low = average_pool(lay_channels_last(grad_high), upsampled, sums=True)
            to_low, to_low_to_high, _ = self.kernel.backward(grad_from_low, low, low_to_high, (*wanted[:2], False))
            to_rows = join_by_parts(to_rows, to_low_to_high, self.parts, 1) if wanted[1] else to_rows
        if self.rows[1]:
            both = self._all_at_low(pooled, low)
            to_both, to_rows_low, to_bias_low = self.kernel.backward(grad_low, both, rows_low, wanted)
            if wanted[0]:
                to_both_high, to_both_low = split_by_parts(to_both, self.parts, 1)
                to_pooled = add_upsampled(to_pooled, *_shares(to_both_high, pooled, self.factors))
                to_low = add_upsampled(to_low, *_shares(to_both_low, low, self.pool)) if low.shape[1] else to_low
            to_rows = torch.cat((to_rows, to_rows_low)) if wanted[1] else to_rows
            to_bias = torch.cat((to_bias, to_bias_low)) if wanted[2] else to_bias
        if wanted[0] and max(self.pool) > 1:
            shares, scale = _shares(to_pooled, high, self.pool)
            to_pooled = upsample(shares * scale, high.shape[2:])
        gradients = (to_pooled, to_low, to_rows, to_bias)
        return tuple(x if want else None for x, want in zip(gradients, (wanted[0], *wanted), strict=True))  # type: ignore[return-value]


def _shares(gradient: Tensor, averaged: Tensor, factors: Sequence[int]) -> tuple[Tensor, float]:
    """What each cell of the windows that were averaged gets of their gradient: the product of the two."""
    if not any(size % factor for size, factor in zip(averaged.shape[2:], factors, strict=True)):
        return gradient, 1 / math.prod(factors)
    ones = gradient.new_ones((1, 1, *averaged.shape[2:]))  # the border's windows have fewer cells
    return gradient / average_pool(ones, factors, sums=True), 1.0


def _batched_gradients(ctx: Any, *gradients: Tensor) -> list[Tensor | None]:
    """Autograd's gradients for several output gradients at once (is_grads_batched), which few operations know."""
    bias = ctx.saved_tensors[2].new_zeros(sum(ctx.paths.rows))
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (*ctx.saved_tensors, bias)]
        outputs = ctx.paths.convolve(*inputs)
    found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
    return [gradient if wanted else None for gradient, wanted in zip(found, ctx.needs_input_grad[1:], strict=True)]


def _lower(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's cast, which leaves float64 alone."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, on devices that have it."""
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )


class _OwnGradient(torch.autograd.Function):
    """The paths, which keep for the gradient only the two input maps.

    Autograd would also keep all channels at low resolution, a quarter of a vanilla map in each layer, and would write
    the gradients of the weight's slices into tensors of zeros: 8 to 13 % of a training step of I3D on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, paths: Paths, high: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(high, low, weight)
        ctx.paths = paths
        # Convolutions in 2-D give views, which nobody could change in place when they come from here.
        out_high, out_low = (torch.ops.aten._unsafe_view(y, y.shape) for y in paths.convolve(high, low, weight, bias))
        return out_high, out_low

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        high, low, weight = ctx.saved_tensors
        if any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in gradients):
            return None, *_batched_gradients(ctx, *gradients)
        _, wants_high, wants_low, *others = ctx.needs_input_grad
        with _without_autocast(high.device.type):
            return None, *ctx.paths.backward(*gradients, high, low, weight, (wants_high or wants_low, *others))
