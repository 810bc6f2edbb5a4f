"""Where octave features were merged into the vanilla tensor: by which function, in which module; warned of once."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CURE = "keep the convolutions that lead there at alpha 0, by skip=... or {regex: 0}"


class Merge(NamedTuple):
    """One merge: by which function, while a method of which module ran (if any), of which low maps."""

    module: nn.Module | None
    function: str
    lows: tuple[Tensor, ...]


_collectors: list[list[Merge]] = []
_warned: set[tuple[type, str]] = set()


@contextmanager
def collected() -> Iterator[list[Merge]]:
    """The merges of the block, in order; they are neither reported nor warned of, and strict networks allow them."""
    merges: list[Merge] = []
    _collectors.append(merges)
    try:
        yield merges
    finally:
        _collectors.pop()


def record(function: str, shape: Sequence[int], *lows: Tensor) -> None:
    """Notes that a function without a meaning on two maps acts on the merged tensor of octave features.

    Goes to the `octave_report` of the innermost network that octavize changed and that is running, which warns the
    first time, or raises TypeError if the network is strict; without one, warns once per class of module and function.

    Args:
        function: its name, such as "flatten".
        shape: of the merged tensor.
        lows: the low maps that were merged, by which a tracer finds the convolutions that made them.
    """
    if torch.compiler.is_compiling():
        return
    running = _running_modules()
    module = next(running, None)
    if _collectors:
        _collectors[-1].append(Merge(module, function, lows))
        return
    around = (outer for outer in (module, *running) if outer is not None and "octave_report" in outer.__dict__)
    if root := next(around, None):
        report: Any = root.octave_report
        report.record_merge(root, module, function, shape)
    elif (key := (type(module), function)) not in _warned:
        _warned.add(key)
        where = f"{type(module).__name__}.{function}" if module else function
        warnings.warn(f"{where} merges octave features of shape {tuple(shape)}: {CURE}", stacklevel=3)


def _running_modules() -> Iterator[nn.Module]:
    """The modules of which a method is running, from the inside out."""
    frame: FrameType | None = sys._getframe(2)
    last: Any = None
    while frame:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module) and first is not last:
            last = first
            yield first
        frame = frame.f_back
