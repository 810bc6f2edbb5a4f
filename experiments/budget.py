"""Measures whether octvideo predict --stream --budget holds its time while other processes load the machine.

python experiments/budget.py --budget MS [--ckpt FILE] [--seconds 90] [--load 1] [--every .5] [--json FILE]

A server sends made movements as in streams.py. In the middle third of the time, --load processes compute without end.
Printed are the command's lines about switches and, for each third, which alphas ran and how long the network took.
Without --ckpt the network is an untrained I3D with the options of elastic training: its times are a trained one's.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from streams import ROOT, Server, loop_of_movements

from octvideo.commands.options import Parser, number, one_line_errors, positive
from octvideo.data.motions import CLASSES
from octvideo.data.preprocessing import Preprocessing
from octvideo.files import appearing
from octvideo.models.cost import hardware
from octvideo.training.elastic import Elastic
from octvideo.training.recognizer import Recognizer


def write_untrained(path: Path, width: int, size: int) -> None:
    """A checkpoint with random weights, as elastic training writes it."""
    torch.manual_seed(0)
    elastic = Elastic([0.0, 0.25, 0.5, 0.75])
    module = Recognizer(alpha=0.0, num_classes=len(CLASSES), width=width, downsample="pool", elastic=elastic)
    how = Preprocessing(8, 2, crop_size=size, short_side=(size, size), test_crop_size=size)
    state = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    torch.save({**state, "VideoData": {"labels": list(CLASSES), "preprocessing": asdict(how)}}, path)


def compute() -> None:
    """Multiplies matrices for ever, on one core."""
    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    while True:
        x @ x


def summary(records: Sequence[dict[str, Any]], budget_ms: float) -> dict[str, Any]:
    """What the steps of a third say."""
    times = [1000 * one["network_seconds"] for one in records]
    within = sum(taken <= budget_ms for taken in times) / len(times)
    found: dict[str, Any] = {"steps": len(times), "median_ms": round(statistics.median(times), 1)}
    found |= {"p95_ms": round(float(np.percentile(times, 95)), 1), "within_budget": round(within, 3)}
    return found | {
        "alphas": {f"{alpha:g}": count for alpha, count in sorted(Counter(x["alpha"] for x in records).items())}
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs server, command and load, and returns what was seen."""
    spawned, third = multiprocessing.get_context("spawn"), arguments.seconds / 3
    server = Server(arguments.port, loop_of_movements(arguments.frame_size))
    with tempfile.TemporaryDirectory() as folder:
        steps, ckpt = Path(folder, "steps.jsonl"), arguments.ckpt or Path(folder, "untrained.ckpt")
        if arguments.ckpt is None:
            write_untrained(ckpt, arguments.width, arguments.size)
        words = ["--stream", f"--ckpt={ckpt}", f"--every={arguments.every}", f"--json={steps}", "--top=1"]
        words += [f"--budget={arguments.budget}", f"--seconds={arguments.seconds}", "--device=cpu"]
        time.sleep(5)  # for the server to start
        command: list[str | Path] = [
            sys.executable,
            ROOT / "tools" / "predict.py",
            f"http://127.0.0.1:{arguments.port}/",
        ]
        process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (steps.exists() and steps.stat().st_size):
            if process.poll() is not None:
                raise OSError(f"the command ended: {process.communicate()[1]}")
            time.sleep(0.1)
        time.sleep(third)
        load = [spawned.Process(target=compute, daemon=True) for _ in range(arguments.load)]
        for one in load:
            one.start()
        begun = time.time()
        time.sleep(third)
        for one in load:
            one.kill()
        ended = time.time()
        said = process.communicate()[1]
        server.kill()
        records = [json.loads(line) for line in steps.read_text().splitlines()]
    times = [datetime.fromisoformat(one["time"]).timestamp() for one in records]
    parts = {"before": (0.0, begun), "under load": (begun, ended), "after": (ended, np.inf)}
    found: dict[str, Any] = {"machine": hardware("cpu"), "budget_ms": arguments.budget, "load": arguments.load}
    found["lines"] = [line for line in said.splitlines() if line.startswith("budget")]
    for name, (start, end) in parts.items():
        inside = [one for one, moment in zip(records, times, strict=True) if start <= moment < end]
        found[name] = summary(inside, arguments.budget) if inside else {"steps": 0}
    return found | {
        "steps": [[round(t - begun, 2), x["alpha"], x["network_seconds"]] for t, x in zip(times, records, strict=True)]
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--budget", metavar="MS", type=positive, required=True, help="milliseconds that the network may take for a clip"
    )
    add("--ckpt", type=Path, help="checkpoint of elastic training; default: an untrained I3D")
    add("--width", type=number, default=64, help="of the untrained network; default: 64")
    add("--size", type=number, default=112, help="height and width of its clips of 8 frames; default: 112")
    add("--seconds", type=positive, default=90.0, help="default: 90")
    add("--load", metavar="N", type=number, default=1, help="processes that compute; default: 1")
    add("--every", metavar="SECONDS", type=positive, default=0.5, help="default: .5")
    add("--frame-size", type=number, default=144, help="height and width of the frames; default: 144")
    add("--port", type=number, default=8766, help="default: 8766")
    add("--json", metavar="FILE", type=Path, help="file for all that was measured")
    return parser.parse_args(words)


def main() -> None:
    """The script."""
    arguments, console = parse(), Console(highlight=False)
    with one_line_errors():
        found = measure(arguments)
        console.print(*found["lines"], sep="\n", soft_wrap=True)
        table = Table("", "before", "under load", "after")
        for row in ("steps", "median_ms", "p95_ms", "within_budget", "alphas"):
            table.add_row(row, *(str(found[name].get(row)) for name in ("before", "under load", "after")))
        console.print(table)
        if arguments.json is not None:
            with appearing(arguments.json) as partial:
                partial.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
