"""Replay: each step also sees some rows of past tasks, out of one memory.

Rolnick et al. 2019, arXiv 1811.11682; with a memory of a few rows a class, Chaudhry et al. 2019, arXiv 1902.10486.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods.base import register
from treelora_ray.methods.gradients import mean_gradient
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import ReplayOptions
from treelora_ray.methods.remembering import Buffered
from treelora_ray.objectives.base import Batch
from treelora_ray.objectives.classification import Classification


@register("replay")
class Replay(Buffered):
    """(1 - w) CE of the step's rows + w CE of remembered ones, each a mean of its own."""

    keeps = "one adapter, the numbers of `memory` rows in all"
    step_cost = "forward/backward of `replay_batch` rows"
    reduces = "gradient, the gradient of the rows drawn"

    def __init__(self, learner: Learner, options: Options) -> None:
        assert isinstance(options, ReplayOptions)
        super().__init__(learner, options)
        own = learner.config.train.batch
        self.weight = self.batch / (own + self.batch) if options.weight is None else options.weight

    @property
    def looks_back(self) -> bool:
        return self.weight > 0 and self.batch > 0 and self.capacity > 0

    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        if not self.looks_back:
            return
        learner = self.learner
        with learner.effort.timed("memory"):
            if refs := self.draw(step, "memory"):
                learner.model.train(True)
                past = mean_gradient(learner, refs, self.loss_among_all)
                learner.model.train(False)
                learner.grad.mul_(1 - self.weight).add_(past, alpha=self.weight)
            if self.scope == "all":
                self.remember(learner.drawn)

    def loss_among_all(self, refs: Sequence[Ref], batch: Batch) -> Tensor:  # noqa: ARG002
        """The sum of a batch's losses, in which all classes seen compete."""
        return self.learner.objective.loss(replace(batch, allowed=None))[0]

    def after_task(self) -> None:
        for task in self.learner.unit if self.looks_back else ():
            self.remember([(task, row) for row in range(len(self.learner.tasks[task].train))])

    def remember(self, refs: Sequence[Ref]) -> None:
        """Offers rows to the memory, each in the group of its class, or of its task where there are none."""
        for task in sorted({task for task, _ in refs}):
            rows, objective = [row for other, row in refs if other == task], self.learner.objective
            if self.buffer.balanced and isinstance(objective, Classification):
                labels = self.learner.tasks[task].train.take(rows, ["label"])
                groups = objective.targets(labels, [task] * len(rows))
            else:
                groups = [task] * len(rows)
            self.buffer.offer([((task, row), group) for row, group in zip(rows, groups, strict=True)], self.capacity)

    def report(self) -> dict[str, Any]:
        return {"memory": self.capacity, "remembered": len(self.buffer.rows())}
