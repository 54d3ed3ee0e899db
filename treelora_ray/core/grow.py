"""How trees come to be: linkage and the two K-D splits, from scratch or by inserting one task.

`linkage` merges tasks bottom-up by their mean-over-layers distance: complete linkage is Eq. (1) of the
TreeLoRA paper to the letter (a node is a largest set of tasks pairwise within delta), average linkage is
its noise-robust relative. `kd-radius` is the paper's recipe: level d splits by layer d at the median
distance to the mean. `kd-inner` is what the released code does: the median inner product with the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.cluster import hierarchy
from torch import Tensor

from treelora_ray.core.layout import FloatArray, IntArray
from treelora_ray.core.store import SignatureStore
from treelora_ray.core.tree import Tree

TreeKind = Literal["linkage", "kd-radius", "kd-inner"]
Linkage = Literal["average", "complete"]
TreeUpdate = Literal["auto", "rebuild", "insert"]
LevelRows = Callable[[IntArray, int], Tensor]  # (tasks, level) -> [n, size of layer `level`]


# -- linkage


def linkage_tree(condensed: FloatArray, tasks: int, method: Linkage, depth: int) -> Tree:
    """From the distances of all pairs, of tasks numbered last to first (`SignatureStore.condensed`)."""
    if tasks == 1:
        return Tree.of_tasks([0])
    merges = hierarchy.linkage(condensed, method)
    left, right = merges[:, 0].astype(int), merges[:, 1].astype(int)
    lowest = np.concatenate([np.arange(tasks)[::-1], np.zeros(tasks - 1, int)])  # smallest task of a cluster
    for i in range(tasks - 1):
        lowest[tasks + i] = min(lowest[left[i]], lowest[right[i]])
    nodes: list[tuple[int, int, float]] = []
    stack = [(2 * tasks - 2, -1, 0)]
    while stack:
        cluster, parent, level = stack.pop()
        if cluster < tasks:
            nodes.append((parent, tasks - 1 - cluster, 0.0))
            continue
        here = len(nodes)
        nodes.append((parent, -1, float(merges[cluster - tasks, 2])))
        below = [int(left[cluster - tasks]), int(right[cluster - tasks])]
        if level == depth:  # the cap: a leaf with all tasks below
            below = _leaves(below, left, right, tasks)
        below.sort(key=lambda c: lowest[c], reverse=True)
        stack.extend((c, here, level + 1) for c in below)
    return Tree.from_nodes(nodes)


def _leaves(clusters: list[int], left: IntArray, right: IntArray, tasks: int) -> list[int]:
    found, todo = [], list(clusters)
    while todo:
        cluster = todo.pop()
        if cluster < tasks:
            found.append(cluster)
        else:
            todo += [int(left[cluster - tasks]), int(right[cluster - tasks])]
    return found


def insert_by_linkage(tree: Tree, task: int, row: FloatArray, method: Linkage, depth: int) -> Tree:
    """Joins the nearest branch; `row` [N] holds the task's distances to the tasks before it.

    Climbs from the nearest task while the newcomer is further from a branch than the branch's group is
    wide, and stands beside the last branch. A descent by mean distances would start where groups are
    largest, and there a few kin among thousands hardly move the mean.
    """
    if len(tree.order) == 1:
        return Tree.of_tasks([int(tree.order[0]), task], float(row[tree.order[0]]))
    by_order = row[tree.order]

    def distance(node: int) -> float:
        members = by_order[tree.first[node] : tree.first[node] + tree.size[node]]
        return float(members.max() if method == "complete" else members.mean())

    nearest = int(row.argmin())
    node = tree.node(nearest)
    away = distance(node)
    while (parent := int(tree.parent[node])) >= 0 and away > tree.height[parent]:
        node, away = parent, distance(parent)
    part = tree.subtree(node)
    if int(tree.depth[node]) + part.max_depth + 1 <= depth:
        height = max(away, float(tree.height[node]))
        grown = tree.replace(node, part.join(Tree.from_nodes([(-1, task, 0.0)]), height))
    else:  # no room for one more group: one more child of the group above
        holder = max(0, int(tree.parent[node]))
        grown = tree.replace(holder, tree.subtree(holder).adopt(task))
        grown.height[holder] = max(grown.height[holder], away)
    if method == "complete":  # the groups above stay pairwise within their heights
        above = [group for group in tree.path(nearest) if group < node]
        grown.height[above] = np.maximum(grown.height[above], [distance(group) for group in above])
    return grown


# -- K-D


def radius_split(rows: Tensor) -> tuple[IntArray, IntArray, float]:
    """Positions nearer to the mean than the median, the others, and the median delta (the paper's split)."""
    away = ((rows - rows.mean(0)).abs().sum(1) / 2).double().numpy().round(6)
    ranked = np.sort(away)
    delta = float(ranked[(len(away) - 1) // 2] + ranked[len(away) // 2]) / 2
    near = away <= delta
    half = -(-len(away) // 2)
    if near.sum() == half:
        return np.flatnonzero(near), np.flatnonzero(~near), delta
    by_distance = np.lexsort((np.arange(len(away)), away))
    return np.sort(by_distance[:half]), np.sort(by_distance[half:]), delta


def inner_split(rows: Tensor) -> tuple[IntArray, IntArray, float]:
    """Positions with inner product at least the lower median, the others, and that median (released)."""
    product = (rows @ rows.mean(0)).double().numpy()
    delta = float(np.sort(product)[(len(product) - 1) // 2])
    upper = product >= delta
    if upper.all():
        half = len(product) // 2
        return np.arange(half), np.arange(half, len(product)), delta
    return np.flatnonzero(upper), np.flatnonzero(~upper), delta


def kd_tree(tasks: IntArray, rows: LevelRows, kind: TreeKind, depth: int, level: int = 0) -> Tree:
    """Recursive halves; level d splits by layer d. `level` > 0 grows a subtree that hangs there."""
    split = radius_split if kind == "kd-radius" else inner_split
    nodes: list[tuple[int, int, float]] = []
    stack: list[tuple[IntArray, int, int]] = [(tasks, -1, level)]
    while stack:
        here, parent, at = stack.pop()
        if len(here) == 1 and parent >= 0:
            nodes.append((parent, int(here[0]), 0.0))
            continue
        number = len(nodes)
        if len(here) == 1 or at == depth:  # a leaf: at the cap with all tasks left over
            nodes.append((parent, -1, 0.0))
            nodes += [(number, int(task), 0.0) for task in here]
            continue
        left, right, delta = split(rows(here, at))
        nodes.append((parent, -1, delta))
        stack += [(here[right], number, at + 1), (here[left], number, at + 1)]
    return Tree.from_nodes(nodes)


def insert_by_descent(tree: Tree, task: int, rows: LevelRows, kind: TreeKind, depth: int) -> Tree:
    """Descends to the child whose mean is nearest at the level's layer, and splits the leaf reached."""
    node, level = 0, 0
    while tree.task[node] < 0 and level < depth and tree.children.count[node] > 1:
        own = rows(np.array([task]), level)[0]
        below = tree.children[node]
        away = [float((rows(tree.members(int(c)), level).mean(0) - own).abs().sum()) for c in below]
        node, level = int(below[int(np.argmin(np.round(away, 6)))]), level + 1
    members = np.sort(np.append(tree.members(node), task))
    return tree.replace(node, kd_tree(members, rows, kind, depth, level))


# -- keeping a tree while tasks arrive

REBUILD_BELOW = 512  # up to so many tasks a rebuild costs milliseconds: `auto` rebuilds each time
GROWTH = 0.25  # `auto` rebuilds when so large a share of the tasks came by insertion
STRAIN = 1.25  # ... or when inserted tasks sit so many times looser than those of the last build


class TreeKeeper:
    """The tree over a store's tasks: inserts each new one, and rebuilds when that has gone bad.

    How loose a task sits is the height of its group over the distance to its nearest task: linkage would
    have merged the two at about that distance. K-D trees have no such measure; they rebuild by growth.
    """

    def __init__(
        self,
        store: SignatureStore,
        kind: TreeKind,
        linkage: Linkage,
        depth: int,
        update: TreeUpdate,
        steps: bool,
    ) -> None:
        self.store, self.kind, self.linkage, self.update = store, kind, linkage, update
        self.depth = depth if kind == "linkage" else min(depth, len(store.layout))
        self.steps = steps  # K-D over the differences of successive signatures, as the released code has it
        self.tree: Tree | None = None
        self.nearest = np.empty(0)  # [N] distance of each task to its nearest
        self.built = 0  # tasks at the last build
        self.looseness = 0.0  # mean looseness at the last build
        self.strain = 0.0  # summed looseness of the tasks inserted since

    def add(self, row: FloatArray) -> bool:
        """Takes in the store's newest task, `row` [N] away from the others; True if the tree was rebuilt."""
        task = len(row)
        self.nearest = np.append(np.minimum(self.nearest, row), row.min() if task else np.inf)
        always = self.update == "rebuild" or (self.update == "auto" and task < REBUILD_BELOW)
        if self.tree is None or always:
            self.rebuild()
            return True
        if self.kind == "linkage":
            self.tree = insert_by_linkage(self.tree, task, row, self.linkage, self.depth)
            self.strain += self._looseness(np.array([task]))
            inserted = task + 1 - self.built
            strained = self.strain / inserted > STRAIN * self.looseness
        else:
            self.tree = insert_by_descent(self.tree, task, self._level_rows, self.kind, self.depth)
            strained = False
        if self.update == "auto" and (strained or task + 1 - self.built > GROWTH * self.built):
            self.rebuild()
            return True
        return False

    def rebuild(self) -> None:
        n = len(self.store)
        if self.kind == "linkage":
            self.tree = linkage_tree(self.store.condensed, n, self.linkage, self.depth)
        else:
            self.tree = kd_tree(np.arange(n), self._level_rows, self.kind, self.depth)
        self.built, self.strain = n, 0.0
        self.looseness = self._looseness(np.arange(n)) if n > 1 else 0.0

    def refresh(self, rows: Sequence[FloatArray]) -> None:
        """After signatures were replaced: rows[i] [N] holds the distances of task i; the tree is built anew."""
        self.nearest = np.array([np.delete(row, task).min(initial=np.inf) for task, row in enumerate(rows)])
        self.rebuild()

    def _looseness(self, tasks: IntArray) -> float:
        assert self.tree is not None
        height = self.tree.height[self.tree.parent[self.tree.node_of[tasks]]]
        return float(np.mean((height + 1e-3) / (self.nearest[tasks] + 1e-3)))  # the 1e-3 for identical tasks

    def _level_rows(self, tasks: IntArray, level: int) -> Tensor:
        rows = self.store.rows.layer(tasks, level)
        if not self.steps:
            return rows
        before = self.store.rows.layer(np.maximum(tasks - 1, 0), level)
        return torch.where(torch.from_numpy(tasks > 0).unsqueeze(-1), rows - before, rows)

    def tensors(self) -> dict[str, Tensor]:
        nearest = {"nearest": torch.from_numpy(self.nearest.copy())}
        return nearest if self.tree is None else {**nearest, **self.tree.state_dict()}

    def to_json(self) -> dict[str, Any]:
        return {"built": self.built, "looseness": self.looseness, "strain": self.strain}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        self.tree = Tree.from_state(tensors) if "parent" in tensors else None
        self.nearest = tensors["nearest"].numpy().copy()
        self.built, self.looseness, self.strain = data["built"], data["looseness"], data["strain"]
