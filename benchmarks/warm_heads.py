"""Where the head of a task should start whose adapter starts from a related task's: at which class means.

    python benchmarks/warm_heads.py DATA [--seeds 0 1 2] [--steps 40] [--doc]

Text tasks of table text-7b, on training rows alone: 400 and 200 that are held out. Of each pair the second task's
adapter becomes the first's, as trained alone, and its head starts from class means of features through that adapter:
over a few of the task's rows, over all of them, and as told from the few and from what is known of frozen features
(`Learner.moved_sums`). Printed: percent of the held-out rows that are right before the first step; beside it those of a
fresh adapter with the head it has, before its first step and after its last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks.cells import read_table  # noqa: E402
from treelora_ray.api import assemble  # noqa: E402
from treelora_ray.config import with_values  # noqa: E402
from treelora_ray.data.stream import open_stream  # noqa: E402
from treelora_ray.methods.base import Method  # noqa: E402
from treelora_ray.methods.learner import Learner  # noqa: E402
from treelora_ray.models.router import ClassSums  # noqa: E402
from treelora_ray.training.evaluate import Evaluator  # noqa: E402
from treelora_ray.training.loop import begin_task, end_task, train_task  # noqa: E402

PAGE = ROOT / "docs" / "results" / "warm-heads.md"
TABLE = ROOT / "pipelines" / "reproduce" / "tables" / "text-7b.yaml"
PAIRS = [
    ("sst2", "yelp"), ("sst2", "imdb"), ("yelp", "imdb"), ("yelp", "amazon"), ("agnews", "yahoo"),
    ("agnews", "dbpedia"), ("yahoo", "dbpedia"),
]  # fmt: skip
COLUMNS = ("fresh", "fresh, after", "few rows", "all rows", "sample")
Scores = dict[str, float]  # by column, percent


def percent(method: Method, task: int) -> float:
    """Of the task's held-out rows that are answered rightly, by adapter and head as they are now, the task told."""
    with method.learner.answering_as_trained():
        return Evaluator(method, "oracle").score(task, method.learner.tasks[task])


def few(learner: Learner) -> Callable[[int], ClassSums]:
    """Class means over the sample's rows alone."""

    def sums_of(task: int) -> ClassSums:
        found = ClassSums(len(learner.tasks[task].labels), learner.model.width)
        found.add(*learner.class_features(task, learner.features, learner.samples[task][0]))
        return found

    return sums_of


def scores(data: Path, seed: int, changes: dict[str, Any]) -> dict[tuple[str, str], Scores]:
    """By pair."""
    config = next(cell.config for cell in read_table(TABLE, data, [seed]).cells if cell.row == "independent")
    config = with_values(config, {"stream.holdout": 0.5, "stream.test_rows": 200, **changes}, "held out")
    stream = open_stream(config.stream, seed)
    method = assemble(config, stream.kind)
    learner, trained = method.learner, dict[str, torch.Tensor]()
    learner.tasks = stream.tasks
    found: dict[tuple[str, str], Scores] = {}
    for task, each in enumerate(stream.tasks):
        begin_task(method, (task,))
        start, head = percent(method, task), learner.head.take(learner.rows)
        for one in [one for one, other in PAIRS if other == each.name and one in trained]:
            learner.adapter.data.copy_(trained[one])
            told = {"fresh": start}
            ways = {"few rows": few(learner), "all rows": learner.class_sums, "sample": learner.moved_sums}
            for name, sums_of in ways.items():
                learner.restart_head(sums_of)
                told[name] = percent(method, task)
            found[one, each.name] = told
        learner.head.put(learner.rows, head)
        begin_task(method, (task,))  # anew, as a task without relatives
        train_task(method, 0, lambda *_: None, lambda _: None)
        learner.model.train(False)
        after = percent(method, task)
        for (_, other), told in found.items():
            if other == each.name:
                told["fresh, after"] = after
        trained[each.name] = learner.adapter.clone()
        end_task(method)
    return found


def page(found: list[dict[tuple[str, str], Scores]], seeds: list[int]) -> str:
    lines = []
    for pair in found[0]:
        means = [np.mean([of_seed[pair][column] for of_seed in found]) for column in COLUMNS]
        lines.append(f"| {' → '.join(pair)} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    whole = [np.mean([told[column] for of_seed in found for told in of_seed.values()]) for column in COLUMNS]
    lines.append("| mean | " + " | ".join(f"{mean:.1f}" for mean in whole) + " |")
    table, numbers = "\n".join(lines), ", ".join(map(str, seeds))
    return f"""# Where the head of a related task starts

Percent of 200 held-out training rows that are right before the first step, means of seeds {numbers}. An adapter that
starts from a related task's has moved the features, so class means of frozen ones are of no use. Means over a few rows
(96, as many of each class) are far off where classes are many; told from the same rows and from what is known of frozen
features, they are as good as means over all 400. Beside them a fresh adapter, and where it ends.

| from → to | fresh | fresh, after its last step | few rows | all rows | few rows and frozen features |
|---|---:|---:|---:|---:|---:|
{table}

    python benchmarks/warm_heads.py DATA --seeds {" ".join(map(str, seeds))} --doc
"""


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="of a task that is trained alone")
    parser.add_argument("--doc", action="store_true", help="rewrite docs/results/warm-heads.md")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    found = [scores(options.data.resolve(), seed, {"train.steps": options.steps}) for seed in options.seeds]
    text = page(found, options.seeds)
    print(text)
    if options.doc:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
