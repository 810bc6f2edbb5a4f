"""What became of a network: the alpha of every convolution, what merged, and what was gained."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from octvideo.layers.merging import CURE
from octvideo.layers.shares import Shares, say_shares
from octvideo.models.cost import Cost
from octvideo.models.roofline import MACHINES, Machine

Change = tuple[int, int]  # before -> after
MACHINE = MACHINES["h100"]  # for which reports predict time


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What vanilla and octave cost on the sample, if octavize was given one: `costs`, in eval mode."""

    costs: tuple[Cost, Cost] | None = None
    dtype: torch.dtype = torch.float32  # of the sample's arithmetic

    def _both(self, name: str) -> Change | None:
        return self.costs and (getattr(self.costs[0], name), getattr(self.costs[1], name))

    macs = property(lambda self: self._both("macs"), doc="Multiply-adds.")
    bytes_moved = property(lambda self: self._both("bytes_moved"), doc="Bytes read and written.")
    kernels = property(lambda self: self._both("kernels"), doc="Operations that are no views.")

    def seconds(self, machine: Machine = MACHINE) -> tuple[float, float] | None:
        """Predicted seconds on a machine, in float32 where it knows no other; see `octvideo.models.roofline`."""
        dtype = self.dtype if self.dtype in machine.flops else torch.float32
        return self.costs and (machine.seconds(self.costs[0], dtype), machine.seconds(self.costs[1], dtype))


@dataclass(frozen=True)
class Assignment(Compared):
    """What became of one convolution: how many output channels are in each low octave, or why it stayed vanilla."""

    name: str
    channels: int
    alpha: Shares
    lows: tuple[int, ...]  # at half the resolution, a quarter ...
    reason: str = ""
    low = property(lambda self: sum(self.lows), doc="Number of low channels.")


@dataclass(frozen=True)
class Report(Compared):
    """The alpha of every convolution of a network, and why some stayed vanilla; `print` it.

    `merges` counts by (module name, function) how often a function without a meaning on two maps acted
    on the merged tensor: with the sample, and in every forward pass since that was not compiled.
    """

    network: str
    assignments: tuple[Assignment, ...]
    replaced: tuple[str, ...] = ()  # names of pytorchvideo's Swish modules, which became nn.SiLU
    parameters: int = 0
    strict: bool = False
    elsewhere: Counter[str] = field(default_factory=Counter)  # vanilla MACs outside convolutions, by class of module
    notes: tuple[str, ...] = ()  # what could not be known
    merges: Counter[tuple[str, str]] = field(default_factory=Counter)

    def record_merge(self, root: nn.Module, module: nn.Module, function: str, shape: Sequence[int]) -> None:
        """Counts a merge in a module of the network, `root`: warns of the first; raises TypeError if `strict`."""
        names = (name for name, part in root.named_modules() if part is module)
        name = next(names, type(module).__name__)
        if self.strict:
            raise TypeError(merge_error(self.network, name, function, f" of shape {tuple(shape)}"))
        if not self.merges:
            where = f"{function} of {name or self.network}"
            what = f"{where} acts on the merged tensor of octave features, which costs time"
            warnings.warn(f"{what}; print(network.octave_report) lists all that do: {CURE}", stacklevel=4)
        self.merges[name, function] += 1

    def __str__(self) -> str:
        octave = sum(not assignment.reason for assignment in self.assignments)
        lines = [f"{self.network}: {octave} of {len(self.assignments)} convolutions are octave"]
        width = max((len(assignment.name) for assignment in self.assignments), default=0)
        for part in self.assignments:
            lows = " + ".join(f"{count} at 1/{2 << i}" for i, count in enumerate(part.lows) if part.lows[1:])
            split = f"{part.channels - part.low} high + {lows or f'{part.low} low'} channels"
            what = part.reason or f"alpha {say_shares(part.alpha)}: {split}"
            if part.macs and part.bytes_moved and not part.reason:
                what += f"; MACs {_change(part.macs)}, bytes {_change(part.bytes_moved)}{_slower(part)}"
            lines.append(f"  {part.name:{width}}  {what}")
        lines += [f"  {name:{width}}  replaced by nn.SiLU, the same function" for name in self.replaced]
        for (name, function), times in self.merges.items():
            lines.append(f"  {name or self.network:{width}}  merges in {function}, {times} time{'s' * (times > 1)}")
        return "\n".join([*lines, *self.notes, self.summary()])

    def summary(self) -> str:
        """One line: what is gained, or what ate it, or what is not known."""
        if not self.macs or not self.bytes_moved:
            return "pass sample= (a clip, or the forward's arguments) to know multiply-adds, bytes and merges"
        costs = f"MACs {_change(self.macs)}, bytes {_change(self.bytes_moved)}{_slower(self)}"
        merges = f"{len(self.merges)} merge{'s' * (len(self.merges) != 1)}"
        parameters = f"{self.parameters / 1e6:.1f} M" if self.parameters >= 1e5 else str(self.parameters)
        gained = f"{costs}, parameters {parameters}, {merges}"
        if self.macs[1] <= 0.8 * self.macs[0]:
            return gained
        eaten: Counter[str] = Counter()
        for part in self.assignments:
            if part.macs and part.reason:
                eaten[f"in convolutions {part.reason}"] += part.macs[0]
        eaten.update({f"in {kind} modules": macs for kind, macs in self.elsewhere.items()})
        shares = [f"{macs / self.macs[0]:.0%} {where}" for where, macs in eaten.most_common(3) if macs]
        why = f"of the vanilla MACs {', '.join(shares) or 'none can be saved'}"
        return f"{'' if self.macs[1] <= 0.98 * self.macs[0] else 'nothing is gained: '}{gained}; {why}"


def merge_error(network: str, name: str, function: str, shape: str = "") -> str:
    """What strict networks say of a merge."""
    return f"{function} of {name or network} would merge octave features{shape}, and strict=True allows none: {CURE}"


def _slower(compared: Compared) -> str:
    """Where the saved arithmetic cannot pay for bytes and kernels: ", slower on h100: 31.0 -> 44.0 us (1.42)"."""
    before, after = (round(1e9 * seconds) for seconds in compared.seconds() or (0, 0))
    return f", slower on {MACHINE.name}: {_change((before, after), _TIMES)}" if after > before else ""


_COUNTS = ((1e9, " G"), (1e6, " M"), (1e3, " k"))
_TIMES = ((1e9, " s"), (1e6, " ms"), (1e3, " us"))  # of nanoseconds


def _change(change: Change, units: Sequence[tuple[float, str]] = _COUNTS) -> str:
    """Two numbers with one unit, and their ratio: "41.6 -> 25.4 G (0.61)"."""
    before, after = change
    scale, unit = next((unit for unit in units if before >= unit[0] / 10), (1, ""))
    digits = 0 if scale == 1 else 1 if before >= 10 * scale else 2
    ratio = f" ({after / before:.2f})" if before else ""
    return f"{before / scale:.{digits}f} -> {after / scale:.{digits}f}{unit}{ratio}"
