"""Data sets: the sample of a draw; bad videos are counted, replaced in training and never in testing."""

import os

import numpy as np
import pytest
import torch
from conftest import frame_numbers

from octvideo.data.clips import BadVideo, Draw, TestViews, TrainingClips, cut
from octvideo.data.decoding import NO_VIDEO, Decoding, clips_of
from octvideo.data.index import IndexedVideo
from octvideo.data.lists import Paths, VideoList
from octvideo.data.loading import collate
from octvideo.data.multigrid import ClipShape
from octvideo.data.sampling import Sampling, even_crops
from octvideo.data.video import Video
from octvideo.errors import DecodeError

SAMPLING = Sampling(clip_frames=4, frame_stride=3, protocol="mmaction", short_videos="hold")


def decoding(*paths, sampling=SAMPLING, **options):
    return Decoding(VideoList(Paths(paths), np.arange(len(paths))), sampling, **options)


def training(videos, short_side=(32, 48), **options):
    return TrainingClips(videos, ClipShape(4, 3, 32, short_side), **{"mirror": True, "seed": 0, **options})


def views(videos, **options):
    return TestViews(videos, **{"crop_size": 32, "short_side": 40, "num_clips": 6, "num_crops": 3, **options})


def frames_of(clip):
    return frame_numbers(clip.permute(1, 2, 3, 0))


def test_a_training_clip_is_uint8_of_consecutive_strided_frames(numbered_video):
    sample = training(decoding(numbered_video), short_side=(48, 48))[Draw(0, 0, 0)]
    assert sample.clips.shape == (1, 3, 4, 32, 32)
    assert sample.clips.dtype == torch.uint8
    assert sample.bad == []
    numbers = frames_of(sample.clips[0])
    assert np.diff(numbers).tolist() == [3, 3, 3]


def test_a_draw_can_name_the_shape_of_its_clips(numbered_video):
    dataset = training(decoding(numbered_video))
    shape = ClipShape(2, 6, 16, (16, 16))
    clips = dataset[Draw(0, 3, 0, shape)].clips
    assert clips.shape == (1, 3, 2, 16, 16)
    assert np.diff(frames_of(clips[0])).tolist() == [6]
    assert torch.equal(dataset[Draw(0, 3, 0, ClipShape(4, 3, 32, (32, 48)))].clips, dataset[Draw(0, 3, 0)].clips)


def test_clips_depend_on_seed_epoch_and_position_alone(numbered_video):
    dataset = training(decoding(numbered_video))
    first = dataset[Draw(0, 0, 0)].clips
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(training(decoding(numbered_video))[Draw(0, 0, 0)].clips, first)
    for other in (
        dataset[Draw(1, 0, 0)],
        dataset[Draw(0, 1, 0)],
        training(decoding(numbered_video), seed=1)[Draw(0, 0, 0)],
    ):
        assert not torch.equal(other.clips, first)


def test_training_clips_come_from_the_whole_video(numbered_video):
    dataset = training(decoding(numbered_video))
    starts = {frames_of(dataset[Draw(0, position, 0)].clips[0])[0] for position in range(120)}
    assert min(starts) <= 2
    assert max(starts) >= 48
    assert max(starts) <= 50


def test_half_of_the_clips_are_mirrored_and_none_where_mirror_is_off(tmp_path):
    from octvideo.data.motions import write_video

    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (12, 48, 64, 3))
    write_video(tmp_path / "ramp.mp4", ramp, 30)

    def share(mirror):
        dataset = training(decoding(tmp_path / "ramp.mp4"), mirror=mirror)
        clips = [dataset[Draw(0, position, 0)].clips.float() for position in range(60)]
        return np.mean([(clip[..., -1] < clip[..., 0]).float().mean() > 0.5 for clip in clips])

    assert 0.3 < share(True) < 0.7
    assert share(False) == 0


def test_a_bad_training_video_is_named_and_another_takes_its_place(numbered_video, tmp_path):
    (tmp_path / "bad.mp4").touch()
    dataset = training(decoding(tmp_path / "bad.mp4", numbered_video))
    sample = dataset[Draw(0, 0, 0)]
    assert sample.label == 1
    assert sample.path == str(numbered_video)
    assert {bad.path for bad in sample.bad} == {str(tmp_path / "bad.mp4")}
    assert "Invalid data" in sample.bad[0].reason


def test_clips_of_one_decode_are_different_clips_of_the_same_video(numbered_video):
    dataset = training(decoding(numbered_video), short_side=(48, 48), num_clips=3)
    clips = dataset[Draw(0, 0, 0)].clips
    assert clips.shape == (3, 3, 4, 32, 32)
    assert [np.diff(frames_of(clip)).tolist() for clip in clips] == [[3, 3, 3]] * 3
    assert len({frames_of(clip)[0] for clip in clips}) == 3


@pytest.mark.parametrize("timeout_seconds", [None, 30.0])
def test_a_watched_decoder_gives_the_same_clips_and_errors(numbered_video, tmp_path, timeout_seconds):
    (tmp_path / "bad.mp4").touch()
    watched = decoding(numbered_video, tmp_path / "bad.mp4", timeout_seconds=timeout_seconds)
    plain = decoding(numbered_video, tmp_path / "bad.mp4")
    assert torch.equal(training(watched)[Draw(0, 5, 0)].clips, training(plain)[Draw(0, 5, 0)].clips)
    assert torch.equal(views(watched)[Draw(0, 0, 0)].clips, views(plain)[Draw(0, 0, 0)].clips)
    assert views(watched)[Draw(0, 1, 1)].bad == views(plain)[Draw(0, 1, 1)].bad


def test_a_decoder_that_hangs_is_killed_and_the_next_video_is_read(numbered_video, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it for reading waits for somebody to write
    hanging = decoding(tmp_path / "pipe.mp4", numbered_video, timeout_seconds=0.5)
    dataset = views(hanging)
    sample = dataset[Draw(0, 0, 0)]
    assert sample.clips is None
    assert sample.bad == [BadVideo(str(tmp_path / "pipe.mp4"), "no result within 0.5 s: the decoder was killed")]
    assert dataset[Draw(0, 1, 1)].clips.shape == (18, 3, 4, 32, 32)
    replaced = training(hanging)[Draw(0, 0, 0)]
    assert replaced.path == str(numbered_video)
    assert {bad.path for bad in replaced.bad} == {str(tmp_path / "pipe.mp4")}


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_the_views_of_one_pass_are_those_of_separate_passes(numbered_video, backend):
    try:
        together = views(decoding(numbered_video, backend=backend))[Draw(0, 0, 0)].clips
    except ValueError as error:
        pytest.skip(str(error))
    numbers = SAMPLING.dense_clips(60, 30, 6)
    for view, clip in enumerate(together):
        with Video(numbered_video, backend) as video:
            (frames,) = clips_of(video, numbers[view // 3][None], 40)
        crop = even_crops(40, 53, 32, 3)[view % 3]
        assert np.array_equal(clip.numpy(), cut(frames, crop, 32))


def test_training_gives_up_when_every_video_is_bad(tmp_path):
    (tmp_path / "bad.mp4").touch()
    with pytest.raises(DecodeError, match=r"bad.mp4: Invalid data.*9 videos tried before it"):
        training(decoding(tmp_path / "bad.mp4"))[Draw(0, 0, 0)]


def test_test_views_are_clips_times_crops_in_order(numbered_video):
    sample = views(decoding(numbered_video))[Draw(0, 0, 0)]
    assert sample.clips.shape == (18, 3, 4, 32, 32)
    starts = [frames_of(clip)[0] for clip in sample.clips]
    assert starts[::3] == starts[1::3] == starts[2::3]
    assert starts[::3] == [0, 10, 20, 30, 40, 50]
    single = views(decoding(numbered_video), num_clips=1, num_crops=1)[Draw(0, 0, 0)]
    assert frames_of(single.clips[0]) == [25, 28, 31, 34]


def test_shuffled_frames_are_the_same_frames_in_another_order(numbered_video):
    plain = views(decoding(numbered_video))[Draw(0, 0, 0)].clips
    mixed = views(decoding(numbered_video), shuffle_frames=True)[Draw(0, 0, 0)].clips
    assert any(frames_of(a) != frames_of(b) for a, b in zip(plain, mixed, strict=True))
    assert all(sorted(frames_of(a)) == sorted(frames_of(b)) for a, b in zip(plain, mixed, strict=True))


def test_a_bad_test_video_is_reported_and_not_replaced(numbered_video, tmp_path):
    (tmp_path / "bad.mp4").touch()
    dataset = views(decoding(tmp_path / "bad.mp4", numbered_video))
    batch = collate([dataset[Draw(0, 0, 0)], dataset[Draw(0, 1, 1)], dataset[Draw(0, 2, NO_VIDEO)]])
    assert batch.clips.shape == (1, 18, 3, 4, 32, 32)
    assert batch.labels.tolist() == [1]
    assert batch.paths == [str(numbered_video)]
    assert batch.turns == [(0, 1)]
    assert [bad.path for bad in batch.bad] == [str(tmp_path / "bad.mp4")]


def test_an_indexed_video_that_has_vanished_is_bad():
    known = [IndexedVideo(60, 30.0, 2.0, np.zeros(1), 100)]
    videos = decoding("/nowhere/gone.mp4", known=known, rows=np.zeros(1, np.int64))
    assert "no such file" in views(videos)[Draw(0, 0, 0)].bad[0].reason.lower()


def test_a_frame_that_is_asked_for_again_is_decoded_once(numbered_video, monkeypatch):
    with Video(numbered_video) as video:
        read, asked = video._reader.read, []
        monkeypatch.setattr(video._reader, "read", lambda times, side: asked.extend(times) or read(times, side))
        images = video.images_at([1.51, 0.51, 1.51, 1.51])
    assert asked == [0.51, 1.51]
    assert frame_numbers(images) == [45, 15, 45, 45]
