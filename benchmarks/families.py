"""How well each kind of tree finds planted families: the table of docs/results/families.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks.planted import LAYERS, VALUES, Planted, adjusted_rand, as_labels, planted, planted_cosine  # noqa: E402
from treelora_ray.core.grow import Linkage, TreeKind, insert_by_linkage, kd_tree, linkage_tree  # noqa: E402
from treelora_ray.core.store import SignatureStore  # noqa: E402
from treelora_ray.core.tree import Tree  # noqa: E402

DEPTH = 64


class Row(NamedTuple):
    families: str
    tasks: str  # how alike the tasks of a family are
    make: Callable[[int], Planted]  # of a seed


COLUMNS = [
    "kd-radius, best level",
    "kd-inner, best level",
    "complete, l1",
    "average, l1",
    "complete, cosine",
    "average, cosine",
    "average, cosine, inserted",
]
SHAPES: list[tuple[str, list[int], int]] = [
    ("8 8 8 8", [8] * 4, 0),
    ("3 5 9 15", [3, 5, 9, 15], 0),
    ("12 x 4", [4] * 12, 0),
    ("8 8 + 10 loners", [8, 8], 10),
]
NOISES = [0.5, 1.5, 2.5]
COSINES = [0.15, 0.25, 0.35]


def table_rows() -> list[Row]:
    noisy = [
        Row(name, f"noise {noise}", partial(planted, sizes, noise, loners))
        for name, sizes, loners in SHAPES
        for noise in NOISES
    ]
    alike = [
        Row(name, f"cosine {cosine}", partial(planted_cosine, sizes, cosine, loners))
        for name, sizes, loners in SHAPES
        for cosine in COSINES
    ]
    return noisy + alike


def score(data: Planted) -> list[float]:
    """The adjusted Rand index of each column's tree."""
    l1, cosine = data.store("l1"), data.store("cosine")
    return [
        *(best_level(data, l1, kind) for kind in ("kd-radius", "kd-inner")),
        *(true_number(data, store, method) for store in (l1, cosine) for method in ("complete", "average")),
        true_number(data, cosine, "average", inserted=True),
    ]


def best_level(data: Planted, store: SignatureStore, kind: TreeKind) -> float:
    tree = kd_tree(np.arange(len(store)), store.rows.layer, kind, len(store.layout))
    levels = range(tree.max_depth + 2)
    return max(adjusted_rand(as_labels(tree.groups(level)), data.labels) for level in levels)


def true_number(data: Planted, store: SignatureStore, method: Linkage, inserted: bool = False) -> float:
    if inserted:
        tree = Tree.of_tasks([0])
        for task in range(1, len(store)):
            tree = insert_by_linkage(tree, task, store.pair_row(task)[:task], method, DEPTH)
    else:
        tree = linkage_tree(store.condensed, len(store), method, DEPTH)
    return adjusted_rand(as_labels(tree.cut_into(data.families)), data.labels)


def as_markdown(results: list[tuple[Row, list[float]]]) -> str:
    lines = [["families", "tasks of a family", *COLUMNS], ["---"] * 2 + ["---:"] * len(COLUMNS)]
    lines += [[row.families, row.tasks, *(f"{mean:.2f}" for mean in means)] for row, means in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_page(table: str, seeds: int, command: str) -> str:
    return f"""# Which trees find planted families

Adjusted Rand index of planted and found families, mean over {seeds} seeds (0 to {seeds - 1}): 1 is perfect, 0 is
chance. {LAYERS} layers of {VALUES} values, signatures in half precision. *Noise* is the norm of a task's own part
relative to its family's centre; *cosine* is the cosine between two tasks of a family. A loner is a family of one.
The K-D trees split level d by layer d and are read at whichever level fits best, which flatters them; linkage
uses the mean distance over layers and is cut into the true number of groups (`Tree.cut_into`). *Inserted* trees
grew task by task and were never rebuilt.

{table}

Regenerate with

    {command}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, help="how many (8; with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="a look in a few seconds")
    parser.add_argument("--doc", action="store_true", help="rewrite docs/results/families.md")
    arguments = parser.parse_args()
    seeds = arguments.seeds or (2 if arguments.quick else 8)
    started = time.perf_counter()
    scores = [(row, np.array([score(row.make(seed)) for seed in range(seeds)])) for row in table_rows()]
    results = [(row, values.mean(0).tolist()) for row, values in scores]
    table = as_markdown(results)
    print(table)
    out = ROOT / "benchmarks" / "out" / "families.json"
    out.parent.mkdir(exist_ok=True)
    data = {
        "seeds": seeds,
        "seconds": round(time.perf_counter() - started, 1),
        "columns": COLUMNS,
        "rows": [
            {
                "families": row.families,
                "tasks": row.tasks,
                "mean": values.mean(0).round(4).tolist(),
                "least": values.min(0).round(4).tolist(),
            }
            for row, values in scores
        ],
    }
    out.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.doc:
        page = ROOT / "docs" / "results" / "families.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(as_page(table, seeds, f".venv/bin/python benchmarks/families.py --seeds {seeds} --doc"))


if __name__ == "__main__":
    main()
