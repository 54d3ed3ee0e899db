from __future__ import annotations

import numpy as np
import pytest

from treelora_ray.core.released import ReleasedSearch, softmax
from treelora_ray.core.tree import Tree

TWO_BRANCHES = Tree.from_nodes([(-1, -1, 0.3), (0, -1, 0.5), (1, 0, 0.0), (1, 1, 0.0), (0, 2, 0.0)])


def search_of(layers: int = 1, depth: int = 4, steps: int = 100, tree: Tree = TWO_BRANCHES) -> ReleasedSearch:
    search = ReleasedSearch(layers, tree, depth, steps, seed=3)
    search.begin_round()
    return search


def test_golden_means_1_5_9_after_30_pulls_each_give_the_probabilities_of_the_released_code() -> None:
    search = search_of()
    search.count[:], search.total[:] = 30, 30 * np.array([1.0, 5.0, 9.0])
    assert search.probabilities(None).ravel() == pytest.approx([0.186, 0.307, 0.506], abs=1e-3)


def test_the_bonus_is_the_released_formula() -> None:
    search = search_of(steps=10)
    search.pulls = 4
    search.count[:] = [[2, 0, 5]]
    bonus = np.sqrt(np.log(2 * 10 * 5 * 6)) / np.sqrt(2 * np.array([2, 0, 5]) + 1e-5)
    assert search.scores().ravel() == pytest.approx(bonus + bonus.min())


def test_it_prefers_distant_tasks_as_the_released_code_does() -> None:
    search = search_of(layers=200)
    search.count[:], search.total[:] = 30, 30 * np.array([0.1, 0.5, 0.9])
    search.pulls = 30
    drawn = np.bincount(search.select(), minlength=3)
    assert drawn[2] > drawn[0]


def test_the_favourites_branch_is_scaled_by_its_own_median() -> None:
    search = search_of()
    search.count[:], search.total[:] = 3, 3 * np.array([1.0, 1.0, 1.0])
    sigma = search.scores()
    scaled = sigma.copy()
    scaled[:2] *= 0.5
    expected = softmax(scaled / (scaled.max() - scaled.min() + 1e-5))
    assert search.probabilities(0) == pytest.approx(expected)
    even = softmax(sigma / 1e-5)  # a leaf counts 1, so nothing changes
    assert search.probabilities(2) == pytest.approx(even)


def test_the_branch_factor_is_capped_and_a_leaf_at_the_cap_counts_one() -> None:
    steep = Tree(TWO_BRANCHES.parent, TWO_BRANCHES.task, np.array([0.3, 7.0, 0.0, 0.0, 0.0]))
    capped, leaf = search_of(tree=steep), search_of(tree=steep, depth=1)
    sigma = capped.scores()
    scaled = sigma.copy()
    scaled[:2] *= 1.5
    assert capped.probabilities(1) == pytest.approx(softmax(scaled / (scaled.max() - scaled.min() + 1e-5)))
    assert leaf.probabilities(1) == pytest.approx(softmax(sigma / (sigma.max() - sigma.min() + 1e-5)))


def test_statistics_start_again_every_epoch() -> None:
    search = ReleasedSearch(2, TWO_BRANCHES, 4, steps_per_epoch=5, seed=0)
    for step in range(12):
        search.begin_round()
        assert search.count.sum() == 2 * (step % 5)
        search.observe(search.select(), np.array([0.5, 0.5]))


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    search = search_of(layers=4000)
    search.count[:], search.total[:] = 30, 30 * np.array([1.0, 5.0, 9.0])
    search.tree = Tree.of_tasks([0, 1, 2])
    drawn = search.select()
    assert (drawn == search.select()).all()
    expected = np.array([0.186, 0.307, 0.506])
    favourite_left = np.bincount(drawn, minlength=3) / 4000
    assert favourite_left == pytest.approx(expected, abs=0.03)
