"""One video: decoded to its end, and re-encoded on the way."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from octvideo.data.pyav_reader import decode_all, frame_rate, open_stream
from octvideo.data.reader import EARLY_END_SECONDS, upright_turns
from octvideo.data.watchdog import still_alive
from octvideo.errors import DecodeError
from octvideo.files import appearing, blocks

# Errors of the machine, not of a video, so the next run tries again. FFmpeg reports some of them for broken files too.
ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENODEV),
}
# A clip decodes from the key frame before it: with one every 32 frames, 16 frames are wasted on average. fastdecode (no
# arithmetic coding, deblocking, weighted prediction) decodes twice the frames a second for a tenth more bytes. Decoders
# can skip B-frames that no other frame refers to. cpu-independent: the same bytes whatever the alignment of memory.
ENCODER = {"crf": "23", "preset": "faster", "tune": "fastdecode", "g": "32", "bf": "3", "threads": "1"}
ENCODER["x264-params"] = "b-pyramid=none:cpu-independent=1"


class Measurements(NamedTuple):
    """A video as measured by decoding it to its end."""

    frames: int
    fps: float  # average
    width: int  # pixels of an upright frame
    height: int
    codec: str  # such as h264
    seconds: float  # from the first frame's start to the last one's end
    keyframe_seconds: list[float]  # timestamps, from the start of the video
    note: str  # what is odd about the file


class _Reader:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.frames = self.damaged = self.last_time = 0
        self.size, self.keyframes = (0, 0), list[float]()  # upright width and height; seconds
        self.end = self.last_packet = 0.0  # of the last frame and of the last packet of any stream, in seconds
        with self._named_errors():
            self._container, self.stream = open_stream(self.path)
        self.time_base, self.rate = cast(Fraction, self.stream.time_base), frame_rate(self.stream, self.path)
        self.close = self._container.close

    def decode(self) -> Iterator[tuple[int, av.VideoFrame]]:
        def see_packet(packet: "av.Packet[Any]") -> None:
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                self.last_packet = max(self.last_packet, float(end))

        step = max(1, round(1 / (self.rate * self.time_base)))
        with self._named_errors():
            for time, frame in decode_all(self._container, self.stream, step, see_packet):
                still_alive()
                if min(frame.width, frame.height) < 1:
                    raise DecodeError(self.path, f"frames of {frame.width} x {frame.height} pixels")
                if not self.frames:
                    self.size = (frame.height, frame.width) if upright_turns(frame) % 2 else (frame.width, frame.height)
                self.frames, self.damaged = self.frames + 1, self.damaged + frame.is_corrupt
                self.last_time, seconds = max(self.last_time, time), float(time * self.time_base)
                if frame.key_frame:
                    self.keyframes.append(seconds)
                length = max(1 / self.rate, (frame.duration or 0) * self.time_base)
                self.end = max(self.end, seconds + float(length))
                yield time, frame
        if not self.frames:
            raise DecodeError(self.path, "no frame could be decoded")

    def measurements(self) -> Measurements:
        if self.frames > 1 and self.last_time <= 0:
            raise DecodeError(self.path, f"its {self.frames} frames have one timestamp")
        stream, declared, end = self.stream, 0.0, self.end
        if stream.duration is not None:
            declared = float(stream.duration * self.time_base)
        elif self._container.duration is not None:  # Matroska's includes its sound, and the time before the first frame
            declared, end = self._container.duration / av.time_base, max(end, self.last_packet)
        if end + EARLY_END_SECONDS < declared:
            raise DecodeError(self.path, f"ends after {end:.2f} s, and its header says {declared:.2f} s")
        notes = [f"its header says {stream.frames} frames"] if stream.frames not in (0, self.frames) else []
        notes += [f"{self.damaged} frames are damaged"] if self.damaged else []
        codec, keyframes = stream.codec_context.codec.canonical_name, sorted(self.keyframes)
        return Measurements(self.frames, float(self.rate), *self.size, codec, self.end, keyframes, "; ".join(notes))

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            after = f" (after {self.frames} frames)" if self.frames else ""
            reason = f"{error.strerror or type(error).__name__}{after}"
            if machine_error(error) is not None:
                for _ in blocks(self.path):  # raises if the machine is to blame
                    still_alive()
                reason += ", though its bytes can be read"
            raise DecodeError(self.path, reason) from error


def machine_error(error: av.error.FFmpegError | OSError) -> OSError | None:
    """The error as the operating system's, if the machine is to blame and not the video."""
    return OSError(error.errno, os.strerror(error.errno)) if error.errno in ENVIRONMENT else None


def measure(path: str | os.PathLike[str]) -> Measurements:
    """Decodes a video to its end; DecodeError if it is not one, broken or truncated, OSError if it cannot be read."""
    with contextlib.closing(_Reader(path)) as reader:
        for _ in reader.decode():
            pass
        return reader.measurements()


def reencode(path: str | os.PathLike[str], output: Path, short_side: int) -> tuple[Measurements, Measurements]:
    """Re-encodes a video so that random clips of it decode fast; returns the measurements of both files.

    The output is an mp4 file of H.264 with a key frame at least every 32 frames, without sound: all frames at their
    timestamps relative to the first, upright, of even height and width, larger ones scaled to short_side pixels on the
    shorter side. It appears whole or not at all, and the same input always gives the same bytes.

    Raises DecodeError for a video that is broken, truncated or cannot be encoded; OSError if the disk is full, or so.
    """
    with contextlib.closing(_Reader(path)) as reader, appearing(output) as partial:
        flags = {"movflags": "+faststart", "fflags": "+bitexact"}
        try:
            with av.open(os.fspath(partial), "w", format="mp4", options=flags) as container:
                _encode(reader, container, short_side)
        except av.error.FFmpegError as error:
            raise machine_error(error) or DecodeError(reader.path, f"cannot be encoded: {error.strerror}") from error
        measured = reader.measurements()
        try:
            written = measure(partial)
        except DecodeError as error:
            raise OSError(errno.EIO, f"the output cannot be read: {error.reason}") from error
        if written.frames != measured.frames:
            raise OSError(errno.EIO, f"{written.frames} of {measured.frames} frames were written")
    return measured, written


def _encode(reader: _Reader, container: OutputContainer, short_side: int) -> None:
    scaler, stream, size, first, previous = VideoReformatter(), None, (0, 0), 0, -1
    for time, frame in reader.decode():
        turns = upright_turns(frame)
        if stream is None:
            scale = min(1.0, short_side / min(frame.width, frame.height))
            size = max(2, 2 * round(frame.width * scale / 2)), max(2, 2 * round(frame.height * scale / 2))
            stream = add_h264(container, ENCODER, reader.rate, reader.time_base, frame)
            stream.width, stream.height = size[::-1] if turns % 2 else size
            first = time
        scaled = scaler.reformat(frame, *size, "yuv420p", interpolation="BICUBIC", threads=1)
        image = from_planes(planes(scaled, turns)) if turns else scaled
        previous = max(time - first, previous + 1)  # the encoder wants rising timestamps
        image.pts, image.time_base = previous, reader.time_base
        image.pict_type = 0  # the encoder chooses its own key frames
        container.mux(stream.encode(image))
    assert stream is not None
    container.mux(stream.encode())


def add_h264(
    container: OutputContainer, options: dict[str, str], rate: Fraction, time_base: Fraction, like: av.VideoFrame
) -> av.VideoStream:
    """Adds a stream with a frame's colours."""
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.pix_fmt, stream.codec_context.time_base = "yuv420p", time_base
    for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
        setattr(stream.codec_context, name, int(getattr(like, name)))
    return stream


def planes(frame: av.VideoFrame, turns: int = 0) -> list[NDArray[np.uint8]]:
    """Y (H, W), U and V (H / 2, W / 2) of a yuv420p frame of even size, turned counter-clockwise by quarters."""
    stored, height, width = frame.to_ndarray(), frame.height, frame.width
    upright = (stored[:height], *stored[height:].reshape(2, height // 2, width // 2))
    return [np.rot90(plane, turns) for plane in upright]


def from_planes(parts: Sequence[NDArray[np.uint8]]) -> av.VideoFrame:
    """The yuv420p frame of Y, U and V."""
    joined = np.concatenate([plane.reshape(-1) for plane in parts])
    return av.VideoFrame.from_ndarray(joined.reshape(-1, parts[0].shape[1]), "yuv420p")
