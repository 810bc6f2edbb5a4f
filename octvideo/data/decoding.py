"""How the videos of a list are opened, and become the frames of clips."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octvideo.data.index import IndexedVideo, VideoIndex
from octvideo.data.lists import VideoList
from octvideo.data.reader import Backend, Image
from octvideo.data.sampling import Sampling
from octvideo.data.source import Source
from octvideo.data.video import Video

NO_VIDEO = -1


class Decoding(NamedTuple):
    """How the videos of a list become frames."""

    videos: VideoList
    sampling: Sampling
    backend: Backend = "auto"
    timeout_seconds: float | None = None  # a video that takes longer is bad; None: no limit, and no process of its own
    known: VideoIndex | None = None
    rows: NDArray[np.int64] | None = None  # of the list's videos in the index; -1 for those that it lacks
    source: Source | None = None  # where the videos are; None: `AnySource`

    def open(self, index: int) -> Video:
        """Opens a video of the list, with what is known of it."""
        return Video(self.videos.paths[index], self.backend, known=self._known(index), source=self.source)

    def expect(self, index: int) -> None:
        """Tells the source which video comes next."""
        if self.source is not None and index != NO_VIDEO:
            self.source.expect(self.videos.paths[index], self._known(index))

    def _known(self, index: int) -> IndexedVideo | None:
        if self.known is None or self.rows is None or self.rows[index] < 0:
            return None
        return self.known[int(self.rows[index])]


def clips_of(video: Video, frame_numbers: NDArray[np.int64], short_side: int) -> list[list[Image]]:
    """Decodes, in one pass, V clips of T images (H, W, 3), the shorter side scaled to `short_side` pixels.

    Each of the (V, T) frame numbers, at the average frame rate, stands for the middle of the time that it is shown.
    """
    images = iter(video.images_at((frame_numbers.ravel() + np.float64(0.5)) / video.fps, short_side))
    return [[next(images) for _ in clip] for clip in frame_numbers]
