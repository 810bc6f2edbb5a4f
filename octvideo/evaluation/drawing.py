"""Predictions drawn onto frames: annotated copies of videos, and contact sheets."""

import contextlib
import math
import time
from collections.abc import Generator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias, cast

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from octvideo.data.preparation.reencode import add_h264, from_planes, machine_error, planes
from octvideo.data.reader import READING_ERRORS, Backend, Orientation, shown_as, square_pixels
from octvideo.data.source import AnySource, Pictures, Source, split_span
from octvideo.data.stream import decode_all, open_timed
from octvideo.data.video import Video
from octvideo.data.watchdog import still_alive
from octvideo.errors import DecodeError
from octvideo.evaluation.prediction import Prediction

ANNOTATED, THUMBNAIL = ".predicted.mp4", ".predicted.jpg"  # endings of file names
Shown: TypeAlias = "Generator[tuple[float, av.VideoFrame, tuple[Orientation, float]]]"
STILLS, STILLS_IN_A_ROW, STILL_SIDE = 8, 4, 180  # frames of a contact sheet, and the pixels of their shorter side
ENCODER = {"crf": "20", "preset": "veryfast", "bf": "0"}  # B-frames at a variable rate make mp4's duration wrong


def write_line(draw: ImageDraw.ImageDraw, width: int, top: int, size: int, left: str, right: str) -> None:
    """Writes a line of text in Pillow's Latin font: all of `right`, and as much of `left` as fits beside it."""
    font, gap = ImageFont.load_default(size), size // 2
    right_start = width - gap - draw.textlength(right, font)
    while left and draw.textlength(left, font) > right_start - 2 * gap:
        left = left.removesuffix("...")[:-1]
        left += "..." if left else ""
    draw.text((gap, top), left, "white", font)
    draw.text((right_start, top), right, "white", font)


def strip(width: int, height: int, label: str, probability: float) -> Image.Image:
    """The strip for the lower edge of a frame of even size: a class and its probability, as a bar in the last sixth."""
    size = max(9, min(width, height) // 18)
    picture = Image.new("RGB", (width, min(height, 2 * size)))
    draw = ImageDraw.Draw(picture)
    write_line(draw, width, size // 5, size, label, f"{100 * probability:.0f} %")
    top = picture.height - max(1, picture.height // 6)
    draw.rectangle((0, top, width, picture.height), "#464646")
    if (filled := round(width * probability)) > 0:
        draw.rectangle((0, top, filled - 1, picture.height), "#2ecc40")
    return picture


class Annotated(contextlib.AbstractContextManager["Annotated"]):
    """An mp4 file that is written frame by frame (H.264, no sound), upright, with a class along the lower edge.

    Raises READING_ERRORS if that fails. Its size and colours are those of the first frame.
    """

    def __init__(self, output: Path, rate: Fraction, time_base: Fraction) -> None:
        self._target = av.open(str(output), "w", format="mp4", options={"movflags": "+faststart"})
        self._rate, self._time_base, self._step = rate, time_base, max(1, round(1 / (rate * time_base)))
        self._scaler, self._timestamp = VideoReformatter(), -1
        self._encoder: av.VideoStream | None = None
        self._drawn: tuple[str, float] | None = None

    def write(
        self, seconds: float, frame: av.VideoFrame, shown: tuple[Orientation, float], label: str, probability: float
    ) -> None:
        """Adds a frame, shown from these seconds on, which must not fall; `shown` is that of `shown_as`."""
        self._timestamp = max(round(seconds / self._time_base), self._timestamp + 1)  # they must rise
        orientation, shape = shown
        if self._encoder is None:
            wide, high = square_pixels(frame.width, frame.height, shape)
            self._size = wide + wide % 2, high + high % 2
        how: dict[str, Any] = {"interpolation": "BICUBIC", "dst_color_range": ColorRange.MPEG, "threads": 1}
        picture = self._scaler.reformat(frame, *self._size, "yuv420p", **how)
        if self._encoder is None:
            self._orientation = orientation
            self._encoder = add_h264(self._target, ENCODER, self._rate, self._time_base, picture)
            self._encoder.width, self._encoder.height = orientation.size(*self._size)
            self._encoder.codec_context.flags |= Flags.frame_duration  # else the last frame's is lost
        if self._drawn != (label, probability):
            self._drawn = label, probability
            drawn = strip(self._encoder.width, self._encoder.height, label, probability)
            pixels = av.VideoFrame.from_ndarray(np.asarray(drawn), "rgb24")
            # Not the frame's own method: PyAV 19 keeps its scaler, whose threads a fork has not got.
            scaled = VideoReformatter().reformat(pixels, format="yuv420p", threads=1)
            self._overlay = planes(scaled, Orientation())
        upright = planes(picture, self._orientation)
        for plane, over in zip(upright, self._overlay, strict=True):
            plane[-len(over) :] = over
        image = from_planes(upright)
        image.pts, image.time_base = self._timestamp, self._time_base
        image.duration = round((frame.duration or 0) * (frame.time_base or 0) / self._time_base) or self._step
        self._target.mux(self._encoder.encode(image))

    def __exit__(self, *raised: object) -> None:
        with self._target:
            if self._encoder is not None and raised[0] is None:
                self._target.mux(self._encoder.encode())


def shown_frames(path: str, source: Source | None) -> tuple[Fraction, Fraction, Shown]:
    """Frames a second, unit of time, and (seconds, frame, how it is shown) of a video, a span of one, or a folder."""
    name, start, end = split_span(path)
    media = (source or AnySource()).find(name)
    if isinstance(media, Pictures):
        rate = Fraction(media.fps).limit_denominator(1000)

        def pictures() -> Shown:
            with Video(path, source=source) as video:
                for number in range(video.num_frames):
                    image = np.ascontiguousarray(video.images_at([(number + 0.5) / video.fps])[0])
                    yield number / video.fps, av.VideoFrame.from_ndarray(image, "rgb24"), (Orientation(), 1.0)

        return rate, 1 / rate, pictures()
    container, stream, timing = open_timed(media)

    def decoded() -> Shown:
        with container:
            if start and timing.clock == "steady":
                with contextlib.suppress(av.error.FFmpegError):
                    first = round(start / cast(Fraction, stream.time_base)) + timing.start
                    container.seek(first, stream=stream)
            for seconds, frame in decode_all(container, stream, timing):
                if end is not None and seconds >= end:
                    return
                if seconds >= start:
                    yield seconds - start, frame, shown_as(frame, stream)

    return timing.rate, cast(Fraction, stream.time_base), decoded()


def annotate(job: tuple[Prediction, Path], most_seconds: float = math.inf, source: Source | None = None) -> None:
    """Writes a copy of a video with its timeline drawn in; `job` is its prediction and the file to write.

    Raises DecodeError if the video is broken or this takes more than most_seconds; OSError if the disk is full, or so.
    """
    (prediction, output), deadline, frame = job, time.monotonic() + most_seconds, None
    timeline, labels = prediction.timeline, prediction.labels
    try:
        rate, time_base, frames = shown_frames(prediction.path, source)
        with contextlib.closing(frames), Annotated(output, rate, time_base) as target:
            for seconds, frame, shown in frames:
                still_alive()
                if time.monotonic() > deadline:
                    raise DecodeError(prediction.path, "it takes too long to write")
                scores = timeline.scores[timeline.second_at(round(seconds, 6))]  # timestamps are whole numbers
                best = int(scores.argmax())
                target.write(seconds, frame, shown, labels[best], float(scores[best]))
            if frame is None:
                raise DecodeError(prediction.path, "no frame could be decoded")
    except READING_ERRORS as error:
        if (machine := machine_error(error)) is not None:
            raise machine from error
        raise DecodeError(prediction.path, f"cannot be annotated: {error.strerror or type(error).__name__}") from error


def read_stills(job: tuple[str, Backend], source: Source | None = None) -> tuple[list[float], NDArray[np.uint8]]:
    """Timestamps in seconds, and frames (STILLS, H, W, 3), of a video's contact sheet; DecodeError if it is broken."""
    path, backend = job
    with Video(path, backend, source=source) as video:
        times = (np.arange(STILLS) + 0.5) / STILLS * video.duration_seconds
        return times.tolist(), video.frames_at(times, STILL_SIDE)


def contact_sheet(prediction: Prediction, times: Sequence[float], frames: NDArray[np.uint8]) -> Image.Image:
    """Frames with their times, below the video's most likely class."""
    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((2 * STILL_SIDE, 2 * STILL_SIDE))
    gap, line = STILL_SIDE // 15, STILL_SIDE // 9
    width, height = pictures[0].width + gap, pictures[0].height + 2 * line
    sheet = Image.new("RGB", (STILLS_IN_A_ROW * width + gap, STILLS // STILLS_IN_A_ROW * height + 3 * line))
    draw, best, small = ImageDraw.Draw(sheet), prediction.top(1)[0], ImageFont.load_default(line * 4 // 5)
    write_line(draw, sheet.width, line // 2, line, best.label, f"{100 * best.probability:.1f} %")
    for index, (picture, seconds) in enumerate(zip(pictures, times, strict=True)):
        row, column = divmod(index, STILLS_IN_A_ROW)
        left, top = gap + column * width, 5 * line // 2 + row * height
        sheet.paste(picture, (left, top))
        draw.text((left, top + picture.height + line // 5), clock(seconds), "white", small)
    return sheet


def clock(seconds: float) -> str:
    """A time in minutes and seconds, such as 1:02.5."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
