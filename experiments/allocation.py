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
import copy
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

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
from torch.overrides import TorchFunctionMode

from octvideo.commands.command_line import CommandLine, start
from octvideo.commands.options import fail, one_line_errors
from octvideo.commands.test import read_alphas
from octvideo.errors import ListError, UserError
from octvideo.files import appearing
from octvideo.models.checkpoint import load_trained
from octvideo.models.cost import count_macs
from octvideo.models.octavize import octavize
from octvideo.models.zoo import set_alpha
from octvideo.training.precise_bn import estimate_statistics

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
SIDE_BY_SIDE = (torch.cat, torch.concat, torch.concatenate)  # the maps they join may be split in different ways
SHOWN = 10  # rows of the table
WIDTH = 160  # characters that one of its lines may have, unless it is for a terminal
PRECISION = 1e-3  # of the uniform alpha
HOW_FAST = ("num_workers", "decode_timeout_seconds")  # options of the data that do not change the clips


class Sensitivity(NamedTuple):
    """The effect of making one group of convolutions octave while all others have alpha 0."""

    names: tuple[str, ...]  # a group of `groups_that_add`
    alpha: float
    loss: float  # the rise
    macs: int  # multiply-adds of a clip saved


class _Origins(TorchFunctionMode):
    """Tracks which convolutions tensors come from, and joins those whose outputs meet elementwise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.groups: dict[str, set[str]] = {}
        self._origins: dict[int, str] = {}  # by id of a tensor: one convolution of the group that it comes from
        self._kept: list[Tensor] = []  # so that no other tensor gets their ids
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                self.groups[name] = {name}
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            depthwise = module.groups == module.in_channels == module.out_channels > 1
            self._note(output, [name, *(self._of(inputs) if depthwise else ())])

        return hook

    def _of(self, values: Iterable[Any]) -> list[str]:
        return [self._origins[id(value)] for value in values if id(value) in self._origins]

    def _note(self, output: Tensor, origins: Sequence[str]) -> None:
        joined = set().union(*(self.groups[name] for name in origins))
        for name in joined:
            self.groups[name] = joined
        self._origins[id(output)] = origins[0]
        self._kept.append(output)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        origins = self._of((*args, *(kwargs or {}).values()))
        if origins and isinstance(output, Tensor) and func not in SIDE_BY_SIDE:
            self._note(output, origins)
        return output


def groups_that_add(network: nn.Module, clip_size: Sequence[int]) -> list[tuple[str, ...]]:
    """The convolutions of a network, in groups that must share an alpha.

    Octaves add elementwise only if they are split alike. So the last convolutions of all blocks of a residual stage and
    its shortcut are a group, as are a depthwise convolution and the one before it; others are alone.

    Args:
        network: ordinary modules; it is neither run nor changed.
        clip_size: size of its input without the batch dimension, such as (3, T, H, W).

    Returns:
        Names of convolutions that can be octave (`octavize` leaves those that read the input, and those inside
        attention), in the order of `named_modules`. A group with any other convolution is left out.
    """
    model = octavize(copy.deepcopy(network), 0).to("meta").eval()
    origins = _Origins(model)
    with torch.no_grad(), origins:
        model(torch.empty((1, *clip_size), device="meta"))
    report: Any = octavize(model, 1.0).octave_report
    possible = {entry.name for entry in report.assignments if not entry.reason}
    groups = {
        name: tuple(other for other in origins.groups if other in group) for name, group in origins.groups.items()
    }
    return [group for group in dict.fromkeys(groups.values()) if possible.issuperset(group)]


def mapping_of(alphas: Mapping[str, float]) -> dict[str, float]:
    """Alphas by the names of convolutions, as `octavize` and `create_model` take them: {regex: number}."""
    return {f"^{re.escape(name)}$": alpha for name, alpha in alphas.items()}


def measure_sensitivities(
    network: nn.Module,
    groups: Sequence[tuple[str, ...]],
    tries: Iterable[tuple[tuple[str, ...], float]],
    loss: Callable[[nn.Module], float],
    clip_size: Sequence[int],
    options: Mapping[str, Any] = NO_OPTIONS,
) -> Iterator[Sensitivity]:
    """Makes one group of convolutions after the other octave, and measures the effect.

    Args:
        network: changed meanwhile; has alpha 0 everywhere in the end.
        groups: all of `groups_that_add`.
        tries: groups, each with an alpha in (0, 1].
        loss: of the network; called first for alpha 0 everywhere.
        clip_size: size of the network's input without the batch dimension, such as (3, T, H, W).
        options: other options of `octavize`, such as downsample.

    Yields:
        One for each try, in order, except where a group's channels cannot be split at the alpha.

    Raises:
        UserError: a loss that is not finite.
    """
    everywhere = {name: 0.0 for group in groups for name in group}

    def finite_loss(where: str) -> float:
        found = loss(network)
        if not math.isfinite(found):
            raise UserError(f"the loss is {found} {where}")
        return found

    try:
        octavize(network, mapping_of(everywhere), **options)
        vanilla_loss, vanilla_macs = finite_loss("at alpha 0"), count_macs(network, clip_size)
        for group, alpha in tries:
            try:
                octavize(network, mapping_of(everywhere | dict.fromkeys(group, alpha)), **options)
            except ValueError:  # channel groups that it does not divide
                continue
            saved = vanilla_macs - count_macs(network, clip_size)
            rise = finite_loss(f"with alpha {alpha:g} in {', '.join(group)}") - vanilla_loss
            yield Sensitivity(group, alpha, rise, saved)
    finally:
        octavize(network, mapping_of(everywhere), **options)


def allocate(
    network: nn.Module,
    groups: Sequence[tuple[str, ...]],
    sensitivities: Iterable[Sensitivity],
    budget: float,
    clip_size: Sequence[int],
    options: Mapping[str, Any] = NO_OPTIONS,
) -> dict[str, float]:
    """Chooses an alpha for each convolution greedily, by the least rise of the loss for a saved multiply-add.

    Starting from alpha 0, it takes the step (of a group, to a higher alpha) with the least ratio until the network is
    cheap enough. Rises are assumed to add up, which holds only roughly; one below 0 counts as 0. The cost of the
    network is counted anew after each step.

    Args:
        network: left as it was; its weights do not matter.
        groups: all of `groups_that_add`.
        sensitivities: of those groups that may be octave.
        budget: allowed share of the multiply-adds at alpha 0, in (0, 1].
        clip_size: size of the network's input without the batch dimension.
        options: other options of `octavize`.

    Returns:
        {regex: alpha} with an entry for each convolution of the groups, also where its alpha is 0: an option such as
        downsample affects the convolutions that an entry names.

    Raises:
        UserError: a budget out of its range, or below what the highest alphas reach.
    """
    if not 0 < budget <= 1:
        raise UserError(f"budget must lie in (0, 1], got {budget}")
    effects: dict[tuple[str, ...], dict[float, tuple[float, int]]] = {group: {0.0: (0.0, 0)} for group in groups}
    for names, alpha, loss, macs in sensitivities:
        effects[names][alpha] = (loss, macs)
    chosen = dict.fromkeys(effects, 0.0)
    model = copy.deepcopy(network).to("meta")

    def mapping() -> dict[str, float]:
        return mapping_of({name: alpha for names, alpha in chosen.items() for name in names})

    vanilla = macs = count_macs(octavize(model, mapping(), **options), clip_size)
    while macs > (budget + 1e-9) * vanilla:  # a share of whole numbers is seldom exact
        steps = []
        for names, alpha in chosen.items():
            loss_now, saved_now = effects[names][alpha]
            for higher, (loss, saved) in effects[names].items():
                if higher > alpha and saved > saved_now:
                    ratio = max(0.0, loss - loss_now) / (saved - saved_now)
                    steps.append((ratio, saved_now - saved, names, higher))
        if not steps:
            raise UserError(
                f"{budget:g} of the multiply-adds is out of reach: at their highest alphas these convolutions leave "
                f"{macs / vanilla:.3f}"
            )
        *_, names, higher = min(steps)
        chosen[names] = higher
        macs = count_macs(octavize(model, mapping(), **options), clip_size)
    return mapping()


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
        self.size = trained.preprocessing.clip_size
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
    found: dict[str, Any] = json.loads(json.dumps(of | {"clips": clips}, default=str))  # as it is read back
    return found


def measure(cli: Allocating, groups: Sequence[tuple[str, ...]], tried: Sequence[tuple[str, ...]]) -> list[Sensitivity]:
    """The sensitivities of the groups to be tried; those that an earlier run kept in the file are not measured again.

    Raises:
        ListError: there are no clips.
    """
    network, path, of = cli.model.network, cli.output.with_suffix(".json"), subject(cli)
    known: dict[tuple[tuple[str, ...], float], Sensitivity] = {}
    if path.is_file():
        try:
            kept = json.loads(path.read_text())
        except ValueError as error:
            fail(f"{path} is not a file of this experiment: {error}")
        if not isinstance(kept, dict) or kept.get("of") != of:
            cure = "delete it, or choose another --output"
            fail(f"{path} holds sensitivities of another checkpoint or of other clips: {cure}")
        for row in kept["sensitivities"]:
            known[tuple(row["names"]), row["alpha"]] = Sensitivity(**row | {"names": tuple(row["names"])})
    tries = [(group, alpha) for group in tried for alpha in cli.alphas]
    left = [one for one in tries if one not in known]
    if left:
        loss = loss_on(cli, read_batches(cli))
        found = measure_sensitivities(network, groups, left, loss, cli.size, network.octave_options)
        for entry in track(found, "layers and alphas", len(left), console=Console(stderr=True)):
            known[entry.names, entry.alpha] = entry
            with appearing(path) as partial:
                partial.write_text(json.dumps({"of": of, "sensitivities": [e._asdict() for e in known.values()]}))
    return [known[one] for one in tries if one in known]


def groups_to_try(cli: Allocating, groups: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
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

    def __init__(self, cli: Allocating, groups: Sequence[tuple[str, ...]], tried: Sequence[tuple[str, ...]]) -> None:
        self.network, self.size = copy.deepcopy(cli.model.network).to("meta"), cli.size
        self.names, self.tried = ([name for group in part for name in group] for part in (groups, tried))

    def of(self, alphas: dict[str, float]) -> int:
        """The multiply-adds at the alphas of a mapping."""
        return count_macs(set_alpha(self.network, alphas), self.size)

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
    rows: dict[tuple[str, ...], dict[float, Sensitivity]] = {}
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
    groups = groups_that_add(network, cli.size)
    tried = groups_to_try(cli, groups)
    costs = Costs(cli, groups, tried)
    vanilla = costs.of(costs.uniform(0))
    with contextlib.suppress(ValueError):  # if the alpha does not divide channel groups, `allocate` finds out
        if (least := costs.of(costs.uniform(cli.alphas[-1])) / vanilla) > budget + 1e-9:
            fail(f"{budget:g} of the multiply-adds is out of reach: alpha {cli.alphas[-1]:g} leaves {least:.3f}")
    sensitivities = measure(cli, groups, tried)
    alphas = allocate(network, groups, sensitivities, budget, cli.size, options)
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
