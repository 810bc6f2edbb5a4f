"""Writes the report of one or several runs: one HTML file with curves, accuracies, confusions, mistakes and cost.

octvideo report RUN_DIR [RUN_DIR ...] [--output FILE] [--rounds N]

A RUN_DIR is a folder of `octvideo train`. predictions.json and alphas.json of `octvideo test` are in it or in its
folder test, and are taken as results of its last.ckpt (or best.ckpt, if that is all there is). The report of several
runs compares them. It leaves out whatever a folder lacks, and says so. The networks are timed here and now. Paths of
videos in predictions.json are relative to the current folder.

Exit status: 0 written; 2 a mistake in the command, or a folder with nothing to report on.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torchvision.io import encode_jpeg

from octvideo.commands.options import Parser, fail, one_line_errors
from octvideo.data.video import Video
from octvideo.errors import DecodeError
from octvideo.evaluation.report import Run, measure, read_run, render
from octvideo.files import appearing
from octvideo.models.cost import hardware


def picture(path: str) -> bytes | str:
    """A JPEG of frames spread over a video, side by side or, wide ones, two by two; or the reason why there is none."""
    try:
        with Video(path) as video:
            frames = video.frames_at((np.arange(4) + 0.5) / 4 * video.duration_seconds, short_side=112)
    except DecodeError as error:
        return error.reason
    frames = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)  # a line between them
    rows = [frames[:2], frames[2:]] if frames.shape[2] > 1.2 * frames.shape[1] else [frames]
    image = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    return bytes(encode_jpeg(torch.from_numpy(image).permute(2, 0, 1).contiguous(), quality=80).numpy())


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of different folders' paths, of equal length, that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = next(n for n in range(1, 1 + max(map(len, parts))) if len({part[-n:] for part in parts}) == len(parts))
    return [str(Path(*part[-length:])) for part in parts]


def write_report(runs: Sequence[Run], path: Path, rounds: int = 10) -> None:
    """Times the runs' networks and writes their report."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = [f"{name} {metadata.version(name)}" for name in ("octvideo", "torch", "lightning", "av")]
    made = f"{time.strftime('%Y-%m-%d %H:%M')}, with {', '.join(versions)}, Python {platform.python_version()}"
    machine = f"{hardware(device)}, threads: {torch.get_num_threads()}, batch: 1, float32, rounds: {rounds}"
    html = render(measure(runs, rounds=rounds, device=device), picture, made=made, machine=machine)
    with appearing(path) as partial:
        partial.write_text(html, "utf-8")
    print(f"report: {path}")


def main(words: list[str]) -> None:
    """Runs the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folders", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run")
    add("--output", metavar="FILE", type=Path, help="file to write; default: report.html in the first RUN_DIR")
    add("--rounds", metavar="N", type=int, default=10, help="timings of each network; 0: none; default: %(default)s")
    arguments = parser.parse_args(words)
    if arguments.rounds < 0:
        fail(f"--rounds must be at least 0, got {arguments.rounds}")
    folders = list({folder.resolve(): folder for folder in arguments.folders}.values())
    with one_line_errors():
        runs = [replace(read_run(one), name=name) for one, name in zip(folders, names_of(folders), strict=True)]
        for line in [f"{run.name}: {sentence}" for run in runs for sentence in run.missing]:
            print(line)
        write_report(runs, arguments.output or folders[0] / "report.html", arguments.rounds)
