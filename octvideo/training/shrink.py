"""From a trained network to a cheaper one: octaves where they cost least, then learning from what it was."""

import copy
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.utils._pytree import tree_leaves, tree_map_only

from octvideo.errors import DoesNotPayError, UserError
from octvideo.files import appearing
from octvideo.models.allocation import (
    Group,
    Sensitivity,
    Trial,
    allocate,
    keep_sensitivities,
    mapping_of,
    measure_sensitivities,
    uniform,
)
from octvideo.models.choose_low import choose_low
from octvideo.models.cost import Cost, time_interleaved
from octvideo.models.octavize import octavize
from octvideo.models.roofline import Machine, measure_machine
from octvideo.training import objective
from octvideo.training.precise_bn import Seen, evaluating, match_statistics, watch
from octvideo.training.schedule import Schedule

By = Literal["macs", "time"]
Batch = Tensor | tuple[Any, ...]  # the forward's argument, or all of them
Distance = Callable[[Any, Any], Tensor]  # of the outputs of student and teacher
TEMPERATURE = 2.0
ALPHAS = (0.25, 0.5, 0.75)


def distance_of(found: Any, wanted: Any) -> Tensor:
    """How far outputs are from a teacher's: a scalar, the sum over all Tensors of floating-point numbers in them.

    For (B, C) of at least two columns the divergence of softmax at a temperature of 2, as in Hinton et al. (2015);
    for others the mean squared error relative to the variance of the teacher's.
    """
    terms = []
    for one, other in zip(floats_in(found), floats_in(wanted), strict=True):
        one, other = one.float(), other.float()
        if other.dim() == 2 and other.shape[1] > 1:
            terms.append(objective.distance_of(one, other, "single", TEMPERATURE))
        else:
            terms.append(F.mse_loss(one, other) / other.var(correction=0).clamp(min=1e-6))
    if not terms:
        raise UserError("the network returns no Tensor of floating-point numbers to learn from")
    return torch.stack(terms).sum()


def floats_in(outputs: Any) -> list[Tensor]:
    """The Tensors of floating-point numbers in whatever a network returns."""
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def decisions(outputs: Any) -> Tensor:
    """What the first output decides: the best of at least two columns (B,), else which numbers are above 0."""
    first = floats_in(outputs)[0]
    return first.argmax(1) if first.dim() == 2 and first.shape[1] > 1 else first > 0


class Likeness(NamedTuple):
    """How like its teacher a network is."""

    distance: float  # mean over batches
    agreement: float  # share of equal `decisions`, in [0, 1]


def answers(network: nn.Module, batches: Iterable[Batch]) -> list[Any]:
    """What a network returns for each batch, in eval mode."""
    with evaluating(network, device := _device(network)):
        return [_run(network, batch, device) for batch in batches]


def compare(found: Sequence[Any], wanted: Sequence[Any], distance: Distance) -> Likeness:
    """Compares the `answers` of two networks to the same batches, at least one."""
    pairs = list(zip(found, wanted, strict=True))
    equal = [(decisions(one) == decisions(other)).flatten() for one, other in pairs]
    distances = [float(distance(one, other)) for one, other in pairs]
    return Likeness(statistics.fmean(distances), float(torch.cat(equal).float().mean()))


def look(vanilla: nn.Module, batches: Iterable[Batch]) -> Seen:
    """What `refresh` asks of the vanilla network, for several octave ones; `outputs` are its answers."""
    return watch(vanilla, batches, lambda model, batch: _run(model, batch, _device(model)))


def refresh(network: nn.Module, vanilla: nn.Module | Seen, batches: Iterable[Batch]) -> list[Any]:
    """Gives a network the batch-norm statistics that suit its octaves; returns what it answers meanwhile."""
    return match_statistics(network, vanilla, batches, lambda model, batch: _run(model, batch, _device(model)))


class Candidate(NamedTuple):
    """One way to meet the budget."""

    name: str
    alpha: dict[str, float]  # as `octavize` and `create_model` take it
    cost: Cost  # of the sample
    likeness: Likeness  # before any training, on the clips that it was chosen by


def choose(
    network: nn.Module,
    batches: Sequence[Batch],
    *,
    budget: float,
    by: By = "macs",
    alphas: Sequence[float] = ALPHAS,
    options: Mapping[str, Any] | None = None,
    distance: Distance = distance_of,
    machine: Machine | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> tuple[Cost, list[Candidate]]:
    """What the network costs, and the ways to make it octave within a budget, the one most like it first.

    No labels are needed: what counts is the distance of the outputs from the network's own, with batch-norm statistics
    that fit the octaves (`match_statistics`). The ways are an alpha for each layer, by sensitivities (see
    `octvideo.models.allocation`); the same without the layers that strided convolutions read, so that these still
    stride; one alpha for all layers.

    Args:
        network: at alpha 0, best after `choose_low`; neither trained nor changed.
        batches: inputs, of which a tenth, two or more, measures sensitivities; the first one is the sample whose cost
            counts, with a single entry.
        budget: share of the cost at alpha 0, in (0, 1).
        by: "macs": multiply-adds; "time": also the time that `machine` (default: this one) is predicted to take.
        alphas: to try for each layer, in (0, 1].
        options: other options of `octavize`, such as downsample="pool" for a network that was trained so.
        distance: of outputs; see `distance_of`.
        folder: where to keep sensitivities.json, for the next call with the same network and batches.
        progress: show a bar on stderr.

    Raises UserError for a number out of its range, and DoesNotPayError if no way meets the budget.
    """
    check(budget, by, alphas)
    options, sample = dict(options or {}), first_of(batches[0])
    dtype = next(x.dtype for x in network.parameters() if x.is_floating_point())
    model = copy.deepcopy(network)
    try:
        octavize(model, 0)
    except UserError as error:  # a transformer, for example
        raise DoesNotPayError(str(error)) from error
    trial = Trial(network, sample, options)
    groups, at_strides = trial.groups(), trial.groups_at_strides()

    def costs_of(alpha: float) -> tuple[dict[str, float], Cost]:
        alphas = mapping_of({name: alpha for group in groups for name in group})
        return alphas, trial.cost(alphas)

    plain, vanilla = costs_of(0.0)
    least = vanilla
    with suppress(ValueError):  # channels that cannot be split at this alpha alone
        least = costs_of(max(alphas))[1]
    if least is not vanilla and least.macs > budget * vanilla.macs:
        octavize(model, costs_of(max(alphas))[0], **options | {"sample": sample})
        left = f"alpha {max(alphas):g} everywhere leaves {least.macs / vanilla.macs:.3f}"
        report: Any = model.octave_report
        raise DoesNotPayError(f"{budget:g} of the multiply-adds is out of reach: {left} ({report.summary()})")
    if machine is None and by == "time":
        machine = measure_machine(dtype, _device(network).type)
    octavize(model, plain, **options)
    seen, some = look(network, batches), batches[: max(2, math.ceil(len(batches) / 10))]
    of_some = replace(seen, sums=seen.sums[: len(some)], outputs=seen.outputs[: len(some)])

    def loss(model: nn.Module) -> float:
        return compare(refresh(model, of_some, some), of_some.outputs, distance).distance

    def measured(left: list[tuple[Group, float]]) -> Iterator[Sensitivity]:
        found = measure_sensitivities(model, groups, left, loss, sample, options)
        yield from track(found, "layers and alphas", len(left), console=Console(stderr=True), disable=not progress)

    tries = [(group, alpha) for group in groups for alpha in sorted(alphas)]
    if folder is None:
        found = list(measured(tries))
    else:
        of = {"network and clips": fingerprint(network, batches), "options": options}
        found = list(keep_sensitivities(folder / "sensitivities.json", of, tries, measured))
    each = partial(allocate, network, groups, budget=budget, sample=sample, options=options, machine=machine)
    ways = {"an alpha for each layer": partial(each, found)}
    if at_strides and options.get("downsample") != "pool":
        others = [entry for entry in found if entry.names not in at_strides]
        ways["an alpha for each layer, strides kept"] = partial(each, others)
    ways["one alpha for all layers"] = partial(uniform, network, groups, groups, budget, sample, **options)
    candidates, reasons = [], []
    for name, way in ways.items():
        try:
            alpha = way()
        except ValueError as error:
            reasons.append(str(error))
            continue
        cost = trial.cost(alpha)
        if machine is None or machine.seconds(cost, dtype) <= budget * machine.seconds(vanilla, dtype):
            octavize(model, alpha, **options)
            refresh(model, seen, batches)
            likeness = compare(answers(model, batches), seen.outputs, distance)
            candidates.append(Candidate(name, alpha, cost, likeness))
    if not candidates:
        raise DoesNotPayError(reasons[0])
    return vanilla, sorted(candidates, key=lambda candidate: candidate.likeness.distance)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    distance: Distance = distance_of,
    progress: bool = False,
) -> None:
    """Trains a network in place to give the outputs of its teacher, without labels.

    Adam with a tenth of the steps as warm-up, then half a cosine to 0, gradients clipped at a norm of 1. Both are in
    eval mode: dropout is off, and batch-norm statistics stay, which should fit the student before (`refresh`).

    Args:
        batches: inputs of several entries each; iterated again and again until there were enough steps.
        steps: of the optimiser; 0: none.
        learning_rate: its peak.

    Raises UserError without batches, and for a distance that is not finite.
    """
    device, modes = _device(student), [(module, module.training) for module in student.modules()]
    student.eval()
    optimizer = torch.optim.Adam([x for x in student.parameters() if x.requires_grad], learning_rate)
    schedule = Schedule(learning_rate, steps, learning_rate / 10, steps / 10) if steps else None
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    numbers = track(range(steps), "distilling", console=Console(stderr=True), disable=not progress)
    for step, batch in zip(numbers, endless, strict=False):
        assert schedule is not None
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        with evaluating(teacher, device):
            wanted = _run(teacher, batch, device)
        with allow_mutation_on_saved_tensors():  # networks for inference alone write where they like
            loss = distance(_run(student, batch, device), wanted)
            if not loss.isfinite():
                raise UserError(f"distilling diverged at step {step}: lower the learning rate of {learning_rate:g}")
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    for module, mode in modes:
        module.training = mode


@dataclass(frozen=True)
class Shrunk:
    """A cheaper network, and what it was before."""

    network: nn.Module  # octave and distilled, in eval mode
    alpha: dict[str, float]  # as `octavize` takes it
    way: str  # the name of its `Candidate`
    candidates: Sequence[Candidate]
    costs: tuple[Cost, Cost]  # of the first entry of the first batch: before, after
    seconds: tuple[float, float]  # measured on it, medians of interleaved rounds: before, after
    likeness: tuple[Likeness, Likeness]  # to the network on the clips that were held out: before distilling, after
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        (one, other), (before, after) = self.costs, self.seconds
        first, last = self.likeness
        ratios = f"multiply-adds {other.macs / one.macs:.3f}, bytes {other.bytes_moved / one.bytes_moved:.3f}"
        lines = [f"{self.way}: {ratios} of what they were"]
        lines.append(f"time {after / before:.2f}: {1000 * before:.1f} ms became {1000 * after:.1f} ms")
        lines.append(f"agreement {100 * first.agreement:.1f} % before distilling, {100 * last.agreement:.1f} % after")
        return "\n".join([*lines, *self.notes])


def shrink(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    budget: float = 0.7,
    by: By = "macs",
    alphas: Sequence[float] = ALPHAS,
    calibration: int = 8,
    held_out: Sequence[Batch] = (),
    steps: int = 200,
    learning_rate: float = 1e-4,
    options: Mapping[str, Any] | None = None,
    distance: Distance = distance_of,
    folder: Path | None = None,
    progress: bool = False,
) -> Shrunk:
    """Makes a trained network cheaper, whatever its inputs and outputs, without labels; the network stays as it is.

    A copy's channels are ordered by `choose_low`, its octaves chosen by `choose`, and it learns the network's outputs
    (`distil`). Batch norms keep the statistics of the clips that the network was trained on, adapted to the octaves
    (`match_statistics`), so that the clips that it learns from may be of another kind.

    Args:
        network: vanilla.
        batches: what it takes, Tensors or tuples of arguments, several entries each; iterable more than once, such as a
            list or a DataLoader.
        budget: share of the cost, in (0, 1); with `by` and `alphas` as in `choose`.
        calibration: the first batches, which choose channels and alphas and give statistics; kept in memory.
        held_out: batches to compare the networks on; default: those of the calibration, which flatter.
        steps: of distilling; 0: none; with learning_rate, distance and progress as in `distil`.
        options: other options of `octavize`.
        folder: where sensitivities.json and distilled.pt are kept, so that the same call does not repeat that work.

    Raises UserError for a number out of its range and without clips; DoesNotPayError, before anything is trained, where
    no choice meets the budget or, by time, where the chosen network is measured here not to be faster.
    """
    check(budget, by, alphas, calibration=calibration, learning_rate=learning_rate)
    if steps < 0:
        raise UserError(f"steps must be at least 0, got {steps}")
    if not (chosen_by := list(itertools.islice(batches, calibration))):
        raise UserError("shrink needs at least one batch of clips")
    options, notes = dict(options or {}), []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    student, device = copy.deepcopy(network).eval(), _device(network)
    try:
        choose_low(student, [_on(batch, device) for batch in chosen_by])
    except UserError as error:
        notes.append(f"channels stay in the order in which they were trained: {error}")
    how: dict[str, Any] = {"budget": budget, "by": by, "alphas": alphas, "options": options, "distance": distance}
    vanilla, candidates = choose(student, chosen_by, **how, folder=folder, progress=progress)
    best, plain = candidates[0], copy.deepcopy(student)
    octavize(student, best.alpha, **options)
    refresh(student, plain, chosen_by)
    seconds = measure_seconds([network, student], chosen_by[0])
    if by == "time":
        refuse_slower(seconds)
    shown = held_out or chosen_by
    wanted = answers(network, shown)
    first = compare(answers(student, shown), wanted, distance)
    kept, of = folder and folder / "distilled.pt", [fingerprint(student, chosen_by), steps, learning_rate]
    known = torch.load(kept, weights_only=True) if kept and kept.is_file() else {}
    if known.get("of") == of:
        student.load_state_dict(known["weights"])
    else:
        training: dict[str, Any] = {"learning_rate": learning_rate, "distance": distance, "progress": progress}
        distil(student, network, batches, steps=steps, **training)
        if kept:
            with appearing(kept) as partial_file:
                torch.save({"of": of, "weights": student.state_dict()}, partial_file)
    likeness = first, compare(answers(student, shown), wanted, distance)
    return Shrunk(student, best.alpha, best.name, candidates, (vanilla, best.cost), seconds, likeness, notes)


def check(budget: float, by: str, alphas: Sequence[float], **positive: float) -> None:
    """Raises UserError for options of `shrink` that are out of their range."""
    if not 0 < budget < 1:
        raise UserError(f"budget must lie in (0, 1), got {budget}")
    if by not in ("macs", "time"):
        raise UserError(f"by must be macs or time, got {by!r}")
    if not alphas or any(not 0 < alpha <= 1 for alpha in alphas):
        raise UserError(f"alphas must lie in (0, 1], got {list(alphas)}")
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"{name} must be positive, got {value}")


def measure_seconds(networks: Sequence[nn.Module], batch: Batch, rounds: int = 10) -> tuple[float, float]:
    """Median seconds that two networks take here for the first entry of a batch, in eval mode, interleaved."""
    device = _device(networks[0])
    sample, calls = _on(first_of(batch), device), []
    for network in networks:
        calls.append(partial(_run, copy.deepcopy(network).eval(), sample, device))
    with torch.inference_mode():
        before, after = time_interleaved(calls, rounds=rounds, warmup=2, device=device)
    return statistics.median(before), statistics.median(after)


def refuse_slower(seconds: tuple[float, float]) -> None:
    """Raises DoesNotPayError, with both times, if the second one is not lower."""
    before, after = (1000 * value for value in seconds)
    if after >= before:
        took = f"the chosen network takes {after:.1f} ms a clip here, the vanilla one {before:.1f} ms"
        raise DoesNotPayError(f"{took}: octaves save arithmetic, but not time, on this machine at this size")


def first_of(batch: Batch) -> Batch:
    """The first entry of a batch, as a batch; Tensors without dimensions stay."""
    return batch[:1] if isinstance(batch, Tensor) else tree_map_only(Tensor, lambda x: x[:1] if x.dim() else x, batch)


def fingerprint(network: nn.Module, batches: Iterable[Batch]) -> str:
    """A digest of weights and clips."""
    digest = hashlib.sha256()
    for x in (*network.state_dict().values(), *tree_leaves(list(batches))):
        if isinstance(x, Tensor):
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _device(network: nn.Module) -> torch.device:
    return next(itertools.chain(network.parameters(), network.buffers())).device


def _on(batch: Batch, device: torch.device) -> Batch:
    return tree_map_only(Tensor, lambda x: x.to(device), batch)  # type: ignore[no-any-return]


def _run(network: nn.Module, batch: Batch, device: torch.device) -> Any:
    batch = _on(batch, device)
    return network(*batch) if isinstance(batch, tuple) else network(batch)
