"""Data sets: what a draw gives, and that bad videos are counted, replaced in training and never in testing."""

import numpy as np
import pytest
import torch
from conftest import frame_numbers

from octvideo.data.annotations import VideoList
from octvideo.data.dataset import NO_VIDEO, BadVideo, Draw, EpochSampler, TestViews, TrainingClips, collate
from octvideo.data.video import DecodeError

CLIP = {"clip_frames": 4, "frame_stride": 3, "crop_size": 32}


def video_list(*paths):
    return VideoList(np.array([str(path) for path in paths]), np.arange(len(paths)))


def training(videos, **options):
    return TrainingClips(videos, **{**CLIP, "short_side": (32, 48), "mirror": True, "seed": 0, **options})


def views(videos, **options):
    return TestViews(videos, **{**CLIP, "short_side": 40, "num_clips": 6, "num_crops": 3, **options})


def frames_of(clip):
    return frame_numbers(clip.permute(1, 2, 3, 0))


def test_a_training_clip_is_uint8_of_consecutive_strided_frames(numbered_video):
    sample = training(video_list(numbered_video))[Draw(0, 0, 0)]
    assert sample.clips.shape == (1, 3, 4, 32, 32)
    assert sample.clips.dtype == torch.uint8
    assert sample.bad == []
    numbers = frames_of(sample.clips[0])
    assert np.diff(numbers).tolist() == [3, 3, 3]


def test_clips_depend_on_seed_epoch_and_position_alone(numbered_video):
    dataset = training(video_list(numbered_video))
    first = dataset[Draw(0, 0, 0)].clips
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(training(video_list(numbered_video))[Draw(0, 0, 0)].clips, first)
    for other in (
        dataset[Draw(1, 0, 0)],
        dataset[Draw(0, 1, 0)],
        training(video_list(numbered_video), seed=1)[Draw(0, 0, 0)],
    ):
        assert not torch.equal(other.clips, first)


def test_training_clips_come_from_the_whole_video(numbered_video):
    dataset = training(video_list(numbered_video))
    starts = {frames_of(dataset[Draw(0, position, 0)].clips[0])[0] for position in range(120)}
    assert min(starts) <= 2
    assert max(starts) >= 48
    assert max(starts) <= 50


def test_half_of_the_clips_are_mirrored_and_none_where_mirror_is_off(tmp_path):
    from octvideo.data.motions import write_video

    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (12, 48, 64, 3))
    write_video(tmp_path / "ramp.mp4", ramp, 30)

    def share(mirror):
        dataset = training(video_list(tmp_path / "ramp.mp4"), mirror=mirror)
        clips = [dataset[Draw(0, position, 0)].clips.float() for position in range(60)]
        return np.mean([(clip[..., -1] < clip[..., 0]).float().mean() > 0.5 for clip in clips])

    assert 0.3 < share(True) < 0.7
    assert share(False) == 0


def test_a_bad_training_video_is_named_and_another_takes_its_place(numbered_video, tmp_path):
    (tmp_path / "bad.mp4").touch()
    dataset = training(video_list(tmp_path / "bad.mp4", numbered_video))
    sample = dataset[Draw(0, 0, 0)]
    assert sample.label == 1
    assert sample.path == str(numbered_video)
    assert {bad.path for bad in sample.bad} == {str(tmp_path / "bad.mp4")}
    assert "Invalid data" in sample.bad[0].reason


def test_training_gives_up_when_every_video_is_bad(tmp_path):
    (tmp_path / "bad.mp4").touch()
    with pytest.raises(DecodeError, match=r"bad.mp4: Invalid data.*9 videos tried before it"):
        training(video_list(tmp_path / "bad.mp4"))[Draw(0, 0, 0)]


def test_test_views_are_clips_times_crops_in_order(numbered_video):
    sample = views(video_list(numbered_video))[Draw(0, 0, 0)]
    assert sample.clips.shape == (18, 3, 4, 32, 32)
    starts = [frames_of(clip)[0] for clip in sample.clips]
    assert starts[::3] == starts[1::3] == starts[2::3]
    assert starts[::3] == [0, 10, 20, 30, 40, 50]
    single = views(video_list(numbered_video), num_clips=1, num_crops=1)[Draw(0, 0, 0)]
    assert frames_of(single.clips[0]) == [25, 28, 31, 34]


def test_shuffled_frames_are_the_same_frames_in_another_order(numbered_video):
    plain = views(video_list(numbered_video))[Draw(0, 0, 0)].clips
    mixed = views(video_list(numbered_video), shuffle_frames=True)[Draw(0, 0, 0)].clips
    assert any(frames_of(a) != frames_of(b) for a, b in zip(plain, mixed, strict=True))
    assert all(sorted(frames_of(a)) == sorted(frames_of(b)) for a, b in zip(plain, mixed, strict=True))


def test_a_bad_test_video_is_reported_and_not_replaced(numbered_video, tmp_path):
    (tmp_path / "bad.mp4").touch()
    dataset = views(video_list(tmp_path / "bad.mp4", numbered_video))
    batch = collate([dataset[Draw(0, 0, 0)], dataset[Draw(0, 1, 1)], dataset[Draw(0, 2, NO_VIDEO)]])
    assert batch.clips.shape == (1, 18, 3, 4, 32, 32)
    assert batch.labels.tolist() == [1]
    assert batch.paths == [str(numbered_video)]
    assert [bad.path for bad in batch.bad] == [str(tmp_path / "bad.mp4")]


def test_a_batch_without_a_good_video_is_empty():
    from octvideo.data.dataset import Sample

    batch = collate([Sample(None, 0, "a", [BadVideo("a", "broken")])])
    assert len(batch.clips) == 0
    assert batch.bad == [BadVideo("a", "broken")]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_videos_without_repeating_any(world_size):
    def draws(shuffle, epoch=0):
        samplers = [EpochSampler(61, 0, shuffle, rank, world_size) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert len(list(sampler)) == len(sampler)
        assert len({len(sampler) for sampler in samplers}) == 1
        return [draw for sampler in samplers for draw in sampler]

    tested = [draw.video for draw in draws(shuffle=False) if draw.video != NO_VIDEO]
    assert sorted(tested) == list(range(61))
    trained = draws(shuffle=True)
    assert len({draw.video for draw in trained}) == len(trained) == 61 // world_size * world_size
    assert len({draw.position for draw in trained}) == len(trained)
    assert [draw.video for draw in draws(shuffle=True, epoch=1)] != [draw.video for draw in trained]
    assert [draw.video for draw in draws(shuffle=True)] == [draw.video for draw in trained]
