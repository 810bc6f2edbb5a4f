"""What every decoding backend has in common; each backend has a file of its own, and `video.READERS` lists them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from octvideo.data.index import IndexedVideo
from octvideo.errors import DecodeError

Image: TypeAlias = NDArray[np.uint8]  # (H, W, 3), RGB
Times: TypeAlias = NDArray[np.float64]  # (T,), in seconds from the start of the video, ascending
Backend = Literal["auto", "pyav", "decord", "torchcodec"]
ROUNDING_SECONDS = 0.001  # Matroska rounds timestamps to milliseconds; a frame may be that early for k / fps
EARLY_END_SECONDS = 1.0  # the headers of many good files are off by some frames
READING_ERRORS = (av.error.FFmpegError, OSError)


def upright_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that make a frame upright; 0 for a matrix that is no rotation by quarters."""
    return frame.rotation // 90 if frame.rotation in (-180, -90, 90, 180) else 0


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    message = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return " ".join(message.split("\n")[0].split())


@contextlib.contextmanager
def decode_errors(path: str, *kinds: type[Exception], raised: type[DecodeError] = DecodeError) -> Iterator[None]:
    """Turns errors of these kinds into DecodeErrors that name the file."""
    try:
        yield
    except kinds as error:
        raise raised(path, one_line(error)) from error


class Reader(ABC):
    """A video file, open in one backend; an UnreadableError says that another backend may be able to read it."""

    fps: float  # average frames per second
    duration_seconds: float  # according to the file, or to the index if that knows the file
    frames_decoded: int | None = None  # so far; None where a backend does not tell

    def __init__(self, path: str, known: IndexedVideo | None) -> None:
        self.path, self.known = path, known
        self._scaler = VideoReformatter()  # one for all frames: setting it up takes longer than scaling a small frame
        self._first_size: tuple[int, int] | None = None

    @abstractmethod
    def read(self, times: Times, short_side: int | None) -> Sequence[Image]:
        """The frame shown at each of the times, upright, its shorter side scaled to short_side pixels."""

    def close(self) -> None:  # noqa: B027
        """Closes the file, if that needs doing."""

    def _size(self, width: int, height: int, short_side: int | None) -> tuple[int, int]:
        """(width, height) of all images: follows from the first frame, even if later ones have another size."""
        if min(width, height) < 1:
            raise DecodeError(self.path, f"frames of {width} x {height} pixels")
        self._first_size = width, height = self._first_size or (width, height)
        scale = 1.0 if short_side is None else short_side / min(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _image(self, frame: av.VideoFrame, short_side: int | None) -> Image:
        """The upright, scaled image of a frame; torchcodec's, bit for bit, where nothing is scaled."""
        size = self._size(frame.width, frame.height, short_side)
        filtering = "BICUBIC" if size == (frame.width, frame.height) else "BILINEAR"
        with decode_errors(self.path, *READING_ERRORS):
            rgb = self._scaler.reformat(frame, *size, "rgb24", interpolation=filtering, threads=1)
            return np.rot90(rgb.to_ndarray(), upright_turns(frame)).astype(np.uint8, copy=False)

    def _scaled(self, images: NDArray[np.uint8], short_side: int | None) -> Sequence[Image]:
        """Scales RGB images (T, H, W, 3)."""
        size = images.shape[2], images.shape[1]
        if self._size(*size, short_side) == size:
            return list(images)
        return [self._image(av.VideoFrame.from_ndarray(image, "rgb24"), short_side) for image in images]

    def _check_end(self, end_seconds: float, wanted_seconds: float) -> None:
        """Refuses to hold the last frame of a file that was cut off: it ends long before its header says."""
        said = self.duration_seconds
        if end_seconds + EARLY_END_SECONDS < min(wanted_seconds, said):
            raise DecodeError(self.path, f"ends after {end_seconds:.2f} s, and its header says {said:.2f} s")
