"""The desk of a run: where the workers leave what the driver shows, and where it asks them to stop."""

from __future__ import annotations

import time
from typing import Any

import ray

from treelora_ray.methods.comm import Comm
from treelora_ray.training.stream import Listener

EVERY = 0.2  # seconds between two losses that are told
ASK = 10  # steps between two questions whether to stop


class Desk:
    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[Any, ...]]] = []
        self.stopping = False
        self.error: Exception | None = None

    def tell(self, event: str, *values: Any) -> None:
        self.events.append((event, values))

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """What was told since the last time."""
        found, self.events = self.events, []
        return found

    def stop(self) -> None:
        self.stopping = True

    def fail(self, error: Exception) -> None:
        """A mistake that no restart mends."""
        self.error = self.error or error

    def failed(self) -> Exception | None:
        return self.error

    def over(self) -> bool:
        """Whether there is nothing to begin any more."""
        return self.stopping or self.error is not None

    def asked(self) -> bool:
        return self.stopping


class Reporter(Listener):
    """On a worker: tells the desk what the driver shall show, and Ray Train that there is a checkpoint."""

    def __init__(self, desk: Any, comm: Comm, report: Any) -> None:
        self.desk, self.leads, self.report, self.last = desk, comm.rank == 0, report, 0.0

    def _tell(self, event: str, *values: Any) -> None:
        if self.leads:
            self.desk.tell.remote(event, *values)

    def starts(self, steps: list[int], records: list[dict[str, Any]]) -> None:
        self._tell("starts", steps, records)

    def begins(self, number: int, of: int, name: str) -> None:
        self._tell("begins", number, of, name)

    def phase(self, name: str) -> None:
        self._tell("phase", name)

    def step(self, step: int, of: int, loss: float) -> None:
        now = time.monotonic()
        if now - self.last > EVERY:
            self.last = now
            self._tell("step", step, of, loss)

    def scored(self, record: dict[str, Any]) -> None:
        self._tell("scored", record)

    def note(self, text: str) -> None:
        self._tell("note", text)

    def saved(self, checkpoint: str, state: dict[str, Any]) -> None:
        self.report(checkpoint, state)


class Stop:
    """Asks the desk now and then; all workers hear the same answer at the same step."""

    def __init__(self, desk: Any, comm: Comm) -> None:
        self.desk, self.comm, self.calls, self.answer = desk, comm, 0, False

    def __call__(self) -> bool:
        if self.calls % ASK == 0:
            self.answer = self.comm.share(bool(ray.get(self.desk.asked.remote())) if self.comm.rank == 0 else False)
        self.calls += 1
        return self.answer
