"""What a method needs of a guide, wherever it lives, and one guide for several workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core.config import GuideConfig
from treelora_ray.core.guide import Guide
from treelora_ray.core.layout import FloatArray, IntArray, Layout
from treelora_ray.core.state import Choice, Inserted, Snapshot
from treelora_ray.methods.comm import Comm


class AnyGuide(Protocol):
    """The calls of `core.Guide` that a method makes; `core.guide` says what each does."""

    names: list[str]
    layout: Layout
    full_layout: Layout

    def begin_task(self, name: str, *, steps_per_epoch: int | None = None) -> None: ...

    def probe(self, step: int, gradient: Tensor) -> Any: ...

    def commit(self) -> Choice: ...

    def select(self, step: int) -> IntArray: ...

    def observe(self, step: int, distances: Tensor | FloatArray) -> bool: ...

    def insert(self, signature: Tensor | None = None) -> Inserted: ...

    def directions(self, tasks: IntArray) -> Tensor: ...

    def draw(self) -> str: ...

    def to_data(self) -> list[dict[str, Any]]: ...

    def measured(self) -> dict[str, Any]: ...

    def nbytes(self) -> int: ...

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...


MakeGuide = Callable[[Layout, GuideConfig], AnyGuide]


class SharedGuide:
    """One guide for all workers: worker 0 asks it, and tells the others what it said.

    All workers make the same calls in the same order. Snapshots and pictures of the tree are for worker 0 alone.
    """

    def __init__(self, comm: Comm, layout: Layout, config: GuideConfig, make: MakeGuide) -> None:
        self.comm, self.full_layout = comm, layout
        self.own = make(layout, config) if comm.rank == 0 else None
        self.layout = Guide(layout, config).layout
        self.names: list[str] = []
        self.name = ""  # of the task in progress
        self.known: dict[int, Tensor] = {}  # by task, its stored directions [total]

    def begin_task(self, name: str, *, steps_per_epoch: int | None = None) -> None:
        self.name = name
        if self.own is not None:
            self.own.begin_task(name, steps_per_epoch=steps_per_epoch)

    def probe(self, step: int, gradient: Tensor) -> None:
        if self.own is not None:
            self.own.probe(step, gradient)

    def commit(self) -> Choice:
        return self.comm.share(self.own.commit() if self.own is not None else NO_CHOICE)

    def select(self, step: int) -> IntArray:
        return self.comm.share(self.own.select(step) if self.own is not None else NO_CHOICE.task)

    def observe(self, step: int, distances: Tensor | FloatArray) -> bool:
        return True if self.own is None else self.own.observe(step, distances)

    def insert(self, signature: Tensor | None = None) -> Inserted:
        done = self.comm.share(self.own.insert(signature) if self.own is not None else Inserted(0, 0, None))
        self.names.append(self.name)
        if done.merge is not None:
            self.known.clear()  # merged tasks may have a new signature in common
        return done

    def directions(self, tasks: IntArray) -> Tensor:
        """Layer by layer the stored direction of another task: [L] -> [total]; zero where a task is -1."""
        found = torch.zeros(self.layout.total)
        for task in sorted(set(tasks.tolist()) - {-1}):
            if task not in self.known:
                everywhere = np.full(len(tasks), task)
                self.known[task] = self.comm.share(
                    self.own.directions(everywhere) if self.own is not None else torch.empty(0)
                )
            for layer in np.flatnonzero(tasks == task).tolist():
                self.layout.segment(found, layer).copy_(self.layout.segment(self.known[task], layer))
        return found

    def restore(self, snapshot: Snapshot) -> None:
        self.names, self.known = list(snapshot.meta["names"]), {}
        current = snapshot.meta["current"]
        self.name = "" if current is None else current["name"]
        if self.own is not None:
            self.own.restore(snapshot)

    def snapshot(self) -> Snapshot:
        return self._mine.snapshot()

    def draw(self) -> str:
        return self._mine.draw()

    def to_data(self) -> list[dict[str, Any]]:
        return self._mine.to_data()

    def measured(self) -> dict[str, Any]:
        return self._mine.measured()

    def nbytes(self) -> int:
        return self._mine.nbytes()

    @property
    def _mine(self) -> AnyGuide:
        assert self.own is not None, "asked of worker 0 only"
        return self.own


NO_CHOICE = Choice(np.empty(0, np.int64), np.empty(0), np.empty(0, bool))
