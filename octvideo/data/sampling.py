"""Which frames and which crops of a video become clips; pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from octvideo.errors import UserError

ROUNDING = 1e-6  # frames; a position this little below a whole frame is that frame
ProtocolName = Literal["slowfast", "pytorchvideo", "mmaction", "uniform"]
ShortVideos = Literal["hold", "loop", "spread"]


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video become clips: the sampling protocols of well-known projects, by name.

    They differ in where clips start and which frames they take, and so in accuracy. In frames, a clip's window is
    w = clip_frames * frame_stride long and starts at d = max(num_frames - w, 0) at the latest. With f for clip_frames,
    clip i of n is:

    | protocol     | starts in training    | starts in tests       | frames                              | short  |
    |--------------|-----------------------|-----------------------|-------------------------------------|--------|
    | slowfast     | anywhere in [0, d]    | d * i / n             | floor(start + linspace(0, w - 1, f))| hold   |
    | pytorchvideo | anywhere in [0, d]    | d * i / n             | of all m frames with start <= frame | spread |
    |              |                       |                       | < start + w, those numbered         |        |
    |              |                       |                       | floor(linspace(0, m - 1, f))        |        |
    | mmaction     | a whole frame in each | round(e * i / (n-1)), | start + j * frame_stride; so the    | loop   |
    |              | of n equal parts of   | or e // 2 if n is 1   | latest start of a test clip is      |        |
    |              | [0, d]                |                       | e = d + frame_stride - 1            |        |
    | uniform      | no window: a random frame of each of f equal parts of the video, in tests the one      | never  |
    |              | at (i + 0.5) / n of each part                                                          |        |

    So the frames of an 8 x 8 clip lie 9 apart with slowfast and pytorchvideo, and 8 with mmaction. The centre clip
    starts at d / 2; for mmaction and uniform it is the test clip of n = 1. With `target_fps`, mmaction takes
    start + floor(linspace(0, w - 1, f)), and its test clips start at floor(d / (n - 1)) * i.

    Sources: slowfast, datasets/decoder.py of facebookresearch/SlowFast. pytorchvideo, its release 0.1.5:
    RandomClipSampler and ConstantClipsPerVideoSampler (unreleased code has d * i / (n - 1)), EncodedVideo.get_clip,
    uniform_temporal_subsample. mmaction, SampleFrames of open-mmlab/mmaction2 1.x. uniform, the segments of TSN (Wang
    et al., ECCV 2016). Where a product is a whole number, their floating-point types may round it down; ours do not.

    Args:
        frame_stride: length of a clip's window for each of its clip_frames; uniform has no window.
        protocol: where clips start and which frames they take.
        target_fps: frame rate that windows are counted in, so that clips last equally long; None: the video's own.
        short_videos: how clips fill up when the video ends first: "hold" repeats the last frame, "loop" starts again
            from the first, "spread" takes floor(linspace(0, num_frames - 1, f)). None: as the protocol's project does.

    Raises:
        UserError: a number out of range (also of the methods), or an unknown name.
    """

    clip_frames: int = 8
    frame_stride: int = 8
    protocol: ProtocolName = "slowfast"
    target_fps: float | None = None
    short_videos: ShortVideos | None = None

    def __post_init__(self) -> None:
        for name in ("clip_frames", "frame_stride"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"sampling protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if self.target_fps is not None and not 0 < self.target_fps < math.inf:
            raise UserError(f"target_fps must be positive and finite, or None, got {self.target_fps}")
        if self.short_videos not in (None, *get_args(ShortVideos)):
            raise UserError(f"short_videos must be hold, loop, spread or None, got {self.short_videos!r}")

    def train_clips(self, num_frames: int, fps: float, num_clips: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Random clips of a video; its `fps` matter only with a target_fps.

        Returns:
            (num_clips, clip_frames) frame numbers from 0 to num_frames - 1; ascending in each clip unless looped.
        """
        video = self._video(num_frames, fps, num_clips)
        return self._frames(video, video.random_starts(num_clips, rng))

    def dense_clips(self, num_frames: int, fps: float, num_clips: int) -> NDArray[np.int64]:
        """The clips on which the protocol tests a video; arguments and result as in `train_clips`."""
        video = self._video(num_frames, fps, num_clips)
        return self._frames(video, video.dense_starts(num_clips))

    def centre_clip(self, num_frames: int, fps: float) -> NDArray[np.int64]:
        """The one clip (1, clip_frames) in the middle of the video; the rest as in `train_clips`."""
        video = self._video(num_frames, fps, 1)
        return self._frames(video, video.centre_start())

    def _video(self, num_frames: int, fps: float, num_clips: int) -> _SlowFast:
        if num_frames < 1 or num_clips < 1:
            raise UserError(f"num_frames and num_clips must be at least 1, got {num_frames} and {num_clips}")
        if not 0 < fps < math.inf:
            raise UserError(f"fps must be positive and finite, got {fps}")
        span, protocol = self.clip_frames * self.frame_stride, PROTOCOLS[self.protocol]
        if self.target_fps is None:
            return protocol(num_frames, self.clip_frames, span, self.frame_stride)
        return protocol(num_frames, self.clip_frames, max(1.0, span * fps / self.target_fps), None)

    def _frames(self, video: _SlowFast, starts: NDArray[np.float64]) -> NDArray[np.int64]:
        frames, num_frames = _floor(video.positions(starts)), video.num_frames
        short_videos = self.short_videos or video.short_videos
        if frames.max() < num_frames:
            return frames
        if short_videos == "hold":
            return np.minimum(frames, num_frames - 1)
        if short_videos == "loop":
            return frames % num_frames
        return np.tile(_floor(np.linspace(0, num_frames - 1, self.clip_frames)), (len(frames), 1))


def _floor(positions: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.floor(positions + ROUNDING).astype(np.int64)


@dataclass(frozen=True)
class _SlowFast:
    """The slowfast protocol for one video; the other protocols override its rules. The table in `Sampling` has them."""

    num_frames: int
    clip_frames: int
    span: float  # of a clip's window, in frames of the video; need not be whole with a target_fps
    frame_stride: int | None  # None with a target_fps
    short_videos: ClassVar[ShortVideos] = "hold"

    @property
    def latest_start(self) -> float:
        return max(self.num_frames - self.span, 0.0)

    def random_starts(self, num_clips: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """(num_clips, ...) starts of clips, as the other starts in the form that `positions` takes."""
        return rng.uniform(0, self.latest_start, num_clips)

    def dense_starts(self, num_clips: int) -> NDArray[np.float64]:
        return self.latest_start * np.arange(num_clips) / num_clips

    def centre_start(self) -> NDArray[np.float64]:
        return np.array([self.latest_start / 2])

    def positions(self, starts: NDArray[np.float64]) -> NDArray[np.float64]:
        """(num_clips, clip_frames) positions in frames; in a short video they may lie after its end."""
        return np.linspace(starts, starts + self.span - 1, self.clip_frames, axis=1)


class _PyTorchVideo(_SlowFast):
    short_videos = "spread"

    def positions(self, starts: NDArray[np.float64]) -> NDArray[np.float64]:
        first, after = np.ceil(starts - ROUNDING), np.ceil(starts + self.span - ROUNDING)
        return np.linspace(first, after - 1, self.clip_frames, axis=1, dtype=np.float64)


class _MMAction(_SlowFast):
    short_videos = "loop"

    def random_starts(self, num_clips: int, rng: np.random.Generator) -> NDArray[np.float64]:
        choices = max(self.num_frames - self.span + 1, 0.0)
        part = int(choices // num_clips)
        if part > 0:
            return np.arange(num_clips, dtype=np.float64) * part + rng.integers(part, size=num_clips)
        if self.num_frames > max(num_clips, self.span):  # fewer starts than clips
            return np.sort(rng.integers(int(choices), size=num_clips)).astype(np.float64)
        return np.round(np.arange(num_clips) * choices / num_clips)

    def dense_starts(self, num_clips: int) -> NDArray[np.float64]:
        if self.clip_frames == 1:  # for networks of single frames
            return (np.arange(num_clips) + 0.5) * self.num_frames / num_clips
        span = self.span if self.frame_stride is None else (self.clip_frames - 1) * self.frame_stride + 1
        latest = max(self.num_frames - span, 0.0)
        if num_clips == 1:
            return np.array([latest // 2])
        between = latest / (num_clips - 1)
        return np.round(np.arange(num_clips) * (np.floor(between) if self.frame_stride is None else between))

    def centre_start(self) -> NDArray[np.float64]:
        return self.dense_starts(1)

    def positions(self, starts: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.frame_stride is None:
            return super().positions(starts)
        return starts[:, None] + np.arange(self.clip_frames) * self.frame_stride


class _Uniform(_SlowFast):
    """Its starts are shares of one of clip_frames equal parts of the video."""

    def random_starts(self, num_clips: int, rng: np.random.Generator) -> NDArray[np.float64]:
        return rng.random((num_clips, self.clip_frames))

    def dense_starts(self, num_clips: int) -> NDArray[np.float64]:
        return ((np.arange(num_clips) + 0.5) / num_clips)[:, None]

    def centre_start(self) -> NDArray[np.float64]:
        return self.dense_starts(1)

    def positions(self, starts: NDArray[np.float64]) -> NDArray[np.float64]:
        positions = (np.arange(self.clip_frames) + starts) * self.num_frames / self.clip_frames
        return np.minimum(positions, self.num_frames - 1)  # rounding must not lead out of the last frame


PROTOCOLS = {"slowfast": _SlowFast, "pytorchvideo": _PyTorchVideo, "mmaction": _MMAction, "uniform": _Uniform}


def random_crop(height: int, width: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """(top, left) of a random square of `size` pixels."""
    return int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))


def even_crops(height: int, width: int, size: int, num_crops: int) -> list[tuple[int, int]]:
    """(top, left) of squares spread evenly along the longer side, both ends included; a single one is in the centre."""
    top, left = (height - size) // 2, (width - size) // 2
    if num_crops == 1:
        return [(top, left)]
    steps = np.linspace(0, max(height, width) - size, num_crops).round().astype(int).tolist()
    return [(step, left) if height > width else (top, step) for step in steps]
