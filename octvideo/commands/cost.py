"""Shows what a network costs at several alphas: multiply-adds, bytes, kernels, and predicted or measured time.

octvideo cost --model i3d_r50 [--alpha 0,.25,.5] [--size 8x224x224] [--batch 8] [--dtype bf16] [--train]
              [--machine h100] [--fused] [--measure] [--compiled] [--layers] [--json FILE]
octvideo cost --ckpt runs/oct_i3d/checkpoints/best.ckpt
octvideo cost --model i3d_r50 --auto [--budget .8] > alpha.yaml

Everything is that of one forward pass of a batch or, with --train, of forward and backward without an optimiser, in
eager mode: kernels are operations that are no views, bytes those of their inputs and outputs. Ratios are to the first
alpha. A kernel is predicted to take the longer of its arithmetic and its memory traffic on the machine, and a launch:
h100, a100, t4, laptop-cpu, "here" (which first measures this machine's matrix products, copies and launches), or your
own as FLOPS,BANDWIDTH,LAUNCH in FLOP/s, bytes/s and seconds. Networks run in the channels_last memory format.

--measure times the networks on this machine, interleaved: medians, and of the ratios within a round. --compiled counts
the kernels that torch.compile generates for this CPU, libraries' convolutions not among them; a minute for each alpha.

--auto prints a configuration for octvideo train (--cfg RECIPE --cfg alpha.yaml) with the alphas that are predicted to
be the fastest or, with --budget, the smallest that take at most this share of the time at alpha 0.

FILE has {"model", "size", "batch", "dtype", "mode", "machine", "rows": [{"alpha", "macs", "parameters", "bytes",
"kernels", "predicted_seconds", "predicted_ratio", "measured_seconds", "measured_ratio", "compiled_kernels", and
"layers": {name: {"macs", "bytes", "kernels", "predicted_seconds"}}}]}; what was not asked for is null.

Exit status: 0, or 2 for a mistake in the command.
"""

import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from octvideo.commands.options import (
    Parser,
    checkpoint,
    clip_size,
    fail,
    number,
    one_line_errors,
    positive,
    several,
    share,
)
from octvideo.files import appearing
from octvideo.layers import use_fused_passes
from octvideo.models.checkpoint import load_trained
from octvideo.models.choose_alpha import choose_alpha
from octvideo.models.cost import (
    Cost,
    copy_with,
    count_compiled_kernels,
    count_cost,
    count_parameters,
    laid,
    run,
    time_interleaved,
    total,
)
from octvideo.models.roofline import DTYPES, MACHINES, Machine, machine_of
from octvideo.models.zoo import MODELS, create_model, set_alpha


def parse(words: list[str]) -> argparse.Namespace:
    """The options."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, metavar="NAME", help=f"one of {', '.join(MODELS)}")
    add("--ckpt", type=checkpoint, metavar="FILE", help="checkpoint of octvideo train, in place of --model")
    add("--alpha", type=several(share), metavar="A,B", help="of res2 to res4; default: 0,.25,.5")
    add("--size", type=clip_size, metavar="TxHxW", help="default: 8x224x224, or the checkpoint's clips")
    add("--batch", type=number, default=8, metavar="N", help="clips; default: %(default)s")
    add("--dtype", choices=DTYPES, default="bf16", help="of weights and clips, with --train of autocast; default: bf16")
    add("--train", action="store_true", help="a training step in place of inference")
    add("--machine", default="h100", help=f"{', '.join(MACHINES)}, here, or FLOPS,BANDWIDTH,LAUNCH; default: h100")
    add("--fused", action="store_true", help="octave layers with octvideo.layers.use_fused_passes('on')")
    add("--measure", action="store_true", help="time the networks on this machine too")
    add("--rounds", type=number, default=10, metavar="N", help="of --measure; default: %(default)s")
    add("--compiled", action="store_true", help="count the kernels of the compiled networks too")
    add("--layers", action="store_true", help="list every layer")
    add("--auto", action="store_true", help="choose the alphas of the stages by predicted time, and print YAML")
    add("--budget", type=positive, metavar="SHARE", help="of --auto: predicted time, relative to alpha 0")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(words)
    if (options.model is None) == (options.ckpt is None):
        fail("give --model NAME or --ckpt FILE")
    if options.budget and not options.auto:
        fail("--budget needs --auto")
    for name in ("alpha", "measure", "compiled", "layers", "json"):
        if options.auto and getattr(options, name):
            fail(f"--auto prints a configuration only: leave --{name} out")
    return options


def measure(networks: list[nn.Module], size: tuple[int, ...], options: argparse.Namespace) -> list[list[float]]:
    """Seconds of each network in each round, on the GPU if there is one."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[options.dtype]
    lay = partial(laid, dtype=torch.float32 if options.train else dtype)
    clip = lay(torch.rand(options.batch, *size, device=device))
    networks = [copy_with(network.to(device), lay).train(options.train) for network in networks]
    calls = [partial(run, network, clip, dtype, options.train) for network in networks]

    def forget() -> None:
        for network in networks:
            network.zero_grad()

    return time_interleaved(calls, rounds=options.rounds, warmup=2, device=device, after_each=forget)


def figures(cost: Cost, machine: Machine, dtype: torch.dtype) -> dict[str, Any]:
    """The entries of a network or a layer in the file."""
    counted = {"macs": cost.macs, "bytes": cost.bytes_moved, "kernels": cost.kernels}
    return counted | {"predicted_seconds": machine.seconds(cost, dtype)}


def rows_of(
    networks: dict[float, nn.Module], size: tuple[int, ...], machine: Machine, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row of the table and the file for each alpha."""
    how: dict[str, Any] = {"batch": options.batch, "dtype": DTYPES[options.dtype], "train": options.train}
    rows = []
    for alpha, network in networks.items():
        costs = count_cost(network, size, **how)
        row = {"alpha": alpha, "parameters": count_parameters(network)} | figures(total(costs), machine, how["dtype"])
        layers = {name: figures(cost, machine, how["dtype"]) for name, cost in costs.items()}
        row["compiled_kernels"] = count_compiled_kernels(network, size, **how) if options.compiled else None
        rows.append(row | {"layers": layers if options.layers else None})
    taken = measure([*networks.values()], size, options) if options.measure else []
    for i, row in enumerate(rows):
        row["predicted_ratio"] = row["predicted_seconds"] / rows[0]["predicted_seconds"]
        row["measured_seconds"] = statistics.median(taken[i]) if taken else None
        pairs = zip(taken[i], taken[0], strict=True) if taken else ()
        row["measured_ratio"] = statistics.median(own / first for own, first in pairs) if taken else None
    return rows


def show(rows: list[dict[str, Any]], machine: Machine, console: Console) -> None:
    """Prints the tables."""
    table = Table("alpha", "GMACs", "M params", "GB", "kernels", f"ms on {machine.name}", "ratio")
    extra = {"ms here": "measured_seconds", "ratio ": "measured_ratio", "compiled": "compiled_kernels"}
    for title, key in extra.items():
        if rows[0][key] is not None:
            table.add_column(title)
    for row in rows:
        cells = [f"{row['alpha']:g}", f"{row['macs'] / 1e9:.2f}", f"{row['parameters'] / 1e6:.2f}"]
        cells += [f"{row['bytes'] / 1e9:.2f}", str(row["kernels"])]
        cells += [f"{1e3 * row['predicted_seconds']:.2f}", f"{row['predicted_ratio']:.2f}"]
        if row["measured_seconds"] is not None:
            cells += [f"{1e3 * row['measured_seconds']:.1f}", f"{row['measured_ratio']:.2f}"]
        table.add_row(*cells, *([str(row["compiled_kernels"])] if row["compiled_kernels"] is not None else []))
    console.print(table)
    if rows[0]["layers"] is None:
        return
    layers = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    table = Table(Column("layer", no_wrap=True, min_width=max(map(len, layers))))
    for row in rows:
        table.add_column(f"alpha {row['alpha']:g}: MB, kernels, us", justify="right")
    for name in layers:
        found = (row["layers"].get(name, {"bytes": 0, "kernels": 0, "predicted_seconds": 0}) for row in rows)
        cells = [f"{x['bytes'] / 1e6:.2f}  {x['kernels']:3}  {1e6 * x['predicted_seconds']:7.1f}" for x in found]
        table.add_row(name or "(elsewhere)", *cells)
    console.print(table)


def main(words: list[str]) -> None:
    """Runs the command."""
    options = parse(words)
    with one_line_errors():
        use_fused_passes("on" if options.fused else "off")
        machine, dtype = machine_of(options.machine, DTYPES[options.dtype]), DTYPES[options.dtype]
        machine.seconds(Cost(), dtype)  # whether it has the dtype
        trained = load_trained(options.ckpt) if options.ckpt else None
        size = (3, *options.size) if options.size else trained.preprocessing.clip_size if trained else (3, 8, 224, 224)
        name = trained.name if trained else options.model
        frames = "x".join(map(str, size[1:]))
        mode = "training" if options.train else "inference"
        setting = f"{name}, {options.batch} x {frames}, {options.dtype}, {mode}, {machine.name}"

        def build(alpha: float) -> nn.Module:
            if trained:
                return set_alpha(copy.deepcopy(trained.network), alpha)
            with torch.device("cpu" if options.measure or options.compiled else "meta"):
                return create_model(name, alpha=alpha)

        if options.auto:
            how: dict[str, Any] = {"batch": options.batch, "dtype": dtype, "train": options.train}
            chosen = choose_alpha(build(0), machine, size, **how, budget=options.budget)
            before, after = 1e3 * chosen.vanilla, 1e3 * chosen.seconds
            print(f"# {setting}: predicted {after:.2f} ms, {after / before:.3f} of the {before:.2f} ms at alpha 0")
            print(yaml.safe_dump({"model": {"name": name, "alpha": chosen.alpha or 0.0}}, sort_keys=False), end="")
            return
        rows = rows_of({alpha: build(alpha) for alpha in options.alpha or (0.0, 0.25, 0.5)}, size, machine, options)
        console = Console(soft_wrap=True)
        console.print(setting, markup=False, highlight=False)
        show(rows, machine, console)
        if options.json:
            about = {"model": name, "size": list(size), "batch": options.batch, "dtype": options.dtype, "mode": mode}
            described = {"name": machine.name, "flops": machine.flops[dtype]}
            described |= {"bandwidth": machine.bandwidth, "launch": machine.launch}
            with appearing(options.json) as part:
                part.write_text(json.dumps(about | {"machine": described, "rows": rows}, indent=1))
