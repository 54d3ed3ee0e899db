from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.planted import Planted, adjusted_rand, as_labels, planted, planted_cosine
from treelora_ray.core import grow
from treelora_ray.core.grow import (
    Linkage,
    TreeKeeper,
    TreeKind,
    TreeUpdate,
    inner_split,
    insert_by_descent,
    insert_by_linkage,
    kd_tree,
    linkage_tree,
    radius_split,
)
from treelora_ray.core.layout import FloatArray, IntArray, Layout
from treelora_ray.core.signature import Distance
from treelora_ray.core.store import SignatureStore
from treelora_ray.core.tree import Tree

KINDS = get_args(TreeKind)
LINKAGES = get_args(Linkage)
UPDATES = get_args(TreeUpdate)
LAYOUT = Layout.of_sizes([5, 3, 4])
quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**32 - 1)
kinds, linkages, updates = (st.sampled_from(names) for names in (KINDS, LINKAGES, UPDATES))
depths = st.sampled_from([1, 2, 3, 64])


def normal(n: int, seed: int, layout: Layout = LAYOUT) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, layout.total))).float()


@st.composite
def signatures(draw: st.DrawFn, least: int = 1, most: int = 12) -> Tensor:
    """Random ones; some equal, some zero."""
    pool = normal(most, draw(seeds))
    pool[0] = 0
    return pool[draw(st.lists(st.integers(0, most - 1), min_size=least, max_size=most))]


def keeper_of(
    rows: Tensor,
    kind: TreeKind = "linkage",
    linkage: Linkage = "average",
    depth: int = 64,
    update: TreeUpdate = "rebuild",
    steps: bool = False,
    distance: Distance = "l1",
    layout: Layout = LAYOUT,
) -> TreeKeeper:
    keeper = TreeKeeper(SignatureStore(layout, distance), kind, linkage, depth, update, steps)
    extend(keeper, rows)
    return keeper


def extend(keeper: TreeKeeper, rows: Tensor) -> list[bool]:
    """Adds tasks; for each, whether the tree was rebuilt."""
    return [keeper.add(keeper.store.append(row)) for row in rows]


def grown(keeper: TreeKeeper) -> Tree:
    assert keeper.tree is not None
    return keeper.tree


def groups_in(tree: Tree) -> list[int]:
    return np.flatnonzero(tree.task < 0).tolist()


def groups_of(tree: Tree, names: Sequence[int] | IntArray | None = None) -> set[frozenset[int]]:
    """The tasks of each group; tasks renamed."""
    return {
        frozenset(int(task if names is None else names[task]) for task in tree.members(node))
        for node in groups_in(tree)
    }


def sets(partition: Sequence[IntArray]) -> set[frozenset[int]]:
    return {frozenset(map(int, members)) for members in partition}


def nesting(tree: Tree, node: int = 0) -> object:
    """Groups as lists of tasks and groups."""
    if tree.task[node] >= 0:
        return int(tree.task[node])
    return [nesting(tree, int(child)) for child in tree.children[node]]


def on_a_line(places: Sequence[float]) -> FloatArray:
    """All distances of points on a line."""
    return np.abs(np.subtract.outer(places, places))


def condensed(distances: FloatArray) -> FloatArray:
    """As `SignatureStore.condensed`: of tasks numbered from the last to the first."""
    backwards = distances[::-1, ::-1]
    return backwards[np.triu_indices(len(distances), 1)]


def build(distances: FloatArray, method: Linkage = "average", depth: int = 64) -> Tree:
    return linkage_tree(condensed(distances), len(distances), method, depth)


def insert_all(distances: FloatArray, method: Linkage = "average", depth: int = 64, built: int = 1) -> Tree:
    tree = build(distances[:built, :built], method, depth)
    for task in range(built, len(distances)):
        tree = insert_by_linkage(tree, task, distances[task, :task], method, depth)
    return tree


def all_pairs(store: SignatureStore) -> FloatArray:
    return np.stack([store.pair_row(task) for task in range(len(store))])


def assert_heights_never_rise(tree: Tree) -> None:
    below = np.arange(1, len(tree))
    assert (tree.height[tree.parent[below]] >= tree.height[below] - 1e-12).all()


# -- every kind


@given(signatures(), kinds, linkages, updates, depths)
@settings(deadline=None, max_examples=150)
def test_each_task_is_in_exactly_one_leaf_and_groups_lie_within_the_cap(
    rows: Tensor, kind: TreeKind, linkage: Linkage, update: TreeUpdate, depth: int
) -> None:
    tree = grown(keeper_of(rows, kind, linkage, depth, update))
    n = len(rows)
    assert tree.tasks.tolist() == list(range(n))
    assert (tree.parent[1:] < np.arange(1, len(tree))).all()
    assert all(tree.parent[node] >= first for first in range(len(tree)) for node in range(first + 1, tree.end[first]))
    assert 0 <= tree.max_depth <= (depth if kind == "linkage" else min(depth, len(LAYOUT)))
    assert (tree.children.count[tree.task < 0] >= min(n, 2)).all()
    assert (tree.height[tree.task >= 0] == 0).all()
    partitions = [tree.groups(level) for level in range(tree.max_depth + 3)]
    partitions += [tree.cut(height) for height in np.unique(tree.height)]
    for partition in partitions:
        assert np.sort(np.concatenate(partition)).tolist() == list(range(n))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
class TestFewTasks:
    def test_one_task_is_a_group_of_one(self, kind: TreeKind, update: TreeUpdate) -> None:
        keeper = keeper_of(normal(1, 0), kind, update=update)
        assert nesting(grown(keeper)) == [0]
        assert grown(keeper).height.tolist() == [0, 0]
        assert keeper.nearest.tolist() == [np.inf]

    def test_two_tasks_are_a_pair(self, kind: TreeKind, update: TreeUpdate) -> None:
        keeper = keeper_of(normal(2, 0), kind, update=update)
        assert nesting(grown(keeper)) in ([0, 1], [1, 0])
        if kind == "linkage":
            assert grown(keeper).height[0] == keeper.store.pair_row(0)[1]

    def test_two_identical_tasks_are_a_pair_of_height_zero(self, kind: TreeKind, update: TreeUpdate) -> None:
        keeper = keeper_of(normal(1, 0).repeat(2, 1), kind, update=update)
        assert nesting(grown(keeper)) in ([0, 1], [1, 0])
        assert keeper.nearest.tolist() == [0, 0]
        if kind != "kd-inner":  # whose height is an inner product
            assert grown(keeper).height[0] == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("distance", ["l1", "cosine", "l2"])
    def test_zero_signatures_are_tasks_like_others(
        self, kind: TreeKind, update: TreeUpdate, distance: Distance
    ) -> None:
        rows = torch.cat([torch.zeros(3, LAYOUT.total), normal(2, 0), torch.zeros(1, LAYOUT.total)])
        tree = grown(keeper_of(rows, kind, update=update, distance=distance))
        assert tree.tasks.tolist() == list(range(6))
        assert np.isfinite(tree.height).all()
        if kind == "linkage":
            assert frozenset({0, 1, 2, 5}) in groups_of(tree)

    def test_only_zero_signatures(self, kind: TreeKind, update: TreeUpdate) -> None:
        tree = grown(keeper_of(torch.zeros(5, LAYOUT.total), kind, update=update))
        assert tree.tasks.tolist() == list(range(5))
        assert (tree.height == 0).all()


@pytest.mark.parametrize("kind", KINDS)
class TestOrder:
    @given(seeds, st.integers(2, 12).flatmap(lambda n: st.permutations(range(n))), linkages, depths)
    @quick
    def test_a_rebuild_after_inserts_in_any_order_equals_a_build_from_scratch(
        self, kind: TreeKind, seed: int, order: list[int], linkage: Linkage, depth: int
    ) -> None:
        layout = Layout.of_sizes([40, 32, 40])  # in few dimensions l1 distances tie, and ties go by task number
        rows = normal(len(order), seed, layout)
        scratch = groups_of(grown(keeper_of(rows, kind, linkage, depth, layout=layout)))
        for update in UPDATES:
            keeper = keeper_of(rows[order], kind, linkage, depth, update, layout=layout)
            if update == "insert":
                keeper.rebuild()
            assert groups_of(grown(keeper), order) == scratch

    def test_a_keeper_that_rebuilds_agrees_with_the_builders(self, kind: TreeKind) -> None:
        keeper = keeper_of(normal(9, 3), kind, "complete")
        store = keeper.store
        if kind == "linkage":
            expected = linkage_tree(store.condensed, 9, "complete", 64)
        else:
            expected = kd_tree(np.arange(9), store.rows.layer, kind, 3)
        assert nesting(grown(keeper)) == nesting(expected)
        assert grown(keeper).height.tolist() == expected.height.tolist()


# -- linkage


class TestLinkage:
    def test_average_linkage_of_points_on_a_line(self) -> None:
        tree = build(on_a_line([0, 10, 1, 12, 40]))
        assert nesting(tree) == [[[0, 2], [1, 3]], 4]
        assert tree.height[tree.task < 0].tolist() == pytest.approx([34.25, 10.5, 1, 2])

    def test_complete_linkage_of_points_on_a_line(self) -> None:
        tree = build(on_a_line([0, 10, 1, 12, 40]), "complete")
        assert nesting(tree) == [[[0, 2], [1, 3]], 4]
        assert tree.height[tree.task < 0].tolist() == pytest.approx([40, 12, 1, 2])

    def test_the_cap_collects_deeper_tasks_in_a_leaf(self) -> None:
        distances = on_a_line([0, 10, 1, 12, 40])
        assert nesting(build(distances, depth=1)) == [[0, 1, 2, 3], 4]
        assert nesting(build(distances, depth=0)) == [0, 1, 2, 3, 4]
        assert build(distances, depth=1).height[:2].tolist() == pytest.approx([34.25, 10.5])

    @given(signatures(least=2), linkages, depths, st.integers(1, 12))
    @quick
    def test_heights_never_rise_from_a_group_to_its_parts(
        self, rows: Tensor, linkage: Linkage, depth: int, built: int
    ) -> None:
        distances = all_pairs(keeper_of(rows).store)
        assert_heights_never_rise(build(distances, linkage, depth))
        assert_heights_never_rise(insert_all(distances, linkage, depth, min(built, len(rows))))

    @given(signatures(least=2), depths, st.integers(1, 12), st.integers(0, 20))
    @settings(deadline=None, max_examples=60)
    def test_complete_linkage_groups_are_pairwise_within_their_height_as_in_eq_1(
        self, rows: Tensor, depth: int, built: int, twentieths: int
    ) -> None:
        store = keeper_of(rows).store
        means = torch.stack(
            [store.from_rows(store.rows[task], np.arange(len(rows))).mean(1) for task in range(len(rows))]
        )
        distances = all_pairs(store)
        np.testing.assert_allclose(distances, means.numpy(), atol=1e-6)
        for tree in (
            build(distances, "complete", depth),
            insert_all(distances, "complete", depth, min(built, len(rows))),
        ):
            for node in groups_in(tree):
                members = tree.members(node)
                assert distances[np.ix_(members, members)].max() == pytest.approx(tree.height[node], abs=1e-9)
            delta = twentieths / 20
            for members in tree.cut(delta):
                assert distances[np.ix_(members, members)].max() <= delta

    @given(signatures(least=2))
    @quick
    def test_average_linkage_heights_are_mean_distances_between_the_two_parts(self, rows: Tensor) -> None:
        distances = all_pairs(keeper_of(rows).store)
        tree = build(distances)
        for node in groups_in(tree):
            left, right = (tree.members(int(child)) for child in tree.children[node])
            assert distances[np.ix_(left, right)].mean() == pytest.approx(tree.height[node], abs=1e-9)

    def test_children_stand_in_the_order_of_their_oldest_task(self) -> None:
        tree = build(all_pairs(keeper_of(normal(12, 5)).store))
        for node in groups_in(tree):
            oldest = [tree.members(int(child))[0] for child in tree.children[node]]
            assert oldest == sorted(oldest)


class TestNearDuplicates:
    @pytest.mark.parametrize("linkage", LINKAGES)
    @pytest.mark.parametrize("epsilon", [0.0, 1e-3])
    @given(seeds, st.integers(2, 20), st.data())
    @quick
    def test_near_duplicates_become_siblings_by_build_and_by_insertion(
        self, linkage: Linkage, epsilon: float, seed: int, n: int, data: st.DataObject
    ) -> None:
        twin = data.draw(st.integers(0, n - 1))
        rows = normal(n + 1, seed)
        rows[n] = rows[twin] + epsilon * rows[n]
        distances = all_pairs(keeper_of(rows).store)
        for built in (n + 1, n, 1):
            tree = insert_all(distances, linkage, built=built)
            assert tree.siblings(n).tolist() == [twin]
            assert tree.siblings(twin).tolist() == [n]

    @pytest.mark.parametrize("linkage", LINKAGES)
    def test_near_duplicates_share_a_leaf_at_the_cap(self, linkage: Linkage) -> None:
        rows = normal(21, 0)
        for twin in range(20):
            rows[20] = rows[twin]
            tree = insert_all(all_pairs(keeper_of(rows).store), linkage, depth=2, built=20)
            assert twin in tree.siblings(20)

    @pytest.mark.parametrize("twin", [0, 1])
    @pytest.mark.parametrize("kind", ["kd-radius", "kd-inner"])
    @given(seeds)
    @quick
    def test_the_near_duplicate_of_one_of_two_tasks_joins_it_in_a_split_tree(
        self, kind: TreeKind, twin: int, seed: int
    ) -> None:
        rows = normal(3, seed)
        rows[2] = rows[twin] + 1e-3 * rows[2]
        tree = grown(keeper_of(rows, kind, update="insert"))
        assert tree.siblings(2).tolist() == [twin]


class TestInsertByLinkage:
    """Points on a line: 0 and 1 a pair, 10 and 12 a pair."""

    places = (0.0, 10.0, 1.0, 12.0)

    def inserted(self, place: float, method: Linkage = "average", depth: int = 64) -> Tree:
        return insert_all(on_a_line([*self.places, place]), method, depth, built=4)

    def heights(self, tree: Tree) -> list[float]:
        return tree.height[tree.task < 0].tolist()

    def test_beside_a_task_nearer_than_its_sibling(self) -> None:
        tree = self.inserted(12.5)
        assert nesting(tree) == [[0, 2], [1, [3, 4]]]
        assert self.heights(tree) == pytest.approx([10.5, 1, 2, 0.5])

    def test_beside_a_pair_that_is_nearer_than_the_other_pair(self) -> None:
        tree = self.inserted(15.0)
        assert nesting(tree) == [[0, 2], [[1, 3], 4]]
        assert self.heights(tree) == pytest.approx([10.5, 1, 4, 2])

    def test_above_the_root_if_further_than_the_two_halves(self) -> None:
        tree = self.inserted(40.0)
        assert nesting(tree) == [[[0, 2], [1, 3]], 4]
        assert self.heights(tree) == pytest.approx([34.25, 10.5, 1, 2])

    def test_complete_linkage_raises_the_groups_above(self) -> None:
        tree = self.inserted(12.5, "complete")
        assert nesting(tree) == [[0, 2], [1, [3, 4]]]
        assert self.heights(tree) == pytest.approx([12.5, 1, 2.5, 0.5])

    def test_a_group_never_stands_lower_than_its_parts(self) -> None:
        # Tasks 0 and 1 a pair at 1; 2 at 1.5 from both. The new task is too far from the pair, but in the mean
        # nearer to all three than these are to each other.
        distances = np.array([[0, 1, 1.5, 1.1], [1, 0, 1.5, 2.1], [1.5, 1.5, 0, 1.11], [1.1, 2.1, 1.11, 0]])
        tree = insert_all(distances, built=3)
        assert nesting(tree) == [[[0, 1], 2], 3]
        assert self.heights(tree) == [1.5, 1.5, 1]

    def test_at_the_cap_the_leaf_takes_one_more_task(self) -> None:
        tree = self.inserted(12.5, depth=1)
        assert nesting(tree) == [[0, 2], [1, 3, 4]]
        assert self.heights(tree) == pytest.approx([10.5, 1, 2])

    def test_a_group_without_room_for_a_group_above_it_leaves_the_task_to_its_parent(self) -> None:
        tree = self.inserted(15.0, depth=1)
        assert nesting(tree) == [[0, 2], [1, 3], 4]
        assert self.heights(tree) == pytest.approx([10.5, 1, 2])

    @pytest.mark.parametrize(("method", "height"), [("average", 34.25), ("complete", 40)])
    def test_a_root_without_room_above_takes_the_task_and_its_distance_as_height(
        self, method: Linkage, height: float
    ) -> None:
        tree = self.inserted(40.0, method, depth=1)
        assert nesting(tree) == [[0, 2], [1, 3], 4]
        assert tree.height[0] == pytest.approx(height)

    @pytest.mark.parametrize("linkage", LINKAGES)
    @pytest.mark.parametrize("seed", range(3))
    def test_a_new_member_lands_in_its_familys_subtree(self, linkage: Linkage, seed: int) -> None:
        store, data = stored((3, 5, 9, 15), 0, "noise", 1.5, "cosine", seed)
        distances = all_pairs(store)
        last = len(data.labels) - 1
        for task in range(len(data.labels)):
            order = [*(other for other in range(last + 1) if other != task), task]
            tree = insert_all(distances[np.ix_(order, order)], linkage, built=last)
            family = {order.index(kin) for kin in np.flatnonzero(data.labels == data.labels[task]).tolist()}
            assert set(tree.siblings(last)) <= family
            assert frozenset(family) in groups_of(tree)

    @pytest.mark.parametrize("linkage", LINKAGES)
    @pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (3, 5, 9, 15), (4,) * 12])
    def test_a_tree_grown_by_insertion_alone_finds_the_families(self, linkage: Linkage, sizes: tuple[int, ...]) -> None:
        assert rand_index(lambda store: insert_all(all_pairs(store), linkage), sizes, 0, "noise", 1.5, "cosine") >= 0.95


# -- families

SHAPES = [((8, 8, 8, 8), 0), ((3, 5, 9, 15), 0), ((4,) * 12, 0), ((8, 8), 10)]
MAKERS: dict[str, Callable[[Sequence[int], float, int, int], Planted]] = {"noise": planted, "cosine": planted_cosine}


@cache
def stored(
    sizes: tuple[int, ...], loners: int, maker: str, value: float, distance: Distance, seed: int
) -> tuple[SignatureStore, Planted]:
    data = MAKERS[maker](sizes, value, loners, seed)
    return data.store(distance), data


def rand_index(
    tree_of: Callable[[SignatureStore], Tree],
    sizes: tuple[int, ...],
    loners: int,
    maker: str,
    value: float,
    distance: Distance,
) -> float:
    """Mean over seeds, cut into the true number of groups."""
    found = []
    for seed in range(3):
        store, data = stored(sizes, loners, maker, value, distance, seed)
        found.append(adjusted_rand(as_labels(tree_of(store).cut_into(data.families)), data.labels))
    return float(np.mean(found))


def scratch(store: SignatureStore, linkage: Linkage) -> Tree:
    return linkage_tree(store.condensed, len(store), linkage, 64)


class TestFamilies:
    @pytest.mark.parametrize("linkage", LINKAGES)
    @pytest.mark.parametrize("distance", ["l1", "cosine"])
    @pytest.mark.parametrize("noise", [0.5, 1.5])
    @pytest.mark.parametrize(("sizes", "loners"), SHAPES)
    def test_linkage_recovers_planted_families(
        self, sizes: tuple[int, ...], loners: int, noise: float, distance: Distance, linkage: Linkage
    ) -> None:
        tree_of = partial(scratch, linkage=linkage)
        assert rand_index(tree_of, sizes, loners, "noise", noise, distance) >= 0.95

    @pytest.mark.parametrize("distance", ["l1", "cosine"])
    @pytest.mark.parametrize("cosine", [0.15, 0.25, 0.35])
    @pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (3, 5, 9, 15)])
    def test_average_linkage_recovers_families_of_little_likeness(
        self, sizes: tuple[int, ...], cosine: float, distance: Distance
    ) -> None:
        tree_of = partial(scratch, linkage="average")
        assert rand_index(tree_of, sizes, 0, "cosine", cosine, distance) >= 0.8

    @pytest.mark.parametrize("linkage", LINKAGES)
    @pytest.mark.parametrize(("sizes", "loners"), SHAPES)
    def test_the_largest_gap_between_heights_finds_planted_families(
        self, sizes: tuple[int, ...], loners: int, linkage: Linkage
    ) -> None:
        for seed in range(3):
            store, data = stored(sizes, loners, "noise", 0.5, "cosine", seed)
            assert adjusted_rand(as_labels(scratch(store, linkage).families()), data.labels) == 1

    def test_a_family_of_one_task_is_a_group_of_its_own(self) -> None:
        data = planted([4, 4], 0.5, loners=2)
        tree = grown(keeper_of(data.signatures, layout=data.layout))
        assert {1, 4} == {len(members) for members in tree.cut_into(4)}


class TestPlanted:
    def test_equal_partitions_have_index_one(self) -> None:
        assert adjusted_rand([0, 0, 1, 1, 2], [5, 5, 3, 3, 9]) == 1
        assert adjusted_rand([0, 0, 0], [1, 1, 1]) == 1
        assert adjusted_rand([0, 1, 2], [2, 1, 0]) == 1
        assert adjusted_rand([0], [3]) == 1
        assert adjusted_rand([], []) == 1

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),
            ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
            ([0, 0, 0, 0], [0, 1, 2, 3], 0),
            ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 8 / 33),
        ],
    )
    def test_index_of_small_partitions_by_hand(self, a: list[int], b: list[int], expected: float) -> None:
        assert adjusted_rand(a, b) == adjusted_rand(b, a) == pytest.approx(expected)

    def test_random_partitions_have_index_zero_in_the_mean(self) -> None:
        rng = np.random.default_rng(0)
        found = [adjusted_rand(rng.integers(0, 4, 40), rng.integers(0, 3, 40)) for _ in range(400)]
        assert abs(np.mean(found)) < 0.01

    def test_partitions_of_different_tasks_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="of 2 and 3 tasks"):
            adjusted_rand([0, 1], [0, 1, 2])

    def test_a_partition_becomes_labels(self) -> None:
        assert as_labels([np.array([3, 0]), np.array([1]), np.array([2])]).tolist() == [0, 1, 2, 0]

    @pytest.mark.parametrize("cosine", [0.15, 0.35])
    def test_planted_cosines_are_what_they_say(self, cosine: float) -> None:
        data = planted_cosine([8, 8, 8, 8], cosine, seed=1, layers=3, values=2000)
        segments = torch.nn.functional.normalize(data.signatures.view(32, 3, 2000), dim=2)
        cosines = torch.einsum("ilv,jlv->ijl", segments, segments).numpy()
        kin = (data.labels[:, None] == data.labels) & ~np.eye(32, dtype=bool)
        assert cosines[kin].mean(0) == pytest.approx(np.full(3, cosine), abs=0.02)
        assert cosines[~kin & ~np.eye(32, dtype=bool)].mean(0) == pytest.approx(np.zeros(3), abs=0.02)

    def test_noise_is_relative_to_the_centres(self) -> None:
        quiet, noisy = (planted([5, 5], noise, loners=1, seed=2).signatures for noise in (0.0, 1.5))
        assert float((noisy - quiet).norm() / quiet.norm()) == pytest.approx(1.5, rel=0.05)

    def test_loners_are_families_of_one_and_seeds_repeat(self) -> None:
        data, again, other = (planted([2, 3], 1, loners=4, seed=seed) for seed in (0, 0, 1))
        assert sorted(np.bincount(data.labels).tolist()) == [1, 1, 1, 1, 2, 3]
        assert data.families == 6
        assert torch.equal(data.signatures, again.signatures)
        assert not torch.equal(data.signatures, other.signatures)


# -- K-D


class TestRadiusSplit:
    @given(signatures(least=2), st.integers(0, 2))
    @quick
    def test_halves_are_equal_and_delta_is_the_mean_of_the_two_middle_distances(self, rows: Tensor, layer: int) -> None:
        x = LAYOUT.segment(rows, layer)
        near, far, delta = radius_split(x)
        away = ((x - x.mean(0)).abs().sum(1) / 2).double().numpy()
        assert sorted([*near, *far]) == list(range(len(rows)))
        assert len(near) - len(far) == len(rows) % 2
        assert delta == pytest.approx(np.median(away), abs=2e-6)
        assert away[near].max() <= delta + 2e-6
        assert away[far].min() >= delta - 2e-6
        assert (np.diff(near) > 0).all()
        assert (np.diff(far) > 0).all()

    def test_ties_are_halved_by_index(self) -> None:
        near, far, delta = radius_split(torch.tensor([[0.0], [4.0], [4.0], [0.0], [4.0], [0.0]]))
        assert (near.tolist(), far.tolist(), delta) == ([0, 1, 2], [3, 4, 5], 1)

    def test_nearer_tasks_come_before_tied_ones(self) -> None:
        near, far, _ = radius_split(torch.tensor([[3.0], [-3.0], [3.0], [-3.0], [0.0]]))
        assert (near.tolist(), far.tolist()) == ([0, 1, 4], [2, 3])

    def test_of_distinct_distances(self) -> None:
        near, far, delta = radius_split(torch.tensor([[-7.0], [1.0], [-2.0], [8.0]]))
        assert (near.tolist(), far.tolist(), delta) == ([1, 2], [0, 3], (1 + 3.5) / 2)


class TestInnerSplit:
    @pytest.mark.parametrize(
        ("n", "sizes"),
        [(2, (1, 1)), (3, (2, 1)), (4, (3, 1)), (5, (3, 2)), (6, (4, 2)), (7, (4, 3)), (8, (5, 3))],
    )
    def test_golden_sizes_of_the_released_root_split(self, n: int, sizes: tuple[int, int]) -> None:
        for seed in range(20):
            upper, lower, _ = inner_split(normal(n, seed))
            assert (len(upper), len(lower)) == sizes
        tree = kd_tree(np.arange(n), lambda tasks, level: normal(n, level)[tasks], "kd-inner", 3)
        assert tuple(int(tree.size[child]) for child in tree.children[0]) == sizes

    @given(signatures(least=3))
    @quick
    def test_the_threshold_is_the_lower_median_and_the_upper_side_holds_it(self, rows: Tensor) -> None:
        upper, lower, delta = inner_split(rows)
        product = (rows @ rows.mean(0)).double().numpy()
        assert delta == np.sort(product)[(len(product) - 1) // 2]
        assert sorted([*upper, *lower]) == list(range(len(rows)))
        if len(np.unique(product)) > 1 and product.min() < delta:
            assert product[upper].min() == delta
            assert product[lower].max() < delta

    @pytest.mark.parametrize("n", [2, 3, 6, 7])
    def test_an_empty_side_halves_by_index(self, n: int) -> None:
        upper, lower, delta = inner_split(torch.tensor([[1.0, 2.0]]).repeat(n, 1))
        assert (upper.tolist(), lower.tolist()) == (list(range(n // 2)), list(range(n // 2, n)))
        assert delta == 5


class TestKD:
    @given(signatures(least=2), depths)
    @quick
    def test_siblings_of_a_radius_tree_differ_by_at_most_one_task(self, rows: Tensor, depth: int) -> None:
        tree = grown(keeper_of(rows, "kd-radius", depth=depth))
        for node in groups_in(tree):
            sizes = tree.size[tree.children[node]]
            assert sizes.max() - sizes.min() <= 1

    @pytest.mark.parametrize("kind", ["kd-radius", "kd-inner"])
    def test_level_d_splits_by_layer_d(self, kind: TreeKind) -> None:
        rows = normal(12, 0)
        tree = grown(keeper_of(rows, kind))
        split = radius_split if kind == "kd-radius" else inner_split
        store = keeper_of(rows).store
        for node in groups_in(tree):
            if (level := int(tree.depth[node])) == len(LAYOUT):
                assert (tree.task[tree.children[node]] >= 0).all()
                assert tree.height[node] == 0
                continue
            members = tree.members(node)
            left, right, delta = split(store.rows.layer(members, level))
            assert [tree.members(int(child)).tolist() for child in tree.children[node]] == [
                members[left].tolist(),
                members[right].tolist(),
            ]
            assert tree.height[node] == delta

    def test_a_cap_deeper_than_the_layers_is_the_number_of_layers(self) -> None:
        assert keeper_of(normal(3, 0), "kd-radius", depth=64).depth == 3
        assert keeper_of(normal(3, 0), "kd-inner", depth=2).depth == 2
        assert keeper_of(normal(3, 0), "linkage", depth=64).depth == 64

    def test_steps_splits_by_differences_of_successive_signatures(self) -> None:
        rows = normal(9, 4)
        differences = torch.cat([rows[:1], rows[1:] - rows[:-1]])
        layout, store = LAYOUT, SignatureStore(LAYOUT, "l2", torch.float32)
        keeper = TreeKeeper(store, "kd-inner", "average", 64, "rebuild", steps=True)
        extend(keeper, rows)
        expected = kd_tree(
            np.arange(9), lambda tasks, level: layout.segment(differences, level)[tasks], "kd-inner", len(layout)
        )
        assert nesting(grown(keeper)) == nesting(expected)
        np.testing.assert_allclose(grown(keeper).height, expected.height, rtol=1e-4, atol=1e-4)


class TestInsertByDescent:
    """One value a layer; three layers."""

    def tree_and_rows(self, table: Sequence[Sequence[float]], depth: int = 3) -> tuple[Tree, grow.LevelRows]:
        values = torch.tensor(table, dtype=torch.float32)

        def rows(tasks: IntArray, level: int) -> Tensor:
            return values[torch.from_numpy(tasks), level : level + 1]

        return kd_tree(np.arange(len(table) - 1), rows, "kd-radius", depth), rows

    def test_descends_to_the_nearest_mean_at_each_levels_layer(self) -> None:
        # Layer 0 at 0 0 3 -3: near the mean are tasks 0 and 1; layer 1 tells these apart, and 2 from 3.
        table = [[0, -1, 0], [0, 1, 0], [3, -1, 0], [-3, 2, 0]]
        tree, rows = self.tree_and_rows([*table, [2.5, 0, 0]])
        assert nesting(tree) == [[0, 1], [2, 3]]
        for new, expected in [
            ([0.1, 0.9, 0.0], [[0, [1, 4]], [2, 3]]),
            ([-0.1, -0.9, 0.0], [[[0, 4], 1], [2, 3]]),
        ]:
            tree, rows = self.tree_and_rows([*table, new])
            assert nesting(insert_by_descent(tree, 4, rows, "kd-radius", 3)) == expected

    def test_splits_the_leaf_reached_at_its_level(self) -> None:
        tree, rows = self.tree_and_rows([[0, 0, 1], [5, 9, 2], [0.2, 3, 1]])
        grown_tree = insert_by_descent(tree, 2, rows, "kd-radius", 3)
        assert nesting(grown_tree) == [[0, 2], 1]
        assert grown_tree.height[1] == pytest.approx(0.75)  # layer 1: 0 and 3, each 1.5 from the mean, halved

    def test_a_leaf_at_the_cap_takes_one_more(self) -> None:
        tree, rows = self.tree_and_rows([[0, 0, 0], [0.2, 0, 0], [4, 0, 0], [-5, 0, 0], [0, 0, 0]], depth=1)
        assert nesting(tree) == [[0, 1], [2, 3]]
        assert nesting(insert_by_descent(tree, 4, rows, "kd-radius", 1)) == [[0, 1, 4], [2, 3]]

    def test_a_single_task_becomes_a_pair(self) -> None:
        tree, rows = self.tree_and_rows([[0, 0, 0], [1, 0, 0]])
        assert nesting(insert_by_descent(tree, 1, rows, "kd-inner", 3)) == [0, 1]

    def test_ties_go_to_the_first_child(self) -> None:
        tree, rows = self.tree_and_rows([[0, 0, 0], [2, 0, 0], [1, 0, 0]])
        assert nesting(insert_by_descent(tree, 2, rows, "kd-radius", 3)) == [[0, 2], 1]


# -- keeping


def line_store(places: Sequence[float]) -> Tensor:
    """Signatures of one value: with distance l2 points on a line."""
    return torch.tensor(places).unsqueeze(1)


LINE = Layout.of_sizes([1])


class TestKeeper:
    @given(signatures(least=2), updates)
    @quick
    def test_nearest_is_each_tasks_distance_to_its_nearest(self, rows: Tensor, update: TreeUpdate) -> None:
        keeper = keeper_of(rows, update=update)
        distances = all_pairs(keeper.store)
        np.fill_diagonal(distances, np.inf)
        assert keeper.nearest.tolist() == distances.min(0).tolist()

    @pytest.mark.parametrize("kind", KINDS)
    def test_rebuild_rebuilds_every_time_and_insert_only_at_first(self, kind: TreeKind) -> None:
        rows = normal(20, 0)
        assert extend(keeper_of(rows[:0], kind, update="rebuild"), rows) == [True] * 20
        assert extend(keeper_of(rows[:0], kind, update="auto"), rows) == [True] * 20
        assert extend(keeper_of(rows[:0], kind, update="insert"), rows) == [True] + [False] * 19

    @pytest.mark.parametrize("kind", KINDS)
    def test_auto_rebuilds_when_a_quarter_came_by_insertion(
        self, kind: TreeKind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(grow, "REBUILD_BELOW", 16)
        monkeypatch.setattr(grow, "STRAIN", np.inf)
        keeper = keeper_of(normal(16, 0), kind, update="auto")
        rebuilt = extend(keeper, normal(20, 1))
        assert np.flatnonzero(rebuilt).tolist() == [4, 10, 17]  # 21 > 1.25 * 16, 27 > 1.25 * 21, 34 > 1.25 * 27
        assert keeper.built == 34
        keeper.rebuild()
        assert keeper.built == 36

    @pytest.mark.parametrize("linkage", LINKAGES)
    def test_auto_rebuilds_under_strain_into_what_a_build_from_scratch_gives(
        self, linkage: Linkage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pairs = [place for base in range(0, 400, 20) for place in (base, base + 0.5)]
        stream = [5.0, 11.5]  # both join pairs that are far off; each other's company would have been nearer
        monkeypatch.setattr(grow, "REBUILD_BELOW", len(pairs))
        keeper, frozen = (
            keeper_of(line_store(pairs), linkage=linkage, update=update, distance="l2", layout=LINE)
            for update in ("auto", "insert")
        )
        frozen.rebuild()
        assert len(stream) < grow.GROWTH * len(pairs)  # growth alone would not rebuild
        assert extend(keeper, line_store(stream)) == [False, True]
        assert extend(frozen, line_store(stream)) == [False, False]
        scratch = keeper_of(line_store([*pairs, *stream]), linkage=linkage, distance="l2", layout=LINE)
        assert groups_of(grown(frozen)) != groups_of(grown(scratch))
        assert nesting(grown(keeper)) == nesting(grown(scratch))
        assert (keeper.built, keeper.strain) == (42, 0)

    def test_auto_keeps_inserting_while_inserted_tasks_sit_as_tight_as_built_ones(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(grow, "REBUILD_BELOW", 40)
        data = planted([12] * 4, 1.0)
        keeper = keeper_of(data.signatures[:40], update="auto", layout=data.layout)
        assert not any(extend(keeper, data.signatures[40:]))
        assert adjusted_rand(as_labels(grown(keeper).cut_into(4)), data.labels) == 1

    def test_looseness_is_the_height_of_a_tasks_group_over_the_distance_to_its_nearest_task(self) -> None:
        keeper = keeper_of(line_store([0, 1, 4, 10]), update="insert", distance="l2", layout=LINE)
        keeper.rebuild()
        assert nesting(grown(keeper)) == [[[0, 1], 2], 3]
        assert keeper.looseness == pytest.approx((1 + 1 + 3.5 / 3 + 25 / 3 / 6) / 4, rel=1e-3)
        assert (keeper.built, keeper.strain) == (4, 0)
        extend(keeper, line_store([11.0]))
        assert nesting(grown(keeper)) == [[[0, 1], 2], [3, 4]]
        assert keeper.strain == pytest.approx(1)
        extend(keeper, line_store([6.4]))  # 2.4 from its nearest, whose group has height 3.5
        assert nesting(grown(keeper)) == [[[0, 1], [2, 5]], [3, 4]]
        assert keeper.strain == pytest.approx(2)
        extend(keeper, line_store([13.0]))  # 2.5 in the mean from 10 and 11, 2 from the nearer of them
        assert nesting(grown(keeper)) == [[[0, 1], [2, 5]], [[3, 4], 6]]
        assert keeper.strain == pytest.approx(2 + 2.5 / 2, rel=1e-3)

    def test_identical_tasks_are_no_strain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grow, "REBUILD_BELOW", 8)
        keeper = keeper_of(normal(1, 0).repeat(8, 1), update="auto")
        assert keeper.looseness == 1
        assert extend(keeper, normal(1, 0).repeat(2, 1)) == [False, False]

    def test_replaced_signatures_are_taken_in(self) -> None:
        rows, others = normal(8, 0), normal(8, 1)
        keeper = keeper_of(rows, update="insert")
        for task in (2, 5):
            keeper.store.replace(task, others[task])
            rows[task] = others[task]
        keeper.refresh([keeper.store.pair_row(task) for task in range(len(keeper.store))])
        expected = keeper_of(rows)
        assert keeper.nearest.tolist() == expected.nearest.tolist()
        assert nesting(grown(keeper)) == nesting(grown(expected))
        assert keeper.built == 8

    def test_one_replaced_signature_alone_has_no_nearest(self) -> None:
        keeper = keeper_of(normal(1, 0))
        keeper.refresh([keeper.store.pair_row(task) for task in range(len(keeper.store))])
        assert keeper.nearest.tolist() == [np.inf]
        assert nesting(grown(keeper)) == [0]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("update", UPDATES)
    def test_a_restored_keeper_continues_as_if_it_had_never_stopped(
        self, kind: TreeKind, update: TreeUpdate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(grow, "REBUILD_BELOW", 6)
        rows = normal(24, 0)
        keeper = keeper_of(rows[:9], kind, update=update)
        restored = keeper_of(rows[:0], kind, update=update)
        restored.store.load(keeper.store.tensors())
        restored.load(keeper.tensors(), keeper.to_json())
        assert extend(keeper, rows[9:]) == extend(restored, rows[9:])
        assert nesting(grown(keeper)) == nesting(grown(restored))
        assert grown(keeper).height.tolist() == grown(restored).height.tolist()
        assert keeper.to_json() == restored.to_json()
        assert keeper.nearest.tolist() == restored.nearest.tolist()

    def test_a_restored_keeper_shares_no_memory(self) -> None:
        keeper, restored = keeper_of(normal(4, 0)), keeper_of(normal(0, 0))
        tensors = keeper.tensors()
        restored.load(tensors, keeper.to_json())
        for value in tensors.values():
            value.fill_(7)
        assert nesting(grown(restored)) == nesting(grown(keeper))
        assert (restored.nearest < 1).all()
        assert (keeper.nearest < 1).all()

    def test_an_empty_keeper_can_be_stored(self) -> None:
        empty, restored = keeper_of(normal(0, 0)), keeper_of(normal(3, 0))
        restored.load(empty.tensors(), empty.to_json())
        assert restored.tree is None
        assert len(restored.nearest) == 0
