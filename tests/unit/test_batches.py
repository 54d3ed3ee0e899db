from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_ray.data.batches import BatchPlan, permuted

plans = st.builds(
    BatchPlan,
    rows=st.integers(1, 300),
    batch=st.integers(1, 64),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    task=st.sampled_from(["yelp", "agnews"]),
)


@given(plans)
def test_an_epoch_takes_every_row_once(plan: BatchPlan) -> None:
    steps = [rows for _, rows in plan.walk()]
    for epoch in range(plan.epochs):
        taken = np.concatenate(steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch])
        assert sorted(taken.tolist()) == list(range(plan.rows))
    assert [len(rows) for rows in steps] == [plan.size(step) for step in range(plan.steps)]
    assert all(len(rows) == plan.batch for rows in steps[: plan.steps_per_epoch - 1])


@given(plans, st.integers(1, 9))
def test_workers_together_take_the_rows_of_one_and_share_them_evenly(plan: BatchPlan, workers: int) -> None:
    for step, rows in plan.walk():
        shares = [plan.at(step, rank, workers) for rank in range(workers)]
        woven = [int(share[i]) for i in range(len(shares[0])) for share in shares if i < len(share)]
        assert woven == rows.tolist()
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@given(plans, st.data())
def test_resuming_at_any_step_goes_on_as_if_never_stopped(plan: BatchPlan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.steps))
    whole = [(step, rows.tolist()) for step, rows in plan.walk()]
    assert [(step, rows.tolist()) for step, rows in plan.walk(start)] == whole[start:]


def test_seed_task_and_epoch_make_the_order() -> None:
    plan = BatchPlan(rows=200, batch=200, epochs=2, seed=0, task="yelp")
    orders = [
        plan.at(0),
        plan.at(1),
        dataclasses.replace(plan, seed=1).at(0),
        dataclasses.replace(plan, task="imdb").at(0),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert plan.at(0).tolist() == dataclasses.replace(plan, batch=200, epochs=9).at(0).tolist()
    assert plan.at(0).tolist() != sorted(plan.at(0).tolist())


def test_the_order_of_a_seed_never_changes() -> None:
    """A run resumed with a newer version must see the same batches."""
    assert BatchPlan(rows=12, batch=6, epochs=1, seed=3, task="digits").at(0).tolist() == [3, 10, 9, 0, 6, 2]


@given(st.integers(1, 5000), st.text(max_size=5))
def test_a_permutation_is_one(count: int, key: str) -> None:
    found = permuted(np.arange(count), count, key)
    assert (np.sort(found) == np.arange(count)).all()


def test_permutations_over_many_keys_are_uniform() -> None:
    """Every row comes to every place equally often, and neighbours do not stay together."""
    count, keys = 13, 6000
    seen = np.array([permuted(np.arange(count), count, str(key)) for key in range(keys)])
    shares = np.array([np.bincount(seen[:, place], minlength=count) for place in range(count)]) / keys
    assert np.abs(shares - 1 / count).max() < 5 * np.sqrt(1 / count / keys)
    together = (np.abs(np.diff(seen, axis=1)) == 1).mean()
    assert together == pytest.approx(2 / count, abs=0.01)


def test_a_step_of_a_huge_task_costs_no_list_of_its_rows() -> None:
    plan = BatchPlan(rows=10**12, batch=32, epochs=1, seed=0, task="web")
    rows = plan.at(plan.steps - 1)
    assert len(rows) == 32
    assert len(set(rows.tolist())) == 32
    assert rows.min() >= 0
    assert rows.max() < 10**12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows of task 'yelp' must be at least 1, got 0"),
        ({"batch": 0}, "batch of task 'yelp' must be at least 1, got 0"),
        ({"epochs": -1}, "epochs of task 'yelp' must be at least 1, got -1"),
    ],
)
def test_a_plan_without_rows_or_steps_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BatchPlan(rows=5, batch=2, epochs=1, seed=0, task="yelp"), **changes)


def test_steps_and_ranks_that_do_not_exist_are_refused() -> None:
    plan = BatchPlan(rows=5, batch=2, epochs=2, seed=0, task="yelp")
    with pytest.raises(ValueError, match="task 'yelp' has steps 0 to 5, got 6"):
        plan.at(6)
    with pytest.raises(ValueError, match="rank must lie in 0 to 1, got 2"):
        plan.at(0, rank=2, workers=2)
