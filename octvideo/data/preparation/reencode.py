"""One video: decoded to its end, and written again on the way."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from octvideo.data.pyav_reader import frame_rate, has_guessed_times, open_stream, to_the_end
from octvideo.data.reader import EARLY_END_SECONDS, upright_turns
from octvideo.data.watchdog import still_alive
from octvideo.errors import DecodeError
from octvideo.files import appearing, blocks

# What is wrong with the machine, not with a video: tried again by the next run. FFmpeg has some of them for broken
# content too.
ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENODEV),
}
# A clip decodes from the key frame before it: with one every 32 frames that is 16 frames in vain, on average. No
# arithmetic coding, deblocking and weighted prediction (fastdecode): twice the frames a second for a tenth more bytes.
# B-frames that no other refers to can be skipped by a decoder. The same machine instructions for any alignment of
# memory (cpu-independent): the same bytes for the same frames.
ENCODER = {
    "crf": "23",
    "preset": "faster",
    "tune": "fastdecode",
    "g": "32",
    "bf": "3",
    "threads": "1",
    "x264-params": "b-pyramid=none:cpu-independent=1",
}


class Measurements(NamedTuple):
    """What decoding a video to its end tells.

    Args:
        frames: how many there are.
        fps: average frame rate, in frames per second.
        width: pixels of an upright frame.
        height: as width.
        codec: its name, such as h264.
        seconds: from the first frame's start to the last one's end.
        keyframe_seconds: when key frames are shown, from the start of the video.
        note: what is odd about it, or nothing.
    """

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    seconds: float
    keyframe_seconds: list[float]
    note: str


class _Reader:
    """Decodes a video to its end, and measures it on the way."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.frames = 0
        self._keyframes: list[float] = []
        self._damaged = 0
        self._last_moment = 0
        self._end = 0.0  # of the last frame, from the start of the video
        self._last_packet = 0.0  # of any stream

    def __enter__(self) -> _Reader:
        with self._named_errors():
            self._container, stream = open_stream(self.path)
        assert stream.time_base is not None
        try:
            self.rate = frame_rate(stream, self.path)
        except DecodeError:
            self._container.close()
            raise
        self.stream, self.time_base = stream, stream.time_base
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def decode(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """All frames with their moments, in units of the time base from the start of the video.

        Raises:
            DecodeError: invalid data, or no frame.
            OSError: the file could not be read.
        """
        start, step = self.stream.start_time or 0, max(1, round(1 / (self.rate * self.time_base)))
        counted = has_guessed_times(self._container, self.stream)
        moment = -step
        with self._named_errors():
            for packet in to_the_end(self._container.demux()):
                if packet.pts is not None and packet.time_base is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._last_packet = max(self._last_packet, end)
                for frame in packet.decode() if packet.stream.index == self.stream.index else ():
                    assert isinstance(frame, av.VideoFrame)
                    moment = moment + step if counted or frame.pts is None else frame.pts - start
                    self._measure(moment, frame)
                    yield moment, frame
        if not self.frames:
            raise DecodeError(self.path, "no frame could be decoded")

    def _measure(self, moment: int, frame: av.VideoFrame) -> None:
        still_alive()
        if min(frame.width, frame.height) < 1:
            raise DecodeError(self.path, f"frames of {frame.width} x {frame.height} pixels")
        if not self.frames:
            self._size = (frame.height, frame.width) if upright_turns(frame) % 2 else (frame.width, frame.height)
        self.frames += 1
        self._last_moment = max(self._last_moment, moment)
        self._damaged += frame.is_corrupt
        if frame.key_frame:
            self._keyframes.append(float(moment * self.time_base))
        length = max(float(1 / self.rate), float((frame.duration or 0) * self.time_base))
        self._end = max(self._end, float(moment * self.time_base) + length)

    def measurements(self) -> Measurements:
        """What was seen, once all is decoded.

        Raises:
            DecodeError: the file ends long before its header says, so it is cut off; or all frames have one timestamp.
        """
        if self.frames > 1 and self._last_moment <= 0:
            raise DecodeError(self.path, f"its {self.frames} frames have one timestamp")
        stream, declared, end = self.stream, 0.0, self._end
        if stream.duration is not None:
            declared = float(stream.duration * self.time_base)
        elif self._container.duration is not None:  # Matroska's counts its sound too, and the time before the start
            declared, end = self._container.duration / av.time_base, max(end, self._last_packet)
        if end + EARLY_END_SECONDS < declared:
            raise DecodeError(self.path, f"ends after {end:.2f} s, and its header says {declared:.2f} s")
        notes = [f"its header says {stream.frames} frames"] if stream.frames not in (0, self.frames) else []
        notes += [f"{self._damaged} frames are damaged"] if self._damaged else []
        codec = stream.codec_context.codec.canonical_name
        keyframes = sorted(self._keyframes)
        return Measurements(self.frames, float(self.rate), *self._size, codec, self._end, keyframes, "; ".join(notes))

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            after = f" (after {self.frames} frames)" if self.frames else ""
            reason = f"{error.strerror or type(error).__name__}{after}"
            if machine_error(error) is not None:
                for _ in blocks(self.path):  # which fails where the machine does
                    still_alive()
                reason += ", though its bytes can be read"
            raise DecodeError(self.path, reason) from error


def machine_error(error: av.error.FFmpegError | OSError) -> OSError | None:
    """An error as the operating system's, if the machine is to blame and not the video."""
    return OSError(error.errno, os.strerror(error.errno)) if error.errno in ENVIRONMENT else None


def measure(path: str | os.PathLike[str]) -> Measurements:
    """Decodes a video to its end.

    Raises:
        DecodeError: it is no video, broken, or cut off.
        OSError: the file could not be read, and the file is not to blame.
    """
    with _Reader(os.fspath(path)) as reader:
        for _ in reader.decode():
            pass
        return reader.measurements()


def reencode(path: str | os.PathLike[str], output: Path, short_side: int) -> tuple[Measurements, Measurements]:
    """Writes a video again so that random clips of it decode fast, and checks it on the way.

    The output is an mp4 file of h264 with a key frame at least every 32 frames, without sound: all frames at their
    moments from the first one on, upright, of even height and width. It appears whole or not at all, and is the same,
    byte for byte, whenever it is made from the same file.

    Args:
        path: the file.
        output: the new one; its folder is made if it is not there.
        short_side: pixels that the shorter side of larger frames is scaled to; smaller ones keep their size.

    Returns:
        What the two files measure.

    Raises:
        DecodeError: the file is no video, broken, or cut off, or cannot be encoded.
        OSError: the disk is full, or the like.
    """
    with _Reader(os.fspath(path)) as reader, appearing(output) as partial:
        try:
            with av.open(
                os.fspath(partial), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
            ) as container:
                _encode(reader, container, short_side)
        except av.error.FFmpegError as error:
            raise machine_error(error) or DecodeError(reader.path, f"cannot be encoded: {error.strerror}") from error
        measured = reader.measurements()
        try:
            written = measure(partial)
        except DecodeError as error:
            raise OSError(errno.EIO, f"what was written cannot be read: {error.reason}") from error
        if written.frames != measured.frames:
            raise OSError(errno.EIO, f"{written.frames} of {measured.frames} frames were written")
    return measured, written


def _encode(reader: _Reader, container: av.container.OutputContainer, short_side: int) -> None:
    scaler, stream, size, first, previous = VideoReformatter(), None, (0, 0), 0, -1
    for moment, frame in reader.decode():
        turn = upright_turns(frame)
        if stream is None:
            size = _even_size(frame, short_side)
            stream = container.add_stream("libx264", rate=Fraction(reader.rate), options=ENCODER)
            stream.width, stream.height = size[::-1] if turn % 2 else size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = reader.time_base
            for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
                setattr(stream.codec_context, name, int(getattr(frame, name)))
            first = moment
        scaled = scaler.reformat(frame, *size, "yuv420p", interpolation="BICUBIC", threads=1)
        image = _turned(scaled, turn) if turn else scaled
        previous = max(moment - first, previous + 1)  # the encoder wants moments that rise
        image.pts, image.time_base = previous, reader.time_base
        image.pict_type = 0  # the encoder decides anew
        container.mux(stream.encode(image))
    assert stream is not None
    container.mux(stream.encode())


def _even_size(frame: av.VideoFrame, short_side: int) -> tuple[int, int]:
    """(width, height) of the output before it is turned."""
    scale = min(1.0, short_side / min(frame.width, frame.height))
    return max(2, 2 * round(frame.width * scale / 2)), max(2, 2 * round(frame.height * scale / 2))


def _turned(frame: av.VideoFrame, quarters: int) -> av.VideoFrame:
    """A yuv420p frame, turned counter-clockwise."""
    stored = frame.to_ndarray()
    height, width = frame.height, frame.width
    luma, chroma = stored[:height], stored[height:].reshape(2, height // 2, width // 2)
    planes = [np.rot90(plane, quarters) for plane in (luma, *chroma)]
    turned_width = planes[0].shape[1]
    joined = np.concatenate([plane.reshape(-1) for plane in planes]).reshape(-1, turned_width)
    return av.VideoFrame.from_ndarray(joined, format="yuv420p")
