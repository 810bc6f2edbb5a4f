"""Data sets: random clips of videos for training, evenly spread views for testing."""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from octvideo.data.decoding import NO_VIDEO, Decoding, clips_of
from octvideo.data.multigrid import ClipShape
from octvideo.data.reader import Image
from octvideo.data.sampling import even_crops, random_crop
from octvideo.data.watchdog import HungError, Watchdog
from octvideo.errors import DecodeError
from octvideo.stores import Traffic, take_traffic

REPLACEMENTS = 10  # videos in a row that may be bad in training


class Draw(NamedTuple):
    """One sample to make. All its randomness derives from (seed, epoch, position), on any worker."""

    epoch: int
    position: int  # in the epoch, over all processes
    video: int  # its index, or NO_VIDEO if this process has no more while others still do
    shape: ClipShape | None = None  # of training clips; None: the data set's own


class BadVideo(NamedTuple):
    """A video that could not be decoded, and why."""

    path: str
    reason: str


class Sample(NamedTuple):
    """The result of one draw: clips (V, C, T, H, W) uint8 of one video, or None if it is bad or missing."""

    clips: Tensor | None
    label: NDArray[Any] | np.int64  # a class number, or (num_classes,) float32 shares
    path: str
    bad: list[BadVideo]
    draw: Draw
    traffic: Traffic = Traffic()  # what was read from a store for it


class Clips(Dataset[Sample]):
    """A data set of draws, which knows in a batch which video comes next."""

    decoding: Decoding

    def make(self, draw: Draw, following: int) -> Sample:
        """The sample of a draw, after which one of the video `following` comes, or NO_VIDEO."""
        raise NotImplementedError

    def __getitem__(self, draw: Draw) -> Sample:
        return self.make(draw, NO_VIDEO)

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample]:
        following = [*(draw.video for draw in draws[1:]), NO_VIDEO]
        return [self.make(draw, video) for draw, video in zip(draws, following, strict=True)]


@dataclass(eq=False)
class TrainingClips(Clips):
    """Random clips: start, short side and crop are random, half are mirrored, and bad videos are named and replaced.

    The num_clips of a video come from one pass of decoding (repeated augmentation, Hoffer et al., CVPR 2020).
    """

    decoding: Decoding
    shape: ClipShape
    _: KW_ONLY
    mirror: bool
    seed: int
    num_clips: int = 1

    def __post_init__(self) -> None:
        self._read_clips = Watchdog(self._clips, self.decoding.timeout_seconds)

    def make(self, draw: Draw, following: int) -> Sample:
        """Clips (num_clips, C, T, H, W), of the draw's shape if it has one; DecodeError after 10 bad videos."""
        videos, video = self.decoding.videos, draw.video
        bad: list[BadVideo] = []
        for attempt in range(REPLACEMENTS):
            path, seed = videos.paths[video], (self.seed, draw.epoch, draw.position, attempt)
            try:
                clips, traffic = self._read_clips((video, seed, draw.shape or self.shape, following))
                return Sample(torch.from_numpy(clips), videos.labels[video], path, bad, draw, traffic)
            except (DecodeError, HungError) as error:
                bad.append(BadVideo(path, error.reason))
                video = int(np.random.default_rng(seed).integers(len(videos.paths)))
        reason = f"{bad[-1].reason} (and the {REPLACEMENTS - 1} videos tried before it cannot be decoded either)"
        raise DecodeError(path, reason)

    def _clips(self, job: tuple[int, tuple[int, ...], ClipShape, int]) -> tuple[NDArray[np.uint8], Traffic]:
        index, seed, shape, following = job
        rng, (least, most), size = np.random.default_rng(seed), shape.short_side, shape.crop_size
        sampling = replace(self.decoding.sampling, clip_frames=shape.clip_frames, frame_stride=shape.frame_stride)
        with self.decoding.open(index) as video:
            self.decoding.expect(following)
            numbers = sampling.train_clips(video.num_frames, video.fps, self.num_clips, rng)
            clips = clips_of(video, numbers, int(rng.integers(least, most + 1)))
        height, width, _ = clips[0][0].shape
        crops = ((random_crop(height, width, size, rng), self.mirror and rng.random() < 0.5) for _ in clips)
        cuts = [cut(clip, crop, size, mirror) for clip, (crop, mirror) in zip(clips, crops, strict=True)]
        return np.stack(cuts), take_traffic()


@dataclass(eq=False)
class TestViews(Clips):
    """All views of each video: the protocol's test clips, times crops spread evenly along the longer side.

    A single clip is the centre clip. Bad videos are named, never replaced. With shuffle_frames each clip's frames are
    in a random order of the seed: a control that tells whether a network uses time.
    """

    __test__ = False  # not one of pytest's tests
    decoding: Decoding
    _: KW_ONLY
    crop_size: int
    short_side: int
    num_clips: int
    num_crops: int
    shuffle_frames: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._read_clips = Watchdog(self._clips, self.decoding.timeout_seconds)

    def make(self, draw: Draw, following: int) -> Sample:
        """All clips (num_clips * num_crops, C, T, H, W) of a video, or None and the reason."""
        if draw.video == NO_VIDEO:
            return Sample(None, np.int64(0), "", [], draw)
        path, label = self.decoding.videos.paths[draw.video], self.decoding.videos.labels[draw.video]
        try:
            clips, traffic = self._read_clips((draw.video, following))
        except (DecodeError, HungError) as error:
            return Sample(None, label, path, [BadVideo(path, error.reason)], draw)
        crops = even_crops(clips.shape[2], clips.shape[3], self.crop_size, self.num_crops)
        views = [cut(clip, crop, self.crop_size) for clip in clips for crop in crops]
        return Sample(torch.from_numpy(np.stack(views)), label, path, [], draw, traffic)

    def _clips(self, job: tuple[int, int]) -> tuple[NDArray[np.uint8], Traffic]:
        """The clips (num_clips, T, H, W, C) of a video, not yet cropped."""
        index, following = job
        with self.decoding.open(index) as video:
            self.decoding.expect(following)
            numbers = self.decoding.sampling.test_clips(video.num_frames, video.fps, self.num_clips)
            if self.shuffle_frames:
                numbers = np.random.default_rng((self.seed, index)).permuted(numbers, axis=1)
            clips = np.stack([np.stack(clip) for clip in clips_of(video, numbers, self.short_side)])
        return clips, take_traffic()


def cut(frames: Iterable[Image], crop: tuple[int, int], size: int, mirror: bool = False) -> NDArray[np.uint8]:
    """Crops a square from T frames (H, W, C), given its (top, left), and makes it a clip (C, T, H, W)."""
    top, left = crop
    squares = np.stack([frame[top : top + size, left : left + size] for frame in frames])
    return (squares[:, :, ::-1] if mirror else squares).transpose(3, 0, 1, 2)
