"""Networks that octvideo did not write: found by class path, fitted to the classes, and built again by checkpoints."""

import importlib
import inspect
import logging
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from octvideo.errors import UserError
from octvideo.models.weights import load_weights
from octvideo.models.zoo import Alpha, create_model, set_alpha

log = logging.getLogger(__name__)


def build_network(class_path: str, **init_args: Any) -> nn.Module:
    """A network by its class path, such as "my.nets.Tiny", which remembers how it was built: checkpoints record it.

    Args:
        class_path: a subclass of nn.Module, or a function annotated to return one (`timm.create_model`,
            `torchvision.models.video.r3d_18`). Nothing else is called, whatever a checkpoint names.
        init_args: its arguments, in types of JSON; {"class_path", "init_args"} stands for a network as an argument.

    Raises UserError for a path that cannot be imported or leads to something else, and for arguments it does not take.
    """
    source = find_network(class_path)
    given = {name: build_recorded(value) if _is_record(value) else value for name, value in init_args.items()}
    try:
        inspect.signature(source).bind(**given)
        network = source(**given)
    except (TypeError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise UserError(f"network {class_path}: {error}") from error
    network.built_from = {"class_path": class_path, "init_args": init_args}
    return typing.cast(nn.Module, network)


def build_recorded(record: Mapping[str, Any]) -> nn.Module:
    """The network of a record; UserError as `build_network`, and where the arguments are unknown."""
    if record.get("init_args", {}) is None:
        raise UserError(
            f"the arguments of network {record['class_path']} are not recorded: it was trained as an object; build it "
            "by octvideo.build_network, or set its built_from, before it is trained"
        )
    return build_network(record["class_path"], **record.get("init_args", {}), **record.get("dict_kwargs", {}))


def check_record(record: Mapping[str, Any]) -> None:
    """UserError, before anything is called, where a record or one among its arguments names no network."""
    find_network(record["class_path"])
    for value in ((record.get("init_args") or {}) | (record.get("dict_kwargs") or {})).values():
        if _is_record(value):
            check_record(value)


def record_of(network: nn.Module) -> dict[str, Any]:
    """How a network was built, as {"class_path", "init_args"}; init_args None if it does not remember."""
    kind = type(network)
    unknown = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": None}
    return typing.cast(dict[str, Any], getattr(network, "built_from", unknown))


def fit_classes(network: nn.Module, num_classes: int) -> str:
    """Replaces the classifier unless it has so many classes; returns what was done in words, "" if nothing.

    The classifier is what timm's networks say it is (reset_classifier), for others the last nn.Linear. Raises UserError
    if there is none.
    """
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"{type(network).__name__} has no linear layer to give {num_classes} classes to")
    name, last = linear[-1]
    if last.out_features == num_classes:
        return ""
    if callable(reset := getattr(network, "reset_classifier", None)):
        reset(num_classes)
    else:
        kept: Any = {"bias": last.bias is not None, "device": last.weight.device, "dtype": last.weight.dtype}
        network.set_submodule(name, nn.Linear(last.in_features, num_classes, **kept))
    return f"the network's last linear layer, {name}, is a new one: {last.out_features} classes became {num_classes}"


def adapt(
    network: nn.Module, alpha: Alpha, *, skip: Sequence[str] = (), downsample: str = "conv", round_to: int = 1
) -> nn.Module:
    """Octavizes a network in place so that `set_alpha` can give it other alphas; at alpha 0 it stays as it is.

    Options are those of `octavize`, which raises UserError.
    """
    options = {"skip": tuple(skip), "downsample": downsample, "round_to": round_to}
    network.octave_options = {"channels_last": None, **options}  # type: ignore[assignment]
    vanilla = downsample == "conv" and not isinstance(alpha, Mapping) and alpha == 0
    return network if vanilla else set_alpha(network, alpha)


def adapt_own(
    network: nn.Module, alpha: Alpha, num_classes: int, skip: Sequence[str], options: Mapping[str, Any]
) -> nn.Module:
    """Adapts a network of the user's, in place: as many classes, octave at alpha, with weights if a file is given.

    Raises UserError for `options` of `create_model` that do not apply, and as `fit_classes`, `load_weights`, `adapt`.
    """
    defaults = create_model.__kwdefaults__ or {}
    if unknown := [key for key in options if key not in defaults]:
        raise UserError(f"model.{unknown[0]} is no option: {', '.join(defaults)}")
    if foreign := [key for key, value in zoo_options().items() if options.get(key, value) != value]:
        named = ", ".join(f"model.{key} {options[key]}" for key in foreign)
        cure = " ".join(f"--model.{key} {yaml.safe_dump(zoo_options().get(key)).split()[0]}" for key in foreign)
        raise UserError(f"the zoo's networks have options that model.network does not: {named}; {cure} leaves them out")
    options = defaults | dict(options)
    if note := fit_classes(network, num_classes):
        log.warning(note)
    if options["weights"] is not None:
        load_weights(network, options["weights"])
    return adapt(network, alpha, skip=skip, downsample=options["downsample"], round_to=options["round_to"])


def zoo_options() -> dict[str, Any]:
    """Options of `create_model` that a network of the user's does not take, with their defaults."""
    known = (create_model.__kwdefaults__ or {}).items()
    return {key: value for key, value in known if key not in ("downsample", "round_to", "weights")}


def logits_of(output: Any, key: str | int | None, num_classes: int) -> Tensor:
    """The logits (B, num_classes) among what a network returns: a Tensor, or an entry, attribute or item by its key."""
    found = output if isinstance(output, Tensor) else entry_of(output, key)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != num_classes:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        cure = "" if isinstance(found, Tensor) else "; name the logits among its outputs by model.output"
        raise UserError(f"the network must give logits (B, {num_classes}), got {got}{cure}")
    return found


def give_logits(network: nn.Module, key: str | int, num_classes: int) -> nn.Module:
    """Makes a network of several outputs return its logits alone, in place, by a forward hook."""
    network.register_forward_hook(lambda _, clips, output: logits_of(output, key, num_classes))
    return network


def entry_of(output: Any, key: str | int | None) -> Any:
    """An entry of a network's outputs: of a mapping, an attribute, or by its number; UserError if there is none."""
    if key is None:
        return output
    try:
        return getattr(output, key) if isinstance(key, str) and not isinstance(output, Mapping) else output[key]
    except (AttributeError, LookupError, TypeError) as error:
        names = list(output) if isinstance(output, Mapping) else getattr(output, "_fields", type(output).__name__)
        raise UserError(f"the network's outputs have no {key!r}: {names}") from error


class FrameAverage(nn.Module):
    """An image network on every frame of a clip, its logits averaged over time (TSN, Wang et al., ECCV 2016).

    Args:
        network: from images (B, 3, H, W) to logits (B, num_classes); in YAML a class path with its arguments.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes) of clips (B, 3, T, H, W)."""
        logits = self.network(clips.transpose(1, 2).flatten(0, 1))
        return torch.unflatten(logits, 0, (clips.shape[0], clips.shape[2])).mean(1)


def find_network(class_path: str) -> Any:
    """The class or function of a path, which must make modules; UserError as `build_network`."""
    folder, _, name = class_path.rpartition(".")
    try:
        source = getattr(importlib.import_module(folder), name)
    except (ImportError, AttributeError, ValueError) as error:
        cure = "install the package that has it, or put its folder on PYTHONPATH"
        raise UserError(f"network {class_path} cannot be imported: {error}; {cure}") from error
    kind = source
    if inspect.isfunction(source):
        try:
            kind = typing.get_type_hints(source).get("return")
        except NameError:  # of types that are imported for type checkers only
            kind = None
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        wanted = "a subclass of nn.Module, or a function annotated to return one"
        raise UserError(f"network {class_path} must be {wanted}, got {source!r}")
    return source


def _is_record(value: Any) -> bool:
    keys = {"class_path", "init_args", "dict_kwargs"}
    return isinstance(value, Mapping) and "class_path" in value and set(value) <= keys
