"""What a run prints: a summary before the first step, a progress bar in a terminal, and one line an epoch."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from octvideo.data.module import VideoData
from octvideo.models.cost import count_parameters
from octvideo.training.recognizer import Recognizer

# An epoch's line: groups of metrics, and how each is printed.
FIGURES: tuple[dict[str, str], ...] = (
    {"train/loss": "loss {:.3g}", "train/top1": "top1 {:.1%}"},
    {"val/loss": "loss {:.3g}", "val/top1": "top1 {:.1%}", "val/top5": "top5 {:.1%}", "val/map": "mAP {:.1%}"},
    {"learning_rate": "lr {:.2g}"},
    {"train/clips_per_second": "{:.4g} clips/s"},
)


class RunSummary(callbacks.Callback):
    """Prints what is trained on what before the first step: network, cost, classes, videos, device."""

    def __init__(self, model: Recognizer, data: VideoData, macs: int) -> None:
        self._data, clips, options = data, data.preprocessing, model.hparams
        size = f"{clips.clip_frames} x {clips.crop_size} x {clips.crop_size}"
        alpha = "per layer" if isinstance(options["alpha"], dict) else options["alpha"]
        parameters = f"{count_parameters(model.network):,} parameters"  # not sharded yet
        name = options["name"] if options["network"] is None else options["network"]["class_path"]
        self._network = f"{name}, alpha {alpha}, {parameters}, {macs / 1e9:.3g} GMACs a clip of {size}"
        self._started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = True
        if not trainer.is_global_zero:
            return
        videos = [
            f"{len(self._data.read(f'{split}_list').paths):,} {name}"
            for split, name in (("train", "training"), ("val", "validation"))
            if self._data.lists[f"{split}_list"] is not None
        ]
        device = str(pl_module.device) if trainer.world_size == 1 else f"{trainer.world_size} x {pl_module.device.type}"
        device += f", {torch.get_num_threads()} threads" if pl_module.device.type == "cpu" else ""
        print(f"network: {self._network}")
        print(f"data: {pl_module.hparams['num_classes']} classes, {' and '.join(videos)} videos")
        print(f"device: {device}, precision {trainer.precision}", flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not self._started:
            print("nothing is left to train: raise trainer.max_epochs to go on", flush=True)


class EpochLines(callbacks.Callback):
    """Prints one line an epoch, of at most 120 columns. Bad videos and memory are reported elsewhere."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first: int | None = None  # batch of the epoch: not 0 in a run resumed there
        self._validated = False  # in this epoch: Lightning keeps the metrics of the last validation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._first = batch_idx if self._first is None else self._first

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if self._validated or k[:4] != "val/"}
        epoch = f"epoch {trainer.current_epoch + 1}"
        epoch += f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""  # -1 trains until max_steps
        line = [epoch + (f" from batch {self._first + 1}" if self._first else "")]
        for group in FIGURES:
            shown = [form.format(metrics[name]) for name, form in group.items() if name in metrics]
            if shown:
                line.append(" ".join(["val", *shown] if "val/loss" in group else shown))
        self._first, self._validated = None, False
        if trainer.is_global_zero:
            print("  ".join(line), flush=True)


class ProgressBar(callbacks.ProgressBar):
    """One line that moves while an epoch, a validation or a test runs, and leaves nothing behind."""

    _enabled = True
    _bar: Progress | None = None

    def disable(self) -> None:  # Lightning calls this in all processes but the first
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _start(self, description: str, total: float) -> None:
        self._stop()
        if self._enabled:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), transient=True)
            self._bar.add_task(description, total=None if total == float("inf") else total, figures="")
            self._bar.start()

    def _advance(self, done: int, figures: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, figures=figures)

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._start(f"epoch {trainer.current_epoch + 1}", self.total_train_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if self._bar is None:  # after a validation within the epoch, or in an epoch that is resumed
            self.on_train_epoch_start(trainer)
        loss = trainer.callback_metrics.get("train/loss_step")
        self._advance(rest[2] + 1, "" if loss is None else f"loss {loss.item():.4g}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("validation", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("test", sum(trainer.num_test_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any, **_: Any) -> None:
        self._advance(rest[2] + 1)

    on_test_batch_end = on_validation_batch_end
    on_train_epoch_end = on_validation_end = on_test_end = on_exception = _stop
