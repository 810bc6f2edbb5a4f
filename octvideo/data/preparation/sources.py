"""Sources of a data set: class folders, list files and official annotations, read into one list of videos."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from octvideo.data.lists import HEADERS, MOST_CLASSES, NOT_VIDEOS, read_class_names
from octvideo.errors import ListError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LISTS = ("train.csv", "val.csv", "test.csv")  # a folder that holds one of them is read as these lists
LABELS = "labels.txt"
PREFERRED = (".mp4", ".mkv", ".webm", ".avi")  # of several files with one name, in this order


class Entry(NamedTuple):
    """A video that a source names.

    Args:
        path: the file, from the folder of videos, or absolute if it lies elsewhere. Of a video that annotations name
            and that is not there, its name without an extension.
        label: class number, or None where the source has none, as the official test splits.
        split: train, val or test.
        note: what is doubtful about the source's line, or nothing.
    """

    path: str
    label: int | None
    split: str
    note: str = ""


class Catalogue(NamedTuple):
    """All videos of the sources, in their order, and the names of the classes."""

    entries: list[Entry]
    class_names: list[str]


class _Line(NamedTuple):
    """A source's line, its label not yet numbered; `place` is where it stands, for errors."""

    path: str
    label: str | None
    split: str
    place: str
    note: str = ""


class _Source(NamedTuple):
    """A source's lines. If their labels are class numbers, `numbered` says so, and `names` are the names beside it."""

    lines: list[_Line]
    numbered: bool = False
    names: list[str] | None = None


def read_sources(
    sources: Sequence[Path], videos: Path, *, labels: Path | None = None, output: Path | None = None
) -> Catalogue:
    """Reads folders, list files and annotations.

    - A folder per class, DIR/<class>/<video>, or DIR/{train,val,test}/<class>/<video>. Videos below the class folder
      count too, videos beside it have no label. Hidden files, files without an extension, texts and pictures do not
      count.
    - A list file with a line `path label` or `path,label` for each video, of the split that is a word in its name
      (kinetics_val_list.txt), else of train; or a folder with train.csv, val.csv or test.csv.
    - Kinetics' CSV files (a header with youtube_id, time_start and time_end) and its JSON files; the video is the file
      `<id>_<start, 6 digits>_<end, 6 digits>.*` anywhere below the folder of videos.
    - ActivityNet's JSON files; the video is `v_<id>.*` or `<id>.*`.

    Classes that a source numbers keep their numbers; names are in the file labels.txt beside it. Other classes are
    numbered in the alphabetical order of their names, as Kinetics' are.

    Args:
        sources: folders and files.
        videos: the folder of videos that relative paths start from.
        labels: text file that has the name of a class on each line, class 0 first, to number classes otherwise. Labels
            that it names, or labels.txt beside a list, may hold the separator of the list's lines.
        output: a folder that is no source of videos, wherever it lies.

    Raises:
        ListError: a source that cannot be read; the message names the file, and the line if there is one.
    """
    folder = _Folder(videos, output)
    given = read_class_names(labels) if labels is not None else None
    read = [one for source in sources for one in _read(source, folder, given)]
    names = _class_names(read) if given is None else given
    numbers = {name: number for number, name in enumerate(names)}
    entries = []
    for source in read:
        for path, label, split, place, note in source.lines:
            number = None
            if label is not None:
                number = int(label) if source.numbered else numbers.get(label, -1)
                if not 0 <= number < len(names):
                    raise ListError(
                        f"{place}: label {label!r} is none of the {len(names)} classes of {labels or LABELS}"
                    )
            entries.append(Entry(path, number, split, note))
    return Catalogue(entries, names)


def _class_names(sources: Sequence[_Source]) -> list[str]:
    """The names of classes 0, 1, 2 ...: numbered sources' if there are any, else all labels in alphabetical order."""
    numbered = [source for source in sources if source.numbered]
    if not numbered:
        return sorted({line.label for source in sources for line in source.lines if line.label is not None})
    given = [source.names for source in numbered if source.names is not None]
    for names in given:
        if names != given[0]:
            raise ListError(f"{numbered[-1].lines[0].place}: the sources number their classes differently ({LABELS})")
    if given:
        return given[0]
    return [str(number) for number in range(1 + max(int(line.label or 0) for one in numbered for line in one.lines))]


_Above = tuple[tuple[int, int], ...]  # folders that are not entered again


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class _Folder:
    """The folder of videos, and what below it not to enter."""

    def __init__(self, path: Path, output: Path | None) -> None:
        self.path = path
        self.above: _Above = (_identity(output),) if output is not None and output.exists() else ()
        self._absolute = os.path.abspath(path)

    @cached_property
    def by_stem(self) -> dict[str, str]:
        """The file for every name without extension; the tree is read once, and only if a source needs it."""
        found: dict[str, str] = {}
        for file in sorted(_files(self.path, self.above), key=lambda file: (_preference(file), file)):
            found.setdefault(os.path.splitext(os.path.basename(file))[0], file)
        return found

    def relative(self, path: str) -> str:
        """A listed path as seen from the folder, or absolute if it is absolute and lies elsewhere."""
        path = os.path.normpath(path)
        if not os.path.isabs(path):
            return path
        inside = os.path.relpath(path, self._absolute)
        return path if inside.split(os.sep)[0] == os.pardir else inside


def _preference(file: str) -> int:
    suffix = os.path.splitext(file)[1].lower()
    return PREFERRED.index(suffix) if suffix in PREFERRED else len(PREFERRED)


def _files(folder: str | os.PathLike[str], above: _Above, below: str = "") -> Iterator[str]:
    """Paths of the files below a folder that may be videos, in the order of their names."""
    try:
        here = _identity(folder)
        children = sorted(os.scandir(folder), key=lambda child: child.name)
    except OSError as error:
        raise ListError(f"{folder}: {error.strerror}") from error
    if here in above:  # a link to a folder that it lies in
        return
    for child in children:
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _files(child.path, (*above, here), f"{below}{child.name}/")
        else:
            suffix = os.path.splitext(child.name)[1].lower()
            if suffix and suffix not in NOT_VIDEOS:
                yield below + child.name


def _read(source: Path, folder: _Folder, labels: Sequence[str] | None) -> Iterator[_Source]:
    lists = [source / name for name in LISTS if (source / name).is_file()]
    if lists:
        for path in lists:
            yield from _read(path, folder, labels)
        return
    if source.is_dir():
        found = _read_classes(source, folder)
    elif source.suffix.lower() == ".json":
        found = _read_json(source, folder)
    else:
        found = _read_text(source, folder, labels)
    if not found.lines:
        raise ListError(f"{source}: no video in it")
    yield found


def _read_classes(source: Path, folder: _Folder) -> _Source:
    """A folder per class, below a folder per split or not."""
    files = [file.split("/") for file in _files(source, folder.above)]
    folders = {parts[0] for parts in files if len(parts) > 1}
    has_splits = bool(folders) and folders <= set(SPLITS)
    lines = []
    for *parents, name in files:
        path = folder.relative(os.path.abspath(source.joinpath(*parents, name)))
        split = SPLITS[parents.pop(0)] if has_splits and parents else "train"
        lines.append(_Line(path, parents[0] if parents else None, split, str(source)))
    return _Source(lines)


def _read_text(source: Path, folder: _Folder, labels: Sequence[str] | None) -> _Source:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        raise ListError(f"{source}: {reason}") from error
    try:
        if "youtube_id" in next(csv.reader([text.partition("\n")[0]], skipinitialspace=True), ()):
            return _read_kinetics(source, text, folder)
    except csv.Error as error:
        raise ListError(f"{source}: no CSV: {error}") from error
    return _read_list(source, text, folder, labels)


def _read_list(source: Path, text: str, folder: _Folder, labels: Sequence[str] | None) -> _Source:
    """Lines of `path label` or `path,label`."""
    beside = source.with_name(LABELS)
    names = read_class_names(beside) if beside.is_file() else None
    known = {*(names or ()), *(labels or ())}
    split, lines, separator = _split_of(source), [], ""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if not separator:
            # What follows the comma of a path is no label: it has an extension or more folders.
            separator = "," if "," in line and not re.search(r"[./]", line.rpartition(",")[2]) else " "
            if re.split(r"[, ]", line.strip().lower())[0] in HEADERS:
                continue
        path, label = _path_and_label(line.strip(), separator, known, f"{source}:{number}")
        lines.append(_Line(folder.relative(path), label, split, f"{source}:{number}"))
    numbered = bool(lines) and str(lines[0].label).isdecimal()
    for found in lines if numbered else ():
        label = str(found.label)
        if not label.isdecimal() or int(label) >= MOST_CLASSES:
            raise ListError(f"{found.place}: expected a class number, as on the lines before, got {label!r}")
    return _Source(lines, numbered, names if numbered else None)


def _path_and_label(line: str, separator: str, known: Collection[str], place: str) -> tuple[str, str]:
    """A line's parts: its label is the longest one that is known, else what follows the last separator."""
    end = -1
    while (end := line.find(separator, end + 1)) >= 0:
        if (label := line[end + 1 :].strip()) in known and line[:end].strip():
            return line[:end].strip(), label
    path, _, label = (part.strip() for part in line.rpartition(separator))
    if not path or not label:
        raise ListError(f"{place}: expected 'path{separator}label', got {line!r}")
    # a.mp4 arm wrestling: what precedes the last separator is no file, and there is a file in it.
    if not re.search(r"\.\w{2,4}$", path) and re.search(rf"\.\w{{2,4}}\s*{separator}[^/]*$", path):
        comma = "" if separator == "," else "separate them by a comma, or "
        raise ListError(
            f"{place}: cannot tell where the path ends and the label starts in {line!r}: {comma}"
            "give class numbers, or a file of all labels"
        )
    return path, label


def _read_kinetics(source: Path, text: str, folder: _Folder) -> _Source:
    """The official CSV files of Kinetics-400, -600 and -700."""
    rows, lines = csv.DictReader(text.splitlines(), skipinitialspace=True), []
    for row in rows:
        place = f"{source}:{rows.line_num}"
        stem = _stem(row["youtube_id"], row.get("time_start"), row.get("time_end"), place)
        split = _split(row["split"], place) if row.get("split") else _split_of(source)
        lines.append(_Line(folder.by_stem.get(stem, stem), row.get("label") or None, split, place))
    return _Source(lines)


def _read_json(source: Path, folder: _Folder) -> _Source:
    """ActivityNet's JSON files, which list segments of whole videos, and Kinetics', which list clips."""
    try:
        content = json.loads(source.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ListError(f"{source}:{error.lineno}: no JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        raise ListError(f"{source}: {reason}") from error
    videos = content.get("database", content) if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise ListError(f"{source}: expected an object of videos, by their ids")
    return _Source([_json_line(source, name, video, folder) for name, video in videos.items()])


def _text(label: Any) -> str:
    if not isinstance(label, str):
        raise TypeError(f"a label that is no text: {label!r}")
    return label


def _json_line(source: Path, name: str, video: Mapping[str, Any], folder: _Folder) -> _Line:
    place = f"{source}: video {name!r}"
    try:
        split = _split(video["subset"], place)
        annotations = video.get("annotations") or []
        if isinstance(annotations, dict):
            segment = annotations["segment"]
            stem = _stem(name, segment[0], segment[1], place)
            label = annotations.get("label")
            return _Line(folder.by_stem.get(stem, stem), None if label is None else _text(label), split, place)
        labels = list(dict.fromkeys(_text(annotation["label"]) for annotation in annotations))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ListError(f"{place}: expected 'subset', and 'annotations' with 'label' and 'segment'") from error
    path = folder.by_stem.get(f"v_{name}") or folder.by_stem.get(name) or f"v_{name}"
    note = f"its labels are {', '.join(map(repr, labels))}: listed with the first" if len(labels) > 1 else ""
    return _Line(path, labels[0] if labels else None, split, place, note)


def _stem(name: str, start: object, end: object, place: str) -> str:
    """The official name of a Kinetics clip."""
    try:
        return f"{name}_{int(float(str(start))):06d}_{int(float(str(end))):06d}"
    except (ValueError, OverflowError) as error:
        raise ListError(f"{place}: expected seconds where the clip starts and ends, got {start!r}, {end!r}") from error


def _split(name: str, place: str) -> str:
    if name not in SPLITS:
        raise ListError(f"{place}: expected a split of {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[name]


def _split_of(source: Path) -> str:
    """The split that is a word in a file's name (kinetics_val.csv, val_256.csv, testlist01.txt), or train.

    Raises:
        ListError: words of different splits.
    """
    letter = r"[^\W\d_]"
    words = re.findall(rf"(?<!{letter})({'|'.join(SPLITS)})(?:list)?(?!{letter})", source.stem.lower())
    found = {SPLITS[word] for word in words}
    if len(found) > 1:
        raise ListError(f"{source}: which split is it of, {' or '.join(words)}? Let one of them be in its name")
    return found.pop() if found else "train"
