"""Preparing on a cluster whose workers die: do its results equal those of one process, byte for byte?

python experiments/preparing.py [--videos 500] [--workers 4] [--kill 2] [--timeout 10] [--size 64] [--output FILE]

Makes a motions data set, with a pipe that nobody writes to among the videos, for which a decoder waits for ever. It is
re-encoded and packed into shards twice: by one process, and by a local cluster of dask.distributed, some of whose
workers are killed on the way, once the pipe has been given up. Writes experiments/results/preparing.json.
"""

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import distributed

from octvideo.commands.options import Parser, number, positive
from octvideo.data.motions import make_data_set
from octvideo.data.preparation.prepare import prepare
from octvideo.data.preparation.sources import Catalogue, read_sources

PIPE = "a pipe.mp4"  # sorts before the others, so that it is taken up first


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(catalogue: Catalogue, videos: Path, output: Path, cluster: Any, kills: int, **options: Any) -> dict[str, Any]:
    """Prepares once; kills so many workers of the cluster on the way."""
    killed, hung, began = list[int](), list[float](), time.perf_counter()

    def see(stage: str, done: int, total: int, status: str | None) -> None:
        if status == "bad":
            hung.append(round(time.perf_counter() - began, 1))
        if hung and len(killed) < kills and stage == "checking" and done > total * (len(killed) + 1) / (kills + 1):
            alive = [worker.pid for worker in cluster.workers.values() if worker.pid not in (None, *killed)]
            killed.append(alive[len(killed) % len(alive)])
            os.kill(killed[-1], signal.SIGKILL)

    outcomes = prepare(catalogue, videos, output, progress=see, short_side=options.pop("size"), **options)
    statuses = [outcome.status for outcome in outcomes]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "ok": statuses.count("ok"),
        "bad": statuses.count("bad"),
        "failed": sum(outcome.failed for outcome in outcomes),
        "killed": len(killed),
        "hung_seconds": hung,  # from the start until the pipe was given up, each time
    }


def main(words: list[str]) -> None:
    """Runs both and compares them."""
    parser = Parser(__doc__)
    for name, default in (("videos", 500), ("workers", 4), ("kill", 2), ("size", 64)):
        parser.add_argument(f"--{name}", type=number, default=default)
    parser.add_argument("--timeout", type=positive, default=10.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "preparing.json")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "motions")
        make_data_set(folder, given.videos - given.videos // 4 - 1, given.videos // 4)
        os.mkfifo(folder / "train" / PIPE)
        (folder / "train.csv").write_text(f"train/{PIPE} 0\n" + (folder / "train.csv").read_text())
        catalogue = read_sources([folder], folder)
        options = {"timeout_seconds": given.timeout, "size": given.size, "shard_bytes": 10**6}
        print(f"one process: {(one := run(catalogue, folder, Path(root, 'one'), None, 0, **options))}")
        quiet: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "silence_logs": 50}
        with distributed.LocalCluster(n_workers=given.workers, threads_per_worker=1, **quiet) as cluster:
            options["scheduler"] = cluster.scheduler_address
            many = run(catalogue, folder, Path(root, "many"), cluster, given.kill, **options)
        print(f"{given.workers} workers: {many}")
        equal = hashes(Path(root, "one")) == hashes(Path(root, "many"))
        files = len(hashes(Path(root, "one")))
    print(f"{files} files, {'the same bytes' if equal else 'NOT the same bytes'}")
    settings = {"videos": given.videos, "workers": given.workers, "timeout": given.timeout, "cores": os.cpu_count()}
    result = settings | {"one_process": one, "cluster": many, "files": files, "same_bytes": equal}
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
