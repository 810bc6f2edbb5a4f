"""TODO."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from octvideo.data.preparation.reencode import machine_error
from octvideo.data.pyav_reader import frame_rate, has_guessed_times, open_stream, to_the_end
from octvideo.data.reader import READING_ERRORS, Backend, upright_turns
from octvideo.data.video import Video
from octvideo.data.watchdog import still_alive
from octvideo.errors import DecodeError
from octvideo.evaluation.prediction import Prediction

ANNOTATED = ".predicted.mp4"  # ends the names of files
THUMBNAIL = ".predicted.jpg"
STILLS, STILLS_IN_A_ROW, STILL_SIDE = 8, 4, 180  # of a contact sheet; pixels
ENCODER = {"crf": "20", "preset": "veryfast", "bf": "0"}  # of a variable rate, B-frames make mp4's duration wrong
BLACK, GREY, WHITE, GREEN = (0, 0, 0), (70, 70, 70), (255, 255, 255), (46, 204, 64)


def write_line(draw: ImageDraw.ImageDraw, width: int, top: int, size: int, left: str, right: str) -> None:
    """Writes a line in Pillow's font of Latin letters: the right part whole, the left one cut where that begins."""
    font, gap = ImageFont.load_default(size), size // 2
    right_start = width - gap - draw.textlength(right, font)
    while left and draw.textlength(left, font) > right_start - 2 * gap:
        left = left.removesuffix("...")[:-1]
        left += "..." if left else ""
    draw.text((gap, top), left, WHITE, font)
    draw.text((right_start, top), right, WHITE, font)


def strip(width: int, height: int, label: str, probability: float) -> Image.Image:
    """What is drawn along the lower edge of a frame: a class with its probability, and below them the bar.

    The bar fills the lowest sixth of it, and is green from the left edge on, as far as the class is probable.

    Args:
        width: of the frame, in pixels; even.
        height: of the frame; the strip is no higher.
        label: name of the class.
        probability: of the class.
    """
    size = max(9, min(width, height) // 18)
    picture = Image.new("RGB", (width, min(height, 2 * size)), BLACK)
    draw = ImageDraw.Draw(picture)
    write_line(draw, width, size // 5, size, label, f"{100 * probability:.0f} %")
    top = bar_top(picture.height)
    draw.rectangle((0, top, width, picture.height), GREY)
    if (filled := round(width * probability)) > 0:
        draw.rectangle((0, top, filled - 1, picture.height), GREEN)
    return picture


def bar_top(height: int) -> int:
    """The first row of the bar in a strip of a height."""
    return height - max(1, height // 6)


def planes(frame: av.VideoFrame) -> list[NDArray[np.uint8]]:
    """Luma (H, W) and the two planes (H / 2, W / 2) of colour of a yuv420p frame of even size."""
    stored, height, width = frame.to_ndarray(), frame.height, frame.width
    return [stored[:height], *stored[height:].reshape(2, height // 2, width // 2)]


def frames_of(
    container: av.container.InputContainer, stream: av.VideoStream, step: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """All frames of a video, each with its moment, in units of the stream's time base; moments rise.

    Args:
        container: the open file.
        stream: in it.
        step: from a frame to the next one, if timestamps do not say.
    """
    counted, start, moment = has_guessed_times(container, stream), stream.start_time or 0, -step
    for frame in to_the_end(container.decode(stream)):
        assert isinstance(frame, av.VideoFrame)
        timed = not counted and frame.pts is not None
        moment = max(frame.pts - start, moment + 1, 0) if timed else moment + step
        yield moment, frame


def annotate(job: tuple[Prediction, Path], most_seconds: float = math.inf) -> None:
    """Writes a video again, with its timeline drawn in.

    Args:
        job: the video's prediction, and the file to write.
        most_seconds: that this may take.

    Raises:
        DecodeError: it is not whole, or takes longer.
        OSError: the disk is full, or the like.
    """
    prediction, output = job
    try:
        with (
            open_stream(prediction.path)[0] as source,
            av.open(os.fspath(output), "w", format="mp4", options={"movflags": "+faststart"}) as target,
        ):
            _annotate(prediction, source, target, time.monotonic() + most_seconds)
    except READING_ERRORS as error:
        if (machine := machine_error(error)) is not None:
            raise machine from error
        raise DecodeError(prediction.path, f"cannot be annotated: {error.strerror or type(error).__name__}") from error


def _annotate(
    prediction: Prediction, source: av.container.InputContainer, target: av.container.OutputContainer, deadline: float
) -> None:
    video = source.streams.best("video")
    assert isinstance(video, av.VideoStream)
    assert video.time_base is not None
    rate, scaler, encoder, shown = frame_rate(video, prediction.path), VideoReformatter(), None, None
    step = max(1, round(1 / (rate * video.time_base)))
    for moment, frame in frames_of(source, video, step):
        still_alive()
        if time.monotonic() > deadline:
            raise DecodeError(prediction.path, "it takes too long to write")
        turns = upright_turns(frame)
        if encoder is None:
            size = frame.width + frame.width % 2, frame.height + frame.height % 2
        picture = scaler.reformat(
            frame, *size, "yuv420p", interpolation="BICUBIC", dst_color_range=ColorRange.MPEG, threads=1
        )
        if encoder is None:
            encoder = target.add_stream("libx264", rate=Fraction(rate), options=ENCODER)
            encoder.width, encoder.height = size[::-1] if turns % 2 else size
            encoder.pix_fmt = "yuv420p"
            encoder.codec_context.time_base = video.time_base
            encoder.codec_context.flags |= Flags.frame_duration  # of the last frame above all
            for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
                setattr(encoder.codec_context, name, int(getattr(picture, name)))
        second = prediction.timeline.second_at(float(moment * video.time_base))
        if second != shown:
            scores, shown = prediction.timeline.scores[second], second
            best = int(scores.argmax())
            drawn = strip(encoder.width, encoder.height, prediction.labels[best], float(scores[best]))
            overlay = planes(av.VideoFrame.from_image(drawn).reformat(format="yuv420p"))
        upright = [np.rot90(plane, turns) for plane in planes(picture)]
        for plane, over in zip(upright, overlay, strict=True):
            plane[-len(over) :] = over
        joined = np.concatenate([plane.reshape(-1) for plane in upright]).reshape(-1, encoder.width)
        image = av.VideoFrame.from_ndarray(joined, "yuv420p")
        image.pts, image.time_base, image.duration = moment, video.time_base, frame.duration or step
        target.mux(encoder.encode(image))
    if encoder is None:
        raise DecodeError(prediction.path, "no frame could be decoded")
    target.mux(encoder.encode())


def read_stills(job: tuple[str, Backend]) -> tuple[list[float], NDArray[np.uint8]]:
    """The moments of a contact sheet's frames in a video, in seconds, and the frames.

    Raises:
        DecodeError: they cannot be decoded.
    """
    path, backend = job
    with Video(path, backend) as video:
        times = (np.arange(STILLS) + 0.5) / STILLS * video.duration_seconds
        return times.tolist(), video.frames_at(times, STILL_SIDE)


def contact_sheet(prediction: Prediction, times: Sequence[float], frames: NDArray[np.uint8]) -> Image.Image:
    """A picture of frames with their times, below the video's most likely class."""
    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((2 * STILL_SIDE, 2 * STILL_SIDE))
    gap, line = STILL_SIDE // 15, STILL_SIDE // 9
    width, height = pictures[0].width + gap, pictures[0].height + 2 * line
    sheet = Image.new("RGB", (STILLS_IN_A_ROW * width + gap, STILLS // STILLS_IN_A_ROW * height + 3 * line), BLACK)
    draw, best = ImageDraw.Draw(sheet), prediction.top(1)[0]
    write_line(draw, sheet.width, line // 2, line, best.label, f"{100 * best.probability:.1f} %")
    for place, (picture, seconds) in enumerate(zip(pictures, times, strict=True)):
        row, column = divmod(place, STILLS_IN_A_ROW)
        left, top = gap + column * width, 5 * line // 2 + row * height
        sheet.paste(picture, (left, top))
        draw.text(
            (left, top + picture.height + line // 5), clock(seconds), WHITE, ImageFont.load_default(line * 4 // 5)
        )
    return sheet


def clock(seconds: float) -> str:
    """A moment as minutes and seconds, 1:02.5."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
