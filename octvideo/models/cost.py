"""What a network costs: multiply-adds, parameters, seconds."""

import copy
import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from octvideo.errors import UserError
from octvideo.layers.resampling import keep_layout

Call = Callable[[], Any]
Device = str | torch.device


def count_macs(model: nn.Module, clip_size: Sequence[int] = (3, 8, 224, 224)) -> int:
    """Multiply-adds of one forward pass on an input of (C, T, H, W): convolutions and the classifier, as in the paper.

    The matrix products of attention and non-local blocks count too, which published figures leave out. Counted on
    tensors without data, so any size takes about a second; the model itself is neither run nor changed. Raises
    UserError for a size that the model does not take.
    """
    model = copy.deepcopy(model).to("meta").eval()
    try:
        return count_macs_of(lambda: model(torch.empty((1, *clip_size), device="meta")))
    except (RuntimeError, ValueError) as error:
        size = " x ".join(map(str, clip_size[1:]))
        raise UserError(f"the network does not take clips of {size}: {error}") from error


def count_macs_of(call: Call) -> int:
    """Multiply-adds of what a function runs, without gradients: of one layer on its input, for example."""
    counter = CostCounter()
    with counter, torch.no_grad():
        call()
    return sum(counter.costs.values(), Cost()).macs


@dataclass
class Cost:
    """What something runs: kernels are operations that are no views, bytes those of their inputs and outputs."""

    macs: int = 0
    bytes_moved: int = 0
    kernels: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        kernels = self.kernels + other.kernels
        return Cost(self.macs + other.macs, self.bytes_moved + other.bytes_moved, kernels)


class CostCounter(TorchDispatchMode):
    """Adds up every operation's cost to that of `layer`, by torch.utils.flop_counter's formulas for multiply-adds."""

    only_counts = True  # octave layers do as they would without it

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = ""
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket in _FREE:
            return output
        cost = self.costs[self.layer]
        if formula := flop_registry.get(func.overloadpacket):
            cost.macs += int(formula(*args, **(kwargs or {}), out_val=output)) // 2
        moved = 0
        for values in (args, (output,)):
            for value in values:
                for x in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(x, Tensor):
                        moved += x.numel() * x.element_size()
        if moved:
            cost.bytes_moved += moved
            cost.kernels += 1
        if func is torch.ops.aten.convolution.default and output.is_meta:  # where it loses the memory format
            output = keep_layout(output, args[0])
        return output


_FREE = {
    *(torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty),
    torch.ops.prim.device,
}


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def time_interleaved(
    calls: Sequence[Call], *, rounds: int, warmup: int = 1, device: Device = "cpu", after_each: Call = lambda: None
) -> list[list[float]]:
    """Seconds that each of several functions takes in each of `rounds`, called in turn: A B C, A B C, ...

    A machine that gets slower or faster does so for all of them, so ratios within a round stay true. On "cuda" each
    measurement waits for the device. `after_each` runs after every call, outside the measured time.
    """
    if rounds < 1 or warmup < 0:
        raise UserError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    wait: Call = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(warmup + rounds):
        for call, taken in zip(calls, seconds, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
            after_each()
    return [taken[warmup:] for taken in seconds]


def hardware(device: str) -> str:
    """The name of the GPU, or of the CPU and its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
