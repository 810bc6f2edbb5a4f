"""OctConv2d and OctConv3d: convolutions that keep a share of their output at half the resolution."""

from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from octvideo.errors import UserError
from octvideo.layers.octaves import Octaves
from octvideo.layers.parts import Parts, groups_alike, join_by_parts, split_by_parts
from octvideo.layers.paths import Kernel, Paths
from octvideo.layers.resampling import average_pool, halved, keep_layout, lay_channels_last, upsample
from octvideo.layers.tracing import OneNode


def split_channels(channels: int, alpha: float, round_to: int = 1) -> tuple[int, int]:
    """How many of `channels` are (high, low): low = floor(alpha * channels); the only place that rounds.

    `round_to` takes the nearest multiple of it instead of the floor, and leaves some channels of either kind. 16, the
    floats in an AVX-512 vector, made I3D up to 17 % faster at alphas such as .1, .2 and .3 for the same arithmetic.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must lie in [0, 1], got {alpha}")
    if channels < 1 or round_to < 1:
        raise UserError(f"channels and round_to must be at least 1, got {channels} and {round_to}")
    if round_to > 1 and 0 < alpha < 1 and channels >= 2 * round_to:
        low = round_to * max(1, min(int(alpha * channels / round_to + 0.5), channels // round_to - 1))
    else:
        low = int(alpha * channels + 1e-6)  # 0.2 * 15 is just below 3
    return channels - low, low


def misalignment(convolution: nn.modules.conv._ConvNd, temporal: bool) -> str:
    """Why a convolution would shift the low map against the high one; empty if it would not."""
    size, dilation, padding = convolution.kernel_size, convolution.dilation, convolution.padding
    if any(stride not in (1, 2) for stride in convolution.stride[-2:]):
        return f"octave features take a spatial stride of 1 or 2, got stride {convolution.stride}"
    first = 0 if temporal else len(size) - 2
    wanted = [d * (n - 1) / 2 for d, n in zip(dilation[first:], size[first:], strict=True)]
    given = [0] * len(wanted) if isinstance(padding, str) else list(padding[first:])  # "valid" or numbers
    if padding == "same" or given == wanted:
        return ""
    wants = f"kernel {size} with dilation {dilation} wants {wanted} in its last {len(wanted)} dimensions, got {padding}"
    return f"octave features need a padding that keeps the size: {wants}"


@dataclass(frozen=True)
class OctaveOptions:
    """How a convolution handles octaves: everything that nn.Conv3d does not know. Raises UserError for bad values.

    Args:
        alpha: share of the output channels held at low resolution, in [0, 1].
        temporal: halve time as well as height and width (3-D only).
        downsample: for a spatial stride of 2 between plain Tensors: "conv" strides as nn.Conv3d does, "pool" averages
            first, as it does wherever octaves are on either side (the fair control at alpha 0).
        channels_last: between plain Tensors too, use that memory format and run factorised convolutions as 2-D ones:
            faster, and equal to nn.Conv3d up to rounding.
        round_to: rounds the number of low channels to a multiple; see `split_channels`.
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
        channels_in, channels, groups = convolution.in_channels, convolution.out_channels, convolution.groups
        (high, low), low_in, depthwise = self.split(channels), self.split(channels_in)[1], groups == channels_in > 1
        if depthwise and low * channels_in != channels * low_in:
            gives = f"alpha {self.alpha} with round_to {self.round_to} gives {low} low output channels"
            low_inputs = f"{low_in} low input channels of a depthwise convolution"
            raise UserError(f"{gives}, but {low_inputs} with {channels // channels_in} outputs for each")
        if not depthwise and low % groups:
            splits = f"alpha {self.alpha} splits {channels} output channels into {high} high and {low} low ones"
            raise UserError(f"{splits}: groups {groups} must divide both")


class _Plan(NamedTuple):
    paths: Paths  # between octaves, of one group
    kernel: Kernel  # between plain Tensors, with the spatial stride
    split_in: tuple[int, int]  # (high, low) channels of an input that is split as the output is
    keeps_low: bool
    plain: bool  # nn.Conv3d's own convolution serves between plain Tensors
    depthwise: bool
    problem: str  # why octaves would lose their alignment; empty if they do not


class _OctConv(OneNode, nn.modules.conv._ConvNd):
    options: OctaveOptions
    _plan: _Plan
    alpha = property(attrgetter("options.alpha"))
    temporal = property(attrgetter("options.temporal"))
    downsample = property(attrgetter("options.downsample"))
    channels_last = property(attrgetter("options.channels_last"))
    round_to = property(attrgetter("options.round_to"))

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
        rest: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *rest)
        self.set_options(OctaveOptions(alpha, temporal, downsample, channels_last, round_to))

    def set_options(self, options: OctaveOptions) -> None:
        """Changes the octave options; the weight stays. Raises UserError, and changes nothing, if they do not fit."""
        options.check(self)
        self.options = options

    def __setattr__(self, name: str, value: Any) -> None:
        """Plans anew where the options, or an argument of nn.Conv3d, are replaced."""
        super().__setattr__(name, value)
        planned = ("options", "_reversed_padding_repeated_twice", *nn.Conv3d.__constants__)
        if "options" not in self.__dict__ or name not in planned:
            return
        options, dimensions = self.options, len(self.kernel_size)
        high, low = options.split(self.out_channels)
        amounts = tuple(self._reversed_padding_repeated_twice)
        padding = tuple(amounts[-2::-2]) if amounts[0::2] == amounts[1::2] else "same"
        *time, _, _ = self.stride
        strided = Kernel(self.kernel_size, self.stride, padding, self.dilation, self.padding_mode, amounts)
        pool = (*(1,) * len(time), *self.stride[-2:])
        factors = (2,) * dimensions if options.temporal or dimensions == 2 else (1, 2, 2)
        rows = (high // self.groups, low // self.groups)
        self.__dict__["_plan"] = _Plan(
            paths=Paths(replace(strided, stride=(*time, 1, 1)), pool, factors, rows),
            kernel=strided,
            split_in=options.split(self.in_channels),
            keeps_low=low > 0,
            plain=low == 0 and (options.downsample == "conv" or max(pool) == 1),
            depthwise=self.groups == self.in_channels > 1,
            problem=misalignment(self, options.temporal),
        )

    def forward(self, input: Tensor | Octaves) -> Tensor | Octaves:
        if isinstance(input, Proxy):
            return self._node(input)
        plan, paths = self._plan, self._plan.paths
        if plan.plain and not isinstance(input, Octaves):
            if self.options.channels_last and input.dim() == len(self.kernel_size) + 2:
                return plan.kernel.convolve(lay_channels_last(input), self.weight, self.bias, self.groups)
            output: Tensor = super().forward(input)
            return output if input.is_contiguous() else keep_layout(output, input)
        high, low, parts = self._maps(input)
        if plan.problem:
            if plan.keeps_low or not isinstance(input, Octaves) or not low.shape[1]:
                raise UserError(plan.problem)
            output = super().forward(input.merge())  # no resolution to keep apart
            return output
        if plan.depthwise:
            return self._depthwise(high, low, parts)
        if self.groups == 1:
            out_high, out_low = paths(high, low, self.weight, self.bias, parts)
            return Octaves(out_high, out_low) if plan.keeps_low else out_high
        # Each vanilla group reads and writes its own channels, high and low; alike groups are one grouped convolution.
        runs = groups_alike(parts, self.groups)
        rows = [groups * sum(paths.rows) for groups, _ in runs]
        highs, lows = ([groups * sum(part[i] for part in group) for groups, group in runs] for i in (0, 1))
        biases = [None] * len(runs) if self.bias is None else self.bias.split(rows)
        tensors = zip(high.split(highs, 1), low.split(lows, 1), self.weight.split(rows), biases, strict=True)
        outputs = [paths(*of_run, group, groups) for of_run, (groups, group) in zip(tensors, runs, strict=True)]
        out_high, out_low = (maps[0] if len(maps) == 1 else torch.cat(maps, 1) for maps in zip(*outputs, strict=True))
        return Octaves(out_high, out_low, (paths.rows,) * self.groups) if plan.keeps_low else out_high

    def _depthwise(self, high: Tensor, low: Tensor, parts: Parts) -> Tensor | Octaves:
        """One filter a channel: high stays high and low stays low, or is upsampled at the end; no path joins them."""
        kernel, pool, multiplier = self._plan.paths.kernel, self._plan.paths.pool, self.out_channels // self.in_channels
        parts = tuple((of_high * multiplier, of_low * multiplier) for of_high, of_low in parts)
        weight_high, weight_low = split_by_parts(self.weight, parts, 0)
        bias_high, bias_low = (None, None) if self.bias is None else split_by_parts(self.bias, parts, 0)
        high, low = average_pool(lay_channels_last(high), pool), lay_channels_last(low)
        out_high = kernel.convolve(high, weight_high, bias_high, high.shape[1])
        if not self._plan.keeps_low and low.shape[1] == 0:
            return out_high
        low = average_pool(low, pool) if self._plan.keeps_low else low
        out_low = kernel.convolve(low, weight_low, bias_low, low.shape[1])
        if self._plan.keeps_low:
            return Octaves(out_high, out_low, parts)
        return join_by_parts(out_high, upsample(out_low, out_high.shape[2:]), parts, 1)

    def _maps(self, input: Tensor | Octaves) -> tuple[Tensor, Tensor, Parts]:
        """The input's maps and parts, checked; a depthwise layer splits a plain one, any other takes it as high."""
        if not isinstance(input, (Tensor, Octaves)):
            raise TypeError(f"expected a Tensor or Octaves, got {type(input).__name__}")
        shape, dimensions, plan = input.shape, len(self.kernel_size), self._plan
        if len(shape) != dimensions + 2 or shape[1] != self.in_channels:
            raise UserError(f"expected (B, {self.in_channels}, {'T, ' * (dimensions - 2)}H, W), got {tuple(shape)}")
        split_alike = plan.depthwise and plan.keeps_low
        if not isinstance(input, Octaves):
            if not split_alike:
                return input, input[:, :0], ((self.in_channels, 0),)
            high, low = input.split(plan.split_in, 1)
            return high, average_pool(low, plan.paths.factors), (plan.split_in,)
        high, low, parts = input.high, input.low, input.parts
        wanted, size, got = halved(high.shape[2:], plan.paths.factors), tuple(high.shape[2:]), tuple(low.shape[2:])
        if got != wanted:
            beside = f"a low map of size {wanted} beside a high map of {size}, got {got}"
            raise UserError(f"a layer with temporal={self.temporal} wants {beside}")
        rounding = len(parts) * self.options.round_to if len(parts) > 1 else 1  # each part was rounded
        if split_alike and abs(low.shape[1] - plan.split_in[1]) >= rounding:
            wants = f"a depthwise convolution of alpha {self.alpha} wants {plan.split_in} (high, low) input channels"
            raise UserError(f"{wants}, got {parts}: give it the preceding layer's alpha")
        return high, low, parts

    def extra_repr(self) -> str:
        options = ((option, getattr(self.options, option.name)) for option in fields(self.options))
        shown = [f"{o.name}={value!r}" for o, value in options if o.name == "alpha" or value != o.default]
        return ", ".join((super().extra_repr(), *shown))  # type: ignore[no-untyped-call]


class OctConv2d(_OctConv, nn.Conv2d):  # type: ignore[misc]
    """A 2-D convolution that keeps a share of its output at half the resolution: `OctConv3d` for (B, C, H, W)."""


class OctConv3d(_OctConv, nn.Conv3d):  # type: ignore[misc]
    """A 3-D convolution that keeps a share of its output at half the spatial resolution.

    Takes the place of nn.Conv3d anywhere: same arguments, same weight, same state_dict. With a plain input and
    alpha 0 it is nn.Conv3d, bit for bit. The four paths of the paper are slices of the one weight: rows are output
    channels and columns input channels, high ones first in both. Section 3.2 of Chen et al., ICCV 2019.

    The octave options are those of `OctaveOptions`; the input's share of low channels is read off the input. A spatial
    stride of 2 pools the input first (the official rule); a temporal stride stays in the convolution. In a grouped
    layer each vanilla group keeps its channels, and the share alpha of its outputs is low. A depthwise layer keeps
    every channel in its octave, so its input must be split as its output is.

    Shape:
        Input: (B, C_in, T, H, W), or Octaves of that shape; H and W may be odd.
        Output: Octaves of (B, C_out, T', H', W'), or a Tensor if alpha is 0.

    Raises UserError for an alpha outside [0, 1] or groups that do not divide the low output channels; in forward, with
    low output channels, for a spatial stride above 2 or a padding that does not keep the size.
    """
