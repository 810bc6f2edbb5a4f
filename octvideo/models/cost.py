"""What a network costs: multiply-adds, parameters, seconds."""

import copy
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from octvideo.errors import UserError

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
    counter = _FlopCounter()
    with counter, torch.no_grad():
        call()
    return counter.flops // 2


class _FlopCounter(TorchDispatchMode):
    """torch.utils.flop_counter's formulas for every operation, without its sums by module: 1.3 to 2.5 times faster."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += int(formula(*args, **(kwargs or {}), out_val=output))
        return output


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
