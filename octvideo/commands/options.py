"""What the command lines of the tools share: errors of one line, and types of options."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

from octvideo.errors import UserError

program = ""  # what messages call this program; empty: the name of its script


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the program with one line on standard error."""
    print(f"{program or os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line for what its user can put right; other errors keep their traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        # An error of a data-loading process comes with that process's traceback in front.
        fail(str(error).strip().splitlines()[-1].removeprefix("octvideo.errors.DecodeError: "))


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line; what it describes is printed as it stands."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            program or None,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program; argparse would print its usage first."""
        fail(message)


def number(text: str) -> int:
    """An option's type for a number of things."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"a whole number from 1 is wanted, got {text!r}")
    return int(text)


def clip_size(text: str) -> tuple[int, int, int]:
    """An option's type for frames, height and width of a clip."""
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(re.fullmatch(r"0*[1-9]\d*", size) for size in sizes):
        raise argparse.ArgumentTypeError(f"TxHxW is wanted, such as 8x224x224, got {text!r}")
    frames, height, width = map(int, sizes)
    return frames, height, width


def several(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The type of an option for values with commas between them, each once."""
    return lambda text: tuple(dict.fromkeys(convert(part.strip()) for part in text.split(",")))


def one_of(names: Collection[str], what: str) -> Callable[[str], str]:
    """The type of an option for one of several names."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"no {what} {text!r}; there are {', '.join(names)}")
        return text

    return convert
