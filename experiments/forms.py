"""Forms of a network that are measured against each other, with the weights that all of them share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo import create_model

Size = tuple[int, int, int]
CLIP: Size = (8, 224, 224)  # published clips, as in the README's table of costs
CLIPS: dict[str, Size] = {
    "slowfast_r50": (32, 224, 224),
    "r2plus1d_r50": (16, 224, 224),
    "csn_r101": (32, 224, 224),
    "x3d_xs": (4, 160, 160),
    "x3d_s": (13, 160, 160),
    "x3d_m": (16, 224, 224),
    "x3d_l": (16, 312, 312),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def size_name(size: Sequence[int]) -> str:
    """A size as the options give it: 8x224x224."""
    return "x".join(map(str, size))


def settle(network: nn.Module) -> nn.Module:
    """Gives batch norms the scales of a trained network: branches that end in a zero would multiply zeros."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return network


def octvideo_form(name: str, alpha: float, width: int | None, size: Size) -> nn.Module:
    """Octvideo's network in its fast form, at alpha 0 too."""
    return settle(create_model(name, alpha=alpha, width=width, channels_last=True))


def shipped_form(name: str, alpha: float, width: int | None, size: Size) -> nn.Module:
    """The network of pytorchvideo's builders."""
    assert alpha == 0
    return settle(create_model(name, alpha=0, width=width))


def channels_last_form(name: str, alpha: float, width: int | None, size: Size) -> nn.Module:
    """The network of pytorchvideo's builders, converted by torch's own means."""
    return shipped_form(name, alpha, width, size).to(memory_format=torch.channels_last_3d)
