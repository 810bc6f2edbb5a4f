"""What a network sees in a video: the scores of its classes, over all of it and second by second."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from octvideo.data.clips import Decoding, Draw, TestViews, clips_of, cut
from octvideo.data.lists import VideoList
from octvideo.data.reader import Backend
from octvideo.data.sampling import ROUNDING, Sampling, even_crops
from octvideo.data.watchdog import HungError
from octvideo.errors import DecodeError, UserError
from octvideo.models.checkpoint import Trained, load_trained

CLIPS_PER_PASS = 10  # of the network: enough to fill a GPU
FRAMES_TOGETHER = 256  # of a timeline's clips, in memory at once
PEAK_SHARE = 0.5  # of a class's highest score, which lasts for a segment
# How clips are made for a network that does not say: the SlowFast project's tests on Kinetics.
PREPROCESSING: dict[str, Any] = {
    "clip_frames": 8,
    "frame_stride": 8,
    "sampling": "slowfast",
    "target_fps": 30,
    "short_videos": None,
    "test_crop_size": 256,
    "mean": 0.45,
    "std": 0.225,
}
OF_TRAINING = {"crop_size", "short_side", "mirror"}  # which checkpoints have besides


class Ranked(NamedTuple):
    """A class, its name and its probability."""

    label: str
    number: int
    probability: float


class Segment(NamedTuple):
    """A stretch of a video in which a class is at its peak.

    Args:
        start_seconds: where it starts.
        end_seconds: where it ends.
        label: name of the class.
        number: of the class.
        mean_score: of the class, over the stretch.
    """

    start_seconds: float
    end_seconds: float
    label: str
    number: int
    mean_score: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """Scores of a video second by second, each those of one clip around the middle of the second.

    Args:
        edges_seconds: (N + 1,) where the N seconds start, and the end of the video: the last one is longer or shorter,
            by up to half a second, or more in a video of less than half a second.
        scores: (N, num_classes) float32 probabilities.
    """

    edges_seconds: NDArray[np.float64]
    scores: NDArray[np.float32]

    @property
    def seconds(self) -> NDArray[np.float64]:
        """(N,) middles of the seconds."""
        return (self.edges_seconds[:-1] + self.edges_seconds[1:]) / 2

    def second_at(self, seconds: float) -> int:
        """Number of the second that a moment lies in; outside of the video the nearest one."""
        place = int(np.searchsorted(self.edges_seconds, seconds, "right")) - 1
        return min(max(place, 0), len(self.scores) - 1)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network sees in a video.

    Args:
        path: the file.
        scores: (num_classes,) float32 probabilities: the average over all views, after softmax.
        labels: name of each class.
        timeline: scores second by second.
    """

    path: str
    scores: NDArray[np.float32]
    labels: Sequence[str]
    timeline: Timeline

    def top(self, k: int = 5) -> list[Ranked]:
        """The k most likely classes, or all if there are fewer, the most likely one first.

        Raises:
            ValueError: k below 1.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        order = np.argsort(-self.scores, kind="stable")[:k]
        return [Ranked(self.labels[number], int(number), float(self.scores[number])) for number in order]

    def segments(self, most: int = 5) -> list[Segment]:
        """Where classes are at their peak, in order of time.

        Of every class that is the most likely one in some second, these are the stretches in which its score is at
        least half of its highest. Stretches of different classes may overlap.

        Args:
            most: classes to give, those with the highest peaks.
        """
        scores, edges = self.timeline.scores, self.timeline.edges_seconds
        winners = np.unique(scores.argmax(1))
        segments = []
        for number in winners[np.argsort(-scores[:, winners].max(0), kind="stable")][:most].tolist():
            of_class = scores[:, number]
            inside = of_class >= PEAK_SHARE * of_class.max()
            bounds = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0, append=0))
            for start, end in bounds.reshape(-1, 2).tolist():
                mean = float(of_class[start:end].mean())
                segments.append(Segment(float(edges[start]), float(edges[end]), self.labels[number], number, mean))
        return sorted(segments, key=lambda segment: (segment.start_seconds, -segment.mean_score))


class Predictor:
    """Predicts videos with one network, whose decoding process serves them all; `predict` is for a single one.

    Args:
        model_or_ckpt: a checkpoint of train_net.py; what `load_trained` made of one; or any module that takes
            (B, 3, T, H, W), normalised, and gives logits (B, num_classes). A module in training mode is in evaluation
            mode while it predicts.
        labels: name of each class. Default: the checkpoint's; of a module "class 0", "class 1" ...
        preprocessing: how clips are made, in part or whole: clip_frames, frame_stride, sampling, target_fps,
            short_videos, test_crop_size, as `octvideo.data.module.VideoData` has them, and mean and std, each a number
            or one of each colour. Default: the checkpoint's; of a module PREPROCESSING, which is 8 frames out of 64 at
            30 a second, 256 x 256 pixels.
        num_clips: moments of a video that its score is the average of, spread evenly; one is the centre.
        num_crops: crops a moment, spread evenly along the longer side.
        device: what to run on; the network moves there. Default: for a checkpoint cuda, if there is one, else cpu; for
            a network where it is.
        backend: what decodes: pyav, torchcodec, decord, or auto: PyAV, and another one where that gives no frame.
        decode_timeout_seconds: a video whose decoding takes longer, for all views or for a stretch of the timeline, is
            bad; None waits forever.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: another file than a checkpoint, an unknown key of preprocessing, or a number out of its range.
    """

    def __init__(
        self,
        model_or_ckpt: str | os.PathLike[str] | Trained | nn.Module,
        *,
        labels: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        num_clips: int = 10,
        num_crops: int = 3,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        decode_timeout_seconds: float | None = 60,
    ) -> None:
        for name, count in (("num_clips", num_clips), ("num_crops", num_crops)):
            if count < 1:
                raise UserError(f"{name} must be at least 1, got {count}")
        if decode_timeout_seconds is not None and decode_timeout_seconds <= 0:
            raise UserError(f"decode_timeout_seconds must be positive or None, got {decode_timeout_seconds}")
        if unknown := set(preprocessing or ()) - PREPROCESSING.keys() - OF_TRAINING:
            raise UserError(f"preprocessing must be of {', '.join(PREPROCESSING)}, got {', '.join(sorted(unknown))}")
        if isinstance(model_or_ckpt, nn.Module):
            trained = Trained(model_or_ckpt, {}, [], {})
        elif isinstance(model_or_ckpt, Trained):
            trained = model_or_ckpt
        else:
            trained = load_trained(Path(model_or_ckpt))
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device is not None:
            trained.network.to(device)
        known = next(trained.network.parameters(), torch.empty(0)).device
        self.device = known if device is None else torch.device(device)
        options = PREPROCESSING | trained.preprocessing | dict(preprocessing or {})
        for name in ("mean", "std"):
            options[name] = torch.as_tensor(options[name], dtype=torch.float32, device=self.device).view(-1, 1, 1, 1)
        self.trained = replace(trained, labels=list(labels or trained.labels), preprocessing=options)
        names = ("clip_frames", "frame_stride", "sampling", "target_fps", "short_videos")
        sampling = Sampling(*(options[name] for name in names))
        self.decoding = Decoding(_only(""), sampling, backend, decode_timeout_seconds)
        reading = _Reading(
            self.decoding._replace(timeout_seconds=None), options["test_crop_size"], num_clips, num_crops
        )
        self._read_views = self.decoding.watched(reading.views)
        self._read_windows = self.decoding.watched(reading.windows)

    def __call__(self, path: str | os.PathLike[str]) -> Prediction:
        """Predicts a video.

        Raises:
            DecodeError: it is missing, no video, broken, or its decoder hangs.
            ValueError: the network gives another number of scores than there are labels, something else than
                (B, num_classes), or what is no number.
        """
        path = os.fspath(path)
        try:
            scores = self._scores(self._read_views(path)).mean(0)
            edges, clips = self._read_windows((path, 0))
            timeline = [self._scores(clips)]
            while (done := sum(map(len, timeline))) < len(edges) - 1:
                timeline.append(self._scores(self._read_windows((path, done))[1]))
        except HungError as error:
            raise DecodeError(path, str(error)) from error
        labels = self.trained.labels or [f"class {number}" for number in range(len(scores))]
        return Prediction(path, scores.numpy(), labels, Timeline(edges, torch.cat(timeline).numpy()))

    @torch.inference_mode()
    def _scores(self, clips: NDArray[np.uint8]) -> Tensor:
        """Probabilities (N, num_classes) of clips (N, C, T, H, W), on the CPU."""
        network, logits = self.trained.network, []
        with _evaluating(network):
            for part in torch.from_numpy(clips).split(CLIPS_PER_PASS):
                logits.append(network(self.trained.normalize(part.to(self.device))).float())
        shape, wanted = tuple(logits[0].shape), len(self.trained.labels)
        if len(shape) != 2 or shape[0] != min(len(clips), CLIPS_PER_PASS):
            raise UserError(f"expected logits (B, num_classes) of the network, got {shape}")
        if wanted not in (0, shape[1]):
            raise UserError(f"expected a label for each of the network's {shape[1]} classes, got {wanted}")
        scores = torch.cat(logits).softmax(1).cpu()
        if not scores.isfinite().all():
            raise UserError("the network gives scores that are no numbers: its training diverged")
        return scores


def predict(
    model_or_ckpt: str | os.PathLike[str] | Trained | nn.Module,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    num_clips: int = 10,
    num_crops: int = 3,
    device: str | torch.device | None = None,
    backend: Backend = "auto",
    decode_timeout_seconds: float | None = 60,
) -> Prediction:
    """Predicts one video: `predict("last.ckpt", "video.mp4").top(5)`; arguments and errors are those of `Predictor`.

    The scores are those of tools/test_net.py: the average, after softmax, of 10 moments x 3 crops.
    """
    predictor = Predictor(
        model_or_ckpt,
        labels=labels,
        preprocessing=preprocessing,
        num_clips=num_clips,
        num_crops=num_crops,
        device=device,
        backend=backend,
        decode_timeout_seconds=decode_timeout_seconds,
    )
    return predictor(path)


def second_edges(duration_seconds: float) -> NDArray[np.float64]:
    """(N + 1,) where the seconds of a video start, and its end; see `Timeline`."""
    return np.append(np.arange(max(1, round(duration_seconds)), dtype=np.float64), duration_seconds)


def window_around(sampling: Sampling, num_frames: int, fps: float, seconds: float) -> NDArray[np.int64]:
    """The clip whose window lies around a moment, or nearest to it within the video.

    It is the centre clip of a video that is as long as the protocol's window (clip_frames * frame_stride, in frames of
    target_fps if there is one), and of the whole video if that is shorter.

    Args:
        sampling: the protocol.
        num_frames: frames of the video.
        fps: frames per second of the video.
        seconds: the moment.

    Returns:
        (clip_frames,) frame numbers from 0 to num_frames - 1.
    """
    span = sampling.clip_frames * sampling.frame_stride * (fps / (sampling.target_fps or fps))
    length = min(num_frames, max(1, math.ceil(span - ROUNDING)))
    first = min(max(0, round(seconds * fps - length / 2)), num_frames - length)
    return first + sampling.centre_clip(length, fps)[0]


class _Reading(NamedTuple):
    """What reads clips of a video, in a process where it may hang.

    Args:
        decoding: how videos become frames; its list does not matter.
        crop_size: height and width of a clip, in pixels.
        num_clips: moments of the video.
        num_crops: crops a moment.
    """

    decoding: Decoding
    crop_size: int
    num_clips: int
    num_crops: int

    def views(self, path: str) -> NDArray[np.uint8]:
        """The views (num_clips * num_crops, C, T, H, W) that tests average."""
        views = TestViews(
            self.decoding._replace(videos=_only(path)),
            crop_size=self.crop_size,
            short_side=self.crop_size,
            num_clips=self.num_clips,
            num_crops=self.num_crops,
        )
        sample = views[Draw(0, 0, 0)]
        if sample.clips is None:
            raise DecodeError(*sample.bad[0])
        return sample.clips.numpy()  # type: ignore[no-any-return]

    def windows(self, job: tuple[str, int]) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """The edges of a video's seconds, and clips (N, C, T, H, W) of some, from the second that the job names on."""
        path, start = job
        sampling, size = self.decoding.sampling, self.crop_size
        with self.decoding._replace(videos=_only(path)).open(0) as video:
            edges = second_edges(video.duration_seconds)
            end = start + max(1, FRAMES_TOGETHER // sampling.clip_frames)
            middles = ((edges[:-1] + edges[1:]) / 2)[start:end]
            windows = [window_around(sampling, video.num_frames, video.fps, moment) for moment in middles]
            clips = clips_of(video, np.stack(windows), size)
        height, width = clips[0][0].shape[:2]
        crop = even_crops(height, width, size, 1)[0]
        return edges, np.stack([cut(clip, crop, size) for clip in clips])


def _only(path: str) -> VideoList:
    return VideoList([path], np.zeros(1, np.int64))


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, and its parts as they were afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
