"""Data sets: random clips of videos for training, evenly spread views for testing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from octvideo.data.annotations import VideoList
from octvideo.data.sampling import clip_times, even_crops, even_starts, latest_start, random_crop
from octvideo.data.video import DecodeError, Video

NO_VIDEO = -1


class Draw(NamedTuple):
    """One turn of an epoch. All that is random about it derives from (seed, epoch, position), on any worker.

    Args:
        epoch: number of the epoch, from 0.
        position: which turn of the epoch this is, over all processes.
        video: index of the video, or NO_VIDEO if this process has no more while others still do.
    """

    epoch: int
    position: int
    video: int


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


class Batch(NamedTuple):
    """What the model gets.

    Args:
        clips: (B, V, C, T, H, W) uint8, V clips of each of B videos; B is 0 if all are bad.
        labels: (B,) class numbers.
        paths: B files.
        bad: videos that could not be decoded while this batch was made.
    """

    clips: Tensor
    labels: Tensor
    paths: list[str]
    bad: list[BadVideo]


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins the good samples; the bad ones are named in `bad`."""
    good = [sample for sample in samples if sample.clips is not None]
    clips = torch.stack([sample.clips for sample in good if sample.clips is not None]) if good else torch.empty(0)
    return Batch(
        clips,
        torch.tensor([sample.label for sample in good], dtype=torch.int64),
        [sample.path for sample in good],
        [bad for sample in samples for bad in sample.bad],
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
        order = np.arange(self.num_videos)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        for turn in range(len(self)):
            position = turn * self.world_size + self.rank
            yield Draw(self.epoch, position, int(order[position]) if position < self.num_videos else NO_VIDEO)


class TrainingClips(Dataset[Sample]):
    """Random clips: a random moment, short side and crop, mirrored half of the time.

    A video that cannot be decoded is named in the sample, and another one takes its place.

    Args:
        videos: the list.
        clip_frames: frames in a clip.
        frame_stride: take every n-th frame of the video.
        crop_size: height and width of a clip, in pixels.
        short_side: (least, most) pixels that the shorter side of a frame is scaled to before the crop.
        mirror: flip half of the clips left to right.
        seed: of all random choices.
    """

    REPLACEMENTS = 10

    def __init__(
        self,
        videos: VideoList,
        *,
        clip_frames: int,
        frame_stride: int,
        crop_size: int,
        short_side: tuple[int, int],
        mirror: bool,
        seed: int,
    ) -> None:
        self.videos = videos
        self.clip_frames = clip_frames
        self.frame_stride = frame_stride
        self.crop_size = crop_size
        self.short_side = short_side
        self.mirror = mirror
        self.seed = seed

    def __len__(self) -> int:
        return len(self.videos.paths)

    def __getitem__(self, draw: Draw) -> Sample:
        """One clip (1, C, T, H, W).

        Raises:
            DecodeError: REPLACEMENTS videos in a row cannot be decoded.
        """
        rng = np.random.default_rng((self.seed, draw.epoch, draw.position))
        bad: list[BadVideo] = []
        video = draw.video
        for _ in range(self.REPLACEMENTS):
            path = str(self.videos.paths[video])
            try:
                return Sample(self._clip(path, rng)[None], int(self.videos.labels[video]), path, bad)
            except DecodeError as error:
                bad.append(BadVideo(path, error.reason))
                video = int(rng.integers(len(self)))
        raise DecodeError(
            bad[-1].path,
            f"{bad[-1].reason} (and the {self.REPLACEMENTS - 1} videos tried before it cannot be decoded either)",
        )

    def _clip(self, path: str, rng: np.random.Generator) -> Tensor:
        with Video(path) as video:
            latest = latest_start(video.duration_seconds, self.clip_frames, self.frame_stride, video.fps)
            times = clip_times(rng.uniform(0, latest), self.clip_frames, self.frame_stride, video.fps)
            least, most = self.short_side
            frames = video.frames_at(times, int(rng.integers(least, most + 1)))
        crop = random_crop(frames.shape[1], frames.shape[2], self.crop_size, rng)
        return _cut(frames, crop, self.crop_size, mirror=self.mirror and rng.random() < 0.5)


class TestViews(Dataset[Sample]):
    """All views of each video: clips spread evenly in time, times crops spread evenly along the longer side.

    The views of a video come from one pass of decoding. A video that cannot be decoded is named, never replaced.

    Args:
        videos: the list.
        clip_frames: frames in a clip.
        frame_stride: take every n-th frame of the video.
        crop_size: height and width of a clip, in pixels.
        short_side: pixels that the shorter side of a frame is scaled to before the crops.
        num_clips: moments a video.
        num_crops: crops a moment.
        shuffle_frames: put the frames of each clip in random order: a control that tells whether a network uses time.
        seed: of that order.
    """

    __test__ = False  # no test of pytest's

    def __init__(
        self,
        videos: VideoList,
        *,
        clip_frames: int,
        frame_stride: int,
        crop_size: int,
        short_side: int,
        num_clips: int,
        num_crops: int,
        shuffle_frames: bool = False,
        seed: int = 0,
    ) -> None:
        self.videos = videos
        self.clip_frames = clip_frames
        self.frame_stride = frame_stride
        self.crop_size = crop_size
        self.short_side = short_side
        self.num_clips = num_clips
        self.num_crops = num_crops
        self.shuffle_frames = shuffle_frames
        self.seed = seed

    def __len__(self) -> int:
        return len(self.videos.paths)

    def __getitem__(self, draw: Draw) -> Sample:
        """All clips (num_clips * num_crops, C, T, H, W) of a video, or None and the reason."""
        if draw.video == NO_VIDEO:
            return Sample(None, 0, "", [])
        path, label = str(self.videos.paths[draw.video]), int(self.videos.labels[draw.video])
        try:
            return Sample(self._views(path, draw.video), label, path, [])
        except DecodeError as error:
            return Sample(None, label, path, [BadVideo(path, error.reason)])

    def _views(self, path: str, index: int) -> Tensor:
        with Video(path) as video:
            latest = latest_start(video.duration_seconds, self.clip_frames, self.frame_stride, video.fps)
            starts = even_starts(latest, self.num_clips)
            times = np.stack([clip_times(start, self.clip_frames, self.frame_stride, video.fps) for start in starts])
            frames = video.frames_at(times.ravel(), self.short_side)
        clips = frames.reshape(self.num_clips, self.clip_frames, *frames.shape[1:])
        if self.shuffle_frames:
            rng = np.random.default_rng((self.seed, index))
            clips = np.stack([clip[rng.permutation(self.clip_frames)] for clip in clips])
        crops = even_crops(frames.shape[1], frames.shape[2], self.crop_size, self.num_crops)
        return torch.stack([_cut(clip, crop, self.crop_size) for clip in clips for crop in crops])


def _cut(frames: NDArray[np.uint8], crop: tuple[int, int], size: int, mirror: bool = False) -> Tensor:
    """Cuts a square out of frames (T, H, W, C) and gives it the layout of a clip, (C, T, H, W)."""
    top, left = crop
    cut = frames[:, top : top + size, left : left + size]
    cut = cut[:, :, ::-1] if mirror else cut
    return torch.from_numpy(np.ascontiguousarray(cut.transpose(3, 0, 1, 2)))
