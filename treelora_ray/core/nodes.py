"""What a group of the tree says about tasks nobody has looked at.

One comparison of a direction x with a group's centroid c estimates how far x is from the group's tasks:

    d(x, nu)^2 = d(x, c)^2 + spread        spread = mean squared distance of the group's tasks to c

which is the exact mean square for cosine and l2 (Pythagoras), and for l1 holds as far as the values look
Gaussian. Without the spread, large groups look near only because their centroid is short.

The nearest task of a group lies below that mean by chance alone. `luck` is the 95th percentile of that
drop for a task foreign to the group of m: sigma * sqrt(1 - 1/m) * Phi^-1(0.95^(1/m)), with sigma, per
layer, the spread of distances between stored tasks that have nothing to do with each other. Kin lie lower
than luck goes, so the slack, delta of Eq. (2), is KIN times it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from treelora_ray.core.layout import FloatArray, IntArray, Layout
from treelora_ray.core.signature import layer_distances
from treelora_ray.core.store import CHUNK_VALUES, Rows, SignatureStore
from treelora_ray.core.tree import Children, Tree

SMALLEST_GROUP = 3  # comparing with the two tasks of a pair costs less than comparing with their centroid first
LUCK_LEVEL = 0.95
# Measured on planted families of cosine 0.2 to 0.5: factors of 1.5 to 2.5 find the right one most often, 1 less so.
KIN = 2.0
SIGMA_PAIRS = 512


class NodeStats:
    """Centroids and spreads of the groups of at least SMALLEST_GROUP tasks, and sigma per layer."""

    def __init__(self, store: SignatureStore, tree: Tree) -> None:
        self.store, self.tree = store, tree
        self.centroids = Rows(store.layout, "l2", store.rows.values.dtype)
        self.spreads = np.empty((1, len(store.layout)), np.float32)  # [rows and room to grow, L]
        self.row = np.full(len(tree), -1, np.int64)  # node -> row of centroids and spreads
        self.sigma = np.zeros(len(store.layout))

    @classmethod
    def build(cls, store: SignatureStore, tree: Tree) -> NodeStats:
        stats = cls(store, tree)
        stats.sigma = unrelated_sigma(store)
        signatures = _backwards(store, tree.order)
        open_sums: list[tuple[Tensor, Tensor]] = []  # of finished subtrees whose parent is still to come
        for node in range(len(tree) - 1, -1, -1):  # reverse preorder: children before parents
            if tree.task[node] >= 0:
                open_sums.append(next(signatures))
                continue
            parts = int(tree.children.count[node])
            total, squares = open_sums.pop()
            for other, other_squares in [open_sums.pop() for _ in range(parts - 1)]:
                total, squares = total + other, squares + other_squares
            open_sums.append((total, squares))
            size = int(tree.size[node])
            if size >= SMALLEST_GROUP:
                stats._put(node, total / size, squares / size)
        return stats

    def _put(self, node: int, centroid: Tensor, mean_square: Tensor) -> None:
        row = int(self.row[node])
        if row < 0:
            row = self.row[node] = self.centroids.append(centroid)
            if row >= len(self.spreads):
                room = np.empty((len(self.spreads) + 8, self.spreads.shape[1]), np.float32)
                self.spreads = np.concatenate([self.spreads, room])
        else:
            self.centroids[row] = centroid
        if self.store.distance == "l1":
            members, stored, total = self.tree.members(node), self.centroids[row], torch.zeros(())
            for chunk in np.array_split(members, -(-len(members) // 32)):
                total = total + self.store.from_rows(stored, chunk).square().sum(0)
            self.spreads[row] = (total / len(members)).numpy()
        else:
            self.spreads[row] = (mean_square - self._length(row)).clamp(min=0).numpy() * self._unit

    def _length(self, row: int) -> Tensor:
        return _square(self.store.layout, self.centroids[row])

    @property
    def _unit(self) -> float:
        """Squared distance per squared difference of directions."""
        return 0.25 if self.store.distance == "cosine" else 1.0

    # -- reading

    def slack(self, node_sizes: IntArray) -> FloatArray:
        """Slack in units of sigma, for groups of these sizes; 0 for single tasks."""
        return KIN * luck(node_sizes)

    def search_children(self) -> Children:
        """Children of the groups that have a centroid, groups without one replaced by their tasks; small first."""
        parent = self.tree.parent.copy()
        for nodes in self.tree.levels[1:]:  # a skipped group's children look one level further up
            skipped = (self.row[parent[nodes]] < 0) & (parent[nodes] > 0)
            parent[nodes[skipped]] = parent[parent[nodes[skipped]]]
        parent[(self.row < 0) & (self.tree.task < 0)] = -1
        parent[0] = -1
        return Children.of(parent, self.tree.size)

    # -- after an insertion

    def after_insert(self, tree: Tree, task: int) -> NodeStats:
        """The statistics of `tree`, which is the old tree with one task inserted: the path changes."""
        new = NodeStats(self.store, tree)
        new.centroids, new.spreads = self.centroids, self.spreads
        tasks = len(tree.order)
        new.sigma = unrelated_sigma(self.store) if tasks & (tasks - 1) == 0 else self.sigma  # at each doubling
        old_of = _old_groups(self.tree, tree, task)
        known = old_of >= 0
        new.row[known] = self.row[old_of[known]]
        signature = self.store.rows[task]
        square = _square(self.store.layout, signature)
        for node in tree.path(task):
            size = int(tree.size[node])
            if size >= SMALLEST_GROUP:
                total, squares = new._sums_without(node, task)
                new._put(node, (total + signature) / size, (squares + square) / size)
        return new

    def _sums_without(self, node: int, task: int) -> tuple[Tensor, Tensor]:
        """Sums of the signatures and of their squared lengths over a node's other tasks, as cheaply as known."""
        others = int(self.tree.size[node]) - 1
        below = self.tree.children[node]
        for known in (
            node,
            *below[self.tree.size[below] == others],
        ):  # itself of old, or new above one of old
            row = int(self.row[known])
            if row >= 0:
                mean_square = torch.from_numpy(self.spreads[row] / self._unit) + self._length(row)
                return self.centroids[row] * others, mean_square * others
        members = self.tree.members(node)
        rows = self.store.rows[members[members != task]]
        return rows.sum(0), _square(self.store.layout, rows).sum(0)

    def nbytes(self) -> int:
        return int(self.centroids.values.nbytes + self.centroids.scales.nbytes + self.spreads.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        return {
            **self.centroids.tensors(),
            "spreads": torch.from_numpy(self.spreads[: len(self.centroids)].copy()),
            "row": torch.from_numpy(self.row.copy()),
            "sigma": torch.from_numpy(self.sigma.copy()),
        }

    @classmethod
    def from_tensors(cls, store: SignatureStore, tree: Tree, tensors: Mapping[str, Tensor]) -> NodeStats:
        stats = cls(store, tree)
        stats.centroids.load({"values": tensors["values"], "scales": tensors["scales"]})
        stats.spreads = tensors["spreads"].numpy().copy()
        stats.row = tensors["row"].numpy().copy()
        stats.sigma = tensors["sigma"].numpy().copy()
        return stats


def _backwards(store: SignatureStore, tasks: IntArray) -> Iterator[tuple[Tensor, Tensor]]:
    """Signatures [total] and squared lengths [L] of the tasks, from the last to the first."""
    step = max(1, CHUNK_VALUES // store.layout.total)
    for stop in range(len(tasks), 0, -step):
        rows = store.rows[tasks[max(0, stop - step) : stop]]
        squares = _square(store.layout, rows)
        yield from zip(rows.flip(0), squares.flip(0), strict=True)


def _square(layout: Layout, flat: Tensor) -> Tensor:
    """Squared length of each layer's segment, [..., L]."""
    return layout.per_layer(lambda x: x.square().sum(-1), flat)


def luck(node_sizes: IntArray) -> FloatArray:
    """How far below the mean of m draws the least of them falls, 95th percentile, in units of their spread."""
    drop = np.sqrt(1 - 1 / node_sizes) * ndtri(LUCK_LEVEL ** (1 / node_sizes))
    return np.asarray(drop)


def unrelated_sigma(store: SignatureStore) -> FloatArray:
    """[L] how much distances between unrelated tasks vary, from a fixed sample of stored pairs.

    Kin only lengthen the lower side, so the upper side is measured: 84th percentile minus median.
    """
    n = len(store)
    pairs = n * (n - 1) // 2
    if pairs == 0:
        return np.zeros(len(store.layout))
    chosen = np.random.default_rng(n).choice(pairs, size=min(pairs, SIGMA_PAIRS), replace=False)
    high = np.floor((1 + np.sqrt(1 + 8 * chosen)) / 2).astype(np.int64)
    low = chosen - high * (high - 1) // 2
    step = max(1, CHUNK_VALUES // store.layout.total)
    parts = [
        layer_distances(store.layout, store.rows[high[i : i + step]], store.rows[low[i : i + step]], store.distance)
        for i in range(0, len(high), step)
    ]
    upper, middle = np.quantile(torch.cat(parts).double().numpy(), [0.8413, 0.5], axis=0)
    return np.asarray(upper - middle)


def _old_groups(old: Tree, new: Tree, task: int) -> IntArray:
    """[M] for each group of the new tree the group of the old one with the same other tasks, else -1.

    Both trees list the old tasks in the same order; a group is known by its first task and its size there.
    """
    kept = new.order != task
    before = np.concatenate([[0], np.cumsum(kept)])
    first = before[new.first]
    size = before[new.first + new.size] - first
    groups = np.flatnonzero(old.task < 0)
    known = {(int(old.first[g]), int(old.size[g])): int(g) for g in groups}
    found = np.full(len(new), -1, np.int64)
    taken: set[int] = set()
    for node in np.flatnonzero(new.task < 0)[::-1]:  # deepest first: a new group above an old one is the new one
        match = known.get((int(first[node]), int(size[node])), -1)
        if match >= 0 and match not in taken:
            found[node] = match
            taken.add(match)
    return found
