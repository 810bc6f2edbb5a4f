"""One video: decoded to its end, and re-encoded on the way."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from octvideo.data.index import SPLICED
from octvideo.data.pictures_reader import PicturesReader
from octvideo.data.reader import EARLY_END_SECONDS, Orientation, shown_as, square_pixels
from octvideo.data.source import LocalFile, Media, Pictures
from octvideo.data.stream import Timing, decode_all, open_timed
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
    def __init__(self, media: Media) -> None:
        self.media, self.path = media, media.name
        self.frames = self.damaged = self.interlaced = 0
        self.size, self.keyframes = (0, 0), list[float]()  # upright width and height; seconds
        self.last = self.end = self.last_packet = 0.0  # seconds of the last frame, its end, and that of any stream
        self._open()

    def _open(self) -> None:
        with self._named_errors():
            self._container, self.stream, self.timing = open_timed(self.media)
        self.time_base = cast(Fraction, self.stream.time_base)
        self.close: Callable[[], None] = self._container.close

    def decode(self) -> Iterator[tuple[float, av.VideoFrame]]:
        def see_packet(packet: "av.Packet[Any]") -> None:
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                self.last_packet = max(self.last_packet, float(end))

        with self._named_errors():
            for seconds, frame in decode_all(self._container, self.stream, self.timing, see_packet):
                still_alive()
                if min(frame.width, frame.height) < 1:
                    raise DecodeError(self.path, f"frames of {frame.width} x {frame.height} pixels")
                if not self.frames:
                    self.size = shown_as(frame, self.stream)[0].size(frame.width, frame.height)
                self.frames, self.damaged = self.frames + 1, self.damaged + frame.is_corrupt
                self.last, self.interlaced = max(self.last, seconds), self.interlaced + frame.interlaced_frame
                if frame.key_frame:
                    self.keyframes.append(seconds)
                length = max(1 / self.timing.rate, (frame.duration or 0) * self.time_base)
                self.end = max(self.end, seconds + float(length))
                yield seconds, frame
        if not self.frames:
            raise DecodeError(self.path, "no frame could be decoded")

    def measurements(self) -> Measurements:
        if self.frames > 1 and self.last <= 0:
            raise DecodeError(self.path, f"its {self.frames} frames have one timestamp")
        stream, declared, end = self.stream, 0.0, self.end
        if self.timing.clock == "spliced":
            pass  # no header knows of the other clocks
        elif stream.duration is not None:
            declared = float(stream.duration * self.time_base)
        elif self._container.duration is not None:  # Matroska's includes its sound, and the time before the first frame
            declared, end = self._container.duration / av.time_base, max(end, self.last_packet)
        if end + EARLY_END_SECONDS < declared:
            raise DecodeError(self.path, f"ends after {end:.2f} s, and its header says {declared:.2f} s")
        notes = [self.timing.note] if self.timing.note else []
        notes += [f"its header says {stream.frames} frames"] if stream.frames not in (0, self.frames) else []
        notes += [f"{self.damaged} frames are damaged"] if self.damaged else []
        notes += ["interlaced"] if self.interlaced else []
        shape = stream.sample_aspect_ratio or 1
        notes += [f"pixels are not square: {shape.numerator}:{shape.denominator}"] if shape != 1 else []
        codec, numbers = stream.codec_context.codec.canonical_name, (self.frames, float(self.timing.rate), *self.size)
        keyframes = [SPLICED] if self.timing.clock == "spliced" else sorted(self.keyframes)
        return Measurements(*numbers, codec, self.end, keyframes, "; ".join(notes))

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            after = f" (after {self.frames} frames)" if self.frames else ""
            reason = f"{error.strerror or type(error).__name__}{after}"
            if machine_error(error) is not None:
                for _ in blocks(self.path) if isinstance(self.media, LocalFile) else ():  # raises if it is to blame
                    still_alive()
                reason += ", though its bytes can be read"
            raise DecodeError(self.path, reason) from error


class _PicturesReader(_Reader):
    """A folder of frames, each shown as long as the others."""

    media: Pictures

    def _open(self) -> None:
        self._pictures, rate = PicturesReader(self.media), Fraction(self.media.fps).limit_denominator(1001)
        self.timing, self.time_base = Timing(rate, len(self.media.files) / float(rate), 0), 1 / rate
        self.stream = cast(av.VideoStream, SimpleNamespace(sample_aspect_ratio=None))
        self.close = lambda: None

    def decode(self) -> Iterator[tuple[float, av.VideoFrame]]:
        for name in self.media.files:
            still_alive()
            seconds = float(self.frames * self.time_base)
            try:
                image = self._pictures.read(np.array([seconds]), None)[0]
            except DecodeError as error:
                raise DecodeError(self.path, f"{name} cannot be read as a picture") from error
            self.size, self.frames = (image.shape[1], image.shape[0]), self.frames + 1
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            yield seconds, VideoReformatter().reformat(picture, format="yuv420p", threads=1)

    def measurements(self) -> Measurements:
        kind, seconds = os.path.splitext(self.media.files[0])[1][1:].lower(), float(self.frames * self.time_base)
        return Measurements(self.frames, float(self.timing.rate), *self.size, kind, seconds, [0.0], "")


def _read(video: str | os.PathLike[str] | Media) -> _Reader:
    media = video if isinstance(video, Media) else LocalFile(os.fspath(video))
    return _PicturesReader(media) if isinstance(media, Pictures) else _Reader(media)


def machine_error(error: av.error.FFmpegError | OSError) -> OSError | None:
    """The error as the operating system's, if the machine is to blame and not the video."""
    return OSError(error.errno, os.strerror(error.errno)) if error.errno in ENVIRONMENT else None


def measure(video: str | os.PathLike[str] | Media) -> Measurements:
    """Decodes a video to its end; DecodeError if it is not one, broken or truncated, OSError if it cannot be read."""
    with contextlib.closing(_read(video)) as reader:
        for _ in reader.decode():
            pass
        return reader.measurements()


def reencode(video: str | os.PathLike[str] | Media, output: Path, short_side: int) -> tuple[Measurements, Measurements]:
    """Re-encodes a video so that random clips of it decode fast; returns the measurements of both files.

    The output is an mp4 file of H.264 with a key frame at least every 32 frames, without sound: all frames at their
    times relative to the first, as they are shown: upright, with square pixels, of even height and width, larger ones
    scaled to short_side pixels on the shorter side. It appears whole or not at all, and the same input always gives the
    same bytes.

    Raises DecodeError for a video that is broken, truncated or cannot be encoded; OSError if the disk is full, or so.
    """
    with contextlib.closing(_read(video)) as reader, appearing(output) as partial:
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
    scaler, stream, size, first, previous = VideoReformatter(), None, (0, 0), 0.0, -1
    for seconds, frame in reader.decode():
        orientation, shape = shown_as(frame, reader.stream)
        if stream is None:
            squared = square_pixels(frame.width, frame.height, shape)
            scale = min(1.0, short_side / min(squared))
            size = max(2, 2 * round(squared[0] * scale / 2)), max(2, 2 * round(squared[1] * scale / 2))
            stream = add_h264(container, ENCODER, reader.timing.rate, reader.time_base, frame)
            stream.width, stream.height = orientation.size(*size)
            first = seconds
        scaled = scaler.reformat(frame, *size, "yuv420p", interpolation="BICUBIC", threads=1)
        image = from_planes(planes(scaled, orientation)) if orientation != Orientation() else scaled
        previous = max(round((seconds - first) / reader.time_base), previous + 1)  # the encoder wants rising timestamps
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


def planes(frame: av.VideoFrame, orientation: Orientation) -> list[NDArray[np.uint8]]:
    """Y (H, W), U and V (H / 2, W / 2) of a yuv420p frame of even size, made upright."""
    stored, height, width = frame.to_ndarray(), frame.height, frame.width
    parts = (stored[:height], *stored[height:].reshape(2, height // 2, width // 2))
    return [orientation.apply(plane) for plane in parts]


def from_planes(parts: Sequence[NDArray[np.uint8]]) -> av.VideoFrame:
    """The yuv420p frame of Y, U and V."""
    joined = np.concatenate([plane.reshape(-1) for plane in parts])
    return av.VideoFrame.from_ndarray(joined.reshape(-1, parts[0].shape[1]), "yuv420p")
