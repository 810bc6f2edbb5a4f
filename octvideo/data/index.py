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
# The file: MAGIC, the number N of videos, the number of all their key frames, COLUMNS of N numbers each in ascending
# order of the names, and the key frames' seconds. Numbers have eight bytes and the little end first.
MAGIC = b"octvideo index 2"
COLUMNS = ("names", "frames", "fps", "durations", "bytes", "mtimes", "ends")  # ends: of the videos' key frames
HEADER_BYTES = len(MAGIC) + 16


class IndexedVideo(NamedTuple):
    """What is known of a video.

    Args:
        frames: number of frames that can be decoded.
        fps: average frame rate, in frames per second.
        duration_seconds: from the start of the first frame to the end of the last one.
        keyframe_seconds: when its K key frames are shown, in seconds from the first frame, ascending.
        bytes: size of the file; a file of another size is not the one that was indexed.
        mtime_ns: st_mtime_ns of the file, whose change tells the same; 0 for files that `prepare` has written.
    """

    frames: int
    fps: float
    duration_seconds: float
    keyframe_seconds: NDArray[np.float64]
    bytes: int
    mtime_ns: int = 0


def write_index(folder: str | os.PathLike[str], videos: Mapping[str, IndexedVideo]) -> None:
    """Writes index.bin in a folder, atomically, from what is known of each video by its path in the list files."""
    names = _hashes(videos)
    order = np.argsort(names)
    assert (np.diff(names[order]) > 0).all(), "two paths have one 64-bit hash"
    values = list(videos.values())
    known = [values[row] for row in order]
    columns = (
        names[order],
        np.array([video.frames for video in known], "<i8"),
        np.array([video.fps for video in known], "<f8"),
        np.array([video.duration_seconds for video in known], "<f8"),
        np.array([video.bytes for video in known], "<i8"),
        np.array([video.mtime_ns for video in known], "<i8"),
        np.cumsum([len(video.keyframe_seconds) for video in known], dtype="<i8"),
        np.concatenate([np.empty(0), *(video.keyframe_seconds for video in known)]).astype("<f8"),
    )
    header = MAGIC + np.array([len(known), len(columns[-1])], "<i8").tobytes()
    with appearing(Path(folder) / FILE) as partial:
        partial.write_bytes(header + b"".join(column.tobytes() for column in columns))


class VideoIndex:
    """An index file, mapped into memory: processes share it, and a look-up touches a few pages whatever its length.

    Raises:
        IndexFileError: the file is missing, truncated, or of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            data = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:  # numpy refuses to map an empty file
            raise IndexFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        sizes = data[len(MAGIC) : HEADER_BYTES].view("<i8") if len(data) >= HEADER_BYTES else (0, 0)
        count, keyframes = int(sizes[0]), int(sizes[1])
        length = HEADER_BYTES + 8 * (count * len(COLUMNS) + keyframes)
        if data[: len(MAGIC)].tobytes() != MAGIC or len(data) != length:
            raise IndexFileError(f"{path}: not a complete index of this version; run tools/prepare_data.py again")
        numbers = np.asarray(data[HEADER_BYTES:]).view("<i8")
        self._columns = dict(zip(COLUMNS, numbers[: count * len(COLUMNS)].reshape(len(COLUMNS), count), strict=True))
        self._keyframe_seconds = numbers[count * len(COLUMNS) :].view("<f8")

    def __reduce__(self) -> tuple[type[VideoIndex], tuple[Path]]:
        return type(self), (self.path,)  # another process maps the file anew

    def __len__(self) -> int:
        return len(self._columns["names"])

    def rows(self, paths: Iterable[str]) -> NDArray[np.int64]:
        """The row of each path, as the list files name it; -1 for videos that are not in the index."""
        wanted, names = _hashes(paths), self._columns["names"].view("<u8")
        rows = np.searchsorted(names, wanted)
        return np.where(np.searchsorted(names, wanted, "right") > rows, rows, -1)

    def __getitem__(self, row: int) -> IndexedVideo:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be 0 to {len(self) - 1}, got {row}")
        columns = self._columns
        start = int(columns["ends"][row - 1]) if row else 0
        return IndexedVideo(
            int(columns["frames"][row]),
            float(columns["fps"].view("<f8")[row]),
            float(columns["durations"].view("<f8")[row]),
            self._keyframe_seconds[start : int(columns["ends"][row])],
            int(columns["bytes"][row]),
            int(columns["mtimes"][row]),
        )


def _hashes(paths: Iterable[str]) -> NDArray[np.uint64]:
    """64 bits for each path: two of a million paths meet once in forty million data sets."""
    digests = [hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths]
    return np.frombuffer(b"".join(digests), "<u8")
