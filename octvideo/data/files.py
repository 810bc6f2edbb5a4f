"""Files: read block by block, and written so that they appear whole or not at all, however a program ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 2**20
PARTIAL = ".partial"  # ends the names of files that are being written


def blocks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The content of a file, a megabyte at a time.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Gives the name of a hidden file beside a path; what was written there takes the path's place at the end.

    A program killed at any moment leaves the former file or the new one, and at most a hidden one.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(folder: Path) -> None:
    """Removes what killed programs left half-written in a folder and those below it, and empty folders in it."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            if name.startswith(".") and name.endswith(PARTIAL):
                os.unlink(os.path.join(parent, name))
        for name in folders:
            with contextlib.suppress(OSError):  # there is something in it
                os.rmdir(os.path.join(parent, name))
