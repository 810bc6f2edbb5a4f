"""What a checkpoint of train_net.py holds: a network, the names of its classes, and how it wants its clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.files import verify
from octvideo.models.weights import read_checkpoint
from octvideo.models.zoo import create_model, set_alpha


def read_labels(path: str | Path) -> list[str] | None:
    """Reads the class names, in the order of class numbers, in a checkpoint of train_net.py; None if it has none.

    Raises:
        ValueError: no such file, or none that torch.load(weights_only=True) reads.
    """
    labels: list[str] | None = (read_checkpoint(path).get("VideoData") or {}).get("labels")
    return labels


def read_preprocessing(path: str | Path) -> dict[str, Any]:
    """Reads how a checkpoint of train_net.py wants its clips: the data's options, and the model's mean and std.

    Returns:
        clip_frames, frame_stride, short_side, test_crop_size ... as in VideoData, mean and std as in Recognizer; those
        of them that the checkpoint holds.

    Raises:
        ValueError: no such file, or none that torch.load(weights_only=True) reads.
    """
    checkpoint = read_checkpoint(path)
    model = checkpoint.get("hyper_parameters") or {}
    return (checkpoint.get("VideoData") or {}).get("preprocessing", {}) | {
        key: model[key] for key in ("mean", "std") if key in model
    }


NETWORK_OPTIONS = (
    *("name", "alpha", "num_classes", "width", "depth"),
    *("frame_ratio", "channel_ratio", "downsample", "round_to"),
)


@dataclass(frozen=True)
class Trained:
    """A trained network, ready to see clips.

    Args:
        network: in evaluation mode; takes (B, 3, T, H, W), normalised as `normalize` does, and gives (B, num_classes).
        options: what `octvideo.create_model` made it from: name, alpha, num_classes ...
        labels: name of each class; "class 3" where the checkpoint has none.
        preprocessing: how it wants its clips.
    """

    network: nn.Module
    options: dict[str, Any]
    labels: list[str]
    preprocessing: Preprocessing

    def normalize(self, clips: Tensor) -> Tensor:
        """uint8 RGB clips of any shape to float32: scaled to [0, 1], less the mean, over the std."""
        return self.preprocessing.normalize(clips)


def load_trained(path: str | Path, alpha: float | None = None) -> Trained:
    """Opens a checkpoint that train_net.py wrote.

    Args:
        path: the file.
        alpha: of res2 to res4; None: the one it was trained at.

    Returns:
        The network with its (averaged, if the run averaged them) weights, on the CPU, channels last.

    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: a torn or changed file.
        ValueError: a file of another kind, or an impossible alpha.
    """
    verify(path)
    checkpoint = read_checkpoint(path)
    try:
        known = {"downsample": "conv", "round_to": 1} | checkpoint["hyper_parameters"]
        options = {key: known[key] for key in NETWORK_OPTIONS}
        data = checkpoint["VideoData"]
        preprocessing = Preprocessing.from_mapping(
            data["preprocessing"] | {key: known[key] for key in ("mean", "std")}
        )
        tensors = checkpoint["state_dict"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of train_net.py: it has no {error}") from error
    network = create_model(**options, channels_last=True)
    prefix = "network."
    try:
        network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit the {options['name']} that it describes: {error}") from error
    if alpha is not None:
        set_alpha(network, alpha)
        options["alpha"] = alpha
    labels = data["labels"] or [f"class {number}" for number in range(options["num_classes"])]
    return Trained(network.eval(), options, labels, preprocessing)
