"""Runs octavize over every convolutional family of timm, torchvision, MONAI and segmentation-models-pytorch.

python experiments/networks.py --json FILE [--library NAME --only REGEX --redo --jobs 2 --timeout 900 --table PAGE.md]

A family is what a library names alike in one of its files (timm's and torchvision's), an encoder family or an
architecture (segmentation-models-pytorch), or a class (MONAI); the member with the fewest parameters runs, with random
weights and an input as small as it takes. Families come from the libraries' own lists, so new ones come in by
themselves; transformers that octavize refuses are listed as such.

Each network runs in a process of its own, with one thread and at most 6 GB, and adds a line to FILE, a JSON object:

library, family, network, size  what ran, and the extent of its input
refused    why octavize refused the network, where less than half of its multiply-adds are convolutions
errors     {stage: error} of octavize, forward, macs, sample, constancy, train, restore; of vanilla: the network itself
merges     [module, function, times] of each function that acted on merged features
ratio      multiply-adds at alpha .25 / vanilla, on an image or clip of the network's own size, or else of the size run
sampled    the same where octavize knows that image or clip; says: the last line of its report
constancy  largest difference of outputs / largest output, on an input constant in space, in float64 with circular
           padding; null where vanilla features vary in space or cannot be padded: "uneven" names the module or why
seconds    of all of it

FILE's networks are not run again, unless --redo asks for it; then the last line counts. Ends with a summary.

Exit status: 0 done; 2 a mistake in the command; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import families
import torch
from choices import one_of
from families import Family
from torch import Tensor, nn
from torch.nn.modules.utils import _reverse_repeat_tuple

from octvideo.commands.options import Parser, fail, number, one_line_errors
from octvideo.errors import UserError
from octvideo.layers.octaves import Octaves
from octvideo.models.cost import count_macs_of
from octvideo.models.octavize import octavize

ALPHA = 0.25
SAME = 1e-8  # relative difference of outputs up to which they are the same
MEMORY = 6 << 30
NOTHING_TO_GAIN = re.compile(r"has no (convolution|nn\.Conv1d)")


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors, Octaves and whatever else an output holds, each with its place among tuples, dicts and dataclasses."""
    kind = type(value).__name__
    if isinstance(value, Octaves):
        yield place, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{place}{kind}.{field.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{place}{kind}[{key}]")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from leaves(item, f"{place}{kind}[{position}]")
    else:
        yield place, value


def described(output: Any, varying: bool) -> list[str]:
    """Type, shape and dtype at each place of an output; without the number of boxes where that varies."""
    kinds = [(f"{place} {type(x).__name__}", x) for place, x in leaves(output)]
    maps = (Tensor, Octaves)
    return [f"{kind} {tuple(x.shape)[varying:]} {x.dtype}" if isinstance(x, maps) else kind for kind, x in kinds]


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, Octaves merged."""
    values = [x.merge() if isinstance(x, Octaves) else x for _, x in leaves(output)]
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def settle(network: nn.Module) -> nn.Module:
    """The network in float64 and eval mode, with circular padding, and statistics, scales and biases as after training.

    Scales that start at zero or nearly so would hide the branches that they scale.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
            module.padding_mode = "circular"
            if not isinstance(module.padding, str):  # some networks change it after construction
                module._reversed_padding_repeated_twice = _reverse_repeat_tuple(module.padding, 2)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        if parameter.numel() == max(parameter.shape, default=1):
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.uniform_(parameter, 0.5, 1.0)
    return network.double().eval()


class Trial:
    """One network, stage by stage; each method returns what it found, or raises."""

    def __init__(self, library: str, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.network = name, families.build(library, name).eval()
        self.detector = families.is_detector(self.network)
        self.channels, self.sizes = families.input_of(library, name, self.network)
        self.types = [type(module) for module in self.network.modules()]
        self.state = {key: value.clone() for key, value in self.network.state_dict().items()}
        for size in self.sizes:  # the smallest that it takes in eval and train mode
            self.size = size
            try:
                self.wanted, self.trained = self.run(), self.gradients()
                break
            except (RuntimeError, ValueError, AssertionError, IndexError, TypeError):
                if size == self.sizes[-1]:
                    raise
        self.macs = 0
        for way in ((self.sizes[-1], True), (self.size, True), (self.size, False)):
            self.counted, self.meta = way
            with contextlib.suppress(Exception):  # of code that depends on data, in many types
                self.macs = self.count()
                break
        self.twin = settle(copy.deepcopy(self.network))

    def call(self, network: nn.Module, size: Sequence[int], batch: int = 2) -> Any:
        """The output for a random input."""
        torch.manual_seed(1)
        return network(*families.arguments(self.name, network, torch.rand(batch, self.channels, *size)))

    def run(self) -> Any:
        """The output in eval mode."""
        with torch.no_grad():
            return self.call(self.network, self.size)

    def gradients(self) -> set[str]:
        """Names of the parameters that get a gradient from a step of a copy in train mode."""
        network = copy.deepcopy(self.network).train()
        loss = sum(x.double().square().mean() for x in tensors(self.call(network, self.size)) if x.requires_grad)
        assert isinstance(loss, Tensor), "no output depends on a parameter"
        loss.backward()
        return {name for name, parameter in network.named_parameters() if parameter.grad is not None}

    def count(self) -> int:
        """Multiply-adds on one input; meta tensors have no data, so that any size is quick."""
        if not self.meta:
            return count_macs_of(lambda: self.call(self.network, self.counted, 1))
        network = copy.deepcopy(self.network).to("meta")
        with torch.device("meta"):
            return count_macs_of(lambda: self.call(network, self.counted, 1))

    def octavize(self) -> Any:
        """Octaves with no other option; the report."""
        return octavize(self.network, ALPHA).__dict__["octave_report"]

    def forward(self) -> None:
        """Types and shapes of the outputs are the vanilla network's."""
        wanted, found = (described(output, self.detector) for output in (self.wanted, self.run()))
        new, gone = sorted({*found} - {*wanted}), sorted({*wanted} - {*found})
        assert wanted == found, f"outputs {new[:3]} instead of {gone[:3]}"

    def ratio(self) -> float:
        """Multiply-adds relative to vanilla."""
        assert self.macs, "multiply-adds of the vanilla network could not be counted"
        return self.count() / self.macs

    def sample(self) -> tuple[str, float]:
        """The last line of the report on a sample of the size counted, and its multiply-adds relative to vanilla."""
        network = copy.deepcopy(self.network)
        sample = families.arguments(self.name, network, torch.rand(1, self.channels, *self.counted))
        report = octavize(network, ALPHA, sample=sample).__dict__["octave_report"]
        return str(report).splitlines()[-1].strip(), report.macs[1] / report.macs[0]

    def constancy(self) -> tuple[float | None, str]:
        """The difference of outputs where all is constant in space, or the module that reads what is not."""
        trunk: Any = self.twin.backbone if self.detector else self.twin
        uneven: list[str] = []

        def check(module: Any, args: Any) -> None:
            x = args[0]
            if x.dim() >= 4 and x.shape[-2:].numel() > 1:
                x = x.flatten(-2)
                if not (x.amax(-1) - x.amin(-1)).max() <= 1e-9 * x.abs().max():
                    uneven.append(names[module])

        names = {module: name for name, module in trunk.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
        hooks = [module.register_forward_pre_hook(check) for module in names]
        torch.set_default_dtype(torch.float64)  # for what a network makes by itself
        try:
            for size in self.sizes[self.sizes.index(self.size) :]:
                try:
                    wanted = self.call_constant(trunk, size)
                    break
                except RuntimeError as error:  # circular padding wider than a map, mostly
                    if size == self.sizes[-1]:
                        return None, f"{error}"[:200]
            for hook in hooks:
                hook.remove()
            if uneven:
                return None, uneven[0]
            octavize(self.twin, ALPHA)
            outputs = self.call_constant(trunk, size)
        finally:
            torch.set_default_dtype(torch.float32)
        pairs = [(a, b) for a, b in zip(wanted, outputs, strict=True) if a.numel()]
        return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-300)).item() for a, b in pairs), ""

    def call_constant(self, network: nn.Module, size: Sequence[int]) -> list[Tensor]:
        """The outputs for an input that varies from channel to channel, and from frame to frame, alone."""
        torch.manual_seed(2)
        x = torch.randn(2, self.channels, *size[:-2], 1, 1).expand(2, self.channels, *size).contiguous()
        with torch.no_grad():
            return tensors(network(*families.arguments(self.name, network, x)))

    def train(self) -> None:
        """Every parameter that gets a gradient in the vanilla network gets one."""
        missing = sorted(self.trained - self.gradients())
        assert not missing, f"{len(missing)} of {len(self.trained)} parameters get no gradient, such as {missing[0]}"

    def restore(self) -> None:
        """Alpha 0 gives outputs, classes and state back, bit for bit."""
        octavize(self.network, 0)
        assert [type(module) for module in self.network.modules()] == self.types, "other classes"
        state = self.network.state_dict()
        assert list(state) == list(self.state), "other keys"
        assert all(torch.equal(state[key], value) for key, value in self.state.items()), "other weights"
        pairs = zip(leaves(self.wanted), leaves(self.run()), strict=True)
        different = [a for (a, x), (_, y) in pairs if isinstance(x, Tensor) and not torch.allclose(x, y, 0, 0, True)]
        assert not different, f"another output {different[0]}"


def _facts(name: str) -> dict[str, Any]:
    """The facts of a network of which nothing is known yet."""
    nothing = dict.fromkeys(("size", "ratio", "sampled", "constancy"))
    return {"network": name, "errors": {}, "refused": "", "merges": [], "says": "", "uneven": "", **nothing}


def examine(library: str, name: str, tell: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """The facts of a network that a line of results holds; `tell` is called with each stage that begins."""
    facts = _facts(name)

    def attempt(stage: str, work: Callable[[], Any]) -> Any:
        tell(stage)
        try:
            return work()
        except Exception as error:
            message = " ".join(str(error).split()) or "-"
            facts["errors"][stage] = f"{type(error).__name__}: {message}"[:600]
            return None

    with contextlib.suppress(Exception), torch.device("meta"):  # a large transformer is refused at no cost
        network = families.build(library, name)
        try:
            octavize(network, ALPHA)
        except UserError as error:
            none = not any(isinstance(module, nn.modules.conv._ConvNd) for module in network.modules())
            found = NOTHING_TO_GAIN.search(str(error))
            if found and (none or families.share_of_convolutions(library, name, network) < 0.5):
                return facts | {"refused": str(error)}
    trial = attempt("vanilla", lambda: Trial(library, name))
    report = trial and attempt("octavize", trial.octavize)
    facts["size"] = trial and trial.size
    if not report:
        return facts
    attempt("forward", trial.forward)
    if not facts["errors"]:
        facts["merges"] = [[*key, times] for key, times in report.merges.items()]
        facts["ratio"] = attempt("macs", trial.ratio)
        facts["says"], facts["sampled"] = attempt("sample", trial.sample) or ("", None)
        facts["constancy"], facts["uneven"] = attempt("constancy", trial.constancy) or (None, "")
        attempt("train", trial.train)
    attempt("restore", trial.restore)
    return facts


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", required=True, help="where results are, a line a network")
    add("--library", type=one_of(families.LIBRARIES, "library"), help="default: all four")
    add("--only", metavar="REGEX", default="", help="families whose 'library/name' it matches")
    add("--redo", action="store_true", help="run networks that have results again")
    add("--jobs", type=number, default=2, metavar="N", help="processes at once; default: 2")
    add("--timeout", type=number, default=900, metavar="S", help="seconds for a network; default: 900")
    add("--table", type=Path, metavar="PAGE", help="page of documentation to write the table to")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """The program."""
    args = parse(words)
    chosen = [family for family in families.families() if args.library in (None, family.library)]
    try:
        chosen = [family for family in chosen if re.search(args.only, f"{family.library}/{family.name}")]
        assert chosen, "no family has such a name"
    except (re.error, AssertionError) as error:
        fail(f"--only {args.only}: {error}")
    known = {} if args.redo else read(args.json)
    missing = [family for family in chosen if family[:2] not in known]
    with args.json.open("a") as file:
        for row in sweep(missing, args.jobs, args.timeout):
            file.write(json.dumps(row) + "\n")
            file.flush()
            outcome = row["refused"] or next(iter(row["errors"].items()), f"{row['ratio'] or math.nan:.3f}")
            print(f"{row['library']}/{row['family']} ({row['network']}), {row['seconds']:.0f} s: {outcome}", flush=True)
    known = read(args.json)
    rows = [known[family[:2]] for family in chosen]
    print(summary(rows))
    if args.table:
        args.table.write_text(page(rows))


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The latest results of each family."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["library"], row["family"]): row for row in rows}


def sweep(chosen: Iterable[Family], jobs: int, timeout: float) -> Iterator[dict[str, Any]]:
    """Results of families as they come, each from a process of its own that may crash, hang or run out of memory."""
    forks = multiprocessing.get_context("fork")  # the libraries are imported
    waiting = list(chosen)[::-1]
    running: dict[Connection, tuple[Any, Family, float, list[str]]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = forks.Pipe(duplex=False)
            process = forks.Process(target=_work, args=(waiting[-1], theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (process, waiting.pop(), time.monotonic(), ["vanilla", "?"])
        ready = wait(list(running), timeout=1)
        for pipe, (process, family, start, state) in list(running.items()):
            seconds, row = time.monotonic() - start, None
            if pipe in ready:
                try:
                    message = pipe.recv()
                except EOFError:
                    process.join()
                    row = {"errors": {state[0]: f"Killed: exit status {process.exitcode}"}}
                else:
                    row, state[:] = (message, state) if isinstance(message, dict) else (None, message)
            elif seconds > timeout:
                row = {"errors": {state[0]: f"Timeout: {timeout:g} s"}}
            if row is not None:
                process.kill()
                process.join()
                del running[pipe]
                yield {"library": family.library, "family": family.name, **_facts(state[1]), **row, "seconds": seconds}


def _work(family: Family, pipe: Connection) -> None:
    """The process of one family: sends (stage, network) as stages begin, and at last the facts."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        name = families.smallest(family)
        facts = examine(family.library, name, lambda stage: pipe.send((stage, name)))
    except Exception as error:
        facts = {"errors": {"vanilla": f"{type(error).__name__}: {error}"[:600]}}
    pipe.send(facts)


def share(rows: Sequence[Any], of: Sequence[Any]) -> str:
    """How many of how many."""
    return f"{len(rows)} of {len(of)}" + (f" ({len(rows) / len(of):.1%})" if of else "")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Counts and lists of what failed."""
    refused, broken = ([row for row in rows if key in row["errors"] or row.get(key)] for key in ("refused", "vanilla"))
    tried = [row for row in rows if row not in broken and row not in refused]
    runs = [row for row in tried if not {"octavize", "forward"} & row["errors"].keys()]
    cheap = [row for row in runs if (row["ratio"] or 1) <= 0.8]
    even = [row for row in runs if row["constancy"] is not None]
    lines = [
        f"{len(rows)} families; {len(refused)} refused, as transformers are; {len(broken)} do not run as they are",
        f"run: {share(runs, tried)}",
        f"multiply-adds <= .80: {share(cheap, runs)}; a sample taken: {share([r for r in runs if r['sampled']], runs)}",
        f"constant within {SAME:g}: {share([row for row in even if row['constancy'] <= SAME], even)}",
        f"every gradient: {share([row for row in runs if 'train' not in row['errors']], runs)}",
        f"restored bit for bit: {share([row for row in tried if 'restore' not in row['errors']], tried)}",
    ]
    for row in rows:
        named = f"{row['library']}/{row['family']} ({row['network']})"
        lines += [f"  {named} {stage}: {error[:300]}" for stage, error in row["errors"].items()]
        if row in even and row["constancy"] > SAME:
            lines.append(f"  {named} differs by {row['constancy']:.1e} where all is constant")
        if row in runs and row not in cheap:
            lines.append(f"  {named} runs {row['ratio'] or math.nan:.3f} of the multiply-adds: {row['says']}")
    return "\n".join(lines)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page of documentation."""
    tried = [row for row in rows if not row["refused"] and "vanilla" not in row["errors"]]
    counts = summary(rows).partition("\n  ")[0].splitlines()
    refused = ", ".join(row["network"] for row in rows if row["refused"])
    lines = [
        "# Networks of other libraries",
        "",
        f"`octavize(network, {ALPHA})`, with no other option, on a network of each family of timm, torchvision, MONAI",
        "and segmentation-models-pytorch with random weights. `experiments/networks.py` wrote this page.",
        "",
        *(f"- {line}" for line in counts),
        "",
        "*merges*: functions that act on merged features. *MACs*: multiply-adds relative to vanilla, at the network's",
        "own input size; *sample*: with `sample=`. *constancy*: difference of outputs relative to the largest, in",
        "float64, circular padding, an input constant in space; - where vanilla features vary in space even then.",
        "*restored*: alpha 0 restores outputs, classes and weights. *trained*: no gradient is missing.",
        "",
        "| network | library | runs | merges | MACs | sample | constancy | restored | trained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(tried, key=lambda row: (row["library"], row["network"])):
        errors = row["errors"]
        runs = not {"octavize", "forward"} & errors.keys()
        forms = (("ratio", ".2f"), ("sampled", ".2f"), ("constancy", ".0e"))
        numbers = ["-" if row[key] is None else f"{row[key]:{form}}" for key, form in forms]
        yes = ["yes" if x else "**no**" for x in (runs, "restore" not in errors, runs and "train" not in errors)]
        merges = str(sum(times for *_, times in row["merges"]))
        lines.append(f"| {' | '.join((row['network'], row['library'], yes[0], merges, *numbers, *yes[1:]))} |")
    return "\n".join([*lines, "", f"Refused, as no convolution in them could become octave: {refused}.", ""])


if __name__ == "__main__":
    with one_line_errors():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
