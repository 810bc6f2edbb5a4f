"""What several test files share: videos written by the tests, the folder of real ones, and a trained network."""

import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from octvideo.data.motions import make_data_set, write_video

ROOT = Path(__file__).parent.parent
REAL_VIDEOS = Path(os.environ.get("OCTVIDEO_REAL_VIDEOS", ROOT.parent / "shared" / "data"))
CONFIG = "configs/quickstart.yaml"


def pytest_collection_modifyitems(items):
    """Slow tests first: else one process may run the last of them while others have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def long(*values):
    """Arguments of a parametrized test that `make test-long` runs."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(scope="session")
def real_videos():
    """A folder with fight/, clips/ and odd/; not part of the project."""
    if not REAL_VIDEOS.is_dir():
        pytest.skip(
            f"no real videos in {REAL_VIDEOS} (set OCTVIDEO_REAL_VIDEOS to a folder with fight/, clips/ and odd/)"
        )
    return REAL_VIDEOS


@pytest.fixture
def one_thread():
    """For tiny networks; other tests keep the number that they had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """Gives the folder that build(folder) fills, once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built_once"
    base.mkdir(exist_ok=True)

    def once(name, build):
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / f"{name}.done").exists():
                shutil.rmtree(base / name, ignore_errors=True)  # where building failed
                (base / name).mkdir()
                build(base / name)
                (base / f"{name}.done").touch()
        return base / name

    return once


@pytest.fixture(scope="session")
def motions(built_once):
    """A motions data set of 32 + 16 videos."""
    return built_once("motions", lambda folder: make_data_set(folder, 32, 16))


def small(data, run):
    """Options of the quickstart configuration at a size for tests."""
    return [
        f"--cfg={CONFIG}",
        f"--data.train_list={data / 'train.csv'}",
        f"--data.val_list={data / 'val.csv'}",
        f"--data.root={data}",
        "--data.crop_size=32",
        "--data.short_side=[32, 36]",
        "--data.test_crop_size=32",
        "--data.clip_frames=4",
        "--data.batch_size=8",
        "--data.num_workers=1",
        "--model.width=8",
        "--trainer.log_every_n_steps=2",
        f"--trainer.default_root_dir={run}",
    ]


@pytest.fixture(scope="session")
def trained(built_once, motions):
    """The folder of a run of two epochs, at an alpha that the configuration does not have."""

    def train(run):
        finished = run_tool("train_net.py", *small(motions, run), "--trainer.max_epochs=2", "--model.alpha=0.5")
        assert finished.returncode == 0, finished.stderr
        (run / "output.txt").write_text(finished.stdout)

    return built_once("trained", train)


@pytest.fixture(scope="session")
def numbered_video(tmp_path_factory):
    """A video of 60 frames at 30 fps, 64 x 48, key frames every 12, whose grey level is 4 times the frame number."""
    path = tmp_path_factory.mktemp("videos") / "with a space.mp4"
    frames = np.broadcast_to((4 * np.arange(60, dtype=np.uint8))[:, None, None, None], (60, 48, 64, 3))
    write_video(path, frames, 30)
    return path


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The address of an S3 server of this machine."""
    pytest.importorskip("moto", reason="pip install 'moto[server]'")
    pytest.importorskip("s3fs", reason="pip install s3fs")
    port, folder = free_port(), tmp_path_factory.mktemp("s3")
    process = start_tool("s3_server.py", [f"--port={port}"], folder)
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        process.join(0.1)
        assert process.exitcode is None, (folder / "stderr").read_text()
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.join()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """The URI of a new bucket, with the environment of its clients."""
    from fsspec.core import url_to_fs

    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {"AWS_ENDPOINT_URL": s3_server, **keys}.items():
        monkeypatch.setenv(name, value)
    system, _ = url_to_fs(f"s3://b{os.urandom(4).hex()}", use_listings_cache=False)
    system.clear_instance_cache()
    bucket = f"s3://b{os.urandom(4).hex()}"
    url_to_fs(bucket)[0].mkdir(bucket)
    return bucket


def settle(network):
    """Random batch-norm statistics and scales, as a trained network has; zeros would hide half of it."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return network.eval()


def frame_numbers(frames):
    """The frame numbers that grey levels (T, H, W, C) stand for."""
    return (np.asarray(frames).mean((1, 2, 3)) / 4).round().astype(int).tolist()


# Tools run in processes that fork from one that has imported what takes seconds to import, and nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["lightning.pytorch.cli", "octvideo.data.module", "octvideo.training.recognizer"])


def start_tool(name, options, folder, **environment):
    """Starts a script of tools/; what it prints goes to the files stdout and stderr in a folder."""
    folder_of_name = "tools" if (ROOT / "tools" / name).exists() else "experiments"
    arguments = [str(ROOT / folder_of_name / name), *map(str, options)]
    process = FORKS.Process(target=_be_tool, args=(arguments, Path(folder), environment))
    process.start()
    return process


def _be_tool(arguments, folder, environment):
    for stream, file in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(ROOT)
    torch.set_num_threads(1)  # networks are tiny here: a second thread costs as much again
    os.setpgrp()  # as a shell does: signals to the group are for this process and those that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where Ctrl-C is ignored
    os.environ.update({"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment})
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    sys.argv = arguments
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "tests"))
    sys.path.insert(0, str(Path(arguments[0]).parent))  # as for any script
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    runpy.run_path(arguments[0], run_name="__main__")


def run_tool(name, *options, timeout=600, **environment):
    """Runs a script of tools/ as a user does; returns the finished process."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_tool(name, options, folder, **environment)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([name, *options], timeout)
        printed = [(Path(folder) / stream).read_text() for stream in ("stdout", "stderr")]
        return subprocess.CompletedProcess([name, *options], process.exitcode, *printed)


def free_port():
    """A port of this machine that nothing listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(function, *args, folder):
    """What function(rank, *args) returns in two gloo processes of one thread."""
    processes = [FORKS.Process(target=_be_rank, args=(rank, function, args, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _be_rank(rank, function, args, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run_processes(count, name, *options, timeout=600, **environment):
    """Runs a script of tools/ in several processes, as torchrun starts them; where one dies, the others are killed."""
    group = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
    }
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / str(rank) for rank in range(count)]
        processes = []
        for rank, folder in enumerate(folders):
            folder.mkdir()
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | group if count > 1 else {}
            processes.append(start_tool(name, options, folder, **ranks, **environment))
        deadline = time.monotonic() + timeout
        while running := [process for process in processes if process.exitcode is None]:
            multiprocessing.connection.wait(
                [process.sentinel for process in running], max(0, deadline - time.monotonic())
            )
            if any(process.exitcode not in (None, 0, 75) for process in processes):
                deadline = min(deadline, time.monotonic() + 20)  # for the others to notice
            if time.monotonic() > deadline:
                for process in processes:
                    process.kill()
        for process in processes:
            process.join()
        return [
            subprocess.CompletedProcess(
                [name, *options], process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()
            )
            for process, folder in zip(processes, folders, strict=True)
        ]
