"""Octaves: a feature map whose channels live at two resolutions, and how torch functions apply to it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from octvideo.errors import UserError
from octvideo.layers.resampling import average_pool, upsample

Parts = tuple[tuple[int, int], ...]
WAY_OUT = (
    "call .merge() on them first for the vanilla tensor; in a network that octavize changed, keep the convolutions "
    "that lead there at alpha 0, by skip=... or {regex: 0}"
)


def split_by_parts(x: Tensor, parts: Parts, dim: int) -> tuple[Tensor, Tensor]:
    """Splits what is per channel, in the vanilla order, into the high channels' and the low channels' share."""
    if len(parts) == 1:
        high, low = x.split(parts[0], dim)
        return high, low
    if len(set(parts)) == 1:  # pieces of equal size, as a grouped convolution makes them: no loop over them
        high, low = x.unflatten(dim, (len(parts), sum(parts[0]))).split(parts[0], dim + 1)
        return high.flatten(dim, dim + 1), low.flatten(dim, dim + 1)
    pieces = x.split([size for part in parts for size in part], dim)
    return torch.cat(pieces[0::2], dim), torch.cat(pieces[1::2], dim)


def join_by_parts(high: Tensor, low: Tensor, parts: Parts, dim: int) -> Tensor:
    """Undoes `split_by_parts`: the vanilla order of channels."""
    if len(parts) == 1:
        return torch.cat((high, low), dim)
    if len(set(parts)) == 1:
        pieces = [x.unflatten(dim, (len(parts), part)) for x, part in zip((high, low), parts[0], strict=True)]
        return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)
    highs = high.split([part[0] for part in parts], dim)
    lows = low.split([part[1] for part in parts], dim)
    return torch.cat([piece for pair in zip(highs, lows, strict=True) for piece in pair], dim)


def join_pieces(parts: Iterable[tuple[int, int]]) -> Parts:
    """Merges neighbouring pieces of one kind, so that equal orders of channels have equal parts."""
    joined: list[tuple[int, int]] = []
    for high, low in parts:
        if joined and (joined[-1][1] == 0 or high == 0):
            joined[-1] = (joined[-1][0] + high, joined[-1][1] + low)
        elif high or low or not joined:
            joined.append((high, low))
    return tuple(joined)


class _Maps(NamedTuple):
    high: Tensor
    low: Tensor


class Octaves(_Maps):
    """A feature map in two octaves: some channels at full resolution, the others at half.

    It answers `shape`, `size()`, `dim()`, `ndim`, `dtype` and `device` as the vanilla Tensor would, and ordinary
    modules (batch norm, activations, dropout, pooling, `+`, `torch.cat`, global pooling) apply to it unchanged, in any
    spelling: `torch.relu(x)`, `F.relu(x)`, `x.relu()`, `x.relu_()`. What has no defined meaning on two resolutions
    raises TypeError; `merge()` gives the vanilla-shaped Tensor. Section 3.1 of Chen et al., ICCV 2019.

    Args:
        high: (B, C_high, T, H, W) or (B, C_high, H, W).
        low: the same with C_low channels; H and W halved and rounded up, for a temporal layer T too.
        parts: (high, low) channel counts of the pieces that this map consists of: what was concatenated, or the groups
            of a convolution. The vanilla network would hold piece 1's high, piece 1's low, piece 2's high ... in this
            order, and weights are read in it. Default: one piece.
    """

    parts: Parts
    _own_parts: Parts | None = None  # of a subclass for features of these pieces
    __array_ufunc__ = None  # numpy numbers leave `number * features` to __rmul__
    _make = None  # type: ignore[assignment]  # pytree rebuilds what has a namedtuple's _make from its two fields alone

    def __new__(cls, high: Tensor, low: Tensor, parts: Parts | None = None) -> Octaves:  # noqa: D102
        if parts is None:
            parts = cls._own_parts or ((high.shape[1], low.shape[1]),)
        else:
            parts = join_pieces(parts)
        kind = _class_of_parts(parts) if len(parts) > 1 and not torch.compiler.is_compiling() else Octaves
        self = super().__new__(kind, high, low)
        self.parts = parts
        return self

    def __reduce__(self) -> tuple[type[Octaves], tuple[Tensor, Tensor, Parts]]:
        return Octaves, (self.high, self.low, self.parts)

    @property
    def shape(self) -> torch.Size:
        """The vanilla tensor's: all channels, the high map's extent."""
        return torch.Size((self.high.shape[0], self.high.shape[1] + self.low.shape[1], *self.high.shape[2:]))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """`shape`, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions: 5 for clips, 4 for images."""
        return self.high.dim()

    @property
    def ndim(self) -> int:
        """Number of dimensions: 5 for clips, 4 for images."""
        return self.high.dim()

    @property
    def dtype(self) -> torch.dtype:
        """The maps' type."""
        return self.high.dtype

    @property
    def device(self) -> torch.device:
        """Where the maps are."""
        return self.high.device

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow to either map."""
        return self.high.requires_grad or self.low.requires_grad

    @property
    def factors(self) -> tuple[int, ...]:
        """What each dimension after the channels was divided by in the low map: 1 or 2."""
        extents = zip(self.high.shape[2:], self.low.shape[2:], strict=True)
        return tuple(1 if high == low else 2 for high, low in extents)

    def merge(self) -> Tensor:
        """The vanilla-shaped Tensor: the low map upsampled, and the channels in the vanilla order."""
        return join_by_parts(self.high, upsample(self.low, self.high.shape[2:]), self.parts, 1)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        refuse_reentrant_checkpoint()
        if func in _SPECIAL:
            return _SPECIAL[func](func, *args, **kwargs)
        if func in _ELEMENTWISE:
            return _elementwise(func, args, kwargs)
        octaves = _octaves_among((args, kwargs))
        if all(set(x.factors) == {1} for x in octaves):  # maps of one cell: the vanilla tensor without any upsampling
            return _on_merged(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"{name} is not defined on octave features of shape {[tuple(x.shape) for x in octaves]}: {WAY_OUT}"
        )

    def __getattr__(self, name: str) -> Any:
        """A Tensor's method, as if it were called on the vanilla tensor."""
        method = getattr(Tensor, name, None)
        if name.startswith("__") or not callable(method):
            raise AttributeError(
                f"octave features have no attribute {name!r}: take it from .high, .low or .merge(), the vanilla tensor"
            )
        return functools.partial(_call_method, method, self)

    def __getitem__(self, index: Any) -> Octaves:  # type: ignore[override]
        """A slice, a list or a 1-D Tensor of numbers or of truth values chooses clips of the batch."""
        if isinstance(index, (slice, list)) or (isinstance(index, Tensor) and index.dim() == 1):
            return Octaves(self.high[index], self.low[index], self.parts)
        raise TypeError(
            f"octave features of shape {tuple(self.shape)} cannot be indexed by {index!r}: a slice or list of numbers "
            f"chooses clips of the batch; for others take .high or .low, or {WAY_OUT}"
        )

    def __bool__(self) -> bool:
        raise TypeError(
            f"octave features of shape {tuple(self.shape)} are neither true nor false, as a Tensor is neither"
        )


@functools.cache
def _class_of_parts(parts: Parts) -> type[Octaves]:
    """Octaves of several pieces, which know them by their class.

    Backward hooks, FSDP and others rebuild a named tuple as type(x)(*x), where an attribute alone would be lost.
    """
    kind = type("Octaves", (Octaves,), {"_own_parts": parts, "__doc__": Octaves.__doc__})
    _register(kind)
    return kind


def _register(kind: type[Octaves]) -> None:
    """Callers that walk nested values (checkpointing, export) must see two tensors, and keep the parts."""

    def unflatten(maps: Iterable[Tensor], parts: Parts) -> Octaves:
        high, low = maps
        return Octaves(high, low, parts)

    torch.utils._pytree.register_pytree_node(
        kind,
        lambda x: ([x.high, x.low], x.parts),
        unflatten,
        serialized_type_name=f"octvideo.Octaves{kind._own_parts or ''}",
        to_dumpable_context=lambda parts: [list(part) for part in parts],
        from_dumpable_context=lambda parts: tuple((high, low) for high, low in parts),
    )


_register(Octaves)


def refuse_reentrant_checkpoint() -> None:
    """Raises RuntimeError inside a reentrant torch.utils.checkpoint, which sees no gradients in nested values.

    It runs its function without gradients first, so only then the callers are looked through.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise RuntimeError(
                "torch.utils.checkpoint(..., use_reentrant=True) would lose the gradients of octave features without "
                "a word: pass use_reentrant=False"
            )
        frame = frame.f_back


def _call_method(method: Callable[..., Any], x: Octaves, *args: Any, **kwargs: Any) -> Any:
    return Octaves.__torch_function__(method, (Octaves,), (x, *args), kwargs)


def _octaves_among(values: Any) -> list[Octaves]:
    """All Octaves in nested arguments."""
    leaves = torch.utils._pytree.tree_leaves(values, is_leaf=lambda value: isinstance(value, Octaves))
    return [value for value in leaves if isinstance(value, Octaves)]


def _on_merged(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Applies a function to the vanilla tensors of all Octaves in its arguments."""
    args, kwargs = torch.utils._pytree.tree_map(
        lambda value: value.merge() if isinstance(value, Octaves) else value,
        (args, kwargs),
        is_leaf=lambda value: isinstance(value, Octaves),
    )
    return func(*args, **kwargs)


def _maps_beside(value: Any, x: Octaves) -> tuple[Any, Any]:
    """What the high and the low map of `x` each meet when `x` meets `value` in an elementwise function.

    A Tensor broadcasts against the vanilla shape. Its last channels, where they are full-size, are pooled.
    """
    if isinstance(value, Octaves):
        gate = set(value.factors) == {1}  # one number a channel (or frame): each map takes its share
        if value.parts == x.parts and (gate or value.factors == x.factors):
            return value.high, value.low
        if not gate:
            raise UserError(
                f"octave features split as {x.parts} of factors {x.factors} meet others split as {value.parts} of "
                f"factors {value.factors}: give both layers the same alpha, groups and temporal, or call .merge()"
            )
        value = value.merge()
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.dim() <= x.dim()):
        return value, value
    channels, extent = x.shape[1], tuple(x.shape[2:])
    while value.dim() < x.dim():
        value = value[None]
    if (
        value.dim() > x.dim()
        or value.shape[1] not in (1, channels)
        or any(have not in (1, want) for have, want in zip(value.shape[2:], extent, strict=True))
    ):
        raise UserError(f"a Tensor of shape {tuple(value.shape)} meets octave features of shape {tuple(x.shape)}")
    high, low = (value, value) if value.shape[1] == 1 else split_by_parts(value, x.parts, 1)
    factors = [1 if size == 1 else factor for size, factor in zip(value.shape[2:], x.factors, strict=True)]
    if max(factors) > 1 and not value.is_floating_point():
        raise TypeError(f"a full-size Tensor of {value.dtype} has no means to meet octave features with; {WAY_OUT}")
    return high, average_pool(low, factors)


def _elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Applies a function of single cells to each map."""
    values = (*args, *kwargs.values())
    octaves = [value for value in values if isinstance(value, Octaves)]
    x = next((value for value in octaves if set(value.factors) != {1}), octaves[0])  # the others may be gates
    first = args[0] if args else kwargs["input"]
    if set(x.factors) == {1} and any(
        isinstance(value, Tensor) and value.dim() == x.dim() and value.shape[2:].numel() > x.shape[2:].numel()
        for value in values
    ):  # gates of one cell that meet a plain Tensor: what comes out is plain
        return _on_merged(func, args, kwargs)
    if func in _IN_PLACE and not isinstance(first, Octaves):
        raise TypeError(f"{func.__name__} cannot write octave features of shape {tuple(x.shape)} into a Tensor")
    pairs = [_maps_beside(value, x) for value in args]
    named = {key: _maps_beside(value, x) for key, value in kwargs.items()}
    high, low = (
        func(*(pair[map_] for pair in pairs), **{key: pair[map_] for key, pair in named.items()}) for map_ in (0, 1)
    )
    return Octaves(high, low, x.parts)


def _expand_as(func: Callable[..., Any], gate: Tensor | Octaves, other: Tensor | Octaves) -> Octaves | Tensor:
    """A gate spread over all cells, as squeeze-and-excitation blocks do before they multiply."""
    if not isinstance(other, Octaves):
        return gate.merge().expand_as(other)  # type: ignore[union-attr]
    high, low = _maps_beside(gate, other)
    return Octaves(high.expand_as(other.high), low.expand_as(other.low), other.parts)


def _augmented(func: Callable[..., Any], first: Any, other: Any) -> Octaves:
    """`tensor += octaves`: the name takes the sum, as the Tensor itself cannot hold it."""
    return _elementwise(_AUGMENTED[func], (first, other), {})


def _new_tensor(func: Callable[..., Any], input: Octaves, *args: Any, **kwargs: Any) -> Tensor:
    """A new Tensor of the features' type and device, whatever its shape."""
    return func(input.high, *args, **kwargs)  # type: ignore[no-any-return]


def _prelu(func: Callable[..., Any], input: Octaves, weight: Tensor) -> Octaves:
    """PReLU: one slope, or one a channel."""
    slopes = (weight, weight) if weight.numel() == 1 else split_by_parts(weight, input.parts, 0)
    high, low = (func(x, slope) for x, slope in zip(input, slopes, strict=True))
    return Octaves(high, low, input.parts)


def _with_channels(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a pool also to a map without channels, which torch's pools refuse."""
    return apply(x) if x.shape[1] else apply(x.new_zeros((x.shape[0], 1, *x.shape[2:])))[:, :0]


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _per_map(
    input: Octaves,
    apply: Callable[[Tensor, bool], Tensor],
    ceil_mode: bool,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any = 1,
) -> Octaves:
    """Pools each map; where the low one would come out smaller than it has to, its last cell is repeated at the border.

    14 cells become 7 by a pool of 2, so 7 low ones have to become 4: the last window is the last cell.

    Args:
        input: the features.
        apply: the pool, of a map and whether sizes are rounded up.
        ceil_mode: whether the vanilla pool rounds sizes up.
        kernel_size: the pool's, as its stride, padding and dilation.
    """
    high = _with_channels(lambda x: apply(x, ceil_mode), input.high)
    axes = input.dim() - 2
    kernels, paddings, dilations = (_sizes(value, axes) for value in (kernel_size, padding, dilation))
    strides = kernels if stride is None else _sizes(stride, axes)
    missing = []
    for axis, factor in enumerate(input.factors):
        have, want = input.low.shape[axis + 2], -(-high.shape[axis + 2] // factor)
        reach = dilations[axis] * (kernels[axis] - 1) + 1 - 2 * paddings[axis]
        needed = (want - 1) * strides[axis] + reach
        starts_inside = (want - 1) * strides[axis] - paddings[axis] < have
        if (needed > have and (strides[axis] == 1 or not starts_inside)) or needed + strides[axis] <= have:
            raise UserError(
                f"this window takes the high map of {tuple(input.high.shape[2:])} cells to {tuple(high.shape[2:])}, "
                f"which the low map of {tuple(input.low.shape[2:])} cells cannot match; {WAY_OUT}"
            )
        missing.append(max(0, needed - have))

    def pool_low(x: Tensor) -> Tensor:
        border = [amount for cells in reversed(missing) for amount in (0, cells)]
        return apply(F.pad(x, border, mode="replicate") if any(missing) else x, False)

    return Octaves(high, _with_channels(pool_low, input.low), input.parts)


def _max_window(
    func: Callable[..., Any],
    input: Octaves,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Octaves:
    """A max pool of each map; torch calls another function for `return_indices` True."""

    def pool(x: Tensor, up: bool) -> Tensor:
        return func(x, kernel_size, stride, padding, dilation, up)  # type: ignore[no-any-return]

    return _per_map(input, pool, ceil_mode, kernel_size, stride, padding, dilation)


def _average_window(
    func: Callable[..., Any],
    input: Octaves,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Octaves | Tensor:
    """An average pool of each map; a window over all that was halved is a global pool."""
    extent = tuple(input.shape[2:])
    window = _sizes(kernel_size, len(extent))
    strides = window if stride is None else _sizes(stride, len(extent))
    halved = [axis for axis, factor in enumerate(input.factors) if factor == 2]
    whole = halved and all(window[axis] == extent[axis] for axis in halved)
    if whole and set(_sizes(padding, len(extent))) == {0}:
        if divisor_override is not None:
            raise TypeError(f"{func.__name__} with a divisor of its own over all of octave features; {WAY_OUT}")

        def average(x: Tensor) -> Tensor:
            sizes = [x.shape[axis + 2] if axis in halved else window[axis] for axis in range(len(window))]
            return func(x, sizes, strides, 0, ceil_mode)  # type: ignore[no-any-return]

        return join_by_parts(_with_channels(average, input.high), _with_channels(average, input.low), input.parts, 1)

    def pool(x: Tensor, up: bool) -> Tensor:
        return func(x, kernel_size, stride, padding, up, count_include_pad, divisor_override)  # type: ignore[no-any-return]

    return _per_map(input, pool, ceil_mode, kernel_size, stride, padding)


def _adaptive(func: Callable[..., Any], input: Octaves, output_size: Any, return_indices: bool = False) -> Tensor:
    """Adaptive pooling of all that was halved to one cell: a Tensor with all channels.

    `return_indices` is always False: torch calls another function for True.
    """
    sizes = (output_size,) * (input.dim() - 2) if isinstance(output_size, int) else tuple(output_size)
    if any(size != 1 for size, factor in zip(sizes, input.factors, strict=True) if factor == 2):
        raise TypeError(
            f"{func.__name__} of octave features of shape {tuple(input.shape)} to {output_size}: "
            f"only 1 cell is defined; {WAY_OUT}"
        )
    high, low = (_with_channels(lambda x: func(x, sizes), map_) for map_ in input)
    return join_by_parts(high, low, input.parts, 1)


def _interpolate(
    func: Callable[..., Any], input: Octaves, size: Any = None, scale_factor: Any = None, **kwargs: Any
) -> Octaves | Tensor:
    """Resizes each map: to a size (the low one to half of it, rounded up), or by a factor."""
    if set(input.factors) == {1}:  # one cell: nothing says which dimensions of the result would be halved
        return func(input.merge(), size, scale_factor, **kwargs)  # type: ignore[no-any-return]
    high = _with_channels(lambda x: func(x, size, scale_factor, **kwargs), input.high)
    half = [-(-cells // factor) for cells, factor in zip(high.shape[2:], input.factors, strict=True)]
    if size is not None:
        return Octaves(high, _with_channels(lambda x: func(x, half, None, **kwargs), input.low), input.parts)
    low = _with_channels(lambda x: func(x, None, scale_factor, **kwargs), input.low)
    if any(have < want for have, want in zip(low.shape[2:], half, strict=True)):
        raise UserError(
            f"scale factor {scale_factor} takes the high map of {tuple(input.high.shape[2:])} cells to "
            f"{tuple(high.shape[2:])}, which the low map of {tuple(input.low.shape[2:])} cells cannot match; {WAY_OUT}"
        )
    for dim, cells in enumerate(half, 2):  # 4 cells for 7 become 8 for 14, of which 7 are needed
        low = low.narrow(dim, 0, cells)
    return Octaves(high, low, input.parts)


def _reduce(
    func: Callable[..., Any],
    input: Octaves,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The mean or maximum of each map over all that was halved, then all channels in the vanilla order."""
    dims = {d % input.dim() for d in ((dim,) if isinstance(dim, int) else dim or ())}
    halved = {axis + 2 for axis, factor in enumerate(input.factors) if factor == 2}
    if not dims >= halved or 1 in dims or not dims:
        raise TypeError(
            f"{func.__name__} over dimensions {dim} of octave features of shape {tuple(input.shape)} is not defined: "
            f"it must take in all of {sorted(halved)} and not the channels; {WAY_OUT}"
        )
    high, low = (func(x, sorted(dims), keepdim, **kwargs) for x in input)
    return join_by_parts(high, low, input.parts, 1 if keepdim or 0 not in dims else 0)


def _cat(func: Callable[..., Any], tensors: Sequence[Tensor | Octaves], dim: int = 0) -> Octaves:
    """Concatenation of channels, each kind with its own; a Tensor counts as a map without low channels."""
    octaves = [x for x in tensors if isinstance(x, Octaves)]
    if dim % octaves[0].dim() != 1:
        raise TypeError(
            f"cat of octave features of shape {[tuple(x.shape) for x in tensors]} is defined on channels, not dim {dim}"
        )
    if any(x.factors != octaves[0].factors for x in octaves):
        raise UserError(f"cat of octave features halved by different factors: {[x.factors for x in octaves]}")
    parts = [part for x in tensors for part in (x.parts if isinstance(x, Octaves) else ((x.shape[1], 0),))]
    high = torch.cat([x.high if isinstance(x, Octaves) else x for x in tensors], 1)
    return Octaves(high, torch.cat([x.low for x in octaves], 1), tuple(parts))


def _normalize(func: Callable[..., Any], input: Octaves, *args: Any, **kwargs: Any) -> Octaves:
    """Batch and instance norm: each map with its share of the per-channel parameters and statistics."""
    names = ("running_mean", "running_var", "weight", "bias")
    per_channel = dict(zip(names, args, strict=False)) | {key: kwargs.get(key) for key in names if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in names}
    shares: dict[str, tuple[Tensor, ...]] = {
        key: split_by_parts(value, input.parts, 0) for key, value in per_channel.items() if value is not None
    }
    statistics = [key for key in names[:2] if key in shares]
    copied = len(input.parts) > 1  # else the shares are views, updated in place
    if copied:
        shares |= {key: tuple(share.clone() for share in shares[key]) for key in statistics}
    maps = []
    for map_, x in enumerate(input):
        arguments = (shares[key][map_] if key in shares else None for key in names)
        try:
            maps.append(func(x, *arguments, *args[len(names) :], **rest) if x.shape[1] else x)
        except ValueError as error:  # of one value a channel, which a small low map has in training before others do
            raise UserError(
                f"octave features of {tuple(input.high.shape[2:])} and {tuple(input.low.shape[2:])} cells: {error}; "
                "take larger batches or crops, or alpha 0 here"
            ) from error
    high, low = maps
    if copied:
        with torch.no_grad():
            for key in statistics:
                high_share, low_share = shares[key]
                per_channel[key].copy_(join_by_parts(high_share, low_share, input.parts, 0))
    return Octaves(high, low, input.parts)


def _named(names: str) -> set[Callable[..., Any]]:
    """Every spelling of the named functions: torch.f, Tensor.f, torch.nn.functional.f and what it calls."""
    homes = (torch, torch.special, Tensor, F, torch._C._nn)
    return {getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)}


# A tuple's own + and * would concatenate and repeat, and its == would compare the two maps as values.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__add__": torch.add,
    "__radd__": torch.add,
    "__iadd__": Tensor.add_,
    "__sub__": torch.sub,
    "__rsub__": torch.rsub,
    "__isub__": Tensor.sub_,
    "__mul__": torch.mul,
    "__rmul__": torch.mul,
    "__imul__": Tensor.mul_,
    "__truediv__": torch.div,
    "__rtruediv__": lambda x, other: other / x,
    "__itruediv__": Tensor.div_,
    "__pow__": torch.pow,
    "__rpow__": lambda x, other: other**x,
    "__neg__": torch.neg,
    "__abs__": torch.abs,
    "__eq__": torch.eq,
    "__ne__": torch.ne,
    "__lt__": torch.lt,
    "__le__": torch.le,
    "__gt__": torch.gt,
    "__ge__": torch.ge,
}


def _operator(func: Callable[..., Any]) -> Callable[..., Octaves]:
    def operate(self: Octaves, *others: Any) -> Octaves:
        return _elementwise(func, (self, *others), {})

    return operate


for _name, _function in _OPERATORS.items():
    setattr(Octaves, _name, _operator(_function))


_AUGMENTED: dict[Any, Callable[..., Any]] = {
    Tensor.__iadd__: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.__imul__: torch.mul,
    Tensor.__itruediv__: torch.div,
}
_IN_PLACE = _named(
    "add_ sub_ mul_ div_ neg_ abs_ exp_ sqrt_ rsqrt_ pow_ square_ clamp_ clip_ clamp_min_ clamp_max_ sigmoid_ tanh_ "
    "relu_ relu6_ leaky_relu_ elu_ selu_ celu_ rrelu_ threshold_ hardtanh_ silu_ dropout_ alpha_dropout_ "
    "feature_dropout_ feature_alpha_dropout_ fill_ zero_ copy_ masked_fill_ nan_to_num_ requires_grad_"
)
_ELEMENTWISE = _IN_PLACE | _named(
    "add sub subtract rsub mul multiply div divide true_divide neg negative abs exp expm1 log log1p sqrt rsqrt square "
    "reciprocal pow float_power sin cos erf sign round floor ceil clamp clip clamp_min clamp_max maximum minimum where "
    "lerp addcmul addcdiv masked_fill nan_to_num eq ne lt le gt ge isnan isinf isfinite logical_not logical_and "
    "logical_or "
    "relu relu6 leaky_relu rrelu elu celu selu gelu silu mish sigmoid hardsigmoid hardswish hardtanh tanh tanhshrink "
    "hardshrink softshrink threshold softplus softsign logsigmoid "
    "dropout dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
    "to float double half bfloat16 type_as cpu cuda contiguous clone detach "
    "zeros_like ones_like empty_like full_like rand_like randn_like"
)
_SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(_AUGMENTED, _augmented),
    F.batch_norm: _normalize,  # torch.batch_norm, which it calls, has another order of arguments
    F.instance_norm: _normalize,
    **dict.fromkeys(_named("cat concat concatenate"), _cat),
    **dict.fromkeys(_named("mean amax"), _reduce),
    **dict.fromkeys(_named("max_pool2d max_pool3d"), _max_window),
    **dict.fromkeys(_named("avg_pool2d avg_pool3d"), _average_window),
    **dict.fromkeys(
        _named("adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"), _adaptive
    ),
    **dict.fromkeys(_named("interpolate upsample"), _interpolate),
    **dict.fromkeys(_named("prelu"), _prelu),
    Tensor.expand_as: _expand_as,
    **dict.fromkeys(_named("new_empty new_zeros new_ones new_full new_tensor"), _new_tensor),
}
