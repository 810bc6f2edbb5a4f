"""Live video: the newest clip of a camera, a network stream or a pipe, in bounded memory."""

import contextlib
import logging
import math
import os
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from octvideo.data.clips import cut
from octvideo.data.preprocessing import Preprocessing
from octvideo.data.reader import READING_ERRORS, ROUNDING_SECONDS, Image, Orientation, Reader, Times, one_line, shown_as
from octvideo.data.sampling import ROUNDING, even_crops
from octvideo.data.source import LocalFile
from octvideo.data.stream import (
    AGREEMENT,
    ANY_METADATA,
    JUMP_SECONDS,
    Packet,
    has_guessed_times,
    packets_of,
    with_stream,
)
from octvideo.errors import DecodeError, UserError
from octvideo.stores import is_uri

SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt", "http", "https")
CAMERAS = {"linux": ("/dev/video{}", "v4l2", {}), "darwin": ("{}", "avfoundation", {"framerate": "30"})}
# RTP over UDP loses packets; and FFmpeg would look at 5 seconds of a stream before it gives the first frame.
NETWORK = {"rtsp_transport": "tcp", "analyzeduration": "1000000"}
OPENING_SECONDS = 10.0  # for a server to answer
RETRY_SECONDS = 0.5, 10.0  # before the first attempt to connect again, and the longest
LATE_SECONDS = 1.0  # how far decoding may fall behind its source before it goes on at the next key frame
IDLE_SECONDS = 0.2  # of waiting for packets on the way to that key frame: there is nothing left to catch up with
log = logging.getLogger(__name__)
DENSEST = 4  # times as many frames are kept as clips have at their frame rate

Shown: TypeAlias = tuple[Orientation, float]  # orientation, and the width of a pixel over its height
See: TypeAlias = Callable[[float, av.VideoFrame, Shown], None]


class Window(NamedTuple):
    """The newest clip of a stream."""

    clip: NDArray[np.uint8]  # (C, T, H, W)
    times_seconds: NDArray[np.float64]  # (T,) of its frames
    seconds: float  # when its newest frame is shown, from the first frame of the stream
    stamp_seconds: float | None  # the same by the source's own clock, where it has one
    arrival: float  # when that frame arrived, by time.monotonic()


class _Kept(NamedTuple):
    seconds: float
    stamp_seconds: float | None
    arrival: float
    image: Image


class Live(Reader):
    """The end of a stream, which a thread receives, decodes and scales: as much as one clip needs.

    A stream's timestamps count where they rise, by 10 seconds at most, and elsewhere the times of arrival. No clip
    reaches across a jump of the timestamps, a lost connection, or a change of the images' size.

    Args:
        source: number of a camera, "-" for standard input, an address of `SCHEMES`, a file or a named pipe. Files
            (also those at an address) and HLS are read at their own pace, a pipe as fast as it is written.
        how: how clips are made.
        reconnect_seconds: how long to try to reach a camera or an address again after it was lost.
        silence_seconds: how long an address may send nothing before it counts as lost.
        see: called by the thread with each decoded frame: seconds, frame, and how it is shown.

    Attributes:
        received: packets of video so far; each holds a frame.
        dropped: those that could not be decoded or not in time, and those that no clip shows because the network was
            busy when it was due.
        reconnects: how often a lost source was reached again.
        seconds: when the newest frame is shown, from the first one.
        lost: why the source is lost; empty while it is not.
    """

    def __init__(
        self,
        source: str,
        how: Preprocessing,
        *,
        reconnect_seconds: float = 300.0,
        silence_seconds: float = 5.0,
        see: See | None = None,
    ) -> None:
        super().__init__(LocalFile(re.sub(r"(?<=://)[^/]*@", "", source)))  # messages show no password
        self._address, self._pipe = is_uri(source), source == "-"
        camera = bool(re.fullmatch(r"\d+|/dev/video\d+", source))
        self._endless = self._address or camera
        if self._address and source.partition("://")[0].lower() not in SCHEMES:
            raise UserError(f"{self.path}: an address must start with {', '.join(SCHEMES)}")
        if camera and sys.platform not in CAMERAS:
            raise UserError(f"{source}: cameras can be read on Linux and macOS; name an address or a pipe")
        if not (self._endless or self._pipe) and (os.path.isdir(source) or not os.path.exists(source)):
            what = "a folder" if os.path.isdir(source) else "no such file"
            raise UserError(f"{source}: {what}; a stream is a camera's number, an address, - or a file")
        self._paced = not (self._endless or self._pipe) and stat.S_ISREG(os.stat(source).st_mode)
        self._place, self._format, self._options = os.path.abspath(source), None, dict[str, str]()
        if camera:
            device, self._format, self._options = CAMERAS[sys.platform]
            self._place = device.format(source) if source.isdigit() else source
        elif self._address or self._pipe:
            self._place, self._options = (source, NETWORK) if self._address else ("pipe:0", {})
        self._how, self._see = how, see
        self._reconnect_seconds, self._silence_seconds = reconnect_seconds, silence_seconds
        self.seconds, self.received = 0.0, 0
        self.dropped = self.reconnects = 0
        self.frames_decoded: int = 0
        self.lost, self._stopped = "", threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)  # a read of a pipe cannot be interrupted
        # The thread's: arrival of the last frame, what images are made of, the frame rate by the header.
        self._arrived, self._stated = 0.0, how.target_fps or 30.0
        self._form: tuple[int, int, Shown] | None = None
        # Guarded by this condition: the frames, the rate that they have, when the next clip is due, and from when on
        # frames count as dropped.
        self._changed, self._ended = threading.Condition(), False
        self._error: Exception | None = None
        self._most, self.fps = DENSEST * how.clip_frames * how.frame_stride, self._stated
        self._kept = deque[_Kept](maxlen=self._most + 2)
        self._due, self._unseen_from = -math.inf, math.inf

    def start(self) -> None:
        """Starts to receive."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the stream, from any thread or signal handler: `window` gives None from now on."""
        self._stopped.set()

    def close(self) -> None:
        """Stops, and waits a moment for the thread; one that is blocked in a read ends with the process."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(1)

    def window(self, every_seconds: float) -> Window | None:
        """Waits for a clip that ends this long after the one before, or now if that is past; None after the end.

        Raises DecodeError if the source cannot be read or is lost for too long, and whatever `see` raises.
        """
        size = self._how.test_crop_size
        with self._changed:
            while not self._is_due() and not self._ended and not self._stopped.is_set():
                self._changed.wait(0.2)  # a signal handler may stop it, but not notify
            if self._error is not None:
                raise self._error
            if self._stopped.is_set() or not self._is_due():
                return None
            (seconds, stamp, arrival, _), times = self._kept[-1], self._times()
            images = self.read(times, size)
            self._due += every_seconds
            self._due = self._due if self._due > seconds + ROUNDING_SECONDS else seconds + every_seconds
            self._unseen_from = max(seconds, self._due - self._length() / self.fps) + ROUNDING_SECONDS
        height, width, _ = images[0].shape
        return Window(cut(images, even_crops(height, width, size, 1)[0], size), times, seconds, stamp, arrival)

    def read(self, times: Times, short_side: int | None) -> list[Image]:
        starts = [kept.seconds for kept in self._kept]
        rows = np.searchsorted(starts, times + ROUNDING_SECONDS, "right") - 1
        return [self._kept[max(0, row)].image for row in rows]

    def _is_due(self) -> bool:
        """Whether the newest frame ends a clip that is due, all of which is there."""
        if not self._kept or self._kept[-1].seconds < self._due - ROUNDING_SECONDS:
            return False
        return self._start() >= self._kept[0].seconds - ROUNDING_SECONDS

    def _length(self) -> int:
        """Frames of a clip's window, as of `window_around`."""
        span = self._how.clip_frames * self._how.frame_stride * (self.fps / (self._how.target_fps or self.fps))
        return max(1, math.ceil(span - ROUNDING))

    def _start(self) -> float:
        """Seconds at which the first frame of the window that ends with the newest one is shown."""
        return self._kept[-1].seconds - (self._length() - 1) / self.fps

    def _times(self) -> NDArray[np.float64]:
        """(T,) middles of the frames of that window's clip."""
        numbers = self._how.sampler.centre_clip(self._length(), self.fps)[0]
        times: NDArray[np.float64] = self._start() + (numbers + 0.5) / self.fps
        return times

    def _keep(self, seconds: float, stamp: float | None, arrival: float, frame: av.VideoFrame, shown: Shown) -> None:
        """Scales a frame and keeps it, and forgets those that no clip needs any longer."""
        if self._kept and seconds - self._kept[-1].seconds < self._length() / self.fps / self._most:
            return
        if (form := (frame.width, frame.height, shown)) != self._form:
            self._form, self._first_size = form, None  # else the image would have the shape of the first frame
        image = self._image(frame, self._how.test_crop_size, shown)
        with self._changed:
            if self._kept and self._kept[-1].image.shape != image.shape:
                self._kept.clear()
            self._kept.append(_Kept(seconds, stamp, arrival, image))
            found = (len(self._kept) - 1) / (seconds - self._kept[0].seconds) if len(self._kept) > 2 else self._stated
            self.fps = self._stated if abs(self._stated / found - 1) <= AGREEMENT else found
            start = self._start() + ROUNDING_SECONDS
            while len(self._kept) > 1 and self._kept[1].seconds <= start:
                self.dropped += self._kept.popleft().seconds >= self._unseen_from
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._receive()
        except Exception as error:  # `window` raises it again
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _receive(self) -> None:
        """Reads one connection after the other; DecodeError where that is hopeless."""
        retry, lost_at, reason = RETRY_SECONDS[0], 0.0, ""
        while not self._stopped.is_set():
            with contextlib.closing(self._frames()) as frames:
                while not self._stopped.is_set():
                    try:
                        found, reason = next(frames, None), ""
                    except (DecodeError, *READING_ERRORS) as error:
                        reason = error.reason if isinstance(error, DecodeError) else one_line(error)
                        found, reason = None, "it is silent" if isinstance(error, av.error.ExitError) else reason
                    if found is None:
                        break
                    if self.lost:
                        self.reconnects, self.lost, retry = self.reconnects + 1, "", RETRY_SECONDS[0]
                        log.warning("%s is back after %.1f s", self.path, time.monotonic() - lost_at)
                    self._keep(*found)
                    if self._see is not None:
                        self._see(found[0], *found[3:])
            if self._stopped.is_set() or (self.frames_decoded and not reason and not self._endless):
                return
            lost_at = lost_at if self.lost else time.monotonic()
            remaining, reason = lost_at + self._reconnect_seconds - time.monotonic(), reason or "it ended"
            if not self.frames_decoded:
                raise DecodeError(self.path, "no frame in it" if reason == "it ended" else reason)
            if not self._endless or remaining <= 0:
                raise DecodeError(self.path, f"lost after {self.frames_decoded} frames: {reason}")
            if not self.lost:
                log.warning("%s is lost: %s; trying for %.0f s to reach it again", self.path, reason, remaining)
            self.lost = reason
            self._stopped.wait(min(retry, remaining))
            retry = min(2 * retry, RETRY_SECONDS[1])

    def _open(self) -> tuple[InputContainer, av.VideoStream]:
        how: dict[str, Any] = {"format": self._format, "options": dict(self._options), **ANY_METADATA}
        patience = (OPENING_SECONDS, self._silence_seconds) if self._address else None
        container, stream = with_stream(self.path, av.open(self._place, timeout=patience, **how), self._address)
        if self._address:  # it may be a recording; and HLS sends seconds of video at once
            self._endless = not container.duration
            self._paced = not self._endless or container.format.name == "hls"
        return container, stream

    def _frames(self) -> Generator[tuple[float, float | None, float, av.VideoFrame, Shown], None, None]:
        """Decodes a connection: (seconds, the source's, arrival, frame, how it is shown)."""
        container, stream = self._open()
        with container:
            base, guessed = float(stream.time_base or Fraction(1)), has_guessed_times(container, stream)
            self._stated = float(stream.average_rate or stream.guessed_rate or self._stated)
            stamp, first, shown = None, True, (Orientation(), 1.0)
            for arrival, packet in self._packets(container, stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    self.dropped += 1
                    continue
                for frame in frames:
                    before, stamp = stamp, None if guessed else frame.pts
                    gap = 0.0 if before is None or stamp is None else (stamp - before) * base
                    if first or not 0 <= gap <= JUMP_SECONDS:
                        with self._changed:
                            self._kept.clear()
                    if not 0 < gap <= JUMP_SECONDS:
                        gap = 1 / self._stated if self._paced and not first else arrival - self._arrived
                    self.seconds += max(gap, 2 * ROUNDING_SECONDS) if self.frames_decoded else 0.0
                    self._arrived, self.frames_decoded, first = arrival, self.frames_decoded + 1, False
                    if frame.key_frame:  # a frame that was asked for its side data lives on until gc finds it
                        shown = shown_as(frame, stream)
                    yield self.seconds, None if stamp is None else stamp * base, arrival, frame, shown

    def _packets(self, container: InputContainer, stream: av.VideoStream) -> Iterator[tuple[float, Packet]]:
        """The packets to decode, and when they arrived, which for a file's is when they are due.

        How late a packet is shows whether decoding has fallen behind: by more than the one that was least late.
        """
        base, previous, least, skips = float(stream.time_base or Fraction(1)), None, math.inf, False
        begun, last, before = None, time.monotonic(), time.monotonic()
        elapsed = waited = 0.0  # seconds of the source's clock, and seconds without a packet while skipping
        for packet in packets_of(container):
            now = time.monotonic()
            if packet.stream.index != stream.index:
                if self._address and now - last > self._silence_seconds:
                    raise DecodeError(self.path, "it sends no video")
                continue
            if packet.size:
                self.received += 1
                gap = -1.0 if previous is None or packet.dts is None else (packet.dts - previous) * base
                if begun is None:
                    begun, gap = now, 0.0
                if not 0 <= gap <= JUMP_SECONDS:
                    gap = 1 / self._stated if self._paced else now - last
                elapsed, previous = elapsed + gap, packet.dts
                if self._paced and self._stopped.wait(max(0.0, begun + elapsed - now)):
                    return
                now = last = time.monotonic()
                waited, late = waited + now - before, now - begun - elapsed
                least = late if skips and waited > IDLE_SECONDS else min(least, late)
                if late - least > LATE_SECONDS and not skips:
                    skips, waited = True, 0.0
                if skips and not packet.is_keyframe:
                    self.dropped, before = self.dropped + 1, now
                    continue
                if skips:
                    stream.codec_context.flush_buffers()
                    skips, waited = late - least > LATE_SECONDS, 0.0
            yield now, packet
            before = time.monotonic()
