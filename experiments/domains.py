"""Octave networks where the input is no video: waveforms, their spectrograms, and volumes. Accuracy over alpha.

python experiments/domains.py [--parts waveforms,spectrograms,volumes] [--alphas 0,.25,.5] [--seeds 3] [--json FILE]

waveforms      an M5-like 1-D network (Dai et al., ICASSP 2017) on one second of made sound at 4 kHz: 8 classes, a tone
               that glides up or down, whose loudness swells slowly or fast, with or without overtones, in noise
spectrograms   a small 2-D network on the log spectrograms of the same sounds
volumes        MONAI's 3-D U-Net, which segments balls among distractors (boxes) in made volumes: mean Dice score

Data, initial weights and the order of batches depend on the seed alone. Runs that the JSON file holds are not repeated.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from choices import one_of
from intervals import interval
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from octvideo import octavize
from octvideo.commands.options import Parser, number, several, share
from octvideo.files import appearing
from octvideo.models.cost import count_macs

RATE = 4000  # samples a second
RESULTS = Path(__file__).parent / "results" / "domains.json"


class Data(NamedTuple):
    """Inputs and what is to be found in them, for training and for testing."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def sound(label: int, rng: np.random.Generator, noise: float = 2.0) -> np.ndarray[Any, Any]:
    """One second of a class, 0 to 7; its bits choose the glide, the swell and the overtones."""
    up, fast, rich = (label >> bit & 1 for bit in range(3))
    time = np.arange(RATE) / RATE
    start, octaves = rng.uniform(150, 350), rng.uniform(0.1, 0.5) * (1 if up else -1)
    phase = 2 * np.pi * start * (2 ** (octaves * time) - 1) / (octaves * math.log(2))
    tone = sum(np.sin(n * phase + rng.uniform(0, 2 * np.pi)) / n for n in ((1, 2, 3) if rich else (1,)))
    swell = 1 + 0.8 * np.sin(2 * np.pi * (rng.uniform(9, 14) if fast else rng.uniform(2, 5)) * time + rng.uniform(0, 6))
    wave = tone / np.std(tone) * swell + rng.normal(0, noise, RATE)
    return (wave / np.std(wave)).astype(np.float32)


def sounds(seed: int, train: int = 960, test: int = 800) -> Data:
    """Waveforms (N, 1, 4000) and their classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(train + test) % 8
    waves = torch.from_numpy(np.stack([sound(int(label), rng) for label in labels]))[:, None]
    classes = torch.from_numpy(labels)
    return Data(waves[:train], classes[:train], waves[train:], classes[train:])


def spectrograms(seed: int) -> Data:
    """Log power (N, 1, 64, 63) up to 2 kHz, and the classes."""
    data = sounds(seed)

    def transformed(waves: Tensor) -> Tensor:
        spectra = torch.stft(waves[:, 0], 128, 64, window=torch.hann_window(128), return_complex=True)
        power = (spectra.abs().square() + 1e-3).log()[:, None, :64]
        return (power - power.mean()) / power.std()

    return data._replace(inputs=transformed(data.inputs), test_inputs=transformed(data.test_inputs))


def volumes(seed: int, train: int = 96, test: int = 48, size: int = 32) -> Data:
    """Volumes (N, 1, 32, 32, 32) of balls and boxes in noise, and masks of the balls."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(size),) * 3, indexing="ij"))
    inputs, masks = [], []
    for _ in range(train + test):
        mask, other = np.zeros((size,) * 3, bool), np.zeros((size,) * 3, bool)
        for target, power in ((mask, 2), (mask, 2), (other, 16), (other, 16)):  # a ball by this norm is a box
            centre, radius = rng.uniform(5, size - 5, 3), rng.uniform(3.5, 6)
            target |= (np.abs(grid - centre[:, None, None, None]) ** power).sum(0) < radius**power
        values = 1.0 * (mask | other) + rng.normal(0, 0.4, mask.shape)
        inputs.append(values.astype(np.float32))
        masks.append(mask & ~other)
    x, y = torch.from_numpy(np.stack(inputs))[:, None], torch.from_numpy(np.stack(masks))[:, None].float()
    return Data(x[:train], y[:train], x[train:], y[train:])


def m5() -> nn.Module:
    """Four convolutions, each with batch norm and a pool of 4."""
    layers: list[nn.Module] = [nn.Conv1d(1, 32, 40, stride=4, padding=18)]
    for before, after in ((32, 32), (32, 64), (64, 128)):
        layers += [nn.BatchNorm1d(before), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(before, after, 3, padding=1)]
    layers += [nn.BatchNorm1d(128), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 8)]
    return nn.Sequential(*layers)


def spectrogram_network() -> nn.Module:
    """Five convolutions, each with batch norm; a pool of 2 after each but the last."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))


def unet() -> nn.Module:
    """MONAI's U-Net on one input and one output channel; with its instance norm it often finds nothing here."""
    from monai.networks.nets import UNet  # type: ignore[attr-defined]

    return UNet(3, 1, 1, channels=(16, 32, 64), strides=(2, 2), num_res_units=2, norm="batch")


def accuracy(outputs: Tensor, classes: Tensor) -> float:
    """Share of right classes."""
    return (outputs.argmax(1) == classes).double().mean().item()


def dice(outputs: Tensor, masks: Tensor) -> float:
    """Mean over volumes of twice the overlap, divided by both sizes."""
    found, dims = (outputs > 0).float(), (1, 2, 3, 4)
    return (2 * (found * masks).sum(dims) / (found.sum(dims) + masks.sum(dims)).clamp_min(1)).mean().item()


def overlap_loss(outputs: Tensor, masks: Tensor) -> Tensor:
    """Dice loss plus cross-entropy: with the latter alone nothing is found, as masks are a small part of a volume."""
    from monai.losses import DiceCELoss  # type: ignore[attr-defined]

    loss: Tensor = DiceCELoss(sigmoid=True)(outputs, masks)
    return loss


class Part(NamedTuple):
    """A kind of data, the network for it, and how it is trained and measured."""

    data: Callable[[int], Data]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    epochs: int
    batch: int


PARTS = {
    "waveforms": Part(sounds, m5, F.cross_entropy, accuracy, 15, 32),
    "spectrograms": Part(spectrograms, spectrogram_network, F.cross_entropy, accuracy, 10, 32),
    "volumes": Part(volumes, unet, overlap_loss, dice, 12, 4),
}


def run(name: str, alpha: float, seed: int) -> dict[str, Any]:
    """Trains a network from random weights, by AdamW with one cycle of learning rates; its score on the test data."""
    part = PARTS[name]
    data = part.data(seed)
    torch.manual_seed(seed)
    network = octavize(part.network(), alpha, downsample="pool")
    batches = part.epochs * (len(data.inputs) // part.batch)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, batches)
    for _ in range(part.epochs):
        for rows in torch.randperm(len(data.inputs)).split(part.batch)[: len(data.inputs) // part.batch]:
            optimizer.zero_grad()
            part.loss(network(data.inputs[rows]), data.targets[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        outputs = torch.cat([network(x) for x in data.test_inputs.split(32)])
    macs = count_macs(network, tuple(data.inputs.shape[1:]))
    return {"part": name, "alpha": alpha, "seed": seed, "score": part.score(outputs, data.test_targets), "macs": macs}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Means over seeds and differences from alpha 0, paired by seed, in Markdown."""
    shown = Table("", "alpha", "multiply-adds", "score, %", "from alpha 0", box=box.MARKDOWN)
    for part, alpha in dict.fromkeys((row["part"], row["alpha"]) for row in rows):
        found = [row for row in rows if (row["part"], row["alpha"]) == (part, alpha)]
        base = {row["seed"]: row for row in rows if (row["part"], row["alpha"]) == (part, 0)}
        mean, half = interval([row["score"] for row in found])
        cells = [f"{alpha:g}", f"{found[0]['macs'] / base[0]['macs']:.2f}", f"{mean:.1f} ± {half:.1f}"]
        more, less = interval([row["score"] - base[row["seed"]]["score"] for row in found])
        shown.add_row(part, *cells, f"{more:+.1f} ± {less:.1f}" if alpha else "")
    return shown


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--parts", type=several(one_of(PARTS, "part")), default=tuple(PARTS), metavar="A,B")
    add("--alphas", type=several(share), default=(0.0, 0.25, 0.5), metavar="A,B")
    add("--seeds", type=number, default=3, metavar="N", help="default: 3")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="default: experiments/results/domains.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing, and writes the rows after each run."""
    options = parse(arguments)
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else []
    done = {(row["part"], row["alpha"], row["seed"]) for row in rows}
    wanted = [
        (name, alpha, seed) for name in options.parts for alpha in options.alphas for seed in range(options.seeds)
    ]
    for name, alpha, seed in wanted:
        if (name, alpha, seed) not in done:
            rows.append(run(name, alpha, seed))
            Console().print(rows[-1])
            with appearing(options.json) as partial_file:
                partial_file.write_text(json.dumps(rows, indent=1))
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
