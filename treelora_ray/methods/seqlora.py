"""One adapter for all tasks, one after the other: what every method is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treelora_ray.config import Options
from treelora_ray.methods.base import register
from treelora_ray.methods.folding import Folding
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import SeqLoraOptions


@register("seqlora")
class SeqLora(Folding):
    keeps = "one adapter (merge_new: all, folded into the weights)"
    starts_from = "the task before"

    @classmethod
    def start_of(cls, options: Mapping[str, Any]) -> str:
        return Folding.starts_from if options["variant"] == "merge_new" else cls.starts_from

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, SeqLoraOptions)
        self.folds = options.variant == "merge_new"

    def after_task(self) -> None:
        if self.folds:
            super().after_task()
