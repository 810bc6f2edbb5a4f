"""Trains a network on list files of videos, from a YAML file of options.

python tools/train_net.py --cfg configs/oct_i3d.yaml [--model.alpha 0.125 --trainer.max_epochs 5 ...]
"""

from __future__ import annotations

import sys
from typing import Any

from command_line import CommandLine, one_line_errors, start
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from octvideo.callbacks import EpochLines, Throughput


class Training(CommandLine):
    """Options and parts of a training run; everything it writes goes to trainer.default_root_dir."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds --ckpt_path."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="checkpoint to go on from: a file, or 'last' for the run folder's last one",
        )

    def before_instantiate_classes(self) -> None:
        """Refuses to train over a finished or interrupted run, or to go on from nothing."""
        self.ckpt_path = ckpt_path = self.config.pop("ckpt_path")  # not to be kept in the run's config.yaml
        last = self.run_folder / "checkpoints" / "last.ckpt"
        if ckpt_path is None and last.exists():
            raise ValueError(
                f"{self.run_folder} already holds a run: go on with it by --ckpt_path last, "
                "or choose another folder by --trainer.default_root_dir"
            )
        if ckpt_path is not None:
            self.take_network_of(last if ckpt_path == "last" else ckpt_path, "--ckpt_path")

    def instantiate_classes(self) -> None:
        """Reads the lists too, so that what is wrong with them shows before anything starts."""
        super().instantiate_classes()
        self.datamodule.read("train_list")
        if self.datamodule.lists["val_list"] is not None:
            self.datamodule.read("val_list")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds logs (TensorBoard and CSV unless others are named) and checkpoints (the best and the last epoch)."""
        folder = self.run_folder
        if self.config["trainer"]["logger"] in (None, True):
            kwargs["logger"] = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="csv")]
        self.trainer_defaults["callbacks"].append(Throughput())
        if not sys.stdout.isatty():
            self.trainer_defaults["callbacks"].append(EpochLines())
        if self.config["trainer"]["enable_checkpointing"] is not False:
            last = ModelCheckpoint(
                folder / "checkpoints", "last", enable_version_counter=False, save_on_train_epoch_end=True
            )
            self.trainer_defaults["callbacks"].append(last)
            if self.datamodule.lists["val_list"] is not None:
                best = ModelCheckpoint(
                    folder / "checkpoints", "best", monitor="val/top1", mode="max", enable_version_counter=False
                )
                self.trainer_defaults["callbacks"].append(best)
        return super().instantiate_trainer(**kwargs)


def main() -> None:
    """Trains."""
    cli = start(lambda: Training(__doc__ or "", keep_options=True))
    with one_line_errors():
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
    if cli.trainer.is_global_zero:
        print(f"checkpoints: {cli.run_folder / 'checkpoints'}  logs: tensorboard --logdir {cli.run_folder}")


if __name__ == "__main__":
    main()
