"""Predicts the classes of videos with a checkpoint that train_net.py wrote.

python tools/predict.py VIDEO|FOLDER|LIST ... --ckpt CHECKPOINT [--json FILE] [--csv FILE] [--timeline]
                        [--save-video DIR] [--thumbnail DIR]

An input is one of
  a video
  a folder, searched for videos with all that is below it, in natural order (clip2 before clip10). Hidden files, files
           without an extension, texts, pictures and what --save-video wrote (*.predicted.mp4) do not count
  a list   *.csv or *.txt, with a line 'path' or 'path class-number' for each video. Given numbers are shown beside the
           predictions, and how many are right. Paths start from --root, by default the present folder, or the list's
           folder where the present one does not have them

The score of a class is the average, after softmax, of N moments x M crops (--clips, --crops), as test_net.py has it.
The timeline scores one clip, of the centre, around the middle of each second. A segment is a stretch in which a class,
one that is the most likely in some second, has at least half of its highest score.

--json   {"checkpoint", "network", "alpha", "labels", "videos": [{"path", "status": "ok", "seconds",
         "predictions": [{"label", "class", "probability"}], "scores": [one a class], "timeline": {"seconds": [middles],
         "scores": [[one a class] a second]}, "segments": [{"start", "end", "label", "class", "mean_score"}]}],
         "bad": [{"path", "reason"}]}; besides "truth" of a video with a given class, "annotated" and "thumbnail" of one
         with such files, and "accuracy": {"top1", "top5", "videos"} if there are given classes
--csv    path,status,reason,rank,label,probability: a row for every rank of a video, one without a rank for a bad one
--save-video   writes DIR/NAME.predicted.mp4 (H.264, without sound): upright, with the most likely class of the present
         second and a bar as long as its probability along the lower edge. PyAV reads the frames, whatever the --backend
--thumbnail    writes DIR/NAME.predicted.jpg: eight frames, evenly spread, with their times and the most likely class

Exit status: 0 if all videos were predicted; 1 if some are bad, which are named with the reason; 2 for a mistake in the
command, or if results cannot be written; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from octvideo.commands.options import Parser, fail, one_line_errors
from octvideo.data.lists import HEADERS, NOT_VIDEOS
from octvideo.data.video import READERS
from octvideo.data.watchdog import HungError
from octvideo.errors import DecodeError, ListError
from octvideo.evaluation.drawing import ANNOTATED, THUMBNAIL, annotate, clock, contact_sheet, read_stills
from octvideo.evaluation.prediction import Prediction, Predictor
from octvideo.files import appearing
from octvideo.models.checkpoint import Trained, load_trained

LISTS = (".csv", ".txt")
WIDTH = 10_000  # characters that a line of a table may have, unless it is for a terminal: nothing is folded there


class Source(NamedTuple):
    """A video to predict, and its class number if a list gives it."""

    path: str
    truth: int | None = None


class Outcome(NamedTuple):
    """What became of a video: a prediction or the reason why there is none, and files that show it, by their keys."""

    source: Source
    prediction: Prediction | None
    reason: str
    files: dict[str, str]


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("inputs", metavar="VIDEO|FOLDER|LIST", nargs="+", type=Path, help="what to predict")
    add("--ckpt", type=Path, required=True, help="checkpoint that train_net.py wrote")
    add("--alpha", type=float, help="alpha of res2 to res4; default: the checkpoint's")
    add("--device", help="such as cpu, cuda or cuda:1; default: cuda if there is one, else cpu")
    add("--root", type=Path, help="folder that the paths in lists start from")
    add("--clips", metavar="N", type=_count, default=10, help="moments of a video, 1 is the centre; default: 10")
    add("--crops", metavar="M", type=_count, default=3, help="crops a moment; default: 3")
    add("--top", metavar="K", type=_count, default=5, help="most likely classes to show; default: 5")
    add("--timeline", action="store_true", help="print the segments too")
    add("--json", metavar="FILE", type=Path, help="file for all results")
    add("--csv", metavar="FILE", type=Path, help="file for the most likely classes")
    add("--save-video", metavar="DIR", type=Path, help="folder for videos with the prediction drawn in")
    add("--thumbnail", metavar="DIR", type=Path, help="folder for contact sheets")
    add("--backend", choices=("auto", *READERS), default="auto", help="what decodes; default: auto, PyAV if it can")
    add(
        *("--decode_timeout_seconds", "--decode-timeout-seconds"),
        metavar="S",
        type=_seconds,
        default=60.0,
        help="a video whose decoder takes longer for a step is bad; null waits forever; default: 60",
    )
    return parser.parse_args(words)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float | None:
    if text == "null":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number or null, got {text!r}")
    return seconds


def find_videos(inputs: Sequence[Path], root: Path | None, num_classes: int) -> list[Source]:
    """The videos that the inputs name, in their order.

    Raises:
        ListError: a list that cannot be read, or a class number that the network does not have; no video at all.
        OSError: a folder that cannot be read.
    """
    found: list[Source] = []
    for path in inputs:
        if path.is_dir():
            found += map(Source, search(path))
        elif path.suffix.lower() in LISTS:
            found += read_list(path, root, num_classes)
        else:
            found.append(Source(str(path)))
    if not any(os.path.exists(source.path) for source in found):
        missing = f": no file of the {len(found)} that are named is there, such as {found[0].path}" if found else ""
        raise ListError(f"no videos found in {', '.join(map(str, inputs))}{missing}")
    return found


def search(folder: Path) -> list[str]:
    """The files below a folder that may be videos, in natural order.

    Raises:
        OSError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found, entered = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:  # a link to a folder that it lies in
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix and suffix not in NOT_VIDEOS and not name.startswith(".") and not name.endswith(ANNOTATED):
                found.append(os.path.join(parent, name))
    return sorted(found, key=lambda path: (natural(path), path))


def natural(path: str) -> list[list[str | int]]:
    """What to sort paths by: numbers in them by their size, and no matter whether letters are capital."""
    return [
        [int(part) if place % 2 else part.casefold() for place, part in enumerate(re.split(r"(\d+)", name))]
        for name in path.split(os.sep)
    ]


def read_list(path: Path, root: Path | None, num_classes: int) -> Iterator[Source]:
    """The videos of a list file, with or without class numbers.

    Raises:
        ListError: it cannot be read, or has a class number that the network does not have.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file in UTF-8'}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and re.split(r"[\s,]", line.strip().lower())[0] in HEADERS):
            continue
        video, label = line.strip(), None
        if parts := re.fullmatch(r"(.*[^\s,])[\s,]+(-?\d+)", video):
            video, label = parts[1], int(parts[2])
            if not 0 <= label < num_classes:
                raise ListError(f"{path}:{number}: class number must be 0 to {num_classes - 1}, got {label}")
        here = Path(root or "", video)
        beside = path.parent / video
        yield Source(str(beside if root is None and not here.exists() and beside.exists() else here), label)


def file_names(paths: Sequence[str], folders: Sequence[Path | None]) -> list[str]:
    """A name for each video's files, none of which is another's or a video itself.

    Args:
        paths: the videos.
        folders: of the annotated videos and of the contact sheets.
    """
    sources, used, counts = {os.path.realpath(path) for path in paths}, set(), Counter[str]()
    names = []
    for path in paths:
        stem = name = Path(path).stem
        while name.casefold() in used or any(
            os.path.realpath(folder / f"{name}{suffix}") in sources
            for folder, suffix in zip(folders, (ANNOTATED, THUMBNAIL), strict=True)
            if folder is not None
        ):
            counts[stem] += 1
            name = f"{stem}_{counts[stem] + 1}"
        used.add(name.casefold())
        names.append(name)
    return names


def predict_all(sources: Sequence[Source], predictor: Predictor, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Predicts each video, and writes the files that show it."""
    annotating, stilling = (predictor.decoding.watched(job) for job in (annotate, read_stills))
    save_video, thumbnail = arguments.save_video, arguments.thumbnail
    names = file_names([source.path for source in sources], (save_video, thumbnail))
    for source, name in zip(sources, names, strict=True):
        files = {}
        try:
            prediction = predictor(source.path)
            if save_video is not None:
                files["annotated"] = str(save_video / f"{name}{ANNOTATED}")
                with appearing(Path(files["annotated"])) as partial:
                    annotating((prediction, partial))
            if thumbnail is not None:
                files["thumbnail"] = str(thumbnail / f"{name}{THUMBNAIL}")
                sheet = contact_sheet(prediction, *stilling((source.path, arguments.backend)))
                with appearing(Path(files["thumbnail"])) as partial:
                    sheet.save(partial, "JPEG", quality=90)
            yield Outcome(source, prediction, "", files)
        except DecodeError as error:
            yield Outcome(source, None, error.reason, {})
        except HungError as error:
            yield Outcome(source, None, str(error), {})


def accuracies(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Shares of the videos with a given class whose most likely class, or one of the five, it is; None without any."""
    judged = [
        (one.source.truth, [best.number for best in one.prediction.top(5)])
        for one in outcomes
        if one.prediction is not None and one.source.truth is not None
    ]
    if not judged:
        return None
    shares = {f"top{k}": sum(truth in best[:k] for truth, best in judged) / len(judged) for k in (1, 5)}
    return {**shares, "videos": len(judged)}


def as_json(outcomes: Sequence[Outcome], trained: Trained, arguments: argparse.Namespace) -> dict[str, Any]:
    """The content of --json."""
    videos = []
    for source, prediction, _, files in outcomes:
        if prediction is None:
            continue
        timeline = prediction.timeline
        video = {
            "path": source.path,
            "status": "ok",
            "seconds": float(timeline.edges_seconds[-1]),
            "predictions": [
                {"label": label, "class": number, "probability": probability}
                for label, number, probability in prediction.top(arguments.top)
            ],
            "scores": prediction.scores.tolist(),
            "timeline": {
                "seconds": timeline.seconds.tolist(),
                "scores": timeline.scores.astype(np.float64).round(6).tolist(),
            },
            "segments": [
                {"start": start, "end": end, "label": label, "class": number, "mean_score": score}
                for start, end, label, number, score in prediction.segments(arguments.top)
            ],
            **files,
        }
        if source.truth is not None:
            video["truth"] = {"label": trained.labels[source.truth], "class": source.truth}
        videos.append(video)
    accuracy = accuracies(outcomes)
    return {
        "checkpoint": str(arguments.ckpt),
        "network": trained.options["name"],
        "alpha": trained.options["alpha"],
        "labels": trained.labels,
        **({"accuracy": accuracy} if accuracy is not None else {}),
        "videos": videos,
        "bad": [{"path": one.source.path, "reason": one.reason} for one in outcomes if one.prediction is None],
    }


def write_csv(path: Path, outcomes: Sequence[Outcome], top: int) -> None:
    """Writes --csv."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "status", "reason", "rank", "label", "probability"))
        for source, prediction, reason, _ in outcomes:
            if prediction is None:
                writer.writerow((source.path, "bad", reason, "", "", ""))
            for rank, best in enumerate(prediction.top(top) if prediction is not None else (), 1):
                writer.writerow((source.path, "ok", "", rank, best.label, best.probability))


def print_results(outcomes: Sequence[Outcome], labels: Sequence[str], arguments: argparse.Namespace) -> None:
    """Prints the predictions, how many are right, the segments if asked to, and the bad videos with their reasons."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    good = [(source, prediction) for source, prediction, *_ in outcomes if prediction is not None]
    truths = any(source.truth is not None for source, _ in good)
    table = Table("file", *(["truth"] if truths else []), *map(str, range(1, min(arguments.top, len(labels)) + 1)))
    segments = Table("file", "from", "to", "class", "mean score", box=box.SIMPLE)
    for column in (*table.columns, *segments.columns):
        column.overflow = "fold"
    for source, prediction in good:
        truth = "" if source.truth is None else labels[source.truth]
        cells = [f"{best.label} {100 * best.probability:.1f} %" for best in prediction.top(arguments.top)]
        table.add_row(*map(Text, (source.path, *([truth] if truths else []), *cells)))
        for segment in prediction.segments(arguments.top):
            times = clock(segment.start_seconds), clock(segment.end_seconds)
            segments.add_row(*map(Text, (source.path, *times, segment.label, f"{100 * segment.mean_score:.1f} %")))
    if good:
        console.print(table)
    if good and arguments.timeline:
        console.print(segments)
    if (accuracy := accuracies(outcomes)) is not None:
        shares = ", ".join(f"top-{k} {100 * accuracy[f'top{k}']:.2f} %" for k in (1, 5))
        console.print(f"{shares} of {accuracy['videos']} videos with a given class", highlight=False)
    console.print(f"{len(good)} videos predicted, {len(outcomes) - len(good)} bad", highlight=False)
    for source, prediction, reason, _ in outcomes:
        if prediction is None:
            console.print(Text(f"  {source.path}: {reason}", "yellow"), soft_wrap=True)


def check_outputs(arguments: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Refuses results in the place of what is read, and makes their folders, before the work that they are for.

    Raises:
        ListError: a result cannot be where it is to be.
        OSError: a folder cannot be made.
    """
    read = {os.path.realpath(path) for path in (arguments.ckpt, *arguments.inputs, *(one.path for one in sources))}
    for option in ("json", "csv"):
        path = getattr(arguments, option)
        if path is None:
            continue
        if path.is_dir() or os.path.realpath(path) in read:
            raise ListError(f"--{option} {path}: that is {'a folder' if path.is_dir() else 'read, or another result'}")
        read.add(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
    for folder in (arguments.save_video, arguments.thumbnail):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)


def predict(arguments: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit status."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    trained = load_trained(arguments.ckpt, arguments.alpha)
    sources = find_videos(arguments.inputs, arguments.root, len(trained.labels))
    check_outputs(arguments, sources)
    predictor = Predictor(
        trained,
        num_clips=arguments.clips,
        num_crops=arguments.crops,
        device=name,
        backend=arguments.backend,
        decode_timeout_seconds=arguments.decode_timeout_seconds,
    )
    console = Console(stderr=True)
    outcomes = list(
        track(
            predict_all(sources, predictor, arguments),
            "predicting",
            len(sources),
            console=console,
            disable=len(sources) < 2 or not console.is_terminal,
        )
    )
    print_results(outcomes, trained.labels, arguments)
    if arguments.json is not None:
        with appearing(arguments.json) as partial:
            partial.write_text(json.dumps(as_json(outcomes, trained, arguments)))
    if arguments.csv is not None:
        with appearing(arguments.csv) as partial:
            write_csv(partial, outcomes, arguments.top)
    return int(any(outcome.prediction is None for outcome in outcomes))


def main(words: list[str]) -> int:
    """Runs the tool; returns its exit status."""
    arguments = read_arguments(words)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path may be of no encoding
    try:
        with one_line_errors():
            return predict(arguments)
    except KeyboardInterrupt:
        print("stopped: nothing but --save-video and --thumbnail was written", file=sys.stderr)
        return 130
