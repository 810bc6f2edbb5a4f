"""Data sets: random clips of videos for training, evenly spread views for testing."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from octvideo.data.annotations import VideoList
from octvideo.data.index import VideoIndex
from octvideo.data.multigrid import ClipShape, whole_batches
from octvideo.data.sampling import Sampling, even_crops, random_crop
from octvideo.data.video import Backend, DecodeError, Image, KnownVideo, Video
from octvideo.data.watchdog import HungError, Watchdog

NO_VIDEO = -1

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Draw(NamedTuple):
    """One turn of an epoch. All that is random about it derives from (seed, epoch, position), on any worker.

    Args:
        epoch: number of the epoch, from 0.
        position: which turn of the epoch this is, over all processes.
        video: index of the video, or NO_VIDEO if this process has no more while others still do.
        shape: of the training clips; None: as the data set's own options say.
    """

    epoch: int
    position: int
    video: int
    shape: ClipShape | None = None


class BadVideo(NamedTuple):
    """A video that could not be decoded, and why."""

    path: str
    reason: str


class Sample(NamedTuple):
    """What one draw gives: clips (V, C, T, H, W) uint8 of one video, or None if it is bad or missing."""

    clips: Tensor | None
    label: int
    path: str
    bad: list[BadVideo]
    draw: Draw


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


class Decoding(NamedTuple):
    """How the videos of a list become frames.

    Args:
        videos: the list.
        sampling: which frames of a video become clips.
        backend: what decodes: auto, pyav, torchcodec or decord.
        timeout_seconds: a video whose decoding takes longer is bad, and the process that decodes it is killed; None
            decodes without a limit, in the process that asks.
        known: what is known of videos beforehand.
        rows: the N rows of the list's videos in it; -1 where it does not have them.
    """

    videos: VideoList
    sampling: Sampling
    backend: Backend = "auto"
    timeout_seconds: float | None = None
    known: VideoIndex | None = None
    rows: NDArray[np.int64] | None = None

    def open(self, place: int) -> Video:
        """Opens a video of the list."""
        path = self.videos.paths[place]
        return Video(path, self.backend, known=self._known(path, place))

    def _known(self, path: str, place: int) -> KnownVideo | None:
        """What the index knows, unless the file has changed since."""
        if self.known is None or self.rows is None or self.rows[place] < 0:
            return None
        video = self.known[int(self.rows[place])]
        try:
            status = os.stat(path)
        except OSError:
            return None
        if status.st_size != video.bytes or video.mtime_ns not in (0, status.st_mtime_ns):
            return None
        return KnownVideo(video.fps, video.duration_seconds, video.keyframe_seconds)

    def watched(self, read: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
        """The function, called where it cannot hang."""
        return read if self.timeout_seconds is None else Watchdog(read, self.timeout_seconds)


def clips_of(video: Video, frame_numbers: NDArray[np.int64], short_side: int) -> list[list[Image]]:
    """The frames of clips, from one pass of decoding.

    Args:
        video: the open video.
        frame_numbers: (V, T), at its average frame rate; each stands for the middle of the time that it is shown.
        short_side: pixels that the shorter side is scaled to.

    Returns:
        V times T images (H, W, 3).

    Raises:
        DecodeError: as `Video.frames_at`.
    """
    clips, clip_frames = frame_numbers.shape
    times = (frame_numbers.ravel() + np.float64(0.5)) / video.fps
    images = video.images_at(times, short_side)
    return [images[clip * clip_frames : (clip + 1) * clip_frames] for clip in range(clips)]


class TrainingClips(Dataset[Sample]):
    """Random clips: a random moment, short side and crop, mirrored half of the time.

    A video that cannot be decoded is named in the sample, and another one takes its place.

    Args:
        decoding: which videos, and how they become frames.
        crop_size: height and width of a clip, in pixels.
        short_side: (least, most) pixels that the shorter side of a frame is scaled to before the crop; the same for all
            clips of a video.
        mirror: flip half of the clips left to right.
        seed: of all random choices.
        num_clips: clips of each video, from one pass of decoding (repeated augmentation, Hoffer et al., CVPR 2020).
    """

    REPLACEMENTS = 10

    def __init__(
        self,
        decoding: Decoding,
        *,
        crop_size: int,
        short_side: tuple[int, int],
        mirror: bool,
        seed: int,
        num_clips: int = 1,
    ) -> None:
        self.decoding = decoding
        self.mirror = mirror
        self.seed = seed
        self.num_clips = num_clips
        sampling = decoding.sampling
        self.shape = ClipShape(sampling.clip_frames, sampling.frame_stride, crop_size, short_side)
        self._read_clips = decoding.watched(self._clips)

    def __len__(self) -> int:
        return len(self.decoding.videos.paths)

    def __getitem__(self, draw: Draw) -> Sample:
        """Clips (num_clips, C, T, H, W), of the draw's shape if it names one.

        Raises:
            DecodeError: REPLACEMENTS videos in a row cannot be decoded.
        """
        videos = self.decoding.videos
        turn = (self.seed, draw.epoch, draw.position)
        bad: list[BadVideo] = []
        video = draw.video
        for attempt in range(self.REPLACEMENTS):
            path = videos.paths[video]
            try:
                clips = torch.from_numpy(self._read_clips((video, (*turn, attempt), draw.shape or self.shape)))
                return Sample(clips, int(videos.labels[video]), path, bad, draw)
            except (DecodeError, HungError) as error:
                bad.append(bad_video(path, error))
                video = int(np.random.default_rng((*turn, attempt)).integers(len(self)))
        raise DecodeError(
            bad[-1].path,
            f"{bad[-1].reason} (and the {self.REPLACEMENTS - 1} videos tried before it cannot be decoded either)",
        )

    def _clips(self, job: tuple[int, tuple[int, ...], ClipShape]) -> NDArray[np.uint8]:
        index, seed, shape = job
        rng = np.random.default_rng(seed)
        sampling = replace(self.decoding.sampling, clip_frames=shape.clip_frames, frame_stride=shape.frame_stride)
        least, most = shape.short_side
        with self.decoding.open(index) as video:
            numbers = sampling.train_clips(video.num_frames, video.fps, self.num_clips, rng)
            clips = clips_of(video, numbers, int(rng.integers(least, most + 1)))
        height, width = clips[0][0].shape[:2]
        cuts = []
        for clip in clips:
            crop = random_crop(height, width, shape.crop_size, rng)
            cuts.append(cut(clip, crop, shape.crop_size, mirror=self.mirror and rng.random() < 0.5))
        return np.stack(cuts)


class TestViews(Dataset[Sample]):
    """All views of each video: the protocol's test clips, times crops spread evenly along the longer side.

    The views of a video come from one pass of decoding. A video that cannot be decoded is named, never replaced.

    Args:
        decoding: which videos, and how they become frames.
        crop_size: height and width of a clip, in pixels.
        short_side: pixels that the shorter side of a frame is scaled to before the crops.
        num_clips: moments a video; a single one is the clip in the centre.
        num_crops: crops a moment.
        shuffle_frames: put the frames of each clip in random order: a control that tells whether a network uses time.
        seed: of that order.
    """

    __test__ = False  # no test of pytest's

    def __init__(
        self,
        decoding: Decoding,
        *,
        crop_size: int,
        short_side: int,
        num_clips: int,
        num_crops: int,
        shuffle_frames: bool = False,
        seed: int = 0,
    ) -> None:
        self.decoding = decoding
        self.crop_size = crop_size
        self.short_side = short_side
        self.num_clips = num_clips
        self.num_crops = num_crops
        self.shuffle_frames = shuffle_frames
        self.seed = seed
        self._read_clips = decoding.watched(self._clips)

    def __len__(self) -> int:
        return len(self.decoding.videos.paths)

    def __getitem__(self, draw: Draw) -> Sample:
        """All clips (num_clips * num_crops, C, T, H, W) of a video, or None and the reason."""
        if draw.video == NO_VIDEO:
            return Sample(None, 0, "", [], draw)
        path, label = self.decoding.videos.paths[draw.video], int(self.decoding.videos.labels[draw.video])
        try:
            clips = self._read_clips(draw.video)
        except (DecodeError, HungError) as error:
            return Sample(None, label, path, [bad_video(path, error)], draw)
        height, width = clips.shape[2:4]
        crops = even_crops(height, width, self.crop_size, self.num_crops)
        views = [cut(clip, crop, self.crop_size) for clip in clips for crop in crops]
        return Sample(torch.from_numpy(np.stack(views)), label, path, [], draw)

    def _clips(self, index: int) -> NDArray[np.uint8]:
        """The clips (num_clips, T, H, W, C) of a video, not yet cropped."""
        sampling = self.decoding.sampling
        with self.decoding.open(index) as video:
            if self.num_clips == 1:
                numbers = sampling.centre_clip(video.num_frames, video.fps)
            else:
                numbers = sampling.dense_clips(video.num_frames, video.fps, self.num_clips)
            if self.shuffle_frames:
                rng = np.random.default_rng((self.seed, index))
                numbers = np.stack([rng.permutation(clip) for clip in numbers])
            return np.stack([np.stack(clip) for clip in clips_of(video, numbers, self.short_side)])


def bad_video(path: str, error: DecodeError | HungError) -> BadVideo:
    """What an error says of a video."""
    return BadVideo(path, error.reason if isinstance(error, DecodeError) else str(error))


def cut(
    frames: Sequence[Image] | NDArray[np.uint8], crop: tuple[int, int], size: int, mirror: bool = False
) -> NDArray[np.uint8]:
    """Cuts a square out of T frames (H, W, C) and gives it the layout of a clip, (C, T, H, W)."""
    top, left = crop
    squares = np.stack([frame[top : top + size, left : left + size] for frame in frames])
    squares = squares[:, :, ::-1] if mirror else squares
    return squares.transpose(3, 0, 1, 2)
