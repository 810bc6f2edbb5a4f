"""Reading through decord, if it is installed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octvideo.data.reader import ROUNDING_SECONDS, Image, LibraryReader, Times, decode_errors
from octvideo.data.source import Media
from octvideo.errors import UnreadableError, UserError


class DecordReader(LibraryReader):
    """Finds frames by the timestamps that decord gives for all of them."""

    def __init__(self, media: Media) -> None:
        super().__init__(media)
        path = media.name
        try:
            import decord
        except ImportError as error:
            raise UserError(f"the backend decord is not installed: {error}") from error
        decord.logging.set_level(decord.logging.QUIET)
        self._errors = (decord.DECORDError, RuntimeError, IndexError)
        with decode_errors(path, *self._errors, raised=UnreadableError):
            self._reader = decord.VideoReader(media.open(), num_threads=1)
            starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64)
            fps = float(self._reader.get_avg_fps())
        if fps <= 0 or len(starts) == 0:
            raise UnreadableError(path, "no frame could be decoded")
        if self._spliceable:
            raise UnreadableError(path, "decord loses frames at the start of such streams, and shows others instead")
        if len(starts) > 1 and starts[-1] > starts[0] and (np.diff(starts) == 0).any():
            raise UnreadableError(path, "decord's timestamps, of 32 bits, do not tell its frames apart")
        self._untimed = bool((np.diff(starts) < 0).any() or starts[-1] <= starts[0])  # it has no timestamps for AVI
        starts = np.arange(len(starts)) / fps if self._untimed else starts
        self._starts = starts - starts[0]
        self._end_seconds = float(self._starts[-1]) + 1 / fps
        self.fps, self.duration_seconds = self._stated or (fps, self._end_seconds)

    def read(self, times: Times, short_side: int | None) -> Sequence[Image]:
        shown = np.searchsorted(self._starts, times + ROUNDING_SECONDS, "right") - 1
        if shown[-1] == len(self._starts) - 1:
            self._check_end(self._end_seconds, times[-1])
        with decode_errors(self.path, *self._errors):
            if not self._untimed:
                return self._upright(_pixels(self._reader.get_batch(shown.clip(0).tolist())), short_side)
            self._reader.seek(0)  # other seeks would lead astray
            decoded = ((number, self._reader.next()) for number in range(shown[-1] + 1))
            frames = {number: _pixels(frame) for number, frame in decoded if number in shown.clip(0)}
        return self._upright(np.stack([frames[number] for number in shown.clip(0).tolist()]), short_side)


def _pixels(frames: Any) -> NDArray[np.uint8]:
    # Another library in the process, such as pytorchvideo, may have made decord give tensors of PyTorch.
    return frames.asnumpy() if hasattr(frames, "asnumpy") else frames.numpy()  # type: ignore[no-any-return]
