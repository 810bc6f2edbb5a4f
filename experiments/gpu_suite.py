"""Measures all that the documentation says about a GPU, in one command and within a number of minutes.

python experiments/speed.py --suite gpu --minutes 8 --json FILE

Sections, the cheapest and most telling first: the device's ceilings; fused passes checked against the eager reference;
I3D in bf16, inference and training; other batches; CUDA graphs; other networks; compiled networks; 32 bits. The forms
of a group run in turn, in blocks of calls of which the first two are dropped. Ratios are relative to the fastest
vanilla form of the group (marked *): octvideo's alpha 0 in channels_last, pytorchvideo's network as shipped, or that in
torch.channels_last_3d. A failure is one line, and the suite goes on. The file is complete after every group. "bytes",
"GB" and "ops" are counted on the operations of eager mode; "run" and "busy" are the GPU's kernels, by torch.profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import multiprocessing
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch._inductor.metrics
import torch.nn.functional as F
from forms import CLIP, CLIPS, DTYPES, Size, channels_last_form, octvideo_form, settle, shipped_form, size_name
from memory import measure_peak_bytes
from timing import Call, measure_ceilings, most_expensive, run_kernels, time_blocks
from torch import Tensor, nn

import octvideo.layers
from octvideo import create_model, fuse
from octvideo.files import appearing
from octvideo.models.compilation import compile_blocks
from octvideo.models.cost import count_cost, count_macs, hardware, total
from octvideo.models.zoo import residual_stages

FORMS = {"octvideo": octvideo_form, "shipped": shipped_form, "channels_last": channels_last_form}
use_fused_passes: Callable[[str], Any] | None = getattr(octvideo.layers, "use_fused_passes", None)
Row = dict[str, Any]


class TimeUpError(BaseException):  # no Exception: nothing that passes failures over must catch it
    """The minutes are used up."""


@dataclass(frozen=True)
class Variant:
    """One form of a network."""

    form: str
    alpha: float = 0.0
    passes: str = "off"  # fused passes

    def __str__(self) -> str:
        return f"{self.form} {self.alpha:g}{' fused passes' if self.passes == 'on' else ''}"


@dataclass(frozen=True)
class Group:
    """Forms of one network in one setting, which are compared."""

    section: str
    model: str
    batch: int
    mode: str = "inference"
    dtype: str = "bf16"  # or fp32, or tf32
    compiled: str = ""  # or graph (a CUDA graph of the eager network), blocks, whole, cudagraphs
    folded: bool = False  # batch norm
    passes: tuple[str, ...] = ("off", "on")
    alphas: tuple[float, ...] = (0.25, 0.5)
    forms: tuple[str, ...] = tuple(FORMS)

    def __str__(self) -> str:
        extra = [self.compiled and f"compiled: {self.compiled}", "batch norm folded" if self.folded else ""]
        return ", ".join([f"{self.model} batch {self.batch} {self.mode} {self.dtype}", *filter(None, extra)])

    @property
    def variants(self) -> list[Variant]:
        """The vanilla forms first."""
        octave = [Variant("octvideo", alpha, mode) for alpha, mode in itertools.product(self.alphas, self.passes)]
        return [*map(Variant, self.forms), *octave]


def groups() -> Iterator[Group]:
    """All groups, in order."""
    i3d, both = "i3d_r50", ("inference", "train")
    for mode in both:
        yield Group("eager", i3d, 8, mode, alphas=(0.125, 0.25, 0.5))
    yield Group("batches", i3d, 1)
    yield Group("batches", i3d, 32, "train", forms=("octvideo", "channels_last"))
    yield Group("batches", i3d, 32)
    yield Group("batches", i3d, 1, "train")
    for batch in (1, 8):
        yield Group("graphs", i3d, batch, compiled="graph", forms=("octvideo", "channels_last"))
    yield Group("graphs", i3d, 8, folded=True, forms=("octvideo", "channels_last"))
    for model, mode in itertools.product(("slowfast_r50", "c2d_r50", "x3d_s", "r2plus1d_r50"), both):
        yield Group("networks", model, 8, mode)
    for compiled, mode in itertools.product(("blocks", "whole"), both):
        yield Group("compiled", i3d, 8, mode, compiled=compiled, forms=("octvideo", "channels_last"))
    yield Group("compiled", i3d, 1, compiled="cudagraphs", forms=("octvideo", "channels_last"))
    for dtype, mode in itertools.product(("tf32", "fp32"), both):
        yield Group("fp32", i3d, 8, mode, dtype)


SECTIONS = tuple(dict.fromkeys(["check", *(group.section for group in groups())]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=("gpu",), default="gpu", help="this one")
    add("--minutes", type=float, default=8.0, metavar="N", help="it ends before; what was left out is listed")
    add("--json", type=Path, metavar="FILE", help="write all there, after every group")
    add("--sections", default=",".join(SECTIONS), metavar="A,B", help=f"in the order of {','.join(SECTIONS)}")
    add("--models", metavar="A,B", help="groups of these networks only")
    add("--alphas", metavar="A,B", help="instead of each group's own")
    passes = "octave networks with fused passes on, off, or both, one after the other"
    add("--passes", choices=("on", "off", "both"), default="both", help=passes)
    add("--rounds", type=int, default=3, metavar="N", help="blocks of calls of each form")
    add("--steps", type=int, default=6, metavar="N", help="calls in a block, of which two are dropped")
    add("--warmup", type=int, default=3, metavar="N", help="calls of each form before those")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    size = "clips of this size for every network; default: each network's published"
    add("--size", type=lambda text: tuple(map(int, text.split("x"))), metavar="TxHxW", help=size)
    add("--width", type=int, metavar="N", help="channels of the stem; default: as published")
    add("--workers", type=int, default=4, metavar="N", help="processes that count bytes and kernels meanwhile")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections.split(",")) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.steps < 3 or options.rounds < 1 or options.warmup < 1:
        parser.error("--steps must be at least 3, --rounds and --warmup at least 1")
    return options


@contextlib.contextmanager
def passes_of(mode: str) -> Iterator[None]:
    """Fused passes on or off; neither where there are none."""
    if use_fused_passes is None:
        yield
        return
    use_fused_passes(mode)
    try:
        yield
    finally:
        use_fused_passes("auto")


def build(group: Group, variant: Variant, size: Size, width: int | None, device: str) -> nn.Module:
    """A network in the state in which it is measured, but not compiled."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws weights faster
        network = FORMS[variant.form](group.model, variant.alpha, width, size)
    if group.mode == "train":
        return network.train()
    network.eval()
    return (fuse(network) if group.folded else network).to(DTYPES["bf16" if group.dtype == "bf16" else "fp32"])


def step_of(group: Group, network: nn.Module, clip: Tensor, labels: Tensor, passes: str) -> Callable[[], Tensor]:
    """A forward pass, which returns the logits, or a training step without an optimiser, which returns the loss."""

    def infer() -> Tensor:
        with passes_of(passes), torch.inference_mode():
            logits: Tensor = network(clip)
            return logits

    def train() -> Tensor:
        with passes_of(passes):
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=group.dtype == "bf16"):
                loss = F.cross_entropy(network(clip), labels)
            loss.backward()
        network.zero_grad(set_to_none=True)
        return loss.detach()

    return train if group.mode == "train" else infer


def compiled(group: Group, network: nn.Module) -> nn.Module:
    """A network as the group compiles it."""
    if group.compiled in ("whole", "cudagraphs"):
        mode = "reduce-overhead" if group.compiled == "cudagraphs" else "default"
        whole: Any = torch.compile(network, dynamic=False, mode=mode)
        return whole  # type: ignore[no-any-return]
    if group.compiled == "blocks":
        compile_blocks(network)
    return network


def graphed(step: Call) -> Call:
    """A function that replays the kernels of a call from a CUDA graph."""
    stream: Any = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def random_clips(group: Group, size: Size, device: str) -> tuple[Tensor, Tensor]:
    """Clips and labels, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn((group.batch, 3, *size), generator=generator).to(device)
    labels = torch.randint(400, (group.batch,), generator=generator).to(device)
    return clip.to(torch.bfloat16 if (group.mode, group.dtype) == ("inference", "bf16") else torch.float32), labels


def count(group: Group, variant: Variant, size: Size, width: int | None) -> dict[str, int]:
    """Multiply-adds of one clip; bytes and kernels of the operations of one call, in eager mode, without data."""
    network, train = build(group, variant, size, width, "cpu"), group.mode == "train"
    macs = count_macs(network.float(), (3, *size))
    with passes_of(variant.passes):
        dtype = DTYPES["bf16" if group.dtype == "bf16" else "fp32"]
        cost = total(count_cost(network, (3, *size), batch=group.batch, dtype=dtype, train=train))
    return {"macs": macs, "bytes_moved": cost.bytes_moved, "kernels": cost.kernels}


@dataclass
class Ready:
    """A network that is ready to be measured, and what its warm-up showed."""

    variant: Variant
    step: Call
    found: Row


class Suite:
    """Measures, and keeps what it found."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options, self.device, self.start = options, options.device, time.monotonic()
        self.rows: list[Row] = []
        self.counts: list[Callable[[], dict[str, int] | None]] = []  # of each row
        self.found: dict[str, Any] = {
            "command": f"experiments/speed.py {shlex.join(arguments)}",
            "hardware": hardware(self.device),
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "fused_passes": use_fused_passes is not None,
            "ceilings": {},
            "checks": [],
            "rows": self.rows,
            "failures": [],
            "left_out": [],
            "seconds": 0.0,
        }
        self.pool: ProcessPoolExecutor | None = None
        if options.workers:
            spawn = multiprocessing.get_context("spawn")
            one = partial(torch.set_num_threads, 1)
            self.pool = ProcessPoolExecutor(options.workers, spawn, initializer=one)
        wanted = options.sections.split(",")
        self.groups = [group for group in groups() if group.section in wanted]
        if options.models:
            self.groups = [group for group in self.groups if group.model in options.models.split(",")]
        if options.alphas:
            alphas = tuple(map(float, options.alphas.split(",")))
            self.groups = [dataclasses.replace(group, alphas=alphas) for group in self.groups]
        if options.passes != "both":
            self.groups = [dataclasses.replace(group, passes=(options.passes,)) for group in self.groups]
        self.counted: dict[Any, Callable[[], dict[str, int] | None]] = {}
        for group in self.groups if self.pool else ():
            for variant in group.variants:
                self.counter(group, variant)

    def say(self, line: str) -> None:
        """Prints a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {line}", flush=True)

    def fail(self, what: str, error: BaseException) -> None:
        """Notes a failure, which the suite passes over."""
        line = (str(error).strip() or "no message").splitlines()[0][:300]
        self.found["failures"].append({"what": what, "error": f"{type(error).__name__}: {line}"})
        self.say(f"FAILED {what}: {type(error).__name__}: {line}")

    def size(self, group: Group) -> Size:
        """The clips of a group."""
        size: Size = self.options.size or CLIPS.get(group.model, CLIP)
        return size

    def counter(self, group: Group, variant: Variant) -> Callable[[], dict[str, int] | None]:
        """A function that returns what `count` found, or None as long as it is at work."""
        plain = dataclasses.replace(group, section="", compiled="", folded=False, alphas=(), forms=(), passes=())
        key, arguments = (plain, variant), (plain, variant, self.size(group), self.options.width)
        if key not in self.counted:
            if self.pool is None:
                self.counted[key] = cache(partial(count, *arguments))
            else:
                future: Future[dict[str, int]] = self.pool.submit(count, *arguments)
                self.counted[key] = lambda: future.result() if future.done() else None
        return self.counted[key]

    def save(self) -> None:
        """Writes all that was found so far."""
        references = {row["group"]: row for row in self.rows if row["is_reference"]}
        for row, counted in zip(self.rows, self.counts, strict=True):
            if "macs" not in row:
                try:
                    row |= counted() or {}
                except Exception as error:  # whatever it is, times are worth more
                    row["macs"] = None
                    self.fail(f"counting {row['group']}: {row['form']} {row['alpha']:g}", error)
        for row in self.rows:
            for key, ratio in (("macs", "mac_ratio"), ("bytes_moved", "byte_ratio"), ("kernels", "kernel_ratio")):
                if row.get(key) and (of_reference := references.get(row["group"], {}).get(key)):
                    row[ratio] = row[key] / of_reference
        self.found["seconds"] = time.monotonic() - self.start
        if self.options.json:
            with appearing(self.options.json) as partly:
                partly.write_text(json.dumps(self.found, indent=1) + "\n")

    def run(self) -> None:
        """Measures everything, or as much as the time allows."""
        limit = self.options.minutes * 60
        reserve = min(20.0, limit / 6)  # to measure what is ready, and to write
        left = list(self.groups)
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGALRM, time_up)
                signal.setitimer(signal.ITIMER_REAL, limit - reserve)
            self.measure_ceilings()
            if "check" in self.options.sections.split(","):
                self.check()
            while left:
                self.measure(left.pop(0))
        except TimeUpError:
            self.found["left_out"] += map(str, left)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            while not all("macs" in row for row in self.rows) and time.monotonic() - self.start < limit - 3:
                self.save()
                time.sleep(0.1)
            self.save()
            if self.pool:
                self.pool.shutdown(wait=False, cancel_futures=True)
        self.print_all()

    def measure_ceilings(self) -> None:
        """What the device can do at most."""
        small = {"side": 256, "copied": 2**20} if self.device == "cpu" else {}
        try:
            self.found["ceilings"] = measure_ceilings(self.device, **small)
        except Exception as error:
            self.fail("ceilings", error)
        self.say(ceilings_line(self.found["ceilings"]))

    def check(self) -> None:
        """Compares fused passes with the eager reference: outputs, and the gradients of all parameters in training."""
        clips = [(2, *self.options.size)] if self.options.size else [(4, 8, 64, 64), (2, 8, 72, 88), (3, 4, 56, 60)]
        cases = [(name, clip) for clip in clips for name in ("blocks", "i3d_r50")]
        cases.append(("slowfast_r50", (2, 8, *clips[0][2:])))
        for (name, clip), mode, dtype in itertools.product(cases, ("train", "inference"), DTYPES):
            row: Row = {"network": name, "clip": size_name(clip), "mode": mode, "dtype": dtype}
            try:
                row |= errors(partial(answers, name, clip, mode, self.device), DTYPES[dtype])
                self.found["checks"].append(row)
                self.say(check_line(row))
            except Exception as error:
                self.fail(check_line(row).rstrip(": "), error)
        self.save()

    def measure(self, group: Group) -> None:
        """Measures the forms of a group: together in turn, or one by one where they are compiled."""
        if group.compiled in ("graph", "cudagraphs") and self.device == "cpu":
            return
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = group.dtype != "fp32"
        self.say(str(group))
        clip, labels = random_clips(group, self.size(group), self.device)
        together = group.compiled in ("", "graph")
        measured: list[tuple[Ready, list[float]]] = []
        stopped: TimeUpError | None = None
        for variants in [group.variants] if together else [[variant] for variant in group.variants]:
            ready: list[Ready] = []
            try:
                for variant in variants:
                    try:
                        ready.append(self.prepare(group, variant, clip, labels))
                    except Exception as error:
                        self.fail(f"{group}: {variant}", error)
                measured += self.time(ready, self.options.rounds)
            except TimeUpError as error:
                stopped = error
                measured += self.time(ready, 1)
            except Exception as error:
                self.fail(str(group), error)
            ready.clear()
            self.free()
            if stopped:
                break
        self.add(group, measured)
        if stopped:
            raise stopped

    def prepare(self, group: Group, variant: Variant, clip: Tensor, labels: Tensor) -> Ready:
        """Builds a network, warms it up, and looks at one step of it."""
        cuda = self.device == "cuda"
        network = build(group, variant, self.size(group), self.options.width, self.device)
        own = sum(tensor.nbytes for tensor in itertools.chain(network.parameters(), network.buffers()))
        step: Call = step_of(group, compiled(group, network), clip, labels, variant.passes)
        cast(Any, torch._inductor.metrics).reset()
        started = time.perf_counter()
        for _ in range(self.options.warmup):
            output = step()
        if not output.isfinite().all():
            raise ArithmeticError("the output is not finite")
        del output
        found: Row = {"warmup_seconds": time.perf_counter() - started}
        if group.compiled and group.compiled != "graph":
            found["kernels_generated"] = torch._inductor.metrics.generated_kernel_count
        step = graphed(step) if group.compiled == "graph" else step
        if cuda:
            found["peak_bytes"] = measure_peak_bytes(step) + own + clip.nbytes
            kernels = run_kernels(step)
            found |= {"kernels_run": len(kernels), "busy_seconds": sum(seconds for _, seconds in kernels)}
            found["most_expensive"] = most_expensive(kernels)
        return Ready(variant, step, found)

    def time(self, ready: Sequence[Ready], rounds: int) -> list[tuple[Ready, list[float]]]:
        """Seconds in each round."""
        calls = [network.step for network in ready]
        seconds = time_blocks(calls, self.device, rounds=rounds, steps=self.options.steps)
        return [
            (Ready(network.variant, lambda: None, network.found), taken)
            for network, taken in zip(ready, seconds, strict=True)
        ]

    def free(self) -> None:
        """Gives the memory of the networks back."""
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def add(self, group: Group, measured: Sequence[tuple[Ready, list[float]]]) -> None:
        """Adds a group's rows."""
        vanilla = [
            (statistics.median(taken), ready.variant.form, taken)
            for ready, taken in measured
            if ready.variant.alpha == 0
        ]
        _, fastest, reference = min(vanilla, default=(0.0, None, None))
        done = [ready.variant for ready, _ in measured]
        failed = {failure["what"] for failure in self.found["failures"]}
        missing = [f"{group}: {variant}" for variant in group.variants if variant not in done]
        self.found["left_out"] += [name for name in missing if name not in failed and str(group) not in failed]
        for ready, taken in measured:
            variant, median = ready.variant, statistics.median(taken)
            row: Row = {"group": str(group), "section": group.section, "model": group.model, "batch": group.batch}
            row |= {"size": size_name(self.size(group)), "mode": group.mode, "dtype": group.dtype}
            row |= {"compiled": group.compiled, "folded": group.folded} | dataclasses.asdict(variant)
            row |= {"seconds": median, "seconds_low": min(taken), "seconds_high": max(taken), "rounds": len(taken)}
            row |= {"clips_per_second": group.batch / median, "time_ratio": None, "normalised_against": fastest}
            if reference:
                row["time_ratio"] = statistics.median(a / b for a, b in zip(taken, reference, strict=False))
            row["is_reference"] = variant.alpha == 0 and variant.form == fastest
            self.rows.append(row | ready.found)
            self.counts.append(self.counter(group, variant))
            self.say(row_line(self.rows[-1]))
        self.save()

    def print_all(self) -> None:
        """Prints all that was found, so that the end of a log has it."""
        found = self.found
        print(f"\n{found['hardware']}, torch {found['torch']}, cuDNN {found['cudnn']}, {found['seconds']:.0f} s")
        print(f"{found['command']}\n{ceilings_line(found['ceilings'])}")
        for row in found["checks"]:
            print(check_line(row))
        for group, rows in itertools.groupby(self.rows, lambda row: str(row["group"])):
            print(f"\n{group}\n{HEADER}")
            for row in rows:
                print(row_line(row))
        for title in ("failures", "left_out"):
            for entry in found[title]:
                line = f"{entry['what']}: {entry['error']}" if isinstance(entry, dict) else entry
                print(f"{title}: {line}")


def errors(answer: Callable[[torch.dtype, str], dict[str, Tensor]], dtype: torch.dtype) -> Row:
    """Relative errors of eager operations and of fused passes, each to eager ones in 64 bits, and of one to the other.

    Fused passes are alike if they are about as near to 64 bits as eager operations of the same type.
    """

    def distances(own: dict[str, Tensor], true: dict[str, Tensor], what: str) -> dict[str, float]:
        return {f"{name}_{what}": float((own[name] - true[name]).norm() / true[name].norm()) for name in own}

    exact, off = answer(torch.float64, "off"), answer(dtype, "off")
    row: Row = distances(off, exact, "off")
    if use_fused_passes:
        on = answer(dtype, "on")
        row |= distances(on, exact, "on") | distances(on, off, "on_to_off")
        row["alike"] = all(row[f"{name}_on"] <= 2 * row[f"{name}_off"] + 1e-6 for name in on)
    return row


def answers(
    name: str, clip: Sequence[int], mode: str, device: str, dtype: torch.dtype, passes: str
) -> dict[str, Tensor]:
    """Output of a small network, and in training the gradients of its parameters and its input, in 64 bits.

    "blocks" are a few residual blocks of I3D, into octaves and out of them: whole networks with random weights let
    batch norm increase the rounding errors of 16 bits until nothing is left of a gradient to compare.
    """
    torch.manual_seed(0)
    model = "i3d_r50" if name == "blocks" else name
    network = settle(create_model(model, alpha=0.25, width=16, num_classes=20, dropout=0, channels_last=True))
    x, labels = torch.randn(clip[0], 3, *clip[1:]), torch.arange(clip[0], device=device)
    if name == "blocks":
        stages = [cast(Any, network).blocks[i].res_blocks for i in residual_stages(cast(Any, network))]
        network = nn.Sequential(stages[0][0], *stages[1][:2], stages[2][0], stages[3][0])
        x = torch.randn(clip[0], 16, clip[1], clip[2] // 2, clip[3] // 2)
    network, x = network.to(device), x.to(device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False), passes_of(passes):
        if mode == "inference":
            with torch.no_grad():
                network.train()(x)  # for statistics that fit
                return {"output": network.eval().to(dtype)(x.to(dtype)).double()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        network, x = network.train().to(wide), x.to(wide).requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = network(x)
            logits = output.flatten(2).mean(2)[:, :20] if name == "blocks" else output
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        gradients = [p.grad.double().flatten() for p in (*network.parameters(), x) if p.grad is not None]
        return {"output": output.detach().double(), "gradients": torch.cat(gradients)}


def time_up(number: int, frame: FrameType | None) -> None:
    """Handles the alarm."""
    raise TimeUpError


def ceilings_line(found: dict[str, float]) -> str:
    """The ceilings in words."""
    if not found:
        return "no ceilings"
    flops, bytes_, launch = found["flops_per_second"], found["bytes_per_second"], found["seconds_per_launch"]
    return f"bf16 {flops / 1e12:.1f} TFLOP/s, copy {bytes_ / 1e9:.0f} GB/s, {launch * 1e6:.1f} us a kernel"


def check_line(row: Row) -> str:
    """A check in words."""
    errors = ", ".join(f"{key} {value:.1e}" for key, value in row.items() if isinstance(value, float))
    verdict = {True: "alike: ", False: "DIFFERENT: ", None: ""}[row.get("alike")]
    return f"check {row['network']} {row['clip']} {row['mode']} {row['dtype']}: {verdict}{errors}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: f"{1e3 * row['seconds']:.3f}",
    "range": lambda row: f"{1e3 * row['seconds_low']:.3f}-{1e3 * row['seconds_high']:.3f}",
    "ratio": lambda row: f"{row['time_ratio']:.3f}",
    "MACs": lambda row: f"{row['mac_ratio']:.3f}",
    "bytes": lambda row: f"{row['byte_ratio']:.3f}",
    "GB": lambda row: f"{row['bytes_moved'] / 1e9:.2f}",
    "ops": lambda row: f"{row['kernels']}",
    "run": lambda row: f"{row['kernels_run']}",
    "gen": lambda row: f"{row['kernels_generated']}",
    "busy ms": lambda row: f"{1e3 * row['busy_seconds']:.3f}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:.0f}",
    "warm s": lambda row: f"{row['warmup_seconds']:.1f}",
}
WIDTHS = (10, 20, 7, 7, 7, 8, 6, 6, 5, 10, 9, 8)
HEADER = f"{'form':32}" + "".join(f"{name:>{width}}" for name, width in zip(COLUMNS, WIDTHS, strict=True))


def row_line(row: Row) -> str:
    """A row of the final table; figures that are not there are left empty."""
    cells = []
    for cell in COLUMNS.values():
        try:
            cells.append(cell(row))
        except (KeyError, TypeError):
            cells.append("")
    name = f"{Variant(row['form'], row['alpha'], row['passes'])}{' *' if row['is_reference'] else ''}"
    return f"{name:32}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.backends.cudnn.benchmark = True
    limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        Suite(options, arguments).run()


if __name__ == "__main__":
    main()
