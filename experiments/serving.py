"""Measures octave networks where they are served: in onnxruntime and OpenVINO on a CPU, in fp32 and int8.

python experiments/serving.py [--models A,B] [--alphas 0,.25] [--size TxHxW] [--json FILE]       time over alpha
python experiments/serving.py --ckpt FILE ... --list LIST --calibration-list LIST [--root DIR]   accuracy in int8
pip install 'octvideo[serving]'

Every network is exported to ONNX with its sizes fixed and its batch norms folded. int8 comes from each runtime's own
quantiser, after training: onnxruntime's static one (QDQ format, activations unsigned, weights by channel) and NNCF's
for OpenVINO, both with the same calibration clips.

Time: random weights, and calibration on random clips. The forms of a network:
  vanilla    as its author ships it: alpha 0
  octvideo   as octvideo runs it, factorised convolutions and pools folded into 2-D ones, at alpha 0 too
  plain      octave networks of operations on (B, C, T, H, W) alone: `octvideo export --plain`
Ratios are relative to the faster form of alpha 0 in the same runtime and dtype, whose networks run in turn (A B C,
A B C, ...); time_ratio is the median over the rounds of the ratio within a round, least_ratio that of the shortest
times. A failure is noted in its row and passed over; the file is written as it goes.

Accuracy: top-1 of checkpoints on the videos of a list, as PyTorch, both runtimes and both dtypes have it, and how many
videos get the class that PyTorch gives them. Calibrate on the training list.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choices import one_of
from forms import settle
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from speed import check_writable, share
from torch import Tensor

import octvideo
from octvideo import MODELS, create_model
from octvideo.commands import export
from octvideo.commands.options import Parser, clip_size, fail, number, one_line_errors, several
from octvideo.data.clips import Draw, TestViews
from octvideo.data.decoding import Decoding
from octvideo.data.lists import read_list
from octvideo.data.preprocessing import Preprocessing
from octvideo.files import appearing
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.cost import count_macs, hardware, time_interleaved
from octvideo.models.fuse import fuse

Clips = NDArray[np.uint8]
Run = Callable[[Clips], Any]  # to logits
Row = dict[str, Any]
IMAGES = ("mobilenet_v2", "resnet50")  # torchvision's, octavized
DTYPES = ("fp32", "int8")


def in_onnxruntime(path: Path, dtype: str, calibration: Sequence[Clips], threads: int) -> Run:
    """Opens an ONNX file in onnxruntime, quantised first for int8."""
    import onnxruntime
    from onnxruntime import quantization

    if dtype == "int8":

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            clips = iter(calibration)

            def get_next(self) -> dict[str, Clips] | None:
                return next(({"clips": clips} for clips in self.clips), None)

        quantized = path.with_suffix(".int8.onnx")
        kinds = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
        quantization.quantize_static(path, quantized, Reader(), per_channel=True, **kinds)
        path = quantized
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda clips: session.run(None, {"clips": clips})[0]


def in_openvino(path: Path, dtype: str, calibration: Sequence[Clips], threads: int) -> Run:
    """Opens an ONNX file in OpenVINO, quantised first for int8."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if dtype == "int8":
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        model = nncf.quantize(model, nncf.Dataset(calibration), subset_size=len(calibration))
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", hints)
    return lambda clips: compiled(clips)[0]


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def write_onnx(trained: Trained, clips: Clips, path: Path, plain: bool) -> None:
    """Exports a network with batch norms folded, for clips of this shape alone; slices of weights become constants."""
    from onnxruntime import quantization

    given, raw = torch.from_numpy(clips), path.with_suffix(".raw.onnx")
    fused = Trained(fuse(trained.network, trained.normalize(given)), {}, [], trained.preprocessing)
    program = export.trace(export.Classifier(fused, softmax=False), given, plain=plain)
    export.onnx(program, raw, {"output": "logits"})
    quantization.quant_pre_process(raw, path, skip_symbolic_shape=True)


def build(name: str, alpha: float, form: str) -> torch.nn.Module:
    """A network with random weights, in evaluation mode."""
    torch.manual_seed(0)
    if name in MODELS:
        return settle(create_model(name, alpha=alpha, channels_last=form != "vanilla")).eval()
    import torchvision

    network = settle(getattr(torchvision.models, name)()).eval()
    return network if form == "vanilla" else octvideo.octavize(network, alpha, channels_last=True)


def measure_times(arguments: argparse.Namespace, save: Callable[[list[Row]], None]) -> list[Row]:
    """Rows of all models, saved after each runtime and dtype."""
    rows: list[Row] = []
    for name in arguments.models:
        frames, *sides = arguments.size
        size = (3, frames, *sides) if name in MODELS else (3, *sides)
        random = np.random.default_rng(0)
        calibration = [
            random.integers(0, 256, (arguments.batch, *size), np.uint8) for _ in range(arguments.calibration)
        ]
        with tempfile.TemporaryDirectory() as folder:
            files: dict[tuple[str, float], Path] = {}
            macs: dict[float, int] = {}
            octave = [(form, alpha) for alpha in arguments.alphas if alpha for form in ("octvideo", "plain")]
            for form, alpha in [("vanilla", 0.0), ("octvideo", 0.0), *octave]:
                network, path = build(name, alpha, form), Path(folder, f"{form}_{alpha}.onnx")
                macs[alpha] = count_macs(network, size)
                write_onnx(Trained(network, {}, [], Preprocessing()), calibration[0], path, form == "plain")
                files[form, alpha] = path
            for runtime in arguments.runtimes:
                for dtype in arguments.dtypes:
                    about = {"model": name, "size": size, "batch": arguments.batch, "runtime": runtime, "dtype": dtype}
                    rows += group(about, files, macs, calibration, arguments)
                    save(rows)
    return rows


def group(about: Row, files: dict[Any, Path], macs: dict[float, int], clips: list[Clips], arguments: Any) -> list[Row]:
    """The rows of one network in one runtime and dtype."""
    rows, runs = list[Row](), list[Run]()
    for (form, alpha), path in files.items():
        row = about | {"form": form, "alpha": alpha, "gmacs": macs[alpha] / 1e9}
        try:
            run = RUNTIMES[about["runtime"]](path, about["dtype"], clips, arguments.threads)
            run(clips[0])
            runs.append(run)
        except Exception as error:  # whatever a runtime raises; the others are still to be measured
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    good = [row for row in rows if "error" not in row]
    seconds = time_interleaved([lambda run=run: run(clips[0]) for run in runs], rounds=arguments.rounds, warmup=2)  # type: ignore[misc]
    vanilla = [taken for row, taken in zip(good, seconds, strict=True) if row["alpha"] == 0]
    base = min(vanilla, key=statistics.median, default=None)
    for row, taken in zip(good, seconds, strict=True):
        quarters = statistics.quantiles([1000 * t for t in taken], n=4)
        row |= {"ms": quarters[1], "quartiles": [quarters[0], quarters[2]], "least_ms": 1000 * min(taken)}
        row["mac_ratio"] = macs[row["alpha"]] / macs[0.0]
        row["time_ratio"] = statistics.median(a / b for a, b in zip(taken, base, strict=True)) if base else None
        row["least_ratio"] = min(taken) / min(base) if base else None
    return rows


def centre_clips(
    trained: Trained, path: Path, arguments: argparse.Namespace, most: int
) -> tuple[list[Clips], list[int]]:
    """The test clips (views, 3, T, H, W) and labels of a list's videos, or of `most` spread over it."""
    how, videos = trained.preprocessing, read_list(path, root=arguments.root)
    side, decoding = how.test_crop_size, Decoding(videos, how.sampler)
    views = TestViews(decoding, crop_size=side, short_side=side, num_clips=arguments.clips, num_crops=1)
    chosen = np.linspace(0, len(videos.labels) - 1, min(most, len(videos.labels))).astype(int)
    samples = [views[Draw(0, 0, int(index))] for index in chosen]
    good = [sample for sample in samples if sample.clips is not None]
    return [sample.clips.numpy() for sample in good if sample.clips is not None], [int(sample.label) for sample in good]


def measure_accuracy(arguments: argparse.Namespace, save: Callable[[list[Row]], None]) -> list[Row]:
    """Rows of all checkpoints."""
    rows: list[Row] = []
    for ckpt in arguments.ckpt:
        trained = load_trained(ckpt)
        clips, labels = centre_clips(trained, arguments.list, arguments, sys.maxsize)
        calibration, _ = centre_clips(trained, arguments.calibration_list, arguments, arguments.calibration)
        about = {"ckpt": str(ckpt)} | {key: trained.options[key] for key in ("name", "alpha", "downsample")}
        about |= {"videos": len(labels), "calibration_videos": len(calibration)}

        def eager(given: Clips, trained: Trained = trained) -> Tensor:
            logits: Tensor = trained.network(trained.normalize(torch.from_numpy(given)))
            return logits

        wanted = classes(eager, clips)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(about | {"runtime": "PyTorch", "dtype": "fp32"} | scores(wanted, wanted, labels))
            for runtime in arguments.runtimes:
                path = Path(folder, f"{runtime}.onnx")
                write_onnx(trained, clips[0], path, plain=runtime == "openvino")
                for dtype in arguments.dtypes:
                    row = about | {"runtime": runtime, "dtype": dtype}
                    try:
                        run = RUNTIMES[runtime](path, dtype, calibration, arguments.threads)
                        row |= scores(classes(run, clips), wanted, labels)
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {error}"[:300]
                    rows.append(row)
                    save(rows)
    return rows


def classes(run: Run, clips: Iterable[Clips]) -> list[int]:
    """The class of each video: that of the highest mean probability over its views."""
    return [int(torch.as_tensor(run(views)).softmax(1).mean(0).argmax()) for views in clips]


def scores(found: list[int], wanted: list[int], labels: list[int]) -> Row:
    """Top-1 and the videos that get PyTorch's class."""
    right, alike = ([a == b for a, b in zip(found, other, strict=True)] for other in (labels, wanted))
    return {"top1": 100 * statistics.mean(right), "right": sum(right), "as_pytorch": sum(alike)}


TIMES = ("runtime", "dtype", "form", "alpha", "gmacs", "ms", "time_ratio", "mac_ratio", "least_ms", "least_ratio")
ACCURACY = ("name", "alpha", "downsample", "runtime", "dtype", "videos", "right", "top1", "as_pytorch")


def show(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Prints rows in Markdown."""
    table = Table(*columns, box=box.MARKDOWN)
    for row in rows:
        values = [row.get(column, row.get("error", "")) for column in columns]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console(width=200).print(table)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", type=several(one_of((*MODELS, *IMAGES), "model")), default=("i3d_r50",), metavar="A,B")
    add("--alphas", type=several(share), default=(0.0, 0.25, 0.5), metavar="0,.25", help="0 is always measured")
    add("--size", type=clip_size, default=(8, 224, 224), metavar="TxHxW", help="default: 8x224x224; images: HxW of it")
    add("--batch", type=number, default=1, metavar="N", help="clips at once; default: 1")
    add("--runtimes", type=several(one_of(RUNTIMES, "runtime")), default=tuple(RUNTIMES), metavar="A,B")
    add("--dtypes", type=several(one_of(DTYPES, "dtype")), default=DTYPES, metavar="fp32,int8")
    add("--rounds", type=number, default=15, metavar="N", help="measurements of each network; default: 15")
    add("--threads", type=number, default=torch.get_num_threads(), metavar="N", help="default: as torch chooses")
    add("--calibration", type=number, metavar="N", help="clips, or videos, to calibrate on; default: 4, or 128 videos")
    add("--ckpt", type=Path, nargs="+", metavar="FILE", help="checkpoints of octvideo train, to measure accuracy")
    add("--list", type=Path, help="with --ckpt: list of the videos to classify")
    add("--calibration-list", type=Path, metavar="LIST", help="with --ckpt: list of the videos to calibrate on")
    add("--root", metavar="DIR", help="folder that paths in the lists start from")
    add("--clips", type=number, default=3, metavar="N", help="with --ckpt: clips of a video to average; default: 3")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(words)
    if arguments.ckpt and not (arguments.list and arguments.calibration_list):
        fail("--ckpt needs --list and --calibration-list")
    arguments.calibration = arguments.calibration or (128 if arguments.ckpt else 4)
    check_writable("--json", arguments.json)
    return arguments


def main(words: Sequence[str]) -> int:
    """Measures, prints and saves."""
    arguments = parse(words)

    def save(rows: list[Row]) -> None:
        if arguments.json is not None:
            with appearing(arguments.json) as path:
                path.write_text(json.dumps(rows, indent=1) + "\n")

    torch.set_num_threads(arguments.threads)
    with one_line_errors(), torch.no_grad():
        rows = (measure_accuracy if arguments.ckpt else measure_times)(arguments, save)
    save(rows)
    print(f"{hardware('cpu')}, {arguments.threads} threads")
    for name in dict.fromkeys(row.get("model") for row in rows):
        print(f"\n{name}\n" if name else "")
        show([row for row in rows if row.get("model") == name], ACCURACY if arguments.ckpt else TIMES)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
