"""Makes a trained network cheaper: octaves where they cost least, then a short training from the network it was.

octvideo shrink --ckpt runs/i3d/checkpoints/last.ckpt --output runs/shrunk [--budget .7] [--by macs|time]
                [--cfg RECIPE] [OPTION OF octvideo train ...]
octvideo shrink --model i3d_r50 --weights I3D_8x8_R50.pyth --cfg RECIPE --output runs/shrunk ...

The checkpoint is one of octvideo train at alpha 0, of the zoo's networks or your own, or a published one; --model takes
a network with weights from elsewhere. The recipe says where the videos are and how to train; without --cfg it is
config.yaml of the checkpoint's run. In turn:

1. a few batches of training clips order the channels (choose_low) and say how much each layer's octaves change the
   scores; the alphas are chosen that meet the budget and change them least: an alpha for each layer, the same with
   strides kept, or one alpha for all
2. the network is tested before, and with these octaves untrained, with batch-norm statistics that fit them
3. it is trained with the original as its teacher (model.teacher), at a twentieth of the recipe's learning rate, for a
   tenth of the original's epochs, as one with a teacher takes about twice as long. Options of octvideo train override
   all of this, such as --model.teacher_weight 1 --model.learning_rate .005
4. the result is tested, exported, and compared with what it was

Everything is in OUTPUT, in order: sensitivities.json, choice.yaml and choice.ckpt (the untrained network), before/,
chosen/, training/checkpoints/last.ckpt (the result), after/, network.onnx (or .pt2 if ONNX is not installed),
shrink.json and report.html: accuracies with their intervals, agreement with the original, multiply-adds, bytes,
measured time. Stopped at any moment, the same command resumes. What the steps print is in log.txt.

Exit status: 0 shrunk; 1 a step failed; 2 a mistake in the command; 3 it does not pay, and one line says why: the
budget is out of reach, by time the network is not faster here, or the accuracy falls by more than --max-drop points;
130 on Ctrl-C, 143 on SIGTERM.
"""

import copy
import importlib.util
import json
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from octvideo.commands import children
from octvideo.commands.children import RunFailedError
from octvideo.commands.command_line import CommandLine, start
from octvideo.commands.export import FORMATS
from octvideo.commands.options import Parser, device_of, fail, number, positive, several, share
from octvideo.commands.report import write_report
from octvideo.errors import DoesNotPayError, ListError, UserError
from octvideo.evaluation.report import Run, agreement, read_run
from octvideo.files import appearing
from octvideo.models import checkpoint
from octvideo.models.checkpoint import TrainingCheckpoint, load_trained, read_training_checkpoint
from octvideo.models.choose_low import choose_low
from octvideo.models.octavize import octavize
from octvideo.models.zoo import MODELS, set_alpha
from octvideo.training.shrink import ALPHAS, check, choose, measure_seconds, refresh, refuse_slower

OWN = {"--model.alpha", "--model.downsample", "--model.weights", "--model.teacher", "--trainer.default_root_dir"}
OWN |= {"--ckpt_path", "--model.name"}
DOES_NOT_PAY = 3
LESS = 20  # times lower than the recipe's is the learning rate; at 5 a good start got worse


class Clips(CommandLine):
    """The recipe's training clips and learning rate, for the network of a checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt", type=str | None, default=None)

    def before_instantiate_classes(self) -> None:
        if self.config["ckpt"] is not None:
            self.take_network_of(self.config["ckpt"], "--ckpt")
        self.config["model"]["teacher"] = None
        self.config["trainer"]["devices"] = 1

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.datamodule.read("train_list")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)


def read_arguments(words: list[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="FILE", help="checkpoint of octvideo train at alpha 0, or a published network")
    what = "in place of --ckpt: a network of the zoo, or the path of a class with arguments --model.network.ARGUMENT"
    add("--model", metavar="NAME", help=what)
    add("--weights", metavar="FILE", help="of --model: what octvideo train takes as model.weights")
    children.add_recipe(parser, required=False)
    add("--budget", type=float, default=0.7, metavar="SHARE", help="of the cost, in (0, 1); default: %(default)s")
    what = "multiply-adds, or also time on this machine, as predicted for the choice and then measured; default: macs"
    add("--by", default="macs", metavar="macs|time", help=what)
    what = "to try for each layer, with commas between them; default: .25,.5,.75"
    add("--alphas", type=several(share), default=ALPHAS, metavar="LIST", help=what)
    add("--batches", type=number, default=20, metavar="N", help="of training clips to choose by; default: %(default)s")
    what = "of training with the teacher; default: a tenth of the checkpoint's epochs, at least 1"
    add("--epochs", type=number, metavar="N", help=what)
    what = "points of accuracy (or mAP) that may be lost; default: %(default)s"
    add("--max-drop", "--max_drop", type=positive, default=2.0, metavar="POINTS", help=what)
    arguments = children.read_recipe(parser, words, OWN, "{} is what shrink sets itself")
    check(arguments.budget, arguments.by, arguments.alphas)
    if (arguments.ckpt is None) == (arguments.model is None):
        fail("either --ckpt FILE or --model NAME says what to shrink")
    if arguments.model is None and arguments.weights is not None:
        fail("--weights are those of --model NAME; a checkpoint has its own")
    if arguments.model in MODELS and arguments.weights is None:
        fail(f"--model {arguments.model} needs --weights FILE: a network that was never trained has nothing to keep")
    if arguments.model is not None and not arguments.cfg:
        fail("--model needs --cfg to say where the videos are")
    if not arguments.cfg:
        config = Path(arguments.ckpt).parent.parent / "config.yaml"
        if not config.is_file():
            fail(f"--cfg is needed: {config} is not there to say where the videos are")
        arguments.cfg, arguments.recipe = [str(config)], [f"--cfg={config}", *arguments.recipe]
    return arguments


def write_original(arguments: Namespace, path: Path) -> None:
    """Writes what --model names as a checkpoint of training, from which all else follows."""
    named = "name" if "." not in arguments.model else "network"
    words = [f"--model.{named}={arguments.model}", "--model.alpha=0"]
    if arguments.weights is not None:
        words.append(f"--model.weights={arguments.weights}")
    words = [*(f"--cfg={file}" for file in arguments.cfg), *words, *arguments.others]
    cli = start(lambda: Clips("", words, keep_options=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    model, data = cli.model, cli.datamodule
    options = {key: model.hparams[key] for key in (*checkpoint.NETWORK_OPTIONS, "mean", "std")}
    training = {"epoch": (cli.config["trainer"]["max_epochs"] or 1) - 1, "global_step": 0}
    training["pytorch-lightning_version"] = lightning.__version__
    checkpoint.write(path, model.network, options, training, data.state_dict())


def decide(arguments: Namespace, found: TrainingCheckpoint) -> None:
    """Chooses the octaves; writes choice.yaml for the training, and choice.ckpt."""
    began, output = time.perf_counter(), arguments.output
    cli = start(lambda: Clips("", [*arguments.recipe, f"--ckpt={arguments.ckpt}"], keep_options=False))
    trained, device = load_trained(arguments.ckpt), device_of(None)
    loader = cli.datamodule.statistics_dataloader(0, arguments.batches)
    batches = [trained.normalize(batch.clips.flatten(0, 1).to(device)) for batch in loader if len(batch.clips)]
    if not batches:
        raise ListError(f"{cli.datamodule.lists['train_list']}: no training video can be decoded")
    network: Any = trained.network.to(device)
    options = network.octave_options
    network.octave_options = options | {"channels_last": False}
    set_alpha(network, 0)  # in the form whose channels can be followed
    try:
        choose_low(network, batches)
    except UserError as error:
        print(f"channels stay in the order in which they were trained: {error}")
    network.octave_options = options
    set_alpha(network, 0)
    how: dict[str, Any] = {"budget": arguments.budget, "by": arguments.by, "alphas": arguments.alphas}
    _, candidates = choose(network, batches, **how, options=options, folder=output, progress=sys.stderr.isatty())
    best = candidates[0]
    for one in candidates:
        like = f"agreement {100 * one.likeness.agreement:.1f} %, distance {one.likeness.distance:.3g}"
        print(f"{one.name}: {like} on {sum(map(len, batches))} training clips, untrained")
    vanilla = load_trained(arguments.ckpt).network.to(device)
    plain = copy.deepcopy(network)
    octavize(network, best.alpha, **options)
    refresh(network, plain, batches)
    seconds = measure_seconds([vanilla, network], batches[0])
    if arguments.by == "time":
        refuse_slower(seconds)
    statistic = {key: getattr(found.preprocessing, key) for key in ("mean", "std")}
    known = found.options | statistic | {"alpha": best.alpha}
    training = {key: found.content[key] for key in ("epoch", "global_step", "pytorch-lightning_version")}
    data = {"preprocessing": asdict(found.preprocessing), "labels": found.labels}
    checkpoint.write(output / "choice.ckpt", network, known, training, data)
    recipe: dict[str, Any] = {key: value for key, value in known.items() if key != "skip"}
    recipe |= {"skip": list(known["skip"] or ()), "weights": str(output / "choice.ckpt"), "teacher": arguments.ckpt}
    recipe |= {"teacher_weight": 0.9, "warmup_epochs": 0, "milestones": None, "normalization": "batch"}
    recipe["learning_rate"] = cli.config["model"]["learning_rate"] / LESS
    epochs = arguments.epochs or max(1, round((found.content["epoch"] + 1) / 10))
    trainer = {"max_epochs": epochs, "default_root_dir": str(output / "training")}
    text = yaml.safe_dump({"model": recipe, "trainer": trainer, "precise_bn": arguments.batches}, sort_keys=False)
    about: dict[str, Any] = {"way": best.name, "candidates": [[one.name, *one.likeness] for one in candidates]}
    about["seconds_to_choose"] = time.perf_counter() - began
    with appearing(output / "choice.json") as partial:
        partial.write_text(json.dumps(about))
    with appearing(output / "choice.yaml") as partial:  # the last: what says that this step is done
        partial.write_text(text)
    print(f"chosen: {best.name}")


def follow(arguments: Namespace) -> tuple[Path, list[Run]]:
    """Tests, trains, tests and exports, as far as that is not done yet; the exported file, and the three runs."""
    output, log = arguments.output, arguments.output / "log.txt"
    after, before = output / "training" / "checkpoints" / "last.ckpt", Path(arguments.ckpt)
    formats = (name for name, (_, needed, _) in FORMATS.items() if all(map(importlib.util.find_spec, needed)))
    exported = output / f"network{next(formats)}"
    files, cfg = {"before": before, "chosen": output / "choice.ckpt", "after": after}, output / "choice.yaml"
    steps = [("test", name) for name in ("before", "chosen")] + [("train", "training"), ("test", "after")]
    with children.RunProgress(len(steps) + 1) as progress:
        for command, name in steps:
            progress.begin(f"{command} {name}" if command == "test" else "train with the teacher")
            if command == "train":
                if not (output / "after" / "predictions.json").is_file():
                    words = [f"--cfg={file}" for file in (*arguments.cfg, cfg)] + arguments.others
                    began = time.perf_counter()
                    children.call("train", [*words, "--ckpt_path=auto"], log)
                    (output / "training.json").write_text(json.dumps(time.perf_counter() - began))
            elif not (output / name / "predictions.json").is_file():
                children.call("test", [*arguments.recipe, f"--ckpt={files[name]}", f"--output={output / name}"], log)
            progress.advance(progress.runs)
        progress.begin("export")
        if not exported.is_file():
            children.call("export", [f"--ckpt={after}", f"--output={exported}"], log)
        progress.advance(progress.runs)
    found = [read_run(output / name, results=output / name, checkpoint=file) for name, file in files.items()]
    found[2] = replace(found[2], curves=read_run(output / "training").curves)
    for run in found:
        if run.predictions is None or not run.predictions.paths or run.card is None:
            raise RunFailedError(f"none of the videos to test on can be decoded: {log}")
    return exported, [replace(run, missing=()) for run in found]


def conclude(arguments: Namespace, exported: Path, found: list[Run]) -> None:
    """Writes shrink.json and report.html, prints the comparison; raises DoesNotPayError where too much is lost."""
    cards: list[Any] = [run.card for run in found]
    key = "map" if "map" in found[0].predictions.accuracies() else "top1"  # type: ignore[union-attr]
    accuracies: list[Any] = [run.predictions.accuracies()[key] for run in found]  # type: ignore[union-attr]
    batch = torch.rand(1, *cards[0].trained.preprocessing.clip_size, device=device_of(None))
    networks = [card.trained.network.to(batch.device) for card in cards]
    seconds = measure_seconds([networks[0], networks[2]], batch)
    alike = [agreement(run, found[0]) for run in found]
    about: dict[str, Any] = json.loads((arguments.output / "choice.json").read_text())
    about |= {key: [each.mean for each in accuracies], "intervals": [each.interval for each in accuracies]}
    about |= {"agreement": alike, "seconds": seconds, "macs": [card.cost.macs for card in cards]}
    about |= {"bytes": [card.cost.bytes_moved for card in cards], "alpha": cards[2].trained.options["alpha"]}
    about |= {"seconds_to_train": json.loads((arguments.output / "training.json").read_text())}
    with appearing(arguments.output / "shrink.json") as partial:
        partial.write_text(json.dumps(about, indent=1))
    table = Table("", "before", "octave, untrained", "after")

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.2f} %"

    table.add_row("mAP" if key == "map" else "video top-1", *(percent(each.mean) for each in accuracies))
    ranges = (each.interval and " to ".join(map(percent, each.interval)) for each in accuracies)
    table.add_row("95 % interval", *(text or "-" for text in ranges))
    table.add_row("same class as before", *map(percent, alike))
    for name, what, unit in (("GMACs", "macs", 1e9), ("GB", "bytes", 1e9)):
        table.add_row(
            f"{name} of a clip", *(f"{value / unit:.3f} ({value / about[what][0]:.2f})" for value in about[what])
        )
    before, after = seconds
    table.add_row("ms of a clip here", f"{1000 * before:.1f}", "", f"{1000 * after:.1f} ({after / before:.2f})")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    write_report(found, arguments.output / "report.html")
    print(f"network: {cards[2].checkpoint}, {exported}")
    drop = 100 * (accuracies[0].mean - accuracies[2].mean)
    if drop > arguments.max_drop:
        fell = f"by {drop:.1f} points, from {percent(accuracies[0].mean)} to {percent(accuracies[2].mean)}"
        cure = "train for more --epochs, or raise --budget"
        raise DoesNotPayError(f"accuracy falls {fell}, more than --max-drop {arguments.max_drop:g}: {cure}")
    if arguments.by == "time":
        refuse_slower(seconds)


def without_network(words: list[str]) -> list[str]:
    """Options without those of `model.network` and their values."""
    kept, within = [], False
    for word in words:
        if word.startswith("--"):
            within = word.startswith("--model.network.")
        if not within:
            kept.append(word)
    return kept


def shrink(words: list[str]) -> int:
    """Does what the command line says; returns the exit status."""
    arguments = read_arguments(words)
    what = children.contents(arguments)
    names = ("ckpt", "budget", "by", "alphas", "batches", "epochs", *(("model", "weights") if arguments.model else ()))
    what |= {name: getattr(arguments, name) for name in names}
    if arguments.model is not None:
        arguments.ckpt = str(arguments.output / "original.ckpt")
        if not (arguments.output / "recipe.json").is_file():
            write_original(arguments, Path(arguments.ckpt))
        arguments.others = without_network(arguments.others)  # which the checkpoint records
        arguments.recipe = [f"--cfg={file}" for file in arguments.cfg] + arguments.others
    try:
        found = read_training_checkpoint(arguments.ckpt)
    except FileNotFoundError as error:
        raise UserError(f"--ckpt {arguments.ckpt}: no such file") from error
    alpha = found.options["alpha"]
    values = alpha.values() if isinstance(alpha, dict) else alpha if isinstance(alpha, (list, tuple)) else [alpha]
    if any(values):
        raise UserError(
            f"--ckpt {arguments.ckpt} is octave already, at alpha {alpha}: shrink takes a network of alpha 0"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    children.keep(arguments.output / "recipe.json", what, "what shrinking with other options wrote")
    try:
        if not (arguments.output / "choice.yaml").is_file():
            decide(arguments, found)
        conclude(arguments, *follow(arguments))
    except DoesNotPayError as error:
        fail(f"shrinking does not pay: {error}", DOES_NOT_PAY)
    except RunFailedError as error:
        fail(f"{error}: see {arguments.output / 'log.txt'}", 1)
    return 0


def main(words: list[str]) -> int:
    """Runs the command."""
    return children.stoppable(lambda: shrink(words))
