"""Callbacks that Lightning lacks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from octvideo.errors import LoaderKilledError, NotFiniteError, UserError

log = logging.getLogger(__name__)
STATM = Path("/proc/self/statm")  # of Linux: this process's memory, in pages
WORKER = "DataLoader worker"  # the beginning of torch's errors for a loader process that died


class BadVideos(Callback):
    """Counts the videos that could not be decoded, and logs each of them once, with its path and reason.

    An epoch with bad videos ends with a summary: how many there were in all processes, by reason, the commonest first.
    Reasons that differ in numbers only count as one.

    Attributes:
        reasons: reason by path, of all bad videos that this process has met.
    """

    REASONS = 5  # in a summary

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._tried: Counter[str] = Counter()
        self._bad: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the videos that were replaced by others."""
        self._note(pl_module, batch, "train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Notes the videos that could not be validated."""
        self._note(pl_module, batch, "val")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Notes the videos that could not be tested."""
        self._note(pl_module, batch, "test")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sums up the training epoch."""
        self._sum_up(trainer, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sums up the validation."""
        self._sum_up(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sums up the test."""
        self._sum_up(trainer, "test")

    def _note(self, module: LightningModule, batch: Any, stage: str) -> None:
        for path, reason in batch.bad:
            if path not in self.reasons:
                self.reasons[path] = reason
                log.warning("bad video %s: %s", path, reason)
        self._tried[stage] += len(batch.paths) + len(batch.bad)
        self._bad[stage] += [(path, reason) for path, reason in batch.bad]
        module.log(
            f"{stage}/bad_videos",
            float(len(batch.bad)),
            on_step=False,
            on_epoch=True,
            reduce_fx="sum",
            sync_dist=True,
            batch_size=1,
        )

    def _sum_up(self, trainer: Trainer, stage: str) -> None:
        parts: list[Any] = [(self._tried.pop(stage, 0), self._bad.pop(stage, []))]
        if trainer.world_size > 1:
            parts = parts * trainer.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        bad = [video for _, part in parts for video in part]
        if not bad or not trainer.is_global_zero or trainer.sanity_checking:
            return
        alike: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for path, reason in bad:
            alike[re.sub(r"\d+(\.\d+)?", "0", reason)].append((path, reason))
        groups = sorted(alike.values(), key=len, reverse=True)
        lines = [f"{len(group)} x {group[0][1]}, e.g. {group[0][0]}" for group in groups[: self.REASONS]]
        if len(groups) > self.REASONS:
            lines.append(f"{sum(map(len, groups[self.REASONS :]))} x other reasons")
        tried = sum(count for count, _ in parts)
        log.warning("\n  ".join([f"{stage}: {len(bad)} of {tried} videos could not be decoded", *lines]))


class Throughput(Callback):
    """Measures what a training epoch spends on data and on computing, and prints a line of advice after it.

    After the first 22 steps of a fit it also says how long an epoch and the rest of the run will take, validation not
    counted: "about 12 min an epoch, 20 h to go (1.9 s a step, 380 steps an epoch)". A step is that of one batch.

    Logs, for an average step, `train/step_seconds` (forward, backward, optimiser), `train/data_seconds` (all the time
    from its end until the next batch is on the device: 0 if the loader keeps up) and `train/clips_per_second` (of both
    together, in all processes). The printed rates are those of one process.

    A GPU works on while Python goes ahead, so there a step's end is waited for in one of `SAMPLED` steps only, and the
    rest of the time an average step takes is data time. The first steps of an epoch, in which the loader starts, count
    in the seconds printed and not in the rates; validation during the epoch counts nowhere.
    """

    WARMUP_STEPS = 5
    SAMPLED = 7  # shares no factor with the usual numbers of accumulated batches
    LOADER_BOUND = 0.1  # share of the time waited for data
    ESTIMATED = 8, 22  # steps of a fit from whose end to whose end its length is estimated: timed ones

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting for the estimate, and for an epoch that goes on in the middle: it has no start."""
        self._fit_steps = 0
        self._fit_seconds = 0.0
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        self._num_steps = self._num_clips = self._num_timed = 0
        self._step_seconds = self._seconds = self._warmup_seconds = 0.0
        self._last = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves out the validation."""
        self._last = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock if this step is timed."""
        on_gpu = pl_module.device.type == "cuda"
        self._timed = not on_gpu or self._num_steps % self.SAMPLED == 0
        if self._timed:
            self._start = _now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds up."""
        now = _now(pl_module) if self._timed else perf_counter()
        self._fit_steps += 1
        first, last = self.ESTIMATED
        if first < self._fit_steps <= last:
            self._fit_seconds += now - self._last
        if self._fit_steps == last:
            self._estimate(trainer, self._fit_seconds / (last - first), batch_idx + 1)
        self._num_steps += 1
        if self._num_steps <= self.WARMUP_STEPS:
            self._warmup_seconds += now - self._last
        else:
            self._seconds += now - self._last
            self._num_clips += batch.clips.shape[:2].numel()
            if self._timed:
                self._step_seconds += now - self._start
                self._num_timed += 1
        self._last = now

    def _estimate(self, trainer: Trainer, step_seconds: float, num_done: int) -> None:
        """Prints how long it will take; nothing of an endless epoch."""
        num_steps = trainer.num_training_batches
        if math.isinf(num_steps) or not trainer.is_global_zero:
            return
        left = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            left = (trainer.max_epochs - trainer.current_epoch) * num_steps - num_done
            data: Any = getattr(trainer, "datamodule", None)
            if getattr(data, "multigrid", None) is not None:  # each epoch has another number, of steps alike in cost
                left = sum(map(data.batches_in_epoch, range(trainer.current_epoch, trainer.max_epochs))) - num_done
        if trainer.max_steps >= 0:
            left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        to_go = "" if math.isinf(left) else f", {_duration(left * step_seconds)} to go"
        print(
            f"about {_duration(num_steps * step_seconds)} an epoch{to_go} "
            f"({step_seconds:.2g} s a step, {num_steps} steps an epoch)",
            flush=True,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs, and prints one line; nothing after an epoch of the first steps or without clips."""
        if self._num_timed == 0 or self._num_clips == 0:
            return
        num_steps = self._num_steps - self.WARMUP_STEPS
        step_seconds = self._step_seconds / self._num_timed
        data_seconds = max(0.0, self._seconds / num_steps - step_seconds)
        clips_per_second = self._num_clips / self._seconds
        pl_module.log("train/step_seconds", step_seconds, sync_dist=True)
        pl_module.log("train/data_seconds", data_seconds, sync_dist=True)
        pl_module.log("train/clips_per_second", clips_per_second, reduce_fx="sum", sync_dist=True)
        if not trainer.is_global_zero:
            return
        model_rate = _short(self._num_clips / num_steps / step_seconds)
        total = self._warmup_seconds + self._seconds
        waited = f"{max(0.0, total - self._num_steps * step_seconds):.0f} of {total:.0f} s waited for clips"
        if data_seconds <= self.LOADER_BOUND * (data_seconds + step_seconds):
            advice = f"compute-bound: the model takes {model_rate} clips/s and the loader keeps up ({waited})"
        else:
            num_workers = getattr(trainer.train_dataloader, "num_workers", 0)
            advice = (
                f"loader-bound: {_short(clips_per_second)} clips/s from {num_workers} workers, the model takes "
                f"{model_rate} ({waited}): raise data.num_workers, or re-encode the videos with "
                "tools/prepare_data.py --reencode"
            )
        print(advice, flush=True)


def _now(module: LightningModule) -> float:
    """The time at which everything that the device was told to do is done."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return perf_counter()


def _short(rate: float) -> str:
    """Three digits, never with an exponent."""
    return f"{float(f'{rate:.3g}'):.10g}"


def _duration(seconds: float) -> str:
    """Two digits or so, in the unit that suits them."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        number = seconds / length
        if number >= 2:
            return f"{number:.1f} {unit}" if number < 9.95 else f"{number:.0f} {unit}"
    return f"{seconds:.0f} s"


class MovingAverage(WeightAveraging):
    """Lightning's averaged weights, an exponential moving average that is quick at first.

    After n steps it keeps min(decay, (1 + n) / (10 + n)) of what it was: with the decay alone, the random weights of
    the start would count for 1 / (1 - decay) steps, which short trainings do not have.

    Args:
        decay: share of the average that a step keeps, in (0, 1).

    Raises:
        ValueError: a decay out of its range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"ema_decay must lie between 0 and 1, got {decay}")

        @torch.no_grad()
        def average(averaged: list[Tensor], current: list[Tensor], steps: Tensor | int) -> None:
            if not averaged[0].is_floating_point():  # counters
                torch._foreach_copy_(averaged, current)
                return
            kept = min(decay, (1 + int(steps)) / (10 + int(steps)))
            torch._foreach_lerp_(averaged, current, 1 - kept)  # exact where both are the same, as frozen weights are

        super().__init__(multi_avg_fn=average)


class Memory(Callback):
    """Logs `train/memory_gib` after every training epoch: of the process that took most, in GiB (2^30 bytes).

    On a GPU this is the most that tensors took at once in the epoch. On a CPU it is the memory that the process holds
    at the epoch's end, without its loader processes; only Linux tells it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts measuring; an epoch that goes on in the middle has no start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts measuring."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs."""
        if pl_module.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(pl_module.device)
        elif STATM.is_file():
            held = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        else:
            return
        pl_module.log("train/memory_gib", held / 2**30, reduce_fx="max", sync_dist=True)


class FiniteLoss(Callback):
    """Ends the run where the loss is not finite, before any weight changes, and logs `train/gradient_norm`.

    The norm is the 2-norm of all gradients before clipping, logged every trainer.log_every_n_steps. It must be finite
    too, except in 16-mixed, whose scaler skips such steps and goes on with a smaller scale.

    Every loss is looked at between its forward and its backward pass, and every norm before the optimiser's step, so
    that a GPU is waited for twice a step: Python cannot prepare what follows ahead, which costs a GPU some
    milliseconds. To look a step later would be free, but by then the weights are lost and may be in a checkpoint.

    Where one of several processes ends like this, the launcher ends the others.

    Raises:
        NotFiniteError: names step, epoch, loss, the videos of this process's batch, and the last good checkpoint: what
            a callback of the trainer's has in its attribute `last_good`, a Path or None.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers what the batch is made of."""
        self._paths: list[str] = batch.paths
        self._batch_index = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Checks the loss; in 16-mixed it is the scaled one."""
        if not loss.isfinite().all():
            self._end(trainer, "loss", loss.item())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs and checks the norm of the gradients, which are unscaled by now."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([x.grad for x in parameters if x.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval > 0 and (trainer.global_step + 1) % interval == 0:
            pl_module.log("train/gradient_norm", norm)
        if getattr(trainer.precision_plugin, "scaler", None) is None and not norm.isfinite():
            self._end(trainer, "norm of the gradients", norm.item())

    def _end(self, trainer: Trainer, what: str, value: float) -> None:
        raise NotFiniteError(
            f"the {what} is {value} in step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1}, batch "
            f"{self._batch_index + 1}, process {trainer.global_rank}): the run ends before its weights take that in; "
            f"lower model.learning_rate, or look at the batch's videos: {', '.join(self._paths)}; {_way_on(trainer)}"
        )


def _way_on(trainer: Trainer) -> str:
    """How to go on with a run, in words."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    last_good = next((path for callback in callbacks if (path := getattr(callback, "last_good", None))), None)
    if last_good is None:
        return "there is no checkpoint to go on from"
    return f"the run goes on from {last_good} with --ckpt_path last"


@contextlib.contextmanager
def naming_killed_loaders(trainer: Trainer) -> Iterator[None]:
    """Turns torch's error for a loader process that died into one that says why it may have, and how to go on.

    Args:
        trainer: whose fit or test runs inside; `last_good` of its callbacks is named.

    Raises:
        LoaderKilledError: in place of torch's RuntimeError, or of the OSError or EOFError with which it gives up the
            tensors that the process had made; other errors pass.
    """
    try:
        try:
            yield
        except (OSError, EOFError) as error:
            # Tensors of a process that has just died: there is nobody to hand them over.
            if "resource_sharer" not in "".join(traceback.format_exception(error)):
                raise
            raise RuntimeError(f"{WORKER} exited unexpectedly") from error
    except RuntimeError as error:
        if not str(error).startswith(WORKER):
            raise
        signal = re.search(r"killed by signal: ([\w ]+)", f"{error} {error.__cause__}")
        name = "Killed" if signal is None else signal[1]
        why = {
            "Killed": "was killed, probably by the system for lack of memory: lower data.num_workers or "
            "data.prefetch_batches",
            "Bus error": "found no more shared memory: enlarge /dev/shm, or lower data.num_workers or "
            "data.prefetch_batches",
        }.get(name, f"crashed ({name}): another data.backend may not")
        raise LoaderKilledError(f"a loader process {why}; {_way_on(trainer)}") from error


class EpochLines(Callback):
    """Prints one line an epoch, for log files, in which a progress bar cannot be read.

    An epoch that a resumed run starts in the middle says from which batch on its figures are.
    """

    def __init__(self) -> None:
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the first batch."""
        self._first: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers where the epoch starts."""
        if self._first is None:
            self._first = batch_idx

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers that this epoch has been validated: Lightning keeps the figures of the last one that was."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what was measured in the epoch."""
        figures = [
            f"{name} {value.item():.4g}"
            for name, value in sorted(trainer.callback_metrics.items())
            if name[-5:] not in ("_step", "epoch") and (self._validated or not name.startswith("val/"))
        ]
        epoch = f"epoch {trainer.current_epoch + 1}"
        if trainer.max_epochs != -1:  # which trains until max_steps
            epoch += f"/{trainer.max_epochs}"
        if self._first:
            epoch += f" from batch {self._first + 1}"
        self._validated, self._first = False, None
        if trainer.is_global_zero:
            print(f"{epoch}  {'  '.join(figures)}", flush=True)
