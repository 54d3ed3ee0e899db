"""Which task a sample belongs to, from the frozen features alone: Gaussians with one common covariance.

Each class (for prompts: each task) is a Gaussian around its mean; the covariance within classes is pooled
over all tasks seen and shrunk by OAS (Chen et al. 2010, arXiv 0907.4698, eq. 23). The task of the likeliest
class answers, or the task that is likelier than others over all of its classes. Statistics are sums, so they may be
gathered by any number of workers in any order.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


class ClassSums:
    """What one pass over a task's rows leaves behind: counts [C], sums [C, d], products [d, d], in one buffer."""

    def __init__(self, classes: int, width: int, device: torch.device | str = "cpu") -> None:
        self.shape = classes, width
        self.flat = torch.zeros(classes + classes * width + width * width, dtype=torch.float64, device=device)

    @property
    def counts(self) -> Tensor:
        return self.flat[: self.shape[0]]

    @property
    def sums(self) -> Tensor:
        classes, width = self.shape
        return self.flat[classes : classes + classes * width].view(classes, width)

    @property
    def products(self) -> Tensor:
        width = self.shape[1]
        return self.flat[-width * width :].view(width, width)

    def add(self, features: Tensor, classes: Tensor) -> None:
        """features [B, d] of rows of the classes [B]."""
        exact = features.double()
        self.counts.index_add_(0, classes, torch.ones_like(classes, dtype=torch.float64))
        self.sums.index_add_(0, classes, exact)
        self.products.add_(exact.T @ exact)

    @property
    def means(self) -> Tensor:
        """[C, d]; zero for a class without rows."""
        return self.sums / self.counts.clamp(min=1).unsqueeze(-1)

    def scatter(self) -> Tensor:
        """[d, d] sum of squares around the class means."""
        means = self.means
        return self.products - (means * self.counts.unsqueeze(-1)).T @ means


class Router:
    def __init__(
        self, width: int, device: torch.device | str = "cpu", task_score: Literal["class", "lse"] = "class"
    ) -> None:
        self.width, self.device, self.task_score = width, torch.device(device), task_score
        self.means = torch.zeros(0, width, dtype=torch.float64, device=device)  # [classes of all tasks, d]
        self.task = torch.zeros(0, dtype=torch.long, device=device)  # [classes] the task of each
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.count = 0.0  # rows behind the scatter, less one a class
        self._rule: tuple[Tensor, Tensor] | None = None

    def add(self, task: int, sums: ClassSums) -> None:
        present = sums.counts > 0
        self.means = torch.cat([self.means, sums.means[present]])
        self.task = torch.cat([self.task, torch.full((int(present.sum()),), task, device=self.device)])
        self.scatter = self.scatter + sums.scatter()
        self.count += float(sums.counts.sum() - present.sum())
        self._rule = None

    def covariance(self) -> Tensor:
        """[d, d] within classes, shrunk towards a multiple of the identity."""
        n = max(self.count, 1.0)
        return shrunk(self.scatter / n, n)

    def route(self, features: Tensor) -> Tensor:
        """features [B, d] -> tasks [B]."""
        if self._rule is None:
            weights = torch.linalg.solve(self.covariance(), self.means.T)  # [d, classes]
            self._rule = weights, -(self.means * weights.T).sum(-1) / 2
        weights, bias = self._rule
        scores = features.double() @ weights + bias  # [B, classes] log-likelihoods, but for what all of a row share
        return self.task[scores.argmax(-1)] if self.task_score == "class" else self._likeliest(scores)

    def _likeliest(self, scores: Tensor) -> Tensor:
        """[B] tasks by the mean likelihood of their classes: a sum would favour tasks with many."""
        tasks, counts = self.task.unique(return_counts=True)
        found = [
            scores[:, self.task == task].logsumexp(1) - math.log(count)
            for task, count in zip(tasks.tolist(), counts.tolist(), strict=True)
        ]
        best: Tensor = tasks[torch.stack(found, 1).argmax(1)]
        return best

    def tensors(self) -> dict[str, Tensor]:
        count = torch.tensor(self.count, dtype=torch.float64)
        return {"means": self.means, "task": self.task, "scatter": self.scatter, "count": count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.means, self.task = tensors["means"].to(self.device), tensors["task"].to(self.device)
        self.scatter, self.count = tensors["scatter"].to(self.device), float(tensors["count"])
        self._rule = None


def shrunk(raw: Tensor, n: float, share: float | None = None) -> Tensor:
    """[d, d] a covariance of n values, moved by a share towards a multiple of the identity; left out: OAS's share."""
    width = len(raw)
    trace, square = float(raw.trace()), float(raw.square().sum())
    eye = torch.eye(width, dtype=raw.dtype, device=raw.device)
    if trace <= 0:
        return eye
    floor = 0.0
    if share is None:
        below = (n + 1 - 2 / width) * (square - trace**2 / width)
        share = min(1.0, ((1 - 2 / width) * square + trace**2) / below) if below > 0 else 1.0
        floor = 1e-6 * trace / width  # features that never vary leave the shrunk matrix singular no more
    return (1 - share) * raw + (share * trace / width + floor) * eye
