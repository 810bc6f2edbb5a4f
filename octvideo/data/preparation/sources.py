"""Sources of a data set: class folders, list files and official annotations, read into one list of videos."""

import csv
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from octvideo import stores
from octvideo.data.lists import HEADERS, MOST_CLASSES, read_class_names, read_lines, video_files
from octvideo.errors import ListError
from octvideo.stores import is_uri

VALIDATION = ("val", "valid", "validate", "validation")
SPLITS = {"train": "train", "training": "train", **dict.fromkeys(VALIDATION, "val"), "test": "test", "testing": "test"}
AROUND_SECONDS = 1.0  # of a timestamp of AVA, before and after it
NUMBERS = re.compile(r"\d+(,\d+)*")  # of classes
SPANNED = r"(.*\.\w{{2,5}}\s*{0}.+){0}([\d.]+){0}([\d.]+)"  # a line with a span behind its label, by its separator
PREFERRED = {".mp4": 0, ".mkv": 1, ".webm": 2, ".avi": 3}  # of files that differ in their extension, the first counts


class Line(NamedTuple):
    """A line of a source."""

    path: str
    labels: Sequence[int | str]  # class numbers or names
    split: str
    where: str  # it stands
    span: str = ""


class Entry(NamedTuple):
    """A video that a source names."""

    path: str  # relative to the folder of videos, or absolute; without extension if it is missing
    label: int | str | None  # class number, or several with commas; None for none, as in the official test splits
    split: str  # train, val or test
    span: str = ""  # of the video: #t=START,END in seconds; empty for all of it


class Catalogue(NamedTuple):
    """All videos of the sources, in their order, and the names of the classes."""

    entries: list[Entry]
    class_names: list[str]


def read_sources(
    sources: Sequence[str | os.PathLike[str]],
    videos: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    whole: bool = False,
) -> Catalogue:
    """Reads the videos of sources, local or remote, each of which is one of

    - a folder per class: DIR/<class>/<video>, at any depth, or DIR/{train,val,test}/<class>/<video>; videos beside the
      class folders have no label;
    - a list file with lines `path label` or `path,label`, whose split is a word in its name (kinetics_val_list.txt),
      else train; or a folder with train.csv, val.csv or test.csv. A path may end with a span #t=START,END, or a line
      with the two numbers, in seconds; a video of several classes has their numbers, `path 3,17`;
    - Kinetics' CSV or JSON; the video is `<id>_<start, 6 digits>_<end, 6 digits>.*` anywhere below `videos`;
    - ActivityNet's JSON, whose segments are spans; the video is `v_<id>.*` or `<id>.*` anywhere below `videos`;
    - Charades' CSV, whose actions are spans, and c092 is class 92; the video is `<id>.*`;
    - AVA's or AVA-Kinetics' CSV: a span of 2 seconds around each timestamp, of all actions of all people then, and
      action 1 is class 0; the video is `<id>.*`, or the clip of Kinetics that contains the timestamp;
    - Something-Something's JSON; the video is `<id>.*`.

    A video is a file, or a folder of numbered pictures. Relative paths start from `videos`; the folder `output` is not
    searched. Class numbers are kept; their names come from labels.txt beside the list. Otherwise classes are numbered
    in the alphabetical order of their names, as in Kinetics, or as in the file `labels`, with a class name on each
    line, or a JSON object of their numbers. Only labels in it, or in labels.txt, may contain the separator of the
    list's lines. With `whole`, each video is one entry, with all classes of its spans.

    Raises ListError for a source that cannot be read, with the file and the line.
    """
    known = None if labels is None else _read_labels(os.fspath(labels))
    reader = _Reader(os.fspath(videos), None if output is None else os.fspath(output), known)
    lines = [line for source in sources for line in reader.read(os.fspath(source))]
    names = reader.labels or reader.names
    if names is None:
        numbers = [label for line in lines for label in line.labels if isinstance(label, int)]
        named = {label for line in lines for label in line.labels if isinstance(label, str)}
        names = list(map(str, range(max(numbers) + 1))) if numbers else sorted(named)
    number_of, found = {name: number for number, name in enumerate(names)}, dict[tuple[str, str, str, int], list[int]]()
    for place, (path, of_line, split, where, span) in enumerate(lines):
        # A span's classes may be on several lines, and with `whole` those of all spans are one video's.
        classes = found.setdefault((path, split, "" if whole else span, -1 if span else place), [])
        for label in of_line:
            number = number_of.get(label, -1) if isinstance(label, str) else label
            if not 0 <= number < len(names):
                what = f"label {str(label)!r} is not one of the {len(names)} classes of {labels or 'labels.txt'}"
                raise ListError(f"{where}: {what}")
            classes += [number] if number not in classes else []
    entries = [Entry(path, _label(classes), split, span) for (path, split, span, _), classes in found.items()]
    return Catalogue(entries, names)


def hold_out(catalogue: Catalogue, share: float) -> Catalogue:
    """Makes a share of each class's training videos, in (0, 1), validation videos; the same ones wherever they lie.

    All spans of a video stay together. A class of several videos gives one at least, and keeps one.
    """
    of_label: dict[int | str, list[str]] = defaultdict(list)
    for path, label in {entry.path: entry.label for entry in catalogue.entries if entry.split == "train"}.items():
        if label is not None:
            of_label[label].append(path)
    held: set[str] = set()
    for paths in of_label.values():
        paths.sort(key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
        held.update(paths[: min(max(1, round(share * len(paths))), len(paths) - 1)])
    entries = [entry._replace(split="val") if entry.path in held else entry for entry in catalogue.entries]
    return catalogue._replace(entries=entries)


def _label(classes: Sequence[int]) -> int | str | None:
    return (classes[0] if len(classes) == 1 else ",".join(map(str, sorted(classes)))) if classes else None


def _read_labels(path: str) -> list[str]:
    if not path.lower().endswith(".json"):
        return read_class_names(path)
    numbers = _json(path)
    if not isinstance(numbers, dict) or sorted(map(str, numbers.values())) != sorted(map(str, range(len(numbers)))):
        raise ListError(f"{path}: expected an object of class names with their numbers, from 0")
    return sorted(numbers, key=lambda name: int(numbers[name]))


def _json(path: str) -> Any:
    try:
        return json.loads("\n".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise ListError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from error


class _Reader:
    def __init__(self, videos: str, output: str | None, labels: list[str] | None) -> None:
        self.videos, self.labels, self.output = videos, labels, output
        self.names: list[str] | None = None  # of the classes, from labels.txt beside lists of class numbers

    def _videos(self, folder: str) -> list[str]:
        """The videos below a folder, outside the output."""
        output = self.output
        if output is None or is_uri(output):
            found = video_files(folder, frames=True)
            inside = f"{output}/".removeprefix(f"{folder.rstrip('/')}/") if output else "/"
            return [name for name in found if not name.startswith(inside)]
        status = os.stat(output) if os.path.exists(output) else None
        return video_files(folder, frames=True, skip=() if status is None else ((status.st_dev, status.st_ino),))

    @cached_property
    def by_stem(self) -> dict[str, str]:
        files = [(*os.path.splitext(file), file) for file in self._videos(self.videos)]
        files.sort(key=lambda parts: (PREFERRED.get(parts[1].lower(), len(PREFERRED)), parts[2]))
        return {os.path.basename(stem): file for stem, _, file in reversed(files)}

    @cached_property
    def clips(self) -> dict[str, list[tuple[int, int, str]]]:
        """The clips of Kinetics by their ids: seconds where they start and end, and their files."""
        found = defaultdict[str, list[tuple[int, int, str]]](list)
        for stem, file in self.by_stem.items():
            if match := re.fullmatch(r"(.+)_(\d{6})_(\d{6})", stem):
                found[match[1]].append((int(match[2]), int(match[3]), file))
        return found

    def relative(self, path: str) -> str:
        if is_uri(path):
            return path.removeprefix(f"{self.videos.rstrip('/')}/")
        path = os.path.normpath(path)
        inside = os.path.relpath(path, os.path.abspath(self.videos)) if os.path.isabs(path) else path
        return path if inside.split(os.sep)[0] == os.pardir else inside

    def read(self, source: str) -> list[Line]:
        folder = stores.is_folder(source)
        lists = [stores.child(source, f"{split}.csv") for split in ("train", "val", "test") if folder]
        if lists := [path for path in lists if stores.exists(path)]:
            return [line for path in lists for line in self.read(path)]
        is_json = source.lower().endswith(".json")
        read = self._read_classes if folder else self._read_json if is_json else self._read_text
        if not (lines := list(read(source))):
            raise ListError(f"{source}: no video in it")
        return lines

    def _read_classes(self, source: str) -> Iterator[Line]:
        files = [file.split("/") for file in self._videos(source)]
        folders = {parts[0] for parts in files if len(parts) > 1}
        has_splits = bool(folders) and folders <= set(SPLITS)
        for *parents, name in files:
            path = stores.child(source, "/".join((*parents, name)))
            split = SPLITS[parents.pop(0)] if has_splits and parents else "train"
            yield Line(self.relative(path if is_uri(path) else os.path.abspath(path)), parents[:1], split, source)

    def _read_text(self, source: str) -> Iterator[Line]:
        """The official CSV files of Kinetics-400, -600 and -700, of Charades and AVA, or a list."""
        text = read_lines(source)
        try:
            first = next(csv.reader(text[:1], skipinitialspace=True), [])
            if re.fullmatch(r"[^,]+(,[\d.]+){6,7}", text[0].strip()):
                yield from self._read_ava(source, text)
                return
            if not {"youtube_id", "actions"} & {*first}:
                yield from self._read_list(source, text)
                return
            for row in (rows := csv.DictReader(text, skipinitialspace=True)):
                where = f"{source}:{rows.line_num}"
                if "actions" in first:
                    yield from self._read_charades(row, _split_of(source), where)
                    continue
                stem = _clip_name(row["youtube_id"], row.get("time_start"), row.get("time_end"), where)
                split = _split(row["split"], where) if row.get("split") else _split_of(source)
                yield Line(self.by_stem.get(stem, stem), list(filter(None, [row.get("label")])), split, where)
        except csv.Error as error:
            raise ListError(f"{source}: invalid CSV: {error}") from error

    def _read_charades(self, row: dict[str, str], split: str, where: str) -> Iterator[Line]:
        path = self.by_stem.get(row["id"], row["id"])
        for action in filter(None, (row["actions"] or "").split(";")):
            if not (match := re.fullmatch(r"c(\d{3}) ([\d.]+) ([\d.]+)", action)):
                raise ListError(f"{where}: expected actions such as 'c092 11.90 21.20', got {action!r}")
            yield Line(path, [int(match[1])], split, where, span=_span(match[2], match[3], where))
        if not row["actions"]:
            yield Line(path, [], split, where)

    def _read_ava(self, source: str, text: list[str]) -> Iterator[Line]:
        for number, line in enumerate(text, 1):
            name, second, *_, action = (line.split(",") if line else ["", "", ""])[:7]
            where, around = f"{source}:{number}", [AROUND_SECONDS, AROUND_SECONDS]
            if not line or not action:  # AVA-Kinetics: nobody is there
                continue
            if not re.fullmatch(r"[\d.]+", second) or not re.fullmatch(r"[1-9]\d*", action):
                raise ListError(f"{where}: expected 'video,second,x1,y1,x2,y2,action,person', got {line!r}")
            found = ((start, file) for start, end, file in self.clips.get(name, ()) if start <= float(second) <= end)
            start, path = (0, self.by_stem[name]) if name in self.by_stem else next(found, (0, name))
            middle = float(second) - start
            span = _span(max(0.0, middle - around[0]), middle + around[1], where)
            yield Line(path, [int(action) - 1], _split_of(source), where, span=span)

    def _read_list(self, source: str, text: list[str]) -> list[Line]:
        """Lines of `path label` or `path,label`, perhaps with a span; the first label says whether all are numbers."""
        beside = stores.beside(source, "labels.txt")
        names = read_class_names(beside) if stores.exists(beside) else None
        known = {*(names or ()), *(self.labels or ())}
        split, separator, numbered, lines = _split_of(source), "", None, list[Line]()
        for number, line in enumerate(map(str.strip, text), 1):
            if not line:
                continue
            where, span = f"{source}:{number}", ""
            if match := re.search(r"#t=([\d.]+)(?:,([\d.]+))?(?=[ ,])", line):
                line = line[: match.start()] + line[match.end() :]
                span = _span(match[1], match[2], where)
            if not separator:
                # A comma inside a path is followed by an extension or by more folders.
                rest = re.sub(r"#bytes=\d+,\d+| \d+(,\d+)+$|,[\d.]+,[\d.]+$", "", line)
                separator = "," if "," in rest and not re.search(r"[./]", rest.rpartition(",")[2]) else " "
                if re.split(r"[, ]", line.lower())[0] in HEADERS:
                    continue
            if match := re.fullmatch(SPANNED.format(re.escape(separator)), line):
                line, span = match[1], _span(match[2], match[3], where)
            path, label = _path_and_label(line, separator, known, where)
            numbered = bool(NUMBERS.fullmatch(label)) if numbered is None else numbered
            if numbered and not (NUMBERS.fullmatch(label) and max(map(int, label.split(","))) < MOST_CLASSES):
                raise ListError(f"{where}: expected a class number, as on the lines before, got {label!r}")
            labels: list[int | str] = [*map(int, label.split(","))] if numbered else [label]
            lines.append(Line(self.relative(path), labels, split, where, span=span))
        if numbered and names is not None and self.labels is None:
            if self.names not in (None, names):
                raise ListError(f"{source}: the sources number their classes differently ({beside})")
            self.names = names
        return lines

    def _read_json(self, source: str) -> Iterator[Line]:
        # ActivityNet's files list segments of whole videos, Kinetics' clips, and Something-Something's videos.
        content = _json(source)
        if (
            content
            and isinstance(content, list)
            and all(isinstance(video, dict) and "id" in video for video in content)
        ):
            for video in content:
                label = str(video.get("template") or video.get("label") or "").replace("[", "").replace("]", "")
                stem = str(video["id"])
                yield Line(self.by_stem.get(stem, stem), [label] if label else [], _split_of(source), source)
            return
        videos = content.get("database", content) if isinstance(content, dict) else None
        if not isinstance(videos, dict):
            raise ListError(f"{source}: expected an object of videos, by their ids")
        for name, video in videos.items():
            where, stems = f"{source}: video {name!r}", [f"v_{name}", name]
            try:
                split, annotations = _split(video["subset"], where), video.get("annotations") or []
                segments = [(one["label"], one["segment"]) for one in annotations if not isinstance(annotations, dict)]
                if isinstance(annotations, dict):  # a clip
                    stems = [_clip_name(name, annotations["segment"][0], annotations["segment"][1], where)]
                    segments = [(annotations["label"], None)] if annotations.get("label") is not None else []
                if not all(isinstance(label, str) for label, _ in segments):
                    raise TypeError(f"a label that is not text: {segments}")
                spans = [
                    (label, _span(of_video[0], of_video[1], where) if of_video else "") for label, of_video in segments
                ]
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                wanted = "expected 'subset', and 'annotations' with 'label' and 'segment'"
                raise ListError(f"{where}: {wanted}") from error
            path = next((self.by_stem[stem] for stem in stems if stem in self.by_stem), stems[0])
            for label, span in spans or [(None, "")]:
                yield Line(path, [] if label is None else [label], split, where, span=span)


def _span(start: object, end: object, where: str) -> str:
    """A span as lists have it, of seconds."""
    try:
        first, last = (None if second is None else round(float(str(second)), 3) for second in (start, end))
        if first is not None and 0 <= first < math.inf and (last is None or first < last < math.inf):
            return f"#t={first}" if last is None else f"#t={first},{last}"
    except ValueError:
        pass
    raise ListError(f"{where}: expected seconds where the span starts and ends, got {start!r}, {end!r}")


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


def _split_of(source: str) -> str:
    # A word in the file's name: kinetics_val.csv, val_256.csv, testlist01.txt.
    stem = os.path.splitext(os.path.basename(source))[0].lower()
    words = re.findall(rf"(?<![^\W\d_])({'|'.join(SPLITS)})(?:list)?(?![^\W\d_])", stem)
    splits = {SPLITS[word] for word in words} or {"train"}
    if len(splits) > 1:
        raise ListError(f"{source}: is its split {' or '.join(words)}? Its name must contain one of them only")
    return splits.pop()
