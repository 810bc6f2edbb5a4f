"""The Lightning data module: from list files to batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from octvideo.data.augmentation import BatchAugmentation
from octvideo.data.clips import Decoding, Sample, TestViews, TrainingClips
from octvideo.data.index import FILE, VideoIndex
from octvideo.data.lists import Paths, VideoList, read_class_names, read_list
from octvideo.data.loading import Batch, EpochSampler, Loader, TrainingBatches, TrainingLoader, collate
from octvideo.data.multigrid import LONG_CYCLE, ClipShape, Multigrid, share_of_side
from octvideo.data.reader import Backend
from octvideo.data.sampling import Sampling, ShortVideos
from octvideo.data.video import READERS
from octvideo.data.watchdog import outlive_signals
from octvideo.errors import ListError, UserError

_STATISTICS = 1  # of the same seed, what the statistics' order and clips derive from
EVALUATED_TOGETHER = 30  # clips in a batch of validation or testing
# What has to be the same wherever a trained network sees a video; with the labels it travels in the checkpoint.
PREPROCESSING = (
    *("clip_frames", "frame_stride", "sampling", "target_fps", "short_videos"),
    *("crop_size", "short_side", "mirror", "test_crop_size"),
)


class VideoData(LightningDataModule):
    """Training clips, and validation and test views, of the videos in list files.

    A list file has a line for each video: its path and its class number. With a file index.bin beside it, which
    tools/prepare_data.py writes, videos are not measured again when they are opened. The defaults are the SlowFast
    project's recipe for Kinetics: 8 frames out of 64 at 30 a second; crops of 224 from a short side of 256 to 320;
    tests of 10 x 3 views of 256.

    Class names and preprocessing become part of the checkpoints: `octvideo.models.checkpoint.read_labels` and
    `read_preprocessing` read them there.

    Args:
        train_list: list file of the training videos.
        val_list: list file of the validation videos, tested after every epoch with one view each.
        test_list: list file of the test videos; default: the validation videos.
        root: folder that the paths in the list files start from. Default: the present folder.
        separator: what stands between path and class number in a list file.
        header: skip the first line of each list file.
        labels: text file with the name of a class on each line, class 0 first. Default: labels.txt beside train_list,
            if there is one.
        num_classes: class numbers must be below it (set by model.num_classes).
        clip_frames: frames in a clip.
        frame_stride: length of a clip's window in frames, for each frame taken; about every n-th one is.
        sampling: protocol that says where clips start and which frames they take: slowfast, pytorchvideo, mmaction, or
            uniform (over the whole video); `octvideo.data.sampling.Sampling` has their rules.
        target_fps: rate that frames are counted at, so that clips last equally long in all videos; null: each video's
            own.
        short_videos: what clips take of a video that ends before they do: hold (the last frame), loop, spread; default:
            as the protocol's project.
        crop_size: height and width of a training clip, in pixels.
        short_side: least and most pixels that the shorter side is scaled to before a training crop.
        mirror: flip half of the training clips left to right; turn it off where left and right are classes.
        test_crop_size: height and width of a validation or test view, in pixels; the shorter side is scaled to it.
        test_clips: moments of a test video, spread evenly.
        test_crops: crops a moment, spread evenly along the longer side.
        augmentation: random changes of whole training batches, on the device: resized crops, RandAugment, erasing,
            mixup, cutmix; a mirror of its own. Default: none.
        multigrid: shapes of training clips that change during the training, and batches that change with them. Needs
            trainer.reload_dataloaders_every_n_epochs 1. Default: the same shape throughout.
        shuffle_test_frames: test on frames in random order: a control that tells whether a network uses time.
        clips_per_video: training clips from one pass of decoding a video (repeated augmentation): decoding costs less,
            and an epoch has that many clips of each video.
        batch_size: training clips a step, in each process; a multiple of clips_per_video.
        num_workers: processes that decode, for each training process; 0 decodes in the training process itself.
        prefetch_batches: batches that each of them makes ahead.
        backend: what decodes: pyav, torchcodec, decord, or auto: PyAV, and another one where that gives no frame.
        decode_timeout_seconds: a video whose decoding takes longer is bad; null waits forever.
        seed: of all random choices (set by seed_everything).

    Raises:
        ListError: a list file that is missing or has a wrong line; a file of labels with another number of lines than
            num_classes, or an empty one among them.
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        *,
        root: str | None = None,
        separator: str = " ",
        header: bool = False,
        labels: str | None = None,
        num_classes: int | None = None,
        clip_frames: int = 8,
        frame_stride: int = 8,
        sampling: Literal["slowfast", "pytorchvideo", "mmaction", "uniform"] = "slowfast",
        target_fps: float | None = 30,
        short_videos: ShortVideos | None = None,
        crop_size: int = 224,
        short_side: tuple[int, int] = (256, 320),
        mirror: bool = True,
        test_crop_size: int = 256,
        test_clips: int = 10,
        test_crops: int = 3,
        augmentation: BatchAugmentation | None = None,
        multigrid: Multigrid | None = None,
        shuffle_test_frames: bool = False,
        clips_per_video: int = 1,
        batch_size: int = 8,
        num_workers: int = 4,
        prefetch_batches: int = 2,
        backend: Backend = "auto",
        decode_timeout_seconds: float | None = 60,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {
            "clip_frames": clip_frames,
            "frame_stride": frame_stride,
            "crop_size": crop_size,
            "test_crop_size": test_crop_size,
            "test_clips": test_clips,
            "test_crops": test_crops,
            "clips_per_video": clips_per_video,
            "batch_size": batch_size,
            "prefetch_batches": prefetch_batches,
        }
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise UserError(f"data.num_workers must be at least 0, got {num_workers}")
        if batch_size % clips_per_video:
            raise UserError(
                f"data.batch_size must be a multiple of clips_per_video {clips_per_video}, got {batch_size}"
            )
        if decode_timeout_seconds is not None and decode_timeout_seconds <= 0:
            raise UserError(f"data.decode_timeout_seconds must be positive or null, got {decode_timeout_seconds}")
        if backend != "auto" and backend not in READERS:
            raise UserError(f"data.backend must be auto, {', '.join(READERS)}, got {backend}")
        Sampling(clip_frames, frame_stride, sampling, target_fps, short_videos)  # refuses what it cannot take
        if not crop_size <= short_side[0] <= short_side[1]:
            raise UserError(
                f"data.short_side must be two sizes from crop_size {crop_size} upwards, the smaller first, "
                f"got {short_side}"
            )
        if not separator:
            raise UserError("data.separator must be at least one character")
        if multigrid is not None:
            for frames, side, factor in LONG_CYCLE if multigrid.long_cycle else ():
                multigrid.scaled(ClipShape(clip_frames, frame_stride, crop_size, short_side), frames, side, factor)
        self.lists = {"train_list": train_list, "val_list": val_list, "test_list": test_list or val_list}
        self.root = root
        self.separator = separator
        self.header = header
        self.num_classes = num_classes
        self.clip_frames = clip_frames
        self.frame_stride = frame_stride
        self.sampling = sampling
        self.target_fps = target_fps
        self.short_videos = short_videos
        self.crop_size = crop_size
        self.short_side = short_side
        self.mirror = mirror
        self.test_crop_size = test_crop_size
        self.test_clips = test_clips
        self.test_crops = test_crops
        self.augmentation = augmentation and dataclasses.replace(augmentation, num_classes=num_classes)
        self.multigrid = multigrid
        self.shuffle_test_frames = shuffle_test_frames
        self.clips_per_video = clips_per_video
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_batches = prefetch_batches
        self.backend = backend
        self.decode_timeout_seconds = decode_timeout_seconds
        self.seed = seed
        self._videos: dict[str, VideoList] = {}
        self._known: dict[str, tuple[VideoIndex, NDArray[np.int64]]] = {}
        self._position: dict[str, Any] | None = None
        self.labels_named = labels is not None
        if labels is None and train_list is not None and (beside := Path(train_list).parent / "labels.txt").is_file():
            labels = str(beside)
        self.labels = None if labels is None else read_class_names(labels, num_classes)

    def setup(self, stage: str) -> None:
        """A run starts at its beginning, unless a checkpoint is loaded after this."""
        self._position = None

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of the data: class names (None if unknown), preprocessing, and in training where it is.

        The position is the present epoch and its batches so far, with what these counts mean: how many videos each
        batch has, over all processes, and which order they come in. The end of an epoch is the next one's start.
        """
        state = {"labels": self.labels, "preprocessing": {name: getattr(self, name) for name in PREPROCESSING}}
        if self.trainer is None or "train_list" not in self._videos:
            return state
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current.state_dict(), loop.epoch_loop.batch_progress.current.state_dict()
        epoch = epochs["processed"]
        seen = batches["processed"] if epochs["started"] > epoch else 0
        return {**state, "position": {"epoch": epoch, "batches": seen, "dealt": self._dealt(epoch)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the position, and the class names unless the option `labels` says others; the preprocessing stays."""
        self._position = state_dict.get("position")
        if not self.labels_named:
            self.labels = state_dict.get("labels") or self.labels

    def read(self, name: str) -> VideoList:
        """Reads a list file once, and says what is missing in the words of the options.

        Args:
            name: train_list, val_list or test_list.

        Raises:
            ListError: not given, missing, or a wrong line.
        """
        if name not in self._videos:
            path = self.lists[name]
            line = f"a line 'path{self.separator}class number' for each video"
            looks = f"a text file with {line}, named by --data.{name} FILE"
            if path is None:
                raise ListError(f"no {name.removesuffix('_list')} videos are named: expected {looks}")
            if not os.path.isfile(path):
                raise ListError(f"{path} does not exist: expected {looks} (its paths start from --data.root DIR)")
            listed = read_list(path, separator=self.separator, header=self.header, num_classes=self.num_classes)
            index = Path(path).parent / FILE
            if index.is_file():
                known = VideoIndex(index)
                self._known[name] = known, known.rows(listed.paths)
            paths = Paths(os.path.join(self.root or "", video) for video in listed.paths)
            self._videos[name] = VideoList(paths, listed.labels)
        return self._videos[name]

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of `batch_size` random clips, from the checkpoint's position on; an incomplete last one is dropped.

        With multigrid the loader is for the trainer's present epoch.

        Raises:
            ListError: fewer videos than one batch in every process.
            ValueError: a position in the middle of an epoch that is dealt in another way now.
        """
        position = self._position or {"epoch": 0, "batches": 0}
        if position["batches"] and position["dealt"] != (dealt := self._dealt(position["epoch"])):
            raise UserError(
                f"the checkpoint was written after {position['batches']} batches of epoch {position['epoch']}, which "
                f"had {_say(position['dealt'])}; now it would have {_say(dealt)}. Going on in the middle of an epoch "
                "needs the same trainer.devices x num_nodes x data.batch_size / clips_per_video, accumulated batches, "
                "train_list, multigrid and seed_everything; from a checkpoint of an epoch's end all of them may change"
            )
        batches = self._batches(self.seed, self._shapes, start=(position["epoch"], position["batches"]))
        batches.sampler.set_epoch(max(position["epoch"], self.trainer.current_epoch if self.trainer is not None else 0))
        for epoch in range((self._max_epochs() or 1) if self.multigrid is not None else 1):
            if batches.batches_in(epoch) < 1:
                raise ListError(
                    f"{self.lists['train_list']}: {batches.sampler.num_videos} videos for {batches.sampler.world_size} "
                    f"processes are fewer than one batch of {batches.sizes(epoch)[0]} each: lower --data.batch_size"
                )
        # With multigrid a loader serves a single epoch.
        options = self._decoded(persistent_workers=self.multigrid is None)
        return TrainingLoader(self._clips(self.seed), batch_sampler=batches, **options)

    def statistics_dataloader(self, epoch: int, num_batches: int) -> DataLoader[Sample]:
        """Training batches to measure the network's statistics on (precise batch normalisation).

        They have the full shape, an order and random clips of their own, and nothing of them stays behind in other
        processes. No trainer is needed.

        Args:
            epoch: number of the epoch; each has another order.
            num_batches: of this process; no more than an epoch of the full shape has.

        Raises:
            ListError: as `read`.
        """
        seed = int(np.random.SeedSequence(self.seed, spawn_key=(_STATISTICS,)).generate_state(1)[0])
        batches = self._batches(seed, lambda epoch: [self._full_shape()], limit=num_batches)
        batches.sampler.set_epoch(epoch)
        return Loader(self._clips(seed), batch_sampler=batches, **self._decoded(persistent_workers=False))

    def batches_in_epoch(self, epoch: int) -> int:
        """How many training batches the epoch has, in each process; only with multigrid it depends on the epoch."""
        return self._batches(self.seed, self._shapes).batches_in(epoch)

    def batch_factor(self, epoch: int) -> int:
        """How many times `batch_size` clips a step of the epoch has by multigrid's long cycle, and 1 without it.

        The learning rate is to be as many times higher; the short cycle leaves it (Wu et al.).
        """
        return self._shapes(epoch)[-1].factor

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments training batches, on the device."""
        if self.augmentation is None or self.trainer is None or not self.trainer.training:
            return batch
        seeds = [(self.seed, *turn) for turn in batch.turns]
        augmentation, side = self.augmentation, batch.clips.shape[-1]
        if augmentation.crop_size is not None and side != self.crop_size:  # a smaller shape of multigrid
            crop_size = share_of_side(augmentation.crop_size, side / self.crop_size)
            augmentation = dataclasses.replace(augmentation, crop_size=crop_size)
        clips, labels = augmentation(batch.clips, batch.labels, seeds)
        return batch._replace(clips=clips, labels=labels)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """The centre view of every validation video; nothing without a validation list."""
        return self._views("val_list", 1, 1) if self.lists["val_list"] is not None else []

    def test_dataloader(self) -> DataLoader[Sample]:
        """All views of every test video."""
        return self._views("test_list", self.test_clips, self.test_crops, self.shuffle_test_frames)

    def _views(self, name: str, num_clips: int, num_crops: int, shuffle_frames: bool = False) -> DataLoader[Sample]:
        videos = self.read(name)
        dataset = TestViews(
            self._decoding(name),
            crop_size=self.test_crop_size,
            short_side=self.test_crop_size,
            num_clips=num_clips,
            num_crops=num_crops,
            shuffle_frames=shuffle_frames,
            seed=self.seed,
        )
        together = max(1, EVALUATED_TOGETHER // (num_clips * num_crops))
        sampler = self._sampler(videos, self.seed, shuffle=False)
        return Loader(dataset, together, sampler=sampler, **self._decoded(persistent_workers=True))

    def _full_shape(self) -> ClipShape:
        return ClipShape(self.clip_frames, self.frame_stride, self.crop_size, self.short_side)

    def _shapes(self, epoch: int) -> list[ClipShape]:
        """The shapes of the epoch's batches, by turns."""
        full = self._full_shape()
        return [full] if self.multigrid is None else self.multigrid.shapes(full, epoch, self._max_epochs())

    def _max_epochs(self) -> int | None:
        """How long the training is; None without a trainer, or if it has no end (-1)."""
        epochs = None if self.trainer is None else self.trainer.max_epochs
        return None if epochs == -1 else epochs

    def _batches(
        self,
        seed: int,
        shapes: Callable[[int], Sequence[ClipShape]],
        start: tuple[int, int] = (0, 0),
        limit: int | None = None,
    ) -> TrainingBatches:
        sampler = self._sampler(self.read("train_list"), seed, shuffle=True)
        return TrainingBatches(sampler, self.batch_size // self.clips_per_video, shapes, start, limit)

    def _dealt(self, epoch: int) -> dict[str, Any]:
        """What the number of an epoch's batches so far has to go with, to say which videos they had."""
        batches = self._batches(self.seed, self._shapes)
        sizes = [size * batches.sampler.world_size for size in batches.sizes(epoch)]
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return {
            "videos": batches.sampler.num_videos,
            "videos_a_batch": sizes,
            "accumulated": accumulated,
            "seed": self.seed,
        }

    def _clips(self, seed: int) -> TrainingClips:
        return TrainingClips(
            self._decoding("train_list"),
            crop_size=self.crop_size,
            short_side=self.short_side,
            mirror=self.mirror,
            seed=seed,
            num_clips=self.clips_per_video,
        )

    def _decoding(self, name: str) -> Decoding:
        sampling = Sampling(self.clip_frames, self.frame_stride, self.sampling, self.target_fps, self.short_videos)
        videos, (index, rows) = self.read(name), self._known.get(name, (None, None))
        return Decoding(videos, sampling, self.backend, self.decode_timeout_seconds, index, rows)

    def _sampler(self, videos: VideoList, seed: int, shuffle: bool) -> EpochSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return EpochSampler(len(videos.paths), seed, shuffle, rank, world_size)

    def _decoded(self, persistent_workers: bool) -> dict[str, Any]:
        """Options of all loaders."""
        return {
            "collate_fn": collate,
            "worker_init_fn": outlive_signals,
            "num_workers": self.num_workers,
            "persistent_workers": persistent_workers and self.num_workers > 0,
            "prefetch_factor": self.prefetch_batches if self.num_workers > 0 else None,
            "pin_memory": torch.cuda.is_available(),
        }


def _say(dealt: dict[str, Any]) -> str:
    sizes = " and ".join(map(str, dealt["videos_a_batch"]))
    return (
        f"{dealt['videos']} videos, {sizes} a batch over all processes, {dealt['accumulated']} batches a step, in the "
        f"order of seed {dealt['seed']}"
    )
