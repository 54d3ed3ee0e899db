"""What a task costs as more tasks are stored: a section of the page of a table of many tasks.

print(markdown(table, results))         `results`: of the cells that are there
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cells import Results, Table
from treelora_ray.tracking.comparison_data import learning_seconds
from treelora_ray.tracking.comparison_table import NONE

Record = Mapping[str, Any]


def spans(tasks: int, count: int) -> Iterator[tuple[int, int]]:
    """As many parts of the stream, about as long: the first task of each, and the one after its last."""
    ends = [round(tasks * part / count) for part in range(count + 1)]
    return ((first, end) for first, end in itertools.pairwise(ends) if end > first)


def looking(record: Record) -> float:
    """Seconds that are spent on learning a task beside its training steps, by whichever run."""
    return learning_seconds(record["effort"]) - float(record["effort"]["seconds"]["train"])


def searching(record: Record) -> float | None:
    """Seconds of the search; of a task whose gradients the run took from another one: there nothing else is in them."""
    effort = record["effort"]
    if not effort["probe_rounds"] or effort["reused"].get("probe_rounds", 0) < effort["probe_rounds"]:
        return None
    return float(effort["seconds"]["probe"])


def median(values: list[float | None], form: str) -> str:
    """Not the mean: a machine that pauses once says nothing of a task."""
    told = [value for value in values if value is not None]
    return form.format(statistics.median(told)) if told else NONE


def markdown(table: Table, results: Results) -> str:
    """For each row, part by part of the stream."""
    lines = []
    for row in table.rows:
        runs = [results[row, seed]["records"] for seed in table.seeds if (row, seed) in results]
        for first, end in spans(min(map(len, runs), default=0), table.growth):
            scores = [statistics.mean(x for x in run[end - 1]["scores"] if x is not None) for run in runs]
            records = [record for run in runs for record in run[first:end]]
            lines.append(
                f"| {row} | {first + 1} to {end} | {statistics.mean(scores):.1f}"
                f" | {median([looking(record) for record in records], '{:.2f}')}"
                f" | {median([searching(record) for record in records], '{:.3f}')}"
                f" | {median([record['effort']['seconds']['train'] for record in records], '{:.2f}')}"
                f" | {median([record['effort']['seconds'].get('checkpoint') for record in records], '{:.3f}')} |"
            )
    if not lines:
        return ""
    head = "| method | tasks | OP at their end, % | looking, s | of this the search, s | training, s | checkpoint, s |"
    about = (
        "Scores are means over seeds, on all tasks seen. Seconds are of one task, medians over tasks and seeds; the "
        "search is told where gradients were taken from an earlier run."
    )
    return "\n".join(["## As tasks are stored", "", about, "", head, "|---|---|---:|---:|---:|---:|---:|", *lines])
