"""OctConv1d/2d/3d and OctConvTranspose2d/3d: convolutions that keep a share of their output at half the resolution."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from octvideo.errors import UserError
from octvideo.layers.finishing import passes_fused
from octvideo.layers.octaves import Octaves, merged, record
from octvideo.layers.parts import Parts, groups_alike
from octvideo.layers.paths import Kernel, Paths, swap_sides
from octvideo.layers.pending import Pending
from octvideo.layers.resampling import as_weight, keep_layout, lay_channels_last
from octvideo.layers.several import Level, convolve_each, convolve_several, levels_of, misfit, pool_octaves
from octvideo.layers.shares import Shares, shares_of, split_octaves
from octvideo.layers.tracing import OneNode

Pairs = tuple[tuple[int, int], ...]  # padding (before, behind) each dimension
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class OctaveOptions:
    """How a convolution handles octaves: everything that nn.Conv3d does not know. Raises UserError for bad values.

    Args:
        alpha: share of the output channels held at low resolution, in [0, 1]; or several: at half, at a quarter ...
        temporal: halve time as well as height and width (3-D only); once, however many octaves there are.
        downsample: for a spatial stride of 2 between plain Tensors: "conv" strides as nn.Conv3d does, "pool" averages
            first, as it does wherever octaves are on either side (the fair control at alpha 0).
        channels_last: between plain Tensors too, use that memory format and run factorised convolutions as 2-D ones:
            faster, and equal to nn.Conv3d up to rounding.
        round_to: rounds the number of low channels to a multiple; see `octvideo.layers.shares.split_channels`.
        strided: for a spatial stride above 1: "pool" averages first, "keep" leaves the convolution vanilla:
            it strides, reads merged octaves and gives a Tensor. Transposed convolutions never pool.
    """

    alpha: Shares = 0.25
    temporal: bool = False
    downsample: Literal["conv", "pool"] = "conv"
    channels_last: bool = False
    round_to: int = 1
    strided: Literal["pool", "keep"] = "pool"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", shares_of(self.alpha))
        self.octaves(1)
        if self.downsample not in ("conv", "pool"):
            raise UserError(f'downsample must be "conv" or "pool", got {self.downsample!r}')
        if self.strided not in ("pool", "keep"):
            raise UserError(f'strided must be "pool" or "keep", got {self.strided!r}')

    def octaves(self, channels: int) -> tuple[int, ...]:
        """How many of `channels` are at the full resolution, at half, a quarter ...; alone if all are."""
        return split_octaves(channels, self.alpha, self.round_to)

    def check(self, convolution: nn.modules.conv._ConvNd) -> None:
        """Raises UserError if a convolution cannot have these options."""
        if self.temporal and len(convolution.kernel_size) < 3:
            raise UserError(f"temporal=True needs a 3-D convolution, got a {len(convolution.kernel_size)}-D one")
        if misfit := self.of_stride(convolution.stride, convolution.transposed).misfit(
            convolution.in_channels, convolution.out_channels, convolution.groups
        ):
            raise UserError(misfit)

    def of_stride(self, stride: Sequence[int], transposed: bool) -> "OctaveOptions":
        """These options as a convolution of that stride takes them: with `strided="keep"` its alpha may be 0."""
        kept = self.strided == "keep" and max(stride[-2:]) > 1 and not transposed
        return replace(self, alpha=0.0, downsample="conv") if kept else self

    def misfit(self, channels_in: int, channels: int, groups: int) -> str:
        """Why a convolution of these channels cannot be split so; empty if it can."""
        (high, *lows), (_, *lows_in) = self.octaves(channels), self.octaves(channels_in)
        depthwise, low, low_in = groups == channels_in > 1, *(" + ".join(map(str, n or [0])) for n in (lows, lows_in))
        if depthwise and [n * channels_in for n in lows] != [n * channels for n in lows_in]:
            gives = f"alpha {self.alpha} with round_to {self.round_to} gives {low} low output channels"
            low_inputs = f"{low_in} low input channels of a depthwise convolution"
            return f"{gives}, but {low_inputs} with {channels // channels_in} outputs for each"
        if not depthwise and any(n % groups for n in lows):
            splits = f"alpha {self.alpha} splits {channels} output channels into {high} high and {low} low ones"
            return f"{splits}: groups {groups} must divide {'all' if len(lows) > 1 else 'both'}"
        return ""


def misalignment(convolution: nn.modules.conv._ConvNd, temporal: bool) -> str:
    """Why a convolution would shift the low map against the high one; empty if it would not."""
    return _misalignment(*_numbers(convolution), temporal)


class Plan(NamedTuple):
    """What a convolution does to octaves, as far as it does not depend on its input and weight."""

    options: OctaveOptions
    channels: tuple[int, int]  # in, out
    groups: int
    weight_shape: tuple[int, ...]
    paths: Paths  # between octaves, of one group
    kernel: Kernel  # between plain Tensors, with the spatial stride
    levels: tuple[Level, ...]  # the same for each resolution of the output
    split_in: tuple[int, ...]  # channels at each resolution that a depthwise layer makes of a plain input
    keeps_low: bool
    plain: bool  # the vanilla convolution serves between plain Tensors
    depthwise: bool
    problem: str  # why octaves would lose their alignment; empty if they do not


def sizes(value: Any, dimensions: int) -> tuple[int, ...]:
    """An argument of a convolution, a number or several, as one integer for each dimension."""
    values = (value,) if isinstance(value, int) else tuple(map(int, value))  # pytorchvideo leaves numpy's
    return values * dimensions if len(values) == 1 else values


def padding_pairs(padding: Any, size: Sequence[int], dilation: Sequence[int]) -> Pairs:
    """An nn.Conv3d's padding as numbers; of an odd "same" the larger half comes behind."""
    if padding == "same":
        sums = [d * (n - 1) for n, d in zip(size, dilation, strict=True)]
        return tuple([(both // 2, both - both // 2) for both in sums])
    return tuple([(n, n) for n in sizes(0 if padding == "valid" else padding, len(size))])


def _misalignment(
    size: Sizes, stride: Sizes, pairs: Pairs, dilation: Sizes, output_padding: Sizes | None, temporal: bool
) -> str:
    first = 0 if temporal else max(0, len(size) - 2)
    given = [before if before == behind else (before, behind) for before, behind in pairs]
    got = f"in its last {len(size) - first} dimensions, got {tuple(given)}"
    sums = [sum(pair) for pair in pairs[first:]]
    reach = [d * (n - 1) for n, d in zip(size[first:], dilation[first:], strict=True)]
    if output_padding is not None:
        grows = list(zip(sums, reach, stride[first:], strict=True))
        # A low map that comes out one position short takes it from the output padding, which a stride of 1 has not.
        if all(abs(both - d - 1 + s) <= (1 if s > 1 or both <= d else 0) for both, d, s in grows):
            return ""
        kernel = f"a transposed kernel {size} with stride {stride} and dilation {dilation}"
        wanted = f"{kernel} wants {[(d + 1 - s) / 2 for _, d, s in grows]} {got}"
        return f"octave features need a padding that multiplies the size by the stride: {wanted}"
    if any(step not in (1, 2) for step in stride[-2:]):
        return f"octave features take a spatial stride of 1 or 2, got stride {stride}"
    if sums == reach and all(abs(before - behind) <= 1 for before, behind in pairs[first:]):
        return ""
    wants = f"kernel {size} with dilation {dilation} wants {[both / 2 for both in reach]} {got}"
    return f"octave features need a padding that keeps the size: {wants}"


@lru_cache(4096)
def plan_convolution(
    options: OctaveOptions,
    channels: tuple[int, int],
    size: Sizes,
    stride: Sizes,
    pairs: Pairs,
    dilation: Sizes,
    groups: int,
    padding_mode: str = "zeros",
    output_padding: Sizes | None = None,
) -> Plan:
    """The plan of a convolution of (in, out) `channels`, transposed if it has an output padding.

    One dimension is planned as the width of images of height 1.
    """
    sides = channels if output_padding is not None else channels[::-1]
    weight_shape = (sides[0], sides[1] // groups, *size)
    problem = _misalignment(size, stride, pairs, dilation, output_padding, options.temporal)
    vanilla = options.of_stride(stride, output_padding is not None)
    if vanilla is not options:
        options, problem = vanilla, f'strided="keep" leaves a convolution of stride {stride} vanilla'
    if len(size) == 1:
        size, stride, pairs, dilation = (1, *size), (1, *stride), ((0, 0), *pairs), (1, *dilation)
        output_padding = output_padding and (0, *output_padding)
    counts = options.octaves(channels[1])
    high, low = counts[0], sum(counts[1:])
    uneven = any(before != behind for before, behind in pairs)
    mode = "constant" if uneven and padding_mode == "zeros" else padding_mode
    amounts = () if mode == "zeros" else tuple([n for pair in reversed(pairs) for n in pair])
    kernel = Kernel(size, stride, tuple([before for before, _ in pairs]), dilation, mode, amounts, output_padding)
    *time, _, _ = stride
    ones = (1,) * len(time)
    pool = (*ones, 1, 1) if output_padding is not None else (*ones, *stride[-2:])
    inner = kernel if output_padding is not None else replace(kernel, stride=(*time, 1, 1))
    height = 1 if len(weight_shape) == 3 else 2
    factors = (2, 2, 2) if options.temporal else (*ones, height, 2)
    paths = Paths(inner, pool, factors, (high // groups, low // groups))
    return Plan(
        options=options,
        channels=channels,
        groups=groups,
        weight_shape=weight_shape,
        paths=paths,
        kernel=kernel,
        levels=levels_of(paths, [count // groups for count in counts]),
        split_in=options.octaves(channels[0]),
        keeps_low=low > 0,
        plain=low == 0 and (options.downsample == "conv" or max(pool) == 1),
        depthwise=groups == channels[0] > 1,
        problem=problem,
    )


def _numbers(convolution: nn.modules.conv._ConvNd) -> tuple[Any, Any, Any, Any, Any]:
    """The size, stride, padding, dilation and output padding (None unless it is transposed) that forward goes by."""
    n = len(convolution.kernel_size)
    given = (convolution.kernel_size, convolution.stride, convolution.dilation)
    size, stride, dilation = (sizes(value, n) for value in given)
    if convolution.padding_mode == "zeros":
        pairs = padding_pairs(convolution.padding, size, dilation)
    else:
        amounts = tuple(map(int, convolution._reversed_padding_repeated_twice))
        pairs = tuple(zip(amounts[0::2], amounts[1::2], strict=True))[::-1]
    return size, stride, pairs, dilation, sizes(convolution.output_padding, n) if convolution.transposed else None


def plan_of(
    convolution: nn.modules.conv._ConvNd, options: OctaveOptions, output_padding: Sequence[int] | None = None
) -> Plan:
    """The plan of a module with these options; `output_padding` is used instead of its own."""
    size, stride, pairs, dilation, own = _numbers(convolution)
    channels, groups = (convolution.in_channels, convolution.out_channels), convolution.groups
    extra = own if output_padding is None else tuple(output_padding)
    return plan_convolution(options, channels, size, stride, pairs, dilation, groups, convolution.padding_mode, extra)


def convolve(input: Tensor | Octaves, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor | Octaves:
    """The octave convolution of a plan without a problem: Octaves if it keeps low channels, else a Tensor.

    Args:
        input: (B, C_in, L), (B, C_in, H, W) or (B, C_in, T, H, W), or Octaves of that shape.
        weight: of `plan.weight_shape`, as nn.Conv3d or nn.ConvTranspose3d have it.

    Raises UserError for an input of another shape, or split in a way that does not suit the plan.
    """
    _check_input(input, plan)
    if weight.dim() == 3:  # a height of 1
        weight, input = weight.unsqueeze(2), input.unsqueeze(2)
    weight = weight if plan.kernel.output_padding is None else swap_sides(weight, plan.groups)
    if plan.plain and not isinstance(input, Octaves):
        output: Tensor | Octaves = plan.kernel.convolve(lay_channels_last(input), weight, bias, plan.groups)
    else:
        high, low, parts = _maps(input, plan)
        if plan.depthwise:
            lower = plan.levels[1].paths if plan.keeps_low else plan.levels[0].below
            output = convolve_each(Octaves(high, low, parts), weight, bias, plan.paths, lower, plan.keeps_low)
        elif len(plan.levels) > 2 or isinstance(low, Octaves):
            output = convolve_several(Octaves(high, low, parts), weight, bias, plan.levels, plan.groups)
        elif _waits(high, plan):
            return _waiting(input, high, low, parts, weight, bias, plan)
        else:
            output = _by_groups(high, low, parts, weight, bias, plan)
    if len(plan.weight_shape) > 3:
        return output
    if isinstance(output, Octaves):
        return Octaves(output.high.squeeze(2), output.low.squeeze(2), output.parts)
    return output.squeeze(2)


def _waits(high: Tensor, plan: Plan) -> bool:
    """Whether the output is left to a fused pass: octaves of one piece, halved in height and width."""
    paths, frames = plan.paths, max(plan.paths.factors[:-2], default=1)
    spatial = len(plan.weight_shape) > 3 and paths.kernel.output_padding is None and frames == 1
    pools = max(paths.pool) == 1 or paths.pool == paths.factors
    channels = plan.keeps_low and paths.rows[0] > 0 < high.shape[1]
    return channels and spatial and pools and plan.groups == 1 and passes_fused(high)


def _waiting(
    input: Tensor | Octaves, high: Tensor, low: Tensor, parts: Parts, weight: Tensor, bias: Tensor | None, plan: Plan
) -> Octaves:
    """The octave convolution as separate convolutions, whose sums wait."""
    high, low, pooled = lay_channels_last(high), lay_channels_last(low), None
    if isinstance(input, Pending):
        *_, pooled = input.ready(pool=True)
    found = plan.paths.separately(plan.paths.terms(high, low, pooled), weight, bias, parts)
    add = found.get(("all", "low"), found.get(("high", "low")))
    return Pending.of_maps(found["high", "high"], add, found["low", "high"], found.get(("low", "low")))


def _by_groups(
    high: Tensor, low: Tensor, parts: Parts, weight: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor | Octaves:
    """Each vanilla group reads and writes its own channels, high and low; alike groups are one grouped convolution."""
    paths = plan.paths
    if plan.groups == 1:
        out_high, out_low = paths(high, low, weight, bias, parts)
        return Octaves(out_high, out_low) if plan.keeps_low else out_high
    runs = groups_alike(parts, plan.groups)
    rows = [groups * sum(paths.rows) for groups, _ in runs]
    highs, lows = ([groups * sum(part[i] for part in group) for groups, group in runs] for i in (0, 1))
    biases = [None] * len(runs) if bias is None else bias.split(rows)
    tensors = zip(high.split(highs, 1), low.split(lows, 1), weight.split(rows), biases, strict=True)
    outputs = [paths(*of_run, group, groups) for of_run, (groups, group) in zip(tensors, runs, strict=True)]
    out_high, out_low = (maps[0] if len(maps) == 1 else torch.cat(maps, 1) for maps in zip(*outputs, strict=True))
    return Octaves(out_high, out_low, (paths.rows,) * plan.groups) if plan.keeps_low else out_high


def _check_input(input: Any, plan: Plan) -> None:
    if not isinstance(input, (Tensor, Octaves)):
        raise TypeError(f"expected a Tensor or Octaves, got {type(input).__name__}")
    shape, dimensions = input.shape, len(plan.weight_shape)
    if len(shape) != dimensions or shape[1] != plan.channels[0]:
        extent = ("L", "H, W", "T, H, W")[dimensions - 3]
        raise UserError(f"expected (B, {plan.channels[0]}, {extent}), got {tuple(shape)}")


def _maps(input: Tensor | Octaves, plan: Plan) -> tuple[Tensor, Tensor, Parts]:
    """The input's maps and parts, checked; a depthwise layer splits a plain one, any other takes it as high."""
    if not isinstance(input, Octaves) and plan.depthwise and plan.keeps_low:
        input = pool_octaves(input, plan.split_in, plan.paths.factors)
    if not isinstance(input, Octaves):
        return input, input[:, :0], ((plan.channels[0], 0),)
    if problem := misfit(input, plan.paths.factors):
        raise UserError(f"a layer with temporal={plan.options.temporal} wants {problem}")
    high, low = input.ready(plan.keeps_low or max(plan.paths.pool) > 1)[:2] if isinstance(input, Pending) else input
    return high, low, input.parts


class Octave(OneNode, nn.modules.conv._ConvNd):
    """What convolutions with octave options have in common: the options, and a plan that follows their arguments."""

    options: OctaveOptions
    _plan: Plan
    alpha = property(attrgetter("options.alpha"))
    temporal = property(attrgetter("options.temporal"))
    downsample = property(attrgetter("options.downsample"))
    channels_last = property(attrgetter("options.channels_last"))
    round_to = property(attrgetter("options.round_to"))
    strided = property(attrgetter("options.strided"))

    def set_options(self, options: OctaveOptions) -> None:
        """Changes the octave options; the weight stays. Raises UserError, and changes nothing, if they do not fit."""
        options.check(self)
        self.options = options

    def __setattr__(self, name: str, value: Any) -> None:
        """Plans anew where the options, or an argument of nn.Conv3d, are replaced."""
        super().__setattr__(name, value)
        planned = ("options", "_reversed_padding_repeated_twice", *nn.Conv3d.__constants__)
        if "options" in self.__dict__ and name in planned:
            self.__dict__["_plan"] = plan_of(self, self.options)

    def extra_repr(self) -> str:
        options = ((option, getattr(self.options, option.name)) for option in fields(self.options))
        shown = [f"{o.name}={value!r}" for o, value in options if o.name == "alpha" or value != o.default]
        return ", ".join((super().extra_repr(), *shown))  # type: ignore[no-untyped-call]


class _OctConv(Octave):
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
        alpha: float | Sequence[float] = 0.25,
        temporal: bool = False,
        downsample: Literal["conv", "pool"] = "conv",
        channels_last: bool = False,
        round_to: int = 1,
        strided: Literal["pool", "keep"] = "pool",
    ) -> None:
        rest: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *rest)
        self.set_options(OctaveOptions(shares_of(alpha), temporal, downsample, channels_last, round_to, strided))

    def forward(self, input: Tensor | Octaves, **output_size: Any) -> Tensor | Octaves:
        if isinstance(input, Proxy):
            return self._node(input, **output_size)
        plan = self._plan
        if not isinstance(input, Tensor) and getattr(input, "axis", 0) != 1 and (plain := merged(input)) is not input:
            record(convolve, [input])  # a view of octaves, or channels in another dimension
            input = plain
        if plan.plain and not isinstance(input, Octaves):
            if self.options.channels_last and input.dim() == len(plan.weight_shape) and not output_size:
                return convolve(input, self.weight, self.bias, plan)
            output: Tensor = super().forward(input, **output_size)
            return output if input.is_contiguous() else keep_layout(output, input)
        _check_input(input, plan)
        if plan.problem:
            if plan.keeps_low or not isinstance(input, Octaves):
                raise UserError(plan.problem)
            result: Tensor | Octaves = super().forward(input.merge(), **output_size)  # no resolution to keep apart
        else:
            result = convolve(input, self.weight, self.bias, self._plan_for(input, **output_size))
        return result if isinstance(result, Octaves) or self.options.channels_last else as_weight(result, self.weight)

    def _plan_for(self, input: Tensor | Octaves) -> Plan:
        return self._plan


class _OctConvTranspose(_OctConv):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        options = {option.name: named.pop(option.name) for option in fields(OctaveOptions) if option.name in named}
        super(_OctConv, self).__init__(*arguments, **named)
        self.set_options(OctaveOptions(**options))

    def forward(  # type: ignore[override]
        self, input: Tensor | Octaves, output_size: Sequence[int] | None = None
    ) -> Tensor | Octaves:
        return super().forward(input, **({} if output_size is None else {"output_size": output_size}))

    def _plan_for(self, input: Tensor | Octaves, output_size: Any = None) -> Plan:
        if output_size is None:
            return self._plan
        numbers = (self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation)
        padding: Any = nn.ConvTranspose3d._output_padding
        return plan_of(self, self.options, padding(self, input, list(output_size), *numbers))


class OctConv1d(_OctConv, nn.Conv1d):  # type: ignore[misc]
    """A 1-D convolution that keeps a share of its output at half the resolution: `OctConv3d` for (B, C, L)."""


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
    every channel in the octave that it is in; a plain input is split by alpha.

    Shape:
        Input: (B, C_in, T, H, W), or Octaves of that shape; H and W may be odd.
        Output: Octaves of (B, C_out, T', H', W'), or a Tensor if alpha is 0.

    Raises UserError for an alpha outside [0, 1] or groups that do not divide the low output channels; in forward, with
    low output channels, for a spatial stride above 2 or a padding that does not keep the size.
    """


class OctConvTranspose2d(_OctConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """A 2-D transposed convolution of octaves: `OctConvTranspose3d` for (B, C, H, W)."""


class OctConvTranspose3d(_OctConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """A 3-D transposed convolution that keeps a share of its output at half the spatial resolution.

    Takes the place of nn.ConvTranspose3d: the same arguments, weight and state_dict, then the octave options of
    `OctaveOptions` as keywords. High to high and low to low are the transposed convolution itself, each at its own
    resolution; high to low averages first, low to high upsamples last. So no stride is pooled, and any is allowed whose
    padding multiplies the size by the stride, give or take a position: low maps are filled or cropped to half of it,
    rounded up. Groups and depthwise layers are as in `OctConv3d`.

    Shape:
        Input: (B, C_in, T, H, W), or Octaves of that shape.
        Output: Octaves of (B, C_out, T', H', W'), or a Tensor if alpha is 0; `output_size` is nn.ConvTranspose3d's.

    Raises UserError as `OctConv3d` does.
    """
