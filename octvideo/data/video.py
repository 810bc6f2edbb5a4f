"""Decoding: the frames of a video file that are shown at given times, through one of the backends in `READERS`."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from octvideo.data.decord_reader import DecordReader
from octvideo.data.index import IndexedVideo
from octvideo.data.pyav_reader import PyAvReader
from octvideo.data.reader import Backend, Image, Reader
from octvideo.data.torchcodec_reader import TorchcodecReader
from octvideo.errors import DecodeError, UnreadableError, UserError

LATEST_SECONDS = 1e7  # no video is longer, and a file's clock counts no further
# To add a backend, or a container that none of these opens: a subclass of Reader in a file of its own, a row here, and
# its name in reader.Backend. The backend "auto" tries them in this order.
READERS: dict[str, Callable[[str, IndexedVideo | None], Reader]] = {
    "pyav": PyAvReader,
    "torchcodec": TorchcodecReader,
    "decord": DecordReader,
}


class Video(contextlib.AbstractContextManager["Video"]):
    """An open video file, for a `with` statement.

    Frames are found by their timestamps, because the frame count in a header is often wrong, and frame rates vary.

    Args:
        path: the file.
        backend: pyav, torchcodec or decord; auto is PyAV, or another installed one for a file from which PyAV gets no
            frame. The attribute of this name tells which one reads.
        known: what an index knows of the video; it must be true of the file.

    Raises:
        DecodeError: the file is missing, no video, or broken.
        UserError: an unknown backend, or one that is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str], backend: Backend = "auto", *, known: IndexedVideo | None = None
    ) -> None:
        if backend != "auto" and backend not in READERS:
            raise UserError(f"backend must be auto, {', '.join(READERS)}, got {backend!r}")
        self.path = os.fspath(path)
        self._known = known
        self.backend: str = next(iter(READERS)) if backend == "auto" else backend
        self._others = list(READERS)[1:] if backend == "auto" else []
        self._first_error: DecodeError | None = None
        if not os.path.exists(self.path):
            raise DecodeError(self.path, os.strerror(errno.ENOENT))
        try:
            self._reader = READERS[self.backend](self.path, known)
        except UnreadableError as error:
            self._reader = self._another(error)

    def _another(self, error: DecodeError) -> Reader:
        """Opens the file in the next backend that can; raises the first backend's error if none can."""
        self._first_error = self._first_error or error
        while self._others:
            self.backend = self._others.pop(0)
            with contextlib.suppress(UserError):  # it cannot read the file, or is not installed
                return READERS[self.backend](self.path, self._known)
        raise self._first_error

    @property
    def fps(self) -> float:
        """Average frame rate, in frames per second."""
        return self._reader.fps

    @property
    def duration_seconds(self) -> float:
        """How long the video runs, according to the file or the index."""
        return self._reader.duration_seconds

    @property
    def num_frames(self) -> int:
        """Number of frames in that time at the average frame rate; the file may hold another number."""
        return max(1, round(self.duration_seconds * self.fps))

    @property
    def frames_decoded(self) -> int | None:
        """Number of frames decoded so far; None where the backend does not tell."""
        return self._reader.frames_decoded

    def frames_at(self, times_seconds: ArrayLike, short_side: int | None = None) -> NDArray[np.uint8]:
        """The frames that a player would show at the given times.

        Decodes in one pass from the key frame before the first time to the last time. A time before the first or after
        the last frame gives that frame, so a clip of a video that is too short holds its last frame. Rotation in the
        metadata is applied.

        Args:
            times_seconds: T times from the start of the video, in any order.
            short_side: scale the frames so that the shorter side has this many pixels; by default they keep their size.

        Returns:
            RGB frames (T, H, W, 3). PyAV and torchcodec agree bit for bit on 8-bit video at its own size. When scaling,
            they differ by rounding: PyAV scales the stored pixels, the others RGB.

        Raises:
            DecodeError: no frame, invalid data before the last time, or an end more than a second too early.
            UserError: no times, or NaN among them.
        """
        return np.stack(self.images_at(times_seconds, short_side))

    def images_at(self, times_seconds: ArrayLike, short_side: int | None = None) -> list[Image]:
        """As `frames_at`, but T arrays (H, W, 3), of which those that show the same frame may be one and the same."""
        times = np.asarray(times_seconds, dtype=np.float64)
        if times.size == 0 or np.isnan(times).any():
            raise UserError(f"expected times in seconds, got {times.tolist()}")
        order = np.argsort(times, kind="stable")
        while True:
            try:
                images = self._reader.read(times[order].clip(0, LATEST_SECONDS), short_side)
                return [images[row] for row in np.argsort(order)]
            except DecodeError as error:
                if self._first_error is None and not isinstance(error, UnreadableError):
                    raise
                another = self._another(error)
                self._reader.close()
                self._reader = another

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def __exit__(self, *_: object) -> None:
        self.close()
