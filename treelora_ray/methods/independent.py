"""An adapter for each task from the same start: nothing is shared, nothing is forgotten."""

from __future__ import annotations

from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.core.merge import AdapterBank
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner


@register("independent")
class Independent(Method):
    keeps = "an adapter for each task"
    starts_from = "fresh"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        self.bank: AdapterBank = AdapterBank(learner.layout)

    def before_task(self) -> None:
        self.learner.adapter.copy_(self.learner.anchor)

    def after_task(self) -> None:
        (task,) = self.learner.unit
        self.bank.put(task, self.learner.adapter, slot=task)

    def answer(self, task: int) -> Tensor:
        return self.bank[task] if task in self.bank.of_task else self.learner.adapter
