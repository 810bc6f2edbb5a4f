"""The report of tested runs: one HTML file with curves, accuracies, mistakes and cost that loads nothing else."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octvideo.errors import UserError
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.cost import count_macs, count_parameters, time_interleaved
from octvideo.models.weights import read_checkpoint
from octvideo.models.zoo import Alpha, set_alpha

RESAMPLES = 10_000
NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %
MISTAKES = 24  # that are shown, of each run
PAIRS = 20  # of confused classes that are shown
BAD = 200  # videos that are shown
NUMBERED_CLASSES = 20  # with more the confusion matrix is a heat map without numbers
LOGGED = (
    *("train/loss_epoch", "val/loss", "train/loss_step", "train/top1", "val/top1"),
    *("learning_rate", "train/clips_per_second"),
)
CURVE_POINTS = 300  # of a longer curve the means of so many parts are drawn
Floats = NDArray[np.float64]
Thumbnail = Callable[[str], bytes | str]


# Statistics


class Accuracy(NamedTuple):
    """A share of videos or clips in [0, 1], and its 95 % interval, None where that is unknown."""

    mean: float
    interval: tuple[float, float] | None = None


def bootstrap(outcomes: Floats) -> Accuracy:
    """The mean of videos' outcomes, and the quantiles of its value over RESAMPLES resamples of the videos.

    A resample of N videos is a draw of how often each distinct outcome occurs in it, from the multinomial distribution.

    Args:
        outcomes: (N,) in [0, 1] with few distinct values, such as right or wrong; N is at least 1.
    """
    values, counts = np.unique(outcomes, return_counts=True)
    number = len(outcomes)
    drawn = np.random.default_rng(0).multinomial(number, counts / number, RESAMPLES) @ values / number
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Accuracy(float(outcomes.mean()), (low, high))


def wilson(right: int, number: int) -> Accuracy:
    """A share and its 95 % score interval (Wilson, 1927), which has a width even where all of few videos are right.

    Args:
        right: videos that are right.
        number: of all videos, at least 1.
    """
    share, squared = right / number, NORMAL_QUANTILE**2 / number
    middle = share + squared / 2
    half = math.sqrt(squared * (share * (1 - share) + squared / 4))
    return Accuracy(share, ((middle - half) / (1 + squared), (middle + half) / (1 + squared)))


# What a run's folder holds


class Curve(NamedTuple):
    """A figure over a training: (N,) optimiser steps, rising, and (N,) values, all finite."""

    steps: Floats
    values: Floats


class Predictions(NamedTuple):
    """What test_net.py says of N videos and C classes.

    Args:
        paths: N files.
        labels: (N,) class numbers.
        order: (N, C) class numbers, the likeliest first.
        scores: (N, C) probabilities.
        clips: clip_top1 and clip_top5: (N,) shares of each video's clips, or a number where only the average is known.
        bad: (path, reason) of videos that could not be decoded.
        names: of the C classes.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    order: NDArray[np.int64]
    scores: NDArray[np.float32]
    clips: dict[str, Floats | float]
    bad: list[tuple[str, str]]
    names: list[str]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) class numbers."""
        return self.order[:, 0]

    def accuracies(self) -> dict[str, Accuracy]:
        """Of videos and of clips, under the names of predictions.json; nothing if no video was tested."""
        if not self.paths:
            return {}
        places = (self.order == self.labels[:, None]).argmax(1)
        found = {f"top{k}": bootstrap((places < k).astype(np.float64)) for k in (1, 5)}
        for name, value in self.clips.items():
            found[name] = Accuracy(value) if isinstance(value, float) else bootstrap(value)
        return found

    def confusion(self) -> NDArray[np.int64]:
        """(C, C) numbers of videos: rows are their classes, columns what was predicted."""
        classes = len(self.names)
        return np.bincount(self.labels * classes + self.predicted, minlength=classes**2).reshape(classes, classes)

    def mistakes(self) -> list[int]:
        """Numbers of the wrongly predicted videos, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.scores.max(1)[wrong], kind="stable")].tolist()


@dataclass(frozen=True)
class Card:
    """A checkpoint's network, and what it costs.

    Args:
        checkpoint: the file.
        trained: what it holds.
        epoch: finished epochs and, if it was written within one, that one.
        step: optimiser steps.
        lightning: the version that wrote it.
        parameters: how many.
        macs: multiply-adds of one clip.
        seconds: for each alpha, as `say_alpha` writes it, the seconds that one clip took, a number a round.
    """

    checkpoint: Path
    trained: Trained
    epoch: int
    step: int
    lightning: str
    parameters: int
    macs: int
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A training and its test, as far as its folder has them.

    Args:
        name: to call it by.
        predictions: of predictions.json.
        alphas: rows of alphas.json.
        curves: figures over the training, under the names that were logged.
        card: of the checkpoint.
        missing: a sentence for each part that is not there.
    """

    name: str
    predictions: Predictions | None = None
    alphas: Sequence[Mapping[str, Any]] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    card: Card | None = None
    missing: Sequence[str] = ()


def clip_size(trained: Trained) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a test clip."""
    return trained.preprocessing.clip_size


def say_alpha(alpha: Alpha) -> str:
    """An alpha, or four, or that there is one a layer."""
    if isinstance(alpha, Mapping):
        return "per layer"
    return ", ".join(f"{value:g}" for value in (alpha if isinstance(alpha, Sequence) else [alpha]))


def read_run(folder: Path, *, results: Path | None = None, checkpoint: Path | None = None) -> Run:
    """Reads a folder of train_net.py.

    Args:
        folder: the run's, which its name is taken from.
        results: folder of predictions.json and alphas.json; default: the run's own, or test in it.
        checkpoint: the file that was tested; default: last.ckpt, or else best.ckpt, in the folder's checkpoints.

    Raises:
        ValueError: there is nothing in it.
    """
    missing: list[str] = []

    def attempt(path: Path | None, otherwise: str, read: Callable[[Path], Any]) -> Any:
        try:
            if path is not None and (found := read(path)):
                return found
            missing.append(otherwise)
        except (ValueError, KeyError, TypeError, OSError, csv.Error) as error:
            missing.append(f"{path} cannot be read: {type(error).__name__}: {error}")
        return None

    def first(*paths: Path) -> Path | None:
        return next((path for path in paths if path.is_file()), None)

    places = [folder / "test", folder] if results is None else [results]
    checkpoint = checkpoint or first(*(folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")))
    card = attempt(checkpoint, "There is no checkpoint: nothing is said of the network.", _read_card)
    names = None if card is None else card.trained.labels
    predictions = attempt(
        first(*(place / "predictions.json" for place in places)),
        "There is no predictions.json of test_net.py: nothing is said of single videos and classes.",
        lambda path: read_predictions(path, names),
    )
    rows = first(*(place / "alphas.json" for place in places))
    alphas = rows and attempt(rows, f"{rows} has no row with a video.", _read_alphas)
    curves = attempt(folder, "There is no log of the training: no metrics.csv, no file of TensorBoard's.", read_curves)
    if not (card or predictions or alphas or curves):
        raise UserError(f"{folder}: nothing to report on. {' '.join(missing)}")
    return Run(folder.resolve().name, predictions, alphas or (), curves or {}, card, missing)


def read_predictions(path: Path, names: Sequence[str] | None = None) -> Predictions:
    """Reads a predictions.json.

    Args:
        path: the file.
        names: of the classes, where the file has none; default: class 0, class 1 ...

    Raises:
        ValueError: no such thing in it; a KeyError or TypeError where something else is.
    """
    results = json.loads(path.read_text("utf-8"))
    videos = results["videos"]
    scores = np.array([video["scores"] for video in videos], np.float32)
    labels = np.array([video["label"] for video in videos], np.int64)
    if videos and (scores.ndim != 2 or labels.min() < 0 or labels.max() >= scores.shape[1]):
        raise UserError(f"expected a score for each class and labels below their number, got scores {scores.shape}")
    scores = scores if videos else np.zeros((0, len(names or ())), np.float32)
    names = results.get("labels") or names or [f"class {number}" for number in range(scores.shape[1])]
    if videos and len(names) != scores.shape[1]:
        raise UserError(f"{len(names)} class names for {scores.shape[1]} scores")
    clips: dict[str, Floats | float] = {}
    for key in ("clip_top1", "clip_top5"):
        if videos and key in videos[0]:
            clips[key] = np.array([video[key] for video in videos], np.float64)
        elif videos:
            clips[key] = float(results[key])
    order = np.argsort(-scores, axis=1, kind="stable")
    bad = [(video["path"], video["reason"]) for video in results["bad"]]
    return Predictions([video["path"] for video in videos], labels, order, scores, clips, bad, list(names))


def _read_alphas(path: Path) -> list[dict[str, Any]]:
    keys = ("alpha", "gmacs", "statistics", "top1", "top5", "videos")
    rows = [{key: row[key] for key in keys} for row in json.loads(path.read_text("utf-8"))]
    return [row for row in rows if row["videos"]]  # of none there is no accuracy


def _read_card(path: Path) -> Card:
    trained = load_trained(path)
    checkpoint = read_checkpoint(path)
    return Card(
        path,
        trained,
        checkpoint["epoch"] + 1,
        checkpoint["global_step"],
        checkpoint["pytorch-lightning_version"],
        count_parameters(trained.network),
        count_macs(trained.network, clip_size(trained)),
    )


def read_curves(folder: Path) -> dict[str, Curve]:
    """The figures of LOGGED that a run logged, from its metrics.csv or, without one, from TensorBoard's files.

    A run that was gone on with has several of either kind: a later one counts from its first step on.
    """
    tables = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    return _joined(map(_read_csv, tables)) or _joined(map(_read_events, sorted(folder.glob("events.out.tfevents.*"))))


def _read_csv(path: Path) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name and text and row["step"]:
                    found.setdefault(name, []).append((float(row["step"]), float(text)))
    return found


def _read_events(path: Path) -> dict[str, list[tuple[float, float]]]:
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def _joined(parts: Iterable[Mapping[str, Sequence[tuple[float, float]]]]) -> dict[str, Curve]:
    found: dict[str, list[tuple[float, float]]] = {}
    for part in parts:
        logged = {name: points for name, points in part.items() if name in LOGGED}
        first = min((step for points in logged.values() for step, _ in points), default=math.inf)
        found = {name: [point for point in points if point[0] < first] for name, points in found.items()}
        for name, points in logged.items():
            found[name] = found.get(name, []) + sorted(points)
    finite = {name: np.array([p for p in points if math.isfinite(p[1])]) for name, points in found.items()}
    return {name: Curve(*points.T) for name, points in finite.items() if len(points)}


def measure(runs: Sequence[Run], *, rounds: int, device: str = "cpu") -> list[Run]:
    """Times one clip through each run's network, at its own alpha and at those that it was tested at, in turn.

    Args:
        runs: those without a checkpoint stay as they are.
        rounds: how often each is measured; with 0 nothing is.
        device: where.

    Returns:
        The runs with seconds in their cards.
    """
    places: list[tuple[int, str]] = []
    calls: list[Callable[[], Any]] = []
    for number, run in enumerate(runs):
        if run.card is None:
            continue
        trained = run.card.trained
        network = trained.network.to(device)
        clip = torch.rand(1, *clip_size(trained), device=device)
        alphas = {
            say_alpha(alpha): alpha for alpha in (trained.options["alpha"], *(row["alpha"] for row in run.alphas))
        }
        for name, alpha in alphas.items():
            shared = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
            other = set_alpha(copy.deepcopy(network, shared), alpha)
            places.append((number, name))
            calls.append(torch.inference_mode()(lambda network=other, clip=clip: network(clip)))
    seconds = time_interleaved(calls, rounds=rounds, warmup=2, device=device) if rounds and calls else []
    measured: list[dict[str, Sequence[float]]] = [{} for _ in runs]
    for (number, name), taken in zip(places, seconds, strict=False):
        measured[number][name] = taken
    return [
        run if run.card is None else replace(run, card=replace(run.card, seconds=taken))
        for run, taken in zip(runs, measured, strict=True)
    ]


# Charts


class Series(NamedTuple):
    """A line of a chart: N x and y, and of a line with marks also N (low, high) intervals of y and N labels."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]] = ()
    labels: Sequence[str] = ()


class Chart(NamedTuple):
    """What the template draws: pixels of a WIDTH x HEIGHT picture.

    Args:
        title: above it.
        x_axis: what it is, and its unit.
        y_axis: likewise.
        x_ticks: (pixel, text).
        y_ticks: likewise.
        series: (name, points of a line, marks); a mark is (x, y, low end, high end).
        labels: (x, y, anchor, text), those of the marks for which there is room.
        text: for those who do not see it.
    """

    title: str
    x_axis: str
    y_axis: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[tuple[str, str, list[tuple[float, float, float, float]]]]
    labels: list[tuple[float, float, str, str]]
    text: str


WIDTH, HEIGHT = 270, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 258, 10, 158


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers at equal distances, from one that is not above `low` to one not below `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-6):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _short(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def chart(title: str, x_axis: str, y_axis: str, series: Sequence[Series], *, percent: bool = False) -> Chart:
    """Lays out a chart.

    Args:
        title: above it.
        x_axis: what it is, and its unit.
        y_axis: likewise.
        series: at least one, each of at least one point.
        percent: y lies between 0 and 100.
    """
    ys = [*chain(*(one.y for one in series)), *chain(*chain(*(one.intervals for one in series)))]
    xs = list(chain(*(one.x for one in series)))
    x_values, y_values = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    if percent:
        y_values = [value for value in y_values if 0 <= value <= 100]

    def across(value: float) -> float:
        return round(LEFT + (value - x_values[0]) / (x_values[-1] - x_values[0]) * (RIGHT - LEFT), 1)

    def up(value: float) -> float:
        return round(BOTTOM - (value - y_values[0]) / (y_values[-1] - y_values[0]) * (BOTTOM - TOP), 1)

    drawn = []
    texts: list[tuple[float, float, str]] = []
    for one in series:
        places = [(across(x), up(y)) for x, y in zip(one.x, one.y, strict=True)]
        line = " ".join(f"{x:g},{y:g}" for x, y in places)
        ends = [(up(low), up(high)) for low, high in one.intervals]
        drawn.append((one.name, line, [(*place, *end) for place, end in zip(places, ends, strict=False)]))
        texts += [(*place, label) for place, label in zip(places, one.labels, strict=False)]
    said = "; ".join(
        f"{one.name}: {one.y[0]:.3g} at {_short(one.x[0])}, {one.y[-1]:.3g} at {_short(one.x[-1])}, "
        f"between {min(one.y):.3g} and {max(one.y):.3g}"
        for one in series
    )
    x_ticks = [(across(value), _short(value)) for value in x_values]
    y_ticks = [(up(value), _short(value)) for value in y_values]
    labels = _labels(texts)
    return Chart(title, x_axis, y_axis, x_ticks, y_ticks, drawn, labels, f"{y_axis} over {x_axis}. {said}.")


def _labels(texts: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str, str]]:
    """Places texts, (x, y, text), beside their marks and no others', where they cover nothing; leaves out the rest.

    Of like texts at marks that are close to one another the first is enough.
    """
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y, _ in texts]
    placed: list[tuple[float, float, str, str]] = []
    for number, (x, y, text) in enumerate(texts):
        if any(text == other and math.dist((x, y), place) < 14 for *place, other in texts[:number]):
            continue
        width = 5.5 * len(text)
        for right, bottom in ((True, y - 5), (True, y + 14), (False, y - 5), (False, y + 14)):
            left = x + 6 if right else x - 6 - width
            box = (left, bottom - 9, left + width, bottom + 1)
            middle = ((box[0] + box[2]) / 2, bottom - 4)
            nearest = min(texts, key=lambda other: math.dist(other[:2], middle))[2]
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < BOTTOM
            if (
                inside
                and nearest == text
                and not any(
                    box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                    for other in taken
                )
            ):
                taken.append(box)
                placed.append((x + 6, bottom, "start", text) if right else (x - 6, bottom, "end", text))
                break
    return placed


def _line(name: str, curve: Curve, scale: float = 1.0) -> Series:
    """A curve as a series: of a long one, the means of its parts."""
    parts = min(CURVE_POINTS, len(curve.steps))
    x, y = ([float(part.mean()) for part in np.array_split(values, parts)] for values in curve)
    return Series(name, x, [scale * value for value in y])


def curve_charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """Loss, accuracy, learning rate and speed of a training, as far as they were logged."""
    losses = {"train/loss_epoch": "training", "val/loss": "validation", "train/loss_step": "training, single steps"}
    wanted: list[tuple[str, str, dict[str, str]]] = [
        ("Loss", "cross-entropy (nats)", losses),
        ("Top-1 accuracy", "top-1 (%)", {"train/top1": "training", "val/top1": "validation"}),
        ("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
        ("Speed", "clips per second", {"train/clips_per_second": "training"}),
    ]
    charts = []
    for title, y_axis, names in wanted:
        share = "(%)" in y_axis
        series = [_line(name, curves[key], 100 if share else 1) for key, name in names.items() if key in curves]
        if series:
            charts.append(chart(title, "optimiser step", y_axis, series, percent=share))
    return charts


# Comparison


class Point(NamedTuple):
    """A network at one alpha: how well it does, and what that costs.

    Args:
        name: of the run and, where that has several kinds, of its batch-norm statistics.
        alpha: as `say_alpha` writes it; "?" without a checkpoint.
        videos: how many it was tested on.
        top1: of videos.
        top5: of videos.
        gmacs: of one clip; None without a checkpoint.
        seconds: that one clip took, a number a round; empty if it was not measured.
    """

    name: str
    alpha: str
    videos: int
    top1: Accuracy
    top5: Accuracy
    gmacs: float | None
    seconds: Sequence[float]


def points_of(run: Run) -> list[Point]:
    """A point for each row of a run's alphas.json, and one for its predictions.json unless a row is the same test."""
    points = []
    seconds: Mapping[str, Sequence[float]] = {} if run.card is None else run.card.seconds
    own = "?" if run.card is None else say_alpha(run.card.trained.options["alpha"])
    for row in run.alphas:
        alpha, videos = say_alpha(row["alpha"]), row["videos"]
        top1, top5 = (bootstrap((np.arange(videos) < round(row[key] * videos)) * 1.0) for key in ("top1", "top5"))
        name = f"{run.name}, {row['statistics']} statistics"
        points.append(Point(name, alpha, videos, top1, top5, row["gmacs"], seconds.get(alpha, ())))
    same = any((say_alpha(row["alpha"]), row["statistics"]) == (own, "checkpoint") for row in run.alphas)
    if run.predictions is not None and (found := run.predictions.accuracies()) and not same:
        gmacs = None if run.card is None else run.card.macs / 1e9
        videos = len(run.predictions.paths)
        points.append(Point(run.name, own, videos, found["top1"], found["top5"], gmacs, seconds.get(own, ())))
    return points


def comparison_charts(runs: Sequence[Run], points: Sequence[Point]) -> list[Chart]:
    """Accuracy over arithmetic, over time, and over the training."""
    charts = []
    arithmetic = [(point.gmacs, point) for point in points if point.gmacs is not None]
    times = [(1000 * statistics.median(point.seconds), point) for point in points if point.seconds]
    for title, x_axis, costs in (
        ("Accuracy over arithmetic", "GMACs of a clip", arithmetic),
        ("Accuracy over time", "ms of a clip", times),
    ):
        series = []
        for name in dict.fromkeys(point.name for _, point in costs):
            members = sorted((pair for pair in costs if pair[1].name == name), key=lambda pair: pair[0])
            tops = [point.top1 for _, point in members]
            intervals = [(100 * low, 100 * high) for top in tops if top.interval for low, high in [top.interval]]
            labels = [f"\N{GREEK SMALL LETTER ALPHA} {point.alpha}" for _, point in members]
            series.append(Series(name, [x for x, _ in members], [100 * top.mean for top in tops], intervals, labels))
        if series:
            charts.append(chart(title, x_axis, "video top-1 (%)", series, percent=True))
    lines = [_line(run.name, run.curves["val/top1"], 100) for run in runs if "val/top1" in run.curves]
    if len(lines) > 1:
        charts.append(chart("Validation over training", "optimiser step", "top-1 (%)", lines, percent=True))
    return charts


# The page


def class_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """For each class its number, name, videos, accuracy (None without any), and (class, videos) most confused with."""
    counts = predictions.confusion()
    rows = []
    for number, (name, row) in enumerate(zip(predictions.names, counts, strict=True)):
        others = row.copy()
        others[number] = 0
        worst = int(others.argmax())
        accuracy = wilson(int(row[number]), int(row.sum())) if row.any() else None
        confused = (predictions.names[worst], int(others[worst])) if others.any() else None
        rows.append(
            {"number": number, "name": name, "videos": int(row.sum()), "accuracy": accuracy, "confused": confused}
        )
    return rows


def confused_pairs(predictions: Predictions) -> list[dict[str, Any]]:
    """The pairs (true, predicted) that are confused most often, with videos and their share of the true class."""
    counts = predictions.confusion()
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:PAIRS]
    return [
        {
            "true": predictions.names[row],
            "predicted": predictions.names[column],
            "videos": int(counts[row, column]),
            "share": counts[row, column] / totals[row],
        }
        for row, column in (divmod(int(place), len(counts)) for place in order)
        if counts[row, column]
    ]


def heat_map(counts: NDArray[np.int64]) -> list[tuple[bool, float, str]]:
    """Paths of a heat map whose cells are 1 x 1: (right or wrong, opacity, path) of the cells of like share in rows."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    levels = np.ceil(shares * 6).astype(int)
    size = max(1.0, len(counts) / 180)  # or the cells of many classes would be finer than a pixel
    paths = []
    for right in (False, True):
        for level in range(1, 7):
            rows, columns = np.nonzero((levels == level) & (np.eye(len(counts), dtype=bool) == right))
            cells = "".join(f"M{x:g} {y:g}h{size:g}v{size:g}h-{size:g}z" for y, x in zip(rows, columns, strict=True))
            if cells:
                paths.append((right, 0.4 + 0.1 * level, cells))
    return paths


def mistakes(predictions: Predictions, thumbnail: Thumbnail) -> list[dict[str, Any]]:
    """The most confident mistakes, with a picture as a data URI or the reason why there is none."""
    found = []
    for place in predictions.mistakes()[:MISTAKES]:
        label, predicted, path = predictions.labels[place], predictions.predicted[place], predictions.paths[place]
        picture = thumbnail(path)
        uri = picture if isinstance(picture, str) else f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        found.append(
            {
                "path": path,
                "true": predictions.names[label],
                "predicted": predictions.names[predicted],
                "true_score": predictions.scores[place, label],
                "score": predictions.scores[place, predicted],
                "picture": uri,
                "shown": isinstance(picture, bytes),
            }
        )
    return found


def say_share(share: float, digits: int = 1) -> str:
    """A share in words."""
    return f"{100 * share:.{digits}f} %"


def say_interval(accuracy: Accuracy) -> str:
    """An accuracy's interval in words."""
    if accuracy.interval is None:
        return "no interval"
    low, high = accuracy.interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def say_milliseconds(seconds: Sequence[float]) -> str:
    """The median of measured times and their quartiles, in words."""
    if not seconds:
        return "-"
    low, median, high = (f"{1000 * second:.1f}" for second in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return f"{median} ({low} to {high})"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def render(runs: Sequence[Run], thumbnail: Thumbnail, *, made: str, machine: str) -> str:
    """The page.

    Args:
        runs: one or several.
        thumbnail: gives a JPEG of a video file's frames, or the reason why there is none.
        made: when, and with which versions.
        machine: that measured the times, and how.

    Returns:
        HTML that refers to nothing outside itself; whatever the runs name is escaped in it.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        alpha=say_alpha, share=say_share, interval=say_interval, milliseconds=say_milliseconds, sha256=_sha256
    )
    points = [point for run in runs for point in points_of(run)]
    compared = len(runs) > 1 or any(run.alphas for run in runs)
    tests = {tuple(sorted(run.predictions.paths)) for run in runs if run.predictions is not None}
    html = environment.from_string(Path(__file__).with_suffix(".html").read_text("utf-8")).render(
        sections=[_section(run, thumbnail) for run in runs],
        made=made,
        machine=machine,
        compared=compared,
        points=points,
        charts=comparison_charts(runs, points) if compared else [],
        same_videos=len(tests) <= 1 and len({point.videos for point in points}) <= 1,
        resamples=RESAMPLES,
        curve_points=CURVE_POINTS,
        most_bad=BAD,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )
    return html.encode(errors="replace").decode()  # names of files need not be text


def _section(run: Run, thumbnail: Thumbnail) -> dict[str, Any]:
    """What the template says of one run."""
    section: dict[str, Any] = {
        "run": run,
        "charts": curve_charts(run.curves),
        "thinned": any(len(curve.steps) > CURVE_POINTS for curve in run.curves.values()),
        "bad": () if run.predictions is None else run.predictions.bad,
        "clip_size": run.card and clip_size(run.card.trained),
        "tested": None,
    }
    if run.predictions is None or not run.predictions.paths:
        return section
    counts = run.predictions.confusion()
    return section | {
        "tested": run.predictions,
        "accuracies": run.predictions.accuracies(),
        "wrong": len(run.predictions.mistakes()),
        "confusion": counts,
        "heat": None if len(counts) <= NUMBERED_CLASSES else heat_map(counts),
        "class_ticks": [tick for tick in ticks(0, len(counts)) if tick < len(counts)],
        "pairs": confused_pairs(run.predictions),
        "classes": class_rows(run.predictions),
        "mistakes": mistakes(run.predictions, thumbnail),
    }
