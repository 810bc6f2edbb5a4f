"""Reading through PyAV: the default backend."""

import contextlib
import itertools
import math
from collections.abc import Iterator

import av
import numpy as np

from octvideo.data.reader import READING_ERRORS, ROUNDING_SECONDS, Image, Reader, Times, decode_errors, shown_as
from octvideo.data.source import Media
from octvideo.data.stream import Packet, decode_all, measure_timing, open_stream, packets_of
from octvideo.errors import UnreadableError

BUFFERED_BYTES = 64 * 2**20  # of packets that are read ahead of decoding


class PyAvReader(Reader):
    """Reads through PyAV, which brings FFmpeg with it.

    Decoding runs in one thread, because a data loader already has a process for each core. Packets are read from a key
    frame on, until it is known which of them hold the wanted frames; these and what they refer to are decoded.
    """

    def __init__(self, media: Media) -> None:
        super().__init__(media)
        self.frames_decoded: int = 0
        self._open()
        with decode_errors(self.path, *READING_ERRORS):
            self._timing = timing = measure_timing(media, self._container, self._stream)
        self.fps, self.duration_seconds, self.note = float(timing.rate), timing.duration_seconds, timing.note
        self._start_time, self._time_base = timing.start, float(self._stream.time_base or 0)

    def _open(self) -> None:
        with decode_errors(self.path, *READING_ERRORS, raised=UnreadableError):
            self._container, self._stream = open_stream(self.media)

    @property
    def _in_order(self) -> bool:
        """Whether no timestamp leads to a frame, so that all are decoded from the start of the file."""
        return self._timing.clock != "steady"

    def read(self, times: Times, short_side: int | None) -> list[Image]:
        # Key frames are seldom further apart than 10 seconds: a longer gap is worth a seek.
        far = np.diff(times) > (math.inf if self._in_order else 10)
        images: list[Image] = []
        with decode_errors(self.path, *READING_ERRORS):
            for span in np.split(times, np.flatnonzero(far) + 1):
                selected = None if self._in_order else self._read_selected(span, short_side)
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
                images[frame.pts] = self._image(frame, short_side, shown_as(frame, self._stream))
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
                self._timing = self._timing._replace(clock="counted")  # timestamps turned out not to rise
                return self._read_in_order(times, short_side)
            if following is None:
                self._check_end(start + max(1 / self.fps, (frame.duration or 0) * self._time_base), times[-1])
            count = int(np.searchsorted(times + ROUNDING_SECONDS, end))  # times before the end of this frame
            if count > len(images):
                images += [self._image(frame, short_side, shown_as(frame, self._stream))] * (count - len(images))
            if count == len(times):
                break
        return images

    def frames_from(self, seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decodes (seconds, frame) from the last key frame that is not after the given time; at least one frame."""
        for start in (None if self._in_order else seconds, None):
            self._seek(start)
            found = False
            for shown, frame in decode_all(self._container, self._stream, self._timing):
                self.frames_decoded += 1
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
