"""Checkpoints that training wrote: the only place that knows what is in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.files import appearing, verify
from octvideo.models.elastic import AlphaStatistics
from octvideo.models.own_network import adapt, build_recorded, fit_classes, give_logits
from octvideo.models.published import STATISTICS, published_folder, read_published
from octvideo.models.scoring import Task
from octvideo.models.weights import read_checkpoint
from octvideo.models.zoo import Alpha, create_model

NETWORK_OPTIONS = (
    *("name", "alpha", "num_classes", "width", "depth"),
    *("frame_ratio", "channel_ratio", "downsample", "round_to"),
    *("network", "skip", "output", "task", "elastic"),
)
# Of checkpoints whose version had no choice of these.
EARLIER = {"downsample": "conv", "round_to": 1, "network": None, "skip": (), "output": None, "elastic": None}
EARLIER["task"] = "single"


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What a checkpoint of train_net.py says about its network."""

    options: dict[str, Any]  # what `restore` makes the network from: `NETWORK_OPTIONS`
    preprocessing: Preprocessing  # how it wants its clips, with defaults for what is not recorded
    labels: list[str] | None  # class names by index
    tensors: dict[str, Tensor]  # the state_dict of the Lightning module, whose network is `network`
    content: dict[str, Any]  # all of the file: epoch, global_step, optimizer_states, callbacks ...


def read_training_checkpoint(path: str | Path, mmap: bool = False) -> TrainingCheckpoint:
    """Opens a checkpoint of train_net.py of any version; with mmap, tensors are read when they are used.

    Or a folder that `octvideo push` wrote, or a repository of the hub as "user/name". Raises FileNotFoundError,
    DamagedCheckpointError (truncated or changed), or UserError for a file of another kind.
    """
    if (folder := published_folder(path)) is not None:
        found = read_published(folder)
        how = Preprocessing.from_mapping(found.preprocessing)
        content = {"VideoData": {"labels": found.labels}, **found.training}
        options = found.options | {key: value for key, value in EARLIER.items() if key not in found.options}
        return TrainingCheckpoint(options, how, found.labels, found.tensors, content)
    verify(path)
    content = read_checkpoint(path, mmap)
    try:
        known = EARLIER | content["hyper_parameters"]
        options = {key: known[key] for key in NETWORK_OPTIONS}
        data = content.get("VideoData") or {}  # named after the class that wrote it
        recorded = data.get("preprocessing", {}) | {key: known[key] for key in ("mean", "std")}
        preprocessing = Preprocessing.from_mapping(recorded)
        return TrainingCheckpoint(options, preprocessing, data.get("labels"), content["state_dict"], content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of train_net.py: it has no {error}") from error


@dataclass(frozen=True)
class Trained:
    """A trained network, ready for clips."""

    network: nn.Module  # in evaluation mode; takes (B, 3, T, H, W) from `normalize`, and gives (B, num_classes)
    options: dict[str, Any]  # what `restore` made it from: name, alpha, num_classes ...
    labels: list[str]  # class names by index; "class 3" where the checkpoint has none
    preprocessing: Preprocessing

    @property
    def name(self) -> str:
        """The network's name in the zoo, or its class path."""
        own = self.options.get("network")
        return str(own["class_path"] if own else self.options["name"])

    @property
    def task(self) -> Task:
        """How scores follow from logits; see `octvideo.models.scoring`."""
        task: Task = self.options.get("task", "single")
        return task

    def normalize(self, clips: Tensor) -> Tensor:
        """uint8 RGB clips (..., 3, T, H, W) as the network takes them."""
        return self.preprocessing.normalize(clips)


def load_trained(path: str | Path, alpha: Alpha | None = None) -> Trained:
    """Opens the network of a checkpoint, folder or repository, with averaged weights if any, channels last on the CPU.

    `alpha` None is as trained. Raises as `read_training_checkpoint`, and UserError if alpha or weights do not fit.
    """
    checkpoint = read_training_checkpoint(path)
    if "VideoData" not in checkpoint.content:
        raise UserError(f"{path}: not a checkpoint of train_net.py: it has no 'VideoData'")
    options = checkpoint.options | ({} if alpha is None else {"alpha": alpha})
    network = restore(options)
    state = {k.partition(".")[2]: v for k, v in checkpoint.tensors.items() if k.startswith("network.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        name = (options["network"] or {"class_path": options["name"]})["class_path"]
        raise UserError(f"{path}: its weights do not fit the {name} that it describes: {error}") from error
    if options["elastic"] is not None:
        own = float(checkpoint.options["alpha"])
        others = sorted(set(options["elastic"]["alphas"]) - {own})
        statistics = AlphaStatistics(network, own, others)
        statistics.load_state_dict({k: checkpoint.tensors[f"{STATISTICS}{k}"] for k in statistics.state_dict()})
        statistics.table().attach(network, options["alpha"])
    if options["output"] is not None:
        give_logits(network, options["output"], options["num_classes"])
    labels = checkpoint.labels or [f"class {index}" for index in range(options["num_classes"])]
    return Trained(network.eval(), options, labels, checkpoint.preprocessing)


def write(
    path: Path, network: nn.Module, options: Mapping[str, Any], training: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Writes a network that was not trained by train_net.py as if it had been.

    Args:
        options: `NETWORK_OPTIONS`, mean and std.
        training: other entries of the file: epoch, global_step, pytorch-lightning_version.
        data: what octvideo's VideoData records: preprocessing and labels.
    """
    tensors = {f"network.{key}": x.cpu() for key, x in network.state_dict().items()}
    content = {**training, "hyper_parameters": dict(options), "state_dict": tensors, "VideoData": dict(data)}
    with appearing(path) as partial:
        torch.save(content, partial)


def restore(options: Mapping[str, Any]) -> nn.Module:
    """A new network of `NETWORK_OPTIONS`; UserError where its class cannot be found or an option does not fit."""
    if (own := options["network"]) is not None:
        network = build_recorded(own)
        fit_classes(network, options["num_classes"])
        kept = {key: options[key] for key in ("downsample", "round_to")}
        return adapt(network, options["alpha"], skip=options["skip"] or (), **kept)
    of_zoo = {key: x for key, x in options.items() if key not in ("network", "skip", "output", "task", "elastic")}
    try:
        return create_model(**of_zoo, channels_last=True)
    except TypeError as error:
        raise UserError(f"options of a network that this version of octvideo does not know: {error}") from error
