"""Multi-view testing: every video's scores, of one network or, from the same clips, of several variants of it."""

import itertools
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from octvideo.data.loading import Batch
from octvideo.models.scoring import average_precisions, score_clips, top_hits


class MultiViewTest(LightningModule):
    """A module whose `test_step` scores all views of videos; `results` is then what predictions.json holds.

    `variants` may name contexts in which the network is another one, such as that of another alpha; each batch is
    decoded once and scored in each of them, and `results_of` has the results of each.
    """

    objective: Any
    results_of: dict[Hashable, dict[str, Any]]
    variants: Mapping[Hashable, Callable[[], AbstractContextManager[None]]] = {"": nullcontext}

    @property
    def results(self) -> dict[str, Any]:
        """The results of the first variant, the same on every rank."""
        return next(iter(self.results_of.values()))

    def view_scores(self, batch: Batch) -> Tensor:
        """Probabilities (B, V, num_classes) of each view of a batch's videos."""
        scores = score_clips(self, batch.clips.flatten(0, 1), self.objective.task)
        return torch.unflatten(scores, 0, batch.clips.shape[:2])

    def on_test_epoch_start(self) -> None:
        # Of each variant: videos, their hits, and bad videos.
        self._tested: dict[Hashable, tuple[list[Any], ...]] = {name: ([], [], []) for name in self.variants}

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Keeps each video's scores, its views averaged after softmax, and whether it and its views were right."""
        for name, entered in self.variants.items():
            videos, hits, bad = self._tested[name]
            bad += [{"path": path, "reason": reason} for path, reason in batch.bad]
            if len(batch.clips) > 0:
                with entered():
                    self._keep(batch, self.view_scores(batch), videos, hits)

    def _keep(self, batch: Batch, views: Tensor, videos: list[Any], hits: list[Any]) -> None:
        scores, labels = views.mean(1), batch.labels
        if self.objective.task == "multi":
            classes = [row.nonzero()[:, 0].tolist() for row in labels > 0.5]
            rows = zip(batch.paths, classes, scores.tolist(), strict=True)
            videos += [{"path": path, "label": label, "scores": values} for path, label, values in rows]
            return
        labels = labels.argmax(1) if labels.dim() > 1 else labels
        clip_hits = [top.mean(1) for top in top_hits(views, labels[:, None])]
        hits += torch.stack((*top_hits(scores, labels), *clip_hits), 1).tolist()
        names = "path", "label", "scores", "clip_top1", "clip_top5"
        columns = batch.paths, *(column.tolist() for column in (labels, scores, *clip_hits))
        videos += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def on_test_epoch_end(self) -> None:
        # Gathers what all ranks tested, in the form of predictions.json.
        parts = [self._tested] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, self._tested)
        self.results_of = {}
        for name in self.variants:
            videos, hits, bad = (list(itertools.chain(*kind)) for kind in zip(*(x[name] for x in parts), strict=True))
            if self.objective.task == "multi":
                results: dict[str, Any] = {"task": "multi"} | average_precisions(videos)
            else:
                accuracies = torch.tensor(hits).mean(0).tolist() if hits else [None] * 4
                results = dict(zip(("top1", "top5", "clip_top1", "clip_top5"), accuracies, strict=True))
            videos, bad = sorted(videos, key=itemgetter("path")), sorted(bad, key=itemgetter("path"))
            self.results_of[name] = results | {"videos": videos, "bad": bad}
