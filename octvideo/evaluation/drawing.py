"""Predictions drawn onto frames: annotated copies of videos, and contact sheets."""

import math
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from octvideo.data.preparation.reencode import add_h264, from_planes, machine_error, planes
from octvideo.data.reader import READING_ERRORS, Backend, Orientation, shown_as, square_pixels
from octvideo.data.source import LocalFile
from octvideo.data.stream import decode_all, open_timed
from octvideo.data.video import Video
from octvideo.data.watchdog import still_alive
from octvideo.errors import DecodeError
from octvideo.evaluation.prediction import Prediction

ANNOTATED, THUMBNAIL = ".predicted.mp4", ".predicted.jpg"  # endings of file names
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


def annotate(job: tuple[Prediction, Path], most_seconds: float = math.inf) -> None:
    """Writes a copy of a video with its timeline drawn in; `job` is its prediction and the file to write.

    Raises DecodeError if the video is broken or this takes more than most_seconds; OSError if the disk is full, or so.
    """
    (prediction, output), deadline = job, time.monotonic() + most_seconds
    scaler, encoder, shown, timestamp = VideoReformatter(), None, None, -1
    how: dict[str, Any] = {"interpolation": "BICUBIC", "dst_color_range": ColorRange.MPEG, "threads": 1}
    try:
        source, video, timing = open_timed(LocalFile(prediction.path))
        with source, av.open(str(output), "w", format="mp4", options={"movflags": "+faststart"}) as target:
            time_base = cast(Fraction, video.time_base)
            step = max(1, round(1 / (timing.rate * time_base)))
            for seconds, frame in decode_all(source, video, timing):
                still_alive()
                if time.monotonic() > deadline:
                    raise DecodeError(prediction.path, "it takes too long to write")
                timestamp = max(round(seconds / time_base), timestamp + 1)  # they must rise
                orientation, shape = shown_as(frame, video)
                if encoder is None:
                    wide, high = square_pixels(frame.width, frame.height, shape)
                    size = wide + wide % 2, high + high % 2
                picture = scaler.reformat(frame, *size, "yuv420p", **how)
                if encoder is None:
                    encoder = add_h264(target, ENCODER, timing.rate, time_base, picture)
                    encoder.width, encoder.height = orientation.size(*size)
                    encoder.codec_context.flags |= Flags.frame_duration  # else the last frame's is lost
                second = prediction.timeline.second_at(float(timestamp * time_base))
                if second != shown:
                    scores, shown = prediction.timeline.scores[second], second
                    best = int(scores.argmax())
                    drawn = strip(encoder.width, encoder.height, prediction.labels[best], float(scores[best]))
                    pixels = av.VideoFrame.from_ndarray(np.asarray(drawn), "rgb24")
                    overlay = planes(pixels.reformat(format="yuv420p"), Orientation())
                upright = planes(picture, orientation)
                for plane, over in zip(upright, overlay, strict=True):
                    plane[-len(over) :] = over
                image = from_planes(upright)
                image.pts, image.time_base, image.duration = timestamp, time_base, frame.duration or step
                target.mux(encoder.encode(image))
            if encoder is None:
                raise DecodeError(prediction.path, "no frame could be decoded")
            target.mux(encoder.encode())
    except READING_ERRORS as error:
        if (machine := machine_error(error)) is not None:
            raise machine from error
        raise DecodeError(prediction.path, f"cannot be annotated: {error.strerror or type(error).__name__}") from error


def read_stills(job: tuple[str, Backend]) -> tuple[list[float], NDArray[np.uint8]]:
    """Timestamps in seconds, and frames (STILLS, H, W, 3), of a video's contact sheet; DecodeError if it is broken."""
    path, backend = job
    with Video(path, backend) as video:
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
