"""Which spatial frequencies feature maps hold: radially averaged power spectra, and shares of energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.octaves import Octaves

NYQUIST = 0.5  # cycles a pixel
LOW = NYQUIST / 2  # below it lies all that a map at half the resolution can hold


def power(maps: Tensor) -> Tensor:
    """Power of every spatial frequency, averaged over clips, channels and frames.

    Each frame of each channel counts equally, whatever its contrast: its power is divided by its sum. The mean over the
    frame (frequency 0) is left out, as it is no pattern; frames that are constant do not count.

    Args:
        maps: (B, C, T, H, W).

    Returns:
        (H, W) float64 with frequency 0 at [0, 0], in the order of torch.fft.fft2; its sum is 1, or 0 if all frames are
        constant.
    """
    spectra = torch.fft.fft2(maps.double() - maps.double().mean((-2, -1), keepdim=True)).abs().square()
    spectra[..., 0, 0] = 0
    totals = spectra.sum((-2, -1))
    varying = totals > 1e-12 * maps.shape[-1] ** 2 * maps.shape[-2] ** 2
    if not varying.any():
        return spectra.new_zeros(maps.shape[-2:])
    return (spectra[varying] / totals[varying][:, None, None]).mean(0)


def frequencies(height: int, width: int) -> Tensor:
    """(H, W) length of the frequency vectors of `power`, in cycles a pixel; up to sqrt(1/2), in the corners."""
    return torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij")).double()


def radial_average(spectrum: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """The mean power in rings around frequency 0, up to the Nyquist frequency of rows and columns.

    Args:
        spectrum: (H, W) of `power`.
        num_bins: rings of equal width.

    Returns:
        (num_bins,) middles of the rings, in cycles a pixel, and (num_bins,) mean powers; rings without a frequency (in
        small maps) have NaN.
    """
    length = frequencies(*spectrum.shape)
    rings = (length / NYQUIST * num_bins).long()
    inside = (rings < num_bins) & (length > 0)
    counts = torch.bincount(rings[inside], minlength=num_bins)
    sums = torch.bincount(rings[inside], spectrum[inside], minlength=num_bins)
    middles = (torch.arange(num_bins, dtype=torch.float64) + 0.5) * NYQUIST / num_bins
    return middles, sums / counts  # 0 / 0 is NaN


def low_share(spectrum: Tensor) -> float:
    """The share of the power at frequencies below half of Nyquist in rows and in columns, in [0, 1].

    That square is what a map of half the resolution can hold. White noise has 1/4 there.
    """
    low = [torch.fft.fftfreq(size).abs() < LOW for size in spectrum.shape]
    total = spectrum.sum()
    return float(spectrum[low[0]][:, low[1]].sum() / total) if total > 0 else float("nan")


def pooled(maps: Tensor) -> Tensor:
    """Maps that are averaged over 2 x 2 cells and brought back to their size: low in frequency by construction."""
    batch, _, frames, height, width = maps.shape
    flat = maps.transpose(1, 2).flatten(0, 1)
    small = F.avg_pool2d(flat, 2, ceil_mode=True, count_include_pad=False)
    flat = F.interpolate(small, scale_factor=2, mode="nearest")[..., :height, :width]
    return flat.unflatten(0, (batch, frames)).transpose(1, 2)


def on_one_grid(features: Tensor | Octaves) -> dict[str, Tensor]:
    """The groups of maps that features consist of, all at the resolution of the high ones.

    Returns:
        "high" and "low" (upsampled, as the layers upsample them) of Octaves, or "all" of a Tensor.
    """
    if not isinstance(features, Octaves):
        return {"all": features}
    merged, num_high = features.merge(), features.high.shape[1]
    return {"high": merged[:, :num_high], "low": merged[:, num_high:]}


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
        raise ValueError(f"the network has no part {', '.join(missing)}")
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
