"""What a network costs: multiply-adds and parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, clip_size: Sequence[int] = (3, 8, 224, 224)) -> int:
    """Multiply-adds of one forward pass: convolutions and the classifier, as the paper counts them.

    The matrix products of attention and non-local blocks count too, which published figures leave out. Counted from
    the operations that run, on tensors without data, so it takes a second for any size.

    Args:
        model: a network; it is neither run nor changed.
        clip_size: size of its input without the batch dimension, (C, T, H, W).
    """
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty((1, *clip_size), device="meta"))
    return int(counter.get_total_flops()) // 2


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
