"""What is known of files, written down as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octvideo.errors import PreparationError
from octvideo.files import appearing


class Journal:
    """What is known of files: lines of JSON that are added one by one, so a killed run loses at most the last.

    A file is known by its path, size and time of change; a later line about a file adds to what earlier ones say.

    Args:
        path: the file; it is made if it is not there.
        options: its first line, which all runs must share.

    Raises:
        PreparationError: the journal is of a run with other options.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self.options = options
        self._known: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        records = [record for record in map(_record, lines) if record is not None]
        if records and records[0] != options:
            there = ", ".join(f"{key} {value}" for key, value in records[0].items())
            here = ", ".join(f"{key} {value}" for key, value in options.items())
            raise PreparationError(
                f"{path.parent} was prepared with other options ({there}; now {here}): "
                "give the same ones, or another folder"
            )
        for record in records[1:]:
            if _is_of_a_file(record):
                self._learn(record)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if not records:
            self._append(options)

    def known(self, path: str, status: os.stat_result) -> dict[str, Any]:
        """What is known of a file, if it is still the same file."""
        record = self._known.get(path, {})
        return record if record and _file_of(record) == (path, status.st_size, status.st_mtime_ns) else {}

    def add(self, path: str, status: os.stat_result, facts: dict[str, Any]) -> None:
        """Writes down what has become known of a file."""
        record = {"path": path, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, **facts}
        self._learn(record)
        # On a full disk this is lost, unless there is room when the run ends.
        with contextlib.suppress(OSError):
            self._append(record)

    def _learn(self, record: dict[str, Any]) -> None:
        former = self._known.get(record["path"], {})
        same = former and _file_of(former) == _file_of(record)
        self._known[record["path"]] = {**former, **record} if same else record

    def _append(self, record: dict[str, Any]) -> None:
        # The line before may be torn, by a full disk or a killed run.
        self._file.write(b"\n" + json.dumps(record).encode() + b"\n")

    def write_in_order(self, paths: Sequence[str]) -> None:
        """Writes the journal anew: a line a file, these first, then what is known of files of other sources."""
        others = sorted(self._known.keys() - set(paths))
        records = [self._known[path] for path in (*paths, *others) if path in self._known]
        with appearing(self.path) as partial, open(partial, "w", encoding="ascii") as file:
            for record in (self.options, *records):
                file.write(json.dumps(record, sort_keys=record is not self.options) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # a torn line, or an empty one
        return None
    return record if isinstance(record, dict) else None


def _is_of_a_file(record: dict[str, Any]) -> bool:
    kinds = {"path": str, "bytes": int, "mtime_ns": int}
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _file_of(record: dict[str, Any]) -> tuple[str, int, int]:
    return record["path"], record["bytes"], record["mtime_ns"]
