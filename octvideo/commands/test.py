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

With --alphas 0,.125,.25,.5 it tests the same weights at several alphas, from one decoding of the test videos: each
with the checkpoint's batch-norm statistics, of that alpha if it was trained elastically (model.elastic), else of the
trained one; and with statistics re-estimated on training clips at that alpha (by default not after elastic training).
It prints a table, writes DIR/alphas.json: [{"alpha", "gmacs" (of one test clip), "statistics" ("checkpoint" or
"re-estimated"), "top1", "top5", "clip_top1", "clip_top5" (or "map"), "videos" and "bad" (how many)}], and each row's
predictions.json to DIR/alpha_0.25 or DIR/alpha_0.25_re-estimated. At alpha 0 strides follow the checkpoint's
model.downsample: a network trained with octaves alone needs --model.downsample pool there.
"""

import itertools
import json
import math
from argparse import SUPPRESS
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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
from octvideo.models.elastic import AlphaPlans, AlphaStatistics
from octvideo.training.precise_bn import estimate_statistics
from octvideo.training.recognizer import Recognizer

ACCURACIES = {"clip_top1": "clip top-1", "clip_top5": "clip top-5", "top1": "video top-1", "top5": "video top-5"}


def read_alphas(text: str) -> list[float]:
    """The numbers of --alphas, each once."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise UserError(f"--alphas must be numbers with commas between them, such as 0,.25,.5, got {text!r}") from error


class Variants(Callback):
    """Has a test score each batch at several alphas, with the checkpoint's statistics and with re-estimated ones.

    The keys of the results are (alpha, "checkpoint" or "re-estimated").
    """

    num_batches = 0  # of each process, to re-estimate statistics on

    def __init__(self, model: Recognizer, data: VideoData, alphas: list[float]) -> None:
        self.data, self.alphas, self.plans = data, alphas, AlphaPlans(model.network, alphas)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        keys = list(itertools.product(self.alphas, ("checkpoint", "re-estimated")[: 1 + bool(self.num_batches)]))
        self.statistics = AlphaStatistics(module.network, None, keys)
        known = module.elastic.statistics.table() if module.elastic is not None else None
        for alpha, kind in keys:
            with self.entered((alpha, kind)):
                if kind == "re-estimated":
                    self._estimate(trainer, pl_module)
                elif known is not None:
                    known.give(module.network, alpha)
        module.variants = {key: partial(self.entered, key) for key in keys}

    @contextmanager
    def entered(self, key: tuple[float, str]) -> Iterator[None]:
        """The network of one row of the table."""
        self.plans.switch(key[0])
        with self.statistics.lent(key):
            yield

    def _estimate(self, trainer: Trainer, module: LightningModule) -> None:
        loader = self.data.statistics_dataloader(0, self.num_batches)
        batches = (batch.clips.flatten(0, 1).to(module.device) for batch in loader)
        try:
            with trainer.precision_plugin.forward_context():
                estimate_statistics(module, batches, module)
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
        what = "alphas of res2 to res4 to test at, such as 0,.125,.25,.5, all from one decoding of the videos"
        add("--alphas", type=str | None, help=what)
        what = "training batches (of each process) to re-estimate each alpha's statistics on; 0: do not; default: 200, "
        what += "or 0 for a checkpoint of elastic training, which has them"
        add("--statistics_batches", type=int | None, help=what)

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
        batches, default = self.config["statistics_batches"], 0 if self.config["model"]["elastic"] else 200
        self.statistics_batches: int = (default if batches is None else batches) if self.alphas else 0
        if self.statistics_batches < 0:
            raise UserError(f"--statistics_batches must be at least 0, got {self.statistics_batches}")
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
            self.variants.plans.switch(alpha)
            (self.macs[alpha],) = self.count_macs([size])
        if not self.alphas:
            self.count_macs([size])
        compile_network(self.model.network, self.config["compile"])
        train_list = self.datamodule.lists["train_list"]
        if self.statistics_batches and train_list is not None and may_be_list(train_list):
            self.datamodule.read("train_list")
            self.variants.num_batches = self.statistics_batches
        elif self.statistics_batches:
            missing = "no training list is given" if train_list is None else f"{train_list} does not exist"
            what = "testing with the checkpoint's statistics only; give one by --data.train_list FILE"
            rank_zero_info(f"{missing}: {what}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.alphas:
            try:
                self.variants = Variants(self.model, self.datamodule, self.alphas)
            except UserError as error:
                raise UserError(f"--alphas {error}") from error
            self.trainer_defaults["callbacks"].append(self.variants)
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


def run_test(cli: Testing) -> dict[Any, dict[str, Any]]:
    """Tests the checkpoint; returns `Recognizer.results_of`, the same on every rank."""
    ckpt = cli.config["ckpt"] if Path(cli.config["ckpt"]).is_file() else None  # Lightning reads no published folder
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=ckpt, verbose=False, weights_only=True)
    found: dict[Any, dict[str, Any]] = cli.model.results_of
    if any(math.isnan(video["scores"][0]) for results in found.values() for video in results["videos"]):
        raise UserError(f"{cli.config['ckpt']} gives scores that are not numbers: its training diverged")
    return found


def write_predictions(cli: Testing, results: dict[str, Any], folder: Path) -> Path:
    """Writes predictions.json to a folder; returns its path."""
    results |= {"labels": cli.datamodule.labels} if cli.datamodule.labels else {}
    folder.mkdir(exist_ok=True)
    with appearing(folder / "predictions.json") as written:
        written.write_text(json.dumps(results))
    return folder / "predictions.json"


def test(cli: Testing, folder: Path) -> None:
    """Tests at the network's own alpha, prints accuracies and writes predictions.json."""
    (results,) = run_test(cli).values()
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
    print(f"predictions: {write_predictions(cli, results, folder)}")


def test_alphas(cli: Testing, folder: Path) -> None:
    """Tests at each of --alphas, prints a table of rows and writes them to alphas.json."""
    rows = []
    statistics = Column("statistics", no_wrap=True)
    keys = {"map": "mAP"} if cli.config["model"]["task"] == "multi" else ACCURACIES
    table = Table("alpha", "GMACs", statistics, *keys.values())
    # Code for all alphas stays, where torch.compile would stop after 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(cli.alphas))
    found = run_test(cli)
    if not cli.trainer.is_global_zero:
        return
    for (alpha, kind), results in found.items():
        row = {"alpha": alpha, "gmacs": cli.macs[alpha] / 1e9, "statistics": kind}
        row |= {key: results[key] for key in keys} | {key: len(results[key]) for key in ("videos", "bad")}
        rows.append(row)
        table.add_row(f"{alpha:g}", f"{row['gmacs']:.3f}", kind, *percent(results, *keys))
        write_predictions(cli, results, folder / f"alpha_{alpha:g}{'_re-estimated' * (kind == 're-estimated')}")
    with appearing(folder / "alphas.json") as written:
        written.write_text(json.dumps(rows, indent=1))
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
