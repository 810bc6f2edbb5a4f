"""Turn the convolutions of any network into octave convolutions, in place, and report what changed."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from octvideo.errors import UserError
from octvideo.layers.convolution import OctaveOptions, OctConv2d, OctConv3d, misalignment
from octvideo.layers.swapping import original_class, swap_class

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Assignment:
    """What became of one convolution: `low` of its output `channels` are low, or the `reason` why it stayed vanilla."""

    name: str
    channels: int
    alpha: float
    low: int
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The alpha of every convolution of a network, and why some stayed vanilla; `print` it."""

    network: str
    assignments: tuple[Assignment, ...]
    replaced: tuple[str, ...] = ()  # names of pytorchvideo's Swish modules, which became nn.SiLU

    def __str__(self) -> str:
        octave = sum(not assignment.reason for assignment in self.assignments)
        lines = [f"{self.network}: {octave} of {len(self.assignments)} convolutions are octave"]
        width = max((len(assignment.name) for assignment in self.assignments), default=0)
        for part in self.assignments:
            what = part.reason or f"alpha {part.alpha:g}: {part.channels - part.low} high + {part.low} low channels"
            lines.append(f"  {part.name:{width}}  {what}")
        lines += [f"  {name:{width}}  replaced by nn.SiLU, the same function" for name in self.replaced]
        return "\n".join(lines)


def octavize(
    model: Network,
    alpha: float | Mapping[str, float] = 0.25,
    *,
    temporal: bool = False,
    skip: str | Iterable[str] = (),
    downsample: Literal["conv", "pool"] = "conv",
    channels_last: bool = False,
    round_to: int = 1,
) -> Network:
    """Gives every nn.Conv2d and nn.Conv3d of a network an alpha, in place; the weights stay untouched.

    Calling it again sets every option anew; alpha 0 with the other options left out restores the vanilla network.
    Otherwise the network's `octave_report` is a `Report`.

    Args:
        alpha: share of low channels, in [0, 1]: a number for every convolution except those that read the network's
            input, lie inside attention layers, or have a stride or padding that would misalign the two maps; or
            {regex: number}, where the first regex found in a convolution's name (`named_modules`) decides, else 0.
        temporal: halve time as well as height and width (3-D convolutions).
        skip: a regex, or several, of names that stay at alpha 0 whatever `alpha` says.
        downsample: "pool" averages for a spatial stride of 2 at alpha 0 too, as octave convolutions do: a fair control.
        channels_last: use that memory format, and run factorised convolutions as 2-D: faster, and equal up to rounding.
        round_to: rounds the number of low channels to a multiple; see `octvideo.layers.convolution.split_channels`.

    Raises UserError, and changes nothing, for an invalid option or regex, for one that matches no convolution or does
    not suit it, and for a network in which none could become octave, such as a transformer.
    """
    defaults = OctaveOptions(0, temporal, downsample, channels_last, round_to)
    plan = _plan(model, alpha, (skip,) if isinstance(skip, str) else tuple(skip), defaults)
    vanilla = not any(options.alpha for _, options, _ in plan) and downsample == "conv" and not channels_last
    for module, options, _ in plan:
        if octave := _octave_class(module):
            for name in ("kernel_size", "stride", "padding", "dilation", "_reversed_padding_repeated_twice"):
                # pytorchvideo leaves numpy's integers, which torch.compile cannot trace.
                if not isinstance(value := getattr(module, name), str):
                    setattr(module, name, tuple(map(int, value)))
            if not vanilla:
                swap_class(module, octave)
                module.set_options(options)
            elif type(module) is octave:
                _restore(module)
    replaced = []
    for name, layer in model.named_modules():
        kind = original_class(layer)
        if (kind.__module__, kind.__name__) == ("pytorchvideo.layers.swish", "Swish"):  # octaves cannot pass it
            replaced.append(name)
            swap_class(layer, kind if vanilla else nn.SiLU)
            layer.__dict__.pop("inplace", None)
            layer.__dict__.update({} if vanilla else {"inplace": False})
    model.__dict__.pop("octave_report", None)
    if not vanilla:
        lines = tuple(line for *_, line in plan)
        model.__dict__["octave_report"] = Report(type(model).__name__, lines, tuple(replaced))
    return model


def _plan(
    model: nn.Module, alpha: float | Mapping[str, float], skip: tuple[str, ...], defaults: OctaveOptions
) -> list[tuple[Any, OctaveOptions, Assignment]]:
    """Each convolution with its options and its line of the report; raises what octavize does, and changes nothing."""
    modules: dict[str, Any] = dict(model.named_modules())
    convolutions = {name: module for name, module in modules.items() if isinstance(module, nn.modules.conv._ConvNd)}
    possible = [name for name, module in convolutions.items() if _octave_class(module)]
    attention = {  # compares tokens or positions with each other: all must be at one resolution
        layer: type(module).__name__
        for layer, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        or re.search(r"Attention(2d|3d)?$|^non_?local$", type(module).__name__, re.I)
    }
    hint = f", a transformer ({len(attention)} attention layers; octaves are for convolutional networks),"
    described = type(model).__name__ + (hint if attention else "")
    if not possible:
        raise UserError(f"{described} has no nn.Conv2d or nn.Conv3d that could become octave")
    for pattern in (*(alpha if isinstance(alpha, Mapping) else ()), *skip):
        try:
            if not any(re.search(pattern, name) for name in possible):
                raise UserError(f"no convolution of {type(model).__name__} has a name that matches {pattern!r}")
        except re.error as error:
            raise UserError(f"invalid regex {pattern!r}: {error}") from error

    # The network's input is read by the first convolution, and by others of as few channels (RGB): SlowFast has two
    # stems. A network whose input has more than 4 channels is taken to have one.
    first = next(iter(convolutions.values()))
    plan = []
    for name, module in convolutions.items():
        problem = misalignment(module, defaults.temporal)
        share, reason = 0.0, ""
        if is_parametrized(module):
            reason = "its weight is parametrized"
        elif name not in possible:
            reason = f"{type(module).__name__} is no nn.Conv2d or nn.Conv3d, or convolves in its own way"
        elif any(re.search(pattern, name) for pattern in skip):
            reason = "skip matches its name"
        elif isinstance(alpha, Mapping):
            shares = [value for pattern, value in alpha.items() if re.search(pattern, name)]
            share, reason = (shares[0], "") if shares else (0.0, "no regex of alpha matches its name")
        elif module is first or module.in_channels == first.in_channels <= 4:
            reason = "it reads the network's input"
        elif around := [kind for layer, kind in attention.items() if name.startswith(f"{layer}.")]:
            reason = f"it is inside an attention layer, {around[0]}"
        else:
            share, reason = (0.0, problem) if problem else (alpha, "")
        if share and problem:
            raise UserError(f"{name}: {problem}; skip it")
        temporal = defaults.temporal and len(module.kernel_size) == 3
        downsample = "conv" if problem or reason else defaults.downsample
        try:
            options = replace(defaults, alpha=share, temporal=temporal, downsample=downsample)
            if name in possible:
                options.check(module)
        except UserError as error:
            raise UserError(f"{name}: {error}; skip it, or choose another alpha for it") from error
        channels, low = module.out_channels, options.split(module.out_channels)[1]
        if not low and not reason:
            reason = f"{channels} channels have no low one at alpha {share:g}" if share else "alpha 0"
        plan.append((module, options, Assignment(name, channels, share, low, reason and f"left: {reason}")))
    if not isinstance(alpha, Mapping) and alpha > 0 and not any(options.alpha for _, options, _ in plan):
        lines = "; ".join(f"{left.name} is {left.reason}" for _, _, left in plan[:3])
        raise UserError(f"{described} has no convolution that could become octave: {lines}")
    return plan


def _octave_class(module: nn.Module) -> type[OctConv2d | OctConv3d] | None:
    """The class that a convolution may take; a subclass of nn.Conv2d or nn.Conv3d must convolve as its base does."""
    kind: Any = type(module)
    if not (is_parametrized(module) or isinstance(module, LazyModuleMixin)):  # their classes have other work
        for plain, octave in ((nn.Conv2d, OctConv2d), (nn.Conv3d, OctConv3d)):
            as_base = kind.forward is plain.forward and kind._conv_forward is plain._conv_forward
            if kind is octave or (isinstance(module, plain) and as_base):
                return octave
    return None


def _restore(module: nn.Module) -> None:
    """Makes an octave convolution what it was; a module built as octave becomes its plain base."""
    swap_class(module, original_class(module))
    bases: dict[type, type] = {OctConv2d: nn.Conv2d, OctConv3d: nn.Conv3d}
    module.__class__ = bases.get(type(module), type(module))
    for name in vars(OctConv2d(1, 1, 1, device="meta")).keys() - vars(nn.Conv2d(1, 1, 1, device="meta")).keys():
        module.__dict__.pop(name, None)
