"""What callbacks print and log."""

import logging
import math
import os
import signal
from multiprocessing import resource_sharer
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import RunningStage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from octvideo.data.module import VideoData
from octvideo.data.multigrid import Multigrid
from octvideo.errors import LoaderKilledError, NotFiniteError
from octvideo.stores import Traffic
from octvideo.training.callbacks import (
    BadVideos,
    FiniteLoss,
    Memory,
    MovingAverage,
    Throughput,
    naming_killed_loaders,
)

STAGES = {"train": RunningStage.TRAINING, "val": RunningStage.VALIDATING, "test": RunningStage.TESTING}


def trainer_in(stage, world_size=1, rank=0, sanity_checking=False):
    """What BadVideos asks a trainer."""
    state = SimpleNamespace(stage=RunningStage.SANITY_CHECKING if sanity_checking else STAGES[stage])
    return SimpleNamespace(
        state=state, world_size=world_size, is_global_zero=rank == 0, sanity_checking=sanity_checking
    )


class Clock:
    """Stands in for time.perf_counter: it moves only when told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("octvideo.training.callbacks.perf_counter", clock)
    return clock


def test_a_bad_video_is_logged_once_and_counted_every_time(caplog):
    counts = []
    module = SimpleNamespace(log=lambda name, value, **options: counts.append((name, value, options["reduce_fx"])))
    bad = SimpleNamespace(bad=[("a.mp4", "no frame"), ("b.mp4", "empty")], paths=[])
    callback = BadVideos()
    with caplog.at_level(logging.WARNING):
        callback.on_train_batch_end(trainer_in("train"), module, None, bad, 0)
        again, none = (SimpleNamespace(bad=videos, paths=[]) for videos in (bad.bad[:1], []))
        callback.on_validation_batch_end(trainer_in("val"), module, None, again, 0)
        callback.on_test_batch_end(trainer_in("test"), module, None, none, 0)
    assert [record.getMessage() for record in caplog.records] == ["bad video a.mp4: no frame", "bad video b.mp4: empty"]
    assert counts == [("train/bad_videos", 2, "sum"), ("val/bad_videos", 1, "sum"), ("test/bad_videos", 0, "sum")]
    assert callback.reasons == {"a.mp4": "no frame", "b.mp4": "empty"}


def summary(caplog, batches, stage="train", **options):
    """What BadVideos says at the end of an epoch of these batches: (good paths, bad videos) each."""
    callback, module = BadVideos(), SimpleNamespace(log=lambda *arguments, **options: None)
    trainer = trainer_in(stage, **options)
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
    assert summary(caplog, [(["a"], [("b", "broken")])], "val", sanity_checking=True) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_sums_up_all_processes(caplog, monkeypatch, rank):
    def gather(parts, own):
        parts[rank], parts[1 - rank] = own, (10, [("z.mp4", "empty")] if own[0] else [])

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    lines = summary(caplog, [(["a"], [("b.mp4", "empty")])], world_size=2, rank=rank)
    assert [line.split("\n")[0] for line in lines] == ["train: 2 of 12 videos could not be decoded"][rank:]


def epoch(clock, steps, callback=None, device="cpu", is_global_zero=True, videos=4):
    """One epoch of (seconds until the batch comes, seconds of the step); returns what was logged."""
    logged = {}
    module = SimpleNamespace(
        device=torch.device(device), log=lambda name, value, **options: logged.update({name: (value, options)})
    )
    trainer = SimpleNamespace(
        is_global_zero=is_global_zero,
        train_dataloader=SimpleNamespace(num_workers=2),
        num_training_batches=math.inf,  # no estimate
    )
    if callback is None:
        callback = Throughput()
        callback.on_train_start(None, None)
    batch = SimpleNamespace(clips=torch.empty(videos, 3, 3, 1, 1, 1), traffic=Traffic())
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


def test_advice_is_given_when_it_changes(clock, capsys):
    callback = Throughput()
    callback.on_train_start(None, None)
    for wait in (0.4, 0.3, 0, 0, 0.4):
        epoch(clock, [(wait, 0.2)] * 10, callback=callback)
    bounds = [line.partition("-")[0] for line in capsys.readouterr().out.splitlines()]
    assert bounds == ["loader", "compute", "loader"]


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

    callback = Validating()
    callback.on_train_start(None, None)
    logged = epoch(clock, [(0.1, 0.3)] * 10, callback)
    assert logged["train/data_seconds"][0] == pytest.approx(0.1)
    assert logged["train/clips_per_second"][0] == pytest.approx(30)


def test_an_epoch_of_the_first_steps_or_without_clips_says_nothing(clock, capsys):
    assert epoch(clock, [(1, 1)] * Throughput.WARMUP_STEPS) == {}
    assert epoch(clock, [(1, 1)] * 10, videos=0) == {}
    assert capsys.readouterr().out == ""


def test_each_epoch_is_measured_for_itself(clock):
    callback = Throughput()
    callback.on_train_start(None, None)
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
    callback = Working()
    callback.on_train_start(None, None)
    logged = epoch(clock, [(0, 0.01)] * (5 + 7 * 10), callback, device="cuda:1")
    assert waits == [torch.device("cuda:1")] * 22  # before and after the steps 0, 7, ... 70
    assert logged["train/step_seconds"][0] == pytest.approx(0.2)
    assert logged["train/data_seconds"][0] == pytest.approx(0, abs=0.02)
    assert logged["train/clips_per_second"][0] == pytest.approx(60, rel=0.05)


class Batch(NamedTuple):
    clips: torch.Tensor
    labels: torch.Tensor
    paths: list
    bad: list
    traffic: Traffic = Traffic()


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
    assert lines == [  # once: the second epoch is like the first
        "loader-bound: 1.33 clips/s from 0 workers, the model takes 4 (12 of 18 s waited for clips): raise "
        "data.num_workers, or re-encode the videos with tools/prepare_data.py --reencode"
    ]
    assert trainer.callback_metrics["train/data_seconds"].item() == pytest.approx(1)
    assert trainer.callback_metrics["train/step_seconds"].item() == pytest.approx(0.5)
    assert trainer.callback_metrics["train/clips_per_second"].item() == pytest.approx(2 / 1.5)
    summaries = [record.getMessage() for record in caplog.records if "could not be decoded" in record.getMessage()]
    train, val = (
        f"{stage}: 1 of {tried} videos could not be decoded\n  1 x no frame, e.g. bad.mp4"
        for stage, tried in (("train", 25), ("val", 9))
    )
    assert summaries == [val, val, val, train] * 2  # validated after every fourth step


def estimate(clock, capsys, rank=0, **options):
    """What is said of steps of 2 s, the first ones of 60 s, with validations of 1000 s between them."""
    given = {"num_training_batches": 10, "max_epochs": 100, "max_steps": -1, "current_epoch": 2, "global_step": 0}
    trainer = SimpleNamespace(is_global_zero=rank == 0, **{"accumulate_grad_batches": 1, **given, **options})
    module = SimpleNamespace(device=torch.device("cpu"))
    batch = SimpleNamespace(clips=torch.empty(2, 1, 3, 1, 1, 1), traffic=Traffic())
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for step in range(40):
        clock.seconds += 60 if step < 8 else 1.5
        callback.on_train_batch_start(trainer, module, batch, step % 10)
        clock.seconds += 0.5
        callback.on_train_batch_end(trainer, module, None, batch, step % 10)
        if step % 10 == 9:
            clock.seconds += 1000
            callback.on_validation_end(trainer, module)
            callback.on_train_epoch_start(trainer, module)
    return capsys.readouterr().out


def test_after_22_steps_the_length_of_the_run_is_estimated(clock, capsys):
    """Epochs of 10 steps; in the third one 2 steps are done, and 978 of 980 are to come."""
    assert estimate(clock, capsys) == "about 20 s an epoch, 33 min to go (2 s a step, 10 steps an epoch)\n"


def test_the_estimate_ends_with_the_steps_of_the_run_or_has_no_end(clock, capsys):
    steps = estimate(clock, capsys, max_epochs=None, max_steps=5000, global_step=1000, accumulate_grad_batches=4)
    assert steps.startswith("about 20 s an epoch, 8.9 h to go (")
    assert estimate(clock, capsys, max_steps=90, global_step=20).startswith("about 20 s an epoch, 2.3 min to go (")
    assert estimate(clock, capsys, max_epochs=-1).startswith("about 20 s an epoch (2 s a step")
    assert estimate(clock, capsys, num_training_batches=43200, max_epochs=12).startswith(
        "about 24 h an epoch, 10 days to"
    )


def test_no_estimate_of_an_endless_epoch_nor_in_other_processes(clock, capsys):
    assert estimate(clock, capsys, num_training_batches=math.inf) == ""
    assert estimate(clock, capsys, rank=1) == ""


def test_a_gpus_memory_is_the_most_since_the_epochs_start(monkeypatch):
    peak, logged = {}, []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update({device: 0}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[device] + 3 * 2**29)
    module = SimpleNamespace(
        device=torch.device("cuda:1"), log=lambda *values, **options: logged.append((values, options))
    )
    callback = Memory()
    for start in (callback.on_train_start, callback.on_train_epoch_start):
        peak[module.device] = 2**40
        start(None, module)
        callback.on_train_epoch_end(None, module)
    assert logged == [(("train/memory_gib", 1.5), {"reduce_fx": "max", "sync_dist": True})] * 2


def test_without_a_gpu_memory_is_what_the_process_holds_if_the_system_tells(monkeypatch, tmp_path):
    logged = []
    module = SimpleNamespace(device=torch.device("cpu"), log=lambda name, value, **options: logged.append(value))
    (tmp_path / "statm").write_text("900000 262144 1 1 0 1 0\n")
    monkeypatch.setattr("octvideo.training.callbacks.STATM", tmp_path / "statm")
    Memory().on_train_epoch_end(None, module)
    assert logged == [262144 * os.sysconf("SC_PAGE_SIZE") / 2**30]
    monkeypatch.setattr("octvideo.training.callbacks.STATM", tmp_path / "missing")
    Memory().on_train_epoch_end(None, module)
    assert len(logged) == 1


class Steps(LightningModule):
    """One weight of 3; the loss of a batch is its label times the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def training_step(self, batch, index):
        loss = self.weight * batch.labels[0]
        self.log("train/loss", loss, batch_size=1, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.001)


def batches(labels):
    """A loader of batches of these labels, each of two videos named by its number."""
    made = [
        Batch(torch.ones(2, 1, 1, 1, 1, 1), torch.tensor([float(label)]), [f"{k}a.mp4", f"{k}b.mp4"], [])
        for k, label in enumerate(labels)
    ]
    return DataLoader(made, batch_size=None)


def trainer_with(tmp_path, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    common = {"max_epochs": 1, "accelerator": "cpu", "callbacks": list(callbacks), "default_root_dir": tmp_path}
    return Trainer(**{**common, **quiet, **options})


class LastGood(Callback):
    """Stands in for the callback that keeps checkpoints."""

    last_good = Path("runs/x/step3.ckpt")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(tmp_path, bad):
    module = Steps()
    trainer = trainer_with(tmp_path, FiniteLoss(), LastGood())
    with pytest.raises(NotFiniteError) as error:
        trainer.fit(module, batches([1, 2, bad, 1]))
    assert module.weight.item() == pytest.approx(3 - 0.001 * (1 + 2))
    assert str(error.value).split("; ") == [
        f"the loss is {bad} in step 3 (epoch 1, batch 3, process 0): the run ends before it changes the weights",
        "lower model.learning_rate, or look at the batch's videos: 2a.mp4, 2b.mp4",
        "resume from runs/x/step3.ckpt with --ckpt_path last",
    ]


class BadGradient(Steps):
    def on_after_backward(self):
        self.weight.grad *= math.inf


def test_a_gradient_that_is_not_finite_ends_the_run_in_a_logged_step(tmp_path):
    module = BadGradient()
    trainer = trainer_with(tmp_path, FiniteLoss(), log_every_n_steps=1)
    with pytest.raises(NotFiniteError, match=r"^the norm of the gradients is inf in step 1 .* there is no checkpoint"):
        trainer.fit(module, batches([1]))
    assert module.weight.item() == 3


def test_a_scaler_may_skip_a_step_whose_gradient_is_not_finite(tmp_path):
    module = BadGradient()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # the Trainer takes none on a CPU
    trainer_with(tmp_path, FiniteLoss(), log_every_n_steps=1, plugins=precision).fit(module, batches([1, 1]))
    assert module.weight.item() == 3


def test_the_gradients_norm_is_computed_in_the_logged_steps_and_before_clipping(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = trainer_with(
        tmp_path, FiniteLoss(), logger=logger, log_every_n_steps=2, accumulate_grad_batches=2, gradient_clip_val=0.5
    )
    trainer.fit(Steps(), batches([1, 1, 3, 1, 5, 5, 7, 9]))
    lines = Path(logger.log_dir, "metrics.csv").read_text().split()
    column = lines[0].split(",").index("train/gradient_norm")
    assert [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]] == [2, 8]


def test_a_norm_that_is_not_finite_ends_the_run_where_nothing_is_logged_either(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
    for interval in (0, 3):
        with pytest.raises(NotFiniteError, match="the norm of the gradients is inf in step 1 "):
            trainer_with(tmp_path, FiniteLoss(), log_every_n_steps=interval).fit(Steps(), batches([1, 1]))


def test_the_norm_of_sharded_gradients_is_that_of_all_shards():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights = [nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Shard(0)])) for _ in range(2)]
        weights[0].grad = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)])
        logged = []
        module = SimpleNamespace(log=lambda name, value: logged.append(value))
        trainer = SimpleNamespace(log_every_n_steps=1, global_step=0, precision_plugin=None)
        FiniteLoss().on_before_optimizer_step(trainer, module, torch.optim.SGD(weights))
        assert not isinstance(logged[0], DTensor)
        assert logged[0].item() == 5
    finally:
        torch.distributed.destroy_process_group()


class Dying(torch.utils.data.Dataset):
    """Its third sample's process is killed; it hands over no tensors, whose loss is another error."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return Batch(None, [1.0], ["a.mp4", "b.mp4"], [])


def test_a_killed_loader_is_named_with_a_way_on(tmp_path):
    trainer = trainer_with(tmp_path, LastGood())
    with pytest.raises(LoaderKilledError) as error, naming_killed_loaders(trainer):
        trainer.fit(Steps(), DataLoader(Dying(), batch_size=None, num_workers=1))
    assert str(error.value) == (
        "a loader process was killed, probably by the system for lack of memory: lower data.num_workers or "
        "data.prefetch_batches; resume from runs/x/step3.ckpt with --ckpt_path last"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Bus error. It is possible that dataloader's workers are out of", "found no more shared memory: enlarge /dev"),
        ("Segmentation fault. ", "crashed (Segmentation fault): try another data.backend; resume from runs/x"),
    ],
)
def test_a_loader_that_crashed_is_named_by_its_signal(text, why):
    """Torch gives the signal in an error of its own or as the cause of another one."""
    error = RuntimeError(f"DataLoader worker (pid 17) is killed by signal: {text}")
    later = RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")
    later.__cause__ = error
    for given in (error, later):
        with pytest.raises(LoaderKilledError) as named, naming_killed_loaders(SimpleNamespace(callbacks=[LastGood()])):
            raise given
        assert str(named.value).startswith(f"a loader process {why}")


def test_tensors_of_a_killed_loader_are_laid_on_it(tmp_path):
    handed_over = DupFd(os.open(tmp_path, os.O_RDONLY))
    resource_sharer.stop()
    with (
        pytest.raises(LoaderKilledError, match=r"was killed, .*; there is no checkpoint to resume from$"),
        naming_killed_loaders(SimpleNamespace(callbacks=[])),
    ):
        handed_over.detach()


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left"),
            "docker run --shm-size",
        ),
        (OSError(24, "Too many open files"), "raise `ulimit -n`, or lower data.num_workers or"),
        (OSError(12, "Cannot allocate memory"), "or the training itself found no more memory: lower data.batch_size"),
    ],
)
def test_what_a_loader_lacks_is_named_with_its_cure(error, cure):
    with pytest.raises(LoaderKilledError) as named, naming_killed_loaders(None):
        raise error
    assert cure in str(named.value)
    assert str(named.value).endswith("data.prefetch_batches")  # nothing to resume in a test


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError("disk full"), EOFError("no more")])
def test_other_errors_are_not_laid_on_loaders(error):
    with pytest.raises(type(error), match=str(error)), naming_killed_loaders(None):
        raise error


def test_an_epoch_that_is_resumed_in_the_middle_is_measured(clock, tmp_path):
    """12 batches an epoch, the run interrupted after the fourth; what is measured is of the 8 others."""
    loader = DataLoader(Slow(clock, 12), batch_size=None)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer_with(tmp_path, saved).fit(Tiny(clock), loader)
    trainer = trainer_with(tmp_path, Throughput(), Memory())
    trainer.fit(Tiny(clock), loader, ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
    assert trainer.callback_metrics["train/memory_gib"] > 0
    assert trainer.callback_metrics["train/step_seconds"] == 0.5


def test_the_names_of_figures_work_in_tensorboard_and_csv(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path, name="csv")]
    trainer_with(tmp_path, FiniteLoss(), Memory(), logger=loggers, log_every_n_steps=1).fit(Steps(), batches([1, 2, 3]))
    names = {"train/gradient_norm", "train/memory_gib", "train/loss_step", "train/loss_epoch"}
    assert names < set(Path(loggers[1].log_dir, "metrics.csv").read_text().split()[0].split(","))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert names < set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("train/gradient_norm")] == [1, 2, 3]


def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for variable, value in (
        ("MODE", "offline"),
        ("CONSOLE", "off"),
        ("SILENT", "true"),
        ("CACHE_DIR", tmp_path),
        ("CONFIG_DIR", tmp_path),
    ):
        monkeypatch.setenv(f"WANDB_{variable}", str(value))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer_with(tmp_path, FiniteLoss(), Memory(), logger=logger, log_every_n_steps=1).fit(Steps(), batches([1, 2, 3]))
    wandb.teardown()  # waits for the file
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = run.read_bytes()
    assert all(name in written for name in (b"train/gradient_norm", b"train/memory_gib", b"train/loss_epoch"))


def test_the_moving_average_is_quick_at_first():
    average = MovingAverage(0.9)
    model = nn.Linear(1, 1, bias=False)
    average._average_model = AveragedModel(model, **average._kwargs)
    wanted = None
    for step, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0]):
        nn.init.constant_(model.weight, value)
        average._average_model.update_parameters(model)
        kept = (1 + step) / (10 + step)
        wanted = value if wanted is None else kept * wanted + (1 - kept) * value
        assert average._average_model.module.weight.item() == pytest.approx(wanted)
    average._average_model.n_averaged.fill_(1000)
    nn.init.constant_(model.weight, 0.0)
    average._average_model.update_parameters(model)
    assert average._average_model.module.weight.item() == pytest.approx(0.9 * wanted)


def test_the_average_of_what_does_not_change_is_that_bit_for_bit():
    average = MovingAverage(0.998)
    model = nn.BatchNorm1d(100)
    nn.init.normal_(model.running_mean)
    average._average_model = AveragedModel(model, **average._kwargs)
    for _ in range(100):
        average._average_model.update_parameters(model)
        model.num_batches_tracked += 1
    averaged = average._average_model.module
    assert torch.equal(averaged.running_mean, model.running_mean)
    assert averaged.num_batches_tracked == 99


@pytest.mark.parametrize("decay", [0, 1])
def test_impossible_averages_are_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay must lie between 0 and 1, got {decay}"):
        MovingAverage(decay)


def test_the_estimate_counts_the_steps_of_each_of_multigrids_epochs(capsys):
    lengths = [40, 60, 100]
    data = VideoData(multigrid=Multigrid())
    data.batches_in_epoch = lengths.__getitem__
    trainer = SimpleNamespace(
        num_training_batches=60, is_global_zero=True, max_epochs=3, max_steps=-1, current_epoch=1, datamodule=data
    )
    Throughput()._estimate(trainer, 2.0, 22)
    assert "4.6 min to go (2 s a step, 60 steps an epoch)" in capsys.readouterr().out  # 138 steps
