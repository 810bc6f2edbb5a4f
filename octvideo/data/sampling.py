"""Which frames and which crops of a video become clips; pure functions."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from octvideo.errors import UserError

ROUNDING = 1e-6  # frames; a position this little below a whole frame is that frame
ProtocolName = Literal["slowfast", "pytorchvideo", "mmaction", "uniform"]
ShortVideos = Literal["hold", "loop", "spread"]
# How each protocol fills up the clips of short videos; those of uniform are never too short.
PROTOCOLS = {"slowfast": "hold", "pytorchvideo": "spread", "mmaction": "loop", "uniform": "hold"}


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video become clips: the sampling protocols of well-known projects, by name.

    In frames, a clip's window is w = clip_frames * frame_stride long and starts at d = max(num_frames - w, 0) at the
    latest. With f for clip_frames, clip i of n is:

    | protocol     | starts in training    | starts in tests       | frames                              | short  |
    |--------------|-----------------------|-----------------------|-------------------------------------|--------|
    | slowfast     | anywhere in [0, d]    | d * i / n             | floor(start + linspace(0, w - 1, f))| hold   |
    | pytorchvideo | anywhere in [0, d]    | d * i / n             | of all m frames with start <= frame | spread |
    |              |                       |                       | < start + w, those numbered         |        |
    |              |                       |                       | floor(linspace(0, m - 1, f))        |        |
    | mmaction     | a whole frame in each | round(e * i / (n-1)), | start + j * frame_stride; a test    | loop   |
    |              | of n equal parts of   | or e // 2 if n is 1   | clip of f frames starts at e =      |        |
    |              | [0, d]                |                       | max(num_frames - (f - 1) *          |        |
    |              |                       |                       | frame_stride - 1, 0) at the latest  |        |
    | uniform      | no window: a random frame of each of f equal parts of the video, in tests the one      | never  |
    |              | at (i + 0.5) / n of each part                                                          |        |

    So the frames of an 8 x 8 clip lie 9 apart with slowfast and pytorchvideo, and 8 with mmaction. The centre clip
    starts at d / 2; for mmaction and uniform it is the test clip of n = 1. With `target_fps`, mmaction takes
    start + floor(linspace(0, w - 1, f)), and its test clips start at floor(d / (n - 1)) * i. Test clips of one frame
    start at (i + 0.5) * num_frames / n with mmaction.

    Sources: slowfast, datasets/decoder.py of facebookresearch/SlowFast. pytorchvideo 0.1.5 (unreleased code has
    d * i / (n - 1)). mmaction, SampleFrames of open-mmlab/mmaction2 1.x. uniform, the segments of TSN (Wang et al.,
    ECCV 2016). Where a product is a whole number, their floating-point types may round it down; ours do not.

    Methods give frame numbers from 0 to num_frames - 1, ascending in each clip unless looped, and raise UserError for
    numbers out of range. The fps of a video matter only with a target_fps.

    Args:
        target_fps: frame rate that windows are counted in, so that clips last equally long; None: the video's own.
        short_videos: how clips fill up when the video ends first: "hold" repeats the last frame, "loop" starts again
            from the first, "spread" takes floor(linspace(0, num_frames - 1, f)). None: as the protocol's project does.
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
        """Random clips (num_clips, clip_frames) of a video."""
        span = self._span(num_frames, fps, num_clips)
        if self.protocol == "uniform":  # its starts are shares of one of clip_frames equal parts of the video
            return self._frames(rng.random((num_clips, self.clip_frames)), num_frames, span)
        if self.protocol != "mmaction":
            return self._frames(rng.uniform(0, max(num_frames - span, 0.0), num_clips), num_frames, span)
        choices = max(num_frames - span + 1, 0.0)
        if (part := int(choices // num_clips)) > 0:
            starts = np.arange(num_clips) * part + rng.integers(part, size=num_clips)
        elif num_frames > max(num_clips, span):  # fewer starts than clips
            starts = np.sort(rng.integers(int(choices), size=num_clips))
        else:
            starts = np.round(np.arange(num_clips) * choices / num_clips)
        return self._frames(starts, num_frames, span)

    def dense_clips(self, num_frames: int, fps: float, num_clips: int) -> NDArray[np.int64]:
        """The clips (num_clips, clip_frames) on which the protocol tests a video."""
        span, numbers = self._span(num_frames, fps, num_clips), np.arange(num_clips)
        if self.protocol == "uniform":
            starts: NDArray[Any] = ((numbers + 0.5) / num_clips)[:, None]
        elif self.protocol != "mmaction":
            starts = max(num_frames - span, 0.0) * numbers / num_clips
        elif self.clip_frames == 1:  # for networks of single frames
            starts = (numbers + 0.5) * num_frames / num_clips
        elif self.target_fps is None:
            latest = max(num_frames - (self.clip_frames - 1) * self.frame_stride - 1, 0.0)
            starts = np.round(numbers * (latest / (num_clips - 1))) if num_clips > 1 else np.array([latest // 2])
        else:
            latest = max(num_frames - span, 0.0)
            starts = numbers * (latest // (num_clips - 1)) if num_clips > 1 else np.array([latest // 2])
        return self._frames(starts, num_frames, span)

    def centre_clip(self, num_frames: int, fps: float) -> NDArray[np.int64]:
        """The one clip (1, clip_frames) in the middle of the video."""
        if self.protocol in ("mmaction", "uniform"):
            return self.dense_clips(num_frames, fps, 1)
        span = self._span(num_frames, fps, 1)
        return self._frames(np.array([max(num_frames - span, 0.0) / 2]), num_frames, span)

    def test_clips(self, num_frames: int, fps: float, num_clips: int) -> NDArray[np.int64]:
        """The clips (num_clips, clip_frames) to test a video on: `dense_clips`, or `centre_clip` for a single one."""
        return self.centre_clip(num_frames, fps) if num_clips == 1 else self.dense_clips(num_frames, fps, num_clips)

    def _span(self, num_frames: int, fps: float, num_clips: int) -> float:
        """Length of a clip's window, in frames of the video; it need not be whole with a target_fps."""
        if num_frames < 1 or num_clips < 1:
            raise UserError(f"num_frames and num_clips must be at least 1, got {num_frames} and {num_clips}")
        if not 0 < fps < math.inf:
            raise UserError(f"fps must be positive and finite, got {fps}")
        span = self.clip_frames * self.frame_stride
        return span if self.target_fps is None else max(1.0, span * fps / self.target_fps)

    def _frames(self, starts: NDArray[Any], num_frames: int, span: float) -> NDArray[np.int64]:
        if self.protocol == "uniform":
            positions: NDArray[Any] = (np.arange(self.clip_frames) + starts) * num_frames / self.clip_frames
        elif self.protocol == "pytorchvideo":
            first, after = np.ceil(starts - ROUNDING), np.ceil(starts + span - ROUNDING)
            positions = np.linspace(first, after - 1, self.clip_frames, axis=1)
        elif self.protocol == "mmaction" and self.target_fps is None:
            positions = starts[:, None] + np.arange(self.clip_frames) * self.frame_stride
        else:
            positions = np.linspace(starts, starts + span - 1, self.clip_frames, axis=1)
        short_videos = self.short_videos or PROTOCOLS[self.protocol]
        if self.protocol == "uniform" or positions.max() + ROUNDING < num_frames or short_videos == "hold":
            return np.minimum(_floor(positions), num_frames - 1)  # rounding must not lead out of the last frame
        if short_videos == "loop":
            return _floor(positions) % num_frames
        return np.tile(_floor(np.linspace(0, num_frames - 1, self.clip_frames)), (len(starts), 1))


def _floor(positions: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.floor(positions + ROUNDING).astype(np.int64)


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
