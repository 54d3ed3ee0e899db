from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.planted import planted
from treelora_ray.core import nodes
from treelora_ray.core.grow import Linkage, TreeKind, insert_by_descent, insert_by_linkage, kd_tree, linkage_tree
from treelora_ray.core.layout import FloatArray, IntArray, Layout
from treelora_ray.core.nodes import KIN, SMALLEST_GROUP, NodeStats, luck, unrelated_sigma
from treelora_ray.core.signature import Distance, directions
from treelora_ray.core.store import Rows, SignatureStore
from treelora_ray.core.tree import Tree

DISTANCES = get_args(Distance)
LAYOUT = Layout.of_sizes([48, 32, 48, 20])
quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**32 - 1)
HALF = 2.0**-11  # relative error of a half


def normal(n: int, seed: int, layout: Layout = LAYOUT) -> Tensor:
    """Layers of different length, which matters to l2 alone, and something in common."""
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((n + 1, layout.total))).float()
    return layout.scale_(rows[1:] + 0.7 * rows[0], torch.arange(1.0, len(layout) + 1).expand(n, -1))


def store_of(
    rows: Tensor, distance: Distance, layout: Layout = LAYOUT, dtype: torch.dtype = torch.float16
) -> SignatureStore:
    store = SignatureStore(layout, distance, dtype)
    store.extend(rows)
    return store


def tree_of(store: SignatureStore, kind: TreeKind = "linkage", linkage: Linkage = "average", depth: int = 64) -> Tree:
    n = len(store)
    if kind == "linkage":
        return linkage_tree(store.condensed, n, linkage, depth)
    return kd_tree(np.arange(n), store.rows.layer, kind, min(depth, len(store.layout)))


def square_distances(store: SignatureStore, x: Tensor, members: Sequence[int] | np.ndarray) -> FloatArray:
    """[n, L] squared distances of a direction to stored tasks, in float64, written out."""
    found = []
    for task in members:
        gap = (store.rows[int(task)].double() - x.double()).numpy()
        layers = [
            gap[start : start + size] for start, size in zip(store.layout.offsets, store.layout.sizes, strict=True)
        ]
        l1 = np.array([np.abs(part).sum() / 2 for part in layers])
        l2 = np.array([np.sqrt((part**2).sum()) for part in layers])
        found.append({"l1": l1, "cosine": l2 / 2, "l2": l2}[store.distance] ** 2)
    return np.array(found)


def groups_with_stats(tree: Tree) -> list[int]:
    return np.flatnonzero((tree.task < 0) & (tree.size >= SMALLEST_GROUP)).tolist()


def assert_same_stats(found: NodeStats, expected: NodeStats, inserts: int = 1) -> None:
    """Equal up to what so many roundings to half precision can do."""
    layout = found.store.layout
    assert ((found.row >= 0) == (expected.row >= 0)).all()
    used = found.row[found.row >= 0]
    assert len(set(used.tolist())) == len(used)
    allowed = HALF * 2 * np.sqrt(inserts + 1)
    for node in np.flatnonzero(found.row >= 0).tolist():
        here, there = found.centroids[int(found.row[node])], expected.centroids[int(expected.row[node])]
        peaks = layout.per_layer(lambda x: x.abs().amax(-1), there)
        assert bool((layout.per_layer(lambda x: x.abs().amax(-1), here - there) <= allowed * peaks).all())
        scale = expected.spreads[expected.row[node]] + layout.per_layer(lambda x: x.square().sum(-1), there).numpy()
        gap = np.abs(found.spreads[found.row[node]] - expected.spreads[expected.row[node]])
        assert (gap <= 2 * allowed * scale + 1e-7).all()


class TestBuild:
    @pytest.mark.parametrize("kind", get_args(TreeKind))
    @pytest.mark.parametrize("distance", DISTANCES)
    def test_centroids_and_spreads_are_means_over_the_members(self, distance: Distance, kind: TreeKind) -> None:
        store = store_of(normal(13, 0), distance)
        tree = tree_of(store, kind)
        stats = NodeStats.build(store, tree)
        assert np.flatnonzero(stats.row >= 0).tolist() == groups_with_stats(tree)
        assert sorted(stats.row[stats.row >= 0]) == list(range(len(stats.centroids)))
        for node in groups_with_stats(tree):
            members = tree.members(node)
            centroid = stats.centroids[int(stats.row[node])]
            mean = store.rows[members].double().mean(0)
            peaks = LAYOUT.per_layer(lambda x: x.abs().amax(-1), mean)
            assert bool((LAYOUT.per_layer(lambda x: x.abs().amax(-1), centroid - mean) <= HALF * peaks).all())
            spread = square_distances(store, centroid, members).mean(0)
            np.testing.assert_allclose(stats.spreads[stats.row[node]], spread, rtol=1e-3)

    @pytest.mark.parametrize("depth", [1, 2])
    def test_a_leaf_of_many_tasks_has_one_centroid(self, depth: int) -> None:
        store = store_of(normal(40, 1), "cosine")
        tree = tree_of(store, depth=depth)
        stats = NodeStats.build(store, tree)
        widest = max(groups_with_stats(tree), key=lambda node: int(tree.children.count[node]))
        assert tree.children.count[widest] > 32  # l1 goes through so many members at a time
        mean = store.rows[tree.members(widest)].mean(0)
        assert torch.allclose(stats.centroids[int(stats.row[widest])], mean, atol=1e-3)

    @pytest.mark.parametrize("rows_at_once", [1, 3])
    @pytest.mark.parametrize("distance", DISTANCES)
    def test_rows_handled_at_once_change_nothing(
        self, distance: Distance, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = store_of(normal(13, 0), distance)
        tree = tree_of(store)
        expected = NodeStats.build(store, tree)
        monkeypatch.setattr(nodes, "CHUNK_VALUES", rows_at_once * LAYOUT.total)
        found = NodeStats.build(store, tree)
        assert_same_stats(found, expected)
        np.testing.assert_allclose(found.sigma, expected.sigma, rtol=1e-6)

    def test_spreads_of_many_members_in_l1(self) -> None:
        store = store_of(normal(70, 2), "l1")
        stats = NodeStats.build(store, tree_of(store, depth=0))
        expected = square_distances(store, stats.centroids[0], range(70)).mean(0)
        np.testing.assert_allclose(stats.spreads[0], expected, rtol=1e-5)

    @pytest.mark.parametrize("distance", DISTANCES)
    def test_identical_and_zero_tasks_have_no_spread(self, distance: Distance) -> None:
        for rows in (normal(1, 0).repeat(5, 1), torch.zeros(5, LAYOUT.total)):
            store = store_of(rows, distance)
            stats = NodeStats.build(store, tree_of(store))
            for row in stats.row[stats.row >= 0]:
                length = LAYOUT.per_layer(lambda x: x.square().sum(-1), store.rows[0]).numpy()
                assert (stats.spreads[row] >= 0).all()
                assert (stats.spreads[row] <= 2 * HALF * length).all()
            assert (stats.sigma == 0).all()

    @pytest.mark.parametrize("n", [1, 2])
    def test_fewer_than_three_tasks_have_no_centroid(self, n: int) -> None:
        store = store_of(normal(n, 0), "cosine")
        stats = NodeStats.build(store, tree_of(store))
        assert (stats.row == -1).all()
        assert len(stats.centroids) == 0
        assert stats.search_children()[0].tolist() == list(range(1, n + 1))

    def test_memory_is_that_of_centroids_and_spreads(self) -> None:
        store = store_of(normal(16, 0), "cosine")
        stats = NodeStats.build(store, tree_of(store))
        held = len(stats.centroids) * (2 * LAYOUT.total + 4 * len(LAYOUT) + 4 * len(LAYOUT))
        assert held <= stats.nbytes() <= 3 * held + 9 * 4 * len(LAYOUT) + 8 * 3 * LAYOUT.total


class TestEstimate:
    """d(x, centroid)^2 + spread against the mean squared distance to the members."""

    def ratios(self, distance: Distance, layout: Layout) -> FloatArray:
        store = store_of(normal(24, 3, layout), distance, layout)
        tree = tree_of(store)
        stats = NodeStats.build(store, tree)
        found = []
        for x in directions(layout, normal(6, 4, layout), distance):
            for node in groups_with_stats(tree):
                row = int(stats.row[node])
                alone = SignatureStore(layout, "l2", torch.float32)
                alone.distance = distance
                alone.rows.append(stats.centroids[row])
                estimate = square_distances(alone, x, [0])[0] + stats.spreads[row]
                found.append(estimate / square_distances(store, x, tree.members(node)).mean(0))
        return np.array(found)

    @pytest.mark.parametrize("distance", ["cosine", "l2"])
    def test_is_exact_for_cosine_and_l2(self, distance: Distance) -> None:
        np.testing.assert_allclose(self.ratios(distance, LAYOUT), 1, atol=2 * HALF)

    def test_is_near_for_l1_in_many_dimensions(self) -> None:
        ratios = self.ratios("l1", Layout.of_sizes([512, 384]))
        assert 0.97 < ratios.min() <= ratios.max() < 1.03


class TestSlack:
    def test_luck_is_the_95th_percentile_of_how_far_the_least_of_m_normals_falls_below_their_mean(self) -> None:
        rng = np.random.default_rng(0)
        for m in (2, 3, 8, 100):
            draws = rng.normal(size=(20_000, m))
            measured = np.quantile(draws.mean(1) - draws.min(1), 0.95)
            assert luck(np.array([m]))[0] == pytest.approx(measured, rel=0.12)
        assert luck(np.array([100]))[0] == pytest.approx(measured, rel=0.02)

    def test_slack_is_wider_than_luck_grows_with_the_group_and_is_zero_for_a_task(self) -> None:
        store, sizes = store_of(normal(2, 0), "cosine"), np.arange(1, 40)
        slack = NodeStats(store, tree_of(store)).slack(sizes)
        assert slack[0] == 0
        assert (np.diff(slack) > 0).all()
        assert slack == pytest.approx(KIN * luck(sizes))

    @pytest.mark.parametrize("distance", ["l1", "cosine"])
    @pytest.mark.parametrize("m", [2, 3, 5, 8, 16, 32])
    def test_luck_agrees_with_direct_calibration_on_unrelated_tasks(
        self, unrelated: dict[str, FloatArray], distance: Distance, m: int
    ) -> None:
        distances, sigma = unrelated[distance], unrelated[f"{distance} sigma"]
        rng, drops = np.random.default_rng(m), []
        for _ in range(25):
            order = rng.permutation(len(distances))
            seen = distances[np.ix_(order[m:], order[:m])]  # outside tasks, members, layers
            drops.append(np.quantile(seen.mean(1) - seen.min(1), 0.95, axis=0))
        direct = np.mean(drops, axis=0)
        assert direct.mean() / (sigma * luck(np.array([m]))[0]).mean() == pytest.approx(1, abs=0.2)


@pytest.fixture(scope="module")
def unrelated() -> dict[str, FloatArray]:
    """All distances [n, n, L] of tasks that have nothing in common, and sigma."""
    data, found = planted([1] * 120, 0.0, seed=7), {}
    for distance in get_args(Distance):
        store = data.store(distance)
        found[distance] = np.stack(
            [store.from_rows(store.rows[i], np.arange(120)).double().numpy() for i in range(120)]
        )
        found[f"{distance} sigma"] = unrelated_sigma(store)
    return found


class TestSigma:
    @pytest.mark.parametrize("distance", DISTANCES)
    def test_is_the_standard_deviation_of_unrelated_distances(
        self, unrelated: dict[str, FloatArray], distance: Distance
    ) -> None:
        plain = unrelated[distance][~np.eye(120, dtype=bool)].std(0)
        np.testing.assert_allclose(unrelated[f"{distance} sigma"], plain, rtol=0.2)

    @pytest.mark.parametrize("sizes", [[6] * 16, [2, 3, 5, 8, 12, 20]])
    @pytest.mark.parametrize("noise", [0.3, 1.0])
    def test_families_hardly_change_it(self, sizes: list[int], noise: float) -> None:
        data = planted(sizes, noise, loners=20, seed=1)
        store = data.store("cosine")
        distances = np.stack([store.from_rows(store.rows[i], np.arange(len(store))).numpy() for i in range(len(store))])
        foreign = data.labels[:, None] != data.labels
        plain = distances[foreign].std(0)
        assert unrelated_sigma(store).mean() / plain.mean() == pytest.approx(1, abs=0.15)
        assert distances[~np.eye(len(store), dtype=bool)].std(0).mean() > 1.2 * plain.mean()  # what kin would do

    def test_is_known_layer_by_layer(self) -> None:
        layout = Layout.of_sizes([400, 25, 400])
        sigma = unrelated_sigma(
            store_of(
                torch.from_numpy(np.random.default_rng(0).standard_normal((40, layout.total))).float(), "cosine", layout
            )
        )
        assert sigma[1] / sigma[[0, 2]] == pytest.approx([4, 4], rel=0.25)  # 1 / sqrt(size)

    @pytest.mark.parametrize(("n", "zero"), [(1, True), (2, True), (3, False)])
    def test_of_few_tasks(self, n: int, zero: bool) -> None:
        sigma = unrelated_sigma(store_of(normal(n, 0), "cosine"))
        assert sigma.shape == (len(LAYOUT),)
        assert (sigma == 0).all() == zero

    def test_reads_every_pair_of_few_tasks(self) -> None:
        store = store_of(normal(9, 5), "l1")
        pairs = np.array([np.sqrt(square_distances(store, store.rows[i], [j])[0]) for i in range(9) for j in range(i)])
        expected = np.quantile(pairs, 0.8413, axis=0) - np.median(pairs, axis=0)
        np.testing.assert_allclose(unrelated_sigma(store), expected, rtol=1e-4)


class TestAfterInsert:
    """Points on a line (l2, one value a layer) or random tasks; always against a build of the same tree."""

    layout = Layout.of_sizes([1, 1])

    def line(self, places: Sequence[float]) -> SignatureStore:
        return store_of(torch.tensor(places).unsqueeze(1).repeat(1, 2), "l2", self.layout)

    @pytest.mark.parametrize(
        ("places", "depth"),
        [
            ([0, 1, 10, 12, 13, 15.5], 64),  # beside a group of three
            ([0, 1, 10, 12, 10.4], 64),  # into a pair
            ([0, 1, 10, 12, 14.5], 64),  # beside a pair
            ([0, 1, 10, 12, 40], 64),  # above the root
            ([0, 1, 10, 12, 40], 1),  # beside the root's halves, without room for a group above
            ([0, 1, 10, 12, 12.2], 1),  # into a leaf at the cap
            ([0, 1, 2.5], 64),  # the first group of three
            ([0, 1], 64),
            ([0, 1, 1.1, 30, 31, 34, 3], 64),
        ],
    )
    def test_of_one_task_equals_a_build(self, places: list[float], depth: int) -> None:
        old = self.line(places[:-1])
        before = tree_of(old, depth=depth)
        stats = NodeStats.build(old, before)
        row = old.append(torch.full((2,), places[-1]))
        tree = insert_by_linkage(before, len(row), row, "average", depth)
        assert_same_stats(stats.after_insert(tree, len(row)), NodeStats.build(old, tree))

    @pytest.mark.parametrize("kind", get_args(TreeKind))
    @pytest.mark.parametrize("distance", DISTANCES)
    def test_of_fifty_tasks_equals_a_build(self, distance: Distance, kind: TreeKind) -> None:
        rows = normal(58, 8)
        store = store_of(rows[:8], distance)
        tree = tree_of(store, kind)
        stats = NodeStats.build(store, tree)
        for task in range(8, 58):
            row = store.append(rows[task])
            if kind == "linkage":
                tree = insert_by_linkage(tree, task, row, "average", 64)
            else:
                tree = insert_by_descent(tree, task, store.rows.layer, kind, len(LAYOUT))
            stats = stats.after_insert(tree, task)
        assert_same_stats(stats, NodeStats.build(store, tree), inserts=50)
        assert len(stats.centroids) == len(groups_with_stats(tree))

    @given(seeds, st.integers(1, 9), st.sampled_from(get_args(Linkage)), st.sampled_from([0, 1, 2, 64]))
    @settings(deadline=None, max_examples=12)
    def test_of_any_tasks_equals_a_build(self, seed: int, built: int, linkage: Linkage, depth: int) -> None:
        rows = normal(12, seed)
        store = store_of(rows[:built], "cosine")
        tree = tree_of(store, "linkage", linkage, depth)
        stats = NodeStats.build(store, tree)
        for task in range(built, 12):
            row = store.append(rows[task])
            tree = insert_by_linkage(tree, task, row, linkage, depth)
            stats = stats.after_insert(tree, task)
            assert stats.tree is tree
            assert_same_stats(stats, NodeStats.build(store, tree), inserts=task)

    @pytest.mark.parametrize("distance", ["cosine", "l2"])
    def test_reads_no_group_of_old_members(self, distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = normal(30, 0)
        rows[20:] += 20 * torch.arange(10.0).unsqueeze(1) * rows[0]  # some of them far off, to stand above the root
        store = store_of(rows[:20], distance)
        tree = tree_of(store)
        stats = NodeStats.build(store, tree)
        read, plain = [], Rows.__getitem__

        def reading(self: Rows, at: int | Sequence[int] | IntArray | slice) -> Tensor:
            found = plain(self, at)
            read.append(len(found) if found.ndim == 2 else 1)
            return found

        monkeypatch.setattr(Rows, "__getitem__", reading)
        for task in range(20, 30):
            tree = insert_by_linkage(tree, task, store.append(rows[task]), "average", 64)
            stats = stats.after_insert(tree, task)
        assert max(read) <= 2
        monkeypatch.undo()
        assert_same_stats(stats, NodeStats.build(store, tree), inserts=10)

    def test_sigma_is_taken_anew_whenever_the_tasks_have_doubled(self) -> None:
        rows = normal(33, 0)
        store = store_of(rows[:2], "cosine")
        tree = tree_of(store)
        stats = NodeStats.build(store, tree)
        assert (stats.sigma == 0).all()
        for task in range(2, 33):
            before = stats.sigma
            tree = insert_by_linkage(tree, task, store.append(rows[task]), "average", 64)
            stats = stats.after_insert(tree, task)
            expected = unrelated_sigma(store) if len(store) in (4, 8, 16, 32) else before
            assert stats.sigma.tolist() == expected.tolist()
        assert (stats.sigma > 0).all()


class TestSearchChildren:
    @given(seeds, st.integers(1, 16), st.sampled_from(get_args(TreeKind)), st.sampled_from([1, 2, 64]))
    @quick
    def test_every_task_is_reached_once_from_the_root_through_groups_with_centroids(
        self, seed: int, n: int, kind: TreeKind, depth: int
    ) -> None:
        store = store_of(normal(n, seed), "cosine")
        tree = tree_of(store, kind, depth=depth)
        stats = NodeStats.build(store, tree)
        children = stats.search_children()
        reached, todo = [], [0]
        while todo:
            node = todo.pop()
            reached.append(node)
            below = children[node].tolist()
            assert all(tree.size[a] <= tree.size[b] for a, b in pairwise(below))  # small first
            assert sum(tree.size[below]) == (tree.size[node] if below else 0)
            todo += below
        assert sorted(tree.task[node] for node in reached if tree.task[node] >= 0) == list(range(n))
        assert [node for node in sorted(reached) if tree.task[node] < 0 and node] == [
            node for node in groups_with_stats(tree) if node
        ]

    def test_pairs_are_replaced_by_their_tasks(self) -> None:
        tree = Tree.from_nodes(
            [(-1, -1, 3), (0, -1, 2), (1, -1, 1), (2, 0, 0), (2, 1, 0), (1, 2, 0), (0, -1, 1), (6, 3, 0), (6, 4, 0)]
        )
        store = store_of(normal(5, 0), "cosine")
        children = NodeStats.build(store, tree).search_children()
        assert [children[node].tolist() for node in range(9)] == [[7, 8, 1], [3, 4, 5], [], [], [], [], [], [], []]


class TestState:
    @pytest.mark.parametrize("n", [1, 2, 11])
    @pytest.mark.parametrize("distance", DISTANCES)
    def test_statistics_come_back_and_continue(self, distance: Distance, n: int) -> None:
        rows = normal(14, 0)
        store = store_of(rows[:n], distance)
        tree = tree_of(store)
        stats = NodeStats.build(store, tree)
        again = NodeStats.from_tensors(store, tree, stats.tensors())
        assert_equal_tensors(again, stats)
        for task in range(n, 14):
            tree = insert_by_linkage(tree, task, store.append(rows[task]), "average", 64)
            stats, again = stats.after_insert(tree, task), again.after_insert(tree, task)
        assert_equal_tensors(again, stats)
        assert len(stats.centroids) > 0

    def test_state_shares_no_memory(self) -> None:
        store = store_of(normal(6, 0), "cosine")
        stats = NodeStats.build(store, tree_of(store))
        expected = {name: value.clone() for name, value in stats.tensors().items()}
        tensors = stats.tensors()
        again = NodeStats.from_tensors(store, stats.tree, tensors)
        for value in tensors.values():
            value.fill_(7)
        for one in (stats, again):
            assert all(torch.equal(value, expected[name]) for name, value in one.tensors().items())


def assert_equal_tensors(found: NodeStats, expected: NodeStats) -> None:
    a, b = found.tensors(), expected.tensors()
    assert a.keys() == b.keys() == {"values", "scales", "spreads", "row", "sigma"}
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert torch.equal(value, b[name])
