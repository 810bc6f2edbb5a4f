"""Which frames and which crops of a video become clips; pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octvideo.errors import UserError

ROUNDING = 1e-6  # frames: a position so little below a whole frame is that frame, and rounding moved it
ShortVideos = Literal["hold", "loop", "spread"]


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video become clips: the sampling protocols of well-known projects, by name.

    They differ in where clips start and which frames they take, and so in accuracy. All in frames: a clip's window is
    w = clip_frames * frame_stride long, its latest start is d = max(num_frames - w, 0). With f for clip_frames, clip i
    of n is:

    | protocol     | starts in training    | starts in tests       | frames                              | short  |
    |--------------|-----------------------|-----------------------|-------------------------------------|--------|
    | slowfast     | any moment in [0, d]  | d * i / n             | floor(start + linspace(0, w - 1, f))| hold   |
    | pytorchvideo | any moment in [0, d]  | d * i / n             | of all m frames with start <= frame | spread |
    |              |                       |                       | < start + w, those numbered         |        |
    |              |                       |                       | floor(linspace(0, m - 1, f))        |        |
    | mmaction     | a whole frame in each | round(e * i / (n-1)), | start + j * frame_stride; so the    | loop   |
    |              | of n equal parts of   | or e // 2 if n is 1   | latest start of a test clip is      |        |
    |              | [0, d]                |                       | e = d + frame_stride - 1            |        |
    | uniform      | no window: a random frame of each of f equal parts of the video, in tests the one      | never  |
    |              | at (i + 0.5) / n of each part                                                          |        |

    So the frames of an 8 x 8 clip lie 9 apart with slowfast and pytorchvideo, and 8 with mmaction. The one clip in the
    centre starts at d / 2; for mmaction and uniform it is the test clip of n = 1. With `target_fps`, mmaction takes
    start + floor(linspace(0, w - 1, f)), and its test clips start at floor(d / (n - 1)) * i.

    Sources: slowfast, datasets/decoder.py of facebookresearch/SlowFast. pytorchvideo, its release 0.1.5:
    RandomClipSampler and ConstantClipsPerVideoSampler (unreleased code has d * i / (n - 1)), EncodedVideo.get_clip,
    uniform_temporal_subsample. mmaction, SampleFrames of open-mmlab/mmaction2 1.x. uniform, the segments of TSN (Wang
    et al., ECCV 2016). Where a product is whole, their number formats may round it down; here it stays whole.

    Args:
        clip_frames: frames in a clip.
        frame_stride: length of a clip's window for each frame taken; uniform has no window.
        protocol: where clips start and which frames they take.
        target_fps: count a window in frames of this rate, so that clips last equally long in all videos; None counts
            in the video's own frames.
        short_videos: what clips take of a video that ends before they do. "hold" repeats the last frame, "loop" starts
            again from the first one, "spread" takes floor(linspace(0, num_frames - 1, f)). None: as the protocol's
            project does.

    Raises:
        ValueError: a number out of its range, or an unknown name.
    """

    clip_frames: int = 8
    frame_stride: int = 8
    protocol: Literal["slowfast", "pytorchvideo", "mmaction", "uniform"] = "slowfast"
    target_fps: float | None = None
    short_videos: ShortVideos | None = None

    def __post_init__(self) -> None:
        for name in ("clip_frames", "frame_stride"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if self.target_fps is not None and not 0 < self.target_fps < math.inf:
            raise UserError(f"target_fps must be positive and finite, or None, got {self.target_fps}")
        if self.short_videos is not None and self.short_videos not in SHORT_VIDEOS:
            raise UserError(f"short_videos must be {', '.join(SHORT_VIDEOS)} or None, got {self.short_videos!r}")

    def train_clips(self, num_frames: int, fps: float, num_clips: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Random clips.

        Args:
            num_frames: frames of the video.
            fps: frames per second of the video; counts only if there is a target_fps.
            num_clips: how many clips.
            rng: where all randomness comes from.

        Returns:
            (num_clips, clip_frames) frame numbers from 0 to num_frames - 1, each clip's in order of time unless looped.

        Raises:
            ValueError: a number out of its range.
        """
        window = self._window(num_frames, fps, num_clips)
        return self._frames(window, PROTOCOLS[self.protocol].random_starts(window, num_clips, rng))

    def dense_clips(self, num_frames: int, fps: float, num_clips: int) -> NDArray[np.int64]:
        """The clips that the protocol tests a video on; arguments, result and errors as those of `train_clips`."""
        window = self._window(num_frames, fps, num_clips)
        return self._frames(window, PROTOCOLS[self.protocol].dense_starts(window, num_clips))

    def centre_clip(self, num_frames: int, fps: float) -> NDArray[np.int64]:
        """The one clip (1, clip_frames) in the middle of the video; the rest as `train_clips`."""
        window = self._window(num_frames, fps, 1)
        return self._frames(window, PROTOCOLS[self.protocol].centre_start(window))

    def _window(self, num_frames: int, fps: float, num_clips: int) -> Window:
        if num_frames < 1 or num_clips < 1:
            raise UserError(f"num_frames and num_clips must be at least 1, got {num_frames} and {num_clips}")
        if not 0 < fps < math.inf:
            raise UserError(f"fps must be positive and finite, got {fps}")
        span = float(self.clip_frames * self.frame_stride)
        if self.target_fps is None:
            return Window(num_frames, span, self.clip_frames, self.frame_stride)
        return Window(num_frames, max(1.0, span * fps / self.target_fps), self.clip_frames, None)

    def _frames(self, window: Window, starts: NDArray[np.float64]) -> NDArray[np.int64]:
        protocol = PROTOCOLS[self.protocol]
        frames = _floor(protocol.positions(window, starts))
        if frames.max() < window.num_frames:
            return frames
        return SHORT_VIDEOS[self.short_videos or protocol.short_videos](frames, window.num_frames)


class Window(NamedTuple):
    """The stretch of a video that a clip is taken from, in the video's own frames.

    Args:
        num_frames: frames of the video.
        span: length of the window; need not be whole with a target_fps.
        clip_frames: frames to take.
        frame_stride: how far apart; None if fps are normalised.
    """

    num_frames: int
    span: float
    clip_frames: int
    frame_stride: int | None

    @property
    def room(self) -> float:
        """The latest start of a window that ends within the video; 0 if the video is shorter."""
        return max(self.num_frames - self.span, 0.0)


class Protocol(NamedTuple):
    """A sampling protocol: where clips start, and what they take; see `Sampling`.

    Args:
        random_starts: (num_clips, ...) starts of training clips.
        dense_starts: (num_clips, ...) starts of test clips.
        centre_start: (1, ...) start of the clip in the middle.
        positions: (num_clips, clip_frames) positions in the video, in frames, of clips with these starts; they may lie
            after the end of a short video.
        short_videos: what the protocol's project does with those.
    """

    random_starts: Callable[[Window, int, np.random.Generator], NDArray[np.float64]]
    dense_starts: Callable[[Window, int], NDArray[np.float64]]
    centre_start: Callable[[Window], NDArray[np.float64]]
    positions: Callable[[Window, NDArray[np.float64]], NDArray[np.float64]]
    short_videos: ShortVideos


def _floor(positions: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.floor(positions + ROUNDING).astype(np.int64)


def _hold(frames: NDArray[np.int64], num_frames: int) -> NDArray[np.int64]:
    return np.minimum(frames, num_frames - 1)


def _loop(frames: NDArray[np.int64], num_frames: int) -> NDArray[np.int64]:
    return frames % num_frames


def _spread(frames: NDArray[np.int64], num_frames: int) -> NDArray[np.int64]:
    clips, clip_frames = frames.shape
    return np.tile(_floor(np.linspace(0, num_frames - 1, clip_frames)), (clips, 1))


def _anywhere(window: Window, num_clips: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.uniform(0, window.room, num_clips)


def _without_the_last(window: Window, num_clips: int) -> NDArray[np.float64]:
    return window.room * np.arange(num_clips) / num_clips


def _middle(window: Window) -> NDArray[np.float64]:
    return np.array([window.room / 2])


def _slowfast_positions(window: Window, starts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linspace(starts, starts + window.span - 1, window.clip_frames, axis=1)


def _pytorchvideo_positions(window: Window, starts: NDArray[np.float64]) -> NDArray[np.float64]:
    first = np.ceil(starts - ROUNDING)
    after = np.ceil(starts + window.span - ROUNDING)
    return np.linspace(first, after - 1, window.clip_frames, axis=1, dtype=np.float64)


def _mmaction_random(window: Window, num_clips: int, rng: np.random.Generator) -> NDArray[np.float64]:
    choices = window.num_frames - window.span + 1
    part = choices // num_clips
    if part > 0:
        return np.arange(num_clips, dtype=np.float64) * part + rng.integers(int(part), size=num_clips)
    if window.num_frames > max(num_clips, window.span):  # fewer starts than clips
        return np.sort(rng.integers(int(choices), size=num_clips)).astype(np.float64)
    if part == 0:
        return np.round(np.arange(num_clips) * choices / num_clips)
    return np.zeros(num_clips)


def _mmaction_dense(window: Window, num_clips: int) -> NDArray[np.float64]:
    if window.clip_frames == 1:  # for networks of single frames
        return (np.arange(num_clips) + 0.5) * window.num_frames / num_clips
    span = window.span if window.frame_stride is None else (window.clip_frames - 1) * window.frame_stride + 1
    latest = max(window.num_frames - span, 0.0)
    if num_clips == 1:
        return np.array([latest // 2])
    between = latest / (num_clips - 1)
    return np.round(np.arange(num_clips) * (between if window.frame_stride is not None else np.floor(between)))


def _mmaction_centre(window: Window) -> NDArray[np.float64]:
    return _mmaction_dense(window, 1)


def _mmaction_positions(window: Window, starts: NDArray[np.float64]) -> NDArray[np.float64]:
    if window.frame_stride is None:
        return _slowfast_positions(window, starts)
    return starts[:, None] + np.arange(window.clip_frames) * window.frame_stride


def _points(window: Window, num_clips: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.random((num_clips, window.clip_frames))


def _even_points(window: Window, num_clips: int) -> NDArray[np.float64]:
    return ((np.arange(num_clips) + 0.5) / num_clips)[:, None]


def _middle_point(window: Window) -> NDArray[np.float64]:
    return _even_points(window, 1)


def _uniform_positions(window: Window, points: NDArray[np.float64]) -> NDArray[np.float64]:
    positions = (np.arange(window.clip_frames) + points) * window.num_frames / window.clip_frames
    return np.minimum(positions, window.num_frames - 1)  # rounding must not lead out of the last frame


SHORT_VIDEOS = {"hold": _hold, "loop": _loop, "spread": _spread}
PROTOCOLS = {
    "slowfast": Protocol(_anywhere, _without_the_last, _middle, _slowfast_positions, "hold"),
    "pytorchvideo": Protocol(_anywhere, _without_the_last, _middle, _pytorchvideo_positions, "spread"),
    "mmaction": Protocol(_mmaction_random, _mmaction_dense, _mmaction_centre, _mmaction_positions, "loop"),
    "uniform": Protocol(_points, _even_points, _middle_point, _uniform_positions, "hold"),
}


def random_crop(height: int, width: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """(top, left) of a random square of `size` pixels."""
    return int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))


def even_crops(height: int, width: int, size: int, num_crops: int) -> list[tuple[int, int]]:
    """(top, left) of squares spread evenly along the longer side, both ends included; a single one is in the centre."""
    if num_crops == 1:
        return [((height - size) // 2, (width - size) // 2)]
    tops = np.linspace(0, height - size, num_crops).round().astype(int)
    lefts = np.linspace(0, width - size, num_crops).round().astype(int)
    if height > width:
        lefts[:] = (width - size) // 2
    else:
        tops[:] = (height - size) // 2
    return list(zip(tops.tolist(), lefts.tolist(), strict=True))
