"""Scores of clips, which validation, testing and prediction average over a video's views."""

from collections.abc import Callable

import torch
from torch import Tensor


def score_clips(network: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
    """Softmax probabilities (N, num_classes) in float32 of clips (N, C, T, H, W), 10 at a time, which fill a GPU."""
    return torch.cat([network(part).float() for part in clips.split(10)]).softmax(1)


def top_hits(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether labels (...) are the best, and among the five best of scores (..., num_classes): 1 or 0, (...) each."""
    hits = scores.topk(min(5, scores.shape[-1])).indices == labels[..., None]
    return hits[..., 0].float(), hits.any(-1).float()
