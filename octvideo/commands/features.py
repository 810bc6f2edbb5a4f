"""Writes embeddings of videos, which a checkpoint's classifier reads: to search, cluster or classify them.

octvideo features VIDEO|FOLDER|LIST ... --ckpt CHECKPOINT --output FILE.npz|FILE.parquet [--per video|clip|second]

Inputs are those of octvideo predict; classes in lists are not used. An embedding is the mean over space and time of
what the last linear layer (or convolution of size 1) reads.

--per video   a row for each video: the mean over its N clips x M crops (--clips, --crops)
--per clip    a row for each clip: the mean over its crops
--per second  a row for each second: one clip around its middle

FILE.npz      arrays paths (N,), features (N, D) in float32 and, but for --per video, seconds (N,), the middle of each
              clip or second
FILE.parquet  the same as columns, with a list of D numbers in each row; `pip install 'octvideo[features]'`

A run that was interrupted goes on when the command is repeated: finished videos are kept in FILE.partial meanwhile.

Exit status: 0 if all videos are in the file; 1 if some are bad (they are listed with the reason); 2 for a mistake in
the command, or if the file cannot be written; 130 on Ctrl-C.
"""

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from torch import Tensor

from octvideo.commands.options import Parser, device_of, fail, number, one_line_errors
from octvideo.commands.predict import add_videos, find_videos, reading, refuse_overwriting, shown
from octvideo.data.clips import BadVideo
from octvideo.data.lists import MOST_CLASSES
from octvideo.data.preparation.journal import Journal
from octvideo.data.source import AnySource, split_span
from octvideo.errors import PreparationError, UserError
from octvideo.evaluation.features import Extractor, Features, VideoFeatures, collected
from octvideo.evaluation.prediction import Predictor
from octvideo.files import appearing
from octvideo.models.checkpoint import Trained, load_trained

FORMATS = (".npz", ".parquet")


def fingerprint(trained: Trained) -> str:
    """A checksum of a network's weights."""
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = trained.network.state_dict()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def identity(path: str) -> tuple[str, int, int]:
    """A file's path, bytes and time of change; zeros if it is missing."""
    try:
        return path, *AnySource().version(split_span(path)[0])
    except (OSError, UserError):
        return path, 0, 0


def resumed(paths: Sequence[str], extractor: Extractor, journal: Journal) -> Iterator[VideoFeatures | BadVideo]:
    """The results of videos, first those that the journal knows; others are written down there."""
    new = []
    for path in dict.fromkeys(paths):
        known = journal.known(*identity(path))
        if "features" not in known:
            new.append(path)
            continue
        rows, seconds = (base64.b64decode(known[key]) for key in ("features", "seconds"))
        times = np.frombuffer(seconds, np.float64)
        yield VideoFeatures(path, np.frombuffer(rows, np.float32).reshape(len(times), -1), times)
    for result in extractor(new):
        if isinstance(result, VideoFeatures):
            facts: dict[str, Any] = dict(zip(("path", "bytes", "mtime_ns"), identity(result.path), strict=True))
            arrays = ("features", result.features.tobytes()), ("seconds", result.seconds.tobytes())
            journal.add(facts | {key: base64.b64encode(content).decode() for key, content in arrays})
        yield result


def write(found: Features, path: Path) -> None:
    """Writes rows to FILE.npz or FILE.parquet."""
    columns: dict[str, Any] = {"paths": found.paths, "features": found.features}
    columns |= {} if found.seconds is None else {"seconds": found.seconds}
    with appearing(path) as partial, partial.open("wb") as file:
        if path.suffix == ".npz":
            np.savez(file, **columns)
            return
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        columns["paths"] = [os.fsencode(name).decode(errors="backslashreplace") for name in found.paths]
        rows = pyarrow.FixedSizeListArray.from_arrays(found.features.ravel(), found.features.shape[1])
        pyarrow.parquet.write_table(pyarrow.table(columns | {"features": rows}), file)


def features(arguments: argparse.Namespace, partial: Path) -> int:
    device, trained = device_of(arguments.device), load_trained(arguments.ckpt, arguments.alpha)
    paths = [path for path, _ in find_videos(arguments.inputs, arguments.root, MOST_CLASSES)]
    inputs = (arguments.ckpt, *arguments.inputs, *paths)
    refuse_overwriting([("output", arguments.output), ("output", partial)], inputs)
    extractor = Extractor(Predictor(trained, device=device, **reading(arguments)), arguments.per, arguments.batch)
    known = {key: getattr(arguments, key) for key in ("per", "clips", "crops", "backend", "frames_fps")}
    known |= {"weights": fingerprint(trained), "alpha": trained.options["alpha"], **asdict(trained.preprocessing)}
    try:
        journal = Journal(partial, json.loads(json.dumps(known)))
    except PreparationError as error:
        cure = "give the same ones, or remove it to start anew"
        raise UserError(
            f"{partial} is of an interrupted run with another checkpoint or other options: {cure}"
        ) from error
    found = collected(paths, shown(resumed(paths, extractor, journal), "embedding", len(set(paths))), arguments.per)
    journal.close()
    if found.paths:
        write(found, arguments.output)
    partial.unlink()
    console, rows = Console(width=None if sys.stdout.isatty() else 10_000), f"{len(found.features)} rows"
    bad = [Text(f"  {path}: {reason}", "yellow") for path, reason in found.bad]
    where = f"{rows} of {found.features.shape[1]} numbers: {arguments.output}" if found.paths else "nothing is written"
    good = len(paths) - len(bad)
    console.print(f"{good} videos embedded, {len(bad)} bad; {where}", *bad, sep="\n", highlight=False, soft_wrap=True)
    return int(bool(bad))


def main(words: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add_videos(parser, "what to embed")
    add("--output", type=Path, required=True, metavar="FILE", help="FILE.npz or FILE.parquet")
    per = "what a row is for; default: video"
    add("--per", choices=("video", "clip", "second"), default="video", help=per)
    add("--batch", metavar="N", type=number, default=10, help="clips that the network sees at a time; default: 10")
    arguments = parser.parse_args(words)
    output: Path = arguments.output
    if output.suffix not in FORMATS:
        fail(f"--output must be a file that ends in {' or '.join(FORMATS)}, got {output}")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        fail(".parquet files need pyarrow: pip install 'octvideo[features]'")
    if arguments.per == "second" and any(
        getattr(arguments, key) != parser.get_default(key) for key in ("clips", "crops")
    ):
        fail("--clips and --crops are for --per video and --per clip: a second has one clip and crop")
    partial = output.with_name(f"{output.name}.partial")
    try:
        with one_line_errors():
            return features(arguments, partial)
    except KeyboardInterrupt:
        print(f"stopped: repeat the command to go on from {partial}", file=sys.stderr)
        return 130
