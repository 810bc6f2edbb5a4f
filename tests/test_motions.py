"""The made data set: what it shows, and that it is the same everywhere."""

import numpy as np
import pytest

from octvideo.data.lists import read_list
from octvideo.data.motions import CLASSES, FPS, FRAMES, SIZE, draw, make_data_set, movement
from octvideo.data.video import Video


@pytest.mark.parametrize(
    ("name", "column", "sign"),
    [
        ("left", 0, -1),
        ("right", 0, 1),
        ("up", 1, -1),
        ("down", 1, 1),
        ("clockwise", 2, 1),
        ("counter-clockwise", 2, -1),
        ("grow", 3, 1),
        ("shrink", 3, -1),
    ],
)
def test_a_class_changes_one_quantity_in_one_direction(name, column, sign):
    path = movement(name, np.random.default_rng(0))
    steps = np.diff(path, axis=0)
    assert np.mean(np.sign(steps[:, column]) == sign) > 0.8  # except where it wraps around
    assert np.abs(np.delete(steps, column, axis=1)).max() == 0


def test_the_frames_of_every_class_are_distributed_alike():
    """At any time each quantity is spread evenly over its range, so a frame alone cannot tell its class."""
    frames = [0, 20, 39]
    means = []
    for name in CLASSES:
        paths = np.stack([movement(name, np.random.default_rng((1, seed)))[frames] for seed in range(2000)])
        paths[..., 3] = np.log(paths[..., 3])
        means.append(paths.mean(0) / np.ptp(paths, axis=0))
    assert np.ptp(means, axis=0).max() < 0.1  # eight means of 2000 draws: a standard error of 0.0065 each


def test_the_disc_is_where_the_path_says():
    rng = np.random.default_rng(0)
    path = np.array([[20.0, 30.0, 0.0, 12.0], [50.0, 30.0, 0.0, 12.0], [50.0, 30.0, np.pi, 12.0]])
    a, b, c = draw(path, rng).astype(int)
    changed = np.abs(a - b).sum(-1) > 0
    y, x = np.nonzero(changed)
    assert 8 <= x.min() < 12
    assert 58 < x.max() <= 62
    assert y.min() >= 18
    assert y.max() <= 42
    np.testing.assert_array_equal(a[18:42, 8:32][4:20, 4:20], b[18:42, 38:62][4:20, 4:20])
    assert np.abs(b[18:42, 38:62][4:20, 4:20] - c[18:42, 38:62][4:20, 4:20][::-1, ::-1]).max() <= 40


def test_files_are_the_same_for_the_same_seed_and_made_once(tmp_path, capsys):
    for folder in "ab":
        make_data_set(tmp_path / folder, 8, 8, 0)
    said = capsys.readouterr().out  # no bar where there is no terminal
    assert said == "".join(
        f"{tmp_path / x}: 8 training and 8 validation videos, train.csv, val.csv and labels.txt\n" for x in "ab"
    )
    videos = sorted((tmp_path / "a").rglob("*.mp4"))
    assert len(videos) == 16
    for video in videos:
        name = video.relative_to(tmp_path / "a")
        assert video.read_bytes() == (tmp_path / "b" / name).read_bytes()
    before = videos[0].stat().st_mtime_ns
    make_data_set(tmp_path / "a", 8, 8, 0)
    assert videos[0].stat().st_mtime_ns == before
    assert "is complete" in capsys.readouterr().out

    listed = read_list(tmp_path / "a" / "train.csv", root=tmp_path / "a", num_classes=8)
    assert sorted(listed.labels.tolist()) == list(range(8))
    assert (tmp_path / "a" / "labels.txt").read_text().split() == list(CLASSES)
    with Video(listed.paths[0]) as video:
        assert video.fps == FPS
        assert video.frames_at(np.arange(FRAMES) / FPS).shape == (FRAMES, SIZE, SIZE, 3)


def test_too_few_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 8 videos, got 7 and 8"):
        make_data_set(tmp_path, 7, 8)
