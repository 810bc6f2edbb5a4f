"""The four paths of an octave convolution, made fast, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import octvideo.layers.resampling as resampling
from octvideo.layers.parts import Parts, join_by_parts, split_by_parts
from octvideo.layers.resampling import (
    add_upsampled,
    average_pool,
    channels_last,
    halved,
    lay_channels_last,
    upsample,
)


def swap_sides(weight: Tensor, groups: int) -> Tensor:
    """Exchanges rows and columns of a weight: (C_out, C_in / groups, ...) to (C_in, C_out / groups, ...), and back."""
    if groups == 1:
        return weight.transpose(0, 1)
    return torch.unflatten(weight, 0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Kernel:
    """How a convolution slides: everything about it but its channels and weight, for (T, H, W) or (H, W).

    Weights are (C_out, C_in / groups, ...), for a transposed convolution too.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before each dimension, and behind it unless `amounts` say something else
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"  # "zeros" is the convolution's own, F.pad does the others
    amounts: tuple[int, ...] = ()  # padding as F.pad takes it, for the modes other than "zeros"
    output_padding: tuple[int, ...] | None = None  # of a transposed convolution; None for the others
    # A factorised 3-D convolution as one of images: of frames where `flat_axis`, the dimension of the weight that goes,
    # is 2, of (T, H * W) where it is 4.
    flat: Kernel | None = field(init=False, default=None)
    flat_axis: int = field(init=False, default=0)
    # A strided convolution of size 1 as one of stride 1: torch 2.14 writes its weight's gradient out of bounds on CPUs,
    # for channels_last images of stride (2, 1).
    thin: Kernel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if max(self.size) == 1 < max(self.stride) and not any(self.padding) and self.output_padding is None:
            self.__dict__["thin"] = replace(self, stride=(1,) * len(self.stride))
            return
        if len(self.size) == 2 or self.padding_mode != "zeros" or self.output_padding is not None:
            return
        over_frames = (self.size[0], self.stride[0], self.padding[0]) == (1, 1, 0)
        if over_frames or (*self.size[1:], *self.stride[1:], *self.padding[1:]) == (1, 1, 1, 1, 0, 0):
            kept = slice(1, 3) if over_frames else slice(0, 2)
            flat = Kernel(self.size[kept], self.stride[kept], self.padding[kept], self.dilation[kept])
            self.__dict__.update(flat=flat, flat_axis=2 if over_frames else 4)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1, size: tuple[int, ...] = ()
    ) -> Tensor:
        """F.conv2d or F.conv3d, which may have no output channels; if transposed, it fills or crops to `size`."""
        if weight.shape[0] == 0:  # torch refuses
            return x.new_zeros((x.shape[0], 0, *(size or self.output_size(x))))
        last = channels_last(x)
        if self.thin is not None:
            x = x[self._kept()]
            return self.thin.convolve(lay_channels_last(x) if last else x, weight, bias, groups)
        if last and self.flat is not None and not x.is_cuda:  # on a CPU up to 5 times faster for a clip, never slower
            return self._unfold(self.flat.convolve(self._fold(x), weight.squeeze(self.flat_axis), bias, groups), x)
        if self.output_padding is not None:
            y = self._transposed(x, weight, bias, groups, size)
            return lay_channels_last(y) if last else y
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = resampling.pad(x, self.amounts, self.padding_mode), (0,) * len(self.stride)
        function: Any = F.conv2d if len(self.size) == 2 else F.conv3d
        y = function(x, weight, bias, self.stride, padding, self.dilation, groups)
        return lay_channels_last(y) if last else y

    def _transposed(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, size: tuple[int, ...]) -> Tensor:
        function: Any = F.conv_transpose2d if len(self.size) == 2 else F.conv_transpose3d
        missing = self.output_padding
        if size:
            missing = tuple([max(0, n - have) for n, have in zip(size, self._grown(x.shape[2:]), strict=True)])
        weight = swap_sides(weight, groups)
        y: Tensor = function(x, weight, bias, self.stride, self.padding, missing, groups, self.dilation)
        for dim, n in enumerate(size, 2):
            y = y.narrow(dim, 0, n)
        return y

    def _grown(self, size: Sequence[int]) -> list[int]:
        """The size of a transposed convolution's output without its output padding."""
        numbers = zip(size, self.size, self.stride, self.padding, self.dilation, strict=True)
        return [(n - 1) * stride - 2 * padding + dilation * (k - 1) + 1 for n, k, stride, padding, dilation in numbers]

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        """The gradients of `convolve` (one group, zero padding) for x, weight and bias; undefined where not wanted."""
        gradient = lay_channels_last(gradient)
        if self.thin is not None:
            to_kept, *others = self.thin.backward(gradient, lay_channels_last(x[self._kept()]), weight, wanted)
            if wanted[0]:
                to_x = torch.zeros_like(x)
                to_x[self._kept()] = to_kept
            return to_x if wanted[0] else to_kept, *others
        if self.flat is not None and channels_last(gradient) and not x.is_cuda:
            images = (self._fold(gradient), self._fold(x), weight.squeeze(self.flat_axis))
            to_x, to_weight, to_bias = self.flat.backward(*images, wanted)
            to_x = self._unfold(to_x, x) if wanted[0] else to_x
        else:
            numbers = (self.stride, self.padding, self.dilation, False, (0,) * len(self.size), 1)
            tensors = (gradient, x, weight, [weight.shape[0]])
            to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(*tensors, *numbers, wanted)
        # With the strides of a fresh tensor in dimensions of size 1 too: DDP's buckets warn of others, and copy them.
        to_weight = to_weight.reshape(-1).view(weight.shape) if wanted[1] else to_weight
        return lay_channels_last(to_x) if wanted[0] else to_x, to_weight, to_bias

    def _kept(self) -> tuple[slice, ...]:
        return (slice(None), slice(None), *(slice(None, None, stride) for stride in self.stride))

    def output_size(self, x: Tensor) -> tuple[int, ...]:
        """The size of the output for `x` after the channels; height and width are kept unless it is transposed."""
        if self.output_padding is not None:
            return tuple([n + more for n, more in zip(self._grown(x.shape[2:]), self.output_padding, strict=True)])
        if len(self.size) == 2:
            return tuple(x.shape[2:])
        padding = sum(self.amounts[-2:]) if self.amounts else 2 * self.padding[0]
        return (-(-(x.shape[2] + padding - self.dilation[0] * (self.size[0] - 1)) // self.stride[0]), *x.shape[3:])

    def _fold(self, x: Tensor) -> Tensor:
        # By way of the order in memory: torch copies images whose stride for a batch of one is not what it would set.
        return resampling.fold_time(x) if self.flat_axis == 2 else x.movedim(1, -1).flatten(2, 3).movedim(-1, 1)

    def _unfold(self, images: Tensor, x: Tensor) -> Tensor:
        return resampling.unfold_time(images, x) if self.flat_axis == 2 else images.unflatten(3, x.shape[3:])


class Term(NamedTuple):
    """A convolution by one block of the weight: of which output and of which input channels."""

    x: Tensor
    rows: Literal["high", "low", "all"]
    columns: Literal["high", "low"]


Sides = tuple[tuple[str, str], ...]  # the rows and the columns of each term


@dataclass(frozen=True)
class Paths:
    """The four paths (Section 3.2 of Chen et al., ICCV 2019) of one group of a convolution or of several alike."""

    kernel: Kernel  # of each path, its spatial stride 1
    pool: tuple[int, ...]  # averaged in place of the spatial stride, which would shift the maps against each other
    factors: tuple[int, ...]  # by what each dimension is divided in low maps
    rows: tuple[int, int]  # (high, low) output channels of one group
    images: Paths | None = field(init=False, default=None)  # the same for frames, where time plays no part

    def __post_init__(self) -> None:
        if self.kernel.flat is not None and self.kernel.flat_axis == 2 and self.factors[0] == 1:
            self.__dict__["images"] = Paths(self.kernel.flat, self.pool[1:], self.factors[1:], self.rows)

    def __call__(
        self, high: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, groups: int = 1
    ) -> tuple[Tensor, ...]:
        """The high and the low output map, channels_last, of two input maps; any of them may have no channels.

        The weight, (C_out, (C_high + C_low) / groups, ...), is in the vanilla order; `parts` are one group's input.
        """
        high, low = lay_channels_last(high), lay_channels_last(low)
        if not (torch.is_grad_enabled() and groups == 1 and self._has_own_gradient(high, low, weight)):
            return self.convolve(high, low, weight, bias, parts, groups)
        kind, inputs = high.device.type, [high, low, weight, bias]
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            outputs: tuple[Tensor, ...] = _OwnGradient.apply(self, parts, *inputs)
            return outputs
        dtype = torch.get_autocast_dtype(kind)  # cast here, so that the gradient of the casts is autograd's
        inputs = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in inputs]
        with torch.autocast(kind, enabled=False):
            outputs = _OwnGradient.apply(self, parts, *inputs)
        return outputs

    def separately(
        self, terms: Sequence[Term], weight: Tensor, bias: Tensor | None, parts: Parts
    ) -> tuple[Tensor, ...]:
        """The convolution of each term alone, channels_last; the first of high rows, and the first of low ones, biased."""
        inputs = [x for x, _, _ in terms]
        kind = inputs[0].device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if autocast:
            dtype = torch.get_autocast_dtype(kind)  # cast here, so that the gradient of the casts is autograd's
            *inputs, weight, bias = (x if x is None else x.to(dtype) for x in (*inputs, weight, bias))
        sides = tuple([(rows, columns) for _, rows, columns in terms])
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, weight)):
                if self.kernel.padding_mode == "zeros":
                    outputs: tuple[Tensor, ...] = _Separate.apply(self, sides, parts, weight, bias, *inputs)
                    return outputs
            blocks = self._blocks(sides, weight, bias, parts)
            return tuple(self.kernel.convolve(x, *block) for x, block in zip(inputs, blocks, strict=True))

    def _blocks(
        self, sides: Sides, weight: Tensor, bias: Tensor | None, parts: Parts
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The block of the weight, and the bias, of each term."""
        high, low = self.rows
        rows_of = {"high": slice(0, high), "low": slice(high, high + low), "all": slice(None)}
        columns_of = dict(zip(("high", "low"), split_by_parts(weight, parts, 1), strict=True))
        biases = [bias[rows_of[r]] if bias is not None and c == "high" else None for r, c in sides]
        return [(columns_of[c][rows_of[r]], b) for (r, c), b in zip(sides, biases, strict=True)]

    def _has_own_gradient(self, high: Tensor, low: Tensor, weight: Tensor) -> bool:
        wanted = any(x.requires_grad for x in (high, low, weight)) and high.shape[1] > 0 and self.rows[0] > 0
        plain = self.kernel.padding_mode == "zeros" and self.kernel.output_padding is None
        return wanted and plain and resampling.runs_as_called()

    def convolve(
        self, high: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, groups: int = 1
    ) -> tuple[Tensor, ...]:
        """As the call, for channels_last maps; the gradient is autograd's."""
        if self.images is not None and channels_last(high) and not high.is_cuda:
            frames = (resampling.fold_time(high), resampling.fold_time(low))
            out_high, out_low = self.images.convolve(*frames, weight.squeeze(2), bias, parts, groups)
            return resampling.unfold_time(out_high, high), resampling.unfold_time(out_low, high)
        rows_high, rows_low = split_by_parts(weight, (self.rows,) * groups, 0)
        bias_high, bias_low = (None, None) if bias is None else split_by_parts(bias, (self.rows,) * groups, 0)
        high_to_high, low_to_high = split_by_parts(rows_high, parts, 1)
        # A low map that is not pooled has the size of the strided high map: no upsampling in low_to_high then.
        high = average_pool(high, self.pool)
        low_size = self.low_size(high)
        if high.shape[1] == 0 and self.rows[0]:
            out_high = self.kernel.convolve(low, low_to_high, bias_high, groups, low_size)
            out_high = upsample(out_high, self.kernel.output_size(high))
        else:
            out_high = self.kernel.convolve(high, high_to_high, bias_high, groups)
            if low.shape[1] and self.rows[0]:
                out_high = add_upsampled(out_high, self.kernel.convolve(low, low_to_high, None, groups, low_size))
        if not self.rows[1]:
            return out_high, out_high[:, :0]
        # One convolution over all channels at low resolution is both paths at once.
        both = self.all_at_low(high, low, parts * groups)
        return out_high, self.kernel.convolve(both, rows_low, bias_low, groups, low_size)

    def low_size(self, high: Tensor) -> tuple[int, ...]:
        """The size to which a transposed convolution must take low maps; () for others, which take them there."""
        return halved(self.kernel.output_size(high), self.factors) if self.kernel.output_padding is not None else ()

    def all_at_low(self, high: Tensor, low: Tensor, parts: Parts) -> Tensor:
        """All input channels at the low output's resolution, in the vanilla order; `high` is pooled for the stride."""
        if low.shape[1] == 0:
            return average_pool(high, self.factors)
        if high.shape[1] == 0:
            return average_pool(low, self.pool)
        # Joined in the order of memory: torch.cat gives the maps of one clip another layout.
        last = high.dim() - 1  # not -1, which the ONNX exporter for TorchScript misreads
        high, low = average_pool(high, self.factors).movedim(1, last), average_pool(low, self.pool).movedim(1, last)
        return join_by_parts(high, low, parts, last).movedim(last, 1)


class _OwnGradient(torch.autograd.Function):
    """The paths of one group, which keep only their two input maps: 8 to 13 % faster in training I3D on a CPU."""

    @staticmethod
    def forward(ctx: Any, paths: Paths, parts: Parts, high: Tensor, low: Tensor, weight: Tensor, bias: Any) -> Any:
        ctx.paths, ctx.parts = paths, parts
        ctx.save_for_backward(high, low, weight)
        outputs = paths.convolve(high, low, weight, bias, parts)
        # Convolutions in 2-D give views, which could not be modified in place if they came from here.
        return tuple(torch.ops.aten._unsafe_view(y, y.shape) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        batched = any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in gradients)
        kind = gradients[0].device.type
        with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
            found = (_batched_gradients if batched else _gradients)(ctx, *gradients)
        return None, None, *(x if want else None for x, want in zip(found, ctx.needs_input_grad[2:], strict=True))


class _Separate(torch.autograd.Function):
    """Convolutions by blocks of one weight, which keep their inputs and the weight alone."""

    @staticmethod
    def forward(ctx: Any, paths: Paths, sides: Sides, parts: Parts, weight: Tensor, bias: Any, *inputs: Tensor) -> Any:
        ctx.paths, ctx.sides, ctx.parts = paths, sides, parts
        ctx.save_for_backward(weight, *inputs)
        ctx.set_materialize_grads(False)
        blocks = paths._blocks(sides, weight, bias, parts)
        outputs = [paths.kernel.convolve(x, *block) for x, block in zip(inputs, blocks, strict=True)]
        return tuple(torch.ops.aten._unsafe_view(y, y.shape) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        paths, (weight, *inputs), wants = ctx.paths, ctx.saved_tensors, ctx.needs_input_grad[3:]
        bias = weight.new_empty(0) if wants[1] else None  # not read: only that there is one
        kind = weight.device.type
        if torch.is_grad_enabled() or any(torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients if g is not None):
            return None, None, None, *_differentiable(ctx, gradients)
        with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
            found: dict[tuple[str, str], Tensor] = {}
            to_inputs, to_biases = [], dict.fromkeys(("high", "low"))
            for gradient, x, (block, _), side, want in zip(
                gradients, inputs, paths._blocks(ctx.sides, weight, None, ctx.parts), ctx.sides, wants[2:], strict=True
            ):
                if gradient is None:
                    to_inputs.append(None)
                    found[side] = torch.zeros_like(block)
                    continue
                biased = bias is not None and side[1] == "high"
                to_x, to_block, to_bias = paths.kernel.backward(gradient, x, block, (want, wants[0], biased))
                to_inputs.append(to_x if want else None)
                if wants[0]:
                    found[side] = to_block
                if biased:
                    to_biases[side[0]] = to_bias
        to_weight = to_all = None
        if wants[0]:
            if ("all", "low") in found:
                found["high", "low"], found["low", "low"] = found["all", "low"].split(paths.rows)
            rows = []
            for kind in ("high", "low"):
                columns = [found[kind, column] for column in ("high", "low") if (kind, column) in found]
                rows.append(columns[0] if len(columns) == 1 else join_by_parts(*columns, ctx.parts, 1))
            to_weight = torch.cat(rows)
        if wants[1]:
            sizes = zip(to_biases.values(), paths.rows, strict=True)
            to_all = torch.cat([weight.new_zeros(n) if x is None else x for x, n in sizes])
        return None, None, None, to_weight, to_all, *to_inputs


def _gradients(ctx: Any, grad_high: Tensor, grad_low: Tensor) -> tuple[Tensor, ...]:
    """For high, low, weight and bias; undefined where not wanted."""
    paths, parts, (high, low, weight) = ctx.paths, ctx.parts, ctx.saved_tensors
    kernel, wants = paths.kernel, (any(ctx.needs_input_grad[2:4]), *ctx.needs_input_grad[4:])  # maps, weight, bias
    rows_high, rows_low = weight.split(paths.rows)
    high_to_high, low_to_high = split_by_parts(rows_high, parts, 1)
    pooled = average_pool(high, paths.pool)
    to_pooled, to_rows, to_bias = kernel.backward(grad_high, pooled, high_to_high, wants)
    to_low = torch.zeros_like(low)
    if low.shape[1]:
        upsampled = resampling.factors_between(grad_high.shape[2:], kernel.output_size(low))
        from_low = average_pool(lay_channels_last(grad_high), upsampled, sums=True)
        to_low, to_low_to_high, _ = kernel.backward(from_low, low, low_to_high, (*wants[:2], False))
        to_rows = join_by_parts(to_rows, to_low_to_high, parts, 1) if wants[1] else to_rows
    if paths.rows[1]:
        both = paths.all_at_low(pooled, low, parts)
        to_both, to_rows_low, to_bias_low = kernel.backward(grad_low, both, rows_low, wants)
        if wants[0]:
            to_both_high, to_both_low = split_by_parts(to_both, parts, 1)
            to_pooled = add_upsampled(to_pooled, *resampling.pool_gradient(to_both_high, pooled, paths.factors))
            if low.shape[1]:
                to_low = add_upsampled(to_low, *resampling.pool_gradient(to_both_low, low, paths.pool))
        to_rows = torch.cat((to_rows, to_rows_low)) if wants[1] else to_rows
        to_bias = torch.cat((to_bias, to_bias_low)) if wants[2] else to_bias
    if wants[0] and max(paths.pool) > 1:
        shares, scale = resampling.pool_gradient(to_pooled, high, paths.pool)
        to_pooled = upsample(shares * scale, high.shape[2:])
    return to_pooled, to_low, to_rows, to_bias


def _differentiable(ctx: Any, gradients: Sequence[Any]) -> list[Tensor | None]:
    """Autograd's own gradients, for a derivative of them or for several at once (is_grads_batched)."""
    weight, *inputs = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [x if torch.is_grad_enabled() and x.requires_grad else x.detach().requires_grad_() for x in (weight, *inputs)]
        bias = weight.new_zeros(sum(ctx.paths.rows)).requires_grad_()
        blocks = ctx.paths._blocks(ctx.sides, leaves[0], bias, ctx.parts)
        outputs = [ctx.paths.kernel.convolve(x, *block) for x, block in zip(leaves[1:], blocks, strict=True)]
    pairs = [(y, gradient) for y, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    outputs, given = zip(*pairs, strict=True)
    wanted = [leaves[0], bias, *leaves[1:]]
    create = torch.is_grad_enabled()
    found = torch.autograd.grad(outputs, wanted, given, allow_unused=True, create_graph=create)
    return [x if want else None for x, want in zip(found, ctx.needs_input_grad[3:], strict=True)]


def _batched_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Autograd's gradients for several output gradients at once (is_grads_batched), which few operations know."""
    bias = ctx.saved_tensors[2].new_zeros(sum(ctx.paths.rows))
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (*ctx.saved_tensors, bias)]
        outputs = ctx.paths.convolve(*inputs, ctx.parts)
    return torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
