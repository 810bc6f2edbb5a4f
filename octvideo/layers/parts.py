"""The order of channels: which pieces of the vanilla order are high and which are low."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

Parts = tuple[tuple[int, int], ...]  # (high, low) channels of each piece


def split_by_parts(x: Tensor, parts: Parts, dim: int) -> tuple[Tensor, Tensor]:
    """Splits channels in the vanilla order into the high and the low ones."""
    if len(parts) == 1:
        high, low = x.split(parts[0], dim)
        return high, low
    if len(set(parts)) == 1:  # pieces of equal size, as a grouped convolution makes them: no loop over them
        high, low = x.unflatten(dim, (len(parts), sum(parts[0]))).split(parts[0], dim + 1)
        return high.flatten(dim, dim + 1), low.flatten(dim, dim + 1)
    pieces = x.split(list(chain(*parts)), dim)
    return torch.cat(pieces[0::2], dim), torch.cat(pieces[1::2], dim)


def join_by_parts(high: Tensor, low: Tensor, parts: Parts, dim: int) -> Tensor:
    """Undoes `split_by_parts`: the vanilla order of channels."""
    if len(parts) == 1:
        return torch.cat((high, low), dim)
    if len(set(parts)) == 1:
        pieces = [x.unflatten(dim, (len(parts), part)) for x, part in zip((high, low), parts[0], strict=True)]
        return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)
    highs, lows = (x.split(sizes, dim) for x, sizes in zip((high, low), zip(*parts, strict=True), strict=True))
    return torch.cat(list(chain(*zip(highs, lows, strict=True))), dim)


def join_pieces(parts: Iterable[tuple[int, int]]) -> Parts:
    """Merges neighbouring pieces of one kind, so that equal orders of channels have equal parts."""
    joined: list[tuple[int, int]] = []
    for high, low in parts:
        if joined and (joined[-1][1] == 0 or high == 0):
            joined[-1] = (joined[-1][0] + high, joined[-1][1] + low)
        elif high or low or not joined:
            joined.append((high, low))
    return tuple(joined)


@lru_cache(1024)
def groups_alike(parts: Parts, groups: int) -> tuple[tuple[int, Parts], ...]:
    """What the groups of a convolution read, in the vanilla order: runs of (number of groups, the parts of each).

    Of one piece, (6, 2), two groups get ((1, ((4, 0),)), (1, ((2, 2),))): the first reads high channels only.
    """
    ends = list(accumulate(chain(*parts), initial=0))
    width = ends[-1] // groups
    runs: list[tuple[int, Parts]] = []
    for start in range(0, ends[-1], width):
        sizes = [right - left for left, right in pairwise(min(max(end, start), start + width) for end in ends)]
        group = join_pieces(zip(sizes[0::2], sizes[1::2], strict=True))
        count = runs.pop()[0] if runs and runs[-1][1] == group else 0
        runs.append((count + 1, group))
    return tuple(runs)
