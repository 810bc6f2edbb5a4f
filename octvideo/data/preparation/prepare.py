"""Preparing a data set: every video is decoded to its end, re-encoded if wanted, listed and indexed."""

import contextlib
import csv
import hashlib
import io
import itertools
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from octvideo.data.index import IndexedVideo, write_index
from octvideo.data.preparation.journal import Facts, Journal
from octvideo.data.preparation.reencode import ENVIRONMENT, measure, reencode
from octvideo.data.preparation.sources import Catalogue, Entry
from octvideo.data.watchdog import HungError, Watchdog, still_alive
from octvideo.errors import DecodeError, PreparationError
from octvideo.files import PARTIAL, appearing, blocks, lock, remove_partial

SPLITS = ("train", "val", "test")
MEASURED = ("frames", "fps", "width", "height", "codec", "seconds")  # columns of the report, of the source file
Progress = Callable[[str, int, int, "str | None"], None]


class Outcome(NamedTuple):
    """What became of a source's video; a row of the report."""

    entry: Entry
    status: str  # ok, bad, missing or duplicate
    reason: str  # why, or what is odd about a good video
    facts: Facts  # if ok or duplicate: `measured` is about the source file, `listed` about the file in the lists
    failed: bool = False  # the machine or this program is to blame, not the video; the next run tries again


def prepare(
    catalogue: Catalogue,
    videos: Path,
    output: Path,
    *,
    short_side: int | None = None,
    workers: int = 1,
    timeout_seconds: float = 60.0,
    progress: Progress = lambda stage, done, total, status: None,
) -> list[Outcome]:
    """Checks, re-encodes, lists and indexes the videos of a catalogue; returns what became of each, in its order.

    Writes train.csv, val.csv, test.csv (of splits that have good videos) and labels.txt, which octvideo.data.lists
    reads; report.csv; index.bin, for VideoIndex; journal.jsonl; and, if re-encoded, videos/. A video is bad if it does
    not decode to its end, and a duplicate if a good one before it has the same bytes. Videos without a label are
    checked and indexed, but not listed. Continues where an earlier run was stopped; killed or not, a run leaves the
    same bytes.

    Args:
        videos: folder that paths start from, also in the lists; those of re-encoded files start from output/videos.
        short_side: re-encode, with larger frames scaled to this even number of pixels on their shorter side.
        timeout_seconds: how long a decoder may show no sign of life.
        progress: called with the stage (comparing or checking), files done, files in all, and the last one's status.

    Raises PreparationError for invalid options, or other ones than before; OSError if results cannot be written.
    """
    if short_side is not None and (short_side < 2 or short_side % 2):
        raise PreparationError(f"the short side must be an even number of pixels, at least 2, got {short_side}")
    if workers < 1 or not timeout_seconds > 0:
        raise PreparationError(f"workers and timeout must be positive, got {workers} and {timeout_seconds}")
    if not videos.is_dir():
        raise PreparationError(f"{videos}: no folder of videos")
    paths = list(dict.fromkeys(entry.path for entry in catalogue.entries))
    folder, written = videos.resolve(), (output / "videos").resolve()
    inside = (path for path in paths if Path(os.path.normpath(folder / path)).is_relative_to(written))
    if short_side is not None and (path := next(inside, None)):
        raise PreparationError(f"{written} is for re-encoded videos, but {path} is there: give another output folder")
    output.mkdir(parents=True, exist_ok=True)
    if (locked := lock(output / ".lock")) is None:
        raise PreparationError(f"{output}: another run is working on it")
    with locked:
        _clean(output, short_side is not None)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            # Keeps room for the results on a disk that the videos fill, where the file system can.
            with open(output / f".reserve{PARTIAL}", "wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, (1 << 16) + 1000 * len(paths))
        # The version is that of the journal and of how videos are encoded.
        journal = Journal(output / "journal.jsonl", {"version": 1, "reencode": short_side})
        root = videos if short_side is None else written
        run = _Run(videos, root, short_side, workers, timeout_seconds, progress, journal)
        with contextlib.closing(journal):
            outcomes = run.outcomes(catalogue.entries)
        _clean(output, short_side is not None)  # what killed decoders left, and the reserve
        _write_results(output, catalogue, outcomes, short_side is not None)
        journal.write_in_order(paths)
    return outcomes


def _clean(output: Path, reencode: bool) -> None:
    """Removes what killed runs left half-written, only where runs write."""
    for left in output.glob(f".*{PARTIAL}"):
        left.unlink()
    if reencode:
        remove_partial(output / "videos")


@dataclass
class _Run:
    """One run over all files: `files` are the facts about each, `names` the paths for the lists, from `root` on."""

    videos: Path
    root: Path
    short_side: int | None
    workers: int
    timeout_seconds: float
    progress: Progress
    journal: Journal

    def outcomes(self, entries: Sequence[Entry]) -> list[Outcome]:
        self.files = {path: self._look(path) for path in dict.fromkeys(entry.path for entry in entries)}
        # The earlier file for each copy; only files of one size are compared.
        sizes = Counter(facts.get("bytes") for facts in self.files.values())
        alike = [path for path, facts in self.files.items() if facts.get("bytes") and sizes[facts["bytes"]] > 1]
        if unknown := [path for path in alike if "sha256" not in self.files[path]]:
            self._work("comparing", self._fingerprint, unknown, len(unknown))
        hashes = {path: self.files[path]["sha256"] for path in alike if "sha256" in self.files[path]}
        earliest = {sha256: path for path, sha256 in reversed(hashes.items())}
        first = {path: earliest[sha256] for path, sha256 in hashes.items() if earliest[sha256] != path}
        originals = [path for path, facts in self.files.items() if "bytes" in facts and path not in first]
        self.names = {path: path for path in originals} if self.short_side is None else _output_names(originals)
        left = [path for path in originals if not self._is_done(path)]
        self._work("checking", self._check, left, len(originals))
        listed: dict[str, Entry] = {}
        return [self._outcome(entry, first.get(entry.path, entry.path), listed) for entry in entries]

    def _look(self, path: str) -> Facts:
        try:
            status = os.stat(self.videos / path)
        except (FileNotFoundError, NotADirectoryError):
            return {"status": "missing", "reason": "no such file"}
        except OSError as error:
            return {"status": "bad", "reason": str(error.strerror), "failed": error.errno in ENVIRONMENT}
        if stat.S_ISDIR(status.st_mode):
            return {"status": "bad", "reason": "a folder"}
        if path != path.strip() or re.search(r"[\r\n\udc80-\udcff]", path):
            return {"status": "bad", "reason": "a list cannot hold its name: rename it"}
        return self.journal.known(path, status.st_size, status.st_mtime_ns)

    def _is_done(self, path: str) -> bool:
        facts, file = self.files[path], self.root / self.names[path]
        if facts.get("status") != "ok":
            return facts.get("status") == "bad" and facts.get("timeout", self.timeout_seconds) >= self.timeout_seconds
        listed = facts["listed"]
        return listed["path"] == self.names[path] and os.path.exists(file) and os.path.getsize(file) == listed["bytes"]

    def _work(self, stage: str, function: Callable[[str], Facts], paths: Sequence[str], total: int) -> None:
        """Learns the facts that a function finds, in processes that are killed if they hang, `workers` at once."""
        before, thread = total - len(paths), threading.local()
        self.progress(stage, before, total, None)

        def start() -> None:
            thread.watchdog = Watchdog(function, self.timeout_seconds)

        def call(path: str) -> tuple[str, Facts]:
            why: Facts = {"failed": True}
            try:
                return path, thread.watchdog(path)
            except HungError as error:
                reason = str(error)
                if "SIGKILL" not in reason:  # from outside, perhaps for memory
                    why = {"timeout": self.timeout_seconds}
            except Exception as error:  # one file's trouble, which the report names
                reason = getattr(error, "strerror", None) or f"unexpected {type(error).__name__}: {error}"
            return path, {"status": "bad", "reason": reason, **why}

        with ThreadPool(max(1, min(self.workers, len(paths))), start) as pool:
            for done, (path, found) in enumerate(pool.imap_unordered(call, paths), before + 1):
                if stage == "comparing" and "sha256" not in found:
                    found = {}  # the file has no known copy, and the check decides
                self.files[path] = found if "failed" in found else self.files[path] | found
                if "failed" not in found:
                    self.journal.add(self.files[path])
                self.progress(stage, done, total, found.get("status"))

    def _fingerprint(self, path: str) -> Facts:
        digest = hashlib.sha256()
        for block in blocks(self.videos / path):
            digest.update(block)
            still_alive()
        return {"sha256": digest.hexdigest()}

    def _check(self, path: str) -> Facts:
        source, file = os.path.join(self.videos, path), self.root / self.names[path]  # the same, unless re-encoded
        try:
            if self.short_side is None:
                measured = written = measure(source)
            else:
                file.unlink(missing_ok=True)
                measured, written = reencode(source, file, self.short_side)
        except DecodeError as error:
            return {"status": "bad", "reason": error.reason}
        listed = {"path": self.names[path], "bytes": file.stat().st_size, "keyframes": written.keyframe_seconds}
        listed |= {"frames": written.frames, "fps": written.fps, "seconds": written.seconds}
        numbers = {column: getattr(measured, column) for column in MEASURED}
        return {"status": "ok", "reason": measured.note, "measured": numbers, "listed": listed}

    def _outcome(self, entry: Entry, original: str, listed: dict[str, Entry]) -> Outcome:
        facts = self.files[original]
        if facts["status"] != "ok":
            return Outcome(entry, facts["status"], facts["reason"], {}, facts.get("failed", False))
        if original not in listed:
            listed[original] = entry
            notes = (facts["reason"], entry.note, "" if entry.label is not None else "no label: in no list")
            return Outcome(entry, "ok", "; ".join(filter(None, notes)), facts)
        path, label, split, _ = listed[original]
        reason = "listed before" if entry.path == path else f"same content as {path}"
        reason += f", which is in {split}, not {entry.split}" if entry.split != split else ""
        reason += f", which has label {label}, not {entry.label}" if entry.label != label else ""
        return Outcome(entry, "duplicate", reason, facts)


def _output_names(paths: Iterable[str]) -> dict[str, str]:
    """Paths of re-encoded files, different from each other and from their folders; an mp4 file keeps its path."""
    safe = {path: "/".join(part for part in path.split("/") if part not in ("", ".", "..")) for path in paths}
    names, taken = {}, {str(folder) for path in safe.values() for folder in PurePosixPath(path).parents}
    for path in sorted(safe, key=lambda path: not path.endswith(".mp4")):
        numbered = (f"{safe[path]}.{number}" for number in itertools.count(2))
        stems = itertools.chain([os.path.splitext(safe[path])[0], safe[path]], numbered)
        names[path] = next(name for stem in stems if (name := f"{stem}.mp4") not in taken)
        taken.add(names[path])
    return names


def _write_results(output: Path, catalogue: Catalogue, outcomes: Sequence[Outcome], reencoded: bool) -> None:
    texts: dict[str, list[str]] = {f"{split}.csv": [] for split in SPLITS}
    indexed, report = {}, io.StringIO()
    table = csv.writer(report, lineterminator="\n")
    table.writerow(["path", "status", "reason", *MEASURED])
    for entry, status, reason, facts, _ in outcomes:
        values = [facts["measured"][name] if facts else "" for name in MEASURED]
        values = [round(value, 3) if isinstance(value, float) else value for value in values]
        table.writerow([entry.path, status, " ".join(reason.split()), *values])
        if status == "ok":
            listed, mtime_ns = facts["listed"], 0 if reencoded else facts["mtime_ns"]
            if entry.label is not None:
                texts[f"{entry.split}.csv"].append(f"{listed['path']} {entry.label}\n")
            numbers = (listed["frames"], listed["fps"], listed["seconds"], np.array(listed["keyframes"], np.float64))
            indexed[listed["path"]] = IndexedVideo(*numbers, listed["bytes"], mtime_ns)
    write_index(output, indexed)
    texts |= {"labels.txt": [f"{name}\n" for name in catalogue.class_names], "report.csv": [report.getvalue()]}
    for name, lines in texts.items():
        if not lines and name != "labels.txt":
            (output / name).unlink(missing_ok=True)
            continue
        with appearing(output / name) as partial:
            partial.write_text("".join(lines), encoding="utf-8", errors="backslashreplace", newline="\n")
