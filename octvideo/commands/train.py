"""Trains a network on lists of videos, from a YAML file of options.

octvideo train --cfg oct_i3d [--model.alpha 0.125 --trainer.max_epochs 5 ...]
torchrun --nproc_per_node 8 tools/train_net.py --cfg configs/oct_i3d.yaml [--trainer.strategy fsdp]
sbatch tools/slurm_train.sbatch --cfg configs/oct_i3d.yaml

Exit status: 0 trained; 75 saved and stopped by SIGTERM or SIGUSR1, to be resumed with --ckpt_path last; 2 a mistake in
options or files, or a loss that is not finite; others: a bug.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from octvideo import stores
from octvideo.commands.command_line import CommandLine, LoggerName, start
from octvideo.errors import UserError
from octvideo.training.callbacks import FiniteLoss, Memory, MovingAverage, Throughput
from octvideo.training.checkpoints import EXIT_PREEMPTED, Mirrored, Preempted, RunCheckpoints, newest_intact
from octvideo.training.console import EpochLines, RunSummary
from octvideo.training.loggers import PatientCSVLogger, PatientTensorBoardLogger
from octvideo.training.precise_bn import PreciseBatchNorm
from octvideo.training.record import RunRecord
from octvideo.training.sharding import FullyShardedStrategy


class Training(CommandLine):
    """Options and parts of a training run; everything it writes goes to trainer.default_root_dir."""

    trains = True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        what = "checkpoint to resume from: a file; last: the newest intact one of this run; auto: the same, if any"
        parser.add_argument("--ckpt_path", type=str | None, help=what)

    def before_instantiate_classes(self) -> None:
        self.take_processes_of_launcher()
        self.take_run_folder()
        self.ckpt_path = ckpt_path = self.config.pop("ckpt_path")  # config.yaml must not have it
        if self.config["ema_decay"] is not None and self.config["trainer"]["strategy"] == "fsdp":
            raise UserError("ema_decay needs whole weights in every process: leave it out, or trainer.strategy fsdp")
        if self.config["precise_bn"] < 0:
            raise UserError(f"precise_bn must be at least 0, got {self.config['precise_bn']}")
        for option in ("accumulate_grad_batches", "check_val_every_n_epoch", "gradient_clip_val", "val_check_interval"):
            value = self.config["trainer"][option]
            if isinstance(value, int | float) and (value < 0 or (value == 0 and option != "gradient_clip_val")):
                raise UserError(f"trainer.{option} must be positive, got {value}")
        model, folder = self.config["model"], self.run_folder / "checkpoints"
        if ckpt_path is not None and stores.is_uri(ckpt_path):
            own = self.mirror and ckpt_path.startswith(f"{self.mirror.uri}/checkpoints/")
            self.ckpt_path = ckpt_path = str(folder / ckpt_path.rpartition("/")[2] if own else stores.local(ckpt_path))
        begun, named = any(folder.glob("*.ckpt")), ckpt_path in ("last", "auto")
        if begun and not named and (ckpt_path is None or Path(ckpt_path).absolute().parent != folder.absolute()):
            ways = "resume it with --ckpt_path last, or choose another folder by --trainer.default_root_dir"
            raise UserError(f"{self.run_folder} already holds a run: {ways}")
        if ckpt_path == "last" or (named and begun):
            path, damaged = newest_intact(folder)
            for other, reason in damaged:
                print(f"{other} is skipped: {reason}", file=sys.stderr)
            print(f"resuming from {path}")
            self.ckpt_path = str(path)
        elif named:
            self.ckpt_path = None
        if self.ckpt_path is not None:
            self.take_network_of(self.ckpt_path, "--ckpt_path")
        elif model["weights"] is None and (model["freeze"] or model["normalization"] == "frozen"):
            cure = "name one by --model.weights FILE"
            raise UserError(f"model.freeze and normalization frozen need a trained network: {cure}")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        for name in ("train_list", "val_list"):  # likewise mistakes in the lists
            if name == "train_list" or self.datamodule.lists[name] is not None:
                self.datamodule.read(name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options, data, elastic = self.config["trainer"], self.datamodule, self.model.elastic
        if elastic is not None and elastic.options.per_stage and not self.config["precise_bn"]:
            raise UserError("model.elastic.per_stage needs precise_bn, as its draws leave no batch-norm statistics")
        macs, *_ = self.count_macs(data.clip_sizes())  # so that mistakes in sizes show before anything starts
        if options["logger"] in (None, True):
            kwargs["logger"] = [self._logger(name) for name in self.config["loggers"]] or False
        if options["strategy"] == "fsdp":
            kwargs["strategy"] = FullyShardedStrategy()
        if SLURMEnvironment.detect() and options["plugins"] is None:
            kwargs["plugins"] = [SLURMEnvironment(auto_requeue=False)]  # tools/slurm_train.sbatch requeues
        if self.config["data"]["multigrid"] is not None:
            kwargs["reload_dataloaders_every_n_epochs"] = 1
        callbacks = self.trainer_defaults["callbacks"]
        callbacks += [RunSummary(self.model, data, macs), FiniteLoss(), Throughput(), Memory(), EpochLines()]
        if (decay := self.config["ema_decay"]) is not None:
            callbacks.append(MovingAverage(decay))
        if self.config["precise_bn"] > 0:
            callbacks.append(PreciseBatchNorm(self.config["precise_bn"]))
        if options["enable_checkpointing"] is not False and not options["fast_dev_run"]:
            best = "val/map" if data.task == "multi" else "val/top1"
            monitor = None if data.lists["val_list"] is None else best
            every, keep = self.config["save_every_n_steps"], self.config["keep_checkpoints"]
            folder = self.run_folder / "checkpoints"
            callbacks.append(RunCheckpoints(folder, every, keep, monitor, self.ckpt_path, self.mirror))
        if not options["fast_dev_run"]:
            callbacks.append(RunRecord())
        if self.mirror is not None:
            callbacks.append(Mirrored(self.mirror))
        return super().instantiate_trainer(**kwargs)

    def _logger(self, name: LoggerName) -> Logger:
        if name == "tensorboard":
            return PatientTensorBoardLogger(self.run_folder, name="", version="")
        if name == "csv":
            return PatientCSVLogger(self.run_folder, name="csv")
        try:
            if name == "wandb":
                return WandbLogger(save_dir=self.run_folder, name=self.run_folder.name, project="octvideo")
            place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.run_folder.absolute()}/mlflow.db"
            return MLFlowLogger("octvideo", self.run_folder.name, place)
        except ModuleNotFoundError as error:
            cure = f"python -m pip install 'octvideo[{name}]', or leave it out"
            raise UserError(f"loggers: {name} is not installed: {cure}") from error


def main(words: list[str]) -> None:
    """Trains."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # during fit, RunCheckpoints handles them
        signal.signal(number, lambda *_: sys.exit(EXIT_PREEMPTED))
    cli = start(lambda: Training(__doc__ or "", words, keep_options=True))
    try:
        with cli.one_line_errors():
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
    except Preempted:
        environment = getattr(cli.trainer.strategy, "cluster_environment", None)  # a single process has none
        if isinstance(environment, LightningEnvironment) and not cli.trainer.is_global_zero:
            return  # with another code than 0 Lightning would kill the process that started this one
        raise
    if cli.trainer.is_global_zero:
        print(f"checkpoints: {stores.child(cli.mirror.uri if cli.mirror else cli.run_folder, 'checkpoints')}")
        if "tensorboard" in cli.config["loggers"] and cli.trainer.loggers:
            print(f"logs: tensorboard --logdir {cli.run_folder}")
