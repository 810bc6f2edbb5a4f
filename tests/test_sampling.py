"""Which frames and crops: tables worked out by hand, and what the projects themselves compute."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorchvideo.data.clip_sampling import ConstantClipsPerVideoSampler, RandomClipSampler

from octvideo.data.sampling import (
    PROTOCOLS,
    Sampling,
    even_crops,
    random_crop,
)

VIDEOS = [(300, 30), (250, 25), (50, 30), (64, 30), (1, 30)]
EVENS = list(range(0, 62, 2))  # of 32 x 2: all frames but the last

# Worked out on paper from each project's formula: the clip that starts the video, of 8 x 8 frames.
FIRST_CLIPS = {
    # protocol, target_fps: frames of a video of 300 at 30 fps; 250 at 25; 50 at 30; 64 at 30; 1 at 30
    ("slowfast", None): [
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0, 9, 18, 27, 36, 45, 49, 49],
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0] * 8,
    ],
    ("slowfast", 30): [
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0, 7, 14, 22, 29, 37, 44, 52],  # a window of 64 * 25 / 30 = 53 1/3 frames: 7 10/21 apart
        [0, 9, 18, 27, 36, 45, 49, 49],
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0] * 8,
    ],
    ("pytorchvideo", None): [
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0, 7, 14, 21, 28, 35, 42, 49],
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0] * 8,
    ],
    ("pytorchvideo", 30): [
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0, 7, 15, 22, 30, 37, 45, 53],  # the 54 frames before 53 1/3: 53 / 7 apart
        [0, 7, 14, 21, 28, 35, 42, 49],
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0] * 8,
    ],
    ("mmaction", None): [
        [0, 8, 16, 24, 32, 40, 48, 56],
        [0, 8, 16, 24, 32, 40, 48, 56],
        [0, 8, 16, 24, 32, 40, 48, 6],
        [0, 8, 16, 24, 32, 40, 48, 56],
        [0] * 8,
    ],
    ("mmaction", 30): [
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0, 7, 14, 22, 29, 37, 44, 52],
        [0, 9, 18, 27, 36, 45, 4, 13],
        [0, 9, 18, 27, 36, 45, 54, 63],
        [0] * 8,
    ],
    ("uniform", None): [  # the first of ten: 1/20 into parts of 37.5, 31.25, 6.25, 8 and 1/8 frames
        [1, 39, 76, 114, 151, 189, 226, 264],
        [1, 32, 64, 95, 126, 157, 189, 220],
        [0, 6, 12, 19, 25, 31, 37, 44],
        [0, 8, 16, 24, 32, 40, 48, 56],
        [0] * 8,
    ],
}

# The same of 32 x 2 frames.
FIRST_LONG_CLIPS = {
    ("slowfast", None): [
        [*EVENS, 63],
        [*EVENS, 63],
        [*EVENS[:25], *[49] * 7],
        [*EVENS, 63],
        [0] * 32,
    ],
    ("slowfast", 30): [
        [*EVENS, 63],
        [0, 1, 3, 5, 6, 8, 10, 11, 13, 15, 16, 18, 20, 21, 23, 25,  # 157 / 93 apart
         27, 28, 30, 32, 33, 35, 37, 38, 40, 42, 43, 45, 47, 48, 50, 52],
        [*EVENS[:25], *[49] * 7],
        [*EVENS, 63],
        [0] * 32,
    ],
    ("pytorchvideo", None): [
        [*EVENS, 63],
        [*EVENS, 63],
        [0, 1, 3, 4, 6, 7, 9, 11, 12, 14, 15, 17, 18, 20, 22, 23,  # 49 / 31 apart
         25, 26, 28, 30, 31, 33, 34, 36, 37, 39, 41, 42, 44, 45, 47, 49],
        [*EVENS, 63],
        [0] * 32,
    ],
    ("mmaction", None): [
        [*EVENS, 62],
        [*EVENS, 62],
        [*EVENS[:25], 0, 2, 4, 6, 8, 10, 12],
        [*EVENS, 62],
        [0] * 32,
    ],
}  # fmt: skip

# Where ten test clips start, and the clip in the centre; 8 x 8 frames.
STARTS = {
    ("slowfast", None, 300, 30): ([0, 23, 47, 70, 94, 118, 141, 165, 188, 212], 118),  # 236 i / 10
    ("slowfast", None, 250, 25): ([0, 18, 37, 55, 74, 93, 111, 130, 148, 167], 93),  # 186 i / 10
    ("slowfast", 30, 250, 25): ([0, 19, 39, 59, 78, 98, 118, 137, 157, 177], 98),  # 196 2/3 i / 10
    ("pytorchvideo", None, 300, 30): ([0, 24, 48, 71, 95, 118, 142, 166, 189, 213], 118),
    ("pytorchvideo", None, 250, 25): ([0, 19, 38, 56, 75, 93, 112, 131, 149, 168], 93),
    ("pytorchvideo", 30, 250, 25): ([0, 20, 40, 59, 79, 99, 118, 138, 158, 177], 99),
    ("mmaction", None, 300, 30): ([0, 27, 54, 81, 108, 135, 162, 189, 216, 243], 121),  # 243 i / 9
    ("mmaction", None, 250, 25): ([0, 21, 43, 64, 86, 107, 129, 150, 172, 193], 96),  # 193 i / 9
    ("mmaction", 30, 300, 30): ([0, 26, 52, 78, 104, 130, 156, 182, 208, 234], 118),  # 26 i, not 26 2/9
    ("mmaction", 30, 250, 25): ([0, 21, 42, 63, 84, 105, 126, 147, 168, 189], 98),
    ("mmaction", None, 64, 30): ([0, 1, 2, 2, 3, 4, 5, 5, 6, 7], 3),  # 7 i / 9
    ("slowfast", None, 64, 30): ([0] * 10, 0),
}


@pytest.mark.parametrize(("video", "place"), zip(VIDEOS, range(5), strict=True))
@pytest.mark.parametrize(("protocol", "target_fps"), FIRST_CLIPS)
def test_the_first_test_clip_of_8_x_8_by_hand(protocol, target_fps, video, place):
    clips = Sampling(8, 8, protocol, target_fps).dense_clips(*video, 10)
    assert clips.shape == (10, 8)
    assert clips[0].tolist() == FIRST_CLIPS[protocol, target_fps][place]


@pytest.mark.parametrize(("video", "place"), zip(VIDEOS, range(5), strict=True))
@pytest.mark.parametrize(("protocol", "target_fps"), FIRST_LONG_CLIPS)
def test_the_first_test_clip_of_32_x_2_by_hand(protocol, target_fps, video, place):
    clip = Sampling(32, 2, protocol, target_fps).dense_clips(*video, 10)[0]
    assert clip.tolist() == FIRST_LONG_CLIPS[protocol, target_fps][place]


@pytest.mark.parametrize(("protocol", "target_fps", "num_frames", "fps"), STARTS)
def test_where_test_clips_start_by_hand(protocol, target_fps, num_frames, fps):
    starts, centre = STARTS[protocol, target_fps, num_frames, fps]
    sampling = Sampling(8, 8, protocol, target_fps)
    assert sampling.dense_clips(num_frames, fps, 10)[:, 0].tolist() == starts
    assert sampling.centre_clip(num_frames, fps)[:, 0].tolist() == [centre]


def test_a_single_test_clip_is_where_the_project_puts_it():
    starts = {name: Sampling(8, 8, name).dense_clips(300, 30, 1)[0, 0] for name in PROTOCOLS}
    assert starts == {"slowfast": 0, "pytorchvideo": 0, "mmaction": 121, "uniform": 18}


def test_a_clip_that_starts_between_frames_by_hand():
    """Ten clips of 186 frames' room: the second starts at 18.6, its window ends at 82.6."""
    assert Sampling(8, 8, "slowfast").dense_clips(250, 25, 10)[1].tolist() == [18, 27, 36, 45, 54, 63, 72, 81]
    assert Sampling(8, 8, "pytorchvideo").dense_clips(250, 25, 10)[1].tolist() == [19, 28, 37, 46, 55, 64, 73, 82]


def test_a_single_clip_of_mmaction_starts_at_a_whole_frame_at_any_rate():
    """At 196 2/3 // 2; from 98 1/3, which is slowfast's start, the third frame would be 113."""
    assert Sampling(8, 8, "mmaction", 30).centre_clip(250, 25).tolist() == [[98, 105, 112, 120, 127, 135, 142, 150]]
    assert Sampling(8, 8, "slowfast", 30).centre_clip(250, 25).tolist() == [[98, 105, 113, 120, 128, 135, 143, 150]]


def test_the_centre_clip_of_uniform_has_the_middle_of_every_part():
    assert Sampling(8, 8, "uniform").centre_clip(300, 30).tolist() == [[18, 56, 93, 131, 168, 206, 243, 281]]
    assert Sampling(8, 8, "uniform").centre_clip(3, 30).tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]


def test_uniform_test_clips_take_every_frame_of_a_part_in_turn():
    clips = Sampling(4, 1, "uniform").dense_clips(12, 30, 3)
    assert clips.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@pytest.mark.parametrize("num_frames", [300, 250, 64, 50, 1])
def test_single_frames_of_mmaction_lie_in_the_middle_of_equal_parts(num_frames):
    clips = Sampling(1, 1, "mmaction").dense_clips(num_frames, 30, 3)
    assert clips.ravel().tolist() == [num_frames // 6, num_frames // 2, 5 * num_frames // 6]


def pytorchvideo_frames(start, end, num_frames, fps, clip_frames):
    """What EncodedVideo.get_clip and uniform_temporal_subsample take: exact times, then linspace in 32 bits."""
    frames = torch.tensor([frame for frame in range(num_frames) if start <= Fraction(frame) / fps < end])
    places = torch.linspace(0, len(frames) - 1, clip_frames).long()
    return frames[places].tolist()


@pytest.mark.parametrize("target_fps", [None, 30])
@pytest.mark.parametrize(("clip_frames", "frame_stride"), [(8, 8), (32, 2), (13, 6)])
@pytest.mark.parametrize(("num_frames", "fps"), [*VIDEOS, (299, 24), (123, 60), (54, 25), (310, 25), (63, 10)])
def test_pytorchvideos_own_samplers_agree(num_frames, fps, clip_frames, frame_stride, target_fps):
    duration = Fraction(num_frames, fps)
    sampler = ConstantClipsPerVideoSampler(Fraction(clip_frames * frame_stride, target_fps or fps), 10)
    wanted = []
    for _ in range(10):
        start, end, *_ = sampler(0.0, duration, {})
        wanted.append(pytorchvideo_frames(start, end, num_frames, fps, clip_frames))
    sampling = Sampling(clip_frames, frame_stride, "pytorchvideo", target_fps)
    assert sampling.dense_clips(num_frames, fps, 10).tolist() == wanted


def test_random_clips_are_those_of_pytorchvideos_sampler(monkeypatch):
    """Whatever share of the room for a start is drawn, the same frames follow."""
    sampler = RandomClipSampler(Fraction(64, 30))
    for share in (0, 0.25, 0.4999, 0.77, 1):
        monkeypatch.setattr("random.uniform", lambda low, high, share=share: low + share * float(high - low))
        start, end, *_ = sampler(0.0, Fraction(250, 25), {})
        rng = SimpleNamespace(uniform=lambda low, high, size, share=share: np.full(size, low + share * (high - low)))
        clip = Sampling(8, 8, "pytorchvideo", 30).train_clips(250, 25, 1, rng)[0]
        assert clip.tolist() == pytorchvideo_frames(start, end, 250, 25, 8)


@pytest.mark.parametrize("protocol", ["slowfast", "pytorchvideo"])
def test_random_starts_reach_both_ends_of_the_room(protocol):
    starts = Sampling(8, 8, protocol).train_clips(70, 30, 2000, np.random.default_rng(0))[:, 0]
    first = {"slowfast": 0, "pytorchvideo": 1}[protocol]  # the frame before a start, or after
    assert set(starts.tolist()) == set(range(first, first + 6))


def test_random_starts_of_slowfast_lie_between_frames():
    """The room is 6: a start is below 3 in half of the clips, and frame 0 in a sixth."""
    clips = Sampling(8, 8, "slowfast").train_clips(70, 30, 6000, np.random.default_rng(1))
    np.testing.assert_allclose(np.bincount(clips[:, 0]) / 6000, 1 / 6, atol=0.02)


@pytest.mark.parametrize(("num_frames", "fps"), [(80, 25), (150, 25), (108, 50), (250, 25)])
def test_what_is_a_whole_frame_in_fractions_is_not_rounded_down(num_frames, fps):
    """The last of ten clips in 150 frames starts at 87; in 64 bits, d * 9 / 10 need not be whole."""
    window = Fraction(64 * fps, 30)
    room = max(num_frames - window, 0)
    wanted = [
        [min(math.floor(room * i / 10 + (window - 1) * k / 7), num_frames - 1) for k in range(8)] for i in range(10)
    ]
    assert Sampling(8, 8, "slowfast", 30).dense_clips(num_frames, fps, 10).tolist() == wanted


def test_mmaction_trains_on_one_clip_in_each_equal_part():
    clips = Sampling(8, 8, "mmaction").train_clips(300, 30, 4, np.random.default_rng(2))
    assert (clips[:, 0] // 59).tolist() == [0, 1, 2, 3]  # 237 starts, 59 in each of four parts
    assert (np.diff(clips) == 8).all()
    many = np.concatenate(
        [Sampling(8, 8, "mmaction").train_clips(66, 30, 1, np.random.default_rng(k)) for k in range(50)]
    )
    assert set(many[:, 0].tolist()) == {0, 1, 2}  # a window of 64 in 66 frames


@pytest.mark.parametrize(
    ("num_frames", "num_clips", "starts"),
    [
        (64, 4, [0, 0, 0, 1]),  # one start for four clips: round(i / 4), and 0.5 is rounded to even
        (50, 3, [0, 0, 0]),  # shorter than the window
        (63, 2, [0, 0]),
        (66, 3, [0, 1, 2]),  # as many starts as clips
    ],
)
def test_mmactions_training_starts_where_there_is_hardly_room(num_frames, num_clips, starts):
    clips = Sampling(8, 8, "mmaction", short_videos="hold").train_clips(
        num_frames, 30, num_clips, np.random.default_rng(0)
    )
    assert clips[:, 0].tolist() == starts


def test_mmaction_spreads_clips_of_one_frame_over_fewer_frames():
    clips = Sampling(1, 1, "mmaction").train_clips(3, 30, 5, np.random.default_rng(0))
    assert clips.ravel().tolist() == [0, 1, 1, 2, 2]  # round(i * 3 / 5)


def test_mmaction_repeats_starts_where_there_are_fewer_than_clips():
    clips = Sampling(8, 8, "mmaction").train_clips(66, 30, 8, np.random.default_rng(0))
    assert clips[:, 0].tolist() == sorted(clips[:, 0].tolist())
    assert set(clips[:, 0].tolist()) == {0, 1, 2}


def test_uniform_trains_on_a_random_frame_of_every_part():
    clips = Sampling(8, 8, "uniform").train_clips(80, 30, 500, np.random.default_rng(0))
    assert (clips // 10 == np.arange(8)).all()
    assert all(set(column.tolist()) == set(range(10 * k, 10 * k + 10)) for k, column in enumerate(clips.T))


def test_the_last_frame_is_the_last_even_if_rounding_leads_out_of_it():
    rng = SimpleNamespace(random=lambda shape: np.full(shape, 1 - 1e-9))
    clip = Sampling(3, 1, "uniform", short_videos="loop").train_clips(3, 30, 1, rng)
    assert clip.tolist()[0][2] == 2


@pytest.mark.parametrize(
    ("protocol", "short_videos", "frames"),
    [
        ("slowfast", "hold", [0, 9, 18, 19]),
        ("slowfast", "loop", [0, 9, 18, 7]),
        ("slowfast", "spread", [0, 6, 12, 19]),
        ("pytorchvideo", "hold", [0, 9, 18, 19]),
        ("pytorchvideo", "loop", [0, 9, 18, 7]),
        ("pytorchvideo", "spread", [0, 6, 12, 19]),
        ("mmaction", "hold", [0, 7, 14, 19]),
        ("mmaction", "loop", [0, 7, 14, 1]),
        ("mmaction", "spread", [0, 6, 12, 19]),
        ("uniform", "hold", [2, 7, 12, 17]),
        ("uniform", "loop", [2, 7, 12, 17]),
        ("uniform", "spread", [2, 7, 12, 17]),
    ],
)
def test_short_videos_hold_loop_or_spread(protocol, short_videos, frames):
    """4 x 7 frames of a video of 20: linspace(0, 27, 4) is 0, 9, 18, 27."""
    sampling = Sampling(4, 7, protocol, short_videos=short_videos)
    assert sampling.dense_clips(20, 30, 1).tolist() == [frames]
    assert sampling.centre_clip(20, 30).tolist() == [frames]
    if protocol != "uniform":
        assert sampling.train_clips(20, 30, 2, np.random.default_rng(0)).tolist() == [frames, frames]


def test_a_video_as_long_as_what_is_taken_is_not_short():
    assert Sampling(8, 8, "mmaction", short_videos="spread").dense_clips(57, 30, 1)[0, 1] == 8
    assert Sampling(8, 8, "slowfast", short_videos="loop").dense_clips(64, 30, 1)[0, -1] == 63


samplings = st.builds(
    Sampling,
    clip_frames=st.integers(1, 40),
    frame_stride=st.integers(1, 16),
    protocol=st.sampled_from(sorted(PROTOCOLS)),
    target_fps=st.none() | st.floats(1, 120),
    short_videos=st.sampled_from([None, "hold", "loop", "spread"]),
)


@given(samplings, st.integers(1, 700), st.floats(1, 120), st.integers(1, 12), st.integers(0, 2**32))
def test_all_frames_lie_in_the_video_in_order_and_the_seed_decides(sampling, num_frames, fps, num_clips, seed):
    clips = sampling.train_clips(num_frames, fps, num_clips, np.random.default_rng(seed))
    again = sampling.train_clips(num_frames, fps, num_clips, np.random.default_rng(seed))
    assert (clips == again).all()
    dense, centre = sampling.dense_clips(num_frames, fps, num_clips), sampling.centre_clip(num_frames, fps)
    assert centre.shape == (1, sampling.clip_frames)
    for frames in (clips, dense, np.repeat(centre, num_clips, 0)):
        assert frames.shape == (num_clips, sampling.clip_frames)
        assert frames.dtype == np.int64
        assert frames.min() >= 0
        assert frames.max() < num_frames
        if sampling.short_videos in ("hold", "spread"):
            assert (np.diff(frames) >= 0).all()
    if sampling.short_videos in ("hold", "spread"):
        assert (np.diff(dense[:, 0]) >= 0).all()


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 700), st.floats(1, 120), st.integers(1, 12))
def test_at_the_target_rate_slowfast_needs_no_normalisation(clip_frames, frame_stride, num_frames, fps, num_clips):
    plain = Sampling(clip_frames, frame_stride).dense_clips(num_frames, fps, num_clips)
    normalised = Sampling(clip_frames, frame_stride, target_fps=fps).dense_clips(num_frames, fps, num_clips)
    assert (plain == normalised).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_frames": 0}, "clip_frames must be at least 1, got 0"),
        ({"frame_stride": 0}, "frame_stride must be at least 1, got 0"),
        ({"protocol": "tsn"}, "sampling protocol must be one of slowfast, pytorchvideo, mmaction, uniform, got 'tsn'"),
        ({"target_fps": 0.0}, "target_fps must be positive and finite, or None, got 0.0"),
        ({"short_videos": "repeat"}, "short_videos must be hold, loop, spread or None, got 'repeat'"),
    ],
)
def test_wrong_samplings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 30, 1), "num_frames and num_clips must be at least 1, got 0 and 1"),
        ((300, 30, 0), "num_frames and num_clips must be at least 1, got 300 and 0"),
        ((300, 0, 1), "fps must be positive and finite, got 0"),
        ((300, float("nan"), 1), "fps must be positive and finite, got nan"),
    ],
)
def test_wrong_videos_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling().dense_clips(*arguments)


def test_a_window_of_less_than_a_frame_is_one_frame():
    assert Sampling(1, 1, "slowfast", 60).dense_clips(10, 15, 4).ravel().tolist() == [0, 2, 4, 6]  # 9 i / 4


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
