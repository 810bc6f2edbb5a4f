"""experiments/decoding.py: its rows, the frames they count, and the mistakes it refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import run_tool

from experiments.decoding import Timeline, parse

KEYS = {"source", "backend", "protocol", "clips_per_second", "frames_decoded_per_clip"}


@pytest.fixture
def video_folder(numbered_video, tmp_path):
    shutil.copy(numbered_video, tmp_path / "a b.mp4")
    shutil.copy(numbered_video, tmp_path / "c.mp4")
    (tmp_path / "bad.mp4").touch()
    (tmp_path / "list.txt").write_text("a b.mp4 0\nbad.mp4 1\nc.mp4 1\n")
    return tmp_path


SMALL = ["--crop-size", 32, "--short-side", 32, 40, "--clip-frames", 4, "--frame-stride", 4, "--passes", 2]


def test_rows_have_every_source_and_count_frames(video_folder):
    rows_file = video_folder / "rows.json"
    tool = run_tool(
        "decoding.py", video_folder / "list.txt", "--json", rows_file, *SMALL, "--rounds", 1,
        "--backends", "pyav,decord", "--protocols", "mmaction,slowfast",
    )  # fmt: skip
    assert tool.returncode == 0, tool.stderr
    assert "left out" in tool.stdout
    assert "bad.mp4" in tool.stdout
    assert "2 videos, 2 clips of each, best of 1 rounds" in tool.stdout
    rows = json.loads(rows_file.read_text())
    assert all(set(row) == KEYS and row["clips_per_second"] > 0 for row in rows)
    found = {(row["source"], row["backend"], row["protocol"]): row["frames_decoded_per_clip"] for row in rows}
    wanted = {
        ("octvideo", backend, protocol) for backend in ("pyav", "decord") for protocol in ("mmaction", "slowfast")
    }
    wanted |= {("octvideo", backend, "mmaction, 10 x 3 views") for backend in ("pyav", "decord")}
    wanted |= {("octvideo", "pyav", "mmaction, 10 x 3 views, separate"), ("pytorchvideo", "pyav", "pytorchvideo")}
    assert wanted <= set(found)
    # A window of 16 frames, key frames every 12: from 13 frames to 12 + 15.
    assert 13 <= found["octvideo", "decord", "mmaction"] <= 27
    assert found["octvideo", "pyav", "mmaction"] <= found["octvideo", "decord", "mmaction"]
    assert found["octvideo", "pyav", "mmaction, 10 x 3 views"] <= 60 / 30
    assert found["octvideo", "pyav", "mmaction, 10 x 3 views, separate"] > 4
    if shutil.which("ffmpeg"):
        assert ("ffmpeg", "ffmpeg", "slowfast") in found


def test_without_a_readable_video_there_is_nothing_to_measure(video_folder):
    (video_folder / "bad.txt").write_text("bad.mp4 0\n")
    tool = run_tool("decoding.py", video_folder / "bad.txt")
    assert tool.returncode == 2
    reason = "decoding.py: error: nothing to measure: no video that every backend can read"
    assert tool.stderr.splitlines()[-1] == reason


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--backends", "opencv"], ["--backends: no backend 'opencv'; there are pyav, torchcodec, decord"]),
        (
            ["--protocols", "best"],
            "argument --protocols: no protocol 'best'; there are slowfast, pytorchvideo, mmaction, uniform",
        ),
        (["--passes", "0"], ["argument --passes: ", "whole number from 1", "got '0'"]),
        (["--short-side", "100", "320"], ["--short-side must be two sizes from --crop-size 224 upwards"]),
        (["--target-fps", "0"], ["--target-fps must be positive, got 0.0"]),
        (["--json", "nowhere/rows.json"], ["--json nowhere/rows.json: no such folder"]),
        (["--sizes", "3"], ["unrecognized arguments: --sizes 3"]),
    ],
)
def test_mistakes_end_in_one_line(options, parts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decoding.py"])
    with pytest.raises(SystemExit, match="2"):
        parse(["list.txt", *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("decoding.py: error: ")
    assert all(part in line for part in parts)


def test_a_timeline_counts_from_key_frames(numbered_video):
    timeline = Timeline(str(numbered_video))
    np.testing.assert_allclose(timeline.frames, np.arange(60) / 30, atol=1e-6)
    np.testing.assert_allclose(timeline.keys, np.arange(5) * 12 / 30, atol=1e-6)
    assert timeline.span(13 / 30, 20 / 30) == 9  # 12 to 20
    assert timeline.span(0, 59 / 30) == 60
