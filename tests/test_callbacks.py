"""What callbacks print and log."""

import logging
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from octvideo.callbacks import BadVideos, EpochLines, Throughput

ALONE = SimpleNamespace(world_size=1, is_global_zero=True, sanity_checking=False)


class Clock:
    """Stands in for time.perf_counter: it moves only when told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("octvideo.callbacks.perf_counter", clock)
    return clock


def test_a_bad_video_is_logged_once_and_counted_every_time(caplog):
    counts = []
    module = SimpleNamespace(log=lambda name, value, **options: counts.append((name, value, options["reduce_fx"])))
    bad = SimpleNamespace(bad=[("a.mp4", "no frame"), ("b.mp4", "empty")], paths=[])
    callback = BadVideos()
    with caplog.at_level(logging.WARNING):
        callback.on_train_batch_end(None, module, None, bad, 0)
        callback.on_validation_batch_end(None, module, None, SimpleNamespace(bad=bad.bad[:1], paths=[]), 0)
        callback.on_test_batch_end(None, module, None, SimpleNamespace(bad=[], paths=[]), 0)
    assert [record.getMessage() for record in caplog.records] == ["bad video a.mp4: no frame", "bad video b.mp4: empty"]
    assert counts == [("train/bad_videos", 2, "sum"), ("val/bad_videos", 1, "sum"), ("test/bad_videos", 0, "sum")]
    assert callback.reasons == {"a.mp4": "no frame", "b.mp4": "empty"}


def summary(caplog, batches, trainer=ALONE, stage="train"):
    """What BadVideos says at the end of an epoch of these batches: (good paths, bad videos) each."""
    callback, module = BadVideos(), SimpleNamespace(log=lambda *arguments, **options: None)
    note = {"train": "on_train_batch_end", "val": "on_validation_batch_end", "test": "on_test_batch_end"}[stage]
    sum_up = {"train": "on_train_epoch_end", "val": "on_validation_epoch_end", "test": "on_test_epoch_end"}[stage]
    for paths, bad in batches:
        getattr(callback, note)(trainer, module, None, SimpleNamespace(paths=paths, bad=bad), 0)
    caplog.clear()
    getattr(callback, sum_up)(trainer, module)
    first = [record.getMessage() for record in caplog.records]
    caplog.clear()
    getattr(callback, sum_up)(trainer, module)
    assert caplog.records == []  # each epoch for itself
    return first


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_an_epoch_with_bad_videos_is_summed_up_by_reason_the_commonest_first(caplog, stage):
    batches = [
        (["good1", "good2"], [("a.mp4", "no frame"), ("b.mp4", "ends after 2.31 s, and its header says 10.0 s")]),
        (["good3"], [("c.mp4", "ends after 4 s, and its header says 7.25 s")]),
    ]
    assert summary(caplog, batches, stage=stage) == [
        f"{stage}: 3 of 6 videos could not be decoded\n"
        "  2 x ends after 2.31 s, and its header says 10.0 s, e.g. b.mp4\n"
        "  1 x no frame, e.g. a.mp4"
    ]


def test_rare_reasons_are_only_counted(caplog):
    bad = [(f"{letter}{k}.mp4", f"reason {letter}") for k, letter in enumerate("aaabbbccddeefgh")]
    lines = summary(caplog, [(["good"] * 85, bad)])[0].split("\n")
    assert lines[0] == "train: 15 of 100 videos could not be decoded"
    assert lines[1] == "  3 x reason a, e.g. a0.mp4"
    assert len(lines) == 7
    assert lines[6] == "  3 x other reasons"


def test_an_epoch_without_bad_videos_and_a_sanity_check_say_nothing(caplog):
    assert summary(caplog, [(["a", "b"], [])]) == []
    checking = SimpleNamespace(world_size=1, is_global_zero=True, sanity_checking=True)
    assert summary(caplog, [(["a"], [("b", "broken")])], checking, "val") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_sums_up_all_processes(caplog, monkeypatch, rank):
    def gather(parts, own):
        parts[rank], parts[1 - rank] = own, (10, [("z.mp4", "empty")] if own[0] else [])

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer = SimpleNamespace(world_size=2, is_global_zero=rank == 0, sanity_checking=False)
    lines = summary(caplog, [(["a"], [("b.mp4", "empty")])], trainer)
    assert [line.split("\n")[0] for line in lines] == ["train: 2 of 12 videos could not be decoded"][rank:]


def epoch(clock, steps, callback=None, device="cpu", is_global_zero=True, videos=4):
    """One epoch of (seconds until the batch comes, seconds of the step); returns what was logged."""
    logged = {}
    module = SimpleNamespace(
        device=torch.device(device), log=lambda name, value, **options: logged.update({name: (value, options)})
    )
    trainer = SimpleNamespace(is_global_zero=is_global_zero, train_dataloader=SimpleNamespace(num_workers=2))
    callback = callback or Throughput()
    batch = SimpleNamespace(clips=torch.empty(videos, 3, 3, 1, 1, 1))
    callback.on_train_epoch_start(trainer, module)
    for index, (wait, work) in enumerate(steps):
        clock.seconds += wait
        callback.on_train_batch_start(trainer, module, batch, index)
        clock.seconds += work
        callback.on_train_batch_end(trainer, module, None, batch, index)
    callback.on_train_epoch_end(trainer, module)
    return logged


def test_waiting_and_computing_are_timed_apart_and_a_slow_loader_is_named(clock, capsys):
    """12 clips a step; 0.4 s for them, 0.2 s for the step, and a minute for the loader to start."""
    logged = epoch(clock, [(60, 3), *[(0.4, 0.2)] * 24])
    assert {name: pytest.approx(value) for name, (value, _) in logged.items()} == {
        "train/step_seconds": 0.2,
        "train/data_seconds": 0.4,
        "train/clips_per_second": 20,
    }
    assert logged["train/clips_per_second"][1] == {"reduce_fx": "sum", "sync_dist": True}  # of all processes together
    assert logged["train/data_seconds"][1] == {"sync_dist": True}
    assert capsys.readouterr().out == (
        "loader-bound: 20 clips/s from 2 workers, the model takes 60 (72 of 77 s waited for clips): raise "
        "data.num_workers, or re-encode the videos with tools/prepare_data.py --reencode\n"
    )


@pytest.mark.parametrize(("wait", "bound"), [(0.021, "compute"), (0.023, "loader")])
def test_a_tenth_of_the_time_may_be_waiting(clock, capsys, wait, bound):
    epoch(clock, [(wait, 0.2)] * 10)
    assert capsys.readouterr().out.startswith(f"{bound}-bound: ")


def test_a_loader_that_keeps_up_is_praised(clock, capsys):
    epoch(clock, [(30, 0.01), *[(0, 0.01)] * 9])
    assert capsys.readouterr().out == (
        "compute-bound: the model takes 1200 clips/s and the loader keeps up (30 of 30 s waited for clips)\n"
    )


def test_without_a_gpu_every_step_is_timed(clock):
    steps = [(0, 0.8 if index % Throughput.SAMPLED == 0 else 0.1) for index in range(5 + 14)]
    assert epoch(clock, steps)["train/step_seconds"][0] == pytest.approx((2 * 0.8 + 12 * 0.1) / 14)


def test_validation_during_the_epoch_counts_nowhere(clock):
    class Validating(Throughput):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            super().on_train_batch_end(trainer, module, outputs, batch, index)
            clock.seconds += 1000
            self.on_validation_end(trainer, module)

    logged = epoch(clock, [(0.1, 0.3)] * 10, Validating())
    assert logged["train/data_seconds"][0] == pytest.approx(0.1)
    assert logged["train/clips_per_second"][0] == pytest.approx(30)


def test_an_epoch_of_the_first_steps_or_without_clips_says_nothing(clock, capsys):
    assert epoch(clock, [(1, 1)] * Throughput.WARMUP_STEPS) == {}
    assert epoch(clock, [(1, 1)] * 10, videos=0) == {}
    assert capsys.readouterr().out == ""


def test_each_epoch_is_measured_for_itself(clock):
    callback = Throughput()
    epoch(clock, [(5, 5)] * 10, callback)
    assert epoch(clock, [(0.1, 0.3)] * 10, callback)["train/step_seconds"][0] == pytest.approx(0.3)


def test_other_processes_log_and_do_not_print(clock, capsys):
    assert epoch(clock, [(1, 1)] * 10, is_global_zero=False).keys() >= {"train/step_seconds"}
    assert capsys.readouterr().out == ""


def test_a_gpu_is_waited_for_in_one_of_seven_steps(clock, monkeypatch):
    """Python needs 0.01 s for a step and the device 0.2: it falls behind until it is waited for."""
    device, waits = SimpleNamespace(busy_until=0.0), []

    def synchronize(which):
        waits.append(which)
        clock.seconds = max(clock.seconds, device.busy_until)

    class Working(Throughput):
        def on_train_batch_start(self, trainer, module, batch, index):
            super().on_train_batch_start(trainer, module, batch, index)
            device.busy_until = max(clock.seconds, device.busy_until) + 0.2

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    logged = epoch(clock, [(0, 0.01)] * (5 + 7 * 10), Working(), device="cuda:1")
    assert waits == [torch.device("cuda:1")] * 22  # before and after the steps 0, 7, ... 70
    assert logged["train/step_seconds"][0] == pytest.approx(0.2)
    assert logged["train/data_seconds"][0] == pytest.approx(0, abs=0.02)
    assert logged["train/clips_per_second"][0] == pytest.approx(60, rel=0.05)


class Batch(NamedTuple):
    clips: torch.Tensor
    labels: torch.Tensor
    paths: list
    bad: list


class Tiny(LightningModule):
    """A classifier of one number, whose step takes 0.5 s of a clock that stands still otherwise."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.layer = nn.Linear(1, 2)

    def training_step(self, batch, index):
        self.clock.seconds += 0.5
        return nn.functional.cross_entropy(self.layer(batch.clips.flatten(1)), batch.labels)

    def validation_step(self, batch, index):
        self.clock.seconds += 1000

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Slow(torch.utils.data.Dataset):
    """Batches that take a second of the clock each, the fourth with a bad video."""

    def __init__(self, clock, num_batches):
        self.clock = clock
        self.num_batches = num_batches

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index):
        self.clock.seconds += 1
        bad = [("bad.mp4", "no frame")] if index == 3 else []
        return Batch(torch.ones(2, 1, 1, 1, 1, 1), torch.tensor([0, 1]), ["a", "b"], bad)


def test_a_trainer_runs_them(clock, capsys, caplog, tmp_path):
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[Throughput(), BadVideos()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        val_check_interval=4,
    )
    training, validation = (DataLoader(Slow(clock, num), batch_size=None, shuffle=False) for num in (12, 4))
    trainer.fit(Tiny(clock), training, validation)
    lines = [line for line in capsys.readouterr().out.split("\n") if "-bound" in line]
    assert (
        lines
        == [
            "loader-bound: 1.33 clips/s from 0 workers, the model takes 4 (12 of 18 s waited for clips): raise "
            "data.num_workers, or re-encode the videos with tools/prepare_data.py --reencode"
        ]
        * 2
    )
    assert trainer.callback_metrics["train/data_seconds"].item() == pytest.approx(1)
    assert trainer.callback_metrics["train/step_seconds"].item() == pytest.approx(0.5)
    assert trainer.callback_metrics["train/clips_per_second"].item() == pytest.approx(2 / 1.5)
    summaries = [record.getMessage() for record in caplog.records if "could not be decoded" in record.getMessage()]
    train, val = (
        f"{stage}: 1 of {tried} videos could not be decoded\n  1 x no frame, e.g. bad.mp4"
        for stage, tried in (("train", 25), ("val", 9))
    )
    assert summaries == [val, val, val, train] * 2  # validated after every fourth step


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
