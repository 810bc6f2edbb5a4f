"""The journal of a preparation: what is known of each file, written as soon as it is known."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from octvideo.errors import PreparationError
from octvideo.files import appearing

Facts = dict[str, Any]  # what is known of a file, as JSON has it
COMPLETE = b'\n{"complete": true}\n'  # ends the journal of a part whose files are all done
IDENTITY = {"path": str, "bytes": int, "mtime_ns": int}  # a file with other values is another file


class Journal:
    """Facts about files, appended as lines of JSON, so a killed run loses at most the last one.

    The first line holds the options, which all runs must share (else PreparationError). A later line about a file adds
    to the earlier ones.
    """

    def __init__(self, path: Path, options: Facts, where: str | None = None) -> None:
        self.path, self.options = path, options
        self._known: dict[str, Facts] = {}
        records = []
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            with contextlib.suppress(ValueError):  # a torn line, or an empty one
                if isinstance(record := json.loads(line), dict):
                    records.append(record)
        if records and records[0] != options:
            before, now = (", ".join(f"{key} {value}" for key, value in one.items()) for one in (records[0], options))
            changed = f"was prepared with other options ({before}; now {now})"
            raise PreparationError(f"{where or path.parent} {changed}: give the same ones, or another folder")
        for record in records[1:]:
            if all(isinstance(record.get(key), kind) for key, kind in IDENTITY.items()):
                self._known[record["path"]] = self.known(*(record[key] for key in IDENTITY)) | record
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.close = self._file.close
        if not records:
            self._append(options)

    def known(self, path: str, size: int, mtime_ns: int) -> Facts:
        """The facts about a file; its identity alone if it is not the file that the journal knows."""
        identity = dict(zip(IDENTITY, (path, size, mtime_ns), strict=True))
        known = self._known.get(path, {})
        return known if identity.items() <= known.items() else identity

    def add(self, facts: Facts) -> None:
        """Writes down the facts about a file."""
        self._known[facts["path"]] = facts
        with contextlib.suppress(OSError):  # a full disk; write_in_order has another go
            self._append(facts)

    def forget(self, which: Callable[[str, Facts], bool]) -> list[str]:
        """Leaves some files out of what `write_in_order` writes; returns their paths."""
        left = [path for path, facts in self._known.items() if which(path, facts)]
        for path in left:
            del self._known[path]
        return left

    def _append(self, record: Facts) -> None:
        # The line before may be torn, by a full disk or a killed run.
        self._file.write(b"\n" + json.dumps(record).encode() + b"\n")

    def write_in_order(self, paths: Sequence[str], complete: bool = False) -> None:
        """Rewrites the journal with a line per file: first these, then files of other sources, sorted by path.

        That of a part says at its end that it is complete.
        """
        ordered = dict.fromkeys((*paths, *sorted(self._known)))
        lines = [json.dumps(self._known[path], sort_keys=True) for path in ordered if path in self._known]
        with appearing(self.path) as partial:
            text = "\n".join([json.dumps(self.options), *lines, ""])
            partial.write_bytes(text.encode("ascii") + (COMPLETE if complete else b""))
