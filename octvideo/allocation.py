"""An alpha for each layer: how much the loss rises where a layer alone is octave, and a choice under a budget."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octvideo.cost import count_macs
from octvideo.octavize import octavize

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
# They join channels side by side, so what they join may be split in different ways.
SIDE_BY_SIDE = (torch.cat, torch.concat, torch.concatenate)


class Sensitivity(NamedTuple):
    """What it does to a network that some convolutions are octave while all others have alpha 0.

    Args:
        names: of the convolutions, a group of `groups_that_add`.
        alpha: theirs.
        loss: how much higher it is than with alpha 0 everywhere.
        macs: how many multiply-adds of a clip fewer there are.
    """

    names: tuple[str, ...]
    alpha: float
    loss: float
    macs: int


class _Origins(TorchFunctionMode):
    """Follows from which convolutions tensors come, and joins those whose outputs meet cell by cell."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.groups: dict[str, set[str]] = {}
        self._origins: dict[int, str] = {}  # of tensors: one convolution of the group that they come from
        self._kept: list[Tensor] = []  # so that no other tensor gets their ids
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                self.groups[name] = {name}
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            depthwise = module.groups == module.in_channels == module.out_channels > 1
            self._note(output, [name, *(self._of(inputs) if depthwise else ())])

        return hook

    def _of(self, values: Iterable[Any]) -> list[str]:
        return [self._origins[id(value)] for value in values if id(value) in self._origins]

    def _note(self, output: Tensor, origins: Sequence[str]) -> None:
        joined = set().union(*(self.groups[name] for name in origins))
        for name in joined:
            self.groups[name] = joined
        self._origins[id(output)] = origins[0]
        self._kept.append(output)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        origins = self._of((*args, *(kwargs or {}).values()))
        if origins and isinstance(output, Tensor) and func not in SIDE_BY_SIDE:
            self._note(output, origins)
        return output


def groups_that_add(network: nn.Module, clip_size: Sequence[int]) -> list[tuple[str, ...]]:
    """The convolutions of a network, in groups that must have one alpha.

    Octaves are added cell by cell where they are split alike only. So the last convolutions of all blocks of a residual
    stage and its shortcut are a group, and so are a depthwise convolution and the one before it; others are alone.

    Args:
        network: of ordinary modules; it is neither run nor changed.
        clip_size: size of its input without the batch dimension, such as (3, T, H, W).

    Returns:
        Names of convolutions that can be octave (`octavize` leaves those that read the input, and those inside
        attention), in the order of `named_modules`. A group with a convolution that cannot be is left out.
    """
    model = octavize(copy.deepcopy(network), 0).to("meta").eval()
    origins = _Origins(model)
    with torch.no_grad(), origins:
        model(torch.empty((1, *clip_size), device="meta"))
    report: Any = octavize(model, 1.0).octave_report
    possible = {entry.name for entry in report.assignments if not entry.reason}
    groups = {
        name: tuple(other for other in origins.groups if other in group) for name, group in origins.groups.items()
    }
    return [group for group in dict.fromkeys(groups.values()) if possible.issuperset(group)]


def mapping_of(alphas: Mapping[str, float]) -> dict[str, float]:
    """The alphas of convolutions, given by their names, as `octavize` and `create_model` take them: {regex: number}."""
    return {f"^{re.escape(name)}$": alpha for name, alpha in alphas.items()}


def measure_sensitivities(
    network: nn.Module,
    groups: Sequence[tuple[str, ...]],
    tries: Iterable[tuple[tuple[str, ...], float]],
    loss: Callable[[nn.Module], float],
    clip_size: Sequence[int],
    options: Mapping[str, Any] = NO_OPTIONS,
) -> Iterator[Sensitivity]:
    """Makes one group of convolutions after the other octave and sees what it does.

    Args:
        network: it is changed in between, and has alpha 0 everywhere in the end.
        groups: all of `groups_that_add`.
        tries: groups, each with an alpha in (0, 1].
        loss: of the network; called once more for alpha 0 everywhere, first.
        clip_size: size of the network's input without the batch dimension, such as (3, T, H, W).
        options: others of `octavize`, such as downsample.

    Yields:
        One for each try, in their order; none for an alpha that a group's channels cannot be split at.

    Raises:
        ValueError: a loss that is not finite.
    """
    everywhere = {name: 0.0 for group in groups for name in group}

    def finite_loss(where: str) -> float:
        found = loss(network)
        if not math.isfinite(found):
            raise ValueError(f"the loss is {found} {where}")
        return found

    try:
        octavize(network, mapping_of(everywhere), **options)
        vanilla_loss, vanilla_macs = finite_loss("at alpha 0"), count_macs(network, clip_size)
        for group, alpha in tries:
            try:
                octavize(network, mapping_of(everywhere | dict.fromkeys(group, alpha)), **options)
            except ValueError:  # channel groups that it does not divide
                continue
            saved = vanilla_macs - count_macs(network, clip_size)
            rise = finite_loss(f"with alpha {alpha:g} in {', '.join(group)}") - vanilla_loss
            yield Sensitivity(group, alpha, rise, saved)
    finally:
        octavize(network, mapping_of(everywhere), **options)


def allocate(
    network: nn.Module,
    groups: Sequence[tuple[str, ...]],
    sensitivities: Iterable[Sensitivity],
    budget: float,
    clip_size: Sequence[int],
    options: Mapping[str, Any] = NO_OPTIONS,
) -> dict[str, float]:
    """Chooses an alpha for each convolution: greedily, by the least rise of the loss for a multiply-add that is saved.

    Starting from alpha 0, it takes the step (of a group of convolutions, to a higher alpha) with the least ratio until
    the network is cheap enough. Rises are taken to add up, which they do only roughly; one below 0 counts as none. What
    the network costs is counted anew after each step.

    Args:
        network: left as it was; its weights do not matter.
        groups: all of `groups_that_add`.
        sensitivities: of those groups that may be octave.
        budget: share of the multiply-adds at alpha 0 that is allowed, in (0, 1].
        clip_size: size of the network's input without the batch dimension.
        options: others of `octavize`.

    Returns:
        {regex: alpha} with an entry for each convolution of the groups, also where its alpha is 0: an option such as
        downsample is for what an entry names.

    Raises:
        ValueError: a budget out of its range, or below what the highest alphas reach.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget must lie in (0, 1], got {budget}")
    effects: dict[tuple[str, ...], dict[float, tuple[float, int]]] = {group: {0.0: (0.0, 0)} for group in groups}
    for names, alpha, loss, macs in sensitivities:
        effects[names][alpha] = (loss, macs)
    chosen = dict.fromkeys(effects, 0.0)
    model = copy.deepcopy(network).to("meta")

    def mapping() -> dict[str, float]:
        return mapping_of({name: alpha for names, alpha in chosen.items() for name in names})

    vanilla = macs = count_macs(octavize(model, mapping(), **options), clip_size)
    while macs > (budget + 1e-9) * vanilla:  # a share of whole numbers is seldom exact
        steps = []
        for names, alpha in chosen.items():
            loss_now, saved_now = effects[names][alpha]
            for higher, (loss, saved) in effects[names].items():
                if higher > alpha and saved > saved_now:
                    ratio = max(0.0, loss - loss_now) / (saved - saved_now)
                    steps.append((ratio, saved_now - saved, names, higher))
        if not steps:
            raise ValueError(
                f"{budget:g} of the multiply-adds is out of reach: at their highest alphas these convolutions leave "
                f"{macs / vanilla:.3f}"
            )
        *_, names, higher = min(steps)
        chosen[names] = higher
        macs = count_macs(octavize(model, mapping(), **options), clip_size)
    return mapping()
