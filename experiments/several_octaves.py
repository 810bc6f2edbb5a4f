"""Measures networks of one and of two octaves, interleaved: time, multiply-adds, bytes and kernels beside alpha 0.

python experiments/several_octaves.py [--models i3d_r50] [--alphas .25,.125+.125,.5,.25+.25] [--size TxHxW] [--batch N]
                                      [--mode inference|train] [--width N] [--rounds N] [--json FILE]

An alpha such as .25+.125 is the shares at half and at a quarter of the resolution, in res2 to res4. Times are medians;
a ratio is the median over the rounds of the ratio to octvideo's alpha 0 within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from choices import one_of
from forms import CLIP, settle, size_name
from timing import time_blocks
from torch import nn

from octvideo import MODELS, create_model
from octvideo.commands.options import Parser, clip_size, number, several
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.layers.shares import Shares, say_shares, shares_of
from octvideo.models.cost import count_cost, hardware, total

ALPHAS: tuple[Shares, ...] = (0.25, (0.125, 0.125), 0.5, (0.25, 0.25), (0.25, 0.125, 0.125))


def shares(text: str) -> Shares:
    """The type of an option for an alpha: .25, or .25+.125."""
    try:
        return shares_of([float(share) for share in text.split("+")])
    except (UserError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"alpha must be a share or several joined by +, got {text!r}") from error


def step_of(network: nn.Module, clip: torch.Tensor, train: bool) -> Callable[[], None]:
    """A forward pass, or a training step without an optimiser."""

    def call() -> None:
        with torch.set_grad_enabled(train):
            logits = network(clip)
        if train:
            logits.logsumexp(1).sum().backward()
            network.zero_grad(set_to_none=True)

    return call


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for alpha 0 and for each of the alphas."""
    alphas = list(dict.fromkeys((0, *options.alphas)))
    train, clip = options.mode == "train", torch.randn(options.batch, 3, *options.size)
    networks = []
    for alpha in alphas:
        torch.manual_seed(0)
        network = create_model(model, alpha=(alpha, alpha, alpha, 0), width=options.width, channels_last=True)
        networks.append(settle(network).train(train))
    steps = [step_of(network, clip, train) for network in networks]
    for step in steps:
        step()
    block, dropped = (4, 2) if train else (1, 0)
    seconds = time_blocks(steps, "cpu", rounds=options.rounds, steps=block, dropped=dropped)
    costs = [total(count_cost(x, (3, *options.size), batch=options.batch, train=train)) for x in networks]
    rows = []
    for alpha, taken, cost in zip(alphas, seconds, costs, strict=True):
        ratio = statistics.median(one / other for one, other in zip(taken, seconds[0], strict=True))
        rows.append(
            {
                **{"model": model, "alpha": alpha, "mode": options.mode, "batch": options.batch},
                **{"size": size_name(options.size), "seconds": statistics.median(taken), "time_ratio": ratio},
                **{"mac_ratio": cost.macs / costs[0].macs, "byte_ratio": cost.bytes_moved / costs[0].bytes_moved},
                **{"kernel_ratio": cost.kernels / costs[0].kernels, "rounds": options.rounds},
                **{"hardware": hardware("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__},
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment: prints a Markdown table, and writes the rows if a file is given."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", type=several(one_of(MODELS, "model")), default=("i3d_r50",), metavar="A,B")
    add("--alphas", type=several(shares), default=ALPHAS, metavar=".25,.25+.125", help="0 is always measured")
    add("--size", type=clip_size, default=CLIP, metavar="TxHxW", help="frames, height and width")
    add("--batch", type=number, default=1, metavar="N", help="clips at once")
    add("--mode", choices=("inference", "train"), default="inference")
    add("--width", type=number, metavar="N", help="channels of the stem; default: as published")
    add("--rounds", type=number, default=9, metavar="N", help="measurements of each network")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    rows = [row for model in options.models for row in measure(model, options)]
    print("| model | alpha | ms | time ratio | MAC ratio | time / MAC | byte ratio | kernel ratio |\n|" + "---|" * 8)
    for row in rows:
        ratios = [row["time_ratio"], row["mac_ratio"], row["time_ratio"] / row["mac_ratio"], row["byte_ratio"]]
        cells = [row["model"], say_shares(row["alpha"]), f"{1000 * row['seconds']:.0f}"]
        print("|", " | ".join([*cells, *(f"{ratio:.3f}" for ratio in (*ratios, row["kernel_ratio"]))]), "|")
    if options.json:
        with appearing(options.json) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
