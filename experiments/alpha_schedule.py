"""Alpha over training: a network's weights are the same at every alpha, so it may change on the way."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from octvideo.errors import UserError
from octvideo.models.zoo import set_alpha, stage_alphas


class AlphaSchedule(Callback):
    """Trains from one alpha to the model's own in a few steps: cheap epochs first, or the reverse.

    Alpha follows from the epoch and the batch alone, so that a resumed run is where it was; checkpoints keep the
    model's own. It changes between optimiser steps only, validations run at the current one, and it is logged as
    `alpha` (or `alpha/res2` ... `alpha/res5`). Batch norm's running averages follow within some 50 steps of a change.
    Where an alpha on the way is 0, build the model with downsample "pool": a vanilla network strides where one with
    octaves pools. Raises UserError for a number out of its range, in fit also for a training that ends too early.

    Args:
        start: alpha at first, in [0, 1]: one for res2 to res4, or four for res2 to res5, as the model's.
        end_epoch: from then on the network has the model's own alpha; may be fractional.
        begin_epoch: the first step comes one step's length after it; may be fractional.
        num_steps: equal steps between the two. With torch.compile, each of them compiles again.
    """

    def __init__(
        self, start: float | list[float], end_epoch: float, *, begin_epoch: float = 0.0, num_steps: int = 4
    ) -> None:
        try:
            stage_alphas(start)
        except UserError as error:
            raise UserError(f"start of the alpha schedule: {error}") from error
        if not 0 <= begin_epoch < end_epoch:
            needed = "the alpha schedule needs begin_epoch of at least 0 and below end_epoch"
            raise UserError(f"{needed}, got {begin_epoch:g} and {end_epoch:g}")
        if num_steps < 1:
            raise UserError(f"num_steps of the alpha schedule must be at least 1, got {num_steps}")
        self.start, self.num_steps = start, num_steps
        self.begin_epoch, self.end_epoch = begin_epoch, end_epoch
        self._alpha: float | tuple[float, ...] | None = None

    def alpha_at(self, progress: float, target: float | Sequence[float]) -> float | tuple[float, ...]:
        """Alpha after `progress` epochs: one number where `start` and `target` are, else four, one a stage.

        Step k comes k / num_steps of the way from `begin_epoch` to `end_epoch`; from there on it is `target` exactly.
        """
        way = max(0.0, (progress - self.begin_epoch) / (self.end_epoch - self.begin_epoch))
        share = int(way * self.num_steps + 1e-6) / self.num_steps  # 3 * (1 / 3) may be just below 1
        pairs: Any = zip(stage_alphas(self.start), stage_alphas(target), strict=True)
        stages = tuple(b if progress >= self.end_epoch else a + (b - a) * share for a, b in pairs)
        return stages if isinstance(self.start, Sequence) or isinstance(target, Sequence) else stages[0]

    def check(self, network: nn.Module, target: float | Sequence[float]) -> None:
        """Raises UserError for an alpha on the way to `target` that a network of `create_model` cannot have."""
        if isinstance(target, Mapping):
            raise UserError("an alpha schedule needs a model.alpha of one number or four, got one for each layer")
        if any(isinstance(one, tuple) for one in (*stage_alphas(self.start), *stage_alphas(target))):
            raise UserError(f"an alpha schedule is for one octave, got {self.start} and {target}")
        for k in range(self.num_steps + 1):
            share = k / self.num_steps
            alpha = self.alpha_at(self.begin_epoch * (1 - share) + self.end_epoch * share, target)
            try:
                set_alpha(network, alpha)
            except UserError as error:
                set_alpha(network, target)
                raise UserError(f"alpha {alpha} of the alpha schedule: {error}") from error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.hparams.get("elastic"):
            raise UserError("an alpha schedule and model.elastic both set alpha: leave out one of them")
        self.check(pl_module.get_submodule("network"), pl_module.hparams["alpha"])
        self._alpha = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or math.isinf(trainer.num_training_batches):  # type: ignore[attr-defined]
            return
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        epochs = trainer.estimated_stepping_batches / steps_per_epoch
        if epochs <= self.end_epoch:
            limit = f"before the end of the training, {epochs:g} epochs"
            raise UserError(f"end_epoch of the alpha schedule must lie {limit}: got {self.end_epoch:g}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        alpha = self._set(trainer, pl_module, batch_idx)
        values = {f"alpha/res{k}": x for k, x in enumerate(alpha, 2)} if isinstance(alpha, tuple) else {"alpha": alpha}
        pl_module.log_dict(values, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # which may resume with a validation, or start with a sanity check
            self._set(trainer, pl_module, trainer.fit_loop.batch_idx)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_alpha(pl_module.get_submodule("network"), pl_module.hparams["alpha"])

    def _set(self, trainer: Trainer, module: LightningModule, batch: int) -> float | tuple[float, ...]:
        stepped = batch - batch % trainer.accumulate_grad_batches
        progress = trainer.current_epoch + stepped / trainer.num_training_batches
        alpha = self.alpha_at(progress, module.hparams["alpha"])
        if alpha != self._alpha:
            set_alpha(module.get_submodule("network"), alpha)
            self._alpha = alpha
            torch.compiler.reset()  # the old code is of no more use, and dynamo stops compiling after a few
        return alpha
