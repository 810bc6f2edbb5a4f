"""One network at several alphas: plans between which it switches at once, and the batch-norm statistics of each."""

import contextlib
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.errors import UserError
from octvideo.layers.convolution import Octave, plan_of
from octvideo.models.published import STATISTICS
from octvideo.models.zoo import Alpha, octave_stages, set_alpha, stage_alphas

log = logging.getLogger(__name__)


class AlphaPlans:
    """The plans of a network's convolutions at several alphas, between which `switch` changes in microseconds.

    The network, of `create_model` or `adapt`, is left at the first alpha, and in its octave form even where that is 0:
    it computes what the vanilla network does, up to rounding. Raises UserError for an alpha that it cannot have.
    """

    def __init__(self, network: nn.Module, alphas: Sequence[float]) -> None:
        self.network, self.alphas = network, tuple(alphas)
        self._plans: dict[float, dict[Octave, dict[str, Any]]] = {}
        self._reports: dict[float, Any] = {}
        for alpha in (*alphas, max(alphas)):  # at the end the classes are octave
            try:
                set_alpha(network, alpha)
            except UserError as error:
                raise UserError(f"{alpha:g}: {error}") from error
            convolutions = [module for module in network.modules() if isinstance(module, Octave)]
            self._plans[alpha] = {x: {"options": x.options, "_plan": x._plan} for x in convolutions}
            self._reports[alpha] = network.__dict__.get("octave_report")
        for alpha in [alpha for alpha, plans in self._plans.items() if not plans]:  # the vanilla network
            for x, plan in self._plans[max(alphas)].items():
                options = replace(plan["options"], alpha=0.0)
                self._plans[alpha][x] = {"options": options, "_plan": plan_of(x, options)}
        blocks = octave_stages(network)
        self._stages = [[x for x in block.modules() if isinstance(x, Octave)] for block in blocks]
        self.has_stages = bool(blocks)
        self.switch(alphas[0])

    def switch(self, alpha: float | Sequence[float]) -> None:
        """Gives the network one of the alphas, or one to each of res2, res3 and res4; statistics stay as they are."""
        if isinstance(alpha, Sequence):
            of_stages = zip(self._stages, alpha, strict=True)
            plans = {x: self._plans[share][x] for stage, share in of_stages for x in stage}
        else:
            plans = self._plans[alpha]
            self.network.__dict__["octave_report"] = self._reports[alpha]
        for module, plan in plans.items():
            module.__dict__.update(plan)


class AlphaStatistics(nn.Module):
    """Batch-norm statistics of a network at further alphas, while the network itself has those of its own alpha.

    Its buffers have a row for each of the others, which may be any keys; columns are the channels of all batch norms
    (in counts, the batch norms) in the order of `modules()`. They start as copies of the network's.
    """

    means: Tensor
    variances: Tensor
    counts: Tensor

    def __init__(self, network: nn.Module, own: Hashable, others: Sequence[Hashable]) -> None:
        super().__init__()
        self.own, self.others = own, list(others)
        self._norms = _norms(network)
        self._sizes = [norm.num_features for norm in self._norms]
        for name, buffer in (
            ("means", "running_mean"),
            ("variances", "running_var"),
            ("counts", "num_batches_tracked"),
        ):
            rows = [norm.get_buffer(buffer).detach().reshape(-1) for norm in self._norms]
            row = torch.cat(rows) if rows else torch.zeros(0)
            self.register_buffer(name, row.repeat(len(self.others), 1))

    def of(self, alpha: Hashable) -> list[tuple[Tensor, ...]]:
        """Running mean, variance and number of batches of each batch norm, as views of the buffers that keep them."""
        if alpha == self.own:
            return [_statistics(norm) for norm in self._norms]
        row = self.others.index(alpha)
        views = self.means[row].split(self._sizes), self.variances[row].split(self._sizes), self.counts[row].unbind()
        return list(zip(*views, strict=True))

    @contextlib.contextmanager
    def lent(self, alpha: Hashable | None) -> Iterator[None]:
        """Has batch norms use, and in training update, the statistics of an alpha; None: copies of the network's own.

        They are lent, not copied: the backward pass of what ran meanwhile finds them unchanged by any other alpha.
        """
        before = [dict(norm._buffers) for norm in self._norms]
        lent = self.of(self.own if alpha is None else alpha)
        try:
            for norm, found in zip(self._norms, lent if alpha is not None else _copies(lent), strict=True):
                norm._buffers.update(zip(NAMES, found, strict=True))
            yield
        finally:
            for norm, buffers in zip(self._norms, before, strict=True):
                norm._buffers.update(buffers)

    def table(self) -> "StatisticsTable":
        """Copies of all statistics, for a network that is deployed."""
        alphas: Any = [self.own, *self.others]
        return StatisticsTable({alpha: _copies(self.of(alpha)) for alpha in sorted(alphas)}, self.state_dict())


class StatisticsTable:
    """Batch-norm statistics for each of several alphas; attached to a network, `set_alpha` gives it the right ones.

    `state` is that of the `AlphaStatistics` that it is of, for checkpoints.
    """

    def __init__(self, statistics: Mapping[float, Sequence[tuple[Tensor, ...]]], state: Mapping[str, Tensor]) -> None:
        self.statistics = dict(statistics)
        self.state = {f"{STATISTICS}{name}": tensor for name, tensor in state.items()}

    def __deepcopy__(self, memo: Any) -> Self:  # copies of a network share it: nothing changes it
        return self

    def attach(self, network: nn.Module, alpha: Alpha) -> None:
        """Gives a network of this alpha its statistics, and makes `set_alpha` of it do so from now on."""
        network.__dict__["alpha_statistics"] = self
        self.give(network, alpha)

    def nearest(self, alpha: Alpha) -> float:
        """The alpha whose statistics are nearest: for several alphas, to the mean of those of res2 to res4."""
        shares = list(alpha.values()) if isinstance(alpha, Mapping) else stage_alphas(alpha)[:3]
        mean = sum(sum(x) if isinstance(x, Sequence) else x for x in shares) / max(1, len(shares))
        return min(self.statistics, key=lambda known: abs(known - mean))

    def give(self, network: nn.Module, alpha: Alpha) -> None:
        """Gives a network the statistics of an alpha, or with a warning the nearest ones; UserError if it is fused."""
        nearest, norms = self.nearest(alpha), _norms(network)
        if alpha != nearest:
            cure = "re-estimate them (octvideo test --alphas, or estimate_statistics), or train at this alpha"
            log.warning("no batch-norm statistics of alpha %s: those of %g are taken; %s", alpha, nearest, cure)
        if len(norms) != len(self.statistics[nearest]):
            raise UserError(f"{type(network).__name__} has lost the batch norms that alphas have statistics for")
        for norm, found in zip(norms, self.statistics[nearest], strict=True):
            for buffer, value in zip(_statistics(norm), found, strict=True):
                buffer.copy_(value)


NAMES = ("running_mean", "running_var", "num_batches_tracked")


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [x for x in network.modules() if isinstance(x, _BatchNorm) and x.running_mean is not None]


def _statistics(norm: _BatchNorm) -> tuple[Tensor, ...]:
    return tuple(norm.get_buffer(name) for name in NAMES)


def _copies(statistics: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(x.detach().clone() for x in each) for each in statistics]
