"""Precise batch norm: statistics estimated for the weights as they are."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
            _mean(norm).copy_(mean)
            _variance(norm).copy_((squares - mean * values) / (count - 1).clamp(min=1))
    return int(clips)


@dataclass(frozen=True)
class Seen:
    """What a network's batch norms saw of some batches; see `match_statistics`."""

    statistics: dict[str, tuple[Tensor, Tensor]]  # running mean and variance (C,) by the batch norm's name
    sums: list[dict[str, list[Tensor]]]  # for each batch and batch norm, (3, C) of each call
    outputs: list[Any]  # of the network, for each batch


def watch(network: nn.Module, batches: Iterable[T], forward: Callable[[nn.Module, T], Any]) -> Seen:
    """Evaluates a network on batches, by forward(network, batch), and notes what `match_statistics` asks of it."""
    norms = _named(network)
    sums: list[dict[str, list[Tensor]]] = []
    known = {name: (_mean(norm).double(), _variance(norm).double()) for name, norm in norms.items()}
    with _looking(norms, lambda name, found: sums[-1][name].append(found)), evaluating(network, _device(network)):
        outputs = []
        for batch in batches:
            sums.append({name: [] for name in norms})
            outputs.append(forward(network, batch))
    return Seen(known, sums, outputs)


def match_statistics(
    model: nn.Module, original: nn.Module | Seen, batches: Iterable[T], forward: Callable[[nn.Module, T], Any]
) -> list[Any]:
    """Sets running statistics so that each channel leaves a batch norm with the mean and variance of the original's.

    Those of an octave network then fit its maps and still are those of the clips that the original was trained on, of
    which there may be none here: statistics of other clips, `estimate_statistics`, spoil even the original. A network
    that computes what the original does keeps its statistics up to rounding. Weights, training modes and frozen batch
    norms stay, and all does if a forward pass fails.

    Args:
        model: with the original's batch norms, under the same names and with channels in the same order.
        original: evaluated with its own statistics; or what `watch` saw of it on the same batches.
        batches: some that are like what the network is for, all of which count alike.
        forward: runs one of the two on a batch.

    Returns the model's output for each batch, from a pass in which its batch norms were matched on that batch alone.

    Raises UserError if the two have batch norms of different names.
    """
    batches = list(batches)
    seen = original if isinstance(original, Seen) else watch(original, batches, forward)
    norms = _named(model)
    if norms.keys() != seen.statistics.keys():
        raise UserError(
            f"batch norms of only one of the two: {', '.join(sorted(norms.keys() ^ seen.statistics.keys()))}"
        )
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    left: dict[str, Iterator[Tensor]] = {}

    def put(name: str, wanted: Tensor, found: Tensor) -> None:
        """Makes of `found` sums what the original's statistics make of `wanted` ones."""
        mean, var = seen.statistics[name]
        (wanted_mean, wanted_var), (found_mean, found_var) = _moments(wanted), _moments(found)
        ratio = torch.where(wanted_var > 1e-10 * var, found_var / wanted_var.clamp(min=1e-30), 1.0)
        _mean(norms[name]).copy_(found_mean - (wanted_mean - mean) * ratio.sqrt())
        _variance(norms[name]).copy_(var * ratio)

    def follow(name: str, found: Tensor) -> None:
        wanted = next(left[name], None)
        if wanted is None:
            raise UserError(f"{name} runs more often in a forward pass than the original's")
        put(name, wanted, found)  # so that what comes later sees what it will see
        before = totals.get(name)
        totals[name] = (wanted, found) if before is None else (before[0] + wanted, before[1] + found)

    outputs = []
    with contextlib.ExitStack() as undo, _looking(norms, follow), evaluating(model, _device(model)):
        for norm in norms.values():
            for values in (_mean(norm), _variance(norm)):
                undo.callback(values.copy_, values.clone())
        for batch, of_batch in zip(batches, seen.sums, strict=True):
            left.update({name: iter(sums) for name, sums in of_batch.items()})
            outputs.append(forward(model, batch))
        undo.pop_all()
    for name, sums in totals.items():
        put(name, *sums)
    return outputs


@contextlib.contextmanager
def _looking(norms: dict[str, _BatchNorm], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls look(name, sums) for the input of each batch norm."""
    with contextlib.ExitStack() as stack:
        for name, norm in norms.items():
            hook = norm.register_forward_pre_hook(lambda _, inputs, name=name: look(name, _sums(inputs[0])))
            stack.callback(hook.remove)
        yield


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
    if not (norms := list(_named(model).values())):
        raise UserError(f"{type(model).__name__} has no batch norm to estimate: all are frozen, or there are none")
    return norms


def _named(model: nn.Module) -> dict[str, _BatchNorm]:
    norms = {k: x for k, x in model.named_modules() if isinstance(x, _BatchNorm) and x.running_mean is not None}
    return {name: norm for name, norm in norms.items() if not isinstance(norm, FrozenBatchNorm)}


def _mean(norm: nn.Module) -> Tensor:
    return norm.get_buffer("running_mean")


def _variance(norm: nn.Module) -> Tensor:
    return norm.get_buffer("running_var")


def _device(model: nn.Module) -> torch.device:
    return next(itertools.chain(model.parameters(), model.buffers())).device


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    count, values, squares = sums
    mean = values / count
    return mean, (squares / count - mean.square()).clamp(min=0)


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
