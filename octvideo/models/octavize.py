"""Turn the convolutions of any network into octave convolutions, in place, and report what changed."""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from octvideo.errors import UserError
from octvideo.layers.calls import OctaveForward, octave_class, restore
from octvideo.layers.convolution import Octave, OctaveOptions, misalignment, sizes
from octvideo.layers.shares import Shares, say_shares, shares_of
from octvideo.layers.swapping import original_class, swap_class
from octvideo.models.cost import count_parameters, total
from octvideo.models.octave_report import Assignment, Report, merge_error
from octvideo.models.outputs import merge_outputs, return_octaves
from octvideo.models.trace import Stage
from octvideo.models.type_checks import forget_types, merge_where_types_are_asked

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class _Planned:
    """What a convolution becomes, and its line of the report."""

    options: OctaveOptions
    line: Assignment

    def left(self, reason: str) -> "_Planned":
        options = replace(self.options, alpha=0, downsample="conv")
        return _Planned(options, replace(self.line, alpha=0, lows=(), reason=f"left: {reason}"))


_Plan = dict[str, _Planned]  # by the names of convolutions


def octavize(
    model: Network,
    alpha: float | Sequence[float] | Mapping[str, float | Sequence[float]] = 0.25,
    *,
    temporal: bool = False,
    skip: str | Iterable[str] = (),
    downsample: Literal["conv", "pool"] = "conv",
    channels_last: bool = False,
    round_to: int = 1,
    strided: Literal["pool", "keep"] = "pool",
    sample: Any = None,
    strict: bool = False,
) -> Network:
    """Gives every convolution of a network, transposed ones too, an alpha, in place; the weights stay untouched.

    Calling it again sets every option anew; alpha 0 with the other options left out restores the vanilla network.
    Otherwise the network's `octave_report` is a `Report`, and what its forward and its public methods such as
    `forward_features` return is merged: outputs are what they were. Hooks of the user's on inner modules see Octaves.

    Args:
        alpha: share of low channels, in [0, 1], or the shares at half the resolution, a quarter ...: one for every
            convolution except those that read the network's input, lie inside attention layers, or have a stride or
            padding that would misalign the maps; or {regex: alpha}, where the first regex found in a convolution's name
            (`named_modules`) decides, else 0.
        temporal: halve time as well as height and width (3-D convolutions).
        skip: a regex, or several, of names that stay at alpha 0 whatever `alpha` says.
        downsample: "pool" averages for a spatial stride of 2 at alpha 0 too, as octave convolutions do: a fair control.
        channels_last: use that memory format, and run factorised convolutions as 2-D: faster, and equal up to rounding.
        round_to: rounds the number of low channels to a multiple; see `octvideo.layers.shares.split_channels`.
        strided: "keep" leaves convolutions with a spatial stride vanilla, and they read merged features: for trained
            weights, which pooling in place of strides changes most.
        sample: a clip (B, C, T, H, W), or a tuple or dict of the forward's arguments, with which the network is tried,
            without computing (unless its code reads values): convolutions over anything but space, and those whose low
            map would only be merged, stay vanilla; the report has multiply-adds, bytes, kernels, predicted time and
            merges.
        strict: raise TypeError, instead of merging with a warning, where a function has no meaning on two maps: here
            if there is a sample, else in forward.

    Raises UserError, and changes nothing, for an invalid option or regex, for one that matches no convolution or does
    not suit it, for a network in which none could become octave, such as a transformer, or that is scripted, quantized
    or not initialised yet, and for a sample that the network does not take with octaves or without.
    """
    _refuse(model)
    found = {key: shares_of(one) for key, one in alpha.items()} if isinstance(alpha, Mapping) else shares_of(alpha)
    defaults = OctaveOptions(0, temporal, downsample, channels_last, round_to, strided)
    plan = _plan(model, found, (skip,) if isinstance(skip, str) else tuple(skip), defaults, sample is not None)
    wanted = _changes(plan)
    report = Report(original_class(model).__name__, (), strict=strict, parameters=count_parameters(model))
    if wanted and sample is not None:
        plan, report = _rehearsed(model, plan, sample, report)
    _assign(model, plan)
    if _changes(plan):
        _forbid_rewriting(model)
        merge_outputs(model)
    if wanted:
        lines, swishes = tuple(planned.line for planned in plan.values()), tuple(_swishes(model))
        report = replace(report, assignments=report.assignments or lines, replaced=swishes if _changes(plan) else ())
        model.__dict__["octave_report"] = report
    return model


def _changes(plan: _Plan) -> bool:
    """Whether a network with this plan is another one than the vanilla network."""
    every = (planned.options for planned in plan.values())
    return any(options.alpha or options.downsample != "conv" or options.channels_last for options in every)


def _refuse(model: nn.Module) -> None:
    """Raises UserError for a network whose modules nothing can change."""
    for name, module in model.named_modules():
        where = f"{type(model).__name__} cannot become octave: {name or 'it'} is"
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{where} a ScriptModule: octavize the network itself, then use torch.jit.trace")
        if re.match(r"torch\.(ao\.)?nn\..*\bquantized\b", str(type(module).__module__)):  # None in torch.fx's graphs
            raise UserError(f"{where} quantized: octavize first, then quantize")
        if any(is_lazy(tensor) for tensor in chain(module.parameters(False), module.buffers(False))):
            raise UserError(f"{where} not initialised yet: run the network once, then octavize it")


def _rehearsed(model: nn.Module, plan: _Plan, sample: Any, report: Report) -> tuple[_Plan, Report]:
    """What a sample tells: convolutions that had better stay vanilla, and what the rest gains; changes nothing."""
    unchanged = {name: replace(planned, options=OctaveOptions(0)) for name, planned in plan.items()}
    stage = Stage(model, sample, partial(_assign, plan=unchanged))
    before = stage.vanilla
    others, note = stage.not_space()
    plan = plan | {name: plan[name].left(why) for name, why in others.items() if plan[name].options.alpha}
    _assign(stage.network, plan)
    after = stage.try_octaves()
    for _ in range(5):
        if not after.wasted:
            break
        for name, merge in after.wasted.items():
            plan[name] = plan[name].left(f"a merge in {merge} would follow")
        _assign(stage.network, plan)
        after = stage.try_octaves()
    after = stage.run()  # as inference runs, which records no graph
    if report.strict and after.merges:
        raise TypeError(merge_error(report.network, *next(iter(after.merges))))
    dtype = next(x.dtype for x in model.parameters() if x.is_floating_point())
    costs = {name: (before.costs[name], after.costs[name]) for name in plan}
    lines = tuple(replace(planned.line, costs=costs[name], dtype=dtype) for name, planned in plan.items())
    elsewhere: Counter[str] = Counter()
    for name, part in stage.network.named_modules():
        if name not in plan:
            elsewhere[type(part).__name__] += before.costs[name].macs
    found: dict[str, Any] = {"elsewhere": elsewhere, "notes": (note,) if note else (), "merges": after.merges}
    totals = (total(before.costs), total(after.costs))
    return plan, replace(report, assignments=lines, costs=totals, dtype=dtype, **found)


def _assign(model: nn.Module, plan: _Plan) -> None:
    """Changes a network as planned; where nothing is to change, it becomes vanilla again."""
    vanilla = not _changes(plan)
    forget_types(model)
    if not vanilla:
        merge_where_types_are_asked(model)
    for module in model.modules():
        return_octaves(module)
        for attribute in [name for name, value in vars(module).items() if isinstance(value, _TooLate)]:
            del module.__dict__[attribute]
        module.__dict__.pop("octave_report", None)
    for name, planned in plan.items():
        convolution: Any = model.get_submodule(name)
        if octave := octave_class(convolution):
            for attribute in ("kernel_size", "stride", "padding", "dilation", "_reversed_padding_repeated_twice"):
                # pytorchvideo leaves numpy's integers, which torch.compile cannot trace.
                if not isinstance(value := getattr(convolution, attribute), str):
                    setattr(convolution, attribute, sizes(value, len(convolution.weight.shape) - 2))
            if not vanilla:
                swap_class(convolution, octave)
                convolution.set_options(planned.options)
            elif isinstance(convolution, Octave):
                restore(convolution)
    for layer in _swishes(model).values():
        swap_class(layer, original_class(layer) if vanilla else nn.SiLU)
        layer.__dict__.pop("inplace", None)
        layer.__dict__.update({} if vanilla else {"inplace": False})


@dataclass(frozen=True)
class _TooLate:
    """Stands for a method that would rewrite convolutions, and lose their octaves."""

    method: str

    def __call__(self) -> NoReturn:
        raise UserError(f"{self.method}() would undo octavize: {self.method} first, then octavize (alpha 0 restores)")


def _forbid_rewriting(model: nn.Module) -> None:
    """Makes methods such as `reparameterize` raise in modules that have octave convolutions."""
    for module in model.modules():
        if any(octave_class(part) and getattr(part, "alpha", 0) for part in module.modules()):
            for name in dir(type(module)):
                if re.fullmatch(r"reparam\w*|fuse(_\w+)?|switch_to_deploy", name):
                    method = inspect.getattr_static(type(module), name)
                    if inspect.isfunction(method) and not _wanted_arguments(method):
                        module.__dict__[name] = _TooLate(name)


def _wanted_arguments(method: Any) -> int:
    """How many arguments a method must be given: one that rewrites its module needs none."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _swishes(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of pytorchvideo's Swish, which octaves cannot pass."""
    layers = {name: (layer, original_class(layer)) for name, layer in model.named_modules()}
    swish = ("pytorchvideo.layers.swish", "Swish")
    return {name: layer for name, (layer, kind) in layers.items() if (kind.__module__, kind.__name__) == swish}


def _plan(
    model: nn.Module,
    alpha: Shares | Mapping[str, Shares],
    skip: tuple[str, ...],
    defaults: OctaveOptions,
    sampled: bool,
) -> _Plan:
    """Each convolution with its options and its line of the report; raises what octavize does, and changes nothing."""
    modules: dict[str, Any] = dict(model.named_modules())
    convolutions = {name: module for name, module in modules.items() if isinstance(module, nn.modules.conv._ConvNd)}
    possible = [name for name, module in convolutions.items() if octave_class(module)]
    attention = {  # compares tokens or positions with each other: all must be at one resolution
        layer: type(module).__name__
        for layer, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        or re.search(r"Attention(2d|3d)?$|^non_?local$", type(module).__name__, re.I)
    }
    hint = f", a transformer ({len(attention)} attention layers; octaves are for convolutional networks),"
    described = type(model).__name__ + (hint if attention else "")
    if not possible:
        raise UserError(f"{described} has no nn.Conv1d, 2d, 3d, nn.ConvTranspose2d or 3d that could become octave")
    for pattern in (*(alpha if isinstance(alpha, Mapping) else ()), *skip):
        try:
            if not any(re.search(pattern, name) for name in possible):
                raise UserError(f"no convolution of {type(model).__name__} has a name that matches {pattern!r}")
        except re.error as error:
            raise UserError(f"invalid regex {pattern!r}: {error}") from error

    # The network's input is read by the first convolution, and by others of as few channels (RGB): SlowFast has two
    # stems. A network whose input has more than 4 channels is taken to have one.
    first = next(iter(convolutions.values()))
    plan = {}
    for name, module in convolutions.items():
        problem = misalignment(module, defaults.temporal)
        own_forward = issubclass(octave_class(module) or nn.Module, OctaveForward)
        if own_forward and max(sizes(module.stride, len(module.kernel_size))[-2:]) <= 2:
            problem = ""  # it may pad its input by itself
        share: Shares = 0.0
        reason = ""
        if name not in possible:
            reason = f"{type(module).__name__} has no octave form"
        elif any(re.search(pattern, name) for pattern in skip):
            reason = "skip matches its name"
        elif isinstance(alpha, Mapping):
            shares = [value for pattern, value in alpha.items() if re.search(pattern, name)]
            share, reason = (shares[0], "") if shares else (0.0, "no regex of alpha matches its name")
        elif module is first or module.in_channels == first.in_channels <= 4:
            reason = "it reads the network's input"
        elif around := [kind for layer, kind in attention.items() if name.startswith(f"{layer}.")]:
            reason = f"it is inside an attention layer, {around[0]}"
        elif not sampled and (size := len(module.kernel_size)) != len(first.kernel_size) and size != 2:
            reason = f"it is {size}-D and the network's first convolution is not: sample= would tell if that is space"
        else:
            share, reason = (0.0, problem) if problem else (alpha, "")
        if share and not replace(defaults, alpha=share).of_stride(module.stride, module.transposed).alpha:
            share, reason = 0.0, f'strided="keep" leaves its stride of {module.stride}'
        if share and problem:
            raise UserError(f"{name}: {problem}; skip it")
        temporal = defaults.temporal and len(module.kernel_size) == 3
        downsample = "conv" if problem or reason else defaults.downsample
        options = replace(defaults, alpha=share, temporal=temporal, downsample=downsample)
        try:
            if name in possible:
                options.check(module)
        except UserError as error:
            if isinstance(alpha, Mapping):
                raise UserError(f"{name}: {error}; skip it, or choose another alpha for it") from error
            share, reason = 0.0, str(error)
            options = replace(defaults, alpha=0)
        channels, (_, *lows) = module.out_channels, options.octaves(module.out_channels)
        if not lows and not reason:
            reason = f"{channels} channels have no low one at alpha {say_shares(share)}" if share else "alpha 0"
        plan[name] = _Planned(options, Assignment(name, channels, share, tuple(lows), reason and f"left: {reason}"))
    if not isinstance(alpha, Mapping) and alpha and not any(planned.options.alpha for planned in plan.values()):
        lines = "; ".join(f"{name} is {planned.line.reason}" for name, planned in islice(plan.items(), 3))
        raise UserError(f"{described} has no convolution that could become octave: {lines}")
    return plan
