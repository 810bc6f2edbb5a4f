"""Convolutions called as functions on octave features, and convolution modules with a forward pass of their own."""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from octvideo.layers.convolution import (
    Octave,
    OctaveOptions,
    OctConv1d,
    OctConv2d,
    OctConv3d,
    OctConvTranspose2d,
    OctConvTranspose3d,
    Pairs,
    Plan,
    convolve,
    padding_pairs,
    plan_convolution,
    sizes,
)
from octvideo.layers.octaves import Function, Octaves, define, merged, on_merged, record
from octvideo.layers.several import misfit
from octvideo.layers.shares import shares_of
from octvideo.layers.swapping import original_class, swap_class

_ARGUMENTS = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
_TRANSPOSED_ARGUMENTS = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
_ARGUMENTS_OF: dict[Function, list[str]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _ARGUMENTS),
    **dict.fromkeys((torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED_ARGUMENTS),
}


class _Padded:
    """Features with zeros around them, which a convolution may add itself; for anything else they are padded."""

    def __init__(self, input: Tensor | Octaves, amounts: tuple[int, ...]) -> None:
        self.input, self.amounts = input, amounts

    def padded(self) -> Any:
        return F.pad(self.input, self.amounts)  # type: ignore[arg-type]

    def merged(self) -> Tensor:
        return F.pad(merged(self.input), self.amounts)

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(_Padded, _Padded.padded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.padded(), name)


class _Call(NamedTuple):
    """A call of a convolution, with the padding that was already added to its input taken back."""

    input: Any
    weight: Any
    bias: Tensor | None
    stride: tuple[int, ...]
    pairs: Pairs
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None

    def plan(self, options: OctaveOptions) -> Plan | None:
        """The plan of the call with these options; None if it can have none."""
        size, transposed = tuple(self.weight.shape[2:]), self.output_padding is not None
        one, other = self.weight.shape[0], self.weight.shape[1] * self.groups
        channels = (one, other) if transposed else (other, one)
        misfit = options.of_stride(self.stride, transposed).misfit(*channels, self.groups)
        if misfit or self.input.shape[1] != channels[0]:
            return None
        numbers = (size, self.stride, self.pairs, self.dilation, self.groups, "zeros", self.output_padding)
        compiling = torch.compiler.is_compiling()  # which warns of caches
        planned = plan_convolution.__wrapped__ if compiling else plan_convolution
        plan = planned(options, channels, *numbers)
        return None if plan.problem else plan


def _call(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    given = dict(zip(_ARGUMENTS_OF[func], args, strict=False)) | kwargs
    input, weight, n = given["input"], given["weight"], len(given["weight"].shape) - 2
    size = tuple(weight.shape[2:])
    stride, dilation = (sizes(given.get(name, 1), n) for name in ("stride", "dilation"))
    pairs = padding_pairs(given.get("padding", 0), size, dilation)
    if isinstance(input, _Padded):
        amounts, input = (*input.amounts, *(0,) * (2 * n - len(input.amounts))), input.input
        added = tuple(zip(amounts[0::2], amounts[1::2], strict=True))[::-1]
        pairs = tuple([(a + c, b + d) for (a, b), (c, d) in zip(pairs, added, strict=True)])
        pairs = _pooled(pairs, size, stride, dilation, tuple(input.shape[2:]))
    extra = sizes(given.get("output_padding", 0), n) if "output_padding" in _ARGUMENTS_OF[func] else None
    return _Call(input, weight, given.get("bias"), stride, pairs, dilation, given.get("groups", 1), extra)


def _pooled(
    pairs: Pairs, size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], extent: tuple[int, ...]
) -> Pairs:
    """The padding that serves after pooling by the stride, where TensorFlow's "same" pads strided layers less."""
    result = []
    for pair, k, s, d, n in zip(pairs, size, stride, dilation, extent, strict=True):
        reach = d * (k - 1)
        same = s == 2 and reach % 2 == 0 and (n + sum(pair) - reach - 1) // 2 + 1 == (n + 1) // 2
        result.append((reach // 2, reach // 2) if same and reach - 1 <= sum(pair) <= reach else pair)
    return tuple(result)


def _is_octaves(x: Any) -> bool:
    return isinstance(x, Octaves) and x.axis == 1


def _like(x: Octaves) -> OctaveOptions | None:
    """Options that keep the shares of low channels that features have; None where their low maps suit no layer."""
    alpha = shares_of([count / max(1, x.shape[1]) for count in x.counts[1:]])
    ways = ((OctaveOptions(alpha, temporal=time == 2), (time, 2, 2)[2 - x.dim() :]) for time in (1, 2))
    return next((options for options, factors in ways if not misfit(x, factors)), None)


def _on_octaves(func: Function, *args: Any, **kwargs: Any) -> Any:
    """A convolution with a plain weight: its output keeps the input's share of low channels; any other merges."""
    call = _call(func, args, kwargs)
    x = call.input
    options = _like(x) if _is_octaves(x) and isinstance(call.weight, Tensor) else None
    plan = call.plan(options) if options and x.dim() == call.weight.dim() else None
    return NotImplemented if plan is None else convolve(x, call.weight, call.bias, plan)


define(_ARGUMENTS_OF, _on_octaves)


class _Routed(TorchFunctionMode):
    """Gives the convolution that a module calls in its forward pass the module's octave options."""

    def __init__(self, module: "OctaveForward") -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad:
            return _pad(*args, **kwargs)
        if func in _ARGUMENTS_OF:
            return self.module._convolve(func, args, kwargs)
        return func(*args, **kwargs)


def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    features = isinstance(input, (Tensor, Octaves)) and 0 < len(pad) <= 2 * (len(input.shape) - 2)
    if features and mode == "constant" and not value and min(pad) >= 0:
        return _Padded(input, tuple(map(int, pad)))
    return F.pad(input, pad, mode, value)


class OctaveForward(Octave):
    """In front of a convolution's class that has a forward pass of its own, such as one that standardises its weight.

    That forward pass runs unchanged; the convolution that it calls with a weight of the module's shape is octave by the
    module's options. Zeros that it pads are left to the convolution. Where octaves would lose their alignment, the
    convolution acts on the merged tensor and gives a Tensor.
    """

    def forward(self, input: Tensor | Octaves, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            return self._node(input, **kwargs)
        if self._plan.plain and not isinstance(input, Octaves):
            return super().forward(input, *args, **kwargs)
        with _Routed(self):
            output = super().forward(input, *args, **kwargs)
        return output.padded() if isinstance(output, _Padded) else output

    def _convolve(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _call(func, args, kwargs)
        x, shape, octaves = call.input, tuple(call.weight.shape), _is_octaves(call.input)
        own = (shape, call.groups) == (self._plan.weight_shape, self.groups)
        if not (own and (octaves or isinstance(x, Tensor)) and x.dim() == len(shape)):
            return func(*args, **kwargs)
        plan = call.plan(self.options)
        if plan and (octaves or not plan.plain):
            return convolve(x, call.weight, call.bias, plan)
        if octaves:
            record(func, [x])
        args, kwargs = tree_map_only(_Padded, _Padded.merged, (args, kwargs))
        return on_merged(func, *args, **kwargs)


_OCTAVE: dict[type[nn.Module], type[Octave]] = {
    nn.Conv1d: OctConv1d,
    nn.Conv2d: OctConv2d,
    nn.Conv3d: OctConv3d,
    nn.ConvTranspose2d: OctConvTranspose2d,
    nn.ConvTranspose3d: OctConvTranspose3d,
}


@cache
def _octave_class_of(kind: Any) -> type[Octave] | None:
    plain = next((plain for plain in _OCTAVE if issubclass(kind, plain)), None)
    if plain is None or issubclass(kind, LazyModuleMixin):  # whose class has other work first
        return None
    if kind is plain or issubclass(kind, Octave):
        octave: type[Octave] = _OCTAVE.get(kind, kind)
        return octave
    as_plain = all(getattr(kind, name, None) is getattr(plain, name, None) for name in ("forward", "_conv_forward"))
    members = {"__reduce_ex__": _reduce, "__module__": kind.__module__, "__doc__": kind.__doc__, "_kind": kind}
    return type(kind.__name__, (_OCTAVE[plain] if as_plain else OctaveForward, kind), members)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles and copies by way of the class that the module had."""
    reduced: Any = object.__reduce_ex__(self, max(2, protocol))
    return _new, (self._kind,), *reduced[2:]


def _new(kind: Any) -> nn.Module:
    octave: Any = _octave_class_of(kind)
    module: nn.Module = octave.__new__(octave)
    return module


def octave_class(module: nn.Module) -> type[Octave] | None:
    """The class that makes a module an octave convolution when swapped in (`swap_class`); None if there is none.

    For a subclass of nn.Conv1d/2d/3d or nn.ConvTranspose2d/3d, that is a subclass of it of the same name.
    """
    kind: Any = type(module)
    return None if "forward" in module.__dict__ else _octave_class_of(kind)


def restore(module: nn.Module) -> None:
    """Makes an octave convolution what it was; a module built as octave becomes its plain base."""
    kind: Any = original_class(module)
    if type(module) not in (kind, _octave_class_of(kind)):  # parametrized since then, which is a class of its own
        module.set_options(OctaveOptions(0))  # type: ignore[operator]
        return
    swap_class(module, kind)
    plain: dict[Any, Any] = {octave: plain for plain, octave in _OCTAVE.items()}
    module.__class__ = plain.get(kind, kind)
    for name in ("options", "_plan"):
        module.__dict__.pop(name, None)
