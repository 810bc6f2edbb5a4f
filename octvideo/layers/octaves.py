"""Octaves: a feature map whose channels live at two resolutions, and how torch functions reach it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from operator import attrgetter
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import TreeSpec, register_pytree_node, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from octvideo.errors import UserError
from octvideo.layers import merging
from octvideo.layers.parts import Parts, join_by_parts, join_pieces, split_by_parts
from octvideo.layers.resampling import average_pool, factors_between, pool_gradient, upsample

Function = Callable[..., Any]
Context = tuple[Parts, int]


class Features:
    """What Octaves and views of them share: a Tensor's methods, and torch functions that act on them."""

    merge: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return apply(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:  # a Tensor's method, as if it were called on the vanilla tensor
        if callable(method := getattr(Tensor, name, None)) and not name.startswith("__"):
            return partial(_method, method, self)
        raise AttributeError(f"octave features have no attribute {name!r}: take it from .high, .low or .merge()")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.merge().__array__(*args, **kwargs)


def _method(method: Function, self: Features, *args: Any, **kwargs: Any) -> Any:
    return self.__torch_function__(method, (), (self, *args), kwargs)


def _registered(kind: type[Octaves]) -> type[Octaves]:
    """Callers that walk nested values (checkpointing, export) must see two tensors, and keep the parts and the axis."""
    register_pytree_node(
        kind,
        lambda x: ([x.high, x.low], (x.parts, x.axis)),
        lambda maps, context: Octaves(*maps, *context),
        serialized_type_name=f"octvideo.Octaves{kind._own_context or ''}",
        to_dumpable_context=lambda context: [[list(part) for part in context[0]], context[1]],
        from_dumpable_context=lambda context: (tuple((high, low) for high, low in context[0]), context[1]),
    )
    return kind


@_registered
class Octaves(Features, NamedTuple("_Maps", [("high", Tensor), ("low", Any)])):
    """A feature map in two octaves: some channels at full resolution, the others at half; or in several.

    `shape`, `size()`, `dim()`, `ndim`, `dtype`, `device` and `requires_grad` are the vanilla Tensor's, and ordinary
    modules (batch norm, activations, dropout, pooling, `+`, `torch.cat`, slices of channels, views that fold time into
    the batch) apply unchanged, in any spelling: `torch.relu(x)`, `F.relu(x)`, `x.relu()`, `x.relu_()`. A function that
    has no meaning on two resolutions acts on `merge()`, the vanilla-shaped Tensor, and is recorded in the network's
    `octave_report`. Section 3.1 of Chen et al., ICCV 2019.

    Hooks, `grad`, `numel()` and arrays are the vanilla Tensor's too, so memory is less than `numel() * element_size()`.
    As a tuple it has two items, `high, low = x`, but indices are the vanilla tensor's: `x[0]` is the first clip. Only
    code that asks `isinstance`, as tools do to take a tuple's first item for a layer's output, gets `merge()` for it.

    Args:
        high: (B, C_high, T, H, W) or (B, C_high, H, W).
        low: the same with C_low channels; H and W halved and rounded up, for a temporal layer T too. Or Octaves of it.
        parts: (high, low) channels of each piece that was concatenated, or of each group of a convolution. Weights are
            read in the vanilla order: piece 1's high channels, piece 1's low ones, piece 2's ... Default: one piece.
        axis: the dimension of the channels; others after a permutation or where time was folded into the batch.
    """

    parts: Parts
    axis: int
    _own_context: Context | None = None  # of a subclass for features of these pieces
    __array_ufunc__ = None  # numpy numbers leave `number * features` to __rmul__
    _make = None  # type: ignore[assignment]  # pytree rebuilds what has a namedtuple's _make from its two fields alone

    def __new__(cls, high: Tensor, low: Tensor | Octaves, parts: Parts | None = None, axis: int = 1) -> Octaves:
        if cls._own_context is not None and parts is None:
            parts, axis = cls._own_context
        elif parts is None:
            parts = ((high.shape[axis], low.shape[axis]),)
        elif len(parts) > 1 or not isinstance(parts, tuple):
            parts = join_pieces(parts)
        usual = (len(parts) == 1 and axis == 1) or torch.compiler.is_compiling()
        self = super().__new__(Octaves if usual else _class_of(parts, axis), high, low)
        self.parts, self.axis = parts, axis
        return self

    def __reduce__(self) -> tuple[type[Octaves], tuple[Any, ...]]:
        return Octaves, (self.high, self.low, self.parts, self.axis)

    def of(self, high: Tensor, low: Tensor | Octaves) -> Octaves:
        """Other maps with the same order of channels."""
        return Octaves(high, low, self.parts, self.axis)

    @property
    def shape(self) -> torch.Size:
        """All channels, at the high map's size."""
        high, low = self.maps_like()
        size = list(high.shape)
        size[self.axis] += low.shape[self.axis]
        return torch.Size(size)

    def maps_like(self) -> tuple[Tensor, Any]:
        """Two maps of the maps' shapes, types and devices: the maps themselves, unless they are yet to be made."""
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """How many channels are at the full resolution, at half, a quarter ..."""
        high, low = self.maps_like()
        return high.shape[self.axis], *(low.counts if isinstance(low, Octaves) else (low.shape[self.axis],))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        high, _ = self.maps_like()
        return high.dim()

    ndim = property(dim)
    data = property(lambda self: self.detach())
    T = property(lambda self: self.permute(*range(self.dim())[::-1]))
    mT = property(lambda self: self.transpose(-1, -2))  # noqa: N815

    @property
    def dtype(self) -> torch.dtype:
        high, _ = self.maps_like()
        return high.dtype

    @property
    def device(self) -> torch.device:
        high, _ = self.maps_like()
        return high.device

    @property
    def requires_grad(self) -> bool:
        return self.high.requires_grad or self.low.requires_grad

    @property
    def factors(self) -> tuple[int, ...]:
        """By what each dimension after the channels is divided in the low map: 1 or 2."""
        high, low = self.maps_like()
        return factors_between(high.shape[self.axis + 1 :], low.shape[self.axis + 1 :])

    @property
    def ratios(self) -> tuple[int, ...]:
        """By what every dimension is divided in the low map: 1 or 2; 1 for the channels."""
        pairs = enumerate(zip(*(x.shape for x in self.maps_like()), strict=True))
        return tuple([1 if high == low or dim == self.axis else 2 for dim, (high, low) in pairs])

    def merge(self) -> Tensor:
        """The vanilla-shaped Tensor: the low map upsampled, and the channels in the vanilla order."""
        return join_by_parts(self.high, self.upsampled(self.low), self.parts, self.axis)

    def upsampled(self, low: Tensor | Octaves) -> Tensor:
        """A map of the low one's size at the high one's."""
        low = low.merge() if isinstance(low, Octaves) else low
        if self.axis == 1 and self.high.shape[0] == self.low.shape[0]:
            return upsample(low, self.high.shape[2:])
        size = [n for dim, n in enumerate(self.high.shape) if dim != self.axis]  # any of them may be halved
        return upsample(low.movedim(self.axis, 0)[None], size)[0].movedim(0, self.axis)

    def pooled(self, x: Tensor) -> Tensor:
        """A map of the high one's size at the low one's; it stays as it is in dimensions where it has one position."""
        ratios = [1 if n == 1 else ratio for n, ratio in zip(x.shape, self.ratios, strict=True)]
        if self.axis == 1 and ratios[0] == 1:
            return average_pool(x, ratios[2:])
        del ratios[self.axis]
        return average_pool(x.movedim(self.axis, 0)[None], ratios)[0].movedim(0, self.axis)

    def alike(self, x: Tensor) -> Octaves:
        """A vanilla-shaped Tensor as octaves of the same parts; its low channels are averaged."""
        high, low = split_by_parts(x, self.parts, self.axis)
        low = self.pooled(low)
        return self.of(high, self.low.alike(low) if isinstance(self.low, Octaves) else low)

    def register_hook(self, hook: Function) -> RemovableHandle:
        """Calls hook(gradient of the vanilla tensor) in the backward pass; what it returns must be None.

        A low position's gradient is shared out evenly to the positions that it covers, as behind their average.
        """
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on octave features that require no gradient")
        maps, spec = tree_flatten(self)
        shapes = [x.shape for x in maps]  # not self, which the hook would keep alive

        def call(gradients: Sequence[Tensor | None]) -> None:
            if hook(_vanilla_gradient(gradients, shapes, spec)) is not None:
                raise UserError("a hook cannot replace the gradient of octave features: register it on .high and .low")

        return register_multi_grad_hook([x if x.requires_grad else x.detach().requires_grad_() for x in maps], call)

    def retain_grad(self) -> None:
        for x in self:
            if x.requires_grad:  # a map without channels may not
                x.retain_grad()

    @property
    def grad(self) -> Tensor | None:
        """The gradient that hooks are called with, if the maps kept theirs."""
        maps, spec = tree_flatten(self)
        gradients = [x.grad for x in maps]
        known = any(gradient is not None for gradient in gradients)
        return _vanilla_gradient(gradients, [x.shape for x in maps], spec) if known else None

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:
            code = sys._getframe(1).f_code
            if _is_compiled(code):  # it reads the two maps, as those of any tuple
                return tuple.__getitem__(self, index)
            if index == 0 and "isinstance" in code.co_names:  # tools take a tuple's first item for a layer's output
                what = "x[0] of octave features is taken for all of the vanilla tensor; x[:1] is the first clip"
                warnings.warn(what, stacklevel=2)
                return self.merge()
        return apply(Tensor.__getitem__, self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        apply(Tensor.__setitem__, self, index, value)

    def __bool__(self) -> bool:
        if self.dtype == torch.bool:
            raise RuntimeError(f"octave comparisons of shape {tuple(self.shape)} are neither true nor false")
        return True


def _is_compiled(code: CodeType) -> bool:
    """Whether code is a guard of torch.compile's, or was generated by it."""
    compiler: Any = sys.modules.get("torch._dynamo.convert_frame")
    return code.co_filename == "<string>" or code in getattr(compiler, "output_codes", ())


for _name in ("layout", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"):
    setattr(Octaves, _name, property(attrgetter(f"high.{_name}")))


@cache
def _class_of(parts: Parts, axis: int) -> type[Octaves]:
    """Octaves that know their pieces by their class: backward hooks, FSDP and others rebuild x as type(x)(*x)."""
    return _registered(type("Octaves", (Octaves,), {"_own_context": (parts, axis), "__doc__": Octaves.__doc__}))


def _vanilla_gradient(gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size], spec: TreeSpec) -> Tensor:
    """The gradient of the vanilla tensor from those of all maps, of which some may be missing."""
    some = next(gradient for gradient in gradients if gradient is not None)
    pairs = zip(gradients, shapes, strict=True)
    found = [some.new_zeros(shape) if gradient is None else gradient for gradient, shape in pairs]
    return _shared_out(tree_unflatten(found, spec))


def _shared_out(gradients: Octaves) -> Tensor:
    high, low = gradients.high, _shared_out(gradients.low) if isinstance(gradients.low, Octaves) else gradients.low
    low, scale = pool_gradient(low, high, factors_between(high.shape[2:], low.shape[2:]))
    return Octaves(high, low * scale, gradients.parts).merge()


def _is_features(value: Any) -> bool:
    return isinstance(value, Features)


def features_among(values: Any) -> list[Any]:
    """The octave features in nested values."""
    return [leaf for leaf in tree_leaves(values, is_leaf=_is_features) if isinstance(leaf, Features)]


def merged(value: Any) -> Any:
    """Octave features as the vanilla tensor; anything else as it is."""
    return value.merge() if isinstance(value, Features) else value


def on_merged(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Applies a function to the vanilla tensors of all octave features in its arguments."""
    args, kwargs = tree_map(merged, (args, kwargs), is_leaf=_is_features)
    return func(*args, **kwargs)


def record(func: Function, features: Sequence[Any]) -> None:
    """Records that a function has no meaning on these features and merges them, if that costs anything."""
    sized = [x for x in features if not isinstance(x, Octaves) or max(x.ratios) > 1]
    if sized:  # maps of one position are the vanilla tensor, with nothing to upsample
        merging.record(getattr(func, "__name__", str(func)), sized[0].shape, *tree_leaves([x.low for x in sized]))


_HANDLER_OF: dict[Function, Function] = {}


def define(functions: Iterable[Function], handler: Function) -> None:
    """Says what functions mean on octave features: handler(func, *args, **kwargs).

    A handler that returns NotImplemented leaves the call to the vanilla tensor.
    """
    _HANDLER_OF.update(dict.fromkeys(functions, handler))


def apply(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Applies a torch function to arguments of which some are octave features."""
    handler = _HANDLER_OF.get(func)
    result = NotImplemented if handler is None else handler(func, *args, **kwargs)
    if result is NotImplemented:
        record(func, features_among((args, kwargs)))
        # The merged tensor may lie in channels_last where the vanilla one would not.
        result = on_merged(Tensor.reshape if func is Tensor.view else func, *args, **kwargs)
        if re.fullmatch(r"[a-z]\w*[a-z0-9]_", getattr(func, "__name__", "")) and isinstance(args[0], Octaves):
            return _written(args[0], result, func)
    return result


def on_map(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Applies a function to one map, which may be octave features: a method of Tensor's would not take them."""
    features = func in _HANDLER_OF and any(isinstance(value, Octaves) for value in (*args, *kwargs.values()))
    return apply(func, *args, **kwargs) if features else func(*args, **kwargs)


def _written(x: Octaves, result: Tensor, func: Function) -> Octaves:
    """Writes into both maps what a function made of the merged tensor in place; low channels are averaged."""
    if result.shape != x.shape:
        what = f"{func.__name__} cannot change octave features of shape {tuple(x.shape)} in place"
        raise TypeError(f"{what}: call it on .merge()")
    for map_, new in zip(x, x.alike(result), strict=True):
        map_.copy_(new)
    return x


_checkpoint_forward: Function = CheckpointFunction.forward


def _refuse_octaves(ctx: Any, run_function: Function, preserve_rng_state: bool, *args: Any) -> Any:
    """The forward pass of reentrant checkpointing, which takes gradients from and to plain Tensors alone."""
    outputs = _checkpoint_forward(ctx, run_function, preserve_rng_state, *args)
    if not torch.is_inference_mode_enabled() and features_among((args, outputs)):
        lost = "torch.utils.checkpoint(..., use_reentrant=True) would silently lose the gradients of octave features"
        raise RuntimeError(f"{lost}: pass use_reentrant=False")
    return outputs


CheckpointFunction.forward = staticmethod(_refuse_octaves)  # type: ignore[method-assign]
