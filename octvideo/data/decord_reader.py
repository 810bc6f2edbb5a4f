"""Reading through decord, if it is installed."""

import os
from collections.abc import Sequence

import numpy as np

from octvideo.data.index import IndexedVideo
from octvideo.data.reader import ROUNDING_SECONDS, Image, LibraryReader, Times, decode_errors
from octvideo.errors import UnreadableError, UserError


class DecordReader(LibraryReader):
    """Finds frames by the timestamps that decord gives for all of them."""

    def __init__(self, path: str, known: IndexedVideo | None) -> None:
        super().__init__(path, known)
        try:
            import decord
        except ImportError as error:
            raise UserError(f"the backend decord is not installed: {error}") from error
        decord.logging.set_level(decord.logging.QUIET)
        self._errors = (decord.DECORDError, RuntimeError, IndexError)
        with decode_errors(path, *self._errors, raised=UnreadableError):
            self._reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
            starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64)
            fps = float(self._reader.get_avg_fps())
        if fps <= 0 or len(starts) == 0:
            raise UnreadableError(path, "no frame could be decoded")
        if (np.diff(starts) < 0).any() or starts[-1] <= starts[0]:  # it has none for AVI
            starts = np.arange(len(starts)) / fps
        self._starts = starts - starts[0]
        self._end_seconds = float(self._starts[-1]) + 1 / fps
        self.fps, self.duration_seconds = self._stated or (fps, self._end_seconds)

    def read(self, times: Times, short_side: int | None) -> Sequence[Image]:
        shown = np.searchsorted(self._starts, times + ROUNDING_SECONDS, "right") - 1
        if shown[-1] == len(self._starts) - 1:
            self._check_end(self._end_seconds, times[-1])
        with decode_errors(self.path, *self._errors):
            batch = self._reader.get_batch(shown.clip(0).tolist())
        # Another library in the process, such as pytorchvideo, may have made decord give tensors of PyTorch.
        return self._upright(batch.asnumpy() if hasattr(batch, "asnumpy") else batch.numpy(), short_side)
