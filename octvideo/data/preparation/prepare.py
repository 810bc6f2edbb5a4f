"""Preparing a data set: every video is decoded to its end, re-encoded if wanted, listed and indexed."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from octvideo import stores
from octvideo.data.index import FILE, IndexedVideo, write_index
from octvideo.data.lists import rooted
from octvideo.data.preparation.cluster import Workers, workers_of
from octvideo.data.preparation.journal import COMPLETE, IDENTITY, Facts, Journal
from octvideo.data.preparation.reencode import ENVIRONMENT
from octvideo.data.preparation.shards import Packed, Shard, plan
from octvideo.data.preparation.sources import Catalogue, Entry
from octvideo.data.preparation.work import MEASURED, Work
from octvideo.data.source import MEMBER, PICTURES, split_span
from octvideo.errors import DecodeError, PreparationError, StoreError
from octvideo.files import PARTIAL, appearing, lock, remove_partial
from octvideo.stores import Stat, is_uri

SPLITS = ("train", "val", "test")
SAVING_SECONDS = 30.0  # between two copies of the journal in a store
LOST_VIDEOS = 3  # in a row that a store does not give end the run
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
    videos: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    short_side: int | None = None,
    workers: int = 1,
    timeout_seconds: float = 60.0,
    progress: Progress = lambda stage, done, total, status: None,
    frames_fps: float = 25.0,
    shard_bytes: int | None = None,
    scheduler: str | None = None,
    part: tuple[int, int] | None = None,
    merge: bool = False,
) -> list[Outcome]:
    """Checks, re-encodes, lists and indexes the videos of a catalogue; returns what became of each, in its order.

    Writes train.csv, val.csv, test.csv (of splits that have good videos) and labels.txt, which octvideo.data.lists
    reads; report.csv; index.bin, for VideoIndex; journal.jsonl; if re-encoded, videos/; and with shard_bytes, shards/,
    whose members the lists then name. A video is bad if it does not decode to its end, and a duplicate if a good one
    before it has the same bytes. Videos without a label are checked and indexed, but not listed. Continues where an
    earlier run was stopped; killed or not, on one machine or many, a run leaves the same bytes.

    Args:
        videos: folder or URI that paths start from, also in the lists; those of re-encoded files start from
            output/videos, and those of shards from output.
        output: folder, or URI of one in a store: what is small is then written in the user's cache, and put there.
        short_side: re-encode, with larger frames scaled to this even number of pixels on their shorter side.
        timeout_seconds: how long a decoder may show no sign of life.
        progress: called with the stage (comparing, checking or packing), files done, files in all, and the last one's
            status.
        frames_fps: frames a second of folders of frames.
        shard_bytes: of the tar files, at most, unless one video is larger.
        scheduler: a cluster that works; see `cluster.workers_of`.
        part: (i, N): only every N-th file from the i-th on, i from 1, for a run with `merge` to join; returns nothing.
        merge: join what all parts have found.

    Raises PreparationError for invalid options, or other ones than before, or missing parts; StoreError if a store
    cannot be used; OSError if results cannot be written.
    """
    if short_side is not None and (short_side < 2 or short_side % 2):
        raise PreparationError(f"the short side must be an even number of pixels, at least 2, got {short_side}")
    if workers < 1 or not timeout_seconds > 0:
        raise PreparationError(f"workers and timeout must be positive, got {workers} and {timeout_seconds}")
    if part is not None and (merge or not 1 <= part[0] <= part[1]):
        raise PreparationError(f"a part must be i of N with i from 1 to N, and is not merged, got {part}")
    videos, output = os.fspath(videos), os.fspath(output).rstrip("/")
    if not is_uri(videos) and not os.path.isdir(videos):
        raise PreparationError(f"{videos}: no folder of videos")
    for place in filter(is_uri, (videos, output)):
        stores.check(stores.child(place, "journal.jsonl"))
    paths = list(dict.fromkeys(entry.path for entry in catalogue.entries))
    work = Work(videos, output, short_side, frames_fps)
    for path in {stores.store_of(path): path for path in paths if "://" in path}.values():
        work.source.check(path)
    made = {"videos": "re-encoded videos"} if short_side is not None else {}
    made |= {"shards": "shards"} if shard_bytes else {}
    for folder, what in made.items():
        written, base = stores.real(stores.child(output, folder)), stores.real(videos)
        for path in paths:
            full = rooted(base, path).rpartition("::")[2]
            if (full if is_uri(full) else os.path.normpath(full)).startswith(f"{written}/"):
                raise PreparationError(f"{written} is for {what}, but {path} is there: give another output folder")
    local = Path(output)
    if is_uri(output):
        local = stores.cache_folder() / "prepared" / hashlib.sha256(output.encode()).hexdigest()[:16]
    local.mkdir(parents=True, exist_ok=True)
    name = "" if part is None else f".part-{part[0]}-of-{part[1]}"
    if (locked := lock(local / f"{name}.lock")) is None:
        raise PreparationError(f"{output}: another run is working on it")
    with locked, workers_of(scheduler, workers, timeout_seconds) as at_work:
        if part is None:
            _clean(local, short_side is not None, bool(shard_bytes))
            if hasattr(os, "posix_fallocate"):  # not on macOS
                # Keeps room for the results on a disk that the videos fill, where the file system can.
                with open(local / f".reserve{PARTIAL}", "wb") as file, contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, (1 << 16) + 1000 * len(paths))
        # The version is that of the journal and of how videos are encoded.
        options = {"version": 1, "reencode": short_side} | ({} if frames_fps == 25 else {"frames_fps": frames_fps})
        journal_path = local / f"journal{name}.jsonl"
        if is_uri(output):
            _fetch(output, journal_path)
        parts = _join_parts(output, local, journal_path, options) if merge else []
        journal = Journal(journal_path, options, output)
        run = _Run(work, at_work, timeout_seconds, progress, journal, shard_bytes, part, merge)
        with contextlib.closing(journal):
            outcomes = run.outcomes(catalogue.entries)
        if part is not None:
            journal.write_in_order(paths, complete=True)
            run.save()
            return []
        _clean(local, short_side is not None, bool(shard_bytes))  # what killed decoders left, and the reserve
        names = _write_results(local, catalogue, outcomes, run.in_shards, short_side is not None or is_uri(videos))
        unwanted = run.forget_other_shards()
        journal.write_in_order([*paths, *(shard.path for shard in run.shards)])
        for result in names if is_uri(output) else ():
            if (local / result).exists():
                stores.put(local / result, stores.child(output, result))
            else:
                stores.remove(stores.child(output, result))
        run.save()
        for left in (*unwanted, *parts):
            stores.remove(stores.child(output, left))
        for left in parts:
            for beside in (left, f".{left.removeprefix('journal.').removesuffix('.jsonl')}.lock"):
                (local / beside).unlink(missing_ok=True)
    return outcomes


def _fetch(output: str, journal: Path) -> None:
    """Adds what any machine has written down to the journal on this one."""
    try:
        content = stores.read(stores.child(output, journal.name))
    except FileNotFoundError:
        journal.unlink(missing_ok=True)
        return
    own = journal.read_bytes() if journal.exists() else b""
    if own and own.split(b"\n", 1)[0] != content.split(b"\n", 1)[0]:
        own = b""  # of another preparation, on this machine; what counts is in the store
    journal.write_bytes(content + b"\n" + own)


def _join_parts(output: str, folder: Path, journal: Path, options: Facts) -> list[str]:
    """Adds the journals of all parts to the whole's; returns their names."""
    names = stores.files_below(output) if is_uri(output) else os.listdir(folder)
    found = [match for name in sorted(names) if (match := re.fullmatch(r"journal\.part-(\d+)-of-(\d+)\.jsonl", name))]
    if len(counts := sorted({int(match[2]) for match in found})) != 1:
        what = f"parts of {' and of '.join(map(str, counts))}: remove the journals of one" if counts else "no parts"
        raise PreparationError(f"{output}: there are {what}")
    contents = {}
    for name in (match[0] for match in found):
        path = stores.child(output, name)
        content = stores.read(path)
        if content.endswith(COMPLETE):
            contents[name] = content
            if json.loads(content.partition(b"\n")[0]) != options:
                raise PreparationError(f"{path}: this part was prepared with other options")
    every = {f"journal.part-{number}-of-{counts[0]}.jsonl": number for number in range(1, counts[0] + 1)}
    if missing := [f"--part {number}/{counts[0]}" for name, number in every.items() if name not in contents]:
        raise PreparationError(f"{output}: some parts are missing or not complete, run {', '.join(missing)}")
    with open(journal, "ab") as file:
        if not file.tell():
            file.write(json.dumps(options).encode())
        file.writelines(b"\n" + contents[name] for name in every)
    return list(every)


def _clean(output: Path, reencode: bool, shards: bool) -> None:
    """Removes what killed runs left half-written, only where runs write."""
    for left in output.glob(f".*{PARTIAL}"):
        left.unlink()
    for folder in ["videos"] * reencode + ["shards"] * shards:
        remove_partial(output / folder)


@dataclass
class _Run:
    """One run over all files: `files` are the facts about each, `names` the paths for the lists."""

    work: Work
    at_work: Workers
    timeout_seconds: float
    progress: Progress
    journal: Journal
    shard_bytes: int | None
    part: tuple[int, int] | None
    merge: bool

    def outcomes(self, entries: Sequence[Entry]) -> list[Outcome]:
        videos, paths = self.work.videos, list(dict.fromkeys(entry.path for entry in entries))
        self.saved, self.known = time.monotonic(), _listing(videos) if is_uri(videos) else {}
        self.files = {path: self._look(path) for path in paths}
        mine = paths if self.part is None else paths[self.part[0] - 1 :: self.part[1]]
        # The earlier file for each copy; only files of one size are compared.
        sizes = Counter(facts.get("bytes") for facts in self.files.values())
        alike = [path for path in mine if (size := self.files[path].get("bytes")) and sizes[size] > 1]
        if unknown := [path for path in alike if "sha256" not in self.files[path]]:
            self._work("comparing", self.work.fingerprint, {path: path for path in unknown}, len(unknown))
        hashes = {path: self.files[path]["sha256"] for path in alike if "sha256" in self.files[path]}
        earliest = {sha256: path for path, sha256 in reversed(hashes.items())}
        first = {path: earliest[sha256] for path, sha256 in hashes.items() if earliest[sha256] != path}
        originals = [path for path in mine if "bytes" in self.files[path] and path not in first]
        # Of all files: a part knows no copies.
        self.names = {path: path for path in paths} if self.work.short_side is None else _output_names(paths)
        self.there = (
            {} if self.work.short_side is None else stores.files_below(stores.child(self.work.output, "videos"))
        )
        if self.merge:
            self._forget(path for path in first if "status" in self.files[path])
        left = {path: (path, self.names[path]) for path in originals if not self._is_done(path)}
        self._work("checking", self.work.check, left, len(originals))
        listed: dict[tuple[str, str], Entry] = {}
        found = [self._outcome(entry, first.get(entry.path, entry.path), listed) for entry in entries if not self.part]
        self.shards = self._plan(found) if self.shard_bytes else []
        self._pack()
        return found

    def _look(self, path: str) -> Facts:
        full = rooted(self.work.videos, path)
        try:
            if self.known and not is_uri(path) and path not in self.known:
                raise FileNotFoundError
            found = self.known.get(path) or self.work.source.version(full)
        except (FileNotFoundError, NotADirectoryError):
            return {"status": "missing", "reason": "no such file"}
        except DecodeError as error:
            return {"status": "bad", "reason": error.reason}
        except OSError as error:
            return {"status": "bad", "reason": str(error.strerror), "failed": error.errno in ENVIRONMENT}
        if path != path.strip() or re.search(r"[\r\n\udc80-\udcff]", path):
            return {"status": "bad", "reason": "a list cannot hold its name: rename it"}
        return self.journal.known(path, *found)

    def _is_done(self, path: str) -> bool:
        facts = self.files[path]
        if facts.get("status") != "ok":
            return facts.get("status") == "bad" and facts.get("timeout", self.timeout_seconds) >= self.timeout_seconds
        listed, name = facts["listed"], self.names[path]
        if self.work.short_side is None:
            return bool(listed["path"] == name)
        return bool(listed["path"] == name and name in self.there and self.there[name].bytes == listed["bytes"])

    def _forget(self, copies: Iterable[str]) -> None:
        """Removes what parts have made of files that are copies of other parts' files."""
        for path in copies:
            facts = self.files[path]
            if "listed" in facts and self.work.short_side is not None:
                stores.remove(self.work.place(facts["listed"]["path"]))
            self.files[path] = {key: facts[key] for key in (*IDENTITY, "sha256")}
            self.journal.add(self.files[path])

    def _work(self, stage: str, function: Callable[..., Facts], arguments: dict[str, Any], total: int) -> None:
        """Learns the facts that a function finds."""
        before, lost = total - len(arguments), 0
        self.progress(stage, before, total, None)
        for done, (path, found) in enumerate(self.at_work(function, [*arguments.items()]), before + 1):
            lost = lost + 1 if found.pop("lost", False) else 0
            if lost == LOST_VIDEOS:
                raise StoreError(f"{found['reason']}; the same command continues")
            if stage == "comparing" and "sha256" not in found:
                found = {}  # the file has no known copy, and the check decides
            if "listed" in found:
                found["listed"].setdefault("bytes", self.files[path]["bytes"])
            self.files[path] = found if "failed" in found else self.files[path] | found
            if "failed" not in found:
                self.journal.add(self.files[path])
                if time.monotonic() > self.saved + SAVING_SECONDS:
                    self.save()
            self.progress(stage, done, total, found.get("status"))

    def save(self) -> None:
        """Puts the journal into the store, if the output is in one."""
        if is_uri(self.work.output):
            stores.put(self.journal.path, stores.child(self.work.output, self.journal.path.name))
        self.saved = time.monotonic()

    def _plan(self, outcomes: Sequence[Outcome]) -> list[Shard]:
        """The shards of all good videos, each split's in the order of its list."""
        entries, shards = defaultdict[str, list[Entry]](list), list[Shard]()
        good = {outcome.facts["listed"]["path"]: outcome for outcome in reversed(outcomes) if outcome.status == "ok"}
        for outcome in outcomes:
            if outcome.status == "ok":
                entries[outcome.facts["listed"]["path"]].append(outcome.entry)
        keys = _keys(good)
        for split in SPLITS:
            packed = []
            for name in (name for name in entries if entries[name][0].split == split):
                facts, key = good[name].facts, keys[name]
                suffix = os.path.splitext(re.sub(r"::.*", "", name))[1] or ".mp4"
                note, content = _note([entry for entry in entries[name] if entry.split == split])
                versions = facts["listed"]["bytes"], facts["mtime_ns"]
                packed.append(Packed(name, *versions, f"{key}{suffix}", f"{key}{note}" if note else "", content))
            shards += plan(split, packed, self.shard_bytes or 0)
        return shards

    def _pack(self) -> None:
        """Writes the shards that are not there yet."""
        there = stores.files_below(stores.child(self.work.output, "shards")) if self.shards else {}
        for shard in self.shards:
            self.files[shard.path] = self.journal.known(shard.path, shard.size, 0)
        left = {
            shard.path: shard
            for shard in self.shards
            if self.files[shard.path].get("digest") != shard.digest
            or there.get(shard.path.removeprefix("shards/"), Stat(-1, 0)).bytes != shard.size
        }
        if self.shards:
            self._work("packing", self.work.pack, left, len(self.shards))
        if bad := [path for path, shard in left.items() if self.files[path].get("digest") != shard.digest]:
            raise PreparationError(
                f"{bad[0]} cannot be packed: {self.files[bad[0]]['reason']}; the same command continues"
            )
        self.in_shards = dict(entry for shard in self.shards for entry in shard.entries)

    def forget_other_shards(self) -> list[str]:
        """The paths of shards that earlier runs have written, and that this one's lists do not name."""
        wanted = {shard.path for shard in self.shards}
        return self.journal.forget(lambda path, facts: bool(wanted) and "digest" in facts and path not in wanted)

    def _outcome(self, entry: Entry, original: str, listed: dict[tuple[str, str], Entry]) -> Outcome:
        facts = self.files[original]
        if facts["status"] != "ok":
            return Outcome(entry, facts["status"], facts["reason"], {}, facts.get("failed", False))
        _, start, _ = split_span(entry.span)
        if start >= (seconds := facts["measured"]["seconds"]):
            return Outcome(
                entry, "bad", f"the span starts at {start:g} s, and the video ends after {seconds:.2f} s", {}
            )
        earlier = listed.setdefault((original, entry.span), entry)
        if earlier is entry:
            notes = (facts["reason"], "" if entry.label is not None else "no label: in no list")
            return Outcome(entry, "ok", "; ".join(filter(None, notes)), facts)
        reason = "listed before" if entry.path == earlier.path else f"same content as {earlier.path}"
        reason += f", which is in {earlier.split}, not {entry.split}" if entry.split != earlier.split else ""
        reason += f", which has label {earlier.label}, not {entry.label}" if entry.label != earlier.label else ""
        return Outcome(entry, "duplicate", reason, facts)


def _listing(videos: str) -> dict[str, Stat]:
    """The files below a URI, and its folders of frames."""
    found, frames = stores.files_below(videos), defaultdict[str, list[Stat]](list)
    for name, one in found.items():
        if os.path.splitext(name)[1].lower() in PICTURES:
            frames[os.path.dirname(name)].append(one)
    folders = {folder: Stat(sum(one.bytes for one in all_), all_[0].mtime_ns) for folder, all_ in frames.items()}
    return folders | found


def _note(entries: Sequence[Entry]) -> tuple[str, bytes]:
    """What is beside a video in a tar: extension and content, none where it has no label."""
    labels = [(*split_span(entry.span)[1:], str(entry.label)) for entry in entries if entry.label is not None]
    if not labels:
        return "", b""
    if len(labels) == 1 and not entries[0].span:
        label = labels[0][2]
        return (".cls", label.encode()) if label.isdecimal() else (".json", json.dumps({"label": label}).encode())
    return ".json", json.dumps({"spans": labels}).encode()


def _output_names(paths: Iterable[str]) -> dict[str, str]:
    """Paths of re-encoded files, different from each other and from their folders; an mp4 file keeps its path."""
    plain = {path: MEMBER.sub(r"\g<shard>/\g<member>", path) for path in paths}  # tar://
    plain = {path: stores.ADDRESS.sub("", name) for path, name in plain.items()}
    safe = {
        path: "/".join(part for part in name.split("/") if part not in ("", ".", "..")) for path, name in plain.items()
    }
    names, taken = {}, {str(folder) for path in safe.values() for folder in PurePosixPath(path).parents}
    for path in sorted(safe, key=lambda path: not path.endswith(".mp4")):
        numbered = (f"{safe[path]}.{number}" for number in itertools.count(2))
        stems = itertools.chain([os.path.splitext(safe[path])[0], safe[path]], numbered)
        names[path] = next(name for stem in stems if (name := f"{stem}.mp4") not in taken)
        taken.add(names[path])
    return names


def _keys(names: Iterable[str]) -> dict[str, str]:
    """Paths in a tar, without extension: of the files' names, without dots, which webdataset takes for an extension."""
    keys, taken = {}, set[str]()
    for name, safe in _output_names(names).items():
        folder, stem = os.path.split(os.path.splitext(safe)[0])
        plain = os.path.join(folder, stem.replace(".", "_"))
        keys[name] = next(key for n in itertools.count(1) if (key := plain + f"_{n}" * (n > 1)) not in taken)
        taken.add(keys[name])
    return keys


def _write_results(
    output: Path, catalogue: Catalogue, outcomes: Sequence[Outcome], in_shards: dict[str, str], written: bool
) -> list[str]:
    """Writes lists, labels, report and index; returns the names of those files, and of those that must not be there."""
    texts: dict[str, list[str]] = {f"{split}.csv": [] for split in SPLITS}
    indexed, report = {}, io.StringIO()
    table = csv.writer(report, lineterminator="\n")
    table.writerow(["path", "status", "reason", *MEASURED])
    for entry, status, reason, facts, _ in outcomes:
        values = [facts["measured"][name] if facts else "" for name in MEASURED]
        values = [round(value, 3) if isinstance(value, float) else value for value in values]
        table.writerow([entry.path + entry.span, status, " ".join(reason.split()), *values])
        if status == "ok":
            listed = facts["listed"]
            name, mtime_ns = in_shards.get(listed["path"], listed["path"]), 0 if written else facts["mtime_ns"]
            if entry.label is not None:
                texts[f"{entry.split}.csv"].append(f"{name}{entry.span} {entry.label}\n")
            numbers = (listed["frames"], listed["fps"], listed["seconds"], np.array(listed["keyframes"], np.float64))
            indexed[name] = IndexedVideo(*numbers, listed["bytes"], mtime_ns)
    write_index(output, indexed)
    texts |= {"labels.txt": [f"{name}\n" for name in catalogue.class_names], "report.csv": [report.getvalue()]}
    for name, lines in texts.items():
        if not lines and name != "labels.txt":
            (output / name).unlink(missing_ok=True)
            continue
        with appearing(output / name) as partial:
            partial.write_text("".join(lines), encoding="utf-8", errors="backslashreplace", newline="\n")
    return [FILE, *texts]
