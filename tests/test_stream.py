"""Live video: what its clips show, what is dropped, how it is lost and found, and the command."""

import contextlib
import functools
import gc
import http.server
import io
import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from conftest import FORKS, frame_numbers, free_port, start_tool
from test_predict import LABELS, write_checkpoint
from torch import nn

from experiments import streams
from octvideo.commands import options as command_options
from octvideo.commands import predict
from octvideo.data.live import Live
from octvideo.data.motions import write_video
from octvideo.data.preprocessing import Preprocessing
from octvideo.data.video import Video
from octvideo.errors import DecodeError, UserError
from octvideo.evaluation.prediction import Predictor, window_around
from octvideo.evaluation.streaming import Segments, Stream
from octvideo.models.checkpoint import Trained, load_trained

HOW = Preprocessing(4, 4, "slowfast", None, crop_size=32, short_side=(32, 32), test_crop_size=32)


class Mean(nn.Module):
    """Logits (B, 3) that a clip's mean decides, after some seconds."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds = seconds

    def forward(self, clips):
        time.sleep(self.seconds)
        return clips.mean((1, 2, 3, 4))[:, None] * torch.tensor([1.0, 0.0, -1.0])


def predictor(seconds=0.0, how=HOW, **options):
    return Predictor(Trained(Mean(seconds), options, LABELS, how))


def windows(live, every_seconds):
    with contextlib.closing(live):
        live.start()
        yield from iter(lambda: live.window(every_seconds), None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a small network."""
    return write_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt", LABELS)


@pytest.fixture(scope="module")
def transport(tmp_path_factory):
    """Writes MPEG-TS of grey frames that rise by 4, at 30 a second; returns its bytes."""

    def write(width, height, count=30):
        path = tmp_path_factory.mktemp("ts") / "part.ts"
        with av.open(str(path), "w") as container:
            encoding = {"preset": "ultrafast", "tune": "zerolatency", "g": "10"}
            stream = container.add_stream("libx264", rate=30, options=encoding)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(count):
                image = np.full((height, width, 3), 4 * number % 256, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()

    return write


@pytest.fixture(scope="module")
def loop():
    return streams.loop_of_movements(64, gop=10)


@contextlib.contextmanager
def served(port, loop):
    """A server, with the clock of this test, until it is killed."""
    process = FORKS.Process(target=streams.serve, args=(port, time.time(), loop))
    process.start()
    for _ in range(1000):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.02)
    try:
        yield
    finally:
        process.kill()
        process.join()


@pytest.fixture
def silent(transport):
    """The address of a server that sends a second of video to whoever comes, and then nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        clients = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    clients.append(server.accept()[0])
                    clients[-1].sendall(b"HTTP/1.0 200 OK\r\nContent-Type: video/mp2t\r\n\r\n" + transport(64, 48))

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        server.shutdown(socket.SHUT_RDWR)
        for client in clients:
            client.close()


@pytest.mark.parametrize("target_fps", [None, 25])
def test_clips_are_what_the_file_shows_at_their_times(numbered_video, target_fps):
    how = replace(HOW, target_fps=target_fps)
    found = list(windows(Live(str(numbered_video), how), 0.3))
    assert len(found) >= 5
    with Video(numbered_video) as video:
        for window in found:
            expected = video.frames_at(window.times_seconds, 32)[:, :, 5:37]  # 42 x 32 pixels
            assert (window.clip == expected.transpose(3, 0, 1, 2)).all()
            # It is the file's own window that ends there.
            end = round(window.seconds * 30) + 1
            numbers = window_around(how.sampler, end, 30, window.seconds)
            assert frame_numbers(window.clip.transpose(1, 2, 3, 0)) == numbers.tolist()
            assert window.stamp_seconds == pytest.approx(window.seconds)
    assert np.diff([window.seconds for window in found]) == pytest.approx(0.3, abs=0.05)


def test_a_slow_network_gets_the_newest_frames_and_the_others_are_counted(numbered_video):
    network, seen, kept = predictor(0.4, replace(HOW, frame_stride=1)), set(), []  # a clip is of 4 frames
    stream = Stream(str(numbered_video), network, every_seconds=0.1)
    for step in stream:
        start = round((step.times_seconds[0] - 1 / 60) * 30)
        newest = round(step.seconds * 30)
        seen |= set(range(start, newest + 1))
        kept.append(len(stream.live._kept))
        assert step.latency_seconds == pytest.approx(0.4, abs=0.2)
    waiting = {round(one.seconds * 30) for one in stream.live._kept} - seen
    after = set(range(60)) - seen - waiting
    assert stream.live.received == 60
    assert len(after) > 20
    assert stream.live.dropped == len(after)
    assert max(kept) <= 5


def test_nothing_is_dropped_between_clips_that_are_on_time(numbered_video):
    stream = Stream(str(numbered_video), predictor(), every_seconds=0.8)  # clips are 0.53 s long
    assert len(list(stream)) == 2
    assert stream.live.dropped == 0


def test_a_slow_decoder_skips_to_key_frames(tmp_path):
    path = tmp_path / "long.mp4"
    write_video(path, np.zeros((150, 32, 32, 3), np.uint8), 30)
    live = Live(str(path), HOW, see=lambda *_: time.sleep(0.1))  # 15 seconds for the 5 of the file
    begun = time.monotonic()
    found = list(windows(live, 0.5))
    assert time.monotonic() - begun < 8
    assert live.received == 150
    assert live.dropped + live.frames_decoded == 150
    assert live.dropped > 60
    assert found[-1].seconds > 3.5


def test_clips_do_not_mix_sizes_or_reach_across_a_jump_of_the_clock(transport, tmp_path):
    path = tmp_path / "joined.ts"
    path.write_bytes(transport(64, 48) + transport(32, 64) + transport(64, 128))
    live, frames = Live(str(path), HOW, see=lambda seconds, frame, shown: frames.append(seconds)), []
    found = list(windows(live, 0.1))
    assert np.diff(frames).min() > 0
    assert frames[-1] == pytest.approx(89 / 30, abs=0.1)
    shown = [frame_numbers(window.clip.transpose(1, 2, 3, 0)) for window in found]
    assert all((np.diff(numbers) > 0).all() for numbers in shown)
    assert {window.clip.shape for window in found} == {(3, 4, 32, 32)}
    assert {int(window.seconds) for window in found} == {0, 1, 2}
    assert live._kept[-1].image.shape == (64, 32, 3)  # not stretched to the shape of the first frames


def test_a_server_that_was_killed_is_found_again(loop):
    port, frames = free_port(), []
    live = Live(
        f"http://127.0.0.1:{port}/", HOW, see=lambda seconds, frame, shown: frames.append(seconds), silence_seconds=3
    )
    with served(port, loop):
        steps = windows(live, 0.2)
        before = [next(steps) for _ in range(3)]
    while not live.lost:
        time.sleep(0.01)
    with served(port, loop):
        after = [next(window for window in steps if window.seconds > before[-1].seconds + 0.5) for _ in range(2)]
    steps.close()
    assert live.reconnects == 1
    assert not live._thread.is_alive()
    gap = int(np.argmax(np.diff(frames)))
    assert frames[gap + 1] - frames[gap] > 0.5
    assert after[0].times_seconds[0] > frames[gap + 1]
    assert np.diff([window.seconds for window in before]) == pytest.approx(0.2, abs=0.1)


def test_a_server_that_falls_silent_is_lost(silent):
    gc.collect()
    gc.disable()
    live = Live(silent, HOW, silence_seconds=0.3, reconnect_seconds=60)
    for window in windows(live, 0.2):
        assert window.clip.shape == (3, 4, 32, 32)
        if live.reconnects == 3:
            break
    assert live.received > 90
    kept = sum(type(one) is av.VideoFrame for one in gc.get_objects())
    gc.enable()
    assert kept < live.received / 2  # so memory does not depend on when the garbage collector runs


def test_a_source_that_does_not_come_back_is_an_error(loop):
    port = free_port()
    with served(port, loop):
        steps = windows(Live(f"http://user:secret@127.0.0.1:{port}/", HOW, reconnect_seconds=0.3), 0.2)
        next(steps)
    with pytest.raises(DecodeError, match=r"^http://127.0.0.1:\d+/: lost after \d+ frames: ") as caught:
        list(steps)
    assert "secret" not in str(caught.value)


def test_what_see_raises_reaches_the_consumer(numbered_video):
    def see(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        list(Stream(str(numbered_video), predictor(), see=see))


def test_pipes_end_when_their_writer_does(transport, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    data = transport(64, 48)
    threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(data,), daemon=True).start()
    live = Live(str(tmp_path / "fifo"), HOW)
    found = list(windows(live, 0.01))
    assert live.received == live.frames_decoded == 30
    assert found[0].clip.shape == (3, 4, 32, 32)


def test_a_recording_at_an_address_is_shown_at_its_pace_and_ends(transport, tmp_path, monkeypatch):
    with av.open(io.BytesIO(transport(64, 48))) as source, av.open(str(tmp_path / "a.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        live = Live(f"http://127.0.0.1:{server.server_port}/a.mkv", HOW)
        found = list(windows(live, 0.2))
        server.shutdown()
    assert [round(window.seconds, 1) for window in found] == [0.5, 0.7, 0.9]
    assert found[-1].arrival - found[0].arrival == pytest.approx(0.4, abs=0.1)
    assert (live.received, live.dropped, live.reconnects) == (30, 0, 0)


def test_udp(transport):
    port = free_port()
    live = Live(f"udp://127.0.0.1:{port}", HOW)
    steps = windows(live, 0.1)

    def send():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            data = transport(64, 48, count=600)
            for place in range(0, len(data), 1316):
                sender.sendto(data[place : place + 1316], ("127.0.0.1", port))
                time.sleep(0.005)

    threading.Thread(target=send, daemon=True).start()
    assert next(steps).clip.shape == (3, 4, 32, 32)
    steps.close()


def test_scores_follow_the_task(numbered_video):
    single = next(iter(Stream(str(numbered_video), predictor())))
    several = next(iter(Stream(str(numbered_video), predictor(task="multi"))))
    assert single.scores.sum() == pytest.approx(1)
    assert several.scores[1] == pytest.approx(0.5)
    assert several.top(1) == [(LABELS[several.scores.argmax()], several.scores.argmax(), several.scores.max())]


def test_segments_hold_every_frame_and_the_label(numbered_video, tmp_path):
    segments = Segments(tmp_path / "segments", 0.75)
    segments.label, segments.probability = "run", 1.0
    assert list(Stream(str(numbered_video), predictor(), see=segments.see))
    assert len(list((tmp_path / "segments").glob("*.mp4"))) == 2  # the third is not yet complete
    segments.close()
    segments.close()
    assert segments.files == sorted((tmp_path / "segments").iterdir())
    numbers, seconds = [], 0.0
    for path in segments.files:
        with Video(path) as video:
            frames = video.frames_at((np.arange(video.num_frames) + 0.5) / 30)
            seconds += video.duration_seconds
        numbers += frame_numbers(frames[:, :20])  # above the strip
        assert (frames[:, -2:, :, 1] > frames[:, -2:, :, 0] + 50).all()  # a green bar
    assert numbers == list(range(60))
    assert seconds == pytest.approx(2)


@pytest.fixture
def run_here(checkpoint, monkeypatch, capsys):
    """Runs the command in this process; gives its exit status and what it printed."""

    def run(*words):
        monkeypatch.setattr(command_options, "program", "predict.py")
        try:
            status = predict.main([*map(str, words), "--stream", f"--ckpt={checkpoint}", "--device=cpu"])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_a_line_and_a_record_for_each_step(run_here, numbered_video, checkpoint, tmp_path):
    options = ("--every=.5", "--top=2", "--save-video", tmp_path / "segments")
    status, out, err = run_here(numbered_video, *options, "--json", tmp_path / "steps.jsonl")
    assert (status, err) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(records) == 3
    *lines, last = out.splitlines()
    assert last.startswith("3 steps in 2.0 s of the stream, 60 frames received, 0 dropped, 0 reconnects, latency ")
    best = load_trained(checkpoint)
    for line, record in zip(lines, records, strict=True):
        first = record["predictions"][0]
        assert f"{first['label']} {100 * first['probability']:.1f} %" in line
        assert LABELS[first["class"]] == first["label"]
        assert len(record["predictions"]) == 2
        names = {"time", "seconds", "timestamp", "predictions", "latency_seconds", "received", "dropped", "reconnects"}
        assert record.keys() == names
    with Video(numbered_video) as video:  # the first clip is of the first 16 frames
        clip = video.frames_at((window_around(best.preprocessing.sampler, 16, 30, 0) + 0.5) / 30, 32)[:, :, 5:37]
    scores = Predictor(best, device="cpu").scores(clip.transpose(3, 0, 1, 2)[None])[0]
    assert records[0]["predictions"][0]["probability"] == pytest.approx(float(scores.max()), abs=1e-6)
    assert [file.suffix for file in (tmp_path / "segments").iterdir()] == [".mp4"]

    status, out, err = run_here(numbered_video, "--json=-", "--seconds=1.2")  # as many as there are
    assert status == 0
    assert [json.loads(line)["seconds"] for line in out.splitlines()] == pytest.approx([0.5], abs=0.1)
    assert "1 steps in 1." in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.mp4"], "x.mp4: no such file; a stream is a camera's number, an address, - or a file"),
        (["."], ".: a folder; a stream is a camera's number, an address, - or a file"),
        (["README.md"], "README.md: Invalid data found when processing input"),
        (["99"], "99: No such file or directory"),
        (["http://u:p@127.0.0.1:9/"], "http://127.0.0.1:9/: Connection refused"),
        (["ftp://host/x"], "ftp://host/x: an address must start with rtsp, rtsps, rtmp"),
        (["0", "1"], "--stream takes one source and no 1; see"),
        (["0", "--clips=3"], "--stream takes one source and no --clips=3; see"),
        (["0", "--csv", "a.csv"], "--stream takes one source and no --csv a.csv; see"),
        (["0", "--every=0"], "argument --every: must be a positive number, got '0'"),
        (["0", "--json", "."], "Is a directory: '.'"),
        (["README.md", "--json=README.md"], "--json README.md: that is the source"),
        (["0", "--save-video=README.md"], "File exists: 'README.md'"),
        ([], "the following arguments are required: SOURCE"),
    ],
)
def test_each_mistake_is_one_line(run_here, words, message):
    status, out, err = run_here(*words)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("predict.py: error: ")
    assert err.count("\n") == 1


def test_values_that_cannot_be(numbered_video):
    with pytest.raises(UserError, match="every_seconds must be positive, got 0"):
        Stream(str(numbered_video), predictor(), every_seconds=0)


def test_a_disk_that_is_full_ends_the_command(run_here, numbered_video, monkeypatch, tmp_path):
    def write(*_):
        raise av.error.OSError(28, "No space left on device")

    monkeypatch.setattr("octvideo.evaluation.drawing.Annotated.write", write)
    status, _, err = run_here(numbered_video, "--save-video", tmp_path / "segments")
    assert (status, err) == (2, f"predict.py: error: [Errno 28] No space left on device: '{tmp_path}/segments'\n")
    assert list((tmp_path / "segments").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_though_the_server_is_silent(checkpoint, silent, number, tmp_path):
    words = [silent, "--stream", "--ckpt", checkpoint, "--silence=60", "--every=.1"]
    words += ["--save-video", tmp_path / "segments", "--json", tmp_path / "steps.jsonl"]
    process = start_tool("predict.py", words, tmp_path)
    for _ in range(3000):
        if (tmp_path / "steps.jsonl").exists() and (tmp_path / "steps.jsonl").stat().st_size:
            break
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    assert " steps in " in (tmp_path / "stdout").read_text().splitlines()[-1]
    (segment,) = (tmp_path / "segments").iterdir()
    with Video(segment) as video:
        assert video.num_frames > 10


def test_standard_input(transport):
    reading, writing = os.pipe()
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        live = Live("-", HOW)
        with open(writing, "wb") as file:
            file.write(transport(64, 48))  # less than a pipe holds
        found = list(windows(live, 0.01))
    finally:
        os.dup2(before, 0)
    assert live.received == live.frames_decoded == 30
    assert found[0].clip.shape == (3, 4, 32, 32)
