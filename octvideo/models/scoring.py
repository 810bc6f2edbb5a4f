"""Scores of clips, which validation, testing and prediction average over a video's views."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Task = Literal["single", "multi"]  # one class of each video, or any number of them


def score_clips(network: Callable[[Tensor], Tensor], clips: Tensor, task: Task = "single") -> Tensor:
    """Probabilities (N, num_classes) in float32 of clips (N, C, T, H, W), 10 at a time, which fill a GPU."""
    return probabilities(torch.cat([network(part).float() for part in clips.split(10)]), task)


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Of logits (N, num_classes): by softmax or, for task "multi", by sigmoid."""
    return logits.sigmoid() if task == "multi" else logits.softmax(1)


def top_hits(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether labels (...) are the best, and among the five best of scores (..., num_classes): 1 or 0, (...) each."""
    hits = scores.topk(min(5, scores.shape[-1])).indices == labels[..., None]
    return hits[..., 0].float(), hits.any(-1).float()


def average_precisions(videos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"map", "ap": of each class} of videos with "scores" and the class numbers "label" of task "multi".

    None for a class without a video, which the mean leaves out, and for the mean of none.
    """
    if not videos:
        return {"map": None, "ap": []}
    from torchmetrics.functional.classification import binary_average_precision  # it imports transformers, if installed

    scores = torch.tensor([video["scores"] for video in videos], dtype=torch.float64)
    truth = torch.zeros(scores.shape, dtype=torch.int64)
    for row, video in zip(truth, videos, strict=True):
        row[list(video["label"])] = 1
    pairs = zip(scores.T, truth.T, strict=True)
    each = [float(binary_average_precision(score, right)) if right.any() else None for score, right in pairs]
    known = [value for value in each if value is not None]
    return {"map": sum(known) / len(known) if known else None, "ap": each}
