"""Training with weights, gradients and momenta sharded over all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from octvideo.files import verify


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks, with the checkpoints of any other strategy.

    The model shards itself in `configure_model`. Lightning numbers an optimiser's parameters in the model's
    order, torch in that of the optimiser's groups, so with several groups momenta would be swapped. This follows torch.
    """

    def __init__(self) -> None:
        super().__init__(1, 1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shards over all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, in the form of `optimizer.state_dict()`; nothing on the others."""
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=options)
        if self.global_rank != 0:
            return {}
        groups = _names(self.model, optimizer)
        numbers = {name: number for number, name in enumerate(name for names in groups for name in names)}
        return {
            "state": {numbers[name]: state for name, state in named["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in names]}
                for group, names in zip(named["param_groups"], groups, strict=True)
            ],
        }

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and momenta into their shards; raises DamagedCheckpointError as `octvideo.files.verify`."""
        assert self.model is not None
        verify(checkpoint_path)
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            groups = _names(self.model, optimizer)
            names = [name for group in groups for name in group]
            named: dict[str, Any] = {
                "state": {names[number]: values for number, values in state["state"].items()},
                "param_groups": [
                    {**group, "params": inside} for group, inside in zip(state["param_groups"], groups, strict=True)
                ],
            }
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)
        return checkpoint


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Names of the parameters in each of an optimiser's groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
