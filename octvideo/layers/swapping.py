"""Giving a module of an existing network another class, in place, and its own one back."""

from __future__ import annotations

from typing import Any

from torch import nn


def swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a module an instance of another class, and remembers the class that it had at first.

    Parameters, buffers, hooks and names stay; the other class must get by with the module's attributes.
    """
    if type(module) is kind:
        return
    original = original_class(module)
    module.__class__ = kind
    if kind is original:
        module.__dict__.pop("_original_class", None)
    else:
        module.__dict__["_original_class"] = original


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was swapped; its present one if it never was."""
    found: Any = module.__dict__.get("_original_class", type(module))
    return found  # type: ignore[no-any-return]


def restore_class(module: nn.Module) -> None:
    """Gives a module the class that it had at first."""
    swap_class(module, original_class(module))
