"""Reading through torchcodec, if it is installed and finds FFmpeg's libraries."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from octvideo.data.reader import ROUNDING_SECONDS, Image, LibraryReader, Times, decode_errors, one_line
from octvideo.data.source import Media
from octvideo.errors import UnreadableError, UserError


class TorchcodecReader(LibraryReader):
    """Asks torchcodec for the frames that are shown at the times."""

    def __init__(self, media: Media) -> None:
        super().__init__(media)
        path = media.name
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as error:
            cure = "it needs FFmpeg's libraries, which apt-get install ffmpeg installs"
            raise UserError(f"the backend torchcodec is not installed, or {cure}: {one_line(error)}") from error
        with decode_errors(path, RuntimeError, ValueError, raised=UnreadableError):
            self._decoder = VideoDecoder(cast(Any, media.open()), dimension_order="NHWC", num_ffmpeg_threads=1)
        metadata = self._decoder.metadata
        start, end, fps = metadata.begin_stream_seconds, metadata.end_stream_seconds, metadata.average_fps
        if start is None or end is None or not fps:
            raise UnreadableError(path, "no frame could be decoded")
        measured = max(end - start, metadata.duration_seconds_from_header or 0)
        if self._kind == "avi":  # its guessed timestamps start late
            late = self._decoder.get_frame_at(0).pts_seconds - start
            start, end = start + late, end + late
        self._start_seconds, self._end_seconds = start, end
        self.fps, self.duration_seconds = self._stated or (fps, measured)

    def read(self, times: Times, short_side: int | None) -> Sequence[Image]:
        start, end = self._start_seconds, self._end_seconds
        if times[-1] + start >= end:
            self._check_end(end - start, times[-1])
        shown = np.maximum(times + start + ROUNDING_SECONDS, start)
        late = int((shown >= end).sum())  # the last frame, which need not have a length
        with decode_errors(self.path, RuntimeError, IndexError, ValueError):
            frames = self._decoder.get_frames_played_at(shown[: len(shown) - late].tolist())
            images = frames.data.numpy()
            if (frames.pts_seconds.numpy() > shown[: len(shown) - late]).any():  # as at the start of transport streams
                raise UnreadableError(self.path, "a seek led to a later frame")
            if late:
                last = self._decoder.get_frame_at(len(self._decoder) - 1).data.numpy()
                images = np.concatenate([images.reshape(-1, *last.shape), np.repeat(last[None], late, 0)])
        return self._upright(images, short_side)
