"""Published networks: a folder, or a repository of the hub, with safetensors, JSON and a model card; nothing pickled.

`PyTorchModelHubMixin` is not used: it is a base class of the network, which it makes again from constructor arguments,
while ours are of other libraries' and users' classes, made octave; and it reads a pickle where there are no
safetensors. What it uploads and downloads with is used: `upload_folder` and `snapshot_download`.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from octvideo.errors import UserError
from octvideo.files import appearing_folder

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CHECKPOINTS = (
    ".ckpt",
    ".pth",
    ".pt",
    ".pyth",
    ".bin",
    ".safetensors",
    ".tar",
)  # how names of files end, not of repositories


STATISTICS = "elastic.statistics."  # begins the names of batch-norm statistics at further alphas, as in checkpoints


class Published(NamedTuple):
    """The content of a published folder, besides its model card."""

    options: dict[str, Any]  # as `Trained.options`
    preprocessing: dict[str, Any]  # fields of `Preprocessing`
    labels: list[str]  # class names by index
    training: dict[str, Any]  # epoch, global_step and the version of Lightning, as a checkpoint names them
    tensors: dict[str, Tensor]  # the network's state_dict, its names behind "network.", and what elastic training adds


def published_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder at a path, or the local copy of the hub's repository user/name; None for a file, or for nothing.

    A name is looked up on the hub only if it can be no path: no folder `user` is here. UserError for a repository that
    does not exist or cannot be read, or without `pip install 'octvideo[hub]'`.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        return Path(name)
    if not HUB_NAME.fullmatch(name) or name.endswith(CHECKPOINTS) or os.path.exists(os.path.dirname(name)):
        return None
    with one_line_hub_errors(name):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))


@contextlib.contextmanager
def one_line_hub_errors(name: str) -> Iterator[None]:
    """Raises UserError for what may go wrong between here and the hub."""
    require_hub()
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    hub, login = constants.ENDPOINT, "log in by `hf auth login`, or set HF_TOKEN"
    others: Any = (*HfHubHTTPError.__bases__, ValueError)  # those of its HTTP library, which it has changed before
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise UserError(f"{name}: nothing of that name is here, and {hub} cannot be reached") from error
    except GatedRepoError as error:
        raise UserError(f"{name}: {hub} wants you to ask for access to it, and to {login}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name}: nothing of that name is here or at {hub}; if it is private, {login}") from error
    except others as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = f"{hub} refuses: {login} with a token that may write there"
        reason = refused if status in (401, 403) else f"{hub}: {' '.join(str(error).split())}"
        raise UserError(f"{name}: {reason}") from error


def require_hub() -> None:
    """UserError if the hub's package is not installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("octvideo push and networks of the hub need huggingface_hub: pip install 'octvideo[hub]'")


def read_published(folder: Path) -> Published:
    """Reads a published folder; UserError for files that are missing, damaged or of another kind."""
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        what = "expected a checkpoint of octvideo train, or a folder of octvideo push"
        if (folder / "checkpoints").is_dir():
            what = f"name a file in {folder / 'checkpoints'}, such as last.ckpt"
        raise UserError(f"{folder}: a folder without {' and '.join(missing)}; {what}")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        keys = ("options", "preprocessing", "labels", "training")
        options, preprocessing, labels, training = (config[key] for key in keys)
        preprocessing["short_side"] = tuple(preprocessing["short_side"])  # JSON has lists
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{folder / CONFIG}: not written by octvideo push: {reason}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: damaged: {error}") from error
    tensors = {key if key.startswith(STATISTICS) else f"network.{key}": x for key, x in tensors.items()}
    return Published(options, preprocessing, labels, training, tensors)


def write_published(
    folder: Path,
    *,
    options: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    labels: Sequence[str],
    training: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
) -> None:
    """Writes a folder that `read_published` reads, whole or not at all; `tensors` is the network's state_dict.

    UserError if the folder exists and holds anything else.
    """
    config = {"library_name": "octvideo", "octvideo_version": importlib.metadata.version("octvideo")}
    about = config | {"options": options, "preprocessing": preprocessing, "labels": labels, "training": training}
    plain = {key: x.detach().cpu().clone(memory_format=torch.contiguous_format) for key, x in tensors.items()}
    with appearing_folder(folder) as partial:
        save_file(plain, partial / WEIGHTS, {"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors writes for the owner alone
        (partial / CARD).write_text(card, "utf-8")


def upload(folder: Path, name: str, private: bool = False) -> str:
    """Uploads a published folder to the hub's repository user/name, made if need be; returns its address."""
    with one_line_hub_errors(name):
        from huggingface_hub import HfApi

        hub, files = HfApi(library_name="octvideo"), [WEIGHTS, CONFIG, CARD]
        address = hub.create_repo(name, private=private or None, exist_ok=True)
        message = f"octvideo {importlib.metadata.version('octvideo')}"
        hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message=message)
        return str(address)
