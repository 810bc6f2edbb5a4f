"""A run that is killed or told to leave at any step goes on to the same weights, bit for bit."""

import random
import signal

import pytest
import torch
from conftest import long, run_processes, run_tool, small

from octvideo.files import verify

STEPS = 12


def options_of(data, run, processes):
    """Three epochs of eight batches, with all that has a state or a random choice."""
    return [
        *small(data, run),
        f"--data.batch_size={4 // processes}",
        "--data.num_workers=2",
        "--data.augmentation.mixup_alpha=0.8",
        "--data.augmentation.rand_augment_layers=1",
        "--data.augmentation.erase_probability=0.5",
        "--model.warmup_epochs=1",
        "--ema_decay=0.9",
        "--precise_bn=1",
        "--save_every_n_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_epochs=3",
    ]


def fault(batch, number, rank=0):
    return [
        "--trainer.callbacks=faults.Signal",
        f"--trainer.callbacks.batch={batch}",
        f"--trainer.callbacks.number={int(number)}",
        f"--trainer.callbacks.rank={rank}",
    ]


def tensors(value, name=""):
    """All tensors and numbers in a checkpoint, by where they are."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in tensors(part, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, part in enumerate(value) for k, v in tensors(part, f"{name}.{key}").items()}
    return {name: value}


def assert_same(run, other):
    """Both runs ended with the same weights, averages, statistics and optimiser state."""
    one, two = (
        torch.load(folder / "checkpoints" / f"step_{STEPS:08d}.ckpt", weights_only=True) for folder in (run, other)
    )
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "loops"):
        a, b = tensors(one[part]), tensors(two[part])
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, (part, name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, long(2)])
def test_a_run_killed_and_told_to_leave_ends_with_the_same_weights(motions, tmp_path, processes):
    whole = run_processes(processes, "train_net.py", *options_of(motions, tmp_path / "whole", processes))
    assert whole[0].returncode == 0, whole[0].stderr
    options = [*options_of(motions, tmp_path / "torn", processes), "--ckpt_path=auto"]
    batches = [start + random.randrange(5) for start in (3, 10, 17)]  # in each epoch, at any place
    print("killed at batches", batches)
    for batch, number in zip(batches, [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL], strict=True):
        ended = run_processes(processes, "train_net.py", *options, *fault(batch, number, rank=processes - 1))
        if number == signal.SIGKILL:
            assert ended[-1].returncode == -signal.SIGKILL, ended[-1].stderr
        else:
            assert [process.returncode for process in ended] == [75] * processes, ended[0].stderr
    ended = run_processes(processes, "train_net.py", *options)
    assert ended[0].returncode == 0, ended[0].stderr
    assert_same(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.parametrize(
    ("number", "place"),
    [(signal.SIGTERM, "setup"), (signal.SIGUSR1, "setup"), (signal.SIGTERM, "on_sanity_check_start")],
)
def test_a_signal_before_the_first_step_leaves_with_the_same_code(motions, tmp_path, number, place):
    before = [
        "--trainer.callbacks=faults.SignalBeforeTraining",
        f"--trainer.callbacks.number={int(number)}",
        f"--trainer.callbacks.place={place}",
    ]
    left = run_tool("train_net.py", *small(motions, tmp_path / "run"), *before)
    assert left.returncode == 75, left.stderr
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt"))


@pytest.mark.long
def test_the_launcher_of_lightning_ends_with_the_same_code(motions, tmp_path):
    """It kills the first process where another one ends with an error."""
    options = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--data.num_workers=0"]
    left = run_tool("train_net.py", *small(motions, tmp_path / "run"), *options, *fault(1, signal.SIGTERM, rank=0))
    assert left.returncode == 75, left.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(motions, tmp_path):
    options = [*small(motions, tmp_path / "run"), "--trainer.max_epochs=1", "--save_every_n_steps=1"]
    whole = run_tool("train_net.py", *options)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "run" / "checkpoints"
    wanted = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    newest = (folder / "last.ckpt").resolve()
    with newest.open("r+b") as file:
        file.truncate(random.randrange(newest.stat().st_size))
    finished = run_tool("train_net.py", *options, "--ckpt_path=last")
    assert finished.returncode == 0, finished.stderr
    assert f"{newest} is skipped: " in finished.stderr
    assert "resuming from" in finished.stdout
    found = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_loss_that_is_no_number_ends_training_with_the_place_and_the_way_on(motions, tmp_path):
    options = [*small(motions, tmp_path / "run"), "--trainer.max_epochs=1", "--save_every_n_steps=1"]
    finished = run_tool(
        "train_net.py", *options, "--trainer.callbacks=faults.NotANumber", "--trainer.callbacks.batch=2"
    )
    assert finished.returncode == 2
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("train_net.py: error")]
    assert "the loss is nan in step 3 (epoch 1, batch 3, process 0)" in line
    assert line.count("train/") == 8  # the batch's videos
    assert "; resume from " in line
    assert "step_00000002.ckpt with --ckpt_path last" in line
    weights = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_a_killed_loader_process_ends_training_with_the_way_on(motions, tmp_path):
    options = [*small(motions, tmp_path / "run"), "--trainer.max_epochs=1", "--save_every_n_steps=1"]
    finished = run_tool(
        "train_net.py", *options, "--trainer.callbacks=faults.KilledLoader", "--trainer.callbacks.batch=2"
    )
    assert finished.returncode == 2
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("train_net.py: error")]
    assert "a loader process was killed, probably by the system for lack of memory" in line
    assert "step_00000002.ckpt with --ckpt_path last" in line


def test_a_full_disk_does_not_end_training(motions, tmp_path):
    """No file may grow over 2 MB, which logs do not and checkpoints do; the one that is there stays whole."""
    options = [*small(motions, tmp_path / "run"), "--save_every_n_steps=1", "--trainer.max_epochs=2"]
    finished = run_tool("train_net.py", *options, "--trainer.callbacks=faults.FullDisk", "--trainer.callbacks.batch=2")
    assert finished.returncode == 2, finished.stderr
    assert "train_net.py: error: the end of the training is not saved: [Errno 27] File too large" in finished.stderr
    assert "step_00000003.ckpt was not saved: [Errno 27] File too large. Training goes on" in finished.stderr
    assert "newest checkpoint: " in finished.stderr
    assert finished.stdout.count("epoch 2/2") == 1
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step_00000002.ckpt"
    verify(tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_a_run_folder_that_cannot_be_written_is_one_line(motions, tmp_path):
    (tmp_path / "file").write_text("")
    finished = run_tool("train_net.py", *small(motions, tmp_path / "file" / "run"))
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("train_net.py: error: [Errno 20] Not a directory")


def test_a_run_that_was_not_begun_starts_by_auto_and_is_refused_by_last(motions, tmp_path):
    options = [*small(motions, tmp_path / "run"), "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    refused = run_tool("train_net.py", *options, "--ckpt_path=last")
    assert refused.returncode == 2
    assert "holds no checkpoint to resume from: no step_*.ckpt there" in refused.stderr
    begun = run_tool("train_net.py", *options, "--ckpt_path=auto")
    assert begun.returncode == 0, begun.stderr
    assert "resuming from" not in begun.stdout
    again = run_tool("train_net.py", *options, "--ckpt_path=auto", "--trainer.max_epochs=2")
    assert again.returncode == 0, again.stderr
    assert "step_00000001.ckpt" in again.stdout
    assert (tmp_path / "run" / "checkpoints" / "step_00000002.ckpt").exists()
