"""Octaves whose sums, batch norm, residual and activation wait until something reads them, and are then one pass."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from octvideo.layers.finishing import finish, statistics
from octvideo.layers.functions import spelled
from octvideo.layers.octaves import Function, Octaves, apply
from octvideo.layers.parts import Parts
from octvideo.layers.resampling import average_pool

Maps = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # high, what is added to it, low, what is added to it


class Norm(NamedTuple):
    """A batch norm that waits: statistics and parameters of each channel, high channels first."""

    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    of_batch: bool = False


class Wait(NamedTuple):
    """What is left to do: activation(norm(high + upsampled add, low + low_add) + plus)."""

    maps: Maps
    norm: Norm = Norm()
    plus: Pending | None = None
    activation: str = "none"
    with_grad: bool = True
    inference: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.maps, *self.norm[:4]) if isinstance(x, Tensor)]


class Pending(Octaves):
    """Octaves that one fused pass makes when they are read; to others they are the Octaves that they stand for.

    Reading `high` or `low`, or any function that does not wait, makes the maps. Nothing waits for maps that others have
    seen, since they may write to them.
    """

    _wait: Wait | None
    _made: tuple[Tensor, Tensor]
    _pooled: Tensor | None = None
    _seen = False
    _readers: dict[int, Pending]  # that wait with these maps as their residual

    def __new__(cls, high: Tensor, low: Tensor, parts: Parts | None = None, axis: int = 1) -> Octaves:  # type: ignore[misc]
        """Plain Octaves, for tools that rebuild x as type(x)(*x)."""
        return Octaves(high, low, parts, axis)

    @classmethod
    def of_maps(cls, high: Tensor, add: Tensor | None, low: Tensor, low_add: Tensor | None = None) -> Pending:
        """Of maps that nobody else has; an `add` of all channels holds `low_add` behind its high channels."""
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return cls._of(Wait((high, add, low, low_add), Norm(), None, "none", *modes))

    @classmethod
    def _of(cls, wait: Wait) -> Pending:
        # What reads a tuple's items in C must not find half of the sum.
        self: Pending = tuple.__new__(cls, (None, None))
        self.parts, self.axis = ((wait.maps[0].shape[1], wait.maps[2].shape[1]),), 1
        self._readers = {}
        self._set(wait)
        return self

    def _set(self, wait: Wait) -> None:
        self._wait = wait
        if wait.plus is not None:
            wait.plus._readers[id(self)] = self

    def ready(self, pool: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """The high and the low map, to be read only, and if asked for the mean of high over each low position."""
        if (wait := self._wait) is not None:
            self._wait = None
            high, add, low, low_add = wait.maps
            left = any(x is not None for x in (add, low_add, wait.norm.mean, wait.plus)) or wait.activation != "none"
            with torch.set_grad_enabled(wait.with_grad), torch.inference_mode(wait.inference):
                plus = wait.plus.ready()[:2] if wait.plus is not None else (None, None)
                if left or pool:
                    norm = wait.norm
                    numbers = (norm.of_batch, wait.activation, pool)
                    high, low, pooled = finish(*wait.maps, *norm[:5], *plus, *numbers)
                    self._pooled = pooled if pool else None
            self._made = high, low
            if wait.plus is not None:
                del wait.plus._readers[id(self)]
        high, low = self._made
        if pool and self._pooled is None:
            pooled = average_pool(high, self.factors)
            self._pooled = None if self._seen else pooled
            return high, low, pooled
        return high, low, self._pooled if pool else None

    def _show(self) -> tuple[Tensor, Tensor]:
        """The maps for others, who may write to them."""
        for reader in list(self._readers.values()):
            reader.ready()
        high, low, _ = self.ready()
        self._seen, self._pooled = True, None
        return high, low

    high = property(lambda self: self._show()[0])
    low = property(lambda self: self._show()[1])

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._show())

    def maps_like(self) -> tuple[Tensor, Tensor]:
        return self._made if self._wait is None else (self._wait.maps[0], self._wait.maps[2])

    @property
    def requires_grad(self) -> bool:
        if self._wait is None:
            return super().requires_grad
        tensors = self._wait.with_grad and any(x.requires_grad for x in self._wait.tensors)
        return tensors or (self._wait.plus is not None and self._wait.plus.requires_grad)

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            result = _normalize(*args, **kwargs)
        elif func in _ACTIVATION:
            result = _activate(_ACTIVATION[func], func in _IN_PLACE, *args, **kwargs)
        elif func in _ADD and len(args) == 2 and not kwargs:
            result = _add(args[0], args[1], func in _IN_PLACE)
        else:
            result = NotImplemented
        return apply(func, *args, **kwargs) if result is NotImplemented else result

    def _changed(self, in_place: bool, **changes: Any) -> Any:
        """With more that waits; what is done in place is done to this object."""
        assert self._wait is not None
        if not self._same_mode() or (in_place and self._readers):
            return NotImplemented
        if not in_place:
            return Pending._of(self._wait._replace(**changes))
        self._set(self._wait._replace(**changes))
        return self

    def _same_mode(self) -> bool:
        assert self._wait is not None
        return (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == self._wait[4:]

    def _open(self) -> bool:
        """Whether a residual and an activation may follow."""
        return self._wait is not None and self._wait.plus is None and self._wait.activation == "none"


def _normalize(
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not isinstance(x, Pending) or x._wait is None or not x._open() or x._wait.norm.mean is not None:
        return NotImplemented
    low = x._wait.maps[2]
    if training and low.numel() <= low.shape[1]:
        return NotImplemented  # one value a channel: torch's error
    if not training and (running_mean is None or running_var is None):
        return NotImplemented
    if training and x._same_mode():
        with torch.no_grad():
            running_mean, running_var = statistics(*x._wait.maps, running_mean, running_var, momentum)
    return x._changed(False, norm=Norm(running_mean, running_var, weight, bias, eps, training))


def _activate(activation: str, writes: bool, x: Any, inplace: bool = False) -> Any:
    if not isinstance(x, Pending) or x._wait is None or x._wait.activation != "none":
        return NotImplemented
    if activation == "silu" and x._wait.plus is not None:  # its derivative does not follow from its output
        return NotImplemented
    return x._changed(writes or inplace, activation=activation)


def _add(x: Any, y: Any, in_place: bool = False) -> Any:
    """x + y where one of them waits and the other is its residual, which nobody but octave layers has seen."""
    pair = isinstance(x, Pending) and isinstance(y, Pending) and x is not y
    if not pair or x._seen or y._seen or [z.shape for z in x.maps_like()] != [z.shape for z in y.maps_like()]:
        return NotImplemented
    if x.dtype != y.dtype:
        return NotImplemented
    if x._open():
        return x._changed(in_place, plus=y)
    return y._changed(False, plus=x) if y._open() and not in_place else NotImplemented


_ACTIVATION: dict[Function, str] = {f: name for name in ("relu", "relu6", "silu") for f in spelled(name)}
_ACTIVATION |= dict.fromkeys(spelled("relu_"), "relu")
_ADD = {*spelled("add add_"), operator.add, operator.iadd}
_IN_PLACE = {*spelled("relu_ add_"), operator.iadd}


def _operator(function: Function, plain: Function) -> Function:
    def operate(self: Any, other: Any) -> Any:
        result = _add(self, other, in_place=function is operator.iadd)
        return plain(self, other) if result is NotImplemented else result

    return operate


for _name, _function in (("add", operator.add), ("radd", operator.add), ("iadd", operator.iadd)):
    setattr(Pending, f"__{_name}__", _operator(_function, getattr(Octaves, f"__{_name}__")))
register_pytree_node(
    Pending,
    lambda x: ([x.high, x.low], (x.parts, x.axis)),
    lambda maps, context: Octaves(*maps, *context),
    serialized_type_name="octvideo.Pending",
)
