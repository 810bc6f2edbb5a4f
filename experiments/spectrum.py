"""Which spatial frequencies feature maps hold: radially averaged power spectra, and shares of energy."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from octvideo.commands.options import Parser, fail
from octvideo.data.clips import clips_of, cut
from octvideo.data.sampling import even_crops
from octvideo.data.video import Video
from octvideo.errors import DecodeError
from octvideo.evaluation.feature_maps import stage_features
from octvideo.files import appearing
from octvideo.layers.octaves import Octaves
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.zoo import create_model, residual_stages

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


BINS = 16  # rings of the radial average
SMALLEST = 8  # rows and columns of maps with a spectrum worth the name


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="video files")
    parser.add_argument("--ckpt", required=True, help="checkpoint of an octave network, of train_net.py")
    parser.add_argument(
        "--vanilla",
        help="checkpoint of the same network trained at alpha 0; default: the octave one's weights at alpha 0",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--clips", type=int, default=4, help="clips of each video; default: 4")
    parser.add_argument(
        "--size", type=int, help="height and width of the clips; default: the checkpoint's test_crop_size"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights; default: 0")
    arguments = parser.parse_args()
    for name in ("clips", "size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            fail(f"--{name} must be at least 1, got {value}")
    return arguments


def open_networks(arguments: argparse.Namespace) -> dict[str, Trained]:
    """The trained octave network, the vanilla one, and the octave one with random weights.

    Raises:
        ValueError: files that are no checkpoints, or whose networks do not go together.
        OSError: files that cannot be read.
    """
    octave = load_trained(arguments.ckpt)
    vanilla = load_trained(arguments.vanilla or arguments.ckpt, alpha=0)
    for key in ("name", "width", "depth"):
        if octave.options[key] != vanilla.options[key]:
            raise ValueError(
                f"--ckpt and --vanilla must hold the same network, got {key} {octave.options[key]} and "
                f"{vanilla.options[key]}"
            )
    torch.manual_seed(arguments.seed)
    network = create_model(**octave.options, channels_last=True).eval()
    return {"octave": octave, "vanilla": vanilla, "random weights": dataclasses.replace(octave, network=network)}


def read_clips(videos: list[str], trained: Trained, num_clips: int, size: int) -> Iterator[Tensor]:
    """Clips (num_clips, 3, T, size, size) of each video, as the network takes them, from its centre.

    Raises:
        DecodeError: a video that cannot be decoded.
    """
    sampling = trained.preprocessing.sampler
    for path in videos:
        with Video(path) as video:
            images = clips_of(video, sampling.dense_clips(video.num_frames, video.fps, num_clips), size)
        (crop,) = even_crops(*images[0][0].shape[:2], size, 1)
        yield trained.normalize(torch.from_numpy(np.stack([cut(clip, crop, size) for clip in images])))


def groups_of(source: str, features: Tensor | Octaves, num_high: int) -> dict[str, Tensor]:
    """The groups of maps that are compared: high and low, or the channels of a vanilla map that are these elsewhere."""
    maps = on_one_grid(features)
    if source == "vanilla":
        whole = maps["all"]
        low = whole[:, num_high:]
        return {"vanilla, high": whole[:, :num_high], "vanilla, low": low, "vanilla, pooled, low": pooled(low)}
    return {f"{source}, {kind}": group for kind, group in maps.items()}


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """The mean power spectrum (H, W) of each group of maps, in each stage whose output is octave.

    Raises:
        ValueError: a network without octave stages, maps that are too small, or an error of `open_networks`.
        DecodeError: a video that cannot be decoded.
        OSError: files that cannot be read.
    """
    networks = open_networks(arguments)
    octave = networks["octave"]
    size = arguments.size or octave.preprocessing.test_crop_size
    names = {f"blocks.{block}": f"res{number}" for number, block in enumerate(residual_stages(octave.network), 2)}
    videos = track(arguments.videos, "videos", console=Console(stderr=True))
    spectra: dict[str, dict[str, Tensor]] = {}
    for clips in read_clips(videos, octave, arguments.clips, size):  # type: ignore[arg-type]
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
            raise ValueError(f"{arguments.ckpt} has no octave stages: its alpha is {octave.options['alpha']}")
    for stage, spectrum in [(stage, kept["octave, high"]) for stage, kept in spectra.items()]:
        if min(spectrum.shape) < SMALLEST:
            print(
                f"{stage} is left out: its maps have {min(spectrum.shape)} rows, too few; raise --size", file=sys.stderr
            )
            del spectra[stage]
    if not spectra:
        raise ValueError(f"no stage has maps of at least {SMALLEST} rows: raise --size, now {size}")
    for kept in spectra.values():
        height, width = next(iter(kept.values())).shape
        noise = torch.randn(1, 256, 1, height, width, generator=torch.Generator().manual_seed(0))
        kept["white noise"] = power(noise)
    return spectra


def plot(spectra: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Radially averaged spectra, a panel for each stage."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(spectra), figsize=(5 * len(spectra), 4), squeeze=False, layout="constrained")
    styles = {"octave": "C0", "vanilla": "C1", "random weights": "C2", "white noise": "C7", "vanilla, pooled": "C3"}
    for panel, (stage, kept) in zip(panels[0], spectra.items(), strict=True):
        for group, spectrum in kept.items():
            source, _, kind = group.rpartition(", ") if ", " in group else (group, "", "high")
            bins = min(BINS, min(spectrum.shape) // 2)
            middles, means = radial_average(spectrum, bins)
            line = "--" if kind == "low" else "-"
            panel.plot(middles, means * spectrum.numel(), line, color=styles[source], label=group)
        panel.axvline(NYQUIST / 2, color="grey", linewidth=0.5)
        panel.set(title=stage, xlabel="cycles a pixel of the high map", ylabel="power (mean is 1)", yscale="log")
    panels[0, -1].legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def main() -> None:
    """Measures, prints and writes."""
    arguments = read_arguments()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        spectra = measure(arguments)
    except (DecodeError, ValueError, OSError) as error:
        fail(str(error))
    groups = list(next(iter(spectra.values())))
    table = Table("share below half of Nyquist", *spectra)
    for group in groups:
        table.add_row(group, *(f"{100 * low_share(kept[group]):.1f} %" for kept in spectra.values()))
    Console().print(table)
    rows = []
    for stage, kept in spectra.items():
        for group, spectrum in kept.items():
            middles, means = radial_average(spectrum, min(BINS, min(spectrum.shape) // 2))
            rows.append(
                {
                    "stage": stage,
                    "maps": group,
                    "low_share": low_share(spectrum),
                    "cycles_per_pixel": middles.tolist(),
                    "power": [None if value != value else value for value in means.tolist()],
                }
            )
    with appearing(arguments.output / "spectrum.json") as partial:
        partial.write_text(json.dumps(rows, indent=1))
    try:
        with appearing(arguments.output / "spectrum.png") as partial:
            plot(spectra, partial)
    except ModuleNotFoundError:
        print("no picture: pip install matplotlib", file=sys.stderr)
    print(f"rows: {arguments.output / 'spectrum.json'}  picture: {arguments.output / 'spectrum.png'}")


if __name__ == "__main__":
    main()
