"""What a model is trained for: rows -> a batch, a batch -> a loss, rows -> answers, answers -> a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class TaskInfo:
    """What must be known of a task to predict, once its data are gone."""

    name: str
    labels: tuple[str, ...] = ()
    score: str = "accuracy"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskInfo:
        return cls(data["name"], tuple(data["labels"]), data["score"])


@dataclass(frozen=True)
class AnchorHead:
    """What a classifier answers by at the anchor, in the order in which the unit's classes compete."""

    means: Tensor  # [n, d] of frozen features
    log_shares: Tensor  # [n]


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]
    count: int  # what the loss is a mean over: rows, or tokens of answers
    targets: Tensor | None = None  # [B] which of the competing classes is right
    allowed: Tensor | None = None  # [B, n] which classes compete for each row; None: all


class Objective(Protocol):
    """The loss of a batch is a sum, so that means may be taken over any number of batches and workers."""

    kind: ClassVar[str]  # as `objective.kind` says it

    def batch(self, rows: Columns, tasks: Sequence[int]) -> Batch:
        """Rows of the tasks (numbers, one a row), ready for the model."""

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """The sum of the batch's losses, and what the model said (for further terms), its logits before any mask."""

    def anchor_loss(self, batch: Batch, head: AnchorHead | None) -> Tensor:
        """The mean loss at the anchor, where no trained head is asked; `head`: where there are classes."""

    def answer(self, rows: Columns, tasks: Sequence[int], classes: Sequence[int] | None) -> list[str]:
        """What the model, with the adapter it holds, answers to each row; among these rows of the head."""
