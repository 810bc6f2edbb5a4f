"""Exports a network to ONNX or torch.export: one file that includes normalisation and describes its input and output.

octvideo export --ckpt runs/oct_i3d/checkpoints/best.ckpt --output oct_i3d.onnx [--alpha A] [--softmax]
octvideo export --name slowfast_r50 --alpha .25 --clip 32x224x224 --output slowfast.pt2 [--num_classes N]

FILE.onnx runs in onnxruntime and others (opset 18, the oldest that PyTorch writes); to write it,
`pip install 'octvideo[export]'`. FILE.pt2 is a torch.export program. Neither needs octvideo or the checkpoint to run.

input    clips: uint8 RGB (batch, 3, frames, height, width); sizes that the network allows are free, unless --batch
         or --free fixes them: heads of X3D fix height and width, SlowFast takes multiples of 4 frames
output   logits, or probabilities with --softmax: float32 (batch, classes)

The file also holds labels, clip_frames, frame_stride, sampling, target_fps, short_videos, test_crop_size (the shorter
side is scaled to it, then a square is cropped), mean and std (already applied by the network), the network's options
(name, alpha ...), output and octvideo_version: JSON values in the metadata_props of ONNX, or one JSON object in the
extra file octvideo.json of FILE.pt2. With --name the network is random, to measure its speed before training.

The outputs for random, black and white clips, and for clips of other sizes where these are free, are first compared
with PyTorch's, computed without folded batch norms. Then both are timed alternately on a random clip.

Exit status: 0 if the outputs agree; 1 if not, and no file is written; 2 for a mistake in the command.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.exc import UserError as UnfreeSizeError
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.commands.options import Parser, checkpoint, clip_size, fail, number, one_line_errors, several
from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.files import appearing
from octvideo.layers.resampling import plain_operations
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.cost import time_interleaved
from octvideo.models.fuse import fuse
from octvideo.models.scoring import probabilities
from octvideo.models.zoo import create_model

AXES = {"batch": 0, "frames": 2, "height": 3, "width": 4}  # of clips; sizes that may be free


def size_name(text: str) -> str:
    """The type of a size to leave free."""
    if text not in (*AXES, "none"):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(AXES)}, or none, got {text!r}")
    return text


class Classifier(nn.Module):
    """The exported module, from uint8 clips (B, 3, T, H, W) to float32 logits or probabilities (B, num_classes)."""

    def __init__(self, trained: Trained, softmax: bool) -> None:
        super().__init__()
        self.network, self.normalize = trained.network, trained.normalize
        self.task = trained.task if softmax else None

    def forward(self, clips: Tensor) -> Tensor:  # its argument's name becomes the name of the file's input
        logits: Tensor = self.network(self.normalize(clips))
        return logits if self.task is None else probabilities(logits, self.task)


def onnx(program: ExportedProgram, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Writes a single file, weights included, which protobuf limits to 2 GB; opens it in onnxruntime on the CPU."""
    import onnxruntime

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # else a line for each weight not folded into a constant
    how: dict[str, Any] = {"dynamo": True, "opset_version": 18, "output_names": [about["output"]], "verbose": False}
    sizes = dict(enumerate(sizes_of(program)))
    names = {axis: name for name, axis in AXES.items() if isinstance(sizes.get(axis), torch.SymInt)}
    how["dynamic_shapes"] = {"clips": names}  # only names the sizes; the program has dynamic ones
    exported = torch.onnx.export(program, **how)
    assert exported is not None
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    path.write_bytes(exported.model_proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


def pt2(program: ExportedProgram, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Opens it in PyTorch. torch.export refuses names that do not end in .pt2, and hides the error of a full disk."""
    torch.export.save(program, archive := io.BytesIO(), extra_files={"octvideo.json": json.dumps(about)})
    path.write_bytes(archive.getvalue())
    return torch.export.load(archive).module()


# The runtime, the packages to install for it, and what writes and opens a file.
FORMATS = {".onnx": ("onnxruntime", ("onnx", "onnxruntime", "onnxscript"), onnx), ".pt2": ("torch.export", (), pt2)}


def untrained(name: str, alpha: float, num_classes: int, preprocessing: Preprocessing) -> Trained:
    """A network with random weights and statistics; with training's initial ones, most of it would output zeros."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"name": name, "alpha": alpha, "num_classes": num_classes}
    network = create_model(**options, channels_last=True)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(cast(Tensor, module.running_mean), std=0.1)
            nn.init.uniform_(cast(Tensor, module.running_var), 0.5, 1.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return Trained(network.eval(), options, [f"class {index}" for index in range(num_classes)], preprocessing)


def sizes_of(program: ExportedProgram) -> Sequence[Any]:
    """Those of the input, as int or torch.SymInt."""
    sizes: Sequence[Any] = next(node for node in program.graph.nodes if node.name == "clips").meta["val"].shape
    return sizes


def trace(
    module: nn.Module, clips: Tensor, free: Iterable[str] = (), step: int = 1, plain: bool = False
) -> ExportedProgram:
    """A program that leaves sizes free, though some may be limited; frames come in multiples of `step`."""
    sizes: dict[int, Any] = {AXES[name]: torch.export.Dim.AUTO for name in free}
    if 0 in sizes:
        sizes[0] = torch.export.Dim("batch", min=1)
    if 2 in sizes and step > 1:
        sizes[2] = step * torch.export.Dim("steps", min=2) if clips.shape[2] >= 2 * step else None
    with plain_operations() if plain else nullcontext():
        program = torch.export.export(module, (clips,), dynamic_shapes={"clips": sizes}, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


def grown(shape: Sequence[int], names: Iterable[str], step: int, times: int) -> list[int]:
    """A shape with other sizes of these names: `times` as large and a bit more, odd unless they come in steps."""
    sizes, more = list(shape), {"batch": 1, "frames": step, "height": 1, "width": 3}
    for name in names:
        sizes[AXES[name]] = times * sizes[AXES[name]] + more[name]
    return sizes


def takes(run: Callable[[Tensor], Tensor], clips: Tensor) -> bool:
    """Whether an exported program allows clips of a size."""
    try:
        run(clips)
    except (AssertionError, RuntimeError):
        return False
    return True


def export(trained: Trained, size: tuple[int, ...], arguments: argparse.Namespace) -> None:
    (runtime, _, write), eager = FORMATS[arguments.output.suffix], Classifier(trained, arguments.softmax)
    free = [name for name in arguments.free or AXES if name in AXES and not (name == "batch" and arguments.batch)]
    random = partial(torch.randint, 256, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clips, step = list[Tensor](), int(getattr(trained.network, "frame_ratio", 1))
    for shape in [(batch, *size) for batch in ((1, 2) if "batch" in free else (arguments.batch or 1,))]:
        clips.append(random(size=shape))
        clips += [torch.full(shape, level, dtype=torch.uint8) for level in (0, 255)]
    try:
        wanted = [eager(clip) for clip in clips]
    except RuntimeError as error:
        fail(f"{trained.name} does not take clips of {'x'.join(map(str, size[1:]))}: {error}")
    if arguments.fuse:
        try:
            trained = replace(trained, network=fuse(trained.network, trained.normalize(clips[0])))
        except UserError as error:
            print(f"batch norms stay as they are: {error}")
    print(f"{trained.name} is exported, which takes a minute or more for large networks", flush=True)
    traced = partial(trace, Classifier(trained, arguments.softmax), step=step, plain=arguments.plain)
    try:
        program = traced(clips[-1], free)
    except UnfreeSizeError as error:  # a size is a number in the network's code
        cure = "name others by --free, or none"
        fail(f"{trained.name} cannot be exported with free sizes: {str(error).partition(chr(10))[0]}; {cure}")
    except NotImplementedError as error:  # SymPy cannot solve what the network asks of free sizes
        if arguments.free or not set(free) - {"batch"}:
            fail(f"{trained.name} cannot be exported with free sizes: {' '.join(str(error).split())}")
        print(f"{trained.name} fixes frames, height, width: torch.export cannot solve what it asks of them")
        free = [name for name in free if name == "batch"]
        program = traced(clips[-1], free)
    accepts, shape = partial(takes, program.module()), clips[0].shape
    others = [random(size=grown(shape, (name,), step, 2)) for name in free]
    allowed = [name for name, clip in zip(free, others, strict=True) if accepts(clip)]
    if allowed != free:
        fixed = f"{trained.name} fixes {', '.join(name for name in free if name not in allowed)}"
        if arguments.free:
            fail(fixed)
        print(f"{fixed} in an export at {'x'.join(map(str, size[1:]))}")
        if "batch" in free and "batch" not in allowed:  # one clip at a time
            clips, wanted = clips[:3], wanted[:3]
            shape, others = clips[0].shape, [clip[: len(clips[0])] for clip in others]
        program = traced(clips[-1], allowed)
    clips += [clip for name, clip in zip(free, others, strict=True) if name in allowed]
    clips.append(random(size=grown(shape, allowed, step, 1)))
    wanted += [eager(clip) for clip in clips[len(wanted) :]]
    about = trained.options | asdict(trained.preprocessing) | {"labels": trained.labels}
    for name in ("crop_size", "short_side", "mirror"):  # apply to training clips only
        del about[name]
    kind = about["output"] = "probabilities" if arguments.softmax else "logits"
    about["octvideo_version"] = importlib.metadata.version("octvideo")
    with appearing(arguments.output) as new:
        run = write(program, new, about)
        pairs = zip(clips, wanted, strict=True)
        differences = [(run(clip) - want).abs().max() / want.abs().max() for clip, want in pairs]
        difference = float(torch.stack(differences).max())
        differ = f"differ from PyTorch's by {difference:.1g} of the largest"
        if not difference <= arguments.tolerance:
            more = f"more than --tolerance {arguments.tolerance:g}: no file is written"
            fail(f"{runtime} gives {kind} that {differ}, {more}", status=1)
        megabytes = new.stat().st_size / 1e6
    seconds = time_interleaved([lambda: eager(clips[0]), lambda: run(clips[0])], rounds=arguments.rounds)
    table = Table(f"clips {tuple(clips[0].shape)}", "median ms", "ratio")
    for name, taken in zip(("PyTorch", runtime), map(median, seconds), strict=True):
        table.add_row(name, f"{1000 * taken:.1f}", f"{taken / median(seconds[0]):.2f}")
    Console().print(table)
    least = [program.range_constraints[sizes_of(program)[AXES[name]].node.expr].lower for name in allowed]
    free = [f"{name} from {size}" for name, size in zip(allowed, least, strict=True)]
    print(f"free sizes: {', '.join(free) or 'none'}")
    print(f"{arguments.output}: {megabytes:.1f} MB; {kind} differ by {difference:.1g} of the largest")


def main(words: list[str]) -> int:
    parser = Parser(__doc__)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", type=checkpoint, metavar="FILE", help="checkpoint of octvideo train")
    source.add_argument("--name", metavar="NETWORK", help="a network of octvideo.MODELS, such as i3d_r50, untrained")
    add("--output", type=Path, required=True, metavar="FILE", help="FILE.onnx or FILE.pt2")
    add("--alpha", type=float, metavar="A", help="alpha of res2 to res4; default: the checkpoint's, or 0 with --name")
    add("--clip", type=clip_size, metavar="TxHxW", help="with --name: frames, height and width")
    add("--num_classes", type=number, metavar="N", help="with --name; default: 400")
    add("--batch", type=number, metavar="N", help="fixed batch size; default: any")
    names = f"sizes to leave free, of {','.join(AXES)}, or none; default: all that the network allows"
    add("--free", type=several(size_name), metavar="A,B", help=names)
    add("--softmax", action="store_true", help="output probabilities instead of logits (by sigmoid for task multi)")
    fold = "fold batch norms into the convolutions before them: faster, and equal up to rounding; default: yes"
    add("--fuse", action=argparse.BooleanOptionalAction, default=True, help=fold)
    what = "export operations on (B, C, T, H, W) alone, which OpenVINO runs faster, and onnxruntime and PyTorch slower"
    add("--plain", action="store_true", help=what)
    share = "largest difference allowed, as a share of the largest output; default: 1e-4"
    add("--tolerance", type=float, default=1e-4, metavar="SHARE", help=share)
    add("--rounds", type=number, default=10, metavar="N", help="timed runs of each runtime; default: 10")
    add("--threads", type=number, metavar="N", help="threads of each runtime; default: PyTorch's choice")
    arguments = parser.parse_args(words)
    output: Path = arguments.output
    if output.suffix not in FORMATS or output.is_dir():
        fail(f"--output must be a file that ends in {' or '.join(FORMATS)}, got {output}")
    if missing := [name for name in FORMATS[output.suffix][1] if importlib.util.find_spec(name) is None]:
        fail(f"{output.suffix} files need {', '.join(missing)}: pip install 'octvideo[export]'")
    if arguments.ckpt and (arguments.clip or arguments.num_classes):
        fail("--clip and --num_classes are for --name: a checkpoint has its own")
    if arguments.name and not arguments.clip:
        fail("--name needs --clip TxHxW, such as 8x224x224")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with one_line_errors(), torch.no_grad():
        if arguments.ckpt:
            trained = load_trained(arguments.ckpt, arguments.alpha)
            size: tuple[int, ...] = trained.preprocessing.clip_size
        else:
            frames, *sides = arguments.clip
            size, how = (3, frames, *sides), Preprocessing(clip_frames=frames, test_crop_size=min(sides))
            trained = untrained(arguments.name, arguments.alpha or 0.0, arguments.num_classes or 400, how)
        export(trained, size, arguments)
    return 0
