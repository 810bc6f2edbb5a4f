"""Multigrid: which shapes the epochs and steps have, and that a training gets them, interrupted or not."""

from types import SimpleNamespace

import pytest
import torch
from test_module import SMALL, fit, position, write_list

from octvideo.data.augmentation import BatchAugmentation
from octvideo.data.module import VideoData
from octvideo.data.multigrid import ClipShape, Multigrid, long_cycle, share_of_side, whole_batches
from octvideo.errors import ListError

FULL = ClipShape(8, 8, 224, (256, 320))
TINY = {**SMALL, "crop_size": 40, "short_side": (40, 44), "batch_size": 1, "num_workers": 0}


def trainer(max_epochs, **options):
    return SimpleNamespace(
        **{"global_rank": 0, "world_size": 1, "current_epoch": 0, "max_epochs": max_epochs, "training": True, **options}
    )


def test_the_long_cycle_spends_epochs_in_proportion_to_the_batch():
    assert long_cycle(15) == [0] * 8 + [1] * 4 + [2] * 2 + [3]
    assert long_cycle(30, cycles=2) == long_cycle(15) * 2
    assert long_cycle(240) == [0] * 128 + [1] * 64 + [2] * 32 + [3] * 16
    assert long_cycle(31, cycles=3) == long_cycle(10) * 2 + long_cycle(11)


def test_every_shape_has_an_epoch_where_there_are_four_and_the_last_one_is_full():
    assert long_cycle(4) == [0, 1, 2, 3]
    assert [long_cycle(epochs) for epochs in (1, 2, 3)] == [[3], [2, 3], [1, 2, 3]]
    for epochs in range(4, 400):
        stages = long_cycle(epochs)
        assert len(stages) == epochs
        assert set(stages) == {0, 1, 2, 3}
        assert stages == sorted(stages)


def test_shapes_are_the_papers_in_multiples_of_8():
    shapes = [Multigrid(short_cycle=False).shapes(FULL, epoch, 4) for epoch in range(5)]
    assert shapes == [
        [(2, 32, 160, (183, 229), 8)],
        [(4, 16, 160, (183, 229), 4)],
        [(4, 16, 224, (256, 320), 2)],
        [FULL],
        [FULL],  # after the last epoch
    ]
    assert Multigrid(long_cycle=False).shapes(FULL, 0, None) == [
        (8, 8, 112, (128, 160), 4),
        (8, 8, 160, (183, 229), 2),
        FULL,
    ]
    assert [(shape.crop_size, shape.factor) for shape in Multigrid().shapes(FULL, 0, 4)] == [
        (80, 32),
        (112, 16),
        (160, 8),
    ]


def test_sides_do_not_become_smaller_than_a_network_takes():
    assert [share_of_side(side, 0.5) for side in (224, 100, 48, 32, 20)] == [112, 48, 32, 32, 20]
    shapes = Multigrid(long_cycle=False).shapes(FULL._replace(crop_size=100), 0, None)
    assert [shape.crop_size for shape in shapes] == [48, 72, 100]


def test_frames_are_at_least_two_and_multiples_of_what_the_network_needs():
    def frames(clip_frames, multiple):
        grid = Multigrid(short_cycle=False, frames_multiple=multiple)
        full = FULL._replace(clip_frames=clip_frames, frame_stride=12)
        return [shape[:2] for epoch in range(4) for shape in grid.shapes(full, epoch, 4)]

    assert frames(32, 4) == [(8, 48), (16, 24), (16, 24), (32, 12)]
    assert frames(8, 4) == [(4, 24), (4, 24), (4, 24), (8, 12)]
    assert frames(4, 1) == [(2, 24), (2, 24), (2, 24), (4, 12)]
    assert frames(1, 1) == [(1, 12)] * 4


def test_batches_that_do_not_fill_are_not_counted():
    assert [whole_batches(turns, [4, 2, 1]) for turns in (0, 3, 4, 5, 6, 7, 10, 11, 14)] == [0, 0, 1, 1, 2, 3, 3, 4, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycles": 0}, "data.multigrid.cycles must be at least 1, got 0"),
        ({"frames_multiple": 0}, "data.multigrid.frames_multiple must be at least 1, got 0"),
        ({"long_cycle": False, "short_cycle": False}, "must have long_cycle, short_cycle or both"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Multigrid(**options)


def test_frames_that_cannot_be_divided_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"takes 2 of 7 frames.*window of data.clip_frames 7 x data.frame_stride 1"):
        VideoData(multigrid=Multigrid(), clip_frames=7, frame_stride=1)
    with pytest.raises(ValueError, match=r"data.clip_frames must be a multiple of .*frames_multiple 8, got 12"):
        VideoData(multigrid=Multigrid(frames_multiple=8), clip_frames=12)
    assert VideoData(multigrid=Multigrid(long_cycle=False), clip_frames=7, frame_stride=1).batch_factor(0) == 1


def test_the_long_cycle_needs_an_end():
    data = VideoData(multigrid=Multigrid())
    with pytest.raises(ValueError, match=r"set trainer.max_epochs"):
        data.batch_factor(0)
    data.trainer = trainer(-1)
    with pytest.raises(ValueError, match=r"set trainer.max_epochs"):
        data.batch_factor(0)


def test_the_schedule_is_known_beforehand(numbered_video, tmp_path):
    data = VideoData(write_list(tmp_path, numbered_video, 61), **{**TINY, "batch_size": 4}, clips_per_video=2)
    assert [data.batches_in_epoch(0), data.batch_factor(0)] == [30, 1]
    data.multigrid, data.trainer = Multigrid(short_cycle=False), trainer(4)
    assert [data.batches_in_epoch(epoch) for epoch in range(4)] == [3, 7, 15, 30]
    assert [data.batch_factor(epoch) for epoch in range(4)] == [8, 4, 2, 1]
    data.multigrid = Multigrid()
    assert [data.batch_factor(epoch) for epoch in range(4)] == [8, 4, 2, 1]
    assert data.batches_in_epoch(3) == 4 * 3  # of 8, 4 and 2 videos by turns; the last 5 do not fill one of 8


def test_an_epoch_deals_every_video_at_most_once_in_batches_of_its_shapes(numbered_video, tmp_path):
    data = VideoData(write_list(tmp_path, numbered_video, 40), **TINY, multigrid=Multigrid())
    for epoch, sizes in enumerate([[32], [16, 8, 4], [8, 4, 2] * 2 + [8, 4], [4, 2, 1] * 5 + [4]]):
        data.trainer = trainer(4, current_epoch=epoch)
        loader = data.train_dataloader()
        batches = list(loader.batch_sampler)
        assert [len(batch) for batch in batches] == sizes
        assert len(loader) == data.batches_in_epoch(epoch) == len(sizes)
        videos = [draw.video for batch in batches for draw in batch]
        assert len(set(videos)) == len(videos)
        assert {draw.epoch for batch in batches for draw in batch} == {epoch}


def test_too_few_videos_for_the_largest_batch_are_refused_at_the_start(numbered_video, tmp_path):
    data = VideoData(write_list(tmp_path, numbered_video, 31), **TINY, multigrid=Multigrid())
    data.trainer = trainer(4, current_epoch=3)
    with pytest.raises(ListError, match="31 videos for 1 processes are fewer than one batch of 32 each"):
        data.train_dataloader()


def test_resized_crops_follow_the_shape_of_the_batch():
    augmentation = BatchAugmentation(crop_size=40)
    data = VideoData(**TINY, augmentation=augmentation)
    data.trainer = trainer(4)
    for side, crop in ((40, 40), (32, 32)):
        clips = torch.randint(256, (1, 1, 3, 2, side, side), dtype=torch.uint8)
        batch = SimpleNamespace(clips=clips, labels=torch.zeros(1, dtype=torch.int64), turns=[(0, 0)])
        batch._replace = lambda **changed: SimpleNamespace(**changed)
        augmented = data.on_after_batch_transfer(batch, 0).clips
        expected, _ = BatchAugmentation(crop_size=crop)(clips, batch.labels, [(0, 0, 0)])
        assert torch.equal(augmented, expected)


def test_a_training_that_goes_on_gets_the_batches_and_shapes_of_one_that_never_stopped(numbered_video, tmp_path):
    options = {**TINY, "train_list": write_list(tmp_path, numbered_video, 40), "multigrid": Multigrid()}
    kept = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    whole = fit(options, kept, keep=tmp_path)
    shapes = [(seen.shape[0], *seen.shape[3:5]) for seen in whole]
    assert shapes[:4] == [(32, 2, 32), (16, 2, 32), (8, 2, 32), (4, 2, 32)]
    assert (
        shapes[4:] == ([(8, 2, 32), (4, 2, 32), (2, 2, 40)] * 3)[:8] + ([(4, 4, 32), (2, 4, 32), (1, 4, 40)] * 6)[:16]
    )
    assert position(tmp_path / "7.ckpt") == (2, 3)
    for step in (1, 3, 4, 7, 13, 27):  # 1 and 4 are ends of epochs
        assert fit(options, kept, tmp_path / f"{step}.ckpt") == whole[step:]
