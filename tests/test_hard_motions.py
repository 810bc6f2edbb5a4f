"""The hard motions: what each class shows, and that files and single frames do not tell it."""

import json
import sys

import hard_motions as probes
import numpy as np
import pytest

from octvideo.data import hard_motions
from octvideo.data.hard_motions import ANGLES, CLASSES, EVENTS, MEETINGS, ORDERS, SIZE, TIME
from octvideo.data.lists import read_list
from octvideo.data.motions import FRAMES, made, make_data_set, make_file
from octvideo.data.video import Video
from octvideo.errors import UserError

KNOWN = hard_motions.sources(0)
GROUPS = ("fine", "wide", "order", "speed")


def test_classes_are_four_groups_of_six():
    assert len(set(CLASSES)) == len(CLASSES) == 24
    assert [name.split(":")[0] for name in CLASSES] == [group for group in GROUPS for _ in range(6)]


@pytest.mark.parametrize("angle", ANGLES)
def test_in_the_fine_group_the_angle_is_the_class_and_elsewhere_any(angle, monkeypatch):
    used, whole = [], hard_motions.disc
    monkeypatch.setattr(hard_motions, "disc", lambda *given: used.append(given[2:]) or whole(*given))

    def angles(label):
        used.clear()
        for seed in range(40):
            hard_motions.scene(label, KNOWN, np.random.default_rng(seed))
        return {stripes[0] for stripes in used if stripes}

    assert angles(ANGLES.index(angle)) == {angle}
    assert angles(6) == angles(12) == angles(18) == set(ANGLES)


@pytest.mark.parametrize("angle", ANGLES)
def test_stripes_have_their_angle_and_pitch(angle):
    one = hard_motions.disc(KNOWN, np.random.default_rng(1), angle)
    strength = abs(np.fft.fft2(one.picture.mean(2) - one.picture.mean()))
    y, x = np.unravel_index(strength.argmax(), strength.shape)
    x, y = (n - 64 * (n > 32) for n in (x, y))
    assert (np.degrees(np.arctan2(y, x)) - angle + 90) % 180 - 90 == pytest.approx(0, abs=8)
    assert 2 * one.radius[0] / np.hypot(x, y) == pytest.approx(hard_motions.PITCH, rel=0.15)


@pytest.mark.parametrize("label", range(0, 24, 5))
def test_every_third_has_each_event_once_whatever_the_class(label):
    discs = hard_motions.scene(label, KNOWN, np.random.default_rng(label))
    for third in range(3):
        now = slice(FRAMES * third // 3 + 4, FRAMES * (third + 1) // 3 - 4)
        assert sum(one.flash[now].max() > 0.4 for one in discs) == 1
        assert sum(one.radius[now].max() > 1.3 * one.radius[0] for one in discs) == 1
        assert sum(np.ptp(one.angle[now]) > 1 for one in discs) == 1


@pytest.mark.parametrize("seed", range(20))
def test_each_meeting_is_what_its_name_says(seed):
    course = {name: hard_motions.meeting(name, np.random.default_rng(seed)) for name in MEETINGS}
    apart = {name: abs(a - b) for name, (a, b) in course.items()}
    assert np.all(np.diff(apart["approach"]) < 0)
    assert np.all(np.diff(apart["separate"]) > 0)
    middle = FRAMES // 2
    for name in ("collide", "pass"):
        assert apart[name][middle - 6 : middle + 7].min() < apart[name][[0, -1]].min() - 5
    direction = {name: np.angle((a - b) / (a - b)[0]) for name, (a, b) in course.items()}
    assert abs(direction["collide"]).max() < 1e-6  # they go back
    assert abs(direction["pass"][-1]) > np.pi / 2  # they exchange sides
    assert np.ptp(apart["swap"]) < 1e-6
    assert abs(direction["swap"][-1]) == pytest.approx(np.pi)
    assert abs(direction["swap"][middle]) == pytest.approx(np.pi / 2, abs=0.1)
    a, b = course["overtake"]
    forward = np.conj((a + b)[-1] - (a + b)[0])
    assert all(((path[-1] - path[0]) * forward).real > 0 for path in (a, b))
    assert ((a - b)[0] * forward).real < -100
    assert ((a - b)[-1] * forward).real > 100
    everywhere = np.stack([path for pair in course.values() for path in pair])
    assert min(everywhere.real.min(), everywhere.imag.min()) > 7
    assert max(everywhere.real.max(), everywhere.imag.max()) < SIZE - 7


@pytest.mark.parametrize("which", range(6))
def test_events_happen_one_after_the_other(which):
    discs = hard_motions.scene(12 + which, KNOWN, np.random.default_rng(which))[-2:]
    (disc,) = [one for one in discs if one.flash.any()]
    changed = {
        "flash": disc.flash > 0.4,
        "grow": disc.radius > 1.3 * disc.radius[0],
        "turn": abs(np.gradient(disc.angle)) > 0.1,
    }
    centers = {event: TIME[now].mean() for event, now in changed.items()}
    assert tuple(sorted(EVENTS, key=centers.get)) == ORDERS[which]
    np.testing.assert_allclose(sorted(centers.values()), (1 / 6, 1 / 2, 5 / 6), atol=0.03)


@pytest.mark.parametrize(("which", "rounds"), enumerate((1, -1, 1.75, -1.75, 3, -3)))
def test_one_circles_at_the_rate_of_its_class(which, rounds):
    pair = hard_motions.scene(18 + which, KNOWN, np.random.default_rng(3))[-2:]
    headings = [np.unwrap(np.angle(np.diff(disc.center))) for disc in pair]
    turned = max((heading[-1] - heading[0] for heading in headings), key=abs) / (2 * np.pi)
    assert turned == pytest.approx(rounds, rel=0.15)  # positive: clockwise on a screen, whose y points down


def test_frames_in_any_order_are_alike_within_the_temporal_groups():
    """Sizes, flashes and angles of the orders' frames, and distances of the rates', are distributed alike."""
    discs = [
        next(d for d in hard_motions.scene(12 + k, KNOWN, np.random.default_rng(5))[-2:] if d.flash.any())
        for k in range(6)
    ]
    for quantity in ("radius", "flash"):
        values = np.sort(np.stack([getattr(disc, quantity) for disc in discs]), axis=1)
        assert np.ptp(values, axis=0).max() < 0.25 * np.ptp(values)


def test_files_depend_on_the_seed_alone_and_their_numbers_are_balanced(tmp_path, capsys):
    make_data_set(tmp_path / "one", 24, 24, 3, "hard")
    videos = sorted((tmp_path / "one" / "val").glob("*.mp4"), key=lambda path: path.stem[-5:])
    assert len(videos) == 24
    of_two_processes = [("hard", tmp_path / videos[label].name, label, 1, 3, label) for label in range(4)]
    assert len(list(made(of_two_processes, num_workers=2))) == 4
    for video in videos[:4]:
        assert video.read_bytes() == (tmp_path / video.name).read_bytes()
    make_file("hard", tmp_path / "other.mp4", label=0, split=1, seed=4, index=0)
    assert (tmp_path / "other.mp4").read_bytes() != videos[0].read_bytes()
    listed = read_list(tmp_path / "one" / "val.csv", root=tmp_path / "one", num_classes=24)
    assert np.bincount(listed.labels).tolist() == [1] * 24
    assert (tmp_path / "one" / "labels.txt").read_text().splitlines() == list(CLASSES)
    with Video(listed.paths[0]) as video:
        assert video.frames_at(np.arange(FRAMES) / video.fps).shape == (FRAMES, SIZE, SIZE, 3)
    make_data_set(tmp_path / "one", 24, 24, 3, "hard")
    assert "is complete" in capsys.readouterr().out


def test_the_splits_share_no_picture():
    other = hard_motions.sources(1)
    assert all(not np.array_equal(a, b) for a, b in zip(KNOWN, other, strict=True))


def test_too_few_and_missing_packages_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="at least 24 videos, got 8 and 24"):
        make_data_set(tmp_path, 8, 24, level="hard")
    hard_motions.sources.cache_clear()
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(UserError, match=r"pip install 'octvideo\[motions\]'"):
        hard_motions.make(0, 0, np.random.default_rng(0))


def test_probes_read_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 4
    noise = rng.normal(size=(240, 20))
    told = noise + 3 * np.eye(20)[labels]
    assert probes.probe((told[:120], labels[:120]), (told[120:], labels[120:])) > 0.9
    assert probes.probe((noise[:120], labels[:120]), (noise[120:], labels[120:])) < 0.45


def test_features_are_of_files_colours_frames_and_motion(tmp_path):
    for label in (0, 23):
        make_file("hard", tmp_path / f"{label}.mp4", label, 0, 0, label)
    one, other = (probes.features(str(tmp_path / f"{label}.mp4")) for label in (0, 23))
    assert one["codec"][0] == (tmp_path / "0.mp4").stat().st_size
    assert {name: values.shape for name, values in one.items()} == {
        name: values.shape for name, values in other.items()
    }
    assert len(one["codec"]) == 1 + FRAMES + 1
    assert len(one["frame"]) == 20 * 20 * 3


def test_measured_probes_on_files_colours_and_frames_are_at_chance():
    """Trained on 1,920 videos, tested on 960: experiments/hard_motions.py."""
    rows = {(row["features"], row["of"]): row for row in json.loads(probes.RESULTS.read_text())}
    for kind in ("codec", "color", "frame"):
        for of in ("class", "group"):
            row = rows[kind, of]
            assert row["right"] - 1.5 * row["half"] < row["chance"], (kind, of)  # about three standard deviations
            assert row["videos"] == [1920, 960]
