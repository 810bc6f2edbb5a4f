"""What every decoding backend has in common; each backend has a file of its own, and `video.READERS` lists them."""

import contextlib
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from octvideo.data.source import Media
from octvideo.data.stream import open_timed, spliceable
from octvideo.errors import DecodeError, UnreadableError

Image: TypeAlias = NDArray[np.uint8]  # (H, W, 3), RGB
Times: TypeAlias = NDArray[np.float64]  # (T,), in seconds from the start of the video, ascending
Backend = Literal["auto", "pyav", "decord", "torchcodec"]
ROUNDING_SECONDS = 0.001  # Matroska rounds timestamps to milliseconds; a frame may be that early for k / fps
EARLY_END_SECONDS = 1.0  # the headers of many good files are off by some frames
log = logging.getLogger(__name__)
MOST_PIXELS = 2**24  # of a frame that is scaled up: 48 MiB
READING_ERRORS = (av.error.FFmpegError, OSError)


def square_pixels(width: int, height: int, pixel_shape: float) -> tuple[int, int]:
    """The size at which a player shows stored pixels: of a frame whose pixels are not square, one side is enlarged."""
    if abs(pixel_shape - 1) < 0.01:  # such as 256:255, which rounding made: not worth new pixels
        return width, height
    return (round(width * pixel_shape), height) if pixel_shape >= 1 else (width, round(height / pixel_shape))


class Orientation(NamedTuple):
    """How stored pixels become an upright image: rows and columns are swapped, then flipped."""

    swapped: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def apply(self, stored: NDArray[Any]) -> NDArray[Any]:
        """A view of pixels (H, W, ...)."""
        stored = stored.swapaxes(0, 1) if self.swapped else stored
        return stored[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the upright image."""
        return (height, width) if self.swapped else (width, height)


def shown_as(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[Orientation, float]:
    """How a player shows a stream's frames: their orientation, and the width of a pixel over its height.

    Where the display matrix is none of the eight flips and turns: as stored, with a warning.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation(), float(stream.sample_aspect_ratio or 1)
    numbers = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]] / 2**16  # stored (x, y) is shown at (ax + cy, bx + dy)
    a, b, c, d = numbers.round().astype(int).tolist()
    turned = [abs(a), abs(b), abs(c), abs(d)] in ([1, 0, 0, 1], [0, 1, 1, 0])
    if not turned or np.abs(numbers - (a, b, c, d)).max() > 0.01:
        _warn_of_matrix(tuple(numbers.tolist()))
        return Orientation(), 1.0
    return Orientation(b != 0, b + d < 0, a + c < 0), float(stream.sample_aspect_ratio or 1)


@functools.cache
def _warn_of_matrix(numbers: tuple[float, ...]) -> None:
    log.warning("a display matrix of %s is no flip or quarter turn: such frames are taken as they are stored", numbers)


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
    note: str = ""  # what of these was derived because no header says it, or a wrong one
    frames_decoded: int | None = None  # so far; None where a backend does not tell

    def __init__(self, media: Media) -> None:
        self.media, self.path, self.known = media, media.name, media.known
        self._scaler = VideoReformatter()  # one for all frames: setting it up takes longer than scaling a small frame
        self._first_size: tuple[int, int] | None = None

    @abstractmethod
    def read(self, times: Times, short_side: int | None) -> Sequence[Image]:
        """The frame shown at each of the times, upright, its shorter side scaled to short_side pixels."""

    def close(self) -> None:  # noqa: B027
        """Closes the file, if that needs doing."""

    def _size(self, width: int, height: int, shape: float, short_side: int | None) -> tuple[int, int]:
        """(width, height) of all images: follows from the first frame, even if later ones have another size."""
        if min(width, height) < 1:
            raise DecodeError(self.path, f"frames of {width} x {height} pixels")
        self._first_size = squared = self._first_size or square_pixels(width, height, shape)
        scale = 1.0 if short_side is None else short_side / min(squared)
        wide, high = (max(1, round(side * scale)) for side in squared)
        if wide * high > max(MOST_PIXELS, width * height):
            raise DecodeError(self.path, f"frames of {width} x {height} pixels, which would become {wide} x {high}")
        return wide, high

    def _image(self, frame: av.VideoFrame, short_side: int | None, shown: tuple[Orientation, float]) -> Image:
        """The image of a frame as it is shown, scaled; torchcodec's, bit for bit, where nothing is scaled."""
        orientation, shape = shown
        size = self._size(frame.width, frame.height, shape, short_side)
        filtering = "BICUBIC" if size == (frame.width, frame.height) else "BILINEAR"
        with decode_errors(self.path, *READING_ERRORS):
            rgb = self._scaler.reformat(frame, *size, "rgb24", interpolation=filtering, threads=1)
            return orientation.apply(rgb.to_ndarray())

    def _check_end(self, end_seconds: float, wanted_seconds: float) -> None:
        """Refuses to hold the last frame of a file that was cut off: it ends long before its header says."""
        said = self.duration_seconds
        if end_seconds + EARLY_END_SECONDS < min(wanted_seconds, said):
            raise DecodeError(self.path, f"ends after {end_seconds:.2f} s, and its header says {said:.2f} s")


class LibraryReader(Reader):
    """A reader of another library, which knows the header's timing alone, and turns frames but never mirrors them."""

    _spliceable = False

    def __init__(self, media: Media) -> None:
        super().__init__(media)
        self._shown, self._turns, self._kind, timing = (Orientation(), 1.0), 0, "", None
        with contextlib.suppress(UnreadableError, StopIteration, *READING_ERRORS):  # the library may read more
            container, stream, timing = open_timed(media)
            with container:
                self._kind, self._spliceable = container.format.name, spliceable(container)
                frame = next(container.decode(stream))
                self._shown, self._turns = shown_as(frame, stream), round(frame.rotation / 90)
        self._stated = timing and (float(timing.rate), timing.duration_seconds)
        self.note = timing.note if timing else ""
        if timing and timing.clock == "spliced":
            raise UnreadableError(self.path, "its clock starts again within the file, which pyav alone follows")
        if timing and timing.clock == "counted" and self._spliceable:
            raise UnreadableError(self.path, "its timestamps are guessed: the backend pyav alone counts its frames")

    def _upright(self, images: NDArray[np.uint8], short_side: int | None) -> list[Image]:
        """Scales RGB images (T, H, W, 3) as PyAV's, and makes them upright."""
        images = np.rot90(images, -self._turns, (1, 2))  # as they are stored
        size = images.shape[2], images.shape[1]
        if self._size(*size, self._shown[1], short_side) == size:
            return [self._shown[0].apply(image) for image in images]
        frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24") for image in images)
        return [self._image(frame, short_side, self._shown) for frame in frames]
