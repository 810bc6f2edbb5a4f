"""Giving a module of an existing network another class, in place, and its own class back."""

from torch import nn


def swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a module an instance of another class, whose methods must get by with its attributes, which all stay."""
    module.__dict__["_original_class"] = original_class(module)
    module.__class__ = kind
    if kind is original_class(module):
        del module.__dict__["_original_class"]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was swapped; its present one if it never was."""
    kind: type[nn.Module] = module.__dict__.get("_original_class", type(module))
    return kind
