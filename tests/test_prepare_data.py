"""octvideo prepare as a user runs it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_tool
from PIL import Image
from test_prepare import write_noise

from octvideo import stores
from octvideo.commands import options
from octvideo.commands import prepare as command
from octvideo.data.lists import read_class_names, read_list
from octvideo.data.motions import write_video
from octvideo.data.preparation import work
from octvideo.data.preparation.prepare import prepare
from octvideo.data.preparation.sources import read_sources
from octvideo.data.video import Video
from octvideo.errors import StoreError

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
    assert "bad  archery/broken.mp4: " in finished.stdout
    out = tmp_path / "out"
    lists = f"--data.train_list={out}/train.csv --data.val_list=null --data.root={out}/videos"
    assert f"train with  {lists} --data.labels={out}/labels.txt --model.num_classes=2" in finished.stdout
    listed = read_list(out / "train.csv", root=out / "videos")
    assert [os.path.relpath(path, out / "videos") for path in listed.paths] == ["archery/b c.mp4", "yoga/a.mp4"]
    assert read_class_names(out / "labels.txt") == ["archery", "yoga"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: SOURCE, --output"),
        (["l.csv", "--output=out"], "--videos DIR is needed, the folder of the videos, unless SOURCE is one folder"),
        (["videos", "--output=out", "--val-share=1"], "argument --val-share: must be below 1, got '1'"),
        (["videos", "--output=out", "--reencode=odd"], "argument --reencode: invalid int value: 'odd'"),
        (["videos", "--output=out", "--reencode=255"], "the short side must be an even number of pixels"),
        (["videos", "--output=out", "--workers=0"], "workers and timeout must be positive, got 0 and 60.0"),
        (["videos", "--output=out", "--shards=9"], "argument --shards: must be a size such as 256MB or 1GB, got '9'"),
        (["videos", "--output=out", "--part=3/2"], "argument --part: must be I/N with I from 1 to N, such as 3/8"),
        (["videos", "--output=out", "--part=1/2", "--merge"], "--merge comes after all parts, without --part"),
        (["videos", "--output=out", "--merge"], "out: there are no parts"),
        (["videos", "--output=out", "--scheduler=here"], "--scheduler must be tcp://HOST:PORT, local[:WORKERS] or"),
        (["videos", "--output=out", "--out=x"], "unrecognized arguments: --out=x"),
        (["videoz", "--output=out"], "videoz: No such file or directory"),
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


def test_a_notebook_forces_colours_and_still_gets_no_bar(run_here, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, printed, _ = run_here(videos, "--output", tmp_path / "out")
    assert "4 videos" in printed
    assert "checking" not in printed


def test_unlabelled_videos_give_no_options_to_train_with(run_here, videos, tmp_path):
    _, printed, _ = run_here(videos / "yoga", "--output", tmp_path / "out")
    assert "1 videos have no label: they are in index.bin and in no list" in printed
    assert "train with" not in printed


def test_a_share_of_each_class_is_held_out(run_here, tmp_path):
    for number in range(10):  # none like another
        write_noise(tmp_path / "videos" / ("archery", "yoga")[number % 2] / f"{number}.mp4", number)
    code, printed, _ = run_here(tmp_path / "videos", "--output", tmp_path / "all")
    assert code == 0
    assert "--val-share 0.2 would take a fifth" in printed
    assert "--data.val_list=null" in printed
    halves = []
    for output in ("some", "again"):
        code, printed, _ = run_here(tmp_path / "videos", "--output", tmp_path / output, "--val-share=0.4")
        assert code == 0
        assert "--data.val_list=null" not in printed
        halves.append([(tmp_path / output / f"{split}.csv").read_text().splitlines() for split in ("train", "val")])
    assert halves[0] == halves[1]
    assert [sorted(line[-1] for line in lines) for lines in halves[0]] == [[*"000111"], [*"0011"]]
    assert not {*halves[0][0]} & {*halves[0][1]}
    write_noise(tmp_path / "split" / "val" / "yoga" / "a.mp4", 0)
    code, _, errors = run_here(tmp_path / "split", "--output", tmp_path / "no", "--val-share=0.4")
    assert (code, "without validation videos: these have some" in errors) == (2, True)


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


def test_addresses_and_folders_of_frames_are_videos_too(run_here, videos, tmp_path):
    frames = videos / "frames"
    frames.mkdir()
    for number in range(5):
        Image.new("RGB", (48, 32), (50 * number, 0, 0)).save(frames / f"img_{number:03d}.png")
    address = f"file://{videos}/yoga"
    (tmp_path / "list.csv").write_text(f"{address}/a.mp4 0\n{address}/gone.mp4 0\nframes 1\narchery 1\n")
    words = (tmp_path / "list.csv", "--videos", videos, "--output", tmp_path / "out", "--frames-fps=10")
    assert run_here(*words)[0] == 0
    rows = (tmp_path / "out" / "report.csv").read_text().splitlines()[1:]
    assert rows == [
        f"{address}/a.mp4,ok,,20,20.0,64,48,h264,1.0",
        f"{address}/gone.mp4,missing,no such file,,,,,,",
        "frames,ok,,5,10.0,48,32,png,0.5",
        "archery,bad,a folder without numbered pictures,,,,,,",
    ]
    status, _, errors = run_here(*words[:-1])
    assert (status, errors.count("\n")) == (2, 1)
    assert "was prepared with other options" in errors
    status, _, errors = run_here(*words, "--shards=1MB")
    assert (status, errors.count("\n")) == (2, 1)
    assert (
        "train-00000.tar cannot be packed: frames is a folder of frames: --reencode makes a file of it; the" in errors
    )
    run_here(*words[:-2], tmp_path / "re", "--reencode=32")
    listed = read_list(tmp_path / "re" / "train.csv", root=tmp_path / "re" / "videos")
    with Video(listed.paths[1]) as video:
        assert (video.fps, video.num_frames) == (25, 5)
        red = video.frames_at(np.arange(5) / 25)[..., 0].mean((1, 2))
    assert red == pytest.approx(50 * np.arange(5), abs=4)


def test_spans_of_a_video_are_lines_and_it_is_checked_once(run_here, videos, tmp_path):
    segments = [{"label": "yoga", "segment": [0, 0.4]}, {"label": "dance", "segment": [0.3, 1]}]
    late = {"label": "yoga", "segment": [1.5, 2]}
    database = {"a": {"subset": "training", "annotations": [*segments, late, segments[0]]}}
    (tmp_path / "net.json").write_text(json.dumps({"database": database}))
    words = (tmp_path / "net.json", "--videos", videos, "--reencode=32", "--shards=1MB", "--output")
    status, printed, _ = run_here(*words, tmp_path / "out")
    assert status == 0, printed
    start = (tmp_path / "out" / "train.csv").read_text().split(",")[0]
    size = (tmp_path / "out" / "videos" / "yoga" / "a.mp4").stat().st_size
    assert start == "tar://yoga/a.mp4::shards/train-00000.tar#bytes=512"
    lines = [f"{start},{size}#t=0.0,0.4 1", f"{start},{size}#t=0.3,1.0 0"]
    assert (tmp_path / "out" / "train.csv").read_text().splitlines() == lines
    rows = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert rows[3].startswith('"yoga/a.mp4#t=1.5,2.0",bad,"the span starts at 1.5 s, and the video ends after 1.00 s"')
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 3  # options, the video, the shard
    listed = read_list(tmp_path / "out" / "train.csv", root=tmp_path / "out")
    again = read_list(str(tmp_path / "out" / "shards" / "train-00000.tar"))
    assert (list(again.paths), again.labels.tolist()) == (list(listed.paths), [1, 0])
    with Video(listed.paths[1]) as video:
        assert video.duration_seconds == pytest.approx(0.7)
    assert run_here(*words, tmp_path / "whole", "--whole")[0] == 0
    assert (tmp_path / "whole" / "train.csv").read_text().endswith(" 0,1\n")
    several = read_list(str(tmp_path / "whole" / "shards" / "train-00000.tar"), num_classes=2, task="multi")
    assert several.labels.tolist() == [[1, 1]]


def test_parts_and_their_merging_from_the_command_line(run_here, videos, tmp_path):
    words = (videos, "--output", tmp_path / "out")
    status, printed, _ = run_here(*words, "--part=1/2")
    assert (status, printed.splitlines()[-1]) == (
        0,
        "part 1 of 2 is complete; when all are: the same command with --merge",
    )
    status, _, errors = run_here(*words, "--merge")
    assert (status, errors.count("\n")) == (2, 1)
    assert "some parts are missing or not complete, run --part 2/2" in errors
    assert run_here(*words, "--part=2/2")[0] == 0
    assert run_here(*words, "--merge")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(".lock", "index.bin", "journal.jsonl", "labels.txt", "report.csv", "train.csv")
    ]


def test_from_a_store_to_a_store(run_here, videos, tmp_path, s3, monkeypatch):
    monkeypatch.setenv("OCTVIDEO_CACHE", str(tmp_path / "cache"))
    for path in videos.rglob("*.*"):
        stores.put(path, f"{s3}/raw/{path.relative_to(videos)}")
    words = ("--reencode=32", "--shards=1MB", "--workers=1")

    def stop(stage, done, total, status):
        if stage == "checking" and done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("octvideo.data.preparation.prepare.SAVING_SECONDS", 0)
        patch.setenv("OCTVIDEO_CACHE", str(tmp_path / "lost"))
        read = read_sources([f"{s3}/raw"], f"{s3}/raw", output=f"{s3}/prepared")
        with pytest.raises(KeyboardInterrupt):
            prepare(read, f"{s3}/raw", f"{s3}/prepared", short_side=32, progress=stop)
    status, printed, errors = run_here(f"{s3}/raw", "--output", f"{s3}/prepared", *words)
    assert status == 0, errors
    assert "2 of 3 files are known from an earlier run" in printed
    root = f"--data.val_list=null --data.root={s3}/prepared --data.labels={s3}/prepared/labels.txt"
    assert f"train with  --data.train_list={s3}/prepared/train.csv {root} --model.num_classes=2" in printed
    assert run_here(videos, "--output", tmp_path / "here", *words)[0] == 0
    made = {path.relative_to(tmp_path / "here").as_posix(): path for path in (tmp_path / "here").rglob("*.*")}
    there = stores.files_below(f"{s3}/prepared")
    assert sorted(there) == sorted(name for name, path in made.items() if path.is_file() and name != ".lock")
    same = [name for name in there if stores.read(f"{s3}/prepared/{name}") == made[name].read_bytes()]
    assert {*there} - {*same} == {"journal.jsonl"}  # where files have other times
    listed = read_list(f"{s3}/prepared/train.csv", root=f"{s3}/prepared")
    with Video(listed.paths[0]) as remote, Video(tmp_path / "here" / "videos" / "archery" / "b c.mp4") as local:
        assert (remote.frames_at([0, 0.5]) == local.frames_at([0, 0.5])).all()
    # Another machine, after this one was killed: it knows what the store's journal knows.
    monkeypatch.setenv("OCTVIDEO_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(work.Work, "check", None)
    stores.remove(f"{s3}/prepared/train.csv")
    _, printed, _ = run_here(f"{s3}/raw", "--output", f"{s3}/prepared", *words)
    assert "3 of 3 files are known from an earlier run" in printed
    assert stores.files_below(f"{s3}/prepared").keys() == there.keys()
    stores.put(tmp_path / "here" / "train.csv", f"{s3}/lists/train.csv")
    named = (f"{s3}/lists/train.csv", "--videos", f"{s3}/raw", "--output", f"{s3}/lists")
    status, _, errors = run_here(*named)
    assert (status, errors.count("\n")) == (2, 1)
    assert "train.csv would be overwritten by the result of that name" in errors
    status, _, errors = run_here("s3://no-such-bucket/raw", "--output", f"{s3}/prepared")
    assert (status, errors.count("\n")) == (2, 1)
    assert "no-such-bucket" in errors


def test_a_store_that_gives_no_video_any_more_ends_the_run(videos, tmp_path, monkeypatch):
    def lose(media):
        raise StoreError("s3://bucket cannot be used")

    monkeypatch.setattr(work, "measure", lose)
    outcomes = prepare(read_sources([videos / "archery"], videos), videos, tmp_path / "out")
    assert [outcome[1:3] for outcome in outcomes if outcome.failed] == [("bad", "s3://bucket cannot be used")] * 2
    with pytest.raises(StoreError, match="s3://bucket cannot be used; the same command continues"):
        prepare(read_sources([videos], videos), videos, tmp_path / "out")
