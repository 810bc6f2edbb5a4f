"""Exports a trained network to ONNX or torch.export, with the normalisation inside and all that its user needs to know.

python tools/export.py --ckpt runs/oct_i3d/checkpoints/best.ckpt --output oct_i3d.onnx [--alpha A] [--softmax]
python tools/export.py --name slowfast_r50 --alpha .25 --clip 32x224x224 --output slowfast.pt2 [--num_classes N]

FILE.onnx is for onnxruntime and other runtimes (opset 18, the oldest that PyTorch writes) and takes
`pip install 'octvideo[export]'` to write; FILE.pt2 is a torch.export program. Either is one file, which needs neither
octvideo nor the checkpoint.

input    clips: uint8 RGB (batch, 3, frames, height, width), of any batch unless --batch fixes it
output   logits, or with --softmax probabilities: float32 (batch, classes)

The file also says how clips are made and what comes out: labels, clip_frames, frame_stride, sampling, target_fps,
short_videos, test_crop_size (pixels that the shorter side is scaled to, and of the square cut out), mean and std (which
the network applies itself), name, alpha and other options of the network, output, octvideo_version. In ONNX each is a
JSON value in metadata_props, in FILE.pt2 all are one JSON object, the extra file octvideo.json.

With --name the network has random weights and batch-norm statistics: to measure it before it is trained.

Before the file appears, what it gives for random, black and white clips is compared with what PyTorch gives, without
folded batch norms. Then both are timed in turn, on the first of those clips.

Exit status: 0 if they agree; 1 if not, and no file is written; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.commands.options import Parser, clip_size, fail, number, one_line_errors
from octvideo.files import appearing
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.cost import time_interleaved
from octvideo.models.fuse import fuse
from octvideo.models.zoo import create_model

OPSET = 18
OF_TRAINING = ("crop_size", "short_side", "mirror")  # preprocessing that only training clips undergo
Size = tuple[int, int, int]


class Classifier(nn.Module):
    """What is exported: normalisation, network and, if wanted, softmax.

    Args:
        trained: the network, and how its clips are normalised.
        softmax: give probabilities.

    Shape:
        Input: (B, 3, T, H, W) uint8.
        Output: (B, num_classes) float32.
    """

    def __init__(self, trained: Trained, softmax: bool) -> None:
        super().__init__()
        self.network = trained.network
        self.normalize = trained.normalize
        self.softmax = softmax

    def forward(self, clips: Tensor) -> Tensor:
        """The argument's name is the name of the file's input."""
        logits: Tensor = self.network(self.normalize(clips))
        return logits.softmax(1) if self.softmax else logits


def write_onnx(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """Writes the weights into the one file too, which protobuf allows up to 2 GB."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # a line for each weight that it leaves to the runtime
    shapes, names = {"clips": {0: "batch"}}, [about["output"]]  # for names alone: the program knows what is dynamic
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, output_names=names, verbose=False
    )
    assert exported is not None
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    path.write_bytes(exported.model_proto.SerializeToString())


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in onnxruntime, on the CPU, with as many threads as PyTorch has."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


def write_pt2(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """Writes by way of an open file: torch.export refuses to know a name without .pt2."""
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"octvideo.json": json.dumps(about)})


def open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in PyTorch."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


class Format(NamedTuple):
    """A kind of file.

    Args:
        runtime: what runs it.
        packages: what has to be installed for it, besides octvideo.
        write: writes a program to a file, with what is to be known about it.
        open: opens the file in its runtime.
    """

    runtime: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, dict[str, Any]], None]
    open: Callable[[Path], Callable[[Tensor], Tensor]]


FORMATS = {
    ".onnx": Format("onnxruntime", ("onnx", "onnxruntime", "onnxscript"), write_onnx, open_onnx),
    ".pt2": Format("torch.export", (), write_pt2, open_pt2),
}


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The command line, checked as far as it can be without a network."""
    parser = Parser(__doc__)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", type=Path, metavar="FILE", help="checkpoint that train_net.py wrote")
    source.add_argument("--name", metavar="NETWORK", help="a network of octvideo.MODELS, such as i3d_r50, untrained")
    add("--output", type=Path, required=True, metavar="FILE", help="FILE.onnx or FILE.pt2")
    add("--alpha", type=float, metavar="A", help="of res2 to res4; default: the checkpoint's, or 0 with --name")
    add(
        "--clip", type=clip_size, metavar="TxHxW", help="with --name: frames, height and width; checkpoints know theirs"
    )
    add("--num_classes", type=number, metavar="N", help="with --name; default: 400")
    add("--batch", type=number, metavar="N", help="clips at once, always; default: any number")
    add("--softmax", action="store_true", help="give probabilities in place of logits")
    add(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold batch norms into the convolutions before them, which is faster and the same up to rounding; "
        "default: yes",
    )
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="SHARE",
        help="of the largest output, that outputs may differ by; default: 1e-4",
    )
    add("--rounds", type=number, default=10, metavar="N", help="measurements of each runtime; default: 10")
    add("--threads", type=number, metavar="N", help="of each runtime; default: as PyTorch chooses")
    arguments = parser.parse_args(words)
    output: Path = arguments.output
    if output.suffix not in FORMATS or output.is_dir():
        fail(f"--output must be a file that ends in {' or '.join(FORMATS)}, got {output}")
    missing = [name for name in FORMATS[output.suffix].packages if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{output.suffix} files need {', '.join(missing)}: pip install 'octvideo[export]'")
    if arguments.ckpt and (arguments.clip or arguments.num_classes):
        fail("--clip and --num_classes are for --name: a checkpoint has its own")
    if arguments.name and not arguments.clip:
        fail("--name needs --clip TxHxW, such as 8x224x224")
    return arguments


def untrained(name: str, alpha: float, num_classes: int, clip_frames: int) -> Trained:
    """A network whose weights and statistics are random: with those that a training starts from, most of it is silent.

    Raises:
        ValueError: an unknown name or an impossible alpha.
    """
    torch.manual_seed(0)
    network = create_model(name, alpha=alpha, num_classes=num_classes, channels_last=True)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    options = {"name": name, "alpha": alpha, "num_classes": num_classes}
    labels = [f"class {number}" for number in range(num_classes)]
    return Trained(network.eval(), options, labels, {"clip_frames": clip_frames, "mean": 0.45, "std": 0.225})


def clips_to_compare(size: Size, batches: tuple[int, ...]) -> list[Tensor]:
    """Random, black and white clips (B, 3, T, H, W) for each B."""
    generator = torch.Generator().manual_seed(0)
    clips = []
    for shape in [(batch, 3, *size) for batch in batches]:
        clips.append(torch.randint(256, shape, dtype=torch.uint8, generator=generator))
        clips += [torch.full(shape, level, dtype=torch.uint8) for level in (0, 255)]
    return clips


def export(trained: Trained, size: Size, arguments: argparse.Namespace) -> None:
    """Writes the file if it gives what PyTorch gives, and prints how fast it is."""
    file = FORMATS[arguments.output.suffix]
    eager = Classifier(trained, arguments.softmax)
    clips = clips_to_compare(size, (arguments.batch,) if arguments.batch else (1, 2))
    try:
        wanted = [eager(clip) for clip in clips]
    except RuntimeError as error:
        fail(f"{trained.options['name']} does not take clips of {'x'.join(map(str, size))}: {error}")
    if arguments.fuse:
        trained = replace(trained, network=fuse(trained.network, trained.normalize(clips[0])))
    dynamic = None if arguments.batch else {"clips": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(
        Classifier(trained, arguments.softmax), (clips[-1],), dynamic_shapes=dynamic, strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    about = {
        **trained.options,
        **{key: value for key, value in trained.preprocessing.items() if key not in OF_TRAINING},
        "labels": trained.labels,
        "output": "probabilities" if arguments.softmax else "logits",
        "octvideo_version": importlib.metadata.version("octvideo"),
    }
    with appearing(arguments.output) as partial:
        file.write(program, partial, about)
        run = file.open(partial)
        differences = [
            (run(clip) - want).abs().max() / want.abs().max() for clip, want in zip(clips, wanted, strict=True)
        ]
        difference = float(torch.stack(differences).max())
        if not difference <= arguments.tolerance:
            sys.exit(
                f"export.py: error: {file.runtime} gives {about['output']} that differ from PyTorch's by "
                f"{difference:.1g} of the largest, more than --tolerance {arguments.tolerance:g}: no file is written"
            )
    seconds = time_interleaved([lambda: eager(clips[0]), lambda: run(clips[0])], rounds=arguments.rounds)
    medians = [median(taken) for taken in seconds]
    table = Table(f"clips {tuple(clips[0].shape)}", "median ms", "ratio")
    for runtime, taken in zip(("PyTorch", file.runtime), medians, strict=True):
        table.add_row(runtime, f"{1000 * taken:.1f}", f"{taken / medians[0]:.2f}")
    Console().print(table)
    megabytes = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: {megabytes:.1f} MB; {about['output']} differ by {difference:.1g} of the largest")


def main(words: list[str]) -> int:
    """Runs the tool; returns its exit status."""
    arguments = read_arguments(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with one_line_errors(), torch.no_grad():
        if arguments.ckpt:
            trained = load_trained(arguments.ckpt, arguments.alpha)
            side = trained.preprocessing["test_crop_size"]
            size = (trained.preprocessing["clip_frames"], side, side)
        else:
            size = arguments.clip
            trained = untrained(arguments.name, arguments.alpha or 0.0, arguments.num_classes or 400, size[0])
        export(trained, size, arguments)
    return 0
