"""Checkpoints that are never lost: written whole or not at all, verified when read, kept until a newer one is safe."""

import copy
import io
import logging
import math
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.nn.parallel import DistributedDataParallel

from octvideo.errors import DamagedCheckpointError, StoreError, UserError
from octvideo.files import lock, point_to, replacing, seal, verify
from octvideo.models.weights import read_checkpoint
from octvideo.stores import Mirror

log = logging.getLogger(__name__)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the run stopped on a signal and waits to be started again
LOCK_SECONDS = 60.0  # for processes to die whose torchrun was killed; a new torchrun's must not fail until then


class Preempted(SystemExit):
    """Training stopped on a signal; resume from `path` (None: nothing was saved yet)."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.path = path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes files of torch.save that appear when they are whole, with a checksum; refuses to load a damaged one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError(f"checkpoints are saved without storage_options, got {storage_options!r}")
        archive = io.BytesIO()  # where a write fails, torch.save hides the OSError behind a RuntimeError without errno
        torch.save(checkpoint, archive)
        temporary = Path(f"{path}.tmp")
        with archive.getbuffer() as content, replacing(Path(path), temporary), temporary.open("wb") as file:
            file.writelines([content, seal(content)])

    def load_checkpoint(self, path: str | Path, *options: Any, **named: Any) -> dict[str, Any]:
        verify(path)
        return super().load_checkpoint(path, *options, **named)


def newest_intact(folder: str | Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The intact step checkpoint with the most steps, and the damaged ones with more, and why; or UserError."""
    damaged: list[tuple[Path, str]] = []
    for _, path in _step_files(Path(folder)):
        try:
            verify(path)
            return path, damaged
        except DamagedCheckpointError as error:
            damaged.append((path, str(error)))
    reasons = "; ".join(reason for _, reason in damaged) or "no step_*.ckpt there"
    best = Path(folder) / "best.ckpt"
    way = f"; {best} may be intact: --ckpt_path {best}" if best.exists() else ""
    raise UserError(f"{folder} holds no checkpoint to resume from: {reasons}{way}")


@dataclass(eq=False)
class RunCheckpoints(Checkpoint):
    """Saves all that a run needs to resume bit for bit, often enough that no kill costs more than every_n_steps.

    step_00000120.ckpt, named after its optimiser steps, is saved every `every_n_steps` (None: never), before each
    validation and after that at the end of an epoch, which Lightning would skip if it resumed from an earlier file.
    last.ckpt links to the newest, best.ckpt is another name of the best at the end of an epoch. A run that stopped
    within an epoch (max_steps, early stopping) can be prolonged exactly.

    SIGTERM and SIGUSR1, sent to any process, save after the current optimiser step, or end a validation at once, and
    raise Preempted in all processes. A save that fails (the disk is full) is a warning: no older file is deleted, and
    the next save tries again; if it is the last, fit ends with an OSError. Raises UserError for a folder in use, and
    for processes that resume from different files.
    """

    folder: Path  # of one run; files newer than a step that it went back to are deleted there
    every_n_steps: int | None = None
    keep: int = 3  # newest step checkpoints
    monitor: str | None = "val/top1"  # metric whose highest finite value makes best.ckpt; None: no best.ckpt
    start: str | Path | None = None  # the file that this process resumes from
    mirror: Mirror | None = None  # of a run's folder in a store, which each save reaches before training goes on

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if min(self.keep, 1 if self.every_n_steps is None else self.every_n_steps) < 1:
            raise UserError(f"every_n_steps and keep must be at least 1, got {self.every_n_steps} and {self.keep}")
        self.last_good: Path | None = None  # the newest that is safe, or the one that training resumed from
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._told_to_stop = self._due = False
        self._step_validated: int | None = None
        self._failure: str | None = None
        self._position: tuple[int, dict[str, Any]] | None = None
        self._lock: IO[bytes] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage != "fit":
            return
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            deadline = time.monotonic() + (LOCK_SECONDS if torch.distributed.is_torchelastic_launched() else 0)
            while (found := lock(self.folder / ".lock")) is None and time.monotonic() < deadline:
                time.sleep(0.5)
            self._lock = found
            for path in self.folder.glob("*.ckpt.tmp") if self._lock is not None else ():
                path.unlink()
        if not trainer.strategy.broadcast(self._lock is not None):
            raise UserError(f"another run is writing to {self.folder}: choose another folder, or wait for its end")
        start = "a start from scratch" if self.start is None else Path(self.start).name
        if start != (first := trainer.strategy.broadcast(start)):
            got = f"process {trainer.global_rank} resumes from {start}, and process 0 from {first}"
            raise UserError(f"{got}: all of them must see the same files in {self.folder}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self._lock is not None:
            Path(str(self._lock.name)).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    on_exception = teardown

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Replaces Lightning's handlers: SIGTERM's communicates between processes while all but one may be elsewhere,
        # and Slurm's saves in the middle of a step. At the end of fit Lightning restores those from before.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self._told_to_stop = True

    def _stop(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            way = "nothing was saved yet" if self.last_good is None else f"resume from {self.last_good}"
            log.warning("stopped by SIGTERM or SIGUSR1: exit code %d; %s", EXIT_PREEMPTED, way)
        raise Preempted(self.last_good)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_sanity_check_start(trainer, pl_module)  # where no sanity check runs
        self._step_seen = trainer.global_step
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            _order_buckets(trainer.strategy.model)
        if trainer.ckpt_path is not None:
            self.last_good = Path(trainer.ckpt_path)
            self._take_best(self.last_good)
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:  # only where max_steps is given: Lightning would end the epoch a second time
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop._restarting = loop.epoch_loop._restarting = loop.epoch_loop.val_loop._restarting = False
        if trainer.is_global_zero and self.best_step == trainer.global_step and self._path(trainer).exists():
            point_to(self.folder / "best.ckpt", self._path(trainer))  # a killed run may not have got there

    def _take_best(self, start: Path) -> None:
        """Takes up the score of this folder's best.ckpt, even if the run has gone back since."""
        if start.absolute().parent != self.folder.absolute():
            self.best_score = self.best_step = None  # another run's
        path = self.folder / "best.ckpt"
        if not path.exists():
            return
        try:
            verify(path)
            state = read_checkpoint(path, mmap=True)["callbacks"][self.state_key]
        except DamagedCheckpointError as error:
            log.warning("%s: its score is ignored", error)
            return
        if state["best_score"] is not None and (self.best_score is None or state["best_score"] > self.best_score):
            self.load_state_dict(state)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        # If a signal came in a validation, or at the end of the last epoch, whose metrics are logged by now.
        if trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False):
            self._stop(trainer)

    on_validation_batch_start = on_train_epoch_start  # VideoData gives all processes equally many batches

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        step = trainer.global_step
        if step == self._step_seen:
            return
        self._step_seen = step
        self._due |= self.every_n_steps is not None and step % self.every_n_steps == 0
        # A run that ends in the middle of an epoch can only be prolonged exactly from here.
        self._due |= _validates_next(trainer, rest[2]) or step == trainer.max_steps or trainer.should_stop
        # Lightning resumes from a checkpoint made here as if what follows the batch, a validation or the end of the
        # epoch, were over: such a save waits. (The validation that a stop brings about is no part of the epoch.)
        epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if trainer.is_last_batch or (not trainer.should_stop and epoch_loop._should_check_val_fx(fetcher)):
            return
        stops = trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False)
        if self._due or stops:
            self._save(trainer)
        if stops:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_validated = trainer.global_step  # the metrics are those of these weights

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.state_dict()
        monitored = self.monitor is not None and self._step_validated == trainer.global_step
        score = float(trainer.callback_metrics.get(str(self.monitor), math.nan)) if monitored else math.nan
        is_best = math.isfinite(score) and (self.best_score is None or score > self.best_score)
        if is_best:
            self.best_score, self.best_step = score, trainer.global_step
        stopped = self._position is not None and self._position[0] == trainer.global_step
        if (stopped or self.last_good != self._path(trainer)) and not self._save(trainer, is_best):
            self.load_state_dict(before)
        if monitored and self.monitor not in trainer.callback_metrics:
            missing = f"best.ckpt is chosen by {self.monitor!r}, which the validation did not log"
            raise UserError(f"{missing}; it logged: {', '.join(sorted(trainer.callback_metrics)) or 'nothing'}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A run that stops within an epoch is saved again after the validation that follows, at the same position.
        if self._position is None or self._position[0] != trainer.global_step:
            names = {"loops", type(getattr(trainer, "datamodule", None)).__qualname__} & checkpoint.keys()
            self._position = trainer.global_step, copy.deepcopy({name: checkpoint[name] for name in names})
        checkpoint.update(self._position[1])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._failure is not None and self.last_good != self._path(trainer):
            way = f"free space and resume from {self.last_good} with --ckpt_path last"
            way = way if self.last_good else "there is no checkpoint to resume from"
            raise OSError(f"the end of the training is not saved: {self._failure}; {way}")

    def _path(self, trainer: Trainer) -> Path:
        return self.folder / f"step_{trainer.global_step:08d}.ckpt"

    def _save(self, trainer: Trainer, is_best: bool = False) -> bool:
        path, failure = self._path(trainer), None
        self._due = False
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:
            failure = str(error)
            log.warning("%s was not saved: %s. Training goes on; newest checkpoint: %s", path, error, self.last_good)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the ranks that do not write wait for this one
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            self._failure = failure or "process 0 could not write"
            return False
        self._failure, self.last_good = None, path
        if trainer.is_global_zero:
            try:
                self._publish(path, trainer.global_step, is_best)
            except OSError as error:
                log.warning("%s is saved, but last.ckpt, best.ckpt or old files could not be changed: %s", path, error)
            try:
                if self.mirror is not None:
                    self.mirror.push()
            except (OSError, StoreError) as error:
                log.warning("%s did not reach its store, which the next save tries again: %s", path, error)
        return True

    def _publish(self, path: Path, step: int, is_best: bool) -> None:
        point_to(self.folder / "last.ckpt", path, symbolic=True)
        if is_best:
            point_to(self.folder / "best.ckpt", path)
        files = _step_files(self.folder)
        kept = [file for number, file in files if number <= step][: self.keep]
        for number, file in files:
            if number > step:
                log.warning("%s is deleted: training went back to an earlier step and is at step %d", file, step)
            if file not in kept:
                file.unlink()


class Mirrored(Callback):
    """Copies a run's folder to its store at the end, when it must work."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.mirror.push()


def _order_buckets(model: DistributedDataParallel) -> None:
    """Lets DDP sort its gradients into buckets before the first step, in an order that depends on the network alone.

    It sorts them anew after the first step of a process. Where three or more processes are summed, a place in a bucket
    decides the order of the sum and so its last bits: a resumed run's first step would differ from the whole run's.
    """
    if not model.find_unused_parameters:  # else DDP never sorts them
        model.reducer.prepare_for_backward([])
        torch.stack([x.sum() for x in model.parameters() if x.requires_grad]).sum().backward()
        model.zero_grad()


def _validates_next(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation follows the next optimiser step."""
    every_epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(every, int):
        return False
    if every_epochs is not None and (trainer.current_epoch + 1) % every_epochs:
        return False
    batches = 1 + (batch_idx if every_epochs is not None else trainer.fit_loop.total_batch_idx)
    return every - batches % every <= trainer.accumulate_grad_batches


def _step_files(folder: Path) -> list[tuple[int, Path]]:
    """The step checkpoints of a folder, the most steps first."""
    found = [(re.fullmatch(r"step_(\d+)\.ckpt", path.name), path) for path in folder.glob("step_*.ckpt")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
