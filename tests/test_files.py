"""Files that appear whole and stay, and locks that one process holds."""

import errno
import os
import stat
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
        assert partial == path.with_name(f".{os.uname().nodename}.{os.getpid()}.partial")
        partial.write_text("a")
    assert synced == [(str(partial), False), (str(path.parent), True)]
    assert [file.name for file in path.parent.iterdir()] == ["a.csv"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(UnicodeEncodeError), appearing(tmp_path / "a.csv") as partial:
        partial.write_text("new\ud800", encoding="utf-8")
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


def write(path, text):
    with appearing(path) as partial:
        partial.write_text(text)


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced_with_its_permissions(tmp_path):
    target, link = tmp_path / "below" / "a.json", tmp_path / "link"
    write(target, "old")
    target.chmod(0o640)
    (tmp_path / "second").symlink_to("below/a.json")
    link.symlink_to(tmp_path / "second")
    with target.open() as reader:
        write(link, "new")
        assert reader.read() == "old"  # it was replaced and not written over
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new", 0o640)
    assert (os.readlink(link), os.readlink(tmp_path / "second")) == (str(tmp_path / "second"), "below/a.json")
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


def test_a_link_to_nothing_makes_its_file_and_no_folder(tmp_path):
    (tmp_path / "link").symlink_to("new.json")
    write(tmp_path / "link", "new")
    assert (tmp_path / "new.json").read_text() == "new"
    (tmp_path / "unmounted").symlink_to("disk/new.json")
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: '/\S+/unmounted'$"):
        write(tmp_path / "unmounted", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new.json", "unmounted"]


def test_a_pipe_gets_the_bytes_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "link", "new")
    assert os.read(reader, 100) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_device_gets_the_bytes_and_stays(tmp_path):
    device = tmp_path / "full"  # one of our own, for a mistake here may replace it
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))
        device.open("wb").close()
    except OSError:
        pytest.skip("no device can be made here")
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{device}'$"):
        write(device, "new")
    assert device.is_char_device()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_standard_output_gets_the_bytes_in_their_place_be_it_a_file_or_a_pipe(tmp_path):
    (tmp_path / "link").symlink_to("/proc/self/fd/1")
    code = "import sys, pathlib; from octvideo.files import appearing\n"
    code += "print('one')\nwith appearing(pathlib.Path(sys.argv[1])) as path: path.write_text('two\\n')\nprint('three')"
    for name in (tmp_path / "link", "/dev/stdout", "/proc/self/fd/1"):
        command = [sys.executable, "-c", code, name]
        with (tmp_path / "out").open("w+b") as file:
            subprocess.run(command, stdout=file, check=True)
            assert os.stat(file.fileno()).st_nlink == 1  # not replaced
        piped = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        assert (tmp_path / "out").read_bytes() == piped == b"one\ntwo\nthree\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_what_cannot_be_written_is_named_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("old")
    cases = {"folder": "Is a directory", "link": "Is a directory", "circle": "Too many levels of symbolic links"}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "file")  # as root, all may be written to
    for name, reason in (cases | {"file": "Permission denied", "file/new": "Not a directory"}).items():
        begun, message = False, rf"^\[Errno \d+\] {reason}: '{tmp_path / name}'$"
        with pytest.raises(OSError, match=message), appearing(tmp_path / name):
            begun = True
        assert not begun, name  # so that no work is lost
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["circle", "file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_read_only_folder_or_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, number):
    (tmp_path / "a.csv").write_text("old")

    def refuse(source, target):
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)  # as root, all folders may be written to
    with pytest.raises(OSError, match=rf"^\[Errno {number}\] {os.strerror(number)}: '{tmp_path / 'a.csv'}'$"):
        write(tmp_path / "a.csv", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "old"
