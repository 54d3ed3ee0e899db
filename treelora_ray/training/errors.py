"""What goes wrong in a run and can be told to its user."""

from __future__ import annotations

from pathlib import Path


class RunError(ValueError):
    """A run cannot be started, resumed or read as asked."""


class BusyError(RunError):
    """Another process trains the run."""


class Stopped(Exception):  # noqa: N818
    """A run was asked to stop, and has written a checkpoint."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(f"stopped; the run goes on from its checkpoint in {folder}")
        self.folder = folder


class NonFiniteError(RuntimeError):
    """The loss or a gradient became infinite or NaN; nothing was updated."""

    def __init__(self, task: str, step: int, loss: float, norm: float) -> None:
        super().__init__(
            f"task {task!r}, step {step}: the loss is {loss} and the norm of its gradient {norm}; the weights are as "
            "before this step. Lower train.lr, set train.clip, or use precision fp32, and resume"
        )
        self.task, self.step, self.values = task, step, (loss, norm)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.task, self.step, *self.values)
