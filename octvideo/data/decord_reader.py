"""TODO."""

from __future__ import annotations

import os

import numpy as np

from octvideo.data.reader import ROUNDING_SECONDS, Image, KnownVideo, Reader, _reason
from octvideo.errors import UnreadableError, UserError


class DecordReader(Reader):
    """Reads through decord, if it is installed."""

    def __init__(self, path: str, known: KnownVideo | None) -> None:
        super().__init__(path, known)
        try:
            import decord
        except ImportError as error:
            raise UserError(f"the backend decord is not installed: {error}") from error
        decord.logging.set_level(decord.logging.QUIET)
        self._errors = (decord.DECORDError, RuntimeError, IndexError)
        try:
            self._reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
            starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64)
            self.fps = float(self._reader.get_avg_fps())
        except self._errors as error:
            raise UnreadableError(path, _reason(error)) from error
        if self.fps <= 0 or len(starts) == 0:
            raise UnreadableError(path, "no frame could be decoded")
        if (np.diff(starts) < 0).any() or starts[-1] <= starts[0]:  # it has none for AVI
            starts = np.arange(len(starts)) / self.fps
        self._starts = starts - starts[0]
        self.duration_seconds = known.duration_seconds if known is not None else float(self._starts[-1]) + 1 / self.fps

    def read(self, times_seconds: list[float], short_side: int | None) -> list[Image]:
        """The frame shown at each of the moments."""
        places = np.searchsorted(self._starts, np.array(times_seconds) + ROUNDING_SECONDS, "right") - 1
        if places[-1] == len(self._starts) - 1:
            self._check_end(float(self._starts[-1]) + 1 / self.fps, times_seconds[-1])
        unique, where = np.unique(places.clip(0), return_inverse=True)
        try:
            batch = self._reader.get_batch(unique.tolist())
        except self._errors as error:
            raise self._broken(error) from error
        # Another library in the process, such as pytorchvideo, may have made decord give tensors of PyTorch.
        frames = batch.asnumpy() if hasattr(batch, "asnumpy") else batch.numpy()
        images = self._scaled(frames, short_side)
        return [images[place] for place in where]
