"""Decoding: the frames of a video file that are shown at given times, through one of the backends in `READERS`."""

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from octvideo.data.decord_reader import DecordReader
from octvideo.data.index import IndexedVideo
from octvideo.data.lists import ADDRESS, NOT_A_FILE
from octvideo.data.pyav_reader import PyAvReader
from octvideo.data.reader import Backend, Image, Reader
from octvideo.data.torchcodec_reader import TorchcodecReader
from octvideo.errors import DecodeError, UnreadableError, UserError

# To add a backend, or a container that none of these opens: a subclass of Reader in a file of its own, a row here, and
# its name in reader.Backend. The backend "auto" tries them in this order.
READERS: dict[str, type[Reader]] = {"pyav": PyAvReader, "torchcodec": TorchcodecReader, "decord": DecordReader}


class Video(contextlib.AbstractContextManager["Video"]):
    """An open video file, for a `with` statement.

    Frames are found by their timestamps, because the frame count in a header is often wrong, and frame rates vary.
    Raises DecodeError for a file that is missing, no video, or broken; UserError for a backend that is not installed.

    Args:
        backend: pyav, torchcodec or decord; auto is PyAV, or another installed one where it gives no frame.
        known: what an index knows of the video; it must be true of the file.
    """

    backend: str  # the one that reads
    fps: float  # average frames per second
    duration_seconds: float  # according to the file or the index
    note: str  # what of these was derived from timestamps, because no header says it, or a wrong one; mostly empty

    def __init__(
        self, path: str | os.PathLike[str], backend: Backend = "auto", *, known: IndexedVideo | None = None
    ) -> None:
        if backend != "auto" and backend not in READERS:
            raise UserError(f"backend must be auto, {', '.join(READERS)}, got {backend!r}")
        self.path, self._known = os.fspath(path), known
        self._backends = list(READERS) if backend == "auto" else [backend]  # not yet tried
        self._first_error: UserError | None = None
        if not os.path.exists(self.path):
            raise DecodeError(self.path, NOT_A_FILE if ADDRESS.match(self.path) else os.strerror(errno.ENOENT))
        if Path(self.path).is_char_device():
            raise DecodeError(self.path, "a device, not a video file")
        self._reader = self._next_reader()

    def _next_reader(self) -> Reader:
        """Opens the file in the next backend that can; raises the first backend's error if none can."""
        while self._backends:
            self.backend = self._backends.pop(0)
            try:
                reader = READERS[self.backend](self.path, self._known)
                self.fps, self.duration_seconds, self.note = reader.fps, reader.duration_seconds, reader.note
                return reader
            except UserError as error:  # another backend may be able to read it, or be installed
                if self._first_error is None and not isinstance(error, UnreadableError):
                    raise
                self._first_error = self._first_error or error
        assert self._first_error is not None
        raise self._first_error

    @property
    def num_frames(self) -> int:
        """Number of frames in that time at the average frame rate; the file may hold another number."""
        return max(1, round(self.duration_seconds * self.fps))

    @property
    def frames_decoded(self) -> int | None:
        """Number of frames decoded so far; None where the backend does not tell."""
        return self._reader.frames_decoded

    def frames_at(self, times_seconds: ArrayLike, short_side: int | None = None) -> NDArray[np.uint8]:
        """RGB frames (T, H, W, 3) that a player would show at T times from the start of the video, in any order.

        A time before the first or after the last frame gives that frame. Rotation in the metadata is applied. With
        `short_side`, frames are scaled to that many pixels on their shorter side. PyAV and torchcodec agree bit for bit
        on 8-bit video at its own size; scaled, they differ by rounding: PyAV scales the stored pixels, the others RGB.

        Raises DecodeError for no frame, invalid data before the last time, or an end more than a second too early.
        """
        return np.stack(self.images_at(times_seconds, short_side))

    def images_at(self, times_seconds: ArrayLike, short_side: int | None = None) -> list[Image]:
        """As `frames_at`, but T arrays (H, W, 3), of which those that show the same frame may be one and the same."""
        times = np.asarray(times_seconds, dtype=np.float64)
        if times.size == 0 or np.isnan(times).any():
            raise UserError(f"expected times in seconds, got {times.tolist()}")
        times, places = np.unique(times, return_inverse=True)
        while True:
            try:  # no video is longer than 1e7 seconds, and a file's clock counts no further
                images = self._reader.read(times.clip(0, 1e7), short_side)
                return [images[place] for place in places]
            except DecodeError as error:
                if self._first_error is None and not isinstance(error, UnreadableError):
                    raise
                self._first_error = self._first_error or error
                failed, self._reader = self._reader, self._next_reader()
                failed.close()

    def close(self) -> None:
        self._reader.close()

    def __exit__(self, *_: object) -> None:
        self.close()
