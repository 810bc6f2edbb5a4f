"""Load weights into a network, whoever trained them: names are translated, image weights inflated."""

import os
import pickle
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from octvideo import stores
from octvideo.errors import UserError
from octvideo.models.published import published_folder, read_published

# From our names to other projects'. A name is first written "stage.pathway.rest" (1 the stem, 2 to 5 the stages, 6 the
# head), then all patterns are applied in order; a name that still starts with a digit has no counterpart.
PYSLOWFAST: tuple[tuple[str, str], ...] = (
    (r"^(\d)\.0\.multipathway_fusion\.conv_fast_to_slow", r"s\1_fuse.conv_f2s"),
    (r"^(\d)\.0\.multipathway_fusion\.norm", r"s\1_fuse.bn"),
    (r"^1\.(\d)\.conv\.conv_t", r"s1.pathway\1_stem.conv_xy"),  # X3D's: reads RGB, one frame at a time
    (r"^1\.(\d)\.conv(\.conv_xy)?", r"s1.pathway\1_stem.conv"),
    (r"^1\.(\d)\.norm", r"s1.pathway\1_stem.bn"),
    (r"^(\d)\.(\d)\.res_blocks\.(\d+)\.non_local\.norm", r"s\1.pathway\2_nonlocal\3.bn"),
    (r"^(\d)\.(\d)\.res_blocks\.(\d+)\.non_local", r"s\1.pathway\2_nonlocal\3"),
    (r"^(\d)\.(\d)\.res_blocks\.(\d+)", r"s\1.pathway\2_res\3"),
    (r"branch1_conv", "branch1"),
    (r"branch1_norm", "branch1_bn"),
    (r"branch2\.conv_([abc])", r"branch2.\1"),
    (r"branch2\.norm_b\.1\.block\.0", "branch2.se.fc1"),
    (r"branch2\.norm_b\.1\.block\.2", "branch2.se.fc2"),
    (r"branch2\.norm_([abc])(\.0)?", r"branch2.\1_bn"),
    (r"^6\.0\.pool\.pre_conv", "head.conv_5"),
    (r"^6\.0\.pool\.pre_norm", "head.conv_5_bn"),
    (r"^6\.0\.pool\.post_conv", "head.lin_5"),
    (r"^6\.0\.proj", "head.projection"),
)
IMAGE_RESNET = (  # torchvision's and timm's
    (r"^1\.0\.(conv|norm)", r"\g<1>1"),
    *((rf"^{stage}\.0\.res_blocks", f"layer{stage - 1}") for stage in (2, 3, 4, 5)),
    (r"branch1_conv", "downsample.0"),
    (r"branch1_norm", "downsample.1"),
    *((rf"branch2\.(conv|norm)_{letter}", rf"\g<1>{number}") for number, letter in enumerate("abc", 1)),
    (r"norm(\d)", r"bn\1"),
    (r"^6\.0\.proj", "fc"),
)
PROJECTS = {"PySlowFast": PYSLOWFAST, "2-D ResNet": IMAGE_RESNET}
# Where files keep the weights in use; where others fit as well, such as their averages, these count.
CONTAINERS = ("state_dict", "model_state", "model", "model_state_dict", "net", "network", "weights", "params")
WRAPPER = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # of torch, at any depth
# What torch.load raises for other files, truncated ones and ones with changed bytes.
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError),
    *(LookupError, TypeError, AttributeError, AssertionError),
)


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors; prints as a few lines.

    Each of the model's parameters and floating-point buffers is named in one of `matched`, `inflated`, `joined` and
    `missing`. (Batch norms' num_batches_tracked is loaded, but not listed.)
    """

    path: str
    source: str  # the project or kind of network that its names belong to
    matched: tuple[str, ...]  # loaded as they are
    inflated: tuple[str, ...]  # loaded from a 2-D weight, spread over the frames of a temporal kernel
    joined: tuple[str, ...]  # of several tensors: an octave layer's four blocks, or a norm folded into its convolution
    skipped: Mapping[str, str]  # why, by the tensor's name in the model, or in the file if the model has none
    missing: tuple[str, ...]  # kept the values they had

    def __str__(self) -> str:
        loaded = len(self.matched) + len(self.inflated) + len(self.joined)
        counts = f"{len(self.matched)} matched, {len(self.inflated)} inflated, {len(self.joined)} joined"
        text = f"weights from {self.path} ({self.source}): {loaded} of {loaded + len(self.missing)} tensors: {counts}"
        if self.skipped:
            text += f"\n  skipped: {_some(f'{name} ({reason})' for name, reason in self.skipped.items())}"
        if untouched := [name for name in self.missing if name not in self.skipped]:
            text += f"\n  not in the file: {_some(untouched)}"
        return text


def load_weights(model: nn.Module, path: str | Path, *, inflate: Literal["mean", "center"] = "mean") -> LoadReport:
    """Loads a file of torch.save into a network, in place, and prints what became of its tensors.

    Recognised by their names: octvideo's checkpoints and any plain state dict; pytorchvideo's; PySlowFast's; octave
    networks that keep a layer's four blocks as separate convolutions (conv_h2h, conv_l2h, conv_h2l, conv_l2l); 2-D
    ResNets of torchvision and timm, which are inflated (SlowFast takes them as its slow pathway). All load at every
    alpha, and give the results they gave at the alpha they were trained at. (Octave ResNets of four blocks pool for a
    stride of 2 in their vanilla stage too: `octavize(resnet50, {"layer[123]": 0.5, "layer4": 0}, downsample="pool")`.)

    The names may stand below any prefix, such as "module." or "net.", in dicts of any names: it is the one below which
    most of them fit. Of equal ones, those of `CONTAINERS` come before others, and the first in the file counts.

    A tensor of another shape is skipped; so is the whole classifier if its classes differ. Inflating by "mean" gives
    each frame of a temporal kernel the 2-D weight over the number of frames, so that a still clip gives what the image
    gave; "center" puts it in the middle frame, with zeros around it.

    Raises UserError for a file that torch.load(weights_only=True) cannot read or without tensors, and for values for
    fewer than half of the tensors that such a checkpoint can hold; then the model is unchanged.
    """
    if inflate not in ("mean", "center"):
        raise UserError(f"inflate must be 'mean' or 'center', got {inflate!r}")
    state, checkpoint = model.state_dict(), read_checkpoint(path)
    tensors, joints, beside = _tensors(checkpoint, path, state)
    source = _source(tensors, checkpoint)
    names = _names(state, PROJECTS.get(source, ()))
    source = "octave layers of four blocks" if joints & tensors.keys() else source
    joints |= _fold_shortcut_norms(tensors, names)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = {name for name in names if name.rpartition(".")[0] in linear[-1:] and names[name] in tensors}
    if all(tensors[names[name]].shape == state[name].shape for name in head):
        head = set()  # loaded; otherwise new as a whole

    values: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    found: dict[str, list[str]] = {"matched": [], "inflated": [], "joined": []}
    for name, other in names.items():
        if other not in tensors:
            continue
        tensor, wanted = tensors.pop(other), state[name].shape
        shape, groups = tensor.shape, getattr(model.get_submodule(name.rpartition(".")[0]), "groups", 1)
        flat = _is_flat(shape, wanted)
        if name in head:
            classes, shapes = f"{shape[0]} -> {wanted[0]} classes", f"shape {tuple(shape)} for {tuple(wanted)}"
            skipped[name] = f"{classes if shape[:1] != wanted[:1] else shapes}: new head"
        elif other in joints and groups > 1:
            skipped[name] = f"the four blocks of a layer of {groups} groups cannot be merged into one weight"
        elif not flat and shape != wanted:
            skipped[name] = f"shape {tuple(shape)} does not fit {tuple(wanted)}"
        else:
            if flat and inflate == "mean":
                tensor = (tensor / wanted[2]).unsqueeze(2).expand(wanted)
            elif flat:
                tensor = F.pad(tensor.unsqueeze(2), (0, 0, 0, 0, wanted[2] // 2, (wanted[2] - 1) // 2))
            values[name] = tensor
            if state[name].is_floating_point():
                found["joined" if other in joints else "inflated" if flat else "matched"].append(name)
    left = (name for name in (*tensors, *beside) if name not in skipped and not name.endswith("num_batches_tracked"))
    skipped |= dict.fromkeys(left, "not in the model")
    missing = tuple(name for name in state if name not in values and state[name].is_floating_point())
    loaded = sum(map(len, found.values()))
    if not loaded or loaded < sum(name in names for name in missing):
        unfit = 2 * sum("does not fit" in reason for reason in skipped.values()) > len(missing)
        sizes = ": its layers have other sizes, as with another model.name, model.width or depth" if unfit else ""
        raise UserError(
            f"{path} ({source}) has values for {loaded} of {loaded + len(missing)} tensors of {type(model).__name__}, "
            f"fewer than half{sizes}; the model is unchanged. Left over in the file: "
            f"{_some(f'{name} ({reason})' for name, reason in skipped.items())}. "
            f"Without a value in the model: {_some(missing)}"
        )
    model.load_state_dict(values, strict=False)
    matched, inflated, joined = map(tuple, found.values())
    report = LoadReport(str(path), source, matched, inflated, joined, skipped, missing)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a training run load; one on each machine says so
        print(report)
    return report


def _is_flat(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether this is the shape of a 2-D convolution's weight where that of a 3-D one is wanted."""
    return len(shape) == 4 and len(wanted) == 5 and tuple(shape) == (*wanted[:2], *wanted[3:])


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return (", ".join(names[:6]) or "nothing") + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A dict that torch.save wrote, on the CPU, with tensors read only when used if `mmap`; UserError if unreadable.

    Or the tensors of a published network; see `published_folder`.
    """
    if (folder := published_folder(path)) is not None:
        return {"state_dict": read_published(folder).tensors}
    try:
        checkpoint = torch.load(stores.local(path), map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except UNREADABLE as error:
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = f"it holds a {foreign[1]}; save a state_dict() alone" if foreign else "cut, damaged or of another kind"
        raise UserError(f"{path}: no checkpoint that torch.load(weights_only=True) reads: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: expected a dict of tensors, got {type(checkpoint).__name__}")
    return checkpoint


def _flat(container: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """(place, name, tensor) of a dict and those in it, at any depth; place and name make its full name."""
    for key in sorted((key for key in container if isinstance(key, str)), key=lambda key: key not in CONTAINERS):
        if isinstance(container[key], dict):
            yield from _flat(container[key], f"{place}{key}.")
        elif isinstance(container[key], Tensor):
            yield place, WRAPPER.sub("", key), container[key]


def _tensors(
    checkpoint: Mapping[str, Any], path: str | Path, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """The tensors below the prefix, of dicts and wrappers, below which most names and shapes are the model's.

    Also the names of those that `_join_four_blocks` joined, and of those that are beside the prefix in the same dicts.
    """
    places = {f"{place}{name}": place for place, name, _ in _flat(checkpoint)}
    tensors = {f"{place}{name}": tensor for place, name, tensor in _flat(checkpoint)}
    if not tensors:
        raise UserError(f"{path}: no tensors in it; it holds {_some(str(key) for key in checkpoint)}")
    joints, fitting, named = _join_four_blocks(tensors), Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    floating = {name: tensor.shape for name, tensor in state.items() if tensor.is_floating_point()}
    ways = [_names(floating, patterns) for patterns in ((), *PROJECTS.values())]
    schemes = [{other: floating[name] for name, other in names.items()} for names in ways]
    for name, tensor in tensors.items():
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            for scheme, shapes in enumerate(schemes):
                if (wanted := shapes.get(name[start:])) is not None:
                    named[name[:start], scheme] += 1
                    fitting[name[:start], scheme] += tensor.shape == wanted or _is_flat(tensor.shape, wanted)
    # Others are chance, such as the weight of one layer.
    likely = [way for way in named if 2 * fitting[way] > len(schemes[way[1]]) or 2 * named[way] >= len(tensors)]
    usual = next((f"{key}." for key in CONTAINERS if isinstance(checkpoint.get(key), dict)), "")
    prefix, _ = max(likely, key=lambda way: (fitting[way], named[way]), default=(usual, 0))
    inside = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    beside = [name for name, place in places.items() if prefix.startswith(place) and not name.startswith(prefix)]
    return inside, {name.removeprefix(prefix) for name in joints}, [name.removeprefix(places[name]) for name in beside]


def _source(tensors: Iterable[str], checkpoint: Mapping[str, Any]) -> str:
    """Whose names the tensors have, in words."""
    if any(re.match(r"s\d\.pathway\d_", name) for name in tensors):
        return "PySlowFast"
    if "layer1.0.conv1.weight" in tensors:
        return "2-D ResNet"
    if any(name.startswith("blocks.") for name in tensors):
        return "octvideo" if "hyper_parameters" in checkpoint else "pytorchvideo"
    return "state dict"


def _names(state: Iterable[str], patterns: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A project's names by the model's; without those of no counterpart."""
    names = {name: WRAPPER.sub("", name) for name in state}
    if not patterns:
        return names
    places = {name: re.match(r"blocks\.(\d+)\.(?:multipathway_blocks\.(\d)\.)?(.*)", name) for name in names.values()}
    blocks = sorted({int(place[1]) for place in places.values() if place})  # those with weights, not the pools
    for name, other in names.items():
        if place := places[other]:
            names[name] = f"{blocks.index(int(place[1])) + 1}.{place[2] or 0}.{place[3]}"
            for pattern, replacement in patterns:
                names[name] = re.sub(pattern, replacement, names[name])
    return {name: other for name, other in names.items() if not other[0].isdigit()}


def _join_four_blocks(tensors: dict[str, Tensor]) -> set[str]:
    """Joins octave layers kept as four convolutions, in place; returns the new names.

    A layer "conv1" that holds a convolution and its two batch norms (conv1.conv.conv_h2h, conv1.bn_h, conv1.bn_l)
    becomes conv1 and bn1; downsample.0 becomes downsample.0 and downsample.1. Biases added to the same map are summed.
    """
    joints: dict[str, Tensor] = {}
    for layer in {match[1] for name in tensors if (match := re.match(r"(.*)\.conv_[hl]2[hl]\.weight$", name))}:
        parent = layer.removesuffix(".conv")
        whole = any(f"{parent}.bn_{side}.weight" in tensors for side in "hl")
        for kind in ("weight", "bias"):
            rows = []
            for side in "hl":
                ways = [name for way in "hl" if (name := f"{layer}.conv_{way}2{side}.{kind}") in tensors]
                row = [tensors.pop(name) for name in ways]
                rows += [torch.cat(row, 1) if kind == "weight" else torch.stack(row).sum(0)] if row else []
            if rows:
                joints[f"{parent if whole else layer}.{kind}"] = torch.cat(rows)
        norm = re.sub(r"conv(\d*)$", r"bn\1", re.sub(r"downsample\.0$", "downsample.1", parent))
        norm += ".bn" if norm == parent else ""
        for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked") if whole else ():
            parts = [tensors.pop(name) for side in "hl" if (name := f"{parent}.bn_{side}.{entry}") in tensors]
            if parts:
                joints[f"{norm}.{entry}"] = torch.cat(parts) if parts[0].dim() else parts[-1]
    tensors.update(joints)
    return set(joints)


def _fold_shortcut_norms(tensors: dict[str, Tensor], names: Mapping[str, str]) -> set[str]:
    """Folds PySlowFast's batch norms of X3D shortcuts that ours do not have, in place; returns the changed names.

    The scale goes into the shortcut's convolution, the shift to that of the block's last batch norm: both are added.
    """
    known, changed = set(names.values()), set()
    for norm in [name.removesuffix(".weight") for name in tensors if name.endswith("branch1_bn.weight")]:
        convolution, last = f"{norm.removesuffix('_bn')}.weight", norm.replace("branch1_bn", "branch2.c_bn.bias")
        if f"{norm}.weight" not in known and {convolution, last} <= known & tensors.keys():
            entries = ("running_mean", "running_var", "weight", "bias")
            mean, variance, scale, bias = (tensors.pop(f"{norm}.{entry}") for entry in entries)
            folded = fuse_conv_bn_weights(tensors[convolution], None, mean, variance, 1e-5, scale, bias)  # its epsilon
            tensors[convolution], tensors[last] = folded[0], tensors[last] + folded[1]
            changed |= {convolution, last}
    return changed
