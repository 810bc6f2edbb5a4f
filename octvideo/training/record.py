"""What a run was started with, in run.json of its folder: command, code, machine, and the lists of videos."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from octvideo.data.lists import VideoList
from octvideo.files import appearing

FILE = "run.json"
PACKAGES = ("octvideo", "torch", "torchvision", "lightning", "av", "numpy")


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is at, and the files that differ from it; None where there is no git repository."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": [line[3:] for line in changed]}
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint(videos: VideoList, root: str | None) -> dict[str, Any]:
    """The number of videos, and a digest of their paths below the root and their labels, in order."""
    digest, start = hashlib.sha256(), os.path.join(root, "") if root else ""
    for path, label in zip(videos.paths, videos.labels.tolist(), strict=True):
        digest.update(f"{path.removeprefix(start)} {label}\n".encode(errors="surrogateescape"))
    return {"videos": len(videos.paths), "sha256": digest.hexdigest()}


def describe(lists: Mapping[str, VideoList], root: str | None) -> dict[str, Any]:
    """A start of a run, now, here."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git_state(Path.cwd()),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": devices},
        "data": {name: fingerprint(videos, root) for name, videos in lists.items()},
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; none where it has no run.json, or a broken one."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / FILE).read_text())
        return found
    except (OSError, ValueError):
        return []


def append(folder: Path, start: dict[str, Any]) -> None:
    """Adds a start."""
    write(folder, [*read(folder), start])


def write(folder: Path, starts: list[dict[str, Any]]) -> None:
    """Replaces all starts."""
    with appearing(folder / FILE) as partial:
        partial.write_text(json.dumps(starts, indent=1))


class RunRecord(Callback):
    """Adds a start to run.json when a training begins or goes on, and to the start the error that ended it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            lists = {name: data.read(name) for name in ("train_list", "val_list") if data.lists[name] is not None}
            append(Path(trainer.default_root_dir), describe(lists, data.root))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        folder = Path(trainer.default_root_dir)
        if isinstance(exception, Exception) and trainer.is_global_zero and (starts := read(folder)):
            starts[-1]["error"] = f"{type(exception).__name__}: {exception}"
            write(folder, starts)
