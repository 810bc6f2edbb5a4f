"""The learning rate as a function of the epoch: the same for any number of devices that share a batch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from octvideo.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Half a cosine, or steps, after a linear warm-up: the recipes of SlowFast and of non-local networks.

    The cosine runs over all epochs; the warm-up rises from `warmup_start` to the curve's value where it ends. Raises
    UserError for a number out of its range.
    """

    peak: float  # learning rate at the start of the curve
    epochs: float  # length of the run
    warmup_start: float = 0.0  # learning rate
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = ()  # ascending epochs at which the rate is multiplied by decay; empty: the cosine
    decay: float = 0.1

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.warmup_start < 0 or self.warmup_epochs < 0 or self.epochs <= 0:
            raise UserError(
                "learning_rate must be positive, warmup_start and warmup_epochs at least 0, and the run longer than 0 "
                f"epochs, got {self.peak}, {self.warmup_start}, {self.warmup_epochs} and {self.epochs}"
            )
        if any(milestone <= 0 for milestone in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise UserError(f"milestones must be epochs above 0 in ascending order, got {list(self.milestones)}")
        if not 0 < self.decay < 1:
            raise UserError(f"decay must lie between 0 and 1, got {self.decay}")

    def at(self, epoch: float) -> float:
        """The learning rate after so many epochs, which may be fractional."""
        if epoch < self.warmup_epochs:
            end = dataclasses.replace(self, warmup_epochs=0).at(self.warmup_epochs)
            return self.warmup_start + (end - self.warmup_start) * epoch / self.warmup_epochs
        if self.milestones:
            return self.peak * self.decay ** sum(epoch >= milestone for milestone in self.milestones)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / self.epochs)))

    def scaled(self, factor: float) -> Self:
        """The schedule for `factor` times as many clips a step (linear scaling, Goyal et al., 2017)."""
        return dataclasses.replace(self, peak=self.peak * factor, warmup_start=self.warmup_start * factor)

    def over(self, epochs: float) -> Self:
        """The schedule of a run of another length; a warm-up that does not fit takes a fifth of it."""
        warmup_epochs = self.warmup_epochs if self.warmup_epochs < epochs else epochs / 5
        return dataclasses.replace(self, epochs=epochs, warmup_epochs=warmup_epochs)

    def __str__(self) -> str:
        curve = f"half a cosine from {self.peak:.6g} to 0 over {self.epochs:g} epochs"
        if self.milestones:
            milestones = ", ".join(f"{milestone:g}" for milestone in self.milestones)
            curve = f"{self.peak:.6g}, times {self.decay:g} at epoch {milestones} of {self.epochs:g}"
        warmup = f", warm-up from {self.warmup_start:.6g} in {self.warmup_epochs:g} epochs"
        return curve + (warmup if self.warmup_epochs else "")
