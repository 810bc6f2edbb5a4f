"""The Lightning module: loss, optimiser, schedule, validation and multi-view testing of a network."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from octvideo.errors import UserError
from octvideo.layers.normalization import SubBatchNorm, normalize
from octvideo.models.recomputation import recompute as recompute_blocks
from octvideo.models.zoo import create_model
from octvideo.training.schedule import Schedule

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


def _limited(batches: int, limit: int | float | None) -> int:
    """Batches of an epoch under trainer.limit_train_batches: a number of them, or a share."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _steps_of_epochs(trainer: Any, length: int) -> int:
    """The optimiser steps to the present place of a training whose epochs all have this length."""
    epochs = trainer.fit_loop.epoch_progress.current.state_dict()
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.state_dict()
    seen: int = batches["processed"] if epochs["started"] > epochs["processed"] else 0
    return epochs["processed"] * length + seen // trainer.accumulate_grad_batches  # type: ignore[no-any-return]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for convolution and linear weights only: none for biases and normalisation layers.

    Parameters that are frozen (requires_grad False) are in no group.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Recognizer(LightningModule):
    """A network that recognises actions in videos, with the recipe that trains and tests it.

    The defaults are the SlowFast project's recipe from scratch. Its learning rates are for 64 clips a step; they are
    scaled by the clips that all processes take before the weights change, and the rate is set anew for every step from
    the epoch and the step in it, so that resuming needs no state of it.

    Args:
        name: network: c2d_r50, i3d_r50, slow_r50, slowfast_r50, c2d_r50_nonlocal, i3d_r50_nonlocal, csn_r101,
            r2plus1d_r50, x3d_xs, x3d_s, x3d_m or x3d_l.
        alpha: share of octave channels at low resolution in res2 to res4, in [0, 1]; or four, for res2 to res5; or
            {regex: number} of convolutions' names, such as experiments/allocation.py writes.
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
        freeze: regexes of names of the network's parts (`blocks.0` is the stem, `blocks.1` res2 ...), from their first
            letter: their weights and batch-norm statistics stay as they are.
        normalization: of training batches: "batch" by each process's own statistics, "sync" by those of all processes,
            "sub" by those of `sub_batch` clips, "frozen" by the running ones, which stay as they are.
        sub_batch: clips that are normalised together by "sub"; default: batch_size, which multigrid's batches exceed.
        recompute: keep for backward only the inputs of residual blocks and compute the rest again (activation
            checkpointing): less memory, about a third more time.
        compile: let torch.compile make the network's code; the first steps take minutes.
        learning_rate: peak of the schedule, for `reference_batch` clips a step.
        reference_batch: clips a step (in all processes, over accumulated batches) that the learning rates are meant
            for; they are scaled in proportion. Null takes them as they are.
        batch_size: clips of a batch in each process (set by data.batch_size); null: the learning rates are as given.
        warmup_start: learning rate at the start of the warm-up, for `reference_batch` clips a step.
        warmup_epochs: length of the warm-up; may be a fraction.
        milestones: epochs, which may be fractions, at each of which the learning rate falls to a tenth; empty: half a
            cosine to 0 over the whole run. With multigrid, whose epochs differ in steps, an epoch of the schedule has
            their mean.
        label_smoothing: share of a label that is spread over all classes.
        momentum: of SGD with Nesterov's correction.
        weight_decay: of convolution and classifier weights; biases and batch norms have none.
        mean: subtracted from pixels in [0, 1].
        std: then divides them.
        seed: of dropout (set by seed_everything).

    Raises:
        ValueError: an unknown network, a number out of its range, or weights that do not fit.
    """

    def __init__(
        self,
        name: str = "i3d_r50",
        alpha: float | list[float] | dict[str, float] = 0.1,
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
        freeze: list[str] | None = None,
        normalization: Literal["batch", "sync", "sub", "frozen"] = "batch",
        sub_batch: int | None = None,
        recompute: bool = False,
        compile: bool = False,
        learning_rate: float = 0.1,
        reference_batch: int | None = 64,
        batch_size: int | None = None,
        warmup_start: float = 0.01,
        warmup_epochs: float = 34,
        milestones: list[float] | None = None,
        label_smoothing: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        mean: float = 0.45,
        std: float = 0.225,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.recipe = Schedule(learning_rate, 1, warmup_start, warmup_epochs, tuple(milestones or ()))
        if not 0 < momentum < 1 or std <= 0 or weight_decay < 0:
            raise UserError(
                "model.momentum must lie between 0 and 1, std be positive and weight_decay at least 0, got "
                f"{momentum}, {std} and {weight_decay}"
            )
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing must lie in [0, 1), got {label_smoothing}")
        if min(1 if n is None else n for n in (sub_batch, reference_batch, batch_size)) < 1:
            raise UserError(
                f"model.sub_batch, reference_batch and batch_size must be at least 1, got {sub_batch}, "
                f"{reference_batch} and {batch_size}"
            )
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
        normalize(self.network, normalization)
        for pattern in freeze or ():
            self._freeze(pattern)
        if recompute:
            recompute_blocks(self.network)
        self.compile_network = compile
        self.num_classes = num_classes
        self.sub_batch = sub_batch or batch_size
        self.reference_batch = reference_batch
        self.batch_size = batch_size
        self.label_smoothing = label_smoothing
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.mean = mean
        self.std = std
        self.seed = seed

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

    def _freeze(self, pattern: str) -> None:
        """Freezes parts of the network, by a regex of their names."""
        try:
            parts = [module for name, module in self.network.named_modules() if name and re.match(pattern, name)]
        except re.error as error:
            raise UserError(f"model.freeze {pattern!r} is no regular expression: {error}") from error
        if not parts:
            raise UserError(f"model.freeze {pattern!r} is the name of no part of the network")
        for part in parts:
            part.requires_grad_(False)
            normalize(part, "frozen")

    def forward(self, clips: Tensor) -> Tensor:
        """Logits of clips.

        Args:
            clips: (B, C, T, H, W) uint8 RGB; normalised here, on the device.

        Returns:
            (B, num_classes).
        """
        for module in self.network.modules():
            if isinstance(module, SubBatchNorm):
                module.splits = max(1, len(clips) // (self.sub_batch or len(clips)))
        x = (clips.to(torch.float32) / 255 - self.mean) / self.std
        return self.network(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy of one batch; of mixed clips, accuracy counts the class of the larger share."""
        videos, views = batch.clips.shape[:2]
        logits = self(batch.clips.flatten(0, 1)).float()
        labels = batch.labels.repeat_interleave(views, 0)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_top1(logits, labels.argmax(1) if labels.dim() > 1 else labels)
        self.log("train/loss", loss, on_epoch=True, prog_bar=True, batch_size=videos, sync_dist=True)
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
        hits = views.topk(min(5, self.num_classes)).indices == batch.labels[:, None, None]  # (B, V, 5)
        top1, top5 = (hits[..., :k].any(-1).float().mean(1).tolist() for k in (1, 5))
        columns = batch.paths, batch.labels.tolist(), videos.tolist(), top1, top5
        names = ("path", "label", "scores", "clip_top1", "clip_top5")
        self._predictions += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

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

    def configure_model(self) -> None:
        """Shards the network over the processes if the strategy wants that (FSDP2), and compiles it if asked to."""
        if self.compile_network and self.trainer.training:
            self.network.compile()
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.network, FSDPModule):
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for block in self.network.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum; `on_train_batch_start` sets the learning rate."""
        groups = parameter_groups(self.network, self.weight_decay)
        if not any(group["params"] for group in groups):
            raise UserError(f"model.freeze {self.hparams['freeze']} freezes all of the network")
        return torch.optim.SGD(groups, self.recipe.peak, momentum=self.momentum, nesterov=True)

    def on_train_start(self) -> None:
        """Makes the schedule for this run's length and batch, and prints it."""
        trainer = self.trainer
        length = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        num_epochs = max(trainer.max_epochs or 0, 0)
        if num_epochs == 0 and trainer.max_steps <= 0:
            raise UserError("the learning rate's schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        last_step = trainer.max_steps
        if num_epochs == 0:  # as if earlier epochs, which may have had other batches, had been as long as this one
            last_step += _steps_of_epochs(trainer, length) - trainer.global_step
        lengths = [length] * (num_epochs or math.ceil(last_step / length))
        of_shapes = getattr(data, "multigrid", None) is not None
        if of_shapes:  # each epoch has another number of steps
            batches = [_limited(data.batches_in_epoch(k), trainer.limit_train_batches) for k in range(len(lengths))]
            lengths = [math.ceil(number / trainer.accumulate_grad_batches) for number in batches]
        self._first_steps = [0, *itertools.accumulate(lengths)]
        total = self._first_steps[-1]
        epochs = len(lengths) * (min(total, last_step) if last_step > 0 else total) / total
        self._steps_per_epoch = total / len(lengths)
        clips = (self.batch_size or 0) * trainer.world_size * trainer.accumulate_grad_batches
        self.schedule = self.schedule_for(epochs, clips)
        parts = f"{self.batch_size} clips x {trainer.world_size} processes x {trainer.accumulate_grad_batches} batches"
        scaled = self.schedule.peak / self.recipe.peak
        reference = f"; scaled by {scaled:g} from {self.reference_batch} clips" if scaled != 1 else ""
        factors = dict.fromkeys(data.batch_factor(epoch) for epoch in range(len(lengths))) if of_shapes else {}
        reference += f"; times {', '.join(map(str, factors))} by turns, as the batches of multigrid" if factors else ""
        rank_zero_info(
            f"learning rate: {self.schedule}{reference}\n"
            f"a step: {parts + f' = {clips} clips' if clips else 'clips as the loader gives them'}; "
            f"an epoch: {self._steps_per_epoch:g} steps"
        )

    def schedule_for(self, epochs: float, clips: int) -> Schedule:
        """The recipe's learning rates for a run.

        Args:
            epochs: length of the run.
            clips: clips of one step, in all processes and accumulated batches; 0 if unknown: as the recipe says.
        """
        recipe = dataclasses.replace(self.recipe, epochs=epochs)
        if recipe.warmup_epochs >= epochs:
            rank_zero_warn(
                f"a warm-up of {recipe.warmup_epochs:g} epochs does not fit into {epochs:g}: "
                "it takes a fifth of the run instead; set model.warmup_epochs"
            )
            recipe = dataclasses.replace(recipe, warmup_epochs=epochs / 5)
        return recipe.scaled(clips / self.reference_batch) if clips and self.reference_batch else recipe

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Sets what depends on the place in the run alone: the learning rate and dropout's seed."""
        trainer = self.trainer
        step = self._first_steps[trainer.current_epoch] + batch_index // trainer.accumulate_grad_batches
        rate = self.schedule.at(step / self._steps_per_epoch)
        if hasattr(trainer.datamodule, "batch_factor"):  # type: ignore[attr-defined]
            rate *= trainer.datamodule.batch_factor(trainer.current_epoch)  # type: ignore[attr-defined]
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = rate
        turn = (self.seed, trainer.current_epoch, batch_index, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(turn).generate_state(1, np.uint64)[0] >> 1))

    def on_validation_epoch_start(self) -> None:
        """Gathers sharded weights once: processes whose last batches hold fewer videos make fewer forward passes."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.set_reshard_after_forward(False, recurse=False)
        if isinstance(self.network, FSDPModule):  # DDP does this itself
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def on_validation_epoch_end(self) -> None:
        """Parts with the gathered weights."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()
