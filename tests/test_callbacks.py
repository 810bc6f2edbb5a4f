"""What callbacks print and log."""

import logging
from types import SimpleNamespace

import torch

from octvideo.callbacks import BadVideos, EpochLines


def test_a_bad_video_is_logged_once_and_counted_every_time(caplog):
    counts = []
    module = SimpleNamespace(log=lambda name, value, **options: counts.append((name, value, options["reduce_fx"])))
    bad = SimpleNamespace(bad=[("a.mp4", "no frame"), ("b.mp4", "empty")])
    callback = BadVideos()
    with caplog.at_level(logging.WARNING):
        callback.on_train_batch_end(None, module, None, bad, 0)
        callback.on_validation_batch_end(None, module, None, SimpleNamespace(bad=bad.bad[:1]), 0)
        callback.on_test_batch_end(None, module, None, SimpleNamespace(bad=[]), 0)
    assert [record.getMessage() for record in caplog.records] == ["bad video a.mp4: no frame", "bad video b.mp4: empty"]
    assert counts == [("train/bad_videos", 2, "sum"), ("val/bad_videos", 1, "sum"), ("test/bad_videos", 0, "sum")]
    assert callback.reasons == {"a.mp4": "no frame", "b.mp4": "empty"}


def test_an_epochs_line_has_validation_figures_only_if_it_was_validated(capsys):
    metrics = {"train/loss": 0.5, "train/loss_step": 0.4, "train/loss_epoch": 0.5, "val/top1": 0.75}
    trainer = SimpleNamespace(
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        is_global_zero=True,
        current_epoch=4,
        max_epochs=10,
    )
    callback = EpochLines()
    callback.on_validation_end(trainer, None)
    callback.on_train_epoch_end(trainer, None)
    trainer.current_epoch = 5
    callback.on_train_epoch_end(trainer, None)
    assert capsys.readouterr().out == "epoch 5/10  train/loss 0.5  val/top1 0.75\nepoch 6/10  train/loss 0.5\n"
