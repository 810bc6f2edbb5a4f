"""Chooses an alpha for each layer of a trained network under a budget of multiply-adds.

python experiments/allocation.py --cfg configs/quickstart.yaml --ckpt VANILLA_CHECKPOINT --output allocation.yaml
                                 [--budget .7] [--alphas .25,.5,.75] [--batches 20] [--skip REGEX]

The checkpoint is one of `octvideo train`, best trained at alpha 0 with --model.downsample pool, so that octave layers
change nothing else. Every group of convolutions that must share an alpha (those of a residual stage whose outputs are
added to each other; most others are alone) is made octave by itself, at each of --alphas: how much higher is the loss,
and how many multiply-adds of a test clip are saved? Starting at alpha 0, the step with the least rise of the loss for
what it saves is taken, until the budget is met. Loss and batch-norm statistics come from the same --batches of training
clips, without dropout and mixing: validation clips stay unseen.

Results, each a YAML file for `octvideo train` (--cfg RECIPE --cfg allocation.yaml); octvideo.create_model and
octvideo.octavize take its model.alpha as alpha:
allocation.yaml              the choice
allocation.uniform.yaml      one alpha for the same convolutions, at the same cost: what the choice must beat
allocation.json              {"of": what was measured, "sensitivities": [{"names", "alpha", "loss", "macs"}]}; what it
                             holds is not measured again, so an interrupted run resumes and another budget is quick

Exit status: 0 written; 2 a mistake in the command; 130 on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor, nn

from octvideo.commands.command_line import CommandLine, start
from octvideo.commands.options import fail, one_line_errors
from octvideo.commands.test import read_alphas
from octvideo.errors import ListError, UserError
from octvideo.files import appearing
from octvideo.models.allocation import (
    Group,
    Sensitivity,
    Trial,
    allocate,
    groups_that_add,
    keep_sensitivities,
    mapping_of,
    measure_sensitivities,
)
from octvideo.models.checkpoint import load_trained
from octvideo.models.zoo import set_alpha
from octvideo.training.precise_bn import estimate_statistics

SHOWN = 10  # rows of the table
WIDTH = 160  # characters that one of its lines may have, unless it is for a terminal
PRECISION = 1e-3  # of the uniform alpha
HOW_FAST = ("num_workers", "decode_timeout_seconds")  # options of the data that do not change the clips


class Allocating(CommandLine):
    """Options, network and clips."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the experiment's own."""
        super().add_arguments_to_parser(parser)
        add = parser.add_argument
        add("--ckpt", type=str, required=True, help="checkpoint that `octvideo train` wrote")
        add("--output", type=Path, required=True, help="YAML file for the result")
        add("--budget", type=float, default=0.7, help="share of alpha 0's multiply-adds, in (0, 1]")
        add("--alphas", type=str, default=".25,.5,.75", help="to try for each layer, in (0, 1], between commas")
        add("--batches", type=int, default=20, help="training batches for losses and statistics")
        add("--skip", type=list[str], default=[], help="regexes of names of convolutions that stay at alpha 0")

    def before_instantiate_classes(self) -> None:
        """Takes the network's options from the checkpoint, and checks the experiment's."""
        self.alphas = sorted(read_alphas(self.config["alphas"]))
        self.output: Path = self.config["output"]
        if any(not 0 < alpha <= 1 for alpha in self.alphas):
            raise UserError(f"--alphas must lie in (0, 1], got {self.config['alphas']}")
        if not 0 < self.config["budget"] <= 1:
            raise UserError(f"--budget must lie in (0, 1], got {self.config['budget']}")
        if self.config["batches"] < 1:
            raise UserError(f"--batches must be at least 1, got {self.config['batches']}")
        if self.output.suffix not in (".yaml", ".yml") or not self.output.parent.is_dir():
            raise UserError(f"--output must be a .yaml file in a folder that exists, got {self.output}")
        self.take_network_of(self.config["ckpt"], "--ckpt")
        self.config["model"]["normalization"] = "batch"  # others are for training; frozen ones cannot be estimated
        self.config["trainer"]["devices"] = 1

    def instantiate_classes(self) -> None:
        """Takes the checkpoint's weights, at alpha 0."""
        super().instantiate_classes()
        self.datamodule.read("train_list")
        trained = load_trained(self.config["ckpt"])
        self.sample = torch.empty(1, *trained.preprocessing.clip_size)
        self.model.network.load_state_dict(trained.network.state_dict())
        set_alpha(self.model.network, 0)
        self.model.to(self.trainer.strategy.root_device)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds a trainer for its device alone."""
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)


def read_batches(cli: Allocating) -> list[tuple[Tensor, Tensor]]:
    """Training clips (B, C, T, H, W) uint8 and their labels (B,).

    Raises:
        ListError: there are none.
    """
    number = cli.config["batches"]
    loader = cli.datamodule.statistics_dataloader(0, number)
    batches = []
    for batch in track(loader, "decoding", number, console=Console(stderr=True)):
        if len(batch.labels):
            batches.append((batch.clips.flatten(0, 1), batch.labels.repeat_interleave(batch.clips.shape[1])))
    if not batches:
        raise ListError(f"{cli.datamodule.lists['train_list']}: no training video can be decoded")
    return batches


def loss_on(cli: Allocating, batches: Sequence[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], float]:
    """The mean cross-entropy of the batches, with batch-norm statistics of the same batches."""
    model = cli.model

    def loss(network: nn.Module) -> float:
        estimate_statistics(model, (clips.to(model.device) for clips, _ in batches), model)
        model.eval()
        with torch.inference_mode():
            losses = [
                F.cross_entropy(model(clips.to(model.device)), labels.to(model.device), reduction="sum")
                for clips, labels in batches
            ]
        return float(sum(losses)) / sum(len(labels) for _, labels in batches)

    return loss


def subject(cli: Allocating) -> dict[str, Any]:
    """Everything that losses depend on, besides layers and alphas."""
    with open(cli.config["ckpt"], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    clips = {key: value for key, value in cli.config["data"].as_dict().items() if key not in HOW_FAST}
    of = {"checkpoint": digest, "batches": cli.config["batches"], "network": cli.model.network.octave_options}
    return of | {"clips": clips}


def measure(cli: Allocating, groups: Sequence[Group], tried: Sequence[Group]) -> list[Sensitivity]:
    """The sensitivities of the groups to be tried; those that an earlier run kept in the file are not measured again.

    Raises:
        ListError: there are no clips.
    """
    network, tries = cli.model.network, [(group, alpha) for group in tried for alpha in cli.alphas]

    def found(left: Sequence[tuple[Group, float]]) -> Iterator[Sensitivity]:
        loss = loss_on(cli, read_batches(cli))
        options = network.octave_options
        yield from track(
            measure_sensitivities(network, groups, left, loss, cli.sample, options),
            "layers and alphas",
            len(left),
            console=Console(stderr=True),
        )

    return list(keep_sensitivities(cli.output.with_suffix(".json"), subject(cli), tries, found))


def groups_to_try(cli: Allocating, groups: list[Group]) -> list[Group]:
    """The groups of convolutions that --skip leaves."""
    for pattern in cli.config["skip"]:
        left = [group for group in groups if not any(re.search(pattern, name) for name in group)]
        if len(left) == len(groups):
            fail(f"--skip: no convolution has a name that matches {pattern!r}")
        groups = left
    if not groups:
        fail("--skip leaves no convolution")
    return groups


class Costs:
    """Multiply-adds of a test clip, where only the groups in `tried` may be octave."""

    def __init__(self, cli: Allocating, groups: Sequence[Group], tried: Sequence[Group]) -> None:
        self.trial = Trial(cli.model.network, cli.sample, cli.model.network.octave_options)
        self.names, self.tried = ([name for group in part for name in group] for part in (groups, tried))

    def of(self, alphas: dict[str, float]) -> int:
        """The multiply-adds at the alphas of a mapping."""
        return self.trial.cost(alphas).macs

    def uniform(self, alpha: float) -> dict[str, float]:
        """The mapping with one alpha for all convolutions that are tried."""
        return mapping_of(dict.fromkeys(self.names, 0.0) | dict.fromkeys(self.tried, alpha))

    def alpha_for(self, macs: int) -> float:
        """The highest alpha for all convolutions that are tried, to PRECISION, that does not cost less."""
        low, high = 0.0, 1.0
        while high - low > PRECISION:
            middle = (low + high) / 2
            low, high = (low, middle) if self.of(self.uniform(middle)) < macs else (middle, high)
        return round(low, 3)


def write(path: Path, alpha: dict[str, float], downsample: str, comment: str) -> None:
    """Writes options for `octvideo train`."""
    options = yaml.safe_dump({"model": {"alpha": alpha, "downsample": downsample}}, sort_keys=False, width=200)
    with appearing(path) as partial:
        partial.write_text(f"# {comment}\n{options}")
    print(f"{path}: {comment}")


def print_table(sensitivities: Sequence[Sensitivity], chosen: dict[str, float], vanilla: int) -> None:
    """Prints the sensitivities and choices of the groups that save most."""
    alphas = sorted({entry.alpha for entry in sensitivities})
    rows: dict[Group, dict[float, Sensitivity]] = {}
    for entry in sensitivities:
        rows.setdefault(entry.names, {})[entry.alpha] = entry
    tried = (Column(f"loss, MACs at {alpha:g}", no_wrap=True) for alpha in alphas)
    table = Table(Column("convolutions", overflow="fold"), *tried, "chosen", box=box.SIMPLE)
    for names, entries in sorted(rows.items(), key=lambda row: -max(entry.macs for entry in row[1].values()))[:SHOWN]:
        name = names[-1] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        found = (entries.get(alpha) for alpha in alphas)
        cells = [f"{e.loss:+.4f}, -{100 * e.macs / vanilla:.1f} %" if e else "-" for e in found]
        table.add_row(name, *cells, f"{chosen[next(iter(mapping_of({names[0]: 0})))]:g}")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    if len(rows) > SHOWN:
        print(f"and {len(rows) - SHOWN} more that save less: see the .json file")


def choose(cli: Allocating) -> None:
    """Measures, chooses and writes."""
    network, options, budget = cli.model.network, cli.model.network.octave_options, cli.config["budget"]
    groups = groups_that_add(network, cli.sample)
    tried = groups_to_try(cli, groups)
    costs = Costs(cli, groups, tried)
    vanilla = costs.of(costs.uniform(0))
    with contextlib.suppress(ValueError):  # if the alpha does not divide channel groups, `allocate` finds out
        if (least := costs.of(costs.uniform(cli.alphas[-1])) / vanilla) > budget + 1e-9:
            fail(f"{budget:g} of the multiply-adds is out of reach: alpha {cli.alphas[-1]:g} leaves {least:.3f}")
    sensitivities = measure(cli, groups, tried)
    alphas = allocate(network, groups, sensitivities, budget, cli.sample, options)
    print_table(sensitivities, alphas, vanilla)
    macs = costs.of(alphas)
    alpha = costs.alpha_for(macs)
    same = costs.uniform(alpha)
    comment = f"an alpha for each layer, {macs / vanilla:.3f} of the multiply-adds at alpha 0"
    write(cli.output, alphas, options["downsample"], comment)
    comment = f"alpha {alpha:g} for the same layers, {costs.of(same) / vanilla:.3f} of the multiply-adds at alpha 0"
    write(cli.output.with_suffix(f".uniform{cli.output.suffix}"), same, options["downsample"], comment)


def main() -> int:
    """Runs the experiment."""
    cli = start(lambda: Allocating(__doc__ or "", sys.argv[1:], keep_options=False))
    try:
        with one_line_errors():
            choose(cli)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
