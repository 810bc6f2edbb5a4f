"""Decoding: the frames of a video file that are shown at given moments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray


class DecodeError(ValueError):
    """A video that cannot be decoded.

    Args:
        path: the file.
        reason: what is wrong with it, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class Video:
    """An open video file, read through PyAV. Use it in a `with` statement.

    Frames are found by their timestamps: the frame count in a header is often wrong, and frame number times frame
    rate is wrong for a variable rate. Decoding runs in one thread, because a data loader already has a process a core.

    Args:
        path: the file.

    Attributes:
        fps: average frame rate, in frames per second.
        duration_seconds: how long the file says that the video runs.

    Raises:
        DecodeError: the file is missing, no video, or broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            self._container = av.open(self.path, metadata_errors="ignore")
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        try:
            self._open_stream()
        except DecodeError:
            self.close()
            raise

    def _open_stream(self) -> None:
        stream = self._container.streams.best("video")  # not a cover picture, nor the smaller of two
        if stream is None:
            raise DecodeError(self.path, "no video stream")
        rate = stream.average_rate or stream.guessed_rate
        if not rate or stream.time_base is None:
            raise DecodeError(self.path, "the video stream has no frame rate")
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._scaler = VideoReformatter()  # one for all frames: setting it up takes longer than scaling a small frame
        self._start_seconds = float((stream.start_time or 0) * stream.time_base)
        self.fps = float(rate)
        if stream.duration is not None:
            self.duration_seconds = float(stream.duration * stream.time_base)
        elif self._container.duration is not None:
            self.duration_seconds = self._container.duration / av.time_base
        else:
            *_, (last_seconds, _) = self._frames_from(0)
            self.duration_seconds = last_seconds + 1 / self.fps

    def frames_at(
        self, times_seconds: Sequence[float] | NDArray[np.float64], short_side: int | None = None
    ) -> NDArray[np.uint8]:
        """The frames nearest to the given moments.

        Seeks to the key frame before the first moment and decodes up to the last one, in one pass. A moment before
        the first or after the last frame gives that frame, so a clip from a video that is too short holds its last
        frame. Rotation in the metadata is applied.

        Args:
            times_seconds: T moments, from the start of the video, in any order.
            short_side: scale the frames so that the shorter side has this many pixels; by default they keep their size.

        Returns:
            RGB frames (T, H, W, 3).

        Raises:
            DecodeError: no frame, or invalid data before the last moment.
        """
        order = np.argsort(times_seconds, kind="stable")
        frames = self._frames_from(float(times_seconds[order[0]]))
        _, current = next(frames)
        upcoming = next(frames, None)
        images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(order)
        image = None
        for place in order:
            reach = times_seconds[place] + 0.5 / self.fps
            while upcoming is not None and upcoming[0] <= reach:
                current, image = upcoming[1], None
                upcoming = next(frames, None)
            if image is None:
                image = self._to_rgb(current, short_side)
            images[place] = image
        return np.stack(images)

    def _frames_from(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decodes (seconds, frame) from the last key frame that is not after the given moment; at least one frame."""
        decoded = self._decode(seconds)
        first = next(decoded, None)
        if first is None or first[0] > seconds:  # an index that leads too far, or past the last key frame
            decoded = self._decode(0)
            first = next(decoded, None)
        if first is None:
            raise DecodeError(self.path, "no frame could be decoded")
        yield first
        yield from decoded

    def _decode(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        try:
            target = int((seconds + self._start_seconds) / self._stream.time_base)
            self._container.seek(target, stream=self._stream)
            shown_seconds = 0.0
            for frame in self._container.decode(self._stream):
                if frame.time is not None:
                    shown_seconds = frame.time - self._start_seconds
                else:  # no timestamp: it follows the frame before it
                    shown_seconds += 1 / self.fps
                yield shown_seconds, frame
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error

    def _to_rgb(self, frame: av.VideoFrame, short_side: int | None) -> NDArray[np.uint8]:
        scale = 1.0 if short_side is None else short_side / min(frame.width, frame.height)
        width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        try:
            rgb = self._scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
            image: NDArray[np.uint8] = rgb.to_ndarray()
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        # The angle is counter-clockwise; a matrix that is no rotation reads as some nonsense angle.
        return np.rot90(image, frame.rotation // 90) if frame.rotation in (-180, -90, 90, 180) else image

    def _broken(self, error: Exception) -> DecodeError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return DecodeError(self.path, reason or type(error).__name__)

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
