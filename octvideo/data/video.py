"""Decoding: the frames of a video file that are shown at given moments."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from types import TracebackType

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

ROUNDING_SECONDS = 0.001  # Matroska rounds timestamps to milliseconds; a frame may be that early for k / fps
EARLY_END_SECONDS = 1.0  # headers are off by some frames in many good files


class DecodeError(ValueError):
    """A video that cannot be decoded.

    Args:
        path: the file.
        reason: what is wrong with it, in one line.
    """

    def __init__(self, path: str, reason: str = "") -> None:
        # A loader's worker process rebuilds an error from its message alone.
        super().__init__(f"{path}: {reason}" if reason else path)
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
        picture = stream is not None and stream.disposition & Disposition.attached_pic  # the cover of a sound file
        if not isinstance(stream, av.VideoStream) or stream.time_base is None or picture:
            self.close()
            raise DecodeError(self.path, "no video stream")
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._time_base = stream.time_base
        self._start_seconds = float((stream.start_time or 0) * stream.time_base)

    def _measure(self) -> tuple[float, float]:
        """Frames per second and seconds, from the stream's header if it has them."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate:
            raise DecodeError(self.path, "the video stream has no frame rate")
        if self._stream.duration is not None:
            return float(rate), float(self._stream.duration * self._time_base)
        # The container's duration counts its sound too and, in Matroska, the time before the first frame: read the
        # timestamps from the last key frame on, or all of them, without decoding.
        end = (self._container.duration or 0) / av.time_base
        last = 0.0
        try:
            self._seek(end)
            for packet in self._container.demux(self._stream):
                if packet.pts is not None:
                    last = max(last, float(packet.pts * self._time_base) - self._start_seconds)
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        return float(rate), last + 1 / float(rate)

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
            DecodeError: no frame, invalid data before the last moment, or an end more than a second too early.
        """
        order = np.argsort(times_seconds, kind="stable")
        frames = self._frames_from(float(times_seconds[order[0]]))
        seconds, current = next(frames)
        upcoming = next(frames, None)
        size = self._scaled_size(current, short_side)
        images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(order)
        image = None
        for place in order:
            reach = times_seconds[place] + ROUNDING_SECONDS
            while upcoming is not None and upcoming[0] <= reach:
                (seconds, current), image = upcoming, None
                upcoming = next(frames, None)
            if upcoming is None:
                self._check_end(seconds, current, float(times_seconds[place]))
            if image is None:
                image = self._to_rgb(current, size)
            images[place] = image
        return np.stack(images)

    def _frames_from(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decodes (seconds, frame) from the last key frame that is not after the given moment; at least one frame."""
        decoded = self._decode(seconds)
        first = next(decoded, None)
        # An index may lead too far, or past the last key frame; frames without timestamps have no place after a jump.
        if first is None or first[0] > seconds + ROUNDING_SECONDS:
            decoded = self._decode(0)
            first = next(decoded, None)
        if first is None:
            raise DecodeError(self.path, "no frame could be decoded")
        yield first
        yield from decoded

    def _decode(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        try:
            self._seek(seconds)
            # Frames without timestamps can be counted from the start, but not after a jump.
            shown_seconds = 0.0 if seconds <= 0 else math.inf
            previous_seconds = None
            for frame in self._container.decode(self._stream):
                assert isinstance(frame, av.VideoFrame)
                if frame.time is not None:
                    shown_seconds = frame.time - self._start_seconds
                elif previous_seconds is not None:
                    shown_seconds = previous_seconds + 1 / float(self._stream.guessed_rate or 25)
                previous_seconds = shown_seconds
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

    def _check_end(self, last_seconds: float, last: av.VideoFrame, wanted_seconds: float) -> None:
        """Refuses to hold the last frame of a file that ends long before its header says, one cut off in the middle."""
        end = last_seconds + max(1 / self.fps, float((last.duration or 0) * self._time_base))
        if end + EARLY_END_SECONDS < min(wanted_seconds, self.duration_seconds):
            raise DecodeError(self.path, f"ends after {end:.2f} s, and its header says {self.duration_seconds:.2f} s")

    def _scaled_size(self, frame: av.VideoFrame, short_side: int | None) -> tuple[int, int]:
        """(width, height) that all frames get, even if the picture's size changes on the way."""
        if min(frame.width, frame.height) < 1:
            raise DecodeError(self.path, f"frames of {frame.width} x {frame.height} pixels")
        scale = 1.0 if short_side is None else short_side / min(frame.width, frame.height)
        return max(1, round(frame.width * scale)), max(1, round(frame.height * scale))

    def _to_rgb(self, frame: av.VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
        width, height = size
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
