"""Embeddings of videos: what a network's classifier reads, for search, clustering and small classifiers."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from octvideo.data.clips import BadVideo
from octvideo.errors import DecodeError, UserError
from octvideo.evaluation.prediction import Model, Predictor

Per: TypeAlias = Literal["video", "clip", "second"]
POINTWISE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Features(NamedTuple):
    """N embeddings of D numbers; the rows of a video follow each other, in the order of time."""

    paths: list[str]  # (N,) the video of each row
    features: NDArray[np.float32]  # (N, D); (0, 0) without a good video
    seconds: NDArray[np.float64] | None  # (N,) middle of the row's clip or second; None for a row per video
    bad: list[BadVideo]  # videos without a row, and why


class VideoFeatures(NamedTuple):
    """The rows of one video."""

    path: str
    features: NDArray[np.float32]  # (N, D)
    seconds: NDArray[np.float64]  # (N,); for a row per video, its clips' mean


def find_classifier(network: nn.Module, clips: Tensor) -> nn.Module:
    """The last layer to run on (B, 3, T, H, W) that has as many outputs as the network: linear, or a 1x1 convolution.

    UserError if there is none.
    """
    called: list[nn.Module] = []
    candidates = [module for module in network.modules() if _num_outputs(module)]
    hooks = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in candidates]
    try:
        classes = network(clips).shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    found = [module for module in called if _num_outputs(module) == classes]
    if not found:
        kinds = "an nn.Linear or a convolution of size 1"
        raise UserError(f"the network has no classifier to read features of: expected {kinds} with {classes} outputs")
    return found[-1]


def _num_outputs(module: nn.Module) -> int:
    if isinstance(module, POINTWISE):
        return module.out_channels if set(module.kernel_size) == {1} else 0
    return module.out_features if isinstance(module, nn.Linear) else 0


class Extractor:
    """Embeds videos with one network, several together in a batch.

    An embedding is the mean, over space and time, of what the classifier reads. A network that sees each frame by
    itself must fold (B, T) clips and frames into its batch in this order.

    Args:
        predictor: the network, and how it wants its clips.
        per: "video" averages over all of the predictor's views; "clip" over the crops of each clip; "second" embeds a
            clip around each second of the video, whatever the numbers of clips and crops.
        batch: clips that the network sees at a time.

    Raises UserError for another `per`, or a batch below 1.
    """

    def __init__(self, predictor: Predictor, per: Per = "video", batch: int = 10) -> None:
        if per not in ("video", "clip", "second"):
            raise UserError(f"per must be video, clip or second, got {per!r}")
        if batch < 1:
            raise UserError(f"batch must be at least 1, got {batch}")
        self.predictor, self.per, self.batch = predictor, per, batch
        self._classifier: nn.Module | None = None

    def __call__(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[VideoFeatures | BadVideo]:
        """Each video's rows, or why it is bad, as soon as they are known: not in order.

        Raises UserError for a network without a classifier, or features that are not finite.
        """
        waiting: list[tuple[str, NDArray[np.float64], NDArray[np.uint8], bool]] = []  # the last: its video is complete
        done: defaultdict[str, list[NDArray[np.float32]]] = defaultdict(list)
        times: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)

        def embed() -> Iterator[VideoFeatures]:
            rows = self._embed(np.concatenate([clips for _, _, clips, _ in waiting]))
            for path, seconds, clips, complete in waiting:
                own, rows = rows[: len(clips)], rows[len(clips) :]
                done[path].append(own)
                times[path].append(seconds)
                if complete:
                    yield self._averaged(path, np.concatenate(done.pop(path)), np.concatenate(times.pop(path)))
            waiting.clear()

        for path in dict.fromkeys(os.fspath(path) for path in paths):
            try:
                for seconds, clips, complete in self._read(path):
                    waiting.append((path, seconds, clips, complete))
                    if sum(len(clips) for _, _, clips, _ in waiting) >= self.batch:
                        yield from embed()
            except DecodeError as error:
                waiting = [piece for piece in waiting if piece[0] != path]
                done.pop(path, None), times.pop(path, None)
                yield BadVideo(path, error.reason)
        if waiting:
            yield from embed()

    def _read(self, path: str) -> Iterator[tuple[NDArray[np.float64], NDArray[np.uint8], bool]]:
        # Pieces of a video: middles in seconds, clips, and whether that is all.
        if self.per != "second":
            yield *self.predictor.views(path), True
            return
        read = 0
        for edges, clips, _ in self.predictor.windows(path):
            middles = ((edges[:-1] + edges[1:]) / 2)[read : read + len(clips)]
            read += len(clips)
            yield middles, clips, read == len(edges) - 1

    def _averaged(self, path: str, rows: NDArray[np.float32], seconds: NDArray[np.float64]) -> VideoFeatures:
        if self.per == "clip":
            rows = rows.reshape(len(seconds), -1, rows.shape[1]).mean(1)
        elif self.per == "video":
            rows, seconds = rows.mean(0, keepdims=True), seconds.mean(keepdims=True)
        return VideoFeatures(path, rows, seconds)

    def _embed(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, D) for clips (N, C, T, H, W)."""
        read: list[Tensor] = []
        found, logits = [], self.predictor.logits
        with self.predictor.evaluating():
            if self._classifier is None:
                normalized = self.predictor.trained.normalize(torch.from_numpy(clips[:1]).to(self.predictor.device))
                self._classifier = find_classifier(self.predictor.trained.network, normalized)
            hook = self._classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
            try:
                for part in torch.from_numpy(clips).split(self.batch):
                    logits(part)
                    calls = [pooled(x, len(part), isinstance(self._classifier, nn.Linear)) for x in read]
                    found.append(torch.stack(calls).mean(0).cpu())
                    read.clear()
            finally:
                hook.remove()
        features = torch.cat(found)
        if not features.isfinite().all():
            raise UserError("the network's features are not finite: its training diverged")
        return features.numpy()


def pooled(x: Tensor, num_clips: int, channels_end: bool) -> Tensor:
    """Means (num_clips, D) in float32 over space, time and frames, of what a classifier reads.

    Args:
        x: (num_clips or num_clips * frames, ..., D) if `channels_end`, else (num_clips or num_clips * frames, D, ...).
    """
    others = range(1, x.dim() - 1) if channels_end else range(2, x.dim())
    means = x.mean(tuple(others)) if len(others) else x  # Octaves become a Tensor
    return torch.unflatten(means.float(), 0, (num_clips, -1)).mean(1)


def features(
    model_or_ckpt: Model,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    per: Per = "video",
    *,
    batch: int = 10,
    **options: Any,
) -> Features:
    """Embeds videos: what the classifier of a network reads, averaged; see `Extractor` for `per` and `batch`.

    Args:
        model_or_ckpt: as for `Predictor`, whose other arguments are the `options`.
        paths: a video, or several; one that is named twice has its rows twice.

    Bad videos are listed, not raised; what `Predictor` and `Extractor` raise is.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    named = [os.fspath(path) for path in several]
    return collected(named, Extractor(Predictor(model_or_ckpt, **options), per, batch)(named), per)


def collected(paths: Iterable[str], results: Iterable[VideoFeatures | BadVideo], per: Per) -> Features:
    """The results in the order of the paths."""
    known = {result.path: result for result in results}
    found = [known[path] for path in paths]
    good = [result for result in found if isinstance(result, VideoFeatures)]
    rows = np.concatenate([one.features for one in good]) if good else np.zeros((0, 0), np.float32)
    seconds = np.concatenate([one.seconds for one in good]) if good else np.zeros(0)
    named = [one.path for one in good for _ in one.features]
    bad = [result for result in found if isinstance(result, BadVideo)]
    return Features(named, rows, None if per == "video" else seconds, bad)
