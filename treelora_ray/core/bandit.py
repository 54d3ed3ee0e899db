"""Who to compare with next: one search per task, all layers at once, deterministic.

A search works in rounds, one a mini-batch. `begin_round()`, then as often as the round allows `select()`
names for each layer a node of the tree (a task, or a group whose centroid stands for its tasks) and
`observe()` takes the distances seen. Distances lie mostly in [0, 1], lower is nearer; they are rounded to
1e-6 before they can decide anything, so that equal runs on different machines choose alike.

Confidence widths: `paper` is c sqrt(log t / n), `noise` is c sigma sqrt(log(t + 1) / n) with sigma, per
layer, the spread of repeated observations of one arm after the round's common shift is taken out. Within
a round the batch is the same, so an arm is observed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treelora_ray.core.layout import FloatArray, IntArray
from treelora_ray.core.nodes import NodeStats
from treelora_ray.core.tree import Tree

SearchKind = Literal["tree-lcb", "flat-lcb", "random", "exhaustive"]
Width = Literal["paper", "noise"]
NOISE_FLOOR = 1e-3
DIGITS = 6
NOTHING = -1  # selected for a layer that has nothing left to compare with in this round


class Search(ABC):
    """Statistics [L, arms] of what was observed, and the rule for what to observe next."""

    def __init__(self, layers: int, arms: int, c: float, width: Width) -> None:
        self.layers, self.arms, self.c, self.width = layers, arms, c, width
        self.lines = np.arange(layers)
        self.count = np.zeros((layers, arms), np.int64)
        self.total = np.zeros((layers, arms))
        self.fresh = np.ones((layers, arms), bool)  # not yet observed in this round
        self.pulls = 0  # of each layer, this task
        self.noise = Noise(layers)

    def begin_round(self) -> None:
        self.noise.end_round()
        self.fresh[:] = True

    @abstractmethod
    def select(self) -> IntArray:
        """[L] the node to compare each layer with, or NOTHING."""

    def observe(self, nodes: IntArray, x: FloatArray) -> None:
        """Distances [L] to the selected nodes; here nodes are tasks 0 .. arms - 1."""
        at = self.lines[nodes >= 0]
        arm, seen = nodes[at], np.round(x[at], DIGITS)
        self.noise.observe(at, seen, self.count[at, arm], self.total[at, arm])
        self.count[at, arm] += 1
        self.total[at, arm] = np.round(self.total[at, arm] + seen, DIGITS)  # the same whatever the order
        self.fresh[at, arm] = False
        self.pulls += 1

    @property
    def mean(self) -> FloatArray:
        """[L, arms] mean distance seen; infinite where an arm was never observed."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.count > 0, self.total / self.count, np.inf)

    def seen(self, this_round: bool = False) -> IntArray:
        """Tasks that any layer was compared with, ever or in this round."""
        return np.flatnonzero(((self.count > 0) & ~(self.fresh & this_round)).any(0))

    def widths(self, count: FloatArray | IntArray, lines: IntArray) -> FloatArray:
        """Confidence widths for observation counts [lines, ...]; infinite at 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.width == "paper":
                return np.asarray(self.c * np.sqrt(np.log(max(self.pulls, 1)) / count))
            scale = self.c * self.noise.sigma()[lines] * np.sqrt(np.log(self.pulls + 1))
            return np.asarray(scale[:, None] / np.sqrt(count))

    def lower_bounds(self) -> FloatArray:
        """[L, arms] mean - width; -inf where an arm was never observed."""
        with np.errstate(invalid="ignore"):
            return np.where(self.count > 0, self.mean - self.widths(self.count, self.lines), -np.inf)

    def tensors(self) -> dict[str, Tensor]:
        arrays = {"count": self.count, "total": self.total, "fresh": self.fresh, **self.noise.arrays()}
        arrays["pulls"] = np.array([self.pulls])
        return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        arrays = {name: value.numpy().copy() for name, value in tensors.items()}
        self.count, self.total, self.fresh = arrays["count"], arrays["total"], arrays["fresh"]
        self.pulls = int(arrays["pulls"][0])
        self.noise.load(arrays)


class Noise:
    """Spread of repeated observations of one arm, per layer, pooled over arms.

    Within a round the observations share their batch. What they have in common moves no choice, so with
    two or more repeats in a round their common shift is removed first.
    """

    def __init__(self, layers: int) -> None:
        self.squares = np.zeros(layers)
        self.freedom = np.zeros(layers)
        self.clear()

    def clear(self) -> None:
        layers = len(self.squares)
        self.round = np.zeros((4, layers))  # repeats, and sums of w, w e, w e^2 in the round

    def observe(self, at: IntArray, x: FloatArray, count: IntArray, total: FloatArray) -> None:
        again = count > 0
        lines, n = at[again], count[again]
        error = x[again] - total[again] / n
        weight = n / (n + 1)  # the variance of `error` is sigma^2 (1 + 1/n)
        for row, value in enumerate((1.0, weight, weight * error, weight * error**2)):
            self.round[row, lines] += value

    def end_round(self) -> None:
        repeats, weight, first, second = self.round
        several = repeats > 1
        shift = np.divide(first**2, weight, out=np.zeros_like(first), where=several)
        self.squares += second - shift
        self.freedom += repeats - several
        self.clear()

    def sigma(self) -> FloatArray:
        spread = np.sqrt(np.divide(self.squares, self.freedom, where=self.freedom > 0, out=0 * self.squares))
        return np.maximum(spread, NOISE_FLOOR)

    def arrays(self) -> dict[str, FloatArray]:
        return {"squares": self.squares, "freedom": self.freedom, "round": self.round}

    def load(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        self.squares, self.freedom, self.round = arrays["squares"], arrays["freedom"], arrays["round"]


class FlatLCB(Search):
    """The arm with the least lower bound; every arm once before any twice; ties to the oldest task."""

    def select(self) -> IntArray:
        bounds = np.where(self.fresh, self.lower_bounds(), np.inf)
        best = bounds.argmin(1)
        return np.where(self.fresh[self.lines, best], best, NOTHING)


class Exhaustive(Search):
    """All arms in turn: the one observed least often, the oldest first."""

    def select(self) -> IntArray:
        best = np.where(self.fresh, self.count, np.iinfo(np.int64).max).argmin(1)
        return np.where(self.fresh[self.lines, best], best, NOTHING)


class Random(Search):
    """Arms at random, without repeats in a round; the draw depends on the seed and the round only."""

    def __init__(self, layers: int, arms: int, c: float, width: Width, seed: int) -> None:
        super().__init__(layers, arms, c, width)
        self.seed = seed
        self.permuted: tuple[int, IntArray] | None = None

    def select(self) -> IntArray:
        taken = (~self.fresh).sum(1)
        start = self.pulls - int(taken.max())  # pulls before this round
        if self.permuted is None or self.permuted[0] != start:
            rng = np.random.default_rng((self.seed, start))
            self.permuted = start, rng.permuted(np.tile(np.arange(self.arms), (self.layers, 1)), axis=1)
        next_up = self.permuted[1][self.lines, np.minimum(taken, self.arms - 1)]
        return np.where(taken < self.arms, next_up, NOTHING)


class PooledTreeLCB(Search):
    """Eq. (2): the bottom-up bound over groups that pool the observations of their tasks.

        LCB(task) = mean - width(n)          -inf if n = 0
        LCB(group) = max(min over children, pooled mean - width(pooled n) - delta)

    Descend from the root to the child with the least bound. With `by_level` (the paper's K-D tree) level d
    of the tree belongs to layer d: layer d takes one step down from where layer d - 1 arrived, by its own
    statistics, and picks the task with the least bound there. Otherwise each layer descends to a task.
    """

    def __init__(self, layers: int, tree: Tree, c: float, width: Width, by_level: bool) -> None:
        super().__init__(layers, len(tree.order), c, width)
        self.tree, self.by_level = tree, by_level

    def select(self) -> IntArray:
        if self.by_level:
            return self._select_by_level()
        bounds = self._bounds(self.lines)
        at = np.zeros(self.layers, np.int64)
        below = self.tree.children
        while (group := self.tree.task[at] < 0).any():
            best = np.where(group, below.ids[np.where(group, below.start[at], 0)], at)
            for k in range(1, int(below.count[at].max())):
                has = k < below.count[at]
                other = below.ids[np.where(has, below.start[at] + k, 0)]
                better = has & (bounds[self.lines, other] < bounds[self.lines, best])
                best = np.where(better, other, best)
            at = best
        task = self.tree.task[at]
        return np.where(self.fresh[self.lines, task], task, NOTHING)

    def _select_by_level(self) -> IntArray:
        steps = min(self.layers, self.tree.max_depth + 1)
        bounds = self._bounds(np.arange(steps))
        tasks = np.where(self.fresh, self.lower_bounds(), np.inf)
        chosen, node = np.empty(self.layers, np.int64), 0
        for layer in range(self.layers):
            if layer < steps and self.tree.task[node] < 0:
                below = self.tree.children[node]
                node = int(below[np.argmin(bounds[layer, below])])
            elif layer > 0:  # arrived: all further layers choose in the same leaf
                arms = self.tree.members(node)
                chosen[layer:] = arms[tasks[layer:, arms].argmin(1)]
                break
            arms = self.tree.members(node)
            chosen[layer] = arms[np.argmin(tasks[layer, arms])]
        return np.where(self.fresh[self.lines, chosen], chosen, NOTHING)

    def _bounds(self, lines: IntArray) -> FloatArray:
        """[lines, M] bounds of all nodes; infinite where all tasks were observed in this round."""
        tree = self.tree
        count, total = self._pool(self.count[lines]), np.round(self._pool(self.total[lines]), DIGITS)
        left = self._pool(self.fresh[lines].astype(np.int64))
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = total / count - self.widths(count, lines) - tree.height
        bounds[count == 0] = -np.inf
        bounds[left == 0] = np.inf
        for nodes in reversed(tree.levels[1:]):
            parents, starts = np.unique(tree.parent[nodes], return_index=True)
            least = np.minimum.reduceat(bounds[:, nodes], starts, axis=1)
            bounds[:, parents] = np.maximum(bounds[:, parents], least)
        return np.asarray(bounds)

    def _pool(self, values: FloatArray | IntArray) -> FloatArray:
        """[lines, arms] -> [lines, M] sums over each node's tasks."""
        tree = self.tree
        sums = np.zeros((len(values), self.arms + 1))
        np.cumsum(values[:, tree.order], axis=1, out=sums[:, 1:])
        return np.asarray(sums[:, tree.first + tree.size] - sums[:, tree.first])


class BestFirstTreeLCB(Search):
    """Bottom-up bounds evaluated lazily, with one comparison per group instead of pooled ones.

    A group's bound is its estimated distance less its slack (`NodeStats`). A child nobody has looked at
    inherits its parent's bound, so taking the least bound of the frontier is the descent of Eq. (2), and
    the cost of a pull depends on the pulls made, not on the number of tasks. To be called with the mean
    of the task's gradients so far: a node is then looked at once, and there is no width to weigh it by.

    Frontier entries are columns [L, used]: a group's entry hands out its children, the smaller first. A
    group's mean square is the mean of its parts', so that of two halves one comparison gives both.
    """

    def __init__(self, layers: int, tree: Tree, stats: NodeStats) -> None:
        super().__init__(layers, 1, 0.0, "noise")
        self.tree, self.stats = tree, stats
        self.below = stats.search_children()
        self.slack = stats.slack(tree.size)
        self.halves_known = stats.store.distance != "l1"
        self.round = 0
        self.used = 1  # the root's entry, never compared with
        self.node = np.zeros((layers, 1), np.int64)
        self.cursor = np.zeros((layers, 1), np.int64)
        self.born = np.zeros((layers, 1), np.int64)  # round in which the entry was made
        self.estimate = np.zeros((layers, 1))
        self.bounds = np.full((layers, 1), -np.inf)  # infinite where an entry has nothing left to hand out
        self.entry = np.zeros(layers, np.int64)  # whose child `select` named

    def begin_round(self) -> None:
        self.round += 1

    def select(self) -> IntArray:
        self.entry = self.bounds[:, : self.used].argmin(1)
        node, cursor = self.node[self.lines, self.entry], self.cursor[self.lines, self.entry]
        open_ = self.bounds[self.lines, self.entry] < np.inf
        return np.where(open_, self.below.ids[np.where(open_, self.below.start[node] + cursor, 0)], NOTHING)

    def observe(self, nodes: IntArray, x: FloatArray) -> None:
        """Distances [L] to the selected nodes: to a task's direction or to a group's centroid."""
        self.pulls += 1
        lines = self.lines[nodes >= 0]
        node, entry = nodes[lines], self.entry[lines]
        row = self.stats.row[node]
        spread = np.where(row >= 0, self.stats.spreads[row, lines], 0.0)
        square = np.round(x[lines], DIGITS) ** 2 + spread
        self.cursor[lines, entry] += 1
        self._enter(lines, node, np.sqrt(square))
        if self.halves_known:
            self._enter_other_half(lines, node, entry, square)
        spent = self.cursor[lines, entry] >= self.below.count[self.node[lines, entry]]
        self.bounds[lines[spent], entry[spent]] = np.inf

    def _enter_other_half(self, lines: IntArray, node: IntArray, entry: IntArray, square: FloatArray) -> None:
        whole = self.node[lines, entry]
        other = self.below.ids[self.below.start[whole] + self.below.count[whole] - 1]
        given = (self.below.count[whole] == 2) & (other != node) & (self.born[lines, entry] == self.round)
        lines, node, entry, whole, other = lines[given], node[given], entry[given], whole[given], other[given]
        size = self.tree.size
        rest = self.estimate[lines, entry] ** 2 * size[whole] - square[given] * size[node]
        self.cursor[lines, entry] += 1
        self._enter(lines, other, np.sqrt(np.maximum(rest / size[other], 0.0)))

    def _enter(self, lines: IntArray, node: IntArray, estimate: FloatArray) -> None:
        """One more column: an entry for each of the lines, a closed one for the others."""
        if self.used == self.node.shape[1]:
            self._grow()
        at = lines, self.used
        self.used += 1
        self.node[at], self.estimate[at], self.born[at] = node, estimate, self.round
        slack = self.slack[node] * self.stats.sigma[lines]
        self.bounds[at] = np.where(self.tree.task[node] < 0, estimate - slack, np.inf)

    def _grow(self) -> None:
        more = max(64, self.used)
        for name, fill in (("node", -1), ("cursor", 0), ("born", -1), ("estimate", np.inf), ("bounds", np.inf)):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full((self.layers, more), fill, old.dtype)], 1))

    def seen(self, this_round: bool = False) -> IntArray:
        node, born = self.node[:, : self.used], self.born[:, : self.used]
        known = (born >= 0) & ((born == self.round) | (not this_round))
        return np.unique(self.tree.task[node[known & (self.tree.task[node] >= 0)]])

    def tensors(self) -> dict[str, Tensor]:
        kept = {name: getattr(self, name) for name in ("node", "cursor", "born", "estimate", "bounds")}
        kept["counters"] = np.array([self.used, self.round, self.pulls])
        return {name: torch.from_numpy(np.array(value)) for name, value in kept.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("node", "cursor", "born", "estimate", "bounds"):
            setattr(self, name, tensors[name].numpy().copy())
        self.used, self.round, self.pulls = (int(n) for n in tensors["counters"])
