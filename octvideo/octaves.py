"""Octaves: a feature map whose channels live at two resolutions, and how torch functions apply to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Parts = tuple[tuple[int, int], ...]


def fold_time(x: Tensor) -> Tensor:
    """Views clips (B, C, T, H, W) as images: (B T, C, H, W) if channels come last in memory, else (B, C T, H, W).

    What treats every frame and channel alike is faster in 2-D: on a CPU avg_pool2d runs up to 37 times faster than
    avg_pool3d, which also loses the channels_last_3d layout and knows no bfloat16.
    """
    return x.transpose(1, 2).flatten(0, 1) if channels_last(x) else x.flatten(1, 2)


def unfold_time(images: Tensor, clips: Tensor) -> Tensor:
    """Undoes `fold_time` for images made from `clips`; height, width and (channels last) channels may differ."""
    if channels_last(clips):
        return images.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)
    return images.unflatten(1, (clips.shape[1], clips.shape[2]))


def channels_last(x: Tensor) -> bool:
    """Whether clips lie in memory as (B, T, H, W, C)."""
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def average_pool(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Averages windows of `factors` cells; a window cut by the border averages the cells it has.

    Rounding the size up (7 -> 4) keeps cell i of the result over cells 2i and 2i + 1 of the input at every size.

    Args:
        x: (B, C, T, H, W) or (B, C, H, W).
        factors: 1 or 2 for each dimension after the channels.

    Returns:
        A Tensor of ceil(size / factor) cells in each of those dimensions.
    """
    if all(factor == 1 for factor in factors):
        return x
    if x.shape[1] == 0:  # torch pools refuse a map without channels
        return x.new_zeros(
            (*x.shape[:2], *(-(-size // factor) for size, factor in zip(x.shape[2:], factors, strict=True)))
        )
    if len(factors) == 3 and factors[0] == 1:
        return unfold_time(average_pool(fold_time(x), factors[1:]), x)
    pool = F.avg_pool2d if len(factors) == 2 else F.avg_pool3d
    return pool(x, tuple(factors), ceil_mode=True, count_include_pad=False)


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeats every cell twice in the dimensions that are smaller than `size`, and crops to `size`.

    Args:
        x: (B, C, T, H, W) or (B, C, H, W).
        size: the wanted size of the dimensions after the channels; each is the present one, or half of it rounded up.

    Raises:
        ValueError: a dimension is neither `size` nor half of it.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if len(size) == 3 and x.shape[2] == size[0]:
        return unfold_time(upsample(fold_time(x), size[1:]), x)
    factors = [1 if have == want else 2 for have, want in zip(x.shape[2:], size, strict=True)]
    if any(-(-want // factor) != have for have, want, factor in zip(x.shape[2:], size, factors, strict=True)):
        raise ValueError(f"a map of {tuple(x.shape[2:])} cells is not half of {tuple(size)}, rounded up")
    x = F.interpolate(x, scale_factor=[float(factor) for factor in factors], mode="nearest")
    for dim, want in enumerate(size, 2):
        x = x.narrow(dim, 0, want)
    return x


def split_by_parts(x: Tensor, parts: Parts, dim: int) -> tuple[Tensor, Tensor]:
    """Splits what is per channel, in the vanilla order, into the high channels' and the low channels' share."""
    sizes = [size for part in parts for size in part]
    pieces = x.split(sizes, dim)
    if len(parts) == 1:
        return pieces[0], pieces[1]
    return torch.cat(pieces[0::2], dim), torch.cat(pieces[1::2], dim)


def join_by_parts(high: Tensor, low: Tensor, parts: Parts, dim: int) -> Tensor:
    """Undoes `split_by_parts`: the vanilla order of channels."""
    if len(parts) == 1:
        return torch.cat((high, low), dim)
    highs = high.split([part[0] for part in parts], dim)
    lows = low.split([part[1] for part in parts], dim)
    return torch.cat([piece for pair in zip(highs, lows, strict=True) for piece in pair], dim)


class _Maps(NamedTuple):
    high: Tensor
    low: Tensor


class Octaves(_Maps):
    """A feature map in two octaves: some channels at full resolution, the others at half.

    It answers `shape`, `size()`, `dim()`, `dtype` and `device` as the vanilla Tensor would, and ordinary modules
    (batch norm, activations, dropout, pooling, `+`, `torch.cat`, global pooling) apply to it unchanged. A function
    that has no defined meaning on two resolutions raises TypeError; `merge()` gives the vanilla-shaped Tensor.
    Section 3.1 of Chen et al., ICCV 2019.

    Args:
        high: (B, C_high, T, H, W) or (B, C_high, H, W).
        low: the same with C_low channels; H and W halved and rounded up, for a temporal layer T too.
        parts: (high, low) channel counts of the maps that were concatenated into this one. The vanilla network would
            hold part 1's high, part 1's low, part 2's high ... in this order, and weights are read in it. Default:
            one part.
    """

    parts: Parts
    _make = None  # type: ignore[assignment]  # pytree rebuilds what has a namedtuple's _make from its two fields alone

    def __new__(cls, high: Tensor, low: Tensor, parts: Parts | None = None) -> Octaves:  # noqa: D102
        self = super().__new__(cls, high, low)
        self.parts = parts or ((high.shape[1], low.shape[1]),)
        return self

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
    def dtype(self) -> torch.dtype:
        """The maps' type."""
        return self.high.dtype

    @property
    def device(self) -> torch.device:
        """Where the maps are."""
        return self.high.device

    @property
    def factors(self) -> tuple[int, ...]:
        """What each dimension after the channels was divided by in the low map: 1 or 2."""
        extents = zip(self.high.shape[2:], self.low.shape[2:], strict=True)
        return tuple(1 if high == low else 2 for high, low in extents)

    def merge(self) -> Tensor:
        """The vanilla-shaped Tensor: the low map upsampled, and the channels in the vanilla order."""
        return join_by_parts(self.high, upsample(self.low, self.high.shape[2:]), self.parts, 1)

    def mean(self, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
        """The mean over (at least) every halved dimension: a Tensor with all channels."""
        return torch.mean(self, dim, keepdim)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SPECIAL:
            return _SPECIAL[func](func, *args, **kwargs)
        if func in _ELEMENTWISE:
            return _elementwise(func, args, kwargs)
        if func in _WINDOWED:
            return _windowed(func, *args, **kwargs)
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"{name} is not defined on octave features of shape {_shapes(args)}: "
            "call .merge() on them first for the vanilla tensor"
        )

    # A tuple's own + and * would concatenate and repeat.
    def __add__(self, other: Any) -> Octaves:  # type: ignore[override]
        return _elementwise(torch.add, (self, other), {})

    def __radd__(self, other: Any) -> Octaves:
        return _elementwise(torch.add, (self, other), {})

    def __sub__(self, other: Any) -> Octaves:
        return _elementwise(torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Octaves:
        return _elementwise(torch.rsub, (self, other), {})

    def __mul__(self, other: Any) -> Octaves:  # type: ignore[override]
        return _elementwise(torch.mul, (self, other), {})

    def __rmul__(self, other: Any) -> Octaves:  # type: ignore[override]
        return _elementwise(torch.mul, (self, other), {})

    def __truediv__(self, other: Any) -> Octaves:
        return _elementwise(torch.div, (self, other), {})

    def __neg__(self) -> Octaves:
        return _elementwise(torch.neg, (self,), {})


def _unflatten(maps: Iterable[Tensor], parts: Parts) -> Octaves:
    high, low = maps
    return Octaves(high, low, parts)


# Callers that walk nested values (checkpointing, export, FSDP) must see two tensors, and keep the parts.
torch.utils._pytree.register_pytree_node(
    Octaves,
    lambda x: ([x.high, x.low], x.parts),
    _unflatten,
    serialized_type_name="octvideo.Octaves",
    to_dumpable_context=lambda parts: [list(part) for part in parts],
    from_dumpable_context=lambda parts: tuple((high, low) for high, low in parts),
)


def _shapes(values: Any) -> list[tuple[int, ...]]:
    """The shapes of all Octaves in an argument list, for error messages."""
    if isinstance(values, Octaves):
        return [tuple(values.shape)]
    if isinstance(values, (tuple, list)):
        return [shape for value in values for shape in _shapes(value)]
    return []


def _maps_beside(value: Any, x: Octaves) -> tuple[Any, Any]:
    """What the high and the low map of `x` each meet when `x` meets `value` in an elementwise function."""
    if isinstance(value, Octaves):
        gate = {1} in (set(value.shape[2:]), set(x.shape[2:]))  # one number a channel, each map with its share
        if value.parts != x.parts or (value.factors != x.factors and not gate):
            raise ValueError(
                f"octave features split as {x.parts} of factors {x.factors} meet others split as {value.parts} "
                f"of factors {value.factors}: give both layers the same alpha and temporal, or call .merge()"
            )
        return value.high, value.low
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value, value
    channels, extent = x.shape[1], tuple(x.shape[2:])
    if value.dim() != x.dim() or value.shape[1] not in (1, channels) or tuple(value.shape[2:]) not in (
        extent,
        (1,) * len(extent),
    ):  # fmt: skip
        raise ValueError(f"a Tensor of shape {tuple(value.shape)} meets octave features of shape {tuple(x.shape)}")
    high, low = (value, value) if value.shape[1] == 1 else split_by_parts(value, x.parts, 1)
    return high, average_pool(low, x.factors) if tuple(value.shape[2:]) == extent else low


def _elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Octaves:
    """Applies a function of single cells to each map."""
    first = args[0] if args else kwargs["input"]
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Octaves))
    if func in _IN_PLACE and not isinstance(first, Octaves):
        raise TypeError(f"{func.__name__} cannot write octave features of shape {tuple(x.shape)} into a Tensor")
    args_high, args_low = zip(*(_maps_beside(value, x) for value in args), strict=True) if args else ((), ())
    pairs = {key: _maps_beside(value, x) for key, value in kwargs.items()}
    return Octaves(
        func(*args_high, **{key: pair[0] for key, pair in pairs.items()}),
        func(*args_low, **{key: pair[1] for key, pair in pairs.items()}),
        x.parts,
    )


def _windowed(func: Callable[..., Any], input: Octaves, *args: Any, **kwargs: Any) -> Octaves:
    """Applies a pooling or interpolation to each map; the maps must keep matching sizes."""

    def apply(x: Tensor) -> Tensor:
        if x.shape[1] == 0:  # torch pools refuse a map without channels
            return func(x.new_zeros((x.shape[0], 1, *x.shape[2:])), *args, **kwargs)[:, :0]  # type: ignore[no-any-return]
        return func(x, *args, **kwargs)  # type: ignore[no-any-return]

    high, low = apply(input.high), apply(input.low)
    sizes = zip(high.shape[2:], low.shape[2:], input.factors, strict=True)
    if any(-(-want // factor) != have for want, have, factor in sizes):
        raise ValueError(
            f"this window takes the maps of {tuple(input.high.shape[2:])} and {tuple(input.low.shape[2:])} cells to "
            f"{tuple(high.shape[2:])} and {tuple(low.shape[2:])}, which do not match: call .merge() first"
        )
    return Octaves(high, low, input.parts)


def _average_window(
    func: Callable[..., Any],
    input: Octaves,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """An average pool; a window as large as the whole map is a global pool."""
    extent = tuple(input.shape[2:])
    window = (kernel_size,) * len(extent) if isinstance(kernel_size, int) else tuple(kernel_size)
    unpadded = set((padding,) if isinstance(padding, int) else padding) == {0}
    if window == extent and unpadded:
        return _global_average(func, input, 1)
    return _windowed(func, input, kernel_size, stride, padding, *args, **kwargs)


def _global_average(func: Callable[..., Any], input: Octaves, output_size: Any) -> Tensor:
    """Adaptive average pooling to one cell."""
    extent = tuple(range(2, input.dim()))
    sizes = (output_size,) if isinstance(output_size, int) else tuple(output_size)
    if set(sizes) != {1}:
        raise TypeError(
            f"adaptive pooling of octave features of shape {tuple(input.shape)} to {output_size}: "
            "only 1 is defined, call .merge() first for other sizes"
        )
    return _mean(torch.mean, input, extent, True)


def _mean(
    func: Callable[..., Any],
    input: Octaves,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The mean of each map over all that was halved, then all channels in the vanilla order."""
    dims = {d % input.dim() for d in ((dim,) if isinstance(dim, int) else dim or ())}
    halved = {axis + 2 for axis, factor in enumerate(input.factors) if factor == 2}
    if not dims >= halved or 1 in dims or not dims:
        raise TypeError(
            f"mean over dimensions {dim} of octave features of shape {tuple(input.shape)} is not defined: "
            f"it must take in all of {sorted(halved)} and not the channels; call .merge() first for others"
        )
    order = sorted(dims)
    high, low = (torch.mean(x, order, keepdim, **kwargs) for x in (input.high, input.low))
    return join_by_parts(high, low, input.parts, 1 if keepdim or 0 not in dims else 0)


def _cat(func: Callable[..., Any], tensors: Sequence[Tensor | Octaves], dim: int = 0) -> Octaves:
    """Concatenation of channels, each kind with its own; a Tensor counts as a map without low channels."""
    octaves = [x for x in tensors if isinstance(x, Octaves)]
    if dim % octaves[0].dim() != 1:
        raise TypeError(
            f"cat of octave features of shapes {_shapes(list(tensors))} is defined on channels, not dim {dim}"
        )
    if any(x.factors != octaves[0].factors for x in octaves):
        raise ValueError(f"cat of octave features halved by different factors: {[x.factors for x in octaves]}")
    parts: Parts = tuple(
        part for x in tensors for part in (x.parts if isinstance(x, Octaves) else ((x.shape[1], 0),))
    )  # fmt: skip
    high = torch.cat([x.high if isinstance(x, Octaves) else x for x in tensors], 1)
    return Octaves(high, torch.cat([x.low for x in octaves], 1), parts)


def _normalize(func: Callable[..., Any], input: Octaves, *args: Any, **kwargs: Any) -> Octaves:
    """Batch and instance norm: each map with its share of the per-channel parameters and statistics."""
    names = ("running_mean", "running_var", "weight", "bias")
    per_channel = dict(zip(names, args, strict=False)) | {key: kwargs.get(key) for key in names if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in names}
    shares: dict[str, tuple[Tensor, Tensor]] = {
        key: split_by_parts(value, input.parts, 0) for key, value in per_channel.items() if value is not None
    }
    high, low = (
        func(x, **{key: shares[key][map_] if key in shares else None for key in names}, **rest) if x.shape[1] else x
        for map_, x in enumerate(input)
    )
    if len(input.parts) > 1:  # the shares of one part are views that were updated in place; these are copies
        for key in ("running_mean", "running_var"):
            if key in shares:
                with torch.no_grad():
                    per_channel[key].copy_(join_by_parts(*shares[key], input.parts, 0))
    return Octaves(high, low, input.parts)


def _named(names: str) -> set[Callable[..., Any]]:
    """Every spelling of the named functions: torch.f, Tensor.f, torch.nn.functional.f and what it calls."""
    homes = (torch, Tensor, F, torch._C._nn)
    return {getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)}


_IN_PLACE = _named(
    "add_ sub_ mul_ div_ neg_ abs_ exp_ sqrt_ clamp_ sigmoid_ tanh_ relu_ leaky_relu_ elu_ hardtanh_ dropout_"
)
_ELEMENTWISE = _IN_PLACE | _named(
    "add sub rsub mul div true_divide neg abs exp sqrt square pow clamp maximum minimum where lerp "
    "relu relu6 leaky_relu elu celu selu gelu silu mish sigmoid hardsigmoid hardswish hardtanh tanh softplus softsign "
    "logsigmoid dropout dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "to float double half bfloat16 contiguous clone detach type_as"
)
_WINDOWED = _named("max_pool2d max_pool3d interpolate upsample")
_SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _normalize,
    F.instance_norm: _normalize,
    **dict.fromkeys(_named("cat concat concatenate"), _cat),
    **dict.fromkeys(_named("mean"), _mean),
    **dict.fromkeys(_named("avg_pool2d avg_pool3d"), _average_window),
    **dict.fromkeys(_named("adaptive_avg_pool2d adaptive_avg_pool3d"), _global_average),
}
