"""Sources of a data set: class folders, list files and official annotations, read into one list of videos."""

import csv
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

from octvideo.data.lists import HEADERS, MOST_CLASSES, read_class_names, read_lines, video_files
from octvideo.errors import ListError
from octvideo.stores import is_uri

VALIDATION = ("val", "valid", "validate", "validation")
SPLITS = {"train": "train", "training": "train", **dict.fromkeys(VALIDATION, "val"), "test": "test", "testing": "test"}
# A line of a source: its path, its label as a class number or name, its split, where it stands, and what is doubtful.
Line: TypeAlias = "tuple[str, int | str | None, str, str, str]"
PREFERRED = {".mp4": 0, ".mkv": 1, ".webm": 2, ".avi": 3}  # of files that differ in their extension, the first counts


class Entry(NamedTuple):
    """A video that a source names."""

    path: str  # relative to the folder of videos, or absolute; without extension if it is missing
    label: int | str | None  # class number, or several with commas; None for none, as in the official test splits
    split: str  # train, val or test
    note: str = ""  # what is doubtful about the source's line
    span: str = ""  # of the video: #t=START,END in seconds; empty for all of it


class Catalogue(NamedTuple):
    """All videos of the sources, in their order, and the names of the classes."""

    entries: list[Entry]
    class_names: list[str]


def read_sources(
    sources: Sequence[Path], videos: Path, *, labels: Path | None = None, output: Path | None = None
) -> Catalogue:
    """Reads the videos of sources, each of which is one of

    - a folder per class: DIR/<class>/<video>, at any depth, or DIR/{train,val,test}/<class>/<video>; videos beside the
      class folders have no label;
    - a list file with lines `path label` or `path,label`, whose split is a word in its name (kinetics_val_list.txt),
      else train; or a folder with train.csv, val.csv or test.csv;
    - Kinetics' CSV or JSON; the video is `<id>_<start, 6 digits>_<end, 6 digits>.*` anywhere below `videos`;
    - ActivityNet's JSON; the video is `v_<id>.*` or `<id>.*` anywhere below `videos`.

    Relative paths start from `videos`; the folder `output` is not searched. Class numbers are kept; their names come
    from labels.txt beside the list. Otherwise classes are numbered in the alphabetical order of their names, as in
    Kinetics, or as in the file `labels`, with a class name on each line. Only labels in it, or in labels.txt, may
    contain the separator of the list's lines.

    Raises ListError for a source that cannot be read, with the file and the line.
    """
    reader = _Reader(videos, output, read_class_names(labels) if labels is not None else None)
    lines = [line for source in sources for line in reader.read(source)]
    names = reader.labels or reader.names
    if names is None:
        numbers = [label for _, label, *_ in lines if isinstance(label, int)]
        named = {label for _, label, *_ in lines if isinstance(label, str)}
        names = list(map(str, range(max(numbers) + 1))) if numbers else sorted(named)
    number_of, entries = {name: number for number, name in enumerate(names)}, []
    for path, label, split, where, note in lines:
        number = number_of.get(label, -1) if isinstance(label, str) else label
        if number is not None and not 0 <= number < len(names):
            what = f"label {str(label)!r} is not one of the {len(names)} classes of {labels or 'labels.txt'}"
            raise ListError(f"{where}: {what}")
        entries.append(Entry(path, number, split, note))
    return Catalogue(entries, names)


class _Reader:
    def __init__(self, videos: Path, output: Path | None, labels: list[str] | None) -> None:
        self.videos, self.labels = videos, labels
        self.names: list[str] | None = None  # of the classes, from labels.txt beside lists of class numbers
        status = output.stat() if output is not None and output.exists() else None
        self.skip = () if status is None else ((status.st_dev, status.st_ino),)

    @cached_property
    def by_stem(self) -> dict[str, str]:
        files = [(*os.path.splitext(file), file) for file in video_files(self.videos, skip=self.skip)]
        files.sort(key=lambda parts: (PREFERRED.get(parts[1].lower(), len(PREFERRED)), parts[2]))
        return {os.path.basename(stem): file for stem, _, file in reversed(files)}

    def relative(self, path: str) -> str:
        path = path if is_uri(path) else os.path.normpath(path)
        inside = os.path.relpath(path, os.path.abspath(self.videos)) if os.path.isabs(path) else path
        return path if inside.split(os.sep)[0] == os.pardir else inside

    def read(self, source: Path) -> list[Line]:
        if lists := [path for split in ("train", "val", "test") if (path := source / f"{split}.csv").is_file()]:
            return [line for path in lists for line in self.read(path)]
        is_json = source.suffix.lower() == ".json"
        read = self._read_classes if source.is_dir() else self._read_json if is_json else self._read_text
        if not (lines := list(read(source))):
            raise ListError(f"{source}: no video in it")
        return lines

    def _read_classes(self, source: Path) -> Iterator[Line]:
        files = [file.split("/") for file in video_files(source, skip=self.skip)]
        folders = {parts[0] for parts in files if len(parts) > 1}
        has_splits = bool(folders) and folders <= set(SPLITS)
        for *parents, name in files:
            path = self.relative(os.path.abspath(source.joinpath(*parents, name)))
            split = SPLITS[parents.pop(0)] if has_splits and parents else "train"
            yield path, parents[0] if parents else None, split, str(source), ""

    def _read_text(self, source: Path) -> Iterator[Line]:
        """The official CSV files of Kinetics-400, -600 and -700, or a list."""
        text = read_lines(source)
        try:
            if "youtube_id" not in next(csv.reader(text[:1], skipinitialspace=True), ()):
                yield from self._read_list(source, text)
                return
            for row in (rows := csv.DictReader(text, skipinitialspace=True)):
                where = f"{source}:{rows.line_num}"
                stem = _clip_name(row["youtube_id"], row.get("time_start"), row.get("time_end"), where)
                split = _split(row["split"], where) if row.get("split") else _split_of(source)
                yield self.by_stem.get(stem, stem), row.get("label") or None, split, where, ""
        except csv.Error as error:
            raise ListError(f"{source}: invalid CSV: {error}") from error

    def _read_list(self, source: Path, text: list[str]) -> list[Line]:
        """Lines of `path label` or `path,label`; the first label says whether all are numbers."""
        beside = source.with_name("labels.txt")
        names = read_class_names(beside) if beside.is_file() else None
        known = {*(names or ()), *(self.labels or ())}
        split, separator, numbered, lines = _split_of(source), "", None, list[Line]()
        for number, line in enumerate(map(str.strip, text), 1):
            if not line:
                continue
            if not separator:
                # A comma inside a path is followed by an extension or by more folders.
                separator = "," if "," in line and not re.search(r"[./]", line.rpartition(",")[2]) else " "
                if re.split(r"[, ]", line.lower())[0] in HEADERS:
                    continue
            where = f"{source}:{number}"
            path, label = _path_and_label(line, separator, known, where)
            numbered = label.isdecimal() if numbered is None else numbered
            if numbered and not (label.isdecimal() and int(label) < MOST_CLASSES):
                raise ListError(f"{where}: expected a class number, as on the lines before, got {label!r}")
            lines.append((self.relative(path), int(label) if numbered else label, split, where, ""))
        if numbered and names is not None and self.labels is None:
            if self.names not in (None, names):
                raise ListError(f"{source}: the sources number their classes differently ({beside})")
            self.names = names
        return lines

    def _read_json(self, source: Path) -> Iterator[Line]:
        # ActivityNet's files list segments of whole videos, and Kinetics' files list clips.
        try:
            content = json.loads("\n".join(read_lines(source)))
        except json.JSONDecodeError as error:
            raise ListError(f"{source}:{error.lineno}: invalid JSON: {error.msg}") from error
        videos = content.get("database", content) if isinstance(content, dict) else None
        if not isinstance(videos, dict):
            raise ListError(f"{source}: expected an object of videos, by their ids")
        for name, video in videos.items():
            where, stems, note = f"{source}: video {name!r}", [f"v_{name}", name], ""
            try:
                split, annotations = _split(video["subset"], where), video.get("annotations") or []
                if isinstance(annotations, dict):  # a clip
                    stems = [_clip_name(name, annotations["segment"][0], annotations["segment"][1], where)]
                    annotations = [annotations] if annotations.get("label") is not None else []
                labels = list(dict.fromkeys(annotation["label"] for annotation in annotations))
                if not all(isinstance(label, str) for label in labels):
                    raise TypeError(f"a label that is not text: {labels}")
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                wanted = "expected 'subset', and 'annotations' with 'label' and 'segment'"
                raise ListError(f"{where}: {wanted}") from error
            path = next((self.by_stem[stem] for stem in stems if stem in self.by_stem), stems[0])
            if len(labels) > 1:
                note = f"its labels are {', '.join(map(repr, labels))}: listed with the first"
            yield path, labels[0] if labels else None, split, where, note


def _path_and_label(line: str, separator: str, known: Collection[str], where: str) -> tuple[str, str]:
    # The label is the longest known one, else what follows the last separator.
    end = -1
    while (end := line.find(separator, end + 1)) >= 0:
        if (label := line[end + 1 :].strip()) in known and line[:end].strip():
            return line[:end].strip(), label
    path, _, label = (part.strip() for part in line.rpartition(separator))
    if not path or not label:
        raise ListError(f"{where}: expected 'path{separator}label', got {line!r}")
    # a.mp4 arm wrestling: the text before the last separator does not end like a file name, but contains one.
    if not re.search(r"\.\w{2,4}$", path) and re.search(rf"\.\w{{2,4}}\s*{separator}[^/]*$", path):
        cure = "" if separator == "," else "separate them by a comma, or "
        cure += "give class numbers, or a file of all labels"
        raise ListError(f"{where}: cannot tell where the path ends and the label starts in {line!r}: {cure}")
    return path, label


def _clip_name(name: str, start: object, end: object, where: str) -> str:
    try:
        return f"{name}_{int(float(str(start))):06d}_{int(float(str(end))):06d}"
    except (ValueError, OverflowError) as error:
        raise ListError(f"{where}: expected seconds where the clip starts and ends, got {start!r}, {end!r}") from error


def _split(name: str, where: str) -> str:
    if name not in SPLITS:
        raise ListError(f"{where}: expected a split of {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[name]


def _split_of(source: Path) -> str:
    # A word in the file's name: kinetics_val.csv, val_256.csv, testlist01.txt.
    words = re.findall(rf"(?<![^\W\d_])({'|'.join(SPLITS)})(?:list)?(?![^\W\d_])", source.stem.lower())
    splits = {SPLITS[word] for word in words} or {"train"}
    if len(splits) > 1:
        raise ListError(f"{source}: is its split {' or '.join(words)}? Its name must contain one of them only")
    return splits.pop()
