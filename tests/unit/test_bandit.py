from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_ray.core.bandit import (
    NOISE_FLOOR,
    NOTHING,
    BestFirstTreeLCB,
    Exhaustive,
    FlatLCB,
    Noise,
    PooledTreeLCB,
    Random,
    Search,
    Width,
)
from treelora_ray.core.config import GuideConfig
from treelora_ray.core.grow import kd_tree, linkage_tree
from treelora_ray.core.guide import Guide
from treelora_ray.core.layout import FloatArray, IntArray, Layout
from treelora_ray.core.nodes import NodeStats
from treelora_ray.core.store import SignatureStore
from treelora_ray.core.tree import Tree

SHIFTED = 1e-9  # less than the digits that may decide


def with_statistics(search: Search, count: IntArray | int, mean: FloatArray) -> Search:
    """A search that has observed each arm `count` times with these means [L, arms]."""
    mean = np.broadcast_to(mean, search.count.shape)
    search.count[:] = count
    search.total[:] = mean * search.count
    search.pulls = int(search.count[0].sum())
    return search


def random_tree(rng: np.random.Generator, tasks: int, depth: int = 64) -> Tree:
    points = rng.normal(size=(tasks, 3))
    high, low = np.tril_indices(tasks, -1)
    away = np.linalg.norm(points[high] - points[low], axis=1)
    return linkage_tree(away[::-1].copy(), tasks, "average", depth)


def pull(search: Search, distances: Callable[[IntArray], FloatArray]) -> IntArray:
    search.begin_round()
    arms = search.select()
    search.observe(arms, distances(arms))
    return arms


# -- golden numbers of Algorithm 1 (docs/fidelity.md, "Golden numbers")


@pytest.mark.parametrize("kind", ["flat", "pooled", "by-level"])
def test_golden_with_equal_counts_the_nearest_of_1_5_9_is_chosen_at_every_level(kind: str) -> None:
    layers = 4
    tree = Tree.from_nodes([(-1, -1, 8.0), (0, -1, 8.0), (1, 0, 0.0), (1, 2, 0.0), (0, 1, 0.0)])
    search: Search = FlatLCB(layers, 3, 2.0, "paper")
    if kind != "flat":
        search = PooledTreeLCB(layers, tree, 2.0, "paper", by_level=kind == "by-level")
    with_statistics(search, 7, np.array([1.0, 5.0, 9.0]))
    search.begin_round()
    assert search.select().tolist() == [0] * layers


def test_golden_an_arm_never_observed_comes_before_any_repeat_in_flat_search() -> None:
    search = with_statistics(FlatLCB(1, 4, 2.0, "paper"), np.array([[5, 5, 0, 5]]), np.array([0.0, 0.1, 0.9, 0.2]))
    search.begin_round()
    assert search.select().tolist() == [2]


def test_golden_an_arm_never_observed_comes_first_within_the_leaf_reached() -> None:
    tree = Tree.from_nodes(
        [(-1, -1, 0.0), (0, -1, 0.0), (1, 0, 0.0), (1, 1, 0.0), (0, -1, 0.0), (4, 2, 0.0), (4, 3, 0.0)]
    )
    search = PooledTreeLCB(1, tree, 0.1, "paper", by_level=True)
    with_statistics(search, np.array([[50, 0, 50, 50]]), np.array([0.1, 0.0, 0.9, 0.9]))
    search.begin_round()
    assert search.select().tolist() == [1]


@pytest.mark.parametrize(("pulls", "share"), [(2000, 0.9), (200, 0.75)])
def test_golden_the_near_arm_takes_most_pulls_of_the_last_half(pulls: int, share: float) -> None:
    rng = np.random.default_rng(0)
    means = np.array([0.05, 0.7, 0.7])
    search = FlatLCB(32, 3, 2.0, "paper")
    taken = [pull(search, lambda arms: means[arms] + 0.05 * rng.standard_normal(32)) for _ in range(pulls)]
    last = np.array(taken[pulls // 2 :])
    assert (last == 0).mean() > share


# -- flat, random, exhaustive


@given(st.integers(1, 12), st.integers(0, 2**31), st.sampled_from(["paper", "noise"]))
@settings(deadline=None, max_examples=30)
def test_flat_lcb_tries_every_arm_before_a_repeat(arms: int, seed: int, width: Width) -> None:
    rng = np.random.default_rng(seed)
    search = FlatLCB(3, arms, 1.0, width)
    taken = np.array([pull(search, lambda a: rng.random(len(a))) for _ in range(arms)])
    assert (np.sort(taken, axis=0) == np.arange(arms)[:, None]).all()


def test_flat_lcb_matches_the_formula() -> None:
    rng = np.random.default_rng(1)
    search = FlatLCB(5, 6, 2.0, "paper")
    with_statistics(search, rng.integers(1, 9, (5, 6)), rng.random((5, 6)))
    search.pulls = 40
    expected = (search.total / search.count - 2.0 * np.sqrt(np.log(40) / search.count)).argmin(1)
    search.begin_round()
    assert (search.select() == expected).all()


@pytest.mark.parametrize("kind", [FlatLCB, Exhaustive, Random, "pooled"])
def test_within_a_round_no_arm_is_observed_twice_and_then_nothing_is_left(kind: type[Search] | str) -> None:
    arms = 5
    search: Search
    if kind == "pooled":
        search = PooledTreeLCB(3, random_tree(np.random.default_rng(0), arms), 1.0, "noise", by_level=False)
    elif kind is Random:
        search = Random(3, arms, 1.0, "noise", seed=4)
    else:
        assert isinstance(kind, type)
        search = kind(3, arms, 1.0, "noise")
    for _ in range(3):
        search.begin_round()
        taken = []
        for _ in range(arms):
            taken.append(search.select())
            search.observe(taken[-1], np.full(3, 0.5))
        assert (np.sort(taken, axis=0) == np.arange(arms)[:, None]).all()
        assert (search.select() == NOTHING).all()
    assert (search.count == 3).all()


def test_random_search_is_uniform_and_depends_on_its_seed_only() -> None:
    def draws(seed: int) -> np.ndarray:
        search = Random(64, 8, 1.0, "noise", seed)
        return np.array([pull(search, lambda arms: np.zeros(len(arms))) for _ in range(50)])

    assert (draws(1) == draws(1)).all()
    assert (draws(1) != draws(2)).any()
    shares = np.bincount(draws(1).ravel(), minlength=8) / draws(1).size
    assert np.abs(shares - 1 / 8).max() < 0.03


def test_exhaustive_search_takes_all_arms_in_turn() -> None:
    search = Exhaustive(2, 3, 1.0, "noise")
    taken = [pull(search, lambda arms: np.zeros(len(arms)))[0] for _ in range(7)]
    assert taken == [0, 1, 2, 0, 1, 2, 0]


def test_differences_below_the_sixth_digit_decide_nothing() -> None:
    search = FlatLCB(1, 2, 1.0, "noise")
    for x in (0.5, 0.5 - SHIFTED):
        search.begin_round()
        search.observe(search.select(), np.array([x]))
    search.begin_round()
    assert search.select().tolist() == [0]


@pytest.mark.parametrize("kind", ["flat", "pooled", "by-level"])
def test_equal_evidence_in_another_order_is_a_tie_and_goes_to_the_oldest(kind: str) -> None:
    xs = np.round(np.random.default_rng(0).random(30), 6)
    tree = Tree.of_tasks(range(4), height=1.0)
    decided = []
    for seed in range(20):
        search: Search = FlatLCB(1, 4, 1.0, "paper")
        if kind != "flat":
            search = PooledTreeLCB(1, tree, 1.0, "paper", by_level=kind == "by-level")
        for arm in range(4):
            for x in np.random.default_rng((seed, arm)).permutation(xs):
                search.observe(np.array([arm]), np.array([x]))
        search.begin_round()
        decided.append(int(search.select()[0]))
    assert decided == [0] * 20


# -- noise


def test_noise_finds_the_spread_of_repeats_whatever_shifts_the_rounds() -> None:
    rng = np.random.default_rng(0)
    search = Exhaustive(8, 10, 1.0, "noise")
    arms = rng.random(10)
    for _ in range(60):
        search.begin_round()
        shift = rng.normal(0, 0.3)
        for _ in range(10):
            chosen = search.select()
            search.observe(chosen, arms[chosen] + shift + 0.02 * rng.standard_normal(8))
    search.begin_round()
    assert search.noise.sigma() == pytest.approx(0.02, rel=0.15)


def test_noise_with_one_pull_a_round_is_the_spread_within_arms() -> None:
    rng = np.random.default_rng(0)
    search = Exhaustive(8, 4, 1.0, "noise")
    for _ in range(400):
        pull(search, lambda arms: arms * 0.2 + 0.05 * rng.standard_normal(8))
    search.begin_round()
    assert search.noise.sigma() == pytest.approx(0.05, rel=0.15)


def test_noise_starts_at_its_floor() -> None:
    assert (Noise(3).sigma() == NOISE_FLOOR).all()


def test_the_noise_width_shrinks_with_count_and_grows_with_noise_and_pulls() -> None:
    search = FlatLCB(2, 2, 1.5, "noise")
    search.pulls = 9
    search.noise.squares[:], search.noise.freedom[:] = [4.0, 16.0], [1.0, 1.0]
    widths = search.widths(np.array([[1, 4], [1, 4]]), search.lines)
    assert widths == pytest.approx(1.5 * np.sqrt(np.log(10)) * np.array([[2.0, 1.0], [4.0, 2.0]]))


# -- the pooled bound of Eq. (2)


def plain_bound(search: PooledTreeLCB, layer: int, node: int) -> float:
    """The bottom-up bound by recursion, straight from the formula."""
    tree = search.tree
    members = tree.members(node)
    open_ = [m for m in members if search.fresh[layer, m]]
    if not open_:
        return np.inf
    count, total = search.count[layer, members].sum(), search.total[layer, members].sum()
    if count == 0:
        own = -np.inf
    else:
        sigma = search.noise.sigma()[layer]
        scale = np.sqrt(np.log(search.pulls)) if search.width == "paper" else sigma * np.sqrt(np.log(search.pulls + 1))
        own = total / count - search.c * scale / np.sqrt(count) - tree.height[node]
    if tree.task[node] >= 0:
        return float(own)
    return float(max(own, min(plain_bound(search, layer, int(child)) for child in tree.children[node])))


def plain_choice(search: PooledTreeLCB, layer: int) -> int:
    node = 0
    while search.tree.task[node] < 0:
        below = [int(c) for c in search.tree.children[node]]
        node = min(below, key=lambda child: plain_bound(search, layer, child))
    return int(search.tree.task[node])


@given(st.integers(2, 20), st.integers(0, 2**31), st.sampled_from(["paper", "noise"]), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_pooled_search_equals_the_plain_recursion(tasks: int, seed: int, width: Width, depth: int) -> None:
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, tasks, depth)
    search = PooledTreeLCB(4, tree, 0.7, width, by_level=False)
    means = rng.random((4, tasks))
    for _ in range(12):
        search.begin_round()
        expected = [plain_choice(search, layer) for layer in range(4)]
        chosen = search.select()
        assert chosen.tolist() == expected
        search.observe(chosen, means[np.arange(4), chosen] + 0.05 * rng.standard_normal(4))


def plain_by_level(search: PooledTreeLCB) -> list[int]:
    tree, node, chosen = search.tree, 0, []
    for layer in range(search.layers):
        if tree.task[node] < 0 and layer <= tree.max_depth:
            node = min((int(c) for c in tree.children[node]), key=lambda c: plain_bound(search, layer, c))
        arms = tree.members(node)
        leaf = [plain_bound(search, layer, int(tree.node_of[arm])) for arm in arms]
        chosen.append(int(arms[int(np.argmin(leaf))]))
    return chosen


@given(st.integers(2, 24), st.integers(0, 2**31), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_by_level_search_equals_the_plain_descent(tasks: int, seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.normal(size=(6, tasks, 5)))
    tree = kd_tree(np.arange(tasks), lambda at, level: rows[level, torch.from_numpy(at)], "kd-radius", depth)
    flat = Tree(tree.parent, tree.task, np.where(tree.task >= 0, 0.0, tree.height))
    search = PooledTreeLCB(6, flat, 2.0, "paper", by_level=True)
    for _ in range(15):
        search.begin_round()
        expected = plain_by_level(search)
        chosen = search.select()
        assert chosen.tolist() == expected
        search.observe(chosen, rng.random(6))


def test_deep_levels_change_the_choice() -> None:
    """Layer 0 leads to the left half; which quarter layer 1 chooses in is layer 1's to say."""
    quarters = [
        (-1, -1, 0.0),
        (0, -1, 0.0),
        (1, -1, 0.0),
        (2, 0, 0.0),
        (2, 1, 0.0),
        (1, -1, 0.0),
        (5, 2, 0.0),
        (5, 3, 0.0),
    ]
    halves = [(0, -1, 0.0), (8, 4, 0.0), (8, 5, 0.0)]
    tree = Tree.from_nodes(quarters + halves)
    mean = np.full((3, 6), 0.8)
    mean[0, :4] = 0.1
    mean[1] = [0.6, 0.6, 0.2, 0.3, 0.0, 0.0]  # the nearest of all at layer 1 lies in the half left behind
    mean[2] = [0.0, 0.0, 0.5, 0.4, 0.0, 0.0]
    search = with_statistics(PooledTreeLCB(3, tree, 0.0, "paper", by_level=True), 5, mean)
    search.begin_round()
    assert search.select().tolist() == [0, 2, 3]
    mean[1] = [0.2, 0.3, 0.6, 0.6, 0.0, 0.0]
    search = with_statistics(PooledTreeLCB(3, tree, 0.0, "paper", by_level=True), 5, mean)
    search.begin_round()
    assert search.select().tolist() == [0, 0, 0]


# -- best first, with centroids


def planted(
    sizes: list[int], dims: int, cosine: float, rng: np.random.Generator
) -> tuple[FloatArray, IntArray, FloatArray]:
    """Unit signatures [N, dims], families [N] and their centres: within-family cosine as given."""
    family = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), dims))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return members_of(centres[family], cosine, rng), family, centres


def members_of(centres: FloatArray, cosine: float, rng: np.random.Generator) -> FloatArray:
    own = rng.normal(size=centres.shape)
    own /= np.linalg.norm(own, axis=-1, keepdims=True)
    rows = np.sqrt(cosine) * centres + np.sqrt(1 - cosine) * own
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def unequal_sizes(tasks: int, rng: np.random.Generator) -> list[int]:
    """Family sizes between 2 and 32 that add up to `tasks`."""
    sizes: list[int] = []
    while (left := tasks - sum(sizes)) > 0:
        size = int(rng.integers(2, min(32, left) + 1)) if left >= 2 else 1
        sizes.append(left if left - size == 1 else size)
    return sizes


def stocked(signatures: FloatArray, layers: int = 1, pulls: int = 32) -> Guide:
    """A guide that holds these signatures [N, total], the tree built once."""
    layout = Layout.of_sizes([signatures.shape[1] // layers] * layers)
    config = GuideConfig.of("treelora", sketch_dim=None, pulls_per_round=pulls)
    guide = Guide(layout, config)
    store, n = guide.store, len(signatures)
    for row in torch.from_numpy(signatures).float():
        store.rows.append(row)
    unit = store.rows[np.arange(n)].view(n, layers, -1).double()
    away = sum((2 - 2 * unit[:, layer] @ unit[:, layer].T).clamp(min=0).sqrt() / 2 for layer in range(layers))
    store.pairs = (np.asarray(away) / layers)[np.tril_indices(n, -1)].astype(np.float32)
    guide.names = [f"task{number}" for number in range(n)]
    guide.slots.of_task = list(range(n))
    guide.keeper.refresh([guide.store.pair_row(task) for task in range(n)])
    return guide


def families_found(tasks: int, rounds: int, seed: int, queries: int) -> list[tuple[bool, int, int]]:
    """For new tasks: whether the committed task is kin, the pulls spent, the tasks themselves compared with."""
    rng = np.random.default_rng(seed)
    rows, family, centres = planted(unequal_sizes(tasks, rng), 512, 0.3, rng)
    guide, found = stocked(rows), []
    for attempt in range(queries):
        own = family[rng.integers(tasks)]
        direction = members_of(centres[own], 0.3, rng)
        guide.begin_task("new", attempt)
        for step in range(rounds):
            noise = rng.normal(size=512)
            noise -= (noise @ direction) * direction
            batch = 0.4 * direction + np.sqrt(1 - 0.4**2) * noise / np.linalg.norm(noise)
            guide.probe(step, torch.from_numpy(batch).float())
        assert guide.current is not None
        search = guide.current.search
        assert isinstance(search, BestFirstTreeLCB)
        found.append((bool(family[guide.commit().task[0]] == own), search.pulls, len(search.seen())))
    return found


def test_tree_lcb_finds_a_member_of_the_right_family_among_512_tasks_with_64_pulls() -> None:
    found = [one for seed in range(20) for one in families_found(512, 2, seed, queries=10)]
    assert np.mean([kin for kin, _, _ in found]) >= 0.95
    assert max(pulls for _, pulls, _ in found) == 64
    assert np.mean([seen for _, _, seen in found]) < 512 / 10


def test_tree_lcb_finds_a_member_of_the_right_family_among_4096_tasks_with_256_pulls() -> None:
    found = [one for seed in range(2) for one in families_found(4096, 8, seed, queries=20)]
    assert np.mean([kin for kin, _, _ in found]) >= 0.85
    assert max(pulls for _, pulls, _ in found) == 256
    assert np.mean([seen for _, _, seen in found]) < 4096 / 20


@pytest.fixture(scope="module")
def forest() -> tuple[SignatureStore, Tree, NodeStats]:
    rng = np.random.default_rng(5)
    rows, _, _ = planted([6, 9, 3, 12, 5, 7], 3 * 64, 0.4, rng)
    guide = stocked(rows, layers=3)
    return guide.store, guide.tree, NodeStats.build(guide.store, guide.tree)


def distance_to(stats: NodeStats, node: int, direction: torch.Tensor) -> FloatArray:
    """[L] chord from a direction to a task or a centroid."""
    task = int(stats.tree.task[node])
    row = stats.store.rows[task] if task >= 0 else stats.centroids[int(stats.row[node])]
    return ((row - direction).view(3, -1).norm(dim=1) / 2).double().numpy()


def play(search: BestFirstTreeLCB, stats: NodeStats, directions: list[torch.Tensor], pulls: int) -> list[IntArray]:
    chosen = []
    for direction in directions:
        search.begin_round()
        for _ in range(pulls):
            nodes = search.select()
            x = [distance_to(stats, max(int(node), 1), direction)[layer] for layer, node in enumerate(nodes)]
            search.observe(nodes, np.array(x))
            chosen.append(nodes)
    return chosen


def plain_best_first(stats: NodeStats, layer: int, directions: list[torch.Tensor], pulls: int) -> list[int]:
    """One layer's pulls by a plain list: the least bound's next child, and the other half where it follows."""
    tree, below, slack = stats.tree, stats.search_children(), stats.slack(stats.tree.size)
    entries: list[dict[str, float]] = [{"node": 0, "next": 0, "bound": -np.inf, "estimate": 0.0, "round": -1}]
    chosen = []
    for round_, direction in enumerate(directions):
        for _ in range(pulls):
            open_ = [e for e in entries if tree.task[int(e["node"])] < 0 and e["next"] < below.count[int(e["node"])]]
            if not open_:
                chosen.append(NOTHING)
                continue
            entry = min(open_, key=lambda e: e["bound"])
            kids = below[int(entry["node"])]
            child = int(kids[int(entry["next"])])
            chosen.append(child)
            x = round(distance_to(stats, child, direction)[layer], 6)
            spread = stats.spreads[stats.row[child], layer] if stats.row[child] >= 0 else 0.0
            found = [(child, float(np.sqrt(x**2 + spread)))]
            if len(kids) == 2 and entry["next"] == 0 and entry["round"] == round_:
                other, size = int(kids[1]), tree.size
                whole = entry["estimate"] ** 2 * size[int(entry["node"])]
                rest = (whole - (x**2 + spread) * size[child]) / size[other]
                found.append((other, float(np.sqrt(max(rest, 0.0)))))
            entry["next"] += len(found)
            for node, estimate in found:
                bound = estimate - slack[node] * stats.sigma[layer]
                entries.append({"node": node, "next": 0, "bound": bound, "estimate": estimate, "round": round_})
    return chosen


def test_best_first_pulls_what_a_plain_list_of_bounds_would(forest: tuple[SignatureStore, Tree, NodeStats]) -> None:
    store, tree, stats = forest
    generator = torch.Generator().manual_seed(3)
    directions = [store.rows[4] + 0.05 * torch.randn(store.layout.total, generator=generator) for _ in range(3)]
    search = BestFirstTreeLCB(3, tree, stats)
    chosen = np.array(play(search, stats, directions, 12))
    for layer in range(3):
        assert chosen[:, layer].tolist() == plain_best_first(stats, layer, directions, 12)


def test_best_first_ends_having_seen_every_task(forest: tuple[SignatureStore, Tree, NodeStats]) -> None:
    store, tree, stats = forest
    search = BestFirstTreeLCB(3, tree, stats)
    chosen = play(search, stats, [store.rows[0]], 2 * len(tree))
    assert (chosen[-1] == NOTHING).all()
    assert search.seen().tolist() == list(range(len(store)))
    search.begin_round()
    assert (search.select() == NOTHING).all()
    assert search.seen(this_round=True).tolist() == []


def test_the_other_half_is_known_without_a_pull(forest: tuple[SignatureStore, Tree, NodeStats]) -> None:
    store, tree, stats = forest
    direction = store.rows[2]
    search = BestFirstTreeLCB(3, tree, stats)
    play(search, stats, [direction], 14)
    checked = 0
    for layer in range(3):
        for column in range(1, search.used):
            node = int(search.node[layer, column])
            if search.born[layer, column] < 1 or node < 0:
                continue
            members = tree.members(node)
            exact = np.sqrt((store.from_rows(direction, members)[:, layer].double().numpy() ** 2).mean())
            assert search.estimate[layer, column] == pytest.approx(exact, abs=2e-3)
            checked += 1
    assert checked > 3 * 14  # more is known than was pulled


# -- state


def searches() -> dict[str, Callable[[], Search]]:
    tree = random_tree(np.random.default_rng(2), 7)
    return {
        "flat": lambda: FlatLCB(3, 7, 1.0, "noise"),
        "random": lambda: Random(3, 7, 1.0, "noise", seed=9),
        "exhaustive": lambda: Exhaustive(3, 7, 1.0, "paper"),
        "pooled": lambda: PooledTreeLCB(3, tree, 1.0, "noise", by_level=False),
    }


@pytest.mark.parametrize("kind", list(searches()))
@pytest.mark.parametrize("stop", [1, 4, 13])
def test_a_search_read_back_goes_on_as_if_never_stopped(kind: str, stop: int) -> None:
    make = searches()[kind]
    xs = np.random.default_rng(0).random((40, 3))

    def go(search: Search, pulls: range) -> list[list[int]]:
        taken = []
        for number in pulls:
            if number % 3 == 0:
                search.begin_round()
            taken.append(search.select().tolist())
            search.observe(np.array(taken[-1]), xs[number])
        return taken

    whole = go(make(), range(20))
    first = make()
    begun = go(first, range(stop))
    second = make()
    second.load(first.tensors())
    assert begun + go(second, range(stop, 20)) == whole
    assert go(first, range(stop, 20)) == whole[stop:]  # reading its tensors left it alone


def test_best_first_read_back_goes_on_as_if_never_stopped(forest: tuple[SignatureStore, Tree, NodeStats]) -> None:
    store, tree, stats = forest
    directions = [store.rows[n] for n in (1, 8, 20)]
    whole = play(BestFirstTreeLCB(3, tree, stats), stats, directions, 9)
    first = BestFirstTreeLCB(3, tree, stats)
    play(first, stats, directions[:2], 9)
    second = BestFirstTreeLCB(3, tree, stats)
    second.load(first.tensors())
    assert np.array_equal(play(second, stats, directions[2:], 9), whole[18:])
