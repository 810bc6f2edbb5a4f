"""Multigrid training (Wu et al., CVPR 2020): many small clips a step early, few large ones late."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from octvideo.errors import UserError

SMALLEST_SIDE = 32  # pixels: one position is left after a stride of 32
SIDE_MULTIPLE = 8
# Share of the frames, share of the side, and how many times as many clips a batch has.
LONG_CYCLE = ((1 / 4, math.sqrt(1 / 2), 8), (1 / 2, math.sqrt(1 / 2), 4), (1 / 2, 1.0, 2), (1.0, 1.0, 1))
# Share of the long cycle's side, and how many times as many clips as there.
SHORT_CYCLE = ((1 / 2, 4), (math.sqrt(1 / 2), 2), (1.0, 1))


class ClipShape(NamedTuple):
    """What the clips of a batch look like, and how many there are.

    Args:
        clip_frames: frames in a clip.
        frame_stride: length of a clip's window in frames, for each frame taken.
        crop_size: height and width, in pixels.
        short_side: least and most pixels that the shorter side is scaled to before the crop.
        factor: a batch has this many times the clips of a batch of the full shape.
    """

    clip_frames: int
    frame_stride: int
    crop_size: int
    short_side: tuple[int, int]
    factor: int = 1


@dataclass(frozen=True)
class Multigrid:
    """Clips that start small and grow, in batches that shrink as much (Wu et al., CVPR 2020, arXiv 1912.00998).

    A clip keeps its window of time: with half of the frames they lie twice as far apart. Sides are rounded to multiples
    of 8, and to 32 at least (small clips therefore shrink less than their batches grow). The last epoch, validation and
    testing have the full shape.

    Args:
        long_cycle: shapes that change with the epochs: (1/4 of the frames, 1/sqrt(2) of the side, 8 times the clips),
            (1/2, 1/sqrt(2), 4), (1/2, 1, 2), (1, 1, 1), each for as many steps, hence for epochs in proportion
            8 : 4 : 2 : 1. The learning rate is to grow with the batch.
        short_cycle: sides that change with every step: (1/2 of the epoch's side, 4 times its clips), (1/sqrt(2), 2),
            (1, 1). The learning rate stays. The SlowFast project takes 1/2 and 1/sqrt(2) of the full side instead.
        cycles: how often the epochs go through the long cycle; the paper's: once for each step of the learning rate.
        frames_multiple: numbers of frames are multiples of it (SlowFast's frame_ratio); there are at least 2.

    Raises:
        ValueError: a number out of its range, or neither of the cycles.
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
        """The shapes that the batches of an epoch have by turns; the last one is that of the long cycle.

        Args:
            full: the shape that the others are shares of.
            epoch: number of the epoch, from 0; from max_epochs on, shapes are those of the last epoch.
            max_epochs: epochs of the whole training.

        Raises:
            ValueError: no max_epochs for the long cycle; frames that cannot be divided.
        """
        stage = LONG_CYCLE[-1]
        if self.long_cycle:
            if max_epochs is None:
                raise UserError("data.multigrid.long_cycle needs to know the last epoch: set trainer.max_epochs")
            stages = long_cycle(max_epochs, self.cycles)
            stage = LONG_CYCLE[stages[min(epoch, len(stages) - 1)]]
        frames, side, factor = stage
        turns = SHORT_CYCLE if self.short_cycle else SHORT_CYCLE[-1:]
        return [self.scaled(full, frames, side * of_side, factor * times) for of_side, times in turns]

    def scaled(self, full: ClipShape, frames_share: float, side_share: float, factor: int) -> ClipShape:
        """A shape with a share of the frames and of the side.

        Raises:
            ValueError: frames that are no multiple of frames_multiple, or a window that they do not divide.
        """
        multiple = self.frames_multiple
        if full.clip_frames % multiple:
            raise UserError(
                f"data.clip_frames must be a multiple of data.multigrid.frames_multiple {multiple}, "
                f"got {full.clip_frames}"
            )
        least = multiple * math.ceil(2 / multiple)
        frames = min(full.clip_frames, max(least, multiple * round(full.clip_frames * frames_share / multiple)))
        window = full.clip_frames * full.frame_stride
        if window % frames:
            raise UserError(
                f"data.multigrid takes {frames} of {full.clip_frames} frames, which do not divide the window of "
                f"data.clip_frames {full.clip_frames} x data.frame_stride {full.frame_stride}: change one of them"
            )
        side = full.crop_size if side_share == 1 else share_of_side(full.crop_size, side_share)
        least_short, most_short = (round(short * side / full.crop_size) for short in full.short_side)
        return ClipShape(frames, window // frames, side, (least_short, most_short), factor)


def long_cycle(num_epochs: int, cycles: int = 1) -> list[int]:
    """Which shape of LONG_CYCLE each epoch has.

    As many epochs as the shape has clips in a batch, rounded; one at least if a cycle has an epoch for each shape, and
    otherwise the first shapes are left out.
    """
    ends_of_15 = list(itertools.accumulate(factor for _, _, factor in LONG_CYCLE))
    last = len(LONG_CYCLE) - 1
    stages = []
    for cycle in range(cycles):
        epochs = (cycle + 1) * num_epochs // cycles - cycle * num_epochs // cycles
        start = 0
        for stage, end_of_15 in enumerate(ends_of_15):
            end = max(round(epochs * end_of_15 / ends_of_15[-1]), stage + 1)
            end = min(end, max(epochs - (last - stage), 0))
            stages += [stage] * (end - start)
            start = end
    return stages


def share_of_side(side: int, share: float) -> int:
    """A share of a side, in pixels: the nearest multiple of 8; 32 at least, unless the side itself is smaller."""
    return min(side, max(SMALLEST_SIDE, SIDE_MULTIPLE * round(side * share / SIDE_MULTIPLE)))


def whole_batches(turns: int, sizes: list[int]) -> int:
    """How many batches so many turns fill, if batches have these sizes by turns."""
    cycles, rest = divmod(turns, sum(sizes))
    return cycles * len(sizes) + sum(end <= rest for end in itertools.accumulate(sizes))
