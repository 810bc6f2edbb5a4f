"""What torch's slices, views, permutations, joins and pads mean on octave features: nothing is lost where they cut."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise, product
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from octvideo.layers.functions import grows, spelled
from octvideo.layers.octaves import (
    Features,
    Function,
    Octaves,
    apply,
    define,
    features_among,
    merged,
    on_map,
    on_merged,
    record,
)
from octvideo.layers.parts import Parts, join_pieces

Positions = tuple[int, ...]


@lru_cache(1024)
def _picked(parts: Parts, channels: Sequence[int]) -> tuple[Positions, Positions, Parts]:
    """Where chosen channels of the vanilla order lie in the high and the low map, and the parts that they form."""
    place: list[tuple[int, int]] = []  # of each channel: (map, position)
    counts = [0, 0]
    for kind, size in enumerate(chain(*parts)):
        place += [(kind % 2, counts[kind % 2] + i) for i in range(size)]
        counts[kind % 2] += size
    chosen = [place[channel] for channel in channels]
    pieces = join_pieces((1 - kind, kind) for kind, _ in chosen)
    high, low = (tuple(position for kind, position in chosen if kind == map_) for map_ in (0, 1))
    return high, low, pieces


def _runs(positions: Positions) -> bool:
    return not positions or positions == tuple(range(positions[0], positions[0] + len(positions)))


def _take(x: Any, positions: Positions, dim: int) -> Any:
    if isinstance(x, Octaves):
        return _channels(x, positions)
    if _runs(positions):
        return x if len(positions) == x.shape[dim] else x.narrow(dim, positions[0] if positions else 0, len(positions))
    return x.index_select(dim, torch.tensor(positions, device=x.device))


def _channels(x: Octaves, channels: Sequence[int]) -> Octaves:
    """Channels chosen by their places in the vanilla order."""
    high, low, parts = _picked(x.parts, channels if isinstance(channels, range) else tuple(channels))
    return Octaves(_take(x.high, high, x.axis), _take(x.low, low, x.axis), parts, x.axis)


def _numbers(index: Any, size: int) -> list[int] | None:
    """A list, or a tensor of one dimension, as numbers; None where they are not known."""
    if isinstance(index, Tensor):
        if index.dim() != 1 or index.device.type == "meta" or torch.compiler.is_compiling():
            return None
        index = index.tolist() if type(index) in (Tensor, torch.nn.Parameter) else None
    if not isinstance(index, (list, tuple, range)) or not all(isinstance(i, int) for i in index):
        return None
    if any(isinstance(i, bool) for i in index):
        return [i for i, wanted in enumerate(index) if wanted]
    return [i % size for i in index]


def _low_slice(index: slice, size: int, low_size: int) -> slice | None:
    """The part of the low map under a slice of the high one; None if it starts inside of a low position."""
    start, stop, step = index.indices(size)
    if step != 1 or start % 2 or stop <= start:
        return None
    return slice(start // 2, min(low_size, (stop + 1) // 2))


def _indices(x: Octaves, index: Any) -> tuple[list[Any], list[Any], Any] | None:
    """What to index the high and the low map with, and the channels in the vanilla order; None if they cannot be."""
    given = list(index) if isinstance(index, tuple) else [index]
    taken = sum(1 for i in given if i is not None and i is not Ellipsis)
    at = next((n for n, i in enumerate(given) if i is Ellipsis), len(given))
    given[at : at + 1] = [slice(None)] * (x.dim() - taken)
    if Ellipsis in [i for i in given if not isinstance(i, Tensor)] or sum(i is not None for i in given) != x.dim():
        return None
    if sum(isinstance(i, (list, Tensor)) for i in given) > 1:
        return None
    channels: Any = range(x.shape[x.axis])
    high: list[Any] = []
    low: list[Any] = []
    dim = 0
    for i in given:
        of_low = i
        if i is not None and dim == x.axis:
            channels = range(x.shape[dim])[i] if isinstance(i, (slice, int)) else _numbers(i, x.shape[dim])
            i = of_low = slice(None)
        elif i is not None and x.ratios[dim] == 2:
            of_low = _low_slice(i, x.shape[dim], x.low.shape[dim]) if isinstance(i, slice) else None
        elif not isinstance(i, (int, slice, list, Tensor, NoneType)) or (isinstance(i, Tensor) and i.dim() > 1):
            return None
        if channels is None or (of_low is None and i is not None):
            return None
        high.append(i)
        low.append(of_low)
        dim += i is not None
    return high, low, channels


def _get(func: Function, input: Octaves, index: Any) -> Any:
    if (found := _indices(input, index)) is None:
        return NotImplemented
    high, low, channels = found
    axis = sum(not isinstance(i, int) for i in high[: _place_of(high, input.axis)])
    if isinstance(channels, int):  # one channel, at its resolution
        x = _channels(input, (channels,))
        y: Tensor = x.high if x.high.shape[x.axis] else x.upsampled(x.low)
        high[_place_of(high, input.axis)] = 0
        return y[tuple(high)]
    x = input if channels == range(input.shape[input.axis]) else _channels(input, channels)
    if not x.low.shape[x.axis]:  # every channel has the full resolution
        return x.high[tuple(high)]
    return Octaves(x.high[tuple(high)], x.low[tuple(low)], x.parts, axis)


def _place_of(index: Sequence[Any], dim: int) -> int:
    """Where an index with new dimensions (None) says something about a dimension."""
    return [n for n, i in enumerate(index) if i is not None][dim]


def _set(func: Function, input: Any, index: Any, value: Any) -> Any:
    found = _indices(input, index) if isinstance(input, Octaves) else None
    if found is None or isinstance(found[2], int):
        if isinstance(input, Octaves):
            what = f"octave features of shape {tuple(input.shape)} cannot be written at {index!r}"
            raise TypeError(f"{what}: write into .merge(), or keep the convolutions that lead there at alpha 0")
        return NotImplemented
    high, low, channels = found
    chosen = _channels(input, channels)
    part = chosen.of(chosen.high[tuple(high)], chosen.low[tuple(low)])
    if isinstance(value, Octaves) and value.parts != part.parts:
        value = value.merge()
    if isinstance(value, Tensor) and value.numel() > 1:
        value = part.alike(value.expand(part.shape))
    values = value if isinstance(value, Octaves) else (value, value)
    places = _picked(input.parts, channels if isinstance(channels, range) else tuple(channels))[:2]
    for x, at, where, of_map in zip(input, (high, low), places, values, strict=True):
        if where:
            at[_place_of(at, input.axis)] = slice(where[0], where[-1] + 1) if _runs(where) else list(where)
            x[tuple(at)] = of_map
    return None


def _at(x: Octaves, dim: int, index: Any) -> Any:
    """x[..., index, ...] at a dimension, by whatever meaning that has."""
    return apply(Tensor.__getitem__, x, (*(slice(None),) * (dim % x.dim()), index))


def _split(func: Function, input: Octaves, split_size_or_sections: Any = None, dim: int = 0, **named: Any) -> Any:
    sizes = named.get("split_size", named.get("indices_or_sections", split_size_or_sections))
    total, dim = input.shape[dim], dim % input.dim()
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    ends = list(accumulate(sizes))
    if input.ratios[dim] == 2 and any(end % 2 for end in ends[:-1]):
        return NotImplemented
    return tuple(_at(input, dim, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True))


def _tensor_split(func: Function, input: Octaves, indices_or_sections: Any, dim: int = 0) -> Any:
    total, n = input.shape[dim], indices_or_sections
    if isinstance(n, Tensor):
        return NotImplemented
    if isinstance(n, int):
        return input.split([(total + n - 1 - i) // n for i in range(n)], dim)
    return input.split([end - start for start, end in pairwise((0, *n, total))], dim)


def _unbind(func: Function, input: Octaves, dim: int = 0) -> Any:
    if input.ratios[dim] == 2 or dim % input.dim() == input.axis:
        return NotImplemented
    return tuple(input.select(dim, i) for i in range(input.shape[dim]))


def _narrow(func: Function, input: Octaves, dim: int, start: Any, length: int) -> Any:
    start = int(start) % input.shape[dim] if start < 0 else start
    return _at(input, dim, slice(start, start + length))


def _flip(func: Function, input: Octaves, *dims: Any, **named: Any) -> Any:
    return _moved(input, [(dim, None) for dim in _shape_of(dims, named.get("dims"))])


def _roll(func: Function, input: Octaves, shifts: Any, dims: Any = ()) -> Any:
    shifts, dims = ((x,) if isinstance(x, int) else tuple(x) for x in (shifts, dims))
    return _moved(input, list(zip(dims, shifts, strict=True))) if dims else NotImplemented


def _moved(x: Octaves, moves: Sequence[tuple[int, int | None]]) -> Any:
    """Flips (None) or rolls dimensions: whole low positions can be moved in an even size, by an even shift."""
    for dim, shift in moves:
        size = x.shape[dim]
        if x.ratios[dim] == 2 and (size % 2 or (shift or 0) % 2):
            return NotImplemented
    for dim, shift in moves:
        size = x.shape[dim]
        if dim % x.dim() == x.axis:
            x = _channels(x, [size - 1 - i if shift is None else (i - shift) % size for i in range(size)])
        elif shift is None:
            x = x.of(*(map_.flip(dim) for map_ in x))
        else:
            x = x.of(x.high.roll(shift, dim), x.low.roll(shift // x.ratios[dim], dim))
    return x


def _cat(func: Function, tensors: Any, dim: int = 0, **named: Any) -> Any:
    """Concatenation: of channels, each kind with its own, where a Tensor counts as a map without low channels."""
    if isinstance(tensors, Features):  # code that concatenates what comes as a tuple, and leaves a single map
        return tensors
    octaves = [x for x in tensors if isinstance(x, Octaves)]
    dim = named.get("axis", dim)
    if not octaves or not all(isinstance(x, (Octaves, Tensor)) for x in tensors):
        return NotImplemented
    x: Any = octaves[0]
    axis, dim = x.axis, dim % x.dim()
    if any(y.ratios != x.ratios or y.axis != axis for y in octaves):
        return NotImplemented
    if dim == axis:
        if len(tensors) == 1:
            return x
        parts = [part for y in tensors for part in (y.parts if isinstance(y, Octaves) else ((y.shape[axis], 0),))]
        high = torch.cat([y.high if isinstance(y, Octaves) else y for y in tensors], axis)
        return Octaves(high, torch.cat([y.low for y in octaves], axis), tuple(parts), axis)
    if any(y.parts != x.parts for y in octaves) or any(
        y.shape[:dim] != x.shape[:dim] or y.shape[dim + 1 :] != x.shape[dim + 1 :] for y in tensors
    ):
        return NotImplemented
    if (x.ratios[dim] == 2 and any(y.shape[dim] % 2 for y in tensors[:-1])) or grows(x, dim, len(tensors)):
        return NotImplemented
    pairs = [y if isinstance(y, Octaves) else x.alike(y) for y in tensors]
    return x.of(*(torch.cat(list(maps), dim) for maps in zip(*pairs, strict=True)))


def _stack(func: Function, tensors: Any, dim: int = 0) -> Any:
    if isinstance(tensors, Features):
        return NotImplemented
    return torch.cat([x.unsqueeze(dim) for x in tensors], dim)


class ListedTensors(TorchFunctionMode):
    """Joins lists in place of tuples: torch.compile looks for octave features in the former alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _JOINS:
            args = [list(x) if type(x) is tuple else x for x in args]
            kwargs = {name: list(x) if type(x) is tuple else x for name, x in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _repeat(func: Function, input: Octaves, *sizes: Any, **named: Any) -> Any:
    times = _shape_of(sizes, named.get("repeats", named.get("dims")))
    if len(times) != input.dim() or any(n > 1 and ratio == 2 for n, ratio in zip(times, input.ratios, strict=True)):
        return NotImplemented
    if any(grows(input, dim, n) for dim, n in enumerate(times)):
        return NotImplemented
    of_map = [n if dim != input.axis else 1 for dim, n in enumerate(times)]
    x: Any = input.of(*(map_.repeat(of_map) for map_ in input))
    return torch.cat([x] * times[input.axis], input.axis) if times[input.axis] > 1 else x


def _expand(func: Function, input: Octaves, *sizes: Any, **named: Any) -> Any:
    target = _shape_of(sizes, named.get("size"))
    if len(target) < input.dim():
        return NotImplemented
    new = len(target) - input.dim()
    x: Any = input[(None,) * new] if new else input
    wanted = [size if n == -1 else n for n, size in zip(target, x.shape, strict=True)]
    if any(n != size and ratio == 2 for n, size, ratio in zip(wanted, x.shape, x.ratios, strict=True)):
        return NotImplemented
    if wanted[x.axis] != x.shape[x.axis] or any(grows(x, dim, n) for dim, n in enumerate(wanted)):
        return NotImplemented
    maps = []
    for map_ in x:
        size = [n if x.ratios[dim] == 1 else map_.shape[dim] for dim, n in enumerate(wanted)]
        size[x.axis] = map_.shape[x.axis]
        maps.append(map_.expand(size))
    return x.of(*maps)


def _pad(func: Function, input: Octaves, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Pads, or crops, each map; in space by even amounts before, and after as far as low positions stay whole."""
    amounts, low_amounts = list(pad), list(pad)
    for place in range(0, len(amounts), 2):
        dim = input.dim() - 1 - place // 2
        before, after = amounts[place : place + 2]
        if (dim == input.axis and (before or after)) or grows(input, dim, 1 + before + after, True):
            return NotImplemented
        if input.ratios[dim] == 1 or not (before or after):
            continue
        size, low_size = input.shape[dim], input.low.shape[dim]
        even = not (size % 2 or before % 2 or (after % 2 and mode != "constant")) and mode != "reflect"
        if not even and not (after <= 0 and before <= 0 and not before % 2):
            return NotImplemented
        low_after = -(-(size + before + after) // 2) - low_size - before // 2
        low_amounts[place : place + 2] = [before // 2, low_after]
    pairs = zip(input, (amounts, low_amounts), strict=True)
    return input.of(*(func(x, to, mode if x.numel() else "constant", value) for x, to in pairs))


# Views and permutations


def _shape_of(sizes: Sequence[Any], named: Any = None) -> list[int]:
    if named is not None:
        sizes = (named,)
    if len(sizes) == 1 and not isinstance(sizes[0], int) and not isinstance(sizes[0], torch.SymInt):
        sizes = sizes[0]
    return list(sizes)


def _resolved(shape: Sequence[int], total: int) -> list[int]:
    """The sizes with the number in place of -1."""
    known = math.prod([n for n in shape if n != -1])
    return [total // known if n == -1 else n for n in shape]


def _blocks(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Pairs the shortest runs of dimensions with equal numbers of elements; ones that have no partner stand alone."""
    i = j = 0
    while i < len(source) or j < len(target):
        first, second = i, j
        if i < len(source) and j < len(target) and source[i] == target[j]:
            i, j = i + 1, j + 1
        elif i < len(source) and source[i] == 1:
            i += 1
        elif j < len(target) and target[j] == 1:
            j += 1
        else:
            left, right = source[i], target[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * source[i], i + 1
                else:
                    right, j = right * target[j], j + 1
        yield range(first, i), range(second, j)


def _viewed(input: Octaves, shape: Sequence[int]) -> Any:
    """The features in another shape: Octaves, a Regrouped view of their channels, or NotImplemented."""
    size, total = input.shape, math.prod(input.shape)  # numel() would fix free sizes in torch.export
    if not total:
        return NotImplemented
    shape = _resolved(shape, total)
    if math.prod(shape) != total:
        raise RuntimeError(f"shape {shape} is invalid for octave features of shape {tuple(size)}")
    ratios, axis, parts = input.ratios, input.axis, input.parts
    highs: list[int] = []
    lows: list[int] = []
    new_axis, grid = -1, None
    for source, target in _blocks(size, shape):
        sizes = [shape[dim] for dim in target]
        if axis not in source:
            if len(source) == len(target) == 1:
                highs.append(input.high.shape[source[0]])
                lows.append(input.low.shape[source[0]])
            elif any(ratios[dim] == 2 for dim in source):
                return NotImplemented
            else:
                highs += sizes
                lows += sizes
            continue
        counts = (input.high.shape[axis], input.low.shape[axis])
        if any(ratios[dim] == 2 for dim in source) or not sizes:
            return NotImplemented
        if len(source) == 1:
            groups = math.prod(sizes[:-1])
            if len(parts) % groups == 0 and parts == parts[: len(parts) // groups] * groups:
                parts = parts[: len(parts) // groups]
                outer, counts = sizes[:-1], (counts[0] // groups, counts[1] // groups)
            else:
                outer, grid = [], tuple(sizes)
            new_axis = len(highs) + len(outer)
            highs += [*outer, counts[0]]
            lows += [*outer, counts[1]]
        elif len(target) == 1:
            before = math.prod([size[dim] for dim in source if dim < axis])
            after = math.prod([size[dim] for dim in source if dim > axis])
            parts = join_pieces(tuple((high * after, low * after) for high, low in parts) * before)
            new_axis = len(highs)
            highs.append(counts[0] * before * after)
            lows.append(counts[1] * before * after)
        else:
            return NotImplemented
    low = input.low.reshape(lows)  # lower octaves whose parts differ between the groups of channels are merged
    y = Octaves(input.high.reshape(highs), merged(low) if isinstance(low, Regrouped) else low, parts, new_axis)
    if grid is None:
        return y
    dims = (*range(new_axis), *(-1 - i for i in range(len(grid))), *range(new_axis + 1, y.dim()))
    return Regrouped(y, grid, dims)


class Regrouped(Features):
    """Octave features whose channels are seen as a grid, as a channel shuffle does on its way."""

    def __init__(self, x: Octaves, grid: tuple[int, ...], dims: tuple[int, ...]) -> None:
        self.x, self.grid, self.dims = x, grid, dims  # dims: of x, or -1 - i for dimension i of the grid
        self.low, self.dtype, self.device = x.low, x.dtype, x.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.x.shape[dim] if dim >= 0 else self.grid[-1 - dim] for dim in self.dims])

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Views of views; anything else acts on the vanilla tensor."""
        kwargs = kwargs or {}
        result = NotImplemented
        if func in _VIEWS and args and isinstance(args[0], Regrouped):
            result = _VIEWS[func](func, *args, **kwargs)
        if result is NotImplemented:
            record(func, features_among((args, kwargs)))
            result = on_merged(func, *args, **kwargs)
        return result

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.dims)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        return self

    def __getitem__(self, index: Any) -> Any:
        return self.__torch_function__(Tensor.__getitem__, (), (self, index))

    def merge(self) -> Tensor:
        """The vanilla tensor in this shape."""
        whole = torch.unflatten(self.x.merge(), self.x.axis, self.grid)
        at = {dim: n for n, dim in enumerate(sorted(self.dims, key=self._place))}
        return whole.permute([at[dim] for dim in self.dims])

    def _place(self, dim: int) -> tuple[int, int]:
        return (dim, 0) if dim >= 0 else (self.x.axis, -dim)

    def permuted(self, order: Sequence[int]) -> Any:
        """The same with its dimensions in another order."""
        return Regrouped(self.x, self.grid, tuple(self.dims[dim] for dim in order))

    def viewed(self, shape: Sequence[int]) -> Any:
        """Octaves if the dimensions of the grid become one."""
        places = [n for n, dim in enumerate(self.dims) if dim < 0]
        if places != list(range(places[0], places[-1] + 1)):
            return NotImplemented
        steps = [math.prod(self.grid[i + 1 :]) for i in range(len(self.grid))]
        grid = [-1 - self.dims[n] for n in places]
        steps_of = [range(0, self.grid[i] * steps[i], steps[i]) for i in grid]
        y = _channels(self.x, [sum(offsets) for offsets in product(*steps_of)])
        rest = [dim for dim in self.dims if dim >= 0]
        y = y.permute(*rest[: places[0]], self.x.axis, *rest[places[0] :])
        return _viewed(y, shape)


def _view(func: Function, input: Any, *sizes: Any, **named: Any) -> Any:
    if sizes and isinstance(sizes[0], torch.dtype):
        return input.of(*(on_map(func, x, *sizes) for x in input)) if isinstance(input, Octaves) else NotImplemented
    shape = _shape_of(sizes, named.get("shape", named.get("size")))
    return _viewed(input, shape) if isinstance(input, Octaves) else input.viewed(shape)


def _view_as(func: Function, input: Any, other: Any) -> Any:
    return _view(func, input, other.shape) if isinstance(input, Features) else input.reshape(other.shape)


def _flatten(func: Function, input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    size = list(input.shape)
    start, end = start_dim % len(size), end_dim % len(size)
    return _view(func, input, [*size[:start], math.prod(size[start : end + 1]), *size[end + 1 :]])


def _unflatten(func: Function, input: Any, dim: int, sizes: Any) -> Any:
    size = list(input.shape)
    dim = dim % len(size)
    return _view(func, input, [*size[:dim], *_resolved(sizes, size[dim]), *size[dim + 1 :]])


def _squeeze(func: Function, input: Any, dim: Any = None) -> Any:
    size = input.shape
    dims = range(len(size)) if dim is None else [dim] if isinstance(dim, int) else dim
    out = {d % len(size) for d in dims if size[d] == 1}
    return _view(func, input, [n for d, n in enumerate(size) if d not in out]) if out else input


def _unsqueeze(func: Function, input: Any, dim: int) -> Any:
    at = dim % (input.dim() + 1)
    return Octaves(input.high.unsqueeze(at), input.low.unsqueeze(at), input.parts, input.axis + (at <= input.axis))


def _permute(func: Function, input: Any, *dims: Any, **named: Any) -> Any:
    order = [dim % input.dim() for dim in _shape_of(dims, named.get("dims"))]
    if not isinstance(input, Octaves):
        return input.permuted(order)
    return Octaves(input.high.permute(order), input.low.permute(order), input.parts, order.index(input.axis))


def _transpose(func: Function, input: Any, dim0: Any = 0, dim1: Any = 1, **named: Any) -> Any:
    first, second = named.get("axis0", dim0), named.get("axis1", dim1)
    order = list(range(input.dim()))
    order[first], order[second] = order[second], order[first]
    return _permute(func, input, order)


def _movedim(func: Function, input: Any, source: Any, destination: Any) -> Any:
    numbered = torch.empty([1 + dim for dim in range(input.dim())], device="meta")
    return _permute(func, input, [n - 1 for n in numbered.movedim(source, destination).shape])


_OF_VIEWS: list[tuple[Iterable[Function], Function]] = [
    (spelled("view reshape"), _view),
    (spelled("view_as reshape_as"), _view_as),
    (spelled("flatten"), _flatten),
    (spelled("unflatten"), _unflatten),
    (spelled("squeeze"), _squeeze),
    (spelled("permute"), _permute),
    (spelled("transpose swapaxes swapdims"), _transpose),
    (spelled("movedim moveaxis"), _movedim),
]
_OF_OCTAVES: list[tuple[Iterable[Function], Function]] = [
    ({Tensor.__getitem__}, _get),
    ({Tensor.__setitem__}, _set),
    (spelled("split split_with_sizes"), _split),
    (spelled("chunk"), lambda func, input, chunks, dim=0: input.split(-(-input.shape[dim] // chunks), dim)),
    (spelled("tensor_split"), _tensor_split),
    (spelled("unbind"), _unbind),
    (spelled("narrow"), _narrow),
    (spelled("select index_select"), lambda func, input, dim, index: _at(input, dim, index)),
    (spelled("flip"), _flip),
    (spelled("roll"), _roll),
    (spelled("cat concat concatenate"), _cat),
    (spelled("stack"), _stack),
    (spelled("repeat tile"), _repeat),
    (spelled("expand"), _expand),
    (spelled("pad"), _pad),
    (spelled("unsqueeze"), _unsqueeze),
]
_JOINS = spelled("cat concat concatenate stack")
_VIEWS = {function: handler for functions, handler in _OF_VIEWS for function in functions}
for _functions, _handler in (*_OF_VIEWS, *_OF_OCTAVES):
    define(_functions, _handler)
