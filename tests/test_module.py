"""The data module: what it refuses, and what its loaders give."""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from octvideo.data.augmentation import BatchAugmentation
from octvideo.data.clips import BadVideo, TrainingClips
from octvideo.data.decoding import NO_VIDEO
from octvideo.data.index import IndexedVideo, write_index
from octvideo.data.module import VideoData
from octvideo.data.multigrid import Multigrid
from octvideo.data.sampling import Sampling
from octvideo.errors import IndexFileError, ListError, UserError


@pytest.fixture
def lists(numbered_video, tmp_path):
    (tmp_path / "list.csv").write_text(f"{numbered_video} 1\n" * 5)
    return {"train_list": str(tmp_path / "list.csv"), "val_list": str(tmp_path / "list.csv")}


SMALL = {
    "clip_frames": 4,
    "frame_stride": 2,
    "crop_size": 32,
    "short_side": (32, 40),
    "test_crop_size": 40,
    "test_clips": 3,
    "test_crops": 2,
    "batch_size": 2,
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_give_uint8_batches(lists, num_workers):
    data = VideoData(**lists, **SMALL, num_workers=num_workers)
    batches = list(data.train_dataloader())
    assert [batch.clips.shape for batch in batches] == [(2, 1, 3, 4, 32, 32)] * 2
    assert batches[0].clips.dtype == torch.uint8
    assert batches[0].labels.tolist() == [1, 1]
    (val,) = data.val_dataloader()
    assert val.clips.shape == (5, 1, 3, 4, 40, 40)
    (test,) = data.test_dataloader()
    assert test.clips.shape == (5, 6, 3, 4, 40, 40)


def test_clips_do_not_depend_on_the_number_of_workers(lists, numbered_video, tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"{numbered_video} {label}\n" for label in range(9)))
    (tmp_path / "empty.mp4").touch()
    with open(tmp_path / "list.csv", "a") as list_file:
        list_file.write(f"{tmp_path / 'empty.mp4'} 9\n")

    def epoch(num_workers):
        return list(VideoData(**lists, **SMALL, num_workers=num_workers).train_dataloader())

    for alone, shared in zip(epoch(0), epoch(2), strict=True):
        assert torch.equal(alone.clips, shared.clips)
        assert alone.labels.tolist() == shared.labels.tolist()
        assert alone[2:] == shared[2:]


def test_a_worker_goes_on_after_a_video_that_hangs(lists, numbered_video, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it for reading waits for somebody to write
    (tmp_path / "list.csv").write_text(f"{numbered_video} 1\n{tmp_path / 'pipe.mp4'} 0\n{numbered_video} 2\n")
    data = VideoData(**lists, **SMALL, num_workers=1, decode_timeout_seconds=1)
    (batch,) = data.val_dataloader()
    assert batch.labels.tolist() == [1, 2]
    assert batch.bad == [BadVideo(str(tmp_path / "pipe.mp4"), "no result within 1 s: the decoder was killed")]


def processes_below(parent):
    """All processes that descend from one."""
    below = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends while it is read
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                below.append(int(entry.name))
    return below + [process for child in below for process in processes_below(child)]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_of_workers_and_decoders_stay_constant(lists, numbered_video, tmp_path):
    (tmp_path / "list.csv").write_text(f"{numbered_video} 1\n" * 1500)
    data = VideoData(**lists, **SMALL, num_workers=2)
    loader = data.train_dataloader()
    used = []
    for epoch in range(4):
        loader.batch_sampler.sampler.set_epoch(epoch)
        for _ in loader:
            pass
        used.append({})  # resident megabytes, and open files, of each process
        for process in processes_below(os.getpid()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one of an earlier test may end here
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                files = len(os.listdir(f"/proc/{process}/fd"))
                used[-1][process] = (pages * os.sysconf("SC_PAGESIZE") / 2**20, files)
    stayed = used[0].keys() & used[-1].keys()
    assert len(stayed) >= 4  # two workers, and the decoder of each
    for process in stayed:
        assert used[-1][process][0] < used[0][process][0] + 20
        assert used[-1][process][1] <= used[0][process][1] + 3  # some are open while a clip is on its way


def test_clips_of_one_decode_fill_batches_of_as_many_clips(lists):
    data = VideoData(**lists, **{**SMALL, "batch_size": 4}, num_workers=0, clips_per_video=2)
    batches = list(data.train_dataloader())
    assert [batch.clips.shape for batch in batches] == [(2, 2, 3, 4, 32, 32)] * 2
    assert len({tuple(turn) for batch in batches for turn in batch.turns}) == 4


def test_training_batches_are_augmented_and_others_are_not(lists):
    options = {"mirror_probability": 1.0, "mixup_alpha": 1.0}
    data = VideoData(**lists, **SMALL, num_workers=0, num_classes=3, augmentation=BatchAugmentation(**options))
    batch = next(iter(data.train_dataloader()))
    assert data.on_after_batch_transfer(batch, 0) is batch  # no trainer
    data.trainer = SimpleNamespace(training=True)
    augmented = data.on_after_batch_transfer(batch, 0)
    seeds = [(0, *turn) for turn in batch.turns]
    clips, labels = BatchAugmentation(**options, num_classes=3)(batch.clips, batch.labels, seeds)
    assert torch.equal(augmented.clips, clips)
    assert torch.equal(augmented.labels, labels)
    assert labels.shape == (2, 3)
    assert not torch.equal(clips, batch.clips)
    data.trainer.training = False
    assert data.on_after_batch_transfer(batch, 0) is batch
    plain = VideoData(**lists)
    plain.trainer = SimpleNamespace(training=True)
    assert plain.on_after_batch_transfer(batch, 0) is batch


def test_sampling_options_reach_the_clips(lists):
    data = VideoData(**lists, **SMALL, num_workers=0, sampling="uniform", target_fps=None)
    decoding = data.test_dataloader().dataset.decoding
    assert decoding.sampling == Sampling(4, 2, "uniform", None)
    assert decoding.timeout_seconds == 60
    assert data.state_dict()["preprocessing"]["sampling"] == "uniform"


def test_an_index_beside_the_list_tells_what_is_known_of_unchanged_files(numbered_video, tmp_path):
    (tmp_path / "list.csv").write_text(f"{numbered_video.name} 1\nother.mp4 0\n")
    size = numbered_video.stat().st_size
    lists = {"train_list": str(tmp_path / "list.csv"), "val_list": str(tmp_path / "list.csv")}

    def duration(num_bytes, mtime_ns=0):
        known = IndexedVideo(30, 30.0, 1.0, np.array([0.0, 0.4, 0.8]), num_bytes, mtime_ns)  # in truth 2 s
        write_index(tmp_path, {numbered_video.name: known})
        decoding = VideoData(**lists, root=str(numbered_video.parent)).val_dataloader().dataset.decoding
        assert decoding.rows.tolist() == [0, -1]
        with decoding.open(0) as video:
            return video.duration_seconds

    assert duration(size) == 1
    assert duration(size + 1) == 2
    assert duration(size, numbered_video.stat().st_mtime_ns) == 1
    assert duration(size, numbered_video.stat().st_mtime_ns + 1) == 2
    (tmp_path / "index.bin").write_bytes(b"cut off")
    with pytest.raises(IndexFileError, match="not a complete index"):
        VideoData(**lists).read("train_list")


def test_without_a_validation_list_there_is_no_validation(lists):
    assert VideoData(lists["train_list"]).val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "data.crop_size must be at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"short_side": (200, 256)}, r"two sizes from crop_size 224 upwards.*got \(200, 256\)"),
        ({"short_side": (256, 240)}, r"got \(256, 240\)"),
        ({"separator": ""}, "data.separator"),
        ({"clips_per_video": 0}, "data.clips_per_video must be at least 1, got 0"),
        ({"prefetch_batches": 0}, "data.prefetch_batches must be at least 1, got 0"),
        ({"batch_size": 6, "clips_per_video": 4}, "batch_size must be a multiple of clips_per_video 4, got 6"),
        ({"decode_timeout_seconds": 0}, "data.decode_timeout_seconds must be positive or null, got 0"),
        ({"backend": "opencv"}, "data.backend must be auto, pyav, decord, torchcodec, got opencv"),
        ({"target_fps": -1}, "target_fps must be positive"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VideoData(**options)


def test_missing_lists_say_which_option_names_them(lists, tmp_path):
    with pytest.raises(ListError, match=r"no train videos are named: .*'path class number'.*--data.train_list FILE"):
        VideoData().read("train_list")
    with pytest.raises(ListError, match=r"nothing.csv does not exist: .*--data.test_list FILE.*--data.root DIR"):
        VideoData(test_list=str(tmp_path / "nothing.csv")).read("test_list")


def test_a_wrong_root_is_refused_and_a_single_missing_video_is_not(tmp_path):
    path = str(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("".join(f"{name}.mp4 0\n" for name in "abc"))
    with pytest.raises(ListError, match=r"was found below --data.root nowhere: there is no nowhere/a.mp4"):
        VideoData(train_list=path, root="nowhere").setup("fit")
    with pytest.raises(ListError, match=r"found from this folder, as there is no --data.root: there is no a.mp4"):
        VideoData(train_list=path).setup("fit")
    (tmp_path / "c.mp4").touch()
    VideoData(train_list=path, root=str(tmp_path)).setup("fit")


def test_fewer_videos_than_a_batch_are_refused(lists):
    with pytest.raises(ListError, match="5 videos for 1 processes are fewer than one batch of 8"):
        VideoData(**lists, **{**SMALL, "batch_size": 8}).train_dataloader()


def test_labels_are_named_by_an_option_or_stand_beside_the_training_list(lists, tmp_path):
    assert VideoData(**lists).labels is None
    (tmp_path / "labels.txt").write_text("sit\nstand\n")
    (tmp_path / "named.txt").write_text("cook\neat\n")
    assert VideoData(**lists, num_classes=2).labels == ["sit", "stand"]
    assert VideoData(**lists, num_classes=2, labels=str(tmp_path / "named.txt")).labels == ["cook", "eat"]
    assert VideoData(val_list=lists["val_list"]).labels is None
    with pytest.raises(ListError, match=r"labels.txt: expected a line for each of 3 classes \(num_classes\), got 2"):
        VideoData(**lists, num_classes=3)
    with pytest.raises(ListError, match=r"nothing.txt: No such file"):
        VideoData(**lists, labels="nothing.txt")


def test_a_checkpoints_labels_are_taken_unless_an_option_names_others(lists, tmp_path):
    state = {"labels": ["a", "b"], "preprocessing": {"clip_frames": 99}}
    (tmp_path / "labels.txt").write_text("sit\nstand\n")
    data = VideoData(**lists)
    data.load_state_dict({"labels": None})
    assert data.labels == ["sit", "stand"]
    data.load_state_dict(state)
    assert data.labels == ["a", "b"]
    assert data.preprocessing.clip_frames == 8
    named = VideoData(**lists, labels=str(tmp_path / "labels.txt"))
    named.load_state_dict(state)
    assert named.labels == ["sit", "stand"]


class Seen(NamedTuple):
    """What a step got; equal only if all of it is."""

    turns: list[tuple[int, int]]
    labels: list[int]
    shape: tuple[int, ...]
    levels: bytes


class Recorder(LightningModule):
    """Trains nothing, and writes down what it gets; keeps a checkpoint of each step by its number."""

    def __init__(self, keep):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keep = keep
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(
            Seen(batch.turns, batch.labels.tolist(), tuple(batch.clips.shape), batch.clips.numpy().tobytes())
        )
        return self.weight * batch.clips.float().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.keep is not None and not self.trainer.is_last_batch:
            self.trainer.save_checkpoint(self.keep / f"{len(self.seen)}.ckpt")

    def on_train_epoch_end(self):
        if self.keep is not None:
            self.trainer.save_checkpoint(self.keep / f"{len(self.seen)}.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(options, trained, ckpt_path=None, keep=None):
    """All that a training gets, from a checkpoint on."""
    recorder = Recorder(keep)
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    trainer = Trainer(accelerator="cpu", logger=False, **dict.fromkeys(quiet, False), **trained)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*validation_step.*")
        warnings.filterwarnings("error", ".*not resumable.*")
        trainer.fit(recorder, VideoData(**options), ckpt_path=ckpt_path, weights_only=True)
    return recorder.seen


def write_list(folder, video, length):
    """A list file of one video many times, each with a class of its own."""
    (folder / "list.csv").write_text("".join(f"{video} {number}\n" for number in range(length)))
    return str(folder / "list.csv")


def position(ckpt_path):
    kept = torch.load(ckpt_path, weights_only=True)["VideoData"]["position"]
    return kept["epoch"], kept["batches"]


@pytest.mark.parametrize(("num_workers", "accumulated"), [(0, 1), (2, 2)])
def test_a_training_that_goes_on_gets_what_one_that_never_stopped_gets(
    numbered_video, tmp_path, num_workers, accumulated
):
    options = {**SMALL, "train_list": write_list(tmp_path, numbered_video, 9), "num_workers": num_workers}
    trained = {"max_epochs": 3, "accumulate_grad_batches": accumulated}
    whole = fit(options, trained, keep=tmp_path)
    assert [[turn[0] for turn in seen.turns] for seen in whole] == [
        [epoch] * 2 for epoch in (0, 1, 2) for _ in range(4)
    ]
    assert len({seen.levels for seen in whole}) == 12
    assert [position(tmp_path / f"{step}.ckpt") for step in (2, 4, 5, 7, 8)] == [(0, 2), (1, 0), (1, 1), (1, 3), (2, 0)]
    for step in range(1, 13) if num_workers == 0 else (2, 4, 6):
        assert fit(options, trained, tmp_path / f"{step}.ckpt") == whole[step:]


def test_going_on_decodes_no_video_that_was_seen(lists, monkeypatch):
    data, decoded, read = VideoData(**lists, **SMALL, num_workers=0), [], TrainingClips.make
    monkeypatch.setattr(
        TrainingClips, "make", lambda self, draw, next: decoded.append(draw.position) or read(self, draw, next)
    )
    data.load_state_dict({"position": {"epoch": 0, "batches": 1, "dealt": data._dealt(0)}})
    loader = data.train_dataloader()
    assert [batch.turns for batch in loader] == [[(0, 2), (0, 3)]]
    assert decoded == [2, 3]
    assert len(loader) == 2  # of the whole epoch
    loader.batch_sampler.sampler.set_epoch(1)
    assert [batch.turns for batch in loader] == [[(1, 0), (1, 1)], [(1, 2), (1, 3)]]


def training(data, rank=0, world_size=1):
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, current_epoch=0, max_epochs=2, accumulate_grad_batches=1
    )
    return data


def test_a_position_holds_while_a_step_has_the_same_videos_over_all_processes(numbered_video, tmp_path):
    path = write_list(tmp_path, numbered_video, 13)
    one = training(VideoData(path, **{**SMALL, "batch_size": 4}, num_workers=0))
    kept = {"position": {"epoch": 1, "batches": 1, "dealt": one._dealt(1)}}
    one.load_state_dict(kept)
    expected = [{draw.position for draw in batch} for batch in one.train_dataloader().batch_sampler]
    shared = []
    for rank in range(2):
        data = training(VideoData(path, **SMALL, num_workers=0), rank, 2)
        data.load_state_dict(kept)
        shared.append([{draw.position for draw in batch} for batch in data.train_dataloader().batch_sampler])
    assert [a | b for a, b in zip(*shared, strict=True)] == expected == [{4, 5, 6, 7}, {8, 9, 10, 11}]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 4}, r"1 batches of epoch 1, which had 13 videos, 2 a batch.*now it would have 13 videos, 4 a"),
        ({"seed": 7}, "in the order of seed 7"),
        ({"train_list": "shorter.csv"}, "now it would have 5 videos"),
    ],
)
def test_a_position_within_an_epoch_that_is_dealt_in_another_way_is_refused(lists, tmp_path, changed, message):
    video = Path(lists["train_list"]).read_text().split(" 1\n")[0]
    options = {**SMALL, "train_list": write_list(tmp_path, video, 13)}
    (tmp_path / "shorter.csv").write_text(f"{video} 1\n" * 5)
    dealt = VideoData(**options)._dealt(1)
    if "train_list" in changed:
        changed = {"train_list": str(tmp_path / changed["train_list"])}
    data = training(VideoData(**{**options, **changed}, num_workers=0))
    data.load_state_dict({"position": {"epoch": 1, "batches": 1, "dealt": dealt}})
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()
    data.load_state_dict({"position": {"epoch": 1, "batches": 0, "dealt": dealt}})  # the end of an epoch
    assert {draw.epoch for batch in data.train_dataloader().batch_sampler for draw in batch} == {1}
    data.load_state_dict({"position": {"epoch": 1, "batches": 1, "dealt": dealt}})
    data.setup("fit")
    assert len(list(data.train_dataloader().batch_sampler)) == len(data.train_dataloader())


def test_statistics_come_from_clips_and_an_order_of_their_own(numbered_video, tmp_path):
    data = VideoData(write_list(tmp_path, numbered_video, 13), **SMALL, num_workers=0)

    def videos(loader):
        return [[draw.video for draw in batch] for batch in loader.batch_sampler]

    first, second = data.statistics_dataloader(0, 3), data.statistics_dataloader(1, 3)
    assert len(first) == len(videos(first)) == 3
    assert videos(first) == videos(data.statistics_dataloader(0, 3))
    assert videos(first) != videos(second)
    assert videos(data.statistics_dataloader(0, 99))[:3] == videos(first)
    assert len(data.statistics_dataloader(0, 99)) == 6
    assert videos(first) != videos(data.train_dataloader())[:3]
    draw = next(iter(first.batch_sampler))[0]
    assert not torch.equal(first.dataset[draw].clips, data.train_dataloader().dataset[draw].clips)
    assert [batch.clips.shape for batch in first] == [(2, 1, 3, 4, 32, 32)] * 3
    data.num_workers = 1
    assert data.train_dataloader().persistent_workers
    assert not data.statistics_dataloader(0, 1).persistent_workers


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_evaluate_as_many_batches_each_and_every_video_once(numbered_video, tmp_path, world_size):
    path = write_list(tmp_path, numbered_video, 61)
    for name in ("val_dataloader", "test_dataloader"):
        loaders = [
            getattr(training(VideoData(val_list=path, **SMALL, num_workers=0), r, world_size), name)()
            for r in range(world_size)
        ]
        batches = [list(loader.batch_sampler) for loader in loaders]
        assert len({len(loader) for loader in loaders}) == len({len(dealt) for dealt in batches}) == 1
        videos = [draw.video for dealt in batches for batch in dealt for draw in batch]
        assert sorted(video for video in videos if video != NO_VIDEO) == list(range(61))


def test_a_tab_may_be_written_as_a_shell_leaves_it(lists, numbered_video, tmp_path):
    (tmp_path / "list.csv").write_text(f"{numbered_video}\t1\n")
    assert VideoData(**lists, **SMALL, separator=r"\t").read("train_list").labels.tolist() == [1]


def test_the_smallest_clips_are_those_that_a_network_is_tried_on(lists):
    assert VideoData(**lists, **SMALL).clip_sizes() == [(4, 32)]  # 40 of the tests is larger
    assert VideoData(**lists, **{**SMALL, "test_crop_size": 16}).clip_sizes() == [(4, 32), (4, 16)]
    large = {**SMALL, "clip_frames": 8, "crop_size": 96, "short_side": (96, 96)}
    multigrid = VideoData(**lists, **large, multigrid=Multigrid())
    assert multigrid.clip_sizes() == [(8, 96), (8, 40), (4, 32), (2, 32)]


def test_more_waiting_clips_than_shared_memory_holds_are_refused(lists, monkeypatch):
    clip, view = 3 * 4 * 32**2, 3 * 4 * 40**2
    free = SimpleNamespace(free=max(4 * clip, 5 * view))  # 2 batches of 2 clips, or all 5 videos of the validation
    monkeypatch.setattr("octvideo.data.shared_memory.shutil.disk_usage", lambda path: free)
    VideoData(**lists, **SMALL, num_workers=1).setup("fit")
    VideoData(**lists, **SMALL, num_workers=0).setup("test")
    for stage, wanted in (("fit", 5 * view), ("test", 5 * 6 * view)):
        free.free = wanted - 1
        with pytest.raises(UserError, match=r"need \d+ MiB of /dev/shm, where .*docker run --shm-size"):
            VideoData(**lists, **SMALL, num_workers=1).setup(stage)
        free.free = wanted
        VideoData(**lists, **SMALL, num_workers=1).setup(stage)
