"""OctConv2d and OctConv3d: convolutions that keep a share of their output at half the resolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.octaves import (
    Octaves,
    average_pool,
    channels_last,
    fold_time,
    join_by_parts,
    split_by_parts,
    unfold_time,
    upsample,
)


def split_channels(channels: int, alpha: float) -> tuple[int, int]:
    """How many of `channels` are (high, low): low = floor(alpha * channels), the only place that rounds.

    Raises:
        ValueError: alpha outside [0, 1], or channels below 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    low = int(alpha * channels + 1e-6)  # 0.2 * 15 is just below 3
    return channels - low, low


def check_groups(convolution: nn.modules.conv._ConvNd, alpha: float) -> None:
    """Raises ValueError if a convolution's groups cannot be split at this alpha."""
    high, low = split_channels(convolution.out_channels, alpha)
    groups = convolution.groups
    depthwise = groups == convolution.in_channels
    if not depthwise and (high % groups or low % groups):
        raise ValueError(
            f"alpha {alpha} splits {convolution.out_channels} output channels into {high} high and {low} low ones: "
            f"groups {groups} must divide both"
        )


def _sum(outputs: list[Tensor | None]) -> Tensor:
    """Adds the paths that exist."""
    first, *rest = [y for y in outputs if y is not None]
    return torch.add(first, rest[0]) if rest else first


class _OctConv(nn.modules.conv._ConvNd):
    """What OctConv2d and OctConv3d share: everything but the number of dimensions."""

    alpha: float
    temporal: bool

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
        self.set_alpha(alpha, temporal)

    def set_alpha(self, alpha: float, temporal: bool = False) -> None:
        """Changes the share of low output channels; the weight stays.

        Args:
            alpha: share of the output channels held at low resolution, in [0, 1].
            temporal: halve time as well as height and width (3-D only).

        Raises:
            ValueError: alpha outside [0, 1], groups that do not divide a path's channels, or temporal in 2-D.
        """
        check_groups(self, alpha)
        if temporal and len(self.kernel_size) == 2:
            raise ValueError("temporal=True needs a 3-D convolution, got a 2-D one")
        self.alpha = alpha
        self.temporal = temporal

    @property
    def _is_depthwise(self) -> bool:
        return self.groups == self.in_channels > 1

    @property
    def _factors(self) -> tuple[int, ...]:
        """What each dimension is divided by in this layer's low maps."""
        return (2,) * len(self.kernel_size) if self.temporal or len(self.kernel_size) == 2 else (1, 2, 2)

    def forward(self, input: Tensor | Octaves) -> Tensor | Octaves:
        """Convolves a Tensor or Octaves; gives Octaves, or a Tensor if no output channel is low."""
        high_out, low_out = split_channels(self.out_channels, self.alpha)
        if not isinstance(input, Octaves) and low_out == 0:
            return super().forward(input)  # type: ignore[no-any-return, misc]
        if self._is_depthwise:
            return self._depthwise(input, high_out)

        stride = self._pooled_stride()
        if isinstance(input, Octaves):
            self._check_input(input)
            x = input
        else:
            x = Octaves(input, input[:, :0])
        bias_high, bias_low = (None, None) if self.bias is None else self.bias.split((high_out, low_out))

        # A spatial stride pools: strided convolutions would shift the two maps against each other. A low map that is
        # not pooled has the size of the strided high map, so low_to_high needs no upsampling then.
        high = average_pool(x.high, stride)
        size = self._output_size(high)
        high_to_high, low_to_high = self._columns(self.weight[:high_out], x)
        outputs = [
            self._convolve(high, high_to_high, bias_high),
            self._convolve(x.low, low_to_high, None if high.shape[1] else bias_high),
        ]
        out_high = _sum([upsample(y, size) for y in outputs if y is not None]) if high_out else None
        if out_high is not None and low_out == 0:
            return out_high

        pooled, low = average_pool(high, self._factors), average_pool(x.low, stride)
        if self.groups == 1:  # one convolution over all channels at low resolution is both paths at once
            both = join_by_parts(pooled, low, x.parts, 1) if low.shape[1] else pooled
            out_low = _sum([self._convolve(both, self.weight[high_out:], bias_low)])
        else:
            high_to_low, low_to_low = self._columns(self.weight[high_out:], x)
            out_low = _sum(
                [
                    self._convolve(pooled, high_to_low, bias_low),
                    self._convolve(low, low_to_low, None if high.shape[1] else bias_low),
                ]
            )
        return Octaves(out_low.new_zeros((out_low.shape[0], 0, *size)) if out_high is None else out_high, out_low)

    def _depthwise(self, input: Tensor | Octaves, high_out: int) -> Tensor | Octaves:
        """One filter a channel: high stays high and low stays low, no path joins them."""
        if high_out == self.out_channels:
            assert isinstance(input, Octaves)
            return super().forward(input.merge())  # type: ignore[no-any-return, misc]
        multiplier = self.out_channels // self.in_channels
        high_in = high_out // multiplier
        if high_out % multiplier:
            raise ValueError(
                f"alpha {self.alpha} gives {high_out} high output channels, not a multiple of the {multiplier} "
                "outputs that each depthwise filter has"
            )
        if not isinstance(input, Octaves):
            high, low = input.split((high_in, self.in_channels - high_in), 1)
            input = Octaves(high, average_pool(low, self._factors))
        self._check_input(input)
        if input.parts != ((high_in, self.in_channels - high_in),):
            raise ValueError(
                f"a depthwise convolution of alpha {self.alpha} wants {high_in} high and {self.in_channels - high_in} "
                f"low input channels, got {input.parts}"
            )
        stride = self._pooled_stride()
        maps: list[Tensor] = []
        for x, rows in zip(input, (slice(high_out), slice(high_out, None)), strict=True):
            bias = None if self.bias is None else self.bias[rows]
            x = average_pool(x, stride)
            y = self._convolve(x, self.weight[rows], bias, groups=x.shape[1])
            maps.append(x.new_zeros((x.shape[0], 0, *self._output_size(x))) if y is None else y)
        return Octaves(maps[0], maps[1])

    def _columns(self, rows: Tensor, x: Octaves) -> tuple[Tensor, Tensor]:
        """Splits rows of the weight into the columns that read high and those that read low input channels."""
        if x.low.shape[1] == 0:
            return rows, rows[:, :0]
        if self.groups == 1:
            return split_by_parts(rows, x.parts, 1)
        high, low = x.high.shape[1], x.low.shape[1]
        if high % self.groups or low % self.groups:
            raise ValueError(f"groups {self.groups} must divide the {high} high and the {low} low input channels")
        return split_by_parts(rows, ((high // self.groups, low // self.groups),), 1)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Tensor | None:
        """A plain convolution of one path, without the spatial stride; None if the path has no channels."""
        if x.shape[1] == 0 or weight.shape[0] == 0:
            return None
        groups = groups or self.groups
        keeps_frames = isinstance(self.padding, str) or self.padding[0] == 0
        frame_by_frame = self.kernel_size[0] == self.stride[0] == 1 and keeps_frames and self.padding_mode == "zeros"
        if frame_by_frame and channels_last(x):  # 2-D is faster: 0.75 of the time for I3D on a CPU
            padding = self.padding if isinstance(self.padding, str) else self.padding[1:]
            images = F.conv2d(fold_time(x), weight[:, :, 0], bias, 1, padding, self.dilation[1:], groups)
            return unfold_time(images, x)
        convolve = F.conv2d if len(self.kernel_size) == 2 else F.conv3d
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        return convolve(x, weight, bias, self._conv_stride, padding, self.dilation, groups)

    @property
    def _conv_stride(self) -> tuple[int, ...]:
        """The stride that stays in the convolution: time's."""
        return (*self.stride[:-2], 1, 1)

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        """The size of this convolution's output for `x`, spatially pooled already; space keeps its size."""
        space = tuple(x.shape[-2:])
        if len(self.kernel_size) == 2 or self.padding == "same":
            return (*x.shape[2:-2], *space)
        padding = 0 if isinstance(self.padding, str) else self.padding[0]
        return (-(-(x.shape[2] + 2 * padding - self._reach(0)) // self.stride[0]), *space)

    def _reach(self, axis: int) -> int:
        """How much a convolution without padding shrinks this dimension."""
        return self.dilation[axis] * (self.kernel_size[axis] - 1)

    def _pooled_stride(self) -> tuple[int, ...]:
        """The factors to pool by in place of the spatial stride; refuses what would move the two maps apart."""
        spatial = self.stride[-2:]
        if any(stride not in (1, 2) for stride in spatial):
            raise ValueError(f"octave features take a spatial stride of 1 or 2, got stride {self.stride}")
        dimensions = len(self.kernel_size)
        halved = range(0 if self.temporal else dimensions - 2, dimensions)
        reach = [self._reach(axis) for axis in halved]
        padding = [0 if isinstance(self.padding, str) else self.padding[axis] for axis in halved]
        if self.padding != "same" and any(2 * p != r for p, r in zip(padding, reach, strict=True)):
            raise ValueError(
                f"octave features need a padding that keeps the size: kernel {self.kernel_size} with dilation "
                f"{self.dilation} wants {[r / 2 for r in reach]} in its last {len(reach)} dimensions, "
                f"got {self.padding}"
            )
        return (*(1,) * (dimensions - 2), *spatial)

    def _check_input(self, x: Octaves) -> None:
        """Refuses a low map halved in other dimensions than this layer halves."""
        wanted = tuple(-(-size // factor) for size, factor in zip(x.shape[2:], self._factors, strict=True))
        if tuple(x.low.shape[2:]) != wanted:
            raise ValueError(
                f"a layer with temporal={self.temporal} wants a low map of {wanted} cells beside a high map of "
                f"{tuple(x.shape[2:])}, got {tuple(x.low.shape[2:])}"
            )
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected {self.in_channels} input channels, got {x.shape[1]} ({x.parts} high and low)")

    def extra_repr(self) -> str:
        """The arguments of nn.Conv3d, and the octave options."""
        return super().extra_repr() + f", alpha={self.alpha}" + (", temporal=True" if self.temporal else "")


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

    Args:
        alpha: share of the output channels held at low resolution, in [0, 1]. The input's share is read off the input.
        temporal: halve time as well as height and width.

    Shape:
        Input: (B, C_in, T, H, W), or Octaves of that shape; H and W may be odd.
        Output: Octaves of (B, C_out, T', H', W'), or a Tensor if alpha is 0.

    Raises:
        ValueError: alpha outside [0, 1], groups that do not divide a path's channels; in forward, with octaves on
            either side: a spatial stride above 2, a padding that does not keep the size, a low map of the other kind.
    """
