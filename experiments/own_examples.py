"""Two networks that a user might have written, for experiments/own_networks.py and the tests."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, width: int = 8, num_classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.norm1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, 2 * width, 3, stride=(1, 2, 2), padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(2 * width)
        self.conv3 = nn.Conv3d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm3d(2 * width)
        self.classifier = nn.Linear(2 * width, num_classes)

    def features(self, clips: Tensor) -> Tensor:
        """(B, 2 * width, T, H / 4, W / 4) of clips (B, 3, T, H, W)."""
        x = torch.relu(self.norm1(self.conv1(clips)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return torch.relu(x + self.norm3(self.conv3(x)))

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(clips).mean((2, 3, 4)))
        return logits


class NeedsClasses(Tiny):
    """A `Tiny` whose number of classes has no default."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__(width, num_classes)


class Outputs(NamedTuple):
    """What `TwoHeads` returns."""

    logits: Tensor
    early: Tensor


def plain() -> nn.Module:
    """A network without arguments."""
    return Tiny()


class TwoHeads(Tiny):
    """A `Tiny` with an auxiliary classifier on its first features."""

    def __init__(self, width: int = 8, num_classes: int = 5) -> None:
        super().__init__(width, num_classes)
        del self.classifier  # the last linear layer is the one that is fitted to the classes
        self.early = nn.Linear(width, num_classes)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, clips: Tensor) -> Outputs:  # type: ignore[override]
        """Logits of both classifiers, each (B, num_classes)."""
        early = torch.relu(self.norm1(self.conv1(clips))).mean((2, 3, 4))
        return Outputs(super().forward(clips), self.early(early))
