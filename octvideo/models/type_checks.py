"""Code that asks for the type of features is given the vanilla tensor: it would take Octaves for a tuple."""

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from octvideo.layers.octaves import Features, Octaves, merged, record

_CONVERSIONS = ("as_tensor", "asarray", "is_tensor")


def merge_where_types_are_asked(network: nn.Module) -> None:
    """Merges what modules are given whose forward asks whether an argument is a Tensor or a tuple.

    Where it asks that of something else, or converts it by torch.as_tensor, the outputs of the modules that it calls
    are merged. Also makes einops take octave features, if it is in use.
    """
    for module in network.modules():
        arguments, others = _asks(type(module).forward)
        if arguments:
            module.register_forward_pre_hook(_merge_arguments, with_kwargs=True)
        for child in _called(module) if others else ():
            child.register_forward_hook(_merge_output)
    if "einops" in sys.modules:
        _teach_einops()


def forget_types(network: nn.Module) -> None:
    """Undoes `merge_where_types_are_asked`, if it was done."""
    for module in network.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_merge_arguments, _merge_output)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


@functools.cache
def _asks(forward: Any) -> tuple[bool, bool]:
    """Whether a method asks for the types of (its arguments, anything else); no where its source is not known."""
    if re.match(r"(torch|octvideo)\.", forward.__module__ or ""):
        return False, False
    try:
        function: Any = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False, False
    nodes = list(ast.walk(function))
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    arguments = others = False
    for node in nodes:
        if isinstance(node, ast.Call) and node.args and _is_question(node):
            names = {part.id for part in ast.walk(node.args[0]) if isinstance(part, ast.Name)} - {"self", "torch"}
            arguments |= bool(names & parameters)
            others |= not isinstance(node.args[0], ast.Name) or not names <= parameters - assigned
    return arguments, others


def _is_question(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    kinds = ast.unparse(call.args[1]) if name == "isinstance" and len(call.args) > 1 else ""
    return name in _CONVERSIONS or bool(re.search(r"Tensor|[tT]uple|Sequence|Iterable", kinds))


def _called(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called(child)
        else:
            yield child


def _merge_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if found := [x for x in (*args, *kwargs.values()) if isinstance(x, Octaves)]:
        record(isinstance, found)
    return tuple(merged(x) for x in args), {name: merged(x) for name, x in kwargs.items()}


def _merge_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Octaves):
        record(isinstance, [output])
    return merged(output)


@functools.cache
def _teach_einops() -> type:
    from einops import _backends

    class OctavesBackend(_backends.TorchBackend):
        """Octave features answer all that einops calls; it finds this class by itself."""

        framework_name = "octvideo.layers"

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, Features)

    return OctavesBackend
