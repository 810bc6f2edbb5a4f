"""Runs a network on a sample without computing anything, and notes what it costs, where it merges and what is space."""

import linecache
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from octvideo.errors import UserError
from octvideo.layers import merging
from octvideo.layers.convolution import Octave
from octvideo.layers.octaves import Octaves
from octvideo.models.cost import Cost, CostCounter, copy_with
from octvideo.models.outputs import octaves_in

Edge = tuple[Any, int]  # of autograd's graph: a node and the index of its output
Makers = dict[Edge, str]  # the octave convolution that made a low map, or "" for what ends a search


@dataclass
class Trace:
    """What one forward pass did; modules go by their names in the network."""

    costs: Mapping[str, Cost]  # of what ran in each module, and in none of its children
    sizes: Mapping[str, list[tuple[int, ...]]]  # of each convolution's inputs, after the channels
    merges: Counter[tuple[str, str]] = field(default_factory=Counter)  # by module and function
    # Octave convolutions whose low map is read by merges alone, with the first: "blocks.3.view".
    wasted: dict[str, str] = field(default_factory=dict)


class Stage:
    """A copy of a network, in eval mode, on which to try octaves: `network`, which `run` runs on a sample.

    On tensors without values; a network that reads values is computed, and says less.

    Args:
        model: the network, which is neither run nor changed.
        sample: a Tensor, or a tuple or mapping of the forward's arguments.
        restore: makes the copy vanilla, for the first run: `vanilla`.

    Raises UserError if the network does not take the sample, or cannot be copied.
    """

    def __init__(self, model: nn.Module, sample: Any, restore: Callable[[nn.Module], object]) -> None:
        if not isinstance(sample, (Tensor, tuple, Mapping)):
            kind = type(sample).__name__
            raise UserError(f"sample must be a Tensor, or a tuple or dict of the forward's arguments, got {kind}")
        self._sample = sample if isinstance(sample, Mapping) else sample if isinstance(sample, tuple) else (sample,)
        self._name = type(model).__name__
        shapes = [tuple(x.shape) for x in tree_leaves(sample) if isinstance(x, Tensor)]
        for self._tensors in ("meta", "real"):  # the first have no values, which some networks read
            try:
                self.network = self._copy(model)
                restore(self.network)
                self.vanilla = self.run()
                return
            except Exception as error:
                failure = error
        raise UserError(f"{self._name} does not take the sample, of shapes {shapes}: {failure}") from failure

    def _place(self, x: Tensor) -> Tensor:
        """A Tensor of the kind that the network is run on."""
        return x.to("meta") if self._tensors == "meta" else x.clone()

    def _copy(self, model: nn.Module) -> nn.Module:
        network = copy_with(model, self._place)
        for x in network.parameters():
            x.requires_grad_(x.is_floating_point())
        return network.eval()

    def run(
        self, network: nn.Module | None = None, enlarge: Callable[[Tensor], Tensor] = Tensor.clone, graph: bool = False
    ) -> Trace:
        """One forward pass of the network or a copy of it, on a sample whose Tensors `enlarge` makes anew.

        With `graph`, for which autograd's graph is recorded, it knows what was wasted.
        """
        network = network or self.network
        names = {module: name for name, module in network.named_modules()}
        sizes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        made: Makers = {}
        read: list[tuple[str, Edge]] = []  # low maps, by what merges them, or by "" for octave convolutions

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            if isinstance(module, nn.Linear) and isinstance(x, Octaves):
                read.extend(("", edge) for edge in _low_edges(x))
            if isinstance(module, nn.modules.conv._ConvNd) and isinstance(x, (Tensor, Octaves)):
                sizes[names[module]].append(tuple(x.shape[2:]))
                if isinstance(x, Octaves):
                    reader = "" if _gains(module) else f"{names[module]}.forward"
                    read.extend((reader, edge) for edge in _low_edges(x))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                maker = names[module] if isinstance(module, nn.modules.conv._ConvNd) else ""
                first = output.high if isinstance(output, Octaves) else output
                if isinstance(first, Tensor):
                    made[_edge(first)] = ""
                made.update(dict.fromkeys(_low_edges(output) if isinstance(output, Octaves) else (), maker))

        with ExitStack() as stack:
            if self._tensors == "meta":
                stack.enter_context(torch.device("meta"))
            arguments = tree_map_only(Tensor, lambda x: enlarge(self._place(x)), self._sample)
            for module in names:
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            stack.enter_context(torch.set_grad_enabled(graph and self._tensors != "real"))
            merges = stack.enter_context(merging.collected())
            counter = stack.enter_context(CostCounter.of(network))
            output = network(**arguments) if isinstance(arguments, Mapping) else network(*arguments)
            returned = octaves_in(output)
            for x in returned:
                x.merge()
        places = [(names.get(merge.module, type(merge.module).__name__), merge.function) for merge in merges]
        for (name, function), merge in zip(places, merges, strict=True):
            where = f"{name}.{function}".lstrip(".")
            read += [(where, _edge(low)) for low in merge.lows]
        read += [("the network's output", edge) for x in returned for edge in _low_edges(x)]
        kept = _sources([edge for reader, edge in read if not reader], made)
        wasted: dict[str, str] = {}
        for reader, edge in read:
            for name in _sources([edge], made) - kept if reader else ():
                wasted.setdefault(name, reader)
        return Trace(counter.costs, sizes, Counter(places), wasted)

    def try_octaves(self) -> Trace:
        """`run`; raises UserError that says where the network stopped."""
        try:
            return self.run(graph=True)
        except Exception as error:
            names = {module: name for name, module in self.network.named_modules()}
            raise UserError(f"{self._name} stops at {_where(error, names)}: {error}; {merging.CURE}") from error

    def not_space(self) -> tuple[dict[str, str], str]:
        """Why convolutions convolve over something else than space, and what could not be known.

        Space grows with the height and width of the sample.
        """
        small = self.vanilla.sizes
        first = next(iter(small), "")
        for change in () if self._tensors == "real" else (lambda n: 2 * n, lambda n: n + n // 2, lambda n: n + 32):
            try:
                large = self.run(self._copy(self.network), partial(self._resized, change)).sizes
            except Exception:  # a classifier of one size only
                continue
            if first and _unlike_space(small[first], large[first]):
                break  # the network resizes what it is given
            found = {name: _unlike_space(few, large[name]) for name, few in small.items()}
            return {name: why for name, why in found.items() if why}, ""
        note = "could not be known: which axes are space (no other size of sample reaches the convolutions); assumed by"
        height, width = small[first][0][-2:] if first and len(small[first][0]) > 1 else (1, 1)
        found = {}
        for name, inputs in small.items():
            for size in inputs:
                if len(size) > 1 and abs(size[-2] * width - size[-1] * height) > 2 * max(height, width):
                    found[name] = f"it convolves over {_by(size)}, not in the proportions of the sample: not space"
        return found, f"{note} their proportions"

    def _resized(self, change: Callable[[int], int], x: Tensor) -> Tensor:
        """Without its values; a Tensor of three dimensions is images without a batch if the network is for images."""
        images = any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in self.network.modules())
        axes = 2 if x.dim() > 3 or (images and x.dim() == 3) else int(x.is_floating_point() and x.dim() > 1)
        kept = x.dim() - axes
        return x.new_empty((*x.shape[:kept], *(change(n) for n in x.shape[kept:])))


def _gains(convolution: nn.Module) -> bool:
    """Whether a convolution that is given octave features gains by the low map, instead of merging it."""
    if not isinstance(convolution, Octave):
        return True
    plan = convolution._plan
    return plan.keeps_low or not (plan.depthwise or plan.problem)


def _edge(x: Tensor) -> Edge:
    return x.grad_fn, x.output_nr


def _low_edges(x: Octaves) -> list[Edge]:
    return [_edge(low) for low in tree_leaves(x.low)]


def _sources(edges: Iterable[Edge], made: Makers) -> set[str]:
    """The convolutions whose low maps these were computed from, with none between."""
    found, queue, seen = set(), list(edges), set()
    while queue:
        edge = queue.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        if edge in made:
            found.add(made[edge])
        elif not edge[0].name().startswith("Convolution"):
            queue += edge[0].next_functions
    return found - {""}


def _unlike_space(small: list[tuple[int, ...]], large: list[tuple[int, ...]]) -> str:
    """Why sizes of a convolution's inputs do not grow as the sample's height and width did; empty if they do."""
    for few, many in zip(small, large, strict=False):
        last = -min(2, len(few))
        if any(n == more or more > 3 * n + 4 for n, more in zip(few[last:], many[last:], strict=True)):
            becomes = f"becomes {_by(many)}" if few != many else "stays"
            return f"its input of {_by(few)} {becomes} where the sample's height and width grow: not space"
    return ""


def _by(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


def _where(error: Exception, names: Mapping[nn.Module, str]) -> str:
    """The innermost module of the network and the line of code at which an error was raised."""
    place = "the network"
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and owner in names and "_call_impl" not in code.co_name:
            line = linecache.getline(code.co_filename, number).strip()
            place = f"{names[owner]} ({type(owner).__name__}), in {code.co_name}: {line!r}"
    return place
