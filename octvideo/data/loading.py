"""TODO."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from octvideo.data.clips import NO_VIDEO, BadVideo, Draw, Sample
from octvideo.data.multigrid import ClipShape, whole_batches


class Batch(NamedTuple):
    """What the model gets.

    Args:
        clips: (B, V, C, T, H, W) uint8, V clips of each of B videos; B is 0 if all are bad.
        labels: (B,) class numbers; after mixing, (B, num_classes) shares of the classes.
        paths: B files.
        bad: videos that could not be decoded while this batch was made.
        turns: (epoch, position) of the B videos' draws, which all that is random about them derives from.
    """

    clips: Tensor
    labels: Tensor
    paths: list[str]
    bad: list[BadVideo]
    turns: list[tuple[int, int]]


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins the good samples; the bad ones are named in `bad`."""
    good = [sample for sample in samples if sample.clips is not None]
    # PyTorch's own function stacks straight into shared memory in a worker.
    clips = default_collate([sample.clips for sample in good]) if good else torch.empty(0)
    return Batch(
        clips,
        torch.tensor([sample.label for sample in good], dtype=torch.int64),
        [sample.path for sample in good],
        [bad for sample in samples for bad in sample.bad],
        [(sample.draw.epoch, sample.draw.position) for sample in good],
    )


class EpochSampler(Sampler[Draw]):
    """Deals each video of a list to one process, once an epoch.

    Every process draws equally often, so that they can work in step: where videos do not divide evenly, training
    drops the rest of the shuffled order, and testing gives the processes that run out empty draws. No video is
    counted twice.

    Args:
        num_videos: length of the list.
        seed: of the order; ignored without `shuffle`.
        shuffle: a new order each epoch (training), or the list's (testing).
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, num_videos: int, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        self.num_videos = num_videos
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_videos // self.world_size if self.shuffle else -(-self.num_videos // self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        epoch, order = self.epoch, np.arange(self.num_videos)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for turn in range(len(self)):
            position = turn * self.world_size + self.rank
            yield Draw(epoch, position, int(order[position]) if position < self.num_videos else NO_VIDEO)


class TrainingBatches(Sampler[list[Draw]]):
    """The whole batches of an epoch; what is left over at its end is dropped.

    A run that goes on in the middle of an epoch starts at the batch that was not seen yet. That is arithmetic, as a
    batch is a list of positions: no worker has a state to restore, and no video is decoded to be skipped, which is why
    torchdata's StatefulDataLoader is not needed.

    Args:
        sampler: deals the epoch's videos.
        num_videos: videos in a batch of a shape of factor 1.
        shapes: given the number of an epoch, the shapes that its batches have by turns.
        start: (epoch, batches): this one epoch starts after so many batches; all others are whole.
        limit: most batches of an epoch; None for all.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        num_videos: int,
        shapes: Callable[[int], Sequence[ClipShape]],
        start: tuple[int, int] = (0, 0),
        limit: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.num_videos = num_videos
        self.shapes = shapes
        self.start = start
        self.limit = limit

    def sizes(self, epoch: int) -> list[int]:
        """Videos in the batches of an epoch, by turns."""
        return [self.num_videos * shape.factor for shape in self.shapes(epoch)]

    def batches_in(self, epoch: int) -> int:
        """How many batches the whole epoch has."""
        batches = whole_batches(len(self.sampler), self.sizes(epoch))
        return batches if self.limit is None else min(batches, self.limit)

    def __len__(self) -> int:
        """Batches of the whole epoch, however many of them have been seen: Lightning counts like this."""
        return self.batches_in(self.sampler.epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, draws = self.sampler.epoch, iter(self.sampler)
        shapes, (start_epoch, seen) = self.shapes(epoch), self.start
        for number in range(self.batches_in(epoch)):
            shape = shapes[number % len(shapes)]
            batch = [draw._replace(shape=shape) for draw in itertools.islice(draws, self.num_videos * shape.factor)]
            if epoch != start_epoch or number >= seen:
                yield batch


class Loader(DataLoader[Sample]):
    """A loader that forks its processes while no other thread of this one is busy.

    torch.distributed's threads register with the interpreter when they end their work. A fork at that moment leaves its
    child with a lock that nobody will release (CPython up to 3.11 deletes the other threads' states before it renews
    the lock), and the training waits for that child for ever. So they get a moment to finish before the fork.
    """

    QUIET_SECONDS = 0.2

    def _get_iterator(self) -> Any:
        if self.num_workers > 0 and torch.distributed.is_available() and torch.distributed.is_initialized():
            time.sleep(self.QUIET_SECONDS)
        return super()._get_iterator()


class TrainingLoader(Loader):
    """A loader of TrainingBatches, for Lightning: it decodes nothing before the first batch is asked for.

    Lightning starts to iterate before it tells the sampler the epoch's number, and where it makes a loader for each
    epoch it starts twice. It takes a loader with a state to be one that can go on in the middle of an epoch. This one
    can, by the start of its TrainingBatches, so that its own state is empty.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing."""
