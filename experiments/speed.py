"""Measures the cost and speed of networks over alpha, against vanilla networks in their best form.

python experiments/speed.py [--quick] [--models A,B] [--alphas 0,.25] [--batch N] [--size TxHxW] [--dtype fp32|bf16]
                            [--mode inference|train] [--compile] [--json FILE] [--plot FILE] [--layers]
python experiments/speed.py --suite gpu [--minutes N] [--json FILE]   all about a GPU; more by --suite gpu --help

Forms of a network, which run interleaved (A B C, A B C, ...) on the same clips:
  octvideo       octvideo's, with its fast form (channels last) at every alpha, 0 included
  shipped        pytorchvideo's network as its author ships it: alpha 0
  channels_last  that, converted by .to(memory_format=torch.channels_last_3d)
  textbook       octave layers as they are usually written: default memory layout, four nn.Conv3d, nn.AvgPool3d,
                 nn.Upsample, and a batch norm for each map: alphas above 0

Networks of the same model, batch, mode and dtype are a group. A group's ratios are relative to the fastest of its forms
at alpha 0, of which octvideo's is always measured: time_ratio is the median over the rounds of the ratio within a
round, so that a machine whose speed drifts does not affect it; time / MAC is time_ratio / mac_ratio, 1 if time falls as
much as the arithmetic. A round of training has four steps in a row for each network, the first two of them dropped,
because they pay for the memory that the network before gave back.
Inference in bf16 has weights and clips in bfloat16; training has float32 weights under autocast. A training step is
forward, cross entropy, backward, and dropping the gradients; no step of an optimiser.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import gpu_suite
import numpy as np
import torch
import torch.nn.functional as F
from choices import one_of
from forms import CLIP, CLIPS, DTYPES, Size, channels_last_form, octvideo_form, shipped_form, size_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from memory import count_saved_bytes, measure_peak_bytes
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from textbook import NoTextbookError, Seen, each_map, textbook, watch
from timing import time_blocks
from torch import Tensor, nn

import octvideo
from octvideo import MODELS, Octaves, OctConv3d, create_model
from octvideo.commands.options import Parser, clip_size, fail, number, several
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.models.cost import count_macs, count_macs_of, count_parameters, hardware, time_interleaved

Row = dict[str, Any]
MODES = ("inference", "train")
QUICK = {"models": ("i3d_r50",), "alphas": (0.0, 0.25, 0.5), "size": (8, 112, 112), "rounds": 10}


def share(text: str) -> float:
    """The type of an option for a share of low channels."""
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", text) or not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"alpha must lie in [0, 1], got {text!r}")
    return float(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, checked as far as possible without a network."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", type=several(one_of(MODELS, "model")), default=("i3d_r50",), metavar="A,B")
    add("--alphas", type=several(share), default=(0.0, 0.125, 0.25, 0.5), metavar="0,.25", help="0 is always measured")
    add("--batch", type=several(number), default=(1,), metavar="N,M", help="clips at once")
    add("--size", type=clip_size, metavar="TxHxW", help="frames, height and width; default: each network's published")
    add("--dtype", type=several(one_of(DTYPES, "dtype")), default=("fp32",), metavar="fp32,bf16")
    add("--mode", type=several(one_of(MODES, "mode")), default=("inference",), metavar="inference,train")
    add("--compile", action="store_true", help="compiled networks; in inference with batch norm folded in and frozen")
    compile_modes, what = ("default", "reduce-overhead", "max-autotune"), "reduce-overhead uses CUDA graphs"
    add("--compile-mode", choices=compile_modes, default="default", help=f"torch.compile's mode; {what}")
    add("--fuse", action="store_true", help="inference with batch norm folded in (the octvideo form only)")
    add("--forms", type=several(one_of(FORMS, "form")), default=tuple(FORMS), metavar="A,B", help="default: all")
    add("--width", type=number, metavar="N", help="channels of the stem; default: as published")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=number, metavar="N", help="on the CPU; default: as torch chooses")
    add("--rounds", type=number, default=15, metavar="N", help="measurements of each network")
    add("--warmup", type=number, default=3, metavar="N", help="calls of each network before those")
    add("--json", type=Path, metavar="FILE", help="write the rows there, after every group")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of time and MACs over alpha there")
    add("--suite", choices=("gpu",), help="measure all about a GPU, with options of its own: --suite gpu --help")
    what = "time each octave layer by itself too (eager); list those furthest from theory"
    add("--layers", action="store_true", help=what)
    add("--layers-json", type=Path, metavar="FILE", help="write the rows of --layers there")
    add("--quick", action="store_true", help="i3d_r50 on 8x112x112 at 3 alphas; other options still count")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no GPU")
    if options.compile_mode != "default" and not options.compile:
        fail("--compile-mode needs --compile")
    if options.fuse and "train" in options.mode:
        fail("--fuse folds batch norm in, which training cannot: give --mode inference")
    if options.layers_json and not options.layers:
        fail("--layers-json needs --layers")
    if options.layers and not any(options.alphas):
        fail("--layers needs an alpha above 0 in --alphas")
    for option in ("json", "plot", "layers_json"):
        check_writable(f"--{option.replace('_', '-')}", getattr(options, option))
    return options


def check_writable(option: str, path: Path | None) -> None:
    """Ends the program if a result file cannot be written, before the work."""
    if path is None:
        return
    if path.is_dir():
        fail(f"{option} {path}: this is a folder")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        fail(f"{option} {path}: {error.strerror}")


def textbook_form(name: str, alpha: float, width: int | None, size: Size) -> nn.Module:
    """The shipped network with textbook octave layers."""
    with torch.device("meta"):
        octave = create_model(name, alpha=alpha, width=width)
    return textbook(shipped_form(name, 0, width, size), octave, size)


FORMS: dict[str, Callable[[str, float, int | None, Size], nn.Module]] = {
    "octvideo": octvideo_form,
    "shipped": shipped_form,
    "channels_last": channels_last_form,
    "textbook": textbook_form,
}


@dataclass(frozen=True)
class Variant:
    """One network of a group, and its cost for one clip."""

    form: str
    alpha: float
    params: int
    macs: int


@dataclass(frozen=True)
class Group:
    """Networks that are measured interleaved; the first one is octvideo at alpha 0."""

    model: str
    size: Size
    batch: int
    mode: str
    dtype: str
    variants: tuple[Variant, ...]

    def __str__(self) -> str:
        return f"{self.model} {size_name(self.size)} batch {self.batch} {self.mode} {self.dtype}"

    def row(self, alpha: float, time_ratio: float, mac_ratio: float) -> Row:
        """The entries that rows of networks and of layers share."""
        found = {key: getattr(self, key) for key in ("model", "batch", "mode", "dtype")}
        ratios = {"time_ratio": time_ratio, "mac_ratio": mac_ratio, "time_over_mac": time_ratio / mac_ratio}
        return found | {"alpha": alpha, "size": size_name(self.size)} | ratios


def plan(options: argparse.Namespace, tell: Callable[[str], Any]) -> list[Group]:
    """The groups to measure; each network runs once without data, so that mistakes show before anything starts.

    Args:
        options: the command line's.
        tell: gets a line for each form that a network does not have.

    Raises:
        ValueError: an alpha, a width or a size that a network does not take.
    """
    groups = []
    for model in options.models:
        size = options.size or CLIPS.get(model, CLIP)
        variants = list(variants_of(model, size, options, tell))
        if "train" in options.mode:
            check_training(model, size, options)
        for dtype, mode, batch in itertools.product(options.dtype, options.mode, options.batch):
            measurable = [variant for variant in variants if variant.form != "textbook"]
            if mode == "train" or has_average_pool(DTYPES[dtype], options.device):
                measurable = variants
            elif len(measurable) < len(variants):
                tell(f"{model}: no textbook form in {dtype}: torch has no avg_pool3d for it on {options.device}")
            groups.append(Group(model, size, batch, mode, dtype, tuple(measurable)))
    return groups


def variants_of(model: str, size: Size, options: argparse.Namespace, tell: Callable[[str], Any]) -> Iterator[Variant]:
    """The forms and alphas of a network, and the cost of each."""
    above = [alpha for alpha in options.alphas if alpha]
    alphas = {"shipped": [0.0], "channels_last": [0.0], "textbook": above}
    alphas["octvideo"] = [0.0, *(above if "octvideo" in options.forms else ())]
    for form in FORMS:
        for alpha in alphas[form] if form in ("octvideo", *options.forms) else ():
            try:
                with torch.device("meta"):
                    network = FORMS[form](model, alpha, options.width, size)
                yield Variant(form, alpha, count_parameters(network), count_macs(network, (3, *size)))
            except NoTextbookError as error:
                tell(f"{model}: no textbook form at alpha {alpha:g}: {error}")
            except (UserError, RuntimeError) as error:
                raise UserError(f"{model} does not take clips of {size_name(size)}: {error}") from error


def has_average_pool(dtype: torch.dtype, device: str) -> bool:
    """Whether torch has the textbook form's pooling for a type."""
    try:
        F.avg_pool3d(torch.ones(1, 1, 1, 2, 2, dtype=dtype, device=device), (1, 2, 2))
    except NotImplementedError:
        return False
    return True


def check_training(model: str, size: Size, options: argparse.Namespace) -> None:
    """Raises ValueError if maps of one pixel leave batch norm nothing to train on."""
    with torch.device("meta"), torch.no_grad():
        for alpha in {0.0, *options.alphas}:
            octvideo_form(model, alpha, options.width, size).train()(torch.empty((min(options.batch), 3, *size)))


def measure(group: Group, options: argparse.Namespace, tick: Callable[[], Any]) -> list[Row]:
    """Measures the networks of a group, interleaved; returns a row for each."""
    torch._dynamo.reset()
    clip, labels = random_clips(group, options.device)
    networks = [prepare(group, variant, options) for variant in group.variants]
    train = group.mode == "train"
    forwards = [training_forward(group, network, clip, labels) for network in networks] if train else []
    if train:
        steps = [training_step(network, forward) for network, forward in zip(networks, forwards, strict=True)]
    else:
        steps = [partial(infer, network, clip) for network in networks]
    with torch._inductor.config.patch(freezing=not train):
        for step in steps * options.warmup:
            step()
            tick()
        block, dropped = (4, 2) if train else (1, 0)
        device, rounds = options.device, options.rounds
        seconds = time_blocks(steps, device, rounds=rounds, steps=block, dropped=dropped, after_each=tick)
    vanilla = [i for i, variant in enumerate(group.variants) if variant.alpha == 0]
    fastest = min(vanilla, key=lambda i: statistics.median(seconds[i]))
    rows = []
    for i, (variant, network) in enumerate(zip(group.variants, networks, strict=True)):
        saved = count_saved_bytes(network, forwards[i]) if train else None
        own = clip.nbytes + sum(tensor.nbytes for tensor in itertools.chain(network.parameters(), network.buffers()))
        peak = measure_peak_bytes(steps[i]) + own if options.device == "cuda" else None
        row = row_of(group, variant, options, seconds[i], seconds[fastest])
        row["normalised_against"] = f"{group.variants[fastest].form}, alpha 0"
        rows.append(row | {"saved_bytes": saved, "peak_bytes": peak})
    return rows


def random_clips(group: Group, device: str) -> tuple[Tensor, Tensor]:
    """Clips and labels, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn((group.batch, 3, *group.size), generator=generator).to(device)
    labels = torch.randint(400, (group.batch,), generator=generator).to(device)
    return (clip if group.mode == "train" else clip.to(DTYPES[group.dtype])), labels


def prepare(group: Group, variant: Variant, options: argparse.Namespace) -> nn.Module:
    """Builds a network and puts it into the state in which it is measured."""
    torch.manual_seed(0)
    network = FORMS[variant.form](group.model, variant.alpha, options.width, group.size).to(options.device)
    if group.mode == "inference":
        network.eval()
        network = octvideo.fuse(network) if is_fused(group, variant, options) else network
        network.to(DTYPES[group.dtype])
    if not options.compile:
        return network
    compiled: Any = torch.compile(network, dynamic=False, mode=options.compile_mode)  # torch calls it a function
    return cast(nn.Module, compiled)


def is_fused(group: Group, variant: Variant, options: argparse.Namespace) -> bool:
    """Whether batch norm is folded in before measuring."""
    return group.mode == "inference" and variant.form == "octvideo" and (options.fuse or options.compile)


def infer(network: nn.Module, clip: Tensor | Octaves) -> None:
    """One forward pass."""
    with torch.inference_mode():
        network(clip)


def autocast(group: Group, device: str) -> torch.autocast:
    """The context of a group's forward passes: training in bf16 is under autocast."""
    return torch.autocast(device, torch.bfloat16, enabled=group.mode == "train" and group.dtype == "bf16")


def training_forward(group: Group, network: nn.Module, clip: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """The forward pass of a training step, which returns the loss."""

    def forward() -> Tensor:
        with autocast(group, clip.device.type):
            return F.cross_entropy(network(clip), labels)

    return forward


def training_step(network: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step, less the optimiser's."""

    def step() -> None:
        forward().backward()
        network.zero_grad(set_to_none=True)

    return step


def row_of(
    group: Group, variant: Variant, options: argparse.Namespace, seconds: Sequence[float], vanilla: Sequence[float]
) -> Row:
    """A network's row of the JSON file, from its seconds in each round and those of the fastest vanilla form."""
    least, low, median, high = np.quantile(seconds, (0, 0.25, 0.5, 0.75)).tolist()
    time_ratio = statistics.median(own / other for own, other in zip(seconds, vanilla, strict=True))
    return group.row(variant.alpha, time_ratio, variant.macs / group.variants[0].macs) | {
        "form": variant.form,
        "compiled": options.compile,
        "fused": is_fused(group, variant, options),
        "params": variant.params,
        "macs": variant.macs,
        "seconds": median,
        "seconds_low": low,
        "seconds_high": high,
        "seconds_min": least,
        "rounds": options.rounds,
        "clips_per_second": group.batch / median,
        "device": options.device,
        "hardware": hardware(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure_layers(group: Group, options: argparse.Namespace, task: Callable[[int], Callable[[], Any]]) -> list[Row]:
    """Times each octave layer of a group's networks by itself, against the same layer at alpha 0; eager and not fused.

    Each layer gets its input in the network, with random values. Layers that are alike are measured once.

    Args:
        group: the networks; in training mode, forward and backward are timed.
        options: the command line's.
        task: takes the number of measurements to come, and returns the function to call after each.
    """
    vanilla = seen_in(group, 0, options)
    pairs = []
    for alpha in (alpha for alpha in options.alphas if alpha):
        alike: dict[str, list[Seen]] = {}
        for name, seen in seen_in(group, alpha, options).items():
            if seen.octave:
                alike.setdefault(f"{seen.layer} {shapes(seen.input)} {shapes(vanilla[name].input)}", []).append(seen)
        pairs += [(alpha, layers, vanilla[layers[0].name]) for layers in alike.values()]
    tick = task(2 * len(pairs) * (options.rounds + options.warmup))
    return [layer_row(group, *pair, options, tick) for pair in pairs]


def seen_in(group: Group, alpha: float, options: argparse.Namespace) -> dict[str, Seen]:
    """The convolutions of a network with their inputs."""
    torch.manual_seed(0)
    network = octvideo_form(group.model, alpha, options.width, group.size).to(options.device).eval()
    clip, _ = random_clips(group, options.device)
    if group.mode == "inference":
        network.to(DTYPES[group.dtype])
    with autocast(group, options.device):
        return {seen.name: seen for seen in watch(network, clip) if isinstance(seen.layer, OctConv3d)}


def shapes(x: Tensor | Octaves) -> str:
    """The sizes of a Tensor, or of both maps: 64x8x56x56 + 16x8x28x28."""
    return " + ".join(size_name(part.shape[1:]) for part in (x if isinstance(x, Octaves) else (x,)))


def layer_row(
    group: Group, alpha: float, alike: list[Seen], vanilla: Seen, options: argparse.Namespace, tick: Callable[[], Any]
) -> Row:
    """Times one layer against its vanilla counterpart."""
    both = [(seen.layer, random_like(seen.input, options.device)) for seen in (alike[0], vanilla)]
    with autocast(group, options.device):
        macs = [count_macs_of(partial(layer, x)) / group.batch for layer, x in both]
    calls = [layer_call(layer, x, group, options) for layer, x in both]
    seconds, vanilla_seconds = time_interleaved(
        calls, rounds=options.rounds, warmup=options.warmup, device=options.device, after_each=tick
    )
    time_ratio = statistics.median(own / other for own, other in zip(seconds, vanilla_seconds, strict=True))
    layer = vanilla.layer
    assert isinstance(layer, OctConv3d)
    return group.row(alpha, time_ratio, macs[0] / macs[1]) | {
        "layers": [seen.name for seen in alike],
        "kernel": size_name(layer.kernel_size),
        "stride": size_name(layer.stride),
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "input": shapes(alike[0].input),
        "macs": int(macs[0]),
        "seconds": statistics.median(seconds),
        "vanilla_seconds": statistics.median(vanilla_seconds),
    }


def random_like(x: Tensor | Octaves, device: str) -> Tensor | Octaves:
    """Random values in the sizes, the type and the memory layout of an input on "meta"."""
    return each_map(x, lambda part: torch.randn_like(part, device=device))


def layer_call(layer: nn.Module, x: Tensor | Octaves, group: Group, options: argparse.Namespace) -> Callable[[], None]:
    """A function that runs a layer forward, in training backward too.

    Each call gets an Octaves of its own, so that nothing can be remembered on it from the call before.
    """
    if group.mode == "inference":
        return lambda: infer(layer, each_map(x, lambda part: part))
    inputs = [part.requires_grad_() for part in maps(x)]
    with autocast(group, options.device):
        gradients = [torch.randn_like(part) for part in maps(layer(x))]

    def call() -> None:
        with autocast(group, options.device):
            outputs = maps(layer(each_map(x, lambda part: part)))
        torch.autograd.backward(outputs, gradients)
        layer.zero_grad(set_to_none=True)
        for part in inputs:
            part.grad = None

    return call


def maps(x: Tensor | Octaves) -> list[Tensor]:
    """A Tensor by itself, or those maps of Octaves that have channels."""
    return [part for part in (x if isinstance(x, Octaves) else (x,)) if part.shape[1]]


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Writes rows so that the file is complete at any time."""
    with appearing(path) as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")


RATIOS = {"time\nratio": "{time_ratio:.3f}", "MAC\nratio": "{mac_ratio:.3f}", "time\n/ MAC": "{time_over_mac:.3f}"}
NETWORK_COLUMNS = {
    **{"model": "{model}", "form": "{form}", "alpha": "{alpha:g}", "batch": "{batch}", "clip": "{size}"},
    **{"mode": "{mode}", "dtype": "{dtype}", "params": "{params:,}", "GMACs": "{giga_macs:.2f}"},
    **{"ms": "{ms:.1f}", "quartiles": "{ms_low:.1f} - {ms_high:.1f}", "clips\n/ s": "{clips_per_second:.2f}"},
    **{"saved\nMB": "{saved_bytes}", "peak\nMB": "{peak_bytes}"},
    **RATIOS,
}
LAYER_COLUMNS = {
    **{"layer": "{layers[0]}", "alike": "{alike}", "alpha": "{alpha:g}", "kernel": "{kernel}", "stride": "{stride}"},
    **{"channels": "{in_channels} to {out_channels}", "input": "{input}", "vanilla\nms": "{vanilla_ms:.2f}"},
    **{"ms": "{ms:.2f}"},
    **RATIOS,
}


def in_units(row: Row) -> Row:
    """A row in the units of the tables: milliseconds, 10^9 multiply-adds, 10^6 bytes."""
    milliseconds = {key.replace("seconds", "ms"): 1000 * row[key] for key in row if "seconds" in key}
    megabytes = {key: "" if row[key] is None else f"{row[key] / 1e6:.1f}" for key in row if key.endswith("_bytes")}
    return row | milliseconds | megabytes | {"giga_macs": row["macs"] / 1e9, "alike": len(row.get("layers", ()))}


def print_table(rows: Sequence[Row], columns: dict[str, str], console: Console, title: str = "") -> None:
    """Prints rows, with a line between groups; values that all of them share go into the title."""
    entries = [{name: pattern.format(**in_units(row)) for name, pattern in columns.items()} for row in rows]
    same = [name for name in columns if len(entries) > 1 and len({entry[name] for entry in entries}) == 1]
    constants = [f"{' '.join(name.split())} {entries[0][name]}" for name in same if entries[0][name]]
    table = Table(title=", ".join([title, *constants] if title else constants), box=box.SIMPLE)
    shown = [name for name in columns if name not in same]
    for name in shown:
        table.add_column(name, justify="left" if name in ("model", "form", "layer") else "right", no_wrap=True)
    for entry, following in itertools.zip_longest(entries, rows[1:]):
        table.add_row(*(entry[name] for name in shown), end_section=following is not None and is_vanilla(following))
    console.print(table)


def is_vanilla(row: Row) -> bool:
    """Whether a row is its group's first."""
    return row.get("form") == "octvideo" and row["alpha"] == 0


def print_layers(title: str, rows: Sequence[Row], console: Console, most: int = 20) -> None:
    """Prints the layers that are furthest from theory."""
    worst = sorted(rows, key=lambda row: -row["time_over_mac"])[:most]
    print_table(worst, LAYER_COLUMNS, console, f"{title}: {len(worst)} of {len(rows)} layers, by time / MAC")


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws time and MACs over alpha, relative to the fastest vanilla form: a panel for each group."""
    starts = [i for i, row in enumerate(rows) if is_vanilla(row)]
    groups = [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(max(6.4, 4.8 * columns), 3.8 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    for panel, group in zip(panels.flat, groups, strict=False):
        draw(panel, group)
    figure.suptitle(title, fontsize=9, wrap=True)
    with appearing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def draw(panel: Axes, rows: Sequence[Row]) -> None:
    """Draws one group."""
    ours = sorted((row for row in rows if row["form"] == "octvideo"), key=lambda row: row["alpha"])
    theory = sorted({(row["alpha"], row["mac_ratio"]) for row in rows})
    panel.plot(*zip(*theory, strict=True), "k--", label="MACs")
    panel.plot([row["alpha"] for row in ours], [row["time_ratio"] for row in ours], "o-C0", label="time, octvideo")
    for form, style in (("textbook", "s-C1"), ("shipped", "xC2"), ("channels_last", "+C3")):
        found = sorted((row for row in rows if row["form"] == form), key=lambda row: row["alpha"])
        if found:
            ratios = [row["time_ratio"] for row in found]
            panel.plot([row["alpha"] for row in found], ratios, style, markersize=8, label=f"time, {form}")
    first = rows[0]
    how = f"{first['mode']}, {first['dtype']}{', compiled' if first['compiled'] else ''}"
    panel.set_title(f"{first['model']}, {first['size']}, batch {first['batch']}\n{how}", fontsize=10)
    panel.set_xlabel("alpha: share of low channels")
    panel.set_ylabel("relative to the fastest vanilla form")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.split("=")[0] == "--suite" for argument in arguments):
        gpu_suite.main(arguments)
        return
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    console = Console(width=180, highlight=False)  # numbers are never cut; a table is as wide as it needs
    machine = f"{hardware(options.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"{machine}\nexperiments/speed.py {shlex.join(arguments)}", markup=False, soft_wrap=True)
    bar, errors = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()), Console(stderr=True)
    hidden = not errors.is_terminal or "CI" in os.environ
    # It moves between measurements only, never during one.
    progress = Progress(*bar, TimeRemainingColumn(), console=errors, auto_refresh=False, disable=hidden)

    @cache  # each line once
    def tell(message: str) -> None:
        errors.print(message, markup=False, highlight=False, soft_wrap=True)

    try:
        groups = plan(options, tell)
    except ValueError as error:
        fail(str(error))
    rows: list[Row] = []
    layers: dict[str, list[Row]] = {}

    def task(description: str, total: int) -> Callable[[], Any]:
        return partial(progress.update, progress.add_task(description, total=total), advance=1, refresh=True)

    # The networks of a group have the same code, and beyond its limit torch.compile runs it eager without a word.
    with progress, torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for group in groups:
            calls = len(group.variants) * (options.rounds + options.warmup)
            rows += measure(group, options, task(str(group), calls))
            if options.json:
                write_json(rows, options.json)
            if options.layers:
                layers[str(group)] = measure_layers(group, options, partial(task, f"{group}, layers"))
            if options.layers_json:
                write_json(list(itertools.chain(*layers.values())), options.layers_json)
    print_table(rows, NETWORK_COLUMNS, console)
    for title, measured in layers.items():
        print_layers(title, measured, console)
    if options.plot:
        plot(rows, options.plot, machine)


if __name__ == "__main__":
    main()
