"""Octaves: a feature map whose channels live at two resolutions, and how torch functions apply to it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from octvideo.errors import UserError
from octvideo.layers import merging
from octvideo.layers.parts import Parts, join_by_parts, join_pieces, split_by_parts
from octvideo.layers.resampling import average_pool, factors_between, halved, pool_gradient, upsample

Function = Callable[..., Any]
WAY_OUT = (
    "call .merge() on them first for the vanilla tensor; in a network that octavize changed, keep the convolutions "
    "that lead there at alpha 0, by skip=... or {regex: 0}"
)


def _registered(kind: type[Octaves]) -> type[Octaves]:
    """Callers that walk nested values (checkpointing, export) must see two tensors, and keep the parts."""
    register_pytree_node(
        kind,
        lambda x: ([x.high, x.low], x.parts),
        lambda maps, parts: Octaves(*maps, parts),  # type: ignore[call-arg]
        serialized_type_name=f"octvideo.Octaves{kind._own_parts or ''}",
        to_dumpable_context=lambda parts: [list(part) for part in parts],
        from_dumpable_context=lambda parts: tuple((high, low) for high, low in parts),
    )
    return kind


@_registered
class Octaves(NamedTuple("_Maps", [("high", Tensor), ("low", Tensor)])):
    """A feature map in two octaves: some channels at full resolution, the others at half.

    `shape`, `size()`, `dim()`, `ndim`, `dtype`, `device` and `requires_grad` are the vanilla Tensor's, and ordinary
    modules (batch norm, activations, dropout, pooling, `+`, `torch.cat`, global pooling) apply unchanged, in any
    spelling: `torch.relu(x)`, `F.relu(x)`, `x.relu()`, `x.relu_()`. A function that has no meaning on two resolutions
    raises TypeError; `merge()` gives the vanilla-shaped Tensor. Section 3.1 of Chen et al., ICCV 2019.

    Hooks, `grad`, `numel()` and arrays are the vanilla Tensor's too, so memory is less than `numel() * element_size()`.
    As a tuple it has two items, `high, low = x`, but `x[0]`, which tools take of a tuple, is all: `merge()`. Slices and
    lists of indices choose clips of the batch.

    Args:
        high: (B, C_high, T, H, W) or (B, C_high, H, W).
        low: the same with C_low channels; H and W halved and rounded up, for a temporal layer T too.
        parts: (high, low) channels of each piece that was concatenated, or of each group of a convolution. Weights are
            read in the vanilla order: piece 1's high channels, piece 1's low ones, piece 2's ... Default: one piece.
    """

    parts: Parts
    axis: int = 1
    _own_parts: Parts | None = None  # of a subclass for features of these pieces
    __array_ufunc__ = None  # numpy numbers leave `number * features` to __rmul__
    _make = None  # type: ignore[assignment]  # pytree rebuilds what has a namedtuple's _make from its two fields alone

    def __new__(cls, high: Tensor, low: Tensor, parts: Parts | None = None) -> Octaves:
        if parts is None:
            parts = cls._own_parts or ((high.shape[1], low.shape[1]),)
        elif len(parts) > 1 or not isinstance(parts, tuple):
            parts = join_pieces(parts)
        kind = _class_of_parts(parts) if len(parts) > 1 and not torch.compiler.is_compiling() else Octaves
        self = super().__new__(kind, high, low)
        self.parts = parts
        return self

    def __reduce__(self) -> tuple[type[Octaves], tuple[Tensor, Tensor, Parts]]:
        return Octaves, (self.high, self.low, self.parts)

    @property
    def shape(self) -> torch.Size:
        """All channels, at the high map's size."""
        batch, channels, *extent = self.high.shape
        return torch.Size((batch, channels + self.low.shape[1], *extent))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.high.dim()

    ndim = property(dim)
    data = property(lambda self: self.detach())

    @property
    def dtype(self) -> torch.dtype:
        return self.high.dtype

    @property
    def device(self) -> torch.device:
        return self.high.device

    @property
    def requires_grad(self) -> bool:
        return self.high.requires_grad or self.low.requires_grad

    @property
    def factors(self) -> tuple[int, ...]:
        """By what each dimension after the channels is divided in the low map: 1 or 2."""
        return factors_between(self.high.shape[2:], self.low.shape[2:])

    def merge(self) -> Tensor:
        """The vanilla-shaped Tensor: the low map upsampled, and the channels in the vanilla order."""
        return join_by_parts(self.high, upsample(self.low, self.high.shape[2:]), self.parts, 1)

    def register_hook(self, hook: Function) -> RemovableHandle:
        """Calls hook(gradient of the vanilla tensor) in the backward pass; what it returns must be None.

        A low position's gradient is shared out evenly to the positions that it covers, as behind their average.
        """
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on octave features that require no gradient")
        shapes, parts = [x.shape for x in self], self.parts  # not self, which the hook would keep alive

        def call(gradients: Sequence[Tensor | None]) -> None:
            if hook(_vanilla_gradient(gradients, shapes, parts)) is not None:
                raise UserError("a hook cannot replace the gradient of octave features: register it on .high and .low")

        return register_multi_grad_hook([x if x.requires_grad else x.detach().requires_grad_() for x in self], call)

    def retain_grad(self) -> None:
        for x in self:
            if x.requires_grad:  # a map without channels may not
                x.retain_grad()

    @property
    def grad(self) -> Tensor | None:
        """The gradient that hooks are called with, if the maps kept theirs."""
        gradients, shapes = [x.grad for x in self], [x.shape for x in self]
        known = any(gradient is not None for gradient in gradients)
        return _vanilla_gradient(gradients, shapes, self.parts) if known else None

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return on_merged(Tensor.__array__, self, *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:  # a Tensor's method, as if it were called on the vanilla tensor
        if callable(method := getattr(Tensor, name, None)) and not name.startswith("__"):
            return partial(_apply, method, self)
        raise AttributeError(f"octave features have no attribute {name!r}: take it from .high, .low or .merge()")

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and index == 0:  # tools take the first item of a tuple for a layer's output
            warnings.warn("x[0] of octave features is all of the vanilla tensor; x[:1] is the first clip", stacklevel=2)
            return self.merge()
        if isinstance(index, (slice, list)) or (isinstance(index, Tensor) and index.dim() == 1):
            return Octaves(self.high[index], self.low[index], self.parts)
        advice = f"a slice or list of indices chooses clips of the batch; for others take .high or .low, or {WAY_OUT}"
        raise TypeError(f"octave features of shape {tuple(self.shape)} cannot be indexed by {index!r}: {advice}")

    def __bool__(self) -> bool:
        if self.dtype == torch.bool:
            raise RuntimeError(f"octave comparisons of shape {tuple(self.shape)} are neither true nor false")
        return True


@cache
def _class_of_parts(parts: Parts) -> type[Octaves]:
    """Octaves that know their pieces by their class: backward hooks, FSDP and others rebuild x as type(x)(*x)."""
    return _registered(type("Octaves", (Octaves,), {"_own_parts": parts, "__doc__": Octaves.__doc__}))


def _octaves_among(values: Any) -> list[Octaves]:
    return [leaf for leaf in tree_leaves(values, is_leaf=lambda x: isinstance(x, Octaves)) if isinstance(leaf, Octaves)]


def on_merged(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Applies a function to the vanilla tensors of all Octaves in its arguments."""
    args, kwargs = tree_map_only(Octaves, Octaves.merge, (args, kwargs), is_leaf=lambda x: isinstance(x, Octaves))
    return func(*args, **kwargs)


def merged(value: Any) -> Any:
    """Octave features as the vanilla tensor; anything else as it is."""
    return value.merge() if isinstance(value, Octaves) else value


def record(func: Function, features: Sequence[Any]) -> None:
    """Records that a function has no meaning on these features and merges them."""
    merging.record(getattr(func, "__name__", str(func)), features[0].shape, *(x.low for x in features))


def define(functions: Iterable[Function], handler: Function) -> None:
    """Says what functions mean on octave features: handler(func, *args, **kwargs).

    A handler that returns NotImplemented leaves the call to the vanilla tensor.
    """
    _HANDLER_OF.update(dict.fromkeys(functions, handler))


def _vanilla_gradient(gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size], parts: Parts) -> Tensor:
    """The gradient of the vanilla tensor from those of the two maps, of which one may be missing."""
    some = next(gradient for gradient in gradients if gradient is not None)
    pairs = zip(gradients, shapes, strict=True)
    high, low = (some.new_zeros(shape) if gradient is None else gradient for gradient, shape in pairs)
    low, scale = pool_gradient(low, high, factors_between(high.shape[2:], low.shape[2:]))
    return Octaves(high, low * scale, parts).merge()


def _undefined(what: str, octaves: Iterable[Octaves], why: str = "") -> TypeError:
    shapes = [tuple(x.shape) for x in octaves]
    return TypeError(f"{what} is not defined on octave features of shape {shapes}: {why}{WAY_OUT}")


def _apply(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Applies a torch function to arguments of which some are Octaves."""
    if func in _HANDLER_OF:
        result = _HANDLER_OF[func](func, *args, **kwargs)
        if result is NotImplemented:
            record(func, _octaves_among((args, kwargs)))
            result = on_merged(func, *args, **kwargs)
        return result
    octaves = _octaves_among((args, kwargs))
    if all(max(x.factors) == 1 for x in octaves):  # maps of one position: the vanilla tensor, nothing upsampled
        return on_merged(func, *args, **kwargs)
    raise _undefined(getattr(func, "__name__", str(func)), octaves)


_checkpoint_forward: Function = CheckpointFunction.forward


def _refuse_octaves(ctx: Any, run_function: Function, preserve_rng_state: bool, *args: Any) -> Any:
    """The forward pass of reentrant checkpointing, which takes gradients from and to plain Tensors alone."""
    outputs = _checkpoint_forward(ctx, run_function, preserve_rng_state, *args)
    if not torch.is_inference_mode_enabled() and _octaves_among((args, outputs)):
        lost = "torch.utils.checkpoint(..., use_reentrant=True) would silently lose the gradients of octave features"
        raise RuntimeError(f"{lost}: pass use_reentrant=False")
    return outputs


CheckpointFunction.forward = staticmethod(_refuse_octaves)  # type: ignore[method-assign]


def _maps_beside(value: Any, x: Octaves) -> tuple[Any, Any]:
    """What each map of `x` meets in an elementwise function; a full-size Tensor is averaged for the low map."""
    if isinstance(value, Octaves):
        gate = max(value.factors) == 1  # one number a channel (or frame): each map takes its share
        if value.parts == x.parts and (gate or value.factors == x.factors):
            return value.high, value.low
        if not gate:
            splits = [f"split as {features.parts} of factors {features.factors}" for features in (x, value)]
            cure = "give both layers the same alpha, groups and temporal, or call .merge()"
            raise UserError(f"octave features {splits[0]} meet others {splits[1]}: {cure}")
        value = value.merge()
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.dim() <= x.dim()):
        return value, value
    value = value[(None,) * (x.dim() - value.dim())]
    if value.dim() > x.dim() or any(n not in (1, want) for n, want in zip(value.shape[1:], x.shape[1:], strict=False)):
        raise UserError(f"a Tensor of shape {tuple(value.shape)} meets octave features of shape {tuple(x.shape)}")
    high, low = (value, value) if value.shape[1] == 1 else split_by_parts(value, x.parts, 1)
    factors = [1 if size == 1 else factor for size, factor in zip(value.shape[2:], x.factors, strict=True)]
    if max(factors) > 1 and not value.is_floating_point():
        raise TypeError(f"a full-size Tensor of {value.dtype} cannot be averaged to meet octave features; {WAY_OUT}")
    return high, average_pool(low, factors)


def _elementwise(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Applies a function of single positions to each map; `tensor += octaves` gives the name a new sum."""
    func = _AUGMENTED.get(func, func)
    values = (*args, *kwargs.values())
    octaves = [value for value in values if isinstance(value, Octaves)]
    x = next((value for value in octaves if max(value.factors) > 1), octaves[0])  # the others may be gates
    if max(x.factors) == 1 and any(
        isinstance(value, Tensor) and value.dim() == x.dim() and value.shape[2:].numel() > x.shape[2:].numel()
        for value in values
    ):  # gates of one position that meet a plain Tensor: the result is plain
        return on_merged(func, *args, **kwargs)
    if func in _IN_PLACE and not isinstance(args[0] if args else kwargs["input"], Octaves):
        raise TypeError(f"{func.__name__} cannot write octave features of shape {tuple(x.shape)} into a Tensor")
    highs, lows = zip(*(_maps_beside(value, x) for value in values), strict=True)
    n = len(args)
    high, low = (func(*maps[:n], **dict(zip(kwargs, maps[n:], strict=True))) for maps in (highs, lows))
    return Octaves(high, low, x.parts)


def _of_high(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Any:
    return func(input.high, *args, **kwargs)


def _prelu(func: Function, input: Octaves, weight: Tensor) -> Octaves:
    high, low = (weight, weight) if weight.numel() == 1 else split_by_parts(weight, input.parts, 0)
    return Octaves(func(input.high, high), func(input.low, low), input.parts)


def _per_channel(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pools or resizes a map, even one without channels, which torch refuses."""
    if x.shape[1]:
        return func(x, *args, **kwargs)
    return func(x.new_zeros((x.shape[0], 1, *x.shape[2:])), *args, **kwargs)[:, :0]


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _pool(names: str, func: Function, input: Octaves, kernel_size: Any, *args: Any, **named: Any) -> Any:
    """Pools each map, and repeats the border of the low one where it would come out too small.

    A pool of 2 takes 14 positions to 7, so 7 low ones must become 4: the last window is the last position. `names` are
    those of the pool's arguments after the kernel's size. An average over all that was halved is a global pool.
    """
    given = dict(zip(names.split(), args, strict=False)) | named
    given.pop("return_indices", None)  # always False: torch calls another function for True
    up, axes = given.pop("ceil_mode", False), range(input.dim() - 2)
    numbers = (kernel_size, given.get("stride"), given.get("padding", 0), given.get("dilation", 1))
    kernels, strides, paddings, dilations = (_sizes(kernel_size if n is None else n, len(axes)) for n in numbers)
    pool = partial(_per_channel, partial(func, **given))
    whole = [axis for axis in axes if input.factors[axis] == 2 and kernels[axis] == input.high.shape[axis + 2]]
    if "divisor_override" in names and 0 < input.factors.count(2) == len(whole) and not any(paddings):
        if given.get("divisor_override") is not None:
            raise _undefined(f"{func.__name__} of all positions with a divisor of its own", [input])
        windows = ([x.shape[axis + 2] if axis in whole else kernels[axis] for axis in axes] for x in input)
        high, low = (pool(x, window, ceil_mode=up) for x, window in zip(input, windows, strict=True))
        return join_by_parts(high, low, input.parts, 1)

    high, low = pool(input.high, kernel_size, ceil_mode=up), input.low
    border: list[int] = []
    for axis, want in enumerate(halved(high.shape[2:], input.factors)):
        have, step, start = low.shape[axis + 2], strides[axis], (want - 1) * strides[axis] - paddings[axis]
        needed = start + dilations[axis] * (kernels[axis] - 1) + 1 - paddings[axis]
        if (needed > have and (step == 1 or start >= have)) or needed + step <= have:
            raise _mismatch("this window", input, high)
        border = [0, max(0, needed - have), *border]
    low = _per_channel(F.pad, low, border, mode="replicate") if any(border) else low
    return Octaves(high, pool(low, kernel_size), input.parts)


def _mismatch(what: str, input: Octaves, high: Tensor) -> UserError:
    before, low, after = (tuple(x.shape[2:]) for x in (*input, high))
    takes = f"{what} takes the high map from size {before} to {after}"
    return UserError(f"{takes}, which the low map of size {low} cannot match; {WAY_OUT}")


def _adaptive(func: Function, input: Octaves, output_size: Any, return_indices: bool = False) -> Tensor:
    """Adaptive pooling of all that was halved to one position: a Tensor with all channels."""
    sizes = _sizes(output_size, input.dim() - 2)
    if any(size != 1 for size, factor in zip(sizes, input.factors, strict=True) if factor == 2):
        raise _undefined(f"{func.__name__} to {output_size}", [input], "only size 1 is defined; ")
    high, low = (_per_channel(func, x, sizes) for x in input)
    return join_by_parts(high, low, input.parts, 1)


def _interpolate(func: Function, input: Octaves, size: Any = None, scale_factor: Any = None, **kwargs: Any) -> Any:
    """Resizes each map: to a size (the low one to half of it, rounded up), or by a factor."""
    if max(input.factors) == 1:  # nothing says which dimensions of the result would be halved
        return func(input.merge(), size, scale_factor, **kwargs)
    high = _per_channel(func, input.high, size, scale_factor, **kwargs)
    half = halved(high.shape[2:], input.factors)
    low = _per_channel(func, input.low, None if size is None else half, scale_factor, **kwargs)
    if any(have < want for have, want in zip(low.shape[2:], half, strict=True)):
        raise _mismatch(f"scale factor {scale_factor}", input, high)
    for dim, n in enumerate(half, 2):  # 4 positions for 7 become 8 for 14, which needs 7
        low = low.narrow(dim, 0, n)
    return Octaves(high, low, input.parts)


def _reduce(func: Function, input: Octaves, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """The mean or maximum of each map over all that was halved, then all channels in the vanilla order."""
    dims = {d % input.dim() for d in ((dim,) if isinstance(dim, int) else dim or ())}
    halved_dims = {axis + 2 for axis, factor in enumerate(input.factors) if factor == 2}
    if not dims >= halved_dims or 1 in dims or not dims:
        why = f"it must take in all of {sorted(halved_dims)} and not the channels; "
        raise _undefined(f"{func.__name__} over dimensions {dim}", [input], why)
    high, low = (func(x, sorted(dims), keepdim, **kwargs) for x in input)
    return join_by_parts(high, low, input.parts, 1 if keepdim or 0 not in dims else 0)


def _cat(func: Function, tensors: Sequence[Tensor | Octaves], dim: int = 0) -> Octaves:
    """Concatenation of channels, each kind with its own; a Tensor counts as a map without low channels."""
    octaves = [x for x in tensors if isinstance(x, Octaves)]
    if dim % octaves[0].dim() != 1:
        raise _undefined("cat", octaves, f"it is defined on channels, not dim {dim}; ")
    if any(x.factors != octaves[0].factors for x in octaves):
        raise UserError(f"cat of octave features halved by different factors: {[x.factors for x in octaves]}")
    parts = [part for x in tensors for part in (x.parts if isinstance(x, Octaves) else ((x.shape[1], 0),))]
    high = torch.cat([x.high if isinstance(x, Octaves) else x for x in tensors], 1)
    return Octaves(high, torch.cat([x.low for x in octaves], 1), tuple(parts))


def normalize_maps(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Octaves:
    """Batch or instance norm: each map with its share of the per-channel parameters and statistics."""
    names = ("running_mean", "running_var", "weight", "bias")
    parameters = [*args[:4], *[kwargs.pop(name, None) for name in names[len(args) :]]]
    shares: list[Any] = [(None, None) if x is None else split_by_parts(x, input.parts, 0) for x in parameters]
    if len(input.parts) > 1:  # cuDNN would update a copy of statistics that are not contiguous
        shares[:2] = [[None if x is None else x.clone() for x in pair] for pair in shares[:2]]
    maps = []
    for map_, x in enumerate(input):
        try:
            maps.append(func(x, *(share[map_] for share in shares), *args[4:], **kwargs) if x.shape[1] else x)
        except ValueError as error:  # of one value a channel, which a small low map reaches first
            what = f"octave features of size {' and '.join(str(tuple(x.shape[2:])) for x in input)}"
            raise UserError(f"{what}: {error}; take larger batches or crops, or alpha 0 here") from error
    if len(input.parts) > 1:  # else the shares are views, updated in place
        with torch.no_grad():
            for statistic, (high, low) in zip(parameters[:2], shares[:2], strict=True):
                if statistic is not None:
                    statistic.copy_(join_by_parts(high, low, input.parts, 0))
    return Octaves(maps[0], maps[1], input.parts)


def _operator(func: Function, reflected: bool = False) -> Function:
    def operate(self: Octaves, *other: Any) -> Any:
        return _elementwise(func, *other, self) if reflected else _elementwise(func, self, *other)

    return operate


# A tuple's own + and * would concatenate and repeat, and its == would compare the two maps as values.
_BINARY = ("add", "sub", "mul", "truediv", "pow")
for _name in (*_BINARY, "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "iadd", "isub", "imul", "itruediv"):
    # operator.eq compares with None, and is False; torch's refuses it.
    setattr(Octaves, f"__{_name}__", _operator(getattr(torch if _name in ("eq", "ne") else operator, _name)))
for _name in _BINARY:
    setattr(Octaves, f"__r{_name}__", _operator(getattr(operator, _name), reflected=True))
for _name in ("layout", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"):
    setattr(Octaves, _name, property(attrgetter(f"high.{_name}")))


def _named(names: str) -> set[Function]:
    """Every spelling of the named functions: torch.f, Tensor.f, torch.nn.functional.f and what it calls."""
    homes = (torch, torch.special, Tensor, F, torch._C._nn)
    return {getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)}


_NAMES = (
    "add sub subtract rsub mul multiply div divide true_divide neg negative abs exp expm1 log log1p sqrt rsqrt square "
    "reciprocal pow float_power sin cos erf sign round floor ceil clamp clip clamp_min clamp_max maximum minimum where "
    "lerp addcmul addcdiv masked_fill nan_to_num eq ne lt le gt ge isnan isinf isfinite logical_not logical_and "
    "logical_or relu relu6 leaky_relu rrelu elu celu selu gelu silu mish sigmoid hardsigmoid hardswish hardtanh tanh "
    "tanhshrink hardshrink softshrink threshold softplus softsign logsigmoid dropout dropout2d dropout3d alpha_dropout "
    "feature_dropout feature_alpha_dropout to float double half bfloat16 type_as cpu cuda contiguous clone detach "
    "zeros_like ones_like empty_like full_like rand_like randn_like"
)
_AUGMENTED: dict[Function, Function] = {  # the Tensor itself cannot hold the sum
    getattr(Tensor, f"__i{name}__"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")
}
_IN_PLACE = _named("fill_ zero_ copy_ requires_grad_") | _named(_NAMES.replace(" ", "_ ") + "_")
_HANDLERS: list[tuple[Iterable[Function], Function]] = [
    ({Tensor.expand_as, *_AUGMENTED, *_IN_PLACE, *_named(_NAMES)}, _elementwise),
    ((F.batch_norm, F.instance_norm), normalize_maps),  # torch.batch_norm, which F's calls, has another order
    (_named("cat concat concatenate"), _cat),
    (_named("mean amax"), _reduce),
    (_named("max_pool2d max_pool3d"), partial(_pool, "stride padding dilation ceil_mode return_indices")),
    (_named("avg_pool2d avg_pool3d"), partial(_pool, "stride padding ceil_mode count_include_pad divisor_override")),
    (_named("adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"), _adaptive),
    (_named("interpolate upsample"), _interpolate),
    (_named("prelu"), _prelu),
    (_named("new_empty new_zeros new_ones new_full new_tensor"), _of_high),
    (_named("element_size is_floating_point is_complex get_device"), _of_high),
    (_named("numel nelement"), lambda func, input: input.shape.numel()),
    (_named("numpy tolist"), on_merged),
]
_HANDLER_OF = {function: handler for functions, handler in _HANDLERS for function in functions}
