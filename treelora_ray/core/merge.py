"""Adapters under a storage budget: which share a slot, and one low-rank pair in place of two.

`Slots` decides (it lives in the guide), `AdapterBank` holds the adapters and carries the decision out (it
lives where the adapters are). Tasks stay what they were; only their adapters come to share a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core.errors import GuideError, LayoutError
from treelora_ray.core.layout import FloatArray, Layout


def merge_low_rank(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best rank-r pair (A [r, d_in], B [d_out, r]) for sum_i weights_i B_i A_i / sum_i weights_i.

    QR of the stacked factors and an SVD of size (sum of ranks) squared: Delta W itself, d_out x d_in, is
    never formed. Averaging A's and B's separately would not average Delta W.
    """
    if not pairs or len(pairs) != len(weights):
        raise LayoutError(f"merging needs as many weights as adapters: got {len(weights)} and {len(pairs)}")
    fit = all(a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] for a, b in pairs)
    if not fit or len({(a.shape[1], b.shape[0]) for a, b in pairs}) != 1:
        given = [(list(a.shape), list(b.shape)) for a, b in pairs]
        raise LayoutError(f"adapters to merge must be of one layer, A [r, d_in] and B [d_out, r]; got {given}")
    a0, b0 = pairs[0]
    rank = a0.shape[0] if rank is None else rank
    share = torch.tensor(weights, dtype=torch.float64) / float(sum(weights))
    tall = torch.cat([b.double() * w for (_, b), w in zip(pairs, share, strict=True)], dim=1)
    wide = torch.cat([a.double() for a, _ in pairs], dim=0)
    left, left_r = torch.linalg.qr(tall)
    right, right_r = torch.linalg.qr(wide.T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    kept = min(rank, len(s))
    s, moves = s[:kept], s[:kept] > s[:1] * 1e-12
    root = torch.where(moves, s, 0.0).sqrt()
    # A direction that nothing moves along keeps a row of A of the usual length, or it could never be trained.
    usual = float(wide.norm(dim=1).mean())
    a = (torch.where(moves, root, usual)[:, None] * (vh[:kept] @ right.T)).to(a0.dtype)
    b = ((left @ u[:, :kept]) * root).to(b0.dtype)
    if kept < rank:  # fewer directions than asked for: zero rows change nothing and keep the shape
        a = torch.cat([a, a.new_zeros(rank - kept, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - kept)], dim=1)
    return a, b


@dataclass(frozen=True)
class Merge:
    """Slot `dropped` goes into slot `kept`, as an average weighted by their numbers of tasks."""

    kept: int
    dropped: int
    weights: tuple[int, int]


class Slots:
    """Which adapter slot each task uses; at most `budget` slots, the nearest two merged above it."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.of_task: list[int] = []
        size = 0 if budget is None else budget + 1
        self.sums = np.zeros((size, size))  # summed distances between the tasks of two slots
        self.sizes = np.zeros(size, np.int64)  # tasks of each slot; 0 = free

    def add(self, row: FloatArray) -> tuple[int, Merge | None]:
        """A free slot for one more task, at distances `row` from those before it, and then what must merge."""
        if self.budget is None:
            self.of_task.append(len(self.of_task))
            return self.of_task[-1], None
        slot = int(np.flatnonzero(self.sizes == 0)[0])
        to_slots = np.bincount(np.array(self.of_task, np.int64), row, minlength=len(self.sizes))
        self.sums[slot], self.sums[:, slot] = to_slots, to_slots
        self.sizes[slot] = 1
        self.of_task.append(slot)
        return slot, self._merge() if (self.sizes > 0).all() else None

    def _merge(self) -> Merge:
        mean = np.round(self.sums / np.outer(self.sizes, self.sizes), 6)
        mean[np.tril_indices(len(mean))] = np.inf
        kept, dropped = (int(i) for i in np.unravel_index(np.argmin(mean), mean.shape))
        merge = Merge(kept, dropped, (int(self.sizes[kept]), int(self.sizes[dropped])))
        self.sums[kept] += self.sums[dropped]
        self.sums[:, kept] += self.sums[:, dropped]
        self.sums[dropped], self.sums[:, dropped] = 0.0, 0.0
        self.sizes[kept] += self.sizes[dropped]
        self.sizes[dropped] = 0
        self.of_task = [kept if slot == dropped else slot for slot in self.of_task]
        return merge

    def remeasure(self, rows: Sequence[FloatArray]) -> None:
        """Distances anew, after signatures were replaced: rows[i] [N] holds those of task i."""
        if self.budget is None:
            return
        belongs = np.zeros((len(self.of_task), len(self.sizes)))
        belongs[np.arange(len(self.of_task)), self.of_task] = 1
        self.sums = belongs.T @ np.stack(rows) @ belongs

    def tasks_of(self, slot: int) -> list[int]:
        return [task for task, own in enumerate(self.of_task) if own == slot]

    def to_json(self) -> dict[str, Any]:
        return {"of_task": list(self.of_task), "sums": self.sums.tolist(), "sizes": self.sizes.tolist()}

    def load(self, data: Mapping[str, Any]) -> None:
        self.of_task = [int(slot) for slot in data["of_task"]]
        self.sums = np.array(data["sums"], float).reshape(self.sums.shape)
        self.sizes = np.array(data["sizes"], np.int64).reshape(self.sizes.shape)


class AdapterBank:
    """The adapters of all tasks, one flat vector [total] a slot; each layer is its (A [r, d_in], B [d_out, r])."""

    def __init__(self, layout: Layout) -> None:
        for name, shapes in zip(layout.names, layout.shapes, strict=True):
            if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
                raise LayoutError(f"layer {name!r} must be (A [r, d_in], B [d_out, r]), got {list(shapes)}")
        self.layout = layout
        self.slots: dict[int, Tensor] = {}
        self.of_task: dict[int, int] = {}

    def put(self, task: int, adapter: Tensor, slot: int, merge: Merge | None = None) -> None:
        """Stores a new task's adapter in the slot that `Guide.insert` names, then carries out its merge."""
        self.layout.require_flat(adapter, f"adapter of task {task}")
        self.slots[slot] = adapter.detach().cpu().clone()
        self.of_task[task] = slot
        if merge is not None:
            self.slots[merge.kept] = self._average(merge)
            del self.slots[merge.dropped]
            self.of_task = {t: merge.kept if s == merge.dropped else s for t, s in self.of_task.items()}

    def _average(self, merge: Merge) -> Tensor:
        out = torch.empty(self.layout.total)
        both = [dict(self.layout.views(self.slots[slot])) for slot in (merge.kept, merge.dropped)]
        for name, (a, b) in self.layout.views(out):
            pairs = [(adapter[name][0], adapter[name][1]) for adapter in both]
            merged = merge_low_rank(pairs, merge.weights, a.shape[0])
            a.copy_(merged[0])
            b.copy_(merged[1])
        return out

    def __getitem__(self, task: int) -> Tensor:
        """A copy of the adapter [total] of a task."""
        if task not in self.of_task:
            raise GuideError(f"no adapter is stored for task {task}; stored: {sorted(self.of_task)}")
        return self.slots[self.of_task[task]].clone()

    def segments(self, tasks: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Layer by layer the adapter of another task: tasks [L] -> [total]; -1 leaves `out` (or zeros) there."""
        out = torch.zeros(self.layout.total) if out is None else out
        needed = {int(task): self[int(task)] for task in tasks if task >= 0}
        for layer, task in enumerate(tasks):
            if task >= 0:
                self.layout.segment(out, layer).copy_(self.layout.segment(needed[int(task)], layer))
        return out
