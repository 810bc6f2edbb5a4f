"""Which moments and which crops of a video become clips; pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def clip_times(start_seconds: float, clip_frames: int, frame_stride: int, fps: float) -> NDArray[np.float64]:
    """The moments of a clip's frames, in seconds: every `frame_stride`-th frame of the video."""
    return start_seconds + np.arange(clip_frames) * frame_stride / fps


def latest_start(duration_seconds: float, clip_frames: int, frame_stride: int, fps: float) -> float:
    """The latest start, in seconds, of a clip that ends within the video; 0 if the video is shorter than the clip."""
    return max(0.0, duration_seconds - ((clip_frames - 1) * frame_stride + 1) / fps)


def even_starts(latest_seconds: float, num_clips: int) -> NDArray[np.float64]:
    """Starts spread evenly from 0 to the latest one, both included; a single one lies in the middle."""
    if num_clips == 1:
        return np.array([latest_seconds / 2])
    return np.linspace(0.0, latest_seconds, num_clips)


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
