"""The four paths of an octave convolution, made fast, and their gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import octvideo.layers.resampling as resampling
from octvideo.layers.parts import Parts, join_by_parts, split_by_parts
from octvideo.layers.resampling import add_upsampled, average_pool, channels_last, halved, lay_channels_last, upsample


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
        if not size and missing and min(missing) < 0:
            size = self.output_size(x)
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

    def reaching(self, x: Tensor, size: Sequence[int]) -> Kernel:
        """This transposed convolution with an output padding, or a crop, that takes `x` to a size."""
        missing = tuple([n - have for n, have in zip(size, self._grown(x.shape[2:]), strict=True)])
        return replace(self, output_padding=missing)

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


# A block of a weight: of which output channels (high, low, all), and of which input channels (high, low).
Side = tuple[str, str]


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
        with _autocast((high, low, weight, bias)) as inputs:
            outputs: tuple[Tensor, ...] = _Summed.apply(self, parts, *inputs)
        return outputs

    def _has_own_gradient(self, high: Tensor, low: Tensor, weight: Tensor) -> bool:
        wanted = any(x.requires_grad for x in (high, low, weight)) and high.shape[1] > 0 and self.rows[0] > 0
        plain = self.kernel.padding_mode == "zeros" and self.kernel.output_padding is None
        return wanted and plain and resampling.runs_as_called()

    def terms(self, high: Tensor, low: Tensor, pooled: Tensor | None = None) -> dict[Side, Tensor]:
        """What each convolution that the paths consist of reads; `pooled`: high over each low position, if known.

        The low map is convolved once for both outputs, unless a stride leaves it at two sizes.
        """
        terms: dict[Side, Tensor] = {}
        strided = max(self.pool) > 1
        if strided:
            high = average_pool(high, self.pool) if pooled is None or self.pool != self.factors else pooled
            pooled = None
        if high.shape[1] and self.rows[0]:
            terms["high", "high"] = high
        if low.shape[1] and not strided:
            terms["all", "low"] = low
        elif low.shape[1]:  # it has the size of the pooled high map
            if self.rows[0]:
                terms["high", "low"] = low
            if self.rows[1]:
                terms["low", "low"] = average_pool(low, self.pool)
        if high.shape[1] and self.rows[1]:
            terms["low", "high"] = average_pool(high, self.factors) if pooled is None else pooled
        return terms

    def blocks(
        self, sides: Iterable[Side], weight: Tensor, bias: Tensor | None, parts: Parts, groups: int = 1
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The block of the weight, and the bias if it is added there, of each term."""
        all_parts, sides = (self.rows,) * groups, list(sides)
        columns = dict(zip(("high", "low"), split_by_parts(weight, parts, 1), strict=True))
        biases: dict[str, Tensor | None] = dict.fromkeys(("all", "high", "low"))
        if bias is not None:
            biases = dict(zip(("all", "high", "low"), (bias, *split_by_parts(bias, all_parts, 0)), strict=True))
        biased = "high" if any(column == "high" for _, column in sides) else "low"
        found = []
        for row, column in sides:
            block = columns[column]
            if row != "all":
                block = split_by_parts(block, all_parts, 0)[row == "low"]
            found.append((block, biases[row] if column == biased else None))
        return found

    def convolve(
        self, high: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, groups: int = 1
    ) -> tuple[Tensor, ...]:
        """As the call, for channels_last maps; the gradient is autograd's."""
        if self.images is not None and channels_last(high) and not high.is_cuda:
            frames = (resampling.fold_time(high), resampling.fold_time(low))
            images = self.images.convolve(*frames, weight.squeeze(2), bias, parts, groups)
            return tuple(resampling.unfold_time(y, high) for y in images)
        terms, last = self.terms(high, low), channels_last(high)
        like = terms["high", "high"] if ("high", "high") in terms else average_pool(high, self.pool)
        extent = self.kernel.output_size(like)
        size = halved(extent, self.factors) if self.kernel.output_padding is not None else ()
        blocks = self.blocks(terms, weight, bias, parts, groups)
        found = {
            side: self.kernel.convolve(x, *block, groups, size if side[1] == "low" or side[0] == "low" else ())
            for (side, x), block in zip(terms.items(), blocks, strict=True)
        }
        if (both := found.pop(("all", "low"), None)) is not None:
            found["high", "low"], found["low", "low"] = split_by_parts(both, (self.rows,) * groups, 1)
        out_high: Any = found.get(("high", "high"))
        out_low: Any = found.get(("low", "high"))
        if self.rows[0] and ("high", "low") in found:
            to_high = found["high", "low"]
            out_high = upsample(to_high, extent) if out_high is None else add_upsampled(out_high, to_high)
        if self.rows[1] and ("low", "low") in found:
            to_low = found["low", "low"]
            out_low = to_low if out_low is None else add_upsampled(out_low, to_low)
        out_high = high.new_zeros((len(high), 0, *extent)) if out_high is None else out_high
        out_low = out_high[:, :0] if out_low is None else out_low
        return (lay_channels_last(out_high), lay_channels_last(out_low)) if last else (out_high, out_low)

    def separately(
        self, terms: dict[Side, Tensor], weight: Tensor, bias: Tensor | None, parts: Parts
    ) -> dict[Side, Tensor]:
        """The convolution of each term, channels_last, to be summed later."""
        with _autocast((weight, bias, *terms.values())) as tensors:
            weight, bias, *inputs = tensors
            grad = torch.is_grad_enabled() and any(x.requires_grad for x in (weight, *inputs))
            if grad and self.kernel.padding_mode == "zeros":
                outputs: Sequence[Tensor] = _Separate.apply(self, tuple(terms), parts, weight, bias, *inputs)
            else:
                blocks = self.blocks(terms, weight, bias, parts)
                outputs = [self.kernel.convolve(x, *block) for x, block in zip(inputs, blocks, strict=True)]
        return dict(zip(terms, outputs, strict=True))

    def backward(
        self, terms: dict[Side, Tensor], gradients: Sequence[Tensor | None], weight: Tensor, parts: Parts, wants: Any
    ) -> tuple[dict[Side, Any], Any, Any]:
        """Gradients of the terms, the weight and the bias, from those of the convolutions (one group)."""
        blocks, to_terms = dict[Side, Tensor](), dict[Side, Any]()
        biases = [weight.new_zeros(rows) for rows in self.rows] if wants[2] else []
        whole = self.blocks(terms, weight, None, parts)
        for (side, x), gradient, (block, _) in zip(terms.items(), gradients, whole, strict=True):
            if gradient is None:
                to_terms[side], blocks[side] = None, torch.zeros_like(block)
                continue
            biased = wants[2] and side[1] == "high"
            to_x, blocks[side], to_bias = self.kernel.backward(gradient, x, block, (*wants[:2], biased))
            to_terms[side] = to_x if wants[0] else None
            if biased:
                biases[side[0] == "low"] = to_bias
        to_weight = None
        if wants[1]:
            if ("all", "low") in blocks:
                blocks["high", "low"], blocks["low", "low"] = blocks["all", "low"].split(self.rows)
            rows = []
            for row, count in zip(("high", "low"), self.rows, strict=True):
                columns = [blocks[row, column] for column in ("high", "low") if count and (row, column) in blocks]
                rows += columns if len(columns) < 2 else [join_by_parts(columns[0], columns[1], parts, 1)]
            to_weight = torch.cat(rows)
        return to_terms, to_weight, torch.cat(biases) if wants[2] else None


@contextmanager
def _autocast(tensors: Sequence[Tensor | None]) -> Iterator[list[Any]]:
    """Tensors in autocast's type, if it is on, and a block without it: so the gradient of the casts is autograd's."""
    kind = next(x.device.type for x in tensors if x is not None)
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        yield list(tensors)
        return
    dtype = torch.get_autocast_dtype(kind)
    cast = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
    with torch.autocast(kind, enabled=False):
        yield cast


def _without_autocast(kind: str) -> torch.autocast:
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


class _Summed(torch.autograd.Function):
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
        paths, parts = ctx.paths, ctx.parts
        if any(map(torch._C._functorch.is_legacy_batchedtensor, gradients)):
            found = _batched(ctx.saved_tensors, sum(paths.rows), lambda *x: paths.convolve(*x, parts), gradients)
        else:
            with _without_autocast(gradients[0].device.type):
                found = _gradients(ctx, *gradients)
        return None, None, *(x if want else None for x, want in zip(found, ctx.needs_input_grad[2:], strict=True))


def _gradients(ctx: Any, grad_high: Tensor, grad_low: Tensor) -> tuple[Any, ...]:
    """For high, low, weight and bias; undefined where not wanted."""
    paths, (high, low, weight) = ctx.paths, ctx.saved_tensors
    wants = (any(ctx.needs_input_grad[2:4]), *ctx.needs_input_grad[4:])  # maps, weight, bias
    terms = paths.terms(high, low)
    pooled, gradients = terms["high", "high"], {("high", "high"): grad_high, ("low", "low"): grad_low}
    gradients["low", "high"] = grad_low
    if low.shape[1]:
        upsampled = resampling.factors_between(grad_high.shape[2:], paths.kernel.output_size(low))
        gradients["high", "low"] = average_pool(lay_channels_last(grad_high), upsampled, sums=True)
    if ("all", "low") in terms:
        # Joined in the order of memory: torch.cat gives the maps of one clip another layout.
        both = (gradients["high", "low"].movedim(1, -1), grad_low.movedim(1, -1))
        gradients["all", "low"] = torch.cat(both, -1).movedim(-1, 1) if paths.rows[1] else gradients["high", "low"]
    found, to_weight, to_bias = paths.backward(terms, [gradients[side] for side in terms], weight, ctx.parts, wants)
    if not wants[0]:
        return None, None, to_weight, to_bias
    to_high, to_low = found["high", "high"], found.get(("all", "low"), found.get(("high", "low")))
    if (to_pooled := found.get(("low", "high"))) is not None:
        to_high = add_upsampled(to_high, *resampling.pool_gradient(to_pooled, pooled, paths.factors))
    if (of_pooled := found.get(("low", "low"))) is not None:
        to_low = add_upsampled(to_low, *resampling.pool_gradient(of_pooled, low, paths.pool))
    if max(paths.pool) > 1:
        shares, scale = resampling.pool_gradient(to_high, high, paths.pool)
        to_high = upsample(shares * scale, high.shape[2:])
    return to_high, torch.zeros_like(low) if to_low is None else to_low, to_weight, to_bias


class _Separate(torch.autograd.Function):
    """Convolutions by blocks of one weight, which keep their inputs and the weight alone."""

    @staticmethod
    def forward(ctx: Any, paths: Paths, sides: Any, parts: Parts, weight: Tensor, bias: Any, *inputs: Tensor) -> Any:
        ctx.paths, ctx.sides, ctx.parts = paths, sides, parts
        ctx.save_for_backward(weight, *inputs)
        ctx.set_materialize_grads(False)
        blocks = paths.blocks(sides, weight, bias, parts)
        outputs = [paths.kernel.convolve(x, *block) for x, block in zip(inputs, blocks, strict=True)]
        return tuple(torch.ops.aten._unsafe_view(y, y.shape) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        paths, (weight, *inputs) = ctx.paths, ctx.saved_tensors
        wants_weight, wants_bias, *wanted = ctx.needs_input_grad[3:]
        given = [gradient for gradient in gradients if gradient is not None]
        if any(map(torch._C._functorch.is_legacy_batchedtensor, given)):

            def outputs(weight: Tensor, *rest: Tensor) -> list[Tensor]:
                *xs, bias = rest
                blocks = paths.blocks(ctx.sides, weight, bias, ctx.parts)
                ys = [paths.kernel.convolve(x, *block) for x, block in zip(xs, blocks, strict=True)]
                return [y for y, gradient in zip(ys, gradients, strict=True) if gradient is not None]

            to_weight, *to_inputs, to_bias = _batched((weight, *inputs), sum(paths.rows), outputs, given)
            return None, None, None, to_weight, to_bias, *to_inputs
        with _without_autocast(weight.device.type):
            terms, wants = dict(zip(ctx.sides, inputs, strict=True)), (any(wanted), wants_weight, wants_bias)
            found, to_weight, to_bias = paths.backward(terms, gradients, weight, ctx.parts, wants)
        to_inputs = [x if want else None for x, want in zip(found.values(), wanted, strict=True)]
        return None, None, None, to_weight, to_bias, *to_inputs


def _batched(tensors: Sequence[Tensor], rows: int, function: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    """Autograd's gradients for several output gradients at once (is_grads_batched), which few operations know.

    Of a function of the tensors and a bias.
    """
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (*tensors, tensors[0].new_zeros(rows))]
        outputs = function(*inputs)
    return torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
