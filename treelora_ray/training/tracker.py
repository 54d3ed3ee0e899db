"""What training tells of itself, for looking at a run later. It knows nothing of where that goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Tracker:
    """Told by worker 0 alone; all of it does nothing here."""

    def begins(self, about: Mapping[str, Any], fresh: bool, left: int) -> None:
        """A run starts (`fresh`) or goes on, with so many units left. `about`: its config, data and versions."""

    def step(
        self, unit: int, step: int, of: int, whole: int, loss: float, values: Callable[[], dict[str, float]]
    ) -> None:
        """Step `step` of `of` is done, `whole` counts through the stream. `values` may cost something to ask for."""

    def learnt(self, number: int, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """A unit is learnt, scored and saved."""

    def ends(self, status: str) -> None:
        """FINISHED, FAILED or KILLED (stopped on request); nothing is told afterwards."""
