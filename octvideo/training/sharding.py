"""Training with weights, gradients and momenta sharded over all ranks."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from octvideo.models.checkpoint import read_training_checkpoint


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks, with the checkpoints of any other strategy.

    Lightning numbers an optimiser's parameters in the model's order, torch in that of the optimiser's groups, so with
    several groups momenta would be swapped: this follows torch. The model shards itself in `configure_model`.
    """

    def __init__(self) -> None:
        super().__init__(1, 1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole `optimizer.state_dict()` on rank 0; nothing on the others."""
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=options)
        if self.global_rank != 0:
            return {}
        groups = _names(self.model, optimizer)
        numbers = {name: number for number, name in enumerate(name for names in groups for name in names)}
        both = zip(named["param_groups"], groups, strict=True)
        return {
            "state": {numbers[name]: state for name, state in named["state"].items()},
            "param_groups": [{**group, "params": [numbers[name] for name in names]} for group, names in both],
        }

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        checkpoint = read_training_checkpoint(checkpoint_path).content  # verified
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            groups = _names(self.model, optimizer)
            names = [name for group in groups for name in group]
            values = {names[number]: values for number, values in state["state"].items()}
            both = zip(state["param_groups"], groups, strict=True)
            given = [{**group, "params": inside} for group, inside in both]
            named: dict[str, Any] = {"state": values, "param_groups": given}
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)
        return checkpoint


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The parameters' names in each of an optimiser's groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
