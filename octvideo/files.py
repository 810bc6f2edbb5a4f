"""Files that appear whole or not at all, however a program ends; checksums of checkpoints; locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from octvideo.errors import DamagedCheckpointError

BLOCK_BYTES = 2**20
PARTIAL = ".partial"  # ends the names of files that are being written
MARK = b"octvideo sha256 "
SEAL_BYTES = len(MARK) + hashlib.sha256().digest_size


def blocks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The content of a file, a megabyte at a time; raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        yield from iter(partial(file.read, BLOCK_BYTES), b"")


@contextlib.contextmanager
def appearing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yields the name of a temporary file beside a path; at the end, what was written there takes the path's place.

    A program killed at any moment leaves the old file or the new one, and at most the temporary one (by default hidden,
    for `remove_partial` to find). File and folder are forced to the disk, so that a power cut cannot undo it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(f".{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # from file systems whose folders are always in sync
                raise
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)  # os.replace leaves it where it is another hard link to the path's old file


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes parts of bytes to a file, by way of path + ".tmp"; raises OSError, and then the old file is unchanged."""
    with appearing(path, path.with_name(path.name + ".tmp")) as temporary, temporary.open("wb") as file:
        file.writelines(parts)


def point_to(name: Path, target: Path, symbolic: bool = False) -> None:
    """Makes name another name for a file beside it: a symbolic or hard link, or a copy where links are refused."""
    with appearing(name, name.with_name(name.name + ".tmp")) as temporary:
        temporary.unlink(missing_ok=True)  # left by a killed process
        if symbolic:
            with contextlib.suppress(OSError):
                temporary.symlink_to(target.name)
                return
        try:
            temporary.hardlink_to(target)
        except OSError:
            shutil.copyfile(target, temporary)


def remove_partial(folder: Path) -> None:
    """Removes the partial files that killed programs left in a folder and those below it, then empty folders in it."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            if name.startswith(".") and name.endswith(PARTIAL):
                os.unlink(os.path.join(parent, name))
        for name in folders:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(os.path.join(parent, name))


def lock(path: Path) -> BinaryIO | None:
    """Locks a file, made if need be, until it is closed or this process ends; None if another process holds it.

    Child processes do not inherit the lock. Where the file system has no locks there is no guard.
    """
    file = path.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            return None
    return file


def seal(archive: memoryview) -> bytes:
    """What to write behind the bytes of torch.save's zip archive: a comment in it, with the checksum of all of them.

    The archive's own checksums do not cover its directory, where a flipped bit can pass one record off as another.
    """
    archive[-2:] = SEAL_BYTES.to_bytes(2, "little")  # the length of the comment, which torch.save leaves empty
    return MARK + hashlib.sha256(archive).digest()


def verify(path: str | Path) -> None:
    """Reads a whole checkpoint and compares its checksum.

    Files without a `seal` are checked by their zip archive's own checksums, which finds every truncation and every
    change of a tensor.

    Raises:
        DamagedCheckpointError: the file is truncated, changed or cannot be read; the message says which.
        FileNotFoundError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            content = os.fstat(file.fileno()).st_size - SEAL_BYTES
            file.seek(max(content, 0))
            end = file.read()
            if end.startswith(MARK):
                file.seek(0)
                digest = hashlib.sha256()
                while chunk := file.read(min(content - file.tell(), BLOCK_BYTES)):
                    digest.update(chunk)
                reason = "" if end == MARK + digest.digest() else "its bytes are not those that were written"
            else:
                with zipfile.ZipFile(file) as archive:
                    if archive.comment or not end.endswith(b"\0\0"):  # torch.save's comment is empty: its length is 0
                        reason = "its checksum is torn"
                    else:
                        record = archive.testzip()
                        reason = f"the record {record} is not what was written" if record else ""
    except FileNotFoundError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        reason = f"cannot be read ({error})"
    if reason:
        raise DamagedCheckpointError(f"{path} is no intact checkpoint: {reason}")
