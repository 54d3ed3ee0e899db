import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treelora_ray.core.errors import GuideError, LayoutError
from treelora_ray.core.layout import FloatArray, Layout
from treelora_ray.core.merge import AdapterBank, Merge, Slots, merge_low_rank

check = settings(deadline=None, max_examples=30)
few = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 9999)
Pair = tuple[Tensor, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(rank: int, d_in: int, d_out: int, seed: int) -> Pair:
    return random(rank, d_in, seed=seed), random(d_out, rank, seed=seed + 10_000)


def delta(both: Pair) -> Tensor:
    a, b = both
    return b.double() @ a.double()


def truncated(w: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(w)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


# -- two low-rank pairs in place of one


@check
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(3, 7), st.integers(3, 7))
def test_merging_equal_adapters_changes_no_delta(seed: int, rank: int, copies: int, d_in: int, d_out: int) -> None:
    one = pair(rank, d_in, d_out, seed)
    a, b = merge_low_rank([one] * copies, list(range(1, copies + 1)))
    assert a.shape == one[0].shape
    assert b.shape == one[1].shape
    torch.testing.assert_close(delta((a, b)), delta(one), atol=1e-4, rtol=1e-4)


@check
@given(seeds, st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.booleans())
def test_a_merge_is_the_best_low_rank_pair_for_the_weighted_mean(
    seed: int, rank: int, weights: list[int], ranks_differ: bool
) -> None:
    pairs = [pair(rank + ranks_differ * i, 9, 7, seed + i) for i in range(len(weights))]
    mean = sum(w * delta(p) for w, p in zip(weights, pairs, strict=True)) / sum(weights)
    assert isinstance(mean, Tensor)
    for wanted in (None, 1, 2):
        a, b = merge_low_rank(pairs, weights, wanted)
        kept = rank if wanted is None else wanted
        assert (a.shape, b.shape) == ((kept, 9), (7, kept))
        torch.testing.assert_close(delta((a, b)), truncated(mean, kept), atol=1e-4, rtol=1e-4)


def test_the_two_factors_share_the_singular_values_evenly() -> None:
    a, b = merge_low_rank([pair(3, 9, 7, 0), pair(3, 9, 7, 1)], [1, 1])
    torch.testing.assert_close((a @ a.T).diag(), (b.T @ b).diag())
    assert float((a @ a.T - torch.diag((a @ a.T).diag())).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_merge_keeps_the_dtype(dtype: torch.dtype) -> None:
    a, b = merge_low_rank([(x.to(dtype), y.to(dtype)) for x, y in [pair(2, 5, 4, 0)] * 2], [1, 3])
    assert (a.dtype, b.dtype) == (dtype, dtype)


def test_averaging_the_factors_instead_would_be_something_else() -> None:
    one, other = pair(2, 8, 8, 0), pair(2, 8, 8, 1)
    mean = (delta(one) + delta(other)) / 2
    merged = delta(merge_low_rank([one, other], [1, 1]))
    naive = delta(((one[0] + other[0]) / 2, (one[1] + other[1]) / 2))
    assert float((merged - mean).norm()) < 0.8 * float((naive - mean).norm())


class Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


def test_merging_never_forms_the_full_matrix() -> None:
    d_in, d_out, rank = 40, 30, 2
    pairs = [pair(rank, d_in, d_out, seed) for seed in range(3)]
    with Shapes() as shapes:
        merge_low_rank(pairs, [1, 2, 3])
    assert (3 * rank, d_in) in shapes.seen
    largest = max(int(np.prod(shape)) for shape in shapes.seen)
    assert largest <= 3 * rank * d_in


def test_missing_ranks_are_padded_with_nothing() -> None:
    one = pair(2, 6, 5, 0)
    a, b = merge_low_rank([one], [1], rank=4)
    assert (a.shape, b.shape) == ((4, 6), (5, 4))
    torch.testing.assert_close(delta((a, b)), delta(one), atol=1e-5, rtol=1e-5)
    assert not a[2:].any()
    assert not b[:, 2:].any()
    small = merge_low_rank([pair(3, 2, 5, 0), pair(3, 2, 5, 1)], [1, 1])  # d_in below the rank
    mean = (delta(pair(3, 2, 5, 0)) + delta(pair(3, 2, 5, 1))) / 2
    assert (small[0].shape, small[1].shape) == ((3, 2), (5, 3))
    torch.testing.assert_close(delta(small), mean, atol=1e-5, rtol=1e-5)


def test_adapters_that_never_moved_merge_to_nothing_that_can_still_be_trained() -> None:
    fresh, other = (random(2, 6), torch.zeros(5, 2)), (random(2, 6) + 1, torch.zeros(5, 2))
    a, b = merge_low_rank([fresh, other], [1, 1])
    assert not delta((a, b)).any()
    usual = torch.cat([fresh[0], other[0]]).norm(dim=1).mean()
    torch.testing.assert_close(a.norm(dim=1), usual.expand(2))
    b.requires_grad_()
    (b @ a).square().sub(b @ a).sum().backward()
    assert b.grad is not None
    assert b.grad.any(0).all()  # every rank of B has a gradient


def test_a_rank_without_movement_can_still_be_trained_and_changes_nothing() -> None:
    a0, b0 = pair(3, 6, 5, 0)
    b0[:, 1:] = 0
    a, b = merge_low_rank([(a0, b0), (a0, b0)], [1, 2])
    torch.testing.assert_close(delta((a, b)), delta((a0, b0)), atol=1e-5, rtol=1e-5)
    assert (a.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize(
    ("pairs", "weights", "message"),
    [
        ([], [], "got 0 and 0"),
        ([pair(2, 5, 4, 0)], [1, 2], "got 2 and 1"),
        ([pair(2, 5, 4, 0), pair(2, 6, 4, 0)], [1, 1], r"must be of one layer, .*\[2, 5\].*\[2, 6\]"),
        ([pair(2, 5, 4, 0), pair(2, 5, 3, 0)], [1, 1], "must be of one layer"),
        ([(torch.ones(2, 5), torch.ones(4, 3))], [1], r"got \[\(\[2, 5\], \[4, 3\]\)\]"),
        ([(torch.ones(2), torch.ones(4, 2))], [1], "must be of one layer"),
        ([(torch.ones(2, 5), torch.ones(2))], [1], "must be of one layer"),
    ],
)
def test_adapters_of_other_shapes_are_refused(pairs: list[Pair], weights: list[float], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        merge_low_rank(pairs, weights)


# -- slots


def symmetric(n: int, seed: int) -> FloatArray:
    matrix = np.random.default_rng(seed).random((n, n))
    return np.asarray((matrix + matrix.T) / 2)


@check
@given(seeds, st.integers(1, 5), st.integers(1, 20))
def test_the_pair_merged_is_the_one_with_the_least_mean_distance(seed: int, budget: int, n: int) -> None:
    matrix, slots = symmetric(n, seed), Slots(budget)
    groups: dict[int, list[int]] = {}
    for task in range(n):
        slot, merge = slots.add(matrix[task, :task])
        assert slot not in groups
        groups[slot] = [task]
        assert (merge is None) == (len(groups) <= budget)
        if merge is not None:
            means = {(i, j): matrix[np.ix_(groups[i], groups[j])].mean() for i in groups for j in groups if i < j}
            assert means[merge.kept, merge.dropped] <= min(means.values()) + 1e-6
            assert merge.weights == (len(groups[merge.kept]), len(groups[merge.dropped]))
            groups[merge.kept] += groups.pop(merge.dropped)
        assert len(groups) <= budget
        assert {s: sorted(slots.tasks_of(s)) for s in set(slots.of_task)} == {s: sorted(g) for s, g in groups.items()}


@check
@given(seeds, st.integers(1, 4))
def test_distances_measured_anew_decide_the_next_merge(seed: int, budget: int) -> None:
    old, new, slots = symmetric(12, seed), symmetric(12, seed + 1), Slots(budget)
    np.fill_diagonal(new, 0)
    for task in range(9):
        slots.add(old[task, :task])
    slots.remeasure([new[task, :9] for task in range(9)])
    for task in range(9, 12):
        groups = {slot: slots.tasks_of(slot) for slot in set(slots.of_task)}
        slot, merge = slots.add(new[task, :task])
        groups[slot] = [task]
        means = {(i, j): new[np.ix_(groups[i], groups[j])].mean() for i in groups for j in groups if i < j}
        assert merge is not None
        assert means[merge.kept, merge.dropped] <= min(means.values()) + 1e-6


def test_ties_go_to_the_lowest_slots() -> None:
    slots = Slots(2)
    for task in range(2):
        slots.add(np.full(task, 0.5))
    assert slots.add(np.array([0.5 + 1e-9, 0.5 - 1e-9])) == (2, Merge(0, 1, (1, 1)))


def test_without_a_budget_nothing_merges() -> None:
    slots = Slots(None)
    assert [slots.add(np.zeros(task)) for task in range(20)] == [(task, None) for task in range(20)]
    slots.remeasure([np.zeros(20)] * 20)
    assert slots.add(np.zeros(20)) == (20, None)


@pytest.mark.parametrize("budget", [None, 1, 3])
def test_slots_read_back_go_on_as_if_never_stopped(budget: int | None) -> None:
    matrix, slots, back = symmetric(14, 0), Slots(budget), Slots(budget)
    for task in range(7):
        slots.add(matrix[task, :task])
    data = slots.to_json()
    text = json.dumps(data)
    back.load(json.loads(text))
    for task in range(7, 14):
        assert slots.add(matrix[task, :task]) == back.add(matrix[task, :task])
    assert slots.of_task == back.of_task
    assert json.dumps(data) == text  # what was written down stays as it was


# -- the bank

SHAPES = {"q": ((2, 6), (5, 2)), "v": ((2, 6), (3, 2)), "o": ((3, 4), (5, 3))}
LAYOUT = Layout(tuple(SHAPES), tuple(SHAPES.values()))


def deltas(flat: Tensor) -> list[Tensor]:
    return [delta((a, b)) for _, (a, b) in LAYOUT.views(flat)]


@few
@given(seeds, st.integers(1, 4) | st.none(), st.integers(1, 14))
def test_a_bank_carries_out_what_slots_decide(seed: int, budget: int | None, n: int) -> None:
    matrix, slots, bank = symmetric(n, seed), Slots(budget), AdapterBank(LAYOUT)
    adapters, alone = random(n, LAYOUT.total, seed=seed), set()
    for task in range(n):
        slot, merge = slots.add(matrix[task, :task])
        bank.put(task, adapters[task], slot, merge)
        alone = {t for t in range(task + 1) if len(slots.tasks_of(slots.of_task[t])) == 1}
        assert set(bank.slots) == set(slots.of_task)
        assert len(bank.slots) <= (budget or n)
        for t in range(task + 1):
            assert bank.of_task[t] == slots.of_task[t]
            assert torch.equal(bank[t], bank[slots.tasks_of(slots.of_task[t])[0]])
            if t in alone:
                assert torch.equal(bank[t], adapters[t])
    assert budget is None or n <= budget or len(alone) < n


@few
@given(seeds, st.integers(1, 3))
def test_a_shared_slot_holds_the_mean_delta_of_its_tasks_whatever_the_order_of_merges(seed: int, budget: int) -> None:
    n = 9
    matrix, slots, bank = symmetric(n, seed), Slots(budget), AdapterBank(LAYOUT)
    adapters = random(n, LAYOUT.total, seed=seed)
    for adapter in adapters[1:]:  # one A for all, so that a mean of rank r exists
        for (_, (a, _)), (_, (shared, _)) in zip(LAYOUT.views(adapter), LAYOUT.views(adapters[0]), strict=True):
            a.copy_(shared)
    for task in range(n):
        bank.put(task, adapters[task], *slots.add(matrix[task, :task]))
    for slot in bank.slots:
        tasks = slots.tasks_of(slot)
        for layer, found in enumerate(deltas(bank[tasks[0]])):
            mean = torch.stack([deltas(adapters[task])[layer] for task in tasks]).mean(0)
            torch.testing.assert_close(found, mean, atol=1e-4, rtol=1e-3)


def test_a_stored_adapter_does_not_follow_the_one_that_was_put() -> None:
    bank, adapter = AdapterBank(LAYOUT), random(LAYOUT.total)
    before = adapter.clone()
    bank.put(0, adapter, 0)
    adapter.zero_()
    assert torch.equal(bank[0], before)


def test_segments_takes_each_layer_from_its_own_task() -> None:
    bank, adapters = AdapterBank(LAYOUT), random(2, LAYOUT.total)
    for task, adapter in enumerate(adapters):
        bank.put(task, adapter, task)
    out = torch.full((LAYOUT.total,), 7.0)
    assert bank.segments([1, -1, 0], out) is out
    expected = [LAYOUT.segment(adapters[1], 0), torch.full((18,), 7.0), LAYOUT.segment(adapters[0], 2)]
    assert all(torch.equal(LAYOUT.segment(out, i), each) for i, each in enumerate(expected))
    assert not LAYOUT.segment(bank.segments([1, -1, 0]), 1).any()


def test_unknown_tasks_and_bad_adapters_are_refused() -> None:
    bank = AdapterBank(LAYOUT)
    bank.put(4, random(LAYOUT.total), 0)
    with pytest.raises(GuideError, match=r"no adapter is stored for task 3; stored: \[4\]"):
        bank[3]
    with pytest.raises(GuideError, match="task 0"):
        bank.segments([4, 0, 4])
    with pytest.raises(LayoutError, match="adapter of task 5 has shape"):
        bank.put(5, random(LAYOUT.total + 1), 1)
    with pytest.raises(LayoutError, match=r"adapter of task 5 has 1 NaN .* layer 'q'"):
        bank.put(5, torch.cat([torch.tensor([float("nan")]), random(LAYOUT.total - 1)]), 1)
    assert list(bank.slots) == [0]


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 6),),
        ((2, 6), (5, 3)),
        ((2, 6), (5, 2), (1,)),
        ((2,), (5, 2)),
        ((2, 6), (2,)),
        ((2, 6), ()),
        ((2, 6, 1), (5, 2)),
        ((2, 6), (5, 1, 2)),
    ],
)
def test_layers_that_are_not_a_and_b_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(LayoutError, match=r"layer 'odd' must be \(A \[r, d_in\], B \[d_out, r\]\), got"):
        AdapterBank(Layout(("q", "odd"), (SHAPES["q"], shapes)))


def test_an_adapter_read_is_a_copy() -> None:
    bank = AdapterBank(LAYOUT)
    bank.put(0, random(LAYOUT.total), 0)
    before = bank[0]
    bank[0].zero_()
    assert torch.equal(bank[0], before)
