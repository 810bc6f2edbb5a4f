"""What a run prints."""

import io
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from rich.console import Console
from test_callbacks import Slow, Tiny, clock, trainer_with  # noqa: F401
from torch.utils.data import DataLoader

from octvideo.commands.train import Training
from octvideo.data.module import VideoData
from octvideo.training.callbacks import Memory, Throughput
from octvideo.training.console import FIGURES, EpochLines, ProgressBar, RunSummary
from octvideo.training.recognizer import Recognizer


def test_an_epoch_that_is_resumed_in_the_middle_says_so(clock, capsys, tmp_path):  # noqa: F811
    """12 batches an epoch, the run interrupted after the fourth; what is measured is of the 8 others."""
    loader = DataLoader(Slow(clock, 12), batch_size=None)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer_with(tmp_path, saved).fit(Tiny(clock), loader)
    capsys.readouterr()
    trainer = trainer_with(tmp_path, Throughput(), Memory(), EpochLines(), max_epochs=2)
    trainer.fit(Tiny(clock), loader, ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2 from batch 5", "epoch 2/2"]
    assert "  1.333 clips/s" in lines[0]


def test_an_epochs_line_has_validation_figures_only_if_it_was_validated(capsys):
    metrics = {"train/loss": 0.5, "train/loss_step": 0.4, "train/loss_epoch": 0.5, "val/top1": 0.75}
    trainer = SimpleNamespace(
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        is_global_zero=True,
        current_epoch=4,
        max_epochs=10,
    )
    callback = EpochLines()
    callback.on_train_start(trainer, None)
    callback.on_validation_end(trainer, None)
    callback.on_train_epoch_end(trainer, None)
    trainer.current_epoch = 5
    callback.on_train_epoch_end(trainer, None)
    assert capsys.readouterr().out == "epoch 5/10  loss 0.5  val top1 75.0%\nepoch 6/10  loss 0.5\n"


def test_an_epochs_line_fits_120_columns_with_every_figure_in_it(capsys):
    values = {"loss": 0.123456, "top1": 1.0, "top5": 1.0, "learning_rate": 1.23456e-5, "clips_per_second": 1234.56}
    names = [name for group in FIGURES for name in group if name != "val/map"]  # of another task
    trainer = SimpleNamespace(
        callback_metrics={name: torch.tensor(values[name.rpartition("/")[2]]) for name in names},
        is_global_zero=True,
        current_epoch=194,
        max_epochs=196,
    )
    callback = EpochLines()
    callback.on_train_start(trainer, None)
    callback.on_train_batch_start(trainer, None, None, 12344)
    callback.on_validation_end(trainer, None)
    callback.on_train_epoch_end(trainer, None)
    line = capsys.readouterr().out.removesuffix("\n")
    assert line == (
        "epoch 195/196 from batch 12345  loss 0.123 top1 100.0%  val loss 0.123 top1 100.0% top5 100.0%  lr 1.2e-05  "
        "1235 clips/s"
    )
    assert len(line) <= 120


@pytest.mark.parametrize(("alpha", "shown"), [(0.25, "0.25"), ({"conv_b": 0.5}, "per layer")])
def test_a_run_starts_with_a_summary(alpha, shown, capsys, tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n" * 600)
    (tmp_path / "val.csv").write_text("c.mp4 1\n")
    lists = [str(tmp_path / f"{split}.csv") for split in ("train", "val")]
    data = VideoData(*lists, clip_frames=4, crop_size=32, short_side=(32, 40), num_classes=2)
    model = Recognizer("x3d_xs", alpha, 2)
    trainer = SimpleNamespace(is_global_zero=True, datamodule=data, world_size=1, precision="32-true")
    summary = RunSummary(model, data, macs=4_000_000)
    summary.on_train_start(trainer, model)
    network, videos, device = capsys.readouterr().out.splitlines()
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    assert network.startswith(f"network: x3d_xs, alpha {shown}, {parameters:,} parameters, 0.004 GMACs")
    assert network.endswith(" GMACs a clip of 4 x 32 x 32")
    assert videos == "data: 2 classes, 1,200 training and 1 validation videos"
    assert device == f"device: cpu, {torch.get_num_threads()} threads, precision 32-true"


def test_a_run_that_has_reached_its_last_epoch_says_so(capsys, tmp_path):
    def summary():  # of no network: the lines of one that starts are above
        callback = RunSummary.__new__(RunSummary)
        callback._started = False
        return callback

    loader, saved = DataLoader(torch.ones(2, 1), 2), ModelCheckpoint(tmp_path, "end", save_last=True)
    trainer_with(tmp_path, saved, max_epochs=1).fit(Plain(), loader)
    trainer = trainer_with(tmp_path, summary(), max_epochs=1)
    trainer.fit(Plain(), loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert capsys.readouterr().out == "nothing is left to train: raise trainer.max_epochs to go on\n"


def test_the_bar_counts_epochs_from_one_and_leaves_nothing(monkeypatch, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    trainer = trainer_with(tmp_path, ProgressBar(), max_epochs=2, enable_progress_bar=True)
    trainer.fit(Plain(), DataLoader(torch.ones(6, 1), 2), DataLoader(torch.ones(2, 1), 2))
    written = screen.getvalue()
    assert "epoch 1 " in written
    assert "epoch 2 " in written
    assert "epoch 0" not in written
    assert "validation " in written
    last_line = written.rsplit("\x1b[2K", 1)[1]  # what follows the last command to erase a line
    assert last_line.strip() == ""


@pytest.mark.parametrize(
    ("words", "bars"),
    [
        ([], [ProgressBar]),
        (["--trainer.enable_progress_bar=false"], []),
        (["--trainer.callbacks=TQDMProgressBar"], [TQDMProgressBar]),
    ],
)
def test_a_terminal_shows_one_bar_or_the_one_that_is_asked_for(words, bars, monkeypatch, tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4 0\nb.mp4 1\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    words = ["--cfg", "quickstart", f"--data.train_list={tmp_path / 'list.csv'}", "--data.val_list=null", *words]
    words += ["--data.test_list=null", f"--data.root={tmp_path}", "--model.name=x3d_xs", "--model.num_classes=2"]
    cli = Training("", [*words, f"--trainer.default_root_dir={tmp_path}"], keep_options=False)
    assert [type(x) for x in cli.trainer.callbacks if isinstance(x, LightningBar)] == bars


class Plain(Tiny):
    """Takes tensors, and validates."""

    def __init__(self):
        super().__init__(None)

    def training_step(self, batch, index):
        return self.layer(batch).mean()

    def validation_step(self, batch, index):
        self.log("val/loss", self.layer(batch).mean())
