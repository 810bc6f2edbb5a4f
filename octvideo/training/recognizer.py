"""The Lightning module: loss, optimiser, learning rate, validation and multi-view testing of a network."""

import itertools
import math
import re
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from octvideo.data.loading import Batch
from octvideo.data.module import VideoData
from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.layers.finishing import use_fused_passes
from octvideo.layers.normalization import normalize
from octvideo.models.compilation import compile_network
from octvideo.models.recomputation import recompute as recompute_blocks
from octvideo.models.scoring import score_clips, top_hits
from octvideo.models.zoo import create_model
from octvideo.training.schedule import Schedule


class Recognizer(LightningModule):
    """A network that recognises actions in videos, with the recipe that trains and tests it.

    The defaults are the SlowFast project's recipe from scratch. The learning rate follows from the epoch and the batch
    alone, so resuming needs no scheduler state. Raises UserError for a number out of its range.

    Args:
        name: network: c2d_r50, i3d_r50, slow_r50, slowfast_r50, c2d_r50_nonlocal, i3d_r50_nonlocal, csn_r101,
            r2plus1d_r50, x3d_xs, x3d_s, x3d_m or x3d_l.
        alpha: share of octave channels at low resolution in res2 to res4, in [0, 1]; or four, for res2 to res5; or
            {regex of convolutions' names: number}, such as experiments/allocation.py writes.
        num_classes: number of classes.
        freeze: modules whose weights and batch norms stay fixed, as regexes that match the start of their names
            (`blocks.0` is the stem).
        normalization: statistics that training batches are normalised with: "batch", each process's own; "sync", those
            of all processes; "sub", those of every `sub_batch` clips; "frozen", the running ones, which stay fixed.
        sub_batch: clips normalised together by "sub"; default: batch_size, which multigrid's batches exceed.
        recompute: activation checkpointing of residual blocks: less memory, about a third more time.
        compile: compile the network with torch.compile: "blocks", each kind of residual block once, or true, all of it,
            which is faster after some minutes; validation included.
        fused_passes: on CUDA devices, leave the sums, batch norm and activation behind an octave layer to one pass in
            Triton, which eager training and testing profit from; see `octvideo.layers.use_fused_passes`.
        learning_rate: peak of the schedule, for `reference_batch` clips a step.
        reference_batch: clips a step, over all processes, that learning rates are for; null: do not scale them.
        batch_size: clips in a batch of each process (set by data.batch_size); null: learning rates are not scaled.
        warmup_start: learning rate at the start of the warm-up, for `reference_batch` clips a step.
        warmup_epochs: length of the warm-up; may be fractional.
        milestones: epochs, possibly fractional, at which the learning rate falls to a tenth; empty: half a cosine to 0.
            With multigrid, whose epochs differ in steps, an epoch of the schedule is their mean number of steps.
        label_smoothing: share of each label that is spread over all classes.
        momentum: of SGD with Nesterov momentum.
        weight_decay: of convolution and classifier weights; biases and batch norms have none.
        mean: subtracted from pixels in [0, 1].
        std: divides them afterwards.
        seed: of dropout (set by seed_everything).
        network: further options of `octvideo.create_model`.
    """

    def __init__(
        self,
        name: str = "i3d_r50",
        alpha: float | list[float] | dict[str, float] = 0.1,
        num_classes: int = 400,
        *,
        freeze: list[str] | None = None,
        normalization: Literal["batch", "sync", "sub", "frozen"] = "batch",
        sub_batch: int | None = None,
        recompute: bool = False,
        compile: bool | Literal["blocks"] = False,
        fused_passes: bool = False,
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
        **network: Any,
    ) -> None:
        super().__init__()
        self.recipe = Schedule(learning_rate, 1, warmup_start, warmup_epochs, tuple(milestones or ()))
        self.preprocessing = Preprocessing(mean=mean, std=std)
        if not 0 < momentum < 1:
            raise UserError(f"model.momentum must lie between 0 and 1, got {momentum}")
        if weight_decay < 0:
            raise UserError(f"model.weight_decay must be at least 0, got {weight_decay}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing must lie in [0, 1), got {label_smoothing}")
        for option, value in ("sub_batch", sub_batch), ("reference_batch", reference_batch), ("batch_size", batch_size):
            if value is not None and value < 1:
                raise UserError(f"model.{option} must be at least 1, got {value}")
        # Channels last is faster at every alpha.
        self.network = create_model(name, alpha=alpha, num_classes=num_classes, channels_last=True, **network)
        # save_hyperparameters reads `network` from here: checkpoints record its defaults too, but no file of weights.
        network = (create_model.__kwdefaults__ or {}) | network | {"alpha": alpha, "num_classes": num_classes}
        self.save_hyperparameters(ignore=["weights", "channels_last"])
        clips_per_part = (sub_batch or batch_size) if normalization == "sub" else None
        normalize(self.network, normalization, clips_per_part=clips_per_part)
        for pattern in freeze or ():
            try:
                parts = [part for name, part in self.network.named_modules() if name and re.match(pattern, name)]
            except re.error as error:
                raise UserError(f"model.freeze {pattern!r} is an invalid regex: {error}") from error
            if not parts:
                raise UserError(f"model.freeze {pattern!r} matches no part of the network")
            for part in parts:
                normalize(part.requires_grad_(False), "frozen")
        if recompute:
            recompute_blocks(self.network)
        accuracies = (MulticlassAccuracy(num_classes, k, average="micro") for k in (1, 1, min(5, num_classes)))
        self.train_top1, self.val_top1, self.val_top5 = accuracies
        self.val_loss = MeanMetric()

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes) of clips (B, C, T, H, W) in uint8 RGB, which are normalised here, on the device."""
        logits: Tensor = self.network(self.preprocessing.normalize(clips).to(self.dtype))
        return logits

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy of a batch; the accuracy of mixed clips counts the class of the larger share."""
        videos, views = batch.clips.shape[:2]
        logits, labels = self(batch.clips.flatten(0, 1)).float(), batch.labels.repeat_interleave(views, 0)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])
        self.train_top1(logits, labels.argmax(1) if labels.dim() > 1 else labels)
        self.log("train/loss", loss, on_epoch=True, batch_size=videos, sync_dist=True)
        self.log("train/top1", self.train_top1, on_step=False, on_epoch=True, batch_size=videos)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracies of videos, with the views averaged after softmax."""
        if len(batch.clips) > 0:
            scores = self._view_scores(batch).mean(1)
            self.val_loss.update(F.nll_loss(scores.clamp_min(1e-12).log(), batch.labels), len(scores))
            self.val_top1.update(scores, batch.labels)
            self.val_top5.update(scores, batch.labels)
        metrics = {"val/loss": self.val_loss, "val/top1": self.val_top1, "val/top5": self.val_top5}
        self.log_dict(metrics, batch_size=1)

    def _view_scores(self, batch: Batch) -> Tensor:  # probabilities (B, V, num_classes)
        return torch.unflatten(score_clips(self, batch.clips.flatten(0, 1)), 0, batch.clips.shape[:2])

    def on_test_epoch_start(self) -> None:
        self._tested: tuple[list[Any], ...] = [], [], []  # videos, their hits, and bad videos

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Keeps each video's scores, its views averaged after softmax, and whether it and its views were right."""
        videos, hits, bad = self._tested
        bad += [{"path": path, "reason": reason} for path, reason in batch.bad]
        if len(batch.clips) == 0:
            return
        views, labels = self._view_scores(batch), batch.labels
        scores = views.mean(1)
        clip_hits = [top.mean(1) for top in top_hits(views, labels[:, None])]
        hits += torch.stack((*top_hits(scores, labels), *clip_hits), 1).tolist()
        names = "path", "label", "scores", "clip_top1", "clip_top5"
        columns = batch.paths, *(column.tolist() for column in (labels, scores, *clip_hits))
        videos += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def on_test_epoch_end(self) -> None:
        # Gathers what all ranks tested into `results`, in the form of predictions.json.
        parts = [self._tested] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, self._tested)
        videos, hits, bad = (list(itertools.chain(*kind)) for kind in zip(*parts, strict=True))
        accuracies = torch.tensor(hits).mean(0).tolist() if hits else [None] * 4
        self.results: dict[str, Any] = dict(zip(("top1", "top5", "clip_top1", "clip_top5"), accuracies, strict=True))
        self.results |= {"videos": sorted(videos, key=itemgetter("path")), "bad": sorted(bad, key=itemgetter("path"))}

    def configure_model(self) -> None:
        if self.hparams["fused_passes"]:
            use_fused_passes("auto")
        if self.trainer.training:
            compile_network(self.network, self.hparams["compile"])
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.network, FSDPModule):
            assert self.device_mesh is not None
            for module in (*self.network.get_submodule("blocks").children(), self.network):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if not trained:
            raise UserError(f"model.freeze {self.hparams['freeze']} freezes the whole network")
        weights, others = [x for x in trained if x.dim() > 1], [x for x in trained if x.dim() <= 1]
        groups = [{"params": weights, "weight_decay": self.hparams["weight_decay"]}, {"params": others}]
        return torch.optim.SGD(groups, self.recipe.peak, momentum=self.hparams["momentum"], nesterov=True)

    def on_train_start(self) -> None:
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        accumulated = trainer.accumulate_grad_batches
        num_epochs, last_step = max(trainer.max_epochs or 0, 0), trainer.max_steps
        if num_epochs == 0 and last_step <= 0:
            raise UserError("the learning-rate schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        if num_epochs == 0:  # earlier epochs may have had other batches: counts as if all were as long as this one
            length = math.ceil(trainer.num_training_batches / accumulated)
            epochs: Any = trainer.fit_loop.epoch_progress.current
            batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            seen = batches.processed if epochs.started > epochs.processed else 0
            last_step += epochs.processed * length + seen // accumulated - trainer.global_step
            num_epochs = math.ceil(last_step / length)
        lengths, self._factors = [trainer.num_training_batches] * num_epochs, [1] * num_epochs
        if isinstance(data, VideoData) and data.multigrid is not None:  # epochs differ in their batches and clips
            limit = trainer.limit_train_batches
            lengths = [data.batches_in_epoch(epoch) for epoch in range(num_epochs)]
            lengths = [min(count, limit) if isinstance(limit, int) else int(count * limit) for count in lengths]
            self._factors = [data.batch_factor(epoch) for epoch in range(num_epochs)]
        self._first_steps = [0, *itertools.accumulate(math.ceil(count / accumulated) for count in lengths)]
        total, self._epoch_steps = self._first_steps[-1], self._first_steps[-1] / num_epochs
        recipe = self.recipe.over(num_epochs * (min(total, last_step) if last_step > 0 else total) / total)
        if recipe.warmup_epochs < self.recipe.warmup_epochs:
            misfit = f"a warm-up of {self.recipe.warmup_epochs:g} epochs does not fit into a run of {recipe.epochs:g}"
            rank_zero_warn(f"{misfit}: it takes a fifth of the run instead; set model.warmup_epochs")
        batch, reference = self.hparams["batch_size"], self.hparams["reference_batch"]
        clips = (batch or 0) * trainer.world_size * accumulated
        scale = clips / reference if clips and reference else 1.0
        self.schedule, factors = recipe.scaled(scale), dict.fromkeys(self._factors)
        scaled = f"; scaled by {scale:g} from {reference} clips" if scale != 1 else ""
        scaled += f"; times {', '.join(map(str, factors))} in multigrid's long cycle" if len(factors) > 1 else ""
        step = f"{batch} clips x {trainer.world_size} processes x {accumulated} batches = {clips} clips"
        step = step if clips else "clips as the loader gives them"
        rank_zero_info(f"learning rate: {self.schedule}{scaled}\na step: {step}; an epoch: {self._epoch_steps:g} steps")

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        # Sets what depends only on the position in the run: the learning rate and dropout's seed.
        trainer, epoch = self.trainer, self.trainer.current_epoch
        step = self._first_steps[epoch] + batch_index // trainer.accumulate_grad_batches
        rate = self.schedule.at(step / self._epoch_steps) * self._factors[epoch]
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate
        self.log("learning_rate", rate)
        turn = (self.hparams["seed"], epoch, batch_index, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(turn).generate_state(1, np.uint64)[0] >> 1))

    def on_validation_epoch_start(self) -> None:
        # Gathers sharded weights once: ranks whose last batches hold fewer videos make fewer forward passes.
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.set_reshard_after_forward(False, recurse=False)
        if isinstance(self.network, FSDPModule):  # DDP does this itself
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def on_validation_epoch_end(self) -> None:
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()
