"""Writes the tables of docs/ from the results that are kept in experiments/results/.

python experiments/tables.py [--check]

A line `<!-- results: NAME -->` stands above each of these tables; the lines of the table below it are written anew.
With --check nothing is written, and the exit status is 1 if a table is not what the results say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import domains
import elastic
import evidence
import fights
import numpy as np
from intervals import shown
from own_networks import HERE
from rich.table import Table

from octvideo.commands.options import Parser
from octvideo.files import appearing

DOCS = HERE.parent / "docs"
MARK = re.compile(r"^(?P<mark><!-- results: (?P<name>.+) -->\n\n)(?:\|.*\n)*", re.MULTILINE)
Cells = Sequence[Sequence[str]]  # the first row is the head


def kept(name: str) -> Any:
    """The results of an experiment."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def cells_of(table: Table) -> Cells:
    """What a table shows."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return list(zip(*columns, strict=True))


def share(alpha: float) -> str:
    """An alpha as the docs write it."""
    return f"{alpha:g}".removeprefix("0") or "0"


def several_octaves() -> Iterator[Sequence[str]]:
    """Two octaves beside one."""
    yield (
        "I3D R50, 8 x 224 x 224, batch 1, fp32, 2 CPU cores",
        "ms",
        "time",
        "multiply-adds",
        "time / MAC",
        "bytes",
        "kernels",
    )
    for row in kept("several_octaves"):
        alphas = row["alpha"] if isinstance(row["alpha"], list) else [row["alpha"]]
        ratios = [row["time_ratio"], row["mac_ratio"], row["time_ratio"] / row["mac_ratio"]]
        ratios += [row["byte_ratio"], row["kernel_ratio"]]
        yield " + ".join(map(share, alphas)), f"{1000 * row['seconds']:.0f}", *(f"{ratio:.2f}" for ratio in ratios)


def small_networks() -> Iterator[Sequence[str]]:
    """Networks of torchvision, on one thread and on two."""
    yield "", "multiply-adds .25 / .5", "time, 1 thread", "time, 2 threads"
    names = {"r3d_18": "R3D-18", "resnet50": "ResNet-50", "efficientnet_b0": "EfficientNet-B0"}
    names["mobilenet_v2"] = "MobileNet-v2"
    one, two = kept("small_networks_one_thread"), kept("small_networks")
    for network, name in names.items():
        pairs = [
            " / ".join(f"{row[key]:.2f}" for row in rows if row["network"] == network and row["alpha"])
            for rows, key in ((two, "mac_ratio"), (one, "ratio"), (two, "ratio"))
        ]
        yield name, *pairs


def learned_alpha() -> Iterator[Sequence[str]]:
    """Ways to choose an alpha for each layer."""
    yield "way", "top-1, %", "from uniform, paired", "distance before training", "time to choose, s"
    rows = kept("learned_alpha")
    uniform = {row["seed"]: row["top1"] for row in rows if row["way"] == "uniform"}
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        spans = [[row[key] for row in own] for key in ("distance", "seconds")]
        cells = [shown([row["top1"] for row in own])]
        cells += ["" if way == "uniform" else shown([row["top1"] - uniform[row["seed"]] for row in own], "+")]
        yield way, *cells, f"{min(spans[0]):.3f} to {max(spans[0]):.3f}", f"{min(spans[1]):.0f} to {max(spans[1]):.0f}"


def probes() -> Iterator[Sequence[str]]:
    """What tells the classes of the hard motions, linearly."""
    yield "features", "class, % (chance 4.2)", "group, % (chance 25)"
    names = {
        "codec": "bytes of the file and of each packet",
        "color": "mean and deviation of colours, over all frames and over time",
        "frame": "a single frame, 20 x 20",
        "motion": "differences of frames",
    }
    rows = {(row["features"], row["of"]): row for row in kept("hard_motions_probes")}
    for features, name in names.items():
        found = (rows[features, of] for of in ("class", "group"))
        yield name, *(f"{100 * row['right']:.1f} ± {100 * row['half']:.1f}" for row in found)


def shrunk() -> Iterator[Sequence[str]]:
    """The quick start's network, shrunk."""
    yield (
        "strides",
        "vanilla",
        "octave, untrained",
        "difference",
        "after one epoch",
        "difference",
        "same class as vanilla",
    )
    for strides, downsample in (("pooled", "pool"), ("strided", "conv")):
        rows = [row for row in kept("shrink")["quickstart"] if row["downsample"] == downsample]
        top1 = np.array([row["top1"] for row in rows])
        lists = [", ".join(f"{100 * x:.1f}" for x in column) for column in top1.T]
        less = [shown(top1[:, i] - top1[:, 0]) for i in (1, 2)]
        same = ", ".join(f"{100 * row['agreement'][2]:.1f}" for row in rows)
        yield strides, lists[0], lists[1], less[0], lists[2], less[1], same


def statistics() -> Iterator[Sequence[str]]:
    """Batch-norm statistics of EfficientNet-Lite0."""
    yield "alpha", "strides", "as they are", "estimated anew", "matched"
    rows = [row for row in kept("shrink")["statistics"] if row["alpha"]]
    for row in sorted(rows, key=lambda row: row["strided"], reverse=True):
        found = (row[kind] for kind in ("kept", "re-estimated", "matched"))
        cells = (f"{100 * one['agreement']:.1f} % ({one['distance']:.2f})" for one in found)
        yield f"{row['alpha']:g}", {"pool": "pooled", "keep": "kept"}[row["strided"]], *cells


def nodes() -> Iterator[Sequence[str]]:
    """Processes and nodes that were killed."""
    yield "killed", "torchruns restarted", "seconds", "steps repeated", "weights"
    restarted = {(1, 1): "none", (1, 2): "node 1's", (2, 2): "both", (2, 1): "node 0's"}
    for name, row in kept("nodes").items():
        name = f"{name}, torchrun and processes" if name == "node 1" else name.replace(" alone", ", not its processes")
        seconds, repeated = row["seconds until training went on"], row["steps repeated"]
        times = ["" if seconds is None else f"{seconds:.0f}", str(repeated or "none")]
        yield name, restarted[tuple(row["torchruns started"])], *times, "equal" if row["equal weights"] else "differ"


def preparing() -> Iterator[Sequence[str]]:
    """A cluster whose workers die."""
    yield "", "seconds", "ok, bad, failed", "pipe given up after"
    found = kept("preparing")
    names = {"one_process": "one process"}
    names["cluster"] = (
        f"{found['workers']} workers, {found['cluster']['killed']} of them killed with SIGKILL after that"
    )
    for key, name in names.items():
        row = found[key]
        counts = ", ".join(str(row[kind]) for kind in ("ok", "bad", "failed"))
        yield name, f"{row['seconds']:.1f}", counts, ", ".join(f"{seconds:.1f} s" for seconds in row["hung_seconds"])


def streams() -> Iterator[Sequence[str]]:
    """Ten minutes of a stream, whose server is gone for a while."""
    parts = {"first_minute": "first minute", "before_outage": "before the outage", "after_outage": "after it"}
    parts |= {"last_minute": "last minute", "whole": "all"}
    yield "", *parts.values()
    found = [kept("streams")[part] for part in parts]
    yield "steps", *(str(part["steps"]) for part in found)
    for key, name in (("lag", "lag"), ("latency", "latency as stated")):
        for which, said in (("median", "median"), ("p95", "95 % within"), ("max", "longest")):
            yield f"{name}, {said} (ms)", *(f"{part[f'{key}_{which}_ms']:.0f}" for part in found)
    yield "memory at the end (MB)", *(f"{part['memory_last_mb']:.0f}" for part in found)
    yield "right, of clips within one movement", *(f"{part['right']} of {part['within_a_movement']}" for part in found)


def budget() -> Iterator[Sequence[str]]:
    """A budget under load."""
    parts, found = ("before", "under load", "after"), kept("budget")
    yield "I3D, 8 x 224 x 224", *parts
    counts = [" / ".join(str(found[p]["alphas"].get(a, 0)) for a in ("0", "0.25", "0.5", "0.75")) for p in parts]
    yield "steps at alpha 0 / .25 / .5 / .75", *counts
    yield "median, ms", *(f"{found[part]['median_ms']:.0f}" for part in parts)
    yield f"within {found['budget_ms']:.0f} ms", *(f"{100 * found[part]['within_budget']:.0f} %" for part in parts)


def parts_of_files() -> Iterator[Sequence[str]]:
    """How much of a file is read from a store."""
    rows = kept("stores")["parts"]["rows"]
    yield "delay of a request", "whole", "parts of 64 kB", "256 kB", "1 MB", "from the cache"
    for delay in dict.fromkeys(row["delay"] for row in rows):
        yield f"{1000 * delay:.0f} ms", *(f"{row['milliseconds']:.0f}" for row in rows if row["delay"] == delay)


def stores() -> Iterator[Sequence[str]]:
    """The speed of stores."""
    yield "from", "clips a second", "of local files", "of local files, a second of processor time", "requests a clip"
    for row in kept("stores")["speed"]["rows"]:
        ratios = (f"{row[key]:.2f}" for key in ("of local files", "of local files, a core"))
        yield row["from"], f"{row['clips a second']:.0f}", *ratios, f"{row['requests a clip']:g}"


def elastic_table(setup: str) -> Cells:
    """Elastic networks beside those trained alone."""
    return cells_of(elastic.table(kept("elastic"), setup))


TABLES: dict[str, Callable[[], Any]] = {
    "several octaves": several_octaves,
    "small networks": small_networks,
    "learned alpha": learned_alpha,
    "probes": probes,
    "evidence, hard": lambda: cells_of(evidence.table(kept("evidence_hard"))),
    "evidence, few": lambda: cells_of(evidence.table(kept("evidence_few"))),
    "test sizes": lambda: cells_of(evidence.table_of_sizes(kept("evidence_few"))),
    "fights": lambda: cells_of(fights.table(kept("fights"))),
    "domains": lambda: cells_of(domains.table(kept("domains"))),
    **{f"elastic, {name}": partial(elastic_table, name) for name in elastic.SETUPS},
    "shrunk quick start": shrunk,
    "statistics": statistics,
    "nodes": nodes,
    "preparing": preparing,
    "streams": streams,
    "budget": budget,
    "parts of files": parts_of_files,
    "stores": stores,
}


def markdown(cells: Cells) -> str:
    """A table."""
    head, *rows = [[f" {cell.strip()} " if cell.strip() else " " for cell in row] for row in cells]
    return "".join(f"|{'|'.join(line)}|\n" for line in [head, ["---"] * len(head), *rows])


def written(page: str) -> str:
    """A page with its tables as the results have them."""
    return MARK.sub(lambda found: found["mark"] + markdown(list(TABLES[found["name"]]())), page)


def main(arguments: Sequence[str]) -> int:
    """Writes, or compares."""
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page would change")
    options, stale = parser.parse_args(arguments), []
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text()
        if (new := written(page)) != page:
            stale.append(path.name)
            if not options.check:
                with appearing(path) as half:
                    half.write_text(new)
    if stale:
        print(f"{'to write' if options.check else 'written'}: {', '.join(stale)}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
