"""Callbacks that Lightning lacks."""

import contextlib
import logging
import math
import os
import re
import traceback
from collections import defaultdict
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

from octvideo import stores
from octvideo.data.loading import Batch
from octvideo.data.module import VideoData
from octvideo.data.shared_memory import ENLARGE
from octvideo.errors import LoaderKilledError, NotFiniteError, UserError
from octvideo.stores import Traffic

log = logging.getLogger(__name__)
STATM = Path("/proc/self/statm")  # on Linux: this process's memory, in pages


class BadVideos(Callback):
    """Logs each undecodable video once, a summary of each epoch's by reason, and their number (`train/bad_videos`).

    Reasons that differ only in numbers count as one; `reasons` has this process's by path.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._epochs: defaultdict[str, tuple[int, list[tuple[str, str]]]] = defaultdict(lambda: (0, []))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any, **_: Any) -> None:
        stage, batch = _stage(trainer), rest[1]
        for path, reason in batch.bad:
            if path not in self.reasons:
                self.reasons[path] = reason
                log.warning("bad video %s: %s", path, reason)
        tried, bad = self._epochs[stage]
        self._epochs[stage] = tried + len(batch.paths) + len(batch.bad), [*bad, *batch.bad]
        name, count = f"{stage}/bad_videos", float(len(batch.bad))
        pl_module.log(name, count, on_step=False, on_epoch=True, batch_size=1, reduce_fx="sum", sync_dist=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = _stage(trainer)
        parts = [self._epochs.pop(stage, (0, []))] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, parts[0])
        bad = [video for _, part in parts for video in part]
        if not bad or not trainer.is_global_zero or trainer.sanity_checking:
            return
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for path, reason in bad:
            alike[re.sub(r"\d+(\.\d+)?", "0", reason)].append(f"{reason}, e.g. {path}")
        groups = sorted(alike.values(), key=len, reverse=True)
        lines = [f"{stage}: {len(bad)} of {sum(count for count, _ in parts)} videos could not be decoded"]
        lines += [f"{len(group)} x {group[0]}" for group in groups[:5]]
        if len(groups) > 5:
            lines.append(f"{sum(map(len, groups[5:]))} x other reasons")
        log.warning("\n  ".join(lines))

    on_validation_batch_end = on_test_batch_end = on_train_batch_end
    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end


class StoreTraffic(Callback):
    """Logs megabytes read from stores and repeated requests of each epoch, where videos come from stores."""

    def __init__(self) -> None:
        self._read: defaultdict[str, Traffic] = defaultdict(Traffic)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any, **_: Any) -> None:
        stage, batch = _stage(trainer), rest[1]
        self._read[stage] = self._read[stage].plus(batch.traffic)
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, VideoData) and stores.is_uri(data.read(f"{stage}_list").paths[0].rpartition("::")[2]):
            how: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1, "reduce_fx": "sum"}
            pl_module.log(f"{stage}/store_megabytes", batch.traffic.bytes / 1e6, **how, sync_dist=True)
            pl_module.log(f"{stage}/store_retries", float(batch.traffic.retries), **how, sync_dist=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        read = self._read.pop(stage := _stage(trainer), Traffic())
        if read.retries and trainer.is_global_zero and not trainer.sanity_checking:
            log.warning("%s: %d of %d requests to %s failed and were repeated", stage, *read[2:0:-1], read.store)

    on_validation_batch_end = on_test_batch_end = on_train_batch_end
    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end


def _stage(trainer: Trainer) -> str:
    assert trainer.state.stage is not None
    return str(trainer.state.stage.dataloader_prefix)  # train, val or test


class Throughput(Callback):
    """Logs seconds a batch for computing and for waiting, and clips a second; prints advice when their balance changes.

    After 22 steps it prints how long an epoch and the rest of the run will take, without validation. Logged rates are
    those of all processes, printed ones this process's.
    """

    WARMUP_STEPS = 5  # of an epoch, in which the loader starts: they count in the seconds printed, not in the rates
    SAMPLED = 7  # one GPU step in 7 is synchronised with and timed: no factor of usual numbers of accumulated batches
    _bound = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_seconds: list[float] = []
        self.on_train_epoch_start(trainer, pl_module)  # not called for an epoch resumed in the middle

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The seconds of each step with the wait before it, its clips, and where it is timed its seconds alone.
        self._steps: list[tuple[float, int, float | None]] = []
        self._traffic = Traffic()
        self._last = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        untimed = pl_module.device.type == "cuda" and len(self._steps) % self.SAMPLED
        self._start = None if untimed else _now(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        now = perf_counter() if self._start is None else _now(pl_module)
        seconds, self._last = now - self._last, now
        clips = rest[1].clips.shape[:2].numel()
        self._traffic = self._traffic.plus(rest[1].traffic)
        self._steps.append((seconds, clips, None if self._start is None else now - self._start))
        if len(self._first_seconds) < 22:  # from the end of a timed step to that of another
            self._first_seconds.append(seconds)
            if len(self._first_seconds) == 22:
                self._estimate(trainer, sum(self._first_seconds[8:]) / 14, rest[2] + 1)

    def _estimate(self, trainer: Trainer, step_seconds: float, num_done: int) -> None:
        num_steps, data, left = trainer.num_training_batches, getattr(trainer, "datamodule", None), math.inf
        if math.isinf(num_steps) or not trainer.is_global_zero:
            return
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            epochs = range(trainer.current_epoch, trainer.max_epochs)
            left = len(epochs) * num_steps - num_done
            if isinstance(data, VideoData) and data.multigrid is not None:  # epochs differ in steps of the same cost
                left = sum(map(data.batches_in_epoch, epochs)) - num_done
        if trainer.max_steps >= 0:
            left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        text = f"about {_duration(num_steps * step_seconds)} an epoch"
        text += "" if math.isinf(left) else f", {_duration(left * step_seconds)} to go"
        print(f"{text} ({step_seconds:.2g} s a step, {num_steps} steps an epoch)", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = self._steps[self.WARMUP_STEPS :]
        timed = [seconds for *_, seconds in steps if seconds is not None]
        seconds, clips = sum(step[0] for step in steps), sum(step[1] for step in steps)
        if not timed or clips == 0:
            return
        step_seconds = sum(timed) / len(timed)
        data_seconds = max(0.0, seconds / len(steps) - step_seconds)
        pl_module.log("train/step_seconds", step_seconds, sync_dist=True)
        pl_module.log("train/data_seconds", data_seconds, sync_dist=True)
        pl_module.log("train/clips_per_second", clips / seconds, reduce_fx="sum", sync_dist=True)
        model_rate, total = _short(clips / len(steps) / step_seconds), sum(step[0] for step in self._steps)
        waited = f"{max(0.0, total - len(self._steps) * step_seconds):.0f} of {total:.0f} s waited for clips"
        bound, advice = "compute", f"the model takes {model_rate} clips/s and the loader keeps up ({waited})"
        if data_seconds > 0.1 * (data_seconds + step_seconds):
            workers = getattr(trainer.train_dataloader, "num_workers", 0)
            bound, rate = "loader", f"{_short(clips / seconds)} clips/s from {workers} workers"
            cure = "raise data.num_workers, or re-encode the videos with tools/prepare_data.py --reencode"
            advice = f"{rate}, the model takes {model_rate} ({waited}): {cure}"
            if self._traffic.seconds > 0.5 * total * max(1, workers):  # most of the workers' time
                _, requests, retries, size, waiting = self._traffic
                bound, speed = "data", f"{self._traffic.store} gives {size / 1e6 / waiting:.1f} MB/s a worker"
                counts = f"{requests} requests, {retries} of them repeated"
                cure = "raise data.num_workers, or keep what is read on this machine by --data.cache DIR"
                advice = f"{speed} ({counts}), {rate}, the model takes {model_rate} ({waited}): {cure}"
        if trainer.is_global_zero and bound != self._bound:
            print(f"{bound}-bound: {advice}", flush=True)
        self._bound = bound


def _now(module: LightningModule) -> float:
    """The time once the device is done."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return perf_counter()


def _short(rate: float) -> str:
    """Three digits, no exponent."""
    return f"{float(f'{rate:.3g}'):.10g}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if (number := seconds / length) >= 2:
            return f"{number:.1f} {unit}" if number < 9.95 else f"{number:.0f} {unit}"
    return f"{seconds:.0f} s"


class MovingAverage(WeightAveraging):
    """An exponential moving average of the weights, of which step n keeps min(decay, (1 + n) / (10 + n)).

    By the decay alone (in (0, 1)), the random initial weights would count for 1 / (1 - decay) steps.
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
            torch._foreach_lerp_(averaged, current, 1 - kept)  # exact where both are equal, as frozen weights are

        super().__init__(multi_avg_fn=average)


class Memory(Callback):
    """Logs each epoch's `train/memory_gib`, of the process with most: on a GPU the tensors' peak, else at the end."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    on_train_epoch_start = on_train_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(pl_module.device)
        elif STATM.is_file():
            held = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        else:
            return
        pl_module.log("train/memory_gib", held / 2**30, reduce_fx="max", sync_dist=True)


class FiniteLoss(Callback):
    """Ends the run at a loss that is not finite, before any weight changes, and logs `train/gradient_norm`.

    The norm, of all gradients before clipping, must be finite too, except in 16-mixed, whose scaler skips such steps.
    Checking synchronises with a GPU, some milliseconds a step; a step later it would be free, but the weights lost.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._paths, self._batch_index = batch.paths, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not loss.isfinite().all():  # in 16-mixed it is the scaled one
            self._end(trainer, "loss", loss.item())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [x.grad for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval > 0 and (trainer.global_step + 1) % interval == 0:
            pl_module.log("train/gradient_norm", norm)
        if getattr(trainer.precision_plugin, "scaler", None) is None and not norm.isfinite():
            self._end(trainer, "norm of the gradients", norm.item())

    def _end(self, trainer: Trainer, what: str, value: float) -> None:
        raise NotFiniteError(
            f"the {what} is {value} in step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1}, batch "
            f"{self._batch_index + 1}, process {trainer.global_rank}): the run ends before it changes the weights; "
            f"lower model.learning_rate, or look at the batch's videos: {', '.join(self._paths)}; {_cure(trainer)}"
        )


def _cure(trainer: Trainer) -> str:
    """How to resume a run: from `last_good` of RunCheckpoints."""
    paths = [getattr(callback, "last_good", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    path = next(filter(None, paths), None)
    return f"resume from {path} with --ckpt_path last" if path else "there is no checkpoint to resume from"


LESS = "lower data.num_workers or data.prefetch_batches"
LACKS = {  # what torch or the system says of a loader process: what happened, and the cure
    "signal: Killed": f"was killed, probably by the system for lack of memory: {LESS}",
    "signal: Bus error": f"found no more shared memory: {ENLARGE}, or {LESS}",
    "allocate shared memory": f"found no more shared memory: {ENLARGE}, or {LESS}",
    "allocate memory": f"or the training itself found no more memory: lower data.batch_size, or {LESS}",
    "oo many open files": f"could open no more files: raise `ulimit -n`, or {LESS}",
}


@contextlib.contextmanager
def naming_killed_loaders(trainer: Trainer | None) -> Iterator[None]:
    """Turns errors of a dead or starved loader process into a LoaderKilledError: why, and how to resume training."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        text = f"{error} {error.__cause__}"
        why = next((why for words, why in LACKS.items() if words in text), None)
        lost = "resource_sharer" in "".join(traceback.format_exception(error))  # tensors it no longer hands over
        if why is None and not text.startswith("DataLoader worker") and (isinstance(error, RuntimeError) or not lost):
            raise
        signal = re.search(r"killed by signal: ([\w ]+)", text)
        crash = LACKS["signal: Killed"] if signal is None else f"crashed ({signal[1]}): try another data.backend"
        cure = "" if trainer is None else f"; {_cure(trainer)}"
        raise LoaderKilledError(f"a loader process {why or crash}{cure}") from error
