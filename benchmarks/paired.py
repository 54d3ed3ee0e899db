"""Scores beside those of `independent` with the same seed: what differs from seed to seed for all rows drops out."""

from __future__ import annotations

import statistics

from benchmarks.cells import Results, Table

ALONE = "independent"


def differences(table: Table, results: Results) -> dict[str, dict[int, float]]:
    """By row and seed, points of OP above `independent`, of the cells that are there."""
    score = {place: result["metrics"]["op"] for place, result in results.items()}
    rows = [row for row in table.rows if row != ALONE]
    seeds = sorted({seed for _, seed in score})
    both = {row: [s for s in seeds if {(row, s), (ALONE, s)} <= score.keys()] for row in rows}
    return {row: {seed: score[row, seed] - score[ALONE, seed] for seed in own} for row, own in both.items()}


def markdown(table: Table, results: Results) -> str:
    told = {row: by_seed for row, by_seed in differences(table, results).items() if by_seed}
    if not told:
        return ""
    lines = []
    for row, by_seed in sorted(told.items(), key=lambda item: -statistics.mean(item[1].values())):
        values = list(by_seed.values())
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        single = ", ".join(f"{value:+.1f}" for value in values)
        lines.append(f"| {row} | {statistics.mean(values):+.1f}{spread} | {single} |")
    return "\n".join([f"## Beside {ALONE}, seed by seed", "", f"| method | OP above {ALONE}, points | each seed |",
                      "|---|---:|---|", *lines])  # fmt: skip
