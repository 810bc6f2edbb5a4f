"""Preprocessing: what it refuses, and the clips and pixels that it describes."""

import pytest
import torch

from octvideo.data.module import VideoData
from octvideo.data.preprocessing import Preprocessing
from octvideo.data.sampling import Sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_frames": 0}, "clip_frames must be at least 1, got 0"),
        ({"test_crop_size": 0}, "test_crop_size must be at least 1, got 0"),
        ({"crop_size": 300}, r"short_side must be two sizes from crop_size 300 upwards.*got \(256, 320\)"),
        ({"sampling": "tsn"}, "sampling protocol must be one of slowfast, .*, got 'tsn'"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"std": [0.2, -0.2, 0.2]}, r"std must be positive, got \[0.2, -0.2, 0.2\]"),
        ({"std": float("inf")}, "std must be positive, got inf"),
        ({"frames": 8, "size": 2}, "preprocessing must be of clip_frames, .*, std, got frames, size"),
    ],
)
def test_wrong_values_and_unknown_keys_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_mapping(options)


def test_entries_of_a_checkpoint_make_the_value_that_wrote_them():
    options = {"clip_frames": 4, "frame_stride": 2, "target_fps": None, "short_side": (256, 280), "mirror": False}
    kept = VideoData(**options).state_dict()["preprocessing"]
    assert list(kept) == [
        *("clip_frames", "frame_stride", "sampling", "target_fps", "short_videos"),
        *("crop_size", "short_side", "mirror", "test_crop_size"),
    ]  # mean and std are the model's
    clips = Preprocessing.from_mapping(kept | {"mean": 0.4, "std": 0.2})
    assert clips == Preprocessing(**options, mean=0.4, std=0.2)
    assert clips.sampler == Sampling(4, 2, "slowfast", None)
    assert clips.clip_size == (3, 4, 256, 256)


def test_pixels_lose_the_mean_and_are_divided_by_the_deviation():
    clips = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    wanted = (clips.double() / 255 - 0.45) / 0.225
    torch.testing.assert_close(Preprocessing().normalize(clips), wanted.float())
    colours = Preprocessing(mean=[0.1, 0.2, 0.3], std=(0.4, 0.5, 0.6)).normalize(clips)
    for colour in range(3):
        wanted = (clips[:, colour].double() / 255 - (0.1 + 0.1 * colour)) / (0.4 + 0.1 * colour)
        torch.testing.assert_close(colours[:, colour], wanted.float())
