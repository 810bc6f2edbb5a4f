"""Things that go wrong in a training run, as callbacks that a test names on the command line."""

import os
import resource
import signal
import subprocess
import sys

import torch
from lightning.pytorch import Callback

from octvideo.data.preprocessing import Preprocessing


class Signal(Callback):
    """Sends this process and those that load its data a signal when a batch starts, counted over all epochs.

    SIGKILL goes to this process alone.

    Args:
        batch: from 0.
        number: of the signal.
        rank: of the process that it is sent to.
    """

    def __init__(self, batch: int, number: int, rank: int = 0):
        self.batch, self.number, self.rank = batch, number, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and trainer.global_rank == self.rank:
            if self.number == signal.SIGKILL:
                os.kill(os.getpid(), self.number)
            # By another process, as a launcher does.
            code = f"import os; os.killpg({os.getpgrp()}, {self.number})"
            subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True)


class SignalBeforeTraining(Callback):
    """Sends this process a signal before there is anything to save.

    Args:
        number: of the signal.
        place: hook in which it comes.
    """

    def __init__(self, number: int, place: str):
        self.number, self.place = number, place

    def setup(self, trainer, pl_module, stage):
        if self.place == "setup":
            os.kill(os.getpid(), self.number)

    def on_sanity_check_start(self, trainer, pl_module):
        if self.place == "on_sanity_check_start":
            os.kill(os.getpid(), self.number)


class NotANumber(Callback):
    """Puts a NaN into a batch, after its way to the device."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            pl_module.preprocessing = Preprocessing(mean=torch.nan)


class KilledLoader(Callback):
    """Kills a process that loads training data."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            iterator = trainer.fit_loop._combined_loader.flattened[0]._iterator
            os.kill(iterator._workers[0].pid, signal.SIGKILL)


class FullDisk(Callback):
    """Lets no file of this process grow over 2 MB from a batch on."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
