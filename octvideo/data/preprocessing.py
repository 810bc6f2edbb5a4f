"""How videos become the clips that a network takes; one value for data, checkpoints, prediction and export."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octvideo.data.sampling import Sampling, ShortVideos
from octvideo.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """What has to be the same wherever a trained network sees a video; it travels in checkpoints.

    The defaults are the SlowFast project's recipe for Kinetics.

    Args:
        clip_frames: frames in a clip.
        frame_stride: length of a clip's window in frames, for each frame taken.
        sampling: protocol, as `Sampling.protocol`.
        target_fps: rate at which frames are counted; None: each video's own.
        short_videos: as `Sampling.short_videos`.
        crop_size: height and width of a training clip, in pixels.
        short_side: least and most pixels of the shorter side before a training crop.
        mirror: whether half of the training clips are flipped left to right.
        test_crop_size: height and width of a test view, in pixels; the shorter side is scaled to it.
        mean: subtracted from pixels in [0, 1]; one number, or one for each of R, G, B.
        std: then divides them; likewise.

    Raises:
        UserError: a value out of its range.
    """

    clip_frames: int = 8
    frame_stride: int = 8
    sampling: str = "slowfast"
    target_fps: float | None = 30
    short_videos: ShortVideos | None = None
    crop_size: int = 224
    short_side: tuple[int, int] = (256, 320)
    mirror: bool = True
    test_crop_size: int = 256
    mean: float | Sequence[float] = 0.45
    std: float | Sequence[float] = 0.225

    def __post_init__(self) -> None:
        for name in ("clip_frames", "frame_stride", "crop_size", "test_crop_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.crop_size <= self.short_side[0] <= self.short_side[1]:
            raise UserError(
                f"short_side must be two sizes from crop_size {self.crop_size} upwards, the smaller first, "
                f"got {self.short_side}"
            )
        if not all(0 < value < math.inf for value in (self.std if isinstance(self.std, Sequence) else [self.std])):
            raise UserError(f"std must be positive, got {self.std}")
        self.sampler  # noqa: B018  (refuses what it cannot take)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From a checkpoint's or a user's entries; what is left out has its default.

        Raises:
            UserError: an unknown key, or a value out of its range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise UserError(f"preprocessing must be of {', '.join(names)}, got {', '.join(unknown)}")
        return cls(**{**values, **({"short_side": tuple(values["short_side"])} if "short_side" in values else {})})

    @property
    def sampler(self) -> Sampling:
        """Which frames of a video become clips."""
        return Sampling(
            self.clip_frames,
            self.frame_stride,
            self.sampling,  # type: ignore[arg-type]
            self.target_fps,
            self.short_videos,
        )

    @property
    def clip_size(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a test clip."""
        return 3, self.clip_frames, self.test_crop_size, self.test_crop_size

    def normalize(self, clips: Tensor) -> Tensor:
        """uint8 RGB clips (..., 3, T, H, W) as float32: scaled to [0, 1], less the mean, over the std."""
        return (clips.to(torch.float32) / 255 - self._per_colour(self.mean, clips)) / self._per_colour(self.std, clips)

    @staticmethod
    def _per_colour(value: float | Sequence[float], clips: Tensor) -> float | Tensor:
        if isinstance(value, Sequence):
            return torch.tensor(value, dtype=torch.float32, device=clips.device).view(-1, 1, 1, 1)
        return value
