"""Kills processes and whole nodes of a training under torchrun, and compares the weights with an undisturbed run's.

python experiments/nodes.py [case ...] [--folder runs/nodes] [--json experiments/results/nodes.json]

Two torchruns on this machine stand for two nodes of two processes each (CPU, gloo). Each case is the training of a
small network in which something gets SIGKILL in the middle of the second epoch, a step after a checkpoint. Where a
supervisor (Kubernetes, Slurm, systemd) is needed, a torchrun that has ended in an error is started again at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from choices import one_of
from lightning.pytorch import Callback, LightningModule, Trainer

from octvideo.commands.options import Parser
from octvideo.data.motions import make_data_set
from octvideo.files import appearing

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
KILL_AFTER = 11  # steps of 24, 8 an epoch
NETWORK = [
    *("--cfg=quickstart", "--data.crop_size=32", "--data.short_side=[32, 36]", "--data.test_crop_size=32"),
    *("--data.clip_frames=4", "--data.num_workers=1", "--model.width=8", "--model.warmup_epochs=1"),
    *("--ema_decay=0.9", "--save_every_n_steps=2", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"),
    *("--ckpt_path=auto", "--trainer.callbacks+=nodes.Steps"),
]


class Steps(Callback):
    """Writes the time, process id and number of each optimiser step to steps.txt in the run folder."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / "steps.txt").open("a") as file:
                file.write(f"{time.time()} {os.getpid()} {trainer.global_step}\n")


def processes_below(pid: int, depth: int = 9) -> set[int]:
    """The processes that a process has started, and to that depth those that they have started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found, level = set[int](), {pid}
    for _ in range(depth):
        level = {child for child, parent in parents.items() if parent in level}
        found |= level
    return found


@dataclass
class Node:
    """A torchrun of a training of several nodes, on this machine."""

    number: int
    port: int
    run: Path
    options: Sequence[str]
    launcher: Sequence[str] = ()
    starts: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Starts it, or starts it again."""
        self.starts += 1
        launch = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--max-restarts=3", *self.launcher),
            *("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{self.port}", f"--rdzv_id={self.run.name}"),
            *(f"--rdzv_conf=is_host={int(self.number == 0)}", "--local_addr=127.0.0.1"),
        ]
        command = [*launch, "tools/train_net.py", *self.options, f"--trainer.default_root_dir={self.run}"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
        with (self.run / f"node{self.number}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | ENVIRONMENT | {"PYTHONPATH": path}
            )

    def workers(self) -> list[int]:
        """The training processes, in the order of their ranks: torchrun's children."""
        return sorted(processes_below(self.process.pid, 1))

    def kill(self) -> None:
        """SIGKILL to torchrun and all that it started, as by a power cut."""
        for pid in (self.process.pid, *processes_below(self.process.pid)):
            kill(pid)
        self.process.wait()


def kill(pid: int) -> None:
    """SIGKILL, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def steps(run: Path) -> list[tuple[float, int, int]]:
    """What `Steps` wrote."""
    file = run / "steps.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(float(when), int(pid), int(step)) for when, pid, step in (line.split() for line in lines)]


def train(
    run: Path,
    options: Sequence[str],
    strike: Callable[[Sequence[Node]], None] | None = None,
    launcher: Sequence[str] = ("--nproc_per_node=2",),
    supervised: bool = False,
    after: int = KILL_AFTER,
    limit_seconds: float = 900,
) -> dict[str, Any]:
    """Trains on two nodes and strikes once after so many steps; what was needed to go on."""
    run.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [Node(number, port, run, options, launcher) for number in (0, 1)]
    struck, deadline = 0.0, time.time() + limit_seconds
    try:
        for node in nodes:
            node.start()
        while any(node.process.poll() != 0 for node in nodes):
            if strike is not None and not struck and any(step >= after for *_, step in steps(run)):
                before = len(steps(run))
                struck = time.time()
                strike(nodes)
            for node in nodes:
                if node.process.poll() not in (None, 0):
                    if not supervised:
                        raise RuntimeError(f"node {node.number} ended with {node.process.returncode}: {run}")
                    node.start()
            if time.time() > deadline:
                raise RuntimeError(f"no end within {limit_seconds} s: {run}")
            time.sleep(0.05)
    finally:
        for node in nodes:
            node.kill()
    found: dict[str, Any] = {"torchruns started": [node.starts for node in nodes]}
    if struck:
        done = steps(run)
        old = {pid for _, pid, _ in done[:before]}
        again = [when for when, pid, _ in done if pid not in old]
        found["seconds until training went on"] = round(again[0] - struck, 1) if again else None  # it was over by then
        found["steps repeated"] = len(done) - len({step for *_, step in done})
    return found


def same_weights(run: Path, other: Path) -> bool:
    """Whether weights, averages, statistics and optimiser states are the same bits at the end of two runs."""
    parts = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    one, two = (torch.load(x / "checkpoints" / "last.ckpt", weights_only=True) for x in (run, other))
    return all(_same(one[part], two[part]) for part in parts if part in one)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


# What is killed, and whether the torchruns are restarted from outside.
CASES: dict[str, tuple[Callable[[Sequence[Node]], None], bool]] = {
    "the first process of node 0": (lambda nodes: kill(nodes[0].workers()[0]), False),
    "the second process of node 0": (lambda nodes: kill(nodes[0].workers()[1]), False),
    "the first process of node 1": (lambda nodes: kill(nodes[1].workers()[0]), False),
    "the second process of node 1": (lambda nodes: kill(nodes[1].workers()[1]), False),
    "node 1": (lambda nodes: nodes[1].kill(), True),
    "node 0, which hosts the rendezvous": (lambda nodes: nodes[0].kill(), True),
    "torchrun of node 1 alone": (lambda nodes: kill(nodes[1].process.pid), True),
    "torchrun of node 0 alone": (lambda nodes: kill(nodes[0].process.pid), True),
}


def main(arguments: Sequence[str]) -> None:
    """Runs the cases that are named, or all."""
    parser = Parser(__doc__)
    parser.add_argument("cases", nargs="*", type=one_of(CASES, "case"), default=[])
    parser.add_argument("--folder", type=Path, default=Path("runs/nodes"))
    parser.add_argument("--json", type=Path, default=ROOT / "experiments" / "results" / "nodes.json")
    options = parser.parse_args(arguments)
    folder, data = options.folder.absolute(), options.folder.absolute() / "motions"
    if not data.exists():
        make_data_set(data, 32, 16)
    lists = [f"--data.{split}_list={data / split}.csv" for split in ("train", "val")]
    words = [*NETWORK, *lists, f"--data.root={data}", "--data.batch_size=1"]
    whole = folder / "undisturbed"
    if not (whole / "done").exists():
        shutil.rmtree(whole, ignore_errors=True)
        train(whole, words)
        (whole / "done").touch()
    rows: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for case in options.cases or CASES:
        run = folder / case.replace(" ", "_").replace(",", "")
        shutil.rmtree(run, ignore_errors=True)
        strike, supervised = CASES[case]
        rows[case] = train(run, words, strike, supervised=supervised) | {"equal weights": same_weights(run, whole)}
        print(case, rows[case], flush=True)
        with appearing(options.json) as partial:
            partial.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
