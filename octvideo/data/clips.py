"""Data sets: random clips of videos for training, evenly spread views for testing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from octvideo.data.index import IndexedVideo, VideoIndex
from octvideo.data.lists import VideoList
from octvideo.data.multigrid import ClipShape
from octvideo.data.reader import Backend, Image
from octvideo.data.sampling import Sampling, even_crops, random_crop
from octvideo.data.video import Video
from octvideo.data.watchdog import HungError, Watchdog
from octvideo.errors import DecodeError

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

    def _known(self, path: str, place: int) -> IndexedVideo | None:
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
        return video

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
