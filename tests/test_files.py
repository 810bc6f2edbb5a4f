"""Files that appear whole and stay, and locks that one process holds."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octvideo.files import appearing, lock


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "new" / "a.csv"
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((os.readlink(f"/proc/self/fd/{number}"), path.exists()))
    )
    with appearing(path) as partial:
        assert partial == path.with_name(f".{os.getpid()}.partial")
        partial.write_text("a")
    assert synced == [(str(partial), False), (str(path.parent), True)]
    assert [file.name for file in path.parent.iterdir()] == ["a.csv"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(KeyError), appearing(tmp_path / "a.csv") as partial:
        partial.write_text("new")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "old"


def take_lock_elsewhere(path):
    code = "import sys, pathlib, octvideo.files as f; print(f.lock(pathlib.Path(sys.argv[1])) is not None)"
    return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout


def test_a_lock_is_one_processes_own_until_it_is_closed(tmp_path):
    held = lock(tmp_path / ".lock")
    assert take_lock_elsewhere(tmp_path / ".lock") == "False\n"
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        os._exit(0)  # a child's end, which closes the file there, does not release it
    assert take_lock_elsewhere(tmp_path / ".lock") == "False\n"
    held.close()
    assert take_lock_elsewhere(tmp_path / ".lock") == "True\n"


def test_without_locks_there_is_no_guard(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with lock(Path(tmp_path / ".lock")) as file:
        assert not file.closed
