"""Preparing a data set: what is written, what is found out, and that runs end and continue whatever happens."""

import contextlib
import csv
import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from octvideo.data.index import VideoIndex
from octvideo.data.lists import read_class_names, read_list
from octvideo.data.motions import write_video
from octvideo.data.preparation import prepare as preparation
from octvideo.data.preparation import work
from octvideo.data.preparation.journal import Journal
from octvideo.data.preparation.prepare import prepare
from octvideo.data.preparation.reencode import measure
from octvideo.data.preparation.sources import Catalogue, Entry, read_sources
from octvideo.errors import PreparationError


def write_noise(path, seed, frames=40, size=(48, 64)):
    """A video of its own content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8), 20)


@pytest.fixture(scope="module")
def whole_videos(tmp_path_factory):
    """Folders of two classes: four good videos, an empty file and a text."""
    folder = tmp_path_factory.mktemp("whole")
    for number, name in enumerate(("train/yoga/a.mp4", "train/yoga/b.mkv", "train/archery/a b.mp4", "val/yoga/c.mp4")):
        write_noise(folder / name, number)
    (folder / "val" / "archery").mkdir()
    (folder / "val" / "archery" / "empty.mp4").touch()
    (folder / "train" / "yoga" / "text.avi").write_text("no video")
    return folder


@pytest.fixture
def videos(whole_videos, tmp_path):
    """A copy of whole_videos that a test may change."""
    return shutil.copytree(whole_videos, tmp_path / "videos")


def run(videos, output, *sources, **options):
    return prepare(read_sources(sources or [videos], videos), videos, output, workers=2, **options)


def statuses(outcomes):
    return {outcome.entry.path: outcome.status for outcome in outcomes}


def report(output):
    with open(output / "report.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def content(folder):
    """The hash of each file below a folder, and the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def test_good_videos_are_listed_and_every_video_is_reported(videos, tmp_path):
    run(videos, tmp_path / "out")
    listed = read_list(tmp_path / "out" / "train.csv", root=videos)
    names = read_class_names(tmp_path / "out" / "labels.txt")
    assert [(os.path.relpath(path, videos), names[label]) for path, label in zip(*listed, strict=True)] == [
        ("train/archery/a b.mp4", "archery"),
        ("train/yoga/a.mp4", "yoga"),
        ("train/yoga/b.mkv", "yoga"),
    ]
    assert (tmp_path / "out" / "val.csv").read_text() == "val/yoga/c.mp4 1\n"
    assert not (tmp_path / "out" / "test.csv").exists()
    text = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert text[0] == "path,status,reason,frames,fps,width,height,codec,seconds"
    assert text[1] == "train/archery/a b.mp4,ok,,40,20.0,64,48,h264,2.0"
    assert text[4] == "train/yoga/text.avi,bad,Invalid data found when processing input,,,,,,"
    assert list(report(tmp_path / "out")) == [
        *("train/archery/a b.mp4", "train/yoga/a.mp4", "train/yoga/b.mkv"),
        *("train/yoga/text.avi", "val/archery/empty.mp4", "val/yoga/c.mp4"),
    ]


def test_the_index_describes_the_listed_files(videos, tmp_path):
    run(videos, tmp_path / "out")
    index = VideoIndex(tmp_path / "out" / "index.bin")
    assert len(index) == 4
    video = index[index.rows(["train/yoga/b.mkv"])[0]]
    assert video[:3] == (40, 20.0, pytest.approx(2, abs=0.001))
    assert video.keyframe_seconds == pytest.approx([0, 0.6, 1.2, 1.8])
    status = (videos / "train" / "yoga" / "b.mkv").stat()
    assert (video.bytes, video.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_reencoded_videos_keep_their_paths_and_the_lists_start_from_them(videos, tmp_path):
    run(videos, tmp_path / "out", short_side=32)
    listed = read_list(tmp_path / "out" / "train.csv", root=tmp_path / "out" / "videos")
    assert [os.path.relpath(path, tmp_path / "out" / "videos") for path in listed.paths] == [
        "train/archery/a b.mp4",
        "train/yoga/a.mp4",
        "train/yoga/b.mp4",
    ]
    index = VideoIndex(tmp_path / "out" / "index.bin")
    for path in listed.paths:
        measured = measure(path)
        assert measured[:5] == (40, 20.0, 42, 32, "h264")
        video = index[index.rows([os.path.relpath(path, tmp_path / "out" / "videos")])[0]]
        assert video.keyframe_seconds.tolist() == measured.keyframe_seconds
        assert (video.bytes, video.mtime_ns) == (os.path.getsize(path), 0)  # another run writes it at another time
    assert report(tmp_path / "out")["train/yoga/b.mkv"]["width"] == "64"  # the source's


def test_files_that_differ_in_their_extension_do_not_overwrite_each_other():
    paths = ["x/a.avi", "x/a.mp4", "x/a.mkv", "/abs/a.avi", "../a.avi", "x/a.avi.mp4", "y/../b.webm"]
    assert preparation._output_names(paths) == {
        "x/a.mp4": "x/a.mp4",
        "x/a.avi.mp4": "x/a.avi.mp4",
        "x/a.avi": "x/a.avi.2.mp4",
        "x/a.mkv": "x/a.mkv.mp4",
        "/abs/a.avi": "abs/a.mp4",
        "../a.avi": "a.mp4",
        "y/../b.webm": "y/b.mp4",
    }


def test_no_file_takes_the_place_of_a_folder_that_others_need(videos, tmp_path):
    assert preparation._output_names(["x.avi", "x.mp4/y/z.mp4", "x.mp4/y.avi", "../x.mp4", "x.mp4/y.mp4/a.mp4"]) == {
        "x.avi": "x.avi.mp4",
        "x.mp4/y/z.mp4": "x.mp4/y/z.mp4",
        "x.mp4/y.avi": "x.mp4/y.avi.mp4",
        "../x.mp4": "x.mp4.mp4",
        "x.mp4/y.mp4/a.mp4": "x.mp4/y.mp4/a.mp4",
    }
    (videos / "train" / "a.mp4").mkdir()
    shutil.move(videos / "train" / "yoga" / "b.mkv", videos / "train" / "a.mkv")
    shutil.move(videos / "train" / "yoga" / "a.mp4", videos / "train" / "a.mp4" / "b.mp4")
    outcomes = run(videos, tmp_path / "out", short_side=32)
    assert list(statuses(outcomes).values()).count("ok") == 4
    assert (tmp_path / "out" / "videos" / "train" / "a.mkv.mp4").is_file()


def test_duplicates_are_named_with_what_differs(videos, tmp_path):
    shutil.copy(videos / "train" / "yoga" / "a.mp4", videos / "val" / "archery" / "copy.mp4")
    shutil.copy(videos / "val" / "archery" / "empty.mp4", videos / "val" / "yoga" / "empty.mp4")
    shutil.copy(videos / "train" / "yoga" / "text.avi", videos / "val" / "yoga" / "text.avi")
    outcomes = run(videos, tmp_path / "out")
    found = {outcome.entry.path: outcome for outcome in outcomes}
    copy = found["val/archery/copy.mp4"]
    assert copy.status == "duplicate"
    assert copy.reason == ("same content as train/yoga/a.mp4, which is in train, not val, which has label 1, not 0")
    assert report(tmp_path / "out")["val/archery/copy.mp4"]["frames"] == "40"
    assert found["val/yoga/empty.mp4"].status == found["val/yoga/text.avi"].status == "bad"
    assert "copy" not in (tmp_path / "out" / "val.csv").read_text()


def test_a_path_that_is_listed_twice_is_a_duplicate(videos, tmp_path):
    (tmp_path / "train.csv").write_text("train/yoga/a.mp4 0\ntrain/yoga/a.mp4 0\ntrain/yoga/../yoga/a.mp4 1\n")
    outcomes = run(videos, tmp_path / "out", tmp_path / "train.csv")
    assert [outcome[1:3] for outcome in outcomes] == [
        ("ok", ""),
        ("duplicate", "listed before"),
        ("duplicate", "listed before, which has label 0, not 1"),
    ]


def test_the_first_good_one_of_the_same_files_is_listed_when_reencoded(videos, tmp_path):
    shutil.copy(videos / "train" / "yoga" / "a.mp4", videos / "train" / "yoga" / "a.avi")
    outcomes = run(videos, tmp_path / "out", short_side=32)
    assert statuses(outcomes)["train/yoga/a.avi"] == "ok"
    assert statuses(outcomes)["train/yoga/a.mp4"] == "duplicate"
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 4


def test_missing_videos_folders_and_names_that_no_list_can_hold_are_reported(videos, tmp_path):
    (videos / "folder.mp4").mkdir()
    names = ["nothing.mp4", "folder.mp4", "two\nlines.mp4", "train/yoga/a.mp4/x.mp4", "x" * 300 + ".mp4"]
    shutil.copy(videos / "train" / "yoga" / "a.mp4", videos / names[2])
    catalogue = Catalogue([Entry(name, 0, "test") for name in names], ["yoga"])
    outcomes = prepare(catalogue, videos, tmp_path / "out")
    assert [outcome[1:3] for outcome in outcomes] == [
        ("missing", "no such file"),
        ("bad", "a folder without numbered pictures"),
        ("bad", "a list cannot hold its name: rename it"),
        ("missing", "no such file"),
        ("bad", "File name too long"),
    ]
    assert not any(outcome.failed for outcome in outcomes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(".lock", "index.bin", "journal.jsonl", "labels.txt", "report.csv")
    ]


def test_videos_without_a_label_are_indexed_and_in_no_list(videos, tmp_path):
    catalogue = Catalogue([Entry("train/yoga/a.mp4", None, "test")], [])
    (outcome,) = prepare(catalogue, videos, tmp_path / "out")
    assert outcome[1:3] == ("ok", "no label: in no list")
    assert not (tmp_path / "out" / "test.csv").exists()
    assert VideoIndex(tmp_path / "out" / "index.bin").rows(["train/yoga/a.mp4"]).tolist() == [0]


def refuse_to_work(run, path):
    raise AssertionError(f"{path} is worked on again")


def test_a_run_after_a_complete_one_opens_no_video_and_changes_nothing(videos, tmp_path, monkeypatch):
    for output, options in ((tmp_path / "checked", {}), (tmp_path / "written", {"short_side": 32})):
        run(videos, output, **options)
        before = content(output)
        with monkeypatch.context() as patch:
            patch.setattr(work.Work, "check", refuse_to_work)
            patch.setattr(work.Work, "fingerprint", refuse_to_work)
            assert not any(outcome.failed for outcome in run(videos, output, **options))
        assert content(output) == before


def test_a_file_that_changed_is_worked_on_again(videos, tmp_path):
    run(videos, tmp_path / "out", short_side=32)
    kept = (tmp_path / "out" / "videos" / "train" / "yoga" / "a.mp4").stat().st_mtime_ns
    write_noise(videos / "train" / "yoga" / "b.mkv", 77, frames=30)
    (videos / "val" / "yoga" / "c.mp4").write_text("no video any more")
    write_noise(videos / "val" / "archery" / "empty.mp4", 78)
    outcomes = run(videos, tmp_path / "out", short_side=32)
    assert report(tmp_path / "out")["train/yoga/b.mkv"]["frames"] == "30"
    assert measure(tmp_path / "out" / "videos" / "train" / "yoga" / "b.mp4").frames == 30
    assert statuses(outcomes)["val/yoga/c.mp4"] == "bad"
    assert not (tmp_path / "out" / "videos" / "val" / "yoga" / "c.mp4").exists()
    assert (tmp_path / "out" / "val.csv").read_text() == "val/archery/empty.mp4 0\n"
    assert (tmp_path / "out" / "videos" / "train" / "yoga" / "a.mp4").stat().st_mtime_ns == kept
    run(videos, tmp_path / "anew", short_side=32)
    assert content(tmp_path / "out") == content(tmp_path / "anew")


def test_an_output_that_is_gone_is_written_again(videos, tmp_path):
    run(videos, tmp_path / "out", short_side=32)
    before = content(tmp_path / "out")
    (tmp_path / "out" / "videos" / "train" / "yoga" / "a.mp4").unlink()
    (tmp_path / "out" / "videos" / "train" / "yoga" / "b.mp4").write_bytes(b"cut")
    run(videos, tmp_path / "out", short_side=32)
    assert content(tmp_path / "out") == before


def test_what_is_known_of_other_sources_stays_known(videos, tmp_path, monkeypatch):
    run(videos, tmp_path / "out")
    (tmp_path / "val.csv").write_text("val/yoga/c.mp4 yoga\n")
    run(videos, tmp_path / "out", tmp_path / "val.csv")
    assert len(report(tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "train.csv").exists()
    monkeypatch.setattr(work.Work, "check", refuse_to_work)
    assert not any(outcome.failed for outcome in run(videos, tmp_path / "out"))
    assert len(report(tmp_path / "out")) == 6


def test_torn_and_meaningless_lines_of_a_journal_are_done_again(videos, tmp_path):
    run(videos, tmp_path / "out")
    before = content(tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    path = json.loads(lines[1])["path"].encode()
    strange = b'123\n[1]\n"x"\nnull\n{}\n{"path":"%s"}\n{"path":"%s","bytes":"1","mtime_ns":1}\n' % (path, path)
    torn = b"\0\0\0\n" + b"".join(lines[1:3]) + strange + lines[3][:50]
    for text in (lines[0] + torn, b'7\n"x"\n' + lines[0] + torn):
        journal.write_bytes(text)
        run(videos, tmp_path / "out")
        assert content(tmp_path / "out") == before


def test_a_journal_of_version_0_1_continues(videos, tmp_path, monkeypatch):
    shutil.copy(videos / "train" / "yoga" / "a.mp4", videos / "val" / "archery" / "copy.mp4")
    run(videos, tmp_path / "out", short_side=32)
    before = content(tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    options, *records = map(json.loads, journal.read_text().splitlines())
    lines = [json.dumps(options)]
    for record in records:  # it appended what was new, and nothing else
        identity = {key: record.pop(key) for key in ("path", "bytes", "mtime_ns")}
        parts = [{"sha256": record.pop("sha256")}] if "sha256" in record else []
        parts += [record] if record else []
        lines += ["", *(json.dumps({**identity, **part}) for part in parts)]
    assert len(lines) == 1 + 7 + 8  # seven files, of which one original has two lines
    journal.write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(work.Work, "check", refuse_to_work)
    monkeypatch.setattr(work.Work, "fingerprint", refuse_to_work)
    assert not any(outcome.failed for outcome in run(videos, tmp_path / "out", short_side=32))
    assert content(tmp_path / "out") == before


def test_where_no_room_can_be_kept_for_the_results_the_rest_works(videos, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    assert list(statuses(run(videos, tmp_path / "out")).values()).count("ok") == 4


def start(*arguments, **options):
    """Runs a data set's preparation in another process, which can be killed."""
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments, kwargs=options)
    process.start()
    return process


def children(process):
    found = []
    for task in os.listdir(f"/proc/{process.pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended since
            found += map(int, Path(f"/proc/{process.pid}/task/{task}/children").read_text().split())
    return found


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_running(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def num_lines(journal):
    return journal.read_bytes().count(b"}\n") if journal.exists() else 0


def kill(process, journal, least_lines, delay_seconds):
    """Kills a run, some time after its journal has so many lines, with all that it has started."""
    wait_until(lambda: not process.is_alive() or num_lines(journal) >= least_lines)
    time.sleep(delay_seconds)
    assert process.is_alive()
    wait_until(lambda: children(process))  # between comparing and checking there are none
    decoders = children(process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not any(map(is_running, decoders)))


def kill_three_times_and_finish(videos, output, sources, num_files, **options):
    """Kills runs at three random times, each after it has finished some files, and lets a fourth one end."""
    rng, journal = random.Random(num_files), output / "journal.jsonl"
    for _ in range(3):
        least_lines = max(num_lines(journal), 1) + 1 + rng.randrange(num_files // 8 + 1)
        process = start(videos, output, *sources, **options)
        kill(process, journal, least_lines, rng.random() * 0.02)
        assert not (output / "report.csv").exists()
    return run(videos, output, *sources, **options)


@pytest.mark.parametrize("short_side", [None, 32])
def test_a_run_killed_three_times_ends_with_the_same_bytes(tmp_path, short_side):
    for number in range(24):
        write_noise(tmp_path / "videos" / f"class {number % 3}" / f"{number}.mp4", number, frames=60, size=(96, 128))
    for number in (3, 7):
        shutil.copy(tmp_path / "videos" / "class 0" / f"{3 * number}.mp4", tmp_path / "videos" / "class 1")
    run(tmp_path / "videos", tmp_path / "whole", short_side=short_side)
    outcomes = kill_three_times_and_finish(
        tmp_path / "videos", tmp_path / "killed", [tmp_path / "videos"], 26, short_side=short_side
    )
    assert sorted(statuses(outcomes).values()) == ["duplicate"] * 2 + ["ok"] * 24
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("short_side", [None, 96])
def test_real_and_odd_videos_killed_three_times_end_with_the_same_bytes(real_videos, tmp_path, short_side):
    odd = sorted(path for path in (real_videos / "odd").iterdir() if path.is_file())
    for split in ("train", "val"):
        lines = (real_videos / "fight" / f"{split}.csv").read_text().splitlines(keepends=True)[::4]
        listed = "".join(f"fight/{line}" for line in lines)
        listed += "".join(f"odd/{path.name} 0\n" for path in odd[split == "val" :: 2])
        (tmp_path / f"{split}.csv").write_text(listed)
    sources = [tmp_path / "train.csv", tmp_path / "val.csv"]
    outcomes = run(real_videos, tmp_path / "whole", *sources, short_side=short_side)
    found = list(statuses(outcomes).values())
    assert (found.count("ok"), found.count("bad")) == (60 + 14, 12)
    kill_three_times_and_finish(real_videos, tmp_path / "killed", sources, len(found), short_side=short_side)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_pipe_that_nobody_writes_is_bad_after_the_timeout(videos, tmp_path):
    os.mkfifo(videos / "train" / "yoga" / "pipe.mp4")
    outcomes = run(videos, tmp_path / "out", timeout_seconds=1.0)
    found = {outcome.entry.path: outcome for outcome in outcomes}
    assert found["train/yoga/pipe.mp4"][1:3] == ("bad", "no result within 1 s: the decoder was killed")
    assert not found["train/yoga/pipe.mp4"].failed
    assert list(statuses(outcomes).values()).count("ok") == 4


def test_a_file_that_cannot_be_compared_is_checked_all_the_same(videos, tmp_path, monkeypatch):
    shutil.copy(videos / "train" / "yoga" / "a.mp4", videos / "val" / "archery" / "copy.mp4")

    def fail(path):
        raise OSError("the memory is full")

    monkeypatch.setattr(work, "blocks", fail)
    found = statuses(run(videos, tmp_path / "out"))
    assert found["train/yoga/a.mp4"] == found["val/archery/copy.mp4"] == "ok"


def test_a_decoder_that_hung_is_tried_again_only_with_more_time(videos, tmp_path, monkeypatch):
    def hang(media):
        if media.name.endswith("b.mkv"):
            signal.pause()
        return measure(media)

    monkeypatch.setattr(work, "measure", hang)
    assert statuses(run(videos, tmp_path / "out", timeout_seconds=0.5))["train/yoga/b.mkv"] == "bad"
    monkeypatch.setattr(work, "measure", measure)
    assert statuses(run(videos, tmp_path / "out", timeout_seconds=0.5))["train/yoga/b.mkv"] == "bad"
    assert statuses(run(videos, tmp_path / "out", timeout_seconds=9.0))["train/yoga/b.mkv"] == "ok"


@pytest.mark.parametrize(
    ("death", "failed"), [(signal.SIGSEGV, False), (signal.SIGKILL, True)], ids=["crashed", "killed"]
)
def test_a_decoder_that_dies_takes_only_its_video_with_it(videos, tmp_path, monkeypatch, death, failed):
    def die(media):
        if media.name.endswith("b.mkv"):
            faulthandler.disable()  # pytest's would print where
            os.kill(os.getpid(), death)
        return measure(media)

    monkeypatch.setattr(work, "measure", die)
    outcomes = run(videos, tmp_path / "out")
    (dead,) = [outcome for outcome in outcomes if outcome.entry.path == "train/yoga/b.mkv"]
    assert dead.status == "bad"
    assert death.name in dead.reason
    assert dead.failed == failed  # who is killed may be innocent
    assert list(statuses(outcomes).values()).count("ok") == 3
    monkeypatch.setattr(work, "measure", measure)
    assert statuses(run(videos, tmp_path / "out"))["train/yoga/b.mkv"] == ("ok" if failed else "bad")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ZeroDivisionError("division by zero"), "unexpected ZeroDivisionError: division by zero"),
    ],
    ids=["permission", "space", "unforeseen"],
)
def test_what_no_video_is_to_blame_for_is_reported_and_tried_again(videos, tmp_path, monkeypatch, error, reason):
    def fail(media):
        if media.name.endswith("b.mkv"):
            raise error
        return measure(media)

    run(videos, tmp_path / "whole")
    monkeypatch.setattr(work, "measure", fail)
    outcomes = run(videos, tmp_path / "out")
    assert [outcome[1:3] for outcome in outcomes if outcome.failed] == [("bad", reason)]
    assert report(tmp_path / "out")["train/yoga/b.mkv"]["reason"] == reason
    monkeypatch.setattr(work, "measure", measure)
    assert not any(outcome.failed for outcome in run(videos, tmp_path / "out"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def run_as_nobody(videos, output):
    if os.geteuid() == 0:  # who may read everything
        os.setgid(65534)
        os.setuid(65534)
    run(videos, output)


def test_a_file_that_may_not_be_read_is_reported_as_such(whole_videos):
    with tempfile.TemporaryDirectory() as folder:
        videos, output = shutil.copytree(whole_videos, Path(folder) / "videos"), Path(folder) / "out"
        output.mkdir()
        for path in (Path(folder), videos, output):
            path.chmod(0o777)
        (videos / "train" / "yoga" / "a.mp4").chmod(0)
        process = multiprocessing.get_context("fork").Process(target=run_as_nobody, args=(videos, output))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        rows = report(output)
    assert rows["train/yoga/a.mp4"]["reason"] == "Permission denied"
    assert [row["status"] for row in rows.values()].count("ok") == 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for less than 400 kB, 64 kB of them for the results."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_spoils_some_files_and_the_same_command_continues(videos, tmp_path, small_disk):
    for number in range(4):
        write_noise(videos / "train" / "yoga" / f"large {number}.mp4", 90 + number, frames=60, size=(120, 160))
    outcomes = run(videos, small_disk / "out", short_side=120)
    full = [outcome for outcome in outcomes if outcome.failed]
    assert len(full) >= 3
    assert {outcome[1:3] for outcome in full} == {("bad", "No space left on device")}
    assert "ok" in statuses(outcomes).values()
    assert report(small_disk / "out")[full[0].entry.path]["reason"] == "No space left on device"
    assert not list(small_disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert not any(outcome.failed for outcome in run(videos, small_disk / "out", short_side=120))
    run(videos, tmp_path / "roomy", short_side=120)
    assert content(small_disk / "out") == content(tmp_path / "roomy")


def test_what_a_full_disk_kept_out_of_the_journal_is_written_at_the_end(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl", {"version": 1})
    (tmp_path / "a.mp4").touch()
    status = os.stat(tmp_path / "a.mp4")
    identity = ("a.mp4", status.st_size, status.st_mtime_ns)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_file", open("/dev/full", "ab", buffering=0))  # noqa: SIM115
        journal.add(journal.known(*identity) | {"status": "ok"})
        journal._file.close()
    assert journal.known(*identity)["status"] == "ok"
    assert b"a.mp4" not in journal.path.read_bytes()
    journal.write_in_order(["a.mp4"])
    journal.close()
    again = Journal(journal.path, {"version": 1})
    assert again.known(*identity) == journal.known(*identity)
    again.close()


def test_two_runs_on_one_folder_at_once_are_refused(videos, tmp_path):
    os.mkfifo(videos / "train" / "yoga" / "pipe.mp4")
    process = start(videos, tmp_path / "out", timeout_seconds=600.0)
    try:
        wait_until((tmp_path / "out" / "journal.jsonl").exists)
        with pytest.raises(PreparationError, match="out: another run is working on it"):
            run(videos, tmp_path / "out")
    finally:
        process.kill()
        process.join()
    assert statuses(run(videos, tmp_path / "out", timeout_seconds=0.5))["train/yoga/pipe.mp4"] == "bad"


def test_options_that_make_no_sense_or_differ_from_the_former_run_are_refused(videos, tmp_path):
    for short_side in (0, 255, -2):
        with pytest.raises(PreparationError, match=f"even number of pixels, at least 2, got {short_side}"):
            run(videos, tmp_path / "out", short_side=short_side)
    with pytest.raises(PreparationError, match="workers and timeout must be positive, got 2 and 0"):
        run(videos, tmp_path / "out", timeout_seconds=0)
    with pytest.raises(PreparationError, match=r"nothing: no folder of videos"):
        prepare(Catalogue([], []), videos / "nothing", tmp_path / "out")
    run(videos, tmp_path / "out", short_side=32)
    with pytest.raises(PreparationError, match=r"out was prepared with other options \(.*32; now .*None\)"):
        run(videos, tmp_path / "out")


def test_sources_are_never_written_over(videos, tmp_path):
    (videos / "train" / "yoga" / "empty").mkdir()
    before = content(tmp_path)
    for folder in (videos, videos / "train"):
        with pytest.raises(
            PreparationError, match=r"videos is for re-encoded videos, but .* is there: give another output folder"
        ):
            run(folder, tmp_path, short_side=32)
    assert content(tmp_path) == before
    run(videos, tmp_path)  # which writes no video
    assert before.items() <= content(tmp_path).items()


def test_what_killed_runs_left_half_written_is_removed(videos, tmp_path):
    run(videos, tmp_path / "out", short_side=32)
    before = content(tmp_path / "out")
    for left in (tmp_path / "out" / ".7.partial", tmp_path / "out" / "videos" / "train" / ".8.partial"):
        left.touch()
    run(videos, tmp_path / "out", short_side=32)
    assert content(tmp_path / "out") == before


def test_progress_counts_what_is_compared_and_checked(videos, tmp_path):
    shutil.copy(videos / "train" / "yoga" / "a.mp4", videos / "val" / "archery" / "copy.mp4")
    shown = []
    run(videos, tmp_path / "out", progress=lambda *arguments: shown.append(arguments))
    assert [arguments[:3] for arguments in shown] == [
        *[("comparing", done, 2) for done in range(3)],
        *[("checking", done, 6) for done in range(7)],
    ]
    assert sorted(arguments[3] for arguments in shown[4:]) == ["bad"] * 2 + ["ok"] * 4
    shown.clear()
    run(videos, tmp_path / "out", progress=lambda *arguments: shown.append(arguments))
    assert shown == [("checking", 6, 6, None)]


def test_the_journal_holds_a_line_for_each_file_in_the_sources_order(videos, tmp_path):
    run(videos, tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    assert records[0] == {"version": 1, "reencode": None}
    assert [record["path"] for record in records[1:]] == list(report(tmp_path / "out"))


def test_a_shard_that_cannot_be_packed_in_time_ends_the_run(numbered_video, tmp_path, monkeypatch):
    monkeypatch.setattr(work.Work, "pack", lambda work, shard: time.sleep(60))
    (tmp_path / "videos").mkdir()
    shutil.copy(numbered_video, tmp_path / "videos" / "a.mp4")
    catalogue = Catalogue([Entry("a.mp4", 0, "train")], ["a"])
    with pytest.raises(PreparationError, match=r"^shards/train-00000.tar cannot be packed: no result within 2 s"):
        prepare(catalogue, tmp_path / "videos", tmp_path / "out", shard_bytes=10**6, timeout_seconds=2)
    assert not (tmp_path / "out" / "train.csv").exists()
