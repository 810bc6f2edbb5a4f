"""What all sub-commands share: errors of one line, types of options, and the configurations that are installed."""

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from octvideo import errors, stores
from octvideo.errors import UserError
from octvideo.stores import is_uri

COMPILE = "compile the network with torch.compile: blocks, each kind of residual block once, or true, all of it"
program = ""  # the name of this program in its messages; empty: the script's


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the program with one line on standard error."""
    print(f"{program or os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.unraisablehook = lambda _: None  # nor may what is left half built add a traceback
    sys.exit(status)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line for errors that its user can put right; others keep their traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        message = str(error).strip()
        if message.startswith("Caught "):  # in a data-loading process, whose traceback is in front of the message
            message = re.sub(r"^octvideo\.errors\.\w+: ", "", message.splitlines()[-1])
        fail(message)


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line and a description printed as it stands."""

    def __init__(self, description: str | None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(program or None, description=description, formatter_class=layout, allow_abbrev=False)
        self.register("type", Path, local_path)

    def error(self, message: str) -> NoReturn:  # argparse's would print its usage first
        fail(message)


def local_path(text: str) -> Path:
    """What type=Path means for options of a `Parser`, as a Path would lose a slash of https://."""
    if text == "-" or is_uri(text):
        raise argparse.ArgumentTypeError(f"must be a file or folder of this machine, got {text!r}")
    return Path(text)


def location(text: str) -> str:
    """The type of an option for a path or a URI."""
    if text == "-":
        raise argparse.ArgumentTypeError("must be a file, folder or address, got '-'")
    return text


def checkpoint(text: str) -> Path:
    """The type of an option for a checkpoint: a path, or a URI, of which a copy is kept on this machine."""
    try:
        return stores.local(text)
    except (OSError, UserError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {getattr(error, 'strerror', None) or error}") from error


def number(text: str) -> int:
    """The type of an option that counts something."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def positive(text: str, otherwise: str = "") -> float:
    """The type of an option that measures something."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a positive number{otherwise}, got {text!r}")


def share(text: str) -> float:
    """The type of an option for an alpha."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"must be numbers in [0, 1] with commas between them, got {text!r}")


def time_limit(text: str) -> float | None:
    """The type of a time limit, or null for none."""
    return None if text == "null" else positive(text, " or null")


def add_predictor(parser: Parser, clips: int, crops: int, required: bool = True) -> None:
    """Adds the options of a checkpoint that predicts videos, with the defaults for clips of a video and their crops."""
    add = parser.add_argument
    add("--ckpt", type=checkpoint, required=required, help="checkpoint of octvideo train, or a published network")
    add("--alpha", type=float, help="alpha of res2 to res4; default: the checkpoint's")
    add("--clips", metavar="N", type=number, default=clips, help=f"clips of a video, 1 is the centre; default: {clips}")
    add("--crops", metavar="M", type=number, default=crops, help=f"crops of a clip; default: {crops}")
    timeout, limit = ("--decode_timeout_seconds", "--decode-timeout-seconds"), "time limit of a decoding step, or null"
    add(*timeout, metavar="S", type=time_limit, default=60.0, help=f"{limit}; default: 60")


def add_budget(parser: Parser) -> None:
    """Adds the option of a time for each clip."""
    what = "time that the network may take for a clip: alpha is the smallest that holds it, and changes with the load"
    parser.add_argument("--budget", metavar="MS", type=positive, help=what)


def check_budget(arguments: argparse.Namespace) -> None:
    """Ends the program where --alpha fixes what --budget chooses."""
    if arguments.budget is not None and arguments.alpha is not None:
        fail("--budget chooses alpha: leave out --alpha")


def device_of(device: str | None) -> str:
    """The device that --device or this machine names, if it can be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: {str(error).splitlines()[0]}")
    return device


def clip_size(text: str) -> tuple[int, int, int]:
    """The type of an option for frames, height and width of a clip."""
    sizes = re.fullmatch("x".join([r"(0*[1-9]\d*)"] * 3), text.lower())
    if sizes is None:
        raise argparse.ArgumentTypeError(f"must be TxHxW, such as 8x224x224, got {text!r}")
    return int(sizes[1]), int(sizes[2]), int(sizes[3])


def config_file(text: str) -> str:
    """The file that --cfg names: a path, or the name of an installed configuration such as quickstart; or UserError."""
    if os.path.exists(text) and not os.path.isdir(text):  # a pipe, too
        return text
    package = Path(errors.__file__).parent
    folder = next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())
    named = folder / f"{text.removesuffix('.yaml')}.yaml"
    if os.sep in text or not named.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UserError(f"--cfg {text}: no such file, and no configuration of that name; there are {names}")
    return str(named)


def with_config_files(words: list[str]) -> list[str]:
    """A command line whose --cfg options name files; see `config_file`."""
    found = []
    for word, before in zip(words, ["", *words], strict=False):
        option, _, value = word.partition("=")
        given = f"{option}={config_file(value)}" if option in ("--cfg", "-c") and value else word
        found.append(config_file(given) if before in ("--cfg", "-c") else given)
    return found


def several(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The type of an option for values with commas between them, each once."""
    return lambda text: tuple(dict.fromkeys(convert(part.strip()) for part in text.split(",")))
