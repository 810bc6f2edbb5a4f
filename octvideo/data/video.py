"""Decoding: the frames of a video file that are shown at given moments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

ROUNDING_SECONDS = 0.001  # Matroska rounds timestamps to milliseconds; a frame may be that early for k / fps


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
        self._scaler = VideoReformatter()  # one for all frames: setting it up takes longer than scaling a small frame
        self._open()
        try:
            self.fps, self.duration_seconds = self._measure()
        except DecodeError:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self._container = av.open(self.path, metadata_errors="ignore")
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        stream = self._container.streams.best("video")  # not a cover picture, nor the smaller of two
        if not isinstance(stream, av.VideoStream) or stream.time_base is None:
            self.close()
            raise DecodeError(self.path, "no video stream")
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._time_base = stream.time_base
        self._start_seconds = float((stream.start_time or 0) * stream.time_base)

    def _measure(self) -> tuple[float, float]:
        """Frames per second and seconds, from the header if it has them."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate:
            raise DecodeError(self.path, "the video stream has no frame rate")
        if self._stream.duration is not None:
            return float(rate), float(self._stream.duration * self._time_base)
        if self._container.duration is not None:
            return float(rate), self._container.duration / av.time_base
        *_, (last_seconds, _) = self._frames_from(0)
        return float(rate), last_seconds + 1 / float(rate)

    def frames_at(
        self, times_seconds: Sequence[float] | NDArray[np.float64], short_side: int | None = None
    ) -> NDArray[np.uint8]:
        """The frames that a player would show at the given moments.

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
            reach = times_seconds[place] + ROUNDING_SECONDS
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
        if (
            first is None or first[0] > seconds + ROUNDING_SECONDS
        ):  # an index that leads too far, or past the last key frame
            decoded = self._decode(0)
            first = next(decoded, None)
        if first is None:
            raise DecodeError(self.path, "no frame could be decoded")
        yield first
        yield from decoded

    def _decode(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        try:
            self._seek(seconds)
            shown_seconds = 0.0
            for frame in self._container.decode(self._stream):
                assert isinstance(frame, av.VideoFrame)
                if frame.time is not None:
                    shown_seconds = frame.time - self._start_seconds
                else:  # no timestamp: it follows the frame before it
                    shown_seconds += 1 / float(self._stream.guessed_rate or 25)
                yield shown_seconds, frame
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error

    def _seek(self, seconds: float) -> None:
        """Goes to the last key frame that is not after the moment, or to the start of a file that cannot seek."""
        try:
            self._container.seek(int((seconds + self._start_seconds) / self._time_base), stream=self._stream)
        except av.error.FFmpegError:
            self.close()
            self._open()

    def _to_rgb(self, frame: av.VideoFrame, short_side: int | None) -> NDArray[np.uint8]:
        scale = 1.0 if short_side is None else short_side / min(frame.width, frame.height)
        width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        try:
            rgb = self._scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
            image = rgb.to_ndarray().astype(np.uint8, copy=False)
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        # The angle is counter-clockwise; a matrix that is no rotation reads as some nonsense angle.
        return np.rot90(image, frame.rotation // 90) if frame.rotation in (-180, -90, 90, 180) else image

    def _broken(self, error: Exception) -> DecodeError:
        return DecodeError(self.path, getattr(error, "strerror", None) or str(error) or type(error).__name__)

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
