"""Classification with a linear head over pooled features; a class is a row of the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.models.backbone import Model
from treelora_ray.models.head import Head
from treelora_ray.objectives.base import AnchorHead, Batch, Columns, TaskInfo

ANCHOR_SCALE = 10.0  # of the cosine logits at the anchor


class Classification:
    kind: ClassVar[str] = "classification"

    def __init__(self, model: Model, head: Head, infos: Sequence[TaskInfo], precision: str = "fp32") -> None:
        self.model, self.head, self.infos, self.precision = model, head, infos, precision
        self.classes: list[int] = []  # rows of the head that are trained now
        self.places: dict[int, int] = {}
        self.flat = torch.empty(0)  # their weights, then their biases
        self.mask: dict[int, Tensor] | None = None

    def compete(self, classes: Sequence[int], flat: Tensor, own: Sequence[int] | None = None) -> None:
        """From now on these rows of the head compete, with their values in `flat`; with `own`, each row of
        a batch is compared with the classes of its own task only, where that is not one of `own`.
        """
        self.classes, self.flat = list(classes), flat
        self.places = {row: place for place, row in enumerate(self.classes)}
        self.mask = None
        if own is not None:
            together = set(self.head.of_tasks(own))
            self.mask = {}
            for task, rows in enumerate(self.head.rows):
                group = together if task in own else set(rows)
                self.mask[task] = torch.tensor([row in group for row in self.classes], device=flat.device)

    def targets(self, rows: Columns, tasks: Sequence[int]) -> list[int]:
        """The row of the head for each row's label."""
        found = []
        for label, task in zip(rows["label"], tasks, strict=True):
            labels = self.infos[task].labels
            found.append(self.head.rows[task][labels.index(label)])
        return found

    def batch(self, rows: Columns, tasks: Sequence[int]) -> Batch:
        places = [self.places[row] for row in self.targets(rows, tasks)]
        allowed = None if self.mask is None else torch.stack([self.mask[task] for task in tasks])
        moved = self.model.to_device({"targets": torch.tensor(places, dtype=torch.long)})
        return Batch(self.model.inputs(rows), len(places), moved["targets"], allowed)

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        with self.model.autocast(self.precision):
            features = self.model.features(batch.inputs)
        end = len(self.classes) * self.model.width
        logits = F.linear(features.float(), self.flat[:end].view(-1, self.model.width), self.flat[end:])
        compared = logits if batch.allowed is None else logits.masked_fill(~batch.allowed, float("-inf"))
        assert batch.targets is not None
        return F.cross_entropy(compared, batch.targets, reduction="sum"), {"features": features, "logits": logits}

    def anchor_loss(self, batch: Batch, head: AnchorHead | None) -> Tensor:
        """Cosine logits between features and class means, and what the shares of the classes alone would say.

        Without the shares the gradients of tasks with a rare class would have in common that it is rare.
        """
        assert head is not None
        with self.model.autocast(self.precision):
            features = self.model.features(batch.inputs)
        logits = ANCHOR_SCALE * F.normalize(features.float(), dim=-1) @ F.normalize(head.means, dim=-1).T
        assert batch.targets is not None
        return F.cross_entropy(logits + head.log_shares, batch.targets)

    @torch.no_grad()
    def answer(self, rows: Columns, tasks: Sequence[int], classes: Sequence[int] | None) -> list[str]:  # noqa: ARG002
        return [self.head.names[row] for row in self.choose(rows, classes)]

    @torch.no_grad()
    def choose(self, rows: Columns, classes: Sequence[int] | None) -> list[int]:
        """The likeliest row of the head for each row, among `classes` (all where None)."""
        among = torch.tensor(list(range(len(self.head)) if classes is None else classes), device=self.model.device)
        with self.model.autocast(self.precision):
            features = self.model.features(self.model.inputs(rows))
        logits = F.linear(features.float(), self.head.weight[among], self.head.bias[among])
        return among[logits.argmax(-1)].tolist()
