"""Choose the alphas of a network's stages by predicted time: which ones gain by octaves, and how large."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import torch
from pytorchvideo.models.net import MultiPathWayWithFuse
from torch import nn

from octvideo.errors import UserError
from octvideo.models.cost import copy_with, count_cost, total
from octvideo.models.roofline import Machine
from octvideo.models.zoo import residual_stages, set_alpha


class Choice(NamedTuple):
    """Alphas as `create_model` takes them, and the predicted seconds with them and at alpha 0."""

    alpha: dict[str, float]
    seconds: float
    vanilla: float


def choose_alpha(
    network: nn.Module,
    machine: Machine,
    clip_size: Sequence[int] = (3, 8, 224, 224),
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    budget: float | None = None,
    alphas: Sequence[float] = (0.125, 0.25, 0.5),
) -> Choice:
    """The alphas of res2 to res5 with the lowest predicted time; of SlowFast's, of each pathway and lateral connection.

    With a budget, octaves are then taken back, where that costs the least time, while the budget is met. A stage whose
    octaves would make the network slower stays vanilla; if none gains, `alpha` is empty. Time is that of the whole
    network, because merging between stages costs too: first for every run of stages at the largest alpha, then for each
    part at each alpha while that gains. Half a minute for I3D's inference, 2 minutes for its training.

    Args:
        network: of `create_model`; neither run nor changed.
        machine: of `octvideo.models.roofline`.
        clip_size: (C, T, H, W); with `batch`, `dtype` and `train` as `count_cost` takes them.
        budget: largest predicted time, as a share of that at alpha 0.
        alphas: what a part may have, beside 0.

    Raises UserError for a budget that no choice meets, and for what `count_cost` and `set_alpha` refuse.
    """
    trial: Any = set_alpha(copy_with(network, lambda x: x.to("meta")), 0)
    stages = [_parts(trial, index) for index in residual_stages(trial)]
    parts = [part for stage in stages for part in stage]

    def predict(chosen: Sequence[float]) -> float:
        set_alpha(trial, dict(zip(parts, chosen, strict=True)))
        return machine.seconds(total(count_cost(trial, clip_size, batch=batch, dtype=dtype, train=train)), dtype)

    @cache
    def seconds(chosen: tuple[float, ...]) -> float:
        try:
            return predict(chosen)
        except UserError:  # channels that cannot be split so
            return math.inf

    def rank(chosen: tuple[float, ...]) -> tuple[float, float]:
        return seconds(chosen), sum(chosen)

    vanilla = predict(best := (0.0,) * len(parts))
    for first, last in combinations_with_replacement(range(len(stages)), 2):
        shares = [max(alphas) if first <= i <= last else 0.0 for i, stage in enumerate(stages) for _ in stage]
        best = min(best, tuple(shares), key=rank)
    before = None
    while best != before:
        before = best
        for i in range(len(parts)):
            best = min(best, *((*best[:i], alpha, *best[i + 1 :]) for alpha in (0.0, *alphas)), key=rank)
    if budget is not None and seconds(best) > budget * vanilla:
        reached = f"the fastest alphas take {seconds(best) / vanilla:.3f} of the time at alpha 0"
        raise UserError(f"no choice meets a time budget of {budget:g} on {machine.name}: {reached}")
    while budget is not None:
        fewer = [
            ((seconds(less) - seconds(best)) / (share - alpha), less)
            for i, share in enumerate(best)
            for alpha in (0.0, *alphas)
            if alpha < share and seconds(less := (*best[:i], alpha, *best[i + 1 :])) <= budget * vanilla
        ]
        if not fewer:
            break
        best = min(fewer)[1]
    return Choice({part: alpha for part, alpha in zip(parts, best, strict=True) if alpha}, seconds(best), vanilla)


def _parts(network: Any, index: int) -> list[str]:
    """Regexes of the parts of a stage that may differ in alpha."""
    stage = network.blocks[index]
    if not isinstance(stage, MultiPathWayWithFuse):
        return [rf"^blocks\.{index}\."]
    names = [f"multipathway_blocks.{i}." for i in range(len(stage.multipathway_blocks))] + ["multipathway_fusion."]
    found = [name for name, module in stage.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
    kept = [name.replace(".", r"\.") for name in names if any(one.startswith(name) for one in found)]
    return [rf"^blocks\.{index}\.{name}" for name in kept]
