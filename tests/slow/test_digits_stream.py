"""The built-in stream is neither too easy for frozen features nor learnt in a few steps, and its families are seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.planted import adjusted_rand, as_labels
from treelora_ray.api import assemble, run
from treelora_ray.config import load
from treelora_ray.data.digits import digits_stream
from treelora_ray.data.rows import column
from treelora_ray.methods.base import Method
from treelora_ray.methods.shared import Shared
from treelora_ray.training import loop
from treelora_ray.training.evaluate import Evaluator

pytestmark = pytest.mark.slow
PLAIN = ["method.name=independent", "objective.ce_scope=current", "objective.routing=oracle", "train.steps=300"]
TASKS, PATIENCE = (0, 1, 2), 40


class EnoughError(Exception):
    pass


def accuracy(method: Method, number: int) -> float:
    method.learner.head.put(method.learner.rows, method.learner.head_parameter.detach())
    return Evaluator(method, "oracle").score(number, method.learner.tasks[number])


def test_nearest_class_means_of_frozen_features_stay_under_90_percent() -> None:
    method = assemble(load("seqlora", PLAIN), "image")
    learner = method.learner
    learner.tasks = digits_stream(12).tasks
    for number, task in enumerate(learner.tasks):
        learner.meet(number)
        with torch.no_grad():
            features = learner.frozen_features(task.test.take(range(len(task.test))))
        nearest = torch.cdist(features, learner.means[number]).argmin(1).tolist()
        right = [task.labels[place] == label for place, label in zip(nearest, column(task.test, "label"), strict=True)]
        assert 25 < 100 * np.mean(right) < 90, task.name


@pytest.mark.parametrize("number", TASKS)
def test_a_fresh_adapter_needs_more_than_40_steps(number: int) -> None:
    def learn(stop: int) -> float:
        method = assemble(load("seqlora", PLAIN), "image")
        method.learner.tasks = [digits_stream(12).tasks[number]]
        loop.begin_task(method, (0,))

        def look(step: int, *_: float) -> None:
            if step + 1 == stop:
                raise EnoughError

        try:
            loop.train_task(method, 0, look, lambda _: None)
        except EnoughError:
            return accuracy(method, 0)
        loop.end_task(method)
        return accuracy(method, 0)

    assert learn(PATIENCE) < 0.95 * learn(-1)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_tree_has_the_families_that_were_built_in(seed: int, tmp_path: Path) -> None:
    settings = ["train.steps=30", "stream.test_rows=20", f"seed={seed}", f"folder={tmp_path}", "tracking.to=none"]
    done = run(load("quickstart", settings))
    tree = done.method.guide.tree  # type: ignore[attr-defined]
    groups, families = as_labels(tree.families()), np.array(done.result["families"])
    kept = families != "permuted"  # these two look alike and ask for different things
    assert adjusted_rand(groups[kept], families[kept]) == 1


def test_what_shares_with_relatives_ends_above_what_shares_nothing_and_that_above_one_adapter_for_all(
    tmp_path: Path,
) -> None:
    own = ["train.steps=40", "stream.test_rows=100", "seed=1", f"folder={tmp_path}", "tracking.to=none"]
    routed = ["objective.ce_scope=current", "objective.routing=inferred"]
    rows = {
        "treelora": load("quickstart", [*own, "name=treelora"]),
        "independent": load("seqlora", [*own, *routed, "name=independent", "method.name=independent"]),
        "seqlora routed": load("seqlora", [*own, *routed, "name=routed"]),
        "seqlora": load("seqlora", [*own, "name=seqlora"]),
    }
    shared = Shared()
    scores = {name: run(config, shared=shared).metrics["op"] for name, config in rows.items()}
    assert sorted(scores, key=lambda name: -scores[name]) == list(rows), scores
    assert scores["treelora"] > scores["independent"] + 2, "from a fresh start it is a point at most"
