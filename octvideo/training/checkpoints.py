"""Checkpoints that are never lost: written whole or not at all, checked when read, kept until a newer one is safe."""

from __future__ import annotations

import copy
import errno
import fcntl
import io
import logging
import math
import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from octvideo.errors import DamagedCheckpointError, UserError
from octvideo.files import point_to, seal, verify, write_atomically

log = logging.getLogger(__name__)
LOCK = ".lock"  # in the folder of a run under way
EXIT_PREEMPTED = 75


"""Exit code of a run that left on a signal and waits to be started again (EX_TEMPFAIL of sysexits.h)."""


class Preempted(SystemExit):
    """Training left on a signal; the process ends with EXIT_PREEMPTED unless somebody catches this.

    Attributes:
        path: the checkpoint to go on from, None if nothing was saved yet.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.path = path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under its name only when it is whole and on the disk; refuses to load a damaged one.

    The file is an ordinary torch.save file. The checksum of its bytes stands in the zip archive's comment, because the
    archive's own checksums do not cover its directory, where a flipped bit can exchange a record for another.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves to path + '.tmp', forces it to the disk, and renames it.

        Raises:
            OSError: the disk is full, over quota, not writable or broken; whatever stood at path before still does.
            TypeError: storage_options, of which there are none.
        """
        if storage_options is not None:
            raise TypeError(f"checkpoints are saved without storage_options, got {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # In memory first: where a write fails, torch.save hides the OSError behind a RuntimeError without its errno.
        archive = io.BytesIO()
        torch.save(checkpoint, archive)
        with archive.getbuffer() as content:
            write_atomically(path, [content, seal(content)])

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads what save_checkpoint wrote, or any other file of torch.save.

        Raises:
            DamagedCheckpointError: see verify.
            FileNotFoundError: there is no such file.
        """
        verify(path)
        return super().load_checkpoint(path, map_location, weights_only)


def newest_intact(folder: str | Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The step checkpoint with the most steps that is whole.

    Args:
        folder: where RunCheckpoints saved.

    Returns:
        The checkpoint, and those with more steps that were passed over, each with what is wrong with it.

    Raises:
        ValueError: there is no intact step checkpoint; the message names those that are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for _, path in _step_files(Path(folder)):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            damaged.append((path, str(error)))
        else:
            return path, damaged
    reasons = "; ".join(reason for _, reason in damaged) or "no step_*.ckpt there"
    best = Path(folder) / "best.ckpt"
    way = f"; {best} may be: --ckpt_path {best}" if best.exists() else ""
    raise UserError(f"{folder} holds no checkpoint to go on from: {reasons}{way}")


class RunCheckpoints(Checkpoint):
    """Saves everything a run needs to go on bit for bit, often enough that no kill costs more than every_n_steps.

    Saves are named step_00000120.ckpt after the optimiser steps taken, and made after an optimiser step, so never
    between batches whose gradients are added up. The last step of an epoch is saved when its validation is over:
    Lightning would skip the validation if it went on from a checkpoint made before. So that a validation that is killed
    costs one step, the step before that is saved too. last.ckpt is a link to the newest, best.ckpt another name for the
    best of those at the end of an epoch.

    SIGTERM and SIGUSR1, sent to any process, save after the optimiser step under way and raise Preempted in all
    processes. During a validation they leave at once. After fit their handlers are the old ones.

    A save that fails (the disk is full) is logged as a warning and training goes on: no older file is deleted, and the
    next save tries again. If the last one failed, the run ends with an error.

    A run that stops in the middle of an epoch (max_steps, early stopping) can be prolonged exactly: its last checkpoint
    has the epoch as it was after the batch, with the statistics and the score of the validation that followed.

    Args:
        folder: where checkpoints go; made if need be. One run only, and one at a time: what is older, or newer than the
            step that a run has gone back to, is deleted there. best.ckpt stays until a better one comes.
        every_n_steps: optimiser steps between saves; None: only those at the end of each epoch and before a validation.
        keep: how many of the newest step checkpoints stay.
        monitor: metric of the validation whose highest value makes best.ckpt; None for none. Values that are not
            finite are passed over.
        start: the checkpoint that this process goes on from; all processes' must have the same name.

    Attributes:
        last_good: the newest checkpoint that is safe, or the one that training went on from; None before the first.
        best_score: the highest value of the monitored metric.
        best_step: optimiser steps before best_score.

    Raises:
        ValueError: every_n_steps or keep below 1; in fit, processes that go on from different checkpoints, or another
            run that is writing to the folder.
        OSError: at the end of fit, if the last save failed.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int | None = None,
        keep: int = 3,
        monitor: str | None = "val/top1",
        start: str | Path | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"every_n_steps must be at least 1, or None for one save per epoch, got {every_n_steps}")
        if keep < 1:
            raise UserError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.monitor = monitor
        self.start = start
        self.last_good: Path | None = None
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._told_to_leave = False
        self._due = False
        self._step_seen = 0
        self._step_validated: int | None = None
        self._common_batches = 0.0
        self._failure: str | None = None
        self._place: tuple[int, dict[str, Any]] | None = None
        self._lock: IO[str] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best score so far and where it was reached."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the best score."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the trainer write with AtomicCheckpointIO and removes what a killed process left half written."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":
            if not trainer.strategy.broadcast(trainer.is_global_zero and self._take_folder()):
                raise UserError(f"another run is writing to {self.folder}: choose another folder, or wait for its end")
            mine = Path(self.start).name if self.start is not None else "a start from scratch"
            first = trainer.strategy.broadcast(mine)
            if mine != first:
                raise UserError(
                    f"process {trainer.global_rank} goes on from {mine}, and process 0 from {first}: all of them must "
                    f"see the same files in {self.folder}"
                )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals; Lightning has only just taken them itself."""
        self._take_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals where no sanity check runs, and the place that training goes on from."""
        self._take_signals()
        self._step_seen = trainer.global_step
        if trainer.ckpt_path is not None:
            start = self.last_good = Path(trainer.ckpt_path)
            self._take_best(start)
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:  # only where max_steps is given: Lightning would end the epoch a second time
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop._restarting = loop.epoch_loop._restarting = loop.epoch_loop.val_loop._restarting = False
        if trainer.is_global_zero and self.best_step == trainer.global_step and self._path(trainer).exists():
            point_to(self.folder / "best.ckpt", self._path(trainer))  # a killed run may not have got there

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves if a signal came at the end of the epoch before, whose metrics are logged by now."""
        self._leave_if_told(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after an optimiser step, if it is time or a signal came."""
        step = trainer.global_step
        if step == self._step_seen:
            return
        self._step_seen = step
        self._due |= self.every_n_steps is not None and step % self.every_n_steps == 0
        self._due |= _validates_next(trainer, batch_idx)
        # A run that ends amid an epoch can only be prolonged exactly from here.
        self._due |= step == trainer.max_steps or trainer.should_stop
        # Lightning goes on from a checkpoint made here as if what follows the batch, a validation or the end of the
        # epoch, were over: such a save waits for the next step or the end of the epoch.
        epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        # (The validation that a stop brings about is no part of the epoch.)
        if trainer.is_last_batch or (not trainer.should_stop and epoch_loop._should_check_val_fx(fetcher)):
            return
        leave = self._all_told_to_leave(trainer)
        if self._due or leave:
            self._save(trainer)
        if leave:
            self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the batches that all processes have: in those they can agree to leave."""
        batches = torch.tensor(float(trainer.num_val_batches[0]), device=trainer.strategy.root_device)
        self._common_batches = float(trainer.strategy.reduce(batches, reduce_op="min"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leaves if a signal came; the step before is saved."""
        if dataloader_idx == 0 and batch_idx < self._common_batches:
            self._leave_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes which weights the metrics are of."""
        self._step_validated = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, as the best where it is.

        Raises:
            ValueError: the monitored metric was not logged in the validation.
        """
        before = self.best_score, self.best_step
        monitored = self.monitor is not None and self._step_validated == trainer.global_step
        score = float(trainer.callback_metrics.get(self.monitor, math.nan)) if self.monitor and monitored else math.nan
        is_best = math.isfinite(score) and (self.best_score is None or score > self.best_score)
        if is_best:
            self.best_score, self.best_step = score, trainer.global_step
        stopped = self._place is not None and self._place[0] == trainer.global_step
        if (stopped or self.last_good != self._path(trainer)) and not self._save(trainer, is_best):
            self.best_score, self.best_step = before
        if monitored and self.monitor not in trainer.callback_metrics:
            raise UserError(
                f"best.ckpt is chosen by {self.monitor!r}, which the validation did not log; it logged: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the place in the epoch where a run that stops there is saved again after its validation."""
        names = ("loops", type(trainer.datamodule).__qualname__)  # type: ignore[attr-defined]
        if self._place is not None and self._place[0] == trainer.global_step:
            checkpoint.update(self._place[1])
        else:
            place = {name: checkpoint[name] for name in names if name in checkpoint}
            self._place = trainer.global_step, copy.deepcopy(place)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a run whose last steps are not saved as one that failed.

        Raises:
            OSError: says why, and how to go on.
        """
        if self._failure is not None and self.last_good != self._path(trainer):
            way = "there is no checkpoint to go on from"
            if self.last_good is not None:
                way = f"free space and go on from {self.last_good} with --ckpt_path last"
            raise OSError(f"the end of the training is not saved: {self._failure}; {way}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets other runs have the folder."""
        self._release_folder()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets other runs have the folder."""
        self._release_folder()

    def _release_folder(self) -> None:
        if self._lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _take_folder(self) -> bool:
        """Makes the folder this process's own until the run ends, and clears it; False if another has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which loader processes do not inherit
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self._lock.close()
                self._lock = None  # the file is the other's
                return False
            # A file system without locks: there is no guard.
        for path in self.folder.glob("*.ckpt.tmp"):
            path.unlink()
        return True

    def _take_best(self, start: Path) -> None:
        """Takes up the best score there was: that of this folder's best.ckpt, even if the run has gone back since."""
        if start.absolute().parent != self.folder.absolute():
            self.best_score = self.best_step = None  # another run's
        path = self.folder / "best.ckpt"
        if not path.exists():
            return
        try:
            verify(path)
        except DamagedCheckpointError as error:
            log.warning("%s: it counts no more", error)
            return
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["callbacks"]
        score, step = (states[self.state_key][name] for name in ("best_score", "best_step"))
        if score is not None and (self.best_score is None or score > self.best_score):
            self.best_score, self.best_step = score, step

    def _path(self, trainer: Trainer) -> Path:
        return self.folder / f"step_{trainer.global_step:08d}.ckpt"

    def _save(self, trainer: Trainer, is_best: bool = False) -> bool:
        """Saves in all processes; whether that went well, of which each of them is told."""
        path, failure = self._path(trainer), None
        self._due = False
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:
            failure = error
            # Only the process that writes gets here, and the others wait for it where save_checkpoint ends.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        saved = trainer.strategy.reduce_boolean_decision(failure is None)
        if failure is not None:
            log.warning("%s was not saved: %s. Training goes on; newest checkpoint: %s", path, failure, self.last_good)
        self._failure = None if saved else str(failure or "process 0 could not write")
        if not saved:
            return False
        self.last_good = path
        if trainer.is_global_zero:
            try:
                self._publish(path, trainer.global_step, is_best)
            except OSError as error:
                log.warning("%s is saved, but last.ckpt, best.ckpt or old files could not be changed: %s", path, error)
        return True

    def _publish(self, path: Path, step: int, is_best: bool) -> None:
        """Points last.ckpt, and best.ckpt if it is, at a checkpoint, then deletes those it makes unnecessary."""
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

    def _take_signals(self) -> None:
        # Lightning's own handler for SIGTERM communicates between processes from within the handler, where all but one
        # may be elsewhere, and Slurm's saves amid a step. Lightning puts back the handlers from before fit at its end.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told_to_leave = True

    def _all_told_to_leave(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._told_to_leave, all=False)

    def _leave_if_told(self, trainer: Trainer) -> None:
        if self._all_told_to_leave(trainer):
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            place = "nothing was saved yet" if self.last_good is None else f"go on from {self.last_good}"
            log.warning("told to leave by a signal: exit code %d; %s", EXIT_PREEMPTED, place)
        raise Preempted(self.last_good)


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
    """The step checkpoints of a folder with their steps, the most steps first."""
    found = [(re.fullmatch(r"step_(\d+)\.ckpt", path.name), path) for path in folder.glob("step_*.ckpt")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
