"""One video: what decoding it to its end tells, and what is written again."""

import errno
import os
import resource
import signal
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from conftest import frame_numbers
from test_video import BAD, GOOD

from octvideo.data import stream as streams
from octvideo.data.preparation import reencode as reencoding
from octvideo.data.preparation.reencode import measure, reencode
from octvideo.data.reader import Orientation
from octvideo.data.stream import decode_all, open_stream
from octvideo.errors import DecodeError


def write_frames(path, images, times_ms, codec="libx264", format="rgb24", **options):
    """A video of the images (H, W, ...), each shown from its time on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": "250", **options})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv444p" if images[0].shape[0] % 2 else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time_ms in zip(images, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format=format)
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def grey(count, height=48, width=64):
    return [np.full((height, width, 3), 4 * (number % 64), np.uint8) for number in range(count)]


def read(path):
    """Timestamps in seconds and images (T, H, W, 3) of a file without rotation."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert {frame.rotation for frame in frames} == {0}
        return np.array([frame.time for frame in frames]), np.stack([f.to_ndarray(format="rgb24") for f in frames])


def test_a_video_is_measured_by_decoding_it(numbered_video):
    measured = measure(numbered_video)
    assert measured[:5] == (60, 30.0, 64, 48, "h264")
    assert measured.seconds == pytest.approx(2)
    assert measured.keyframe_seconds == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    assert measured.note == ""


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_good_files_measure_what_they_hold(real_videos, name):
    measured = measure(real_videos / "odd" / name)
    assert (measured.frames, measured.height, measured.width) == GOOD[name]
    wrong_header = {"cartwheel_metadata_not_utf8.avi": "its header says 84 frames"}
    assert measured.note == wrong_header.get(name, "")


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(real_videos, name):
    with pytest.raises(DecodeError, match=BAD[name]):
        measure(real_videos / "odd" / name)


def test_a_reason_says_how_many_frames_were_good(real_videos):
    with pytest.raises(DecodeError, match=r"Invalid data .* \(after 28 frames\)"):
        measure(real_videos / "odd" / "corrupted.mp4")


@pytest.fixture
def cut_video(tmp_path):
    """The first half of a Matroska file of 4 s, which has no index that would be missing."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(120)]
    write_frames(tmp_path / "cut.mkv", images, [round(n * 1000 / 30) for n in range(120)])
    whole = (tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "cut.mkv"


def test_a_matroska_file_cut_in_the_middle_is_bad(cut_video):
    with pytest.raises(DecodeError, match=r"ends after [12].\d\d s, and its header says 4.0\d s"):
        measure(cut_video)


def test_a_file_without_frame_rate_or_size_is_bad(numbered_video, monkeypatch):
    class Stopped:
        width = height = 0
        average_rate = guessed_rate = time_base = None
        codec_context = SimpleNamespace(has_b_frames=False)

    with monkeypatch.context() as patch:
        patch.setattr(reencoding, "decode_all", lambda *_: iter([(0, Stopped())]))
        with pytest.raises(DecodeError, match="frames of 0 x 0 pixels"):
            measure(numbered_video)
    empty = SimpleNamespace(format=av.ContainerFormat("mp4"), demux=lambda *_: iter(()))
    monkeypatch.setattr(streams, "measure_timing", lambda path, *_: streams._by_packets(path, empty, Stopped()))
    with pytest.raises(DecodeError, match="the video stream has no frame rate"):
        measure(numbered_video)


def test_reencoded_frames_are_the_same_at_the_same_timestamps(tmp_path):
    times_ms = [5000 + round(n * 1000 / 30) for n in range(70)] + [8000, 8500, 8517]
    write_frames(tmp_path / "variable.mkv", grey(73), times_ms, bf="2")
    source, output = reencode(tmp_path / "variable.mkv", tmp_path / "out" / "o.mp4", 256)
    seconds, images = read(tmp_path / "out" / "o.mp4")
    assert seconds * 1000 == pytest.approx(np.array(times_ms) - 5000)
    assert frame_numbers(images) == [number % 64 for number in range(73)]
    assert source.frames == output.frames == 73
    assert output.keyframe_seconds[0] == 0
    gaps = np.diff(np.searchsorted(seconds, [*output.keyframe_seconds, 1e9]))
    assert gaps.max() <= 32
    assert source.seconds == pytest.approx(3.55, abs=0.02)
    assert output.seconds == pytest.approx(source.seconds, abs=0.02)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((48, 64), 24, (24, 32)), ((64, 48), 32, (42, 32)), ((48, 64), 256, (48, 64)), ((33, 17), 256, (32, 16))],
)
def test_larger_frames_are_scaled_and_none_enlarged(tmp_path, size, short_side, expected):
    write_frames(tmp_path / "v.mkv", grey(3, *size), [0, 33, 67])
    _, output = reencode(tmp_path / "v.mkv", tmp_path / "o.mp4", short_side)
    assert (output.height, output.width) == expected


def test_an_output_is_h264_in_an_mp4_file_made_to_be_read_from_its_start(real_videos, tmp_path):
    reencode(real_videos / "odd" / "nasa_13013.mp4", tmp_path / "o.mp4", 64)
    with av.open(str(tmp_path / "o.mp4")) as container:
        (stream,) = container.streams  # no sound
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert container.metadata.get("encoder") is None
    content = (tmp_path / "o.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_rotated_videos_are_written_upright(real_videos, tmp_path):
    stored = read_first(real_videos / "odd" / "video_90.mov")
    reencode(real_videos / "odd" / "video_90.mov", tmp_path / "o.mp4", 320)
    upright = np.rot90(stored, 3)  # a quarter clockwise
    _, images = read(tmp_path / "o.mp4")
    assert images[0].shape == upright.shape == (568, 320, 3)
    assert np.abs(images[0].astype(int) - upright).mean() < 5


def read_first(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize(("quarters", "orientation"), [(1, (1, 1, 0)), (2, (0, 1, 1)), (3, (1, 0, 1)), (-1, (1, 0, 1))])
def test_a_frame_is_turned_counter_clockwise(quarters, orientation):
    y, x = np.mgrid[:32, :48]
    image = np.stack([4 * y, 5 * x, 2 * x + 3 * y], 2).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
    turned = (
        reencoding.from_planes(reencoding.planes(frame, Orientation(*orientation)))
        .to_ndarray(format="rgb24")
        .astype(int)
    )
    expected = np.rot90(frame.to_ndarray(format="rgb24"), quarters).astype(int)
    assert turned.shape == expected.shape
    assert np.abs(turned - expected).mean() < 3


def test_the_same_file_gives_the_same_bytes_whatever_was_encoded_before(tmp_path):
    rng = np.random.default_rng(0)
    for number, size in enumerate([(48, 64), (72, 40), (64, 96)]):
        images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(20)]
        write_frames(tmp_path / f"{number}.mkv", images, range(0, 800, 40))
    written = {}
    for turn, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        for number in order:
            reencode(tmp_path / f"{number}.mkv", tmp_path / f"{turn}" / f"{number}.mp4", 256)
            written.setdefault(number, set()).add((tmp_path / f"{turn}" / f"{number}.mp4").read_bytes())
    assert [len(contents) for contents in written.values()] == [1, 1, 1]


def test_a_bad_video_leaves_no_output(tmp_path, cut_video):
    with pytest.raises(DecodeError, match="ends after"):
        reencode(cut_video, tmp_path / "out" / "o.mp4", 256)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_an_error_of_the_machine(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(30)]
    write_frames(tmp_path / "noise.mkv", images, range(0, 900, 30))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            reencode(tmp_path / "noise.mkv", tmp_path / "out" / "o.mp4", 256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert raised.value.errno == errno.EFBIG
    assert os.listdir(tmp_path / "out") == []


def test_a_codec_that_ffmpeg_does_not_know_makes_a_file_bad(numbered_video, tmp_path):
    (tmp_path / "new.mp4").write_bytes(numbered_video.read_bytes().replace(b"avc1", b"new1"))
    with pytest.raises(DecodeError, match="no decoder for its codec"):
        measure(tmp_path / "new.mp4")


@pytest.fixture
def trouble(tmp_path):
    """A file of whose content FFmpeg says that it is an input/output error."""
    write_frames(tmp_path / "trouble.mkv", grey(20), range(0, 800, 40))
    os.truncate(tmp_path / "trouble.mkv", 300)
    return tmp_path / "trouble.mkv"


def test_broken_content_that_ffmpeg_takes_for_trouble_of_the_machine_is_bad(trouble):
    with pytest.raises(DecodeError, match=r"Input/output error, though its bytes can be read"):
        measure(trouble)
    with pytest.raises(DecodeError, match=r"Input/output error, though its bytes can be read"):
        reencode(trouble, trouble.with_name("o.mp4"), 256)


def test_a_file_that_cannot_be_read_to_its_end_is_an_error_of_the_machine(trouble, monkeypatch):
    def broken_disk(path):
        yield path.encode()
        raise OSError(errno.EIO, "Input/output error")

    shown = []
    monkeypatch.setattr(reencoding, "blocks", broken_disk)
    monkeypatch.setattr(reencoding, "still_alive", lambda: shown.append(1))
    with pytest.raises(OSError, match="Input/output error") as raised:
        measure(trouble)
    assert raised.value.errno == errno.EIO
    assert shown == [1]  # reading a large file takes longer than a decoder may hang


def test_streams_that_appear_on_the_way_do_not_spoil_a_file(numbered_video, monkeypatch):
    demux = av.container.InputContainer.demux

    class Late:
        """As PyAV at the end of such a file, where its memory happens to be so."""

        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self):
            yield from demux(self.container)
            raise IndexError("list index out of range")

    def open_late(media):
        container, stream = open_stream(media)
        return Late(container), stream

    expected = measure(numbered_video)
    monkeypatch.setattr(streams, "open_stream", open_late)
    assert measure(numbered_video) == expected


def test_an_index_error_of_a_decoder_is_not_taken_for_the_end(numbered_video, monkeypatch):
    def fail(*_):
        raise IndexError("ours")

    monkeypatch.setattr(reencoding, "still_alive", fail)
    with pytest.raises(IndexError, match="ours"):
        measure(numbered_video)


def test_an_output_that_does_not_hold_all_frames_does_not_appear(tmp_path, numbered_video, monkeypatch):
    good = measure(numbered_video)
    monkeypatch.setattr(reencoding, "measure", lambda path: good._replace(frames=59))
    with pytest.raises(OSError, match="59 of 60 frames were written"):
        reencode(numbered_video, tmp_path / "o.mp4", 256)

    def refuse(path):
        raise DecodeError(str(path), "broken")

    monkeypatch.setattr(reencoding, "measure", refuse)
    with pytest.raises(OSError, match="the output cannot be read: broken"):
        reencode(numbered_video, tmp_path / "o.mp4", 256)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_refuses_makes_the_video_bad(tmp_path, numbered_video, monkeypatch):
    monkeypatch.setitem(reencoding.ENCODER, "preset", "nonsense")
    with pytest.raises(DecodeError, match=r"cannot be encoded: "):
        reencode(numbered_video, tmp_path / "o.mp4", 256)
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_frames_have_one_timestamp_is_bad(numbered_video, monkeypatch):
    monkeypatch.setattr(reencoding, "decode_all", lambda *of: ((0, frame) for _, frame in decode_all(*of)))
    with pytest.raises(DecodeError, match="its 60 frames have one timestamp"):
        measure(numbered_video)
