"""The Lightning data module: from list files to batches."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from octvideo.data.annotations import ListError, Paths, VideoList, read_class_names, read_list
from octvideo.data.dataset import Batch, Decoding, EpochSampler, Sample, TestViews, TrainingClips, collate
from octvideo.data.index import FILE, VideoIndex
from octvideo.data.sampling import Sampling, ShortVideos
from octvideo.data.transforms import BatchAugmentation
from octvideo.data.video import READERS, Backend

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

    Class names and preprocessing become part of the checkpoints: `octvideo.weights.read_labels` and
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
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {num_workers}")
        if batch_size % clips_per_video:
            raise ValueError(
                f"data.batch_size must be a multiple of clips_per_video {clips_per_video}, got {batch_size}"
            )
        if decode_timeout_seconds is not None and decode_timeout_seconds <= 0:
            raise ValueError(f"data.decode_timeout_seconds must be positive or null, got {decode_timeout_seconds}")
        if backend != "auto" and backend not in READERS:
            raise ValueError(f"data.backend must be auto, {', '.join(READERS)}, got {backend}")
        Sampling(clip_frames, frame_stride, sampling, target_fps, short_videos)  # refuses what it cannot take
        if not crop_size <= short_side[0] <= short_side[1]:
            raise ValueError(
                f"data.short_side must be two sizes from crop_size {crop_size} upwards, the smaller first, "
                f"got {short_side}"
            )
        if not separator:
            raise ValueError("data.separator must be at least one character")
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
        self.labels_named = labels is not None
        if labels is None and train_list is not None and (beside := Path(train_list).parent / "labels.txt").is_file():
            labels = str(beside)
        self.labels = None if labels is None else read_class_names(labels, num_classes)

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of the data: class names (None if unknown) and preprocessing."""
        return {"labels": self.labels, "preprocessing": {name: getattr(self, name) for name in PREPROCESSING}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the checkpoint's class names unless the option `labels` says others; the preprocessing stays."""
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
        """Batches of `batch_size` random clips; the incomplete last one is dropped.

        Raises:
            ListError: fewer videos than one batch in every process.
        """
        videos = self.read("train_list")
        dataset = TrainingClips(
            self._decoding("train_list"),
            crop_size=self.crop_size,
            short_side=self.short_side,
            mirror=self.mirror,
            seed=self.seed,
            num_clips=self.clips_per_video,
        )
        sampler = self._sampler(videos, shuffle=True)
        together = self.batch_size // self.clips_per_video
        if len(sampler) < together:
            raise ListError(
                f"{self.lists['train_list']}: {len(videos.paths)} videos for {sampler.world_size} processes are fewer "
                f"than one batch of {together} each: lower --data.batch_size"
            )
        return self._loader(dataset, sampler, together, drop_last=True)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments training batches, on the device."""
        if self.augmentation is None or self.trainer is None or not self.trainer.training:
            return batch
        seeds = [(self.seed, *turn) for turn in batch.turns]
        clips, labels = self.augmentation(batch.clips, batch.labels, seeds)
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
        return self._loader(dataset, self._sampler(videos, shuffle=False), together, drop_last=False)

    def _decoding(self, name: str) -> Decoding:
        sampling = Sampling(self.clip_frames, self.frame_stride, self.sampling, self.target_fps, self.short_videos)
        videos, (index, rows) = self.read(name), self._known.get(name, (None, None))
        return Decoding(videos, sampling, self.backend, self.decode_timeout_seconds, index, rows)

    def _sampler(self, videos: VideoList, shuffle: bool) -> EpochSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return EpochSampler(len(videos.paths), self.seed, shuffle, rank, world_size)

    def _loader(
        self, dataset: Dataset[Sample], sampler: EpochSampler, batch_size: int, drop_last: bool
    ) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=self.prefetch_batches if self.num_workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
        )
