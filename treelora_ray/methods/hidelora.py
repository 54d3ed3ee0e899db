"""HiDe-LoRA: an adapter for each task, a head that infers the task, and a classifier fit over all classes seen.

Wang et al. 2024, arXiv 2407.05229; the decomposition is that of Wang et al. 2023, arXiv 2310.07234.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.core.merge import AdapterBank
from treelora_ray.methods.base import register
from treelora_ray.methods.hide import Hide
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import HideLoraOptions


@register("hide-lora")
class HideLora(Hide):
    keeps = "an adapter for each task; of a class 2 summaries of its features, and a row of the head that infers tasks"

    @classmethod
    def start_of(cls, options: Mapping[str, Any]) -> str:
        return {"previous": "the task before", "fresh": "fresh"}[options["start"]]

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, HideLoraOptions)
        self.continues = options.start == "previous"
        self.bank: AdapterBank = AdapterBank(learner.layout)

    def values_trained(self) -> Tensor:
        return self.learner.adapter

    def values_kept(self) -> list[Tensor]:
        return [self.bank[task] for task in sorted(self.bank.of_task)]

    def keep(self, task: int, values: Tensor) -> None:
        self.bank.put(task, values, slot=task)

    def before_task(self) -> None:
        before = self.values_kept() if self.continues else []
        self.learner.adapter.copy_(before[-1] if before else self.learner.anchor)

    def answer(self, task: int) -> Tensor:
        return self.bank[task] if task in self.bank.of_task else self.learner.adapter
