"""Callbacks that Lightning lacks."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


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


class EpochLines(Callback):
    """Prints one line an epoch, for log files, in which a progress bar cannot be read."""

    def __init__(self) -> None:
        self._validated = False

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
        self._validated = False
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(figures)}", flush=True)
