"""Checkpoints: what a killed, signalled or resumed run finds again, with a real Trainer and a tiny network."""

import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from octvideo.errors import DamagedCheckpointError
from octvideo.files import verify
from octvideo.training import checkpoints
from octvideo.training.checkpoints import EXIT_PREEMPTED, AtomicCheckpointIO, Preempted, RunCheckpoints, newest_intact

BATCHES, ACCUMULATE = 7, 2  # the last optimiser step of an epoch is of one batch
STEPS = 4  # per epoch


class Batches:
    """Batches that are arithmetic of the epoch and the place in it, from where the trainer is."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return BATCHES

    def __iter__(self):
        loop = self.model.trainer.fit_loop
        epoch, first = loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready
        for batch in range(first, BATCHES):
            yield torch.arange(12.0).view(4, 3).add(5 * batch + 11 * epoch).sin()


class Tiny(LightningModule):
    """Notes its batches, and how many there were at the start and end of every epoch and every validation."""

    def __init__(self, scores=None):
        super().__init__()
        self.scores = scores
        self.started, self.validated, self.ended, self.steps = [], [], [], []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))

    def on_train_epoch_start(self):
        self.started.append(self.trainer.fit_loop.total_batch_idx + 1)

    def training_step(self, batch, batch_idx):
        self.steps.append((self.current_epoch, batch_idx))
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.fit_loop.total_batch_idx + 1)
            if self.scores is not None:
                self.log("val/top1", self.scores[self.current_epoch])

    def on_train_epoch_end(self):
        self.ended.append(self.trainer.fit_loop.total_batch_idx + 1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), "interval": "step"}]

    def train_dataloader(self):
        return Batches(self)

    def val_dataloader(self):
        return DataLoader(torch.ones(4, 3), batch_size=2)


def fit(folder, model=None, ckpt_path=None, callbacks=(), every_n_steps=1, keep=100, monitor=None, **options):
    """Trains three epochs unless told otherwise; the model, its checkpoints and the trainer."""
    model = model or Tiny()
    saves = RunCheckpoints(folder, every_n_steps, keep, monitor)
    options = {"max_epochs": 3, "accumulate_grad_batches": ACCUMULATE, "num_sanity_val_steps": 0} | options
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saves, *callbacks],
        **options,
    )
    trainer.fit(model, ckpt_path=ckpt_path, weights_only=True)
    return model, saves, trainer


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


class At(Callback):
    """Does something when a batch of training, or of validation, starts."""

    def __init__(self, does, step=None, validation=None):
        self.does, self.step, self.validation = does, step, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.does()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if (trainer.current_epoch, batch_idx) == self.validation:
            self.does()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The model at the end of three epochs."""
    return fit(tmp_path_factory.mktemp("whole"), every_n_steps=None)[0]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of every size of record, as its path and its bytes."""
    path = tmp_path / "step_00000002.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.arange(500.0), "one": torch.ones(1), "step": 2}, path)
    return path, path.read_bytes()


# What is written


def test_a_saved_checkpoint_is_an_ordinary_file_of_torch(saved):
    path, _ = saved
    for content in (torch.load(path, weights_only=True), AtomicCheckpointIO().load_checkpoint(path, weights_only=True)):
        assert torch.equal(content["weight"], torch.arange(500.0))
        assert content["step"] == 2


def test_every_truncation_is_detected(saved):
    path, content = saved
    sizes = [0, 1, len(content) - 1, *range(len(content) - 50, len(content))]
    for size in sizes + random.Random(0).sample(range(len(content)), 10):
        path.write_bytes(content[:size])
        with pytest.raises(DamagedCheckpointError, match=r"step_00000002\.ckpt is no intact checkpoint"):
            verify(path)
    path.write_bytes(content[:-30] + b"\0\0")
    with pytest.raises(DamagedCheckpointError, match="its checksum is torn"):
        verify(path)


def test_every_flipped_bit_is_detected(saved):
    path, content = saved
    draw = random.Random(1)
    tail = range(len(content) - 700, len(content))  # the archive's directory and the checksum
    for place in [*draw.sample(range(len(content)), 10), *tail[::3], *tail[-49:]]:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpointError):
            AtomicCheckpointIO().load_checkpoint(path)


def test_a_checkpoint_without_our_checksum_is_checked_by_its_records(tmp_path):
    path = tmp_path / "foreign.ckpt"
    torch.save({"weight": torch.arange(500.0)}, path)
    verify(path)
    content = path.read_bytes()
    place = content.index(torch.arange(500.0).numpy().tobytes())
    path.write_bytes(content[: place + 9] + b"\xff" + content[place + 10 :])
    with pytest.raises(DamagedCheckpointError, match=r"record foreign/data/0|record archive/data/0"):
        verify(path)
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        verify(path)


def test_a_missing_checkpoint_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none.ckpt")


def test_a_checkpoint_on_a_broken_disk_is_damaged(tmp_path):
    (tmp_path / "step_00000001.ckpt").mkdir()
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read .*directory"):
        verify(tmp_path / "step_00000001.ckpt")


@pytest.fixture
def small_files():
    """Lets no file of this process grow beyond 1000 bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(saved, small_files):
    path, content = saved
    small_files()
    with pytest.raises(OSError, match="File too large") as failure:
        AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(500)}, path)
    assert failure.value.errno == errno.EFBIG
    assert files(path.parent) == [path.name]
    assert path.read_bytes() == content


def test_options_of_other_storages_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"without storage_options, got \{'fast': True\}"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", {"fast": True})


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "a.ckpt"
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((os.readlink(f"/proc/self/fd/{number}"), path.exists()))
    )
    AtomicCheckpointIO().save_checkpoint({}, path)
    assert synced == [(f"{path}.tmp", False), (str(tmp_path), True)]


@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_only_a_folder_that_cannot_be_synced_at_all_is_no_failure(tmp_path, monkeypatch, code, fails):
    def sync(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", sync)
    if fails:
        with pytest.raises(OSError, match="Input/output"):
            AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    else:
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert files(tmp_path) == ["a.ckpt"]


# What is read


def test_the_newest_intact_checkpoint_is_found_and_the_damaged_ones_are_named(saved):
    path, content = saved
    for step in (1, 3, 10):
        path.with_name(f"step_{step:08d}.ckpt").write_bytes(content if step == 1 else content[: 100 * step])
    path.with_name("step_new.ckpt").write_bytes(content)
    newest, damaged = newest_intact(path.parent)
    assert newest == path
    assert [(other.name, "no intact checkpoint" in why) for other, why in damaged] == [
        ("step_00000010.ckpt", True),
        ("step_00000003.ckpt", True),
    ]


def test_a_folder_without_an_intact_checkpoint_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint to resume from: no step_\*\.ckpt there"):
        newest_intact(tmp_path)
    (tmp_path / "step_00000004.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"resume from: .*step_00000004\.ckpt is no intact checkpoint: cannot be read"):
        newest_intact(tmp_path)
    (tmp_path / "best.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"; (.*)/best\.ckpt may be intact: --ckpt_path \1/best\.ckpt$"):
        newest_intact(tmp_path)


# When a run saves, and what stays


def test_steps_are_saved_when_they_are_due_and_before_and_after_a_validation(tmp_path):
    _, saves, _ = fit(tmp_path, every_n_steps=5, check_val_every_n_epoch=2)
    # Epochs end after 4, 8 and 12 steps; the second is validated, so 7 is saved too; 5 and 10 are due.
    steps = [4, 5, 7, 8, 10, 12]
    assert files(tmp_path) == ["last.ckpt", *(f"step_{step:08d}.ckpt" for step in steps)]
    assert [step_of(tmp_path / f"step_{step:08d}.ckpt") for step in steps] == steps
    assert b"octvideo sha256" in (tmp_path / "step_00000005.ckpt").read_bytes()
    assert os.readlink(tmp_path / "last.ckpt") == "step_00000012.ckpt"
    assert saves.last_good == tmp_path / "step_00000012.ckpt"


def test_no_step_is_saved_just_before_a_validation_amid_an_epoch(tmp_path):
    fit(tmp_path, val_check_interval=6, max_epochs=1)
    assert files(tmp_path) == ["last.ckpt", *(f"step_{step:08d}.ckpt" for step in (1, 2, 4))]


def test_without_every_n_steps_epochs_and_the_steps_before_validations_are_saved(tmp_path):
    fit(tmp_path, every_n_steps=None)
    assert files(tmp_path) == ["last.ckpt", *(f"step_{step:08d}.ckpt" for step in (3, 4, 7, 8, 11, 12))]


def test_without_validations_only_epochs_are_saved(tmp_path):
    fit(tmp_path, every_n_steps=None, limit_val_batches=0)
    assert files(tmp_path) == ["last.ckpt", *(f"step_{step:08d}.ckpt" for step in (4, 8, 12))]


def test_the_step_before_a_validation_amid_an_epoch_is_saved(tmp_path):
    fit(tmp_path, every_n_steps=None, val_check_interval=4, max_epochs=2)
    assert {"step_00000001.ckpt", "step_00000005.ckpt"} <= set(files(tmp_path))  # the validation follows steps 2 and 6


def test_a_run_that_somebody_stops_amid_an_epoch_can_be_prolonged_from_there(tmp_path, whole):
    stop = At(lambda: None)
    stop.on_train_batch_end = lambda trainer, *args: setattr(trainer, "should_stop", trainer.global_step == 2)
    _, saves, _ = fit(tmp_path / "stopped", callbacks=[stop], every_n_steps=None)
    assert saves.last_good == tmp_path / "stopped" / "step_00000002.ckpt"
    model, _, _ = fit(tmp_path / "stopped", ckpt_path=saves.last_good)
    assert model.steps == whole.steps[4:]
    for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_stay_and_the_best_survives_them(tmp_path):
    model, saves, _ = fit(tmp_path, Tiny([0.5, float("nan"), 0.25]), keep=2, monitor="val/top1")
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_00000011.ckpt", "step_00000012.ckpt"]
    assert step_of(tmp_path / "best.ckpt") == 4
    assert (saves.best_score, saves.best_step) == (0.5, 4)
    verify(tmp_path / "best.ckpt")
    assert model.validated == [7, 14, 21]


def test_the_best_is_remembered_by_a_run_that_goes_on(tmp_path):
    fit(tmp_path, Tiny([0.25, 0.5]), monitor="val/top1", max_epochs=2)
    last = tmp_path / "step_00000008.ckpt"
    os.replace(tmp_path / "step_00000004.ckpt", tmp_path / "best.ckpt")  # as if it was killed before the best was named
    for _ in range(2):
        _, saves, _ = fit(tmp_path, Tiny([0, 0, 0.375]), last, monitor="val/top1", max_epochs=3)
        assert saves.best_score == 0.5
        assert step_of(tmp_path / "best.ckpt") == 8
        assert not list(tmp_path.glob("*.tmp"))
    _, saves, _ = fit(tmp_path, Tiny([0, 0, 0.75]), last, monitor="val/top1", max_epochs=3)
    assert saves.best_score == 0.75
    assert step_of(tmp_path / "best.ckpt") == 12


def test_a_metric_that_is_not_there_is_an_error_after_the_save(tmp_path):
    with pytest.raises(ValueError, match=r"best\.ckpt is chosen by 'val/top1', which the validation did not log"):
        fit(tmp_path, monitor="val/top1", every_n_steps=None)
    assert files(tmp_path) == ["last.ckpt", "step_00000003.ckpt", "step_00000004.ckpt"]


def test_epochs_without_validation_have_no_best(tmp_path):
    _, saves, _ = fit(tmp_path, Tiny([0, 0.5, 0]), monitor="val/top1", every_n_steps=None, check_val_every_n_epoch=2)
    assert saves.best_step == 8


def test_what_is_newer_than_the_step_gone_back_to_is_deleted_after_the_next_save(tmp_path, caplog):
    fit(tmp_path, max_epochs=1)
    fit(tmp_path, ckpt_path=tmp_path / "step_00000001.ckpt", max_steps=2, max_epochs=-1, keep=2)
    assert files(tmp_path) == ["last.ckpt", "step_00000001.ckpt", "step_00000002.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "step_00000002.ckpt"
    assert "step_00000004.ckpt is deleted: training went back to an earlier step and is at step 2" in caplog.text


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "step_00000099.ckpt.tmp").write_bytes(b"half")
    fit(tmp_path, every_n_steps=None, max_epochs=1, limit_val_batches=0)
    assert files(tmp_path) == ["last.ckpt", "step_00000004.ckpt"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_without_links_there_are_copies(tmp_path, monkeypatch, hard_links):
    def refuse(self, *args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    fit(tmp_path, Tiny([0.5]), monitor="val/top1", max_epochs=1)
    newest = tmp_path / "step_00000004.ckpt"
    for name in ("best.ckpt", "last.ckpt"):
        assert not (tmp_path / name).is_symlink()
        assert os.path.samefile(tmp_path / name, newest) == hard_links
        assert (tmp_path / name).read_bytes() == newest.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps and keep must be at least 1, got 0 and 3"),
        ({"keep": 0}, "every_n_steps and keep must be at least 1, got None and 0"),
    ],
)
def test_counts_below_one_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RunCheckpoints(tmp_path, **options)


# Going on


def everything(model, trainer, ema):
    """All that training has made, for comparison."""
    state = {f"model {name}": value for name, value in model.state_dict().items()}
    state |= {f"average {name}": value for name, value in ema._average_model.state_dict().items()}
    momenta = trainer.optimizers[0].state_dict()["state"]
    state |= {f"momentum {index}": value["momentum_buffer"] for index, value in momenta.items()}
    state["learning rate"] = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
    return state


@pytest.mark.parametrize(
    "options",
    [
        {"check_val_every_n_epoch": 2},
        {"max_epochs": -1, "max_steps": 10},
        {"val_check_interval": 3, "max_epochs": 2},
    ],
    ids=["epochs with and without validation", "limit of steps", "validations amid epochs"],
)
def test_going_on_from_any_checkpoint_repeats_the_run_bit_for_bit(tmp_path, options):
    ema = EMAWeightAveraging(decay=0.9)
    model, _, trainer = fit(tmp_path / "whole", callbacks=[ema], **options)
    expected = everything(model, trainer, ema)
    starts = sorted((tmp_path / "whole").glob("step_*.ckpt"))
    assert len(starts) >= 6
    for start in starts[:-1]:
        ema = EMAWeightAveraging(decay=0.9)
        again, _, trainer = fit(tmp_path / start.stem, ckpt_path=start, callbacks=[ema], **options)
        actual = everything(again, trainer, ema)
        assert actual.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(value, actual[name])] == [], start.name
        epochs, steps = divmod(int(start.stem[-8:]), STEPS)
        done = BATCHES * epochs + ACCUMULATE * steps
        assert again.steps == model.steps[done:], start.name
        assert again.started == [batches for batches in model.started if batches >= done], start.name
        assert again.validated == [batches for batches in model.validated if batches > done], start.name
        assert again.ended == [batches for batches in model.ended if batches > done], start.name


def test_a_run_that_a_limit_of_steps_ended_amid_an_epoch_can_be_prolonged(tmp_path, whole):
    _, saves, _ = fit(tmp_path, every_n_steps=None, max_steps=6, max_epochs=-1)
    again, _, _ = fit(tmp_path, ckpt_path=saves.last_good, every_n_steps=None)
    assert again.steps == whole.steps[-len(again.steps) :]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


# A full disk


def test_a_full_disk_stops_neither_training_nor_the_next_save(tmp_path, caplog, small_files):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill, free = At(small_files, 5), At(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits), 7)
    _, _, trainer = fit(
        tmp_path, Tiny([0.5, 0.75, 0.75]), callbacks=[fill, free], keep=2, every_n_steps=3, monitor="val/top1"
    )
    warnings = [record.getMessage() for record in caplog.records if record.name == checkpoints.__name__]
    good = tmp_path / "step_00000004.ckpt"
    assert warnings == [
        f"{tmp_path}/step_0000000{step}.ckpt was not saved: [Errno 27] File too large. "
        f"Training goes on; newest checkpoint: {good}"
        for step in (6, 7)
    ]
    assert trainer.global_step == 12
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_00000011.ckpt", "step_00000012.ckpt"]
    assert step_of(tmp_path / "best.ckpt") == 8


def test_a_best_that_could_not_be_saved_is_not_the_best(tmp_path, small_files):
    class Keeping(Callback):
        def __init__(self, kept):
            self.kept = kept

        def on_exception(self, trainer, pl_module, exception):
            self.kept.append(trainer.checkpoint_callback)

    kept, last = [], tmp_path / "step_00000004.ckpt"
    way = f"the end of the training is not saved: [Errno 27] File too large; free space and resume from {last} with"
    with pytest.raises(OSError, match=re.escape(way)):
        fit(
            tmp_path,
            Tiny([0.5, 0.75]),
            callbacks=[At(small_files, 5), Keeping(kept)],
            every_n_steps=None,
            monitor="val/top1",
            max_epochs=2,
        )
    (saves,) = kept
    assert (saves.best_score, saves.best_step) == (0.5, 4)
    assert saves.last_good == tmp_path / "step_00000004.ckpt"
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_00000003.ckpt", "step_00000004.ckpt"]


def test_nothing_is_deleted_while_last_cannot_be_moved_on(tmp_path, caplog, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "point_to", refuse)
    _, saves, _ = fit(tmp_path, keep=1, every_n_steps=None, limit_val_batches=0)
    assert files(tmp_path) == [f"step_{step:08d}.ckpt" for step in (4, 8, 12)]
    assert saves.last_good == tmp_path / "step_00000012.ckpt"
    assert (
        "step_00000012.ckpt is saved, but last.ckpt, best.ckpt or old files could not be changed: [Errno 28]"
        in caplog.text
    )


# Signals


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_under_way_and_leaves(tmp_path, caplog, number):
    before = signal.getsignal(number)
    model = Tiny()
    with pytest.raises(Preempted) as left:
        fit(tmp_path, model, callbacks=[At(send(number), 5)], every_n_steps=100)
    assert left.value.path == tmp_path / "step_00000006.ckpt"
    assert left.value.code == EXIT_PREEMPTED == 75
    assert len(model.steps) == BATCHES + 2 * ACCUMULATE
    assert step_of(tmp_path / "last.ckpt") == 6
    assert f"stopped by SIGTERM or SIGUSR1: exit code 75; resume from {left.value.path}" in caplog.text
    assert signal.getsignal(number) == before


def test_a_signal_in_the_last_step_of_an_epoch_waits_for_its_end(tmp_path, whole):
    model = Tiny()
    with pytest.raises(Preempted) as left:
        fit(tmp_path, model, callbacks=[At(send(signal.SIGTERM), 3)], limit_val_batches=0, every_n_steps=100)
    assert left.value.path == tmp_path / "step_00000004.ckpt"
    assert model.ended == [7]
    again, _, _ = fit(tmp_path, ckpt_path=left.value.path, limit_val_batches=0)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_signal_in_a_validation_leaves_at_once_and_costs_one_step(tmp_path):
    model = Tiny()
    with pytest.raises(Preempted) as left:
        fit(tmp_path, model, callbacks=[At(send(signal.SIGTERM), validation=(1, 0))], every_n_steps=100)
    assert left.value.path == tmp_path / "step_00000007.ckpt"
    assert model.validated == [7]


def test_a_signal_in_a_validation_leaves_at_once_where_only_epochs_are_saved_too(tmp_path):
    model = Tiny()
    with pytest.raises(Preempted) as left:
        fit(tmp_path, model, callbacks=[At(send(signal.SIGTERM), validation=(1, 0))], every_n_steps=None)
    assert left.value.path == tmp_path / "step_00000007.ckpt"
    assert model.validated == [7]


def test_processes_that_go_on_from_different_checkpoints_are_refused(tmp_path):
    saves = RunCheckpoints(tmp_path, start="there/step_00000001.ckpt")
    strategy = SimpleNamespace(broadcast=lambda name: "step_00000002.ckpt")
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=False, global_rank=3)
    with pytest.raises(ValueError, match=r"process 3 resumes from step_00000001.ckpt, and process 0 from step_0"):
        saves.setup(trainer, None, "fit")


def test_a_signal_before_the_first_step_leaves_without_a_checkpoint(tmp_path):
    with pytest.raises(Preempted) as left:
        fit(
            tmp_path,
            callbacks=[At(send(signal.SIGTERM), validation=(0, 0))],
            num_sanity_val_steps=2,
            every_n_steps=None,
        )
    assert left.value.path is None
    assert files(tmp_path) == []


def test_a_signal_in_the_last_epoch_of_all_lets_the_run_finish(tmp_path):
    fit(tmp_path, callbacks=[At(send(signal.SIGTERM), 11)], limit_val_batches=0)
    assert step_of(tmp_path / "last.ckpt") == 12


def test_a_second_signal_changes_nothing(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        fit(tmp_path, callbacks=[At(twice, 5)], every_n_steps=100)
    assert newest_intact(tmp_path) == (tmp_path / "step_00000006.ckpt", [])


def test_a_signal_while_a_checkpoint_is_written_leaves_it_whole(tmp_path, monkeypatch):
    sync, sent = os.fsync, []

    def signalled(number):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        sync(number)

    monkeypatch.setattr(os, "fsync", signalled)
    with pytest.raises(Preempted) as left:
        fit(tmp_path, every_n_steps=1)
    # The save of step 1 was under way; in the check after step 1 nobody had been told.
    assert left.value.path == tmp_path / "step_00000002.ckpt"
    assert newest_intact(tmp_path) == (left.value.path, [])


def test_training_in_a_thread_leaves_the_signals_alone(tmp_path):
    trained = []
    thread = threading.Thread(target=lambda: trained.append(fit(tmp_path, max_epochs=1)))
    thread.start()
    thread.join()
    assert trained
    assert step_of(tmp_path / "last.ckpt") == 4


def test_a_disk_that_is_full_when_a_signal_comes_names_the_older_checkpoint(tmp_path, small_files):
    with pytest.raises(Preempted) as left:
        fit(tmp_path, callbacks=[At(small_files, 5), At(send(signal.SIGTERM), 5)], every_n_steps=4)
    assert left.value.path == tmp_path / "step_00000004.ckpt"


def test_a_run_that_goes_on_and_cannot_save_names_the_checkpoint_it_went_on_from(tmp_path, small_files):
    fit(tmp_path / "before", every_n_steps=None, max_epochs=1)
    start = tmp_path / "before" / "step_00000004.ckpt"
    with pytest.raises(Preempted) as left:
        fit(tmp_path / "after", ckpt_path=start, callbacks=[At(small_files, 4), At(send(signal.SIGTERM), 4)])
    assert left.value.path == start


def test_the_best_of_the_folder_stays_when_training_goes_back(tmp_path):
    fit(tmp_path, Tiny([0.25, 0.375, 0.875]), monitor="val/top1", every_n_steps=None)
    assert step_of(tmp_path / "best.ckpt") == 12
    start = tmp_path / "step_00000004.ckpt"
    _, saves, _ = fit(tmp_path, Tiny([0.25, 0.375, 0.5]), ckpt_path=start, monitor="val/top1", every_n_steps=None)
    assert (saves.best_score, saves.best_step) == (0.875, 12)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert best["callbacks"]["RunCheckpoints"] == {"best_score": 0.875, "best_step": 12}
    other = tmp_path / "other"
    _, saves, _ = fit(other, Tiny([0.25, 0.125, 0.0]), ckpt_path=tmp_path / "step_00000004.ckpt", monitor="val/top1")
    assert (saves.best_score, saves.best_step) == (0.125, 8)
    assert step_of(other / "best.ckpt") == 8


def test_a_damaged_best_counts_no_more(tmp_path, caplog):
    fit(tmp_path, Tiny([0.25, 0.875]), monitor="val/top1", max_epochs=2)
    (tmp_path / "best.ckpt").unlink()
    (tmp_path / "best.ckpt").write_bytes(b"PK torn")
    start = tmp_path / "step_00000004.ckpt"
    _, saves, _ = fit(tmp_path, Tiny([0.25, 0.5, 0.375]), ckpt_path=start, monitor="val/top1")
    assert "best.ckpt is no intact checkpoint" in caplog.text
    assert (saves.best_score, saves.best_step) == (0.5, 8)


class Estimate(Callback):
    """Sets statistics at the end of an epoch, as precise batch norm does."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.net[1].running_mean.fill_(trainer.global_step)


@pytest.mark.parametrize(
    ("options", "best"), [({"max_steps": 6, "max_epochs": -1}, (0.25, 4)), ({"stop": 6}, (0.75, 6))]
)
def test_a_run_that_stops_amid_an_epoch_keeps_what_follows_and_can_be_prolonged(tmp_path, whole, options, best):
    """Lightning validates where a callback stops the run, and not at max_steps."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.should_stop = trainer.global_step == stop

    stop, scores = options.pop("stop", None), [0.25, 0.75, 0.875]
    _, saves, _ = fit(tmp_path, Tiny(scores), monitor="val/top1", callbacks=[Stop(), Estimate()], **options)
    assert (saves.best_score, saves.best_step) == best
    assert step_of(tmp_path / "best.ckpt") == best[1]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["net.1.running_mean"].tolist() == [6, 6]
    found, _, trainer = fit(tmp_path, Tiny(scores), monitor="val/top1", ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 12
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), whole.parameters(), strict=True))


def test_a_run_under_torchrun_waits_until_the_one_before_has_died(tmp_path, monkeypatch):
    held, waits, real = iter([True, True]), [], checkpoints.lock
    monkeypatch.setattr(checkpoints, "lock", lambda path: None if next(held, False) else real(path))
    monkeypatch.setattr(checkpoints.time, "sleep", waits.append)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    saves = RunCheckpoints(tmp_path)
    trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda value: value), is_global_zero=True)
    saves.setup(trainer, None, "fit")
    assert len(waits) == 2
    saves.teardown(trainer, None)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """Locks are a process's own, so another process has to hold it."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another run is writing to"):
            fit(tmp_path)
        assert files(tmp_path) == [".lock"]  # the other's, which the refused run leaves in place
        other.communicate("\n")
    fit(tmp_path, max_epochs=1)
    assert ".lock" not in files(tmp_path)


def test_a_file_system_without_locks_has_no_guard(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    fit(tmp_path, max_epochs=1)
    assert "step_00000004.ckpt" in files(tmp_path)
