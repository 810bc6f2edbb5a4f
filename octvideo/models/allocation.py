"""Chooses an alpha for each layer of a trained network under a budget: which layers lose least for what they save."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.models.cost import Cost, total
from octvideo.models.octavize import octavize
from octvideo.models.roofline import Machine
from octvideo.models.trace import Stage

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
SIDE_BY_SIDE = (torch.cat, torch.concat, torch.concatenate)  # the maps they join may be split in different ways
Group = tuple[str, ...]  # names of convolutions that must share an alpha


class Sensitivity(NamedTuple):
    """The effect of making one group of convolutions octave while all others have alpha 0."""

    names: Group  # of `groups_that_add`
    alpha: float
    loss: float  # the rise
    macs: int  # multiply-adds of the sample saved


class _Origins(TorchFunctionMode):
    """Tracks which convolutions tensors come from, and joins those whose outputs meet elementwise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.groups: dict[str, set[str]] = {}
        self.sources: dict[str, list[str]] = {}  # by convolution: one of each group that it reads
        self._origins: dict[int, str] = {}  # by id of a tensor: one convolution of the group that it comes from
        self._kept: list[Tensor] = []  # so that no other tensor gets their ids
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                self.groups[name] = {name}
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.sources[name] = self._of(inputs)
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


class Trial:
    """A copy of a network without values, to count what it costs on a sample at any alphas.

    Args:
        network: ordinary modules; neither run nor changed.
        sample: a Tensor (B, ...), or a tuple or mapping of the forward's arguments.
        options: other options of `octavize`, such as downsample.

    Raises UserError if the network does not take the sample.
    """

    def __init__(self, network: nn.Module, sample: Any, options: Mapping[str, Any] = NO_OPTIONS) -> None:
        self._stage = Stage(network, sample, lambda model: octavize(model, 0))
        self._options = options

    def groups(self) -> list[Group]:
        """The convolutions of the network, in groups that must share an alpha; see `groups_that_add`."""
        return self.flow()[0]

    def groups_at_strides(self) -> list[Group]:
        """Those that have a spatial stride, or that one reads: octaves there would make it pool."""
        groups, sources = self.flow()
        modules: dict[str, Any] = dict(self._stage.network.named_modules())
        strided = [name for name in sources if max(modules[name].stride[-2:]) > 1]
        touched = {name for each in strided for name in (each, *sources[each])}
        return [group for group in groups if not touched.isdisjoint(group)]

    def flow(self) -> tuple[list[Group], dict[str, list[str]]]:
        """The groups, and for each convolution those that its input comes from, by one name of each group."""
        model = octavize(self._stage.network, 0)
        with _Origins(model) as origins:
            self._stage.run()
        report: Any = octavize(model, 1.0).octave_report
        possible = {entry.name for entry in report.assignments if not entry.reason}
        joined = (tuple(name for name in origins.groups if name in group) for group in origins.groups.values())
        return [group for group in dict.fromkeys(joined) if possible.issuperset(group)], origins.sources

    def cost(self, alphas: Mapping[str, float]) -> Cost:
        """What one forward pass runs at the alphas of {regex: alpha}; UserError for channels that they cannot split."""
        return total(self.costs(alphas))

    def costs(self, alphas: Mapping[str, float]) -> Mapping[str, Cost]:
        """The same by the names of modules, without their children."""
        octavize(self._stage.network, alphas, **self._options)
        return self._stage.run().costs


def groups_that_add(network: nn.Module, sample: Any) -> list[Group]:
    """The convolutions of a network, in groups that must share an alpha.

    Octaves add elementwise only if they are split alike. So the last convolutions of all blocks of a residual stage and
    its shortcut are a group, as are a depthwise convolution and the one before it; others are alone. They are in the
    order of `named_modules`, and those that can be octave (`octavize` leaves those that read the input, and those
    inside attention): a group with any other convolution is left out. Arguments are those of `Trial`.
    """
    return Trial(network, sample).groups()


def mapping_of(alphas: Mapping[str, float]) -> dict[str, float]:
    """Alphas by the names of convolutions, as `octavize` and `create_model` take them: {regex: number}."""
    return {f"^{re.escape(name)}$": alpha for name, alpha in alphas.items()}


def measure_sensitivities(
    network: nn.Module,
    groups: Sequence[Group],
    tries: Iterable[tuple[Group, float]],
    loss: Callable[[nn.Module], float],
    sample: Any,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> Iterator[Sensitivity]:
    """Makes one group of convolutions after the other octave, and measures the effect.

    Args:
        network: changed meanwhile; has alpha 0 everywhere in the end.
        groups: all of `groups_that_add`.
        tries: groups, each with an alpha in (0, 1].
        loss: of the network; called first for alpha 0 everywhere.
        sample: input of the network, whose multiply-adds count; with `options` as `Trial` takes them.

    Yields:
        One for each try, in order, except where a group's channels cannot be split at the alpha.

    Raises:
        UserError: a loss that is not finite.
    """
    everywhere, trial = {name: 0.0 for group in groups for name in group}, Trial(network, sample, options)

    def finite_loss(where: str) -> float:
        found = loss(network)
        if not math.isfinite(found):
            raise UserError(f"the loss is {found} {where}")
        return found

    try:
        octavize(network, mapping_of(everywhere), **options)
        vanilla_loss, vanilla_macs = finite_loss("at alpha 0"), trial.cost(mapping_of(everywhere)).macs
        for group, alpha in tries:
            try:
                octavize(network, alphas := mapping_of(everywhere | dict.fromkeys(group, alpha)), **options)
            except ValueError:  # channel groups that it does not divide
                continue
            saved = vanilla_macs - trial.cost(alphas).macs
            rise = finite_loss(f"with alpha {alpha:g} in {', '.join(group)}") - vanilla_loss
            yield Sensitivity(group, alpha, rise, saved)
    finally:
        octavize(network, mapping_of(everywhere), **options)


def allocate(
    network: nn.Module,
    groups: Sequence[Group],
    sensitivities: Iterable[Sensitivity],
    budget: float,
    sample: Any,
    options: Mapping[str, Any] = NO_OPTIONS,
    machine: Machine | None = None,
) -> dict[str, float]:
    """Chooses an alpha for each convolution greedily, by the least rise of the loss for a saved multiply-add.

    Starting from alpha 0, it takes the step (of a group, to a higher alpha) with the least ratio until the network is
    cheap enough. Rises are assumed to add up, which holds only roughly; one below 0 counts as 0. The cost of the
    network is counted anew after each step.

    Args:
        network: left as it was; its weights do not matter.
        groups: all of `groups_that_add`.
        sensitivities: of those groups that may be octave.
        budget: allowed share of the multiply-adds at alpha 0, in (0, 1].
        sample: input of the network; with `options` as `Trial` takes them.
        machine: the budget is also for the time that this machine is predicted to take for the sample.

    Returns:
        {regex: alpha} with an entry for each convolution of the groups, also where its alpha is 0: an option such as
        downsample affects the convolutions that an entry names.

    Raises:
        UserError: a budget out of its range, or below what the highest alphas reach.
    """
    if not 0 < budget <= 1:
        raise UserError(f"budget must lie in (0, 1], got {budget}")
    effects: dict[Group, dict[float, tuple[float, int]]] = {group: {0.0: (0.0, 0)} for group in groups}
    for names, alpha, loss, macs in sensitivities:
        effects[names][alpha] = (loss, macs)
    chosen, trial = dict.fromkeys(effects, 0.0), Trial(network, sample, options)
    dtype = next((x.dtype for x in network.parameters() if x.is_floating_point()), torch.float32)

    def mapping() -> dict[str, float]:
        return mapping_of({name: alpha for names, alpha in chosen.items() for name in names})

    vanilla = cost = trial.cost(mapping())
    least = 1.0  # share of the vanilla time
    while True:
        met = cost.macs <= (budget + 1e-9) * vanilla.macs  # a share of whole numbers is seldom exact
        if met and machine is not None:
            share = machine.seconds(cost, dtype) / machine.seconds(vanilla, dtype)
            met, least = share <= budget, min(least, share)
        if met:
            return mapping()
        steps = []
        for names, alpha in chosen.items():
            loss_now, saved_now = effects[names][alpha]
            for higher, (loss, saved) in effects[names].items():
                if higher > alpha and saved > saved_now:
                    ratio = max(0.0, loss - loss_now) / (saved - saved_now)
                    steps.append((ratio, saved_now - saved, names, higher))
        if not steps:
            what, where = "the multiply-adds", "at their highest alphas these convolutions leave"
            reached = cost.macs / vanilla.macs
            if machine is not None and reached <= budget:
                what, where, reached = "the time", f"on {machine.name} the fastest choice is predicted to take", least
            raise UserError(f"{budget:g} of {what} is out of reach: {where} {reached:.3f}")
        *_, names, higher = min(steps)
        chosen[names] = higher
        cost = trial.cost(mapping())


def uniform(
    network: nn.Module, groups: Sequence[Group], tried: Sequence[Group], budget: float, sample: Any, **options: Any
) -> dict[str, float]:
    """The mapping with the lowest alpha, to .001 and the same for all groups in `tried`, that meets a budget.

    Arguments are those of `allocate`. Raises UserError for a budget out of reach, or channels that cannot be split.
    """
    trial, everywhere = Trial(network, sample, options), {name: 0.0 for group in groups for name in group}

    def mapping(alpha: float) -> dict[str, float]:
        return mapping_of(everywhere | {name: alpha for group in tried for name in group})

    vanilla, low, high = trial.cost(mapping(0)).macs, 0, 1000
    while low < high:
        middle = (low + high) // 2
        met = trial.cost(mapping(middle / 1000)).macs <= (budget + 1e-9) * vanilla
        low, high = (low, middle) if met else (middle + 1, high)
    if (reached := trial.cost(mapping(high / 1000)).macs / vanilla) > budget + 1e-9:
        raise UserError(
            f"{budget:g} of the multiply-adds is out of reach: at alpha 1 these convolutions leave {reached:.3f}"
        )
    return mapping(high / 1000)


def keep_sensitivities(
    path: Path,
    of: Mapping[str, Any],
    tries: Sequence[tuple[Group, float]],
    measure: Callable[..., Iterator[Sensitivity]],
) -> Iterator[Sensitivity]:
    """The sensitivities of all tries: those of a file, and then those that `measure(left)` yields, each kept there.

    `of` says, in types of JSON, what they depend on. Raises UserError for a file of something else.
    """
    known: dict[tuple[Group, float], Sensitivity] = {}
    of = json.loads(json.dumps(of, default=str))  # as it is read back
    if path.is_file():
        try:
            kept = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not a file of this kind: {error}") from error
        if not isinstance(kept, dict) or kept.get("of") != of:
            cure = "delete it, or choose another place for the output"
            raise UserError(f"{path} holds sensitivities of another checkpoint or of other clips: {cure}")
        for row in kept["sensitivities"]:
            known[tuple(row["names"]), row["alpha"]] = Sensitivity(**row | {"names": tuple(row["names"])})
    yield from (known[one] for one in tries if one in known)
    if left := [one for one in tries if one not in known]:
        for entry in measure(left):
            known[entry.names, entry.alpha] = entry
            with appearing(path) as partial:
                partial.write_text(json.dumps({"of": of, "sensitivities": [e._asdict() for e in known.values()]}))
            yield entry
