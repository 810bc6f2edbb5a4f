"""A run that is killed or told to leave at any step goes on to the same weights, bit for bit."""

import random
import signal

import pytest
import torch
from conftest import run_processes
from test_command_line import motions, small  # noqa: F401

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
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_and_told_to_leave_ends_with_the_same_weights(motions, tmp_path, processes):  # noqa: F811
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
