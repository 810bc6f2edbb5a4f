"""Compares the fused passes' operators with their eager reference, on random maps of awkward shapes.

python experiments/passes.py [--device cuda] [--dtype bf16] [--cases 100]

On a CPU the kernels run in Triton's interpreter (set TRITON_INTERPRET=1), which takes a second or so for each case.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octvideo.layers import finishing
from octvideo.layers.resampling import lay_channels_last


class Case(NamedTuple):
    """A pass: the size of the high map, and what there is to do."""

    size: tuple[int, int, int, int]  # B, T, H, W
    channels: tuple[int, int]
    add: str  # none; joined: of all channels, at low resolution; low, high: for the high map, at that resolution
    norm: str  # none, batch, frozen
    plus: bool
    activation: str


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Random ones of all that there are."""
    sizes = ((2, 2, 6, 4), (1, 2, 7, 5), (2, 1, 1, 1), (1, 1, 4, 1), (1, 2, 9, 12))
    channels = ((20, 7), (48, 16), (1, 2), (56, 8), (130, 70))
    activations, norms = finishing.ACTIVATIONS, ("none", "batch", "frozen")
    every = itertools.product(sizes, channels, ("none", "joined", "low", "high"), norms, (False, True), activations)
    fit = [case for case in itertools.starmap(Case, every) if not (case.plus and case.activation == "silu")]
    yield from random.Random(seed).sample(fit, min(count, len(fit)))


def distance(a: Tensor, b: Tensor) -> float:
    """The relative error of a to b; 0 where both are rounding errors."""
    scale = b.double().norm()
    return float((a.double() - b.double()).norm() / scale) if scale > 1e-3 * b.numel() ** 0.5 else 0.0


def errors(case: Case, device: str, dtype: torch.dtype, kernels: Any = torch.ops.octvideo) -> dict[str, float]:
    """Of statistics, outputs and gradients, to the eager reference in 64 bits."""
    (b, t, high_h, high_w), (ch, cl) = case.size, case.channels
    extent, half = (t, high_h, high_w), (t, -(-high_h // 2), -(-high_w // 2))

    def drawn(channels: int, size: tuple[int, int, int]) -> Tensor:
        return lay_channels_last((torch.randn(b, channels, *size) * 2 + 1).to(device, dtype))

    high, low = drawn(ch, extent), drawn(cl, half)
    add = {"none": None, "joined": drawn(ch + cl, half), "low": drawn(ch, half), "high": drawn(ch, extent)}[case.add]
    low_add = drawn(cl, half) if case.add in ("low", "high") else None
    pluses = (drawn(ch, extent), drawn(cl, half)) if case.plus else (None, None)
    maps, of_batch = (high, add, low, low_add), case.norm == "batch" and low.numel() > cl
    found: dict[str, float] = {}

    def wide(values: Any) -> list[Any]:
        return [x.double() if isinstance(x, Tensor) else x for x in values]

    running = [torch.randn(ch + cl, device=device), torch.rand(ch + cl, device=device) + 0.5]
    mean, var = running if case.norm != "none" else (None, None)
    weight, bias = (
        (torch.randn(ch + cl, device=device) + 1, torch.randn(ch + cl, device=device))
        if mean is not None
        else (None, None)
    )
    if of_batch:
        others = [x.double() for x in running]
        exact = finishing._statistics(*wide((*maps, *others, 0.1)))
        mean, var = kernels.statistics(*maps, *running, 0.1)
        pairs = zip((mean, var, *running), (*exact, *others), strict=True)
        found["statistics"] = max(distance(own, true) for own, true in pairs)
    norm, how = (mean, var, weight, bias, 1e-5), (*pluses, of_batch, case.activation, True)
    outputs, exact_outputs = kernels.finish(*maps, *norm, *how), finishing._finish(*wide((*maps, *norm, *how)))
    found["outputs"] = max(distance(own, true) for own, true in zip(outputs, exact_outputs, strict=True))
    for given in ((True, True, True), (True, True, False), (False, False, True)):
        grads = [
            x if give else None
            for x, give in zip((drawn(ch, extent), drawn(cl, half), drawn(ch, half)), given, strict=True)
        ]
        outs: Any = outputs[:2] if case.plus and case.activation != "none" else (None, None)
        rest = (*outs, case.plus, of_batch, case.activation)
        own = kernels.finish_backward(*grads, *maps, *norm, *rest)
        true = finishing._finish_backward(*wide((*grads, *maps, *norm, *rest)))
        assert [x.shape for x in own] == [x.shape for x in true]
        # A batch norm of few values has gradients near 0, all of them rounding errors.
        if not of_batch or b * t * half[1] * half[2] >= 8:
            worst = max(distance(x, y) for x, y in zip(own, true, strict=True) if x.numel())
            found["gradients"] = max(found.get("gradients", 0.0), worst)
    return found


def compare(device: str, dtype: torch.dtype, count: int, kernels: Any = torch.ops.octvideo) -> dict[str, float]:
    """The largest errors of `count` cases."""
    torch.manual_seed(0)
    found: dict[str, float] = {}
    for case in cases(count):
        for name, value in errors(case, device, dtype, kernels).items():
            if not value < (3e-2 if dtype == torch.bfloat16 else 1e-3):
                raise ArithmeticError(f"{name} of {case} is off by {value:.1e}")
            found[name] = max(found.get(name, 0.0), value)
    return found


def main() -> None:
    """Prints the largest errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cases", type=int, default=100, metavar="N")
    options = parser.parse_args()
    kernels: Any = torch.ops.octvideo
    if options.device == "cpu":
        from octvideo.layers import kernels
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    print(compare(options.device, dtype, options.cases, kernels))


if __name__ == "__main__":
    main()
