"""Runs side by side: numbers worked out by hand, and only what is comparable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests import results
from treelora_ray.config import from_mapping
from treelora_ray.tracking.compare import Entry, Value, compare, counted, shared

NAN = np.nan


def entry(name: str, matrix: Any, tasks: str = "abcdef", seed: int = 0, **config: Any) -> Entry:
    more = {key: config.pop(key) for key in ("data", "device", "commit", "finished") if key in config}
    names = list(tasks)[: len(matrix[0])]
    return Entry(name, from_mapping({"name": name, "seed": seed, **config}), results.result(names, matrix, **more))


def two(first: float, drop: float) -> list[list[float]]:
    """Two tasks: the first is learnt at `first` and loses `drop`, the second is learnt at 60."""
    return [[first, NAN], [first - drop, 60.0]]


def test_seeds_of_the_same_settings_are_one_group_with_mean_and_sample_deviation() -> None:
    entries = [entry(f"r{seed}", two(80.0 + 2 * seed, 10.0), seed=seed) for seed in range(3)]
    found = compare(entries)
    (group,) = found.groups
    # op is (70 + 2 s + 60) / 2 = 65, 66, 67; bwt over both tasks is 5, forgetting over the first is 10.
    assert group.measures["op"] == Value(66.0, 1.0, 3)
    assert group.measures["bwt"] == Value(5.0, 0.0, 3)
    assert group.measures["forgetting"] == Value(10.0, 0.0, 3)
    assert group.measures["learning_accuracy"] == Value(71.0, 1.0, 3)
    assert group.measures["average_incremental_accuracy"].mean == pytest.approx((82 + 66) / 2)
    assert group.scores == {"a": Value(72.0, 2.0, 3), "b": Value(60.0, 0.0, 3)}
    assert group.course == [Value(82.0, 2.0, 3), Value(66.0, 1.0, 3)]
    assert found.basis == "All runs learnt the same 2 tasks in the same order: everything is compared."
    assert found.notes == []


def test_one_seed_has_no_deviation() -> None:
    (group,) = compare([entry("r", two(80, 10))]).groups
    assert group.measures["op"] == Value(65.0, None, 1)


def test_what_a_run_cost_is_counted_up_to_where_it_is_compared() -> None:
    long = np.where(np.tri(3, dtype=bool), 50.0, NAN).tolist()
    short, other = compare([entry("short", two(80, 10)), entry("long", long, train={"lr": 0.1})]).groups
    # Each task: 30 steps, 4 probe rounds, 65 rows passed in batches of 32; 8 s of training of 10 s.
    for group in (short, other):
        assert group.measures["steps"].mean == 60
        assert group.measures["counted"].mean == 2 * (30 + 4 + 3)
        assert group.measures["step_ms"].mean == pytest.approx(8000 / 30)
        assert group.measures["seconds"].mean == 20


def test_probe_rounds_queries_and_passes_count_as_steps() -> None:
    effort = {"steps": 7, "probe_rounds": 5, "queries": 3, "pass_rows": 33}
    assert counted(effort, 32) == 7 + 5 + 3 + 2


def test_a_run_that_stands_twice_counts_once() -> None:
    found = compare([entry("r", two(80, 10)), entry("again", two(80, 10))])
    assert [run.name for run in found.groups[0].runs] == ["r"]
    assert found.notes == ["again is left out: r has the same settings and the same seed."]


def test_groups_are_named_by_what_sets_them_apart() -> None:
    entries = [
        entry("a", two(80, 10), method={"name": "treelora"}),
        entry("b", two(80, 10), method={"name": "treelora", "lambda": 0.3}),
        entry("c", two(80, 10), method={"name": "seqlora"}),
    ]
    found = compare(entries)
    assert [group.label for group in found.groups] == ["treelora (lambda 0.1)", "treelora (lambda 0.3)", "seqlora"]
    assert found.differences["method.lambda"] == [0.1, 0.3, "–"]
    assert "seed" not in found.differences
    assert "name" not in found.differences


# -- different tasks


def test_streams_that_begin_alike_are_compared_as_they_stood_then() -> None:
    long = [[90.0, NAN, NAN], [70.0, 50.0, NAN], [10.0, 20.0, 60.0]]
    found = compare([entry("short", two(80, 10)), entry("long", long, train={"lr": 0.1})])
    assert found.tasks == ["a", "b"]
    assert "begin with the same 2 tasks and then differ" in found.basis
    assert found.groups[1].measures["op"].mean == 60  # after two tasks, not after three
    assert found.groups[1].measures["bwt"].mean == 10
    assert found.groups[1].scores["a"].mean == 70
    assert [value.mean for value in found.groups[1].course] == [90, 60]


def test_of_other_orders_only_the_last_scores_are_compared() -> None:
    found = compare([entry("one", two(80, 10), "ab"), entry("other", two(90, 30), "ba", train={"lr": 0.1})])
    assert "in different orders" in found.basis
    assert found.groups[0].scores == {"a": Value(70, None, 1), "b": Value(60, None, 1)}
    assert found.groups[1].scores == {"a": Value(60, None, 1), "b": Value(60, None, 1)}
    for group in found.groups:
        assert "bwt" not in group.measures
        assert "forgetting" not in group.measures
        assert group.measures["op"].n == 1
        assert group.measures["steps"].mean == 60
        assert group.course == []


def test_of_streams_that_share_some_tasks_these_alone_are_compared() -> None:
    three = [[80.0, NAN, NAN], [70.0, 50.0, NAN], [60.0, 40.0, 90.0]]
    found = compare([entry("one", three, "xab"), entry("other", two(90, 30), "ya", train={"lr": 0.1})])
    assert found.tasks == ["a"]
    assert "1 task in common, learnt among different others" in found.basis
    assert [group.measures for group in found.groups] == [{"op": Value(40, None, 1)}, {"op": Value(60, None, 1)}]


def test_runs_without_a_task_in_common_are_not_compared() -> None:
    found = compare([entry("one", two(80, 10), "ab"), entry("other", two(80, 10), "xy", train={"lr": 0.1})])
    assert found.tasks == []
    assert found.basis == "The runs have no task in common: nothing of them can be compared."
    assert all(not group.measures and not group.scores for group in found.groups)


@pytest.mark.parametrize(
    ("orders", "tasks", "staged"),
    [
        (["abc", "abc"], "abc", True),
        (["abc", "ab", "abd"], "ab", True),
        (["abc", "acb"], "abc", False),
        (["abcd", "acb"], "abc", False),
        (["abc", "bcd"], "bc", False),
        (["ab", "cd"], "", False),
    ],
)
def test_what_streams_share(orders: list[str], tasks: str, staged: bool) -> None:
    runs = [entry("r", np.full((len(order), len(order)), 50.0).tolist(), order) for order in orders]
    assert shared(runs)[:2] == (list(tasks), staged)


def test_tasks_learnt_at_once_have_a_mean_score_and_no_forgetting() -> None:
    joint = entry("joint", [[80.0, 90.0]], method={"name": "joint"})
    found = compare([entry("one", two(80, 10)), joint])
    assert found.groups[1].measures["op"] == Value(85.0, None, 1)
    assert "bwt" not in found.groups[1].measures
    assert found.groups[1].course == []
    longer = compare([entry("one", two(80, 10)), entry("joint", [[80.0, 90.0, 70.0]], method={"name": "joint"})])
    assert longer.groups[1].measures == {}
    assert longer.groups[1].runs == []
    assert "joint learnt all its tasks at once: it has no scores after 2 of them." in longer.notes


# -- reservations


def notes(*entries: Entry) -> str:
    return " ".join(compare(entries).notes)


def test_differences_that_change_the_question_are_named() -> None:
    last = entry("b", two(80, 10), objective={"routing": "last"}, train={"steps": 50})
    said = notes(entry("a", two(80, 10)), last)
    assert "objective.routing differs (inferred, last), that is which adapter answers at test" in said
    assert "train.steps differs (None, 50), that is the budget" in said
    assert "Fewer than 3 seeds stand behind some rows" in said


def test_three_seeds_a_group_need_no_reservation() -> None:
    entries = [
        entry(f"{lr}-{seed}", two(80, 10), seed=seed, train={"lr": lr}) for lr in (0.1, 0.2) for seed in range(3)
    ]
    assert compare(entries).notes == []
    assert "Fewer than 3 seeds" in notes(*entries[:-1])


def test_rows_that_differ_for_the_same_seed_are_named_and_for_other_seeds_are_not() -> None:
    def run(name: str, digest: str, seed: int) -> Entry:
        data = [{"name": "a", "digest": digest}, {"name": "b", "digest": "same"}]
        return entry(name, two(80, 10), seed=seed, data=data, train={"lr": 0.1 if name == "x" else 0.2})

    assert "The rows of a are not the same in all runs of one seed" in notes(run("x", "1", 0), run("y", "2", 0))
    assert "rows of" not in notes(run("x", "1", 0), run("y", "2", 1))


def test_devices_versions_and_unfinished_runs_are_named() -> None:
    other = entry("b", two(80, 10), seed=1, device="cuda", commit="f00", finished=False)
    said = notes(entry("a", two(80, 10)), other)
    assert "Times were taken on different devices (cpu, cuda)" in said
    assert "made by different commits" in said
    assert "Not finished yet: b." in said


def test_the_deviation_is_that_of_a_sample() -> None:
    assert Value.of([1.0, 2.0, 6.0]).std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
