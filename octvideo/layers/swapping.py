"""Giving a module of an existing network another class, in place, and its own class back."""

from __future__ import annotations

from torch import nn


def swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a module an instance of another class, which must get by with its attributes, and keeps its original one.

    Parameters, buffers, hooks and names stay.
    """
    original = original_class(module)
    module.__class__ = kind
    module.__dict__["_original_class"] = original
    if kind is original:
        del module.__dict__["_original_class"]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was swapped; its present one if it never was."""
    found: type[nn.Module] = module.__dict__.get("_original_class", type(module))
    return found


def restore_class(module: nn.Module) -> None:
    """Gives a module its original class."""
    swap_class(module, original_class(module))
