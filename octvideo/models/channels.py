"""Which channels of a network belong together, found by following them through a run, and their permutation."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from octvideo.errors import UserError

_POINTWISE = re.compile(  # beside those that torch tags so, or as good as pointwise: alike for all channels
    "hardswish|_prelu_kernel|_to_copy|copy|detach|alias|dropout|fill|zero|_softmax|_log_softmax|native_layer_norm"
)
_MOVEMENT = re.compile(
    "view|_unsafe_view|unsqueeze|squeeze|permute|transpose|t|expand|slice|select|split|split_with_sizes|unbind|cat|stack|"
    "flip|roll|repeat|pixel_shuffle|pixel_unshuffle|native_channel_shuffle"
)
_NORM = re.compile(r"(cudnn_|miopen_|native_|_native_)batch_norm(_legit|_legit_no_training)?|native_group_norm")
_FIXED = torch.zeros((), dtype=torch.int32)
_PER_CHANNEL = re.compile(r"(_pool|^_?upsample_\w+|(reflection|replication)_pad)([123])d")


class Channels(TorchDispatchMode):
    """Follows the rows and columns of every weight through a run of the network under this mode.

    Each position of the first two dimensions of a parameter or buffer is a symbol, and a tensor of the run is labelled
    with the symbols that its positions hold. Symbols that must move together, such as a row of a convolution, the
    channel's statistics and the column that reads it, are united. 0 stands for positions that cannot move: whatever
    meets them, or goes through a function that is not known to treat channels alike, is united with it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parent = [0]
        # A tensor's labels have its number of dimensions, and size 1 where the symbol does not depend on the position.
        self._labels: Any = WeakIdKeyDictionary()
        self._axes: list[tuple[Tensor, int, Tensor]] = []  # tensor, dimension, symbols of its positions
        self._parts: set[tuple[int, ...]] = set()  # symbols that some function treats unlike their neighbours
        self._unused = {id(parameter): name for name, parameter in network.named_parameters() if parameter.numel()}
        for tensor in (*network.parameters(), *network.buffers()):
            self._labels[tensor] = [self._new_axis(tensor, dim) for dim, n in enumerate(tensor.shape[:2]) if n > 1]

    def _new_axis(self, tensor: Tensor, dim: int) -> Tensor:
        symbols = torch.arange(len(self._parent), len(self._parent) + tensor.shape[dim], dtype=torch.int32)
        self._parent.extend(symbols.tolist())
        self._axes.append((tensor, dim, symbols))
        return _labels_of([symbols], dim, tensor.dim())[0]

    def check_all_used(self) -> None:
        """Raises UserError for parameters that the run did not meet: they could read channels that move."""
        if self._unused:
            some = ", ".join(list(self._unused.values())[:3])
            raise UserError(f"{some}: parameters that a run in eval mode does not use; remove their modules first")

    def pin(self, tensor: Tensor) -> None:
        """Keeps what the positions of a tensor hold where it is."""
        for labels in self._labels.get(tensor, ()):
            self._unite(labels, _FIXED)

    def permutation(self, costs: Iterable[tuple[Tensor, int, Tensor]]) -> dict[int, int]:
        """For each channel that moves, the one that takes its place: those that cost least come last.

        Args:
            costs: parameters, each with the dimension of its output channels and their costs, which add up over all
                parameters in which a channel occurs. The first that holds a channel tells which places are last.
        """
        roots = {(id(tensor), dim): self._roots(symbols) for tensor, dim, symbols in self._axes}
        cost: dict[int, float] = defaultdict(float)
        order: dict[int, None] = {}
        for tensor, dim, values in costs:
            for root, value in zip(roots.get((id(tensor), dim), ()), values.tolist(), strict=False):
                cost[root] += value
                order[root] = None
        uses: dict[int, list[tuple[int, int]]] = defaultdict(list)  # which axes and parts hold a channel, and how often
        for place, symbols in enumerate((*roots.values(), *({*self._roots(part)} for part in self._parts))):
            for root, count in Counter(symbols).items():
                uses[root].append((place, count))
        alike = defaultdict(list)
        for root in order:
            if root != self._find(0):
                alike[tuple(uses[root])].append(root)
        pairs = (zip(group, sorted(group, key=lambda root: -cost[root]), strict=True) for group in alike.values())
        return {place: root for group in pairs for place, root in group if place != root}

    def permute(self, permutation: Mapping[int, int]) -> Callable[[], None]:
        """Moves channels in all parameters and buffers; returns a function that undoes it."""
        saved: list[tuple[Tensor, Tensor]] = []
        for tensor, dim, symbols in self._axes:
            roots = self._roots(symbols)
            if permutation.keys().isdisjoint(roots):
                continue
            places: dict[int, list[int]] = defaultdict(list)
            for place, root in enumerate(roots):
                places[root].append(place)
            seen: Counter[int] = Counter()
            source = []
            for root in roots:  # a channel's k-th place in an axis takes the k-th of the channel that moves there
                source.append(places[permutation.get(root, root)][seen[root]])
                seen[root] += 1
            saved.append((tensor, tensor.detach().clone()))
            tensor.data.copy_(tensor.data.index_select(dim, torch.tensor(source, device=tensor.device)))

        def undo() -> None:
            for tensor, before in reversed(saved):
                tensor.data.copy_(before)

        return undo

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        tensors = [leaf for leaf in tree_leaves(named) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._unused.pop(id(tensor), None)
        output = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not any(tensor in self._labels for tensor in tensors):
            return output
        name = func.overloadpacket.__name__
        base = name.rstrip("_") if func._schema.is_mutable else name
        if torch.Tag.pointwise in func.tags or _POINTWISE.fullmatch(base):
            self._labels[outputs[0]] = self._pointwise(tensors, outputs[0])
        elif _MOVEMENT.fullmatch(base):
            self._move(lambda data: func(data, *args[1:], **(kwargs or {})), args[0], outputs)
        elif base == "constant_pad_nd":
            self._pad(args[0], args[1], outputs[0])
        elif base == "convolution":
            self._labels[outputs[0]] = self._convolution(args[0], args[1], args[2], args[6], args[8])
        elif base in ("mm", "bmm", "addmm", "baddbmm"):
            self._labels[outputs[0]] = self._product(*tensors[-2:])
            if len(tensors) == 3:
                self._labels[outputs[0]] = self._pointwise([tensors[0], outputs[0]], outputs[0])
        elif _NORM.fullmatch(base):
            (channels,) = self._vectors(tensors[0], [1])
            for parameter in tensors[1:]:
                self._unite(channels, self._vectors(parameter, [0])[0])
            if "group" in named:
                self._parts.update(tuple(part.tolist()) for part in channels.chunk(named["group"]))
            self._labels[outputs[0]] = _labels_of([channels], 1, outputs[0].dim())
        elif torch.Tag.reduction in func.tags and len(tensors) == 1:
            self._reduce(tensors[0], outputs, named.get("dim"), named.get("keepdim", False))
        elif found := _PER_CHANNEL.search(base):
            self._per_channel(tensors, outputs, int(found[3]))
        else:
            for tensor in tensors:
                self.pin(tensor)
        return output

    def _pointwise(self, tensors: Sequence[Tensor], output: Tensor) -> list[Tensor]:
        """Labels of an elementwise function: what meets at a position is one channel."""
        dims = output.dim()
        found: dict[tuple[int, ...], Tensor] = {}
        for tensor in tensors:
            for labels in self._labels.get(tensor, ()):
                labels = labels.view((1,) * (dims - labels.dim()) + labels.shape)
                where = _varies(labels)
                for other in [key for key in found if key != where and {*key} & {*where}]:
                    self._unite(found.pop(other), _FIXED)
                    self._unite(labels, _FIXED)
                if where in found:
                    self._unite(found[where], labels)
                found[where] = labels
        for where, labels in found.items():
            for tensor in tensors:
                own = {tuple(d + dims - tensor.dim() for d in _varies(x)) for x in self._labels.get(tensor, ())}
                shape = (1,) * (dims - tensor.dim()) + tensor.shape
                if where not in own and any(shape[d] > 1 for d in where):
                    self._unite(labels, _FIXED)
        return list(found.values())

    def _move(self, function: Callable[[Any], Any], data: Tensor | Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Labels of a function that moves positions about: it moves their labels likewise."""
        if isinstance(data, Tensor):
            inputs: list[Any] = [labels.expand(data.shape).contiguous() for labels in self._labels.get(data, ())]
            symbols = [len(labels.unique()) for labels in self._labels.get(data, ())]
        else:
            if any(len(self._labels.get(x, ())) > 1 for x in data):
                for x in data:
                    self.pin(x)
                return
            inputs = [[(self._labels.get(x) or [_FIXED])[0].expand(x.shape) for x in data]]
            symbols = [0]
        for output in outputs:
            self._labels[output] = []
        for moved, before in zip(map(function, inputs), symbols, strict=True):
            for output, labels in zip(outputs, [moved] if isinstance(moved, Tensor) else moved, strict=True):
                labels = _compress(labels)
                held = labels.unique()
                if len(held) == 1:  # one channel alone
                    self._unite(held, _FIXED)
                    continue
                if len(held) != before:
                    self._parts.add(tuple(held.tolist()))
                self._labels[output].append(labels)

    def _pad(self, data: Tensor, amounts: Sequence[int], output: Tensor) -> None:
        padded = {data.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
        self._labels[output] = []
        for labels in self._labels.get(data, ()):
            if padded & {*_varies(labels)}:
                labels = _compress(torch.ops.aten.constant_pad_nd(labels.expand(data.shape), amounts, 0))
            self._labels[output].append(labels)

    def _convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, groups: int
    ) -> list[Tensor]:
        (read,) = self._vectors(x, [1])
        rows, columns = self._vectors(weight, [1, 0] if transposed else [0, 1])
        if groups == 1:
            self._unite(read, columns)
        elif groups == len(read) == weight.shape[0] and weight.shape[1] == 1:  # depthwise
            rows = columns if transposed else rows
            self._unite(read, rows)
        else:  # outputs may move within their group
            for fixed in (read, columns, *([rows] if transposed else [])):
                self._unite(fixed, _FIXED)
            self._parts.update(tuple(part.tolist()) for part in rows.chunk(groups))
        if bias is not None:
            self._unite(rows, self._vectors(bias, [0])[0])
        return _labels_of([rows], 1, x.dim())

    def _product(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """Labels of a matrix product: the contracted dimensions are one, the others remain."""
        dims = a.dim()
        *of_a, columns = self._vectors(a, range(dims))
        *of_b, rows, out = self._vectors(b, range(dims))
        self._unite(columns, rows)
        for batch_a, batch_b in zip(of_a, of_b, strict=False):
            self._unite(batch_a, batch_b)
        return _labels_of([*of_a, out], 0, dims)

    def _reduce(self, x: Tensor, outputs: Sequence[Tensor], dim: Any, keepdim: bool) -> None:
        reduced = {d % x.dim() for d in ((dim,) if isinstance(dim, int) else dim or range(x.dim()))}
        kept = []
        for labels in self._labels[x]:
            inside = {*_varies(labels)} & reduced
            if inside and not all(output.dtype.is_floating_point for output in outputs):  # positions are told
                self._unite(labels, _FIXED)
            elif inside != {*_varies(labels)}:
                for d in inside:
                    self._unite(labels, labels.narrow(d, 0, 1))
                    labels = labels.narrow(d, 0, 1)
                kept.append(labels if keepdim else labels.squeeze(tuple(reduced)))
        for output in outputs:
            self._labels[output] = kept

    def _per_channel(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor], spatial: int) -> None:
        """Labels of pooling and resizing of the last dimensions."""
        x, *others = tensors
        for other in others:
            self.pin(other)
        kept = [labels for labels in self._labels.get(x, ()) if max(_varies(labels)) < x.dim() - spatial]
        for labels in self._labels.get(x, ()):
            if max(_varies(labels)) >= x.dim() - spatial:
                self._unite(labels, _FIXED)
        for output in outputs:
            self._labels[output] = kept

    def _vectors(self, tensor: Tensor, dims: Iterable[int]) -> list[Tensor]:
        """The symbols along some dimensions (0: none) for a function that treats other positions alike."""
        vectors = {d: torch.zeros(tensor.shape[d], dtype=torch.int32) for d in dims}
        for labels in self._labels.get(tensor, ()):
            where = _varies(labels)
            along = next((d for d in vectors if d in where), None)
            if along is None:
                self._unite(labels, _FIXED)
                continue
            one = labels
            for d in where:
                one = one if d == along else one.narrow(d, 0, 1)
            self._unite(labels, one)
            vectors[along] = one.flatten()
        return list(vectors.values())

    def _find(self, symbol: int) -> int:
        while self._parent[symbol] != symbol:
            self._parent[symbol] = symbol = self._parent[self._parent[symbol]]
        return symbol

    def _roots(self, symbols: Tensor | Iterable[int]) -> list[int]:
        return [self._find(s) for s in (symbols.tolist() if isinstance(symbols, Tensor) else symbols)]

    def _unite(self, a: Tensor, b: Tensor) -> None:
        for one, other in torch.stack(torch.broadcast_tensors(a, b)).flatten(1).unique(dim=1).t().tolist():
            self._parent[self._find(one)] = self._find(other)


def _labels_of(vectors: Sequence[Tensor], first: int, dims: int) -> list[Tensor]:
    """Labels of a tensor with symbols along the dimensions from `first` on; nothing where none can move."""
    along = ((vector, dim) for dim, vector in enumerate(vectors, first) if len(vector) > 1 and vector.any())
    return [vector.view([-1 if d == dim else 1 for d in range(dims)]) for vector, dim in along]


def _varies(labels: Tensor) -> tuple[int, ...]:
    return tuple(d for d, n in enumerate(labels.shape) if n > 1)


def _compress(labels: Tensor) -> Tensor:
    for dim in _varies(labels):
        first = labels.narrow(dim, 0, 1)
        labels = first if bool((labels == first).all()) else labels
    return labels
