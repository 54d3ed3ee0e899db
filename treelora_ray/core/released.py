"""The search of the released TreeLoRA code, kept to reproduce numbers obtained with it; never a default.

It adds its confidence bonus to mean *distances* and draws tasks by a softmax of the sum, so that it prefers
distant tasks; of the tree it uses the two children of the root only. docs/fidelity.md lists the rest.
"""

from __future__ import annotations

import numpy as np

from treelora_ray.core.bandit import Search
from treelora_ray.core.layout import FloatArray, IntArray
from treelora_ray.core.tree import Tree


class ReleasedSearch(Search):
    """Statistics start again every epoch of `steps_per_epoch` micro-batches; one round a micro-batch."""

    def __init__(self, layers: int, tree: Tree, depth: int, steps_per_epoch: int, seed: int) -> None:
        super().__init__(layers, len(tree.order), 1.0, "paper")
        self.tree, self.depth, self.steps_per_epoch, self.seed = tree, depth, steps_per_epoch, seed

    def begin_round(self) -> None:
        super().begin_round()
        if self.pulls % self.steps_per_epoch == 0:
            self.count[:], self.total[:] = 0, 0.0

    def scores(self) -> FloatArray:
        """sigma [arms, L] before the tree has its say."""
        t = self.pulls % self.steps_per_epoch
        count = self.count.T
        mean = np.divide(self.total.T, count, out=np.zeros(count.shape), where=count > 0)
        bonus = np.sqrt(np.log(2 * self.steps_per_epoch * (t + 1) * (t + 2))) / np.sqrt(2 * count + 1e-5)
        sigma = mean + bonus
        return np.asarray(sigma + sigma.min())

    def probabilities(self, favourite: int | None) -> FloatArray:
        """[arms, L]; the branch of the root that holds the favourite is scaled by its own median."""
        sigma = self.scores()
        if favourite is not None:
            for child in self.tree.children[0]:
                members = self.tree.members(int(child))
                if favourite in members:
                    leaf = self.tree.task[child] >= 0 or self.tree.depth[child] == self.depth
                    sigma[members] *= 1.0 if leaf else min(float(self.tree.height[child]), 1.5)
        return softmax(sigma / (sigma.max() - sigma.min() + 1e-5))

    def select(self) -> IntArray:
        rng = np.random.default_rng((self.seed, self.pulls))
        favourite = None
        if self.arms > 1 and self.depth > 0:
            favourite = int(rng.choice(self.arms, p=softmax(self.scores().sum(1))))
        cumulative = np.cumsum(self.probabilities(favourite), axis=0)
        draws = rng.random(self.layers)
        return np.asarray((cumulative < draws).sum(0).clip(max=self.arms - 1), np.int64)


def softmax(scores: FloatArray) -> FloatArray:
    """Over the first axis."""
    weights = np.exp(scores - scores.max(0))
    return np.asarray(weights / weights.sum(0))
