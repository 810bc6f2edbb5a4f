"""Multigrid training (Wu et al., CVPR 2020): many small clips a step early, few large ones late."""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from octvideo.errors import UserError

# Shares of the frames and of the side (of the long cycle's side), and how many times as many clips a batch has.
LONG_CYCLE = ((1 / 4, math.sqrt(1 / 2), 8), (1 / 2, math.sqrt(1 / 2), 4), (1 / 2, 1.0, 2), (1.0, 1.0, 1))
SHORT_CYCLE = ((1 / 2, 4), (math.sqrt(1 / 2), 2), (1.0, 1))


class ClipShape(NamedTuple):
    """Shape of a batch's training clips, as in `Preprocessing`, and their number."""

    clip_frames: int
    frame_stride: int
    crop_size: int
    short_side: tuple[int, int]
    factor: int = 1  # a batch has this many times the clips of a batch of the full shape


@dataclass(frozen=True)
class Multigrid:
    """Clips that start small and grow, in batches that shrink as much (Wu et al., CVPR 2020, arXiv 1912.00998).

    A clip keeps its window of time: half as many frames lie twice as far apart. Sides are multiples of 8 from 32 on.

    Args:
        long_cycle: shapes that change with the epochs: (1/4 of the frames, 1/sqrt(2) of the side, 8 times the clips),
            (1/2, 1/sqrt(2), 4), (1/2, 1, 2), (1, 1, 1), each for equally many steps, hence for epochs in proportion
            8 : 4 : 2 : 1. The learning rate grows with the batch.
        short_cycle: sides that change with every step: (1/2 of the epoch's side, 4 times its clips), (1/sqrt(2), 2),
            (1, 1). The learning rate stays. The SlowFast project takes 1/2 and 1/sqrt(2) of the full side instead.
        cycles: how often the epochs go through the long cycle; in the paper once per step of the learning rate.
        frames_multiple: frame counts are multiples of it (SlowFast's frame_ratio), and at least 2.
    """

    long_cycle: bool = True
    short_cycle: bool = True
    cycles: int = 1
    frames_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("cycles", "frames_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"data.multigrid.{name} must be at least 1, got {getattr(self, name)}")
        if not (self.long_cycle or self.short_cycle):
            raise UserError("data.multigrid must have long_cycle, short_cycle or both; null turns it off")

    def shapes(self, full: ClipShape, epoch: int, max_epochs: int | None) -> list[ClipShape]:
        """The shapes that the batches of an epoch (from 0) cycle through; the last one is that of the long cycle."""
        if not self.long_cycle:
            return self._turns(full, *LONG_CYCLE[-1])
        if max_epochs is None or max_epochs < 0:
            raise UserError("data.multigrid.long_cycle needs to know the last epoch: set trainer.max_epochs")
        return self._turns(full, *LONG_CYCLE[long_cycle(max_epochs, self.cycles)[min(epoch, max_epochs - 1)]])

    def all_shapes(self, full: ClipShape) -> list[ClipShape]:
        """The shapes of all epochs; UserError for frames that cannot be divided."""
        long = LONG_CYCLE if self.long_cycle else LONG_CYCLE[-1:]
        return [shape for epoch in long for shape in self._turns(full, *epoch)]

    def _turns(self, full: ClipShape, frames: float, side: float, factor: int) -> list[ClipShape]:
        turns = SHORT_CYCLE if self.short_cycle else SHORT_CYCLE[-1:]
        return [self.scaled(full, frames, side * of_side, factor * times) for of_side, times in turns]

    def scaled(self, full: ClipShape, frames_share: float, side_share: float, factor: int) -> ClipShape:
        """A shape with a share of the frames and of the side; UserError for frames that cannot be divided."""
        multiple, window = self.frames_multiple, full.clip_frames * full.frame_stride
        if full.clip_frames % multiple:
            wanted = f"a multiple of data.multigrid.frames_multiple {multiple}, got {full.clip_frames}"
            raise UserError(f"data.clip_frames must be {wanted}")
        frames = min(full.clip_frames, max(2, multiple, multiple * round(full.clip_frames * frames_share / multiple)))
        if window % frames:
            clip = f"data.clip_frames {full.clip_frames} x data.frame_stride {full.frame_stride}: change one of them"
            got = f"{frames} of {full.clip_frames} frames, which do not divide the window of {clip}"
            raise UserError(f"data.multigrid takes {got}")
        side = full.crop_size if side_share == 1 else share_of_side(full.crop_size, side_share)
        least_short, most_short = (round(short * side / full.crop_size) for short in full.short_side)
        return ClipShape(frames, window // frames, side, (least_short, most_short), factor)


def long_cycle(num_epochs: int, cycles: int = 1) -> list[int]:
    """Index in LONG_CYCLE of each epoch's shape; a cycle with fewer epochs than shapes leaves out the first ones."""
    ends = list(itertools.accumulate(factor for _, _, factor in LONG_CYCLE))
    stages: list[int] = []
    for cycle in range(cycles):
        epochs = (cycle + 1) * num_epochs // cycles - cycle * num_epochs // cycles
        start = 0
        for stage, share in enumerate(ends):
            most = max(epochs - (len(ends) - 1 - stage), 0)  # leaves an epoch for each later shape
            end = min(max(round(epochs * share / ends[-1]), stage + 1), most)
            stages, start = stages + [stage] * (end - start), end
    return stages


def share_of_side(side: int, share: float) -> int:
    """A share of a side in pixels, as the nearest multiple of 8; at least 32, unless the side itself is smaller."""
    return min(side, max(32, 8 * round(side * share / 8)))  # a stride of 32 leaves one position of 32 pixels


def whole_batches(turns: int, sizes: list[int]) -> int:
    """How many batches so many draws fill, where batches cycle through these sizes."""
    cycles, rest = divmod(turns, sum(sizes))
    return cycles * len(sizes) + sum(end <= rest for end in itertools.accumulate(sizes))
