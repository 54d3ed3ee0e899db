"""One adapter on all tasks at once: no stream, and the bound that streams are measured against."""

from __future__ import annotations

from collections.abc import Sequence

from treelora_ray.methods.base import Method, register
from treelora_ray.methods.options import JointOptions


@register("joint")
class Joint(Method):
    keeps = "one adapter; needs all rows at once"
    starts_from = "fresh"

    def units(self, tasks: int) -> list[tuple[int, ...]]:
        return [tuple(range(tasks))] if tasks else []

    @property
    def weighs_tasks(self) -> bool:
        options = self.learner.config.method
        assert isinstance(options, JointOptions)
        return super().weighs_tasks if options.classes is None else options.classes == "all"

    def own_classes(self) -> Sequence[int] | None:
        return None if self.weighs_tasks else ()
