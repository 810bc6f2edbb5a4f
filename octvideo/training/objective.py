"""What training minimises: the loss of a task, with weights of classes, and what a teacher adds to it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from octvideo.errors import UserError
from octvideo.models.checkpoint import load_trained
from octvideo.models.scoring import Task


class FocalLoss(nn.Module):
    """Cross-entropy in which well classified clips count less (Lin et al., ICCV 2017), for either task.

    Args:
        gamma: how much less: each term is multiplied by (1 - p) ** gamma, p the probability of the truth; at least 0.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if gamma < 0:
            raise UserError(f"gamma must be at least 0, got {gamma}")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over (B, num_classes) logits; labels are (B,) classes, or (B, num_classes) in [0, 1] of several."""
        if labels.dim() == 2:
            terms = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        else:
            terms = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - torch.exp(-terms)) ** self.gamma * terms).mean()


class Objective(nn.Module):
    """The loss of logits (B, num_classes).

    Labels are (B,) class numbers or, after mixing and where lists give shares, (B, num_classes) shares of the classes;
    for task "multi" (B, num_classes), 1 for each class of a clip. The loss is cross-entropy, for "multi" the binary one
    of every class, or a module of the user's that is called with logits and labels.
    """

    def __init__(
        self,
        task: Task,
        num_classes: int,
        *,
        loss: nn.Module | None = None,
        class_weights: list[float] | str | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.task, self.num_classes, self.loss, self.label_smoothing = task, num_classes, loss, label_smoothing
        self.balanced = class_weights == "balanced"
        if loss is not None and (class_weights is not None or label_smoothing):
            raise UserError("model.class_weights and label_smoothing are of the default loss: give them to model.loss")
        if isinstance(class_weights, str) and not self.balanced:
            raise UserError(f"model.class_weights must be numbers or 'balanced', got {class_weights!r}")
        if isinstance(class_weights, list) and (len(class_weights) != num_classes or min(class_weights) < 0):
            raise UserError(f"model.class_weights must be {num_classes} numbers from 0, got {class_weights}")
        numbers = class_weights if isinstance(class_weights, list) else None
        self.register_buffer("weights", None if numbers is None else torch.tensor(numbers), persistent=False)
        if num_classes < 2:
            raise UserError(f"model.num_classes must be at least 2, got {num_classes}")
        if task == "multi" and label_smoothing:
            raise UserError("model.label_smoothing is for task single")

    def balance(self, counts: NDArray[np.float64], num_videos: int) -> None:
        """Sets class weights from the videos of each class: num_videos / (num_classes * count); 0 without any."""
        weights = num_videos / np.maximum(counts, 1) / (1 if self.task == "multi" else self.num_classes)
        weights = np.where(counts > 0, weights - (self.task == "multi"), 0)  # of its positives, to equal the negatives
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss; UserError where the user's loss does not take these, or does not give one number."""
        weights = None if self.weights is None else self.weights.to(logits)
        if self.loss is None:
            if self.task == "single":
                return F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)
            weight, positive = (None, weights) if self.balanced else (weights, None)
            return F.binary_cross_entropy_with_logits(logits, labels, weight, pos_weight=positive)
        name = type(self.loss).__name__
        given = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} of {labels.dtype}"
        try:
            loss: Tensor = self.loss(logits, labels)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"model.loss {name} does not take {given}: {error}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserError(f"model.loss {name} must give one number for {given}")
        return loss


class Teacher:
    """A trained network whose scores another one learns (Hinton et al., 2015); it is no part of checkpoints.

    Args:
        checkpoint: of the teacher, with as many classes, for the same task.
        weight: share of the loss that is the teacher's, in (0, 1]; the labels' gets the rest.
        temperature: divides both networks' logits, above 0.
    """

    def __init__(self, checkpoint: str | Path, weight: float, temperature: float, task: Task, num_classes: int) -> None:
        if not 0 < weight <= 1 or temperature <= 0:
            got = f"got {weight} and {temperature}"
            raise UserError(f"model.teacher_weight must lie in (0, 1] and model.temperature be positive, {got}")
        try:
            self.trained = load_trained(checkpoint)
        except FileNotFoundError as error:
            raise UserError(f"model.teacher {checkpoint}: no such file") from error
        self.trained.network.requires_grad_(False)
        if (self.trained.options["num_classes"], self.trained.task) != (num_classes, task):
            have = f"{self.trained.options['num_classes']} classes of task {self.trained.task}"
            raise UserError(f"model.teacher {checkpoint} has {have}, not {num_classes} of task {task}")
        self.weight, self.temperature, self.task = weight, temperature, task

    def __call__(self, clips: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The loss, mixed with the distance of logits (B, num_classes) from the teacher's for clips in uint8 RGB."""
        network: Any = self.trained.network.to(clips.device)
        with torch.no_grad():
            wanted = network(self.trained.normalize(clips)).float()
        distance = distance_of(logits, wanted, self.task, self.temperature)
        return (1 - self.weight) * loss + self.weight * distance


def distance_of(logits: Tensor, wanted: Tensor, task: Task, temperature: float) -> Tensor:
    """How far logits (B, num_classes) are from a teacher's, both divided by the temperature: the loss that it teaches.

    Kullback-Leibler divergence or, for task "multi", binary cross-entropy; times the temperature's square, so that
    gradients keep their size.
    """
    logits, wanted = logits / temperature, wanted / temperature
    if task == "multi":
        distance = F.binary_cross_entropy_with_logits(logits, wanted.sigmoid())
    else:
        distance = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    return temperature**2 * distance
