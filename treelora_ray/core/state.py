"""What a guide hands out and keeps of the task in progress, and how that is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treelora_ray.core.bandit import NOTHING, Search
from treelora_ray.core.layout import FloatArray, IntArray
from treelora_ray.core.merge import Merge

GROUP = -2  # in place of a task: a layer was compared with the centroid of a group
PULLS = ("pulled_at", "pulled", "apart")  # tensors that hold the comparisons
STRETCHES, LAYERS_SHOWN = 12, 8  # into which the comparisons of a task are summed up for figures


@dataclass(frozen=True)
class Choice:
    """What each layer leans on: `task` [L] (-1: nothing), its distance [L], and whether it is kin [L]."""

    task: IntArray
    distance: FloatArray
    related: NDArray[np.bool_]

    @property
    def warm(self) -> IntArray:
        """[L] the related task of each layer, -1 where it starts fresh and is not pulled."""
        return np.where(self.related, self.task, NOTHING)


@dataclass(frozen=True)
class Inserted:
    """A stored task's number, the adapter slot it takes, and the merge that then keeps the budget."""

    task: int
    slot: int
    merge: Merge | None

    def to_json(self) -> dict[str, Any]:
        merge = None if self.merge is None else [self.merge.kept, self.merge.dropped, *self.merge.weights]
        return {"task": self.task, "slot": self.slot, "merge": merge}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inserted:
        merge = None
        if data["merge"] is not None:
            kept, dropped, one, other = data["merge"]
            merge = Merge(kept, dropped, (one, other))
        return cls(data["task"], data["slot"], merge)


@dataclass(frozen=True)
class Snapshot:
    """Everything a guide knows, as plain tensors and JSON."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@dataclass
class Current:
    """The task in progress."""

    name: str
    attempt: int
    search: Search | None
    exact: bool  # few enough tasks that every probe round compares with all of them
    gradient: Tensor  # sum of the probe gradients, [total]
    steps_per_epoch: int | None = None  # of this task, where it brings its own
    before: Tensor | None = None  # gradient of the last round, where it waits for the next
    differences: list[Tensor] = field(default_factory=list)  # of the gradients of two rounds each
    rounds: int = 0
    step: int = -1  # last step observed
    seen: int = 0  # checksum of what it brought
    offered: tuple[int, IntArray] | None = None  # (step, arms) of the last select
    choice: Choice | None = None
    history: dict[int, IntArray] = field(default_factory=dict)  # by probe step, the tasks compared with
    # Step, tasks [L] and distances [L] of each comparison, for figures.
    pulls: list[tuple[int, NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)

    def pulled(self, tasks: Sequence[str], layers: Sequence[str]) -> dict[str, Any] | None:
        """How often, and at what mean distance, a layer was compared with a task, by stretch of steps.

        `count` and `distance` are [layers shown, stretches, tasks]; `starts` has the first step of each stretch, and
        one past the last.
        """
        if not self.pulls:
            return None
        steps, chosen, apart = (np.array(column) for column in zip(*self.pulls, strict=True))
        first, past = int(steps[0]), int(steps[-1]) + 1
        starts = np.linspace(first, past, min(STRETCHES, past - first) + 1).round().astype(np.int64)
        stretch = np.searchsorted(starts, steps, "right") - 1
        shown = np.unique(np.linspace(0, len(layers) - 1, LAYERS_SHOWN).round().astype(np.int64))
        count = np.zeros((len(shown), len(starts) - 1, len(tasks)), np.int64)
        total = np.zeros(count.shape)
        for row, layer in enumerate(shown):
            known = chosen[:, layer] >= 0
            at = np.full(known.sum(), row), stretch[known], chosen[known, layer]
            np.add.at(count, at, 1)
            np.add.at(total, at, apart[known, layer].astype(np.float64))
        mean = np.round(total / np.maximum(count, 1), 4).astype(object)
        mean[count == 0] = None
        return {
            "task": self.name,
            "tasks": list(tasks),
            "layers": [layers[layer] for layer in shown],
            "starts": starts.tolist(),
            "count": count.tolist(),
            "distance": mean.tolist(),
            "groups": int((chosen[:, shown] == GROUP).sum()),
        }

    def to_json(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in ("name", "attempt", "steps_per_epoch", "rounds", "step", "seen")}
        offered = None if self.offered is None else self.offered[0]
        history = [[step, tasks.tolist()] for step, tasks in self.history.items()]
        noise = {"waits": self.before is not None, "differences": len(self.differences)}
        kept = {"committed": self.choice is not None, "pulls": len(self.pulls)}
        return {**plain, **noise, "offered": offered, "history": history, **kept}

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"current.gradient": self.gradient.clone()}
        if self.before is not None:
            tensors["current.before"] = self.before.clone()
        if self.differences:
            tensors["current.differences"] = torch.stack(self.differences)
        if self.search is not None:
            tensors |= {f"search.{key}": value for key, value in self.search.tensors().items()}
        arrays: dict[str, NDArray[Any]] = {} if self.offered is None else {"arms": self.offered[1]}
        if self.pulls:
            columns = zip(*self.pulls, strict=True)
            arrays |= {name: np.array(column) for name, column in zip(PULLS, columns, strict=True)}
        if self.choice is not None:
            arrays |= {key: getattr(self.choice, key) for key in ("task", "distance", "related")}
        return tensors | {f"current.{key}": torch.from_numpy(value.copy()) for key, value in arrays.items()}

    def load(self, data: Mapping[str, Any], own: Mapping[str, Tensor], search: Mapping[str, Tensor]) -> None:
        """Becomes what `to_json` and `tensors` wrote; name, attempt and the kind of search are set already."""
        self.rounds, self.step, self.seen = data["rounds"], data["step"], data["seen"]
        self.gradient = own["gradient"].clone()
        self.history = {step: np.array(tasks, np.int64) for step, tasks in data["history"]}
        self.before = own["before"].clone() if data["waits"] else None
        self.differences = list(own["differences"].clone()) if data["differences"] else []
        arrays = {key: value.numpy().copy() for key, value in own.items()}
        if self.search is not None:
            self.search.load(search)
        if data["offered"] is not None:
            self.offered = data["offered"], arrays["arms"]
        if data.get("pulls"):  # a snapshot of an older version has none
            steps, tasks, distances = (arrays[name] for name in PULLS)
            self.pulls = list(zip(steps.tolist(), tasks, distances, strict=True))
        if data["committed"]:
            self.choice = Choice(arrays["task"], arrays["distance"], arrays["related"])
