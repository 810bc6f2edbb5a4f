"""A file's main video stream: opening it, when its frames are shown, and decoding it to its end."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias, cast

import av
from av.container import InputContainer
from av.format import Flags
from av.stream import Disposition

from octvideo.data.index import IndexedVideo
from octvideo.data.source import Media
from octvideo.errors import DecodeError, UnreadableError

Packet: TypeAlias = "av.Packet[Any]"
PLAYLISTS = {"hls", "concat", "dash", "webm_dash_manifest", "imf"}  # FFmpeg would open whatever files they name
# Titles may be in any encoding; from PyAV 19 on that is no error, nor an option.
ANY_METADATA: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
logging.getLogger("libav").addHandler(logging.NullHandler())  # torchvision 0.23 has FFmpeg's errors logged, to stderr
HEAD = 48  # packets that tell whether a header is right
JUMP_SECONDS = 10  # a longer gap in a container that may be spliced is another clock, as in FFmpeg
AGREEMENT = 0.1  # by which share a header's frame rate may differ from that of the timestamps


def open_stream(media: Media) -> tuple[InputContainer, av.VideoStream]:
    """Opens a video and selects its main video stream, to be decoded in one thread.

    Raises `READING_ERRORS` where that fails, DecodeError without video, and UnreadableError without a decoder.
    """
    return with_stream(media.name, cast(InputContainer, av.open(media.open(), **ANY_METADATA)))


def with_stream(name: str, container: InputContainer, remote: bool = False) -> tuple[InputContainer, av.VideoStream]:
    """An open container with its main video stream, or closed, with errors as `open_stream`'s; may be a remote HLS."""
    kind, stream = container.format.name, container.streams.best("video")  # not the smaller of two
    cover = stream is not None and stream.disposition & Disposition.attached_pic  # of a sound file
    if not PLAYLISTS.isdisjoint(kind.split(",")) and not (remote and kind == "hls"):  # FFmpeg lets it name no file
        error = DecodeError(name, f"a playlist ({kind}), which names other files")
    elif not isinstance(stream, av.VideoStream) or stream.time_base is None or cover:
        error = DecodeError(name, "no video stream")
    elif stream.codec_context is None:
        error = UnreadableError(name, "no decoder for its codec")
    elif is_still(kind, stream):
        error = DecodeError(name, "a still image, not a video")
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


class Timing(NamedTuple):
    """When the frames of a stream are shown."""

    rate: Fraction  # average frames per second
    duration_seconds: float  # from the start of the first frame to the end of the last one
    start: int  # timestamp of the first frame, in units of the stream's time_base
    clock: str = "steady"  # timestamps lead to frames; or "spliced", they start again, or "counted", they say nothing
    note: str = ""  # what was derived from timestamps because no header says it, or a wrong one


def has_guessed_times(container: InputContainer, stream: av.VideoStream) -> bool:
    """Whether FFmpeg guesses timestamps wrongly: AVI stores none, and MPEG program streams only some."""
    return container.format.name in ("avi", "mpeg") and bool(stream.codec_context.has_b_frames)


def packets_of(container: InputContainer, *streams: av.VideoStream) -> Iterator[Packet]:
    """The packets of these streams, or of all, from here to the end of the file."""
    # Where a stream appears in the middle of a file, PyAV may read past its list of streams after the last packet.
    with contextlib.suppress(IndexError):
        yield from container.demux(*streams)


def measure_timing(media: Media, container: InputContainer, stream: av.VideoStream) -> Timing:
    """When the frames of an open file are shown: by the index, by its header, or by all packets where that is wrong.

    The container may be at another place afterwards. Raises `READING_ERRORS`, and DecodeError without a frame rate.
    """
    if (timing := _by_header(container, stream, media.known)) is not None:
        return timing
    container, stream = open_stream(media)
    with container:
        return _by_packets(media.name, container, stream)


def open_timed(media: Media) -> tuple[InputContainer, av.VideoStream, Timing]:
    """Opens a file as `open_stream` does, with its timing; measuring that would leave it at another place."""
    container, stream = open_stream(media)
    with contextlib.closing(container):
        timing = measure_timing(media, container, stream)
    return *open_stream(media), timing


def _by_header(container: InputContainer, stream: av.VideoStream, known: IndexedVideo | None) -> Timing | None:
    """The timing that index or header state; None if they state none, or another one than the first packets."""
    rate, base = stream.average_rate or stream.guessed_rate, stream.time_base or Fraction(1)
    start, head = stream.start_time or 0, None
    if not ("mp4" in container.format.name and stream.frames > 1):  # its tables of all frames need no check
        head = scan(itertools.islice(packets_of(container, stream), HEAD), base)
        start = head.first
    clock = "counted" if has_guessed_times(container, stream) else "steady"
    if known is not None:
        clock = "spliced" if known.is_spliced else clock
        return Timing(Fraction(known.fps), known.duration_seconds, start, clock)
    if not rate or spliceable(container) or (stream.duration is None and not container.duration):
        return None
    if head and head.rate and container.format.name != "avi" and not _agree(rate, head.rate):  # it has no timestamps
        return None
    if stream.duration is not None:
        return Timing(rate, float(stream.duration * base), start, clock)
    # The container's duration counts sound too and, in Matroska, the time before the first frame: look at the end.
    with contextlib.suppress(av.error.FFmpegError):
        container.seek(round((container.duration or 0) / av.time_base / base) + start, stream=stream)
    end = scan(packets_of(container, stream), base).last - start * base
    return Timing(rate, float(end + 1 / rate), start) if end > 0 else None


def _by_packets(path: str, container: InputContainer, stream: av.VideoStream) -> Timing:
    stated, guessed = stream.average_rate or stream.guessed_rate, has_guessed_times(container, stream)
    found = scan(packets_of(container, stream), stream.time_base or Fraction(1), spliceable(container))
    rate = stated if found.rate is None or (stated and (guessed or _agree(stated, found.rate))) else found.rate
    if not rate:
        raise DecodeError(path, "the video stream has no frame rate, and its packets tell none")
    if guessed or found.rate is None:
        clock = "counted" if guessed or found.packets > 1 else "steady"
        return Timing(rate, float(max(1, found.packets) / rate), found.first, clock)
    duration, notes = float(found.shown + found.clocks / rate), []
    if rate != stated:
        notes.append(f"{float(rate):.4g} frames a second by its timestamps, {float(stated or 0):.4g} by its header")
    if found.clocks > 1:
        notes.append(f"its clock starts {found.clocks} times, for {duration:.2f} s in all")
    elif not container.duration:
        notes.append(f"{duration:.2f} s by its timestamps, no duration in its header")
    return Timing(rate, duration, found.first, "steady" if found.clocks == 1 else "spliced", "; ".join(notes))


class Scan(NamedTuple):
    """What timestamps say about packets."""

    packets: int  # that hold something
    clocks: int  # how often the clock starts
    shown: Fraction  # seconds from the first frame of each clock to the last one, in all
    last: Fraction  # timestamp in seconds
    first: int  # timestamp in units

    @property
    def rate(self) -> Fraction | None:
        """Average frames per second; None if there are too few timestamps."""
        steps = self.packets - self.clocks
        return (steps / self.shown).limit_denominator(10**6) if steps > 0 and self.shown > 0 else None


def scan(packets: Iterable[Packet], base: Fraction, jumps: bool = False) -> Scan:
    """Reads packets in units of `base` seconds; with `jumps`, a long gap is another clock, as a step back always is."""
    count = clocks = shown = low = high = decoded = first = 0
    for packet in packets:
        count += packet.size > 0
        if packet.pts is None or packet.size == 0:
            continue
        time = decoded if packet.dts is None else packet.dts
        if clocks == 0 or time < decoded or (jumps and (time - decoded) * base > JUMP_SECONDS):
            clocks, shown, low, high, decoded = clocks + 1, shown + high - low, packet.pts, packet.pts, time
        low, high, decoded = min(low, packet.pts), max(high, packet.pts), time
        first = low if clocks == 1 else first
    return Scan(count, clocks, (shown + high - low) * base, high * base, first)


def spliceable(container: InputContainer) -> bool:
    """Whether files of this kind may be joined ones, with a clock for each part, and no header that says how long."""
    return bool(container.format.flags & cast(int, Flags.ts_discont.value))


def _agree(stated: Fraction, found: Fraction) -> bool:
    return abs(stated / found - 1) <= AGREEMENT


def decode_all(
    container: InputContainer, stream: av.VideoStream, timing: Timing, see: Callable[[Packet], None] | None = None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decodes a stream to its end: (seconds from the stream's start, frame).

    Frames whose timestamps are missing or mean nothing come a step after the one before; where the clock is spliced, it
    goes on like that. If given, `see` is called with every packet of every stream of the file.
    """
    step, base = float(1 / timing.rate), float(stream.time_base or 1)
    start, seconds, count = timing.start * base, None, 0
    for packet in packets_of(container) if see else packets_of(container, stream):
        if see is not None:
            see(packet)
        for frame in packet.decode() if packet.stream.index == stream.index else ():
            following = 0.0 if seconds is None else seconds + step
            if timing.clock == "counted":
                following = count / float(timing.rate)
            elif frame.pts is not None:
                shown = frame.pts * base - start
                gap = 0.0 if seconds is None else shown - seconds
                if timing.clock == "spliced" and (gap < 0 or (gap > JUMP_SECONDS and spliceable(container))):
                    start = frame.pts * base - following
                else:
                    following = shown
            seconds, count = following, count + 1
            yield seconds, frame
