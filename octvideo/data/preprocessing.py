"""How videos become the clips that a network takes; one value for data, checkpoints, prediction and export."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from octvideo.data.sampling import ProtocolName, Sampling, ShortVideos
from octvideo.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """How a network's clips are made, in training and ever after; the defaults are SlowFast's recipe for Kinetics.

    Args:
        clip_frames: frames in a clip.
        frame_stride: length of a clip's window in frames, for each frame taken; about every n-th frame is.
        sampling: where clips start and which frames they take: slowfast, pytorchvideo, mmaction, or uniform; `Sampling`
            in `octvideo.data.sampling` has their rules.
        target_fps: frame rate that windows are counted in, so that clips last equally long; null: each video's own.
        short_videos: how clips fill up when the video ends first: hold (the last frame), loop, spread; default: the
            protocol's own way.
        crop_size: height and width of a training clip, in pixels.
        short_side: least and most pixels that the shorter side is scaled to before a training crop.
        mirror: flip half of the training clips left to right; turn it off where left and right are classes.
        test_crop_size: height and width of a validation or test view, in pixels; the shorter side is scaled to it.
        mean: subtracted from pixels in [0, 1]; one number, or one each for R, G and B.
        std: then divides them; likewise.
    """

    clip_frames: int = 8
    frame_stride: int = 8
    sampling: ProtocolName = "slowfast"
    target_fps: float | None = 30
    short_videos: ShortVideos | None = None
    crop_size: int = 224
    short_side: tuple[int, int] = (256, 320)
    mirror: bool = True
    test_crop_size: int = 256
    mean: float | Sequence[float] = 0.45
    std: float | Sequence[float] = 0.225

    def __post_init__(self) -> None:
        for name in ("crop_size", "test_crop_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.crop_size <= self.short_side[0] <= self.short_side[1]:
            wanted = f"two sizes from crop_size {self.crop_size} upwards, the smaller first"
            raise UserError(f"short_side must be {wanted}, got {self.short_side}")
        std = torch.as_tensor(self.std)
        if not (std.isfinite() & (std > 0)).all():
            raise UserError(f"std must be positive, got {self.std}")
        self.sampler  # noqa: B018  (checks the other options)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """From the entries of a checkpoint or a user; unknown ones are a UserError."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(values.keys() - names):
            raise UserError(f"preprocessing must be of {', '.join(names)}, got {', '.join(unknown)}")
        return cls(**values)

    @property
    def sampler(self) -> Sampling:
        """Which frames of a video become clips."""
        return Sampling(self.clip_frames, self.frame_stride, self.sampling, self.target_fps, self.short_videos)

    @property
    def clip_size(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a test clip."""
        return 3, self.clip_frames, self.test_crop_size, self.test_crop_size

    def normalize(self, clips: Tensor) -> Tensor:
        """uint8 RGB clips (..., 3, T, H, W) as float32: scaled to [0, 1], less the mean, over the std."""
        mean, std = (
            value if isinstance(value, float | int) else torch.as_tensor(value, device=clips.device).view(-1, 1, 1, 1)
            for value in (self.mean, self.std)
        )
        return (clips.float() / 255 - mean) / std
