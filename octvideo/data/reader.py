"""TODO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from octvideo.errors import DecodeError

Image: TypeAlias = NDArray[np.uint8]  # (H, W, 3), RGB
Moments: TypeAlias = Sequence[float] | NDArray[np.float64]
Backend = Literal["auto", "pyav", "decord", "torchcodec"]
ROUNDING_SECONDS = 0.001  # Matroska rounds timestamps to milliseconds; a frame may be that early for k / fps
EARLY_END_SECONDS = 1.0  # headers are off by some frames in many good files
READING_ERRORS = (av.error.FFmpegError, OSError)


class KnownVideo(NamedTuple):
    """What an index knows of a video, so that it need not be read from the file.

    Args:
        fps: average frame rate, in frames per second.
        duration_seconds: from the first frame to the end of the last.
        keyframe_seconds: moments of the key frames from the first frame on, in order.
    """

    fps: float
    duration_seconds: float
    keyframe_seconds: NDArray[np.float64]


def upright_turns(frame: av.VideoFrame) -> int:
    """Quarters counter-clockwise that make a frame upright; a matrix that is no rotation reads as a nonsense angle."""
    return frame.rotation // 90 if frame.rotation in (-180, -90, 90, 180) else 0


class Reader(ABC):
    """A video file, open in one backend.

    Args:
        path: the file.
        known: what is known of it.

    Attributes:
        fps: average frame rate, in frames per second.
        duration_seconds: how long the file says that the video runs.
        frames_decoded: frames that the decoder has given so far; None where a backend does not tell.

    Raises:
        DecodeError: the file is missing or broken.
    """

    fps: float
    duration_seconds: float
    frames_decoded: int | None = None

    def __init__(self, path: str, known: KnownVideo | None) -> None:
        self.path = path
        self.known = known
        self._scaler = VideoReformatter()  # one for all frames: setting it up takes longer than scaling a small frame
        self._first_size: tuple[int, int] | None = None

    @abstractmethod
    def read(self, times_seconds: list[float], short_side: int | None) -> list[Image]:
        """The frame shown at each of the moments, which are in order; upright and scaled."""

    def close(self) -> None:
        """Closes the file."""
        return None

    def _scaled_size(self, width: int, height: int, short_side: int | None) -> tuple[int, int]:
        """(width, height) that all frames get, those of the first one read, even if the picture's size changes."""
        if min(width, height) < 1:
            raise DecodeError(self.path, f"frames of {width} x {height} pixels")
        self._first_size = width, height = self._first_size or (width, height)
        scale = 1.0 if short_side is None else short_side / min(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _to_rgb(self, frame: av.VideoFrame, size: tuple[int, int]) -> Image:
        """An upright image of a frame; the same as torchcodec's where the size is the frame's."""
        width, height = size
        same_size = size == (frame.width, frame.height)
        try:
            rgb = self._scaler.reformat(
                frame, width, height, "rgb24", interpolation="BICUBIC" if same_size else "BILINEAR", threads=1
            )
            image = rgb.to_ndarray().astype(np.uint8, copy=False)
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        turns = upright_turns(frame)
        return np.rot90(image, turns) if turns else image

    def _scaled(self, images: NDArray[np.uint8], short_side: int | None) -> Sequence[Image]:
        """Images (T, H, W, 3) at the wanted size."""
        height, width = images.shape[1:3]
        size = self._scaled_size(width, height, short_side)
        if size == (width, height):
            return images  # type: ignore[return-value]
        return [self._to_rgb(av.VideoFrame.from_ndarray(image, "rgb24"), size) for image in images]

    def _broken(self, error: Exception) -> DecodeError:
        return DecodeError(self.path, _reason(error))

    def _check_end(self, end_seconds: float, wanted_seconds: float) -> None:
        """Refuses to hold the last frame of a file that ends long before its header says, one cut off in the middle."""
        if end_seconds + EARLY_END_SECONDS < min(wanted_seconds, self.duration_seconds):
            raise DecodeError(
                self.path, f"ends after {end_seconds:.2f} s, and its header says {self.duration_seconds:.2f} s"
            )


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(message).split("\n")[0].split())
