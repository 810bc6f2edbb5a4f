"""Where the time of a network's inference goes on this CPU, operation by operation, vanilla and octave.

python experiments/operations.py [--model i3d_r50] [--alphas 0,.125,.25,.5] [--batch N] [--dtype fp32|bf16] [--rounds N]

Each operation of a forward pass is timed by itself, the networks in turn; its time is its minimum over the rounds.
"time / MAC" of a column is its time relative to alpha 0, over the multiply-adds relative to alpha 0: of the
convolutions alone it is the least that a network could reach on this machine if all else cost as much per number of
its maps as in the vanilla network.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from choices import one_of
from forms import CLIP, CLIPS, DTYPES, octvideo_form
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from octvideo import MODELS
from octvideo.commands.options import Parser, number, several, share
from octvideo.models.cost import count_macs, hardware

KINDS = {"conv": "convolutions", "batch_norm": "batch norm", "relu": "activation", "add": "sums", "pool": "pools"}


class Times(TorchDispatchMode):
    """Times each operation below it."""

    only_counts = True  # layers run as they do without it

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, float]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        output = function(*args, **(kwargs or {}))
        self.found.append((str(function), time.perf_counter() - begin))
        return output


def measure(networks: dict[float, torch.nn.Module], clips: torch.Tensor, rounds: int) -> dict[float, Any]:
    """A Counter of the seconds of each kind of operation, by alpha."""
    least: dict[float, list[float]] = {}
    names: dict[float, list[str]] = {}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for alpha, network in networks.items():
                with Times() as times:
                    network(clips)
                names[alpha], seconds = map(list, zip(*times.found, strict=True))
                least[alpha] = list(map(min, seconds, least.get(alpha, seconds)))
    found: dict[float, Any] = {alpha: Counter() for alpha in networks}
    for alpha, operations in names.items():
        for name, least_seconds in zip(operations, least[alpha], strict=True):
            kind = next((kind for part, kind in KINDS.items() if part in name), "other")
            found[alpha][kind] += least_seconds
    return found


def main(arguments: Sequence[str]) -> None:
    """Prints a table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=one_of(MODELS, "model"), default="i3d_r50")
    add("--alphas", type=several(share), default=(0.0, 0.125, 0.25, 0.5), metavar="0,.25", help="0 is always measured")
    add("--batch", type=number, default=1, metavar="N")
    add("--dtype", choices=tuple(DTYPES), default="fp32")
    add("--rounds", type=number, default=8, metavar="N")
    options: argparse.Namespace = parser.parse_args(arguments)
    size, dtype = CLIPS.get(options.model, CLIP), DTYPES[options.dtype]
    networks = {
        alpha: octvideo_form(options.model, alpha, None, size).eval().to(dtype)
        for alpha in dict.fromkeys((0.0, *options.alphas))
    }
    macs = {alpha: count_macs(network, (3, *size)) for alpha, network in networks.items()}
    found = measure(networks, torch.randn(options.batch, 3, *size, dtype=dtype), options.rounds)
    kinds = [*KINDS.values(), "other"]
    table = Table(title=f"{options.model}, batch {options.batch}, {options.dtype}: ms ({hardware('cpu')})")
    for heading in ("alpha", "MAC ratio", *kinds, "sum", "convolutions / MAC", "sum / MAC"):
        table.add_column(heading, justify="right")
    for alpha, seconds in found.items():
        share_of_macs, sums = macs[alpha] / macs[0.0], (seconds.total(), found[0.0].total())
        ratios = (seconds["convolutions"] / found[0.0]["convolutions"], sums[0] / sums[1])
        cells = [f"{1e3 * seconds[kind]:.1f}" for kind in kinds] + [f"{1e3 * sums[0]:.1f}"]
        table.add_row(f"{alpha:g}", f"{share_of_macs:.3f}", *cells, *(f"{x / share_of_macs:.2f}" for x in ratios))
    Console(width=150).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
