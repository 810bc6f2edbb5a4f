"""Decoding: the frames of a video file that are shown at given moments, through PyAV, decord or torchcodec."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from octvideo.data.decord_reader import DecordReader
from octvideo.data.pyav_reader import PyAvReader
from octvideo.data.reader import Backend, Image, KnownVideo, Moments, Reader
from octvideo.data.torchcodec_reader import TorchcodecReader
from octvideo.errors import DecodeError, UnreadableError, UserError

LATEST_SECONDS = 1e7  # no video is longer, and a file's clock counts no further
READERS: dict[str, Callable[[str, KnownVideo | None], Reader]] = {
    "pyav": PyAvReader,
    "torchcodec": TorchcodecReader,
    "decord": DecordReader,
}


class Video:
    """An open video file. Use it in a `with` statement.

    Frames are found by their timestamps: the frame count in a header is often wrong, and frame number times frame rate
    is wrong for a variable rate.

    Args:
        path: the file.
        backend: pyav, torchcodec or decord; auto is PyAV, and another one that is installed for a file of which PyAV
            gives no frame.
        known: what an index knows of the video; it must be true of the file.

    Attributes:
        backend: the one that reads.

    Raises:
        DecodeError: the file is missing, no video, or broken.
        ValueError: an unknown backend, or one that is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str], backend: Backend = "auto", *, known: KnownVideo | None = None
    ) -> None:
        if backend != "auto" and backend not in READERS:
            raise UserError(f"backend must be auto, {', '.join(READERS)}, got {backend!r}")
        self.path = os.fspath(path)
        self._known = known
        self._others = [name for name in READERS if name != "pyav"] if backend == "auto" else []
        self.backend: str = "pyav" if backend == "auto" else backend
        self._first_error: DecodeError | None = None
        if not os.path.exists(self.path):
            raise DecodeError(self.path, os.strerror(errno.ENOENT))
        try:
            self._reader = READERS[self.backend](self.path, known)
        except UnreadableError as error:
            self._reader = self._another(error)

    def _another(self, error: DecodeError) -> Reader:
        """The next backend that can open the file; what the first one said, if none can."""
        self._first_error = self._first_error or error
        while self._others:
            self.backend = self._others.pop(0)
            with contextlib.suppress(DecodeError, ValueError):  # not installed is one way of not being able to
                return READERS[self.backend](self.path, self._known)
        raise self._first_error

    @property
    def fps(self) -> float:
        """Average frame rate, in frames per second."""
        return self._reader.fps

    @property
    def duration_seconds(self) -> float:
        """How long the file says that the video runs."""
        return self._reader.duration_seconds

    @property
    def num_frames(self) -> int:
        """How many frames that are at the average frame rate; the file may hold others."""
        return max(1, round(self.duration_seconds * self.fps))

    @property
    def frames_decoded(self) -> int | None:
        """How many frames have been decoded so far; None where the backend does not tell."""
        return self._reader.frames_decoded

    def frames_at(self, times_seconds: Moments, short_side: int | None = None) -> NDArray[np.uint8]:
        """The frames that a player would show at the given moments.

        Goes to the key frame before the first moment and on to the last one, in one pass. A moment before the first or
        after the last frame gives that frame, so a clip from a video that is too short holds its last frame. Rotation
        in the metadata is applied.

        Args:
            times_seconds: T moments, from the start of the video, in any order.
            short_side: scale the frames so that the shorter side has this many pixels; by default they keep their size.

        Returns:
            RGB frames (T, H, W, 3). PyAV and torchcodec give the same ones, bit for bit, for 8-bit video at its own
            size; scaled, PyAV scales what is stored and the others its RGB form, which differs by rounding.

        Raises:
            DecodeError: no frame, invalid data before the last moment, or an end more than a second too early.
            ValueError: no moment, or one that is no number.
        """
        return np.stack(self.images_at(times_seconds, short_side))

    def images_at(self, times_seconds: Moments, short_side: int | None = None) -> list[Image]:
        """As `frames_at`, T arrays (H, W, 3); one and the same array where several moments show one frame."""
        times = np.asarray(times_seconds, dtype=np.float64)
        if times.size == 0 or np.isnan(times).any():
            raise UserError(f"expected moments in seconds, got {times.tolist()}")
        times = times.clip(0, LATEST_SECONDS)
        order = np.argsort(times, kind="stable")
        while True:
            try:
                images = self._reader.read(times[order].tolist(), short_side)
                break
            except DecodeError as error:
                if self._first_error is None and not isinstance(error, UnreadableError):
                    raise
                another = self._another(self._first_error or error)
                self._reader.close()
                self._reader = another
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return [images[place] for place in places]

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
