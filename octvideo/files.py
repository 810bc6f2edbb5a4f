"""Files that appear whole or not at all, however a program ends; checksums of checkpoints; locks."""

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from octvideo.errors import DamagedCheckpointError, UserError

BLOCK_BYTES = 2**20
PARTIAL = ".partial"  # ends the names of files that are being written
MARK = b"octvideo sha256 "
SEAL_BYTES = len(MARK) + hashlib.sha256().digest_size


def blocks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The content of a file, a megabyte at a time."""
    with open(path, "rb") as file:
        yield from iter(partial(file.read, BLOCK_BYTES), b"")


def _sync(path: Path) -> None:
    """Forces a file or folder to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # from file systems whose folders are always in sync
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[None]:
    """At the end, the temporary file takes the place of the path, be it a link or not; after an error it is removed.

    Forced to the disk: a program killed at any time leaves the old file or the new one, and at most the temporary one.
    """
    try:
        yield
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # os.replace leaves it where it is another hard link to the path's old file


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file; at the end, what was written there is at the path, whatever that is.

    A file is replaced as a whole (see `replacing`) and keeps its permissions; of a link, that is the file it leads to.
    The temporary one is beside it and hidden, for `remove_partial` to find. Anything else that can be written to, such
    as a device, a pipe or /dev/stdout, gets the bytes at the end. Any OSError names the path.
    """
    target, temporary = path, None
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # links in a circle are an error
        # The links in /proc lead to open files, which may have no name.
        while target.is_symlink() and not target.parent.resolve().is_relative_to("/proc"):
            target = target.parent / target.readlink()
        if target.is_dir() or (target.is_file() and not os.access(target, os.W_OK)):
            number = errno.EISDIR if target.is_dir() else errno.EACCES
            raise OSError(number, os.strerror(number))
        if target.is_symlink() or (target.exists() and not target.is_file()):
            with tempfile.TemporaryDirectory() as folder:
                yield (temporary := Path(folder, path.name))
                sys.stdout.flush()
                own = target.parent.resolve() == Path(f"/proc/{os.getpid()}/fd")  # another one's may not be truncated
                opened = os.dup(int(target.name)) if own else os.open(target, os.O_WRONLY | os.O_APPEND)
                with open(opened, "wb") as file:
                    file.writelines(blocks(temporary))
            return
        if target is path:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Another machine that writes into the folder may have a process of this number.
        temporary = target.with_name(f".{os.uname().nodename}.{os.getpid()}{PARTIAL}")
        with replacing(target, temporary):
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder; at the end, it and the files in it are at the path, or after an error nothing is.

    A folder that is there already, and not empty, must hold the same files: else UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}{PARTIAL}")
    temporary.mkdir()
    try:
        yield temporary
        names = sorted(os.listdir(temporary))
        if path.is_dir() and (there := sorted(os.listdir(path))):
            if there != names or filecmp.cmpfiles(path, temporary, names, shallow=False)[0] != names:
                raise UserError(f"{path} exists and holds something else: name another folder, or remove it")
            return
        for name in names:
            _sync(temporary / name)
        os.rename(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def point_to(name: Path, target: Path, symbolic: bool = False) -> None:
    """Makes name another name for a file beside it: a symbolic or hard link, or a copy where links are refused."""
    temporary = name.with_name(name.name + ".tmp")
    with replacing(name, temporary):
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

    Child processes do not inherit the lock. On a file system without locks the file is open, but not locked.
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
    """A zip comment with a checksum, to write behind an archive of torch.save, whose own do not cover its directory."""
    archive[-2:] = SEAL_BYTES.to_bytes(2, "little")  # the length of the comment, which torch.save leaves empty
    return MARK + hashlib.sha256(archive).digest()


def verify(path: str | Path) -> None:
    """Reads a checkpoint and compares its `seal`, or zip checksums; FileNotFoundError or DamagedCheckpointError."""
    reason = ""
    try:
        with open(path, "rb") as file:
            content = os.fstat(file.fileno()).st_size - SEAL_BYTES
            file.seek(max(content, 0))
            end = file.read()
            file.seek(0)
            if end.startswith(MARK):
                digest = hashlib.sha256()
                while chunk := file.read(min(content - file.tell(), BLOCK_BYTES)):
                    digest.update(chunk)
                reason = "" if end == MARK + digest.digest() else "its bytes are not those that were written"
            elif (archive := zipfile.ZipFile(file)).comment or end[-2:] != b"\0\0":  # torch.save's comment is empty
                reason = "its checksum is torn"
            elif record := archive.testzip():
                reason = f"the record {record} is not what was written"
    except FileNotFoundError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        reason = f"cannot be read ({error})"
    if reason:
        raise DamagedCheckpointError(f"{path} is no intact checkpoint: {reason}")
