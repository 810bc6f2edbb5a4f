"""Inference on videos: class probabilities for the whole video and for every second of it."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from octvideo.data.clips import cut
from octvideo.data.decoding import clips_of
from octvideo.data.preprocessing import Preprocessing
from octvideo.data.reader import Backend
from octvideo.data.sampling import ROUNDING, Sampling, even_crops
from octvideo.data.source import Source
from octvideo.data.video import Video
from octvideo.data.watchdog import Argument, HungError, Result, Watchdog
from octvideo.errors import DecodeError, UserError
from octvideo.evaluation.budget import Budget
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.scoring import score_clips

FRAMES_TOGETHER = 256  # frames of timeline clips held in memory at once
Model: TypeAlias = str | os.PathLike[str] | Trained | nn.Module


class Ranked(NamedTuple):
    """A class, its index and its probability."""

    label: str
    number: int
    probability: float


def ranked(scores: NDArray[np.float32], labels: Sequence[str], k: int) -> list[Ranked]:
    """The k most likely of the classes with these scores; see `Prediction.top`."""
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    order = np.argsort(-scores, kind="stable")[:k]
    return [Ranked(labels[number], int(number), float(scores[number])) for number in order]


class Segment(NamedTuple):
    """A stretch of a video in which a class scores near its peak."""

    start_seconds: float
    end_seconds: float
    label: str
    number: int
    mean_score: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """Scores for every second of a video, each from one clip centred on that second."""

    edges_seconds: NDArray[np.float64]  # (N + 1,) start of each second, then the end of the last, longer or shorter one
    scores: NDArray[np.float32]  # (N, num_classes) probabilities

    @property
    def seconds(self) -> NDArray[np.float64]:
        """(N,) middle of each second."""
        return (self.edges_seconds[:-1] + self.edges_seconds[1:]) / 2

    def second_at(self, seconds: float) -> int:
        """Index of the second that contains a timestamp; outside the video, of the nearest one."""
        return int(np.clip(np.searchsorted(self.edges_seconds, seconds, "right") - 1, 0, len(self.scores) - 1))


@dataclass(frozen=True, eq=False)
class Prediction:
    """The scores of one video."""

    path: str
    scores: NDArray[np.float32]  # (num_classes,) probabilities, averaged over all views after softmax
    labels: Sequence[str]
    timeline: Timeline
    note: str = ""  # what of the video's times no header says, or a wrong one; see `Video`
    alpha: float | None = None  # of the network, if a budget chose it

    def top(self, k: int = 5) -> list[Ranked]:
        """The k most likely classes, or all if there are fewer; most likely first. UserError for k below 1."""
        return ranked(self.scores, self.labels, k)

    def segments(self, most: int = 5) -> list[Segment]:
        """Stretches, which may overlap, in which a class scores at least half of its peak, sorted by start.

        Only classes that are the most likely one in some second count, and of those the `most` with the highest peaks.
        """
        scores, edges, segments = self.timeline.scores, self.timeline.edges_seconds, []
        winners = np.unique(scores.argmax(1))
        for number in winners[np.argsort(-scores[:, winners].max(0), kind="stable")][:most].tolist():
            of_class = scores[:, number]
            inside = (of_class >= 0.5 * of_class.max()).astype(np.int8)
            for start, end in np.flatnonzero(np.diff(inside, prepend=0, append=0)).reshape(-1, 2).tolist():
                mean = float(of_class[start:end].mean())
                segments.append(Segment(float(edges[start]), float(edges[end]), self.labels[number], number, mean))
        return sorted(segments, key=lambda segment: (segment.start_seconds, -segment.mean_score))


class Predictor:
    """Runs one network on many videos, and keeps its decoding process alive between them.

    Args:
        model_or_ckpt: a checkpoint of `octvideo train`, what `load_trained` made of one, or any module that maps
            normalised clips (B, 3, T, H, W) to logits (B, num_classes). Its training mode is kept, but not used here.
        labels: name of each class. Default: the checkpoint's, or "class 0", "class 1" ... for a module.
        preprocessing: fields of `Preprocessing` to change. Default: the checkpoint's; for a module, the defaults there.
        num_clips: evenly spaced clips to average over; a single one is taken from the centre.
        num_crops: crops of each clip, evenly spaced along the longer side.
        device: where the network moves. Default: for a checkpoint cuda if available, else cpu; for others, where it is.
        backend: decoder: pyav, torchcodec, decord, or auto: PyAV, then the others for a file that PyAV cannot read.
        decode_timeout_seconds: time limit for decoding a video's views, or a stretch of its timeline; None: no limit.
        source: where videos are. Default: `AnySource`, for files, folders of frames, URIs, members of tar files.
        budget_ms: milliseconds that the network may take for a clip: its alpha follows from that; see `Budget`.

    Raises FileNotFoundError for a missing checkpoint, UserError for another file or an invalid option.
    """

    def __init__(
        self,
        model_or_ckpt: Model,
        *,
        labels: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        num_clips: int = 10,
        num_crops: int = 3,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        decode_timeout_seconds: float | None = 60,
        source: Source | None = None,
        budget_ms: float | None = None,
    ) -> None:
        for name, count in (("num_clips", num_clips), ("num_crops", num_crops)):
            if count < 1:
                raise UserError(f"{name} must be at least 1, got {count}")
        if decode_timeout_seconds is not None and decode_timeout_seconds <= 0:
            raise UserError(f"decode_timeout_seconds must be positive or None, got {decode_timeout_seconds}")
        if isinstance(model_or_ckpt, nn.Module):
            trained = Trained(model_or_ckpt, {}, [], Preprocessing())
        elif isinstance(model_or_ckpt, Trained):
            trained = model_or_ckpt
        else:
            trained = load_trained(Path(model_or_ckpt))
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        known = Preprocessing.from_mapping(asdict(trained.preprocessing) | dict(preprocessing or {}))
        self.trained = replace(trained, labels=list(labels or trained.labels), preprocessing=known)
        if device is not None:
            trained.network.to(device)
        self.device = torch.device(device or next(trained.network.parameters(), torch.empty(0)).device)
        self.num_clips, self.num_crops, self.backend = num_clips, num_crops, backend
        self._timeout_seconds = decode_timeout_seconds
        self.source = source
        self.budget = None if budget_ms is None else Budget(self.trained, budget_ms)
        if self.budget is not None:
            clip = torch.zeros((1, *known.clip_size), dtype=torch.uint8)
            self.budget.calibrate(lambda: self._scored(clip))
        how = known, backend, source  # not bound methods, which would keep this predictor and its network alive
        self._read_views = self.watched(partial(read_views, *how, num_clips, num_crops))
        self._read_windows = self.watched(partial(_windows, *how))

    def watched(self, read: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
        """The function, called in a process that is killed where it hangs, if there is a time limit."""
        return read if self._timeout_seconds is None else Watchdog(read, self._timeout_seconds)

    def __call__(self, path: str | os.PathLike[str]) -> Prediction:
        """Predicts a video.

        Raises DecodeError if it is missing, not a video or broken, or if its decoder hangs; UserError if the network's
        output is not (B, num_classes), not finite, or does not match the labels.
        """
        path = os.fspath(path)
        views = self.views(path)[1]
        alpha = None if self.budget is None else self.budget.alpha
        scores = self.scores(views).mean(0)
        parts = [(edges, self.scores(clips), note) for edges, clips, note in self.windows(path)]
        edges, _, note = parts[0]
        timeline = torch.cat([part for _, part, _ in parts])
        labels = self.trained.labels or [f"class {number}" for number in range(len(scores))]
        return Prediction(path, scores.numpy(), labels, Timeline(edges, timeline.numpy()), note, alpha)

    def views(self, path: str) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """The middles of a video's clips in seconds (num_clips,), and its views (num_clips * num_crops, C, T, H, W).

        Those of a clip follow each other. Raises DecodeError as `__call__` does.
        """
        with _hanging_is_bad(path):
            return self._read_views(path)

    def windows(self, path: str) -> Iterator[tuple[NDArray[np.float64], NDArray[np.uint8], str]]:
        """Clips (N, C, T, H, W) around a video's seconds in order, some at a time, with all edges and the note.

        See `Timeline` for the edges, and `Video` for the note. Raises DecodeError as `__call__` does.
        """
        edges, read = np.zeros(2), 0
        while read < len(edges) - 1:
            with _hanging_is_bad(path):
                edges, clips, note = self._read_windows((path, read))
            read += len(clips)
            yield edges, clips, note

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients and in evaluation mode, after which each module has the mode that it had."""
        training = [module for module in self.trained.network.modules() if module.training]
        self.trained.network.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True

    def scores(self, clips: NDArray[np.uint8]) -> Tensor:
        """Probabilities (N, num_classes) of uint8 clips (N, C, T, H, W), on the CPU; UserError as `__call__`."""
        start = perf_counter()
        scores = self._scored(torch.from_numpy(clips))
        if self.budget is not None:
            self.budget.spent((perf_counter() - start) / max(1, len(clips)))
        if not scores.isfinite().all():
            raise UserError("the network's scores are not finite: its training diverged")
        return scores

    def _scored(self, clips: Tensor) -> Tensor:
        with self.evaluating():
            return score_clips(self.logits, clips, self.trained.task).cpu()

    def logits(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes) of uint8 clips (B, C, T, H, W); UserError for another shape or number of labels."""
        logits: Tensor = self.trained.network(self.trained.normalize(clips.to(self.device)))
        shape, labels = tuple(logits.shape), len(self.trained.labels)
        if len(shape) != 2 or shape[0] != len(clips):
            raise UserError(f"expected logits (B, num_classes) from the network, got {shape}")
        if labels not in (0, shape[1]):
            raise UserError(f"expected a label for each of the network's {shape[1]} classes, got {labels}")
        return logits


@contextmanager
def _hanging_is_bad(path: str) -> Iterator[None]:
    try:
        yield
    except HungError as error:
        raise DecodeError(path, str(error)) from error


def read_views(
    how: Preprocessing, backend: Backend, source: Source | None, num_clips: int, num_crops: int, path: str
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """What `Predictor.views` returns; DecodeError for what cannot be decoded."""
    with Video(path, backend, source=source) as video:
        numbers = how.sampler.test_clips(video.num_frames, video.fps, num_clips)
        middles = (numbers.min(1) + numbers.max(1) + 1) / (2 * video.fps)
        return middles, read_clips(video, numbers, how.test_crop_size, num_crops)


def _windows(
    how: Preprocessing, backend: Backend, source: Source | None, job: tuple[str, int]
) -> tuple[NDArray[np.float64], NDArray[np.uint8], str]:
    """Edges of a video's seconds, clips (N, C, T, H, W) for some of them, starting at second job[1], and its note."""
    path, start = job
    with Video(path, backend, source=source) as video:
        edges = second_edges(video.duration_seconds)
        middles = ((edges[:-1] + edges[1:]) / 2)[start:][: max(1, FRAMES_TOGETHER // how.clip_frames)]
        return edges, clips_around(video, middles.tolist(), how), video.note


def predict(model_or_ckpt: Model, path: str | os.PathLike[str], **options: Any) -> Prediction:
    """Predicts one video: `Predictor(model_or_ckpt, **options)(path)`. Keep a Predictor for many: it starts faster."""
    return Predictor(model_or_ckpt, **options)(path)


def second_edges(duration_seconds: float) -> NDArray[np.float64]:
    """(N + 1,) start of each second of a video, then its end; see `Timeline`."""
    return np.append(np.arange(max(1, round(duration_seconds)), dtype=np.float64), duration_seconds)


def window_around(sampling: Sampling, num_frames: int, fps: float, seconds: float) -> NDArray[np.int64]:
    """Frame numbers (clip_frames,) of the clip centred on a timestamp, shifted where needed to stay inside the video.

    It is the centre clip of the protocol's window, which is as long as the video at most.
    """
    span = sampling.clip_frames * sampling.frame_stride * (fps / (sampling.target_fps or fps))
    length = min(num_frames, max(1, math.ceil(span - ROUNDING)))
    first = min(max(0, round(seconds * fps - length / 2)), num_frames - length)
    window: NDArray[np.int64] = first + sampling.centre_clip(length, fps)[0]
    return window


def clips_around(video: Video, times_seconds: Sequence[float], how: Preprocessing) -> NDArray[np.uint8]:
    """Centre crops (N, C, T, H, W) of the clips centred on N timestamps."""
    windows = [window_around(how.sampler, video.num_frames, video.fps, seconds) for seconds in times_seconds]
    return read_clips(video, np.stack(windows), how.test_crop_size)


def read_clips(video: Video, frame_numbers: NDArray[np.int64], size: int, num_crops: int = 1) -> NDArray[np.uint8]:
    """Clips (V * num_crops, C, T, size, size) with these frame numbers (V, T), scaled and cropped."""
    clips = clips_of(video, frame_numbers, size)
    height, width = clips[0][0].shape[:2]
    crops = even_crops(height, width, size, num_crops)
    return np.stack([cut(clip, crop, size) for clip in clips for crop in crops])
