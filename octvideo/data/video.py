"""Decoding: the frames of a video that are shown at given times, through one of the backends in `READERS`."""

import contextlib
import math
import os

import numpy as np
from numpy.typing import ArrayLike, NDArray

from octvideo.data.decord_reader import DecordReader
from octvideo.data.index import IndexedVideo
from octvideo.data.pictures_reader import PicturesReader
from octvideo.data.pyav_reader import PyAvReader
from octvideo.data.reader import ROUNDING_SECONDS, Backend, Image, Reader, one_line
from octvideo.data.source import AnySource, Pictures, Source, split_span
from octvideo.data.torchcodec_reader import TorchcodecReader
from octvideo.errors import DecodeError, UnreadableError, UserError

# To add a backend, or a container that none of these opens: a subclass of Reader in a file of its own, a row here, and
# its name in reader.Backend. The backend "auto" tries them in this order.
READERS: dict[str, type[Reader]] = {"pyav": PyAvReader, "torchcodec": TorchcodecReader, "decord": DecordReader}


class Video(contextlib.AbstractContextManager["Video"]):
    """An open video, for a `with` statement.

    Frames are found by their timestamps, because the frame count in a header is often wrong, and frame rates vary.
    Raises DecodeError for a file that is missing, no video, or broken; UserError for a backend that is not installed;
    StoreError where what holds the video cannot be used.

    Args:
        path: what `source` finds: a file, a folder of frames, a URI, a member of a tar file. With #t=START,END behind
            it, in seconds, that stretch of it is the video.
        backend: pyav, torchcodec or decord; auto is PyAV, or another installed one where it gives no frame.
        known: what an index knows of all of it.
        source: where it is; default: `AnySource`.
    """

    backend: str  # the one that reads
    fps: float  # average frames per second
    duration_seconds: float  # according to the file or the index
    note: str  # what of these was derived from timestamps, because no header says it, or a wrong one; mostly empty

    def __init__(
        self,
        path: str | os.PathLike[str],
        backend: Backend = "auto",
        *,
        known: IndexedVideo | None = None,
        source: Source | None = None,
    ) -> None:
        if backend != "auto" and backend not in READERS:
            raise UserError(f"backend must be auto, {', '.join(READERS)}, got {backend!r}")
        self.path = os.fspath(path)
        name, self._start, self._end = split_span(self.path)
        self._backends = list(READERS) if backend == "auto" else [backend]  # not yet tried
        self._first_error: UserError | None = None
        try:
            self._media = (source or AnySource()).find(name, known)
        except OSError as error:
            raise DecodeError(self.path, one_line(error)) from error
        self._reader = PicturesReader(self._media) if isinstance(self._media, Pictures) else self._next_reader()
        self.fps, self.note, whole = self._reader.fps, self._reader.note, self._reader.duration_seconds
        if isinstance(self._media, Pictures):
            self.backend = "pictures"
        self.duration_seconds = min(whole, math.inf if self._end is None else self._end) - self._start
        if self.duration_seconds <= 0:
            reached = f"the video ends after {whole:.2f} s" if self._start >= whole else f"it ends at {self._end:.2f} s"
            raise DecodeError(self.path, f"the span starts at {self._start:.2f} s, and {reached}")

    def _next_reader(self) -> Reader:
        """Opens the file in the next backend that can; raises the first backend's error if none can."""
        while self._backends:
            self.backend = self._backends.pop(0)
            try:
                return READERS[self.backend](self._media)
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
        if self._start or self._end is not None:
            last = math.inf if self._end is None else max(self._start, self._end - 2 * ROUNDING_SECONDS)
            times = (times.clip(0, None) + self._start).clip(None, last)
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
