"""Preparing a data set: every video checked to its end, re-encoded if wanted, listed and indexed; resumable anywhere.

What is known of a file goes into a journal as soon as it is known, so a run that was killed continues where it was. All
that a run writes is in the sources' order and without times of its own: a run that was killed and continued leaves the
same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octvideo.data.index import IndexedVideo, write_index
from octvideo.data.preparation.journal import Journal
from octvideo.data.preparation.reencode import machine_error, measure, reencode
from octvideo.data.preparation.sources import Catalogue, Entry
from octvideo.data.watchdog import HungError, Watchdog, still_alive
from octvideo.errors import DecodeError, PreparationError
from octvideo.files import PARTIAL, appearing, blocks, remove_partial

VERSION = 1  # of the journal and of how videos are encoded
SPLITS = ("train", "val", "test")
COLUMNS = ("path", "status", "reason", "frames", "fps", "width", "height", "codec", "seconds")
Facts = dict[str, Any]  # what the journal knows of a file, as JSON has it
Progress = Callable[[str, int, int, "str | None"], None]


class Outcome(NamedTuple):
    """What has become of a source's video; a row of the report.

    Args:
        entry: the video.
        status: ok, bad, missing or duplicate.
        reason: why; or what is odd about a good one.
        measured: frames, fps, width, height, codec and seconds of the source file, where it could be decoded.
        listed: path, bytes, mtime_ns, frames, fps, seconds and keyframes of the file that the lists name, if it is
            good; mtime_ns is 0 if this program has written the file.
        failed: the machine is to blame, or an error of this program, not the video; the next run tries again.
    """

    entry: Entry
    status: str
    reason: str = ""
    measured: Facts | None = None
    listed: Facts | None = None
    failed: bool = False


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
    """Checks, re-encodes, lists and indexes the videos of a catalogue; continues what an earlier run left.

    Writes into the output folder: train.csv, val.csv, test.csv (of splits that have good videos) and labels.txt, which
    octvideo.data.lists reads; report.csv; index.bin, for VideoIndex; journal.jsonl; and, if re-encoded, videos/.

    A video is bad if it does not decode to its end, and a duplicate if a good one before it has the same content, byte
    for byte. Videos without a label are checked and indexed, and are in no list.

    Args:
        catalogue: the videos and classes.
        videos: folder that the catalogue's paths start from.
        output: folder for the results.
        short_side: re-encode, with larger frames scaled to this many pixels of their shorter side; an even number. The
            lists' paths then start from output/videos, else from `videos`.
        workers: files that are worked on at once.
        timeout_seconds: how long a decoder may show no sign of life.
        progress: called with the stage (comparing or checking), the files done, the files to do, and the status of the
            last one.

    Returns:
        What has become of each video, in the catalogue's order.

    Raises:
        PreparationError: options that make no sense, or that differ from those of the run that is continued.
        OSError: the results cannot be written.
    """
    if short_side is not None and (short_side < 2 or short_side % 2):
        raise PreparationError(f"the short side must be an even number of pixels from 2 on, got {short_side}")
    if workers < 1 or not timeout_seconds > 0:
        raise PreparationError(f"workers and timeout must be positive, got {workers} and {timeout_seconds}")
    if not videos.is_dir():
        raise PreparationError(f"{videos}: no folder of videos")
    if short_side is not None:
        _check_apart(catalogue, videos, output / "videos")
    output.mkdir(parents=True, exist_ok=True)
    with _only_run(output):
        _clean(output, short_side is not None)
        _reserve(output, len(catalogue.entries))
        journal = Journal(output / "journal.jsonl", {"version": VERSION, "reencode": short_side})
        try:
            run = _Run(catalogue, videos, output, short_side, workers, timeout_seconds, progress, journal)
            outcomes = run.outcomes()
        finally:
            journal.close()
        _clean(output, short_side is not None)  # what killed decoders left, and the reserve
        _write_results(output, catalogue, outcomes)
        journal.write_in_order(list(dict.fromkeys(outcome.entry.path for outcome in outcomes)))
    return outcomes


def _check_apart(catalogue: Catalogue, videos: Path, written: Path) -> None:
    """Refuses to write over the sources."""
    folder, start = os.path.realpath(videos), os.path.realpath(written) + os.sep
    for entry in catalogue.entries:
        if os.path.normpath(os.path.join(folder, entry.path)).startswith(start):
            raise PreparationError(f"{written} is where re-encoded videos go, and {entry.path} is there: take another")


def _clean(output: Path, reencode: bool) -> None:
    """Removes what killed runs left, and looks only where runs write."""
    for partial in output.glob(f".*{PARTIAL}"):
        partial.unlink()
    if reencode:
        remove_partial(output / "videos")


def _reserve(output: Path, num_videos: int) -> None:
    """Keeps room for the results on a disk that the videos fill, if there is room and the file system can."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with open(output / f".reserve{PARTIAL}", "wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, (1 << 16) + 1000 * num_videos)


class _Work(NamedTuple):
    """A file to work on: compare it (`short_side` and `output` are None), or check and re-encode it."""

    path: str
    source: str
    output: Path | None
    short_side: int | None


class _Refusal(NamedTuple):
    """Why there is nothing to know of a file; see Outcome."""

    status: str
    reason: str
    failed: bool = False


class _Run:
    """One run over all files of a catalogue."""

    def __init__(
        self,
        catalogue: Catalogue,
        videos: Path,
        output: Path,
        short_side: int | None,
        workers: int,
        timeout_seconds: float,
        progress: Progress,
        journal: Journal,
    ) -> None:
        self.entries = catalogue.entries
        self.videos = videos
        self.output = output / "videos"
        self.short_side = short_side
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.progress = progress
        self.journal = journal
        self.refused: dict[str, _Refusal] = {}  # by path: files that are not even opened, or failed in this run
        self.there: dict[str, os.stat_result] = {}
        self.first: dict[str, str] = {}  # by the path of a copy: the path of the first such file

    def outcomes(self) -> list[Outcome]:
        """Does all that is left to do; what has become of each entry."""
        for entry in self.entries:
            if entry.path not in self.there and entry.path not in self.refused:
                self._look(entry.path)
        self._find_copies()
        self._check()
        listed: dict[str, Entry] = {}
        return [self._outcome(entry, listed) for entry in self.entries]

    def _look(self, path: str) -> None:
        """Finds a file without opening it."""
        try:
            status = os.stat(self.videos / path)
        except (FileNotFoundError, NotADirectoryError):
            self.refused[path] = _Refusal("missing", "no such file")
        except OSError as error:
            self.refused[path] = _Refusal("bad", str(error.strerror), machine_error(error) is not None)
        else:
            if stat.S_ISDIR(status.st_mode):
                self.refused[path] = _Refusal("bad", "a folder")
            elif path != path.strip() or re.search(r"[\r\n\udc80-\udcff]", path):
                self.refused[path] = _Refusal("bad", "its name cannot stand in a list: rename it")
            else:
                self.there[path] = status

    def _find_copies(self) -> None:
        """Compares the contents of files of the same size."""
        sizes: dict[int, list[str]] = {}
        for path, status in self.there.items():
            if stat.S_ISREG(status.st_mode) and status.st_size:
                sizes.setdefault(status.st_size, []).append(path)
        alike = [path for paths in sizes.values() if len(paths) > 1 for path in paths]
        unknown = [path for path in alike if "sha256" not in self.journal.known(path, self.there[path])]
        work = [_Work(path, str(self.videos / path), None, None) for path in unknown]
        if work:
            self.progress("comparing", 0, len(work), None)
        for done, (job, found) in enumerate(_watched(_fingerprint, work, self.workers, self.timeout_seconds), 1):
            if isinstance(found, dict):
                self.journal.add(job.path, self.there[job.path], found)
            self.progress("comparing", done, len(work), None)
        first: dict[str, str] = {}
        for path in alike:
            fingerprint = self.journal.known(path, self.there[path]).get("sha256")
            if fingerprint is not None and first.setdefault(fingerprint, path) != path:
                self.first[path] = first[fingerprint]

    def _check(self) -> None:
        """Checks and re-encodes what the journal does not know."""
        originals = [path for path in self.there if path not in self.first]
        names = _output_names(originals) if self.short_side is not None else {}
        work = [
            _Work(path, str(self.videos / path), self.output / names[path] if names else None, self.short_side)
            for path in originals
            if not self._is_done(path, names.get(path, path))
        ]
        done = len(originals) - len(work)
        self.progress("checking", done, len(originals), None)
        for job, found in _watched(_check_one, work, self.workers, self.timeout_seconds):
            status = self.there[job.path]
            if isinstance(found, dict):
                if "listed" in found:
                    found["listed"]["path"] = names.get(job.path, job.path)
                self.journal.add(job.path, status, found)
            elif isinstance(found, HungError) and "SIGKILL" not in str(found):
                facts = {"status": "bad", "reason": str(found), "timeout": self.timeout_seconds}
                self.journal.add(job.path, status, facts)
            else:
                self.refused[job.path] = _Refusal("bad", _trouble(found), failed=True)
            done += 1
            state = "bad" if job.path in self.refused else self.journal.known(job.path, status)["status"]
            self.progress("checking", done, len(originals), state)

    def _is_done(self, path: str, name: str) -> bool:
        known = self.journal.known(path, self.there[path])
        if known.get("status") == "bad":
            return known.get("timeout", self.timeout_seconds) >= self.timeout_seconds
        if "status" not in known or known["listed"]["path"] != name:
            return False
        if self.short_side is None:
            return True
        try:
            return os.stat(self.output / name).st_size == known["listed"]["bytes"]
        except OSError:
            return False

    def _outcome(self, entry: Entry, listed: dict[str, Entry]) -> Outcome:
        original = self.first.get(entry.path, entry.path)
        for path in (entry.path, original):
            if path in self.refused:
                status, reason, failed = self.refused[path]
                return Outcome(entry, status, reason, failed=failed)
        known = self.journal.known(original, self.there[original])
        if known["status"] == "bad":
            return Outcome(entry, "bad", known["reason"])
        measured = known["measured"]
        if original in listed:
            return Outcome(entry, "duplicate", _sameness(entry, listed[original]), measured)
        listed[original] = entry
        reasons = [known["reason"], entry.note, "" if entry.label is not None else "no label: in no list"]
        mtime_ns = self.there[original].st_mtime_ns if self.short_side is None else 0
        listed_file = {**known["listed"], "mtime_ns": mtime_ns}
        return Outcome(entry, "ok", "; ".join(filter(None, reasons)), measured, listed_file)


def _trouble(error: Exception) -> str:
    """What kept a file from being worked on, and is not its fault."""
    if isinstance(error, HungError):  # killed from outside, perhaps for memory
        return str(error)
    return getattr(error, "strerror", None) or f"unexpected {type(error).__name__}: {error}"


def _sameness(entry: Entry, former: Entry) -> str:
    """Why a video is a duplicate, and what is worse about it."""
    reason = "listed before" if entry.path == former.path else f"same content as {former.path}"
    if entry.split != former.split:
        reason += f", which is in {former.split}, not {entry.split}"
    if entry.label != former.label:
        reason += f", which has label {former.label}, not {entry.label}"
    return reason


def _fingerprint(work: _Work) -> Facts:
    digest = hashlib.sha256()
    for block in blocks(work.source):
        digest.update(block)
        still_alive()
    return {"sha256": digest.hexdigest()}


def _check_one(work: _Work) -> Facts:
    """What the journal is to know of a file."""
    try:
        if work.output is None or work.short_side is None:
            measured = written = measure(work.source)
        else:
            work.output.unlink(missing_ok=True)
            measured, written = reencode(work.source, work.output, work.short_side)
    except DecodeError as error:
        return {"status": "bad", "reason": error.reason}
    return {
        "status": "ok",
        "reason": measured.note,
        "measured": {name: getattr(measured, name) for name in COLUMNS[3:]},
        "listed": {
            "bytes": os.stat(work.output or work.source).st_size,
            "frames": written.frames,
            "fps": written.fps,
            "seconds": written.seconds,
            "keyframes": written.keyframe_seconds,
        },
    }


def _output_names(paths: Iterable[str]) -> dict[str, str]:
    """For each file the path of its re-encoded one; an mp4 file keeps its own, and no two are the same.

    None is the folder of another one, as x.mp4 for x.avi beside a folder x.mp4 would be.
    """
    safe = {path: "/".join(part for part in path.split("/") if part not in ("", ".", "..")) for path in paths}
    names: dict[str, str] = {}
    taken = {str(folder) for path in safe.values() for folder in PurePosixPath(path).parents}
    for path in sorted(safe, key=lambda path: not path.endswith(".mp4")):
        stem = os.path.splitext(safe[path])[0]
        name, number = f"{stem}.mp4", 1
        while name in taken:
            name = f"{safe[path]}{f'.{number}' if number > 1 else ''}.mp4"
            number += 1
        taken.add(name)
        names[path] = name
    return names


def _watched(
    function: Callable[[_Work], Facts], jobs: Sequence[_Work], workers: int, timeout_seconds: float
) -> Iterator[tuple[_Work, Facts | Exception]]:
    """Calls a function for every job, several at once, each in a process that is killed if it hangs.

    Gives the jobs in the order in which they end, with the function's result or what ended it.
    """
    waiting, lock = iter(jobs), threading.Lock()
    ended: SimpleQueue[tuple[_Work, Any]] = SimpleQueue()

    def work() -> None:
        watchdog = Watchdog(function, timeout_seconds)
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return watchdog.close()
            try:
                ended.put((job, watchdog(job)))
            except Exception as error:  # one file's trouble, which the report names
                ended.put((job, error))

    for _ in range(min(workers, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    for _ in jobs:
        yield ended.get()


@contextlib.contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Refuses a second run on a folder. The lock ends with this process, and its children do not inherit it."""
    with open(output / ".lock", "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise PreparationError(f"{output}: another run is at work on it") from error
        yield


# Results


def _write_results(output: Path, catalogue: Catalogue, outcomes: Sequence[Outcome]) -> None:
    good = [outcome for outcome in outcomes if outcome.listed is not None]
    for split in SPLITS:
        chosen = [one for one in good if one.entry.split == split and one.entry.label is not None]
        lines = [f"{(one.listed or {})['path']} {one.entry.label}\n" for one in chosen]
        if lines:
            _write(output / f"{split}.csv", "".join(lines))
        else:
            (output / f"{split}.csv").unlink(missing_ok=True)
    _write(output / "labels.txt", "".join(f"{name}\n" for name in catalogue.class_names))
    indexed = {}
    for outcome in good:
        listed = outcome.listed or {}
        keyframes: NDArray[np.float64] = np.array(listed["keyframes"], dtype=np.float64)
        indexed[listed["path"]] = IndexedVideo(
            listed["frames"], listed["fps"], listed["seconds"], keyframes, listed["bytes"], listed["mtime_ns"]
        )
    write_index(output, indexed)
    _write(output / "report.csv", _report(outcomes))


def _report(outcomes: Sequence[Outcome]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for entry, status, reason, measured, _, _ in outcomes:
        numbers = [(measured or {}).get(name, "") for name in COLUMNS[3:]]
        values = [round(number, 3) if isinstance(number, float) else number for number in numbers]
        table.writerow([entry.path, status, " ".join(reason.split()), *values])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with appearing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
