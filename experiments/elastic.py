"""One network trained for all alphas against one trained for each: accuracy and training time, on made videos.

python experiments/elastic.py [--setups motions,few] [--kinds alone,elastic,labels] [--seeds 3] [--folder runs/elastic]
                              [--json FILE] [--plot FILE]

motions    the quickstart's recipe and 480 training videos, strides pooled at every alpha
few        the same with 120 videos and 20 epochs, where the vanilla network stays below 90 %

Of each set-up and seed: a network trained alone at each of the alphas 0, .125, .25 and .5; one trained for all, whose
smaller networks learn the largest's scores (elastic) or these and the labels alike (labels, the default of octvideo);
and the network of alpha 0 run at the others without training, with statistics of its own alpha or re-estimated. All are
tested on 800 videos that no training saw. Seconds are processor time of training, loader included. Rows are added
to the JSON file after each seed, and seeds that it holds are not repeated, nor finished trainings.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from choices import one_of
from intervals import interval
from own_networks import HERE, data_words, octvideo, train
from rich import box
from rich.console import Console
from rich.table import Table

from octvideo.commands.options import Parser, number, several
from octvideo.data.motions import make_data_set
from octvideo.files import appearing

ALPHAS = (0.0, 0.125, 0.25, 0.5)
SETUPS = {"motions": (480, 10), "few": (120, 20)}  # training videos, epochs
KINDS = {"alone": [], "elastic": ["--model.elastic.teacher_weight=1"], "labels": ["--model.elastic.teacher_weight=0.5"]}
NAMES = {"alone": "alone", "elastic": "elastic, scores", "labels": "elastic", "untrained": "vanilla, at this alpha"}
RESULTS = HERE / "results" / "elastic.json"
Row = dict[str, Any]


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def trained(run: Path, words: Sequence[str]) -> tuple[Path, float]:
    """The last checkpoint of a training, and its processor time in seconds."""
    kept, before = run / "seconds.json", processor_seconds()
    checkpoint = train(run, *words)
    if not kept.exists():
        kept.write_text(json.dumps(processor_seconds() - before))
    seconds: float = json.loads(kept.read_text())
    return checkpoint, seconds


def tested(checkpoint: Path, run: Path, words: Sequence[str], alphas: Sequence[float], statistics: int) -> list[Row]:
    """The rows of `octvideo test --alphas`: with the checkpoint's statistics and, on so many batches, new ones."""
    output = run / "test"
    if not (output / "alphas.json").exists():
        asked = [f"--alphas={','.join(map(str, alphas))}", f"--statistics_batches={statistics}"]
        octvideo("test", *words, *asked, f"--ckpt={checkpoint}", f"--output={output}", log=run / "log.txt")
    rows: list[Row] = json.loads((output / "alphas.json").read_text())
    return [{key: row[key] for key in ("alpha", "gmacs", "statistics", "top1")} for row in rows]


def recipe(setup: str, seed: int, folder: Path, downsample: str = "pool") -> tuple[list[str], str]:
    """Options of a training without its alpha, and the one that names the videos to test on; the data are there."""
    num_train, epochs = SETUPS[setup]
    data, unseen = folder / setup, folder / "unseen"
    make_data_set(data, num_train)
    make_data_set(unseen, 8, 800, seed=1)
    words = ["--cfg=quickstart", *data_words(data), f"--model.downsample={downsample}"]
    words += [f"--trainer.max_epochs={epochs}", f"--seed_everything={seed}"]
    listed = (unseen / "val.csv").read_text().splitlines()
    (unseen / "absolute.csv").write_text("".join(f"{unseen / line}\n" for line in listed))
    return words, f"--data.test_list={unseen / 'absolute.csv'}"


def measure(setup: str, seed: int, kind: str, folder: Path) -> Iterator[Row]:
    """The rows of one seed: of networks trained alone and of the vanilla one at other alphas, or of the elastic one."""
    words, test_list = recipe(setup, seed, folder)
    test = [*words, test_list]
    of_run: Row = {"setup": setup, "seed": seed}
    for alpha in ALPHAS if kind == "alone" else ():
        run = folder / f"{setup}_alone_{alpha:g}_{seed}"
        checkpoint, seconds = trained(run, [*words, f"--model.alpha={alpha:g}"])
        alphas = ALPHAS if alpha == 0 else [alpha]
        for row in tested(checkpoint, run, test, alphas, 0 if alpha else 20):
            own = row["alpha"] == alpha
            if not own or row["statistics"] == "checkpoint":
                yield of_run | row | {"kind": "alone" if own else "untrained", "seconds": seconds}
    if kind == "alone":
        return
    run = folder / f"{setup}_{kind}_{seed}"
    asked = [f"--model.elastic.alphas={list(ALPHAS)}", *KINDS[kind]]
    checkpoint, seconds = trained(run, [*words, "--model.alpha=0.25", *asked])
    for row in tested(checkpoint, run, test, ALPHAS, 20):
        yield of_run | row | {"kind": kind, "seconds": seconds}


def summary(rows: Sequence[Row], setup: str) -> Iterator[Row]:
    """For each kind, statistics and alpha: top-1 in percent, its difference from networks trained alone, and cost."""
    of_setup = [row for row in rows if row["setup"] == setup]
    for kind, statistics, alpha in sorted({(row["kind"], row["statistics"], row["alpha"]) for row in of_setup}):
        key = {"kind": kind, "statistics": statistics, "alpha": alpha}
        chosen = [row for row in of_setup if key.items() <= row.items()]
        alone = {row["seed"]: row["top1"] for row in of_setup if (row["kind"], row["alpha"]) == ("alone", alpha)}
        top1, half = interval([row["top1"] for row in chosen])
        found = {"top1": top1, "half": half, "from_alone": interval([r["top1"] - alone[r["seed"]] for r in chosen])}
        yield key | found | {"gmacs": chosen[0]["gmacs"], "seconds": np.mean([row["seconds"] for row in chosen])}


def table(rows: Sequence[Row], setup: str) -> Table:
    """The summary in Markdown: a row for each kind of training, a column for each alpha."""
    shown = Table("trained", "statistics", "s of a core", *(f"alpha {alpha:g}" for alpha in ALPHAS), box=box.MARKDOWN)
    found = list(summary(rows, setup))
    for kind, statistics in dict.fromkeys((row["kind"], row["statistics"]) for row in found):
        line = {row["alpha"]: row for row in found if (row["kind"], row["statistics"]) == (kind, statistics)}
        cells = {alpha: f"{row['top1']:.1f} ± {row['half']:.1f}" for alpha, row in line.items()}
        if kind != "alone":
            cells |= {
                alpha: "{} ({:+.1f} ± {:.1f})".format(cells[alpha], *row["from_alone"]) for alpha, row in line.items()
            }
        seconds = " ".join(dict.fromkeys(f"{row['seconds']:.0f}" for row in line.values()))
        shown.add_row(NAMES[kind], statistics, seconds, *(cells.get(alpha, "") for alpha in ALPHAS))
    return shown


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over multiply-adds of each kind, a panel for each set-up."""
    setups = list(dict.fromkeys(row["setup"] for row in rows))
    figure, panels = plt.subplots(1, len(setups), figsize=(5 * len(setups), 3.5), squeeze=False)
    for panel, setup in zip(panels[0], setups, strict=True):
        found = list(summary(rows, setup))
        for kind, statistics in dict.fromkeys((row["kind"], row["statistics"]) for row in found):
            line = [row for row in found if (row["kind"], row["statistics"]) == (kind, statistics)]
            x, y, half = ([row[key] for row in line] for key in ("gmacs", "top1", "half"))
            panel.errorbar(x, y, half, marker="o", capsize=3, label=f"{NAMES[kind]}, statistics {statistics}")
        panel.set(title=setup, xlabel="GMACs a clip", ylabel="top-1, %")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--setups", type=several(one_of(SETUPS, "set-up")), default=tuple(SETUPS), metavar="A,B")
    add("--kinds", type=several(one_of(KINDS, "kind")), default=tuple(KINDS), metavar="A,B")
    add("--seeds", type=number, default=3, metavar="N", help="default: 3")
    add("--folder", type=Path, default=Path("runs/elastic"), help="for data and runs; default: runs/elastic")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="default: experiments/results/elastic.json")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of accuracy over multiply-adds there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measures what is missing, and writes the rows after each seed."""
    options = parse(arguments)
    folder, console = options.folder.absolute(), Console(width=None if sys.stdout.isatty() else 250)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = json.loads(options.json.read_text()) if options.json.exists() else []
    for setup in options.setups:
        for seed, kind in product(range(options.seeds), options.kinds):
            key = {"setup": setup, "seed": seed, "kind": kind}
            if any(key.items() <= row.items() for row in rows):
                continue
            rows += measure(setup, seed, kind, folder)
            with appearing(options.json) as partial:
                partial.write_text(json.dumps(rows, indent=1))
        console.print(setup, table(rows, setup), sep="\n\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
