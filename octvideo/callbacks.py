"""Callbacks that Lightning lacks."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class BadVideos(Callback):
    """Counts the videos that could not be decoded, and logs each of them once, with its path and reason.

    Attributes:
        reasons: reason by path, of all bad videos that this process has met.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the videos that were replaced by others."""
        self._note(pl_module, batch, "train/bad_videos")

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
        self._note(pl_module, batch, "val/bad_videos")

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
        self._note(pl_module, batch, "test/bad_videos")

    def _note(self, module: LightningModule, batch: Any, name: str) -> None:
        for path, reason in batch.bad:
            if path not in self.reasons:
                self.reasons[path] = reason
                log.warning("bad video %s: %s", path, reason)
        module.log(
            name, float(len(batch.bad)), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True, batch_size=1
        )


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
