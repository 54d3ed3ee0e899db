"""One adapter, and a small memory: each step also sees some rows of past tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        self.buffer = memory.Buffer(learner.config.seed, balanced=False)

    @property
    def memory(self) -> list[Ref]:
        return self.buffer.rows()

    @property
    def looks_back(self) -> bool:
        return bool(self.memory and self.extra)

    def rows(self, step: int, drawn: list[Ref]) -> list[Ref]:
        if not self.looks_back:
            return drawn
        known, key = self.memory, f"{self.learner.config.seed}/{self.learner.unit_name}/replay"
        return drawn + [known[place] for place in memory.walk(len(known), self.extra, step, key)]

    def after_task(self) -> None:
        """Each row seen so far is in the memory with the same probability."""
        for task in self.learner.unit:
            rows = range(len(self.learner.tasks[task].train))
            self.buffer.offer([((task, row), 0) for row in rows], self.size)

    def tensors(self) -> dict[str, Tensor]:
        return {"memory": torch.tensor(self.memory, dtype=torch.long).view(-1, 2)}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        rows = [(task, row) for task, row in tensors["memory"].tolist()]
        self.buffer.offer([(row, 0) for row in rows], len(rows))
