"""Which parameters an optimiser changes, how fast, and with which weight decay."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim import Optimizer

from octvideo.errors import UserError

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]  # in YAML {class_path, init_args}
SchedulerCallable = Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler]


def parameter_groups(
    network: nn.Module, weight_decay: float | None, no_decay: Sequence[str] = (), layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of trained parameters: weights with decay, then vectors and those whose names `no_decay` finds, without.

    With layer_decay below 1 each layer has its two groups, whose "lr_scale" is layer_decay to the power of the layers
    behind it; a layer is what parameters' names start with up to their first number: blocks.3, layer1.0, stem. A
    weight_decay of None is left to the optimiser. Raises UserError for an invalid regex or a number out of its range.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"model.layer_decay must lie in (0, 1], got {layer_decay}")
    try:
        patterns = [re.compile(pattern) for pattern in no_decay]
    except re.error as error:
        raise UserError(f"model.no_decay {list(no_decay)} has an invalid regex: {error}") from error
    layers: dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        match = re.match(r".*?\.\d+(?=\.)", name) if layer_decay < 1 else None
        layer = match[0] if match else name.split(".")[0] if layer_decay < 1 else ""
        groups = layers.setdefault(layer, ([], []))
        if parameter.requires_grad:
            spared = parameter.dim() <= 1 or any(pattern.search(name) for pattern in patterns)
            groups[spared].append(parameter)
    found: list[dict[str, Any]] = []
    for index, (weights, others) in enumerate(layers.values()):
        scale = {} if layer_decay == 1 else {"lr_scale": layer_decay ** (len(layers) - 1 - index)}
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        found += [{"params": weights, **decay, **scale}, {"params": others, "weight_decay": 0, **scale}]
    # The default's two groups stay, empty or not, as checkpoints have them.
    return found if layer_decay == 1 else [group for group in found if group["params"]]


def build_optimizer(make: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimiser of the user's; UserError where it does not take the groups."""
    try:
        return make(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.optimizer: {error}") from error


class ScheduleFree(LightningModule):
    """A module whose optimiser may be schedule-free (Defazio et al., 2024): one that averages weights itself.

    Such an optimiser trains other weights than those to use; validation sees the latter, and a checkpoint has both.
    """

    def _schedule_free(self) -> Any:
        """The optimiser, if it has modes for training and evaluation."""
        found = self.trainer.optimizers if self._trainer else []
        return next((optimizer for optimizer in found if callable(getattr(optimizer, "train", None))), None)

    def on_validation_start(self) -> None:
        if (optimizer := self._schedule_free()) is not None:
            if any(isinstance(callback, WeightAveraging) for callback in getattr(self.trainer, "callbacks", ())):
                raise UserError("ema_decay: a schedule-free optimiser averages weights itself")
            optimizer.eval()

    def on_validation_end(self) -> None:
        if (optimizer := self._schedule_free()) is not None:
            optimizer.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        optimizer = self._schedule_free()
        if optimizer is None:
            return
        current = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        optimizer.eval()
        checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        optimizer.train()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(current[name])
        checkpoint["training_weights"] = current

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training and "training_weights" in checkpoint:
            checkpoint["state_dict"] |= checkpoint["training_weights"]
