"""Files: read block by block, and written so that they appear whole or not at all, however a program ends."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from octvideo.errors import DamagedCheckpointError

_MARK = b"octvideo sha256 "
_SEAL = len(_MARK) + hashlib.sha256().digest_size  # bytes


def verify(path: str | Path) -> None:
    """Reads a whole checkpoint and compares its checksum.

    Files that AtomicCheckpointIO did not write carry no checksum of all their bytes: there, those of the zip archive's
    records are compared, which finds every truncation and every change of a tensor.

    Raises:
        DamagedCheckpointError: the file is torn, changed or cannot be read; the message says which.
        FileNotFoundError: there is no such file.
    """
    try:
        reason = _damage(Path(path))
    except FileNotFoundError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        reason = f"cannot be read ({error})"
    if reason:
        raise DamagedCheckpointError(f"{path} is no intact checkpoint: {reason}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; errors of reading it are the caller's."""
    with path.open("rb") as file:
        content = os.fstat(file.fileno()).st_size - _SEAL  # bytes
        file.seek(max(content, 0))
        seal = file.read()
        if not seal.startswith(_MARK):
            with zipfile.ZipFile(file) as archive:
                if archive.comment or not seal.endswith(b"\0\0"):  # torch.save makes empty comments, of length 0
                    return "its checksum is torn"
                record = archive.testzip()
                return record and f"the record {record} is not what was written"
        file.seek(0)
        digest = hashlib.sha256()
        while chunk := file.read(min(content - file.tell(), 2**20)):
            digest.update(chunk)
        return None if seal == _MARK + digest.digest() else "its bytes are not those that were written"


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes parts of bytes to a file that appears at path when it is on the disk, and not at all if that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rename(old: Path, new: Path) -> None:
    """Renames on the disk too, so that a power cut cannot undo it."""
    os.replace(old, new)
    folder = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # from file systems on which folders are never behind
            raise
    finally:
        os.close(folder)


def _point(name: Path, target: Path, symbolic: bool = False) -> None:
    """Makes name another name for a file beside it: a symbolic or hard link, or a copy where there are no links."""
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a killed process
    try:
        if symbolic:
            temporary.symlink_to(target.name)
        else:
            temporary.hardlink_to(target)
    except OSError:
        if symbolic:
            _point(name, target)
        else:
            with target.open("rb") as source:
                _replace(name, iter(partial(source.read, 2**20), b""))
        return
    try:
        _rename(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)  # renaming one of two hard links to the other leaves both


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
