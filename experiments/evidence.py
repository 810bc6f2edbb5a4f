"""Octave networks and all their controls under one recipe: accuracy over seeds, by group of classes.

python experiments/evidence.py [--study hard|few] [--variants A,B] [--seeds N,M] [--num-train N] [--json FILE]
                               [--folder runs/evidence] [--table FILE] [--plot FILE]

hard  configs/hard_motions.yaml on the hard motions, 5,760 videos; tested on 960 others
few   configs/quickstart.yaml for 20 epochs on 120 of the quick start's videos, which leave a quarter unsolved; tested
      on 800 others

Variants, all trained by `octvideo sweep`, and tested on videos of another seed than those of training and validation:

pooled, strided            alpha 0, which pools where the octave networks do, or strides as published networks do
octave A                   alpha .125, .25 or .5 in res2 to res4
smaller A, narrower A      pooled, at the input size or the width whose multiply-adds are nearest to octave A's
res4 .5, res2 .5, res5 .25 octave in that stage alone; res2 to res5
allocated                  an alpha for each layer, by experiments/allocation.py from the pooled network of seed 0, at
                           the multiply-adds of octave .25
annealed .25               alpha falls from .5 to .25 in the first half of the training
ablated: CHANGE            octave .25 with a change of experiments/ablations.py, of which temporal is one
shuffled, still, blurred   pooled, on clips of experiments/controls.py

Pooled and octave ones are also tested at .75, 1.25 and 1.5 times the size; of the hard motions, seed 0 alone. By
default few has five seeds of each variant, two of the ablations and of the places of octaves, and one of the controls
of the data; hard has five seeds of seven variants, one of the controls, and the others if --seeds says which.
The JSON file has a row for each variant and seed, which is not run again; a training that was stopped goes on. Several
processes may share a file and a folder if their variants differ. Differences are paired by seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from ablations import CHANGES
from choices import one_of
from intervals import interval, shown
from own_networks import HERE, octvideo
from rich import box
from rich.console import Console
from rich.table import Table
from timing import time_blocks
from torch import nn

from octvideo import build_network, create_model, fuse
from octvideo.commands.options import Parser, number, one_line_errors, several
from octvideo.data.hard_motions import CLASSES
from octvideo.data.motions import make_data_set
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.models.cost import count_cost, count_macs, total

GROUPS = tuple(dict.fromkeys(name.partition(":")[0] for name in CLASSES))
FAMILIES = (
    *("pooled", "strided", "octave", "smaller", "narrower", "allocated", "annealed", "ablated", "res"),
    *("blurred", "shuffled", "still"),
)
SIZES = (0.75, 1.25, 1.5)  # of test clips
Row = dict[str, Any]
Recipe = dict[str, Any]


class Study(NamedTuple):
    """What all variants are trained and tested on."""

    config: str
    level: str  # of the made videos
    num_train: int
    num_val: int
    num_unseen: int
    groups: tuple[str, ...] = ()  # of classes
    options: tuple[str, ...] = ()  # of training
    sized: int = 1  # so many seeds are tested at other sizes
    compared: tuple[str, ...] = ("pooled", "strided", "octave", "smaller", "narrower", "allocated", "ablated: temporal")

    @property
    def path(self) -> Path:
        """The recipe's file."""
        return HERE.parent / "configs" / f"{self.config}.yaml"

    def recipe(self) -> Recipe:
        """The recipe."""
        recipe: Recipe = yaml.safe_load(self.path.read_text())
        recipe["trainer"] |= yaml.safe_load("\n".join(o.split(".")[1].replace("=", ": ") for o in self.options)) or {}
        return recipe


FEW = ("--trainer.max_epochs=20", "--trainer.check_val_every_n_epoch=20")
HARD = ("pooled", "strided", "octave 0.25", "octave 0.5", "smaller 0.25", "narrower 0.25", "ablated: temporal")
STUDIES = {
    "hard": Study("hard_motions", "hard", 5760, 480, 960, GROUPS, compared=HARD),
    "few": Study("quickstart", "easy", 120, 160, 800, options=FEW, sized=5),
}


def zoo(recipe: Recipe, **changes: Any) -> Row:
    """Arguments of `create_model` for a recipe."""
    names = ("name", "alpha", "num_classes", "width", "dropout", "downsample")
    return {name: value for name, value in (recipe["model"] | changes).items() if name in names}


def variant(alpha: Any, model: Row | None = None, data: Row | None = None) -> Recipe:
    """What a variant changes of the recipe; all but one pool at every alpha."""
    return {"model": {"alpha": alpha, "downsample": "pool"} | (model or {}), "data": data or {}}


def size_of(size: int) -> Row:
    """Options of clips of another size."""
    return {"crop_size": size, "short_side": [size, size * 9 // 8], "test_crop_size": size}


def wrapped(network: Row) -> Recipe:
    """A variant that is a network of one's own."""
    return variant(0, {"downsample": "conv", "width": None, "dropout": 0.5, "network": network})


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """All of them by name."""

    @cache
    def macs(width: int, size: int, alpha: float = 0.0) -> int:
        with torch.device("meta"):
            network = create_model(**zoo(recipe, width=width, alpha=alpha, downsample="pool"))
        return count_macs(network, (3, recipe["data"]["clip_frames"], size, size))

    def nearest(known: int, wanted: int, of: Callable[[int], int]) -> int:
        """The number whose multiply-adds, about proportional to its square, are nearest to those wanted."""
        guess = known * (wanted / of(known)) ** 0.5
        return min(range(int(guess) - 6, min(int(guess) + 3, known)), key=lambda n: abs(of(n) - wanted))

    width, size = recipe["model"]["width"], recipe["data"]["crop_size"]
    found = {"pooled": variant(0), "strided": variant(0, {"downsample": "conv"})}
    for alpha in (0.125, 0.25, 0.5):
        wanted = macs(width, size, alpha)
        small = nearest(size, wanted, lambda n: macs(width, n))
        narrow = nearest(width, wanted, lambda n: macs(n, size))
        found[f"octave {alpha:g}"] = variant(alpha)
        found[f"smaller {alpha:g}"] = variant(0, data=size_of(small))
        found[f"narrower {alpha:g}"] = variant(0, {"width": narrow})
    found["res2 0.5"], found["res4 0.5"] = variant([0.5, 0, 0, 0]), variant([0, 0, 0.5, 0])
    found["res2 to res5 0.25"] = variant([0.25] * 4)
    found["allocated"] = variant(None)  # known when pooled is trained
    annealing = {"start": 0.5, "end_epoch": recipe["trainer"]["max_epochs"] / 2}
    callback = {"class_path": "alpha_schedule.AlphaSchedule", "init_args": annealing}
    found["annealed 0.25"] = variant(0.25) | {"trainer": {"callbacks": [callback]}}
    for change in CHANGES:
        arguments = zoo(recipe, alpha=0.25, downsample="pool") | {"change": change}
        if change != "none":
            found[f"ablated: {change}"] = wrapped({"class_path": "ablations.create", "init_args": arguments})
    for control in ("Shuffled", "Still", "Blurred"):
        inner = {"class_path": "octvideo.models.zoo.create_model", "init_args": zoo(recipe, alpha=0, downsample="pool")}
        found[control.lower()] = wrapped({"class_path": f"controls.{control}", "init_args": {"network": inner}})
    return found


def seeds_of(name: str, study: Study) -> int:
    """How many trainings of a variant there should be."""
    if name in ("shuffled", "still", "blurred"):
        return 1
    if name.startswith(study.compared):
        return 5
    return 0 if study.level == "hard" else 2


def groups_right(predictions: Path, groups: Sequence[str]) -> Row:
    """The share of the videos that is right, of all and of each group of as many classes."""
    videos = json.loads(predictions.read_text())["videos"]
    right = np.array([int(np.argmax(video["scores"])) == video["label"] for video in videos])
    group = np.array([video["label"] for video in videos]) // (len(videos[0]["scores"]) // max(len(groups), 1))
    return {"all": float(right.mean())} | {name: float(right[group == i].mean()) for i, name in enumerate(groups)}


def built(change: Recipe, recipe: Recipe) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """A variant's network before its training, and the size of its clips."""
    network, size = change["model"].get("network"), change["data"].get("crop_size", recipe["data"]["crop_size"])
    if network is None:
        model = create_model(**zoo(recipe, **change["model"]))
    else:  # a control's own operations do not count
        inner = network["init_args"].get("network", network)
        model = build_network(inner["class_path"], **inner["init_args"])
    return model.eval(), (3, recipe["data"]["clip_frames"], size, size)


def cost_of(change: Recipe, recipe: Recipe) -> Row:
    """Multiply-adds of a clip, and bytes moved in inference, eager mode."""
    cost = total(count_cost(*built(change, recipe)))
    return {"macs": cost.macs, "bytes": cost.bytes_moved}


def time_ratio(change: Recipe, recipe: Recipe) -> float:
    """The time of a clip over that of the pooled network, fused, by turns: the median over 15 rounds of 10 clips."""
    calls = []
    for one in (change, variant(0)):
        network, size = built(one, recipe)
        calls.append(partial(fuse(network), torch.randn(1, *size)))
    with torch.inference_mode():
        mine, pooled = time_blocks(calls, "cpu", rounds=15, steps=10)
    return float(np.median(np.divide(mine, pooled)))


def allocated(pooled: Path, words: Sequence[str], log: Path, known: dict[str, Recipe], recipe: Recipe) -> Recipe:
    """The alphas that suit a trained network, for as many multiply-adds as octave .25 has."""
    file = pooled / "allocation.yaml"
    if not file.exists():
        budget = cost_of(known["octave 0.25"], recipe)["macs"] / cost_of(known["pooled"], recipe)["macs"]
        ckpt = pooled / "checkpoints" / "last.ckpt"
        asked = [f"--ckpt={ckpt}", "--model.alpha=0", "--model.downsample=pool"]
        asked += [f"--output={file}", f"--budget={budget}"]
        with log.open("a") as to:
            script = [sys.executable, str(HERE / "allocation.py"), *words, *asked]
            subprocess.run(script, check=True, stdout=to, stderr=subprocess.STDOUT)
    return variant(yaml.safe_load(file.read_text())["model"]["alpha"])


def stem(name: str) -> str:
    """A variant's name in paths."""
    return name.replace(": ", "_").replace(" ", "_")


def measure(name: str, seeds: Sequence[int], options: Namespace) -> Iterator[Row]:
    """Trains and tests one variant with some seeds."""
    study, recipe = options.study, options.recipe
    folder: Path = options.folder.absolute()
    data, unseen = folder / f"{study.level}_{options.num_train}", folder / f"{study.level}_unseen"
    lists = [f"--data.train_list={data / 'train.csv'}", f"--data.val_list={data / 'val.csv'}", f"--data.root={data}"]
    words = [f"--cfg={study.path}", *lists, f"--data.test_list={unseen / 'absolute.csv'}", "--data.num_workers=1"]

    def runs_of(name: str) -> Path:
        return Path(folder, options.study_name, stem(name))

    def run_of(name: str, seed: int) -> Path:
        if not (found := sorted(runs_of(name).glob(f"*/seed-{seed}"))):
            raise UserError(f"{name} of seed {seed} is needed first")
        return found[0]

    log, change = runs_of(f"{name}.txt"), options.known[name]
    if name == "allocated":
        change = allocated(run_of("pooled", 0), [*words, *study.options], log, options.known, recipe)
    file = folder / options.study_name / "variants" / f"{stem(name)}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    with appearing(file) as half:
        half.write_text(yaml.safe_dump(change))
    how = [f"--alphas={file}", f"--seeds={','.join(map(str, seeds))}", "--rounds=1", f"--output={runs_of(name)}"]
    octvideo("sweep", *words, *study.options, *how, log=log)
    cost = {"time": time_ratio(change, recipe), **cost_of(change, recipe)}
    for seed in seeds:
        run = run_of(name, seed)
        row: Row = {"variant": name, "seed": seed, **cost}
        row |= {"top1": groups_right(run / "test" / "predictions.json", study.groups)}
        if seed < study.sized and (name == "pooled" or name.startswith("octave")):
            for share in SIZES:
                size, tested = round(recipe["data"]["crop_size"] * share / 2) * 2, run / f"test_{share:g}"
                if not (tested / "predictions.json").exists():
                    sized = [f"--cfg={file}", f"--data.test_crop_size={size}", f"--output={tested}"]
                    octvideo("test", *words, *sized, f"--ckpt={run / 'checkpoints' / 'last.ckpt'}", log=log)
                row[f"top1 at {share:g}"] = groups_right(tested / "predictions.json", study.groups)["all"]
        yield row


def octave_beside(name: str) -> str:
    """The octave variant that another is compared with, if any: of as many multiply-adds, or without the change."""
    kind, _, alpha = name.partition(" ")
    if kind in ("smaller", "narrower"):
        return f"octave {alpha}"
    return "octave 0.25" if kind in ("allocated", "annealed", "ablated:") else ""


def summary(rows: Sequence[Row]) -> Iterator[Row]:
    """For each variant: cost over pooled's; for each seed, top-1 of all and of each group, and all's from others'."""
    of = {(row["variant"], row["seed"]): row for row in rows}

    def pairs(own: Sequence[Row], other: str) -> list[tuple[Row, Row]]:
        return [(row, of[other, row["seed"]]) for row in own if (other, row["seed"]) in of]

    names = dict.fromkeys(row["variant"] for row in rows)
    for name in sorted(names, key=lambda name: (FAMILIES.index(name.split()[0].rstrip(":0123456789")), name)):
        own = [row for row in rows if row["variant"] == name]
        found: Row = {"variant": name, "seeds": len(own)}
        for key in ("macs", "bytes"):
            ratios = [row[key] / base[key] for row, base in pairs(own, "pooled")]
            found[key] = float(np.median(ratios)) if ratios else float("nan")
        found["time"] = float(np.median([row["time"] for row in own]))
        found |= {group: [row["top1"][group] for row in own] for group in own[0]["top1"]}
        for other in ("pooled", octave_beside(name)):
            more = [row["top1"]["all"] - base["top1"]["all"] for row, base in pairs(own, other) if name != other]
            found[f"from {other.split()[0] if other else 'octave'}"] = more
        yield found


def table(rows: Sequence[Row]) -> Table:
    """The summary, in Markdown."""
    groups, others = [group for group in rows[0]["top1"] if group != "all"], ("from pooled", "from octave")
    found = Table("variant", "seeds", "MACs", "bytes", "time", "top-1, %", *others, *groups, box=box.MARKDOWN)
    for row in summary(rows):
        cost = [f"{row[key]:.2f}" for key in ("macs", "bytes", "time")]
        more = [shown(row[other], "+") if row[other] else "" for other in others]
        accuracy = [shown(row["all"]), *more, *(shown(row[group]) for group in groups)]
        found.add_row(row["variant"], str(row["seeds"]), *cost, *accuracy)
    return found


def table_of_sizes(rows: Sequence[Row]) -> Table:
    """Top-1 at other test sizes, in Markdown."""
    found = Table("variant", *(f"{share:g}" for share in (SIZES[0], 1, *SIZES[1:])), box=box.MARKDOWN)
    sized = [row for row in rows if f"top1 at {SIZES[0]:g}" in row]
    for name in dict.fromkeys(row["variant"] for row in sized):
        own = [row for row in sized if row["variant"] == name]
        at = {share: [row[f"top1 at {share:g}"] for row in own] for share in SIZES} | {
            1: [r["top1"]["all"] for r in own]
        }
        found.add_row(name, *(shown(at[share]) for share in sorted(at)))
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over multiply-adds, bytes and time, of all that five seeds were meant for but the strided network."""
    found = list(summary(rows))
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    families = ("pooled", "octave", "smaller", "narrower", "allocated", "ablated: temporal")
    for panel, (key, label) in zip(panels, (("macs", "MACs"), ("bytes", "bytes"), ("time", "time")), strict=True):
        for color, family in enumerate(families):
            line = [row for row in found if row["variant"].startswith(family)]
            means = [interval(row["all"]) for row in line]
            y, half = [mean for mean, _ in means], [half for _, half in means]
            panel.errorbar([row[key] for row in line], y, half, marker="o", capsize=3, label=family, color=f"C{color}")
        panel.set(xlabel=f"{label}, relative to pooled")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("video top-1, %")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--study", type=one_of(STUDIES, "study"), default="hard", dest="study_name", metavar="NAME")
    add("--variants", type=several(str), metavar="A,B", help="default: all")
    add("--seeds", type=several(int), metavar="N,M", help="default: from 0 on, as many as said above")
    add("--num-train", type=number, metavar="N", help="training videos; default: as said above")
    add("--folder", type=Path, default=Path("runs/evidence"), help="for data and runs; default: runs/evidence")
    add("--json", type=Path, metavar="FILE", help="default: experiments/results/evidence_STUDY.json")
    add("--table", type=Path, metavar="FILE", help="write the table there, in Markdown")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of accuracy over cost there")
    options = parser.parse_args(arguments)
    options.study = STUDIES[options.study_name]
    options.num_train = options.num_train or options.study.num_train
    options.json = options.json or HERE / "results" / f"evidence_{options.study_name}.json"
    options.recipe = options.study.recipe()
    options.known = variants(options.recipe)
    options.variants = options.variants or tuple(options.known)
    if unknown := [name for name in options.variants if name not in options.known]:
        parser.error(f"no variant {unknown[0]!r}; there are {', '.join(options.known)}")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measures what is missing, and writes the rows of each variant."""
    with one_line_errors():
        run(parse(arguments))


def run(options: Namespace) -> None:
    """Does what the command line says."""
    folder, study = options.folder.absolute(), options.study
    folder.mkdir(parents=True, exist_ok=True)
    make_data_set(folder / f"{study.level}_{options.num_train}", options.num_train, study.num_val, 0, study.level, 2)
    unseen = folder / f"{study.level}_unseen"
    make_data_set(unseen, 24, study.num_unseen, 1, study.level, 2)
    listed = (unseen / "val.csv").read_text().splitlines()
    (unseen / "absolute.csv").write_text("".join(f"{unseen / line}\n" for line in listed))

    def rows() -> list[Row]:
        return json.loads(options.json.read_text()) if options.json.exists() else []

    for name in options.variants:
        done = {row["seed"] for row in rows() if row["variant"] == name}
        seeds = [seed for seed in options.seeds or range(seeds_of(name, study)) if seed not in done]
        if seeds:
            found = list(measure(name, seeds, options))
            Console().print(found)
            with appearing(options.json) as half:
                half.write_text(json.dumps([*rows(), *found], indent=1))
    if found := rows():
        Console(width=None if sys.stdout.isatty() else 200).print(table(found))
        if options.table:
            with options.table.open("w") as file:
                Console(file=file, width=1000).print(table(found))
        if options.plot:
            plot(found, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
