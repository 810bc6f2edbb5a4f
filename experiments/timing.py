"""Times functions against each other: in blocks of calls, on a CPU or by a GPU's own clock."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]


def time_block(call: Call, device: str, steps: int, dropped: int) -> float:
    """Seconds of a call: the median over a block of calls in a row, of which the first ones are dropped.

    The first calls after another network's pay for memory that the allocator has to give back and to find.
    """
    if device == "cuda":
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        moments: list[float] = [events[0].elapsed_time(event) / 1000 for event in events]
    else:
        moments = [time.perf_counter()]
        for _ in range(steps):
            call()
            moments.append(time.perf_counter())
    return statistics.median(end - start for start, end in list(itertools.pairwise(moments))[dropped:])


def time_blocks(
    calls: Sequence[Call], device: str, *, rounds: int, steps: int, dropped: int = 2, after_each: Call = lambda: None
) -> list[list[float]]:
    """Seconds of each call in each round; a round has a block of `steps` calls for each of them, in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            taken.append(time_block(call, device, steps, dropped))
            after_each()
    return seconds


def run_kernels(call: Call) -> list[tuple[str, float]]:
    """Name and seconds of every CUDA kernel that a call runs, in order; copies by the driver are left out."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    device = torch._C._autograd.DeviceType.CUDA
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in profiler.events() or ()
        if event.device_type == device
        and not getattr(event, "is_user_annotation", False)  # ranges, not kernels
        and not event.name.startswith(("Memcpy", "Memset", "Context Sync"))
    ]


def most_expensive(kernels: Sequence[tuple[str, float]], most: int = 12) -> list[dict[str, Any]]:
    """The kernels on which most time is spent, equal names together."""
    found: dict[str, list[float]] = {}
    for name, seconds in kernels:
        found.setdefault(name, []).append(seconds)
    rows = [{"name": name[:120], "times": len(taken), "seconds": sum(taken)} for name, taken in found.items()]
    return sorted(rows, key=lambda row: -cast(float, row["seconds"]))[:most]


def measure_ceilings(device: str, side: int = 8192, copied: int = 2**30) -> dict[str, float]:
    """What a device can do: bf16 FLOP/s of a matrix product, bytes/s of a copy, seconds to launch a small kernel."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copied, device=device, dtype=torch.uint8)
    target, small = torch.empty_like(source), torch.zeros(16, device=device)

    def launches() -> None:
        for _ in range(200):
            small.add_(1)

    def best(call: Call) -> float:
        return min(time_block(call, device, 6, 2) for _ in range(2))

    return {
        "flops_per_second": 2 * side**3 / best(lambda: torch.mm(a, b)),
        "bytes_per_second": 2 * copied / best(lambda: target.copy_(source)),
        "seconds_per_launch": best(launches) / 200,
    }
