"""Predicts the classes of videos with a checkpoint of octvideo train.

octvideo predict VIDEO|FOLDER|LIST ... --ckpt CHECKPOINT [--json FILE] [--csv FILE] [--timeline]
                 [--save-video DIR] [--thumbnail DIR]
octvideo predict SOURCE --stream ...    predicts live video; octvideo predict --stream --help explains

An input is a video (a file, a URI such as s3://bucket/clip.mp4, a member of a tar file), of which VIDEO#t=START,END
is a stretch in seconds, or
  a folder (of a store: with a / at its end), searched for videos at any depth, in natural order (clip2 before clip10);
           hidden files, files without an extension, texts, pictures and copies written by --save-video
           (*.predicted.mp4) are skipped; or, without videos in it, the numbered frames of one (--frames-fps)
  a list   *.csv or *.txt with a line 'path' or 'path class-number' for each video. Given classes are shown beside the
           predictions and accuracies are computed. Paths start from --root; by default from the current folder, or from
           the list's folder if the current one does not have them

The score of a class is averaged after softmax over N clips x M crops (--clips, --crops), as in octvideo test. The
timeline scores one clip around the middle of each second. A segment is a stretch in which a class that is the most
likely one in some second keeps at least half of its highest score.

--json   {"checkpoint", "network", "alpha", "labels", "videos": [{"path", "status": "ok", "seconds", "predictions":
         [{"label", "class", "probability"}], "scores": [one per class], "timeline": {"seconds": [middles], "scores":
         [[one per class] per second]}, "segments": [{"start", "end", "label", "class", "mean_score"}]}], "bad":
         [{"path", "reason"}]}; also a video's "alpha" with --budget, a "note" if its frame rate or duration had to be
         derived, "truth" if its class is given, "annotated" and "thumbnail" if it has such files, and "accuracy":
         {"top1", "top5", "videos"} if classes are given
--csv    path,status,reason,rank,label,probability: one row per rank of a video, or one without a rank for a bad video
--save-video   writes DIR/NAME.predicted.mp4 (H.264, no sound): upright, with the most likely class of the current
         second and a bar as long as its probability along the lower edge; PyAV reads it, whatever the --backend
--thumbnail    writes DIR/NAME.predicted.jpg: eight evenly spaced frames with their times, and the most likely class
--budget       times the alphas of elastic training at the start, then takes the smallest that scores a clip in MS
               milliseconds, and another where the load changes, with a line on standard error for each switch

Exit status: 0 if all videos were predicted; 1 if some are bad (they are listed with the reason); 2 for a mistake in the
command, if results cannot be written, or if a store fails (what was predicted before is written); 130 on Ctrl-C.
"""

import argparse
import csv
import io
import itertools
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from octvideo.commands import stream
from octvideo.commands.options import (
    COMPILE,
    Parser,
    add_budget,
    add_predictor,
    check_budget,
    device_of,
    location,
    number,
    one_line_errors,
    positive,
)
from octvideo.data.lists import HEADERS, read_lines, rooted, video_files, without_span
from octvideo.data.source import PICTURES, AnySource, split_span
from octvideo.data.video import READERS
from octvideo.data.watchdog import HungError
from octvideo.errors import DecodeError, ListError, StoreError, UserError
from octvideo.evaluation.drawing import ANNOTATED, THUMBNAIL, annotate, clock, contact_sheet, read_stills
from octvideo.evaluation.prediction import Prediction, Predictor
from octvideo.files import appearing
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.compilation import compile_network
from octvideo.stores import exists, is_uri

Result = TypeVar("Result")


class Outcome(NamedTuple):
    path: str
    truth: int | None  # its class, if a list gives it
    prediction: Prediction | None
    reason: str  # why there is none
    files: Mapping[str, str]  # that show it, by their keys in --json


def find_videos(
    inputs: Sequence[str | Path], root: str | Path | None, num_classes: int
) -> list[tuple[str, int | None]]:
    """The paths that the inputs name, in order, and the classes that lists give; ListError if there is none."""
    found: list[tuple[str, int | None]] = []
    for path in map(str, inputs):
        if path.lower().endswith((".csv", ".txt")) and not os.path.isdir(path):
            found += read_list(path, root, num_classes)
        else:
            is_folder = path.endswith("/") if is_uri(path) else os.path.isdir(path)
            found += [(video, None) for video in (search(path) if is_folder else [path])]
    if not any(is_uri(video) or os.path.exists(split_span(video)[0]) for video, _ in found):
        missing = f": none of the {len(found)} files named exist, such as {found[0][0]}" if found else ""
        raise ListError(f"no videos found in {', '.join(map(str, inputs))}{missing}")
    return found


def search(folder: str) -> list[str]:
    """The files below a folder that may be videos, in natural order: numbers by value, ignoring case.

    Without any, the folder itself, if it has frames of a video.
    """

    def natural(path: str) -> list[list[str | int]]:
        parts = [re.split(r"(\d+)", name.casefold()) for name in path.split("/")]
        return [[int(text) if index % 2 else text for index, text in enumerate(texts)] for texts in parts]

    names = [name for name in video_files(folder) if not name.endswith(ANNOTATED)]
    if not names and (is_uri(folder) or {os.path.splitext(name)[1].lower() for name in os.listdir(folder)} & PICTURES):
        return [folder.rstrip("/")]
    return [os.path.join(folder, name) for name in sorted(names, key=natural)]


def read_list(path: str, root: str | Path | None, num_classes: int) -> Iterator[tuple[str, int | None]]:
    """The videos of a list file, with or without classes."""
    for line_number, line in enumerate(read_lines(path), 1):
        video, label = without_span(line.strip(), " "), None
        if not video or (line_number == 1 and re.split(r"[\s,]", video.lower())[0] in HEADERS):
            continue
        if several := re.fullmatch(r"(.*\S)\s+(-|[\d.:]+(,[\d.:]+)+)", video):  # classes or shares: no single truth
            video = several[1]
        elif parts := re.fullmatch(r"(.*[^\s,])[\s,]+(-?\d+)", video):
            video, label = parts[1], int(parts[2])
            if not 0 <= label < num_classes:
                raise ListError(f"{path}:{line_number}: class number must be 0 to {num_classes - 1}, got {label}")
        here, beside = rooted(root or "", video), rooted(os.path.dirname(path), video)
        elsewhere = is_uri(path) or (
            not (is_uri(here) or exists(split_span(here)[0])) and exists(split_span(beside)[0])
        )
        yield beside if root is None and elsewhere else here, label


def file_names(paths: Sequence[str], folders: Sequence[Path | None]) -> list[str]:
    """A name for each video's files in the folders of --save-video and --thumbnail, so that nothing is overwritten."""
    sources, names = {os.path.realpath(path) for path in paths}, dict[str, str]()
    numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))
    endings = [(folder, end) for folder, end in zip(folders, (ANNOTATED, THUMBNAIL), strict=True) if folder is not None]
    for path in paths:
        stem = name = re.sub(r"#t=(.*)$", r"_\1", Path(path).stem if "#t=" not in path else os.path.basename(path))
        while name.casefold() in names or any(os.path.realpath(f / f"{name}{end}") in sources for f, end in endings):
            name = f"{stem}_{next(numbers[stem])}"
        names[name.casefold()] = name
    return list(names.values())


def predict_all(
    videos: Sequence[tuple[str, int | None]], predictor: Predictor, arguments: argparse.Namespace
) -> Iterator[Outcome]:
    """Predicts each video, and writes its annotated copy and contact sheet."""
    annotating = predictor.watched(partial(annotate, source=predictor.source))
    stilling = predictor.watched(partial(read_stills, source=predictor.source))
    names = file_names([path for path, _ in videos], (arguments.save_video, arguments.thumbnail))
    for (path, truth), name in zip(videos, names, strict=True):
        files = {}
        try:
            prediction = predictor(path)
            if arguments.save_video is not None:
                files["annotated"] = str(arguments.save_video / f"{name}{ANNOTATED}")
                with appearing(Path(files["annotated"])) as written:
                    annotating((prediction, written))
            if arguments.thumbnail is not None:
                files["thumbnail"] = str(arguments.thumbnail / f"{name}{THUMBNAIL}")
                sheet = contact_sheet(prediction, *stilling((path, arguments.backend)))
                with appearing(Path(files["thumbnail"])) as written:
                    sheet.save(written, "JPEG", quality=90)
            yield Outcome(path, truth, prediction, "", files)
        except StoreError as error:  # nothing is known of the videos behind it: what is known is written
            print(f"stopped: {error}", file=sys.stderr)
            return
        except (DecodeError, HungError) as error:
            yield Outcome(path, truth, None, error.reason if isinstance(error, DecodeError) else str(error), {})


def accuracies(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Top-1 and top-5 accuracy over the predicted videos with a given class; None without any."""
    judged = [(one.prediction, one.truth) for one in outcomes if one.prediction is not None and one.truth is not None]
    if not judged:
        return None
    hits = np.array([[best.number == truth for best in prediction.top(5)] for prediction, truth in judged])
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean()), "videos": len(judged)}


def as_json(outcomes: Sequence[Outcome], trained: Trained, arguments: argparse.Namespace) -> dict[str, Any]:
    ranked, segment = ("label", "class", "probability"), ("start", "end", "label", "class", "mean_score")
    videos = []
    for path, truth, prediction, _, files in outcomes:
        if prediction is None:
            continue
        timeline = prediction.timeline
        scores = timeline.scores.astype(np.float64).round(6).tolist()
        video: dict[str, Any] = {"path": path, "status": "ok", "seconds": float(timeline.edges_seconds[-1])}
        video |= {
            "predictions": [dict(zip(ranked, best, strict=True)) for best in prediction.top(arguments.top)],
            "scores": prediction.scores.tolist(),
            "timeline": {"seconds": timeline.seconds.tolist(), "scores": scores},
            "segments": [dict(zip(segment, one, strict=True)) for one in prediction.segments(arguments.top)],
        }
        if prediction.note:
            video["note"] = prediction.note
        if prediction.alpha is not None:
            video["alpha"] = prediction.alpha
        if truth is not None:
            video["truth"] = {"label": trained.labels[truth], "class": truth}
        videos.append(video | dict(files))
    accuracy = accuracies(outcomes)
    found = {"checkpoint": str(arguments.ckpt), "network": trained.name, "alpha": trained.options["alpha"]}
    found |= {"labels": trained.labels, **({} if accuracy is None else {"accuracy": accuracy}), "videos": videos}
    return found | {"bad": [{"path": one.path, "reason": one.reason} for one in outcomes if one.prediction is None]}


def print_results(outcomes: Sequence[Outcome], labels: Sequence[str], arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 10_000)  # unless for a terminal, no line is folded
    good = [(path, truth, prediction) for path, truth, prediction, *_ in outcomes if prediction is not None]
    truths = ["truth"] if any(truth is not None for _, truth, _ in good) else []
    table = Table("file", *truths, *map(str, range(1, min(arguments.top, len(labels)) + 1)))
    segments = Table("file", "from", "to", "class", "mean score", box=box.SIMPLE)
    for column in (*table.columns, *segments.columns):
        column.overflow = "fold"
    for path, truth, prediction in good:
        given = ["" if truth is None else labels[truth]] if truths else []
        ranks = [f"{best.label} {100 * best.probability:.1f} %" for best in prediction.top(arguments.top)]
        table.add_row(*map(Text, (path, *given, *ranks)))
        for start, end, label, _, score in prediction.segments(arguments.top):
            segments.add_row(*map(Text, (path, clock(start), clock(end), label, f"{100 * score:.1f} %")))
    if good:
        console.print(table, *([segments] if arguments.timeline else []))
    if (accuracy := accuracies(outcomes)) is not None:
        shares = ", ".join(f"top-{k} {100 * accuracy[f'top{k}']:.2f} %" for k in (1, 5))
        console.print(f"{shares} of {accuracy['videos']} videos with a given class", highlight=False)
    bad = [Text(f"  {one.path}: {one.reason}", "yellow") for one in outcomes if one.prediction is None]
    for path, _, prediction in good:
        if prediction.note:
            console.print(Text(f"{path}: {prediction.note}"), soft_wrap=True)
    console.print(f"{len(good)} videos predicted, {len(bad)} bad", *bad, sep="\n", highlight=False, soft_wrap=True)
    for what, folder in (("annotated copies", arguments.save_video), ("contact sheets", arguments.thumbnail)):
        if good and folder is not None:
            console.print(f"{what}: {folder}", highlight=False, soft_wrap=True)


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a `Predictor` reads videos, from the options of `add_videos`."""
    views = {"num_clips": arguments.clips, "num_crops": arguments.crops, "backend": arguments.backend}
    source = AnySource(arguments.frames_fps)
    return views | {"decode_timeout_seconds": arguments.decode_timeout_seconds, "source": source}


def shown(results: Iterable[Result], what: str, count: int) -> Iterable[Result]:
    """The results, with a progress bar if they are several and someone is watching."""
    console = Console(stderr=True)
    return track(results, what, count, console=console, disable=count < 2 or not console.file.isatty())


def refuse_overwriting(outputs: Collection[tuple[str, Path]], inputs: Iterable[str | Path]) -> None:
    """Refuses results, named by their options, that would replace what is read or each other; makes their folders."""
    read = set(map(os.path.realpath, inputs))
    for option, path in outputs:
        replaced = path.is_file() or not path.exists()  # devices and pipes are not
        if path.is_dir() or (replaced and os.path.realpath(path) in read):
            what = "a folder" if path.is_dir() else "an input or another result"
            raise UserError(f"--{option} {path}: that is {what}")
        read.add(os.path.realpath(path))
    for _, path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)


def predict(arguments: argparse.Namespace) -> int:
    device = device_of(arguments.device)
    trained = load_trained(arguments.ckpt, arguments.alpha)
    compile_network(trained.network, arguments.compile)
    videos = find_videos(arguments.inputs, arguments.root, len(trained.labels))
    if trained.task == "multi":  # a list's single class is no truth to count hits of
        videos = [(video, None) for video, _ in videos]
    given = [(option, path) for option in ("json", "csv") if (path := getattr(arguments, option)) is not None]
    refuse_overwriting(given, (arguments.ckpt, *arguments.inputs, *(video for video, _ in videos)))
    for folder in (arguments.save_video, arguments.thumbnail):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    predictor = Predictor(trained, device=device, budget_ms=arguments.budget, **reading(arguments))
    outcomes = list(shown(predict_all(videos, predictor, arguments), "predicting", len(videos)))
    print_results(outcomes, trained.labels, arguments)
    if arguments.json is not None:
        with appearing(arguments.json) as written:
            written.write_text(json.dumps(as_json(outcomes, trained, arguments)))
    if arguments.csv is not None:
        rows: list[tuple[object, ...]] = [("path", "status", "reason", "rank", "label", "probability")]
        for path, _, prediction, reason, _ in outcomes:
            best = [] if prediction is None else prediction.top(arguments.top)
            rows += [(path, "ok", "", rank, one.label, one.probability) for rank, one in enumerate(best, 1)]
            rows += [(path, "bad", reason, "", "", "")] if prediction is None else []
        csv.writer(text := io.StringIO(newline="")).writerows(rows)
        with appearing(arguments.csv) as written:
            written.write_text(text.getvalue(), "utf-8", "surrogateescape", newline="")
    if len(outcomes) < len(videos):
        return 2
    return int(any(outcome.prediction is None for outcome in outcomes))


def add_videos(parser: Parser, what: str) -> None:
    """Adds the videos to work on, the checkpoint, and how they are read."""
    add = parser.add_argument
    add("inputs", metavar="VIDEO|FOLDER|LIST", nargs="+", type=location, help=what)
    add_predictor(parser, clips=10, crops=3)
    add("--device", help="such as cpu, cuda or cuda:1; default: cuda if available, else cpu")
    add("--root", type=location, help="folder that paths in lists start from")
    add("--frames-fps", metavar="F", type=positive, default=25.0, help="of folders of frames; default: 25")
    add("--backend", choices=("auto", *READERS), default="auto", help="decoder; default: auto, PyAV if it can")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text


def main(words: list[str]) -> int:
    if "--stream" in words:
        return stream.main(words)
    parser = Parser(__doc__)
    add = parser.add_argument
    add_videos(parser, "what to predict")
    add_budget(parser)
    add("--compile", choices=("blocks", "true"), help=COMPILE)
    add("--top", metavar="K", type=number, default=5, help="most likely classes to show; default: 5")
    add("--timeline", action="store_true", help="print the segments too")
    add("--json", metavar="FILE", type=Path, help="file for all results")
    add("--csv", metavar="FILE", type=Path, help="file for the most likely classes")
    add("--save-video", metavar="DIR", type=Path, help="folder for annotated copies of the videos")
    add("--thumbnail", metavar="DIR", type=Path, help="folder for contact sheets")
    arguments = parser.parse_args(words)
    check_budget(arguments)
    try:
        with one_line_errors():
            return predict(arguments)
    except KeyboardInterrupt:
        print("stopped: nothing but --save-video and --thumbnail was written", file=sys.stderr)
        return 130
