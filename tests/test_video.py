"""Decoding: the right frames, from good, odd and broken files."""

import os
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
from conftest import frame_numbers

from octvideo.data.video import DecodeError, Video


def test_frames_are_the_ones_shown_at_the_moments_in_any_order(numbered_video):
    with Video(numbered_video) as video:
        assert video.fps == 30
        assert video.duration_seconds == pytest.approx(2)
        assert frame_numbers(video.frames_at(np.array([40, 3, 4, 41, 3]) / 30)) == [40, 3, 4, 41, 3]
        assert frame_numbers(video.frames_at([0.0])) == [0]


def test_moments_outside_give_the_first_and_the_last_frame(numbered_video):
    with Video(numbered_video) as video:
        assert frame_numbers(video.frames_at([-1.0, 1.9, 5.0])) == [0, 57, 59]
        assert frame_numbers(video.frames_at([7.0, 8.0])) == [59, 59]


def test_only_the_frames_from_the_key_frame_to_the_last_moment_are_decoded(numbered_video, monkeypatch):
    with Video(numbered_video) as video:
        decoded = []
        original = video._decode
        monkeypatch.setattr(video, "_decode", lambda s: ((decoded.append(t), (t, f))[1] for t, f in original(s)))
        assert frame_numbers(video.frames_at(np.array([27, 30]) / 30)) == [27, 30]
    assert decoded[0] == pytest.approx(24 / 30)
    assert len(decoded) <= 8


def test_short_side_scales_and_keeps_the_proportions(numbered_video):
    with Video(numbered_video) as video:
        assert video.frames_at([0.0], 24).shape == (1, 24, 32, 3)
        assert video.frames_at([0.0]).shape == (1, 48, 64, 3)


def write_at(path, moments_ms, codec, **options):
    """A video whose frame n, of grey level 4 n, is shown from the n-th moment."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.bit_rate = 4_000_000
        for number, moment in enumerate(moments_ms):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("file", "codec"), [("v.mkv", "libx264"), ("v.mp4", "libx264"), ("v.webm", "libvpx")])
def test_variable_frame_rate_is_read_by_timestamps(tmp_path, file, codec):
    moments = [0, 33, 67, 100, 1000, 1033, 2000, 2033, 2067, 2100]
    write_at(tmp_path / file, moments, codec)
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
        assert frame_numbers(video.frames_at(np.array([0, 12, 25]) / 30)) == [0, 12, 25]


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
        assert sum(1 for _ in video._frames_from(0)) in (frames, frames - 65)  # nasa's edit list hides 65


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(real_videos, name):
    def read():
        with Video(real_videos / "odd" / name) as video:
            video.frames_at(np.linspace(0, video.duration_seconds, 10))

    with pytest.raises(DecodeError, match=BAD[name]):
        read()


@pytest.mark.parametrize("name", ["R6llTwEh07w.mp4", "flipping_a_pancake.mkv", "v_SoccerJuggling_g23_c01.avi"])
def test_seeking_gives_the_frames_of_a_sequential_pass(real_videos, name):
    with Video(real_videos / "clips" / name) as video:
        whole = [(seconds, video._to_rgb(frame, 32)) for seconds, frame in video._frames_from(0)]
        for first in (0, 13, len(whole) // 2, len(whole) - 9):
            chosen = range(first, first + 8)
            frames = video.frames_at([whole[index][0] for index in chosen], 32)
            for frame, index in zip(frames, chosen, strict=True):
                assert np.array_equal(frame, whole[index][1])
