from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from treelora_ray.training import metrics
from treelora_ray.training.metrics import ScoreError

NAN = float("nan")
# Three tasks. Task 0: 90, then 80, then 60. Task 1: 70, then 75. Task 2: 50. Before learning: 20 and 30.
RUN = np.array([[90.0, 20.0, NAN], [80.0, 70.0, 30.0], [60.0, 75.0, 50.0]])

matrices = st.integers(2, 8).flatmap(lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(0, 100)))


def test_each_metric_of_a_small_run_by_hand() -> None:
    assert metrics.overall_performance(RUN) == pytest.approx((60 + 75 + 50) / 3)
    assert metrics.learning_accuracy(RUN) == pytest.approx((90 + 70 + 50) / 3)
    assert metrics.bwt(RUN) == pytest.approx((30 - 5 + 0) / 3)
    assert metrics.bwt(RUN, norm="n-1") == pytest.approx((30 - 5) / 2)
    assert metrics.bwt_gem(RUN) == pytest.approx((-30 + 5) / 2)
    assert metrics.bwt_released(RUN) == pytest.approx((-30 + 0 + 0) / 3)
    assert metrics.forgetting(RUN) == pytest.approx(((90 - 60) + (70 - 75)) / 2)
    assert metrics.forgetting(RUN, include_last=True) == pytest.approx(((90 - 60) + 0) / 2)
    assert metrics.forward_transfer_gem(RUN, [10, 15, 40]) == pytest.approx(((20 - 15) + (30 - 40)) / 2)
    assert metrics.forward_transfer_sapt(RUN, [95, 60, 50]) == pytest.approx((-5 + 10 + 0) / 3)
    assert metrics.average_incremental_accuracy(RUN) == pytest.approx((90 + (80 + 70) / 2 + 185 / 3) / 3)
    pooled = (90 + (80 * 10 + 70 * 30) / 40 + (60 * 10 + 75 * 30 + 50 * 60) / 100) / 3
    assert metrics.average_incremental_accuracy(RUN, samples=[10, 30, 60]) == pytest.approx(pooled)


def test_the_best_score_may_lie_between_learning_and_the_end() -> None:
    rose = np.array([[40.0, NAN, NAN], [70.0, 50.0, NAN], [55.0, 50.0, 50.0]])
    assert metrics.forgetting(rose) == pytest.approx((15 + 0) / 2)
    assert metrics.bwt(rose) == pytest.approx(-15 / 3)


@given(matrices)
def test_overall_performance_is_learning_accuracy_less_bwt(a: np.ndarray) -> None:
    assert metrics.overall_performance(a) == pytest.approx(metrics.learning_accuracy(a) - metrics.bwt(a))
    assert metrics.bwt_gem(a) == pytest.approx(-len(a) / (len(a) - 1) * metrics.bwt(a))


@given(matrices)
def test_a_matrix_that_only_improves_has_no_forgetting(a: np.ndarray) -> None:
    improving = np.maximum.accumulate(a, axis=0)
    assert metrics.bwt(improving) <= 0
    assert metrics.bwt_released(improving) == 0
    assert metrics.forgetting(improving) <= 0
    assert metrics.forgetting(improving, include_last=True) == 0


@given(matrices)
def test_forgetting_counts_at_least_what_bwt_counts(a: np.ndarray) -> None:
    assert metrics.forgetting(a) >= metrics.bwt(a, norm="n-1") - 1e-9
    assert metrics.forgetting(a, include_last=True) >= max(0.0, metrics.forgetting(a) - 1e-9)
    assert metrics.bwt_released(a) <= min(0.0, -metrics.bwt(a) + 1e-9)


@given(matrices)
def test_scores_are_left_as_they_were_and_tasks_to_come_do_not_count(a: np.ndarray) -> None:
    before = a.copy()
    hidden = np.where(np.tril(np.ones_like(a)) > 0, a, NAN)
    assert metrics.summary(a) == metrics.summary(hidden)
    metrics.forward_transfer_gem(a, np.zeros(len(a)))
    assert (a == before).all()


def test_one_task_has_what_one_task_can_have() -> None:
    found = metrics.summary([[81.0]])
    assert found["op"] == found["learning_accuracy"] == found["average_incremental_accuracy"] == 81
    assert found["bwt"] == 0
    assert found["forgetting"] is None
    assert found["bwt_n_minus_1"] is None
    with pytest.raises(ScoreError, match="at least 2 tasks; the matrix has 1"):
        metrics.forgetting([[81.0]])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ScoreError, match=r"a row and a column for each task; got shape \[2, 3\]"):
        metrics.bwt(np.zeros((2, 3)))
    with pytest.raises(ScoreError, match="score on task 0 after task 1 is nan; it must be measured"):
        metrics.overall_performance([[1.0, NAN], [NAN, 2.0]])
    with pytest.raises(ScoreError, match="needs at least 1 tasks; the matrix has 0"):
        metrics.overall_performance(np.zeros((0, 0)))
    with pytest.raises(ScoreError, match=r"score on task 2 before it is learnt \(after task 1\)"):
        metrics.forward_transfer_gem(np.where(RUN == 30, NAN, RUN), [0, 0, 0])
    with pytest.raises(ScoreError, match="independent scores must be one number a task, 3 in all"):
        metrics.forward_transfer_sapt(RUN, [1, 2])
    with pytest.raises(ScoreError, match="sample counts must be positive"):
        metrics.average_incremental_accuracy(RUN, samples=[1, 0, 1])
    with pytest.raises(ScoreError, match="norm is 'm'; known: n, n-1"):
        metrics.bwt(RUN, norm="m")  # type: ignore[arg-type]
