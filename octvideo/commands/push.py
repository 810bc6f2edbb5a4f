"""Publishes a network: weights, configuration and a model card in a folder, and on the Hugging Face hub if you say so.

octvideo push --ckpt CHECKPOINT --to FOLDER [--report RESULTS] [--data TEXT] [--license NAME] [--hub USER/NAME]

FOLDER/model.safetensors   weights
FOLDER/config.json         the network's options, preprocessing, class names, versions
FOLDER/README.md           the model card: cost and, with --report, accuracies with their intervals

FOLDER appears whole or not at all, and nothing in it is pickled. It serves as --ckpt of other commands, and so does
USER/NAME, once it is on the hub: octvideo predict video.mp4 --ckpt USER/NAME. The hub needs a token (`hf auth login`).
To edit the card before it is seen, leave out --hub, edit README.md, then: octvideo push --ckpt FOLDER --hub USER/NAME.

Exit status: 0 published; 2 a mistake in the command, or a hub that does not answer.
"""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path

import jinja2

from octvideo.commands.options import Parser, checkpoint, fail, one_line_errors
from octvideo.errors import UserError
from octvideo.evaluation.report import (
    Accuracy,
    Card,
    MultiPredictions,
    Predictions,
    read_card,
    read_predictions,
    say_alpha,
)
from octvideo.models.published import HUB_NAME, require_hub, upload, write_published


def percent(accuracy: Accuracy) -> str:
    """An accuracy and its interval, in words."""
    interval = (
        "" if accuracy.interval is None else " ({:.2f} to {:.2f} %)".format(*(100 * x for x in accuracy.interval))
    )
    return f"{100 * accuracy.mean:.2f} %{interval}"


def model_card(
    card: Card, predictions: Predictions | MultiPredictions | None, where: str, data: str, license_name: str
) -> str:
    """The page of a network, with the metadata that the hub reads in front."""
    from huggingface_hub import EvalResult, ModelCardData

    trained, accuracies = card.trained, predictions.accuracies() if predictions else {}
    name, alpha = Path(where).name, trained.options["alpha"]
    task = ("video-classification", "video", "test videos")
    kinds = {"top1": "accuracy", "top5": "accuracy", "map": "mean_average_precision"}
    found = [(key, kind, round(accuracies[key].mean, 4)) for key, kind in kinds.items() if key in accuracies]
    results = [EvalResult(*task, kind, value, metric_name=f"video {key}") for key, kind, value in found]
    metadata = ModelCardData(
        model_name=name,
        library_name="octvideo",
        pipeline_tag="video-classification",
        license=license_name or None,
        tags=["octave-convolution", "video-recognition", "pytorch"],
        eval_results=results or None,
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["accuracy"] = percent
    octave = any(alpha.values() if isinstance(alpha, dict) else alpha if isinstance(alpha, list | tuple) else [alpha])
    text = environment.from_string(Path(__file__).with_name("model_card.md").read_text("utf-8")).render(
        **{
            "name": name,
            "where": where,
            "kind": trained.name,
            "labels": trained.labels,
            "data": data,
        },
        **{"octave": ", octave" if octave else "", "alpha": say_alpha(alpha), "how": trained.preprocessing},
        **{"parameters": card.parameters, "gmacs": card.cost.macs / 1e9, "epoch": card.epoch, "step": card.step},
        version=importlib.metadata.version("octvideo"),
        **{"tested": accuracies, "videos": len(predictions.paths) if predictions else 0},
        bad=len(predictions.bad) if predictions else 0,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def publish(ckpt: Path, folder: Path, report: Path | None, where: str, data: str, license_name: str) -> None:
    """Writes a checkpoint's folder."""
    require_hub()
    path, predictions = ckpt, None
    try:
        card = read_card(ckpt)
        if report is not None:
            path = report / "predictions.json" if report.is_dir() else report
            predictions = read_predictions(path, card.trained.labels)
            if not predictions.paths:
                raise UserError("no video was tested")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise UserError(str(error) if path is ckpt else f"{path}: {error}") from error
    trained = card.trained
    training = {"epoch": card.epoch - 1, "global_step": card.step, "pytorch-lightning_version": card.lightning}
    write_published(
        folder,
        options=trained.options,
        preprocessing=asdict(trained.preprocessing),
        labels=trained.labels,
        training=training,
        tensors=trained.network.state_dict() | getattr(trained.network.__dict__.get("alpha_statistics"), "state", {}),
        card=model_card(card, predictions, where, data, license_name),
    )
    print(f"published: {folder}")


def main(words: list[str]) -> None:
    """Runs the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=checkpoint, required=True, help="checkpoint of octvideo train, or a FOLDER to put on the hub")
    add("--to", type=Path, metavar="FOLDER", help="folder to write")
    add("--hub", metavar="USER/NAME", help="repository of the hub to write to as well, made if need be")
    add("--private", action="store_true", help="if it is made, only you can see it")
    add("--report", type=Path, metavar="RESULTS", help="folder of octvideo test with predictions.json, or that file")
    add("--data", default="", metavar="TEXT", help="what it was trained on, and for what it should not be used")
    add("--license", default="", metavar="NAME", help="licence of the weights, such as apache-2.0")
    arguments = parser.parse_args(words)
    ckpt, folder, hub = arguments.ckpt, arguments.to, arguments.hub
    if hub is not None and not HUB_NAME.fullmatch(hub):
        fail(f"--hub must be USER/NAME, got {hub}")
    if folder is None and not (hub and ckpt.is_dir()):
        fail("--to FOLDER is needed, unless --ckpt is a folder and --hub says where it goes")
    with one_line_errors():
        if folder is not None:
            publish(ckpt, folder, arguments.report, hub or folder.name, arguments.data, arguments.license)
        if hub is not None:
            print(f"published: {upload(folder or ckpt, hub, arguments.private)}")
