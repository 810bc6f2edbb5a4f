"""What a network costs: multiply-adds, bytes, kernels, parameters, seconds."""

import copy
import logging
import os
import platform
import re
import time
import warnings
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from octvideo.errors import UserError
from octvideo.layers.resampling import keep_layout, lay_channels_last

Call = Callable[[], Any]
Device = str | torch.device


@dataclass
class Cost:
    """What something runs: `operations` has the multiply-adds and the bytes of inputs and outputs of each kernel."""

    operations: list[tuple[int, int]] = field(default_factory=list)

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions, linear layers and matrix products."""
        return sum(macs for macs, _ in self.operations)

    @property
    def bytes_moved(self) -> int:
        """Bytes that kernels read and write."""
        return sum(moved for _, moved in self.operations)

    @property
    def kernels(self) -> int:
        """Operations that are no views."""
        return len(self.operations)


def count_cost(
    model: nn.Module,
    clip_size: Sequence[int] = (3, 8, 224, 224),
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
) -> dict[str, Cost]:
    """What each module runs in eager mode on `batch` inputs of (C, T, H, W), by its name, its children left out.

    Inference has weights and clips of `dtype`. A training step is forward and backward, under autocast for another
    `dtype` than float32, without an optimiser; a module's part of the backward pass counts as its own. Clips and
    weights have the channels_last memory format. "" is what runs outside of all modules; sum up with `total`.

    Counted on tensors without data, so any size takes a second or two; the model itself is neither run nor changed.
    Raises UserError for a size that the model does not take.
    """
    return _count(_Fake(allow_non_fake_inputs=True), model, clip_size, batch, dtype, train)


def _count(
    without_data: Any, model: nn.Module, clip_size: Sequence[int], batch: int, dtype: torch.dtype, train: bool
) -> dict[str, Cost]:
    """`count_cost` within a context whose new tensors have no data."""
    lay = partial(laid, dtype=torch.float32 if train else dtype)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    try:
        logger.disabled = True  # it would log each error
        with without_data:
            network = copy_with(model, lambda x: lay(torch.empty(x.shape, dtype=x.dtype))).train(train)
            clip = lay(torch.empty(batch, *clip_size))
            with CostCounter.of(network) as counter:
                run(network, clip, dtype, train)
    except (RuntimeError, ValueError) as error:
        size = " x ".join(map(str, clip_size[1:]))
        raise UserError(f"the network does not take clips of {size}: {error}") from error
    finally:
        logger.disabled = False
    return dict(counter.costs)


def count_compiled_kernels(
    model: nn.Module,
    clip_size: Sequence[int] = (3, 8, 224, 224),
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
) -> int:
    """Kernels that torch.compile generates for this CPU; convolutions and matrix products are libraries', not counted.

    As `count_cost`, but a copy of the model is compiled and run once, which takes a minute or several.
    """
    from torch._inductor import config, metrics  # a second

    lay = partial(laid, dtype=torch.float32 if train else dtype)
    torch._dynamo.reset()
    metrics.reset()
    compiled: Any = torch.compile(copy_with(model, lay).train(train))
    with config.patch(force_disable_caches=True), warnings.catch_warnings():  # with caches nothing is generated
        warnings.simplefilter("ignore")
        run(compiled, lay(torch.rand(batch, *clip_size)), dtype, train)
    return metrics.generated_kernel_count


def total(costs: Mapping[str, Cost]) -> Cost:
    """The sum of what modules cost."""
    return Cost([operation for cost in costs.values() for operation in cost.operations])


def run(network: nn.Module, clip: Tensor, dtype: torch.dtype, train: bool) -> None:
    """One forward pass, or forward and backward under autocast for another dtype than float32."""
    lower = train and dtype != torch.float32
    with torch.autocast(clip.device.type, dtype) if lower else nullcontext(), torch.set_grad_enabled(train):
        outputs = tree_leaves(network(clip))
    if train:
        torch.stack([x.float().sum() for x in outputs if isinstance(x, Tensor) and x.requires_grad]).sum().backward()


def laid(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the channels_last memory format, floating-point numbers as `dtype`."""
    x = x.to(dtype if x.is_floating_point() else x.dtype, copy=True)
    return lay_channels_last(x) if x.dim() in (4, 5) else x


def copy_with(model: nn.Module, place: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model whose parameters and buffers are what `place` makes of them."""
    placed: dict[int, Any] = {}
    for x in chain(model.parameters(), model.buffers()):
        y = place(x.detach())
        placed[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
    return copy.deepcopy(model, placed)


def count_macs(model: nn.Module, clip_size: Sequence[int] = (3, 8, 224, 224)) -> int:
    """Multiply-adds of one forward pass on an input of (C, T, H, W): convolutions and the classifier, as in the paper.

    The matrix products of attention and non-local blocks count too, which published figures leave out. As `count_cost`,
    but on meta tensors, four times as fast, for which torch decomposes attention.
    """
    return total(_count(torch.device("meta"), model, clip_size, 1, torch.float32, False)).macs


def count_macs_of(call: Call) -> int:
    """Multiply-adds of what a function runs, without gradients: of one layer on its input, for example."""
    with CostCounter() as counter, torch.no_grad():
        call()
    return total(counter.costs).macs


class _Fake(FakeTensorMode):
    """Tensors without data that know their device, which autocast asks for; octave layers do as they would without."""

    only_counts = True


class CostCounter(TorchDispatchMode):
    """Adds every operation to the cost of `layer`, by torch.utils.flop_counter's formulas for multiply-adds."""

    only_counts = True  # octave layers do as they would without it

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = ""
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self._outer: list[str] = []
        # The numbers of autograd's nodes rise: each entry is the first one of a module, to tell whose gradient runs.
        self._numbers: list[int] = [0]
        self._layers: list[str] = [""]

    @classmethod
    @contextmanager
    def of(cls, network: nn.Module) -> Iterator["CostCounter"]:
        """A counter of what runs within this context, whose layers are the names of the network's modules."""
        counter = cls()
        with ExitStack() as stack:
            for name, module in network.named_modules():
                stack.callback(module.register_forward_pre_hook(partial(counter._enter, name)).remove)
                stack.callback(module.register_forward_hook(counter._leave).remove)
            stack.enter_context(counter)
            yield counter

    def _enter(self, layer: str, *_: Any) -> None:
        self._outer.append(self.layer)
        self._go_on(layer)

    def _leave(self, *_: Any) -> None:
        self._go_on(self._outer.pop())

    def _go_on(self, layer: str) -> None:
        self.layer = layer
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._layers.append(layer)

    def _current(self) -> str:
        """The module that runs, or that made the node whose gradient is computed."""
        node: Any = None if self._outer else torch._C._current_autograd_node()
        return self.layer if node is None else self._layers[bisect(self._numbers, node._sequence_nr()) - 1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view or torch.Tag.inplace_view in func.tags or func.overloadpacket in _FREE:
            return output
        formula = _ATTENTION.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        macs = int(formula(*args, **(kwargs or {}), out_val=output)) // 2 if formula else 0
        read = args[1:] if func.overloadpacket in _ONLY_WRITE else args
        arguments = zip(args, func._schema.arguments, strict=False)
        written = output if func._schema.returns else [x for x, what in arguments if what.is_write]
        if moved := sum(x.numel() * x.element_size() for x in tree_leaves((read, written)) if isinstance(x, Tensor)):
            self.costs[self._current()].operations.append((macs, moved))
        if (source := _FORGETFUL.get(func)) is not None:
            first, *rest = output if isinstance(output, tuple) else (output,)
            if isinstance(first, Tensor) and (first.is_meta or isinstance(first, FakeTensor)):
                first = keep_layout(first, args[source])
            output = (first, *rest) if rest else first
        return output


_FREE = {
    *(torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty),
    torch.ops.prim.device,
}
_ONLY_WRITE = {  # do not read their first argument
    *(torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_, torch.ops.aten.new_zeros),
    *(torch.ops.aten.zeros_like, torch.ops.aten.ones_like, torch.ops.aten.full_like, torch.ops.aten.new_ones),
}
_FLASH = "_scaled_dot_product_flash_attention"
_ATTENTION = {  # the CPU's form, of which torch has no formula
    getattr(torch.ops.aten, f"{_FLASH}_for_cpu{way}"): flop_registry[getattr(torch.ops.aten, f"{_FLASH}{way}")]
    for way in ("", "_backward")
}
# Without data their first output loses the memory format of one argument.
_FORGETFUL = {torch.ops.aten.convolution.default: 0, torch.ops.aten.convolution_backward.default: 1}


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def time_interleaved(
    calls: Sequence[Call], *, rounds: int, warmup: int = 1, device: Device = "cpu", after_each: Call = lambda: None
) -> list[list[float]]:
    """Seconds that each of several functions takes in each of `rounds`, called in turn: A B C, A B C, ...

    A machine that gets slower or faster does so for all of them, so ratios within a round stay true. On "cuda" each
    measurement waits for the device. `after_each` runs after every call, outside the measured time.
    """
    if rounds < 1 or warmup < 0:
        raise UserError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    wait: Call = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(warmup + rounds):
        for call, taken in zip(calls, seconds, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
            after_each()
    return [taken[warmup:] for taken in seconds]


def hardware(device: str) -> str:
    """The name of the GPU, or of the CPU and its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
