"""Prepared videos packed into tar files of webdataset's layout, so that a training clip is one request to a store."""

import errno
import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from octvideo.data.watchdog import still_alive


class Packed(NamedTuple):
    """A video to pack, and a note beside it."""

    name: str  # as lists name its file
    size: int
    mtime_ns: int  # of the source's file
    member: str  # its path in the tar
    note: str  # likewise; empty for none
    content: bytes


def _header(name: str, size: int) -> bytes:
    # This format's header starts with the bytes of the name, as data.source expects; time, user and group are 0.
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padded(size: int, block: int = tarfile.BLOCKSIZE) -> int:
    return -(-size // block) * block


def _bytes(video: Packed) -> int:
    """What a video takes of a tar."""
    note = len(_header(video.note, 0)) + _padded(len(video.content)) if video.note else 0
    return len(_header(video.member, video.size)) + _padded(video.size) + note


@dataclass(frozen=True)
class Shard:
    """A tar file as it will be."""

    path: str  # from the output on
    videos: Sequence[Packed]

    @property
    def size(self) -> int:
        """Size of the file."""
        return _padded(sum(map(_bytes, self.videos)) + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)

    @property
    def digest(self) -> str:
        """What tells it from a shard of other videos."""
        return hashlib.sha256(repr([tuple(video) for video in self.videos]).encode()).hexdigest()

    @property
    def entries(self) -> Iterator[tuple[str, str]]:
        """Each video's name, and how lists name it in the shard."""
        place = 0
        for video in self.videos:
            start = place + len(_header(video.member, video.size))
            yield video.name, f"tar://{video.member}::{self.path}#bytes={start},{video.size}"
            place += _bytes(video)

    def write(self, file: Path, read: Callable[[str], Iterable[bytes]]) -> None:
        """Writes it; `read` gives the content of the file that lists name."""
        with open(file, "wb") as tar:
            for video in self.videos:
                parts = [(video.member, video.size, read(video.name))]
                parts += [(video.note, len(video.content), [video.content])] if video.note else []
                for name, size, content in parts:
                    tar.write(_header(name, size))
                    start = tar.tell()
                    for block in content:
                        still_alive()
                        tar.write(block)
                    if tar.tell() != start + size:
                        raise OSError(errno.EIO, f"{video.name} has changed: {tar.tell() - start} bytes, not {size}")
                    tar.write(bytes(_padded(size) - size))
            tar.write(bytes(self.size - tar.tell()))


def plan(split: str, videos: Iterable[Packed], most_bytes: int) -> list[Shard]:
    """The shards of a split, each of at most so many bytes or of one video."""
    groups, room = list[list[Packed]](), 0
    for video in videos:
        room -= _bytes(video)
        if room < 0 or not groups:
            groups.append([])
            room = most_bytes - tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE - _bytes(video)
        groups[-1].append(video)
    return [Shard(f"shards/{split}-{number:05d}.tar", group) for number, group in enumerate(groups)]
