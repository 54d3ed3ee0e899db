"""One adapter, and a small memory: each step also sees some rows of past tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import ReplayOptions


@register("replay")
class Replay(Method):
    """The memory holds the numbers of its rows; the rows themselves stay where the stream keeps them."""

    keeps = "one adapter, the numbers of `memory` rows"
    step_cost = "forward/backward of `replay_batch` rows"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, ReplayOptions)
        self.size, self.extra = options.memory, options.replay_batch
        self.memory: list[Ref] = []
        self.seen = 0  # rows of finished tasks

    def competing(self) -> list[int]:
        if not self.memory or not self.extra:
            return super().competing()
        return self.learner.head.of_all()

    def own_classes(self) -> Sequence[int] | None:
        current = self.learner.config.objective.ce_scope == "current"
        return self.learner.unit if current and self.memory and self.extra else None

    def rows(self, step: int, drawn: list[Ref]) -> list[Ref]:
        if not self.memory or not self.extra:
            return drawn
        key = f"{self.learner.config.seed}/{self.learner.unit_name}/replay"
        return drawn + [self.memory[place] for place in memory.walk(len(self.memory), self.extra, step, key)]

    def after_task(self) -> None:
        """Reservoir sampling: each row seen so far is in the memory with the same probability."""
        learner = self.learner
        for task in learner.unit:
            rows = len(learner.tasks[task].train)
            draw = np.random.default_rng([learner.config.seed, self.seen])
            places = draw.integers(0, np.arange(self.seen, self.seen + rows) + 1)
            for row, place in enumerate(places.tolist()):
                if len(self.memory) < self.size:
                    self.memory.append((task, row))
                elif place < self.size:
                    self.memory[place] = (task, row)
            self.seen += rows

    def tensors(self) -> dict[str, Tensor]:
        return {"memory": torch.tensor(self.memory, dtype=torch.long).view(-1, 2)}

    def to_json(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        self.memory = [(task, row) for task, row in tensors["memory"].tolist()]
        self.seen = data["seen"]
