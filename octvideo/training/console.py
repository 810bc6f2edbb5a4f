"""What a run prints: a summary before the first step, a progress bar in a terminal, and one line an epoch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from octvideo.data.module import VideoData
from octvideo.models.cost import count_macs, count_parameters

# An epoch's line: groups of metrics, and how each is printed.
FIGURES: tuple[dict[str, str], ...] = (
    {"train/loss": "loss {:.3g}", "train/top1": "top1 {:.1%}"},
    {"val/loss": "loss {:.3g}", "val/top1": "top1 {:.1%}", "val/top5": "top5 {:.1%}"},
    {"learning_rate": "lr {:.2g}"},
    {"train/clips_per_second": "{:.4g} clips/s"},
)


class RunSummary(callbacks.Callback):
    """Prints what is trained on what before the first step: network, cost, classes, videos, device."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Counts the network's cost, before it is sharded."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        clips = self._data(trainer).preprocessing
        size = (3, clips.clip_frames, clips.crop_size, clips.crop_size)
        network: Any = pl_module.network
        options = pl_module.hparams
        alpha = "per layer" if isinstance(options["alpha"], dict) else options["alpha"]
        self._network = (
            f"{options['name']}, alpha {alpha}, {count_parameters(network):,} parameters, "
            f"{count_macs(network, size) / 1e9:.3g} GMACs a clip of {' x '.join(map(str, size[1:]))}"
        )

    @staticmethod
    def _data(trainer: Trainer) -> VideoData:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, VideoData)
        return data

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints, after the sanity check."""
        if not trainer.is_global_zero:
            return
        data = self._data(trainer)
        videos = [
            f"{len(data.read(f'{split}_list').paths):,} {name}"
            for split, name in (("train", "training"), ("val", "validation"))
            if data.lists[f"{split}_list"] is not None
        ]
        device = str(pl_module.device) if trainer.world_size == 1 else f"{trainer.world_size} x {pl_module.device.type}"
        threads = f", {torch.get_num_threads()} threads" if pl_module.device.type == "cpu" else ""
        print(
            f"network: {self._network}\n"
            f"data: {pl_module.hparams['num_classes']} classes, {' and '.join(videos)} videos\n"
            f"device: {device}{threads}, precision {trainer.precision}",
            flush=True,
        )


class EpochLines(callbacks.Callback):
    """Prints one line an epoch, of at most 120 columns. Bad videos and memory are reported elsewhere."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the first batch."""
        self._first: int | None = None
        self._validated = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers where the epoch starts."""
        self._first = batch_idx if self._first is None else self._first

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers that this epoch was validated: Lightning keeps the metrics of the last one that was."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints."""
        metrics = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if self._validated or not name.startswith("val/")
        }
        epoch = f"epoch {trainer.current_epoch + 1}"
        epoch += f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""  # -1 trains until max_steps
        line = [epoch + (f" from batch {self._first + 1}" if self._first else "")]
        for group in FIGURES:
            shown = [form.format(metrics[name]) for name, form in group.items() if name in metrics]
            if shown:
                line.append(" ".join(["val", *shown] if "val/top1" in group else shown))
        self._first, self._validated = None, False
        if trainer.is_global_zero:
            print("  ".join(line), flush=True)


class ProgressBar(callbacks.ProgressBar):
    """One line that moves while an epoch, a validation or a test runs, and leaves nothing behind."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None

    def disable(self) -> None:
        """Lightning calls this in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Undoes `disable`."""
        self._enabled = True

    def _start(self, description: str, total: float) -> None:
        self._stop()
        if not self._enabled:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        figures = TextColumn("{task.fields[figures]}")
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), figures, transient=True)
        self._bar.add_task(description, total=None if total == float("inf") else total, figures="")
        self._bar.start()

    def _advance(self, done: int, figures: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, figures=figures)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the epoch's bar."""
        self._start(f"epoch {trainer.current_epoch + 1}", self.total_train_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Moves on, beside the loss of the step."""
        if self._bar is None:  # after a validation within the epoch, or in an epoch that is resumed
            self.on_train_epoch_start(trainer, pl_module)
        loss = trainer.callback_metrics.get("train/loss_step")
        self._advance(rest[2] + 1, "" if loss is None else f"loss {loss.item():.4g}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the validation's bar."""
        self._start("validation", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the test's bar."""
        self._start("test", sum(trainer.num_test_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Moves on."""
        self._advance(rest[2] + 1)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Moves on."""
        self._advance(rest[2] + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar."""
        self._stop()

    on_train_epoch_end = on_test_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the bar, so that the error has a line of its own."""
        self._stop()
