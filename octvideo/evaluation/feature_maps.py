"""Feature maps to look at: the high and the low maps that a layer gives for a clip, as small pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from octvideo.errors import UserError
from octvideo.layers.octaves import Octaves
from octvideo.layers.resampling import upsample
from octvideo.models.zoo import residual_stages

# Dark purple to light yellow, ever lighter; equal steps in between.
COLOURS = np.array([(8, 5, 30), (74, 12, 107), (150, 38, 102), (218, 72, 62), (250, 145, 30), (252, 250, 165)])


class Maps(NamedTuple):
    """The maps of one resolution that a pathway of a layer gives for a clip.

    Args:
        kind: high, low, or all for those of a layer without low maps.
        values: (C, T, H, W), low ones repeated to the size of the high ones.
        size: (T, H, W) that they have themselves.
    """

    kind: str
    values: Tensor
    size: tuple[int, ...]

    def magnitudes(self) -> Tensor:
        """(C, H, W) how far each channel is from 0, in the middle frame."""
        return self.values[:, self.values.shape[1] // 2].abs()

    def strongest(self, most: int) -> list[int]:
        """Numbers of the channels whose mean magnitude in the middle frame is the largest, the largest one first."""
        return self.magnitudes().mean((1, 2)).argsort(descending=True, stable=True)[:most].tolist()


def layers_of(network: nn.Module) -> dict[str, str]:
    """The residual stages of a network of `create_model`, and all convolutions in them.

    Returns:
        The name among the network's modules of each, by what to call it: res2, or res2 res_blocks.0.branch2.conv_a.
    """
    found = {f"res{number}": f"blocks.{block}" for number, block in enumerate(residual_stages(network), 2)}  # type: ignore[arg-type]
    for stage, name in list(found.items()):
        for inner, module in network.get_submodule(name).named_modules():
            if isinstance(module, nn.Conv3d):
                found[f"{stage} {inner}"] = f"{name}.{inner}"
    return found


def maps_of(network: nn.Module, layer: str, clip: Tensor) -> list[list[Maps]]:
    """What a layer gives for a clip.

    Args:
        network: in evaluation mode.
        layer: name of one of its modules.
        clip: (3, T, H, W), as the network takes it.

    Returns:
        For each pathway (of SlowFast's stages there are two, the slow one first) the high and the low maps; all maps
        together if none is low.

    Raises:
        ValueError: a name that the network does not have.
    """
    ((output,),) = (features.values() for features in stage_features(network, [layer], [clip[None]]))
    pathways = output if isinstance(output, list) else [output]
    return [_by_resolution(features) for features in pathways]


def _by_resolution(features: Tensor | Octaves) -> list[Maps]:
    if not isinstance(features, Octaves):
        return [Maps("all", features[0], tuple(features.shape[2:]))]
    found = []
    for kind, maps in zip(("high", "low"), features[:2], strict=True):
        if maps.shape[1]:
            found.append(Maps(kind, upsample(maps, features.high.shape[2:])[0], tuple(maps.shape[2:])))
    return found


def heat(values: Tensor) -> NDArray[np.uint8]:
    """A picture (H, W, 3) of a map (H, W): its smallest value is the darkest, its largest one the lightest."""
    numbers = values.double().cpu().numpy()
    span = numbers.max() - numbers.min()
    shares = (numbers - numbers.min()) / (span if span > 0 else 1)
    places = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(shares, places, colour) for colour in COLOURS.T]
    return np.stack(channels, -1).round().astype(np.uint8)


@torch.no_grad()
def stage_features(
    network: nn.Module, stages: Iterable[str], clips: Iterable[Tensor]
) -> Iterable[dict[str, Tensor | Octaves]]:
    """What parts of a network give for clips.

    Args:
        network: in evaluation mode.
        stages: names of its parts, such as blocks.1.
        clips: of (B, 3, T, H, W), as the network takes them.

    Yields:
        For each of the clips a dict from the part's name to its output: a Tensor or Octaves.

    Raises:
        ValueError: a name that the network does not have.
    """
    parts = dict(network.named_modules())
    missing = [name for name in stages if name not in parts]
    if missing:
        raise UserError(f"the network has no part {', '.join(missing)}")
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found[name] = output

        return hook

    hooks = [parts[name].register_forward_hook(keep(name)) for name in stages]
    try:
        for clip in clips:
            network(clip)
            yield dict(found)
    finally:
        for handle in hooks:
            handle.remove()
