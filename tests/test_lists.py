"""List files: what is read, and what is refused with file and line."""

import re

import pytest

from octvideo.data.lists import read_class_names, read_list
from octvideo.errors import ListError


@pytest.fixture
def write(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "list.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def test_paths_with_spaces_blank_lines_and_windows_line_ends(write):
    videos = read_list(write("a b/c d.mp4 3\r\n\r\nx.mp4 0\r\n"), root="/videos")
    assert list(videos.paths) == ["/videos/a b/c d.mp4", "/videos/x.mp4"]
    assert videos.labels.tolist() == [3, 0]


def test_separator_header_and_absolute_paths(write):
    path = write("path,label\n/elsewhere/a,b.mp4,1\n", encoding="utf-8-sig")
    videos = read_list(path, root="/videos", separator=",", header=True)
    assert list(videos.paths) == ["/elsewhere/a,b.mp4"]
    assert videos.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\nb.mp4\n", r"list.csv:2: expected 'path class number', got 'b.mp4'"),
        ("a.mp4 zero\n", r"list.csv:1: expected"),
        (" 3\n", r"list.csv:1: expected"),
        ("a.mp4 0\nb.mp4 5\n", r"list.csv:2: class number must be 0 to 4 \(num_classes is 5\), got 5"),
        ("a.mp4 -1\n", r"list.csv:1: class number must be 0 to 4"),
        ("\n", "no video in it"),
    ],
)
def test_a_wrong_line_is_an_error_with_file_and_line(write, text, message):
    with pytest.raises(ListError, match=message):
        read_list(write(text), num_classes=5)


def test_a_tab_is_shown_where_it_is_missing(write):
    with pytest.raises(ListError, match=re.escape(r"expected 'path\tclass number', got 'a.mp4 0'")):
        read_list(write("a.mp4 0\n"), separator="\t")


def test_without_a_number_of_classes_only_negative_labels_are_wrong(write):
    assert read_list(write("a.mp4 99\n")).labels.tolist() == [99]
    with pytest.raises(ListError, match="must be 0 to 2147483647, got -2"):
        read_list(write("a.mp4 -2\n"))


def test_a_missing_or_binary_list_is_an_error(tmp_path):
    with pytest.raises(ListError, match=r"nothing.csv: No such file"):
        read_list(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ListError, match=r"binary.csv: not a text file in UTF-8"):
        read_list(tmp_path / "binary.csv")


def test_class_names_are_the_lines_of_a_file(write):
    assert read_class_names(write("\ufeffplaying cello\r\nyoga \n\n"), num_classes=2) == ["playing cello", "yoga"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\n", r"list.csv: expected a line for each of 3 classes \(num_classes\), got 2"),
        ("a\n\nb\n", r"list.csv:2: expected the name of class 1, got an empty line"),
        ("\nb\nc\nd\n", r"list.csv:1: expected the name of class 0, got an empty line"),
        ("", r"list.csv:1: expected the name of class 0, got an empty line"),
    ],
)
def test_missing_class_names_are_an_error(write, text, message):
    with pytest.raises(ListError, match=message):
        read_class_names(write(text), num_classes=3)


def test_an_address_stays_as_it_was_typed(write):
    assert list(read_list(write("s3://b/a.mp4 0\nb.mp4 0\n"), root="/videos").paths) == [
        "s3://b/a.mp4",
        "/videos/b.mp4",
    ]
