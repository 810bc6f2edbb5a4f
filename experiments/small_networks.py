"""Times octave forms of torchvision's networks against their fastest vanilla form, in inference on this CPU.

python experiments/small_networks.py [--networks resnet50,r3d_18] [--alphas .25,.5] [--rounds 7] [--json FILE]

All forms of a network run in turn, in blocks of calls on the same input, at batch 1: vanilla as it comes and in
channels_last, octave in both. A row has the seconds (median over the rounds) of the fastest vanilla form and of the
fastest octave form of each alpha, and the ratios of time and of multiply-adds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from choices import one_of
from rich.console import Console
from timing import time_blocks
from torch import nn

from octvideo import octavize
from octvideo.commands.options import Parser, number, several, share
from octvideo.files import appearing
from octvideo.models.cost import count_macs

SIZES = {
    "mobilenet_v2": (3, 224, 224),
    "efficientnet_b0": (3, 224, 224),
    "resnet50": (3, 224, 224),
    "r3d_18": (3, 16, 112, 112),
}
RESULTS = Path(__file__).parent / "results" / "small_networks.json"


def build(name: str, alpha: float, channels_last: bool) -> nn.Module:
    """A network in evaluation mode; octave above alpha 0."""
    network: nn.Module = torchvision.models.get_model(name).eval()
    if alpha:
        return octavize(network, alpha, channels_last=channels_last)
    formats: Any = {3: torch.channels_last, 4: torch.channels_last_3d}
    return network.to(memory_format=formats[len(SIZES[name])]) if channels_last else network


def measure(name: str, alphas: Sequence[float], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for alpha 0 and for each other alpha: its fastest form beside the fastest vanilla one."""
    clip = torch.randn(1, *SIZES[name])
    forms = [(alpha, last) for alpha in (0.0, *alphas) for last in (False, True)]
    networks = [build(name, *form) for form in forms]
    with torch.inference_mode():
        calls = [partial(network, clip) for network in networks]
        taken = time_blocks(calls, "cpu", rounds=rounds, steps=4)
    seconds = dict(zip(forms, map(statistics.median, taken), strict=True))
    macs = {alpha: count_macs(build(name, alpha, False), SIZES[name]) for alpha, _ in forms}
    vanilla = min(seconds[0.0, last] for last in (False, True))
    for alpha in (0.0, *alphas):
        fastest = min(seconds[alpha, last] for last in (False, True))
        row = {"network": name, "alpha": alpha, "seconds": fastest, "ratio": fastest / vanilla}
        yield row | {"mac_ratio": macs[alpha] / macs[0.0], "threads": torch.get_num_threads()}


def main(arguments: Sequence[str]) -> None:
    """Measures the chosen networks, and writes the rows after each."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--networks", type=several(one_of(SIZES, "network")), default=tuple(SIZES), metavar="A,B")
    add("--alphas", type=several(share), default=(0.25, 0.5), metavar="A,B")
    add("--rounds", type=number, default=7, metavar="N")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="default: experiments/results/small_networks.json")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in options.networks:
        for row in measure(name, [alpha for alpha in options.alphas if alpha], options.rounds):
            rows.append(row)
            Console().print(row)
        with appearing(options.json) as partial_file:
            partial_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
