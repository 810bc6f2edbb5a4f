"""Checkpoints that training wrote: the only place that knows what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.files import verify
from octvideo.models.weights import read_checkpoint
from octvideo.models.zoo import Alpha, create_model

NETWORK_OPTIONS = (
    *("name", "alpha", "num_classes", "width", "depth"),
    *("frame_ratio", "channel_ratio", "downsample", "round_to"),
)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What a checkpoint of train_net.py says about its network.

    Attributes:
        options: what `octvideo.create_model` made the network from: `NETWORK_OPTIONS`.
        recorded: the options of `Preprocessing` that the file holds; only mean and std if it holds no data options.
        labels: class names by index; None if the file has none.
        tensors: the state_dict of the Lightning module, whose network is `network`.
        content: all of the file: epoch, global_step, optimizer_states, callbacks ...
    """

    options: dict[str, Any]
    recorded: dict[str, Any]
    labels: list[str] | None
    tensors: dict[str, Tensor]
    content: dict[str, Any]

    @property
    def preprocessing(self) -> Preprocessing:
        """How the network wants its clips, with defaults for what is not recorded."""
        return Preprocessing.from_mapping(self.recorded)


def read_training_checkpoint(path: str | Path, mmap: bool = False) -> TrainingCheckpoint:
    """Opens a checkpoint of train_net.py of any version, whole; with mmap, tensors are read when they are used.

    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: a truncated or changed file.
        UserError: a file of another kind.
    """
    verify(path)
    content = read_checkpoint(path, mmap)
    try:
        # Early versions had no choice of these, and named none.
        known = {"downsample": "conv", "round_to": 1} | content["hyper_parameters"]
        options = {key: known[key] for key in NETWORK_OPTIONS}
        data = content.get("VideoData") or {}  # named after the class that wrote it
        recorded = data.get("preprocessing", {}) | {key: known[key] for key in ("mean", "std")}
        return TrainingCheckpoint(options, recorded, data.get("labels"), content["state_dict"], content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of train_net.py: it has no {error}") from error


def read_labels(path: str | Path) -> list[str] | None:
    """Class names by index in a checkpoint of train_net.py; None if it has none. Errors: `read_training_checkpoint`."""
    return read_training_checkpoint(path, mmap=True).labels


def read_preprocessing(path: str | Path) -> dict[str, Any]:
    """The options of `Preprocessing` that a checkpoint of train_net.py holds. Errors: `read_training_checkpoint`."""
    return read_training_checkpoint(path, mmap=True).recorded


@dataclass(frozen=True)
class Trained:
    """A trained network, ready for clips.

    Args:
        network: in evaluation mode; takes (B, 3, T, H, W), normalised by `normalize`, and gives (B, num_classes).
        options: what `octvideo.create_model` made it from: name, alpha, num_classes ...
        labels: class names by index; "class 3" where the checkpoint has none.
        preprocessing: how it wants its clips.
    """

    network: nn.Module
    options: dict[str, Any]
    labels: list[str]
    preprocessing: Preprocessing

    def normalize(self, clips: Tensor) -> Tensor:
        """uint8 RGB clips (..., 3, T, H, W) as the network takes them; `Preprocessing.normalize`."""
        return self.preprocessing.normalize(clips)


def load_trained(path: str | Path, alpha: Alpha | None = None) -> Trained:
    """Opens the network of a checkpoint of train_net.py, with its averaged weights if any, channels last on the CPU.

    Args:
        path: the file; for errors see `read_training_checkpoint`.
        alpha: as `octvideo.create_model`'s; None: as it was trained.

    Raises:
        UserError: also for weights that do not fit the network, or an impossible alpha.
    """
    checkpoint = read_training_checkpoint(path)
    if "VideoData" not in checkpoint.content:
        raise UserError(f"{path}: not a checkpoint of train_net.py: it has no 'VideoData'")
    options = checkpoint.options | ({} if alpha is None else {"alpha": alpha})
    network = create_model(**options, channels_last=True)
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit the {options['name']} that it describes: {error}") from error
    labels = checkpoint.labels or [f"class {index}" for index in range(options["num_classes"])]
    return Trained(network.eval(), options, labels, checkpoint.preprocessing)
