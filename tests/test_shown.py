"""What a player shows: orientation, pixels' shape and time of videos made in every container, drawn frame by frame."""

import contextlib
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_video import backend_or_skip

from octvideo.data.index import IndexedVideo
from octvideo.data.preparation.reencode import measure, reencode
from octvideo.data.video import Video
from octvideo.errors import DecodeError
from octvideo.evaluation.drawing import annotate, read_stills
from octvideo.evaluation.prediction import Prediction, Timeline

BACKENDS = ("pyav", "torchcodec", "decord")
# Stored (x, y) is shown at (ax + cy, bx + dy).
MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
RATE = 25


def draw(number, width=128, height=96):
    """A picture that tells its number, up to 63, and any flip or turn: six bits between white and black columns."""
    columns = np.array([1, *(number >> bit & 1 for bit in range(6)), 0])
    image = np.repeat(np.repeat(columns[None], height, 0), width // 8, 1)
    image[: height // 4], image[-height // 8 :] = 1, 0
    return (30 + 200 * image).astype(np.uint8)[..., None].repeat(3, 2)


def told(image):
    """The number of a drawn picture, of any size; None if it is not as it was drawn."""
    height, width = image.shape[:2]
    grey = image.astype(float).mean(2)
    cells = [grey[height * 3 // 8 : height * 3 // 4, (2 * i + 1) * width // 16] for i in range(8)]
    bits = [cell.mean() > 128 for cell in cells]
    upright = grey[height // 8].mean() > 180 and grey[-height // 24 - 1].mean() < 80
    return sum(bit << i for i, bit in enumerate(bits[1:7])) if upright and bits[0] and not bits[7] else None


def turn_back(image, matrix):
    """The stored picture of one that is shown by a matrix."""
    a, b, c, d = matrix
    image = image[:: -1 if b + d < 0 else 1, :: -1 if a + c < 0 else 1]
    return np.ascontiguousarray(image.swapaxes(0, 1) if b else image)


class Pipe:
    """A recorder that cannot seek back to complete its header."""

    def __init__(self, path):
        self.file = path.open("wb")

    def write(self, data):
        return self.file.write(data)


def write(path, times, *, matrix=(1, 0, 0, 1), shape=Fraction(1), live=False, first=0, rate=RATE):
    """Writes drawn frames, shown at ascending times in seconds."""
    codec, options = {"webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"})}.get(
        path.suffix[1:], ("libx264", {"preset": "ultrafast", "bf": "0" if path.suffix == ".avi" else "2", "g": "12"})
    )
    names = {"ts": "mpegts", "mkv": "matroska"}
    of_live = {"mp4": {"movflags": "frag_keyframe+empty_moov"}, "mov": {"movflags": "frag_keyframe+empty_moov"}}
    header = of_live.get(path.suffix[1:], {"live": "1"}) if live and path.suffix != ".ts" else {}
    base = (
        Fraction(1, RATE)
        if path.suffix == ".avi"
        else Fraction(1, 90000)
        if path.suffix == ".ts"
        else Fraction(1, 1000)
    )
    target = Pipe(path) if live else str(path)
    with av.open(target, "w", format=names.get(path.suffix[1:], path.suffix[1:]), options=header) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        pictures = [turn_back(draw(first + number), matrix) for number in range(len(times))]
        height, width = pictures[0].shape[:2]
        stream.width, stream.height = 2 * round(width / shape / 2), height
        stream.pix_fmt, stream.codec_context.time_base, stream.bit_rate = "yuv420p", base, 2_000_000
        stream.codec_context.sample_aspect_ratio = shape
        for picture, seconds in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(stream.width, height, "yuv420p")
            frame.pts, frame.time_base = round(seconds / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if live:
        target.file.close()
    data = bytearray(path.read_bytes())
    if live and path.suffix in (".webm", ".mkv") and (at := data.find(bytes.fromhex("23e383"))) > 0:
        size = data[at + 3] & 0x7F  # DefaultDuration, which recorders leave out, becomes a void element
        data[at : at + 4 + size] = bytes([0xEC, 0x82 + size, *bytes(2 + size)])
    path.write_bytes(data)
    if path.suffix in (".mp4", ".mov"):
        set_matrix(path, matrix)


def set_matrix(path, matrix):
    """Writes a display matrix into the track's header."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 8
    at += (20 if data[at - 4] == 0 else 32) + 16
    a, b, c, d = (round(65536 * number) for number in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@st.composite
def videos(draw_from):
    """(container, times, matrix, shape, live) of a video that the container can hold."""
    kind = draw_from(st.sampled_from(["mp4", "mov", "mkv", "webm", "ts", "avi"]))
    matrix = draw_from(st.sampled_from(MATRICES)) if kind in ("mp4", "mov") else MATRICES[0]
    shape = Fraction(draw_from(st.sampled_from(["1", "64/45", "8/9"]))) if kind not in ("webm", "avi") else Fraction(1)
    live = kind != "avi" and draw_from(st.booleans())
    count, times = draw_from(st.integers(20, 60)), None
    times = np.arange(count) / RATE
    if kind != "avi":
        if draw_from(st.booleans()):
            seed = draw_from(st.integers(0, 99))
            times = times + np.random.default_rng(seed).uniform(0, 0.6 / RATE, count).round(3)
        offsets = {"mkv": [0, 0.52, 7200, 1e6], "webm": [0, 0.52, 7200, 1e6], "ts": [0, 0.52, 7200, 95442.5]}
        times = times + draw_from(st.sampled_from(offsets.get(kind, [0, 0.52])))
    return kind, times, matrix, shape, live


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for backend in BACKENDS:
        backend_or_skip(backend)
    return tmp_path_factory.mktemp("shown")


@given(video=videos(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_frames_at_random_times_are_those_that_were_drawn_for_them(folder, video, seed):
    kind, times, matrix, shape, live = video
    path = folder / f"video.{kind}"
    write(path, times, matrix=matrix, shape=shape, live=live)
    shown, rng = times - times[0], np.random.default_rng(seed)
    numbers = rng.integers(len(times), size=8)
    ends = np.append(shown[1:], shown[-1] + 1 / RATE)
    wanted = shown[numbers] + rng.uniform(0.1, 0.9, 8) * (ends - shown)[numbers]
    duration = shown[-1] + 1 / RATE
    for backend in BACKENDS:
        # decord's FFmpeg is of 2018, and torchcodec does not find the start of transport streams.
        refusals = [DecodeError] if backend == "decord" or (kind, backend) == ("ts", "torchcodec") else []
        with contextlib.suppress(*refusals), Video(path, backend) as read:
            assert read.duration_seconds == pytest.approx(duration, abs=1.6 / RATE)
            assert read.fps == pytest.approx(len(times) / duration, rel=0.11)
            frames = read.frames_at(wanted)
            assert frames.shape[2] / frames.shape[1] == pytest.approx(128 / 96, rel=0.03)
            assert [told(frame) for frame in frames] == numbers.tolist(), (backend, video)


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_written_copies_are_shown_as_their_source(folder, matrix):
    source, copy = folder / "turned.mp4", folder / "copy.mp4"
    write(source, np.arange(10) / RATE, matrix=matrix, shape=Fraction(64, 45))
    measured, written = reencode(source, copy, 48)
    assert "pixels are not square: 64:45" in measured.note
    assert (written.width, written.height) == (64, 48)
    prediction = Prediction("", np.array([1.0]), ["a"], Timeline(np.array([0, 0.4]), np.array([[1.0]])))
    annotate((replace(prediction, path=str(source)), folder / "annotated.mp4"))
    for path in (copy, folder / "annotated.mp4"):
        with av.open(str(path)) as container:
            assert container.streams.video[0].sample_aspect_ratio in (None, 0, 1)  # 0 is unknown
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert frames[0].shape[1] / frames[0].shape[0] == pytest.approx(128 / 96, rel=0.03)
        assert [told(frame[:-12]) if path != copy else told(frame) for frame in frames] == list(range(10))
    times, stills = read_stills((str(source), "auto"))
    assert [told(still) for still in stills] == [int(time * RATE) for time in times]


@pytest.mark.parametrize("numbers", [(2, 0, 0, 2), (1, 0.5, 0, 1), (0.87, 0.5, -0.5, 0.87)], ids=str)
def test_a_matrix_that_is_no_flip_or_turn_is_left_out_with_one_warning(folder, numbers, caplog):
    path = folder / "odd.mp4"
    write(path, np.arange(10) / RATE)
    set_matrix(path, numbers)
    for backend in BACKENDS:
        with Video(path, backend) as video:
            assert [told(frame) for frame in video.frames_at([0.01, 0.21])] == [0, 5]
            assert video.frames_at([0]).shape == (1, 96, 128, 3)
    assert len([one for one in caplog.messages if "is no flip or quarter turn" in one]) == 1


def join(path, *parts):
    """Joins transport streams of (first number, times) as cat does."""
    content = b""
    for first, times in parts:
        write(path, times, first=first)
        content += path.read_bytes()
    path.write_bytes(content)


JOINED = {
    "restarts": [(0, np.arange(20) / RATE), (20, np.arange(20) / RATE), (40, np.arange(15) / RATE)],
    "jumps": [(0, np.arange(20) / RATE), (20, np.arange(20) / RATE + 3600), (40, np.arange(15) / RATE + 7200)],
    "runs backwards": [(0, np.arange(20) / RATE + 900), (20, np.arange(20) / RATE + 50), (40, np.arange(15) / RATE)],
}


@pytest.mark.parametrize("parts", JOINED.values(), ids=JOINED)
def test_joined_streams_are_shown_one_after_the_other(folder, parts):
    path, copy = folder / "joined.ts", folder / "joined.mp4"
    join(path, *parts)
    times = (np.array([0, 7, 19, 20, 33, 40, 54]) + 0.5) / RATE
    with Video(path) as video:
        assert (video.fps, video.duration_seconds, video.num_frames) == (RATE, 55 / RATE, 55)
        assert "its clock starts 3 times, for 2.20 s in all" in video.note
        assert [told(frame) for frame in video.frames_at(times)] == [0, 7, 19, 20, 33, 40, 54]
        assert [told(frame) for frame in video.frames_at(times[3:5])] == [20, 33]
    measured, written = reencode(path, copy, 96)
    assert (measured.seconds, written.seconds) == pytest.approx((55 / RATE, 55 / RATE))
    known = IndexedVideo(55, measured.fps, measured.seconds, np.array(measured.keyframe_seconds), 0)
    with Video(path, known=known) as video:
        assert [told(frame) for frame in video.frames_at(times)] == [0, 7, 19, 20, 33, 40, 54]
    with Video(copy) as video:
        assert [told(frame) for frame in video.frames_at(times)] == [0, 7, 19, 20, 33, 40, 54]
    for backend in ("torchcodec", "decord"):
        with pytest.raises(DecodeError, match="its clock starts again within the file"):
            Video(path, backend)


def test_a_recording_without_a_rate_gets_that_of_its_timestamps(folder):
    path = folder / "browser.webm"
    times = np.arange(50) / 24 + np.random.default_rng(0).uniform(0, 0.022, 50).round(3)
    write(path, times, live=True, rate=1000)
    for backend in ("pyav", "torchcodec"):
        with Video(path, backend) as video:
            assert video.fps == pytest.approx(24, rel=0.02)
            assert video.duration_seconds == pytest.approx(50 / 24, rel=0.02)
            assert re.match(r"2\d.* frames a second by its timestamps, .* by its header; .* s by its ", video.note)
    assert measure(path).note.startswith(video.note)


def test_a_frame_has_a_largest_size(folder):
    path = folder / "strip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 4096, 2, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((2, 4096, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    with Video(path) as video:
        assert video.frames_at([0]).shape == (1, 2, 4096, 3)
        assert video.frames_at([0], 64).shape == (1, 64, 131072, 3)
        with pytest.raises(DecodeError, match="frames of 4096 x 2 pixels, which would become 524288 x 256"):
            video.frames_at([0], 256)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg to make the video with")
def test_an_interlaced_source_is_named(folder):
    path = folder / "interlaced.mkv"
    source = ["-f", "lavfi", "-i", "testsrc=size=128x96:rate=25:duration=0.4", "-vf", "setfield=tff"]
    command = ["ffmpeg", "-v", "error", *source, "-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-y", str(path)]
    subprocess.run(command, check=True)
    assert measure(path).note == "interlaced"


KINDS = {
    "h264": ["libx264", "-bf", "2"],
    "m4v": ["mpeg4", "-bf", "2"],
    "mjpeg": ["mjpeg"],
    "m2v": ["mpeg2video"],
    "ivf": ["libvpx"],
    "flv": ["flv1"],
    "mpg": ["mpeg2video", "-bf", "2"],
    "wmv": ["wmv2"],
    "dv": ["dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p"],
    "avi": ["mpeg4", "-bf", "2"],
    "m2ts": ["libx264", "-bf", "2"],
    "gif": ["gif"],
}


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg to make the videos with")
@pytest.mark.parametrize("kind", KINDS)
def test_streams_without_or_with_poor_headers_have_their_frames_and_times(folder, kind):
    source, path, times = folder / "source.mkv", folder / f"stream.{kind}", (np.arange(45) + 0.5) / RATE
    if not source.exists():
        write(source, np.arange(45) / RATE)
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(source), "-b:v", "2M", "-c:v", *KINDS[kind], str(path)]
    subprocess.run(command, check=True)
    for backend in BACKENDS:
        with contextlib.suppress(*([] if backend == "pyav" else [DecodeError])), Video(path, backend) as video:
            assert (video.fps, video.duration_seconds) == pytest.approx((RATE, 1.8))
            assert [told(frame) for frame in video.frames_at(times)] == list(range(45))
