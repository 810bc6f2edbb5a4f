"""Elastic training: one network for several alphas, of which the largest network teaches the smaller ones."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision

from octvideo.data.loading import Batch
from octvideo.errors import UserError
from octvideo.models.elastic import AlphaPlans, AlphaStatistics
from octvideo.models.scoring import Task
from octvideo.training.objective import distance_of


@dataclass(frozen=True)
class Elastic:
    """Training of one network for several alphas, by the sandwich rule (Yu and Huang, ICCV 2019, arXiv 1903.05134).

    Each step runs the largest network, that of the smallest alpha, on the labels, and `drawn` others on its logits for
    the same clips: the smallest one and, in turn, those between. If only one is drawn, it is the smallest in every
    second step. The losses are added. Each alpha has batch-norm statistics of its own.

    Args:
        alphas: two or more, in [0, 1], with model.alpha among them: that one is validated as val/top1 and deployed
            unless another is asked for; the others are validated as val/top1_alpha_0.5 and the like.
        drawn: networks besides the largest in each step; those between have their turns equally often.
        per_stage: draw an alpha for each of res2, res3 and res4, so that all their combinations are trained. Needs
            precise_bn, which then estimates the statistics of the uniform ones.
        teacher_weight: share of the others' loss that is the largest's, in [0, 1]; the labels' gets the rest.
        temperature: divides the logits of both before they are compared.
    """

    alphas: list[float]
    drawn: int = 1
    per_stage: bool = False
    teacher_weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        alphas, most = self.alphas, len(self.alphas) - 1
        if any(not 0 <= alpha <= 1 for alpha in alphas) or len(set(alphas)) < max(2, len(alphas)):
            raise UserError(f"model.elastic.alphas must be two or more different numbers in [0, 1], got {alphas}")
        if not 1 <= self.drawn <= most:
            raise UserError(f"model.elastic.drawn must lie in [1, {most}], one less than alphas, got {self.drawn}")
        if not 0 <= self.teacher_weight <= 1 or self.temperature <= 0:
            got = f"{self.teacher_weight:g} and {self.temperature:g}"
            raise UserError(f"model.elastic needs teacher_weight in [0, 1] and a positive temperature, got {got}")


class ElasticTraining(nn.Module):
    """What a Recognizer needs to train elastically; outside of `at` its network is that of model.alpha.

    Raises UserError for alphas that do not suit the network, or without model.alpha.
    """

    def __init__(self, network: nn.Module, options: Elastic, alpha: Any, task: Task, num_classes: int) -> None:
        super().__init__()
        if alpha not in options.alphas:
            raise UserError(f"model.alpha must be one of model.elastic.alphas {options.alphas}, got {alpha}")
        self.options, self.own, self.largest = options, float(alpha), min(options.alphas)
        self.others = sorted(set(options.alphas) - {self.own})
        try:
            self.plans = AlphaPlans(network, [self.own, *self.others])
        except UserError as error:
            raise UserError(f"model.elastic.alphas {error}") from error
        if options.per_stage and not self.plans.has_stages:
            raise UserError(f"model.elastic.per_stage is for the zoo's networks, not for {type(network).__name__}")
        self.statistics = AlphaStatistics(network, self.own, self.others)
        self.task: Task = task
        kind: Any = MultilabelAveragePrecision if task == "multi" else partial(MulticlassAccuracy, average="micro")
        self.metrics = nn.ModuleList([kind(num_classes) for _ in self.others])

    @contextlib.contextmanager
    def at(self, alpha: float | tuple[float, ...]) -> Iterator[None]:
        """Makes the network that of another alpha, with its statistics; of one a stage, with passing ones."""
        self.plans.switch(alpha)
        try:
            with self.statistics.lent(None if isinstance(alpha, tuple) else alpha):
                yield
        finally:
            self.plans.switch(self.own)

    def draw(self, seed: int, epoch: int, batch_index: int) -> list[float | tuple[float, ...]]:
        """The networks that a batch trains besides the largest: a function of the position in the run alone."""
        alphas, drawn = sorted(self.options.alphas), self.options.drawn
        if self.options.per_stage:
            random, largest = np.random.default_rng((seed, epoch, batch_index)), (self.largest,) * 3
            found: dict[Any, None] = {}
            while len(found) < drawn:
                mapping = tuple(random.choice(alphas, 3).tolist())
                found |= {} if mapping == largest else {mapping: None}
            return list(found)
        *between, smallest = alphas[1:]
        if drawn == 1:
            always, in_turn = [], between + [smallest] * max(1, len(between))
        else:
            always, in_turn, drawn = [smallest], between, drawn - 1
        turns, size = range(batch_index * drawn, (batch_index + 1) * drawn), len(in_turn)
        rounds = {turn // size: np.random.default_rng((seed, epoch, turn // size)) for turn in turns}
        orders = {number: random.permutation(in_turn).tolist() for number, random in rounds.items()}
        return list(dict.fromkeys([*always, *(orders[turn // size][turn % size] for turn in turns)]))

    def loss_of_others(self, module: Any, clips: Tensor, labels: Tensor, logits: Tensor, batch_index: int) -> Tensor:
        """The summed loss of the networks drawn for a batch, taught by the largest's logits (B, num_classes).

        `module` is the Recognizer, whose outputs, logits and loss they share.
        """
        losses, options = list[Tensor](), self.options
        for alpha in self.draw(module.hparams["seed"], module.trainer.current_epoch, batch_index):
            with self.at(alpha):
                outputs = module.outputs(clips)
            found = module.logits(outputs).float()
            loss = distance_of(found, logits.detach(), self.task, options.temperature)
            if options.teacher_weight < 1:
                loss = options.teacher_weight * loss + (1 - options.teacher_weight) * module.loss(outputs, labels)
            losses.append(loss)
        total = torch.stack(losses).sum()
        module.log("train/loss_of_others", total, on_epoch=True, batch_size=len(clips), sync_dist=True)
        return total

    def validate(self, module: Any, batch: Batch) -> None:
        """Scores videos at the other alphas, the views averaged after softmax or sigmoid."""
        multi, name = self.task == "multi", "val/map" if self.task == "multi" else "val/top1"
        metrics: Any = self.metrics
        for alpha, metric in zip(self.others, metrics, strict=True):
            if len(batch.clips) > 0:
                with self.at(alpha):
                    scores, labels = module.view_scores(batch).mean(1), batch.labels
                truth = (labels > 0.5).long() if multi else labels.argmax(1) if labels.dim() > 1 else labels
                metric.update(scores, truth)
            module.log(f"{name}_alpha_{alpha:g}", metric, batch_size=1)


def elastic_options(given: Elastic | Mapping[str, Any] | None) -> Elastic | None:
    """The options as an object: checkpoints and Python may have them as a mapping."""
    try:
        return Elastic(**given) if isinstance(given, Mapping) else given
    except TypeError as error:
        raise UserError(f"model.elastic: {error}") from error
