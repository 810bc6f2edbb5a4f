"""A network that octavize changed returns what it returned before: its outputs hold no Octaves."""

import contextlib
import copy
import copyreg
import dataclasses
import functools
import inspect
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from octvideo.layers.octaves import Features, merged
from octvideo.layers.reshaping import ListedTensors
from octvideo.layers.swapping import swap_class

_ENTRIES = re.compile(r"forward|feature|encode|decode|intermediate|predict|embed")


class _Running(threading.local):
    network: nn.Module | None  # whose outermost method has not returned yet

    def __init__(self) -> None:  # for each thread; an attribute of the class instead would break compiled code
        self.network = None


_running = _Running()


def map_octaves(function: Callable[[Features], Any], value: Any) -> Any:
    """Applies a function to octave features in nested tuples, lists, mappings and dataclasses; else the same object."""
    if isinstance(value, Features):
        return function(value)
    if not octaves_in(value):
        return value
    if isinstance(value, (tuple, list)):
        found = [map_octaves(function, item) for item in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    items = {key: map_octaves(function, item) for key, item in _items(value).items()}
    if type(value) is dict:
        return items
    new: Any = copy.copy(value)  # of any class, such as Hugging Face's ModelOutput
    for key, item in items.items():
        if isinstance(value, Mapping):
            new[key] = item
        else:
            object.__setattr__(new, key, item)  # it may be frozen
    return new


def _items(value: Any) -> Mapping[Any, Any]:
    """What a mapping or a dataclass holds; empty for anything else."""
    if isinstance(value, Mapping):
        return value
    known = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)} if known else {}


def octaves_in(value: Any) -> list[Any]:
    """The octave features that `map_octaves` reaches."""
    if isinstance(value, Features):
        return [value]
    items = value if isinstance(value, (tuple, list)) else _items(value).values()
    return [x for item in items for x in octaves_in(item)]


def merge_outputs(network: nn.Module) -> None:
    """Makes a network's forward, and methods such as `forward_features`, merge the Octaves in what they return.

    Its class becomes a subclass of the same name. What such a method returns to another one of the same network stays.
    """
    swap_class(network, _merging(type(network)))  # type: ignore[arg-type]


def return_octaves(network: nn.Module) -> None:
    """Undoes `merge_outputs`, if it was done."""
    if kind := getattr(type(network), "_octvideo_base", None):
        swap_class(network, kind)


def _entry(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _running.network is self:
            return method(self, *args, **kwargs)
        outer, _running.network = _running.network, self
        try:
            with ListedTensors() if torch.compiler.is_compiling() else contextlib.nullcontext():
                output = method(self, *args, **kwargs)
        finally:
            _running.network = outer
        return map_octaves(merged, output)

    return call


@functools.cache
def _merging(kind: Any) -> type[nn.Module]:
    """A subclass whose instances are copied and pickled by way of `kind`, for pickle cannot find it by its name."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made: tuple[Any, ...] = kind.__reduce_ex__(self, max(2, protocol))
        if made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made
        return (_rebuilt, (kind, *made[1][1:]), *made[2:])

    methods = {name: inspect.getattr_static(kind, name) for name in dir(kind) if _ENTRIES.search(name)}
    own = {name for name in methods if name == "forward" or not (name.startswith("_") or hasattr(nn.Module, name))}
    body = {name: _entry(methods[name]) for name in own if inspect.isfunction(methods[name])}
    described = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {"_octvideo_base": kind, "__reduce_ex__": reduce, **described, **body})


def _rebuilt(kind: Any, *args: Any) -> nn.Module:
    new = _merging(kind)
    return new.__new__(new, *args)
