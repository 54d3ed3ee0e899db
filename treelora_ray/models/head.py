"""The classifier head: one row per class, kept outside the adapters, growing with the stream.

While a task is learnt, the rows that compete in its loss are trained in the learner's flat buffer (`taken`),
and put back when the task ends. All other rows are out of reach of optimizer and weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 0.1  # share of all variance that classes are taken to make of it, at least, where all tasks have one origin


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

    def grow(self, labels: Sequence[str], means: Tensor, within: float = 0.0) -> None:
        """Adds a task's classes; new rows start at the class means [C_t, d] of its frozen features, around which these
        lie at the mean square distance `within`."""
        weight, bias = self._start(means, within, first=not self.rows)
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

    def restart(self, task: int, means: Tensor, within: float = 0.0) -> None:
        """A task's rows start again, from features that its adapter has changed."""
        index = torch.tensor(self.rows[task], device=self.weight.device)
        weight, bias = self._start(means, within, first=len(self.rows) == 1)
        self.weight[index], self.bias[index] = weight.to(self.weight), bias.to(self.bias)

    def _start(self, means: Tensor, within: float, first: bool) -> tuple[Tensor, Tensor]:
        """Rows of a task's classes: of the nearest mean in the task, or, with one origin for all, in all tasks.

        What the classes of one task have in common its own loss never sees, so that training leaves it as it is.
        """
        if not self.common:
            return nearest_mean(means, origin_of(means))
        if self.origin is None or first:
            self.origin = origin_of(means, within)
        return nearest_mean(means, self.origin)

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


def origin_of(means: Tensor, within: float = 0.0) -> Tensor:
    """[d + 1] the mean m of class means [C, d], and the scale `a` that makes the mean of |mu_c - m|^2 count as 4.

    It counts as less where it is less than a tenth of all variance: a first task whose classes lie together must not
    set a scale at which classes of later tasks shout each other down.
    """
    exact = means.double()
    centre = exact.mean(0)
    between = (exact - centre).square().sum(-1).mean()
    spread = torch.maximum(between, LEAST * (between + within))
    return torch.cat([centre, torch.where(spread > 0, 4 / spread, 0.0).reshape(1)])


def nearest_mean(means: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C, d] and biases [C] of class means [C, d]: a (<mu_c - m, h - m> - |mu_c - m|^2 / 2).

    That is -a |h - mu_c|^2 / 2 but for what all classes with this origin (m, a) have in common.
    """
    exact, centre, scale = means.double(), origin[:-1].to(means.device), float(origin[-1])
    away = exact - centre
    weight = away * scale
    return weight, -(weight * (centre + away / 2)).sum(-1)
