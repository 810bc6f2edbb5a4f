"""Octave layers as they are usually written, for comparison with octvideo's: four convolutions and two batch norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo import Octaves, OctConv3d
from octvideo.layers.parts import Parts, split_by_parts
from octvideo.layers.shares import split_channels


class NoTextbookError(ValueError):
    """A network that the textbook form is not defined for."""


class TextbookConv3d(nn.Module):
    """An octave convolution as it is usually written: up to four nn.Conv3d, in the default memory layout.

    It computes what OctConv3d computes: a spatial stride pools both maps first, and then low_to_high is not upsampled.

    Args:
        vanilla: the convolution with the joint weight.
        alpha: share of its output that is low.
        parts: (high, low) channels of its input, the pieces in the order of the weight's columns.

    Shape:
        Input: (B, C_in, T, H, W), or Octaves of that shape.
        Output: Octaves of (B, C_out, T', H', W'), or a Tensor if no channel is low.

    Raises:
        NoTextbookError: several groups, or no high channel.
    """

    def __init__(self, vanilla: nn.Conv3d, alpha: float, parts: Parts) -> None:
        super().__init__()
        if vanilla.groups > 1:
            raise NoTextbookError(f"a convolution of {vanilla.groups} groups")
        outputs = split_channels(vanilla.out_channels, alpha)
        if not outputs[0] or not sum(high for high, _ in parts):
            raise NoTextbookError("a convolution without high channels")
        biases = (None, None) if vanilla.bias is None else vanilla.bias.split(outputs)
        (high_to_high, low_to_high), (high_to_low, low_to_low) = (
            split_by_parts(rows, parts, 1) for rows in vanilla.weight.split(outputs)
        )
        path = partial(self._path, vanilla)
        self.high_to_high, self.low_to_high = path(high_to_high, biases[0]), path(low_to_high, None)
        self.high_to_low, self.low_to_low = path(high_to_low, biases[1]), path(low_to_low, None)
        self.strided = vanilla.stride[-1] == 2
        self.pool = nn.AvgPool3d((1, 2, 2), ceil_mode=True, count_include_pad=False)
        self.upsample = nn.Upsample(scale_factor=(1, 2, 2), mode="nearest")

    @staticmethod
    def _path(vanilla: nn.Conv3d, weight: Tensor, bias: Tensor | None) -> nn.Conv3d | None:
        """The convolution with a slice of the weight, if there are such channels."""
        if 0 in weight.shape:
            return None
        options: dict[str, Any] = {key: getattr(vanilla, key) for key in ("padding", "dilation", "padding_mode")}
        options |= {"kernel_size": vanilla.kernel_size, "stride": (vanilla.stride[0], 1, 1)}
        path = nn.Conv3d(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, **options)
        path.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        return path

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        """Convolves along the four paths and sums them for each resolution."""
        high, low = x if isinstance(x, Octaves) else (x, None)
        high = self.pool(high) if self.strided else high
        assert self.high_to_high is not None
        out_high: Tensor = self.high_to_high(high)
        if low is not None and self.low_to_high is not None:
            from_low = self.low_to_high(low)
            height, width = out_high.shape[-2:]
            out_high = out_high + (from_low if self.strided else self.upsample(from_low)[..., :height, :width])
        if self.high_to_low is None:
            return out_high
        out_low = self.high_to_low(self.pool(high))
        if low is not None and self.low_to_low is not None:
            out_low = out_low + self.low_to_low(self.pool(low) if self.strided else low)
        return Octaves(out_high, out_low)


class TextbookNorm(nn.Module):
    """A batch norm for each map of Octaves (B, C, T, H, W), with its share of the vanilla parameters and statistics."""

    def __init__(self, vanilla: _BatchNorm, parts: Parts) -> None:
        super().__init__()
        state = vanilla.state_dict()
        shares = {key: split_by_parts(value, parts, 0) if value.dim() else (value,) * 2 for key, value in state.items()}
        device = state["running_mean"].device
        self.high, self.low = (
            nn.BatchNorm3d(sum(part), vanilla.eps, vanilla.momentum, device=device) for part in zip(*parts, strict=True)
        )
        for i, norm in enumerate((self.high, self.low)):
            norm.load_state_dict({key: share[i] for key, share in shares.items()})

    def forward(self, x: Octaves) -> Octaves:
        """Normalises each map."""
        return Octaves(self.high(x.high), self.low(x.low), x.parts)


@dataclass(frozen=True)
class Seen:
    """A convolution or batch norm that ran."""

    name: str  # among the network's modules
    layer: nn.Module
    input: Tensor | Octaves  # without the values, on "meta"
    octave: bool  # whether its input or its output was Octaves


def watch(network: nn.Module, clip: Tensor) -> list[Seen]:
    """Runs a network once; returns its convolutions and batch norms in the order in which they ran."""
    seen: list[Seen] = []

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        octave = isinstance(inputs[0], Octaves) or isinstance(output, Octaves)
        seen.append(Seen(name, layer, each_map(inputs[0], lambda x: x.to("meta")), octave))

    hooks = [
        layer.register_forward_hook(partial(note, name))
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Conv3d, _BatchNorm))
    ]
    with torch.no_grad():
        network(clip)
    for hook in hooks:
        hook.remove()
    return seen


def each_map(x: Tensor | Octaves, change: Callable[[Tensor], Tensor]) -> Tensor | Octaves:
    """Applies a function to a Tensor, or to both maps of Octaves."""
    return Octaves(change(x.high), change(x.low), x.parts) if isinstance(x, Octaves) else change(x)


def textbook(vanilla: nn.Module, octave: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Replaces layers of a vanilla network, in place, by textbook ones wherever an octave network has octaves.

    Args:
        vanilla: the network as shipped, whose weights stay.
        octave: the same network with octave layers, on "meta".
        size: (T, H, W) of the clips.

    Returns:
        The vanilla network.

    Raises:
        NoTextbookError: a layer that the textbook form is not defined for.
    """
    for seen in watch(octave.eval(), torch.empty((1, 3, *size), device="meta")):
        if not seen.octave:
            continue
        parts = seen.input.parts if isinstance(seen.input, Octaves) else ((seen.input.shape[1], 0),)
        layer = vanilla.get_submodule(seen.name)
        try:
            if isinstance(layer, nn.Conv3d) and isinstance(seen.layer, OctConv3d):
                vanilla.set_submodule(seen.name, TextbookConv3d(layer, seen.layer.alpha, parts))
            elif isinstance(layer, _BatchNorm):
                vanilla.set_submodule(seen.name, TextbookNorm(layer, parts))
        except NoTextbookError as error:
            raise NoTextbookError(f"{seen.name} is {error}") from error
    return vanilla
