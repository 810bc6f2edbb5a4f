"""Trains one recipe at several alphas, with several seeds each, and compares accuracy with cost.

octvideo sweep --cfg configs/quickstart.yaml --output runs/sweep
               [--alphas 0,0:pool,.125,.25,.5] [--seeds 0,1,2] [OPTION OF octvideo train ...]
octvideo sweep --cfg configs/quickstart.yaml --output runs/sweep --ckpt CHECKPOINT [CHECKPOINT ...]

An alpha is a number in [0, 1], of res2 to res4 (alpha 0 is the ordinary network, with strided convolutions), or
FILE.yaml of experiments/allocation.py, with an alpha for each layer, whose model.downsample counts too. :pool after it
gives the network downsample "pool": res2 to res5 average-pool for a stride of 2 wherever they are not octave too.
0:pool is the fair control, as octave layers always pool; 0 is what the literature publishes.

Each run is an `octvideo train` and then an `octvideo test`, in OUTPUT/ALPHA/seed-SEED, with all their output in
log.txt; they get the options that this command does not know, such as --trainer.max_epochs 5. Stopped at any moment,
the same command resumes. A run that fails is named, the others continue, and the same command tries it again.

With --ckpt nothing is trained: the checkpoints, which differ in their seeds, are tested at each alpha with batch-norm
statistics of 200 training batches (--statistics_batches) at that alpha.

OUTPUT/sweep.json  [{"alpha", "downsample", "gmacs" (of one test clip), "mac_ratio", "milliseconds" (of one clip, batch
                   1, the median of --rounds, all alphas interleaved), "time_ratio", "top1", "clip_top1" (means over
                   seeds), "top1_deviation", "clip_top1_deviation" (over seeds, n - 1; null for one), "seeds", "runs":
                   [{"run" (its seed or checkpoint), "checkpoint", "top1", "clip_top1", "videos", "bad"}]}]; ratios
                   are relative to the first alpha that has a result
OUTPUT/sweep.md    the same as a table
OUTPUT/sweep.png   accuracy over multiply-adds and over time

Exit status: 0 if all runs are there; 1 if some failed; 2 for a mistake in the command; 130 on Ctrl-C, 143 on SIGTERM,
when the training under way has been saved.
"""

import hashlib
import io
import json
import statistics
import sys
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Column, Table

from octvideo.commands import children
from octvideo.commands.children import RunFailedError
from octvideo.commands.options import Parser, checkpoint, fail, number, several
from octvideo.files import appearing
from octvideo.models.checkpoint import load_trained, restore
from octvideo.models.cost import count_macs, time_interleaved
from octvideo.models.zoo import Alpha

OWN = {"--model.alpha", "--model.downsample", "--seed_everything", "--trainer.default_root_dir", "--ckpt_path"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One of --alphas."""

    name: str  # as on the command line
    title: str  # in table and picture
    folder: str  # its name
    alpha: Alpha = field(compare=False)
    downsample: str  # "conv" or "pool"
    file: Path | None  # where the alpha is from; None: a number


def read_variant(text: str) -> Variant:
    """The type of each of --alphas."""
    value, _, kind = text.partition(":")
    file = Path(value) if value.endswith((".yaml", ".yml")) else None
    if kind not in ("", "pool"):
        raise ArgumentTypeError(f"only :pool may follow an alpha, got {text!r}")
    try:
        model: Row = yaml.safe_load(file.read_text())["model"] if file else {"alpha": float(value)}
        alpha, downsample = model["alpha"], kind or model.get("downsample", "conv")
    except ValueError:
        raise ArgumentTypeError(f"an alpha is a number or a FILE.yaml, got {value!r}") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentTypeError(f"{value} has no model.alpha: {error}") from None
    if isinstance(alpha, float) and not 0 <= alpha <= 1:
        raise ArgumentTypeError(f"alpha must lie in [0, 1], got {value}")
    title = (file.stem if file else f"{alpha:g}") + (", pooled" if downsample == "pool" else "")
    folder = ("" if file else "alpha-") + title.replace(", pooled", "-pool")
    return Variant(text, title, folder, alpha, downsample, file)


def read_seed(text: str) -> int:
    """The type of each of --seeds."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}")
    return int(text)


def read_arguments(words: list[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    children.add_recipe(parser)
    what = "with commas between them; default: %(default)s"
    add("--alphas", type=several(read_variant), default="0,0:pool,.125,.25,.5", metavar="LIST", help=what)
    add("--seeds", type=several(read_seed), default="0,1,2", metavar="LIST", help="of training; default: %(default)s")
    add("--ckpt", type=checkpoint, nargs="+", metavar="FILE", help="test these checkpoints, train nothing")
    add("--statistics_batches", type=number, default=200, metavar="N", help="with --ckpt; default: %(default)s")
    add("--rounds", type=number, default=20, metavar="N", help="timings of each network; default: %(default)s")
    cure = "a sweep sets {} itself: give --alphas, --seeds and --output"
    arguments = children.read_recipe(parser, words, OWN, cure)
    for file in arguments.ckpt or ():
        if not file.is_file():
            fail(f"--ckpt {file}: no such file")
    if len({variant.folder for variant in arguments.alphas}) < len(arguments.alphas):
        fail(f"--alphas has two of the same name: {', '.join(variant.folder for variant in arguments.alphas)}")
    if arguments.ckpt and any(variant.file for variant in arguments.alphas):
        fail("--ckpt tests at numbers: an alpha for each layer needs its own training")
    return arguments


def run_all(arguments: Namespace) -> tuple[dict[Variant, list[Row]], list[str]]:
    """Trains and tests, or tests, what is not there yet: each variant's "runs", and a sentence for each failed run."""
    which = {str(file): file for file in arguments.ckpt or ()} or {f"seed {seed}": seed for seed in arguments.seeds}
    found: dict[Variant, list[Row]] = {variant: [] for variant in arguments.alphas}
    failed = []
    with children.RunProgress(len(which) * len(found)) as progress:
        for name, run, variant in [(f"alpha {v.name}, {what}", run, v) for what, run in which.items() for v in found]:
            progress.begin(name)
            try:
                found[variant].append((test if arguments.ckpt else train)(variant, run, arguments))
            except RunFailedError as error:
                failed.append(f"{name} failed: {error}")
                progress.say(failed[-1], failed=True)
            progress.advance(progress.runs)
    return found, failed


def train(variant: Variant, seed: int, arguments: Namespace) -> Row:
    """Trains and tests one network, as far as that is not done yet."""
    folder = arguments.output / variant.folder / f"seed-{seed}"
    results, checkpoint = folder / "test" / "predictions.json", folder / "checkpoints" / "last.ckpt"
    if not results.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        alpha = f"--cfg={variant.file}" if variant.file else f"--model.alpha={variant.alpha}"
        options = [*arguments.recipe, alpha, f"--model.downsample={variant.downsample}", f"--seed_everything={seed}"]
        options.append(f"--trainer.default_root_dir={folder}")
        children.call("train", [*options, "--ckpt_path=auto"], folder / "log.txt")
        children.call("test", [*options, f"--ckpt={checkpoint}"], folder / "log.txt")
    found = json.loads(results.read_text())
    return entry(seed, checkpoint, found | {key: len(found[key]) for key in ("videos", "bad")})


def test(variant: Variant, checkpoint: Path, arguments: Namespace) -> Row:
    """Tests one checkpoint at one alpha, if that is not done yet."""
    with checkpoint.open("rb") as file:
        folder = arguments.output / variant.folder / hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def estimated() -> Row | None:
        """The row with statistics of this alpha: the second one, written when its test is over."""
        path = folder / "alphas.json"
        rows = json.loads(path.read_text()) if path.is_file() else []
        return next((row for row in rows if row["statistics"] == "re-estimated"), None)

    if estimated() is None:
        folder.mkdir(parents=True, exist_ok=True)
        options = [f"--model.downsample={variant.downsample}", f"--alphas={variant.alpha}", f"--ckpt={checkpoint}"]
        options += [f"--output={folder}", f"--statistics_batches={arguments.statistics_batches}"]
        children.call("test", [*arguments.recipe, *options], folder / "log.txt")
    if found := estimated():
        return entry(checkpoint, checkpoint, found)
    raise RunFailedError(f"there are no training videos to estimate batch-norm statistics on: {folder / 'log.txt'}")


def entry(run: int | Path, checkpoint: Path, found: Row) -> Row:
    """A run's entry in sweep.json."""
    if not found["videos"]:
        raise RunFailedError("none of the videos to test on can be decoded")
    kept = {key: found[key] for key in ("top1", "clip_top1", "videos", "bad")}
    return {"run": str(run), "checkpoint": str(checkpoint), **kept}


def rows_of(found: dict[Variant, list[Row]], rounds: int) -> dict[Variant, Row]:
    """The rows of sweep.json, of variants with a result."""
    tested = {variant: tests for variant, tests in found.items() if tests}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    macs, calls = [], []
    for variant, tests in tested.items():  # the checkpoint may be one of another alpha
        trained = load_trained(tests[0]["checkpoint"])
        options = trained.options | {"alpha": variant.alpha, "downsample": variant.downsample}
        network = restore(options).eval()
        network.load_state_dict(trained.network.state_dict())
        size = trained.preprocessing.clip_size
        macs.append(count_macs(network, size))
        calls.append(torch.inference_mode()(partial(network.to(device), torch.rand(1, *size, device=device))))
    times = time_interleaved(calls, rounds=rounds, warmup=2, device=device)
    rows = {}
    for (variant, tests), cost, seconds in zip(tested.items(), macs, times, strict=True):
        # Ratios within a round: whatever the machine did meanwhile is in both.
        ratio = statistics.median(own / first for own, first in zip(seconds, times[0], strict=True))
        row: Row = {"alpha": variant.name.removesuffix(":pool"), "downsample": variant.downsample}
        row |= {"gmacs": cost / 1e9, "mac_ratio": cost / macs[0]}
        row |= {"milliseconds": 1000 * statistics.median(seconds), "time_ratio": ratio}
        for key in ("top1", "clip_top1"):
            values = [run[key] for run in tests]
            row[key] = statistics.fmean(values)
            row[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        rows[variant] = row | {"seeds": len(tests), "runs": tests}
    return rows


def write_results(rows: dict[Variant, Row], output: Path) -> None:
    """Prints the table, and writes it with the picture."""
    columns = ("alpha", "GMACs", "ratio", "ms", "ratio", "video top-1", "clip top-1", "seeds")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=box.MARKDOWN)
    for variant, row in rows.items():
        pairs = [(100 * row[key], row[f"{key}_deviation"]) for key in ("top1", "clip_top1")]
        shares = [f"{mean:.1f}" + ("" if s is None else f" ± {100 * s:.1f}") + " %" for mean, s in pairs]
        cost = (f"{row['gmacs']:.3f}", f"{row['mac_ratio']:.2f}", f"{row['milliseconds']:.1f}")
        table.add_row(variant.title, *cost, f"{row['time_ratio']:.2f}", *shares, str(row["seeds"]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    Console(file=(text := io.StringIO()), width=1000).print(table)
    contents = {"sweep.json": json.dumps([*rows.values()], indent=1), "sweep.md": text.getvalue().strip()}
    for name, content in contents.items():
        with appearing(output / name) as partial:
            partial.write_text(content + "\n")
    with appearing(output / "sweep.png") as partial:
        draw(rows).savefig(partial, format="png", dpi=120)
    print(f"results: {', '.join(str(path) for path in sorted(output.glob('sweep.*')))}")


def draw(rows: dict[Variant, Row]) -> Figure:
    """Accuracy over multiply-adds and over time; bars are the seeds' standard deviation, dots the seeds."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    octave = [row for variant, row in rows.items() if variant.file is None and variant.alpha]
    octave.sort(key=lambda row: float(row["alpha"]))
    costs = ("gmacs", "GMACs of a clip"), ("milliseconds", "ms of a clip, batch 1")
    for panel, (key, label) in zip(panels, costs, strict=True):
        panel.plot([row[key] for row in octave], [100 * row["top1"] for row in octave], "-", color="grey", alpha=0.5)
        for index, (variant, row) in enumerate(rows.items()):
            marker, colour = "*" if variant.file else "o" if variant.alpha else "s", f"C{index % 10}"
            spread, tops = 100 * (row["top1_deviation"] or 0), [100 * run["top1"] for run in row["runs"]]
            mean = {"fmt": marker, "capsize": 3, "markersize": 9, "label": variant.title, "color": colour}
            panel.errorbar(row[key], 100 * row["top1"], spread, **mean)
            panel.plot([row[key]] * len(tops), tops, ".", markersize=4, color=colour)
        panel.set(xlabel=label, xmargin=0.1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("video top-1 (%)")
    panels[1].legend(title="alpha", loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    return figure


def sweep(words: list[str]) -> int:
    """Does what the command line says; returns the exit status."""
    arguments = read_arguments(words)
    more = [f"--ckpt={arguments.ckpt[0]}"] if arguments.ckpt else []
    children.resolve("test" if arguments.ckpt else "train", [*arguments.recipe, *more])
    other = "a sweep of another recipe or alpha"
    tests = {"statistics_batches": arguments.statistics_batches} if arguments.ckpt else {}
    children.keep(arguments.output / "recipe.json", children.contents(arguments) | tests, other)
    for one in arguments.alphas:
        alpha = {"alpha": one.alpha, "downsample": one.downsample}
        children.keep(arguments.output / one.folder / "alpha.json", alpha, other)
    found, failed = run_all(arguments)
    if rows := rows_of(found, arguments.rounds):
        write_results(rows, arguments.output)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def main(words: list[str]) -> int:
    """Runs the command."""
    return children.stoppable(lambda: sweep(words))
