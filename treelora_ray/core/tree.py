"""A tree over tasks: nested groups of tasks whose signatures are alike.

Nodes are numbered in preorder (a parent before its children, a subtree in one range of numbers), and the
tree is a few integer arrays that never change: inserting gives a new tree. A node is either a group or a
single task; every task is one node. `height` is the delta of Eq. (1) of the TreeLoRA paper: within which
distance a group's tasks lie (its merge height, or the median of a K-D split).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core.errors import GuideError
from treelora_ray.core.layout import FloatArray, IntArray


@dataclass(frozen=True)
class Tree:
    parent: IntArray  # [M], -1 at the root
    task: IntArray  # [M], the task number, -1 for a group
    height: FloatArray  # [M], 0 for a task

    @classmethod
    def from_nodes(cls, nodes: Iterable[tuple[int, int, float]]) -> Tree:
        """From (parent, task, height) of each node in preorder."""
        parent, task, height = zip(*nodes, strict=True)
        return cls(np.array(parent, np.int64), np.array(task, np.int64), np.array(height, np.float64))

    @classmethod
    def of_tasks(cls, tasks: Sequence[int], height: float = 0.0) -> Tree:
        """One group with the tasks as its children."""
        return cls.from_nodes([(-1, -1, height), *((0, task, 0.0) for task in tasks)])

    def __len__(self) -> int:
        return len(self.parent)

    # -- derived arrays, made when first asked for

    @cached_property
    def depth(self) -> IntArray:
        """[M] groups above each node."""
        depth = np.zeros(len(self), np.int64)
        for node in range(1, len(self)):  # preorder: the parent's depth is known
            depth[node] = depth[self.parent[node]] + 1
        return depth

    @cached_property
    def levels(self) -> list[IntArray]:
        """The nodes of each depth, the root's first."""
        order = np.argsort(self.depth, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.depth))[:-1])

    @cached_property
    def size(self) -> IntArray:
        """[M] tasks below each node, itself included."""
        size = (self.task >= 0).astype(np.int64)
        for nodes in reversed(self.levels[1:]):
            np.add.at(size, self.parent[nodes], size[nodes])
        return size

    @cached_property
    def end(self) -> IntArray:
        """[M] one past the last node of each subtree."""
        count = np.ones(len(self), np.int64)
        for nodes in reversed(self.levels[1:]):
            np.add.at(count, self.parent[nodes], count[nodes])
        return np.arange(len(self)) + count

    @cached_property
    def order(self) -> IntArray:
        """[N] all tasks from left to right; a subtree's tasks are order[first : first + size]."""
        return self.task[self.task >= 0]

    @cached_property
    def first(self) -> IntArray:
        """[M] tasks to the left of each node."""
        return np.asarray(np.cumsum(self.task >= 0) - (self.task >= 0), np.int64)

    @cached_property
    def node_of(self) -> IntArray:
        """[largest task + 1] the node of each task, -1 where the tree does not hold it."""
        where = np.full(int(self.order.max()) + 1, -1, np.int64)
        nodes = np.flatnonzero(self.task >= 0)
        where[self.task[nodes]] = nodes
        return where

    @cached_property
    def children(self) -> Children:
        return Children.of(self.parent)

    @property
    def tasks(self) -> IntArray:
        return np.sort(self.order)

    @property
    def max_depth(self) -> int:
        """The depth of the deepest group, the root's being 0; -1 for a lone task."""
        groups = self.depth[self.task < 0]
        return int(groups.max()) if len(groups) else -1

    # -- lookups

    def members(self, node: int) -> IntArray:
        """The tasks below a node, ascending."""
        return np.sort(self.order[self.first[node] : self.first[node] + self.size[node]])

    def node(self, task: int) -> int:
        """The node of a task."""
        if not 0 <= task < len(self.node_of) or self.node_of[task] < 0:
            raise GuideError(f"task {task} is not in the tree; it holds {len(self.order)} tasks")
        return int(self.node_of[task])

    def path(self, task: int) -> list[int]:
        """Groups from the root down to the one that holds the task."""
        node, path = int(self.parent[self.node(task)]), []
        while node >= 0:
            path.append(node)
            node = int(self.parent[node])
        return path[::-1]

    def siblings(self, task: int) -> IntArray:
        """The tasks of the smallest group around a task, without itself."""
        return np.setdiff1d(self.members(self.path(task)[-1]), [task])

    def groups(self, level: int) -> list[IntArray]:
        """A partition of the tasks: the nodes at depth `level`, and the tasks that end above it."""
        at = np.flatnonzero((self.depth == level) | ((self.task >= 0) & (self.depth < level)))
        return [self.members(int(node)) for node in at]

    def cut(self, height: float) -> list[IntArray]:
        """A partition of the tasks: the largest groups of at most this height."""
        reached = np.zeros(len(self), bool)
        reached[0] = True
        for nodes in self.levels[1:]:
            above = self.parent[nodes]
            reached[nodes] = reached[above] & (self.height[above] > height)
        at = np.flatnonzero(reached & ((self.height <= height) | (self.task >= 0)))
        return [self.members(int(node)) for node in at]

    def cut_into(self, groups: int) -> list[IntArray]:
        """The finest cut into at most this many groups."""
        if groups < 1:
            raise GuideError(f"the tasks cannot be cut into {groups} groups; at least 1 is needed")
        heights = np.unique([-np.inf, *self.height])
        at = bisect_left(heights, True, key=lambda height: len(self.cut(height)) <= groups)
        return self.cut(float(heights[at]))

    def families(self) -> list[IntArray]:
        """The tree's own view of which tasks are kin: the partition at the largest gap between heights.

        A gap counts as often as there are tasks in groups below it: else one tight pair would hide all other families.
        """
        heights = np.sort(self.height[self.task < 0])
        if len(heights) < 2:
            return self.cut(np.inf)
        joined = np.sort(self.height[self.parent[self.task >= 0]])
        gap = int(np.argmax(np.diff(heights) * np.searchsorted(joined, heights[:-1], side="right")))
        return self.cut(float(heights[gap] + heights[gap + 1]) / 2)

    # -- change

    def replace(self, node: int, part: Tree) -> Tree:
        """A new tree in which `part` stands where the subtree of `node` stood."""
        stop, shift = int(self.end[node]), len(part) - int(self.end[node] - node)
        inner = part.parent + node
        inner[0] = self.parent[node]
        after = self.parent[stop:]
        after = np.where(after >= stop, after + shift, after)
        return Tree(
            np.concatenate([self.parent[:node], inner, after]),
            np.concatenate([self.task[:node], part.task, self.task[stop:]]),
            np.concatenate([self.height[:node], part.height, self.height[stop:]]),
        )

    def subtree(self, node: int) -> Tree:
        stop = int(self.end[node])
        parent = self.parent[node:stop] - node
        parent[0] = -1
        return Tree(parent, self.task[node:stop], self.height[node:stop])

    def join(self, other: Tree, height: float) -> Tree:
        """A new group of this height above two trees."""
        parts = [Tree(np.array([-1]), np.array([-1]), np.array([height]))]
        parent, at = [parts[0].parent], 1
        for tree in (self, other):
            shifted = tree.parent + at
            shifted[0] = 0
            parent.append(shifted)
            parts.append(tree)
            at += len(tree)
        return Tree(
            np.concatenate(parent),
            np.concatenate([part.task for part in parts]),
            np.concatenate([part.height for part in parts]),
        )

    def adopt(self, task: int) -> Tree:
        """A new tree in which the root has one more child, the task."""
        return Tree(np.append(self.parent, 0), np.append(self.task, task), np.append(self.height, 0.0))

    # -- showing and storing

    def draw(self, names: Sequence[str]) -> str:
        """The tree as text, a line a node."""
        lines, last = [], np.zeros(len(self), bool)
        ends = self.end
        for node in range(len(self)):
            parent = int(self.parent[node])
            last[node] = parent >= 0 and ends[node] == ends[parent]
            label = names[self.task[node]] if self.task[node] >= 0 else f"δ {self.height[node]:.3f}"
            if parent < 0:
                lines.append(label)
                continue
            rails = []
            while self.parent[parent] >= 0:
                rails.append("   " if last[parent] else "│  ")
                parent = int(self.parent[parent])
            lines.append("".join(reversed(rails)) + ("└─ " if last[node] else "├─ ") + label)
        return "\n".join(lines)

    def to_data(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The nodes in preorder, each with what a figure needs."""
        return [
            {
                "node": node,
                "parent": int(self.parent[node]),
                "depth": int(self.depth[node]),
                "height": float(self.height[node]),
                "size": int(self.size[node]),
                "task": names[self.task[node]] if self.task[node] >= 0 else None,
            }
            for node in range(len(self))
        ]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("parent", "task", "height")}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Tree:
        return cls(*(state[name].numpy().copy() for name in ("parent", "task", "height")))


@dataclass(frozen=True)
class Children:
    """Children of node i: `ids[start[i] : start[i] + count[i]]`, ascending by `rank`, then by number."""

    start: IntArray
    count: IntArray
    ids: IntArray

    @classmethod
    def of(cls, parent: IntArray, rank: IntArray | None = None) -> Children:
        count = np.bincount(parent[parent >= 0], minlength=len(parent))
        order = np.argsort(parent, kind="stable") if rank is None else np.lexsort((rank, parent))
        ids = order[int((parent < 0).sum()) :]
        return cls(np.cumsum(count) - count, count, ids)

    def __getitem__(self, node: int) -> IntArray:
        return self.ids[self.start[node] : self.start[node] + self.count[node]]
