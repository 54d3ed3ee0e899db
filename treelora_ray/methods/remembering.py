"""One adapter and remembered rows: so many of each past task, whose gradients say where a step must not go, or one
memory over all tasks, out of which each step looks at some again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import DerOptions, ReplayOptions

PER_TASK = 100  # rows of a memory over all tasks, for each task of the stream, where its size is not given


class Remembering(Method):
    """What methods with an episodic memory have in common. The memory holds the numbers of its rows.

    All rows of the head are in the buffer, since the gradients of remembered rows are about them too; the loss of a row
    compares the classes that `objective.ce_scope` says.
    """

    keeps = "one adapter, the numbers of `memory` rows of each task"
    starts_from = "the task before"

    def __init__(self, learner: Learner, options: Options, per_task: int) -> None:
        super().__init__(learner, options)
        self.per_task = per_task
        self.memory: dict[int, list[Ref]] = {}  # by task
        self.edited = 0  # steps of the unit whose gradient was changed

    @property
    def looks_back(self) -> bool:
        return bool(self.memory)

    def before_task(self) -> None:
        self.edited = 0

    def after_task(self) -> None:
        """Rows of all the task's, drawn uniformly."""
        learner = self.learner
        for task in learner.unit if self.per_task else ():
            key = f"{learner.config.seed}/{learner.tasks[task].name}/memory"
            rows = memory.draw(len(learner.tasks[task].train), self.per_task, key)
            self.memory[task] = [(task, row) for row in sorted(rows)]

    def tensors(self) -> dict[str, Tensor]:
        refs = [ref for rows in self.memory.values() for ref in rows]
        return {"memory": torch.tensor(refs, dtype=torch.long).view(-1, 2)}

    def to_json(self) -> dict[str, Any]:
        return {"edited": self.edited}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        self.memory, self.edited = {}, data["edited"]
        for task, row in tensors["memory"].tolist():
            self.memory.setdefault(task, []).append((task, row))

    def report(self) -> dict[str, Any]:
        return {"steps_edited": self.edited}


class Buffered(Method):
    """What methods have in common that hold one memory over all tasks. It holds the numbers of its rows."""

    starts_from = "the task before"

    def __init__(self, learner: Learner, options: ReplayOptions | DerOptions) -> None:
        super().__init__(learner, options)
        own = learner.config.train.batch
        self.size, self.scope = options.memory, options.scope
        self.batch = own if options.replay_batch is None else options.replay_batch
        self.buffer = memory.Buffer(learner.config.seed, options.policy == "balanced")

    @property
    def capacity(self) -> int:
        return PER_TASK * len(self.learner.tasks) if self.size is None else self.size

    def draw(self, step: int, name: str) -> list[Ref]:
        """Different rows for a step, the same on all workers; all there are where these are fewer."""
        known = [ref for ref in self.buffer.rows() if self.scope == "all" or ref[0] not in self.learner.unit]
        key = f"{self.learner.config.seed}/{self.learner.unit_name}/{step}/{name}"
        return [known[place] for place in memory.draw(len(known), self.batch, key)]

    def tensors(self) -> dict[str, Tensor]:
        return {
            "rows": torch.tensor(self.buffer.rows(), dtype=torch.long).view(-1, 2),
            "groups": torch.tensor(self.buffer.groups_of_rows(), dtype=torch.long),
        }

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        rows = [(task, row) for task, row in tensors["rows"].tolist()]
        self.buffer.offer(list(zip(rows, tensors["groups"].tolist(), strict=True)), len(rows))
