"""Batch norm for training at scale: of all processes, of sub-batches, frozen, and with precise statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.errors import UserError
from octvideo.layers.normalization import FrozenBatchNorm
from octvideo.layers.octaves import Octaves
from octvideo.layers.parts import join_by_parts

T = TypeVar("T")


def estimate_statistics(model: nn.Module, batches: Iterable[T], forward: Callable[[T], Any]) -> int:
    """Sets the running statistics of batch norms to those of all given clips: precise batch norm.

    The running averages of training lag behind the weights and forget; these are the mean and the (unbiased) variance
    over all cells of all clips, for the weights as they are (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021).
    Batch norms normalise with each batch's own statistics meanwhile, as in training; all else is in evaluation mode.
    Weights, `num_batches_tracked`, training modes and torch's random state stay, and so do frozen batch norms and those
    that nothing ran through.

    In a process group every process has to call it; the statistics are those of all processes' batches. One that ends
    before the others' ends the estimate, and where a process has an empty batch all skip theirs: layers that
    communicate stay in step.

    Args:
        model: whose batch norms are estimated, on one device.
        batches: Tensors (B, ...) of clips, or what has a Tensor (B, V, ...) of them as its attribute `clips`, such as a
            data loader's batches; B may be 0.
        forward: runs the model on one of them.

    Returns:
        The number of clips, in all processes.

    Raises:
        ValueError: there are no clips, or no batch norm to estimate.
    """
    norms = _estimated(model)
    device = norms[0].running_mean.device  # type: ignore[union-attr]
    modes = {module: module.training for module in model.modules()}
    tracked = [norm.track_running_stats for norm in norms]
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64, device=device) for norm in norms}

    def add(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        sums[norm] += _sums(inputs[0])  # type: ignore[index]

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    clips = torch.zeros(1, dtype=torch.float64, device=device)
    generators = [device] if device.type == "cuda" else []
    try:
        model.eval()
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        # Code that was compiled before would not call the hooks.
        stance = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), torch.random.fork_rng(generators), stance:
            for batch in _in_step(batches, device):
                forward(batch)
                clips += _num_clips(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for norm, tracks in zip(norms, tracked, strict=True):
            norm.track_running_stats = tracks
    totals = torch.cat(list(sums.values()), 1)
    if _in_parallel():
        distributed.all_reduce(totals)
        distributed.all_reduce(clips)
    if clips == 0:
        raise UserError("batch-norm statistics need clips, got only batches that are empty (in one process at least)")
    for norm, (cells, values, squares) in zip(norms, totals.split([n.num_features for n in norms], 1), strict=True):
        if cells.min() > 0:
            mean = values / cells
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_((squares - mean * values) / (cells - 1).clamp(min=1))  # type: ignore[union-attr]
    return int(clips)


def _estimated(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that have statistics of their own to estimate."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in norms if not isinstance(norm, FrozenBatchNorm) and norm.running_mean is not None]
    if not norms:
        raise UserError(
            f"{type(model).__name__} has no batch norm whose statistics could be estimated: they are frozen, or there "
            "is none"
        )
    return norms


def _sums(x: Tensor | Octaves) -> Tensor:
    """(3, C) float64: for each channel the number of cells, the sum of their values and that of the squares."""
    if isinstance(x, Octaves):
        return join_by_parts(_sums(x.high), _sums(x.low), x.parts, 1)
    if x.shape[1] == 0:  # at alpha 1
        return x.new_zeros((3, 0), dtype=torch.float64)
    precise = x if x.dtype == torch.float64 else x.float()
    # Not batch norm's own figures: its kernel for channels last on CPUs is wrong by 1e-5, and this by 1e-7.
    var, mean = torch.var_mean(precise, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    var, mean = var.double(), mean.double()
    cells = x.shape[0] * x.shape[2:].numel()
    return cells * torch.stack((torch.ones_like(mean), mean, var + mean.square()))


def _in_parallel() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _num_clips(batch: Any) -> int:
    clips = getattr(batch, "clips", None)
    return len(batch) if clips is None else clips.shape[:2].numel()


def _in_step(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    """The batches that have clips in every process, as long as every process has batches."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        state = torch.tensor(0 if batch is None else 1 if _num_clips(batch) == 0 else 2, device=device)
        if _in_parallel():
            distributed.all_reduce(state, distributed.ReduceOp.MIN)
        if state == 0:
            return
        if state == 2:
            yield batch  # type: ignore[misc]


class PreciseBatchNorm(Callback):
    """Estimates the statistics of batch norms before each validation and at the end of each training epoch.

    They are those of the weights that are evaluated: with Lightning's weight averaging (EMA), the averaged ones, and
    stand in the checkpoint's `state_dict`. The clips are training clips without mixing, which the data module draws as
    a function of the epoch, so that a resumed run estimates the same.

    Args:
        num_batches: training batches of each process, fewer in a shorter epoch.

    Raises:
        ValueError: num_batches below 1; in fit, a data module without `statistics_dataloader(epoch, num_batches)`, or a
            network without a batch norm to estimate.
    """

    def __init__(self, num_batches: int = 200) -> None:
        if num_batches < 1:
            raise UserError(f"precise batch norm needs num_batches of at least 1, got {num_batches}")
        self.num_batches = num_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is something to estimate, and from what."""
        if stage != "fit":
            return
        _estimated(pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "statistics_dataloader"):
            raise UserError(
                "precise batch norm needs a data module with statistics_dataloader(epoch, num_batches), got "
                f"{type(data).__name__}"
            )
        self._estimated_at = -1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimates for the validation in fit, before weights are swapped for it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._estimate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimates for the checkpoint, unless the validation has just done so."""
        if self._estimated_at != trainer.global_step:
            self._estimate(trainer, pl_module)

    def _estimate(self, trainer: Trainer, module: LightningModule) -> None:
        start = perf_counter()
        loader = trainer.datamodule.statistics_dataloader(trainer.current_epoch, self.num_batches)  # type: ignore[attr-defined]

        def batches() -> Iterator[Tensor]:  # starts the loader, which draws random numbers, where those are set back
            for batch in itertools.islice(loader, self.num_batches):
                # Not by way of Lightning's batch transfer, which would mix and augment the clips.
                yield batch.clips.flatten(0, 1).to(module.device)

        averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
        for average in averages:
            average._swap_models(module)
        try:
            with trainer.precision_plugin.forward_context():
                clips = estimate_statistics(module, batches(), module)
        finally:
            for average in averages:
                average._swap_models(module)
        self._estimated_at = trainer.global_step
        if trainer.is_global_zero:
            print(f"precise BN: statistics of {clips} clips in {perf_counter() - start:.0f} s", flush=True)
