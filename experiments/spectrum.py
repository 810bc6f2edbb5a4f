"""Which spatial frequencies do a network's feature maps hold, and do octave convolutions separate them?

python experiments/spectrum.py VIDEO ... --ckpt CHECKPOINT [--vanilla CHECKPOINT] --output DIR

Runs clips of the videos through a trained octave network, and compares the high and low maps that its stages output
with controls: the same channels of a vanilla network; these pooled and upsampled, which are low by construction; and
the octave network with random weights. Prints the share of the power below half of the Nyquist frequency, which is all
that a map of half the resolution can hold, and writes DIR/spectrum.json with the rows of the table and the radially
averaged power spectra, and DIR/spectrum.png. Of SlowFast it looks at the slow pathway.

If the low share of the high maps is smaller than that of the vanilla network's same channels, the octave network moved
low frequencies out of them. The low maps' own spectrum shows nothing: pooling makes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from octvideo.commands.options import Parser, number, one_line_errors
from octvideo.data.clips import cut
from octvideo.data.decoding import clips_of
from octvideo.data.sampling import even_crops
from octvideo.data.video import Video
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.layers.octaves import Octaves
from octvideo.models.checkpoint import Trained, load_trained, restore
from octvideo.models.zoo import residual_stages

NYQUIST = 0.5  # cycles per pixel
BINS = 16  # rings of the radial average
SMALLEST = 8  # rows and columns that a spectrum needs


def power(maps: Tensor) -> Tensor:
    """Power of every spatial frequency of maps (B, C, T, H, W), averaged over clips, channels and frames.

    Each frame of each channel counts equally, whatever its contrast: its power is divided by its sum. Frequency 0 (the
    mean over the frame) and constant frames do not count.

    Returns:
        (H, W) float64 in the order of torch.fft.fft2; its sum is 1, or 0 if all frames are constant.
    """
    spectra: Tensor = torch.fft.fft2(maps.double() - maps.double().mean((-2, -1), keepdim=True)).abs().square()
    spectra[..., 0, 0] = 0
    totals = spectra.sum((-2, -1))
    varying = totals > 1e-12 * maps.shape[-1] ** 2 * maps.shape[-2] ** 2
    if not varying.any():
        return spectra.new_zeros(maps.shape[-2:])
    return (spectra[varying] / totals[varying][:, None, None]).mean(0)


@torch.no_grad()
def stage_features(
    network: nn.Module, stages: Iterable[str], clips: Iterable[Tensor]
) -> Iterable[dict[str, Tensor | Octaves]]:
    """Yields the outputs of some of a network's modules for each of its normalised clips (B, 3, T, H, W), by name.

    The network is in evaluation mode. UserError for a module that it does not have.
    """
    parts, found = dict(network.named_modules()), dict[str, Any]()
    if missing := [name for name in stages if name not in parts]:
        raise UserError(f"the network has no part {', '.join(missing)}")

    def keep(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        found[name] = output

    with ExitStack() as hooks:
        for name in stages:
            hooks.enter_context(parts[name].register_forward_hook(partial(keep, name)))
        for clip in clips:
            network(clip)
            yield dict(found)


def frequencies(height: int, width: int) -> Tensor:
    """(H, W) length of the frequency vectors of `power`, in cycles per pixel; up to sqrt(1/2), in the corners."""
    return torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij")).double()


def radial_average(spectrum: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """The mean of a spectrum (H, W) in rings of equal width around frequency 0, up to the Nyquist frequency.

    Returns:
        (num_bins,) middles of the rings, in cycles per pixel, and (num_bins,) mean powers; rings that hold no frequency
        (in small maps) have NaN.
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

    A map of half the resolution can hold that square alone. White noise has 1/4 there.
    """
    low = [torch.fft.fftfreq(size).abs() < NYQUIST / 2 for size in spectrum.shape]
    total = spectrum.sum()
    return float(spectrum[low[0]][:, low[1]].sum() / total) if total > 0 else float("nan")


def pooled(maps: Tensor) -> Tensor:
    """Maps averaged over 2 x 2 pixels and upsampled to their size: low in frequency by construction."""
    batch, _, frames, height, width = maps.shape
    flat = maps.transpose(1, 2).flatten(0, 1)
    small = F.avg_pool2d(flat, 2, ceil_mode=True, count_include_pad=False)
    flat = F.interpolate(small, scale_factor=2, mode="nearest")[..., :height, :width]
    return torch.unflatten(flat, 0, (batch, frames)).transpose(1, 2)


def on_one_grid(features: Tensor | Octaves) -> dict[str, Tensor]:
    """ "high" and "low" maps of Octaves (these upsampled, as the layers upsample them), or "all" maps of a Tensor."""
    if not isinstance(features, Octaves):
        return {"all": features}
    merged, num_high = features.merge(), features.high.shape[1]
    return {"high": merged[:, :num_high], "low": merged[:, num_high:]}


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("videos", metavar="VIDEO", nargs="+", help="video files")
    add("--ckpt", required=True, help="checkpoint of an octave network, of `octvideo train`")
    what = "checkpoint of the same network trained at alpha 0; default: the octave one's weights at alpha 0"
    add("--vanilla", help=what)
    add("--output", type=Path, required=True, help="folder for the results")
    add("--clips", type=number, default=4, help="clips of each video; default: 4")
    add("--size", type=number, help="height and width of the clips; default: the checkpoint's test_crop_size")
    add("--seed", type=int, default=0, help="of the random weights; default: 0")
    return parser.parse_args()


def open_networks(arguments: argparse.Namespace) -> dict[str, Trained]:
    """The trained octave network, the vanilla one, and the octave one with random weights.

    Raises:
        UserError: files that are not checkpoints, or whose networks do not go together.
    """
    octave = load_trained(arguments.ckpt)
    vanilla = load_trained(arguments.vanilla or arguments.ckpt, alpha=0)
    for key in ("name", "width", "depth"):
        if octave.options[key] != vanilla.options[key]:
            got = f"{key} {octave.options[key]} and {vanilla.options[key]}"
            raise UserError(f"--ckpt and --vanilla must hold the same network, got {got}")
    torch.manual_seed(arguments.seed)
    network = restore(octave.options).eval()
    return {"octave": octave, "vanilla": vanilla, "random weights": dataclasses.replace(octave, network=network)}


def read_clips(videos: Iterable[str], trained: Trained, num_clips: int, size: int) -> Iterator[Tensor]:
    """Clips (num_clips, 3, T, size, size) of each video, as the network takes them, from its centre.

    Raises:
        DecodeError: a video that cannot be decoded.
    """
    for path in videos:
        with Video(path) as video:
            indices = trained.preprocessing.sampler.dense_clips(video.num_frames, video.fps, num_clips)
            images = clips_of(video, indices, size)
        height, width, _ = images[0][0].shape
        (crop,) = even_crops(height, width, size, 1)
        clips = torch.from_numpy(np.stack([cut(clip, crop, size) for clip in images]))
        yield trained.preprocessing.normalize(clips)


def groups_of(source: str, features: Tensor | Octaves, num_high: int) -> dict[str, Tensor]:
    """The groups of maps to compare: high and low, or the same channels of a vanilla map."""
    maps = on_one_grid(features)
    if source == "vanilla":
        whole = maps["all"]
        low = whole[:, num_high:]
        return {"vanilla, high": whole[:, :num_high], "vanilla, low": low, "vanilla, pooled, low": pooled(low)}
    return {f"{source}, {kind}": group for kind, group in maps.items()}


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """The mean power spectrum (H, W) of each group of maps, in each stage whose output is octave.

    Raises:
        UserError: no octave stages, maps that are too small, or an error of `open_networks` or `read_clips`.
    """
    networks = open_networks(arguments)
    octave = networks["octave"]
    size = arguments.size or octave.preprocessing.test_crop_size
    names = {f"blocks.{block}": f"res{number}" for number, block in enumerate(residual_stages(octave.network), 2)}
    videos = track(arguments.videos, "videos", console=Console(stderr=True))
    spectra: dict[str, dict[str, Tensor]] = {}
    for clips in read_clips(videos, octave, arguments.clips, size):
        num_high: dict[str, int] = {}
        for source, trained in networks.items():
            (features,) = stage_features(trained.network, names, [clips])
            for part, maps in features.items():
                stage = names[part]
                maps = maps[0] if isinstance(maps, list) else maps  # the slow pathway of SlowFast
                if source == "octave" and isinstance(maps, Octaves):
                    num_high[stage] = maps.high.shape[1]
                if stage not in num_high:
                    continue
                kept = spectra.setdefault(stage, {})
                for group, values in groups_of(source, maps, num_high[stage]).items():
                    kept[group] = kept.get(group, torch.zeros(())) + power(values) / len(arguments.videos)
        if not num_high:
            raise UserError(f"{arguments.ckpt} has no octave stages: its alpha is {octave.options['alpha']}")
    for stage, spectrum in [(stage, kept["octave, high"]) for stage, kept in spectra.items()]:
        if min(spectrum.shape) < SMALLEST:
            what = f"its maps have {min(spectrum.shape)} rows, too few; raise --size"
            print(f"{stage} is left out: {what}", file=sys.stderr)
            del spectra[stage]
    if not spectra:
        raise UserError(f"no stage has maps of at least {SMALLEST} rows: raise --size, now {size}")
    for kept in spectra.values():
        height, width = next(iter(kept.values())).shape
        noise = torch.randn(1, 256, 1, height, width, generator=torch.Generator().manual_seed(0))
        kept["white noise"] = power(noise)
    return spectra


def draw(spectra: dict[str, dict[str, Tensor]]) -> Figure:
    """Radially averaged spectra, a panel for each stage."""
    figure = Figure(figsize=(5 * len(spectra), 4), layout="constrained")
    panels = figure.subplots(1, len(spectra), squeeze=False)[0]
    styles = {"octave": "C0", "vanilla": "C1", "random weights": "C2", "white noise": "C7", "vanilla, pooled": "C3"}
    for panel, (stage, kept) in zip(panels, spectra.items(), strict=True):
        for group, spectrum in kept.items():
            source, _, kind = group.rpartition(", ") if ", " in group else (group, "", "high")
            middles, means = radial_average(spectrum, min(BINS, min(spectrum.shape) // 2))
            line = "--" if kind == "low" else "-"
            panel.plot(middles, means * spectrum.numel(), line, color=styles[source], label=group)
        panel.axvline(NYQUIST / 2, color="grey", linewidth=0.5)
        panel.set(title=stage, xlabel="cycles per pixel of the high map", ylabel="power (mean is 1)", yscale="log")
    panels[-1].legend(fontsize="small")
    return figure


def main() -> None:
    """Runs the experiment."""
    arguments = read_arguments()
    with one_line_errors():
        arguments.output.mkdir(parents=True, exist_ok=True)
        spectra = measure(arguments)
    table = Table("share below half of Nyquist", *spectra)
    for group in next(iter(spectra.values())):
        table.add_row(group, *(f"{100 * low_share(kept[group]):.1f} %" for kept in spectra.values()))
    Console().print(table)
    rows = []
    for stage, kept in spectra.items():
        for group, spectrum in kept.items():
            middles, means = radial_average(spectrum, min(BINS, min(spectrum.shape) // 2))
            known = [None if value != value else value for value in means.tolist()]
            row = {"stage": stage, "maps": group, "low_share": low_share(spectrum)}
            rows.append(row | {"cycles_per_pixel": middles.tolist(), "power": known})
    with appearing(arguments.output / "spectrum.json") as partial:
        partial.write_text(json.dumps(rows, indent=1))
    with appearing(arguments.output / "spectrum.png") as partial:
        draw(spectra).savefig(partial, dpi=120, format="png")
    print(f"rows: {arguments.output / 'spectrum.json'}  picture: {arguments.output / 'spectrum.png'}")


if __name__ == "__main__":
    main()
