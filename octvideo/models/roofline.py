"""Predicted time on a described machine: each kernel takes the longer of its arithmetic and its memory traffic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octvideo.errors import UserError
from octvideo.models.cost import Cost, time_interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """What a machine reaches in practice, not what its datasheet promises.

    `flops` are floating-point operations a second by dtype, two for a multiply-add; `bandwidth` is bytes a second, and
    `launch` the seconds that every kernel takes besides.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float
    launch: float

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """Predicted seconds of what was counted; UserError for a dtype that the machine has no arithmetic for.

        Kernels run one after the other and every byte comes from memory: caches, overlap and fusion are left out.
        """
        if dtype not in self.flops:
            names = ", ".join(name for name, known in DTYPES.items() if known in self.flops)
            raise UserError(f"machine {self.name} has no {dtype}: choose {names}")
        peak = self.flops[dtype]
        return sum(max(2 * macs / peak, moved / self.bandwidth) + self.launch for macs, moved in cost.operations)


# Datasheets' dense peaks, of which large convolutions reach about 0.6 and streaming kernels 0.85; 4 us is the time
# between two kernels that a CPU launches in eager mode. fp32 is TF32, PyTorch's default for convolutions on these.
MACHINES = {
    machine.name: machine
    for machine in (
        # NVIDIA H100 SXM: 989 TFLOP/s in 16 bits, 494 in TF32, 3.35 TB/s.
        Machine("h100", {torch.float32: 300e12, torch.bfloat16: 600e12, torch.float16: 600e12}, 2.8e12, 4e-6),
        # NVIDIA A100 SXM 80 GB: 312 TFLOP/s in 16 bits, 156 in TF32, 2.04 TB/s.
        Machine("a100", {torch.float32: 95e12, torch.bfloat16: 190e12, torch.float16: 190e12}, 1.7e12, 4e-6),
        # NVIDIA T4: 65 TFLOP/s in fp16, 8.1 in fp32 (it has neither TF32 nor bf16), 320 GB/s; 70 W do not let it reach
        # more than about half of its arithmetic for long.
        Machine("t4", {torch.float32: 4e12, torch.float16: 30e12}, 0.27e12, 5e-6),
        # 8 cores at 3 GHz with two AVX2 multiply-adds of 8 numbers a cycle, 768 GFLOP/s, and two channels of DDR4-3200,
        # 51 GB/s, of which 0.7 is usual. PyTorch's operations take about 10 us of such a CPU besides.
        Machine("laptop-cpu", {torch.float32: 0.46e12}, 36e9, 10e-6),
    )
}


def machine_of(text: str, dtype: torch.dtype = torch.float32) -> Machine:
    """A machine by name (`MACHINES`), by "FLOPS,BANDWIDTH,LAUNCH" in FLOP/s, bytes/s and seconds, or "here": measured.

    Raises UserError for anything else.
    """
    if text in MACHINES:
        return MACHINES[text]
    if text == "here":
        return measure_machine(dtype, "cuda" if torch.cuda.is_available() else "cpu")
    try:
        flops, bandwidth, launch = (float(part) for part in text.split(","))
        if min(flops, bandwidth) > 0 and launch >= 0:
            return Machine(text, dict.fromkeys(DTYPES.values(), flops), bandwidth, launch)
    except ValueError:
        pass
    described = "FLOPS,BANDWIDTH,LAUNCH such as 600e12,2.8e12,4e-6"
    raise UserError(f"machine must be {', '.join(MACHINES)}, here, or {described}, got {text!r}")


def measure_machine(dtype: torch.dtype, device: str = "cpu") -> Machine:
    """This machine: the fastest of a few matrix products, copies of 256 MB, and layers of almost no work."""
    a, one = (torch.ones(shape, dtype=dtype, device=device) for shape in ((2048, 2048), (1, 8, 1, 4, 4)))
    big = torch.ones(2**28 // a.element_size(), dtype=dtype, device=device)
    copied = torch.empty_like(big)
    layers = nn.Sequential(nn.Conv3d(8, 8, 1, bias=False), nn.BatchNorm3d(8), nn.ReLU()).to(device, dtype).eval()

    def launch() -> None:
        for _ in range(100):
            layers(one)

    with torch.no_grad():
        calls: tuple[Callable[[], Any], ...] = (lambda: a @ a, lambda: copied.copy_(big), launch)
        taken = (time_interleaved([call], rounds=5, warmup=0, device=device) for call in calls)
        product, copy, launches = (min(seconds) for (seconds,) in taken)
    return Machine("here", {dtype: 2 * 2048**3 / product}, 2 * big.nbytes / copy, launches / 300)
