"""One adapter on all tasks at once: no stream, and the bound that streams are measured against."""

from __future__ import annotations

from collections.abc import Sequence

from treelora_ray.config import Options
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import JointOptions


@register("joint")
class Joint(Method):
    keeps = "one adapter; needs all rows at once"
    starts_from = "fresh"

    def __init__(self, learner: Learner, options: Options) -> None:
        assert isinstance(options, JointOptions)
        objective = learner.config.objective
        told = "own" if objective.routing != "last" and objective.ce_scope == "current" else "all"
        self.apart = (options.classes or told) == "own"
        super().__init__(learner, options)

    def units(self, tasks: int) -> list[tuple[int, ...]]:
        return [tuple(range(tasks))] if tasks else []

    @property
    def weighs_tasks(self) -> bool:
        return not self.apart

    def own_classes(self) -> Sequence[int] | None:
        return () if self.apart else None
