"""The report of tested runs: one HTML file with curves, accuracies, mistakes and cost that loads nothing else."""

import base64
import copy
import csv
import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octvideo.errors import UserError
from octvideo.evaluation.charts import Chart, Series, draw_heat_map, to_svg
from octvideo.layers.shares import say_shares
from octvideo.models.checkpoint import Trained, load_trained, read_training_checkpoint
from octvideo.models.cost import Cost, count_cost, count_parameters, time_interleaved, total
from octvideo.models.octave_report import MACHINE
from octvideo.models.zoo import Alpha, set_alpha

RESAMPLES = 10_000
LOSSES = {"train/loss_epoch": "training", "val/loss": "validation", "train/loss_step": "training, single steps"}
CURVES: Sequence[tuple[str, str, dict[str, str]]] = (  # title, y axis, and the figures with their names
    ("Loss", "cross-entropy (nats)", LOSSES),
    ("Top-1 accuracy", "top-1 (%)", {"train/top1": "training", "val/top1": "validation"}),
    ("Mean average precision", "mAP (%)", {"val/map": "validation"}),
    ("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
    ("Speed", "clips per second", {"train/clips_per_second": "training"}),
)
LOGGED = {name for _, _, names in CURVES for name in names}
CURVE_POINTS = 300  # a longer curve is drawn as the means of that many parts
Floats = NDArray[np.float64]


class Accuracy(NamedTuple):
    """A share of videos or clips in [0, 1], and its 95 % interval, None where that is unknown."""

    mean: float
    interval: tuple[float, float] | None = None


def bootstrap(outcomes: Floats) -> Accuracy:
    """The mean of N >= 1 outcomes (right or wrong, or few other values in [0, 1]), and its bootstrap interval."""
    values, counts = np.unique(outcomes, return_counts=True)
    number = len(outcomes)  # how often each value occurs in a resample is multinomial
    drawn = np.random.default_rng(0).multinomial(number, counts / number, RESAMPLES) @ values / number
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Accuracy(float(outcomes.mean()), (low, high))


def wilson(right: int, number: int) -> Accuracy:
    """A share and its score interval (Wilson, 1927), which has a width even where all of few videos are right."""
    share, squared = right / number, statistics.NormalDist().inv_cdf(0.975) ** 2 / number
    middle = share + squared / 2
    half = math.sqrt(squared * (share * (1 - share) + squared / 4))
    return Accuracy(share, ((middle - half) / (1 + squared), (middle + half) / (1 + squared)))


class Curve(NamedTuple):
    """A figure over a training."""

    steps: Floats  # (N,) optimiser steps, rising
    values: Floats  # (N,), all finite


class Predictions(NamedTuple):
    """The predictions.json of N videos and C classes."""

    paths: list[str]
    labels: NDArray[np.int64]  # (N,) classes
    order: NDArray[np.int64]  # (N, C) classes, the likeliest first
    scores: NDArray[np.float32]  # (N, C) probabilities
    clips: dict[str, Floats | float]  # clip_top1, clip_top5: (N,) shares of each video's clips, or just the average
    bad: list[tuple[str, str]]  # (path, reason) of videos that could not be decoded
    names: list[str]  # of the classes

    def accuracies(self) -> dict[str, Accuracy]:
        """Accuracies of videos and clips, named as in predictions.json; empty if no video was tested."""
        if not self.paths:
            return {}
        ranks = (self.order == self.labels[:, None]).argmax(1)
        found = {f"top{k}": bootstrap((ranks < k) * 1.0) for k in (1, 5)}
        clips = self.clips.items()
        return found | {key: Accuracy(share) if isinstance(share, float) else bootstrap(share) for key, share in clips}

    def confusion(self) -> NDArray[np.int64]:
        """(C, C) numbers of videos: rows are their classes, columns the predicted ones."""
        counts = np.zeros((len(self.names),) * 2, np.int64)
        np.add.at(counts, (self.labels, self.order[:, 0]), 1)
        return counts

    def mistakes(self) -> list[int]:
        """Indices of the wrongly predicted videos, the most confident first."""
        wrong = np.flatnonzero(self.order[:, 0] != self.labels)
        return list(wrong[np.argsort(-self.scores.max(1)[wrong], kind="stable")].tolist())


class MultiPredictions(NamedTuple):
    """The predictions.json of N videos of any number of the C classes each."""

    paths: list[str]
    rows: list[dict[str, Any]]  # of each class its name, videos, and average precision, None without a video
    mean: float | None  # average precision over the classes with videos
    bad: list[tuple[str, str]]  # (path, reason) of videos that could not be decoded

    def accuracies(self) -> dict[str, Accuracy]:
        """The mean average precision, as predictions.json names it; empty without any."""
        return {} if self.mean is None else {"map": Accuracy(self.mean)}


@dataclass(frozen=True)
class Card:
    """A checkpoint's network, and what it costs."""

    checkpoint: Path
    trained: Trained
    epoch: int  # finished ones and, if the checkpoint was written within one, that one
    step: int
    lightning: str  # the version that wrote it
    parameters: int
    cost: Cost  # of one clip in float32
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of one clip in each round, by `say_alpha`


@dataclass(frozen=True)
class Run:
    """A training and its test, as far as its folder has them; `missing` has a sentence for each part that it lacks."""

    name: str
    predictions: Predictions | MultiPredictions | None = None
    alphas: Sequence[Mapping[str, Any]] = ()  # rows of alphas.json
    curves: Mapping[str, Curve] = field(default_factory=dict)  # by their names in the log
    card: Card | None = None
    missing: Sequence[str] = ()


def say_alpha(alpha: Alpha) -> str:
    """An alpha in words: one number, one for each stage, or "per layer"."""
    if isinstance(alpha, Mapping):
        return "per layer"
    return ", ".join(map(say_shares, alpha if isinstance(alpha, Sequence) else [alpha]))


def read_run(folder: Path, *, results: Path | None = None, checkpoint: Path | None = None) -> Run:
    """Reads the folder of a run, which gives the run its name; raises UserError if there is nothing in it.

    Args:
        results: folder of predictions.json and alphas.json; default: test in the run's folder, or that folder.
        checkpoint: the file that was tested; default: last.ckpt, or else best.ckpt, in the folder's checkpoints.
    """
    missing: list[str] = []

    def attempt(paths: Iterable[Path], otherwise: str, read: Callable[[Path], Any]) -> Any:
        path = next((path for path in paths if path.exists()), None)
        try:
            if path is not None and (found := read(path)):
                return found
            missing.append(otherwise)
        except (ValueError, KeyError, TypeError, OSError, csv.Error) as error:
            missing.append(f"{path} cannot be read: {type(error).__name__}: {error}")
        return None

    folders = [folder / "test", folder] if results is None else [results]
    files = [checkpoint] if checkpoint else [folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
    card = attempt(files, "There is no checkpoint, so the report does not describe the network.", read_card)
    files = [each / "predictions.json" for each in folders]
    lacks = "There is no predictions.json (`octvideo test` writes it), so the report has no videos and classes."
    predictions = attempt(files, lacks, partial(read_predictions, names=card and card.trained.labels))
    files = [each / "alphas.json" for each in folders if (each / "alphas.json").exists()]
    alphas = files and attempt(files, f"{files[0]} has no accuracies of videos.", _read_alphas)
    curves = attempt([folder], "There is no training log: neither metrics.csv nor a TensorBoard file.", read_curves)
    if not (card or predictions or alphas or curves):
        raise UserError(f"{folder}: nothing to report on. {' '.join(missing)}")
    return Run(folder.resolve().name, predictions, alphas or (), curves or {}, card, missing)


def read_predictions(path: Path, names: Sequence[str] | None = None) -> Predictions | MultiPredictions:
    """Reads a predictions.json; `names` are for classes that it does not name, else they are class 0, class 1 ...

    Raises UserError for scores, labels and names that do not fit; ValueError, KeyError or TypeError for another file.
    """
    results = json.loads(path.read_text("utf-8"))
    videos = results["videos"]
    bad = [(video["path"], video["reason"]) for video in results["bad"]]
    if results.get("task") == "multi":
        names = results.get("labels") or names or [f"class {number}" for number in range(len(results["ap"]))]
        counts = Counter(label for video in videos for label in video["label"])
        each = zip(names, results["ap"], strict=True)
        rows = [{"name": name, "videos": counts[number], "precision": ap} for number, (name, ap) in enumerate(each)]
        return MultiPredictions([video["path"] for video in videos], rows, results["map"], bad)
    scores = np.array([video["scores"] for video in videos], np.float32)
    labels = np.array([video["label"] for video in videos], np.int64)
    if videos and (scores.ndim != 2 or labels.min() < 0 or labels.max() >= scores.shape[1]):
        raise UserError(f"expected a score for each class and labels below their number, got scores {scores.shape}")
    scores = scores if videos else np.zeros((0, len(names or ())), np.float32)
    names = results.get("labels") or names or [f"class {number}" for number in range(scores.shape[1])]
    if videos and len(names) != scores.shape[1]:
        raise UserError(f"{len(names)} class names for {scores.shape[1]} scores")
    clips: dict[str, Floats | float] = {}
    for key in ("clip_top1", "clip_top5") if videos else ():
        shares = [video[key] for video in videos if key in videos[0]]
        clips[key] = np.array(shares, np.float64) if shares else float(results[key])
    order = np.argsort(-scores, axis=1, kind="stable")
    return Predictions([video["path"] for video in videos], labels, order, scores, clips, bad, list(names))


def _read_alphas(path: Path) -> list[dict[str, Any]]:
    keys = ("alpha", "gmacs", "statistics", "top1", "top5", "videos")
    rows = [{key: row[key] for key in keys} for row in json.loads(path.read_text("utf-8")) if "map" not in row]
    return [row for row in rows if row["videos"]]  # without a video there is no accuracy


def read_card(path: Path) -> Card:
    """Opens a checkpoint and counts its cost; raises as `load_trained`, and KeyError for one that names no epoch."""
    trained, saved = load_trained(path), read_training_checkpoint(path, mmap=True).content
    written = saved["epoch"] + 1, saved["global_step"], saved["pytorch-lightning_version"]
    cost = total(count_cost(trained.network, trained.preprocessing.clip_size))
    return Card(path, trained, *written, count_parameters(trained.network), cost)


def read_curves(folder: Path) -> dict[str, Curve]:
    """The figures of LOGGED that a run logged, from its metrics.csv or, without one, from TensorBoard's files."""
    tables = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    return _joined(map(_read_csv, tables)) or _joined(map(_read_events, sorted(folder.glob("events.out.tfevents.*"))))


def _read_csv(path: Path) -> dict[str, list[tuple[float, float]]]:
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"]]
    return {key: [(float(row["step"]), float(row[key])) for row in rows if row.get(key)] for key in LOGGED}


def _read_events(path: Path) -> dict[str, list[tuple[float, float]]]:
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    names = LOGGED.intersection(events.Tags()["scalars"])
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def _joined(parts: Iterable[Mapping[str, Sequence[tuple[float, float]]]]) -> dict[str, Curve]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LOGGED}
    for part in parts:  # a resumed run has several files: a later one counts from its first step on
        first = min((step for points in part.values() for step, _ in points), default=math.inf)
        for name, points in found.items():
            found[name] = [point for point in points if point[0] < first] + sorted(part.get(name, ()))
    finite = {name: np.array([p for p in points if math.isfinite(p[1])]) for name, points in found.items()}
    return {name: Curve(*points.T) for name, points in finite.items() if len(points)}


def measure(runs: Sequence[Run], *, rounds: int, device: str = "cpu") -> list[Run]:
    """The runs with seconds of one clip, at their own alpha and those of their tests, interleaved; 0 rounds: none."""
    calls: dict[tuple[int, str], Callable[[], Any]] = {}
    for index, run in enumerate(runs):
        if run.card is None or rounds == 0:
            continue
        trained, network = run.card.trained, run.card.trained.network.to(device)
        clip = torch.rand(1, *trained.preprocessing.clip_size, device=device)
        for alpha in (trained.options["alpha"], *(row["alpha"] for row in run.alphas)):
            shared = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
            other = set_alpha(copy.deepcopy(network, shared), alpha)
            calls.setdefault((index, say_alpha(alpha)), torch.inference_mode()(partial(other, clip)))
    taken = time_interleaved([*calls.values()], rounds=rounds, warmup=2, device=device) if calls else []
    seconds: list[dict[str, Sequence[float]]] = [{} for _ in runs]
    for (index, alpha), values in zip(calls, taken, strict=True):
        seconds[index][alpha] = values
    cards = (run.card and replace(run.card, seconds=values) for run, values in zip(runs, seconds, strict=True))
    return [replace(run, card=card) for run, card in zip(runs, cards, strict=True)]


def _series(name: str, curve: Curve, scale: float = 1) -> Series:
    """A curve to draw, the means of its parts if it is long."""
    parts = min(CURVE_POINTS, len(curve.steps))
    x, y = ([float(part.mean()) for part in np.array_split(values, parts)] for values in curve)
    return Series(name, x, [scale * value for value in y])


def curve_charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """Loss, accuracy, learning rate and speed of a training, as far as they were logged."""
    charts = []
    for title, y_axis, names in CURVES:
        percent = "(%)" in y_axis
        series = [_series(name, curves[key], 100 if percent else 1) for key, name in names.items() if key in curves]
        charts += [Chart(title, "optimiser step", y_axis, series, percent)] if series else []
    return charts


class Point(NamedTuple):
    """A network at one alpha: its accuracies over videos, and its cost for one clip."""

    name: str  # the run's, with the kind of batch-norm statistics where there are several
    alpha: str  # as `say_alpha` writes it; "?" without a checkpoint
    videos: int
    top1: Accuracy
    top5: Accuracy
    gmacs: float | None  # None without a checkpoint
    seconds: Sequence[float]  # one number a round; empty if it was not measured
    gigabytes: float | None = None  # read and written; None without a checkpoint
    agreement: float | None = None  # share of the first run's videos with the same class; None for the first run


def agreement(run: Run, other: Run) -> float | None:
    """The share of videos that two tests give the same class; None unless both tested the same videos for one class."""
    one, two = run.predictions, other.predictions
    if run is other or not (isinstance(one, Predictions) and isinstance(two, Predictions)) or one.paths != two.paths:
        return None
    return float((one.order[:, 0] == two.order[:, 0]).mean()) if one.paths else None


def points_of(run: Run, first: Run | None = None) -> list[Point]:
    """A point for each row of a run's alphas.json, and one for its predictions.json unless a row is the same test."""
    points = []
    seconds: Mapping[str, Sequence[float]] = run.card.seconds if run.card else {}
    own = say_alpha(run.card.trained.options["alpha"]) if run.card else "?"
    for row in run.alphas:
        alpha, videos = say_alpha(row["alpha"]), row["videos"]
        top1, top5 = (bootstrap((np.arange(videos) < round(row[key] * videos)) * 1.0) for key in ("top1", "top5"))
        name = f"{run.name}, {row['statistics']} statistics"
        points.append(Point(name, alpha, videos, top1, top5, row["gmacs"], seconds.get(alpha, ())))
    same = (f"{run.name}, checkpoint statistics", own) in (point[:2] for point in points)
    if isinstance(run.predictions, Predictions) and (found := run.predictions.accuracies()) and not same:
        gmacs, videos = run.card.cost.macs / 1e9 if run.card else None, len(run.predictions.paths)
        moved, alike = run.card.cost.bytes_moved / 1e9 if run.card else None, agreement(run, first) if first else None
        tops = found["top1"], found["top5"]
        points.append(Point(run.name, own, videos, *tops, gmacs, seconds.get(own, ()), moved, alike))
    return points


def comparison_charts(runs: Sequence[Run], points: Sequence[Point]) -> list[Chart]:
    """Accuracy over arithmetic, over time, and over the training."""
    arithmetic = [(point.gmacs, point) for point in points if point.gmacs is not None]
    times = [(1000 * statistics.median(point.seconds), point) for point in points if point.seconds]
    charts = []
    for what, x_axis, costs in (("arithmetic", "GMACs of a clip", arithmetic), ("time", "ms of a clip", times)):
        series = []
        for name in dict.fromkeys(point.name for _, point in costs):
            x, members = zip(*sorted((pair for pair in costs if pair[1].name == name), key=itemgetter(0)), strict=True)
            tops = [point.top1 for point in members]
            intervals = [(100 * top.interval[0], 100 * top.interval[1]) for top in tops if top.interval]
            labels = [f"\N{GREEK SMALL LETTER ALPHA} {point.alpha}" for point in members]
            series.append(Series(name, list(x), [100 * top.mean for top in tops], intervals, labels))
        if series:
            charts.append(Chart(f"Accuracy over {what}", x_axis, "video top-1 (%)", series, percent=True))
    lines = [_series(run.name, run.curves["val/top1"], 100) for run in runs if "val/top1" in run.curves]
    validation = Chart("Validation over training", "optimiser step", "top-1 (%)", lines, percent=True)
    return [*charts, validation] if len(lines) > 1 else charts


def class_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """For each class its number, name, videos, accuracy (None without any), and (class, videos) most confused with."""
    rows = []
    for number, (name, row) in enumerate(zip(predictions.names, predictions.confusion(), strict=True)):
        videos = int(row.sum())
        accuracy = wilson(int(row[number]), videos) if videos else None
        row[number] = 0
        confused = (predictions.names[row.argmax()], int(row.max())) if row.any() else None
        rows.append({"number": number, "name": name, "videos": videos, "accuracy": accuracy, "confused": confused})
    return rows


def confused_pairs(predictions: Predictions) -> list[dict[str, Any]]:
    """The pairs (true, predicted) that are confused most often, with videos and their share of the true class."""
    counts, names = predictions.confusion(), predictions.names
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    rows, columns = np.unravel_index(np.argsort(-counts, axis=None, kind="stable")[:20], counts.shape)
    return [
        {"true": names[row], "predicted": names[column], "videos": int(videos), "share": videos / totals[row]}
        for row, column, videos in zip(rows, columns, counts[rows, columns], strict=True)
        if videos
    ]


def say_milliseconds(seconds: Sequence[float]) -> str:
    """The median of measured times and their quartiles, in words."""
    if not seconds:
        return "-"
    low, median, high = (f"{1000 * second:.1f}" for second in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return f"{median} ({low} to {high})"


def render(runs: Sequence[Run], thumbnail: Callable[[str], bytes | str], *, made: str, machine: str) -> str:
    """The page: HTML that refers to nothing outside itself, with everything that the runs name escaped.

    `thumbnail` gives a JPEG of a video's frames, or the reason why there is none; `made` says when and with which
    versions, `machine` where and how the times were measured.
    """
    undefined = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"alpha": say_alpha, "milliseconds": say_milliseconds}
    environment.filters["predicted"] = lambda cost: f"{1000 * MACHINE.seconds(cost, torch.float32):.2f}"
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["sha256"] = lambda text: hashlib.sha256(text.encode()).digest()
    points = [point for run in runs for point in points_of(run, runs[0])]
    compared = len(runs) > 1 or any(run.alphas for run in runs)
    tests = {tuple(sorted(run.predictions.paths)) for run in runs if run.predictions is not None}
    html = environment.from_string(Path(__file__).with_suffix(".html").read_text("utf-8")).render(
        **{"made": made, "machine": machine, "compared": compared, "points": points, "predicted_on": MACHINE.name},
        sections=[_section(run, thumbnail) for run in runs],
        charts=comparison_charts(runs, points) if compared else [],
        same_videos=len(tests) <= 1 and len({point.videos for point in points}) <= 1,
        **{"resamples": RESAMPLES, "curve_points": CURVE_POINTS, "most_bad": 200},
    )
    return html.encode(errors="replace").decode()  # names of files need not be text


def _section(run: Run, thumbnail: Callable[[str], bytes | str]) -> dict[str, Any]:
    tested, multi = run.predictions if run.predictions is not None and run.predictions.paths else None, None
    if isinstance(tested, MultiPredictions):
        tested, multi = None, tested
    thinned = any(len(curve.steps) > CURVE_POINTS for curve in run.curves.values())
    section: dict[str, Any] = {"run": run, "charts": curve_charts(run.curves), "thinned": thinned, "tested": tested}
    section["multi"] = multi
    if tested is None:
        return section
    counts, mistakes = tested.confusion(), tested.mistakes()
    heat = to_svg(draw_heat_map(counts), salt=run.name) if len(counts) > 20 else None  # fewer are a table of numbers
    pictures = [(index, thumbnail(tested.paths[index])) for index in mistakes[:24]]
    section |= {"accuracies": tested.accuracies(), "pairs": confused_pairs(tested), "classes": class_rows(tested)}
    return section | {"wrong": len(mistakes), "confusion": counts, "heat": heat, "pictures": pictures}
