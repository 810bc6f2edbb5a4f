"""Turn the convolutions of any network into octave convolutions, in place, and report what changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from octvideo.errors import UserError
from octvideo.layers.convolution import OctaveOptions, OctConv2d, OctConv3d, misalignment, split_channels

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Assignment:
    """What became of one convolution.

    Attributes:
        name: its name among the network's modules.
        channels: its output channels.
        alpha: the share of them that is low.
        low: how many of them are low.
        reason: why it was left at alpha 0; empty for an octave convolution.
    """

    name: str
    channels: int
    alpha: float
    low: int
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Which convolution got which alpha, and which were left alone and why; `print` it.

    Attributes:
        network: the network's class.
        assignments: one for each convolution, in the order of `named_modules`.
        exchanged: names of other modules that were exchanged for their equals, such as pytorchvideo's Swish.
    """

    network: str
    assignments: tuple[Assignment, ...]
    exchanged: tuple[str, ...] = ()

    def __str__(self) -> str:
        octave = [assignment for assignment in self.assignments if not assignment.reason]
        lines = [f"{self.network}: {len(octave)} of {len(self.assignments)} convolutions are octave"]
        width = max((len(assignment.name) for assignment in self.assignments), default=0)
        for assignment in self.assignments:
            high, low = assignment.channels - assignment.low, assignment.low
            what = assignment.reason or f"alpha {assignment.alpha:g}: {high} high + {low} low channels"
            lines.append(f"  {assignment.name:{width}}  {what}")
        lines += [f"  {name:{width}}  exchanged for nn.SiLU, the same function" for name in self.exchanged]
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

    Calling it again re-assigns every option, those that are left out too. Alpha 0 everywhere, with the other options
    left out, restores the vanilla network.

    Args:
        model: any network of ordinary modules.
        alpha: share of low channels: a number for every convolution except those that read the network's input, those
            inside attention layers and those whose stride or padding would move the two maps apart; or {regex: number},
            of which a convolution takes the first whose regex is found in its name (re.search on the name of
            `named_modules`), else 0.
        temporal: halve time as well as height and width (3-D convolutions).
        skip: a regex, or several, of names that keep alpha 0 whatever `alpha` says.
        downsample: "pool" makes every convolution that `alpha` names, at alpha 0 too, average-pool for a spatial stride
            of 2, as octave convolutions do: the fair control for an octave network.
        channels_last: every convolution, at alpha 0 too, lays channels last in memory and runs as a 2-D one where it is
            factorised (1 x k x k, k x 1 x 1), as octave convolutions always do: faster, and equal up to rounding.
        round_to: rounds the number of low channels of each convolution to a multiple; 16 is faster at alphas such as
            .1, but changes how much is low. See `octvideo.layers.convolution.split_channels`.

    Returns:
        The same model. Its attribute `octave_report` says which convolution got which alpha and which were left and
        why: `print(model.octave_report)`. A vanilla network has none.

    Raises:
        ValueError: an alpha outside [0, 1], groups that cannot be split, a regex that is none, that no convolution
            matches or that gives an alpha to one whose stride or padding moves the maps apart, or no convolution that
            could become octave, as in a transformer.
    """
    OctaveOptions(0, temporal, downsample, channels_last, round_to)
    convolutions = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)
    }
    possible = {name: octave for name, module in convolutions.items() if (octave := _octave_class(module))}
    if not possible:
        raise UserError(f"{_describe(model)} has no nn.Conv2d or nn.Conv3d that could become octave")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    for pattern in (*(alpha if isinstance(alpha, Mapping) else ()), *skip):
        try:
            found = any(re.search(pattern, name) for name in possible)
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from error
        if not found:
            raise UserError(f"no convolution of {type(model).__name__} has a name that matches {pattern!r}")
    reasons = _reasons(model, convolutions, alpha, skip, temporal)
    alphas = {name: 0.0 if name in reasons else _alpha_of(name, alpha) for name in convolutions}
    if not isinstance(alpha, Mapping) and alpha > 0 and len(reasons) == len(convolutions):
        lines = "; ".join(f"{name} is {reason}" for name, reason in list(reasons.items())[:3])
        raise UserError(f"{_describe(model)} has no convolution that could become octave: {lines}")
    for name in possible:  # before anything changes
        try:
            OctaveOptions(alphas[name], round_to=round_to).check(convolutions[name])
        except ValueError as error:
            raise UserError(f"{name}: {error}; skip it, or choose another alpha for it") from error
        problem = misalignment(convolutions[name], temporal)
        if alphas[name] and problem:
            raise UserError(f"{name}: {problem}; skip it")

    vanilla = not any(alphas.values()) and downsample == "conv" and not channels_last
    for name, octave in possible.items():
        module: Any = convolutions[name]
        _plain_ints(module)
        if not vanilla:
            _swap_class(module, octave)
            pools = name not in reasons and not misalignment(module, temporal)
            module.set_options(
                OctaveOptions(
                    alphas[name],
                    temporal=temporal and octave is OctConv3d,
                    downsample=downsample if pools else "conv",
                    channels_last=channels_last,
                    round_to=round_to,
                )
            )
        elif isinstance(module, (OctConv2d, OctConv3d)):
            _swap_class(module, getattr(module, "_vanilla_class", nn.Conv2d if octave is OctConv2d else nn.Conv3d))
            for attribute in ("options", "_plan", "_vanilla_class"):
                module.__dict__.pop(attribute, None)
    exchanged = _exchange_swish(model, vanilla)
    model.__dict__.pop("octave_report", None)
    if not vanilla:
        assignments = tuple(
            _assignment(name, module, alphas[name], reasons, round_to) for name, module in convolutions.items()
        )
        model.octave_report = Report(type(model).__name__, assignments, exchanged)  # type: ignore[assignment]
    return model


def _octave_class(module: nn.Module) -> type[OctConv2d | OctConv3d] | None:
    """The class that a convolution may take; a subclass of nn.Conv2d or nn.Conv3d must convolve as its base does."""
    kind: Any = type(module)
    if is_parametrized(module) or isinstance(module, LazyModuleMixin):  # their classes have other work
        return None
    for vanilla, octave in ((nn.Conv2d, OctConv2d), (nn.Conv3d, OctConv3d)):
        if kind is octave:
            return octave
        if (
            isinstance(module, vanilla)
            and kind.forward is vanilla.forward
            and kind._conv_forward is vanilla._conv_forward
        ):
            return octave
    return None


def _alpha_of(name: str, alpha: float | Mapping[str, float]) -> float:
    """The alpha that the argument gives to a convolution that it names."""
    if isinstance(alpha, Mapping):
        return next(value for pattern, value in alpha.items() if re.search(pattern, name))
    return alpha


def _reasons(
    model: nn.Module,
    convolutions: Mapping[str, Any],
    alpha: float | Mapping[str, float],
    skip: tuple[str, ...],
    temporal: bool,
) -> dict[str, str]:
    """Why convolutions are left at alpha 0, of those that cannot be octave or that the arguments leave there."""
    attention = {layer: type(module).__name__ for layer, module in model.named_modules() if _is_attention(module)}
    # The convolutions that read the network's input: the first one, and others that read as few channels (RGB), since
    # SlowFast has two such stems. A network whose input has more than 4 channels is taken to have one.
    first, stem = next(iter(convolutions.items()))
    reasons: dict[str, str] = {}
    for name, module in convolutions.items():
        around = next((kind for layer, kind in attention.items() if name.startswith(f"{layer}.")), None)
        if is_parametrized(module):
            reasons[name] = "left: its weight is parametrized"
        elif not _octave_class(module):
            kind = type(module).__name__
            reasons[name] = f"left: {kind} is no nn.Conv2d or nn.Conv3d, or convolves in its own way"
        elif any(re.search(pattern, name) for pattern in skip):
            reasons[name] = "left: skip matches its name"
        elif isinstance(alpha, Mapping):
            if not any(re.search(pattern, name) for pattern in alpha):
                reasons[name] = "left: no regex of alpha matches its name"
        elif name == first or module.in_channels == stem.in_channels <= 4:
            reasons[name] = "left: it reads the network's input"
        elif around:
            reasons[name] = f"left: it is inside an attention layer, {around}"
        elif problem := misalignment(module, temporal):
            reasons[name] = f"left: {problem}"
    return reasons


def _assignment(name: str, module: Any, alpha: float, reasons: Mapping[str, str], round_to: int) -> Assignment:
    """What became of a convolution; one whose channels are too few for a low one stays vanilla too."""
    low = split_channels(module.out_channels, alpha, round_to)[1]
    too_few = f"left: {module.out_channels} channels have no low one at alpha {alpha:g}" if alpha else "left: alpha 0"
    return Assignment(name, module.out_channels, alpha, low, reasons.get(name, "" if low else too_few))


def _is_attention(module: nn.Module) -> bool:
    """Whether a module compares tokens or cells with each other, of which no share can be at another resolution."""
    name = type(module).__name__
    return (
        isinstance(module, nn.MultiheadAttention)
        or re.search(r"Attention(2d|3d)?$|^non_?local$", name, re.I) is not None
    )


def _describe(model: nn.Module) -> str:
    """The network's class, and whether it is a transformer."""
    layers = sum(_is_attention(module) for module in model.modules())
    transformer = (
        f", a transformer ({layers} attention layers; octaves are for convolutional networks)," if layers else ""
    )
    return f"{type(model).__name__}{transformer}"


def _swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a module another class, and keeps the class it had."""
    if type(module) is not kind:
        module._vanilla_class = type(module)  # type: ignore[assignment]
        module.__class__ = kind


def _exchange_swish(model: nn.Module, vanilla: bool) -> tuple[str, ...]:
    """Exchanges pytorchvideo's Swish, an autograd function that octaves cannot pass, for nn.SiLU, or back."""
    names = []
    for name, module in model.named_modules():
        kind: Any = type(module)
        if not vanilla and (kind.__module__, kind.__name__) == ("pytorchvideo.layers.swish", "Swish"):
            _swap_class(module, nn.SiLU)
            module.inplace = False  # type: ignore[assignment]
        if kind is nn.SiLU and vanilla and "_vanilla_class" in module.__dict__:
            module.__class__ = module.__dict__.pop("_vanilla_class")
            del module.inplace
        if type(module) is nn.SiLU and "_vanilla_class" in module.__dict__:
            names.append(name)
    return tuple(names)


def _plain_ints(module: nn.Module) -> None:
    """Makes sizes Python ints: pytorchvideo leaves numpy integers, which torch.compile cannot trace."""
    for name in ("kernel_size", "stride", "padding", "dilation", "_reversed_padding_repeated_twice"):
        value = getattr(module, name)
        if not isinstance(value, str):
            setattr(module, name, tuple(int(entry) for entry in value))
