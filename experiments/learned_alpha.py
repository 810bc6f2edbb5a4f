"""Learns the alpha of every layer under a budget of multiply-adds in two ways, and compares them with two others.

python experiments/learned_alpha.py --cfg configs/quickstart.yaml --ckpt VANILLA [VANILLA ...] --output DIR
                                    [--budget .7] [--ways uniform,gates ...] [OPTION OF octvideo train ...]

The checkpoints are of `octvideo train` at alpha 0 (best --model.downsample pool), one for each seed. All ways go by
the distance of the scores from the vanilla network's on the same --batches of training clips, meet the same budget,
and give the same kind of result: {regex: alpha}, as create_model, octavize and model.alpha take it.

uniform      one alpha for all layers
sensitivity  the greedy choice of experiments/allocation.py
gates        the share of each group of convolutions is a parameter: its last channels are pooled and upsampled, by a
             soft step over the channels; shares are trained for --steps by the distance and a penalty on multiply-adds
             above the budget, the weights being fixed; then one offset makes them meet it
evolution    --population mappings, the best half of which is mixed and mutated for --generations; with --elastic, a
             checkpoint that was trained at several alphas for each of --ckpt, its weights say how good a mapping is

Then each octave network is trained for --epochs with the vanilla one as its teacher, and tested (0: not at all).

DIR/WAY-SEED/alpha.yaml          the choice; DIR/WAY-SEED/test its test
DIR/learned_alpha.json           rows {"way", "seed", "macs" (share), "distance", "seconds", "top1", "alpha"}
DIR/learned_alpha.png            alpha over depth, for each way: the mean over seeds

Stopped, the same command resumes. Exit status: 0 done; 1 a training failed; 2 a mistake in the command.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from choices import one_of
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from octvideo.commands import children
from octvideo.commands.command_line import start
from octvideo.commands.options import Parser, checkpoint, number, several
from octvideo.commands.shrink import LESS, OWN, Clips
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.layers.resampling import average_pool, upsample
from octvideo.models.allocation import Trial, allocate, mapping_of, measure_sensitivities, uniform
from octvideo.models.checkpoint import load_trained
from octvideo.models.choose_low import choose_low
from octvideo.models.octavize import octavize
from octvideo.models.zoo import set_alpha
from octvideo.training.shrink import ALPHAS, check, compare, distance_of, look, refresh

SHARPNESS = 0.1  # width of the soft step, as a share of the channels
PENALTY = 30.0  # of the square of the share of multiply-adds above the budget
HIGHEST = 0.875
Row = dict[str, Any]


class Task:
    """A vanilla network, its clips, and what a mapping does to its scores."""

    def __init__(self, arguments: Namespace, seed: int) -> None:
        ckpt = arguments.ckpt[seed]
        cli = start(lambda: Clips("", [*arguments.recipe, f"--ckpt={ckpt}"], keep_options=False))
        trained: Any = load_trained(ckpt)
        loader = cli.datamodule.statistics_dataloader(0, arguments.batches)
        self.batches = [trained.normalize(batch.clips.flatten(0, 1)) for batch in loader if len(batch.clips)]
        self.network: Any = trained.network
        options: Any = self.network.octave_options
        self.options: dict[str, Any] = options | {"channels_last": False}
        self.network.octave_options = self.options
        choose_low(set_alpha(self.network, 0), self.batches[:4])
        self.trial = Trial(self.network, self.batches[0][:1], self.options)
        self.groups, self.sources = self.trial.flow()
        self.seen = look(self.network, self.batches)
        self.model = copy.deepcopy(self.network)
        if arguments.elastic:  # its channels stay in their order
            self.model.load_state_dict(load_trained(arguments.elastic[seed]).network.state_dict())
        self.vanilla = self.trial.cost(self.mapping([0.0] * len(self.groups))).macs
        self.learning_rate = cli.config["model"]["learning_rate"]

    def mapping(self, shares: Sequence[float]) -> dict[str, float]:
        """Shares of the groups as {regex: alpha}."""
        pairs = zip(self.groups, shares, strict=True)
        return mapping_of({name: share for group, share in pairs for name in group})

    def macs(self, shares: Sequence[float]) -> float:
        """Multiply-adds, as a share of the vanilla network's."""
        return self.trial.cost(self.mapping(shares)).macs / self.vanilla

    def distance(self, alphas: dict[str, float]) -> float:
        """The distance of the scores from the vanilla network's, with batch-norm statistics of the same clips."""
        octavize(self.model, alphas, **self.options)
        return self.distance_of(self.model)

    def distance_of(self, network: nn.Module) -> float:
        """The same for a network as it is."""
        return compare(refresh(network, self.seen, self.batches), self.seen.outputs, distance_of).distance


def one_alpha(task: Task, arguments: Namespace) -> dict[str, float]:
    """One alpha for all layers."""
    sample = task.batches[0][:1]
    return uniform(task.network, task.groups, task.groups, arguments.budget, sample, **task.options)


def sensitivity(task: Task, arguments: Namespace) -> dict[str, float]:
    """The greedy choice by sensitivities."""
    sample = task.batches[0][:1]
    tries = [(group, alpha) for group in task.groups for alpha in ALPHAS]
    found = measure_sensitivities(task.model, task.groups, tries, task.distance_of, sample, task.options)
    kept = list(track(found, "sensitivities", len(tries), console=Console(stderr=True)))
    return allocate(task.network, task.groups, kept, arguments.budget, sample, task.options)


def gates(task: Task, arguments: Namespace) -> dict[str, float]:
    """Shares trained with the weights fixed."""
    model = copy.deepcopy(task.network).requires_grad_(False).eval()
    modules: dict[str, Any] = dict(model.named_modules())
    logits = torch.full((len(task.groups),), -0.5, requires_grad=True)
    index = {name: i for i, group in enumerate(task.groups) for name in group}
    counted = task.trial.costs(task.mapping([0.0] * len(task.groups)))
    parts = []  # multiply-adds of a convolution, and the numbers of its own group and of those that it reads
    for name, sources in task.sources.items():
        parts.append((counted[name].macs, index.get(name), [index[one] for one in sources if one in index]))
    fixed = task.vanilla - sum(macs for macs, *_ in parts)

    def shares() -> Tensor:
        return HIGHEST * logits.sigmoid()

    def macs(now: Tensor) -> Tensor:
        """Multiply-adds as a function of the shares: three of a layer's four paths have a quarter of the positions."""
        total = torch.tensor(float(fixed))
        for cost, own, read in parts:
            high = 1 - now[own] if own is not None else torch.tensor(1.0)
            for source in read[:1]:
                high = high * (1 - now[source])
            total = total + cost * (0.25 + 0.75 * high)
        return total / task.vanilla

    def blur(i: int) -> Callable[..., Tensor]:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            channels = output.shape[1]
            place = (torch.arange(channels) + 0.5) / channels
            low = ((place - (1 - shares()[i])) / SHARPNESS).sigmoid().view(-1, *(1,) * (output.dim() - 2))
            factors = (1,) * (output.dim() - 4) + (2, 2)
            return output + low * (upsample(average_pool(output, factors), output.shape[2:]) - output)

        return hook

    optimizer = torch.optim.Adam([logits], 0.05)
    pairs = list(zip(task.batches, task.seen.outputs, strict=True))
    with ExitStack() as stack:
        for i, group in enumerate(task.groups):
            for name in group:
                stack.callback(modules[name].register_forward_hook(blur(i)).remove)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        for step in track(range(arguments.steps), "gates", console=Console(stderr=True)):
            clips, wanted = pairs[step % len(pairs)]
            above = (macs(shares()) - arguments.budget).clamp(min=0)
            loss = distance_of(model(clips), wanted) + PENALTY * above.square() + above
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    low, high = -8.0, 8.0  # an offset that makes them meet the budget
    for _ in range(12):
        middle = (low + high) / 2
        met = task.macs((HIGHEST * (logits.detach() + middle).sigmoid()).tolist()) <= arguments.budget
        low, high = (low, middle) if met else (middle, high)
    return task.mapping([round(share, 3) for share in (HIGHEST * (logits.detach() + high).sigmoid()).tolist()])


def evolution(task: Task, arguments: Namespace) -> dict[str, float]:
    """Mappings that were mixed and mutated; the first ones are the uniform one and random ones."""
    draw = random.Random(arguments.draw)
    levels = (0.0, *ALPHAS, HIGHEST)

    def repaired(shares: list[float]) -> tuple[float, ...]:
        """Raised in random groups until the budget is met, then lowered where that is possible."""
        while task.macs(shares) > arguments.budget:
            possible = [i for i, share in enumerate(shares) if share < levels[-1]]
            if not possible:
                raise UserError(f"{arguments.budget:g} of the multiply-adds is out of reach")
            i = draw.choice(possible)
            shares[i] = next(level for level in levels if level > shares[i])
        return tuple(shares)

    def mixed(one: tuple[float, ...], other: tuple[float, ...]) -> list[float]:
        shares = [draw.choice(pair) for pair in zip(one, other, strict=True)]
        return [draw.choice(levels) if draw.random() < 0.1 else share for share in shares]

    some = one_alpha(task, arguments)
    first = tuple(some[next(iter(mapping_of({group[0]: 0.0})))] for group in task.groups)
    population: dict[tuple[float, ...], float] = {first: task.distance(task.mapping(first))}
    while len(population) < arguments.population:
        shares = repaired([draw.choice(levels) for _ in task.groups])
        population[shares] = task.distance(task.mapping(shares))
    for _ in track(range(arguments.generations), "evolution", console=Console(stderr=True)):
        parents = sorted(population, key=population.__getitem__)[: arguments.population // 2]
        population = {one: population[one] for one in parents}
        while len(population) < arguments.population:
            shares = repaired(mixed(draw.choice(parents), draw.choice(parents)))
            if shares not in population:
                population[shares] = task.distance(task.mapping(shares))
    return task.mapping(sorted(population, key=population.__getitem__)[0])


WAYS: dict[str, Callable[[Task, Namespace], dict[str, float]]] = {
    "uniform": one_alpha,
    "sensitivity": sensitivity,
    "gates": gates,
    "evolution": evolution,
}


def read_arguments(words: list[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    children.add_recipe(parser)
    add = parser.add_argument
    add("--ckpt", type=checkpoint, nargs="+", required=True, metavar="FILE", help="vanilla checkpoints, one a seed")
    add("--elastic", type=checkpoint, nargs="+", metavar="FILE", help="trained at several alphas, as many as --ckpt")
    add("--budget", type=float, default=0.7, metavar="SHARE", help="of the multiply-adds; default: %(default)s")
    add("--ways", type=several(one_of(WAYS, "way")), default=",".join(WAYS), help="default: all")
    add("--batches", type=number, default=10, metavar="N", help="of training clips; default: %(default)s")
    add("--steps", type=number, default=200, metavar="N", help="of gates; default: %(default)s")
    add("--population", type=number, default=24, metavar="N", help="of evolution; default: %(default)s")
    add("--generations", type=number, default=15, metavar="N", help="of evolution; default: %(default)s")
    add("--epochs", type=int, default=1, metavar="N", help="of training with the teacher; 0: none; default: 1")
    arguments = children.read_recipe(parser, words, OWN, "{} is what the experiment sets itself")
    check(arguments.budget, "macs", ALPHAS)
    if arguments.elastic and len(arguments.elastic) != len(arguments.ckpt):
        raise UserError(f"--elastic has {len(arguments.elastic)} checkpoints for {len(arguments.ckpt)} of --ckpt")
    return arguments


def train(arguments: Namespace, folder: Path, seed: int) -> float | None:
    """The top-1 accuracy after a training with the teacher, as far as that is not done yet."""
    results = folder / "test" / "predictions.json"
    if arguments.epochs < 1:
        return None
    if not results.is_file():
        options = [*arguments.recipe, f"--cfg={folder / 'alpha.yaml'}", f"--seed_everything={seed}"]
        options += [f"--trainer.default_root_dir={folder}", f"--trainer.max_epochs={arguments.epochs}"]
        children.call("train", [*options, "--ckpt_path=auto"], folder / "log.txt")
        ckpt = folder / "checkpoints" / "last.ckpt"
        children.call("test", [*options, f"--ckpt={ckpt}", f"--output={folder / 'test'}"], folder / "log.txt")
    top1: float = json.loads(results.read_text())["top1"]
    return top1


def draw(rows: Sequence[Row]) -> Figure:
    """Alpha over depth: a line for each way, the mean over seeds, and dots for seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="convolution, from the input to the classifier", ylabel="alpha", ylim=(-0.03, 1))
    for number_, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        found = [list(row["alpha"].values()) for row in rows if row["way"] == way]
        means = torch.tensor(found).mean(0).tolist()
        axes.step(range(len(means)), means, where="mid", label=way, color=f"C{number_}")
        for one in found if len(found) > 1 else ():
            axes.plot(range(len(one)), one, ".", markersize=3, color=f"C{number_}", alpha=0.5)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def run(arguments: Namespace) -> int:
    """Chooses, trains, tests and writes."""
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    names = ("budget", "batches", "steps", "population", "generations", "epochs", "ckpt", "elastic")
    what = children.contents(arguments) | {name: getattr(arguments, name) for name in names}
    children.keep(output / "recipe.json", what, "the experiment with other options")
    path = output / "learned_alpha.json"
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    for seed in range(len(arguments.ckpt)):
        left = [way for way in arguments.ways if not any((row["way"], row["seed"]) == (way, seed) for row in rows)]
        task = Task(arguments, seed) if left else None
        for way in left:
            assert task is not None
            folder, began = output / f"{way}-{seed}", time.perf_counter()
            folder.mkdir(exist_ok=True)
            arguments.draw = seed
            alphas = WAYS[way](task, arguments)
            seconds, macs = time.perf_counter() - began, task.trial.cost(alphas).macs / task.vanilla
            order = list(mapping_of({name: 0.0 for name, _ in task.network.named_modules()}))
            alphas = {name: alphas[name] for name in order if name in alphas}
            model = {"alpha": alphas, "downsample": task.options["downsample"], "weights": str(arguments.ckpt[seed])}
            model |= {"teacher": str(arguments.ckpt[seed]), "teacher_weight": 0.9, "warmup_epochs": 0}
            model["learning_rate"] = task.learning_rate / LESS
            with appearing(folder / "alpha.yaml") as partial_file:
                text = yaml.safe_dump({"model": model, "precise_bn": arguments.batches}, sort_keys=False)
                partial_file.write_text(text)
            row = {"way": way, "seed": seed, "macs": macs, "distance": task.distance(alphas), "seconds": seconds}
            rows.append(row | {"top1": train(arguments, folder, seed), "alpha": alphas})
            with appearing(path) as partial_file:
                partial_file.write_text(json.dumps(rows, indent=1))
    table = Table("way", "seed", "MACs", "distance", "s", "video top-1")
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{100 * row['top1']:.1f} %"
        cells = (f"{row['macs']:.3f}", f"{row['distance']:.3g}", f"{row['seconds']:.0f}", top1)
        table.add_row(row["way"], str(row["seed"]), *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    with appearing(path.with_suffix(".png")) as partial_file:
        draw(rows).savefig(partial_file, dpi=110, format="png")
    return 0


def main() -> int:
    """Runs the experiment."""

    def work() -> int:
        try:
            return run(read_arguments(sys.argv[1:]))
        except children.RunFailedError as error:
            print(error, file=sys.stderr)
            return 1

    return children.stoppable(work)


if __name__ == "__main__":
    sys.exit(main())
