"""What torch's elementwise, pooling, reducing and normalising functions mean on octave features."""

import dis
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octvideo.errors import UserError
from octvideo.layers.octaves import Features, Function, Octaves, apply, define, merged, on_map, on_merged, record
from octvideo.layers.parts import join_by_parts, split_by_parts
from octvideo.layers.resampling import halved

_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")  # the arguments of batch and instance norm


def _maps_beside(value: Any, x: Octaves) -> tuple[Any, Any]:
    """What each map of `x` meets in an elementwise function; a full-size Tensor is averaged for the low map."""
    if isinstance(value, Octaves):
        gate = max(value.ratios) == 1  # one number a channel (or frame): each map takes its share
        if value.parts == x.parts and value.axis == x.axis and (gate or value.ratios == x.ratios):
            return value.high, value.low
        value = value.merge()
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.dim() <= x.dim()):
        return value, value
    value = value[(None,) * (x.dim() - value.dim())]
    high, low = (value, value) if value.shape[x.axis] == 1 else split_by_parts(value, x.parts, x.axis)
    return high, x.pooled(low) if _halved(value, x) else low


def grows(x: Octaves, dim: int, times: int, space: bool = False) -> bool:
    """Whether one position would become several, of which nobody knows how many the low map should have.

    With `space`, the last two dimensions but the channels are taken to be height and width.
    """
    if times == 1 or x.shape[dim] > 1 or dim in (0, x.axis):
        return False
    return max(x.ratios) == 1 or (space and dim in [d for d in range(x.dim()) if d != x.axis][-2:])


def _meets(value: Any, x: Octaves) -> bool:
    """Whether each map of `x` can meet its share of a value: it spans the channels and positions of x, or is one."""
    if isinstance(value, Octaves):
        return value.shape == x.shape or max(value.ratios) == 1
    if not isinstance(value, Tensor) or value.numel() == 1:
        return not isinstance(value, Features)
    if value.dim() > x.dim():
        return False
    sizes = zip(value.shape[::-1], x.shape[::-1], range(x.dim())[::-1], strict=False)
    fits = all(n in (1, want) or (want == 1 and dim != x.axis and not grows(x, dim, n, True)) for n, want, dim in sizes)
    return fits and (value.is_floating_point() or not _halved(value, x))


def _halved(value: Tensor, x: Octaves) -> bool:
    """Whether a Tensor must be averaged to meet the low map."""
    return any(n > 1 and ratio == 2 for n, ratio in zip(value.shape[::-1], x.ratios[::-1], strict=False))


def _elementwise(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Applies a function of single positions to each map; `tensor += octaves` gives the name a new sum."""
    values = (*args, *kwargs.values())
    octaves = [value for value in values if isinstance(value, Octaves)]
    if func in _IN_PLACE and not isinstance(values[0], Octaves):
        if func not in _AUGMENTED:
            return NotImplemented
        if torch.compiler.is_compiling():  # which cannot tell `x += y` from `x.add_(y)`
            total = _elementwise(_AUGMENTED[func], *args, **kwargs)
            on_merged(func, *args, **kwargs)
            return total
        if _called_by_operator():
            raise TypeError("the Tensor cannot hold the sum")  # Python goes on to the other operand's __radd__
        return NotImplemented
    if not octaves:
        return NotImplemented
    x = octaves[0]
    if len(octaves) > 1:  # the others may be gates, or have other parts: those at lower resolution are merged
        sized = [value for value in octaves if max(value.ratios) > 1] or octaves
        x = min(sized, key=lambda value: (sum(value.ratios), value.low.shape[value.axis]))
        if others := [value for value in sized if (value.parts, value.ratios) != (x.parts, x.ratios)]:
            if func in _IN_PLACE and values[0] is not x:
                x, others = values[0], [value for value in sized if value is not values[0]]
            record(func, others)
    if not all(_meets(value, x) for value in values if value is not x):
        if max(x.ratios) == 1:  # gates of one position that meet a plain Tensor: the result is plain
            return on_merged(func, *args, **kwargs)
        return NotImplemented
    highs, lows = zip(*(_maps_beside(value, x) for value in values), strict=True)
    n = len(args)
    high, low = (on_map(func, *maps[:n], **dict(zip(kwargs, maps[n:], strict=True))) for maps in (highs, lows))
    return x.of(high, low)


def _called_by_operator() -> bool:
    """Whether a Tensor's method runs for an operator, `x += y`, and not by its name, `x.add_(y)`."""
    frame = sys._getframe(4)
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "BINARY_OP"


def _of_high(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Any:
    return func(input.high, *args, **kwargs)


def _prelu(func: Function, input: Octaves, weight: Tensor) -> Any:
    if input.axis != 1:
        return NotImplemented
    high, low = (weight, weight) if weight.numel() == 1 else split_by_parts(weight, input.parts, 0)
    return input.of(func(input.high, high), on_map(func, input.low, low))


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
    if input.axis != 1:
        return NotImplemented
    numbers = (kernel_size, given.get("stride") or None, given.get("padding", 0), given.get("dilation", 1))
    kernels, strides, paddings, dilations = (_sizes(kernel_size if n is None else n, len(axes)) for n in numbers)
    pool = partial(_per_channel, partial(func, **given))
    whole = [axis for axis in axes if input.factors[axis] == 2 and kernels[axis] == input.high.shape[axis + 2]]
    if "divisor_override" in names and 0 < input.factors.count(2) == len(whole) and not any(paddings):
        if given.get("divisor_override") is not None:
            return NotImplemented
        windows = ([x.shape[axis + 2] if axis in whole else kernels[axis] for axis in axes] for x in input)
        high, low = (pool(x, window, ceil_mode=up) for x, window in zip(input, windows, strict=True))
        return join_by_parts(high, merged(low), input.parts, 1)

    def lower(low: Any, sizes: Sequence[int]) -> Any:
        if isinstance(low, Octaves):
            maps = lower(low.high, sizes), lower(low.low, halved(sizes, low.factors))
            return NotImplemented if any(x is NotImplemented for x in maps) else low.of(*maps)
        border: list[int] = []
        for axis, want in enumerate(sizes):
            have, step, start = low.shape[axis + 2], strides[axis], (want - 1) * strides[axis] - paddings[axis]
            needed = start + dilations[axis] * (kernels[axis] - 1) + 1 - paddings[axis]
            if (needed > have and (step == 1 or start >= have)) or needed + step <= have:
                return NotImplemented  # the low map cannot match the high one
            border = [0, max(0, needed - have), *border]
        low = _per_channel(F.pad, low, border, mode="replicate") if any(border) else low
        return pool(low, kernel_size)

    high = pool(input.high, kernel_size, ceil_mode=up)
    low = lower(input.low, halved(high.shape[2:], input.factors))
    return low if low is NotImplemented else input.of(high, low)


def _adaptive(func: Function, input: Octaves, output_size: Any, return_indices: bool = False) -> Any:
    """Adaptive pooling; a Tensor with all channels where all that was halved comes to one position."""
    if input.axis != 1 or return_indices:
        return NotImplemented
    given = _sizes(output_size, input.dim() - 2)
    sizes = [n if size is None else size for size, n in zip(given, input.shape[2:], strict=True)]
    lows = list(sizes)
    for axis, (size, n, factor) in enumerate(zip(sizes, input.shape[2:], input.factors, strict=True)):
        if factor == 2 and size == n:
            lows[axis] = input.low.shape[axis + 2]
        elif factor == 2 and size > 1 and n % (2 * size):  # else windows start and end where low positions do
            return NotImplemented
    high, low = (_per_channel(func, x, size) for x, size in ((input.high, sizes), (input.low, lows)))
    return join_by_parts(high, merged(low), input.parts, 1) if lows == sizes else input.of(high, low)


def _interpolate(func: Function, input: Octaves, size: Any = None, scale_factor: Any = None, **kwargs: Any) -> Any:
    """Resizes each map: to a size (the low one to half of it, rounded up), or by a factor."""
    if max(input.ratios) == 1:  # nothing says which dimensions of the result would be halved
        return func(input.merge(), size, scale_factor, **kwargs)
    if input.axis != 1:
        return NotImplemented
    high = _per_channel(func, input.high, size, scale_factor, **kwargs)
    half = halved(high.shape[2:], input.factors)
    low = _per_channel(func, input.low, None if size is None else half, scale_factor, **kwargs)
    if any(have < want for have, want in zip(low.shape[2:], half, strict=True)):
        return NotImplemented
    for dim, n in enumerate(half, 2):  # 4 positions for 7 become 8 for 14, which needs 7
        low = low.narrow(dim, 0, n)
    return input.of(high, low)


def _dims(input: Octaves, dim: Any) -> list[int]:
    given = range(input.dim()) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
    return sorted({d % input.dim() for d in given})


def _covered(input: Octaves, dims: Iterable[int]) -> Tensor | int:
    """How many positions each low one covers in the halved ones of `dims`; a number if all cover as many."""
    count: Tensor | int = 1
    for dim in dims:
        if input.ratios[dim] == 2:
            size, covered = input.high.shape[dim], input.low.shape[dim]
            two: Any = 2
            if size % 2:
                two = input.low.new_full((covered,), 2)
                two[-1] = 1
                two = two.view(-1, *(1,) * (input.dim() - 1 - dim))
            count = count * two
    return count


def _of_maps(input: Octaves, high: Tensor, low: Tensor, dims: Sequence[int], keepdim: bool, combine: Any) -> Any:
    """The reduced maps as the reduced vanilla tensor: Octaves while channels and two resolutions remain.

    `high` and `low` keep the reduced dimensions at size 1. `combine` joins the values of high and low channels.
    """
    x: Any = input.of(high, low)
    if input.axis in dims:
        x = combine(high, x.upsampled(low))
    elif max(x.ratios) == 1:
        x = x.merge()
    return x if keepdim else x.squeeze(tuple(dims))


def _reduce(func: Function, input: Octaves, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Sums, means, maxima and minima over any dimensions; sums weigh a low position by those that it covers."""
    dims, name = _dims(input, dim), func.__name__
    if name in ("amax", "amin"):
        if not (input.high.numel() and input.low.numel()):
            return NotImplemented
        high, low = (on_map(func, x, dims, True) for x in input)
        return _of_maps(input, high, low, dims, keepdim, torch.maximum if name == "amax" else torch.minimum)
    if kwargs.get("out") is not None:
        return NotImplemented
    all_halved = all(d in dims for d, ratio in enumerate(input.ratios) if ratio == 2)
    if name == "mean" and all_halved and input.axis not in dims:  # a global pool: the mean of each map
        high, low = (x.mean(dims, True, **kwargs) for x in input)
        return _of_maps(input, high, low, dims, keepdim, None)
    covered = _covered(input, dims)
    high, low = input.high.sum(dims, True, **kwargs), input.low
    alike = isinstance(covered, int)
    low = low.sum(dims, True, **kwargs) * covered if alike else (low * covered).sum(dims, True, **kwargs)
    y = _of_maps(input, high, low, dims, keepdim, torch.add)
    return y / math.prod([input.shape[d] for d in dims]) if name == "mean" else y


def _extremum(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Any:
    """max and min: of everything, of two arguments, or over a dimension with indices."""
    if not (given := (*args, *kwargs.values())):
        return _reduce(torch.amax if func.__name__ == "max" else torch.amin, input)
    if len(given) == 1 and isinstance(given[0], (Tensor, Octaves)):
        return _elementwise(func, input, *args, **kwargs)
    dim = kwargs.get("dim", args[0] if args else None)
    if dim is None or dim % input.dim() == input.axis or input.ratios[dim] == 2:
        return NotImplemented
    (high, at_high), (low, at_low) = (on_map(func, x, *args, **kwargs) for x in input)
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    axis = input.axis - (not keepdim and dim % input.dim() < input.axis)
    results = [Octaves(high, low, input.parts, axis), Octaves(at_high, at_low, input.parts, axis)]
    return getattr(torch.return_types, func.__name__)(results)


def _variance(func: Function, input: Octaves, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """var and std over dimensions that keep channels and resolutions apart, such as time, or over all of space."""
    if args or isinstance(dim, bool) or "unbiased" in kwargs or "out" in kwargs:
        return NotImplemented
    dims, keepdim, correction = _dims(input, dim), kwargs.get("keepdim", False), kwargs.get("correction", 1)
    halved_dims = {d for d, ratio in enumerate(input.ratios) if ratio == 2}
    if input.axis not in dims and not halved_dims & set(dims):
        high, low = (x.var(dims, correction=correction, keepdim=True) for x in input)
        y = _of_maps(input, high, low, dims, keepdim, None)
    elif halved_dims <= set(dims):
        count = math.prod([input.shape[d] for d in dims])
        centred = input - _reduce(torch.sum, input, dims, True) / count
        total = _reduce(torch.sum, centred * centred, dims, keepdim)
        y = total / max(0, count - (1 if correction is None else correction))
    else:
        return NotImplemented
    return y.sqrt() if func.__name__ == "std" else y


def _norm(func: Function, input: Octaves, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """The Euclidean norm over any dimensions."""
    if kwargs.pop("ord", p) not in (2, "fro", None) or any(value is not None for value in kwargs.values()):
        return NotImplemented
    squares: Any = input * input
    return _reduce(torch.sum, squares, dim, keepdim).sqrt()


def _along(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Any:
    """A function along one dimension, such as softmax: of channels, of time; the low channels' results are averaged."""
    dim = kwargs.get("dim", args[0] if args else None)
    if not isinstance(dim, int) or input.ratios[dim] == 2:
        return NotImplemented
    if dim % input.dim() != input.axis:
        return input.of(*(on_map(func, x, *args, **kwargs) for x in input))
    return input.alike(func(input.merge(), *args, **kwargs))


def _normalize(func: Function, input: Octaves, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, **named: Any) -> Any:
    if named.get("out") is not None:
        return NotImplemented
    return _along(lambda x, dim: func(x, p, dim, eps), input, dim=dim)


def _at_channels(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Any:
    """local_response_norm: a low channel's result is averaged over the positions that it covers."""
    return input.alike(func(input.merge(), *args, **kwargs)) if input.axis == 1 else NotImplemented


def normalize_maps(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Any:
    """Batch or instance norm: each map with its share of the per-channel parameters and statistics."""
    if input.axis != 1:
        return NotImplemented
    parameters = [*args[:4], *[kwargs.pop(name, None) for name in _PER_CHANNEL[len(args) :]]]
    shares: list[Any] = [(None, None) if x is None else split_by_parts(x, input.parts, 0) for x in parameters]
    if len(input.parts) > 1:  # cuDNN would update a copy of statistics that are not contiguous
        shares[:2] = [[None if x is None else x.clone() for x in pair] for pair in shares[:2]]
    maps = []
    for map_, x in enumerate(input):
        of_map = partial(normalize_maps, func) if isinstance(x, Octaves) else func
        try:
            maps.append(of_map(x, *(share[map_] for share in shares), *args[4:], **kwargs) if x.shape[1] else x)
        except ValueError as error:  # of one value a channel, which a small low map reaches first
            what = f"octave features of size {' and '.join(str(tuple(x.shape[2:])) for x in input)}"
            raise UserError(f"{what}: {error}; take larger batches or crops, or alpha 0 here") from error
    if len(input.parts) > 1:  # else the shares are views, updated in place
        with torch.no_grad():
            for statistic, (high, low) in zip(parameters[:2], shares[:2], strict=True):
                if statistic is not None:
                    statistic.copy_(join_by_parts(high, low, input.parts, 0))
    return Octaves(maps[0], maps[1], input.parts)


def _instance_norm(func: Function, input: Octaves, *args: Any, **kwargs: Any) -> Any:
    found: Any = [*args[:4], *[kwargs.get(name) for name in _PER_CHANNEL[len(args) :]]]
    mean, _, weight, bias = found
    uneven = isinstance(_covered(input, range(2, input.dim())), Tensor)  # a border position weighs less
    if mean is None and input.axis == 1 and (uneven or input.low.shape[2:].numel() == 1):
        eps = kwargs.get("eps", args[6] if len(args) > 6 else 1e-5)
        return _group_norm(func, input, input.shape[1], weight, bias, eps)
    return normalize_maps(func, input, *args, **kwargs)


def _group_norm(
    func: Function, input: Octaves, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Group norm with the vanilla statistics: of both maps, a low position weighing those that it covers."""
    if input.axis != 1 or input.shape[1] % num_groups:
        return NotImplemented
    batch, channels = input.shape[:2]
    space = tuple(range(2, input.dim()))
    weights = _covered(input, space)
    maps = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in input]
    means, variances = [], []
    for x, covered in zip(map(merged, maps), (1, weights), strict=True):
        if isinstance(covered, int) or not x.shape[1]:
            variance, mean = torch.var_mean(x, space, correction=0)
        else:
            share = covered / input.shape[2:].numel()
            mean = (x * share).sum(space)
            variance = ((x - mean[(..., *(None,) * len(space))]).square() * share).sum(space)
        means.append(mean)
        variances.append(variance)
    mean, variance = (
        join_by_parts(high, low, input.parts, 1).view(batch, num_groups, -1) for high, low in (means, variances)
    )
    centre = mean.mean(2, keepdim=True)
    scale = ((variance + (mean - centre).square()).mean(2, keepdim=True) + eps).rsqrt()
    scale, shift = (x.expand(mean.shape).reshape(batch, channels) for x in (scale, -centre * scale))
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    shift = shift if bias is None else shift + bias
    scales, shifts = (split_by_parts(x[(..., *(None,) * len(space))], input.parts, 1) for x in (scale, shift))
    high, low = (torch.addcmul(b, x, a).to(input.dtype) for x, a, b in zip(maps, scales, shifts, strict=True))
    return input.of(high, low)


def _layer_norm(
    func: Function, input: Octaves, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Layer norm of channels that lie last: the statistics of each position of the vanilla tensor.

    A low channel gets the mean of the vanilla results at the positions that it covers, which is its value times the
    mean of their scales plus the mean of their shifts.
    """
    if len(normalized_shape) != 1 or input.axis != input.dim() - 1:
        return NotImplemented
    high, low = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in input)
    counts = [x.shape[-1] for x in input]
    if not all(counts):
        return NotImplemented
    low_variance, low_mean = torch.var_mean(merged(low), -1, correction=0, keepdim=True)
    low_variance, low_mean = (input.upsampled(x) for x in (low_variance, low_mean))
    high_mean = high.mean(-1, keepdim=True)
    mean = (high_mean * counts[0] + low_mean * counts[1]) / sum(counts)
    high = high - mean
    squares = high.square().sum(-1, keepdim=True) + counts[1] * (low_variance + (low_mean - mean).square())
    scale = (squares / sum(counts) + eps).rsqrt()
    y: Any = input.of(high * scale, low * input.pooled(scale) - input.pooled(mean * scale))
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(input.dtype)


def _linear(func: Function, input: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A matrix over channels that lie last is a convolution of size 1."""
    if not isinstance(input, Octaves) or input.axis != input.dim() - 1 or input.dim() not in (4, 5):
        return NotImplemented
    x = Octaves(input.high.movedim(-1, 1), input.low.movedim(-1, 1), input.parts)
    convolve: Function = F.conv2d if input.dim() == 4 else F.conv3d
    y = convolve(x, weight[(..., *(None,) * (input.dim() - 2))], bias)
    return y.movedim(1, -1)


def _operator(func: Function, reflected: bool = False) -> Function:
    def operate(self: Any, *other: Any) -> Any:
        arguments = (*other, self) if reflected else (self, *other)
        result = _elementwise(func, *arguments) if isinstance(self, Octaves) else NotImplemented
        if result is NotImplemented:
            record(func, [x for x in arguments if isinstance(x, Features)])
            return on_merged(func, *arguments)
        return result

    return operate


# A tuple's own + and * would concatenate and repeat, and its == would compare the two maps as values.
_BINARY = ("add", "sub", "mul", "truediv", "pow")
_AUGMENTED: dict[Function, Function] = {
    getattr(Tensor, f"{name}_"): getattr(torch, name) for name in ("add", "sub", "mul", "div", "true_divide")
}
_OTHERS = "neg abs eq ne lt le gt ge and_ or_ invert iadd isub imul itruediv"
for _name in (*_BINARY, *_OTHERS.split()):
    # operator.eq compares with None, and is False; torch's refuses it.
    _home = torch if _name in ("eq", "ne") else operator
    setattr(Features, f"__{_name.rstrip('_')}__", _operator(getattr(_home, _name)))
setattr(Features, "__matmul__", lambda self, other: apply(torch.matmul, self, other))  # noqa: B010
setattr(Features, "__rmatmul__", lambda self, other: apply(torch.matmul, other, self))  # noqa: B010
for _name in _BINARY:
    setattr(Features, f"__r{_name}__", _operator(getattr(operator, _name), reflected=True))


def spelled(names: str) -> set[Function]:
    """Every spelling of the named functions: torch.f, Tensor.f, torch.nn.functional.f and what it calls."""
    homes = (torch, torch.special, Tensor, F, torch._C._nn)
    return {getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)}


_NAMES = (
    "add sub subtract rsub mul multiply div divide true_divide neg negative abs exp expm1 log log1p sqrt rsqrt square "
    "reciprocal pow float_power sin cos erf sign round floor ceil clamp clip clamp_min clamp_max maximum minimum where "
    "lerp addcmul addcdiv masked_fill nan_to_num eq ne lt le gt ge isnan isinf isfinite logical_not logical_and "
    "logical_or relu relu6 leaky_relu rrelu elu celu selu gelu silu mish sigmoid hardsigmoid hardswish hardtanh tanh "
    "tanhshrink hardshrink softshrink threshold softplus softsign logsigmoid dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_dropout feature_alpha_dropout to float double half bfloat16 type_as cpu cuda contiguous "
    "clone detach zeros_like ones_like empty_like full_like rand_like randn_like"
)
_IN_PLACE = spelled("fill_ zero_ copy_ requires_grad_") | spelled(_NAMES.replace(" ", "_ ") + "_")
_POOLED, _AVERAGED = "stride padding dilation ceil_mode return_indices", "stride padding ceil_mode count_include_pad"
_HANDLERS: list[tuple[Iterable[Function], Function]] = [
    ({Tensor.expand_as, *_IN_PLACE, *spelled(_NAMES)}, _elementwise),
    ((F.batch_norm,), normalize_maps),  # torch.batch_norm, which F's calls, has another order
    ((F.instance_norm,), _instance_norm),
    ((F.group_norm,), _group_norm),
    ((F.layer_norm,), _layer_norm),
    ((F.linear,), _linear),
    ((F.local_response_norm,), _at_channels),
    ((F.normalize,), _normalize),
    (spelled("softmax log_softmax cumsum cumprod"), _along),
    (spelled("mean sum amax amin"), _reduce),
    (spelled("max min"), _extremum),
    (spelled("var std"), _variance),
    ((*spelled("norm"), torch.linalg.vector_norm), _norm),
    (spelled("max_pool1d max_pool2d max_pool3d"), partial(_pool, _POOLED)),
    (spelled("avg_pool1d"), partial(_pool, _AVERAGED)),
    (spelled("avg_pool2d avg_pool3d"), partial(_pool, f"{_AVERAGED} divisor_override")),
    (spelled(" ".join(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))), _adaptive),
    (spelled("interpolate upsample"), _interpolate),
    (spelled("prelu"), _prelu),
    (spelled("new_empty new_zeros new_ones new_full new_tensor"), _of_high),
    (spelled("element_size is_floating_point is_complex get_device is_contiguous"), _of_high),
    (spelled("numel nelement"), lambda func, input: math.prod(input.shape)),
    (spelled("numpy tolist"), on_merged),
]
for _functions, _handler in _HANDLERS:
    define(_functions, _handler)
