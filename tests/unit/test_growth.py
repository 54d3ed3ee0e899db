"""What a task costs as more are stored: parts of the stream, and whose seconds count."""

from __future__ import annotations

from typing import Any

from benchmarks import growth
from benchmarks.cells import Table


def record(place: int, tasks: int, probe: float, shared: bool) -> dict[str, Any]:
    reused = {"pass_rows": 80, "probe_rounds": 4, "seconds": 0.5} if shared else {"pass_rows": 80, "seconds": 0.25}
    seconds = {"probe": probe, "statistics": 0.125, "train": 1.0 + place, "checkpoint": 0.01}
    effort = {"seconds": seconds, "probe_rounds": 4, "reused": reused}
    return {"scores": [50.0 + place] * (place + 1) + [None] * (tasks - place - 1), "effort": effort}


def table(**rows: str) -> Table:
    return Table("tiny", "Tiny", dict.fromkeys(rows), [], [], None, {}, [0, 1], [], 2)  # type: ignore[arg-type]


def test_a_stream_is_told_in_parts_without_gaps() -> None:
    assert list(growth.spans(48, 4)) == [(0, 12), (12, 24), (24, 36), (36, 48)]
    assert list(growth.spans(7, 3)) == [(0, 2), (2, 5), (5, 7)]
    assert list(growth.spans(2, 4)) == [(0, 1), (1, 2)], "no part is empty"
    assert list(growth.spans(0, 4)) == []


def test_looks_count_whoever_spent_them_and_a_search_counts_where_it_stands_alone() -> None:
    assert growth.looking(record(0, 1, 0.25, shared=True)) == 0.25 + 0.125 + 0.5
    queried = record(0, 1, 0.25, shared=True)
    queried["effort"]["seconds"] |= {"query": 2.0, "watch": 4.0, "evaluate": 8.0}
    assert growth.looking(queried) == 0.25 + 0.125 + 0.5 + 2.0, "scoring is no part of learning"
    assert growth.searching(record(0, 1, 0.25, shared=True)) == 0.25
    assert growth.searching(record(0, 1, 0.25, shared=False)) is None, "gradients are in it"


def test_each_part_has_the_scores_at_its_end_and_the_seconds_of_its_tasks() -> None:
    runs = {
        ("treelora", seed): {"records": [record(place, 4, 0.01 * (place + 1), shared=True) for place in range(4)]}
        for seed in (0, 1)
    }
    alone = {("plain", 0): {"records": [record(place, 4, 2.0, shared=False) for place in range(4)]}}
    text = growth.markdown(table(treelora="", plain="", missing=""), {**runs, **alone})
    assert [line for line in text.splitlines() if line.startswith("| ")][1:] == [
        "| treelora | 1 to 2 | 51.0 | 0.64 | 0.015 | 1.50 | 0.010 |",
        "| treelora | 3 to 4 | 53.0 | 0.66 | 0.035 | 3.50 | 0.010 |",
        "| plain | 1 to 2 | 51.0 | 2.38 | – | 1.50 | 0.010 |",
        "| plain | 3 to 4 | 53.0 | 2.38 | – | 3.50 | 0.010 |",
    ]


def test_a_task_that_was_broken_off_before_its_checkpoint_has_no_seconds_of_one() -> None:
    broken, whole = record(0, 2, 0.01, shared=True), record(1, 2, 0.01, shared=True)
    del broken["effort"]["seconds"]["checkpoint"]
    text = growth.markdown(table(treelora=""), {("treelora", 0): {"records": [broken, whole]}})
    first, second = text.splitlines()[-2:]
    assert first.endswith(" | 1.00 | – |")
    assert second.endswith(" | 2.00 | 0.010 |")


def test_without_a_cell_there_is_no_such_section() -> None:
    assert growth.markdown(table(treelora=""), {}) == ""
