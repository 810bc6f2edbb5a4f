"""The index of a data set: what is known of every video before it is opened, in one file that processes share."""

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
# MAGIC, the numbers of videos and of all key frames, and columns: names as hashes in ascending order, frames, fps,
# durations, bytes, mtimes, and ends of the videos' parts of the last one, the seconds of all key frames.
MAGIC = b"octvideo index 2"
SPLICED = -1.0  # in place of all key frames: timestamps start again within the file, and lead to no frame
COLUMNS = ("<u8", "<i8", "<f8", "<f8", "<i8", "<i8", "<i8", "<f8")
HEADER_BYTES = len(MAGIC) + 16


class IndexedVideo(NamedTuple):
    """What is known of a video; a file of another size or mtime is not the one that was indexed."""

    frames: int  # that can be decoded
    fps: float  # average frames per second
    duration_seconds: float  # from the start of the first frame to the end of the last one
    keyframe_seconds: NDArray[np.float64]  # when key frames are shown, from the first frame on, ascending; or SPLICED
    bytes: int  # 0: not compared
    mtime_ns: int = 0  # the file's st_mtime_ns; 0 for files that `prepare` has written

    @property
    def is_spliced(self) -> bool:
        """Whether timestamps start again within the file."""
        return bool((self.keyframe_seconds[:1] == SPLICED).any())


def write_index(folder: str | os.PathLike[str], videos: Mapping[str, IndexedVideo]) -> None:
    """Writes index.bin in a folder, atomically, from what is known of each video by its path in the list files."""
    names = _hashes(videos)
    order = np.argsort(names)
    assert (np.diff(names[order]) > 0).all(), "two paths have one 64-bit hash"
    values, scalars = list(videos.values()), ("frames", "fps", "duration_seconds", "bytes", "mtime_ns")
    known = [values[row] for row in order]
    keyframes = np.concatenate([np.empty(0), *(video.keyframe_seconds for video in known)])
    ends = np.cumsum([len(video.keyframe_seconds) for video in known])
    columns = (names[order], *([getattr(video, name) for video in known] for name in scalars), ends, keyframes)
    parts = [np.asarray(column).astype(dtype).tobytes() for column, dtype in zip(columns, COLUMNS, strict=True)]
    with appearing(Path(folder) / FILE) as partial:
        partial.write_bytes(b"".join([MAGIC, np.array([len(known), len(keyframes)], "<i8").tobytes(), *parts]))


class VideoIndex:
    """An index file, mapped into memory: processes share it, and a look-up touches a few pages whatever its length."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            data = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:  # numpy refuses to map an empty file
            raise IndexFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        sizes = data[len(MAGIC) : HEADER_BYTES].view("<i8") if len(data) >= HEADER_BYTES else (0, 0)
        ends = int(sizes[0]) * np.arange(1, len(COLUMNS))  # of all columns but the last, in numbers of eight bytes
        if data[: len(MAGIC)].tobytes() != MAGIC or len(data) != HEADER_BYTES + 8 * (ends[-1] + int(sizes[1])):
            raise IndexFileError(f"{path}: not a complete index of this version; run tools/prepare_data.py again")
        columns = np.split(np.asarray(data[HEADER_BYTES:]).view("<i8"), ends)
        self._columns = [column.view(dtype) for column, dtype in zip(columns, COLUMNS, strict=True)]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)  # another process maps the file anew

    def __len__(self) -> int:
        return len(self._columns[0])

    def rows(self, paths: Iterable[str]) -> NDArray[np.int64]:
        """The row of each path, as the list files name it; -1 for videos that are not in the index."""
        wanted, names = _hashes(paths), self._columns[0]
        rows = np.searchsorted(names, wanted)
        return np.where(np.searchsorted(names, wanted, "right") > rows, rows, -1)

    def __getitem__(self, row: int) -> IndexedVideo:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be 0 to {len(self) - 1}, got {row}")
        _, frames, fps, seconds, size, mtime_ns, end = (column[row].item() for column in self._columns[:-1])
        keyframes = self._columns[-1][int(self._columns[-2][row - 1]) if row else 0 : end]
        return IndexedVideo(frames, fps, seconds, keyframes, size, mtime_ns)


def _hashes(paths: Iterable[str]) -> NDArray[np.uint64]:
    """64 bits for each path: two of a million paths meet once in forty million data sets."""
    digests = [hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths]
    return np.frombuffer(b"".join(digests), "<u8")
