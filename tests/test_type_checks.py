"""Code that asks for the type of features, or converts them by a library that does."""

from typing import Any

import einops
import pytest
import torch
from einops.layers.torch import Rearrange
from torch import nn

from octvideo import octavize
from octvideo.models.type_checks import forget_types, merge_where_types_are_asked


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)


class AsksForATensor(Block):
    def forward(self, x, skip: Any = None):
        y = self.conv(x)
        return y + skip if isinstance(skip, torch.Tensor) else y


class AsksForATuple(Block):
    def forward(self, x, skip=None):
        if isinstance(x, (tuple, list)):
            x, skip = x
        return self.conv(x) if skip is None else self.conv(x) + skip


class AsksOfAnOutput(Block):
    def forward(self, x, skip=None):
        y = self.conv(x)
        return y * 2 if torch.jit.isinstance(y, torch.Tensor) else y


class Converts(Block):
    def forward(self, x, skip=None):
        return x + torch.as_tensor(self.conv(x))


class Einops(Block):
    def __init__(self):
        super().__init__()
        self.fold = Rearrange("b (g c) h w -> b (c g) h w", g=2)

    def forward(self, x, skip=None):
        y = einops.rearrange(self.conv(x), "b c h w -> b h w c")
        weights = einops.reduce(y, "b h w c -> b c", "mean")
        return self.fold(einops.rearrange(y, "b h w c -> b c h w")) * weights[..., None, None]


class Network(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), block()
        self.head = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.first(self.stem(x))
        return self.head(self.second(x, skip=x))


@pytest.mark.parametrize("block", [AsksForATensor, AsksForATuple, AsksOfAnOutput, Converts, Einops])
def test_features_are_taken_for_a_tensor(block):
    """Of an input constant in space, in circles, octaves lose nothing: a skipped branch would show."""
    torch.manual_seed(0)
    network = Network(block).double().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    image = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 8, 8)
    wanted = network(image)
    octavize(network, 0.25)
    merge_where_types_are_asked(network)
    with pytest.warns(UserWarning, match="isinstance") if block is not Einops else torch.no_grad():
        torch.testing.assert_close(network(image), wanted)
    if block is not AsksOfAnOutput:  # torch.compile refuses torch.jit.isinstance
        torch._dynamo.reset()
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image), wanted)
    forget_types(network)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
