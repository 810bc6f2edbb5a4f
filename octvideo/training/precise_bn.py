"""Precise batch norm: statistics estimated for the weights as they are."""

import contextlib
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
    """Sets the running statistics of batch norms to those of all given clips; returns the clips' number.

    They are the mean and the unbiased variance over all positions (Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
    2021), while batch norms normalise by each batch, as in training, and all else evaluates. Weights, training modes,
    torch's random state, frozen batch norms and those that nothing ran through stay as they are.

    In a process group all processes call it, and their batches count together: all skip a batch that is empty in one
    of them, and end with the first that has no more. Raises UserError without clips, or a batch norm to estimate.

    Args:
        model: on one device.
        batches: Tensors (B, ...) of clips, or objects whose `clips` are a Tensor (B, V, ...); B may be 0.
        forward: runs the model on one of them.
    """
    norms = _estimated(model)
    device = next(norms[0].buffers()).device
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64, device=device) for norm in norms}
    clips = torch.zeros(1, dtype=torch.float64, device=device)

    def add(norm: _BatchNorm, inputs: tuple[Any, ...]) -> None:
        sums[norm] += _sums(inputs[0])

    with evaluating(model, device) as stack:
        for norm in norms:
            stack.callback(setattr, norm, "track_running_stats", norm.track_running_stats)
            norm.training, norm.track_running_stats = True, False
            stack.enter_context(norm.register_forward_pre_hook(add))
        for batch in _in_step(batches, device):
            forward(batch)
            clips += _num_clips(batch)
    for total in (clips, *sums.values()) if distributed.is_initialized() else ():
        distributed.all_reduce(total)
    if clips == 0:
        raise UserError("batch-norm statistics need clips, got only batches that are empty (in one process at least)")
    for norm, (count, values, squares) in sums.items():
        if count.min() > 0:
            mean = values / count
            norm.get_buffer("running_mean").copy_(mean)
            norm.get_buffer("running_var").copy_((squares - mean * values) / (count - 1).clamp(min=1))
    return int(clips)


@contextlib.contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[contextlib.ExitStack]:
    """Evaluation mode, without gradients; training modes and torch's random state are restored after it."""
    devices = [device] if device.type == "cuda" else []
    eager = torch.compiler.set_stance("force_eager")  # compiled code would not call hooks
    with contextlib.ExitStack() as stack, eager, torch.no_grad(), torch.random.fork_rng(devices):
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        yield stack


def _estimated(model: nn.Module) -> list[_BatchNorm]:
    norms = [x for x in model.modules() if isinstance(x, _BatchNorm) and x.running_mean is not None]
    norms = [norm for norm in norms if not isinstance(norm, FrozenBatchNorm)]
    if not norms:
        raise UserError(f"{type(model).__name__} has no batch norm to estimate: all are frozen, or there are none")
    return norms


def _sums(x: Tensor | Octaves) -> Tensor:
    """(3, C) float64: the number of each channel's positions, the sum of their values and that of the squares."""
    if isinstance(x, Octaves):
        return join_by_parts(_sums(x.high), _sums(x.low), x.parts, 1)
    if x.shape[1] == 0:  # at alpha 1
        return x.new_zeros((3, 0), dtype=torch.float64)
    x = x if x.dtype == torch.float64 else x.float()
    # Not batch norm's own statistics: its kernel for channels last on CPUs is wrong by 1e-5, this one by 1e-7.
    var, mean = (y.double() for y in torch.var_mean(x, [0, *range(2, x.dim())], correction=0))
    return x.numel() // x.shape[1] * torch.stack((torch.ones_like(mean), mean, var + mean.square()))


def _num_clips(batch: Any) -> int:
    clips = getattr(batch, "clips", None)
    return len(batch) if clips is None else clips.shape[:2].numel()


def _in_step(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    """The batches that have clips in every process, while every process has batches."""
    for batch in itertools.chain(batches, [None]):
        state = torch.tensor(0 if batch is None else 1 if _num_clips(batch) == 0 else 2, device=device)
        if distributed.is_initialized():
            distributed.all_reduce(state, distributed.ReduceOp.MIN)
        if batch is None or state == 0:
            return
        if state == 2:
            yield batch


class PreciseBatchNorm(Callback):
    """Estimates batch-norm statistics before each validation and at the end of each training epoch.

    They are those of the weights that are validated and saved (Lightning's averaged ones if any), and of training clips
    without mixing: `num_batches` of each process, or an epoch's, as a function of the epoch, so that resuming is exact.
    """

    def __init__(self, num_batches: int = 200) -> None:
        if num_batches < 1:
            raise UserError(f"precise batch norm needs num_batches of at least 1, got {num_batches}")
        self.num_batches = num_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _estimated(pl_module)
        self._data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(self._data, "statistics_dataloader"):
            needed = "a data module with statistics_dataloader(epoch, num_batches)"
            raise UserError(f"precise batch norm needs {needed}, got {type(self._data).__name__}")
        self._estimated_at = -1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:  # before weights are swapped for it
            self._estimate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._estimated_at != trainer.global_step:  # not just before, for the validation
            self._estimate(trainer, pl_module)

    def _estimate(self, trainer: Trainer, module: LightningModule) -> None:
        start = perf_counter()
        loader = self._data.statistics_dataloader(trainer.current_epoch, self.num_batches)

        def batches() -> Iterator[Tensor]:  # lazy: the loader draws random numbers where their state is restored
            for batch in itertools.islice(loader, self.num_batches):
                # Not by way of Lightning's batch transfer, which would mix and augment the clips.
                yield batch.clips.flatten(0, 1).to(module.device)

        with contextlib.ExitStack() as stack:
            for average in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(average, WeightAveraging):
                    average._swap_models(module)
                    stack.callback(average._swap_models, module)
            stack.enter_context(trainer.precision_plugin.forward_context())
            elastic: Any = getattr(module, "elastic", None)
            for context in (
                [elastic.at(alpha) for alpha in elastic.options.alphas] if elastic else [contextlib.nullcontext()]
            ):
                with context:
                    clips = estimate_statistics(module, batches(), module)
        if self._estimated_at < 0 and trainer.is_global_zero:
            text = f"{perf_counter() - start:.0f} s an epoch for the statistics of {clips} clips"
            print(f"precise BN: {text}", flush=True)
        self._estimated_at = trainer.global_step
