"""Convolutions of several octaves, by recursion: the low map of octave features may be octave features itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octvideo.layers.octaves import Octaves
from octvideo.layers.parts import Parts, join_by_parts, split_by_parts
from octvideo.layers.paths import Paths
from octvideo.layers.resampling import add_upsampled, average_pool, halved, lay_channels_last, upsample


@dataclass(frozen=True)
class Level:
    """How the outputs of one resolution, and of all lower ones, are made (of one group)."""

    paths: Paths  # its rows: channels of this resolution, and of all lower ones
    below: Paths  # from inputs of lower resolutions to this one, which no stride pools


def levels_of(paths: Paths, counts: Sequence[int]) -> tuple[Level, ...]:
    """The levels of outputs of `counts` channels at each resolution, of which `paths` makes the first and the rest."""
    space, levels = _space(paths.factors), []
    for i, count in enumerate(counts):
        own = paths if i == 0 else replace(paths, factors=space, rows=(count, sum(counts[i + 1 :])))
        levels.append(Level(own, Paths(paths.kernel, (1,) * len(space), space, (count, 0))))
    return tuple(levels)


def misfit(x: Octaves, factors: Sequence[int]) -> str:
    """What is wrong with the maps' sizes if each has that of the one above, by factors, of time once; else empty."""
    high, low = x.maps_like()
    wanted, size, got = halved(high.shape[2:], factors), tuple(high.shape[2:]), tuple(low.shape[2:])
    if got != wanted:
        return f"a low map of size {wanted} beside a high map of {size}, got {got}"
    return misfit(low, _space(factors)) if isinstance(low, Octaves) else ""


def _space(factors: Sequence[int]) -> tuple[int, ...]:
    """Those of the octaves below the first, which halve height and width alone."""
    return (*(1,) * (len(factors) - 2), *factors[-2:])


def pool_octaves(x: Tensor, counts: Sequence[int], factors: Sequence[int]) -> Tensor | Octaves:
    """A plain map as octaves of so many channels at each resolution."""
    if len(counts) < 2:
        return x
    high, low = x.split((counts[0], sum(counts[1:])), 1)
    return Octaves(high, pool_octaves(average_pool(low, factors), counts[1:], _space(factors)))


def _maps(x: Tensor | Octaves) -> tuple[Tensor, Tensor | Octaves, Parts]:
    return (x.high, x.low, x.parts) if isinstance(x, Octaves) else (x, x[:, :0], ((x.shape[1], 0),))


def convolve_several(
    x: Tensor | Octaves, weight: Tensor, bias: Tensor | None, levels: Sequence[Level], groups: int
) -> Tensor | Octaves:
    """A convolution from any number of octaves to any number, group by group; the weight is in the vanilla order."""
    if groups == 1:
        return _convolve(*_maps(x), weight, bias, levels)
    width, outputs = x.shape[1] // groups, []
    biases: Sequence[Tensor | None] = [None] * groups if bias is None else bias.chunk(groups)
    for i, (rows, of_rows) in enumerate(zip(weight.chunk(groups), biases, strict=True)):
        outputs.append(_convolve(*_maps(x[:, i * width : (i + 1) * width]), rows, of_rows, levels))
    return torch.cat(outputs, 1)  # type: ignore[arg-type]


def _convolve(
    high: Tensor,
    low: Tensor | Octaves,
    parts: Parts,
    weight: Tensor,
    bias: Tensor | None,
    levels: Sequence[Level],
    size: tuple[int, ...] = (),
) -> Tensor | Octaves:
    """One group; `size` is the output's if a transposed convolution must be filled or cropped to it.

    The outputs of the full resolution are those of the high map and, upsampled, of everything lower. All others are a
    convolution one octave down, of the pooled high map beside everything lower.
    """
    paths = levels[0].paths
    high = lay_channels_last(high)
    pooled = average_pool(high, paths.pool)
    kernel = paths.kernel.reaching(pooled, size) if size else paths.kernel
    if len(levels) < 3 and isinstance(low, Tensor):  # at most one octave on either side
        paths = replace(paths, kernel=kernel) if size else paths
        out_high, out_low = paths(high, low, weight, bias, parts)
        return Octaves(out_high, out_low) if paths.rows[1] else out_high
    extent = kernel.output_size(pooled)
    half = halved(extent, paths.factors) if kernel.output_padding is not None else ()
    of_high, of_low = split_by_parts(weight, parts, 1)
    rows = paths.rows[0]
    bias_high, bias_low = (None, None) if bias is None else (bias[:rows], bias[rows:])
    output: Tensor | None = None
    if high.shape[1] or not rows:
        output, bias_high = kernel.convolve(pooled, of_high[:rows], bias_high), None
    if low.shape[1] and rows:
        below = Level(levels[0].below, levels[0].below)
        added: Tensor = _convolve(*_maps(low), of_low[:rows], bias_high, (below,), half)  # type: ignore[assignment]
        output = upsample(added, extent) if output is None else add_upsampled(output, added)
    assert output is not None
    if not paths.rows[1]:
        return output
    if high.shape[1]:
        beside = average_pool(high, paths.factors)
        low = torch.cat([beside, low], 1) if low.shape[1] else beside  # type: ignore[list-item]
    weight = weight[rows:] if len(parts) == 1 else torch.cat((of_high[rows:], of_low[rows:]), 1)
    return Octaves(output, _convolve(*_maps(low), weight, bias_low, levels[1:], half))


def convolve_each(
    x: Tensor | Octaves,
    weight: Tensor,
    bias: Tensor | None,
    paths: Paths,
    lower: Paths,
    keeps_low: bool,
    size: tuple[int, ...] = (),
) -> Tensor | Octaves:
    """A depthwise convolution: each channel stays in its octave, or is upsampled at the end; no path joins them.

    `paths` are the high map's, `lower` those of all other maps; `size` is as in `_convolve`.
    """
    high, low, parts = _maps(x)
    high, multiplier = average_pool(lay_channels_last(high), paths.pool), weight.shape[0] // max(1, x.shape[1])
    parts = tuple((of_high * multiplier, of_low * multiplier) for of_high, of_low in parts)
    of_high, of_low = split_by_parts(weight, parts, 0)
    bias_high, bias_low = (None, None) if bias is None else split_by_parts(bias, parts, 0)
    out_high = paths.kernel.convolve(high, of_high, bias_high, high.shape[1], size)
    if not isinstance(x, Octaves) or not (keeps_low or low.shape[1]):
        return out_high
    half = halved(size or paths.kernel.output_size(high), paths.factors)
    half = half if paths.kernel.output_padding is not None else ()
    out_low = convolve_each(low, of_low, bias_low, lower, lower, keeps_low, half)
    if keeps_low:
        return Octaves(out_high, out_low, parts)
    return join_by_parts(out_high, upsample(out_low, out_high.shape[2:]), parts, 1)  # type: ignore[arg-type]
