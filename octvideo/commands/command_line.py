"""The command line that training and testing share: YAML, typed options, errors of one line."""

import contextlib
import difflib
import logging
import os
import re
import sys
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import progress
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from octvideo import stores
from octvideo.commands import options
from octvideo.commands.options import fail, with_config_files
from octvideo.data.module import VideoData
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.models.checkpoint import read_training_checkpoint
from octvideo.models.cost import count_macs
from octvideo.models.own_network import build_recorded, check_record, zoo_options
from octvideo.training.callbacks import BadVideos, StoreTraffic, naming_killed_loaders
from octvideo.training.checkpoints import Mirrored
from octvideo.training.console import ProgressBar
from octvideo.training.recognizer import Recognizer

# Warnings and notes of Lightning about its own inside; a user of octvideo could change nothing.
for message in (
    *(".*LeafSpec.*", ".*smaller than the logging interval.*", ".*callbacks used to create.*", ".*args parameter.*"),
    *(".*WeightAveraging callback with a model that overrides.*", r".*module\(s\) in eval mode at the start.*"),
    "Total length of `list` across ranks is zero.*",
):
    warnings.filterwarnings("ignore", message)
warnings.filterwarnings("once", "This DataLoader will create")
NOTES = r"Tip:|PU available:|Trainer\.fit. stopped|Seed set to|Restoring states from|Loaded model weights from"
for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
    logging.getLogger(name).addFilter(lambda record: not re.search(NOTES, record.getMessage()))

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow"]
# Options of training besides model, data and trainer; testing accepts them, so that one YAML file serves both.
TRAINING_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "save_every_n_steps": (int | None, None, "optimiser steps after which to write a checkpoint, besides each epoch's"),
    "keep_checkpoints": (int, 3, "newest checkpoints to keep, besides the best"),
    "ema_decay": (float | None, None, "decay of the moving average of weights to validate and save, such as .999"),
    "precise_bn": (int, 0, "training batches to compute batch-norm statistics from after each epoch; 0: running ones"),
    "loggers": (
        list[LoggerName],
        ["tensorboard", "csv"],
        "where metrics go; wandb, mlflow: pip install octvideo[NAME]",
    ),
}
Cli = TypeVar("Cli", bound="CommandLine")


class Help(DefaultHelpFormatter):
    """jsonargparse's, without its lists of hundreds of classes."""

    def _get_help_string(self, action: Any) -> str:
        text = super()._get_help_string(action)
        return re.sub(r", known subclasses: .{300,}(?=\)$)", ", one by its class path", text)


class Missing(BaseException):
    """Arguments of a class that have no default and were not given, by their names; jsonargparse must not catch it."""


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of one line; Missing is for `CommandLine`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # jsonargparse's prints its usage first
        asks = r'the following arguments are required: (.+)|.*Key "(\w+)" is required .*'  # as earlier versions say
        if missing := re.fullmatch(asks, str(message)):
            raise Missing(missing[1] or missing[2])
        unknown = re.match(r"unrecognized arguments: --([\w.]+)", str(message))
        known = vars(self.get_defaults().as_flat()) if unknown else ()
        near = difflib.get_close_matches(unknown[1] if unknown else "", known, 2)
        fail(in_one_line(str(message)) + (f"; did you mean --{' or --'.join(near)}?" if near else ""))


def in_one_line(message: str) -> str:
    """The useful part of jsonargparse's message, which lists every type that a value might have had."""
    lines = [line.strip() for line in message.splitlines()]
    reasons = [re.sub(":$", f": {after}", line[2:]) for line, after in pairwise([*lines, ""]) if line.startswith("- ")]
    dull = ("Expected a", "Does not validate against any")
    useful = [reason.partition("callable class: ")[2] or reason for reason in reasons if not reason.startswith(dull)]
    key = re.search(r'key "([^"]+)":', message)
    if useful:
        return f"{key[1]}: {useful[0]}" if key else useful[0]
    kind = re.search(r"Subtypes: \[(.*)\]", message) or re.search(r"Expected a (.*?)\. Got value", message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    if key and kind and value:
        expected = re.sub(r"<class '([^']*)'>", r"\1", kind[1]).replace("typing.", "")
        return f"{key[1]}: expected {expected}, got {value[1]}"
    return message


class KeptOptions(SaveConfigCallback):
    """Writes the options of a run to config.yaml in its folder, whatever its loggers are."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config, callbacks = self.config.clone(), getattr(trainer, "callbacks", ())
        for mirrored in (callback for callback in callbacks if isinstance(callback, Mirrored)):
            config["trainer"]["default_root_dir"] = mirrored.mirror.uri
        with appearing(Path(trainer.default_root_dir) / self.config_filename) as partial:
            self.parser.save(config, partial, skip_none=False, overwrite=True)


class CommandLine(LightningCLI):
    """Builds trainer, model and data from the words of a command line; `keep_options` writes config.yaml."""

    mirror: stores.Mirror | None = None  # of a run folder in a store
    trains = False  # else --help says nothing of TRAINING_OPTIONS

    def __init__(self, description: str, words: list[str], keep_options: bool) -> None:
        self.words, self.shows_progress = words, sys.stdout.isatty()
        super().__init__(
            *(Recognizer, VideoData),
            save_config_callback=KeptOptions if keep_options else None,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                "prog": options.program or None,
                "description": description,
                "default_env": False,
                "allow_abbrev": False,
                "formatter_class": Help,
            },
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [BadVideos(), StoreTraffic()]},
            run=False,
            args=with_config_files(words),
            auto_configure_optimizers=False,  # the recipe's is the recognizer's
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        what = "YAML file of options, or the name of an installed one, such as quickstart; later options override it"
        parser.add_argument("-c", "--cfg", action=ActionConfigFile, help=what)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for option in ("num_classes", "task"):
            parser.link_arguments(f"model.{option}", f"data.{option}")
        parser.link_arguments("data.batch_size", "model.batch_size")
        for part in ("data", "model"):
            parser.link_arguments("seed_everything", f"{part}.seed", compute_fn=int)
        parser.set_defaults({"trainer.default_root_dir": "runs/default", "trainer.enable_model_summary": False})
        for name, (kind, default, what) in TRAINING_OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=what if self.trains else SUPPRESS)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        named = [word.removeprefix("--model.classes_argument=") for word in self.words if "classes_argument=" in word]
        argument = (named or ["num_classes"])[-1]
        try:
            try:
                super().parse_arguments(parser, args)
            except Missing as error:  # the network's own: any number holds the place of model.num_classes
                if str(error) != argument:
                    raise
                super().parse_arguments(parser, [*args, f"--model.network.{argument}=1"])
        except Missing as error:
            fail(f"a class needs arguments that have no default: {error}; give them as --model.network.NAME VALUE")

    def take_network_of(self, path: str | Path, option: str) -> None:
        """Takes the network's options from a checkpoint unless the command line gives them; model.weights is not read.

        Weights fit at every alpha, so another alpha in the YAML file would silently change the network.
        """
        try:
            checkpoint = read_training_checkpoint(path, mmap=True)
        except (FileNotFoundError, UserError) as error:
            what = f"{path}: no such file" if isinstance(error, FileNotFoundError) else error
            raise UserError(f"{option} {what}") from error
        options, given = self.config["model"], {word.split("=")[0] for word in self.words}
        kept = checkpoint.options | {key: getattr(checkpoint.preprocessing, key) for key in ("mean", "std")}
        if kept["network"] is not None:
            kept = {key: value for key, value in zoo_options().items() if key in options} | kept
            check_record(kept["network"])  # whatever a checkpoint names, nothing but networks is called
            if kept["network"].get("init_args", {}) is None:
                build_recorded(kept["network"])
        own, argument = options["network"], options["classes_argument"]
        if own is not None and (own.get("init_args") or {}).get(argument, argument) is None:
            own["init_args"][argument] = options["num_classes"]  # as instantiate_classes does
        for key, value in kept.items():
            have = options[key].as_dict() if isinstance(options[key], Namespace) else options[key]
            if f"--model.{key}" not in given and (have or None) != (value or None):
                print(f"model.{key} {value} taken from the checkpoint (config says {have})")
                options[key] = value
        for key in ("num_classes", "task"):
            self.config["data"][key] = options[key]
        options["weights"] = None

    def take_processes_of_launcher(self) -> None:
        """Takes the numbers of devices and nodes from torchrun or Slurm, which started the processes."""
        environment = os.environ
        if TorchElasticEnvironment.detect():
            local, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
        elif SLURMEnvironment.detect():
            world = int(environment["SLURM_NTASKS"])
            local = int(environment.get("SLURM_NTASKS_PER_NODE", world // int(environment.get("SLURM_NNODES", 1))))
        else:
            return
        if world % local:
            counts = f"{world} in all and {local} on this one"
            raise UserError(f"every node must have the same number of processes, got {counts}")
        shares = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # In torch 2.14 restarted processes would find the dead ones' addresses.
        if shares and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            cure = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
            raise UserError(f"torchrun cannot restart processes that share its store: {cure}, or --max-restarts 0")
        trainer = self.config["trainer"]
        trainer["devices"], trainer["num_nodes"] = local, world // local

    def instantiate_classes(self) -> None:
        model, data = self.config["model"], self.config["data"]
        counts = {"data.clip_frames": data["clip_frames"]}
        if data["multigrid"] is not None:
            counts["data.multigrid.frames_multiple"] = data["multigrid"]["frames_multiple"]
        own = model["network"]
        if own is not None and model["classes_argument"] in (own.get("init_args") or ()):
            own["init_args"][model["classes_argument"]] = model["num_classes"]
        for name, count in counts.items() if own is None and model["name"].startswith("slowfast") else ():
            if count % max(1, ratio := model["frame_ratio"]):
                raise UserError(f"{name} must be a multiple of model.frame_ratio {ratio} for SlowFast, got {count}")
        super().instantiate_classes()

    def count_macs(self, sizes: Iterable[tuple[int, int]]) -> list[int]:
        """Multiply-adds of clips of (T, H = W); UserError if the network does not take them."""
        try:
            return [count_macs(self.model.network, (3, frames, side, side)) for frames, side in sizes]
        except UserError as error:
            cure = "raise data.clip_frames, data.crop_size or data.test_crop_size"
            own = self.config["model"]["network"]
            what = f"name {self.config['model']['name']}" if own is None else f"network {own['class_path']}"
            raise UserError(f"model.{what}: {error}; {cure}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        wanted, given = (self.config_init["trainer"][key] for key in ("enable_progress_bar", "callbacks"))
        if not self.shows_progress and wanted is None:
            kwargs["enable_progress_bar"] = False
        elif wanted is not False and not any(
            isinstance(x, progress.ProgressBar) for x in (given if isinstance(given, list) else [given])
        ):
            self.trainer_defaults["callbacks"].append(ProgressBar())
        options = self.config["trainer"]
        if options["use_distributed_sampler"]:
            raise UserError("trainer.use_distributed_sampler must be false: each process has its own videos anyway")
        if str(options["strategy"]).endswith("spawn"):
            raise UserError(f"trainer.strategy {options['strategy']} cannot start: take ddp, which does the same")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, RuntimeError, ModuleNotFoundError) as error:
            raise UserError(f"trainer: {error}") from error
        if options["sync_batchnorm"] and isinstance(trainer.accelerator, CPUAccelerator):
            raise UserError("trainer.sync_batchnorm needs GPUs: take model.normalization sync")
        return trainer

    @contextlib.contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Ends the program with one line for what its user can put right in training or testing."""
        with options.one_line_errors(), naming_killed_loaders(self.trainer if self.trains else None):
            try:
                yield
            except Exception as error:
                *_, (frame, _) = traceback.walk_tb(error.__traceback__)
                refused = isinstance(error, MisconfigurationException | RuntimeError | ValueError)
                from_lightning = refused and frame.f_globals["__name__"].startswith("lightning.")
                if not from_lightning and not type(error).__module__.startswith("wandb."):
                    raise
                raise UserError(str(error)) from error  # about the trainer's options, or the account of a logger

    @property
    def run_folder(self) -> Path:
        """Where this run keeps its checkpoints, logs and results."""
        folder = self.config["trainer"]["default_root_dir"]
        if folder is None:
            raise UserError("trainer.default_root_dir must name a folder")
        return Path(folder)

    def take_run_folder(self, fetch: bool = True) -> None:
        """Makes a run folder in a store a folder of this machine, with what the store has."""
        folder = self.config["trainer"]["default_root_dir"]
        if folder is not None and stores.is_uri(folder):
            self.mirror = stores.Mirror(folder)
            stores.check(stores.child(folder, "config.yaml"))
            if fetch:
                self.mirror.fetch()
            self.config["trainer"]["default_root_dir"] = str(self.mirror.folder)


def start(command_line: Callable[[], Cli]) -> Cli:
    """Builds a command line; a mistake in it ends the program with one line."""
    try:
        return command_line()
    except (ValueError, OSError, MisconfigurationException) as error:
        fail(in_one_line(str(error)))
