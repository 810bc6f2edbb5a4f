"""The index: what was written is found again, quickly and without the paths; other files are refused."""

import pickle

import numpy as np
import pytest

from octvideo.data.index import IndexedVideo, VideoIndex, write_index
from octvideo.errors import IndexFileError
from octvideo.files import remove_partial


def video(number):
    """A video that differs from all others in everything, with 0 to 4 key frames."""
    return IndexedVideo(number, number + 0.5, number / 7, np.arange(number % 5) * 1.1, 1000 + number, 2**60 + number)


@pytest.fixture
def index(tmp_path):
    write_index(tmp_path, {f"class {number % 3}/{number}.mp4": video(number) for number in range(100)})
    return VideoIndex(tmp_path / "index.bin")


def test_every_video_is_found_by_its_path(index):
    assert len(index) == 100
    for number in range(100):
        found = index[index.rows([f"class {number % 3}/{number}.mp4"])[0]]
        expected = video(number)
        assert found[:3] == expected[:3]
        assert np.array_equal(found.keyframe_seconds, expected.keyframe_seconds)
        assert found.bytes == expected.bytes
        assert found.mtime_ns == expected.mtime_ns
    assert index.rows(["class 0/1.mp4"]).tolist() == [-1]


def test_rows_of_many_paths_come_at_once(index):
    paths = ["class 2/5.mp4", "nothing.mp4", "class 0/99.mp4", "class 2/5.mp4"]
    rows = index.rows(np.array(paths))
    assert rows.dtype == np.int64
    assert [-1 if row < 0 else index[row].frames for row in rows] == [5, -1, 99, 5]
    assert index.rows([]).shape == (0,)


def test_arrays_are_mapped_not_read_also_in_another_process(index):
    for column in index._columns:
        while isinstance(column, np.ndarray) and not isinstance(column, np.memmap):
            column = column.base
        assert isinstance(column, np.memmap)
    message = pickle.dumps(index)
    assert len(message) < 500
    assert pickle.loads(message)[3].frames == index[3].frames


def test_an_index_may_be_empty(tmp_path):
    write_index(tmp_path, {})
    empty = VideoIndex(tmp_path / "index.bin")
    assert len(empty) == 0
    assert empty.rows(["a.mp4"]).tolist() == [-1]


def test_the_same_videos_give_the_same_bytes_in_any_order(index, tmp_path):
    before = index.path.read_bytes()
    write_index(tmp_path, {f"class {number % 3}/{number}.mp4": video(number) for number in reversed(range(100))})
    assert index.path.read_bytes() == before


def test_rows_outside_are_refused(index):
    for row in (-1, 100):
        with pytest.raises(IndexError, match=f"row must be 0 to 99, got {row}"):
            index[row]


def test_missing_cut_and_foreign_files_are_refused(index, tmp_path):
    whole = index.path.read_bytes()
    for content in (whole[:-8], whole[:20], b"octvideo index 1" + whole[16:], whole + bytes(8)):
        (tmp_path / "index.bin").write_bytes(content)
        with pytest.raises(IndexFileError, match=r"index.bin: not a complete index of this version"):
            VideoIndex(tmp_path / "index.bin")
    (tmp_path / "index.bin").write_bytes(b"")
    with pytest.raises(IndexFileError, match=r"index.bin: "):
        VideoIndex(tmp_path / "index.bin")
    with pytest.raises(IndexFileError, match="No such file"):
        VideoIndex(tmp_path / "nowhere" / "index.bin")


def test_an_index_that_cannot_be_written_leaves_the_former_one(index, tmp_path):
    before = index.path.read_bytes()
    with pytest.raises(AttributeError):
        write_index(tmp_path, {"a.mp4": None})
    broken = video(1)._replace(keyframe_seconds=["no number"])
    with pytest.raises(ValueError, match="could not convert"):
        write_index(tmp_path, {"a.mp4": broken})
    assert index.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["index.bin"]


def test_what_killed_programs_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "empty" / "too").mkdir(parents=True)
    for name in (".1.partial", "below/.22.partial", "below/kept", "kept.partial", ".kept"):
        (tmp_path / name).touch()
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".kept", "below", "kept", "kept.partial"]
