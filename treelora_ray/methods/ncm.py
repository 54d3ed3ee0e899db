"""NCM: a class is the mean of its features; nothing is trained, and the nearest mean answers.

Mensink et al. 2013 (IEEE TPAMI 35); on frozen features of a pre-trained model, for streams of classes, Janson et al.
2022, arXiv 2210.04428.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import NcmOptions
from treelora_ray.models.backbone import backbone_digest
from treelora_ray.models.router import shrunk


@register("ncm")
class Ncm(Method):
    """Kept are counts, sums and products of features, so that tasks, workers and restarts add up exactly."""

    objectives = ("classification",)
    keeps = "sums of features: C (d + 1) values, for mahalanobis d^2 more"
    starts_from = "fresh"
    step_cost = "no steps: one forward for each row of a task"
    reduces = "counts, sums and products of features"
    routes = False

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, NcmOptions)
        self.options = options
        width = learner.model.width
        self.counts = torch.zeros(0, dtype=torch.float64, device=learner.device)  # [C] by row of the head
        self.sums = torch.zeros(0, width, dtype=torch.float64, device=learner.device)  # [C, d]
        self.products = torch.zeros(width, width, dtype=torch.float64, device=learner.device)

    @cached_property
    def extractor(self) -> str:
        """Identity of the frozen weights: sums of features mean something for these alone."""
        return backbone_digest(self.learner.model)

    def steps(self, planned: int) -> int:
        return planned if self.options.features == "first_task" and not len(self.counts) else 0

    def after_task(self) -> None:
        learner = self.learner
        for task in learner.unit:
            found = learner.class_sums(task)
            more = len(learner.head) - len(self.counts)
            self.counts = F.pad(self.counts, (0, more))
            self.sums = F.pad(self.sums, (0, 0, 0, more))
            rows = torch.tensor(learner.head.rows[task], device=learner.device)
            self.counts.index_add_(0, rows, found.counts)
            self.sums.index_add_(0, rows, found.sums)
            self.products += found.products
        weight, bias = self.scores()
        learner.head.put(range(len(learner.head)), torch.cat([weight.reshape(-1), bias]).to(learner.head.weight))
        with torch.no_grad():
            learner.head_parameter.copy_(learner.head.take(learner.rows))

    @property
    def means(self) -> Tensor:
        """[C, d]"""
        return self.sums / self.counts.clamp(min=1).unsqueeze(1)

    def scores(self) -> tuple[Tensor, Tensor]:
        """Weights [C, d] and biases [C] whose argmax is the nearest mean. A class without rows is never the nearest."""
        means, score = self.means, self.options.score
        if score == "mahalanobis" and float(self.counts.sum()) > len(means):
            weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(self.covariance())).T
        else:  # of one row a class there is no covariance
            weight = F.normalize(means, dim=1) if score == "cosine" else means
        bias = torch.zeros(len(means)).to(means) if score == "cosine" else -(weight * means).sum(1) / 2
        return weight, bias.masked_fill(self.counts == 0, float("-inf"))

    def covariance(self) -> Tensor:
        """[d, d] within classes, shrunk towards a multiple of the identity."""
        means, spare = self.means, float(self.counts.sum()) - len(self.means)
        raw = (self.products - (means * self.counts.unsqueeze(1)).T @ means) / spare
        return shrunk(raw, spare, None if self.options.shrinkage == "oas" else self.options.shrinkage)

    def tensors(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "sums": self.sums, "products": self.products}

    def to_json(self) -> dict[str, Any]:
        return {"extractor": self.extractor}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        if data["extractor"] != self.extractor:
            raise ConfigError(
                "the class means are of features of other weights than model.backbone has now: go on with the backbone "
                "the run began with, or give the run another name to start anew"
            )
        device = self.learner.device
        self.counts, self.sums = tensors["counts"].to(device), tensors["sums"].to(device)
        self.products = tensors["products"].to(device)
