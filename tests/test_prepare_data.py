"""octvideo prepare as a user runs it."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_tool

from octvideo.commands import options
from octvideo.commands import prepare as command
from octvideo.data.lists import read_class_names, read_list
from octvideo.data.motions import write_video

CLIPS = {"using segway": ("R6llTwEh07w", "SOX5yA1l24A", "WUzgd7C1pWA")}
STAND_INS = {"arm wrestling": "arm_wrestling.mp4", "flipping pancake": "flipping_a_pancake.mkv"}


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the command in this process; gives its exit status and what it printed."""

    def run(*words):
        monkeypatch.setattr(options, "program", "prepare_data.py")
        try:
            status = command.main([str(word) for word in words])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def videos(tmp_path):
    """Two classes of two videos each; one is broken, one a copy."""
    for number, name in enumerate(("yoga/a.mp4", "archery/b c.mkv")):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True)
        write_video(path, np.full((20, 48, 64, 3), 40 * number, np.uint8), 20)
    shutil.copy(tmp_path / "videos" / "yoga" / "a.mp4", tmp_path / "videos" / "yoga" / "copy.mp4")
    (tmp_path / "videos" / "archery" / "broken.mp4").write_text("no video")
    return tmp_path / "videos"


def test_a_run_says_what_it_found_and_how_to_train(videos, tmp_path):
    finished = run_tool("prepare_data.py", videos, "--output", tmp_path / "out", "--reencode", 32, "--workers", 1)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "\x1b" not in finished.stdout  # no bar where there is no terminal
    rows = [line.split() for line in finished.stdout.splitlines()]
    assert ["split", "ok", "bad", "missing", "duplicate", "all"] in rows
    assert ["train", "2", "1", "0", "1", "4"] in rows
    out = tmp_path / "out"
    lists = f"--data.train_list={out}/train.csv --data.root={out}/videos --data.labels={out}/labels.txt"
    assert f"train with  {lists} --model.num_classes=2" in finished.stdout
    listed = read_list(out / "train.csv", root=out / "videos")
    assert [os.path.relpath(path, out / "videos") for path in listed.paths] == ["archery/b c.mp4", "yoga/a.mp4"]
    assert read_class_names(out / "labels.txt") == ["archery", "yoga"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: SOURCE, --output"),
        (["l.csv", "--output=out"], "--videos DIR is needed, the folder of the videos, unless SOURCE is one folder"),
        (["videos", "--output=out", "--reencode=odd"], "argument --reencode: invalid int value: 'odd'"),
        (["videos", "--output=out", "--reencode=255"], "the short side must be an even number of pixels"),
        (["videos", "--output=out", "--workers=0"], "workers and timeout must be positive, got 0 and 60.0"),
        (["videos", "--output=out", "--out=x"], "unrecognized arguments: --out=x"),
        (["nothing", "--videos=videos", "--output=out"], "nothing: No such file or directory"),
        (["l.csv", "--videos=nothing", "--output=out"], "nothing: no folder of videos"),
        (["l.csv", "--videos=videos", "--output=out", "--labels=no.txt"], "no.txt: No such file or directory"),
    ],
    ids=str,
)
def test_a_mistake_ends_the_run_with_one_clear_line(run_here, videos, monkeypatch, words, message):
    monkeypatch.chdir(videos.parent)
    (videos.parent / "l.csv").write_text("yoga/a.mp4 0\n")
    status, _, errors = run_here(*words)
    assert status == 2
    assert errors.startswith(f"prepare_data.py: error: {message}")
    assert errors.count("\n") == 1


def test_trouble_of_the_machine_is_in_the_exit_status(run_here, videos, tmp_path, monkeypatch):
    original = command.prepare

    def troubled(*arguments, **named):
        outcomes = original(*arguments, **named)
        return [outcomes[0]._replace(status="bad", reason="No space left on device", failed=True), *outcomes[1:]]

    with monkeypatch.context() as patch:
        patch.setattr(command, "prepare", troubled)
        status, printed, errors = run_here(videos, "--output", tmp_path / "out")
    assert status == 1
    assert "report in" in printed
    assert "1 files failed through no fault of theirs (1 x No space left on device)" in errors
    (tmp_path / "file").touch()
    status, _, errors = run_here(videos, "--output", tmp_path / "file" / "out")
    assert status == 1
    assert "Not a directory; the same command continues" in errors
    assert run_here(videos, "--output", tmp_path / "out")[0] == 0


def test_a_second_run_says_that_all_is_known(run_here, videos, tmp_path):
    assert "known" not in run_here(videos, "--output", tmp_path / "out")[1]
    assert "3 of 3 files are known from an earlier run" in run_here(videos, "--output", tmp_path / "out")[1]


def test_without_a_terminal_a_line_now_and_then_tells_how_far_it_is(run_here, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SECONDS_A_LINE", 0.0)
    _, printed, _ = run_here(videos, "--output", tmp_path / "out")
    assert "comparing 2/2 files" in printed
    assert "checking 3/3 files, 2 ok, 1 bad, 0 min left" in printed


def test_unlabelled_videos_give_no_options_to_train_with(run_here, videos, tmp_path):
    _, printed, _ = run_here(videos / "yoga", "--output", tmp_path / "out")
    assert "1 videos have no label: they are in index.bin and in no list" in printed
    assert "train with" not in printed


def test_ctrl_c_stops_a_run_that_the_same_command_continues(videos, tmp_path):
    os.mkfifo(videos / "yoga" / "pipe.mp4")
    line = [sys.executable, ROOT / "tools" / "prepare_data.py", videos, "--output", tmp_path / "out"]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    journal = tmp_path / "out" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and '"ok"' in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "stopped; the same command continues"
    assert not (tmp_path / "out" / "report.csv").exists()


@pytest.mark.parametrize("version", [400, 600])
def test_kinetics_clips_are_found_and_all_others_are_missing(run_here, real_videos, tmp_path, version):
    source = real_videos / "kinetics" / f"kinetics-{version}_val.csv"
    with open(source) as file:
        rows = list(csv.DictReader(file))
    expected = {}
    (tmp_path / "videos" / "arm wrestling").mkdir(parents=True)
    for row in rows:
        stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        if row["youtube_id"] in CLIPS.get(row["label"], ()):
            name, clip = f"{stem}.mp4", f"{row['youtube_id']}.mp4"
        elif row["label"] in STAND_INS and row["label"] not in expected.values():
            clip = STAND_INS[row["label"]]
            folder = "arm wrestling/" if row["label"] == "arm wrestling" else ""
            name = f"{folder}{stem}{os.path.splitext(clip)[1]}"
        else:
            continue
        expected[name] = row["label"]
        shutil.copy(real_videos / "clips" / clip, tmp_path / "videos" / name)
    assert len(expected) == {400: 5, 600: 4}[version]  # one of the clips is not in Kinetics-600
    status, _, _ = run_here(source, "--videos", tmp_path / "videos", "--output", tmp_path / "out")
    assert status == 0
    names = read_class_names(tmp_path / "out" / "labels.txt", version)
    listed = read_list(tmp_path / "out" / "val.csv", num_classes=version)
    assert {path: names[label] for path, label in zip(*listed, strict=True)} == expected
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        found = [row["status"] for row in csv.DictReader(file)]
    assert (found.count("ok"), found.count("missing")) == (len(expected), len(rows) - len(expected))


def test_a_source_is_not_overwritten_by_a_result(run_here, videos, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.csv").write_text("yoga/a.mp4 0\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val.csv").symlink_to(tmp_path / "lists" / "train.csv")
    for source, output in (("lists", "lists"), ("lists/train.csv", "lists"), ("lists", "out")):
        status, _, errors = run_here(tmp_path / source, "--videos", videos, "--output", tmp_path / output)
        message = f"{tmp_path}/lists/train.csv would be overwritten by the result of that name: give another --output"
        assert (status, errors) == (2, f"prepare_data.py: error: {message}\n")
    assert (tmp_path / "lists" / "train.csv").read_text() == "yoga/a.mp4 0\n"


def test_addresses_are_missing_as_they_were_typed_and_folders_of_frames_are_explained(run_here, videos, tmp_path):
    address = "https://example.org/a.mp4"
    (tmp_path / "list.csv").write_text(f"{address} 0\n")
    status, printed, _ = run_here(tmp_path / "list.csv", "--videos", videos, "--output", tmp_path / "out")
    assert status == 0, printed
    line = f'{address},missing,"an address, not a file: download it first"'
    assert (tmp_path / "out" / "report.csv").read_text().splitlines()[1].startswith(line)
    status, _, errors = run_here(address, "--videos", videos, "--output", tmp_path / "out")
    wanted = f"argument SOURCE: must be a file or folder of this machine, got '{address}'"
    assert (status, errors) == (2, f"prepare_data.py: error: {wanted}\n")
    frames = tmp_path / "frames" / "yoga" / "a"
    frames.mkdir(parents=True)
    (frames / "img_0007.jpg").touch()
    status, _, errors = run_here(tmp_path / "frames", "--output", tmp_path / "out")
    assert (status, errors.count("\n")) == (2, 1)
    assert f"{tmp_path / 'frames'}: no video in it; {frames} holds still images, of which this makes a video" in errors
