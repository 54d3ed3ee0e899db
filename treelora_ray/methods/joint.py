"""One adapter on all tasks at once: no stream, and the bound that streams are measured against."""

from __future__ import annotations

from treelora_ray.methods.base import Method, register


@register("joint")
class Joint(Method):
    keeps = "one adapter; needs all rows at once"
    starts_from = "fresh"

    def units(self, tasks: int) -> list[tuple[int, ...]]:
        return [tuple(range(tasks))] if tasks else []

    @property
    def weighs_tasks(self) -> bool:
        return True
