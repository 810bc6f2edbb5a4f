"""Augmentation of whole batches of clips, on their device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from octvideo.errors import UserError

GREY = 115.0  # erased and uncovered pixels: the networks' mean of .45, so zero after normalisation


@dataclass(frozen=True)
class BatchAugmentation:
    """Random crops, flips, colours, erasing and mixing by torchvision's transforms, the same for all frames of a clip.

    In this order: resized crop, mirror, RandAugment, erasing, then mixing; all are off by default. RandAugment's
    Contrast, AutoContrast and Equalize look at pixels frame by frame. Mixing joins each video, view by view, with the
    one before it in the batch, the first with the last, and rounds pixels to whole levels.

    Choices derive from the batch's seeds alone: for a clip from its video's seed and its view number, for mixing from
    the first video's seed. They are drawn on the CPU; devices may differ in how they round resized pixels.

    Args:
        crop_size: crop a random part of each clip and scale it to this height and width, in pixels; default: no crop.
        crop_scale: least and most share of the clip's area in that crop, in (0, 1].
        crop_ratio: least and most ratio of its width to its height.
        mirror_probability: of flipping a clip left to right; 0 where left and right are classes.
        rand_augment_layers: how many random operations of RandAugment (Cubuk et al., NeurIPS 2020) a clip undergoes.
        rand_augment_magnitude: their strength, 0 to 30.
        erase_probability: of making a random rectangle, 2 to 33 % of a clip, grey (Zhong et al., AAAI 2020).
        mixup_alpha: blend pairs of clips, the share of one drawn from Beta(alpha, alpha) (Zhang et al., ICLR 2018).
        cutmix_alpha: paste a rectangle of one into the other, its size drawn likewise (Yun et al., ICCV 2019). With
            mixup as well, each batch gets one of the two, both equally often.
        num_classes: number of classes, which mixed labels need (set by model.num_classes).
    """

    crop_size: int | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    mirror_probability: float = 0.0
    rand_augment_layers: int = 0
    rand_augment_magnitude: int = 9
    erase_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    num_classes: int | None = None

    def __post_init__(self) -> None:
        scale, ratio = self.crop_scale, self.crop_ratio
        rules = {
            "crop_size": (self.crop_size is None or self.crop_size >= 1, "be at least 1, or None"),
            "crop_scale": (0 < scale[0] <= scale[1] <= 1, "be two shares in (0, 1], the smaller first"),
            "crop_ratio": (0 < ratio[0] <= ratio[1], "be two positive ratios, the smaller first"),
            "mirror_probability": (0 <= self.mirror_probability <= 1, "lie in [0, 1]"),
            "rand_augment_layers": (self.rand_augment_layers >= 0, "be at least 0"),
            "rand_augment_magnitude": (0 <= self.rand_augment_magnitude <= 30, "lie in [0, 30]"),
            "erase_probability": (0 <= self.erase_probability <= 1, "lie in [0, 1]"),
            "mixup_alpha": (self.mixup_alpha >= 0, "be at least 0"),
            "cutmix_alpha": (self.cutmix_alpha >= 0, "be at least 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"data.augmentation.{name} must {rule}, got {getattr(self, name)}")

    @cached_property
    def _each(self) -> v2.Transform | None:
        crop = self.crop_size and v2.RandomResizedCrop(self.crop_size, self.crop_scale, self.crop_ratio)
        mirror = self.mirror_probability and v2.RandomHorizontalFlip(self.mirror_probability)
        layers = self.rand_augment_layers
        colours = layers and v2.RandAugment(layers, self.rand_augment_magnitude, fill=GREY)
        erasing = self.erase_probability and v2.RandomErasing(self.erase_probability, value=GREY)
        each = [transform for transform in (crop, mirror, colours, erasing) if transform]
        return v2.Compose(each) if each else None

    @cached_property
    def _mixing(self) -> v2.Transform | None:
        if (self.mixup_alpha > 0 or self.cutmix_alpha > 0) and (self.num_classes is None or self.num_classes < 1):
            raise UserError(f"mixup_alpha and cutmix_alpha need num_classes of at least 1, got {self.num_classes}")
        mixup = self.mixup_alpha and v2.MixUp(alpha=self.mixup_alpha, num_classes=self.num_classes)
        cutmix = self.cutmix_alpha and v2.CutMix(alpha=self.cutmix_alpha, num_classes=self.num_classes)
        in_float = mixup and v2.Compose([v2.ToDtype(torch.float32), mixup])  # it multiplies in place, unlike uint8
        mixing = [transform for transform in (in_float, cutmix) if transform]
        return v2.RandomChoice(mixing) if mixing else None

    def __call__(self, clips: Tensor, labels: Tensor, seeds: Sequence[int | tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Augments clips (B, V, C, T, H, W) uint8 of B videos with labels (B,) or shares (B, num_classes); both stay.

        Each video has a seed: a number from 0 or a tuple of such, for example (seed, epoch, position). After mixing,
        labels are (B, num_classes) float32 shares. Raises UserError for other shapes, or mixing without num_classes.
        """
        if clips.dim() != 6 or clips.dtype != torch.uint8 or clips.numel() == 0:
            raise UserError(f"expected clips (B, V, C, T, H, W) of uint8, got {tuple(clips.shape)} of {clips.dtype}")
        if labels.shape[:1] != clips.shape[:1] or labels.dim() > 2 or len(seeds) != len(clips):
            got = f"labels {tuple(labels.shape)} and {len(seeds)} seeds"
            raise UserError(f"expected a label and a seed for each of {len(clips)} videos, got {got}")
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the CPU's generator only
            if self._each is not None:
                augmented = []
                for seed, views in zip(seeds, clips, strict=True):
                    for view, clip in enumerate(views):
                        _seed(seed, 1, view)
                        augmented.append(self._each(clip.transpose(0, 1)).transpose(0, 1))  # images are (T, C, H, W)
                clips = torch.stack(augmented).unflatten(0, clips.shape[:2])
            if self._mixing is not None:
                _seed(seeds[0], 0)
                mixed, labels = self._mixing(clips.flatten(1, 3), labels)  # (B, V * C * T, H, W): whole videos
                clips = mixed.round().to(torch.uint8).view_as(clips)
        return clips, labels


def _seed(seed: int | tuple[int, ...], *purpose: int) -> None:
    """Seeds the CPU's generator alone; torch.manual_seed would seed other devices' too."""
    state = np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(state[0]))
