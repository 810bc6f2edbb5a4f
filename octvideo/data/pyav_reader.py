"""Reading through PyAV: the default backend, and the loop that decodes a file to its end."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, TypeAlias

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from octvideo.data.index import IndexedVideo
from octvideo.data.reader import READING_ERRORS, ROUNDING_SECONDS, Image, Reader, Times, decode_errors
from octvideo.errors import DecodeError, UnreadableError

Packet: TypeAlias = "av.Packet[Any]"
BUFFERED_BYTES = 64 * 2**20  # of packets that are read ahead of decoding
PLAYLISTS = {"hls", "concat", "dash", "webm_dash_manifest", "imf"}  # FFmpeg would open whatever files they name


def open_stream(path: str) -> tuple[InputContainer, av.VideoStream]:
    """Opens a file and selects its main video stream, to be decoded in one thread.

    Raises `READING_ERRORS` where that fails, DecodeError without video, and UnreadableError without a decoder.
    """
    container = av.open(os.path.abspath(path), metadata_errors="ignore")  # a relative path with a colon is an address
    kind, stream = container.format.name, container.streams.best("video")  # not the smaller of two
    cover = stream is not None and stream.disposition & Disposition.attached_pic  # of a sound file
    if not PLAYLISTS.isdisjoint(kind.split(",")):
        error = DecodeError(path, f"a playlist ({kind}), which names other files")
    elif not isinstance(stream, av.VideoStream) or stream.time_base is None or cover:
        error = DecodeError(path, "no video stream")
    elif stream.codec_context is None:
        error = UnreadableError(path, "no decoder for its codec")
    elif is_still(kind, stream):
        error = DecodeError(path, "a still image, not a video")
    else:
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        return container, stream
    container.close()
    raise error


def is_still(kind: str, stream: av.VideoStream) -> bool:
    """Whether a stream of a container of this kind is a picture: a file of one, or a GIF, AVIF or HEIC of no length."""
    picture = kind.endswith("_pipe") or kind in ("image2", "ico")
    return stream.codec_context.width > 0 if picture else stream.frames == 1 and not stream.duration


def frame_rate(stream: av.VideoStream, path: str) -> Fraction:
    """Average frames per second of a stream; a DecodeError if it has none."""
    if not (rate := stream.average_rate or stream.guessed_rate):
        raise DecodeError(path, "the video stream has no frame rate")
    return rate


def has_guessed_times(container: InputContainer, stream: av.VideoStream) -> bool:
    """Whether FFmpeg guesses timestamps wrongly: AVI stores none, and MPEG program streams only some."""
    return container.format.name in ("avi", "mpeg") and bool(stream.codec_context.has_b_frames)


def packets_of(container: InputContainer, *streams: av.VideoStream) -> Iterator[Packet]:
    """The packets of these streams, or of all, from here to the end of the file."""
    # Where a stream appears in the middle of a file, PyAV may read past its list of streams after the last packet.
    with contextlib.suppress(IndexError):
        yield from container.demux(*streams)


def decode_all(
    container: InputContainer, stream: av.VideoStream, step: int, see_packet: Callable[[Packet], None] | None = None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decodes a stream to its end: (time, frame), times in units of stream.time_base from the stream's start.

    Frames whose timestamps are missing or guessed come a step after the one before. If given, see_packet is called with
    every packet of every stream of the file.
    """
    counted, start, time = has_guessed_times(container, stream), stream.start_time or 0, -step
    for packet in packets_of(container) if see_packet else packets_of(container, stream):
        if see_packet is not None:
            see_packet(packet)
        for frame in packet.decode() if packet.stream.index == stream.index else ():
            time = time + step if counted or frame.pts is None else frame.pts - start
            yield time, frame


class PyAvReader(Reader):
    """Reads through PyAV, which brings FFmpeg with it.

    Decoding runs in one thread, because a data loader already has a process for each core. Packets are read from a key
    frame on, until it is known which of them hold the wanted frames; these and what they refer to are decoded.
    """

    def __init__(self, path: str, known: IndexedVideo | None) -> None:
        super().__init__(path, known)
        self.frames_decoded: int = 0
        self._unordered = False  # timestamps turned out not to rise, so frames are counted from the start of the file
        self._open()
        self.fps, self.duration_seconds = (known.fps, known.duration_seconds) if known else self._measure()

    def _open(self) -> None:
        with decode_errors(self.path, *READING_ERRORS, raised=UnreadableError):
            self._container, self._stream = open_stream(self.path)
        self._time_base, self._start_time = float(self._stream.time_base or 0), self._stream.start_time or 0

    @property
    def _counted(self) -> bool:
        return self._unordered or has_guessed_times(self._container, self._stream)

    def _measure(self) -> tuple[float, float]:
        """Frames per second and seconds, from the stream's header if it has them."""
        fps = float(frame_rate(self._stream, self.path))
        guessed = self._container.format.name == "mpeg"  # a program stream has no header that says how long it is
        if self._stream.duration is not None and not guessed:
            return fps, self._stream.duration * self._time_base
        # The container's duration counts sound too and, in Matroska, the time before the first frame: read timestamps.
        with decode_errors(self.path, *READING_ERRORS):
            for start in (None,) if guessed else ((self._container.duration or 0) / av.time_base, None):
                self._seek(start)
                last, count = self._read_timestamps()
                if last > 0:  # else nothing comes after a jump to the end, or there are no true timestamps
                    break
        self._unordered = last <= 0 and count > 1
        return fps, last + 1 / fps if last > 0 and not guessed else max(1, count) / fps

    def _read_timestamps(self) -> tuple[float, int]:
        """The last timestamp from here to the end, in seconds, or 0 if there is none; and the number of packets."""
        packets = [(packet.pts, packet.size) for packet in packets_of(self._container, self._stream)]
        last = max((pts for pts, _ in packets if pts is not None), default=self._start_time)
        return max(0.0, (last - self._start_time) * self._time_base), sum(size > 0 for _, size in packets)

    def read(self, times: Times, short_side: int | None) -> list[Image]:
        # Key frames are seldom further apart than 10 seconds: a longer gap is worth a seek.
        far = np.diff(times) > (math.inf if self._counted else 10)
        images: list[Image] = []
        with decode_errors(self.path, *READING_ERRORS):
            for span in np.split(times, np.flatnonzero(far) + 1):
                selected = None if self._counted else self._read_selected(span, short_side)
                images += selected or self._read_in_order(span, short_side)
        return images

    def _read_selected(self, times: Times, short_side: int | None) -> list[Image] | None:
        """Decodes what the wanted frames need, by the packets' timestamps; None where these do not lead to them."""
        for earlier in (0, 2, 8, 30):  # seconds, where a seek does not lead to the key frame before a time
            self._seek(max(0.0, times[0] - earlier))
            if (found := self._packets_until(times[-1] + ROUNDING_SECONDS)) is None:
                return None
            packets, ended = found
            stamps = np.array([packet.pts for packet in packets], np.int64)
            unique, rows, counts = np.unique(stamps, return_index=True, return_counts=True)
            seconds = (unique - self._start_time) * self._time_base
            shown = np.searchsorted(seconds, times + ROUNDING_SECONDS, "right") - 1
            # Some frames that follow the key frame in the file and are shown before it cannot be decoded.
            if shown[0] >= 0 and unique[shown[0]] >= stamps[0]:
                break
        else:
            return None
        if (counts[shown] > 1).any():  # two frames of one time
            return None
        if ended and shown[-1] == len(unique) - 1:
            length = max(1 / self.fps, (packets[rows[-1]].duration or 0) * self._time_base)
            self._check_end(float(seconds[-1]) + length, times[-1])
        wanted, previous = unique[shown].tolist(), -math.inf
        images: dict[int, Image] = {}
        for frame in self._decode_packets(packets, set(rows[shown].tolist())):
            self.frames_decoded += 1
            if frame.pts is None or frame.pts < previous:
                return None
            previous = frame.pts
            if frame.pts in wanted and frame.pts not in images:
                images[frame.pts] = self._image(frame, short_side)
        return [images[stamp] for stamp in wanted] if images.keys() == set(wanted) else None

    def _packets_until(self, seconds: float) -> tuple[list[Packet], bool] | None:
        """Packets to the last that may be shown by then, and whether the file ends there; None if they are no use."""
        packets: list[Packet] = []
        size = 0
        for packet in packets_of(self._container, self._stream):
            # Packets come in the order of decoding; no frame is shown before it is decoded.
            late = packet.dts is not None and (packet.dts - self._start_time) * self._time_base > seconds
            if late and packet.size > 0:
                return packets, False
            if packet.size > 0 and (packets or packet.is_keyframe):
                packets.append(packet)
                size += packet.size
                if packet.pts is None or size > BUFFERED_BYTES:
                    return None
        return packets, True

    def _decode_packets(self, packets: list[Packet], wanted: set[int]) -> Iterator[av.VideoFrame]:
        """Decodes the packets with these indices, and those from a key frame on that they are predicted from."""
        stamps = [packet.pts or 0 for packet in packets]
        needed: set[int] = set()
        for index in wanted:
            key = index
            while not packets[key].is_keyframe or stamps[key] > stamps[index]:  # it may be shown before a key frame
                key -= 1
            needed.update(range(key, index + 1))
        context, previous = self._stream.codec_context, None
        # In these codecs, frames that no other frame refers to can be left out without a trace in the others.
        skipping = context.codec.name in ("h264", "mpeg4", "mpeg2video", "mpeg1video")
        for index in sorted(needed):
            if previous not in (None, index - 1):
                yield from context.decode(None)
                context.flush_buffers()
            if skipping:
                context.skip_frame = "DEFAULT" if index in wanted else "NONREF"
            yield from context.decode(packets[index])
            previous = index
        yield from context.decode(None)

    def _read_in_order(self, times: Times, short_side: int | None) -> list[Image]:
        """Decodes every frame from the key frame before the first time to the last time."""
        images: list[Image] = []
        frames = itertools.chain(self.frames_from(times[0]), [(math.inf, None)])
        for (start, frame), (end, following) in itertools.pairwise(frames):
            assert frame is not None
            if end < start:
                self._unordered = True
                return self._read_in_order(times, short_side)
            if following is None:
                self._check_end(start + max(1 / self.fps, (frame.duration or 0) * self._time_base), times[-1])
            count = int(np.searchsorted(times + ROUNDING_SECONDS, end))  # times before the end of this frame
            if count > len(images):
                images += [self._image(frame, short_side)] * (count - len(images))
            if count == len(times):
                break
        return images

    def frames_from(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decodes (seconds, frame) from the last key frame that is not after the given time; at least one frame."""
        for start in (None if self._counted else seconds, None):
            self._seek(start)
            counted, step, found = self._counted, max(1, round(1 / (self.fps * self._time_base))), False
            for count, (time, frame) in enumerate(decode_all(self._container, self._stream, step)):
                self.frames_decoded += 1
                shown = count / self.fps if counted else time * self._time_base
                if start is not None and not found and (frame.pts is None or shown > seconds + ROUNDING_SECONDS):
                    break  # nothing says when it is shown, or an index led too far
                found = True
                yield shown, frame
            if found:
                return
        raise UnreadableError(self.path, "no frame could be decoded")

    def _seek(self, seconds: float | None) -> None:
        """Goes to the last key frame that is not after the time; to the start for None, or where that fails."""
        with contextlib.suppress(av.error.FFmpegError):
            if seconds is not None:
                if self.known is not None and len(self.known.keyframe_seconds) > 0:
                    row = int(np.searchsorted(self.known.keyframe_seconds, seconds + ROUNDING_SECONDS, "right")) - 1
                    # In files that were cut, a key frame that is not shown comes before the first in the index.
                    seconds = float(self.known.keyframe_seconds[row]) if row >= 0 else seconds
                self._stream.codec_context.skip_frame = "DEFAULT"
                self._container.seek(round(seconds / self._time_base) + self._start_time, stream=self._stream)
                return
        self.close()  # a seek to time 0 does not always lead to the start
        self._open()

    def close(self) -> None:
        self._container.close()
