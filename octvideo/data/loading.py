"""From data sets to batches: which process makes which samples, in which order, and how they are joined."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from octvideo.data.clips import BadVideo, Draw, Sample
from octvideo.data.decoding import NO_VIDEO
from octvideo.data.multigrid import ClipShape, whole_batches
from octvideo.stores import Traffic


class Batch(NamedTuple):
    """What the model gets: clips of B videos; B is 0 if all are bad."""

    clips: Tensor  # (B, V, C, T, H, W) uint8, V clips of each video
    labels: Tensor  # (B,) class numbers; after mixing and for several classes, (B, num_classes) shares of the classes
    paths: list[str]
    bad: list[BadVideo]  # videos that could not be decoded while this batch was made
    turns: list[tuple[int, int]]  # (epoch, position) of each video, from which all its random choices derive
    traffic: Traffic = Traffic()  # what was read from stores


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins the good samples; the bad ones are named in `bad`."""
    good = [sample for sample in samples if sample.clips is not None]
    return Batch(  # default_collate stacks straight into shared memory in a worker
        default_collate([sample.clips for sample in good]) if good else torch.empty(0),
        torch.from_numpy(np.stack([sample.label for sample in good])) if good else torch.empty(0, dtype=torch.int64),
        [sample.path for sample in good],
        [bad for sample in samples for bad in sample.bad],
        [(sample.draw.epoch, sample.draw.position) for sample in good],
        functools.reduce(Traffic.plus, (sample.traffic for sample in samples), Traffic()),
    )


@dataclass(eq=False)
class EpochSampler(Sampler[Draw]):
    """Deals each video of a list to one process, once an epoch, in a new order if shuffled (training).

    Every process draws equally often, so that they keep in step: where videos do not divide evenly, training drops the
    rest of the shuffled order, and testing gives processes that run out empty draws. No video is counted twice.
    """

    num_videos: int
    seed: int
    shuffle: bool
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    repeats: bool = False  # every epoch is dealt as the first one
    chances: NDArray[np.float64] | None = None  # of each video, which training draws with repetition; None: all, once

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_videos // self.world_size if self.shuffle else -(-self.num_videos // self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        epoch, order = 0 if self.repeats else self.epoch, np.arange(self.num_videos)
        if self.shuffle and self.chances is not None:
            order = np.random.default_rng((self.seed, epoch)).choice(order, len(order), p=self.chances)
        elif self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for position in range(self.rank, len(self) * self.world_size, self.world_size):
            yield Draw(epoch, position, int(order[position]) if position < self.num_videos else NO_VIDEO)


@dataclass(eq=False)
class TrainingBatches(Sampler[list[Draw]]):
    """The full batches of an epoch; the rest is dropped.

    A batch is a list of positions, so resuming in the middle of an epoch skips positions and decodes nothing.
    """

    sampler: EpochSampler
    num_videos: int  # in a batch of a shape of factor 1
    shapes: Callable[[int], Sequence[ClipShape]]  # given an epoch, what its batches cycle through
    start: tuple[int, int] = (0, 0)  # (epoch, batches): this one epoch starts after that many batches
    limit: int | None = None  # most batches of an epoch

    def sizes(self, epoch: int) -> list[int]:
        """Videos in each of the batches that an epoch cycles through."""
        return [self.num_videos * shape.factor for shape in self.shapes(epoch)]

    def batches_in(self, epoch: int) -> int:
        """Batches of the whole epoch."""
        batches = whole_batches(len(self.sampler), self.sizes(epoch))
        return batches if self.limit is None else min(batches, self.limit)

    def __len__(self) -> int:
        return self.batches_in(self.sampler.epoch)  # even when resumed in the middle: Lightning counts like this

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, draws = self.sampler.epoch, iter(self.sampler)
        for number, shape in zip(range(self.batches_in(epoch)), itertools.cycle(self.shapes(epoch)), strict=False):
            batch = [draw._replace(shape=shape) for draw in itertools.islice(draws, self.num_videos * shape.factor)]
            if epoch != self.start[0] or number >= self.start[1]:
                yield batch


class Loader(DataLoader[Sample]):
    """A loader for Lightning, which decodes nothing and forks no worker before the first batch is asked for.

    Lightning starts to iterate before it tells the sampler the epoch. It believes that a loader can resume in the
    middle of an epoch if it has a state; TrainingBatches can, so there is a state, and it is empty.
    """

    # A thread of torch.distributed that finishes its work during a fork would leave the worker a lock that nobody
    # releases (CPython up to 3.11), and training would wait for that worker for ever. So the threads get time first.
    QUIET_SECONDS = 0.2

    def _get_iterator(self) -> Any:
        if self.num_workers > 0 and torch.distributed.is_available() and torch.distributed.is_initialized():
            time.sleep(self.QUIET_SECONDS)
        return super()._get_iterator()

    def __iter__(self) -> Any:  # an Iterator[Batch]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
