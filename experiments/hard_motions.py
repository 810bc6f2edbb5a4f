"""Whether the classes of the hard motions can be read where they should not be: linear probes on a made data set.

python experiments/hard_motions.py FOLDER [--json FILE] [--pictures FILE]

FOLDER is one that `octvideo motions FOLDER --level hard` made. Logistic regressions learn the class, and the group of
six, from the training videos' files and pixels, and are tested on the validation videos:

codec     bytes of the file, of each packet, and their order
color     mean and standard deviation of each channel, over all frames and how they change
frame     one frame at 20 x 20 pixels
motion    the mean absolute difference of frames, 10 x 10: which does tell something, for comparison

The share that is right, with half its 95 % interval, and chance. Needs scikit-learn. With --pictures a figure of two
validation videos of each group is all that is made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import matplotlib.pyplot as plt
import numpy as np
from own_networks import HERE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from octvideo.commands.options import Parser
from octvideo.data.lists import read_list
from octvideo.files import appearing

RESULTS = HERE / "results" / "hard_motions_probes.json"
FEATURES = ("codec", "color", "frame", "motion")


def features(path: str) -> dict[str, Any]:
    """What the probes see of a video."""
    with av.open(path) as container:
        packets = [packet.size for packet in container.demux(video=0) if packet.size]
    with av.open(path) as container:
        video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    size = video.shape[1] // 20
    coarse = video.reshape(len(video), 20, size, 20, size, 3).mean((2, 4))
    means, spreads = video.mean((1, 2)), video.std((1, 2))
    color = [f(kind, axis=0) for kind in (means, spreads) for f in (np.mean, np.std)]
    moved = np.abs(np.diff(coarse, axis=0)).mean((0, 3)).reshape(10, 2, 10, 2).mean((1, 3))
    return {
        "codec": np.array([Path(path).stat().st_size, *packets, np.std(packets)]),
        "color": np.concatenate([*color, *np.array_split(means, 4)[0], *np.array_split(means, 4)[-1]], axis=None),
        "frame": coarse[len(coarse) // 2].ravel(),
        "motion": moved.ravel(),
    }


def probe(train: tuple[Any, Any], test: tuple[Any, Any]) -> float:
    """The share of the test rows that a logistic regression on the training rows gets right."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    share: float = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(*train).score(*test)
    return share


def measure(folder: Path) -> list[dict[str, Any]]:
    """A row for each kind of features, of classes and of groups."""
    splits = []
    for part in ("train", "val"):
        listed = read_list(folder / f"{part}.csv", root=folder)
        seen = [features(str(path)) for path in track(listed.paths, part, console=Console(stderr=True))]
        splits.append(({name: np.stack([row[name] for row in seen]) for name in FEATURES}, np.array(listed.labels)))
    (train, labels), (test, truth) = splits
    rows = []
    for name in FEATURES:
        for target, per in (("class", 1), ("group", 6)):
            right = probe((train[name], labels // per), (test[name], truth // per))
            half = 1.96 * (right * (1 - right) / len(truth)) ** 0.5
            row = {"features": name, "of": target, "right": right, "half": half}
            rows.append(row | {"chance": 1 / len(set(truth // per)), "videos": [len(labels), len(truth)]})
    return rows


def draw(folder: Path, file: Path, columns: int = 8) -> None:
    """A figure with a row of frames, evenly apart, of two validation videos of each group."""
    listed, labels = read_list(folder / "val.csv", root=folder), (folder / "labels.txt").read_text().splitlines()
    shown = [6 * group + place for group in range(len(labels) // 6) for place in (2, 4)]
    figure, axes = plt.subplots(len(shown), columns, figsize=(columns, len(shown) * 1.25), layout="constrained")
    for label, row in zip(shown, axes, strict=True):
        with av.open(str(listed.paths[list(listed.labels).index(label)])) as container:
            video = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for panel, at in zip(row, np.linspace(0, len(video) - 1, columns).round().astype(int), strict=True):
            panel.imshow(video[at], interpolation="nearest")
            panel.axis("off")
        row[0].set_title(labels[label], fontsize=8, loc="left")
    figure.savefig(file, dpi=90)


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--pictures", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.pictures:
        return draw(options.folder, options.pictures)
    rows = measure(options.folder)
    with appearing(options.json) as partial:
        partial.write_text(json.dumps(rows, indent=1))
    table = Table("features", "of", "right, %", "chance, %")
    for row in rows:
        shares = f"{100 * row['right']:.1f} ± {100 * row['half']:.1f}", f"{100 * row['chance']:.1f}"
        table.add_row(row["features"], row["of"], *shares)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
