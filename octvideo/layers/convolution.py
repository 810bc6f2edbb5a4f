"""OctConv2d and OctConv3d: convolutions that keep a share of their output at half the resolution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octvideo.errors import UserError
from octvideo.layers.octaves import (
    Octaves,
    Parts,
    join_by_parts,
    join_pieces,
    refuse_reentrant_checkpoint,
    split_by_parts,
)
from octvideo.layers.paths import Kernel, Paths
from octvideo.layers.resampling import average_pool, keep_layout, lay_channels_last, upsample


def split_channels(channels: int, alpha: float, round_to: int = 1) -> tuple[int, int]:
    """How many of `channels` are (high, low): low = floor(alpha * channels); the only place that rounds.

    Args:
        channels: in all.
        alpha: share of low channels, in [0, 1].
        round_to: takes the nearest multiple of this in place of the floor, at least one and leaving at least one, where
            there are two. 16, the floats that a vector of AVX-512 holds, made I3D at alphas such as .1, .2 and .3 up to
            17 % faster for the same arithmetic, and 1 to 5 % at .125. It changes how much is low.

    Raises:
        ValueError: alpha outside [0, 1], or channels or round_to below 1.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must lie in [0, 1], got {alpha}")
    if channels < 1 or round_to < 1:
        raise UserError(f"channels and round_to must be at least 1, got {channels} and {round_to}")
    if round_to > 1 and 0 < alpha < 1 and channels >= 2 * round_to:
        nearest, most = int(alpha * channels / round_to + 0.5), channels // round_to - 1
        low = round_to * max(1, min(nearest, most))
    else:
        low = int(alpha * channels + 1e-6)  # 0.2 * 15 is just below 3
    return channels - low, low


def misalignment(convolution: nn.modules.conv._ConvNd, temporal: bool) -> str:
    """Why a convolution would move the high and the low map apart; empty if it does not.

    Args:
        convolution: the layer.
        temporal: whether low maps have half the frames; a 2-D layer has none.
    """
    dimensions = len(convolution.kernel_size)
    if any(stride not in (1, 2) for stride in convolution.stride[-2:]):
        return f"octave features take a spatial stride of 1 or 2, got stride {convolution.stride}"
    halved = range(0 if temporal else dimensions - 2, dimensions)
    reach = [convolution.dilation[axis] * (convolution.kernel_size[axis] - 1) for axis in halved]
    padding = [0 if isinstance(convolution.padding, str) else convolution.padding[axis] for axis in halved]
    if convolution.padding != "same" and any(2 * p != r for p, r in zip(padding, reach, strict=True)):
        return (
            f"octave features need a padding that keeps the size: kernel {convolution.kernel_size} with dilation "
            f"{convolution.dilation} wants {[r / 2 for r in reach]} in its last {len(reach)} dimensions, "
            f"got {convolution.padding}"
        )
    return ""


def is_depthwise(convolution: nn.modules.conv._ConvNd) -> bool:
    """Whether each filter reads one channel of several."""
    return convolution.groups == convolution.in_channels > 1


@dataclass(frozen=True)
class OctaveOptions:
    """How a convolution handles octaves: everything that nn.Conv3d does not know.

    Args:
        alpha: share of the output channels held at low resolution, in [0, 1].
        temporal: halve time as well as height and width (3-D only).
        downsample: what a spatial stride of 2 does between plain Tensors: "conv" strides as nn.Conv3d does, "pool"
            averages first, as it does wherever octaves are on either side (the fair control at alpha 0).
        channels_last: between plain Tensors too, use the channels_last memory format and run factorised convolutions
            as 2-D ones, as with octaves: faster, and equal to nn.Conv3d up to rounding.
        round_to: rounds the number of low channels to a multiple; see `split_channels`.

    Raises:
        UserError: a value out of its range.
    """

    alpha: float = 0.25
    temporal: bool = False
    downsample: Literal["conv", "pool"] = "conv"
    channels_last: bool = False
    round_to: int = 1

    def __post_init__(self) -> None:
        self.split(1)
        if self.downsample not in ("conv", "pool"):
            raise UserError(f'downsample must be "conv" or "pool", got {self.downsample!r}')

    def split(self, channels: int) -> tuple[int, int]:
        """How many of `channels` are (high, low)."""
        return split_channels(channels, self.alpha, self.round_to)

    def check(self, convolution: nn.modules.conv._ConvNd) -> None:
        """Raises UserError if a convolution cannot have these options."""
        if self.temporal and len(convolution.kernel_size) == 2:
            raise UserError("temporal=True needs a 3-D convolution, got a 2-D one")
        high, low = self.split(convolution.out_channels)
        if is_depthwise(convolution):
            multiplier = convolution.out_channels // convolution.in_channels
            if low % multiplier:
                raise UserError(
                    f"alpha {self.alpha} gives {high} high output channels, not a multiple of the {multiplier} "
                    "outputs that each depthwise filter has"
                )
            low_in = self.split(convolution.in_channels)[1]
            if low != multiplier * low_in:
                raise UserError(
                    f"alpha {self.alpha} with round_to {self.round_to} gives {low} low output channels, but {low_in} "
                    f"low input channels of a depthwise convolution with {multiplier} outputs for each"
                )
        elif low % convolution.groups:
            raise UserError(
                f"alpha {self.alpha} splits {convolution.out_channels} output channels into {high} high and {low} low "
                f"ones: groups {convolution.groups} must divide both"
            )


@functools.lru_cache(maxsize=1024)
def groups_alike(parts: Parts, groups: int) -> tuple[tuple[int, Parts], ...]:
    """How the input of a grouped convolution is made up: runs of (number of groups, the parts of each of them).

    The vanilla convolution's groups are cut from the vanilla order of channels. Of one piece, (6, 2), two groups get
    ((1, ((4, 0),)), (1, ((2, 2),))): the first reads high channels only.
    """
    width = sum(high + low for high, low in parts) // groups
    runs: list[tuple[int, Parts]] = []
    begun: list[tuple[int, int]] = []

    def append(count: int, group: Parts) -> None:
        if runs and runs[-1][1] == group:
            count += runs.pop()[0]
        runs.append((count, group))

    for part in parts:
        for is_low, channels in enumerate(part):
            left = channels
            while left:
                room = width - sum(high + low for high, low in begun)
                whole = 0 if begun else left // width
                taken = whole * width or min(room, left)
                piece = (0, taken) if is_low else (taken, 0)
                left -= taken
                if whole:
                    append(whole, ((0, width) if is_low else (width, 0),))
                    continue
                begun.append(piece)
                if taken == room:
                    append(1, join_pieces(begun))
                    begun.clear()
    return tuple(runs)


class _OctConv(nn.modules.conv._ConvNd):
    """What OctConv2d and OctConv3d share: everything but the number of dimensions."""

    options: OctaveOptions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        alpha: float = 0.25,
        temporal: bool = False,
        downsample: Literal["conv", "pool"] = "conv",
        channels_last: bool = False,
        round_to: int = 1,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,  # type: ignore[arg-type]
            bias,  # type: ignore[arg-type]
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.set_options(OctaveOptions(alpha, temporal, downsample, channels_last, round_to))

    def set_options(self, options: OctaveOptions) -> None:
        """Changes the octave options; the weight stays.

        Raises:
            UserError: options that this convolution cannot have; then it is unchanged.
        """
        options.check(self)
        self.options = options

    @property
    def alpha(self) -> float:
        """Share of the output channels held at low resolution."""
        return self.options.alpha

    @property
    def temporal(self) -> bool:
        """Whether low maps have half the frames too."""
        return self.options.temporal

    @property
    def downsample(self) -> Literal["conv", "pool"]:
        """What a spatial stride of 2 does between plain Tensors."""
        return self.options.downsample

    @property
    def channels_last(self) -> bool:
        """Whether plain Tensors are laid out channels_last too."""
        return self.options.channels_last

    @property
    def round_to(self) -> int:
        """What numbers of low channels are multiples of."""
        return self.options.round_to

    @property
    def _factors(self) -> tuple[int, ...]:
        """What each dimension is divided by in this layer's low maps."""
        return (2,) * len(self.kernel_size) if self.temporal or len(self.kernel_size) == 2 else (1, 2, 2)

    def forward(self, input: Tensor | Octaves) -> Tensor | Octaves:
        """Convolves a Tensor or Octaves; gives Octaves, or a Tensor if no output channel is low."""
        refuse_reentrant_checkpoint()
        high_out, low_out = split_channels(self.out_channels, self.alpha, self.round_to)
        pools = self.downsample == "pool" and max(self.stride[-2:]) > 1
        if not isinstance(input, Octaves) and low_out == 0 and not pools:
            if self.channels_last and input.dim() == len(self.kernel_size) + 2:
                kernel = self._kernel(self.stride[-2:])
                return kernel.convolve(lay_channels_last(input), self.weight, self.bias, self.groups)
            output = super().forward(input)  # type: ignore[misc]
            return output if input.is_contiguous() else keep_layout(output, input)
        x = self._octaves(input, low_out > 0)
        if low_out == 0 and x.low.shape[1] and misalignment(self, self.temporal):  # no resolution to keep apart
            return super().forward(x.merge())  # type: ignore[no-any-return, misc]
        if is_depthwise(self):
            return self._depthwise(x, low_out > 0)

        rows = (high_out // self.groups, low_out // self.groups)
        kernel, pool = self._kernel(), self._pool()
        if self.groups == 1:
            paths = Paths(kernel, pool, self._factors, x.parts, rows)
            out_high, out_low = paths(x.high, x.low, self.weight, self.bias)
            return Octaves(out_high, out_low) if low_out else out_high
        # Each vanilla group reads and writes its own channels, of which some are high and some low. Groups that are
        # alike are one grouped convolution.
        runs = groups_alike(x.parts, self.groups)
        counts = [groups * sum(rows) for groups, _ in runs]
        weights = self.weight.split(counts)
        biases = [None] * len(runs) if self.bias is None else self.bias.split(counts)
        highs = x.high.split([groups * sum(high for high, _ in group) for groups, group in runs], 1)
        lows = x.low.split([groups * sum(low for _, low in group) for groups, group in runs], 1)
        outputs = [
            Paths(kernel, pool, self._factors, group, rows, groups)(high, low, weight, bias)
            for (groups, group), high, low, weight, bias in zip(runs, highs, lows, weights, biases, strict=True)
        ]
        out_high, out_low = (maps[0] if len(maps) == 1 else torch.cat(maps, 1) for maps in zip(*outputs, strict=True))
        return Octaves(out_high, out_low, (rows,) * self.groups) if low_out else out_high

    def _depthwise(self, x: Octaves, keeps_low: bool) -> Tensor | Octaves:
        """One filter a channel: high stays high and low stays low, or is upsampled at the end; no path joins them."""
        multiplier = self.out_channels // self.in_channels
        parts = tuple((high * multiplier, low * multiplier) for high, low in x.parts)
        weight_high, weight_low = split_by_parts(self.weight, parts, 0)
        bias_high, bias_low = (None, None) if self.bias is None else split_by_parts(self.bias, parts, 0)
        pool, kernel = self._pool(), self._kernel()
        high, low = lay_channels_last(x.high), lay_channels_last(x.low)
        out_high = kernel.convolve(average_pool(high, pool), weight_high, bias_high, high.shape[1])
        if keeps_low:
            out_low = kernel.convolve(average_pool(low, pool), weight_low, bias_low, low.shape[1])
            return Octaves(out_high, out_low, parts)
        if low.shape[1] == 0:
            return out_high
        out_low = kernel.convolve(low, weight_low, bias_low, low.shape[1])
        return join_by_parts(out_high, upsample(out_low, out_high.shape[2:]), parts, 1)

    def _octaves(self, input: Tensor | Octaves, keeps_low: bool) -> Octaves:
        """The input, checked; a depthwise layer splits a plain one, any other takes it as high."""
        if not isinstance(input, (Tensor, Octaves)):
            raise TypeError(f"expected a Tensor or Octaves, got {type(input).__name__}")
        dimensions = len(self.kernel_size)
        if input.dim() != dimensions + 2 or input.shape[1] != self.in_channels:
            raise UserError(
                f"expected (B, {self.in_channels}, {'T, ' * (dimensions - 2)}H, W), got {tuple(input.shape)}"
            )
        depthwise = is_depthwise(self)
        if not isinstance(input, Octaves):
            alpha = self.alpha if depthwise and keeps_low else 0
            high, low = input.split(split_channels(self.in_channels, alpha, self.round_to), 1)
            return Octaves(high, average_pool(low, self._factors) if low.shape[1] else low)
        size, low_size = tuple(input.high.shape[2:]), tuple(input.low.shape[2:])
        wanted = tuple(-(-cells // factor) for cells, factor in zip(size, self._factors, strict=True))
        if low_size != wanted:
            raise UserError(
                f"a layer with temporal={self.temporal} wants a low map of {wanted} cells beside a high map of {size}, "
                f"got {low_size}"
            )
        low = input.low.shape[1]
        wanted = split_channels(self.in_channels, self.alpha, self.round_to)
        rounding = len(input.parts) * self.round_to  # of each part
        differs = low != wanted[1] if len(input.parts) == 1 else abs(low - wanted[1]) >= rounding
        if depthwise and keeps_low and differs:
            raise UserError(
                f"a depthwise convolution of alpha {self.alpha} wants {wanted} (high, low) input "
                f"channels, got {input.parts}: give it the alpha of the layer before"
            )
        return input

    def _kernel(self, spatial_stride: Sequence[int] = (1, 1)) -> Kernel:
        """How this layer slides; its spatial stride is 1 where pools stand for it."""
        amounts = tuple(self._reversed_padding_repeated_twice)
        padding = tuple(amounts[-2::-2]) if amounts[0::2] == amounts[1::2] else "same"
        return Kernel((*self.stride[:-2], *spatial_stride), padding, self.dilation, self.padding_mode, amounts)

    def _pool(self) -> tuple[int, ...]:
        """The factors to pool by in place of the spatial stride; refuses what would move the two maps apart."""
        problem = misalignment(self, self.temporal)
        if problem:
            raise UserError(problem)
        return (*(1,) * (len(self.kernel_size) - 2), *self.stride[-2:])

    def extra_repr(self) -> str:
        """The arguments of nn.Conv3d, and the octave options."""
        options = f", alpha={self.alpha}" + (", temporal=True" if self.temporal else "")
        options += ", downsample='pool'" if self.downsample == "pool" else ""
        options += ", channels_last=True" if self.channels_last else ""
        return super().extra_repr() + options + (f", round_to={self.round_to}" if self.round_to > 1 else "")


class OctConv2d(_OctConv, nn.Conv2d):  # type: ignore[misc]
    """A 2-D convolution that keeps a share of its output at half the resolution; see `OctConv3d`.

    Shape:
        Input: (B, C_in, H, W), or Octaves of that shape; H and W may be odd.
        Output: Octaves of (B, C_out, H', W'), or a Tensor if alpha is 0.
    """


class OctConv3d(_OctConv, nn.Conv3d):  # type: ignore[misc]
    """A 3-D convolution that keeps a share of its output at half the spatial resolution.

    Takes the place of nn.Conv3d anywhere: same arguments, same weight, same state_dict. With a plain input and
    alpha 0 it is nn.Conv3d, bit for bit. The four paths of the paper are slices of the one weight: rows are output
    channels and columns input channels, high ones first in both. Section 3.2 of Chen et al., ICCV 2019.

    A spatial stride of 2 pools the input first (the official rule), a temporal stride stays in the convolution.
    A grouped layer is the same layer with the grouped weight written as a block-diagonal dense one: each of the vanilla
    groups keeps its channels, and the share alpha of its outputs is low. A depthwise layer keeps every channel in the
    octave that it is in, so its input must be split as its output is.

    Args:
        alpha: share of the output channels held at low resolution, in [0, 1]. The input's share is read off the input.
        temporal: halve time as well as height and width.
        downsample: "pool" pools for a spatial stride of 2 between plain Tensors too, "conv" strides there.
        channels_last: between plain Tensors too, lay channels last in memory and run factorised convolutions as 2-D
            ones, as with octaves: faster, and equal to nn.Conv3d up to rounding.
        round_to: rounds the number of low output channels to a multiple; see `split_channels`.

    Shape:
        Input: (B, C_in, T, H, W), or Octaves of that shape; H and W may be odd.
        Output: Octaves of (B, C_out, T', H', W'), or a Tensor if alpha is 0.

    Raises:
        ValueError: alpha outside [0, 1], groups that do not divide the low output channels; in forward: with low output
            channels, a spatial stride above 2 or a padding that does not keep the size (at alpha 0 such a layer
            convolves the merged input); an input of other channels, a low map of the other kind.
        RuntimeError: called inside a reentrant checkpoint, which would lose gradients.
    """
