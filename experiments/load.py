"""Load on `octvideo serve`: throughput, latency, lost answers and memory, with bad videos among the good ones.

python experiments/load.py --ckpt FILE | --onnx FILE --videos FOLDER [--clients 8] [--seconds 60] [--bad .2]
                           [--json FILE] [OPTIONS OF octvideo serve ...]

So many clients send a request each, and the next when it is answered. A share of them is bad: random bytes, half of a
video's bytes, nothing, a playlist of a file of this machine, more than --max-megabytes, a form without one. Counted:
answers by status; lost ones, which are none, or another status than their kind gets (503 is tried again); seconds of
good videos, the median and the 99th percentile; resident memory of the server with its processes after a tenth of the
time and at the end.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from octvideo.commands.options import Parser, number, positive
from octvideo.commands.serve import read_arguments
from octvideo.files import appearing

KINDS = {"random": {422}, "half": {200, 422}, "empty": {400}, "playlist": {422}, "large": {413}, "no video": {400}}


def bad_request(kind: str, video: bytes, most_megabytes: float) -> dict[str, Any]:
    """What httpx.post takes for a bad request."""
    bodies = {
        "random": random.randbytes(20_000),
        "half": video[: len(video) // 2],
        "empty": b"",
        "playlist": b"ffconcat version 1.0\nfile /etc/passwd\n",
    }
    if kind == "no video":
        return {"files": {"film": video}}
    return {"content": bodies[kind] if kind in bodies else bytes(round(most_megabytes * 2**20) + 2**17)}


def resident(process: int) -> int:
    """Bytes of a process and those that it started, what they share counted once."""
    total, waiting = 0, [process]
    while waiting:
        one = waiting.pop()
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            children = [path.read_text().split() for path in Path(f"/proc/{one}/task").glob("*/children")]
        except OSError:  # it has ended
            continue
        total += 1024 * int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
        waiting += [int(child) for found in children for child in found]
    return total


class Clients:
    """Requests of several threads, and what became of them."""

    def __init__(self, address: str, videos: Sequence[bytes], options: Namespace, most_megabytes: float) -> None:
        self.address, self.videos, self.options, self.most_megabytes = address, videos, options, most_megabytes
        self.statuses: Counter[str] = Counter()
        self.lost: list[str] = []
        self.seconds: list[float] = []
        self.batches: list[int] = []

    def run(self, client: int, ends: float) -> None:
        """One client."""
        draw = random.Random(client)
        with httpx.Client(timeout=self.options.timeout) as http:
            while time.monotonic() < ends:
                video = draw.choice(self.videos)
                kind = draw.choice(list(KINDS)) if draw.random() < self.options.bad else "good"
                request = {"content": video} if kind == "good" else bad_request(kind, video, self.most_megabytes)
                wanted = {200} if kind == "good" else KINDS[kind]
                began = time.perf_counter()
                try:
                    answer = http.post(f"{self.address}/predict", **request)
                except httpx.HTTPError as error:
                    if kind != "large":  # the server may hang up on what it does not read
                        self.lost.append(f"{kind}: {error!r}")
                    continue
                self.statuses[f"{kind} {answer.status_code}"] += 1
                if answer.status_code not in (wanted | {503}):
                    self.lost.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
                elif kind == "good" and answer.status_code == 200:
                    self.seconds.append(time.perf_counter() - began)
                    self.batches.append(answer.json()["batch"])


def measure(options: Namespace, others: Sequence[str], most_megabytes: float) -> dict[str, Any]:
    """Starts the server, loads it, and stops it."""
    paths = sorted(path for folder in options.videos for path in folder.rglob("*") if path.suffix in (".mp4", ".avi"))
    if not paths:
        raise SystemExit("no .mp4 or .avi in --videos")
    videos = [path.read_bytes() for path in paths[:200]]
    command = [sys.executable, "-m", "octvideo", "serve", *others, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        clients = Clients(address, videos, options, most_megabytes)
        ends = time.monotonic() + options.seconds
        threads = [threading.Thread(target=clients.run, args=(n, ends)) for n in range(options.clients)]
        for thread in threads:
            thread.start()
        time.sleep(options.seconds / 10)
        memory = [resident(server.pid)]
        for thread in threads:
            thread.join()
        memory.append(resident(server.pid))
        healthy = httpx.get(f"{address}/health").json()
        server.terminate()
        status = server.wait(60)
    p50, p99 = np.percentile(clients.seconds, (50, 99)) if clients.seconds else (float("nan"),) * 2
    return {
        "videos": len(videos),
        "clients": options.clients,
        "seconds": options.seconds,
        "answers": dict(sorted(clients.statuses.items())),
        "lost": clients.lost,
        "good_per_second": len(clients.seconds) / options.seconds,
        "p50_seconds": float(p50),
        "p99_seconds": float(p99),
        "mean_batch_clips": float(np.mean(clients.batches)),
        "memory_mb": [round(size / 2**20) for size in memory],
        "network": healthy["network"],
        "runtime": healthy["runtime"],
        "exit_status": status,
    }


def main(arguments: Sequence[str]) -> int:
    """Measures, prints and writes; exit status 1 where anything was lost."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--videos", type=Path, nargs="+", required=True, metavar="FOLDER", help="good ones; the first 200 are sent")
    add("--clients", type=number, default=8, metavar="N", help="requests at a time; default: 8")
    add("--seconds", type=positive, default=60.0, metavar="S", help="default: 60")
    add("--bad", type=float, default=0.2, metavar="SHARE", help="of the requests; default: .2")
    add("--timeout", type=positive, default=60.0, metavar="S", help="of a client; default: 60")
    add("--json", type=Path, metavar="FILE")
    options, others = parser.parse_known_args(arguments)
    row = measure(options, others, read_arguments(others).max_megabytes)
    Console().print(row)
    if options.json:
        with appearing(options.json) as partial:
            partial.write_text(json.dumps(row, indent=1))
    return 1 if row["lost"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
