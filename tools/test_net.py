"""Tests a checkpoint on many views of each video, and writes every video's scores.

python tools/test_net.py --cfg configs/oct_i3d.yaml --ckpt runs/oct_i3d/checkpoints/best.ckpt [--output DIR]

The network is the one in the checkpoint, whatever the YAML file says; options on the command line override it.
Prints clip and video accuracies (views averaged after softmax) and writes DIR/predictions.json:
{"top1", "top5", "clip_top1", "clip_top5", "videos": [{"path", "label", "scores"}], "bad": [{"path", "reason"}],
"labels": [class names, if the checkpoint or data.labels has them]}.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from command_line import CommandLine, one_line_errors, start
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from octvideo.data.annotations import ListError


class Testing(CommandLine):
    """Options and parts of a test."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds --ckpt and --output."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt", type=str, required=True, help="checkpoint that train_net.py wrote")
        parser.add_argument("--output", type=str | None, help="folder for predictions.json; default: RUN_FOLDER/test")

    def before_instantiate_classes(self) -> None:
        """Takes the network's options from the checkpoint, so that it is tested at the alpha it was trained at."""
        self.take_network_of(self.config["ckpt"], "--ckpt")

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
    output = Path(cli.config["output"] or cli.run_folder / "test")
    with one_line_errors():
        output.mkdir(parents=True, exist_ok=True)  # before the work whose result it is for
        cli.trainer.test(cli.model, cli.datamodule, ckpt_path=cli.config["ckpt"], verbose=False, weights_only=True)
        if not cli.trainer.is_global_zero:
            return
        print_table(cli.model.results)
        if any(math.isnan(video["scores"][0]) for video in cli.model.results["videos"]):
            raise ListError(f"{cli.config['ckpt']} gives scores that are no numbers: its training diverged")
        labels = {"labels": cli.datamodule.labels} if cli.datamodule.labels else {}
        (output / "predictions.json").write_text(json.dumps(cli.model.results | labels))
        print(f"predictions: {output / 'predictions.json'}")


if __name__ == "__main__":
    main()
