"""The tools as a user runs them: errors of one line, training, killing, resuming, testing."""

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_tool, settle, small
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser

from octvideo import create_model
from octvideo.commands.command_line import CommandLine, KeptOptions
from octvideo.commands.train import Training
from octvideo.data.module import VideoData
from octvideo.data.motions import CLASSES, write_video
from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.models.checkpoint import read_training_checkpoint
from octvideo.models.cost import count_macs
from octvideo.training.precise_bn import estimate_statistics


def assert_one_line(finished, *parts):
    assert finished.returncode == 2, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(lines) == 1, finished.stderr
    assert finished.stderr.strip().splitlines()[-1] == lines[0]
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["data/kinetics400/train.csv does not exist", "'path class number'", "--data.train_list FILE"]),
        (["--model.alhpa=0.1"], ["model.alhpa", "did you mean --model.alpha or --"]),
        (["--trainer.epochs=3"], ["did you mean --trainer.min_epochs or --trainer.max_epochs?"]),
        (["--data.batch_size=many"], ["data.batch_size", "many"]),
        (["--model.alpha=1.5"], ["alpha must lie in [0, 1], got 1.5"]),
        (["--model.name=i3d"], ["no model 'i3d'; there are c2d_r50, c2d_r50_nonlocal, i3d_r50"]),
        (["--ckpt_path=nothing.ckpt"], ["nothing.ckpt: no such file"]),
        (["--ckpt_path=last"], ["runs/oct_i3d/checkpoints holds no checkpoint to resume from: no step_*.ckpt there"]),
        (["--model.name=slowfast_r50", "--data.clip_frames=6"], ["multiple of model.frame_ratio 4", "got 6"]),
        (["--cfg=nothing.yaml"], ["nothing.yaml"]),
        (["--model.weights=nothing.pth"], ["nothing.pth: no such file"]),
        (["--optimizer=AdamW"], ["optimizer"]),
        (["--model.freeze=[blocks.0]"], ["name one by --model.weights FILE"]),
        (["--model.normalization=frozen", "--ckpt_path=auto"], ["name one by --model.weights FILE"]),
        (["--ema_decay=2"], ["ema_decay must lie between 0 and 1, got 2"]),
        (["--precise_bn=-1"], ["precise_bn must be at least 0, got -1"]),
        (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches must be positive, got 0"]),
        (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val must be positive, got -1"]),
        (["--trainer.limit_train_batches=2.5"], ["limit_train_batches"]),
        (["--data.multigrid.cycles=0"], ["data.multigrid.cycles must be at least 1, got 0"]),
        (
            [
                "--trainer.callbacks+=alpha_schedule.AlphaSchedule",
                "--trainer.callbacks.start=2",
                "--trainer.callbacks.end_epoch=3",
            ],
            ["start of the alpha schedule: alpha must lie in [0, 1], got 2"],
        ),
        (
            ["--model.name=slowfast_r50", "--data.clip_frames=32", "--data.multigrid.cycles=1"],
            ["data.multigrid.frames_multiple must be a multiple of model.frame_ratio 4 for SlowFast, got 1"],
        ),
        (["--model.weights=README.md"], ["README.md: no checkpoint that torch.load(weights_only=True) reads"]),
        (["--data.augmentation.mixup_alpha=-1"], ["data.augmentation.mixup_alpha must be at least 0, got -1"]),
        (["--data.target_fps=0"], ["target_fps must be positive"]),
        (["--data.labels=nothing.txt"], ["nothing.txt: No such file"]),
    ],
    ids=str,
)
def test_a_mistake_ends_training_with_one_clear_line(options, parts):
    assert_one_line(run_tool("train_net.py", "--cfg=configs/oct_i3d.yaml", *options), *parts)


def test_a_wrong_key_in_a_file_and_a_wrong_label_are_one_line_each(motions, tmp_path):
    (tmp_path / "wrong.yaml").write_text("model:\n  alpa: 0.1\n")
    assert_one_line(run_tool("train_net.py", f"--cfg={tmp_path / 'wrong.yaml'}"), "alpa")
    (tmp_path / "wrong.csv").write_text("a.mp4 0\nb.mp4 8\n")
    finished = run_tool(
        "train_net.py", *small(motions, tmp_path / "run"), f"--data.train_list={tmp_path / 'wrong.csv'}"
    )
    assert_one_line(finished, "wrong.csv:2", "0 to 7 (num_classes is 8), got 8")


def test_a_run_writes_options_logs_and_checkpoints(trained):
    options = yaml.safe_load((trained / "config.yaml").read_text())
    assert options["model"]["alpha"] == 0.5
    steps = {"step_00000004.ckpt", "step_00000007.ckpt", "step_00000008.ckpt"}
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", *steps}
    assert list(trained.glob("events.out.tfevents.*"))
    header, *rows = (trained / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"train/loss_step", "train/loss_epoch", "val/top1", "val/top5", "learning_rate", "train/bad_videos"} <= set(
        header.split(",")
    )
    assert rows
    assert "epoch 2/2  loss " in (trained / "output.txt").read_text()  # no terminal: a line for each epoch
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert checkpoint["global_step"] == 8


def test_checkpoints_hold_labels_and_preprocessing(trained):
    found = read_training_checkpoint(trained / "checkpoints" / "best.ckpt")
    assert found.labels == list(CLASSES)
    parameters = found.content["hyper_parameters"]
    preprocessing = found.content["VideoData"]["preprocessing"] | {key: parameters[key] for key in ("mean", "std")}
    assert preprocessing.pop("short_side") in ((32, 36), [32, 36])
    assert preprocessing == {
        "clip_frames": 4,
        "sampling": "mmaction",
        "target_fps": None,
        "short_videos": None,
        "frame_stride": 2,
        "crop_size": 32,
        "mirror": False,
        "test_crop_size": 32,
        "mean": 0.45,
        "std": 0.225,
    }


def test_training_starts_from_weights_that_later_commands_do_not_need(motions, trained, tmp_path):
    start = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.save(
        {f"module.{name.removeprefix('network.')}": tensor for name, tensor in start.items()}, tmp_path / "x.pth"
    )
    run = tmp_path / "run"
    options = [*small(motions, run), "--model.learning_rate=1e-12", "--model.warmup_epochs=0"]
    finished = run_tool("train_net.py", *options, f"--model.weights={tmp_path / 'x.pth'}", "--trainer.max_epochs=1")
    assert finished.returncode == 0, finished.stderr
    assert f"weights from {tmp_path / 'x.pth'} (pytorchvideo): 267 of 267 tensors: 267 matched" in finished.stdout
    last = run / "checkpoints" / "last.ckpt"
    after = torch.load(last, weights_only=True)["state_dict"]
    for name in start:
        if name.endswith("weight"):
            torch.testing.assert_close(after[name], start[name], msg=name)
    (tmp_path / "x.pth").unlink()
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["weights"] == str(tmp_path / "x.pth")
    finished = run_tool("test_net.py", f"--cfg={run / 'config.yaml'}", f"--ckpt={last}", f"--output={tmp_path}")
    assert finished.returncode == 0, finished.stderr
    assert "weights from" not in finished.stdout
    assert json.loads((tmp_path / "predictions.json").read_text())["labels"] == list(CLASSES)
    finished = run_tool("train_net.py", f"--cfg={run / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_epochs=2")
    assert finished.returncode == 0, finished.stderr
    assert torch.load(last, weights_only=True)["epoch"] == 1


def test_weights_of_another_network_end_training_with_one_line(motions, trained, tmp_path):
    options = [*small(motions, tmp_path / "run"), f"--model.weights={trained / 'checkpoints' / 'last.ckpt'}"]
    finished = run_tool("train_net.py", *options, "--model.width=16")
    assert_one_line(finished, "last.ckpt (octvideo) has values for 0 of 267 tensors", "does not fit")


def test_a_checkpoint_without_labels_or_later_options_is_still_tested_and_gone_on_from(motions, trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["VideoData"]
    for option in ("downsample", "round_to"):
        del checkpoint["hyper_parameters"][option]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    found = read_training_checkpoint(tmp_path / "old.ckpt")
    assert (found.labels, found.preprocessing) == (None, Preprocessing(mean=0.45, std=0.225))
    (tmp_path / "lists").mkdir()
    for name in ("train.csv", "val.csv"):  # no labels.txt beside them
        (tmp_path / "lists" / name).write_text((motions / name).read_text())
    options = [
        *small(motions, tmp_path / "run"),
        f"--data.train_list={tmp_path / 'lists' / 'train.csv'}",
        f"--data.val_list={tmp_path / 'lists' / 'val.csv'}",
    ]
    finished = run_tool("test_net.py", *options, f"--ckpt={tmp_path / 'old.ckpt'}", f"--output={tmp_path}")
    assert finished.returncode == 0, finished.stderr
    assert set(json.loads((tmp_path / "predictions.json").read_text())) == {
        *("top1", "top5", "clip_top1", "clip_top5", "videos", "bad")
    }
    finished = run_tool("train_net.py", *options, f"--ckpt_path={tmp_path / 'old.ckpt'}", "--trainer.max_epochs=3")
    assert finished.returncode == 0, finished.stderr
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_training_over_a_run_is_refused(motions, trained):
    finished = run_tool("train_net.py", *small(motions, trained))
    assert_one_line(finished, "already holds a run", "--ckpt_path last", "--trainer.default_root_dir")


def test_testing_reports_good_and_bad_videos_with_the_checkpoints_network(motions, trained, tmp_path):
    bad = tmp_path / "bad file.mp4"
    bad.touch()
    lines = (motions / "val.csv").read_text() + f"{bad} 3\n"
    (tmp_path / "test.csv").write_text(lines)
    finished = run_tool(
        "test_net.py",
        f"--cfg={trained / 'config.yaml'}",
        "--model.dropout=0.1",
        f"--data.test_list={tmp_path / 'test.csv'}",
        f"--ckpt={trained / 'checkpoints' / 'best.ckpt'}",
        f"--output={tmp_path / 'output'}",
    )
    assert finished.returncode == 0, finished.stderr
    assert "16 videos tested, 1 bad" in finished.stdout
    assert "bad file.mp4: Invalid data" in finished.stdout
    results = json.loads((tmp_path / "output" / "predictions.json").read_text())
    assert results["labels"] == list(CLASSES)
    assert results["bad"][0]["path"] == str(bad)
    assert len(results["videos"]) == 16
    scores = np.array([video["scores"] for video in results["videos"]])
    labels = np.array([video["label"] for video in results["videos"]])
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)
    assert results["top1"] == pytest.approx(np.mean(scores.argmax(1) == labels))
    ranks = (-scores).argsort(1)
    assert results["top5"] == pytest.approx(np.mean((ranks[:, :5] == labels[:, None]).any(1)))
    assert 0 <= results["clip_top1"] <= 1


def test_testing_all_odd_files_ends_and_names_the_bad_ones(real_videos, trained, motions, tmp_path):
    files = sorted((real_videos / "odd").iterdir())
    (tmp_path / "odd.csv").write_text("".join(f"{path} 0\n" for path in files))
    finished = run_tool(
        "test_net.py",
        *small(motions, trained),
        f"--data.test_list={tmp_path / 'odd.csv'}",
        f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}",
        f"--output={tmp_path}",
    )
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "predictions.json").read_text())
    good = {path.split("/")[-1] for path in (video["path"] for video in results["videos"])}
    bad = {video["path"].split("/")[-1]: video["reason"] for video in results["bad"]}
    assert len(good) + len(bad) == len(files)
    assert "cartwheel_metadata_not_utf8.avi" in good
    assert {"nasa_13013.mp4", "metadata.mp4", "gif-transparent.gif", "tiny_av1.mp4", "video_90.mov"} <= good
    assert {"corrupted.mp4", "empty.mp4", "Mpeg4.mp4", "short-cenc.mp4", "opus_audioinit.mp4"} <= set(bad)
    assert all(bad.values())


def test_the_network_is_the_checkpoints_unless_the_command_line_says_otherwise(motions, trained, tmp_path):
    options = [*small(motions, trained), f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}", f"--output={tmp_path}"]
    finished = run_tool("test_net.py", *options)
    assert "model.alpha 0.5 taken from the checkpoint (config says 0.25)" in finished.stdout, finished.stderr
    as_trained = json.loads((tmp_path / "predictions.json").read_text())
    finished = run_tool("test_net.py", *options, "--model.alpha=0")
    assert "taken from the checkpoint" not in finished.stdout, finished.stderr
    assert json.loads((tmp_path / "predictions.json").read_text())["videos"] != as_trained["videos"]


@pytest.mark.parametrize(
    ("content", "part"), [(None, "no such file"), (b"not a checkpoint", "is no intact checkpoint: cannot be read")]
)
def test_a_wrong_checkpoint_is_one_line(motions, tmp_path, content, part):
    path = tmp_path / "x.ckpt"
    if content is not None:
        path.write_bytes(content)
    assert_one_line(run_tool("test_net.py", *small(motions, tmp_path), f"--ckpt={path}"), "x.ckpt", part)


def test_a_bad_training_video_is_logged_once_and_counted(motions, tmp_path):
    (tmp_path / "bad.mp4").touch()
    lines = [*(motions / "train.csv").read_text().splitlines()[:15], f"{tmp_path / 'bad.mp4'} 0"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    finished = run_tool(
        "train_net.py",
        *small(motions, tmp_path / "run"),
        f"--data.train_list={tmp_path / 'train.csv'}",
        "--data.num_workers=2",
        "--trainer.max_epochs=2",
        "--trainer.limit_val_batches=0",
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("bad.mp4: Invalid data") == 1
    header, *rows = (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/bad_videos")
    counts = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert len(counts) == 2
    assert min(counts) >= 1  # once in each epoch, more if it is drawn again as a replacement


def test_a_killed_run_goes_on_from_its_last_checkpoint(motions, tmp_path):
    options = [*small(motions, tmp_path / "run"), "--trainer.max_epochs=4"]
    command = [sys.executable, "tools/train_net.py", *options, "--model.alpha=0.5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = torch.load(last, weights_only=True)
    assert before["epoch"] < 3
    finished = run_tool("train_net.py", *options, "--ckpt_path=last")
    assert finished.returncode == 0, finished.stderr
    assert "model.alpha 0.5 taken from the checkpoint (config says 0.25)" in finished.stdout
    assert f"resuming from {last.parent / 'step_0000000'}" in finished.stdout
    after = torch.load(last, weights_only=True)
    assert after["epoch"] == 3
    assert after["global_step"] == 16
    resumed = (tmp_path / "run" / "csv" / "version_1" / "metrics.csv").read_text().splitlines()
    assert int(resumed[1].split(",")[0]) in (
        before["epoch"],
        before["epoch"] + 1,
    )  # killed in its middle, or at its end


def test_videos_that_are_all_bad_or_too_few_end_training_with_one_line(motions, tmp_path):
    options = small(motions, tmp_path / "run")
    finished = run_tool("train_net.py", *options, "--data.root=/nowhere")
    assert_one_line(finished, "none of its videos was found below --data.root /nowhere: there is no /nowhere/train/")
    for split in ("train", "val"):
        shutil.copytree(motions / split, tmp_path / split, copy_function=lambda _, to: open(to, "w").close())
    few = ("--data.backend=pyav", "--trainer.limit_val_batches=0")
    finished = run_tool("train_net.py", *options, f"--data.root={tmp_path}", *few)
    assert_one_line(finished, f"{tmp_path}/train/", "(and the 9 videos tried before it")
    assert_one_line(run_tool("train_net.py", *options, "--data.batch_size=64"), "lower --data.batch_size")


@pytest.mark.parametrize(
    "launcher",
    [
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_JOB_NAME": "x", "SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"},
    ],
    ids=["torchrun", "Slurm"],
)
def test_nodes_with_different_numbers_of_processes_are_refused(launcher):
    refused = run_tool("train_net.py", "--cfg=configs/oct_i3d.yaml", **launcher)
    assert_one_line(refused, "every node must have the same number of processes, got 3 in all and 2 on this one")


def test_another_runs_checkpoint_cannot_take_over_a_folder(motions, trained, tmp_path):
    other = tmp_path / "other.ckpt"
    shutil.copy(trained / "checkpoints" / "last.ckpt", other)
    before = sorted((trained / "checkpoints").iterdir())
    refused = run_tool("train_net.py", *small(motions, trained), f"--ckpt_path={other}")
    assert_one_line(refused, f"{trained} already holds a run")
    assert sorted((trained / "checkpoints").iterdir()) == before


def test_a_changed_checkpoint_is_neither_tested_nor_gone_on_from(motions, trained, tmp_path):
    changed = tmp_path / "changed.ckpt"
    content = bytearray((trained / "checkpoints" / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    for tool, option in (("test_net.py", "--ckpt"), ("train_net.py", "--ckpt_path")):
        refused = run_tool(tool, *small(motions, tmp_path / "run"), f"{option}={changed}")
        assert_one_line(refused, f"{option} {changed} is no intact checkpoint: its bytes are not those")


def test_the_printed_options_of_training_serve_for_testing(motions, trained, tmp_path):
    printed = run_tool("train_net.py", *small(motions, trained), "--ema_decay=.9", "--print_config")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "all.yaml").write_text(printed.stdout)
    options = [f"--cfg={tmp_path / 'all.yaml'}", f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}"]
    tested = run_tool("test_net.py", *options, f"--output={tmp_path}", "--data.test_clips=1")
    assert tested.returncode == 0, tested.stderr


def test_a_trial_run_leaves_nothing(motions, tmp_path):
    finished = run_tool("train_net.py", *small(motions, tmp_path / "run"), "--trainer.fast_dev_run=1")
    assert finished.returncode == 0, finished.stderr
    assert not (tmp_path / "run").exists()


def test_options_lie_in_the_run_folder_whatever_the_logs_are(motions, tmp_path):
    options = [*small(motions, tmp_path / "run"), "--loggers=[csv]", "--trainer.max_epochs=1"]
    finished = run_tool("train_net.py", *options, "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0")
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "run.json", "checkpoints", "csv"}
    assert "tensorboard" not in finished.stdout


def test_bfloat16_is_one_option(motions, tmp_path):
    # 8 frames: in bfloat16 oneDNN's gradient of a kernel longer than the clip (5 for 4) reads memory nobody wrote.
    options = [*small(motions, tmp_path / "run"), "--data.clip_frames=8", "--trainer.max_epochs=1"]
    options.append("--trainer.precision=bf16-mixed")
    finished = run_tool("train_net.py", *options)
    assert finished.returncode == 0, finished.stderr
    assert "bfloat16" in finished.stderr


@pytest.mark.long
def test_two_processes_train_one_network(motions, tmp_path):
    finished = run_tool(
        "train_net.py",
        *small(motions, tmp_path / "run"),
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--data.num_workers=0",
    )
    assert finished.returncode == 0, finished.stderr
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2  # 32 videos in batches of 2 x 8
    assert finished.stdout.count("epoch 1/1") == 1


@pytest.mark.long
@pytest.mark.slow
def test_prepared_videos_train_with_all_augmentation_on(motions, tmp_path):
    prepared = run_tool("prepare_data.py", motions, "--output", tmp_path / "prepared", "--reencode", 64)
    assert prepared.returncode == 0, prepared.stderr
    (options,) = [line.removeprefix("train with") for line in prepared.stdout.splitlines() if "train with" in line]
    finished = run_tool(
        "train_net.py",
        *small(motions, tmp_path / "run"),
        *shlex.split(options),
        "--data.num_workers=2",
        "--data.clips_per_video=2",
        "--data.backend=pyav",
        *("--data.augmentation.crop_size=28", "--data.augmentation.rand_augment_layers=1"),
        *("--data.augmentation.erase_probability=0.3", "--data.augmentation.mirror_probability=0.5"),
        *("--data.augmentation.mixup_alpha=0.4", "--data.augmentation.cutmix_alpha=1.0"),
        "--trainer.max_epochs=2",
    )
    assert finished.returncode == 0, finished.stderr
    assert "-bound: " in finished.stdout
    last = list(csv.DictReader((tmp_path / "run" / "csv" / "version_0" / "metrics.csv").open()))
    figures = {key: float(value) for row in last for key, value in row.items() if value}
    assert figures["train/data_seconds"] >= 0
    assert figures["train/step_seconds"] > 0
    assert figures["train/clips_per_second"] > 0
    assert math.isfinite(figures["train/loss_epoch"])


@pytest.mark.parametrize("tool", ["train_net.py", "test_net.py"])
def test_help_and_print_config_explain_the_options(tool):
    finished = run_tool(tool, "--help")
    assert finished.returncode == 0
    for text in ("--cfg", "--model.alpha", "share of octave channels", "--data.train_list", "--trainer.max_epochs"):
        assert text in finished.stdout


def test_print_config_shows_what_a_run_would_use():
    finished = run_tool("train_net.py", "--cfg=configs/oct_slowfast.yaml", "--model.alpha=0.25", "--print_config")
    assert finished.returncode == 0, finished.stderr
    options = yaml.safe_load(finished.stdout)
    assert options["model"]["alpha"] == 0.25
    assert options["model"]["weight_decay"] == 1e-4
    assert options["data"]["clip_frames"] == 32


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_short_and_named_after_what_they_hold(path):
    options = yaml.safe_load(path.read_text())
    assert len(path.read_text().splitlines()) < 40
    assert options["trainer"]["default_root_dir"] == f"runs/{path.stem}"
    if path.stem.startswith("oct_"):
        assert options["model"]["alpha"] == 0.1
        if (path.parent / f"{path.stem[4:]}.yaml").exists():
            vanilla = yaml.safe_load((path.parent / f"{path.stem[4:]}.yaml").read_text())
            vanilla["model"]["alpha"], vanilla["trainer"]["default_root_dir"] = (
                0.1,
                options["trainer"]["default_root_dir"],
            )
            assert vanilla == options


def test_a_video_of_one_frame_is_a_clip_that_holds_it(tmp_path, motions, trained):
    write_video(tmp_path / "one.mp4", np.full((1, 48, 64, 3), 100, np.uint8), 25)
    (tmp_path / "test.csv").write_text("one.mp4 0\n")
    finished = run_tool(
        "test_net.py",
        *small(motions, trained),
        f"--data.test_list={tmp_path / 'test.csv'}",
        f"--data.root={tmp_path}",
        f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}",
        f"--output={tmp_path}",
    )
    assert "1 videos tested, 0 bad" in finished.stdout, finished.stderr


def test_a_checkpoint_is_tested_at_other_alphas_with_its_own_and_with_new_statistics(motions, trained, tmp_path):
    network = {"width": 8, "num_classes": 8, "channels_last": True}
    torch.manual_seed(0)
    settled = settle(create_model("i3d_r50", **network))  # so that scores differ, as few steps of training do not make
    state = settled.state_dict() | {"blocks.6.proj.weight": torch.randn(8, 256) / 16}
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"] |= {f"network.{name}": tensor for name, tensor in state.items()}
    torch.save(checkpoint, tmp_path / "x.ckpt")

    options = [*small(motions, trained), f"--ckpt={tmp_path / 'x.ckpt'}", f"--output={tmp_path}"]
    finished = run_tool("test_net.py", *options, "--alphas=0,.5", "--statistics_batches=2")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("re-estimated") == 2
    assert not (tmp_path / "predictions.json").exists()
    rows = json.loads((tmp_path / "alphas.json").read_text())

    data = VideoData(
        *(str(motions / "train.csv"), str(motions / "val.csv")),
        root=str(motions),
        clip_frames=4,
        frame_stride=2,
        sampling="mmaction",
        target_fps=None,
        crop_size=32,
        short_side=(32, 36),
        mirror=False,
        test_crop_size=32,
        test_clips=3,
        test_crops=1,
        batch_size=8,
        num_workers=0,
    )

    def normalized(batch):
        return (batch.clips.flatten(0, 1) / 255 - 0.45) / 0.225

    tests = list(data.test_dataloader())
    labels = torch.cat([batch.labels for batch in tests])
    expected = []
    for alpha in (0, 0.5):
        model = create_model("i3d_r50", alpha=alpha, **network).eval()
        for statistics in ("checkpoint", "re-estimated"):
            model.load_state_dict(state)
            if statistics == "re-estimated":
                estimate_statistics(model, map(normalized, data.statistics_dataloader(0, 2)), model)
            with torch.no_grad():
                scores = torch.cat([model(normalized(batch)) for batch in tests]).softmax(1).unflatten(0, (-1, 3))
            row = {"alpha": alpha, "gmacs": count_macs(model, (3, 4, 32, 32)) / 1e9, "statistics": statistics}
            for name, part, wanted in (
                ("clip_", scores.flatten(0, 1), labels.repeat_interleave(3)),
                ("", scores.mean(1), labels),
            ):
                ranks = part.argsort(1, descending=True) == wanted[:, None]
                row |= {f"{name}top1": ranks[:, 0].float().mean(), f"{name}top5": ranks[:, :5].any(1).float().mean()}
            expected.append(row | {"videos": 16, "bad": 0})
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx({key: v if isinstance(v, str) else float(v) for key, v in wanted.items()})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--alphas=0,1.5"], ["--alphas 1.5: alpha must lie in [0, 1], got 1.5"]),
        (["--alphas=0;1"], ["--alphas must be numbers with commas between them, such as 0,.25,.5, got '0;1'"]),
        (["--alphas=0", "--statistics_batches=-1"], ["--statistics_batches must be at least 0, got -1"]),
        (["--alphas=0", "--statistics_batches=1", "--data.batch_size=64"], ["train.csv, for --statistics_batches"]),
    ],
    ids=str,
)
def test_a_mistake_in_other_alphas_is_one_line(motions, trained, tmp_path, options, parts):
    given = [*small(motions, trained), f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}", f"--output={tmp_path}"]
    assert_one_line(run_tool("test_net.py", *given, *options), *parts)


def test_without_training_videos_other_alphas_have_the_checkpoints_statistics_only(motions, trained, tmp_path):
    given = [*small(motions, trained), f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}", f"--output={tmp_path}"]
    finished = run_tool("test_net.py", *given, "--alphas=.5", "--data.train_list=nothing.csv")
    assert finished.returncode == 0, finished.stderr
    assert "nothing.csv does not exist: testing with the checkpoint's statistics only" in finished.stderr
    (row,) = json.loads((tmp_path / "alphas.json").read_text())
    assert (row["alpha"], row["statistics"], row["videos"]) == (0.5, "checkpoint", 16)


def test_options_are_kept_where_a_link_leads(tmp_path):
    (tmp_path / "config.yaml").symlink_to("target.yaml")
    (tmp_path / "target.yaml").write_text("old: 1\n")
    parser = LightningArgumentParser()
    parser.add_argument("--alpha", type=float)
    kept = KeptOptions(parser, parser.parse_args(["--alpha=0.5"]))
    kept.save_config(SimpleNamespace(default_root_dir=str(tmp_path)), None, "fit")
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "target.yaml"]
    assert os.readlink(tmp_path / "config.yaml") == "target.yaml"
    assert yaml.safe_load((tmp_path / "target.yaml").read_text())["alpha"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data.clip_frames=1"],
            "model.name i3d_r50: the network does not take clips of 1 x 32 x 32: .* raise data.cl",
        ),
        ([r"--data.separator=\t"], r"expected 'path\\tclass number', got 'train/"),
        (["--trainer.default_root_dir=null"], "trainer.default_root_dir must name a folder"),
        (["--trainer.accelerator=cpu", "--trainer.sync_batchnorm=true"], "take model.normalization sync"),
        (["--trainer.val_check_interval=0"], "trainer.val_check_interval must be positive, got 0"),
        (["--trainer.use_distributed_sampler=true"], "trainer.use_distributed_sampler must be false"),
        (["--trainer.strategy=ddp_spawn"], "trainer.strategy ddp_spawn cannot start: take ddp"),
        (["--trainer.accelerator=cpu", "--trainer.devices=-1"], "trainer: .*should be an int > 0"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_anything_starts(motions, tmp_path, options, message):
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=message):
        Training("", [*small(motions, tmp_path / "run"), *options], keep_options=True)
    torch.set_rng_state(state)
    assert not (tmp_path / "run").exists()


def test_what_lightning_itself_refuses_is_one_line(capsys):
    cli = SimpleNamespace(trainer=None, trains=False)
    with pytest.raises(SystemExit), CommandLine.one_line_errors(cli):
        EarlyStopping("val/none")._validate_condition_metric({})
    assert "error: Early stopping conditioned on metric `val/none`" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"), CommandLine.one_line_errors(cli):
        raise RuntimeError("a bug")


def test_overfitting_repeats_the_same_few_batches(motions, tmp_path):
    options = [*small(motions, tmp_path / "run"), "--trainer.overfit_batches=2", "--trainer.max_epochs=2"]
    finished = run_tool("train_net.py", *options, "--trainer.precision=64-true")
    assert finished.returncode == 0, finished.stderr
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert {tensor.dtype for name, tensor in checkpoint["state_dict"].items() if "weight" in name} == {torch.float64}
