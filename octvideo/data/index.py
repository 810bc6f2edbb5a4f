"""The index of a data set: what is known of every video before it is opened, in one file that processes share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octvideo.errors import IndexFileError
from octvideo.files import appearing

FILE = "index.bin"
# A file is these bytes, the numbers N of videos and K of key frames, and the columns; eight bytes a number.
MAGIC = b"octvideo index 2"
COLUMNS = {
    "names": "<u8",  # N hashes of paths, in ascending order
    "frames": "<i8",
    "fps": "<f8",
    "durations": "<f8",
    "sizes": "<i8",
    "mtimes": "<i8",
    "ends": "<i8",  # where the videos' parts of the last column end
    "keyframes": "<f8",  # K
}


class IndexedVideo(NamedTuple):
    """What the index knows of a video.

    Args:
        frames: how many can be decoded.
        fps: average frame rate, in frames per second.
        duration_seconds: from the start of the first frame to the end of the last one.
        keyframe_seconds: when its K key frames are shown, in seconds from the first frame, ascending.
        bytes: size of the file; another size tells that it is not the file that was indexed.
        mtime_ns: time of the file's last change, in nanoseconds as os.stat has it, which tells the same; 0 of a file
            that preparing has written, whose time is no part of what it is.
    """

    frames: int
    fps: float
    duration_seconds: float
    keyframe_seconds: NDArray[np.float64]
    bytes: int
    mtime_ns: int = 0


def write_index(folder: str | os.PathLike[str], videos: Mapping[str, IndexedVideo]) -> None:
    """Writes the index of a data set; a reader sees the former index or the new one, never a part.

    Args:
        folder: where the file index.bin appears.
        videos: what is known of each video, by its path as list files have it.
    """
    paths = list(videos)
    names = _hashes(paths)
    order = np.argsort(names)
    assert (np.diff(names[order]) > 0).all(), "two paths of one 64-bit hash"
    known = [videos[paths[row]] for row in order]
    lengths = [len(video.keyframe_seconds) for video in known]
    values = (
        names[order],
        [video.frames for video in known],
        [video.fps for video in known],
        [video.duration_seconds for video in known],
        [video.bytes for video in known],
        [video.mtime_ns for video in known],
        np.cumsum(lengths),
        np.concatenate([np.empty(0), *(video.keyframe_seconds for video in known)]),
    )
    with appearing(Path(folder) / FILE) as partial, open(partial, "wb") as file:
        file.write(MAGIC)
        file.write(np.array([len(paths), sum(lengths)], "<i8").tobytes())
        for dtype, column in zip(COLUMNS.values(), values, strict=True):
            file.write(np.asarray(column).astype(dtype).tobytes())


class VideoIndex:
    """An index, mapped into memory: processes share it, and a look-up touches a few pages whatever its length.

    Args:
        path: the file.

    Raises:
        IndexFileError: no index, or not a whole one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            data = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:  # numpy refuses to map an empty file
            raise IndexFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        start = len(MAGIC) + 16
        sizes = data[len(MAGIC) : start].view("<i8") if len(data) >= start else (0, 0)
        count, keyframes = int(sizes[0]), int(sizes[1])
        length = start + 8 * (count * (len(COLUMNS) - 1) + keyframes)
        if data[: len(MAGIC)].tobytes() != MAGIC or len(data) != length:
            raise IndexFileError(f"{path}: no whole index of this version; run tools/prepare_data.py again")
        columns = {}
        for name, dtype in COLUMNS.items():
            end = start + 8 * (keyframes if name == "keyframes" else count)
            columns[name] = np.asarray(data[start:end]).view(dtype)
            start = end
        self._columns = columns

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> VideoIndex:
        """The index of a prepared data set: the file index.bin in its folder."""
        return cls(Path(folder) / FILE)

    def __reduce__(self) -> tuple[type[VideoIndex], tuple[Path]]:
        return type(self), (self.path,)  # another process maps the file anew

    def __len__(self) -> int:
        return len(self._columns["names"])

    def rows(self, paths: Iterable[str]) -> NDArray[np.int64]:
        """The row of each path, as list files have it; -1 for videos that are not in the index."""
        wanted = _hashes(paths)
        names = self._columns["names"]
        if not len(names):
            return np.full(len(wanted), -1, np.int64)
        rows = np.searchsorted(names, wanted).astype(np.int64)
        found = names[np.minimum(rows, len(names) - 1)] == wanted
        return np.where(found, rows, -1)

    def find(self, path: str) -> int | None:
        """The row of a path, as list files have it, or None."""
        row = int(self.rows([path])[0])
        return None if row < 0 else row

    def __getitem__(self, row: int) -> IndexedVideo:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be 0 to {len(self) - 1}, got {row}")
        columns = self._columns
        start = int(columns["ends"][row - 1]) if row else 0
        return IndexedVideo(
            int(columns["frames"][row]),
            float(columns["fps"][row]),
            float(columns["durations"][row]),
            columns["keyframes"][start : int(columns["ends"][row])],
            int(columns["sizes"][row]),
            int(columns["mtimes"][row]),
        )


def _hashes(paths: Iterable[str]) -> NDArray[np.uint64]:
    """64 bits for each path: two of a million paths meet once in forty million data sets."""
    digests = [hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths]
    return np.frombuffer(b"".join(digests), "<u8")
