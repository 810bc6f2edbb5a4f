"""Videos in stores, measured: clips a second from local files, tar files and S3, how much of a file to read, start-up.

python experiments/stores.py speed|parts|entries|whole [--videos N] [--seconds S] [--json FILE]

speed     training clips a second of one process, from local files, shards on disk, and files and shards in S3 on the
          loopback address, in turn; each also as a share of local files'
parts     the time of a clip of 8 frames out of 10 seconds in S3, its file read whole, in parts, or from the cache, at
          several delays of a request
entries   20,000 entries of a list in S3: seconds to start, and the growth of memory over an epoch
whole     prepare, shard, train, kill -9 and resume, test and predict in S3, and again with 5 % of the requests failing
          and 1 % never answered: are all files, weights and scores those of the same commands on local files?

The server is `s3_server.py`, a process of its own; videos are made, 320 x 256 pixels, and prepared by octvideo.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choices import one_of
from rich.console import Console

from octvideo import stores
from octvideo.commands.options import Parser, number
from octvideo.data import source
from octvideo.data.clips import Draw, TrainingClips
from octvideo.data.lists import read_list
from octvideo.data.module import VideoData
from octvideo.data.motions import make_data_set, write_video
from octvideo.data.source import AnySource
from octvideo.data.video import Video
from octvideo.files import appearing

HERE = Path(__file__).parent
PARTS = ("speed", "parts", "entries", "whole")
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def server(slow: float = 0.0, *faults: str | Path) -> Iterator[str]:
    """A bucket of an S3 server whose requests wait so many seconds, with other options of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: list[str | Path] = [sys.executable, HERE / "s3_server.py", f"--port={port}", f"--slow={slow}", *faults]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    import fsspec

    system = fsspec.filesystem("s3", use_listings_cache=False)
    system.clear_instance_cache()
    for attempt in itertools.count():
        try:
            fsspec.filesystem("s3", use_listings_cache=False).mkdir("s3://videos")
            break
        except OSError:
            if attempt == 20:
                raise
    try:
        yield "s3://videos"
    finally:
        process.kill()
        process.wait()


def make_videos(folder: Path, count: int) -> None:
    """Writes videos of 10 seconds at 30 frames a second that move and flicker like filmed ones, in two classes."""
    if (folder / "done").exists():
        return
    for index in range(count):
        rng = np.random.default_rng(index)
        scene = rng.integers(0, 255, (40, 60, 3)).repeat(12, 0).repeat(12, 1).astype(np.uint8)
        steps = rng.integers(-3, 4, (300, 2)).cumsum(0) % 100
        frames = np.stack([scene[y : y + 256, x : x + 320] for y, x in steps])
        (folder / f"c{index % 2}").mkdir(parents=True, exist_ok=True)
        write_video(folder / f"c{index % 2}" / f"{index:04d}.mp4", frames, 30)
    (folder / "done").touch()


def octvideo(*words: str | Path) -> None:
    """Runs a command."""
    subprocess.run([sys.executable, "-m", "octvideo", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def clips_of(data_list: str, root: str) -> TrainingClips:
    """The training clips of a list, 8 x 8 frames at 224 pixels, decoded in this process."""
    data = VideoData(data_list, root=root, num_workers=0, decode_timeout_seconds=None)
    clips = data.train_dataloader().dataset
    assert isinstance(clips, TrainingClips)
    return clips


def speed(folder: Path, videos: int, seconds: float) -> dict[str, Any]:
    """Clips a second of each kind, and as a share of local files'."""
    make_videos(folder / "raw", videos)
    if not (folder / "shards" / "train.csv").exists():
        octvideo("prepare", folder / "raw", "--output", folder / "files", "--reencode", "256")
        octvideo("prepare", folder / "raw", "--output", folder / "shards", "--reencode", "256", "--shards", "64MB")
    with server() as bucket:
        for kind in ("files", "shards"):
            for path in sorted((folder / kind).rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    stores.put(path, f"{bucket}/{path.relative_to(folder)}")
        kinds = {
            "local files": clips_of(str(folder / "files" / "train.csv"), str(folder / "files" / "videos")),
            "shards on disk": clips_of(str(folder / "shards" / "train.csv"), str(folder / "shards")),
            "S3, files": clips_of(f"{bucket}/files/train.csv", f"{bucket}/files/videos"),
            "S3, shards": clips_of(f"{bucket}/shards/train.csv", f"{bucket}/shards"),
        }
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        per_core: dict[str, list[float]] = {name: [] for name in kinds}  # clips a second of processor time
        requests: dict[str, float] = {}
        position, until = 0, time.monotonic() + seconds
        while time.monotonic() < until or not requests:
            for name, clips in kinds.items():  # in turn, the same clips for all
                stores.take_traffic()
                start, busy = time.perf_counter(), time.process_time()
                samples = clips.__getitems__([Draw(0, position + n, (position + n) % videos) for n in range(8)])
                rates[name].append(8 / (time.perf_counter() - start))
                per_core[name].append(8 / (time.process_time() - busy))
                requests[name] = sum(sample.traffic.requests for sample in samples) / 8
            position += 8
    median = {name: statistics.median(found) for name, found in rates.items()}
    size = statistics.mean(path.stat().st_size for path in (folder / "files" / "videos").rglob("*.mp4"))
    rows = [
        {
            "from": name,
            "clips a second": round(rate, 2),
            "of local files": share(rates, name),
            "of local files, a core": share(per_core, name),
            "requests a clip": requests[name],
        }
        for name, rate in median.items()
    ]
    return {"rows": rows, "rounds": len(rates["local files"]), "videos": videos, "mean bytes": round(size)}


def share(rates: dict[str, list[float]], name: str) -> float:
    """The rate of a kind as a share of local files', the median over rounds."""
    return round(float(np.median(np.array(rates[name]) / np.array(rates["local files"]))), 3)


def parts(folder: Path, videos: int, seconds: float) -> dict[str, Any]:
    """Seconds of a clip of 8 frames out of 10 s, by how its file is read and by the delay of a request."""
    make_videos(folder / "raw", videos)
    paths = sorted((folder / "raw").rglob("*.mp4"))[:8]
    rows = []
    for delay in (0.0, 0.02, 0.1):
        with server(delay) as bucket, tempfile.TemporaryDirectory() as kept:
            for path in paths:
                stores.put(path, f"{bucket}/{path.name}")
            ways: dict[str, tuple[int, AnySource]] = {
                "whole": (source.WHOLE_BYTES, AnySource()),
                **{f"parts of {size // 1024} kB": (0, AnySource()) for size in (2**16, 2**18, 2**20)},
                "cache": (source.WHOLE_BYTES, AnySource(cache=kept)),
            }
            taken: dict[str, list[float]] = {name: [] for name in ways}
            read: dict[str, list[int]] = {name: [] for name in ways}
            for turn in range(max(2, round(seconds / 20))):
                for index, path in enumerate(paths):
                    for name, (whole, where) in ways.items():
                        source.WHOLE_BYTES, source.PART_BYTES = whole, 2**20
                        if name.startswith("parts"):
                            source.PART_BYTES = int(name.split()[2]) * 1024
                        stores.take_traffic()
                        start = time.perf_counter()
                        with Video(f"{bucket}/{path.name}", source=where) as video:
                            video.frames_at(index + np.arange(8) * 8 / 30, 256)
                        if turn > 0:
                            taken[name].append(time.perf_counter() - start)
                            read[name].append(stores.take_traffic().bytes)
            rows += [
                {
                    "delay": delay,
                    "read": name,
                    "milliseconds": round(1000 * statistics.median(found), 1),
                    "bytes": round(statistics.mean(read[name])),
                }
                for name, found in taken.items()
            ]
    source.WHOLE_BYTES, source.PART_BYTES = 16 * 2**20, 4 * 2**20
    return {"rows": rows, "mean bytes": round(statistics.mean(path.stat().st_size for path in paths))}


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    found: dict[str, torch.Tensor] = torch.load(stores.local(path), weights_only=True)["state_dict"]
    return found


def pipeline(raw: str, out: str, work: Path, *, kill: bool = False) -> dict[str, Any]:
    """Prepares, shards, trains, tests and predicts; what came of it. A training that is to be killed is resumed."""
    octvideo(
        *("prepare", f"{raw}/train.csv", f"{raw}/val.csv", "--videos", raw, "--output", f"{out}/prepared"),
        *("--reencode", "72", "--shards", "1MB", "--workers", "2"),
    )
    prepared, run = f"{out}/prepared", f"{out}/run"
    data = [f"--data.{name}_list={prepared}/{name}.csv" for name in ("train", "val")]
    options = ["--cfg", "quickstart", *data, f"--data.root={prepared}", "--data.num_workers=1", "--model.width=8"]
    options += ["--trainer.max_epochs=2", "--save_every_n_steps=2", f"--trainer.default_root_dir={run}"]
    if kill:
        training = subprocess.Popen([sys.executable, "-m", "octvideo", "train", *options], stdout=subprocess.DEVNULL)
        while training.poll() is None and not stores.exists(f"{run}/checkpoints/step_00000004.ckpt"):
            time.sleep(0.2)
        training.kill()
        training.wait()
        os.environ["OCTVIDEO_CACHE"] = str(work / "another machine")
    octvideo("train", *options, "--ckpt_path=auto")
    last = f"{run}/checkpoints/step_00000012.ckpt"
    octvideo("test", *options, f"--ckpt={last}", f"--output={work / 'test'}")
    video = read_list(f"{prepared}/val.csv", root=prepared).paths[0]
    octvideo("predict", video, f"--ckpt={stores.local(last)}", f"--json={work / 'predicted.json'}")
    listed = {
        name: stores.read(f"{prepared}/{name}") if stores.is_uri(prepared) else Path(prepared, name).read_bytes()
        for name in ("train.csv", "val.csv", "labels.txt", "index.bin", "shards/train-00000.tar")
    }
    (predicted,) = json.loads((work / "predicted.json").read_text())["videos"]
    tested = json.loads((work / "test" / "predictions.json").read_text())
    scores = [predicted["scores"], *(one["scores"] for one in tested["videos"])]
    return {"files": listed, "weights": weights(last), "scores": scores, "videos": len(tested["videos"])}


def whole(folder: Path, videos: int, seconds: float) -> dict[str, Any]:
    """Whether a pipeline in S3, with and without faults, ends as on local files."""
    make_data_set(folder / "motions", 96, 32)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        here = pipeline(str(folder / "motions"), f"{name}/local", Path(name))
        for faults in ((), ("--fail=0.05", "--hang=0.01")):
            log = Path(name, "server.json")
            with server(0.0, f"--log={log}", *faults) as bucket:
                os.environ["OCTVIDEO_CACHE"] = f"{name}/cache{len(faults)}"
                for path in sorted((folder / "motions").rglob("*.*")):
                    if path.is_file():
                        stores.put(path, f"{bucket}/raw/{path.relative_to(folder / 'motions')}")
                there = pipeline(f"{bucket}/raw", f"{bucket}/out", Path(name), kill=True)
                logs = [file for file in stores.files_below(f"{bucket}/out/run/csv") if file.endswith("metrics.csv")]
                metrics = stores.read(f"{bucket}/out/run/csv/{logs[-1]}").decode().splitlines()
            column = metrics[0].split(",").index("train/store_retries")
            rows.append(
                {
                    "faults": bool(faults),
                    "files equal": [key for key in here["files"] if here["files"][key] == there["files"][key]],
                    "weights equal": all(
                        torch.equal(here["weights"][key], there["weights"][key]) for key in here["weights"]
                    ),
                    "scores equal": here["scores"] == there["scores"],
                    "videos tested": there["videos"],
                    "retries logged in training": sum(float(line.split(",")[column] or 0) for line in metrics[1:]),
                    "server": json.loads(log.read_text()),
                }
            )
    return {"rows": rows}


def resident() -> float:
    """Megabytes of this process and those that it started."""
    import psutil  # type: ignore[import-untyped]

    process = psutil.Process()
    return 1e-6 * float(sum(one.memory_info().rss for one in (process, *process.children(recursive=True))))


def entries(folder: Path, videos: int, seconds: float) -> dict[str, Any]:
    """Start-up and memory of a list of 20,000 entries, of which `seconds` at most are read."""
    make_videos(folder / "raw", videos)
    names = sorted(str(path.relative_to(folder / "raw")) for path in (folder / "raw").rglob("*.mp4"))
    with server() as bucket, tempfile.TemporaryDirectory() as made:
        for name in names:
            stores.put(folder / "raw" / name, f"{bucket}/{name}")
        lines = (f"{names[index % len(names)]} {index % 2}\n" for index in range(20_000))
        Path(made, "train.csv").write_text("".join(lines))
        stores.put(Path(made, "train.csv"), f"{bucket}/train.csv")
        start = time.perf_counter()
        how: dict[str, Any] = {"clip_frames": 4, "crop_size": 32, "short_side": (32, 32), "batch_size": 16}
        data = VideoData(f"{bucket}/train.csv", root=bucket, num_workers=1, **how)
        data.setup("fit")
        batches = iter(data.train_dataloader())
        next(batches)
        started = time.perf_counter() - start
        memory, until = [], time.monotonic() + seconds
        for _ in batches:
            memory.append(resident())
            if time.monotonic() > until:
                break
    early, late = memory[len(memory) // 10 : len(memory) // 5], memory[-max(1, len(memory) // 10) :]
    growth = statistics.median(late) - statistics.median(early)
    found = {"entries": 20_000, "seconds to the first batch": round(started, 1), "clips read": len(memory) * 16}
    return found | {"growth in MB": round(growth, 1), "MB at the end": round(memory[-1])}


def main(words: Sequence[str]) -> None:
    """Measures the parts that are named."""
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="+", type=one_of(PARTS, "part"))
    parser.add_argument("--videos", type=number, default=48)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/stores"))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "stores.json")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for part in options.parts:
        results[part] = globals()[part](options.folder.absolute(), options.videos, options.seconds)
        Console().print(part, results[part])
        with appearing(options.json) as partial:
            partial.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
