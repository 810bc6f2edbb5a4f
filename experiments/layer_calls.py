"""What octave layers cost beside their arithmetic: Python calls of a middle layer, and the time of a tiny one.

python experiments/layer_calls.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from octvideo import Octaves, OctConv3d
from octvideo.models.cost import time_interleaved


def count_calls(call: Callable[[], Any]) -> int:
    """Python functions that a call enters, itself left out."""
    entered = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered - 1


def features(channels: int, size: tuple[int, int, int]) -> Octaves:
    """Random features as an octave layer of alpha 0.25 leaves them."""
    output = OctConv3d(channels, channels, 1, alpha=0.25)(torch.randn(1, channels, *size))
    assert isinstance(output, Octaves)
    return output


def main() -> None:
    """Prints both numbers."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with torch.no_grad():
        middle, x = OctConv3d(64, 64, 3, padding=1, alpha=0.25), features(64, (8, 8, 8))
        print(f"Python calls of OctConv3d(64, 64, 3, padding=1, alpha=0.25): {count_calls(lambda: middle(x))}")
    with torch.inference_mode():
        octave, vanilla = OctConv3d(64, 64, 1, alpha=0.25), nn.Conv3d(64, 64, 1)
        x, plain = features(64, (8, 4, 4)), torch.randn(1, 64, 8, 4, 4)
        times = time_interleaved((lambda: octave(x), lambda: vanilla(plain)), rounds=2000, warmup=200)
    ours, theirs = (1e6 * statistics.median(seconds) for seconds in times)
    print(f"1 x 1 x 1, 64 channels on 8 x 4 x 4: OctConv3d {ours:.0f} us, nn.Conv3d {theirs:.0f} us")


if __name__ == "__main__":
    main()
