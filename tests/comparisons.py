"""Comparisons that never were, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests import results
from treelora_ray.cluster.compare_rows import Row
from treelora_ray.config import from_mapping
from treelora_ray.tracking.compare import Entry

TASKS = [f"task-{number}" for number in range(6)]
METHODS = {  # at the start, points lost a task, seconds a step
    "seqlora": (78.0, 6.0, 0.010),
    "independent": (88.0, 0.0, 0.010),
    "ewc": (79.0, 4.0, 0.014),
    "ogd": (80.0, 3.5, 0.031),
    "der++": (84.0, 1.2, 0.018),
    "o-lora": (77.0, 3.0, 0.012),
    "treelora": (91.0, 0.3, 0.011),
}


def run(name: str, matrix: Any, seed: int = 0, tasks: Sequence[str] = TASKS, **effort: Any) -> Entry:
    """A run of these scores; `effort` is that of each task."""
    method = {"method": {"name": effort.pop("method", "seqlora")}}
    found = results.result(list(tasks)[: len(matrix[0])], matrix)
    for record in found["records"]:
        record["effort"] = {**record["effort"], **effort}
    return Entry(name, from_mapping({"name": name, "seed": seed, **method}), found)


def named(row: str, seed: int) -> str:
    return f"{Row(row, row).slug}-s{seed}"


def cell(row: str, seed: int, state: str = "finished", **more: Any) -> dict[str, Any]:
    name = named(row, seed)
    found = {"id": name, "row": row, "seed": seed, "run": f"cells/{name}", "state": state, "error": None}
    return {**found, "failures": 0, "kept": {"memory": 2**20, "stored": 3 * 2**19}, **more}


def about(rows: dict[str, str], cells: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What comparison.json holds. `rows`: by label, the method."""
    return {
        "name": "compare-quickstart", "objective": "classification", "reach": None, "at_once": 1, "data": {},
        "rows": {label: {"method": method, "settings": {}, "config": {}} for label, method in rows.items()},
        "seeds": sorted({each["seed"] for each in cells}), "cells": list(cells), "seconds": 754.0,
        "code": {"sources": "0123456789abcdef", "torch": "2.13.0"}, **more,
    }  # fmt: skip


def drawn(seeds: int = 3) -> tuple[dict[str, Any], dict[str, Entry]]:
    """All of METHODS, of which ogd has failed once; `routed` is seqlora with other settings."""
    rng = np.random.default_rng(0)
    rows = {label: label for label in METHODS} | {"seqlora ce_scope=current": "seqlora"}
    cells, entries = [], {}
    for seed in range(seeds):
        for label, method in rows.items():
            if (label, seed) == ("ogd", 1):
                cells.append(cell(label, seed, "failed", error="NonFiniteError: the loss is nan at step 12"))
                continue
            start, loss, step = METHODS[method]
            start += 3.0 * (label != method)
            matrix = np.full((len(TASKS), len(TASKS)), np.nan)
            for after in range(len(TASKS)):
                for task in range(after + 1):
                    matrix[after, task] = min(99.0, start - loss * (after - task) + rng.normal(0, 1.5))
            steps = 60
            rate = 0.16 if method == "treelora" else 0.09
            watched = [[at, float((start + 4) * (1 - np.exp(-rate * (at + 3))))] for at in range(0, steps + 1, 5)]
            effort: dict[str, Any] = {
                "seconds": {"statistics": 0.4, "train": steps * step * rng.uniform(0.95, 1.05), "evaluate": 0.5},
                "steps": steps, "probe_rounds": 8 if method == "treelora" else 0, "watched": watched,
            }  # fmt: skip
            cells.append(cell(label, seed, kept={"memory": int(2**18 * loss) + 2**18, "stored": 2**20}))
            name = named(label, seed)
            entries[name] = run(name, matrix, seed, method=method, **effort)
    return about(rows, cells, reach=0.95, at_once=2), entries
