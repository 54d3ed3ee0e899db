"""The gate on real features: what is unrelated starts fresh, what is related does not."""

from __future__ import annotations

import numpy as np
import pytest

from treelora_ray.api import assemble
from treelora_ray.config import load
from treelora_ray.data.digits import digits_stream
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task
from treelora_ray.methods.treelora import TreeLora
from treelora_ray.training import loop

pytestmark = pytest.mark.slow
LEARNT, MIXED, RELATED = (0, 1, 2), 12, (3, 5, 6)  # two families and a loner; members of these families


def shares(seed: int, *settings: str) -> tuple[float, float]:
    """Layers that lean on a task learnt before: of tasks with shuffled labels, and of relatives."""
    stream = digits_stream(12, 100 + seed).tasks
    tasks: list[Task] = [stream[number] for number in LEARNT]
    rng = np.random.default_rng(seed)
    for number in range(MIXED):
        source = tasks[number % len(LEARNT)]
        columns = source.train.take(range(len(source.train)))
        labels = [columns["label"][row] for row in rng.permutation(len(source.train))]
        rows = MemoryRows({"image": columns["image"], "label": labels})
        tasks.append(Task(f"mixed-{number}", rows, rows, source.labels))
    tasks += [stream[number] for number in RELATED]
    method = assemble(load("quickstart", ["train.steps=5", "train.threads=1", f"seed={seed}", *settings]), "image")
    assert isinstance(method, TreeLora)
    method.learner.tasks = tasks
    for number in range(len(LEARNT)):
        loop.begin_task(method, (number,))
        loop.train_task(method, 0, lambda *_: None, lambda _: None)
        loop.end_task(method)
    learnt, warm = method.guide.snapshot(), []
    for number in range(len(LEARNT), len(tasks)):
        loop.begin_task(method, (number,))
        assert method.choice is not None
        warm.append(float(np.mean(method.choice.warm >= 0)))
        method.guide.restore(learnt)
    return float(np.mean(warm[:MIXED])), float(np.mean(warm[MIXED:]))


@pytest.mark.parametrize("commit", ["layer", "task"])
def test_shuffled_labels_seldom_lean_on_a_task_and_relatives_do(commit: str) -> None:
    mixed, relatives = np.mean([shares(seed, f"method.guide.commit={commit}") for seed in range(4)], axis=0)
    assert mixed <= 0.25
    assert relatives >= 0.6
