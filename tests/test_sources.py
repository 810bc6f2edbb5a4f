"""Sources: folders, lists and annotations give the right files, labels and splits, or an error that says where."""

import csv
import json
import re

import pytest

from octvideo.data.preparation.sources import Entry, read_sources
from octvideo.errors import ListError


@pytest.fixture
def write(tmp_path):
    def write(name, text=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def read(*sources, videos, **options):
    entries, names = read_sources(sources, videos, **options)
    return [tuple(entry[:3]) for entry in entries], names


def test_a_folder_per_class_numbers_the_classes_in_alphabetical_order(tmp_path, write):
    for name in ("yoga/b.mp4", "yoga/a b.avi", "archery/deep/c.mkv", ".hidden/d.mp4", "yoga/.e.mp4", "yoga/notes.txt"):
        write(name)
    write("LICENSE")
    write("stray.webm")
    (tmp_path / "archery" / "round").symlink_to(tmp_path, target_is_directory=True)  # must not be walked for ever
    assert read(tmp_path, videos=tmp_path) == (
        [
            ("archery/deep/c.mkv", 0, "train"),
            ("stray.webm", None, "train"),
            ("yoga/a b.avi", 1, "train"),
            ("yoga/b.mp4", 1, "train"),
        ],
        ["archery", "yoga"],
    )


def test_folders_named_as_splits_hold_the_class_folders(tmp_path, write):
    for name in ("train/yoga/a.mp4", "validate/archery/b.mp4", "test/c.mp4"):
        write(name)
    write("loose.mp4")
    entries, names = read(tmp_path, videos=tmp_path)
    assert entries == [
        ("loose.mp4", None, "train"),
        ("test/c.mp4", None, "test"),
        ("train/yoga/a.mp4", 1, "train"),
        ("validate/archery/b.mp4", 0, "val"),
    ]
    assert names == ["archery", "yoga"]


def test_a_class_may_be_called_as_a_split(tmp_path, write):
    write("test/a.mp4")
    write("yoga/b.mp4")
    assert read(tmp_path, videos=tmp_path) == (
        [("test/a.mp4", 0, "train"), ("yoga/b.mp4", 1, "train")],
        ["test", "yoga"],
    )


def test_the_output_is_no_source_even_inside_the_videos(tmp_path, write):
    write("yoga/a.mp4")
    write("prepared/videos/yoga/a.mp4")
    assert read(tmp_path, videos=tmp_path, output=tmp_path / "prepared")[0] == [("yoga/a.mp4", 0, "train")]
    assert len(read(tmp_path, videos=tmp_path, output=tmp_path / "elsewhere")[0]) == 2


def test_lists_keep_their_numbers_and_take_the_names_beside_them(tmp_path, write):
    train = write("lists/train.csv", "a b/c.mp4 1\n\n./d.mp4 0\n")
    val = write("lists/kinetics_val.csv", f"{tmp_path}/e.mp4 1\n/elsewhere/f.mp4 1\r\n")
    write("lists/labels.txt", "yoga\narchery\n")
    expected = [
        ("a b/c.mp4", 1, "train"),
        ("d.mp4", 0, "train"),
        ("e.mp4", 1, "val"),
        ("/elsewhere/f.mp4", 1, "val"),
    ]
    assert read(train, val, videos=tmp_path) == (expected, ["yoga", "archery"])
    assert read(tmp_path / "lists", videos=tmp_path) == (expected[:2], ["yoga", "archery"])  # train.csv is in it


def test_numbered_lists_without_names_name_the_classes_by_their_numbers(tmp_path, write):
    assert read(write("l.txt", "a.mp4 2\nb.mp4 0\n"), videos=tmp_path)[1] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("text", "path", "label"),
    [
        ("a,b.mp4,playing cello\n", "a,b.mp4", "playing cello"),
        ("a,b.mp4 yoga\n", "a,b.mp4", "yoga"),
        ("a,b/c yoga\n", "a,b/c", "yoga"),
        ("a.avi b.mp4 yoga\n", "a.avi b.mp4", "yoga"),
        ("path,label\na b.mp4,yoga\n", "a b.mp4", "yoga"),
        ("\ufeffvideo label\na b.mp4 yoga\n", "a b.mp4", "yoga"),
    ],
)
def test_the_last_comma_or_space_of_a_line_counts(tmp_path, write, text, path, label):
    assert read(write("test.csv", text), videos=tmp_path) == ([(path, 0, "test")], [label])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("testlist01.txt", "test"),
        ("my_validation.csv", "val"),
        ("training.csv", "train"),
        ("kinetics400_val_list_videos.txt", "val"),
        ("ucf101_val_split_1_videos.txt", "val"),
        ("test_videofolder.txt", "test"),
        ("K400-Validate-340x256.csv", "val"),
        ("256val2.csv", "val"),
        ("my_test_testlist.csv", "test"),
        ("latest.csv", "train"),
        ("trainval.csv", "train"),
        ("évaluation_interval.csv", "train"),
    ],
)
def test_the_split_is_a_word_in_the_name_of_a_list(tmp_path, write, name, split):
    assert read(write(name, "a.mp4 0\n"), videos=tmp_path)[0] == [("a.mp4", 0, split)]


def test_a_list_with_two_splits_in_its_name_is_refused_unless_its_lines_have_splits(tmp_path, write):
    with pytest.raises(ListError, match=r"train_val.csv: is its split train or val"):
        read_sources([write("train_val.csv", "a.mp4 0\n")], tmp_path)
    lines = "youtube_id,time_start,time_end,split\na,4,14,test\n"
    assert read(write("train_val.csv", lines), videos=tmp_path)[0] == [("a_000004_000014", None, "test")]


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4 arm wrestling", "a.mp4", 2),
        ("a b.mp4  arm wrestling", "a b.mp4", 2),
        ("a.mp4,archery, crossbow", "a.mp4", 1),
        ("arm wrestling/a.mp4 wrestling", "arm wrestling/a.mp4", 0),
    ],
)
def test_known_labels_may_have_several_words_and_the_longest_counts(tmp_path, write, line, path, label):
    labels = write("order.txt", "wrestling\narchery, crossbow\narm wrestling\n")
    assert read(write("l.csv", line), videos=tmp_path, labels=labels)[0] == [(path, label, "train")]
    write("lists/labels.txt", labels.read_text())
    entries, names = read_sources([write("lists/l.csv", line)], tmp_path)
    assert [(entry.path, names[entry.label]) for entry in entries] == [(path, labels.read_text().split("\n")[label])]


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("a.mp4 arm wrestling", "separate them by a comma, or give class numbers"),
        ("a b.mp4 120 5", "separate them by a comma, or give class numbers"),
        ('a.mp4,"archery, crossbow"', "give class numbers, or a file of all labels"),
    ],
)
def test_a_label_is_not_guessed_where_a_line_can_be_read_in_two_ways(tmp_path, write, line, advice):
    message = re.escape(f"l.csv:1: cannot tell where the path ends and the label starts in {line!r}: {advice}")
    with pytest.raises(ListError, match=message):
        read_sources([write("l.csv", line)], tmp_path)


def test_a_file_of_labels_fixes_the_numbers(tmp_path, write):
    labels = write("order.txt", "yoga\nspare\narchery\n")
    source = write("l.csv", "a.mp4 archery\nb.mp4 yoga\n")
    assert read(source, videos=tmp_path, labels=labels) == (
        [("a.mp4", 2, "train"), ("b.mp4", 0, "train")],
        ["yoga", "spare", "archery"],
    )


def test_named_sources_join_numbered_ones_that_have_names(tmp_path, write):
    numbered = write("numbered/val.csv", "a.mp4 0\n")
    write("numbered/labels.txt", "yoga\narchery\n")
    named = write("named.csv", "b.mp4 archery\n")
    assert read(numbered, named, videos=tmp_path)[0] == [("a.mp4", 0, "val"), ("b.mp4", 1, "train")]


def test_kinetics_files_are_found_by_id_and_seconds_anywhere_below_the_folder(tmp_path, write):
    for name in ("yoga/A_1-x_000004_000014.mkv", "b_000100_000110.part", "b_000100_000110.mp4", "c_000000_000010.jpg"):
        write(f"videos/{name}")
    source = write(
        "kinetics_val.csv",
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        'yoga,A_1-x,4,14,val,0\n"archery, crossbow",b,100.0,110.0,validate,0\nyoga,c,0,10,train,1\n,d,5,15,test,0\n',
    )
    assert read(source, videos=tmp_path / "videos") == (
        [
            ("yoga/A_1-x_000004_000014.mkv", 1, "val"),
            ("b_000100_000110.mp4", 0, "val"),
            ("c_000000_000010", 1, "train"),
            ("d_000005_000015", None, "test"),
        ],
        ["archery, crossbow", "yoga"],
    )
    quoted = write(
        "quoted.csv", '"label", "youtube_id","time_start","time_end","split"\n"yoga","A_1-x","4","14","val"\n'
    )
    assert read(quoted, videos=tmp_path / "videos") == ([("yoga/A_1-x_000004_000014.mkv", 0, "val")], ["yoga"])
    unlabelled = write("kinetics_test.csv", "youtube_id,time_start,time_end\nA_1-x,4,14\n")
    assert read(unlabelled, videos=tmp_path / "videos") == ([("yoga/A_1-x_000004_000014.mkv", None, "test")], [])


def test_activitynets_segments_are_spans(tmp_path, write):
    for name in ("v_a.mp4", "b.mkv"):
        write(f"videos/{name}")
    segments = [{"label": "yoga", "segment": [0, 5.25]}, {"label": "archery", "segment": [5, 9]}]
    content = {
        "a": {"subset": "training", "annotations": [segments[0], segments[0]]},
        "b": {"subset": "validation", "annotations": segments},
        "c": {"subset": "testing", "annotations": []},
    }
    source = write("activity_net.json", json.dumps({"version": "1.3", "database": content}))
    entries, names = read_sources([source], tmp_path / "videos")
    assert names == ["archery", "yoga"]
    assert entries == [
        Entry("v_a.mp4", 1, "train", span="#t=0.0,5.25"),
        Entry("b.mkv", 1, "val", span="#t=0.0,5.25"),
        Entry("b.mkv", 0, "val", span="#t=5.0,9.0"),
        Entry("v_c", None, "test"),
    ]
    assert read(source, videos=tmp_path / "videos", whole=True)[0] == [
        ("v_a.mp4", 1, "train"),
        ("b.mkv", "0,1", "val"),
        ("v_c", None, "test"),
    ]


def spans(*arguments, **named):
    return [(*entry[:2], entry.span) for entry in read_sources(*arguments, **named).entries]


def test_actions_of_charades_are_spans_and_keep_their_numbers(tmp_path, write):
    write("videos/46GP8.mp4")
    header = "id,subject,scene,actions,length\n"
    rows = "46GP8,HR43,Kitchen,c092 11.90 21.20;c147 0.00 12.60;c003 0.0 12.6,24.83\nN11GT,7BQ9,Stairs,,18.33\n"
    source, videos = write("Charades_v1_train.csv", header + rows), tmp_path / "videos"
    wanted = [("46GP8.mp4", 92, "#t=11.9,21.2"), ("46GP8.mp4", "3,147", "#t=0.0,12.6"), ("N11GT", None, "")]
    assert spans([source], videos) == wanted
    assert len(read_sources([source], videos).class_names) == 148
    assert spans([source], videos, whole=True) == [("46GP8.mp4", "3,92,147", ""), ("N11GT", None, "")]
    with pytest.raises(ListError, match=r"train.csv:2: expected actions such as 'c092 11.90 21.20', got 'c92 1 2'"):
        read_sources([write("Charades_train.csv", header + "a,b,c,c92 1 2,3\n")], videos)


def test_avas_people_act_around_a_timestamp_and_kinetics_clips_start_later(tmp_path, write):
    write("videos/-5KQ66BBWC4.mkv")
    write("videos/abc_000010_000020.mp4")
    rows = "-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,80,1\n-5KQ66BBWC4,0902,0.3,0.2,0.5,0.8,9,0\n"
    rows += "-5KQ66BBWC4,0903,0.3,0.2,0.5,0.8,9,0\nabc,12.5,0.1,0.2,0.3,0.4,1,0\n"
    source, videos = write("ava_val_v2.2.csv", rows), tmp_path / "videos"
    assert spans([source], videos) == [
        ("-5KQ66BBWC4.mkv", "8,79", "#t=901.0,903.0"),
        ("-5KQ66BBWC4.mkv", 8, "#t=902.0,904.0"),
        ("abc_000010_000020.mp4", 0, "#t=1.5,3.5"),
    ]
    assert {entry.split for entry in read_sources([source], videos).entries} == {"val"}
    with pytest.raises(ListError, match=r"ava_val.csv:2: expected 'video,second,x1,y1,x2,y2,action,person', got 'a,b"):
        read_sources([write("ava_val.csv", rows[:46] + "a,b,0,0,0,0,1,1\n")], videos)


def test_something_something_has_templates_and_numbers_in_json(tmp_path, write):
    write("videos/78687.webm")
    videos = [
        {"id": "78687", "label": "putting a cup on a table", "template": "Putting [something] on [a table]"},
        {"id": "2", "template": "Opening [something]"},
    ]
    source = write("something-something-v2-validation.json", json.dumps(videos))
    labels = write("labels.json", json.dumps({"Putting something on a table": "1", "Opening something": "0"}))
    entries, names = read(source, videos=tmp_path / "videos", labels=labels)
    assert entries == [("78687.webm", 1, "val"), ("2", 0, "val")]
    assert names == ["Opening something", "Putting something on a table"]
    with pytest.raises(ListError, match=r"odd.json: expected an object of class names with their numbers, from 0"):
        read_sources([source], tmp_path / "videos", labels=write("odd.json", '{"a": "1"}'))


def test_folders_of_frames_are_videos(tmp_path, write):
    for name in ("yoga/a/img_00001.jpg", "yoga/a/img_00002.jpg", "yoga/b.mp4", "yoga/thumb1.jpg", "archery/c/1.png"):
        write(name)
    write("archery/c/about.txt")
    write("archery/pictures/notes/1.txt")
    write("archery/pictures/5.jpg")  # a folder with a folder in it is no video
    assert read(tmp_path, videos=tmp_path)[0] == [
        ("archery/c", 0, "train"),
        ("yoga/a", 1, "train"),
        ("yoga/b.mp4", 1, "train"),
    ]


@pytest.mark.parametrize(
    ("line", "path", "label", "span"),
    [
        ("a b.mp4 3 1.5 20", "a b.mp4", 3, "#t=1.5,20.0"),
        ("a b.mp4,3,1.5,20", "a b.mp4", 3, "#t=1.5,20.0"),
        ("a.mp4,arm wrestling,1,2", "a.mp4", 0, "#t=1.0,2.0"),
        ("a.mp4#t=1.5,20 3,17", "a.mp4", "3,17", "#t=1.5,20.0"),
        ("frames/a#t=4 3", "frames/a", 3, "#t=4.0"),
        ("a.mp4#t=1,2,yoga", "a.mp4", 0, "#t=1.0,2.0"),
        ("a.mp4 17,3", "a.mp4", "3,17", ""),
        ("frames/a 17,3", "frames/a", "3,17", ""),
        ("s3://b/raw/a.mp4 3", "s3://b/raw/a.mp4", 3, ""),
        ("tar://a.mp4::x.tar#bytes=512,99 3", "tar://a.mp4::x.tar#bytes=512,99", 3, ""),
    ],
)
def test_lines_may_have_a_span_and_several_classes(tmp_path, write, line, path, label, span):
    assert spans([write("l.csv", line)], tmp_path) == [(path, label, span)]


def test_kinetics_json_names_clips(tmp_path, write):
    write("videos/x_000003_000013.mp4")
    video = {"annotations": {"label": "yoga", "segment": [3.0, 13.0]}, "duration": 10.0, "subset": "validate"}
    source = write("kinetics.json", json.dumps({"x": video, "y": {"subset": "test"}}))
    assert read(source, videos=tmp_path / "videos") == (
        [("x_000003_000013.mp4", 0, "val"), ("v_y", None, "test")],
        ["yoga"],
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nothing.csv", None, r"nothing.csv: No such file"),
        ("l.csv", "a.mp4 0 7 5\n", r"l.csv:1: expected seconds where the span starts and ends, got '7', '5'"),
        ("l.csv", "", r"l.csv: no video in it"),
        ("l.csv", "a.mp4 0\nb.mp4\n", r"l.csv:2: expected 'path label', got 'b.mp4'"),
        ("l.csv", "a.mp4,0\nb.mp4 1\n", r"l.csv:2: expected 'path,label', got 'b.mp4 1'"),
        ("l.csv", "a.mp4 0\nb.mp4 yoga\n", r"l.csv:2: expected a class number, as on the lines before, got 'yoga'"),
        ("l.csv", "a.mp4 0\nb.mp4 99999999999\n", r"l.csv:2: expected a class number"),
        ("k.csv", "youtube_id,time_start,time_end\na,4,soon\n", r"k.csv:2: expected seconds .* got '4', 'soon'"),
        ("k.csv", "youtube_id,time_start,time_end\na,inf,5\n", r"k.csv:2: expected seconds .* got 'inf', '5'"),
        ("k.csv", "youtube_id,time_start,time_end\na,4,nan\n", r"k.csv:2: expected seconds .* got '4', 'nan'"),
        ("k.csv", 'youtube_id,time_start,time_end\n"' + 200_000 * "a", r"k.csv: invalid CSV: field larger than"),
        ("k.csv", "youtube_id,time_start,time_end,split\na,4,5,dev\n", r"k.csv:2: expected a split of .* got 'dev'"),
        ("a.json", '{"database": {\n', r"a.json:2: invalid JSON"),
        ("b.json", None, r"b.json: No such file"),
        ("a.json", "[]", r"a.json: expected an object of videos"),
        ("a.json", '{"x": {"annotations": []}}', r"a.json: video 'x': expected 'subset'"),
        (
            "a.json",
            '{"x": {"subset": "val", "annotations": {"label": ["yoga"], "segment": [0, 1]}}}',
            r"a.json: video 'x': expected 'subset'",
        ),
        (
            "a.json",
            '{"x": {"subset": "val", "annotations": [{"label": 3, "segment": [0, 1]}]}}',
            r"a.json: video 'x': expected 'subset'",
        ),
        ("a.json", '{"x": {"subset": "val", "annotations": {"segment": [1]}}}', r"a.json: video 'x': expected"),
        ("a.json", '{"x": {"subset": "dev", "annotations": []}}', r"a.json: video 'x': expected a split"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_file_and_line(tmp_path, write, name, text, message):
    source = tmp_path / name if text is None else write(name, text)
    with pytest.raises(ListError, match=message):
        read_sources([source], tmp_path)


def test_binary_files_and_missing_folders_are_errors(tmp_path, write):
    for name in ("binary.csv", "binary.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ListError, match=f"{name}: not a text file in UTF-8"):
            read_sources([tmp_path / name], tmp_path)
    source = write("k.csv", "youtube_id,time_start,time_end\na,4,5\n")
    with pytest.raises(ListError, match="nothing: No such file"):
        read_sources([source], tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ListError, match="empty: no video in it"):
        read_sources([tmp_path / "empty"], tmp_path)


def test_labels_without_a_number_are_errors(tmp_path, write):
    with pytest.raises(ListError, match=r"l.csv:2: label 'yoga' is not one of the 1 classes of .*order.txt"):
        read_sources([write("l.csv", "a 0.mp4 dance\nb.mp4 yoga\n")], tmp_path, labels=write("order.txt", "dance\n"))
    write("one/labels.txt", "dance\n")
    with pytest.raises(ListError, match=r"train.csv:1: label '3' is not one of the 1 classes of labels.txt"):
        read_sources([write("one/train.csv", "a.mp4 3\n")], tmp_path)
    write("one/train.csv", "a.mp4 0\n")
    write("two/labels.txt", "yoga\n")
    with pytest.raises(ListError, match="the sources number their classes differently"):
        read_sources([tmp_path / "one", write("two/val.csv", "b.mp4 0\n")], tmp_path)


@pytest.mark.parametrize("version", [400, 600])
def test_official_kinetics_lists_give_the_official_numbers(real_videos, tmp_path, version):
    source = real_videos / "kinetics" / f"kinetics-{version}_val.csv"
    official = (real_videos / "kinetics" / f"label_map_k{version}.txt").read_text().splitlines()
    with open(source) as file:
        rows = list(csv.DictReader(file))
    entries, names = read_sources([source], tmp_path)
    assert names == official
    assert len(entries) == len(rows)
    assert [official[entry.label] for entry in entries] == [row["label"] for row in rows]
    assert entries[0].path == f"{rows[0]['youtube_id']}_{int(rows[0]['time_start']):06d}_{int(rows[0]['time_end']):06d}"
