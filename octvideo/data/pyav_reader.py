"""TODO."""

from __future__ import annotations

import bisect
import contextlib
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, TypeAlias, TypeVar

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from octvideo.data.reader import READING_ERRORS, ROUNDING_SECONDS, Image, KnownVideo, Reader, _reason
from octvideo.errors import DecodeError, UnreadableError

Item = TypeVar("Item")
Packet: TypeAlias = "av.Packet[av.VideoStream]"
SEEK_SECONDS = 10.0  # over a longer gap between two moments it is worth to seek: files with key frames rarer are few
EARLIER_SECONDS = (0.0, 2.0, 8.0, 30.0)  # tried where a seek does not lead to the key frame before a moment
BUFFERED_BYTES = 64 * 2**20  # of packets that are read ahead of decoding
# Codecs whose frames that no other frame refers to can be left out without a trace in the others.
SKIPPING_CODECS = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
PLAYLISTS = {"hls", "concat", "dash", "webm_dash_manifest", "imf"}  # FFmpeg would open whatever files they name


def open_stream(path: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Opens a file in PyAV, and the video stream in it that is meant, to be decoded in one thread.

    Raises:
        DecodeError: a list of other files, or no video stream; an UnreadableError if there is no decoder for it.
        av.error.FFmpegError: the file cannot be opened; an OSError if it cannot be read.
    """
    container = av.open(os.path.abspath(path), metadata_errors="ignore")  # a relative path with a colon is an address
    kind = container.format.name
    if not PLAYLISTS.isdisjoint(kind.split(",")):
        container.close()
        raise DecodeError(path, f"a playlist ({kind}), which names other files")
    stream = container.streams.best("video")  # not a cover picture, nor the smaller of two
    picture = stream is not None and stream.disposition & Disposition.attached_pic  # the cover of a sound file
    if not isinstance(stream, av.VideoStream) or stream.time_base is None or picture:
        container.close()
        raise DecodeError(path, "no video stream")
    if stream.codec_context is None:
        container.close()
        raise UnreadableError(path, "no decoder for its codec")
    stream.thread_type = "SLICE"
    stream.codec_context.thread_count = 1
    return container, stream


def frame_rate(stream: av.VideoStream, path: str) -> Fraction:
    """Average frames per second of a stream.

    Raises:
        DecodeError: it has none.
    """
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise DecodeError(path, "the video stream has no frame rate")
    return rate


def has_guessed_times(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether the frames' timestamps are wrong, and frames must be counted.

    AVI has no timestamps of display, and MPEG program streams have them for some frames only: those of frames that are
    stored out of order are guessed.
    """
    return container.format.name in ("avi", "mpeg") and bool(stream.codec_context.has_b_frames)


def to_the_end(read: Iterator[Item]) -> Iterator[Item]:
    """What PyAV demuxes or decodes, to the end of the file.

    Where a stream appears in the middle of a file, PyAV reads past its own list of streams after the last packet, by
    chance: an IndexError there is the end.
    """
    with contextlib.suppress(IndexError):
        yield from read


def decode_all(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    step: int,
    see_packet: Callable[[av.Packet[Any]], None] | None = None,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decodes a stream to its end: (time, frame), times in units of stream.time_base from the stream's start.

    Args:
        container: the open file.
        stream: one of its video streams.
        step: time between two frames, for those whose timestamps are missing or guessed.
        see_packet: called with every packet of every stream of the file.
    """
    counted, start, time = has_guessed_times(container, stream), stream.start_time or 0, -step
    for packet in to_the_end(container.demux() if see_packet else container.demux(stream)):
        if see_packet is not None:
            see_packet(packet)
        for frame in packet.decode() if packet.stream.index == stream.index else ():
            assert isinstance(frame, av.VideoFrame)
            time = time + step if counted or frame.pts is None else frame.pts - start
            yield time, frame


class PyAvReader(Reader):
    """Reads through PyAV, which brings FFmpeg with it.

    Decoding runs in one thread, because a data loader already has a process a core. From the key frame before the first
    moment, packets are read without decoding until it is known which of them hold the frames that are wanted. Then only
    those are decoded, and what they are predicted from: not the frames that no other one refers to, not the time from a
    moment to the next key frame.
    """

    def __init__(self, path: str, known: KnownVideo | None) -> None:
        super().__init__(path, known)
        self.frames_decoded: int = 0
        self._counted = False
        self._open()
        try:
            self.fps, self.duration_seconds = known[:2] if known is not None else self._measure()
        except DecodeError:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self._container, stream = open_stream(self.path)
        except (av.error.FFmpegError, OSError) as error:
            raise UnreadableError(self.path, _reason(error)) from error
        self._stream = stream
        assert stream.time_base is not None
        self._time_base = float(stream.time_base)
        self._start_seconds = float((stream.start_time or 0) * stream.time_base)
        self._counted = self._counted or has_guessed_times(self._container, stream)

    def _measure(self) -> tuple[float, float]:
        """Frames per second and seconds, from the stream's header if it has them."""
        rate = frame_rate(self._stream, self.path)
        guessed = self._container.format.name == "mpeg"  # a program stream has no header that says how long it is
        if self._stream.duration is not None and not guessed:
            return float(rate), self._stream.duration * self._time_base
        # The container's duration counts its sound too and, in Matroska, the time before the first frame: read the
        # timestamps from the last key frame on, or all of them, without decoding.
        try:
            last, count = 0.0, 0
            if not guessed:
                self._seek((self._container.duration or 0) / av.time_base)
                last, count = self._read_timestamps()
            if last <= 0:  # nothing comes after a jump to the end, or there are no true timestamps
                self._restart()
                last, count = self._read_timestamps()
        except READING_ERRORS as error:
            raise self._broken(error) from error
        self._counted = self._counted or (last <= 0 and count > 1)
        known = last > 0 and not guessed
        return float(rate), last + 1 / float(rate) if known else max(1, count) / float(rate)

    def _read_timestamps(self) -> tuple[float, int]:
        """The last timestamp from here to the end, in seconds, or 0 if there is none; and the number of packets."""
        last, count = 0.0, 0
        for packet in to_the_end(self._container.demux(self._stream)):
            count += packet.size > 0
            if packet.pts is not None:
                last = max(last, self._seconds(packet.pts))
        return last, count

    def _restart(self) -> None:
        """Goes to the start of the file, where a seek to the first moment need not lead."""
        self.close()
        self._open()

    def _seconds(self, timestamp: int) -> float:
        return timestamp * self._time_base - self._start_seconds

    def read(self, times_seconds: list[float], short_side: int | None) -> list[Image]:
        """The frame shown at each of the moments."""
        images: list[Image] = []
        first = 0
        for place in range(1, len(times_seconds) + 1):
            far = place < len(times_seconds) and times_seconds[place] > times_seconds[place - 1] + SEEK_SECONDS
            if place == len(times_seconds) or (far and not self._counted):  # those are read from the start each time
                images += self._read_span(times_seconds[first:place], short_side)
                first = place
        return images

    def _read_span(self, times_seconds: list[float], short_side: int | None) -> list[Image]:
        if not self._counted:
            try:
                images = self._read_selected(times_seconds, short_side)
            except READING_ERRORS as error:
                raise self._broken(error) from error
            if images is not None:
                return images
        try:
            return self._read_in_order(times_seconds, short_side)
        except _UnorderedError:
            self._counted = True
            return self._read_in_order(times_seconds, short_side)

    def _read_selected(self, times_seconds: list[float], short_side: int | None) -> list[Image] | None:
        """Decodes what the wanted frames need, by the packets' timestamps; None where these do not lead to them."""
        for earlier in EARLIER_SECONDS:
            self._seek(max(0.0, times_seconds[0] - earlier))
            found = self._packets_until(times_seconds[-1] + ROUNDING_SECONDS)
            if found is None:
                return None
            packets, timestamps, ended = found
            order = np.argsort(timestamps, kind="stable")
            seconds = timestamps[order] * self._time_base - self._start_seconds
            shown = np.searchsorted(seconds, np.array(times_seconds) + ROUNDING_SECONDS, "right") - 1
            # Of frames shown before the key frame, which may follow it in the file, some cannot be decoded.
            if shown[0] >= 0 and timestamps[order[shown[0]]] >= timestamps[0]:
                break
            if earlier >= min(times_seconds[0], EARLIER_SECONDS[-1]):
                return None
        wanted = order[shown]
        if any(np.count_nonzero(timestamps == timestamps[place]) > 1 for place in set(wanted.tolist())):
            return None  # two frames of one moment
        if ended and shown[-1] == len(order) - 1:
            end = seconds[-1] + max(1 / self.fps, (packets[order[-1]].duration or 0) * self._time_base)
            self._check_end(float(end), times_seconds[-1])
        images = self._decode_selected(packets, timestamps, set(wanted.tolist()), short_side)
        if images is None or any(int(timestamps[place]) not in images for place in wanted):
            return None
        return [images[int(timestamps[place])] for place in wanted]

    def _packets_until(self, seconds: float) -> tuple[list[Packet], NDArray[np.int64], bool] | None:
        """Packets from the place in the file to the last that may be shown by then, and whether the file ends there.

        The first is a key frame. None if one has no timestamp, or if they are too many to be kept.
        """
        packets: list[Packet] = []
        size = 0
        ended = True
        for packet in to_the_end(self._container.demux(self._stream)):
            if packet.size == 0:
                continue
            # Packets come in the order of decoding; no frame is shown before it is decoded.
            if packet.dts is not None and self._seconds(packet.dts) > seconds:
                ended = False
                break
            if not packets and not packet.is_keyframe:
                continue
            size += packet.size
            if packet.pts is None or size > BUFFERED_BYTES:
                return None
            packets.append(packet)
        return packets, np.array([packet.pts for packet in packets], dtype=np.int64), ended

    def _decode_selected(
        self, packets: list[Packet], timestamps: NDArray[np.int64], wanted: set[int], short_side: int | None
    ) -> dict[int, Image] | None:
        """Images of the wanted packets, by their timestamps; None if frames are not shown in the timestamps' order."""
        keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
        needed: set[int] = set()
        for place in wanted:
            start = bisect.bisect_right(keys, place) - 1
            while timestamps[keys[start]] > timestamps[place]:  # it is shown before that key frame
                start -= 1
            needed.update(range(keys[start], place + 1))
        context = self._stream.codec_context
        skips = context.codec.name in SKIPPING_CODECS
        moments = {int(timestamps[place]) for place in wanted}
        images: dict[int, Image] = {}
        shown: list[int] = []

        def decode(packet: Packet | None) -> None:
            for frame in context.decode(packet):
                self.frames_decoded += 1
                shown.append(-1 if frame.pts is None else frame.pts)
                if frame.pts in moments and frame.pts not in images:
                    size = self._scaled_size(frame.width, frame.height, short_side)
                    images[frame.pts] = self._to_rgb(frame, size)

        previous = -1
        for place in sorted(needed):
            if place != previous + 1 and previous >= 0:
                decode(None)
                context.flush_buffers()
            if skips:
                context.skip_frame = "DEFAULT" if place in wanted else "NONREF"
            decode(packets[place])
            previous = place
        decode(None)
        context.flush_buffers()
        context.skip_frame = "DEFAULT"
        return images if shown == sorted(shown) else None

    def _read_in_order(self, times_seconds: list[float], short_side: int | None) -> list[Image]:
        """Decodes every frame from the key frame before the first moment to the last moment."""
        frames = self.frames_from(times_seconds[0])
        shown_seconds, current = next(frames)
        upcoming = next(frames, None)
        size = self._scaled_size(current.width, current.height, short_side)
        images: list[Image] = []
        image = None
        for seconds in times_seconds:
            while upcoming is not None and upcoming[0] <= seconds + ROUNDING_SECONDS:
                (shown_seconds, current), image = upcoming, None
                upcoming = next(frames, None)
            if upcoming is None:
                end = shown_seconds + max(1 / self.fps, (current.duration or 0) * self._time_base)
                self._check_end(end, seconds)
            if image is None:
                image = self._to_rgb(current, size)
            images.append(image)
        return images

    def frames_from(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decodes (seconds, frame) from the last key frame that is not after the given moment; at least one frame."""
        decoded = self._decode(None if self._counted else seconds)
        first = next(decoded, None)
        # An index may lead too far, or past the last key frame; frames without timestamps have no place after a jump.
        if first is None or first[0] > seconds + ROUNDING_SECONDS:
            decoded = self._decode(None)
            first = next(decoded, None)
        if first is None:
            raise UnreadableError(self.path, "no frame could be decoded")
        yield first
        yield from decoded

    def _decode(self, seconds: float | None) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decodes from a key frame before a moment, or from the start of the file."""
        try:
            if seconds is None:
                self._restart()
            else:
                self._seek(seconds)
            # Frames without timestamps can be counted from the start, but not after a jump.
            shown_seconds = 0.0 if seconds is None else math.inf
            previous_seconds = None
            for frame in to_the_end(self._container.decode(self._stream)):
                assert isinstance(frame, av.VideoFrame)
                self.frames_decoded += 1
                if frame.pts is not None and not self._counted:
                    shown_seconds = self._seconds(frame.pts)
                elif previous_seconds is not None:
                    shown_seconds = previous_seconds + 1 / self.fps
                if previous_seconds is not None and shown_seconds < previous_seconds < math.inf:
                    raise _UnorderedError
                previous_seconds = shown_seconds
                yield shown_seconds, frame
        except READING_ERRORS as error:
            raise self._broken(error) from error

    def _seek(self, seconds: float) -> None:
        """Goes to the last key frame that is not after the moment, or to the start of a file that cannot seek."""
        if self.known is not None and len(self.known.keyframe_seconds) > 0:
            place = int(np.searchsorted(self.known.keyframe_seconds, seconds + ROUNDING_SECONDS, "right")) - 1
            # Before the first one lies, in files that were cut, a key frame that is not shown.
            seconds = float(self.known.keyframe_seconds[place]) if place >= 0 else seconds
        try:
            self._container.seek(round((seconds + self._start_seconds) / self._time_base), stream=self._stream)
        except av.error.FFmpegError:
            self._restart()

    def close(self) -> None:
        """Closes the file."""
        self._container.close()


class _UnorderedError(Exception):
    """Frames whose timestamps do not rise in the order in which they are shown."""
