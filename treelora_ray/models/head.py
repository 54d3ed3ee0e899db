"""The classifier head: one row per class, kept outside the adapters, growing with the stream.

While a task is learnt, the rows that compete in its loss are trained in the learner's flat buffer (`taken`),
and put back when the task ends. All other rows are out of reach of optimizer and weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora_ray.models.router import ClassSums

SUREST = 4.0  # mean square distance of class means from their mean, in variances within classes, that counts at most


class Head:
    def __init__(self, width: int, share_labels: bool = False, device: torch.device | str = "cpu") -> None:
        """`share_labels`: equal label names of different tasks are one class."""
        self.share_labels = share_labels
        self.common = False  # whether classes of different tasks are weighed against each other: see `_start`
        self.origin: Tensor | None = None  # [d + 1] of the first task, while they are
        self.weight = torch.zeros(0, width, device=device)  # [C, d]
        self.bias = torch.zeros(0, device=device)  # [C]
        self.names: list[str] = []  # label of each row
        self.rows: list[list[int]] = []  # by task: the row of each of its labels, in their order

    def __len__(self) -> int:
        return len(self.names)

    def grow(self, labels: Sequence[str], sums: ClassSums) -> None:
        """Adds a task's classes; `sums`: of its frozen features."""
        weight, bias = self._start(sums)
        rows = []
        for number, label in enumerate(labels):
            if self.share_labels and label in self.names:
                rows.append(self.names.index(label))
                continue
            rows.append(len(self.names))
            self.names.append(label)
            self.weight = torch.cat([self.weight, weight[number : number + 1].to(self.weight)])
            self.bias = torch.cat([self.bias, bias[number : number + 1].to(self.bias)])
        self.rows.append(rows)

    def row(self, task: int, labels: Sequence[str], known: Sequence[str]) -> list[int]:
        """The rows of label names of a task whose labels are `known`."""
        place = dict(zip(known, self.rows[task], strict=True))
        return [place[label] for label in labels]

    def of_tasks(self, tasks: Sequence[int]) -> list[int]:
        """The rows of several tasks together, ascending."""
        return sorted({row for task in tasks for row in self.rows[task]})

    def of_all(self) -> list[int]:
        """The rows of all tasks, ascending."""
        return self.of_tasks(range(len(self.rows)))

    def restart(self, task: int, sums: ClassSums) -> None:
        """A task's rows start again, from features that its adapter has changed."""
        index = torch.tensor(self.rows[task], device=self.weight.device)
        if self.origin is not None and len(self.rows) == 1:  # where features are now, all is said in small numbers
            self.origin = torch.cat([origin_of(sums)[:-1], self.origin[-1:]])
        weight, bias = self._start(sums)
        self.weight[index], self.bias[index] = weight.to(self.weight), bias.to(self.bias)

    def _start(self, sums: ClassSums) -> tuple[Tensor, Tensor]:
        """Rows of a task's classes: of the nearest mean in the task, or, with one origin for all, in all tasks.

        What the classes of one task have in common its own loss never sees, so that training leaves it as it is.
        """
        if not self.common:
            origin = origin_of(sums)
        else:
            origin = self.origin = origin_of(sums) if self.origin is None else self.origin
        weight, bias = nearest_mean(sums.means, origin)
        return weight, bias + log_shares(sums.counts)

    def take(self, rows: Sequence[int]) -> Tensor:
        """[n (d + 1)] weights, then biases, of some rows."""
        index = torch.tensor(rows, dtype=torch.long, device=self.weight.device)
        return torch.cat([self.weight[index].reshape(-1), self.bias[index]])

    def put(self, rows: Sequence[int], flat: Tensor) -> None:
        """Stores what `take` gave, after training."""
        count, width = len(rows), self.weight.shape[1]
        index = torch.tensor(rows, dtype=torch.long, device=self.weight.device)
        self.weight[index] = flat[: count * width].view(count, width)
        self.bias[index] = flat[count * width :]

    def tensors(self) -> dict[str, Tensor]:
        origin = {} if self.origin is None else {"origin": self.origin}
        return {"weight": self.weight, "bias": self.bias, **origin}

    def to_json(self) -> dict[str, object]:
        return {"names": self.names, "rows": self.rows}

    def load(self, tensors: dict[str, Tensor], names: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
        self.weight, self.bias = tensors["weight"].to(self.weight), tensors["bias"].to(self.bias)
        self.origin = tensors["origin"].to(self.weight.device) if "origin" in tensors else None
        self.names, self.rows = list(names), [list(part) for part in rows]


def origin_of(sums: ClassSums) -> Tensor:
    """[d + 1] the mean m of class means mu_c, and the scale `a` at which distances from them tell how likely each is.

    1 / a is the variance within classes along the directions in which their means differ, as if it were the same along
    all of these. Of rows that lie further apart than SUREST the head is no surer: few rows may do so by chance.
    """
    there = sums.counts > 0
    means = sums.means[there]
    centre = means.mean(0)
    away = means - centre
    between = away.square().sum(-1).mean()
    along = ((away @ sums.scatter()) * away).sum(-1).mean() / sums.counts.sum()  # variance within, times `between`
    variance = torch.maximum(along / between, between / SUREST)
    return torch.cat([centre, torch.where(between > 0, 1 / variance, 0.0).reshape(1)])


def origin_of_means(means: Tensor) -> Tensor:
    """The same where nothing is known but the means [C, d]: of rows that lie so far apart that it is at its surest."""
    exact = means.double()
    centre = exact.mean(0)
    between = (exact - centre).square().sum(-1).mean()
    return torch.cat([centre, torch.where(between > 0, SUREST / between, 0.0).reshape(1)])


def nearest_mean(means: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C, d] and biases [C] of class means [C, d]: a (<mu_c - m, h - m> - |mu_c - m|^2 / 2).

    That is -a |h - mu_c|^2 / 2 but for what all classes with this origin (m, a) have in common.
    """
    exact, centre, scale = means.double(), origin[:-1].to(means.device), float(origin[-1])
    away = exact - centre
    weight = away * scale
    return weight, -(weight * (centre + away / 2)).sum(-1)


def log_shares(counts: Tensor) -> Tensor:
    """[C] log of how often each class is, of counts [C]; one more row of each is taken to be there."""
    more = counts.double() + 1
    return (more / more.sum()).log()
