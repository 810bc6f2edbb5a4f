"""What a run prints."""

from types import SimpleNamespace

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callbacks import Slow, Tiny, clock, trainer_with  # noqa: F401
from torch.utils.data import DataLoader

from octvideo.training.callbacks import Memory, Throughput
from octvideo.training.console import EpochLines


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
    assert " GiB" in lines[0]
    assert "  1.33 clips/s" in lines[0]


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
    assert capsys.readouterr().out == "epoch 5/10  loss 0.5  val top-1 75.0%\nepoch 6/10  loss 0.5\n"
