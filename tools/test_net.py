"""Tests a checkpoint on many views of each video, and writes every video's scores.

python tools/test_net.py --cfg configs/oct_i3d.yaml --ckpt runs/oct_i3d/checkpoints/best.ckpt [--output DIR]

The network is the one in the checkpoint, whatever the YAML file says; options on the command line override it.
Prints clip and video accuracies (views averaged after softmax) and writes DIR/predictions.json:
{"top1", "top5", "clip_top1", "clip_top5", "videos": [{"path", "label", "scores"}], "bad": [{"path", "reason"}]}.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from command_line import CommandLine, start
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

NETWORK_OPTIONS = ("name", "alpha", "num_classes", "width", "depth", "frame_ratio", "channel_ratio", "mean", "std")


class Testing(CommandLine):
    """Options and parts of a test."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds --ckpt and --output."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt", type=str, required=True, help="checkpoint that train_net.py wrote")
        parser.add_argument("--output", type=str | None, help="folder for predictions.json; default: RUN_FOLDER/test")

    def before_instantiate_classes(self) -> None:
        """Takes the network's options from the checkpoint, so that it is tested at the alpha it was trained at."""
        path = self.config["ckpt"]
        try:
            # mmap: Lightning reads the weights later
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            trained = {key: checkpoint["hyper_parameters"][key] for key in NETWORK_OPTIONS}
        except FileNotFoundError as error:
            raise ValueError(f"--ckpt {path}: no such file") from error
        except (RuntimeError, pickle.UnpicklingError, KeyError, EOFError, OSError) as error:
            raise ValueError(f"--ckpt {path}: not a checkpoint of train_net.py: {error}") from error
        options = self.config["model"]
        for key in NETWORK_OPTIONS:
            given = any(argument.split("=")[0] == f"--model.{key}" for argument in sys.argv)
            if not given and options[key] != trained[key]:
                print(f"model.{key} {trained[key]} as in the checkpoint; the options say {options[key]}")
                options[key] = trained[key]
        self.config["data"]["num_classes"] = options["num_classes"]

    def instantiate_classes(self) -> None:
        """Reads the list too, so that what is wrong with it shows before anything starts."""
        super().instantiate_classes()
        self.datamodule.read("test_list")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Testing leaves no logs and no checkpoints."""
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)


def print_table(results: dict[str, Any]) -> None:
    """Prints accuracies, and the bad videos with their reasons."""
    table = Table("", "top-1", "top-5")
    for kind, prefix in (("clip", "clip_"), ("video", "")):
        accuracies = [results[f"{prefix}top{k}"] for k in (1, 5)]
        table.add_row(kind, *("-" if accuracy is None else f"{100 * accuracy:.2f} %" for accuracy in accuracies))
    console = Console()
    console.print(table)
    console.print(f"{len(results['videos'])} videos tested, {len(results['bad'])} bad")
    for bad in results["bad"]:
        console.print(
            f"  {bad['path']}: {bad['reason']}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )


def main() -> None:
    """Tests."""
    cli = start(lambda: Testing(__doc__ or "", keep_options=False))
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=cli.config["ckpt"], verbose=False, weights_only=True)
    if cli.trainer.is_global_zero:
        print_table(cli.model.results)
        output = Path(cli.config["output"] or cli.run_folder / "test")
        output.mkdir(parents=True, exist_ok=True)
        (output / "predictions.json").write_text(json.dumps(cli.model.results))
        print(f"predictions: {output / 'predictions.json'}")


if __name__ == "__main__":
    main()
