"""Octave networks that lack something of the paper's layer, for `model.network: ablations.create`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from octvideo import Octaves, OctConv3d, create_model
from octvideo.errors import UserError
from octvideo.layers.parts import split_by_parts
from octvideo.layers.resampling import average_pool, upsample
from octvideo.models.zoo import set_alpha

CHANGES = {
    "none": "the layer of the paper, computed path by path",
    "strided": "high to low, and strides, by strided convolutions in place of average pools",
    "no_high_to_low": "no path from high to low between two octave maps",
    "no_low_to_high": "no path from low to high between two octave maps",
    "no_exchange": "neither path",
    "temporal": "low maps are halved in time as well",
    "bilinear": "low to high is upsampled bilinearly in place of by repeating",
}


class AblatedConv3d(OctConv3d):
    """An OctConv3d of one group that lacks something; each path is a convolution of its own."""

    change: str

    def forward(self, input: Tensor | Octaves, **_: Any) -> Tensor | Octaves:  # type: ignore[override]
        """As OctConv3d, but for the change."""
        plan = self._plan
        if not isinstance(input, Octaves) and not plan.keeps_low:
            return super().forward(input)
        octave = isinstance(input, Octaves)
        high, low, parts = (
            (*input, input.parts) if isinstance(input, Octaves) else (input, None, ((input.shape[1], 0),))
        )
        paths, both, strided = plan.paths, octave and plan.keeps_low, self.change == "strided"
        pool, factors = paths.pool, paths.factors
        blocks = [split_by_parts(rows, parts, 1) for rows in self.weight.split([n for n in paths.rows if n])]

        def path(x: Tensor, weight: Tensor, *divided: tuple[int, ...]) -> Tensor:
            """Convolves, and divides the size by each of some factors before or meanwhile."""
            strides = paths.kernel.stride
            for by in divided:
                strides = tuple(a * b for a, b in zip(strides, by, strict=True))
                x = x if strided else average_pool(x, by)
            kernel = replace(paths.kernel, stride=strides) if strided else paths.kernel
            return kernel.convolve(x, weight, None)

        out_high = path(high, blocks[0][0], pool)
        if low is not None and not (both and self.change in ("no_low_to_high", "no_exchange")):
            more = paths.kernel.convolve(low, blocks[0][1], None)
            extent = out_high.shape[2:]
            if max(pool) == 1 and self.change == "bilinear":
                more = F.interpolate(more, scale_factor=tuple(map(float, factors)), mode="trilinear")
                more = more[..., : extent[1], : extent[2]]
            out_high = out_high + (upsample(more, extent) if max(pool) == 1 else more)
        if not plan.keeps_low:
            return out_high
        out_low = None
        if not (both and self.change in ("no_high_to_low", "no_exchange")):
            out_low = path(high, blocks[1][0], pool, factors)
        if low is not None:
            kept = path(low, blocks[1][1], pool)
            out_low = kept if out_low is None else out_low + kept
        assert out_low is not None
        return Octaves(out_high, out_low)


def create(
    change: str, name: str, alpha: float, num_classes: int, width: int, downsample: str = "pool", dropout: float = 0.5
) -> nn.Module:
    """A network of `create_model` whose octave layers have a change; UserError for one that is not in CHANGES."""
    if change not in CHANGES:
        raise UserError(f"change must be one of {', '.join(CHANGES)}, got {change!r}")
    zoo: Any = {"width": width, "downsample": downsample, "dropout": dropout}
    network: Any = create_model(name, alpha=alpha, num_classes=num_classes, **zoo)
    if change == "temporal":
        network.octave_options = network.octave_options | {"temporal": True}
        return set_alpha(network, alpha)
    for module in network.modules():
        if type(module) is OctConv3d:
            if module.groups > 1 or module.bias is not None:
                raise UserError("ablations are of convolutions of one group without bias")
            module.__class__ = AblatedConv3d
            module.change = change
    return network  # type: ignore[no-any-return]
