"""Feature maps as pictures: the high- and low-resolution outputs of a layer for one clip."""

from functools import reduce
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from octvideo.layers.resampling import upsample
from octvideo.models.zoo import residual_stages

# Dark purple to light yellow; lightness rises in equal steps.
COLOURS = np.array([(8, 5, 30), (74, 12, 107), (150, 38, 102), (218, 72, 62), (250, 145, 30), (252, 250, 165)])


class Maps(NamedTuple):
    """A layer's feature maps of one resolution, for one clip."""

    kind: str  # high, low (of several octaves: 1/4 ... of the resolution too), or all for a layer without low maps
    values: Tensor  # (C, T, H, W); low maps are upsampled to the size of the high ones
    size: tuple[int, ...]  # (T, H, W) before that

    def magnitudes(self) -> Tensor:
        """(C, H, W) absolute values in the middle frame."""
        return self.values[:, self.values.shape[1] // 2].abs()

    def strongest(self, most: int) -> list[int]:
        """Indices of the channels with the largest mean magnitude in the middle frame, largest first."""
        return self.magnitudes().mean((1, 2)).argsort(descending=True, stable=True)[:most].tolist()


def layers_of(network: nn.Module) -> dict[str, str]:
    """Module names of the residual stages of a network of `create_model` ("res2") and of the convolutions in them."""
    found = {f"res{number}": f"blocks.{block}" for number, block in enumerate(residual_stages(cast(Any, network)), 2)}
    for stage, name in list(found.items()):
        for inner, module in network.get_submodule(name).named_modules():
            if isinstance(module, nn.Conv3d):
                found[f"{stage} {inner}"] = f"{name}.{inner}"
    return found


def maps_of(network: nn.Module, layer: str, clip: Tensor) -> list[list[Maps]]:
    """The feature maps of a module for a normalised clip (3, T, H, W); the network is in evaluation mode.

    For each pathway (SlowFast's stages have two, slow first) its high and low maps; all in one if none is low.
    """
    outputs, pathways = list[Any](), []
    with network.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[2])), torch.no_grad():
        network(clip[None])
    (output,) = outputs
    for features in output if isinstance(output, list) else [output]:
        maps = tree_leaves(features)
        kinds = ("high", "low", *(f"1/{4 << i}" for i in range(len(maps)))) if len(maps) > 1 else ("all",)
        found = []
        for i, (kind, x) in enumerate(zip(kinds, maps, strict=False)):
            if x.shape[1]:
                full = reduce(upsample, [larger.shape[2:] for larger in maps[:i][::-1]], x)
                found.append(Maps(kind, full[0], tuple(x.shape[2:])))
        pathways.append(found)
    return pathways


def heat(values: Tensor) -> NDArray[np.uint8]:
    """A map (H, W) as a picture (H, W, 3), from its smallest value (dark) to its largest (light)."""
    numbers = values.double().cpu().numpy()
    shares = (numbers - numbers.min()) / (np.ptp(numbers) or 1)
    channels = [np.interp(shares, np.linspace(0, 1, len(COLOURS)), colour) for colour in COLOURS.T]
    return np.stack(channels, -1).round().astype(np.uint8)
