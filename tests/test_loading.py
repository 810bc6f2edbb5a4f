"""Loading: how draws are dealt to processes and batches, and when loaders start."""

import pytest
import torch
from test_clips import decoding, training
from torch.utils.data import DataLoader

from octvideo.data import loading
from octvideo.data.clips import BadVideo, Draw, Sample
from octvideo.data.decoding import NO_VIDEO
from octvideo.data.loading import EpochSampler, Loader, TrainingBatches, collate
from octvideo.data.multigrid import ClipShape


def test_a_batch_without_a_good_video_is_empty():
    batch = collate([Sample(None, 0, "a", [BadVideo("a", "broken")], Draw(0, 0, 0))])
    assert len(batch.clips) == 0
    assert batch.turns == []
    assert batch.bad == [BadVideo("a", "broken")]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
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


def test_a_sampler_that_repeats_deals_the_first_epoch_again():
    first, again = EpochSampler(20, 0, True), EpochSampler(20, 0, True, repeats=True)
    again.set_epoch(3)
    assert list(again) == list(first)


def test_one_epoch_starts_where_it_was_left_and_all_others_are_whole():
    shapes = [ClipShape(4, 3, 32, (32, 48), factor) for factor in (2, 1)]

    def batches(epoch, **options):
        sampler = EpochSampler(20, 0, True)
        sampler.set_epoch(epoch)
        dealt = TrainingBatches(sampler, 2, lambda epoch: shapes, **options)
        assert len(dealt) == (6 if "limit" not in options else 5)
        return list(dealt)

    whole = batches(3)
    assert [len(batch) for batch in whole] == [4, 2, 4, 2, 4, 2]
    assert [draw.shape for batch in whole[:2] for draw in batch] == [shapes[0]] * 4 + [shapes[1]] * 2
    assert [draw.position for batch in whole for draw in batch] == list(range(18))
    assert batches(3, start=(3, 2)) == whole[2:]
    assert batches(3, start=(3, 6)) == []
    assert batches(4, start=(3, 2)) == batches(4)
    assert batches(3, limit=5) == whole[:5]


def test_the_epoch_may_be_set_until_the_first_batch_is_asked_for(numbered_video):
    sampler = EpochSampler(3, 0, True)
    batches = TrainingBatches(sampler, 1, lambda epoch: [ClipShape(4, 3, 32, (32, 48))])
    loader = Loader(training(decoding(*[numbered_video] * 3)), batch_sampler=batches, collate_fn=collate, num_workers=1)
    iterator = iter(loader)
    sampler.set_epoch(5)
    assert [batch.turns for batch in iterator] == [[(5, 0)], [(5, 1)], [(5, 2)]]
    loader.load_state_dict(loader.state_dict())
    assert loader.state_dict() == {}


def test_processes_that_load_start_when_the_threads_of_a_process_group_have_had_time_to_finish(monkeypatch):
    waited = []
    monkeypatch.setattr(loading.time, "sleep", waited.append)
    monkeypatch.setattr(DataLoader, "_get_iterator", lambda self: iter(waited))
    for workers, initialized, wanted in ((0, True, []), (1, False, []), (1, True, [Loader.QUIET_SECONDS])):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda initialized=initialized: initialized)
        waited.clear()
        assert list(Loader(range(3), batch_size=None, num_workers=workers)) == wanted
