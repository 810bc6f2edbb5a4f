"""List files and folders: which videos there are, and their classes."""

import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from octvideo import stores
from octvideo.data.source import MEMBER, SPAN, members, open_rows
from octvideo.errors import ListError
from octvideo.stores import is_uri

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic"}
# FFmpeg would open text files and pictures as videos.
NOT_VIDEOS = {".txt", ".csv", ".json", ".md", ".xml", ".srt", ".vtt"} | PICTURES
HEADERS = {"path", "file", "filename", "video"}  # how the first line of a list starts if it is a header
MOST_CLASSES = 2**31
BESIDE = {"cls", "json", "txt"}  # extensions of what is beside a video in a tar file


class Paths(Sequence[str]):
    """File paths as bytes of one tensor: counting references to strings would copy them in every worker process."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
        self._ends = torch.tensor([len(path) for path in encoded], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:  # an index, or a slice
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        start = int(self._ends[i - 1]) if i > 0 else 0
        return os.fsdecode(self._bytes[start : int(self._ends[i])].numpy().tobytes())


class VideoList(NamedTuple):
    """The paths of N videos and their N class numbers, from 0, or shares (N, num_classes) of the classes."""

    paths: Sequence[str]
    labels: NDArray[Any]  # int64, or float32 where a list has several classes of a video

    def class_counts(self, num_classes: int) -> NDArray[np.float64]:
        """(num_classes,) videos of each class, parts of them where there are shares."""
        counts = self.labels.sum(0) if self.labels.ndim > 1 else np.bincount(self.labels, minlength=num_classes)
        return counts.astype(np.float64)

    def chances(self, num_classes: int) -> NDArray[np.float64]:
        """(N,) how likely each video is to be drawn, as its rarest class is rare: so all classes are as frequent."""
        rarity = 1 / np.maximum(self.class_counts(num_classes), 1)
        chances = rarity[self.labels] if self.labels.ndim == 1 else (self.labels * rarity).max(1)
        chances = np.where(chances > 0, chances, 1 / len(self.labels))  # videos of no class
        return np.asarray(chances / chances.sum(), np.float64)


def read_list(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    separator: str = " ",
    header: bool = False,
    num_classes: int | None = None,
    task: str = "single",
) -> VideoList:
    """Reads a list file in UTF-8: on each line a video's path and its class number. Blank lines are skipped.

    Relative paths start from `root`, by default the current folder. The last separator on a line counts, so paths may
    contain it. With a header the first line is skipped. Class numbers must be below num_classes if that is given.

    A path with an extension may have a span: `path 3 12.5 20` is class 3 from second 12.5 to 20, as in the entry
    path#t=12.5,20. The list may be a URI, too; or tar files of webdataset's layout (train-{000..017}.tar), with a .cls
    or .json beside each video; or a Hugging Face data set, hf://NAME?split=train, with a column `label`.

    For task "multi" a video has any number of classes, `path 3,17`, or `path -` for none. For task "single" it may have
    shares of several that add up to 1, `path 3:0.7,17:0.3`. Both need num_classes.

    Raises ListError for a file that is missing or empty, or has another kind of line.
    """
    most = MOST_CLASSES if num_classes is None else num_classes
    form = {"single": r"-?\d+|-?\d+:[\d.]+(,-?\d+:[\d.]+)*", "multi": r"-|-?\d+(,-?\d+)*"}[task]
    what = "class number" if task == "single" else "class numbers with commas between them"
    paths, entries, line_of = [], [], repr(f"path{separator}{what}")  # shows what a tab is
    named = os.fspath(path)
    lines = _rows(named) if named.startswith("hf://") else _shards(named) if named.endswith(".tar") else None
    if lines is not None:
        separator, header = " ", False
    for number, line in enumerate(read_lines(path) if lines is None else lines, 1):
        if not line.strip() or (header and number == 1):
            continue
        video, _, text = (entry.strip() for entry in without_span(line.strip(), separator).rpartition(separator))
        if not video or not re.fullmatch(form, text):
            raise ListError(f"{path}:{number}: expected {line_of}, got {line!r}")
        shares = dict(_share(part) for part in text.split(",") if part != "-")
        for label in shares:
            if not 0 <= label < most:
                allowed = f"0 to {most - 1}" + ("" if num_classes is None else f" (num_classes is {num_classes})")
                raise ListError(f"{path}:{number}: class number must be {allowed}, got {label}")
        if task == "single" and abs(sum(shares.values()) - 1) > 1e-3:
            raise ListError(f"{path}:{number}: shares of the classes must add up to 1, got {text}")
        paths.append(video if root is None else rooted(root, video))
        entries.append(shares)
    if not paths:
        raise ListError(f"{path}: no video in it; expected lines of {line_of}")
    if task == "single" and all(len(shares) == 1 for shares in entries):
        return VideoList(Paths(paths), np.array([next(iter(shares)) for shares in entries], dtype=np.int64))
    if num_classes is None:
        raise ListError(f"{path}: videos of several classes need num_classes")
    labels = np.zeros((len(entries), num_classes), np.float32)
    for row, shares in zip(labels, entries, strict=True):
        row[list(shares)] = list(shares.values())
    return VideoList(Paths(paths), labels)


def _share(text: str) -> tuple[int, float]:
    """A class and its share of a video: 3:0.7, or 3 for all of it."""
    label, _, share = text.partition(":")
    return int(label), float(share or 1)


def without_span(line: str, separator: str) -> str:
    """A line `path label start end` as `path#t=start,end label`."""
    between = re.escape(separator)
    match = re.fullmatch(rf"(.*\.\w{{2,5}}\s*){between}([\d:.,-]+){between}([\d.]+){between}([\d.]+)", line)
    return f"{match[1].strip()}#t={match[3]},{match[4]}{separator}{match[2]}" if match else line


def may_be_list(path: str) -> bool:
    """Whether a path is worth reading as a list: a file that is there, or what only reading tells of."""
    return is_uri(path) or path.endswith(".tar") or os.path.isfile(path)


def check_there(path: str, videos: Sequence[str], root: str | None) -> None:
    """Raises ListError where none of up to ten videos all over a list is there, as with a wrong root."""
    numbers = np.linspace(0, len(videos) - 1, min(len(videos), 10)).astype(int)
    some = [SPAN.sub("", videos[number]) for number in numbers]
    if not any(is_uri(video) or MEMBER.match(video) or os.path.exists(video) for video in some):
        where = f"below --data.root {root}" if root else "from this folder, as there is no --data.root"
        raise ListError(f"{path}: none of its videos was found {where}: there is no {some[0]}")


def rooted(root: str | os.PathLike[str], video: str) -> str:
    """An entry whose relative path starts from a folder, local or remote; the others stay."""
    if match := MEMBER.match(video):
        return video.replace(f"::{match['shard']}", f"::{rooted(root, match['shard'])}")
    return video if is_uri(video) else stores.child(root, video)


def _shards(pattern: str) -> Iterator[str]:
    """Lines for the videos in tar files: a member's extension is what follows the first dot, as in webdataset."""
    for shard in stores.expand(pattern):
        for key, group in itertools.groupby(members(shard).items(), lambda item: re.sub(r"\.[^/]*$", "", item[0])):
            found = {name[len(key) + 1 :].lower(): (name, member) for name, member in group}
            label, spans = found["cls"][1].note.decode() if "cls" in found else "missing", []
            if "json" in found:
                about = json.loads(found["json"][1].note or b"{}")
                label, spans = str(about.get("cls", about.get("label", label))), about.get("spans", [])
            for name, (start, size, _) in (item for suffix, item in found.items() if suffix not in BESIDE):
                entry = f"tar://{name}::{shard}#bytes={start},{size}"
                for first, last, of_span in spans or [(None, None, label.strip())]:
                    span = "" if first is None else f"#t={first}" if last is None else f"#t={first},{last}"
                    yield f"{entry}{span} {of_span}"


def _rows(name: str) -> Iterator[str]:
    """Lines for the videos of a Hugging Face data set."""
    rows, _ = open_rows(name)
    if "label" not in rows.features:
        raise ListError(f"{name}: no column 'label', only {', '.join(rows.features)}")
    mark = "&" if "?" in name else "?"
    for row, label in enumerate(rows["label"]):
        yield f"{name}{mark}row={row} {','.join(map(str, label)) if isinstance(label, list) else label}"


def read_class_names(path: str | os.PathLike[str], num_classes: int | None = None) -> list[str]:
    """Reads class names from a text file, one on each line, class 0 first; ListError if there are not num_classes."""
    names = [line.strip() for line in "\n".join(read_lines(path)).rstrip().split("\n")]
    if "" in names:
        number = names.index("")
        raise ListError(f"{path}:{number + 1}: expected the name of class {number}, got an empty line")
    if num_classes is not None and len(names) != num_classes:
        raise ListError(f"{path}: expected a line for each of {num_classes} classes (num_classes), got {len(names)}")
    return names


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte-order mark; ListError if it cannot be read."""
    try:
        content = stores.read(path)
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "not a text file in UTF-8"
        raise ListError(f"{path}: {reason}") from error


def video_files(
    folder: str | os.PathLike[str], *, skip: Collection[tuple[int, int]] = (), frames: bool = False
) -> list[str]:
    """Paths, relative to a folder or URI, of the files at any depth below it that may be videos, sorted by name.

    Hidden files, files without an extension, text files and pictures are left out, except that, with `frames`, a folder
    of numbered pictures alone is a video. Folders whose (device, inode) are in `skip` are not entered, nor is a link to
    a folder that contains it. ListError if a folder cannot be read.
    """
    names = stores.files_below(folder) if is_uri(folder := os.fspath(folder)) else _files(folder, skip)
    visible = sorted(tuple(name.split("/")) for name in names if not name.startswith(".") and "/." not in name)
    suffixes = {parts: os.path.splitext(parts[-1])[1].lower() for parts in visible}
    found = [parts for parts, suffix in suffixes.items() if suffix and suffix not in NOT_VIDEOS]
    if frames:
        others = {parts[:-1][:n] for parts in found for n in range(len(parts))} | {()}
        others |= {parts[:-2][:n] for parts in suffixes for n in range(len(parts) - 1)}
        kept = (parts for parts, kind in suffixes.items() if kind in PICTURES and re.search(r"\d\.\w+$", parts[-1]))
        found = sorted({*found, *(parts[:-1] for parts in kept if parts[:-1] not in others)})
    return ["/".join(parts) for parts in found]


def _files(folder: str, skip: Collection[tuple[int, int]]) -> Iterator[str]:
    try:
        status, children = os.stat(folder), list(os.scandir(folder))
    except OSError as error:
        raise ListError(f"{folder}: {error.strerror}") from error
    here = (status.st_dev, status.st_ino)
    for child in children if here not in skip else ():
        if child.is_dir() and not child.name.startswith("."):
            yield from (f"{child.name}/{path}" for path in _files(child.path, (*skip, here)))
        elif not child.is_dir():
            yield child.name
