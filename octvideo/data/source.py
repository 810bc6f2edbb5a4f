"""Where videos come from: what the entries of lists name, and how each is opened."""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import re
import stat
import tarfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from octvideo import stores
from octvideo.data.index import IndexedVideo
from octvideo.errors import DecodeError, StoreError, UserError
from octvideo.files import PARTIAL, lock
from octvideo.stores import is_uri

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}  # the files of a folder of frames
SPAN = re.compile(r"#t=(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?$")  # as in W3C's Media Fragments
MEMBER = re.compile(r"tar://(?P<member>.+)::(?P<shard>.+?)(?:#bytes=(?P<start>\d+),(?P<size>\d+))?$")
ROW = re.compile(r"(hf://.+)[?&]row=(\d+)$")
# A file up to this size is read by one request: for a clip out of ten seconds that is faster than several parts of it.
WHOLE_BYTES = 16 * 2**20
PART_BYTES, PARTS_KEPT = 4 * 2**20, 16  # of larger ones
HEADER_BYTES = 512  # before a member of a tar file
MOST_NOTE_BYTES, NOTES = 2**16, (".cls", ".json", ".txt")  # of members that are read on the way
CLEANING_SHARE = 0.02  # of its bound, which a process writes into the cache between two looks at its size


class Media(ABC):
    """A video that a source has found.

    Args:
        name: the list's entry.
        known: what an index knows of it; None if nothing, or if the file has changed since.
    """

    def __init__(self, name: str, known: IndexedVideo | None = None) -> None:
        self.name, self.known = name, known

    @abstractmethod
    def open(self) -> str | BinaryIO:
        """The path of a local file, or a new file object that can seek, of an encoded video."""


class LocalFile(Media):
    """A file that its path opens."""

    def open(self) -> str:
        return os.path.abspath(self.name)  # a relative path with a colon is an address, for FFmpeg


class Ranges(Media):
    """The bytes of an encoded video behind a function that reads them from a start to an end; the last ones are kept.

    Args:
        size: bytes in all.
    """

    def __init__(
        self, name: str, size: int, read: Callable[[int, int], bytes], known: IndexedVideo | None = None
    ) -> None:
        super().__init__(name, known)
        self.size, self.part_bytes = size, size if size <= WHOLE_BYTES else PART_BYTES
        self.read = functools.lru_cache(PARTS_KEPT)(read)

    def open(self) -> BinaryIO:
        return io.BufferedReader(_RangeFile(self), 2**16)


class _RangeFile(io.RawIOBase):
    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self._ranges, self._place = ranges, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._ranges.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        size, part = self._ranges.size, self._ranges.part_bytes
        if not 0 <= self._place < size:
            return 0
        start = self._place // part * part
        content = self._ranges.read(start, min(start + part, size))
        found = content[self._place - start : self._place - start + len(buffer)]
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


class Pictures(Media):
    """A video as a folder of numbered pictures, local or remote.

    Args:
        files: names of the pictures in the folder, in the order of time.
        fps: pictures a second.
    """

    def __init__(self, name: str, files: list[str], fps: float) -> None:
        super().__init__(name)
        self.files, self.fps = files, fps

    def open(self) -> str:
        raise DecodeError(self.name, "a folder of frames, not a video file")

    def picture(self, number: int) -> bytes:
        """The content of a picture's file."""
        return stores.read(stores.child(self.name, self.files[number]))


class Source(ABC):
    """Finds videos by the entries of lists. To bring another: a subclass, named by `data.source`.

    It must give the same video for the same entry whenever and wherever it is asked, in any process: exact resuming
    rests on that. It is pickled on the way to other processes.
    """

    @abstractmethod
    def find(self, name: str, known: IndexedVideo | None = None) -> Media:
        """The video that an entry names, which an index may know.

        Raises FileNotFoundError or DecodeError for a bad entry, and StoreError where the source cannot be used at all.
        """

    def expect(self, name: str, known: IndexedVideo | None = None) -> None:  # noqa: B027
        """Told which entry will be asked for next, so that reading it can begin."""

    def check(self, name: str) -> None:  # noqa: B027
        """Raises StoreError, soon, where what holds an entry cannot be used; called once before a run starts."""


class AnySource(Source):
    """Local files, folders of frames, URIs, members of tar files, and rows of Hugging Face data sets.

    Args:
        frames_fps: frames a second of folders of frames.
        cache: folder on this machine for what is read from stores, shared by its processes; None: nothing is kept.
        cache_gb: most gigabytes in it; what was used longest ago goes first.
    """

    def __init__(self, frames_fps: float = 25.0, cache: str | None = None, cache_gb: float = 50.0) -> None:
        for name, value in (("frames_fps", frames_fps), ("cache_gb", cache_gb)):
            if not value > 0:
                raise UserError(f"{name} must be positive, got {value}")
        self.frames_fps, self._cache = frames_fps, Cache(Path(cache), cache_gb * 1e9) if cache else None

    def check(self, name: str) -> None:
        uri = name.rpartition("::")[2].partition("#")[0]
        if is_uri(uri) and not ROW.match(uri):
            stores.check(uri)

    def find(self, name: str, known: IndexedVideo | None = None) -> Media:
        if match := MEMBER.match(name):
            return self._member(name, match, known)
        if match := ROW.match(name):
            content = _row(match[1], int(match[2]))
            return Ranges(name, len(content), lambda start, end: content[start:end], known)
        if is_uri(name):
            try:
                return self._remote(name, known)
            except PermissionError as error:
                if name.startswith("http"):  # each address has rights of its own
                    raise
                why = f"no access to {name}, or, where listing is not allowed either, no such file: {error}"
                raise StoreError(why) from error
        found = os.stat(name)
        if stat.S_ISDIR(found.st_mode):
            return Pictures(name, frames_of(name, os.listdir(name)), self.frames_fps)
        if stat.S_ISCHR(found.st_mode):
            raise DecodeError(name, "a device, not a video file")
        return LocalFile(name, _if_same(known, stores.Stat(found.st_size, found.st_mtime_ns)))

    def expect(self, name: str, known: IndexedVideo | None = None) -> None:
        name = SPAN.sub("", name)
        if (match := MEMBER.match(name)) is not None and match["start"] and int(match["size"]) <= WHOLE_BYTES:
            start = int(match["start"])
            uri, start, end = match["shard"], start - HEADER_BYTES, start + int(match["size"])
        elif match is None and known is not None and known.bytes <= WHOLE_BYTES:
            uri, start, end = name, 0, known.bytes + 1
        else:
            return
        kept = self._cache is not None and self._cache.has(uri if match is None else (uri, start, end))
        if is_uri(uri) and not kept:
            stores.read_ahead(uri, start, end)

    def version(self, name: str) -> stores.Stat:
        """What tells the file, the member or the folder of frames that an entry names from its earlier versions."""
        if not (match := MEMBER.match(name)) and not ROW.match(name) and not os.path.isdir(name):
            with contextlib.suppress(IsADirectoryError):
                return stores.stat(name)
        media = self.find(name)
        if isinstance(media, Pictures):
            found = [stores.stat(stores.child(name, file)) for file in media.files]
            return stores.Stat(sum(one.bytes for one in found), max(one.mtime_ns for one in found))
        return stores.Stat(getattr(media, "size", 0), stores.stat(match["shard"]).mtime_ns if match else 0)

    def _remote(self, uri: str, known: IndexedVideo | None) -> Media:
        if known is not None and known.bytes <= WHOLE_BYTES:  # one more byte would tell that it has grown
            content = self._kept(uri, known.bytes, lambda: stores.read(uri, 0, known.bytes + 1))
            if len(content) == known.bytes:
                return Ranges(uri, known.bytes, lambda start, end: content[start:end], known)
        try:
            found = stores.stat(uri)
        except (FileNotFoundError, IsADirectoryError) as error:
            missing = isinstance(error, FileNotFoundError) and os.path.splitext(uri)[1]
            if missing or not (names := [*stores.files_below(uri)]):
                raise
            return Pictures(uri, frames_of(uri, [name for name in names if "/" not in name]), self.frames_fps)
        if not found.bytes:  # a web server that tells no size
            content = stores.read(uri)
            return Ranges(uri, len(content), lambda start, end: content[start:end])

        def read(start: int, end: int) -> bytes:
            return self._kept((uri, found, start), end - start, lambda: stores.read(uri, start, end))

        return Ranges(uri, found.bytes, read, _if_same(known, found))

    def _member(self, name: str, match: re.Match[str], known: IndexedVideo | None) -> Media:
        member, shard = match["member"], match["shard"]
        start, size = int(match["start"] or 0), int(match["size"] or 0)
        if not start:
            places = members(shard)
            if member not in places:
                raise DecodeError(name, f"{shard} has no such member")
            start, size, _ = places[member]

        def read(first: int, last: int) -> bytes:
            # With the header before it, one request tells whether this is the member that was meant.
            front = HEADER_BYTES if first == 0 else 0
            whole = first - front + start, last + start
            content = self._kept((shard, *whole), last - first + front, lambda: stores.read(shard, *whole))
            if front and not _is_header_of(content[:HEADER_BYTES], member, size):
                raise DecodeError(name, f"{shard} has changed: another member is there")
            return content[front:]

        return Ranges(name, size, read, known if known is not None and known.bytes == size else None)

    def _kept(self, key: object, size: int, read: Callable[[], bytes]) -> bytes:
        """The bytes from the cache if there is one, else read, and kept if they are as many as expected."""
        if self._cache is None:
            return read()
        if (content := self._cache.get(key, size)) is None:
            content = read()
            if len(content) == size:
                self._cache.put(key, content)
        return content


def _if_same(known: IndexedVideo | None, found: stores.Stat) -> IndexedVideo | None:
    """What is known, if it is of the version of a file that was found."""
    same = known is not None and known.bytes in (0, found.bytes) and known.mtime_ns in (0, found.mtime_ns)
    return known if same else None


class Cache:
    """Bytes in files of a folder, which is bounded, shared by processes, and survives them."""

    def __init__(self, folder: Path, most_bytes: float) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._unseen = most_bytes  # written since this process last looked at the size of all

    def _path(self, key: object) -> Path:
        name = hashlib.sha256(repr(key).encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def get(self, key: object, size: int) -> bytes | None:
        """What was put there, if it is whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return content if len(content) == size else None

    def has(self, key: object) -> bool:
        """Whether something was put there."""
        return self._path(key).exists()

    def put(self, key: object, content: bytes) -> None:
        """Keeps bytes, and makes room for them; a full disk keeps nothing."""
        path = self._path(key)
        temporary = path.with_name(f".{os.getpid()}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if (unseen := self._unseen + len(content)) > CLEANING_SHARE * self.most_bytes:
                self._make_room(len(content))
                unseen = 0
            self._unseen = unseen
            temporary.write_bytes(content)  # torn by a crash of the machine, it has another size, and is read anew
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        if (locked := lock(self.folder / ".lock")) is None:
            return  # another process is at it
        with locked:
            found = []
            for folder in os.scandir(self.folder):
                for file in os.scandir(folder) if folder.is_dir() else ():
                    status = file.stat()
                    found.append((status.st_mtime_ns, status.st_size, file.path))
            # The other processes may write as much before they look.
            room = self.most_bytes * (1 - 5 * CLEANING_SHARE) - needed
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found) if total > room else ():
                os.unlink(path)
                total -= size
                if total <= room:
                    break


def frames_of(folder: str, names: Iterable[str]) -> list[str]:
    """The numbered pictures of a folder in the order of their numbers; of several kinds, those that are not flow_x ...

    DecodeError if there are none, if frames are missing, or if it cannot be told which they are.
    """
    kinds = defaultdict[tuple[str, str], dict[int, str]](dict)
    for name in names:
        match = re.fullmatch(r"(.*?)(\d+)(\.\w+)", name)
        if match and match[3].lower() in PICTURES and not name.startswith((".", "flow")):
            kinds[match[1], match[3]][int(match[2])] = name
    if not kinds:
        raise DecodeError(folder, "a folder without numbered pictures")
    if len(kinds) > 1:
        seen = ", ".join(f"{prefix}*{suffix}" for prefix, suffix in sorted(kinds))
        raise DecodeError(folder, f"a folder of several kinds of frames: {seen}")
    numbered = next(iter(kinds.values()))
    numbers = sorted(numbered)
    steps = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    if len(steps) > 1:
        gap = next(n for n, later in itertools.pairwise(numbers) if later - n > min(steps))
        raise DecodeError(folder, f"frames are missing after {numbered[gap]}")
    return [numbered[number] for number in numbers]


def split_span(name: str) -> tuple[str, float, float | None]:
    """An entry without its span #t=START,END, and the span in seconds; END is None for the video's end."""
    match = SPAN.search(name)
    if match is None or match[0] == "#t=" or (not is_uri(name) and os.path.exists(name)):
        return name, 0.0, None
    return name[: match.start()], float(match[1] or 0), None if match[2] is None else float(match[2])


def _is_header_of(header: bytes, member: str, size: int) -> bool:
    """Whether 512 bytes are what comes before a member in a tar; other formats than GNU's may spell its name anew."""
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    is_gnu = header[257:265] == tarfile.GNU_MAGIC
    return found.size == size and (not is_gnu or os.fsencode(member)[:100] == os.fsencode(found.name)[:100])


class Member(NamedTuple):
    """Where a file in a tar is."""

    start: int
    size: int
    note: bytes  # its content, if that is short


@functools.lru_cache(maxsize=256)
def members(shard: str) -> dict[str, Member]:
    """The files in a local or remote tar, by name. DecodeError if it is no tar file, or a compressed one."""
    size = stores.stat(shard).bytes
    parts = functools.lru_cache(8)(lambda start, end: stores.read(shard, start, end))
    ranges = Ranges(shard, size, parts)
    ranges.part_bytes = 2**14 if is_uri(shard) else 2**20
    try:
        with tarfile.open(fileobj=ranges.open(), mode="r:") as tar:
            found = {}
            for entry in filter(tarfile.TarInfo.isfile, tar):
                is_note = entry.size <= MOST_NOTE_BYTES and entry.name.lower().endswith(NOTES)
                note = tar.extractfile(entry) if is_note else None
                found[entry.name] = Member(entry.offset_data, entry.size, note.read() if note else b"")
            return found
    except tarfile.TarError as error:
        raise DecodeError(shard, f"not an uncompressed tar file: {error}") from error


def _row(name: str, row: int) -> bytes:
    """The encoded video in a row of a Hugging Face data set."""
    rows, column = open_rows(name)
    video: dict[str, Any] = rows[row][column]
    if video["bytes"] is not None:
        return bytes(video["bytes"])
    return stores.read(str(video["path"]))


@functools.lru_cache(maxsize=8)
def open_rows(name: str) -> tuple[Any, str]:
    """A Hugging Face data set, hf://NAME or hf://NAME?split=SPLIT, whose videos stay encoded, and their column.

    A NAME that is a local folder is read from there. UserError if it cannot be had, or has no column of videos.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs datasets: pip install 'octvideo[datasets]'") from error
    path, _, query = name.removeprefix("hf://").partition("?")
    split = query.removeprefix("split=") or "train"
    saved = any((Path(path) / file).exists() for file in ("dataset_info.json", "dataset_dict.json", "state.json"))
    try:
        found: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split)
        found = found[split] if isinstance(found, dict) else found
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
    columns = [key for key, feature in found.features.items() if isinstance(feature, datasets.Video)]
    if len(columns) != 1:
        raise UserError(f"{name} must have one column of videos, got {', '.join(found.features)}")
    return found.cast_column(columns[0], datasets.Video(decode=False)), columns[0]
