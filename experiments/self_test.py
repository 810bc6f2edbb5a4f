"""A test before training in 16 bits, if asked for: do this device's convolutions compute what its 32-bit ones do?"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.linalg import vector_norm as norm
from torch.overrides import TorchFunctionMode

from octvideo.layers.octaves import Octaves
from octvideo.training.precise_bn import evaluating

# In I3D, SlowFast, X3D and R(2+1)D at alphas from 0 to 0.5 bfloat16 differed from float32 by at most 0.46 % in every
# layer's output and gradients, and float16 by 0.12 %: rounding. oneDNN's wrong gradients were off by 87 % or more.
TOLERANCE = 0.02
QUANTITIES = ("output", "input gradient", "weight gradient")


@dataclass
class Convolution:
    """A convolution as it runs for some clips; stands for all with the same options, input shapes and layouts."""

    name: str
    module: nn.Module
    input: Tensor | Octaves  # on the meta device
    conv3d_calls: list[tuple[int, int]] = field(default_factory=list)  # torch.conv3d's kernel lengths and frames


class Difference(NamedTuple):
    """The relative error, in norm, of 16-bit results against 32-bit ones; nan if they hold nans."""

    layer: str
    quantity: str
    error: float

    @property
    def tolerable(self) -> bool:
        """Whether rounding explains it."""
        return self.error <= TOLERANCE


class _Recorder(TorchFunctionMode):
    """Notes each kind of convolution that a network runs, once, and the calls of conv3d inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, Convolution] = {}
        self._latest = ""

    def note(self, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        like = torch.empty_like(arguments[0], device="meta")
        self._latest = f"{module} {[(x.shape, x.stride()) for x in _maps(like)]}"
        self.kinds.setdefault(self._latest, Convolution(name, module, like))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv3d and self._latest:
            call, calls = (args[1].shape[2], args[0].shape[2]), self.kinds[self._latest].conv3d_calls
            if call not in calls:
                calls.append(call)
        return func(*args, **(kwargs or {}))


def _maps(x: Tensor | Octaves) -> list[Tensor]:
    return list(x) if isinstance(x, Octaves) else [x]


def find_convolutions(network: nn.Module, clips: Tensor) -> list[Convolution]:
    """The kinds of convolutions that a network runs for clips (B, C, T, H, W), in their order.

    One forward pass in evaluation mode, uncompiled; the network and the random generators are left as they were.
    """
    recorder = _Recorder()
    with evaluating(network, clips.device) as stack, recorder:
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                stack.enter_context(module.register_forward_pre_hook(functools.partial(recorder.note, name)))
        network(clips)
    return list(recorder.kinds.values())


def compare(convolution: Convolution, dtype: torch.dtype, device: torch.device) -> list[Difference]:
    """Runs one convolution in float32 and under autocast to `dtype`, forward and backward: one Difference a quantity.

    All numbers are random: a kernel's faults depend on shapes, and trained weights may be sharded.
    """
    layer = copy.copy(convolution.module)
    parameters = layer._parameters.items()
    layer._parameters = {
        k: None if x is None else nn.Parameter(torch.empty(x.shape, device=device)) for k, x in parameters
    }
    inputs: Any = torch.empty_like(cast(Tensor, convolution.input), dtype=torch.float32, device=device)
    weight, maps = layer.get_parameter("weight"), _maps(inputs)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for x in (*layer.parameters(), *maps):
            x.normal_(generator=generator).requires_grad_()
    gradients: list[Tensor] = []

    def run(enabled: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=enabled):
            outputs = _maps(layer.forward(inputs))  # past the hooks of sharded layers
        if not gradients:
            gradients.extend(torch.empty_like(x).normal_(generator=generator) for x in outputs)
        given = [gradient.to(x.dtype) for gradient, x in zip(gradients, outputs, strict=True)]
        *to_maps, to_weight = torch.autograd.grad(outputs, [*maps, weight], given)
        return outputs, to_maps, [to_weight]

    differences = []
    for quantity, exact, rounded in zip(QUANTITIES, run(False), run(True), strict=True):
        pairs = zip(exact, rounded, strict=True)
        errors = [norm(a - b) / norm(a).clamp_min(1e-30) for a, b in pairs]  # 0 / 0 where there are no channels
        differences.append(Difference(convolution.name, quantity, torch.stack(errors).max().item()))
    return differences


def known_faults(convolutions: Sequence[Convolution], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Faults of library versions that shapes reveal, a sentence each.

    A comparison can miss them: oneDNN's shows only for some contents of unused memory, cuDNN's only for large inputs.
    """
    faults, calls = [], [(kind.name, *call) for kind in convolutions for call in kind.conv3d_calls]
    version = torch.backends.cudnn.version() or 0 if device.type == "cuda" else 0
    if 90800 <= version <= 91002 and calls:
        faults.append(
            f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100} computes some 16-bit Conv3d wrongly, or "
            "torch avoids it and is four times slower (pytorch#163539, #166122): install nvidia-cudnn 9.15 or newer"
        )
    if device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        faults += [
            f"{name} has a kernel of {kernel} frames for {frames}: oneDNN's bf16 weight gradient of such a Conv3d "
            "reads uninitialised memory, and may be nan: raise data.clip_frames, or --trainer.precision 32-true"
            for name, kernel, frames in calls
            if 1 < frames < kernel
        ]
    return faults


class SelfTest(Callback):
    """Compares the network's convolutions in 16 bits with the same ones in 32 before training, on this device.

    Some releases of cuDNN and oneDNN compute 16-bit 3-D convolutions wrongly, and such a run merely learns worse. Every
    rank runs two training clips through the network (sharded weights are gathered by all; one clip would use other
    kernels than a batch), then rank 0 compares, for `limit_seconds`: I3D at 8 x 224 x 224 took 45 s on 2 busy cores.
    """

    def __init__(self, limit_seconds: float = 60) -> None:
        self.limit_seconds = limit_seconds

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(trainer.precision.partition("-")[0])
        if dtype is None:
            return
        clips = trainer.datamodule.preprocessing  # type: ignore[attr-defined]
        size = (2, 3, clips.clip_frames, clips.crop_size, clips.crop_size)
        with trainer.precision_plugin.forward_context():
            kinds = find_convolutions(pl_module, torch.zeros(size, dtype=torch.uint8, device=pl_module.device))
        if not trainer.is_global_zero:
            return
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        for fault in known_faults(kinds, dtype, pl_module.device):
            rank_zero_warn(f"self-test: {fault}")
        start, compared = perf_counter(), list[Difference]()
        for kind in kinds:
            if perf_counter() - start > self.limit_seconds:
                break
            compared += compare(kind, dtype, pl_module.device)
        wrong = [difference for difference in compared if not difference.tolerable]
        cure = "train with --trainer.precision 32-true, or with other versions of torch and cuDNN"
        for layer, quantity, error in wrong:
            fault = f"{layer}: its {quantity} in {name} is off by {100 * error:.3g} % on this device"
            rank_zero_warn(f"self-test: {fault}, where rounding explains {100 * TOLERANCE:g}: {cure}")
        if compared and not wrong:
            text = f"{len(compared) // 3} kinds of convolution"
            text += "" if len(compared) == 3 * len(kinds) else f" (of {len(kinds)}, in {self.limit_seconds:g} s)"
            worst = 100 * max(difference.error for difference in compared)
            print(f"self-test: {text} agree in {name} within {worst:.2g} %", flush=True)
