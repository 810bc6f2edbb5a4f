"""Trains one recipe at several alphas, each with several seeds, and lays accuracy beside what it costs.

python tools/sweep.py --cfg configs/quickstart.yaml --output runs/sweep
                      [--alphas 0,0:pool,.125,.25,.5] [--seeds 0,1,2] [OPTION OF train_net.py ...]
python tools/sweep.py --cfg configs/quickstart.yaml --output runs/sweep --ckpt CHECKPOINT [CHECKPOINT ...]

An alpha is
  a number    in [0, 1], of res2 to res4; alpha 0 is the ordinary network, which strides
  FILE.yaml   an alpha for each layer, of experiments/allocation.py, whose model.downsample counts too
and with :pool behind it the network has downsample "pool": res2 to res5 average-pool for a stride of 2 wherever they
are not octave too. 0:pool is the fair control, as octave layers always pool; 0 is what is published.

Each run is one of train_net.py and then of test_net.py, in OUTPUT/ALPHA/seed-SEED with all that they print in log.txt;
options that this tool does not know are theirs, such as --trainer.max_epochs 5. Stopped at any moment, the same command
goes on where it was. A run that fails is named, the others go on, and the same command tries it again.

With --ckpt nothing is trained: the checkpoints, which differ in their seeds, are tested at each alpha with batch-norm
statistics of 200 training batches (--statistics_batches) at that alpha.

OUTPUT/sweep.json  [{"alpha", "downsample", "gmacs" (of one test clip), "mac_ratio", "milliseconds" (of one clip, batch
                   1, the median of --rounds, all alphas in turn), "time_ratio", "top1", "clip_top1" (means over seeds),
                   "top1_deviation", "clip_top1_deviation" (of the seeds, n - 1; null for one), "seeds", "runs":
                   [{"run" (its seed or checkpoint), "checkpoint", "top1", "clip_top1", "videos", "bad"}]}]; ratios
                   are to the first alpha that has a result
OUTPUT/sweep.md    the same as a table
OUTPUT/sweep.png   accuracy over multiply-adds and over time (`pip install 'octvideo[plot]'`)

Exit status: 0 if all runs are there; 1 if some failed; 2 for a mistake in the command; 130 on Ctrl-C, 143 on SIGTERM,
when the training under way has been saved.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from octvideo.commands.options import Parser, fail, one_line_errors
from octvideo.evaluation.report import clip_size
from octvideo.files import appearing
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.cost import count_macs, time_interleaved
from octvideo.models.zoo import Alpha, create_model

WARMUP = 2  # rounds
WIDTH = 160  # characters that a line of a table may have, unless it is for a terminal


@dataclass(frozen=True, eq=False)
class Variant:
    """What differs between the networks of a sweep.

    Args:
        name: as on the command line; names the folder too.
        alpha: of the network.
        downsample: "conv" or "pool".
        file: that the alpha is from.
    """

    name: str
    alpha: Alpha
    downsample: str
    file: Path | None

    @property
    def options(self) -> list[str]:
        """Options of train_net.py and test_net.py."""
        alpha = ["--model.alpha", str(self.alpha)] if self.file is None else ["--cfg", str(self.file)]
        return [*alpha, "--model.downsample", self.downsample]

    @property
    def described(self) -> dict[str, Any]:
        """What it is, wherever it is from."""
        return {"alpha": self.alpha, "downsample": self.downsample}

    @property
    def folder(self) -> str:
        """A name for its folder."""
        name = f"alpha-{self.alpha:g}" if self.file is None else self.file.stem  # type: ignore[str-format]
        return f"{name}-pool" if self.downsample == "pool" else name


@dataclass(frozen=True)
class Tested:
    """One run and its accuracies, in [0, 1].

    Args:
        run: its seed or its checkpoint.
        checkpoint: the file.
        top1: of videos.
        clip_top1: of clips.
        videos: how many were tested.
        bad: how many could not be.
    """

    run: str
    checkpoint: Path
    top1: float
    clip_top1: float
    videos: int
    bad: int


def read_variant(text: str) -> Variant:
    """One of --alphas."""
    name = text.strip()
    value, _, kind = name.partition(":")
    if kind not in ("", "pool"):
        raise argparse.ArgumentTypeError(f"behind an alpha only :pool may stand, got {name!r}")
    file = Path(value) if Path(value).suffix in (".yaml", ".yml") else None
    if file is None:
        try:
            alpha = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"an alpha is a number or a FILE.yaml, got {value!r}") from None
        if not 0 <= alpha <= 1:
            raise argparse.ArgumentTypeError(f"alpha must lie in [0, 1], got {value}")
        return Variant(name, alpha, kind or "conv", None)
    try:
        model = yaml.safe_load(file.read_text())["model"]
        return Variant(name, model["alpha"], kind or model.get("downsample", "conv"), file)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{file} has no model.alpha: {error}") from None


def read_variants(text: str) -> list[Variant]:
    """The type of --alphas."""
    return [read_variant(variant) for variant in dict.fromkeys(text.split(","))]


def read_seeds(text: str) -> list[int]:
    """The type of --seeds."""
    seeds = list(dict.fromkeys(text.split(",")))
    if not all(seed.strip().isdecimal() for seed in seeds):
        raise argparse.ArgumentTypeError(f"whole numbers with commas between them are wanted, got {text!r}")
    return [int(seed) for seed in seeds]


def read_arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line: this tool's options, and those for train_net.py and test_net.py."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        *("--cfg", "-c"),
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="YAML file of the recipe; given again, the later one overrides",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the runs and the results")
    add(
        "--alphas",
        type=read_variants,
        default=read_variants("0,0:pool,.125,.25,.5"),
        metavar="LIST",
        help="with commas between them; default: 0,0:pool,.125,.25,.5",
    )
    add("--seeds", type=read_seeds, default=[0, 1, 2], metavar="LIST", help="of training; default: 0,1,2")
    add("--ckpt", type=Path, nargs="+", metavar="FILE", help="test these checkpoints, train nothing")
    add("--statistics_batches", type=int, default=200, metavar="N", help="with --ckpt; default: 200")
    add("--rounds", type=int, default=20, metavar="N", help="how often each network is timed; default: 20")
    arguments, others = parser.parse_known_args(words)
    if others and not others[0].startswith("--"):
        fail(f"unrecognized arguments: {others[0]}")
    own = ("--model.alpha", "--model.downsample", "--seed_everything", "--trainer.default_root_dir", "--ckpt_path")
    for option in others:
        if option.split("=")[0] in own:
            fail(f"{option.split('=')[0]} is what a sweep sets itself: give --alphas, --seeds and --output")
    for option in ("cfg", "ckpt"):
        for file in getattr(arguments, option) or ():
            if not file.is_file():
                fail(f"--{option} {file}: no such file")
    for option in ("rounds", "statistics_batches"):
        if getattr(arguments, option) < 1:
            fail(f"--{option} must be at least 1, got {getattr(arguments, option)}")
    folders = [variant.folder for variant in arguments.alphas]
    if len(set(folders)) < len(folders):
        fail(f"--alphas has two of the same name: {', '.join(folders)}")
    if arguments.ckpt and any(variant.file for variant in arguments.alphas):
        fail("--ckpt tests at numbers: an alpha for each layer wants its own training")
    return arguments, others


def recipe_options(arguments: argparse.Namespace, others: Sequence[str]) -> list[str]:
    """What all calls of train_net.py and test_net.py have."""
    return [word for file in arguments.cfg for word in ("--cfg", str(file))] + list(others)


def keep(path: Path, what: dict[str, Any]) -> None:
    """Notes what a folder is for; ends the program if it was for something else before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    what = json.loads(json.dumps(what, default=str))  # as it is read back
    if not path.is_file():
        with appearing(path) as partial:
            partial.write_text(json.dumps(what, indent=1))
    elif json.loads(path.read_text()) != what:
        fail(f"{path.parent} holds a sweep of another recipe or alpha ({path}): choose another --output")


def check_options(arguments: argparse.Namespace, others: Sequence[str]) -> None:
    """Ends the program for options that train_net.py or test_net.py refuses, before anything starts."""
    tool, more = ("test", ["--ckpt", str(arguments.ckpt[0])]) if arguments.ckpt else ("train", [])
    command = [sys.executable, "-m", "octvideo", tool, *recipe_options(arguments, others), *more, "--print_config"]
    tried = subprocess.run(command, capture_output=True, text=True)
    if reason := why(tool, tried.returncode, tried.stderr):
        fail(reason.removeprefix(f"octvideo {tool}: error: "))


def why(tool: str, status: int, errors: str) -> str:
    """Why a tool failed: how it was killed, or its last line on standard error; empty if it did not."""
    if status < 0:
        return f"{tool} was killed by {signal.Signals(-status).name}"
    lines = [line for line in errors.splitlines() if line.strip()] or [f"{tool} ended with {status}"]
    return lines[-1] if status else ""


def call(tool: str, options: Sequence[str], log: Path) -> str:
    """Runs a tool to its end, with what it prints appended to a log; where this is interrupted, the tool saves first.

    Returns:
        Why it failed; empty if it did not.
    """
    with log.open("a") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, "-m", "octvideo", tool, *options], stdout=printed, stderr=errors)
        try:
            status = process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        finally:
            errors.seek(0)
            said = errors.read()
            printed.write(said)
    return why(tool, status, said)


def run_all(arguments: argparse.Namespace, others: Sequence[str]) -> dict[Variant, dict[str, Tested | str]]:
    """Trains and tests, or tests, what is not there yet.

    Returns:
        For each variant and each seed or checkpoint the result, or why there is none.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = {str(file): file for file in arguments.ckpt or ()} or {f"seed {seed}": seed for seed in arguments.seeds}
    found: dict[Variant, dict[str, Tested | str]] = {variant: {} for variant in arguments.alphas}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(runs) * len(found))
        for run, which in runs.items():
            for variant, results in found.items():
                progress.update(task, description=f"alpha {variant.name}, {run}")
                if not console.is_terminal:
                    console.print(f"alpha {variant.name}, {run}", highlight=False)
                results[run] = (test if arguments.ckpt else train)(variant, which, arguments, others)
                if isinstance(results[run], str):
                    progress.print(f"alpha {variant.name}, {run} failed: {results[run]}", markup=False, style="yellow")
                progress.advance(task)
    return found


def train(variant: Variant, seed: int, arguments: argparse.Namespace, others: Sequence[str]) -> Tested | str:
    """Trains and tests one network, as far as that is not done yet."""
    folder = arguments.output / variant.folder / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    results, checkpoint = folder / "test" / "predictions.json", folder / "checkpoints" / "last.ckpt"
    common = [*recipe_options(arguments, others), *variant.options, "--seed_everything", str(seed)]
    common += ["--trainer.default_root_dir", str(folder)]
    if not results.is_file():
        reason = call("train", [*common, "--ckpt_path", "auto"], folder / "log.txt")
        reason = reason or call("test", [*common, "--ckpt", str(checkpoint)], folder / "log.txt")
        if reason:
            return reason
    found = json.loads(results.read_text())
    if not found["videos"]:
        return "none of the videos to test on can be decoded"
    return Tested(str(seed), checkpoint, found["top1"], found["clip_top1"], len(found["videos"]), len(found["bad"]))


def test(variant: Variant, checkpoint: Path, arguments: argparse.Namespace, others: Sequence[str]) -> Tested | str:
    """Tests one checkpoint at one alpha, if that is not done yet."""
    with checkpoint.open("rb") as file:
        folder = arguments.output / variant.folder / hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "alphas.json"

    def estimated() -> dict[str, Any] | None:
        """The row with statistics of this alpha: the second one, written when its test is over."""
        rows = json.loads(results.read_text()) if results.is_file() else []
        return next((row for row in rows if row["statistics"] == "re-estimated"), None)

    if estimated() is None:
        options = [*recipe_options(arguments, others), "--model.downsample", variant.downsample]
        options += ["--ckpt", str(checkpoint), "--output", str(folder), "--alphas", str(variant.alpha)]
        options += ["--statistics_batches", str(arguments.statistics_batches)]
        if reason := call("test", options, folder / "log.txt"):
            return reason
    found = estimated()
    if found is None:
        return f"there are no training videos to estimate batch-norm statistics on: {folder / 'log.txt'}"
    if not found["videos"]:
        return "none of the videos to test on can be decoded"
    return Tested(str(checkpoint), checkpoint, found["top1"], found["clip_top1"], found["videos"], found["bad"])


def time_networks(variants: dict[Variant, Trained], rounds: int) -> dict[Variant, list[float]]:
    """Seconds of one clip through each network, all in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = []
    for trained in variants.values():
        network, clip = trained.network.to(device), torch.rand(1, *clip_size(trained), device=device)
        calls.append(torch.inference_mode()(lambda network=network, clip=clip: network(clip)))
    return dict(zip(variants, time_interleaved(calls, rounds=rounds, warmup=WARMUP, device=device), strict=True))


def open_network(variant: Variant, checkpoint: Path) -> Trained:
    """The network of a variant, from a checkpoint of it or of another alpha."""
    trained = load_trained(checkpoint)
    options = trained.options | {"alpha": variant.alpha, "downsample": variant.downsample}
    network = create_model(**options, channels_last=True)
    network.load_state_dict(trained.network.state_dict())
    return Trained(network.eval(), options, trained.labels, trained.preprocessing)


def rows_of(found: dict[Variant, dict[str, Tested | str]], rounds: int) -> Iterator[dict[str, Any]]:
    """What sweep.json holds, of variants with a result."""
    tested = {variant: [run for run in runs.values() if isinstance(run, Tested)] for variant, runs in found.items()}
    tested = {variant: runs for variant, runs in tested.items() if runs}
    networks = {variant: open_network(variant, runs[0].checkpoint) for variant, runs in tested.items()}
    seconds = time_networks(networks, rounds)
    macs = {variant: count_macs(trained.network.cpu(), clip_size(trained)) for variant, trained in networks.items()}
    first = next(iter(tested), None)
    for variant, runs in tested.items():
        assert first is not None
        row: dict[str, Any] = {
            "alpha": variant.name.removesuffix(":pool"),
            "downsample": variant.downsample,
            "gmacs": macs[variant] / 1e9,
            "mac_ratio": macs[variant] / macs[first],
            "milliseconds": 1000 * statistics.median(seconds[variant]),
            # Of the rounds, which share what the machine did meanwhile.
            "time_ratio": statistics.median(a / b for a, b in zip(seconds[variant], seconds[first], strict=True)),
        }
        for key in ("top1", "clip_top1"):
            values = [getattr(run, key) for run in runs]
            row[key] = statistics.fmean(values)
            row[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        kept = [asdict(run) | {"checkpoint": str(run.checkpoint)} for run in runs]
        yield row | {"seeds": len(runs), "runs": kept}


COLUMNS = ("alpha", "GMACs", "ratio", "ms", "ratio", "video top-1", "clip top-1", "seeds")


def name_of(row: dict[str, Any]) -> str:
    """What a row is called in table and picture."""
    name = row["alpha"] if is_number(row["alpha"]) else Path(row["alpha"]).stem
    return f"{name}, pooled" if row["downsample"] == "pool" else name


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    shares = []
    for key in ("top1", "clip_top1"):
        spread = row[f"{key}_deviation"]
        shares.append(f"{100 * row[key]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}") + " %")
    cost = [f"{row['gmacs']:.3f}", f"{row['mac_ratio']:.2f}", f"{row['milliseconds']:.1f}", f"{row['time_ratio']:.2f}"]
    return [name_of(row), *cost, *shares, str(row["seeds"])]


def write_results(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Prints the table, and writes it with the picture."""
    table = Table(*(Column(name, no_wrap=True) for name in COLUMNS), box=box.SIMPLE)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        table.add_row(*cells(row))
        lines.append(f"| {' | '.join(cells(row))} |")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    with appearing(output / "sweep.json") as partial:
        partial.write_text(json.dumps(rows, indent=1))
    with appearing(output / "sweep.md") as partial:
        partial.write_text("\n".join(lines) + "\n")
    try:
        with appearing(output / "sweep.png") as partial:
            plot(rows, partial)
    except ModuleNotFoundError:
        (output / "sweep.png").unlink(missing_ok=True)  # it is of earlier results
        print("no picture: pip install 'octvideo[plot]'", file=sys.stderr)
    print(f"results: {', '.join(str(path) for path in sorted(output.glob('sweep.*')))}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over multiply-adds and over time; bars are the seeds' standard deviation, dots the seeds."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    octave = [row for row in rows if is_number(row["alpha"]) and float(row["alpha"]) > 0]
    line = sorted(octave, key=lambda row: float(row["alpha"]))
    for panel, key, label in zip(
        panels, ("gmacs", "milliseconds"), ("GMACs of a clip", "ms of a clip, batch 1"), strict=True
    ):
        panel.plot([row[key] for row in line], [100 * row["top1"] for row in line], "-", color="grey", alpha=0.5)
        for number, row in enumerate(rows):
            marker = "*" if not is_number(row["alpha"]) else "o" if float(row["alpha"]) else "s"
            style = {"color": f"C{number % 10}", "alpha": 0.9}
            spread, tops = 100 * (row["top1_deviation"] or 0), [100 * run["top1"] for run in row["runs"]]
            panel.errorbar(
                *(row[key], 100 * row["top1"], spread), fmt=marker, capsize=3, markersize=9, label=name_of(row), **style
            )
            panel.plot([row[key]] * len(tops), tops, ".", markersize=4, **style)
        panel.set_xlabel(label)
        panel.margins(x=0.1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("video top-1 (%)")
    panels[1].legend(title="alpha", loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def is_number(text: str) -> bool:
    """Whether an alpha is one for all layers."""
    return not text.endswith((".yaml", ".yml"))


def main(words: list[str]) -> int:
    """Sweeps."""
    arguments, others = read_arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_options(arguments, others)
        recipe = {"cfg": [yaml.safe_load(file.read_text()) for file in arguments.cfg], "options": others}
        tests = {"statistics_batches": arguments.statistics_batches} if arguments.ckpt else {}
        keep(arguments.output / "recipe.json", recipe | tests)
        for variant in arguments.alphas:
            keep(arguments.output / variant.folder / "alpha.json", variant.described)
        found = run_all(arguments, others)
        with one_line_errors():
            rows = list(rows_of(found, arguments.rounds))
    except OSError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if rows:
        write_results(rows, arguments.output)
    failed = [
        (variant, run, reason)
        for variant, runs in found.items()
        for run, reason in runs.items()
        if isinstance(reason, str)
    ]
    for variant, run, reason in failed:
        print(f"alpha {variant.name}, {run} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0
