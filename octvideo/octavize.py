"""Turn the convolutions of any network into octave convolutions, in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from octvideo.conv import OctConv2d, OctConv3d, check_groups

Network = TypeVar("Network", bound=nn.Module)


def octavize(
    model: Network, alpha: float | Mapping[str, float] = 0.25, *, temporal: bool = False, skip: Iterable[str] = ()
) -> Network:
    """Gives every nn.Conv2d and nn.Conv3d of a network an alpha, in place; the weights stay untouched.

    Calling it again with another alpha re-assigns. Alpha 0 everywhere restores the vanilla network.

    Args:
        model: any network of ordinary modules.
        alpha: share of low channels: a number for every convolution except those that read the network's input, or
            {regex: number}, of which a convolution takes the first whose regex is found in its name
            (re.search on the name of `named_modules`), else 0.
        temporal: halve time as well as height and width.
        skip: regexes of names that keep alpha 0 whatever `alpha` says.

    Returns:
        The same model.

    Raises:
        ValueError: an alpha outside [0, 1], a regex that no convolution matches, or no convolution at all.
    """
    convolutions: dict[str, Any] = {name: module for name, module in model.named_modules() if _octave_class(module)}
    if not convolutions:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d or nn.Conv3d that could become octave")
    skip = tuple(skip)
    patterns = dict(alpha) if isinstance(alpha, Mapping) else {"": alpha}
    for pattern in (*patterns, *skip):
        if not any(re.search(pattern, name) for name in convolutions):
            raise ValueError(f"no convolution of {type(model).__name__} has a name that matches {pattern!r}")
    stems = set() if isinstance(alpha, Mapping) else _input_convolutions(convolutions)
    alphas = {
        name: 0.0
        if name in stems or any(re.search(pattern, name) for pattern in skip)
        else next((value for pattern, value in patterns.items() if re.search(pattern, name)), 0.0)
        for name in convolutions
    }
    for name, module in convolutions.items():  # before anything changes
        try:
            check_groups(module, alphas[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    vanilla = not any(alphas.values())
    for name, module in convolutions.items():
        _plain_ints(module)
        if not vanilla:
            octave = _octave_class(module)
            if type(module) is not octave:
                module._vanilla_class = type(module)
                module.__class__ = octave
            module.set_alpha(alphas[name], temporal and octave is OctConv3d)
        elif isinstance(module, (OctConv2d, OctConv3d)):
            base: Any = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Conv3d
            module.__class__ = getattr(module, "_vanilla_class", base)
            for attribute in ("alpha", "temporal", "_vanilla_class"):
                module.__dict__.pop(attribute, None)
    return model


def _octave_class(module: nn.Module) -> type[OctConv2d | OctConv3d] | None:
    """The class that a convolution may take; a subclass of nn.Conv2d or nn.Conv3d must convolve as its base does."""
    kind: Any = type(module)
    if is_parametrized(module):  # its class holds the parametrization, such as weight norm's
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


def _input_convolutions(convolutions: Mapping[str, Any]) -> set[str]:
    """The convolutions that read the network's input: the first one, and others that read as few channels (RGB).

    SlowFast has two such stems. A network whose input has more than 4 channels is taken to have one.
    """
    first, module = next(iter(convolutions.items()))
    channels = module.in_channels
    return {first} | {name for name, module in convolutions.items() if module.in_channels == channels <= 4}


def _plain_ints(module: nn.Module) -> None:
    """Makes sizes Python ints: pytorchvideo leaves numpy integers, which torch.compile cannot trace."""
    for name in ("kernel_size", "stride", "padding", "dilation", "_reversed_padding_repeated_twice"):
        value = getattr(module, name)
        if not isinstance(value, str):
            setattr(module, name, tuple(int(entry) for entry in value))
