"""TODO."""

from __future__ import annotations

import os

import numpy as np

from octvideo.data.reader import ROUNDING_SECONDS, Image, KnownVideo, Reader, _reason
from octvideo.errors import UnreadableError, UserError


class TorchcodecReader(Reader):
    """Reads through torchcodec, if it is installed and finds FFmpeg's libraries."""

    def __init__(self, path: str, known: KnownVideo | None) -> None:
        super().__init__(path, known)
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as error:
            reason = f"it needs FFmpeg's libraries, such as apt-get install ffmpeg gives: {_reason(error)}"
            raise UserError(f"the backend torchcodec is not installed, or {reason}") from error
        try:
            self._decoder = VideoDecoder(os.path.abspath(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as error:
            raise UnreadableError(path, _reason(error)) from error
        metadata = self._decoder.metadata
        start, end, fps = metadata.begin_stream_seconds, metadata.end_stream_seconds, metadata.average_fps
        if start is None or end is None or not fps:
            raise UnreadableError(path, "no frame could be decoded")
        self._start_seconds, self._end_seconds, self.fps = start, end, fps
        self.duration_seconds = max(end - start, metadata.duration_seconds_from_header or 0)
        if known is not None:
            self.duration_seconds = known.duration_seconds

    def read(self, times_seconds: list[float], short_side: int | None) -> list[Image]:
        """The frame shown at each of the moments."""
        start, end = self._start_seconds, self._end_seconds
        if times_seconds[-1] + start >= end:
            self._check_end(end - start, times_seconds[-1])
        moments = np.clip(np.array(times_seconds) + start + ROUNDING_SECONDS, start, np.nextafter(end, start))
        unique, where = np.unique(moments, return_inverse=True)
        try:
            images = self._decoder.get_frames_played_at(unique.tolist()).data.numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise self._broken(error) from error
        scaled = self._scaled(images, short_side)
        return [scaled[place] for place in where]
