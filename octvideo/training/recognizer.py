"""The Lightning module: loss, optimiser, learning rate, validation and multi-view testing of a network."""

import itertools
import math
import re
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision

from octvideo.data.loading import Batch
from octvideo.data.module import VideoData
from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.layers.finishing import use_fused_passes
from octvideo.layers.normalization import normalize
from octvideo.models.compilation import compile_network
from octvideo.models.own_network import adapt_own, entry_of, logits_of, record_of
from octvideo.models.recomputation import recompute as recompute_blocks
from octvideo.models.scoring import Task
from octvideo.models.zoo import create_model
from octvideo.training.elastic import Elastic, ElasticTraining, elastic_options
from octvideo.training.objective import Objective, Teacher
from octvideo.training.optimizers import (
    OptimizerCallable,
    ScheduleFree,
    SchedulerCallable,
    build_optimizer,
    parameter_groups,
)
from octvideo.training.schedule import Schedule
from octvideo.training.testing import MultiViewTest


class Recognizer(MultiViewTest, ScheduleFree):
    """A network that recognises actions in videos, with the recipe that trains and tests it.

    The defaults are the SlowFast project's recipe from scratch. The learning rate follows from the epoch and the batch
    alone, so resuming needs no scheduler state. Raises UserError for a number out of its range.

    Args:
        name: of the zoo: c2d_r50, i3d_r50, slow_r50, slowfast_r50, c2d_r50_nonlocal, i3d_r50_nonlocal, csn_r101,
            r2plus1d_r50, x3d_xs, x3d_s, x3d_m or x3d_l.
        alpha: share of octave channels at low resolution in res2 to res4, in [0, 1]; or four, for res2 to res5; or
            {regex of convolutions' names: number}, such as experiments/allocation.py writes. Of `network`: a number for
            all convolutions that suit, or a mapping. Each of the four, or of a mapping, may be a list of the shares at
            half the resolution, a quarter ...
        elastic: alphas that one network is trained for at once, and how; see docs/elastic.md. Default: alpha alone.
        num_classes: number of classes.
        network: a network of your own in place of the zoo's, from clips (B, 3, T, H, W) to logits (B, num_classes): in
            YAML {class_path, init_args}, in Python a module, of `octvideo.build_network` if checkpoints are to build it
            again. Its last linear layer is replaced unless it has num_classes outputs.
        classes_argument: argument of the network's class that takes num_classes, if it has one of that name.
        skip: of `network`: regexes of convolutions' names that stay vanilla.
        output: of `network`: key, attribute or number of the logits among several outputs.
        auxiliary: of `network`: weights in the loss of further logits, by their key, attribute or number.
        task: "single": one class a video; "multi": any number of classes (`path 3,17` in lists), each with a sigmoid.
        loss: module called with logits and labels, such as octvideo.training.objective.FocalLoss; default:
            cross-entropy, for "multi" the binary one.
        class_weights: a weight for each class, or "balanced": by the numbers of training videos.
        teacher: checkpoint of a network whose scores this one learns too (knowledge distillation).
        teacher_weight: share of the loss that is the teacher's, in (0, 1].
        temperature: divides the logits of both before they are compared.
        optimizer: class path of another optimiser, such as torch.optim.AdamW, with its arguments; its lr takes the
            place of learning_rate, and the schedule keeps its shape. Default: SGD with Nesterov momentum.
        lr_scheduler: class path of a schedule of torch, stepped after each epoch, in place of the one here.
        layer_decay: learning rates fall by this factor from each layer to the one before it; 1: all alike.
        no_decay: regexes of parameters' names without weight decay, besides biases and batch norms.
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
        zoo: further options of `octvideo.create_model`.
    """

    def __init__(
        self,
        name: str = "i3d_r50",
        alpha: float | list[float | list[float]] | dict[str, float | list[float]] = 0.1,
        num_classes: int = 400,
        *,
        elastic: Elastic | None = None,
        network: nn.Module | None = None,
        classes_argument: str = "num_classes",
        skip: list[str] | None = None,
        output: str | int | None = None,
        auxiliary: dict[str, float] | None = None,
        task: Task = "single",
        loss: nn.Module | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        temperature: float = 2.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: SchedulerCallable | None = None,
        layer_decay: float = 1.0,
        no_decay: list[str] | None = None,
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
        **zoo: Any,
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
        if network is None:
            # Channels last is faster at every alpha.
            self.network = create_model(name, alpha=alpha, num_classes=num_classes, channels_last=True, **zoo)
        else:
            self.network = adapt_own(network, alpha, num_classes, skip or (), zoo)
        self.objective = Objective(
            task, num_classes, loss=loss, class_weights=class_weights, label_smoothing=label_smoothing
        )
        elastic = elastic_options(elastic)
        self.teacher = Teacher(teacher, teacher_weight, temperature, task, num_classes) if teacher else None
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        # save_hyperparameters reads `network` and `zoo` from here: checkpoints record defaults too, but no file.
        zoo = (create_model.__kwdefaults__ or {}) | zoo | {"alpha": alpha, "num_classes": num_classes}
        network, record = None, None if network is None else record_of(network)
        self.save_hyperparameters(ignore=["weights", "channels_last", "loss", "optimizer", "lr_scheduler", "elastic"])
        self.hparams["network"] = self.hparams.get("network") or record  # the command line's, or else the object's
        self.hparams["elastic"] = elastic and asdict(elastic)
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
        if elastic and (recompute or compile):
            raise UserError("model.elastic changes alpha within a step: leave out model.recompute and model.compile")
        self.elastic = ElasticTraining(self.network, elastic, alpha, task, num_classes) if elastic else None
        self.val_loss = MeanMetric()
        if task == "multi":
            self.val_map = MultilabelAveragePrecision(num_classes)
        else:
            accuracies = (MulticlassAccuracy(num_classes, k, average="micro") for k in (1, 1, min(5, num_classes)))
            self.train_top1, self.val_top1, self.val_top5 = accuracies

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes) of clips (B, C, T, H, W) in uint8 RGB, which are normalised here, on the device."""
        return self.logits(self.outputs(clips))

    def outputs(self, clips: Tensor) -> Any:
        """What the network returns for clips (B, C, T, H, W) in uint8 RGB."""
        return self.network(self.preprocessing.normalize(clips).to(self.dtype))

    def logits(self, outputs: Any) -> Tensor:
        """The logits (B, num_classes) among a network's outputs: override for what `model.output` cannot name."""
        return logits_of(outputs, self.hparams["output"], self.hparams["num_classes"])

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss of a network's outputs, auxiliary ones included: override for any other sum."""
        loss: Tensor = self.objective(self.logits(outputs).float(), labels)
        for key, weight in (self.hparams["auxiliary"] or {}).items() if not isinstance(outputs, Tensor) else ():
            further = entry_of(outputs, int(key) if key.isdecimal() else key)
            loss = loss + weight * self.objective(further.float(), labels)
        return loss

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of a batch; the accuracy of mixed clips counts the class of the larger share."""
        videos, views = batch.clips.shape[:2]
        clips, labels = batch.clips.flatten(0, 1), batch.labels.repeat_interleave(views, 0)
        with self.elastic.at(self.elastic.largest) if self.elastic else nullcontext():
            outputs = self.outputs(clips)
        loss, logits = self.loss(outputs, labels), self.logits(outputs).float()
        if self.teacher is not None:
            loss = self.teacher(clips, logits, loss)
        self.log("train/loss", loss, on_epoch=True, batch_size=videos, sync_dist=True)
        if self.objective.task == "single":
            self.train_top1(logits, labels.argmax(1) if labels.dim() > 1 else labels)
            self.log("train/top1", self.train_top1, on_step=False, on_epoch=True, batch_size=videos)
        if self.elastic is not None:
            loss = loss + self.elastic.loss_of_others(self, clips, labels, logits, batch_index)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracies of videos, with the views averaged after softmax or sigmoid."""
        multi = self.objective.task == "multi"
        metrics: dict[str, Any] = {"val/map": self.val_map} if multi else {}
        metrics |= {} if multi else {"val/top1": self.val_top1, "val/top5": self.val_top5}
        if len(batch.clips) > 0:
            scores, labels = self.view_scores(batch).mean(1), batch.labels
            if multi:
                loss = F.binary_cross_entropy(scores, labels)
                labels = (labels > 0.5).long()
            elif labels.dim() > 1:
                loss, labels = -(labels * scores.clamp_min(1e-12).log()).sum(1).mean(), labels.argmax(1)
            else:
                loss = F.nll_loss(scores.clamp_min(1e-12).log(), labels)
            self.val_loss.update(loss, len(scores))
            for metric in metrics.values():
                metric.update(scores, labels)
        self.log_dict({"val/loss": self.val_loss, **metrics}, batch_size=1)
        if self.elastic is not None:
            self.elastic.validate(self, batch)

    def configure_model(self) -> None:
        if self.hparams["fused_passes"]:
            use_fused_passes("auto")
        if self.trainer.training:
            compile_network(self.network, self.hparams["compile"])
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if self.elastic is not None and sharded:
            raise UserError("model.elastic changes alpha within a step: leave out --trainer.strategy fsdp")
        if sharded and not isinstance(self.network, FSDPModule):
            assert self.device_mesh is not None
            for module in (*getattr(self.network, "blocks", self.network).children(), self.network):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise UserError(f"model.freeze {self.hparams['freeze']} freezes the whole network")
        own, options = self.optimizer is not None, self.hparams
        if self.lr_scheduler is not None and not own:
            raise UserError("model.lr_scheduler is for model.optimizer: give one, such as SGD")
        spared, decay = options["no_decay"] or (), options["layer_decay"]
        groups = parameter_groups(self.network, None if own else options["weight_decay"], spared, decay)
        if self.optimizer is None:
            return torch.optim.SGD(groups, self.recipe.peak, momentum=options["momentum"], nesterov=True)
        optimizer = build_optimizer(self.optimizer, groups)
        self.recipe = self.recipe.scaled(optimizer.defaults["lr"] / self.recipe.peak)
        if self.lr_scheduler is None:
            return optimizer
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1)
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def on_fit_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if self.objective.balanced:
            if not isinstance(data, VideoData):
                raise UserError("model.class_weights balanced counts the classes of octvideo's VideoData: give numbers")
            videos = data.read("train_list")
            self.objective.balance(videos.class_counts(data.num_classes or 0), len(videos.paths))

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
        how = f"{self.schedule}{scaled}" if self.lr_scheduler is None else "as model.lr_scheduler sets it"
        rank_zero_info(f"learning rate: {how}\na step: {step}; an epoch: {self._epoch_steps:g} steps")

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        # Sets what depends only on the position in the run: the learning rate and dropout's seed.
        trainer, epoch = self.trainer, self.trainer.current_epoch
        step = self._first_steps[epoch] + batch_index // trainer.accumulate_grad_batches
        rate = self.schedule.at(step / self._epoch_steps) * self._factors[epoch]
        optimizer: Any = trainer.optimizers[0]
        for group in optimizer.param_groups if self.lr_scheduler is None else ():
            group["lr"] = rate * group.get("lr_scale", 1)
        self.log("learning_rate", rate if self.lr_scheduler is None else optimizer.param_groups[0]["lr"])
        turn = (self.hparams["seed"], epoch, batch_index, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(turn).generate_state(1, np.uint64)[0]) >> 1)

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
