"""Fine-tuning on a small set of real videos, fights and others by surveillance cameras: alphas over seeds.

python experiments/fights.py FOLDER [--networks lite0,i3d] [--seeds 0,1,2,3,4] [--output runs/fights] [--json FILE]

FOLDER has train.csv and val.csv of paths from it, 180 and 60 videos of two classes.

lite0  EfficientNet-Lite0 with its ImageNet weights on each of 4 frames, logits averaged; all of it is fine-tuned
i3d    I3D of width 16 on 8 frames, from random weights: no package has weights of a ResNet to inflate

The frames are spread over the 2 seconds of a video, at 112 x 112; `octvideo sweep` trains the networks, and resumes.
Alpha 0 strides as published, 0:pool pools where octave layers do. Differences are paired by seed. The last column says
how many videos a test set needs to show a difference of 2 points from the pooled network: from the share of the videos
of which just one of the two is right, for a chance of .8 at the level of .05, whatever the seeds add.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from choices import one_of
from intervals import shown
from own_networks import HERE, octvideo
from real_weights import load_lite0
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from octvideo.commands.options import Parser, several
from octvideo.files import appearing
from octvideo.models.own_network import FrameAverage

NETWORKS = {
    "lite0": [
        *("--model.network=fights.lite0", "--model.width=null", "--model.dropout=0.5", "--trainer.max_epochs=6"),
        *("--data.clip_frames=4", "--data.frame_stride=12"),
    ],
    "i3d": [
        *("--model.name=i3d_r50", "--model.width=16", "--trainer.max_epochs=12"),
        *("--data.clip_frames=8", "--data.frame_stride=6"),
    ],
}
ALPHAS = ("0:pool", "0", ".125", ".25", ".5")
SHOWN = 0.02  # the difference that a test set should show
Row = dict[str, Any]


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its weights, on every frame."""
    network: nn.Module = FrameAverage(load_lite0())
    return network


def sweep(name: str, options: Namespace) -> None:
    """Trains and tests one network at all alphas."""
    output, data = options.output.absolute() / name, options.data.absolute()
    output.mkdir(parents=True, exist_ok=True)
    lists = [f"--data.train_list={data / 'train.csv'}", f"--data.val_list={data / 'val.csv'}"]
    lists += [f"--data.test_list={data / 'val.csv'}", f"--data.root={data}"]
    clips = ["--data.crop_size=112", "--data.short_side=[112, 128]", "--data.test_crop_size=112"]
    clips += ["--data.mirror=true", "--data.num_workers=1", "--data.batch_size=4"]
    recipe = ["--cfg=hard_motions", "--model.num_classes=2", "--model.optimizer.init_args.lr=0.0003", *NETWORKS[name]]
    sweeping = [f"--alphas={','.join(ALPHAS)}", f"--seeds={','.join(map(str, options.seeds))}", "--rounds=5"]
    octvideo("sweep", *recipe, *lists, *clips, *sweeping, f"--output={output}", log=options.output / f"{name}.txt")


def collect(name: str, folder: Path) -> list[Row]:
    """For each alpha and seed, cost and which of the videos are right."""
    rows = []
    for swept in json.loads((folder / "sweep.json").read_text()):
        for run in swept["runs"]:
            tested = Path(run["checkpoint"]).parent.parent / "test" / "predictions.json"
            videos = sorted(json.loads(tested.read_text())["videos"], key=lambda video: str(video["path"]))
            right = [int(np.argmax(video["scores"])) == video["label"] for video in videos]
            known = {"network": name, "alpha": swept["alpha"], "downsample": swept["downsample"]}
            rows.append(known | {"seed": run["run"], "mac_ratio": swept["mac_ratio"], "right": right})
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Means over seeds and differences from both networks without octaves, in Markdown."""
    found = Table("", "alpha", "MACs", "seeds", "top-1, %", "from pooled", "from strided", box=box.MARKDOWN)
    for title in ("one right", "videos"):
        found.add_column(title)
    right = {
        (row["network"], row["alpha"], row["downsample"], row["seed"]): np.array(row["right"], float) for row in rows
    }
    for name, alpha, downsample in dict.fromkeys(key[:3] for key in right):
        own = {key[3]: value for key, value in right.items() if key[:3] == (name, alpha, downsample)}
        cells = [shown([float(value.mean()) for value in own.values()])]
        for kind in ("pool", "conv"):
            pairs = [(value, right[name, "0", kind, seed]) for seed, value in own.items()]
            same = (alpha, downsample) == ("0", kind)
            cells.append("" if same else shown([float(mine.mean() - base.mean()) for mine, base in pairs], "+"))
            if kind == "pool":
                one = float(np.mean([(mine != base).mean() for mine, base in pairs]))
                told = ["", ""] if same else [f"{100 * one:.0f} %", f"{(1.96 + 0.84) ** 2 * one / SHOWN**2:,.0f}"]
        ratio = next(row["mac_ratio"] for row in rows if (row["network"], row["alpha"]) == (name, alpha))
        title = f"{alpha}{', pooled' if downsample == 'pool' else ''}"
        found.add_row(name, title, f"{ratio:.2f}", str(len(own)), *cells, *told)
    return found


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="FOLDER", help="with train.csv and val.csv")
    networks = several(one_of(NETWORKS, "network"))
    add("--networks", type=networks, default=tuple(NETWORKS), metavar="A,B", help="default: lite0,i3d")
    add("--seeds", type=several(int), default=tuple(range(5)), metavar="N,M", help="default: 0,1,2,3,4")
    add("--output", type=Path, default=Path("runs/fights"), help="folder for the runs; default: runs/fights")
    add("--json", type=Path, default=HERE / "results" / "fights.json", metavar="FILE", help="results of all networks")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Sweeps over each network's alphas, and writes rows and the table."""
    options = parse(arguments)
    for name in options.networks:
        sweep(name, options)
        rows = json.loads(options.json.read_text()) if options.json.exists() else []
        rows = [row for row in rows if row["network"] != name] + collect(name, options.output / name)
        with appearing(options.json) as partial:
            partial.write_text(json.dumps(rows))
    Console(width=None if sys.stdout.isatty() else 200).print(table(json.loads(options.json.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
