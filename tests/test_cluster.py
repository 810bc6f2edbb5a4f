"""Preparing on many workers, in parts and into shards: the same bytes as one process, whatever dies on the way."""

import os
import shutil
import signal
import subprocess

import pytest
import yaml
from conftest import ROOT
from test_prepare import content, refuse_to_work, run, statuses, write_noise

from octvideo import stores
from octvideo.commands import prepare as command
from octvideo.data.index import VideoIndex
from octvideo.data.lists import read_list, rooted
from octvideo.data.preparation import work
from octvideo.data.preparation.cluster import tasks, workers_of
from octvideo.data.preparation.prepare import prepare
from octvideo.data.preparation.sources import Catalogue, Entry
from octvideo.data.video import Video
from octvideo.errors import DecodeError, PreparationError, UserError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two classes and splits: ten good videos, two copies, a broken file, and one in two containers."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(10):
        split = "val" if number > 7 else "train"
        write_noise(folder / split / f"class {number % 2}" / f"v{number}.mp4", number, frames=20)
    shutil.copy(folder / "train" / "class 0" / "v2.mp4", folder / "train" / "class 1" / "a copy.mp4")
    shutil.copy(folder / "train" / "class 1" / "v3.mp4", folder / "train" / "class 1" / "v3.avi")
    (folder / "train" / "class 0" / "broken.mp4").write_text("no video")
    return folder


@pytest.mark.parametrize("short_side", [None, 32])
def test_parts_merge_to_the_bytes_of_one_run(videos, tmp_path, short_side, monkeypatch):
    options = {"short_side": short_side, "shard_bytes": 30_000}
    run(videos, tmp_path / "one", **options)
    with pytest.raises(PreparationError, match="one-none: there are no parts"):
        run(videos, tmp_path / "one-none", merge=True, **options)
    for number in (3, 1):
        assert run(videos, tmp_path / "parts", part=(number, 3), **options) == []
    with pytest.raises(PreparationError, match=r"parts: some parts are missing or not complete, run --part 2/3$"):
        run(videos, tmp_path / "parts", merge=True, **options)
    with pytest.raises(PreparationError, match=r"1-of-3.jsonl: this part was prepared with other options"):
        run(videos, tmp_path / "parts", merge=True, short_side=64)
    run(videos, tmp_path / "parts", part=(2, 3), **options)
    journal = tmp_path / "parts" / "journal.part-2-of-3.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])  # as of a run that was killed
    with pytest.raises(PreparationError, match="run --part 2/3"):
        run(videos, tmp_path / "parts", merge=True, **options)
    journal.write_bytes(whole)
    monkeypatch.setattr(work.Work, "check", refuse_to_work)
    monkeypatch.setattr(work.Work, "fingerprint", refuse_to_work)
    outcomes = run(videos, tmp_path / "parts", merge=True, **options)
    assert sorted(statuses(outcomes).values()) == ["bad"] + ["duplicate"] * 2 + ["ok"] * 10
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def test_parts_in_a_store_merge_on_another_machine(videos, tmp_path, s3, monkeypatch):
    options = {"short_side": 32, "shard_bytes": 10**6}
    run(videos, tmp_path / "one", **options)
    for number in (1, 2):
        monkeypatch.setenv("OCTVIDEO_CACHE", str(tmp_path / f"machine {number}"))
        run(videos, f"{s3}/out", part=(number, 2), **options)
    monkeypatch.setenv("OCTVIDEO_CACHE", str(tmp_path / "machine 3"))
    monkeypatch.setattr(work.Work, "check", refuse_to_work)
    assert not any(outcome.failed for outcome in run(videos, f"{s3}/out", merge=True, **options))
    files = {path.relative_to(tmp_path / "one").as_posix(): path for path in (tmp_path / "one").rglob("*.*")}
    expected = {name: path.read_bytes() for name, path in files.items() if path.is_file() and name != ".lock"}
    assert {name: stores.read(f"{s3}/out/{name}") for name in stores.files_below(f"{s3}/out")} == expected


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_parts_that_are_none_are_refused(videos, tmp_path, part):
    with pytest.raises(PreparationError, match="a part must be i of N with i from 1 to N"):
        run(videos, tmp_path / "out", part=part)


def test_shards_hold_the_videos_of_each_split_in_order_and_clips_are_one_read(videos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, out, short_side=32, shard_bytes=50_000)
    shards = sorted(path.name for path in (out / "shards").iterdir())
    assert shards[:2] == ["train-00000.tar", "train-00001.tar"]
    assert shards[-1] == "val-00000.tar"
    assert all((out / "shards" / name).stat().st_size <= 50_000 for name in shards)
    listed = read_list(out / "train.csv", root=out)
    again = read_list(f"{out}/shards/train-{{00000..{len(shards) - 2:05d}}}.tar")
    assert list(again.paths) == list(listed.paths)
    assert again.labels.tolist() == listed.labels.tolist()
    index = VideoIndex(out / "index.bin")
    names = [line.rsplit(" ", 1)[0] for line in (out / "train.csv").read_text().splitlines()]
    assert names[0].startswith("tar://train/class 0/v0.mp4::shards/train-00000.tar#bytes=512,")
    assert list(listed.paths) == [rooted(out, name) for name in names]
    rows, reads, read = index.rows(names), [], stores.read
    monkeypatch.setattr(stores, "read", lambda *place: reads.append(place) or read(*place))
    for name, row in zip(names, rows, strict=True):
        member = name.removeprefix("tar://").partition("::")[0].replace("v3_avi", "v3.avi")
        reads.clear()
        with Video(rooted(out, name), known=index[row]) as packed, Video(out / "videos" / member) as plain:
            assert (packed.frames_at([0, 0.5, 0.9]) == plain.frames_at([0, 0.5, 0.9])).all()
        assert len(reads) == 1


def test_webdataset_reads_the_shards(videos, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    run(videos, tmp_path / "out", shard_bytes=10**9)
    tar = str(tmp_path / "out" / "shards" / "train-00000.tar")
    samples = list(webdataset.WebDataset(tar, shardshuffle=False))
    lines = (tmp_path / "out" / "train.csv").read_text().splitlines()
    files = [line.rpartition("::")[0].removeprefix("tar://") for line in lines]
    assert [f"{one['__key__']}.{'avi' if 'avi' in one else 'mp4'}" for one in samples] == files
    assert [int(one["cls"]) for one in samples] == read_list(tar).labels.tolist()
    assert samples[0]["mp4"] == (videos / files[0]).read_bytes()


def test_right_shards_are_kept_and_others_removed(videos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, out, short_side=32, shard_bytes=40_000)
    before, times = content(out), {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    (out / "shards" / "train-00001.tar").write_bytes(b"cut")
    (out / "shards" / ".7.partial").touch()
    monkeypatch.setattr(work.Work, "check", refuse_to_work)
    run(videos, out, short_side=32, shard_bytes=40_000)
    assert content(out) == before
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["train-00001.tar"]
    run(videos, out, short_side=32, shard_bytes=10**9)
    assert sorted(path.name for path in (out / "shards").iterdir()) == ["train-00000.tar", "val-00000.tar"]
    monkeypatch.undo()
    run(videos, tmp_path / "anew", short_side=32, shard_bytes=10**9)
    assert content(out) == content(tmp_path / "anew")
    with pytest.raises(PreparationError, match=r"shards is for shards, but tar://a.mp4::shards/a.tar is there"):
        prepare(Catalogue([Entry("tar://a.mp4::shards/a.tar", 0, "train")], ["a"]), out, out, shard_bytes=10**9)


@pytest.fixture(scope="module")
def cluster():
    """Two workers of dask."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50
    ) as made:
        yield made


def test_a_killed_worker_changes_nothing(videos, tmp_path, cluster):
    run(videos, tmp_path / "one", short_side=32, shard_bytes=40_000)
    killed = []

    def kill(stage, done, total, status):
        if stage == "checking" and done == 3 and not killed:
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    options = {"scheduler": cluster.scheduler_address, "progress": kill}
    outcomes = run(videos, tmp_path / "many", short_side=32, shard_bytes=40_000, **options)
    assert killed
    assert not any(outcome.failed for outcome in outcomes)
    assert content(tmp_path / "many") == content(tmp_path / "one")


class Deadly:
    """Stands for work that takes its worker with it, as where memory runs out."""

    def check(self, path):
        if path == "deadly":
            os.kill(os.getppid(), signal.SIGKILL)
        if path == "full":
            try:
                raise DecodeError("a", "b")
            except DecodeError as error:
                raise OSError(28, "No space left on device") from error
        return {"status": "ok"}


def test_who_takes_every_worker_with_it_failed_and_is_no_bad_video(cluster, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with distributed.Client(cluster, set_as_default=False) as client:
        found = dict(tasks(client, 60.0, Deadly().check, [("deadly", "deadly")]))
        reason = "every worker that took it up died"
        assert found == {"deadly": {"status": "bad", "reason": reason, "failed": True}}
        found = dict(tasks(client, 60.0, Deadly().check, [("a", "good"), ("b", "full")]))
        assert found["a"] == {"status": "ok"}
        assert found["b"] == {"status": "bad", "reason": "No space left on device", "failed": True}


def test_a_hung_video_costs_its_timeout_once(tmp_path, cluster):
    for number in range(3):
        write_noise(tmp_path / "videos" / "yoga" / f"{number}.mp4", number, frames=5)
    os.mkfifo(tmp_path / "videos" / "yoga" / "pipe.mp4")
    outcomes = run(tmp_path / "videos", tmp_path / "out", timeout_seconds=1.0, scheduler=cluster.scheduler_address)
    found = {outcome.entry.path: outcome for outcome in outcomes}
    assert found["yoga/pipe.mp4"][1:3] == ("bad", "no result within 1 s: the decoder was killed")
    assert not found["yoga/pipe.mp4"].failed
    assert list(statuses(outcomes).values()).count("ok") == 3


def test_a_scheduler_that_is_gone_ends_the_run_with_one_line(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("octvideo.data.preparation.cluster.CONNECT_SECONDS", 1.0)
    options = {"n_workers": 1, "threads_per_worker": 1, "protocol": "tcp", "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(processes=False, silence_logs=50, **options) as made,
        workers_of(made.scheduler_address, 1, 60.0) as at_work,
    ):
        found = at_work(Deadly().check, [(str(number), number) for number in range(100)])
        assert next(found)[1] == {"status": "ok"}
        made.close()
        with pytest.raises(PreparationError, match="the cluster's scheduler is gone: the same command continues"):
            list(found)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("here", r"--scheduler must be tcp://HOST:PORT, local\[:WORKERS\] or slurm\[:JOBS\], got 'here'"),
        ("local:two", r"got 'local:two'"),
        ("slurm:3", r"--scheduler slurm needs dask-jobqueue: pip install dask-jobqueue"),
        ("tcp://127.0.0.1:9", r"--scheduler tcp://127.0.0.1:9 cannot be reached: "),
    ],
)
def test_schedulers_that_cannot_be_used_are_an_error_of_one_line(videos, tmp_path, monkeypatch, scheduler, message):
    monkeypatch.setattr("octvideo.data.preparation.cluster.CONNECT_SECONDS", 1.0)
    with pytest.raises(UserError, match=message):
        run(videos, tmp_path / "out", scheduler=scheduler)


def test_the_examples_for_clusters_give_options_that_there_are(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "read_sources", lambda *sources, **named: seen.append(sources) or Catalogue([], []))
    monkeypatch.setattr(command, "prepare", lambda *given, **named: seen.append((named["part"], named["merge"])) or [])
    for task, how in (("3", ((3, 64), False)), ("0", (None, True))):
        slurm = {"SLURM_ARRAY_TASK_ID": task, "SLURM_CPUS_PER_TASK": "2", "PYTHON": "echo"}
        line = ["bash", ROOT / "tools" / "slurm_prepare.sbatch", tmp_path, "--output", tmp_path / "out"]
        printed = subprocess.run(line, env=os.environ | slurm, capture_output=True, text=True, check=True).stdout
        script, *words = printed.split()
        assert script == "tools/prepare_data.py"
        assert command.main(words) == 0
        assert seen[-1] == how
    (tmp_path / "apptainer").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONTAINER": "octvideo.sif"}
    printed = subprocess.run(line, env=os.environ | slurm | path, capture_output=True, text=True, check=True).stdout
    here = os.getcwd()
    assert printed.startswith(f"exec --bind {here} --pwd {here} octvideo.sif python tools/prepare_data.py {tmp_path} ")
    monkeypatch.setattr(command, "exists", lambda path: False)
    jobs = list(yaml.safe_load_all((ROOT / "tools" / "kubernetes_prepare.yaml").read_text()))
    for job, how in zip(jobs, [((8, 64), False), (None, True)], strict=True):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        arguments = container["args"][0].replace("octvideo prepare", "echo", 1)
        environment = os.environ | {"JOB_COMPLETION_INDEX": "7"}
        line = [*container["command"], arguments]
        printed = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
        assert command.main(printed.split()) == 0
        assert seen[-1] == how
