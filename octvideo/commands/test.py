"""Tests a checkpoint on many views of each video, and writes every video's scores.

octvideo test --cfg configs/oct_i3d.yaml --ckpt runs/oct_i3d/checkpoints/best.ckpt [--output DIR]

The network is the one in the checkpoint, whatever the YAML file says; options on the command line override it.
--ckpt also takes a folder of octvideo push, or USER/NAME on the hub.
Prints clip and video accuracies (views averaged after softmax) and writes DIR/predictions.json:
{"top1", "top5", "clip_top1", "clip_top5", "videos": [{"path", "label", "scores", and "clip_top1", "clip_top5": shares
of its clips}], "bad": [{"path", "reason"}], "labels": [class names, if the checkpoint or data.labels has them]}. For
task multi, in which a video has any number of classes, {"task": "multi", "map": mean average precision, "ap": that of
each class, "videos": [{"path", "label": [classes], "scores"}], "bad", "labels"}.

With --report it also writes DIR/report.html, as `octvideo report` does.

With --alphas 0,.125,.25,.5 it tests the same weights at several alphas, each with the checkpoint's batch-norm
statistics and with statistics re-estimated on training clips at that alpha, prints a table and writes DIR/alphas.json:
[{"alpha", "gmacs" (of one test clip), "statistics" ("checkpoint" or "re-estimated"), "top1", "top5", "clip_top1",
"clip_top5", "videos" and "bad" (how many)}]. Every row decodes the test videos again. At alpha 0 strides follow the
checkpoint's model.downsample: a network trained with octaves needs --model.downsample pool there.
"""

import json
import math
from argparse import SUPPRESS
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Column, Table

from octvideo import stores
from octvideo.commands.command_line import CommandLine, start
from octvideo.commands.report import write_report
from octvideo.data.lists import may_be_list
from octvideo.data.module import VideoData
from octvideo.errors import ListError, UserError
from octvideo.evaluation.report import read_run
from octvideo.files import appearing
from octvideo.models.checkpoint import read_training_checkpoint
from octvideo.models.compilation import compile_network
from octvideo.models.zoo import set_alpha
from octvideo.training.precise_bn import estimate_statistics

ACCURACIES = ("clip_top1", "clip_top5", "top1", "top5")


def read_alphas(text: str) -> list[float]:
    """The numbers of --alphas, each once."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise UserError(f"--alphas must be numbers with commas between them, such as 0,.25,.5, got {text!r}") from error


class Statistics(Callback):
    """Sets batch-norm statistics, before a test, to those of the same training clips at the network's current alpha."""

    def __init__(self, data: VideoData) -> None:
        self.data = data
        self.num_batches = 0  # of each process; 0 leaves the statistics as they are

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.num_batches == 0:
            return
        loader = self.data.statistics_dataloader(0, self.num_batches)
        batches = (batch.clips.flatten(0, 1).to(pl_module.device) for batch in loader)
        try:
            with trainer.precision_plugin.forward_context():
                estimate_statistics(pl_module, batches, pl_module)
        except UserError as error:
            raise ListError(f"{self.data.lists['train_list']}, for --statistics_batches: {error}") from error


class Testing(CommandLine):
    """Options and parts of a test."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add = parser.add_argument
        add("--ckpt", type=str, required=True, help="checkpoint that `octvideo train` wrote")
        add("--ckpt_path", type=str | None, help=SUPPRESS)  # of training, as --print_config writes it
        add("--output", type=str | None, help="folder for predictions.json; default: RUN_FOLDER/test")
        add("--report", action="store_true", help="write report.html there too: curves, mistakes, cost")
        what = "compile the network with torch.compile: blocks, each kind of residual block once, or true, all of it"
        add("--compile", type=bool | Literal["blocks"], default=False, help=what)
        what = "alphas of res2 to res4 to test at, such as 0,.125,.25,.5; each takes the time of a test or, with "
        what += "re-estimated statistics, of two and of decoding the training clips for them"
        add("--alphas", type=str | None, help=what)
        what = "training batches (of each process) to re-estimate statistics on with --alphas; 0: do not"
        add("--statistics_batches", type=int, default=200, help=what)

    def before_instantiate_classes(self) -> None:
        self.take_processes_of_launcher()
        self.take_run_folder(fetch=False)
        if stores.is_uri(self.config["ckpt"]):
            self.config["ckpt"] = str(stores.local(self.config["ckpt"]))
        self.take_network_of(self.config["ckpt"], "--ckpt")
        self.config["model"]["teacher"] = None  # of training
        if self.config["trainer"]["strategy"] == "fsdp":  # testing has no gradients to shard
            self.config["trainer"]["strategy"] = "auto"
        self.alphas = read_alphas(self.config["alphas"]) if self.config["alphas"] is not None else []
        self.statistics_batches: int = self.config["statistics_batches"] if self.alphas else 0
        if self.statistics_batches < 0:
            raise UserError(f"--statistics_batches must be at least 0, got {self.statistics_batches}")
        if self.alphas and self.config["model"]["task"] == "multi":
            raise UserError("--alphas is for task single")
        if self.alphas:
            self.config["model"]["normalization"] = "batch"  # others are for training; frozen ones cannot be estimated

    def instantiate_classes(self) -> None:
        """Reads the lists and tries the alphas too, so that mistakes show before anything starts."""
        super().instantiate_classes()
        if not Path(self.config["ckpt"]).is_file():
            found = read_training_checkpoint(self.config["ckpt"])
            self.model.load_state_dict(found.tensors)
            self.datamodule.load_state_dict(found.content["VideoData"])
        self.datamodule.read("test_list")
        clips = self.datamodule.preprocessing
        size = clips.clip_frames, clips.test_crop_size
        self.macs: dict[float, int] = {}
        for alpha in self.alphas:
            try:
                set_alpha(self.model.network, alpha)
            except ValueError as error:
                raise UserError(f"--alphas {alpha:g}: {error}") from error
            (self.macs[alpha],) = self.count_macs([size])
        if not self.alphas:
            self.count_macs([size])
        compile_network(self.model.network, self.config["compile"])
        if self.statistics_batches == 0:
            return
        train_list = self.datamodule.lists["train_list"]
        if train_list is not None and may_be_list(train_list):
            self.datamodule.read("train_list")
            return
        self.statistics_batches = 0
        missing = "no training list is given" if train_list is None else f"{train_list} does not exist"
        what = "testing with the checkpoint's statistics only; give one by --data.train_list FILE"
        rank_zero_info(f"{missing}: {what}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.statistics = Statistics(self.datamodule)
        self.trainer_defaults["callbacks"].append(self.statistics)
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)


def percent(results: dict[str, Any], *keys: str) -> list[str]:
    """Accuracies for a table; they are None if no video was tested."""
    return ["-" if results[key] is None else f"{100 * results[key]:.2f} %" for key in keys]


def print_results(table: Table, results: dict[str, Any]) -> None:
    """Prints accuracies, and the bad videos with their reasons."""
    console = Console(soft_wrap=True)
    console.print(table, soft_wrap=False)
    console.print(f"{len(results['videos'])} videos tested, {len(results['bad'])} bad")
    for bad in results["bad"]:
        console.print(f"  {bad['path']}: {bad['reason']}", style="yellow", markup=False, highlight=False)


def run_test(cli: Testing) -> dict[str, Any]:
    """Tests the checkpoint at the network's current alpha; returns `Recognizer.results`, the same on every rank."""
    ckpt = cli.config["ckpt"] if Path(cli.config["ckpt"]).is_file() else None  # Lightning reads no published folder
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=ckpt, verbose=False, weights_only=True)
    results: dict[str, Any] = cli.model.results
    if any(math.isnan(video["scores"][0]) for video in results["videos"]):
        raise UserError(f"{cli.config['ckpt']} gives scores that are not numbers: its training diverged")
    return results


def test(cli: Testing, folder: Path) -> None:
    """Tests at the network's own alpha, prints accuracies and writes predictions.json."""
    results = run_test(cli)
    if not cli.trainer.is_global_zero:
        return
    if results.get("task") == "multi":
        table = Table("classes with videos", "mAP")
        table.add_row(str(sum(value is not None for value in results["ap"])), *percent(results, "map"))
    else:
        table = Table("", "top-1", "top-5")
        table.add_row("clip", *percent(results, "clip_top1", "clip_top5"))
        table.add_row("video", *percent(results, "top1", "top5"))
    print_results(table, results)
    results |= {"labels": cli.datamodule.labels} if cli.datamodule.labels else {}
    with appearing(folder / "predictions.json") as partial:
        partial.write_text(json.dumps(results))
    print(f"predictions: {folder / 'predictions.json'}")


def test_alphas(cli: Testing, folder: Path) -> None:
    """Tests at each of --alphas, writes the rows to alphas.json as they come, and prints them."""
    rows = []
    statistics = Column("statistics", no_wrap=True)
    table = Table("alpha", "GMACs", statistics, "clip top-1", "clip top-5", "video top-1", "video top-5")
    for alpha in cli.alphas:
        set_alpha(cli.model.network, alpha)
        torch.compiler.reset()  # code for other alphas is of no more use, and torch.compile stops after a few
        for num_batches in dict.fromkeys((0, cli.statistics_batches)):
            cli.statistics.num_batches = num_batches
            results, kind = run_test(cli), "re-estimated" if num_batches else "checkpoint"
            row = {"alpha": alpha, "gmacs": cli.macs[alpha] / 1e9, "statistics": kind}
            row |= {key: results[key] for key in ACCURACIES} | {key: len(results[key]) for key in ("videos", "bad")}
            rows.append(row)
            table.add_row(f"{alpha:g}", f"{row['gmacs']:.3f}", kind, *percent(results, *ACCURACIES))
            if cli.trainer.is_global_zero:
                with appearing(folder / "alphas.json") as partial:
                    partial.write_text(json.dumps(rows, indent=1))
    if cli.trainer.is_global_zero:
        print_results(table, results)
        print(f"rows: {folder / 'alphas.json'}")


def main(words: list[str]) -> None:
    """Runs the command."""
    cli = start(lambda: Testing(__doc__ or "", words, keep_options=False))
    with cli.one_line_errors():
        output = Path(cli.config["output"] or cli.run_folder / "test")
        output.mkdir(parents=True, exist_ok=True)  # before the work whose result it is for
        (test_alphas if cli.alphas else test)(cli, output)
        if cli.config["report"] and cli.trainer.is_global_zero:
            checkpoint = Path(cli.config["ckpt"])
            folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else cli.run_folder
            write_report([read_run(folder, results=output, checkpoint=checkpoint)], output / "report.html")
        if cli.mirror is not None and cli.config["output"] is None and cli.trainer.is_global_zero:
            for path in output.iterdir():
                stores.put(path, stores.child(cli.mirror.uri, f"test/{path.name}"))
