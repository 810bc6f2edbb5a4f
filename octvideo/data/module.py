"""The Lightning data module: from list files to batches."""

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, Dataset

from octvideo import stores
from octvideo.data.augmentation import BatchAugmentation
from octvideo.data.clips import Sample, TestViews, TrainingClips
from octvideo.data.decoding import Decoding
from octvideo.data.index import FILE, VideoIndex
from octvideo.data.lists import Paths, VideoList, check_there, may_be_list, read_class_names, read_list, rooted
from octvideo.data.loading import Batch, EpochSampler, Loader, TrainingBatches, collate
from octvideo.data.multigrid import ClipShape, Multigrid, share_of_side
from octvideo.data.preprocessing import Preprocessing
from octvideo.data.reader import Backend
from octvideo.data.shared_memory import check_shared_memory
from octvideo.data.source import SPAN, AnySource, Source
from octvideo.data.watchdog import outlive_signals
from octvideo.errors import ListError, UserError


# Lightning keeps a data module's state in checkpoints under the name of its class: renaming it would break resuming.
class VideoData(LightningDataModule):
    """Training clips, and validation and test views, of the videos in list files.

    A list file has a line for each video: its path and its class number (`path 3`), or several (`path 3,17` for task
    multi, `path 3:0.7,17:0.3` for shares), and, for a stretch of a video, its start and end in seconds (`path 3 12.5
    20`). A path is a file, a folder of frames, a URI such as s3://bucket/clip.mp4, or a member of a tar file. An
    index.bin beside the list, as `octvideo prepare` writes, saves measuring the videos when they are opened. Class
    names and preprocessing become part of checkpoints.

    Args:
        train_list: list file of the training videos, local or a URI; or tar files, or hf://NAME of a data set.
        val_list: list file of the validation videos; after every epoch the centre view of each is tested.
        test_list: list file of the test videos; default: the validation videos.
        root: folder, local or a URI, that the paths in the list files start from; default: the current folder.
        separator: separates path and class number in a list file; \\t means a tab.
        header: skip the first line of each list file.
        labels: text file of class names, one a line, class 0 first; default: labels.txt beside train_list, if any.
        num_classes: class numbers must be below it (set by model.num_classes).
        task: "single" or "multi": one class of a video, or any number of them (set by model.task).
        balanced: draw training videos so that all classes are as frequent; an epoch stays as long.
        test_clips: clips of a test video, spread evenly over time.
        test_crops: crops of each of them, spread evenly along the longer side.
        augmentation: random changes of whole training batches, on the device; default: none.
        multigrid: small clips in large batches early in training, large clips in small batches late; default: none.
            Needs trainer.reload_dataloaders_every_n_epochs 1.
        shuffle_test_frames: test on frames in random order: a control that tells whether a network uses time.
        clips_per_video: training clips from one pass of decoding a video (repeated augmentation), all in one epoch.
        batch_size: training clips a step, in each process; a multiple of clips_per_video.
        num_workers: processes that decode, for each training process; 0 decodes in the training process itself.
        prefetch_batches: batches that each of them makes ahead.
        backend: decoder: pyav, torchcodec, decord, or auto: PyAV, then the others for a file it cannot read.
        decode_timeout_seconds: a video whose decoding takes longer is bad; null waits for ever.
        frames_fps: frames a second of folders of frames.
        cache: folder on each machine for what is read from stores, shared by its processes; default: nothing is kept.
        cache_gb: most gigabytes in it.
        source: class that finds videos in another way; see `octvideo.data.source.Source`.
        seed: of all random choices (set by seed_everything).
        preprocessing: the options of `Preprocessing`, except mean and std, which are the model's.
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
        task: Literal["single", "multi"] = "single",
        balanced: bool = False,
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
        frames_fps: float = 25,
        cache: str | None = None,
        cache_gb: float = 50,
        source: Source | None = None,
        seed: int = 0,
        **preprocessing: Any,
    ) -> None:
        super().__init__()
        self.lists = {"train_list": train_list, "val_list": val_list, "test_list": test_list or val_list}
        self.root, self.header, self.num_classes = root, header, num_classes
        self.task, self.balanced = task, balanced
        self.separator = separator.replace(r"\t", "\t")  # as shells and YAML's single quotes leave it
        self.test_clips, self.test_crops, self.shuffle_test_frames = test_clips, test_crops, shuffle_test_frames
        self.augmentation = augmentation and dataclasses.replace(augmentation, num_classes=num_classes)
        self.multigrid, self.seed = multigrid, seed
        self.clips_per_video, self.batch_size = clips_per_video, batch_size
        self.num_workers, self.prefetch_batches = num_workers, prefetch_batches
        self.backend, self.decode_timeout_seconds = backend, decode_timeout_seconds
        try:  # pixels are normalised by the model: jsonargparse makes options of all arguments but those named here
            self.preprocessing = clips = Preprocessing(**preprocessing, mean=0, std=1)
            self.source = source or AnySource(frames_fps, cache, cache_gb)
        except UserError as error:
            raise UserError(f"data.{error}") from error
        self._full_shape = ClipShape(clips.clip_frames, clips.frame_stride, clips.crop_size, clips.short_side)
        self._check()
        full = self._full_shape
        self.all_shapes = [full] if multigrid is None else multigrid.all_shapes(full)
        self._read: dict[str, Decoding] = {}
        self._position: dict[str, Any] | None = None
        self.labels_named = labels is not None
        if labels is None and train_list is not None and not train_list.startswith("hf://"):
            labels = beside if stores.exists(beside := stores.beside(train_list, "labels.txt")) else None
        self.labels = None if labels is None else read_class_names(labels, num_classes)

    def _check(self) -> None:
        for name in ("test_clips", "test_crops", "clips_per_video", "batch_size", "prefetch_batches", "num_workers"):
            if getattr(self, name) < (least := 0 if name == "num_workers" else 1):
                raise UserError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        if self.batch_size % self.clips_per_video:
            wanted = f"a multiple of clips_per_video {self.clips_per_video}"
            raise UserError(f"data.batch_size must be {wanted}, got {self.batch_size}")
        if self.decode_timeout_seconds is not None and self.decode_timeout_seconds <= 0:
            raise UserError(f"data.decode_timeout_seconds must be positive or null, got {self.decode_timeout_seconds}")
        if self.backend not in get_args(Backend):
            raise UserError(f"data.backend must be {', '.join(get_args(Backend))}, got {self.backend}")
        if not self.separator:
            raise UserError("data.separator must be at least one character")

    def setup(self, stage: str) -> None:
        self._position = None  # a run starts at its beginning, unless a checkpoint is loaded after this
        for name in ("test_list",) if stage == "test" else ("train_list", "val_list"):
            if self.lists[name] is not None:
                self.source.check(self.read(name).paths[0])
                if type(self.source) is AnySource:
                    check_there(str(self.lists[name]), self.read(name).paths, self.root)
        self._check_shared_memory(stage)

    def _check_shared_memory(self, stage: str) -> None:
        tested, views = ("test_list", self.test_clips * self.test_crops) if stage == "test" else ("val_list", 1)
        videos = self.batch_size // self.clips_per_video
        # Lists, videos in a batch, and bytes of the clips of each.
        loads = [(tested, _together(views), views * math.prod(self.preprocessing.clip_size))]
        for shape in self.all_shapes if stage == "fit" else ():
            size = 3 * shape.clip_frames * shape.crop_size**2
            loads.append(("train_list", videos * shape.factor, self.clips_per_video * size))
        waiting = self.num_workers * self.prefetch_batches
        named = [(self.read(name).paths, batch, size) for name, batch, size in loads if self.lists[name] is not None]
        sizes = [min(waiting * batch, len(paths)) * size for paths, batch, size in named]
        check_shared_memory(max(sizes, default=0) * getattr(self.trainer, "num_devices", 1))

    def state_dict(self) -> dict[str, Any]:
        """Class names, preprocessing, and in training the position; the end of an epoch is the next one's start."""
        preprocessing = dataclasses.asdict(self.preprocessing)
        del preprocessing["mean"], preprocessing["std"]
        state = {"labels": self.labels, "preprocessing": preprocessing}
        if self.trainer is None or "train_list" not in self._read:
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
        """The videos of train_list, val_list or test_list; ListError if they are not named, missing or wrong."""
        return self._decoding(name).videos

    def _decoding(self, name: str) -> Decoding:
        if name not in self._read:
            path = self.lists[name]
            line = repr(f"path{self.separator}class number")
            looks = f"a text file with a line {line} for each video, named by --data.{name}"
            if path is None:
                raise ListError(f"no {name.removesuffix('_list')} videos are named: expected {looks} FILE")
            if not may_be_list(path):
                raise ListError(f"{path} does not exist: expected {looks} FILE (its paths start from --data.root DIR)")
            how_read: dict[str, Any] = {"num_classes": self.num_classes, "task": self.task}
            listed = read_list(path, separator=self.separator, header=self.header, **how_read)
            has_index = not path.startswith("hf://") and stores.exists(index := stores.beside(path, FILE))
            known = VideoIndex(stores.local(index)) if has_index else None
            rows = None if known is None else known.rows(SPAN.sub("", video) for video in listed.paths)
            videos = listed._replace(paths=Paths(rooted(self.root or "", video) for video in listed.paths))
            how = self.preprocessing.sampler, self.backend, self.decode_timeout_seconds
            self._read[name] = Decoding(videos, *how, known, rows, self.source)
        return self._read[name]

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of `batch_size` random clips, from the checkpoint's position on, without an incomplete one."""
        position = self._position or {"epoch": 0, "batches": 0}
        if position["batches"] and position["dealt"] != (dealt := self._dealt(position["epoch"])):
            raise UserError(
                f"the checkpoint was written after {position['batches']} batches of epoch {position['epoch']}, which "
                f"had {_describe(position['dealt'])}; now it would have {_describe(dealt)}. To resume in the middle of "
                "an epoch, trainer.devices x num_nodes x data.batch_size / clips_per_video, accumulated batches, "
                "train_list, multigrid and seed_everything must stay; from an epoch's end all of them may change"
            )
        batches = self._batches(start=(position["epoch"], position["batches"]))
        sampler = batches.sampler
        sampler.set_epoch(max(position["epoch"], getattr(self.trainer, "current_epoch", 0)))
        for epoch in range(max(1, getattr(self.trainer, "max_epochs", None) or 1)):
            if batches.batches_in(epoch) < 1:
                raise ListError(
                    f"{self.lists['train_list']}: {sampler.num_videos} videos for {sampler.world_size} processes are "
                    f"fewer than one batch of {batches.sizes(epoch)[0]} each: lower --data.batch_size"
                )
        return self._training_loader(batches, persistent=self.multigrid is None)  # else one loader an epoch

    def statistics_dataloader(self, epoch: int, num_batches: int) -> DataLoader[Sample]:
        """At most `num_batches` of the full shape, to measure batch-norm statistics on; order and clips are new."""
        batches = dataclasses.replace(self._batches(limit=num_batches), shapes=lambda epoch: [self._full_shape])
        batches.sampler.seed = int(np.random.SeedSequence(self.seed, spawn_key=(1,)).generate_state(1)[0])
        batches.sampler.set_epoch(epoch)
        return self._training_loader(batches, persistent=False)

    def batches_in_epoch(self, epoch: int) -> int:
        """Training batches of the epoch in each process."""
        return self._batches().batches_in(epoch)

    def batch_factor(self, epoch: int) -> int:
        """How many times larger batches and learning rate are in this epoch of multigrid's long cycle; else 1."""
        return self._shapes(epoch)[-1].factor

    def clip_sizes(self) -> list[tuple[int, int]]:
        """(T, H = W) of full training clips, and of each T's smallest clips: a network that takes these takes all."""
        clips = self.preprocessing
        sizes = [(shape.clip_frames, shape.crop_size) for shape in self.all_shapes]
        smallest = dict(sorted([*sizes, (clips.clip_frames, clips.test_crop_size)], reverse=True))  # keeps the last
        return list(dict.fromkeys([(clips.clip_frames, clips.crop_size), *smallest.items()]))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.augmentation is None or self.trainer is None or not self.trainer.training:
            return batch
        augmentation, side, full = self.augmentation, batch.clips.shape[-1], self.preprocessing.crop_size
        if augmentation.crop_size is not None and side != full:  # a smaller shape of multigrid
            crop_size = share_of_side(augmentation.crop_size, side / full)
            augmentation = dataclasses.replace(augmentation, crop_size=crop_size)
        clips, labels = augmentation(batch.clips, batch.labels, [(self.seed, *turn) for turn in batch.turns])
        return batch._replace(clips=clips, labels=labels)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        return self._views("val_list", 1, 1) if self.lists["val_list"] is not None else []

    def test_dataloader(self) -> DataLoader[Sample]:
        return self._views("test_list", self.test_clips, self.test_crops, self.shuffle_test_frames)

    def _views(self, name: str, num_clips: int, num_crops: int, shuffle: bool = False) -> DataLoader[Sample]:
        size = self.preprocessing.test_crop_size
        options: dict[str, Any] = {"crop_size": size, "short_side": size, "shuffle_frames": shuffle, "seed": self.seed}
        views = TestViews(self._decoding(name), num_clips=num_clips, num_crops=num_crops, **options)
        # Lightning's overfit_batches would replace the sampler of a loader that has no batch sampler.
        sampler: Any = self._sampler(name, shuffle=False)
        batches = BatchSampler(sampler, _together(num_clips * num_crops), drop_last=False)
        return self._loader(views, batch_sampler=batches)

    def _shapes(self, epoch: int) -> list[ClipShape]:
        full, max_epochs = self._full_shape, getattr(self.trainer, "max_epochs", None)
        return [full] if self.multigrid is None else self.multigrid.shapes(full, epoch, max_epochs)

    def _batches(self, **options: Any) -> TrainingBatches:
        sampler = self._sampler("train_list", shuffle=True)
        return TrainingBatches(sampler, self.batch_size // self.clips_per_video, self._shapes, **options)

    def _dealt(self, epoch: int) -> dict[str, Any]:
        """What must stay the same for a number of batches to say which videos were used."""
        batches = self._batches()
        return {
            "videos": batches.sampler.num_videos,
            "videos_a_batch": [size * batches.sampler.world_size for size in batches.sizes(epoch)],
            "accumulated": getattr(self.trainer, "accumulate_grad_batches", 1),
            "seed": self.seed,
            **({"balanced": True} if self.balanced else {}),
        }

    def _sampler(self, name: str, shuffle: bool) -> EpochSampler:
        processes = getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)
        repeats = getattr(self.trainer, "overfit_batches", 0) > 0
        chances = self.read(name).chances(self.num_classes or 0) if self.balanced and shuffle else None
        return EpochSampler(len(self.read(name).paths), self.seed, shuffle, *processes, 0, repeats, chances)

    def _training_loader(self, batches: TrainingBatches, persistent: bool) -> DataLoader[Sample]:
        mirror, seed, num_clips = self.preprocessing.mirror, batches.sampler.seed, self.clips_per_video
        decoding, shape = self._decoding("train_list"), self._full_shape
        clips = TrainingClips(decoding, shape, mirror=mirror, seed=seed, num_clips=num_clips)
        return self._loader(clips, persistent, batch_sampler=batches)

    def _loader(self, clips: Dataset[Sample], persistent: bool = True, **options: Any) -> DataLoader[Sample]:
        if self.num_workers > 0:
            options |= {"persistent_workers": persistent, "prefetch_factor": self.prefetch_batches}
        stores.take_traffic()  # what lists have cost is no clip's
        options |= {"num_workers": self.num_workers, "worker_init_fn": outlive_signals}
        return Loader(clips, collate_fn=collate, pin_memory=torch.cuda.is_available(), **options)


def _together(num_views: int) -> int:
    """Videos of so many views in a batch of about 30."""
    return max(1, 30 // num_views)


def _describe(dealt: dict[str, Any]) -> str:
    sizes = f"{' and '.join(map(str, dealt['videos_a_batch']))} a batch over all processes"
    order = f", in the order of seed {dealt['seed']}"
    return f"{dealt['videos']} videos, {sizes}, {dealt['accumulated']} batches a step{order}"
