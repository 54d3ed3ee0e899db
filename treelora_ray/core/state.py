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
STRETCHES, LAYERS_SHOWN = 12, 8  # at most, into which the comparisons of a task are summed up for figures


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


class Pulls:
    """How often, and at what distance, a layer was compared with a task: sums over stretches of steps, for figures.

    Stretches are all equally long. When they become too many, two are made one: a task of any length keeps as much.
    """

    def __init__(self, layers: int, tasks: int) -> None:
        self.shown = np.unique(np.linspace(0, layers - 1, LAYERS_SHOWN).round().astype(np.int64))
        self.count = np.zeros((len(self.shown), STRETCHES, tasks), np.int64)
        self.total = np.zeros(self.count.shape)  # of distances
        self.first, self.last, self.length, self.groups = -1, -1, 1, 0  # first: -1 before the first comparison

    def add(self, step: int, tasks: IntArray, distances: FloatArray) -> None:
        """A comparison of each layer [L]; steps do not fall."""
        if self.first < 0:
            self.first = step
        self.last = step
        while (stretch := (step - self.first) // self.length) >= STRETCHES:
            for sums in (self.count, self.total):
                half = sums.reshape(len(self.shown), STRETCHES // 2, 2, -1).sum(2)
                sums[:] = 0
                sums[:, : STRETCHES // 2] = half
            self.length *= 2
        seen = tasks[self.shown]
        self.groups += int((seen == GROUP).sum())
        rows = np.flatnonzero(seen >= 0)
        self.count[rows, stretch, seen[rows]] += 1
        self.total[rows, stretch, seen[rows]] += distances[self.shown][rows]

    def to_data(self, task: str, tasks: Sequence[str], layers: Sequence[str]) -> dict[str, Any] | None:
        """`count` and `distance` are [layers shown, stretches, tasks]; `starts` has the first step of each stretch, and
        one past the last."""
        if self.first < 0:
            return None
        used = (self.last - self.first) // self.length + 1
        count, total = self.count[:, :used], self.total[:, :used]
        mean = np.round(total / np.maximum(count, 1), 4).astype(object)
        mean[count == 0] = None
        return {
            "task": task,
            "tasks": list(tasks),
            "layers": [layers[layer] for layer in self.shown],
            "starts": [self.first + number * self.length for number in range(used)] + [self.last + 1],
            "count": count.tolist(),
            "distance": mean.tolist(),
            "groups": self.groups,
        }

    def to_json(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("first", "last", "length", "groups")}

    def tensors(self) -> dict[str, Tensor]:
        return {"pulled": torch.from_numpy(self.count.copy()), "apart": torch.from_numpy(self.total.copy())}

    def load(self, data: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        for key, value in data.items():
            setattr(self, key, value)
        self.count, self.total = (tensors[key].numpy().copy() for key in ("pulled", "apart"))


@dataclass
class Current:
    """The task in progress."""

    name: str
    attempt: int
    search: Search | None
    exact: bool  # few enough tasks that every probe round compares with all of them
    gradient: Tensor  # sum of the probe gradients, [total]
    steps_per_epoch: int | None = None  # of this task, where it brings its own
    differences: list[Tensor] = field(default_factory=list)  # of each round from the mean of those before it
    rounds: int = 0
    step: int = -1  # last step observed
    seen: int = 0  # checksum of what it brought
    offered: tuple[int, IntArray] | None = None  # (step, arms) of the last select
    choice: Choice | None = None
    history: dict[int, IntArray] = field(default_factory=dict)  # by probe step, the tasks compared with
    pulls: Pulls | None = None  # what it was compared with; None where that would be too much to draw

    def to_json(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in ("name", "attempt", "steps_per_epoch", "rounds", "step", "seen")}
        offered = None if self.offered is None else self.offered[0]
        history = [[step, tasks.tolist()] for step, tasks in self.history.items()]
        pulls = None if self.pulls is None else self.pulls.to_json()
        kept = {"differences": len(self.differences), "committed": self.choice is not None, "pulls": pulls}
        return {**plain, "offered": offered, "history": history, **kept}

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"current.gradient": self.gradient.clone()}
        if self.differences:
            tensors["current.differences"] = torch.stack(self.differences)
        if self.search is not None:
            tensors |= {f"search.{key}": value for key, value in self.search.tensors().items()}
        arrays: dict[str, NDArray[Any]] = {} if self.offered is None else {"arms": self.offered[1]}
        if self.pulls is not None:
            tensors |= {f"current.{key}": value for key, value in self.pulls.tensors().items()}
        if self.choice is not None:
            arrays |= {key: getattr(self.choice, key) for key in ("task", "distance", "related")}
        return tensors | {f"current.{key}": torch.from_numpy(value.copy()) for key, value in arrays.items()}

    def load(self, data: Mapping[str, Any], own: Mapping[str, Tensor], search: Mapping[str, Tensor]) -> None:
        """Becomes what `to_json` and `tensors` wrote; name, attempt and the kind of search are set already."""
        self.rounds, self.step, self.seen = data["rounds"], data["step"], data["seen"]
        self.gradient = own["gradient"].clone()
        self.history = {step: np.array(tasks, np.int64) for step, tasks in data["history"]}
        self.differences = list(own["differences"].clone()) if data["differences"] else []
        arrays = {key: value.numpy().copy() for key, value in own.items()}
        if self.search is not None:
            self.search.load(search)
        if data["offered"] is not None:
            self.offered = data["offered"], arrays["arms"]
        if data["pulls"] is not None and self.pulls is not None:
            self.pulls.load(data["pulls"], own)
        if data["committed"]:
            self.choice = Choice(arrays["task"], arrays["distance"], arrays["related"])
