"""Which moments and crops: tables worked out by hand."""

import numpy as np
import pytest

from octvideo.data.sampling import clip_times, even_crops, even_starts, latest_start, random_crop


def test_a_clip_takes_every_nth_frame():
    np.testing.assert_allclose(clip_times(1.0, 4, 8, 32.0), [1.0, 1.25, 1.5, 1.75])


def test_the_latest_clip_ends_on_the_last_frame():
    start = latest_start(10.0, 8, 8, 30.0)  # 300 frames: the last clip takes 243, 251 ... 299
    assert start * 30 == pytest.approx(243)
    assert clip_times(start, 8, 8, 30.0)[-1] * 30 == pytest.approx(299)


def test_a_video_shorter_than_the_clip_starts_at_its_beginning():
    assert latest_start(1.0, 8, 8, 30.0) == 0


def test_starts_include_both_ends_and_a_single_one_is_in_the_middle():
    assert even_starts(9.0, 10).tolist() == list(range(10))
    assert even_starts(9.0, 1).tolist() == [4.5]


@pytest.mark.parametrize(
    ("height", "width", "crops"),
    [
        (256, 340, [(0, 0), (0, 42), (0, 84)]),
        (340, 256, [(0, 0), (42, 0), (84, 0)]),
        (256, 256, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_three_crops_lie_along_the_longer_side(height, width, crops):
    assert even_crops(height, width, 256, 3) == crops


def test_one_crop_is_in_the_centre():
    assert even_crops(256, 340, 224, 1) == [(16, 58)]


def test_random_crops_reach_every_place_and_stay_inside():
    rng = np.random.default_rng(0)
    crops = {random_crop(5, 4, 3, rng) for _ in range(200)}
    assert crops == {(top, left) for top in range(3) for left in range(2)}
