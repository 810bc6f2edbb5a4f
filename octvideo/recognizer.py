"""The Lightning module: loss, optimiser, schedule, validation and multi-view testing of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from octvideo.models import create_model

CLIPS_PER_PASS = 10  # of one forward pass in testing: enough to fill a GPU


class Batch(Protocol):
    """What a data set has to give: clips of videos.

    Attributes:
        clips: (B, V, C, T, H, W) uint8, V clips of each of B videos; B may be 0.
        labels: (B,) class numbers; in training also (B, num_classes) shares of the classes.
        paths: B files.
        bad: (path, reason) of videos that could not be decoded.
    """

    clips: Tensor
    labels: Tensor
    paths: list[str]
    bad: Sequence[tuple[str, str]]


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, warmup_start: float) -> float:
    """Half a cosine from `peak` to 0, reached through a linear warm-up (the SlowFast project's schedule).

    The cosine runs over all steps; the warm-up leads in a line from `warmup_start` to where the cosine is at its end.

    Args:
        step: optimiser steps so far.
        total_steps: steps in all.
        warmup_steps: steps of the warm-up.
        peak: the cosine's value at step 0.
        warmup_start: learning rate at step 0 if there is a warm-up.
    """

    def cosine(step: int) -> float:
        return peak * 0.5 * (1 + math.cos(math.pi * step / total_steps))

    if step < warmup_steps:
        return warmup_start + (cosine(warmup_steps) - warmup_start) * step / warmup_steps
    return cosine(step)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for convolution and linear weights only: none for biases and normalisation layers."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Recognizer(LightningModule):
    """A network that recognises actions in videos, with the recipe that trains and tests it.

    The defaults are the SlowFast project's recipe from scratch for a total batch of 64 clips; scale the learning rates
    with the batch size.

    Args:
        name: network: c2d_r50, i3d_r50, slow_r50, slowfast_r50, c2d_r50_nonlocal, i3d_r50_nonlocal, csn_r101,
            r2plus1d_r50, x3d_xs, x3d_s, x3d_m or x3d_l.
        alpha: share of octave channels at low resolution in res2 to res4, in [0, 1]; or four, for res2 to res5.
        num_classes: number of classes.
        width: channels of the network's stem; default: as published, 24 for X3D and 64 for the others.
        depth: 50, 101 or 152 layers; default: as the name says. R(2+1)D and X3D have no other.
        dropout: probability before the classifier.
        frame_ratio: SlowFast only: frames of the fast pathway for each one of the slow pathway.
        channel_ratio: SlowFast only: channels of the slow pathway for each one of the fast pathway.
        downsample: "pool" makes res2 to res5 average-pool for a spatial stride at alpha 0 too, as octave networks do:
            the fair control for them; "conv" strides there as published.
        round_to: rounds the numbers of low channels to a multiple; 16 is faster at alphas such as .1, but changes how
            much is low.
        weights: checkpoint to start from: ours, pytorchvideo's, PySlowFast's, or a 2-D ImageNet ResNet's, which is
            inflated. A classifier of another number of classes starts fresh.
        learning_rate: peak of the half-cosine schedule.
        warmup_start: learning rate at the start of the warm-up.
        warmup_epochs: length of the warm-up; may be a fraction.
        momentum: of SGD with Nesterov's correction.
        weight_decay: of convolution and classifier weights; biases and batch norms have none.
        mean: subtracted from pixels in [0, 1].
        std: then divides them.

    Raises:
        ValueError: an unknown network, a number out of its range, or weights that do not fit.
    """

    def __init__(
        self,
        name: str = "i3d_r50",
        alpha: float | list[float] = 0.1,
        num_classes: int = 400,
        *,
        width: int | None = None,
        depth: int | None = None,
        dropout: float = 0.5,
        frame_ratio: int = 4,
        channel_ratio: int = 8,
        downsample: Literal["conv", "pool"] = "conv",
        round_to: int = 1,
        weights: str | None = None,
        learning_rate: float = 0.1,
        warmup_start: float = 0.01,
        warmup_epochs: float = 34,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        mean: float = 0.45,
        std: float = 0.225,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or warmup_start < 0 or warmup_epochs < 0 or weight_decay < 0:
            raise ValueError(
                f"model.learning_rate must be positive, warmup_start, warmup_epochs and weight_decay at least 0, got "
                f"{learning_rate}, {warmup_start}, {warmup_epochs} and {weight_decay}"
            )
        if not 0 < momentum < 1 or std <= 0:
            raise ValueError(f"model.momentum must lie between 0 and 1 and std be positive, got {momentum} and {std}")
        self.save_hyperparameters(ignore="weights")  # a checkpoint has its own, and opens without that file
        self.network = create_model(
            name,
            alpha=alpha,
            num_classes=num_classes,
            width=width,
            depth=depth,
            dropout=dropout,
            frame_ratio=frame_ratio,
            channel_ratio=channel_ratio,
            downsample=downsample,
            channels_last=True,  # faster at every alpha
            round_to=round_to,
            weights=weights,
        )
        self.num_classes = num_classes
        self.learning_rate = learning_rate
        self.warmup_start = warmup_start
        self.warmup_epochs = warmup_epochs
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.mean = mean
        self.std = std

        top5 = min(5, num_classes)
        self.train_top1 = self._accuracy(1)
        self.val_loss = MeanMetric()
        self.val_top1, self.val_top5 = self._accuracy(1), self._accuracy(top5)
        self.clip_top1, self.clip_top5 = self._accuracy(1), self._accuracy(top5)
        self.video_top1, self.video_top5 = self._accuracy(1), self._accuracy(top5)
        self._predictions: list[dict[str, Any]] = []
        self._bad: list[dict[str, str]] = []
        self.results: dict[str, Any] = {}

    def _accuracy(self, top_k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(self.num_classes, top_k=top_k, average="micro")

    def forward(self, clips: Tensor) -> Tensor:
        """Logits of clips.

        Args:
            clips: (B, C, T, H, W) uint8 RGB; normalised here, on the device.

        Returns:
            (B, num_classes).
        """
        x = (clips.to(torch.float32) / 255 - self.mean) / self.std
        return self.network(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy of one batch; of mixed clips, accuracy counts the class of the larger share."""
        videos, views = batch.clips.shape[:2]
        logits = self(batch.clips.flatten(0, 1)).float()
        labels = batch.labels.repeat_interleave(views, 0)
        loss = F.cross_entropy(logits, labels)
        self.train_top1(logits, labels.argmax(1) if labels.dim() > 1 else labels)
        self.log("train/loss", loss, on_epoch=True, prog_bar=True, batch_size=videos)
        self.log("train/top1", self.train_top1, on_step=False, on_epoch=True, prog_bar=True, batch_size=videos)
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracies of videos, their views averaged after softmax."""
        if len(batch.clips) > 0:
            scores = self._view_scores(batch).mean(1)
            self.val_loss.update(F.nll_loss(scores.clamp_min(1e-12).log(), batch.labels), len(scores))
            self.val_top1.update(scores, batch.labels)
            self.val_top5.update(scores, batch.labels)
        self.log("val/loss", self.val_loss, on_epoch=True, prog_bar=True, batch_size=1)
        self.log("val/top1", self.val_top1, on_epoch=True, prog_bar=True, batch_size=1)
        self.log("val/top5", self.val_top5, on_epoch=True, batch_size=1)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Scores of every view and of every video, the views averaged after softmax."""
        self._bad += [{"path": path, "reason": reason} for path, reason in batch.bad]
        if len(batch.clips) == 0:
            return
        views = self._view_scores(batch)
        videos = views.mean(1)
        labels = batch.labels.repeat_interleave(views.shape[1])
        self.clip_top1.update(views.flatten(0, 1), labels)
        self.clip_top5.update(views.flatten(0, 1), labels)
        self.video_top1.update(videos, batch.labels)
        self.video_top5.update(videos, batch.labels)
        for path, label, scores in zip(batch.paths, batch.labels.tolist(), videos.tolist(), strict=True):
            self._predictions.append({"path": path, "label": label, "scores": scores})

    def _view_scores(self, batch: Batch) -> Tensor:
        """Probabilities (B, V, num_classes) of every clip."""
        clips = batch.clips.flatten(0, 1)
        logits = torch.cat([self(part).float() for part in clips.split(CLIPS_PER_PASS)])
        return logits.softmax(1).unflatten(0, batch.clips.shape[:2])

    def on_test_epoch_start(self) -> None:
        """Forgets an earlier test."""
        self._predictions, self._bad = [], []

    def on_test_epoch_end(self) -> None:
        """Joins what all processes tested into `results`, in the form of predictions.json."""
        parts: list[Any] = [None] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, (self._predictions, self._bad))
        else:
            parts = [(self._predictions, self._bad)]
        videos = sorted((video for part, _ in parts for video in part), key=lambda video: video["path"])
        bad = sorted((video for _, part in parts for video in part), key=lambda video: video["path"])
        accuracies: dict[str, float | None] = {}
        for key, metric in {
            "top1": self.video_top1,
            "top5": self.video_top5,
            "clip_top1": self.clip_top1,
            "clip_top5": self.clip_top5,
        }.items():
            accuracies[key] = metric.compute().item() if videos else None  # of nothing there is no accuracy
            metric.reset()
        self.results = {**accuracies, "videos": videos, "bad": bad}
        self._predictions, self._bad = [], []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD with Nesterov momentum, and the schedule stepped after every optimiser step."""
        optimizer = torch.optim.SGD(
            parameter_groups(self.network, self.weight_decay), self.learning_rate, momentum=self.momentum, nesterov=True
        )
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise ValueError("the half-cosine schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        total_steps = int(self.trainer.estimated_stepping_batches)
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if warmup_steps >= total_steps:
            rank_zero_warn(
                f"a warm-up of {self.warmup_epochs:g} epochs does not fit into {total_steps / steps_per_epoch:g}: "
                "it takes a fifth of the run instead; set model.warmup_epochs"
            )
            warmup_steps = total_steps // 5

        def factor(step: int) -> float:
            rate = learning_rate_at(step, total_steps, warmup_steps, self.learning_rate, self.warmup_start)
            return rate / self.learning_rate

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
