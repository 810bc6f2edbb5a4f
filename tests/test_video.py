"""Decoding: the right frames, from good, odd and broken files."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition
from conftest import frame_numbers
from PIL import Image

from octvideo import stores
from octvideo.data.index import IndexedVideo
from octvideo.data.pyav_reader import PyAvReader
from octvideo.data.source import LocalFile
from octvideo.data.stream import packets_of, scan
from octvideo.data.video import Video
from octvideo.errors import DecodeError, StoreError, UnreadableError

FFMPEG_9 = av.library_versions["libavformat"][0] >= 63


def test_frames_are_the_ones_shown_at_the_times_in_any_order(numbered_video):
    with Video(numbered_video) as video:
        assert video.fps == 30
        assert video.duration_seconds == pytest.approx(2)
        assert frame_numbers(video.frames_at(np.array([40, 3, 4, 41, 3]) / 30)) == [40, 3, 4, 41, 3]
        assert frame_numbers(video.frames_at([0.0])) == [0]


def test_times_outside_give_the_first_and_the_last_frame(numbered_video):
    with Video(numbered_video) as video:
        assert frame_numbers(video.frames_at([-1.0, 1.9, 5.0])) == [0, 57, 59]
        assert frame_numbers(video.frames_at([7.0, 8.0])) == [59, 59]


def test_only_the_frames_from_the_key_frame_to_the_last_time_are_decoded(numbered_video):
    with Video(numbered_video) as video:
        assert frame_numbers(video.frames_at(np.array([27, 30]) / 30)) == [27, 30]
        assert 2 <= video.frames_decoded <= 7  # from the key frame 24 on, and fewer where 28 and 29 can be left out


def test_short_side_scales_and_keeps_the_proportions(numbered_video):
    with Video(numbered_video) as video:
        assert video.frames_at([0.0], 24).shape == (1, 24, 32, 3)
        assert video.frames_at([0.0]).shape == (1, 48, 64, 3)


def whole(path):
    """Every frame of a file with the second at which it is shown, by plain decoding from its start."""
    reader = PyAvReader(LocalFile(str(path)))
    yield from reader.frames_from(0)
    reader.close()


def encode(container, times_ms, codec, size=(64, 48), **options):
    """Adds a stream whose frame n, of grey level 4 n (over again from 64 on), is shown from the n-th time."""
    stream = container.add_stream(codec, rate=30, options=options)
    (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
    if codec != "mpeg4":
        stream.codec_context.time_base = Fraction(1, 1000)
    stream.bit_rate = 4_000_000
    for number, time_ms in enumerate(times_ms):
        grey = np.full((*size[::-1], 3), 4 * (number % 64), np.uint8)
        frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
        frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
        if codec == "mpeg4":
            frame.pts, frame.time_base = number, Fraction(1, 30)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_at(path, times_ms, codec, **options):
    """A video file of one such stream."""
    with av.open(str(path), "w") as container:
        encode(container, times_ms, codec, **options)


@pytest.mark.parametrize(("file", "codec"), [("v.mkv", "libx264"), ("v.mp4", "libx264"), ("v.webm", "libvpx")])
def test_variable_frame_rate_is_read_by_timestamps(tmp_path, file, codec):
    times_ms = [0, 33, 67, 100, 1000, 1033, 2000, 2033, 2067, 2100]
    write_at(tmp_path / file, times_ms, codec)
    with Video(tmp_path / file) as video:
        assert frame_numbers(video.frames_at([0.067, 0.5, 1.0, 1.5, 2.07])) == [2, 3, 4, 5, 8]


def test_b_frames_come_in_the_order_they_are_shown(tmp_path):
    write_at(tmp_path / "b.mp4", [round(n * 1000 / 30) for n in range(60)], "libx264", bf="3", g="20")
    with Video(tmp_path / "b.mp4") as video:
        for first in (0, 7, 19, 20, 21, 45):
            assert frame_numbers(video.frames_at((first + np.arange(8)) / 30)) == list(range(first, first + 8))


def test_a_video_that_starts_late_is_timed_from_its_first_frame(tmp_path):
    write_at(tmp_path / "late.mkv", [5000 + round(n * 1000 / 30) for n in range(30)], "libx264", g="10")
    with Video(tmp_path / "late.mkv") as video:
        assert video.duration_seconds == pytest.approx(1, abs=0.005)
        assert frame_numbers(video.frames_at(np.array([0, 12, 25]) / 30)) == [0, 12, 25]


def test_a_live_recording_without_a_duration_is_measured(tmp_path):
    with av.open(str(tmp_path / "live.mkv"), "w", options={"live": "1"}) as container:
        encode(container, [round(n * 1000 / 30) for n in range(45)], "libx264")
    with av.open(str(tmp_path / "live.mkv")) as container:
        assert container.duration is None
    with Video(tmp_path / "live.mkv") as video:
        assert video.duration_seconds == pytest.approx(1.5, abs=0.01)
        assert frame_numbers(video.frames_at([0, 0.5, 1.4])) == [0, 15, 42]


def test_raw_h264_without_timestamps_is_counted_from_its_start(tmp_path):
    with av.open(str(tmp_path / "raw.h264"), "w") as container:
        encode(container, [round(n * 1000 / 25) for n in range(50)], "libx264", g="10", bf="0")
    with Video(tmp_path / "raw.h264") as video:
        times = (np.array([0, 1, 24, 40]) + 0.2) / video.fps
        assert frame_numbers(video.frames_at(times)) == [0, 1, 24, 40]
        assert frame_numbers(video.frames_at(times[2:])) == [24, 40]


def test_frames_that_change_their_size_get_the_first_ones(tmp_path):
    streams = []
    for number, size in enumerate(((64, 48), (32, 48))):
        with av.open(str(tmp_path / f"{number}.h264"), "w") as container:
            encode(container, range(0, 400, 40), "libx264", size=size)
        streams.append((tmp_path / f"{number}.h264").read_bytes())
    (tmp_path / "both.h264").write_bytes(b"".join(streams))
    sizes = {(frame.width, frame.height) for _, frame in whole(tmp_path / "both.h264")}
    assert sizes == {(64, 48), (32, 48)}
    with Video(tmp_path / "both.h264") as video:
        assert video.frames_at(np.arange(18) / video.fps, 24).shape == (18, 24, 32, 3)


@pytest.mark.parametrize(("name", "codec"), [("cut.mp4", "libx264"), ("cut.avi", "mpeg4")])
def test_a_file_cut_off_in_the_middle_gives_no_held_frames(tmp_path, name, codec):
    options = {"movflags": "faststart"} if name == "cut.mp4" else {}
    with av.open(str(tmp_path / name), "w", options=options) as container:
        encode(container, [round(n * 1000 / 30) for n in range(120)], codec)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 6 // 10])
    if name == "cut.avi" and FFMPEG_9:  # it takes the time that is there
        with Video(tmp_path / name) as video:
            assert video.duration_seconds < 2.5
        return
    with pytest.raises(DecodeError, match="Invalid data"), Video(tmp_path / name) as video:
        video.frames_at([0.5, 3.5])


def test_an_end_long_before_the_headers_is_an_error_where_it_matters(numbered_video):
    with Video(numbered_video) as video:
        video._reader.duration_seconds = 4.0
        assert frame_numbers(video.frames_at([1.0, 2.5])) == [30, 59]
        with pytest.raises(DecodeError, match=r"ends after 2.00 s, and its header says 4.00 s"):
            video.frames_at([1.0, 3.5])


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_a_playlist_does_not_lead_to_other_files(numbered_video, tmp_path, backend):
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:2", "#EXTINF:2,", str(tmp_path / "private.mp4"), "#EXT-X-ENDLIST"]
    shutil.copy(numbered_video, tmp_path / "private.mp4")
    (tmp_path / "upload.m3u8").write_text("\n".join(lines))
    with av.open(str(tmp_path / "upload.m3u8")) as container:
        assert container.streams.video  # FFmpeg follows it
    with pytest.raises(DecodeError, match=r"a playlist \(hls\), which names other files"):
        Video(tmp_path / "upload.m3u8", backend)
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile private.mp4\n")
    with pytest.raises(DecodeError, match=r"a playlist \(concat\), which names other files"):
        Video(tmp_path / "list.ffconcat", backend)


def test_a_sound_file_with_a_cover_is_no_video(tmp_path):
    with av.open(str(tmp_path / "cover.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with pytest.raises(DecodeError, match="no video stream"):
        Video(tmp_path / "cover.mp4")


def test_rotated_videos_are_upright(real_videos):
    path = str(real_videos / "odd" / "video_90.mov")
    with Video(path) as video, av.open(path) as container:
        stored = next(container.decode(video=0))
        assert stored.rotation == -90
        upright = np.rot90(stored.to_ndarray(format="rgb24"), 3)  # a quarter clockwise
        assert np.abs(video.frames_at([0.0])[0].astype(int) - upright).mean() < 2


def test_an_error_names_file_and_reason_and_survives_a_worker_process(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DecodeError, match=r"empty.mp4: Invalid data"):
        Video(tmp_path / "empty.mp4")
    with pytest.raises(DecodeError, match="No such file"):
        Video(tmp_path / "nothing.mp4")
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "broken")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "broken", "a.mp4: broken")


def test_files_are_closed_even_when_they_are_broken(tmp_path, numbered_video):
    (tmp_path / "sound.mp4").touch()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with Video(numbered_video) as video:
            video.frames_at([0.5])
        with pytest.raises(DecodeError):
            Video(tmp_path / "sound.mp4")
    assert len(os.listdir("/proc/self/fd")) <= before


def backend_or_skip(name):
    """Skips a test whose backend is not installed: this file is no video, and an installed one says so."""
    try:
        Video(__file__, name)
    except DecodeError:
        return
    except ValueError as error:
        pytest.skip(str(error))


BACKENDS = ["pyav", "torchcodec", "decord"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_finds_frames_by_times(numbered_video, backend):
    backend_or_skip(backend)
    with Video(numbered_video, backend) as video:
        assert video.backend == backend
        assert video.fps == pytest.approx(30)
        assert video.duration_seconds == pytest.approx(2)
        assert video.num_frames == 60
        assert frame_numbers(video.frames_at(np.array([40, 3, 4, 41, 3]) / 30)) == [40, 3, 4, 41, 3]
        assert frame_numbers(video.frames_at([-1.0, 1.9, 5.0])) == [0, 57, 59]
        assert video.frames_at([0.0], 24).shape == (1, 24, 32, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reads_a_variable_rate_and_b_frames(tmp_path, backend):
    backend_or_skip(backend)
    times_ms = [0, 33, 67, 100, 1000, 1033, 2000, 2033, 2067, 2100]
    write_at(tmp_path / "v.mp4", times_ms, "libx264", bf="3")
    with Video(tmp_path / "v.mp4", backend) as video:
        assert frame_numbers(video.frames_at([0.067, 0.5, 1.0, 1.5, 2.07])) == [2, 3, 4, 5, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_refuses_broken_files_with_a_reason(tmp_path, backend):
    backend_or_skip(backend)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DecodeError, match=r"empty.mp4: \S+"):
        Video(tmp_path / "empty.mp4", backend)
    with pytest.raises(DecodeError, match="No such file"):
        Video(tmp_path / "nothing.mp4", backend)


TIMES_MS = [round(n * 1000 / 30) for n in range(90)]


@pytest.mark.parametrize("name", ["f.ts", "f.mpg", "f.flv", "f.mkv", "f.mp4", "f.h264"])
def test_every_clip_of_a_container_is_the_one_that_plain_decoding_gives(tmp_path, name):
    codec = "mpeg2video" if name == "f.mpg" else "libx264"
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"bf": "2", "g": "30"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in range(60):
            grey = np.full((48, 64, 3), 4 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with Video(tmp_path / name) as video:
        assert abs(video.num_frames - 60) <= 2
        for first in range(0, 50, 3):
            times = (first + np.arange(0, 10, 3) + 0.5) / video.fps
            assert frame_numbers(video.frames_at(times)) == list(range(first, first + 10, 3))


def cut_at_half_a_second(source, target):
    """As ffmpeg -ss 0.5 -c copy: packets from the key frame before on, and those before the cut are not shown."""
    with av.open(str(source)) as whole_file, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(whole_file.streams.video[0])
        for packet in whole_file.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts -= round(0.5 / packet.time_base)
                packet.dts -= round(0.5 / packet.time_base)
                container.mux(packet)


def test_times_before_the_first_key_frame_that_is_shown_are_found_with_an_index_too(tmp_path):
    write_at(tmp_path / "whole.mp4", TIMES_MS[:60], "libx264", g="30")
    cut_at_half_a_second(tmp_path / "whole.mp4", tmp_path / "cut.mp4")
    shown = [
        (seconds, frame_numbers(frame.to_ndarray(format="rgb24")[None])[0])
        for seconds, frame in whole(tmp_path / "cut.mp4")
    ]
    shown = [(seconds, number) for seconds, number in shown if seconds >= 0]
    assert shown[0][1] == 15
    known = IndexedVideo(45, 30.0, 1.5, np.array([0.5]), 0)  # frame 0, a key frame, is not shown
    for chosen in (None, known):
        with Video(tmp_path / "cut.mp4", known=chosen) as video:
            for start in (0, 5, 12, 20):
                times = [seconds + 0.01 for seconds, _ in shown[start : start + 4]]
                assert frame_numbers(video.frames_at(times)) == [number for _, number in shown[start : start + 4]]


def test_two_frames_of_one_time_leave_the_others_where_they_are(tmp_path):
    times_ms = [0, 40, 80, 80, 160, 200, 240, 1200, 1240, 1280, 2500, 2540, 2580, 2620]
    with av.open(str(tmp_path / "d.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            for packet in stream.encode(frame):
                packet.pts = packet.dts = time_ms
                packet.time_base = Fraction(1, 1000)
                container.mux(packet)
    for buffered in (64 * 2**20, 0):  # by packets, and by decoding all
        with pytest.MonkeyPatch.context() as patch, Video(tmp_path / "d.mkv") as video:
            patch.setattr("octvideo.data.pyav_reader.BUFFERED_BYTES", buffered)
            assert frame_numbers(video.frames_at([0.045, 0.09, 0.17, 0.9, 1.25, 2.0, 2.6])) == [1, 3, 4, 6, 8, 9, 12]


def test_a_stream_that_nothing_can_decode_is_named_and_tried_with_another_backend(numbered_video, tmp_path):
    unknown = numbered_video.read_bytes().replace(b"avc1", b"xvc9")
    (tmp_path / "unknown.mp4").write_bytes(unknown)
    with pytest.raises(UnreadableError, match="no decoder for its codec"):
        Video(tmp_path / "unknown.mp4", "pyav")
    with pytest.raises(DecodeError, match="no decoder for its codec"):
        Video(tmp_path / "unknown.mp4")


def test_the_index_error_of_pyav_after_the_last_packet_is_the_end_of_the_file(numbered_video, monkeypatch):
    """It comes by chance, where a stream appears in the middle of a file."""
    reader = PyAvReader(LocalFile(str(numbered_video)))
    original = reader._container

    def then_fails(read):
        def call(stream):
            yield from read(stream)
            raise IndexError("list index out of range")

        return call

    failing = SimpleNamespace(
        demux=then_fails(original.demux), seek=original.seek, close=lambda: None, format=original.format
    )
    monkeypatch.setattr(reader, "_container", failing)
    assert frame_numbers(np.stack(reader.read(np.array([1.0, 1.99]), None))) == [30, 59]
    monkeypatch.setattr(reader, "_open", lambda: None)
    monkeypatch.setattr("octvideo.data.pyav_reader.BUFFERED_BYTES", 0)
    assert frame_numbers(np.stack(reader.read(np.array([1.0, 1.99]), None))) == [30, 59]
    reader._seek(0)
    found = scan(packets_of(failing, reader._stream), reader._stream.time_base)
    assert (found.last, found.packets) == (Fraction(59, 30), 60)


def write_long(path, codec, **options):
    """2400 frames at 30 fps with key frames every 60, whose grey level is the frame number modulo 64 times 4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": "60", "bf": "2", **options})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for number in range(2400):
            grey = np.full((48, 64, 3), 4 * (number % 64), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


FAR_APART = np.array([10, 11, 500, 501, 1000, 1700, 2300])


@pytest.mark.parametrize(
    ("name", "codec", "most"), [("l.ts", "libx264", 400), ("l.mp4", "libx264", 400), ("l.avi", "mpeg4", 2310)]
)
def test_times_far_apart_cost_no_more_than_one_pass(tmp_path, name, codec, most):
    write_long(tmp_path / name, codec)
    with Video(tmp_path / name) as video:
        assert frame_numbers(video.frames_at((FAR_APART + 0.5) / 30)) == (FAR_APART % 64).tolist()
        assert video.frames_decoded <= most


def test_frames_of_one_timestamp_are_counted(tmp_path):
    with av.open(str(tmp_path / "o.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            for packet in stream.encode(frame):
                packet.pts = packet.dts = 0
                container.mux(packet)
    with Video(tmp_path / "o.mkv") as video:
        assert video.num_frames == 60
        assert frame_numbers(video.frames_at((np.array([0, 17, 59]) + 0.5) / video.fps)) == [0, 17, 59]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_refuses_to_hold_the_last_frame_long_before_the_headers_end(numbered_video, backend):
    backend_or_skip(backend)
    with Video(numbered_video, backend, known=IndexedVideo(120, 30.0, 4.0, np.empty(0), 0)) as video:
        assert frame_numbers(video.frames_at([1.0, 2.5])) == [30, 59]
        with pytest.raises(DecodeError, match=r"ends after 2.00 s, and its header says 4.00 s"):
            video.frames_at([1.0, 3.5])


def test_a_video_in_which_another_backend_finds_no_frame_is_unreadable(numbered_video, monkeypatch):
    backend_or_skip("decord")
    backend_or_skip("torchcodec")
    monkeypatch.setattr("decord.VideoReader", EmptyVideoReader)
    nothing = SimpleNamespace(begin_stream_seconds=None, end_stream_seconds=None, average_fps=None)
    decoder = SimpleNamespace(metadata=nothing)
    monkeypatch.setattr("torchcodec.decoders.VideoDecoder", lambda *arguments, **options: decoder)
    for backend in ("decord", "torchcodec"):
        with pytest.raises(UnreadableError, match="no frame could be decoded"):
            Video(numbered_video, backend)


class EmptyVideoReader:
    """Decord's, of a file without frames."""

    def __init__(self, path, num_threads):
        self.path = path

    def __len__(self):
        return 0

    def get_frame_timestamp(self, indices):
        return np.empty((len(indices), 2))

    def get_avg_fps(self):
        return 30.0


def test_a_video_says_the_same_after_an_error(numbered_video, monkeypatch):
    with Video(numbered_video, "pyav") as video:
        with monkeypatch.context() as patch:
            patch.setattr(PyAvReader, "read", refuse)
            for _ in range(2):
                with pytest.raises(DecodeError, match="cannot be opened"):
                    video.frames_at([0.5])
        assert frame_numbers(video.frames_at([0.5, 1e18, np.inf])) == [15, 59, 59]


@pytest.mark.parametrize("times", [[], [0.5, float("nan")]])
def test_times_that_are_missing_or_nan_are_refused(numbered_video, times):
    with Video(numbered_video) as video, pytest.raises(ValueError, match="expected times in seconds, got"):
        video.frames_at(times)


def test_a_relative_path_with_a_colon_is_no_address(numbered_video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(numbered_video, "cam1:0001.mp4")
    for backend in BACKENDS:
        backend_or_skip(backend)
        with Video("cam1:0001.mp4", backend) as video:
            assert frame_numbers(video.frames_at([0.5])) == [15]


def test_all_frames_of_a_video_have_one_size_whatever_times_they_are_from(tmp_path):
    parts = []
    for number, size in enumerate(((64, 48), (32, 48))):
        with av.open(str(tmp_path / f"{number}.ts"), "w") as container:
            encode(container, TIMES_MS if number == 0 else [3000 + time for time in TIMES_MS], "libx264", size=size)
        parts.append((tmp_path / f"{number}.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with Video(tmp_path / "both.ts") as video:
        assert video.frames_at([0.5], 24).shape == (1, 24, 32, 3)
        assert video.frames_at([4.5, 0.5, 5.0], 24).shape == (3, 24, 32, 3)


def test_an_unknown_backend_is_refused_and_one_that_is_missing_says_so(numbered_video, monkeypatch):
    with pytest.raises(ValueError, match="backend must be auto, pyav, torchcodec, decord, got 'opencv'"):
        Video(numbered_video, "opencv")
    for name, module in (("decord", "decord"), ("torchcodec", "torchcodec.decoders")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"the backend {name} is not installed"):
            Video(numbered_video, name)


def test_auto_takes_another_backend_where_pyav_gives_no_frame(numbered_video, monkeypatch):
    monkeypatch.setattr(PyAvReader, "_open", refuse)
    backend_or_skip("decord")
    with Video(numbered_video) as video:
        assert video.backend in ("torchcodec", "decord")
        assert frame_numbers(video.frames_at([0.5, 1.0])) == [15, 30]
    with pytest.raises(DecodeError, match="cannot be opened"):
        Video(numbered_video, "pyav")


def test_auto_takes_another_backend_where_pyav_opens_and_decodes_nothing(numbered_video, monkeypatch):
    backend_or_skip("decord")
    with Video(numbered_video) as video:
        monkeypatch.setattr(PyAvReader, "read", refuse)
        assert frame_numbers(video.frames_at([0.5, 1.0])) == [15, 30]
        assert video.backend in ("torchcodec", "decord")


def test_auto_says_what_pyav_said_if_no_other_backend_can_either(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(DecodeError, match="Invalid data found when processing input"):
        Video(tmp_path / "noise.mp4")


def refuse(reader, *arguments):
    raise UnreadableError(reader.path, "cannot be opened")


def test_frames_of_avi_files_with_b_frames_are_counted_because_their_timestamps_are_wrong(tmp_path):
    with av.open(str(tmp_path / "b.avi"), "w") as container:
        encode(container, range(60), "mpeg4", bf="2", g="12")
    with av.open(str(tmp_path / "b.avi")) as container:
        assert next(container.decode(video=0)).pts == 1  # of frame 0
    with Video(tmp_path / "b.avi") as video:
        for first in (0, 7, 30, 50):
            times = (first + np.arange(8) + 0.5) / 30
            assert frame_numbers(video.frames_at(times)) == list(range(first, first + 8))


def test_frames_out_of_order_are_counted_even_where_the_file_does_not_tell(real_videos, monkeypatch):
    path = real_videos / "clips" / "TrumanShow_wave_f_nm_np1_fr_med_26.avi"
    images = [frame.to_ndarray(format="rgb24") for _, frame in whole(path)]
    reader = PyAvReader(LocalFile(str(path)))
    assert reader._in_order
    reader.close()
    monkeypatch.setattr("octvideo.data.stream.has_guessed_times", lambda *_: False)
    reader = PyAvReader(LocalFile(str(path)))
    assert not reader._in_order
    frames = reader.read((np.arange(20, 28) + 0.5) / reader.fps, None)
    assert all(np.array_equal(frame, image) for frame, image in zip(frames, images[20:28], strict=True))
    assert reader._in_order
    reader.close()


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"bf": "2", "g": "40", "b_strategy": "0", "x264-params": "b-pyramid=none"}),
        ("mpeg4", {"bf": "2", "g": "40"}),
    ],
)
def test_frames_that_nothing_refers_to_are_left_out_without_a_trace(tmp_path, codec, options):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, number, 1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    images = [frame.to_ndarray(format="rgb24") for _, frame in whole(tmp_path / "b.mp4")]
    chosen = [3, 12, 21, 30, 39, 48]
    with Video(tmp_path / "b.mp4", "pyav") as video:
        frames = video.frames_at((np.array(chosen) + 0.5) / 30)
        assert len(chosen) <= video.frames_decoded < 35  # of the 49 up to the last one
        assert all(np.array_equal(frame, images[number]) for frame, number in zip(frames, chosen, strict=True))


def test_time_between_wanted_frames_is_left_out_where_key_frames_lie_in_it(numbered_video):
    with Video(numbered_video) as video:
        assert frame_numbers(video.frames_at(np.array([1, 50]) / 30)) == [1, 50]
        assert 2 <= video.frames_decoded <= 5  # frames 0, 1, and 48 to 50
    with Video(numbered_video) as video:
        video.frames_at(np.array([1, 1 + 30 * 20]) / 30)  # so far apart that it seeks
        assert video.frames_decoded <= 14


def test_without_packets_that_lead_to_frames_all_are_decoded(numbered_video, monkeypatch):
    monkeypatch.setattr("octvideo.data.pyav_reader.BUFFERED_BYTES", 100)
    with Video(numbered_video, "pyav") as video:
        assert frame_numbers(video.frames_at(np.array([3, 25, 26, 59]) / 30)) == [3, 25, 26, 59]
        assert video.frames_decoded >= 57


def test_what_an_index_knows_is_not_read_again(numbered_video, monkeypatch):
    monkeypatch.setattr("octvideo.data.stream.scan", None)
    known = IndexedVideo(60, 30.0, 2.0, np.arange(5) * 12 / 30, 0)
    with Video(numbered_video, known=known) as video:
        assert (video.fps, video.duration_seconds) == (30, 2)
        for first in (0, 11, 12, 40):
            assert frame_numbers(video.frames_at(np.arange(first, first + 5) / 30)) == list(range(first, first + 5))
    for backend in ("torchcodec", "decord"):
        backend_or_skip(backend)
        with Video(numbered_video, backend, known=known._replace(duration_seconds=1.9)) as video:
            assert video.duration_seconds == 1.9


GOOD = {  # name: (frames, height, width)
    "cartwheel_metadata_not_utf8.avi": (83, 240, 320),
    "nasa_13013.mp4": (390, 270, 480),
    "metadata.mp4": (1, 240, 320),
    "unordered.mov": (4, 50, 50),
    "gif-transparent.gif": (1, 1, 1),
    "tiny_av1.mp4": (1, 64, 64),
    "av1_video.mkv": (125, 360, 640),
    "h265_video.mp4": (10, 128, 128),
    "h264_10bits.mp4": (30, 200, 200),
    "bbb_480p_vp9_opus_1second.webm": (24, 480, 854),
    "mov-basic.mov": (95, 144, 192),
    "video_0.mov": (3, 320, 568),
    "video_90.mov": (3, 568, 320),
    "video_rotation_90.mp4": (1, 100, 60),
}
BAD = {
    "corrupted.mp4": "Invalid data",
    "truncated.mp4": "Invalid data",
    "empty.mp4": "Invalid data",
    "chunk_out_of_range.mp4": "Invalid data",
    "FlashVideo.flv": "End of file",
    "Mpeg4.mp4": "no video stream",
    "invalid_userdata.mp4": "no frame could be decoded",
    "short-cenc.mp4": "Invalid data",
    "invalid_vp9_bitstream-bug_1416.webm": "Invalid data",
    "opus_audioinit.mp4": "no video stream",
    "sine_mono_s16.wav": "no video stream",
    "no_timescale.mp4": "Invalid data",  # 8 frames decode, then nothing
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_good_files_are_read_whole(real_videos, name):
    frames, height, width = GOOD[name]
    with Video(real_videos / "odd" / name) as video:
        times = np.linspace(0, video.duration_seconds, 20)
        assert video.frames_at(times).shape == (20, height, width, 3)
    shown = [
        (seconds, frame.to_ndarray(format="rgb24", interpolation="BICUBIC"))
        for seconds, frame in whole(real_videos / "odd" / name)
    ]
    assert len(shown) == frames
    turns = {"video_90.mov": 3, "video_rotation_90.mp4": 3}.get(name, 0)
    with Video(real_videos / "odd" / name) as video:
        for number in {0, frames // 3, frames - 1}:
            seconds, image = shown[number]
            assert np.array_equal(video.frames_at([max(seconds, 0)])[0], np.rot90(image, turns))


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(real_videos, name):
    def read():
        with Video(real_videos / "odd" / name) as video:
            video.frames_at(np.linspace(0, video.duration_seconds, 10))

    with pytest.raises(DecodeError, match=BAD[name]):
        read()


@pytest.mark.parametrize("name", ["R6llTwEh07w.mp4", "flipping_a_pancake.mkv", "v_SoccerJuggling_g23_c01.avi"])
def test_seeking_gives_the_frames_of_a_sequential_pass(real_videos, name):
    images = [(seconds, frame.to_ndarray(format="rgb24")) for seconds, frame in whole(real_videos / "clips" / name)]
    with Video(real_videos / "clips" / name) as video:
        for first in (0, 13, len(images) // 2, len(images) - 9):
            chosen = images[first : first + 8]
            frames = video.frames_at([seconds for seconds, _ in chosen])
            for frame, (_, image) in zip(frames, chosen, strict=True):
                assert np.array_equal(frame, image)


ALIKE = [  # 8-bit video in codecs that are exact to the bit
    *("clips/R6llTwEh07w.mp4", "clips/flipping_a_pancake.mkv", "fight/fight/fi001.mp4", "odd/nasa_13013.mp4"),
    *("odd/av1_video.mkv", "odd/h265_video.mp4", "odd/bbb_480p_vp9_opus_1second.webm", "odd/mov-basic.mov"),
    *("odd/video_90.mov", "odd/gif-transparent.gif", "odd/unordered.mov", "odd/metadata.mp4"),
]


@pytest.mark.parametrize("name", ALIKE)
def test_pyav_and_torchcodec_give_the_same_bits(real_videos, name):
    backend_or_skip("torchcodec")
    with Video(real_videos / name, "pyav") as ours, Video(real_videos / name, "torchcodec") as theirs:
        times = np.linspace(0, ours.duration_seconds, 16)
        assert np.array_equal(ours.frames_at(times), theirs.frames_at(times))
        size = max(1, min(ours.frames_at([0])[0].shape[:2]) * 2 // 3)
        difference = np.abs(ours.frames_at(times, size).astype(int) - theirs.frames_at(times, size))
        assert difference.mean() < 1.5  # scaling before or after the change to RGB


def test_mpeg4_differs_by_the_rounding_of_its_transform_alone(real_videos):
    backend_or_skip("torchcodec")
    path = real_videos / "clips" / "v_SoccerJuggling_g23_c01.avi"
    with Video(path, "pyav") as ours, Video(path, "torchcodec") as theirs:
        times = np.linspace(0, ours.duration_seconds, 50)
        assert np.abs(ours.frames_at(times).astype(int) - theirs.frames_at(times)).max() <= 3


@pytest.mark.parametrize("backend", ["torchcodec", "decord", "auto"])
def test_every_backend_ends_in_frames_or_a_reason(real_videos, backend):
    """In watched processes, which show a crash and a hang; docs/data.md has the table."""
    if backend != "auto":
        backend_or_skip(backend)
    program = (
        "import json, sys, numpy; from octvideo.data.video import Video, DecodeError\n"
        "from octvideo.data.watchdog import Watchdog\n"
        "def read(path):\n    with Video(path, sys.argv[1]) as video:\n"
        "        return video.frames_at(numpy.linspace(0, video.duration_seconds, 10)).shape\n"
        "watched, outcomes = Watchdog(read, 60), []\n"
        "for path in sys.argv[2:]:\n    try:\n        outcomes.append(watched(path))\n"
        "    except (RuntimeError, DecodeError) as error:\n        outcomes.append(str(error))\n"
        "print(json.dumps(outcomes))"
    )
    paths = [str(real_videos / "odd" / name) for name in (*GOOD, *BAD)]
    answer = subprocess.run([sys.executable, "-c", program, backend, *paths], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    too_old_for = ("av1_video.mkv", "tiny_av1.mp4", "gif-transparent.gif") if backend == "decord" else ()
    for path, name, outcome in zip(paths, (*GOOD, *BAD), json.loads(answer.stdout.splitlines()[-1]), strict=True):
        if name in BAD or name in too_old_for:
            assert re.fullmatch(rf"{re.escape(path)}: \S.*", outcome)
        else:
            assert outcome == [10, *GOOD[name][1:], 3]


NOISE = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)) for seed in range(3)]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.avif", "a.bmp", "a.tiff", "a.tga", "a.ico"])
def test_a_still_image_is_named_as_such_whatever_its_name(tmp_path, name):
    NOISE[0].save(tmp_path / name)
    shutil.copy(tmp_path / name, tmp_path / "a.mp4")
    for path in (tmp_path / name, *([tmp_path / "a.mp4"] if name != "a.tga" else [])):  # known by its name alone
        with pytest.raises(DecodeError) as error:
            Video(path)
        assert (error.value.path, error.value.reason) == (str(path), "a still image, not a video")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.avif"])
def test_an_animated_image_is_a_video(tmp_path, name):
    NOISE[0].save(tmp_path / name, save_all=True, append_images=NOISE[1:], duration=100)
    with Video(tmp_path / name) as video:
        assert (video.num_frames, video.fps) == (3, 10)
        assert len(video.frames_at([0, 0.1, 0.2])) == 3


def test_an_animated_image_that_ffmpeg_cannot_decode_is_not_called_still(tmp_path):
    NOISE[0].save(tmp_path / "a.webp", save_all=True, append_images=NOISE[1:], duration=100)
    if FFMPEG_9:  # it can
        with Video(tmp_path / "a.webp") as video:
            assert video.num_frames == 3
        return
    with pytest.raises(DecodeError) as error, Video(tmp_path / "a.webp") as video:
        video.frames_at([0])
    assert "still" not in error.value.reason


def test_one_frame_and_frames_of_an_image_codec_are_videos(tmp_path):
    for name, codec, pixels, count in (("a.mp4", "libx264", "yuv420p", 1), ("a.avi", "mjpeg", "yuvj420p", 3)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=10, width=32, height=24, pix_fmt=pixels)
            for image in NOISE[:count]:
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
        with Video(tmp_path / name) as video:
            assert video.num_frames == count


def test_addresses_and_devices_are_named_as_they_were_given(monkeypatch):
    monkeypatch.setattr(stores, "START_PATIENCE_SECONDS", 0)
    with pytest.raises(
        StoreError, match=r"^http://127.0.0.1:9 cannot be used: 1 requests in \d s failed, the last with"
    ):
        Video("http://127.0.0.1:9/a.mp4")
    for path in ("rtsp://camera", "udp://@239.0.0.1:1234"):
        with pytest.raises(DecodeError, match=f"^{path}: no kind of store is called {path.split(':')[0]}://$"):
            Video(path)
    with pytest.raises(DecodeError, match=r"^/dev/null: a device, not a video file$"):
        Video("/dev/null")
