"""Lists the runs below a folder: what was trained, how far, on what, and how accurate it is.

octvideo runs [FOLDER ...] [--sort COLUMN] [--json FILE]

A run is a folder with config.yaml of `octvideo train`. Columns:

run        its folder, below FOLDER
network    model.name, or the class of model.network
alpha      model.alpha, with "pool" for model.downsample pool
epochs     finished ones of trainer.max_epochs, and "failed" where an error ended it
val        best top-1 (or mAP) of a validation, in percent
test       top-1 (or mAP) of predictions.json of `octvideo test` in the run's folder, in percent
started    when, first; and how often it was resumed
commit     of the git repository that it was started in, with + where files differed
data       start of the digest of the training list: runs with the same one saw the same videos

--sort takes a column, and puts the largest last. --json writes all of it, with the whole run.json of each run.
Exit status: 0; 2 for a mistake in the command, or where there is no run.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from octvideo.commands.options import Parser, fail, one_line_errors
from octvideo.evaluation.report import read_curves, say_alpha
from octvideo.files import appearing
from octvideo.training import record

COLUMNS = ("run", "network", "alpha", "epochs", "val", "test", "started", "commit", "data")
Row = dict[str, Any]


def find(folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """The name and the folder of each run, in alphabetical order."""
    for folder in folders:
        for config in sorted(folder.rglob("config.yaml")):
            run = config.parent
            yield (str(run.relative_to(folder)) if run != folder else run.name), run


def read(name: str, run: Path) -> Row:
    """A row of the table, None where the folder does not say; with "starts", its run.json."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    model, starts, curves = config["model"], record.read(run), read_curves(run)
    own = (model.get("network") or {}).get("class_path")
    val = next((curves[key] for key in ("val/top1", "val/map") if key in curves), None)
    ended = val if val is not None else curves.get("train/top1", curves.get("train/loss_epoch"))
    first: Row = starts[0] if starts else {}
    git, data = first.get("git") or {}, first.get("data") or {}
    return {
        "run": name,
        "network": own or model["name"],
        "alpha": model["alpha"],
        "pooled": model.get("downsample") == "pool",
        "epochs": len(ended.values) if ended is not None else None,
        "max_epochs": config["trainer"]["max_epochs"],
        "val": None if val is None else float(val.values.max()),
        "test": tested(run),
        "started": first.get("started"),
        "resumed": max(0, len(starts) - 1),
        "commit": git.get("commit"),
        "changed": bool(git.get("changed")),
        "data": data.get("train_list", {}).get("sha256"),
        "failed": bool(starts) and "error" in starts[-1],
        "starts": starts,
    }


def tested(run: Path) -> float | None:
    """The accuracy in predictions.json of a run's folder, or of test in it."""
    for path in (run / "test" / "predictions.json", run / "predictions.json"):
        if path.is_file():
            found = json.loads(path.read_text())
            value = found.get("top1", found.get("map"))
            return None if value is None else float(value)
    return None


def cells(row: Row) -> list[str]:
    """A row as it is printed."""
    alpha = say_alpha(row["alpha"]) + (", pool" if row["pooled"] else "")
    epochs = "" if row["epochs"] is None else f"{row['epochs']} of {row['max_epochs']}"
    epochs = ", ".join(filter(None, (epochs, "failed" if row["failed"] else "")))
    val, test = ("" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("val", "test"))
    started = (row["started"] or "")[:16].replace("T", " ") + (f", resumed {row['resumed']}" if row["resumed"] else "")
    commit = (row["commit"] or "")[:8] + ("+" if row["changed"] else "")
    return [row["run"], row["network"], alpha, epochs, val, test, started, commit, (row["data"] or "")[:8]]


def main(words: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folders", metavar="FOLDER", nargs="*", type=Path, default=[Path("runs")], help="default: runs")
    add("--sort", choices=COLUMNS, metavar="COLUMN", default="run", help="default: run")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(words)
    rows = []
    with one_line_errors():
        for folder in arguments.folders:
            if not folder.is_dir():
                fail(f"{folder}: no such folder; name the FOLDER of your runs")
        for name, run in find(arguments.folders):
            try:
                rows.append(read(name, run))
            except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
                print(f"{run} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        if not rows:
            fail(f"no run in {', '.join(map(str, arguments.folders))}: none has a config.yaml of octvideo train")
        rows.sort(key=lambda row: (row[arguments.sort] is not None, _comparable(row[arguments.sort])))
        if arguments.json:
            with appearing(arguments.json) as partial:
                partial.write_text(json.dumps(rows, indent=1))
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _comparable(value: Any) -> Any:
    """Numbers by size, anything else as text."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, json.dumps(value))
