"""Thirty steps of each objective against the losses they had when last looked at; `make golden` writes them anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny, toys
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task
from treelora_ray.methods.base import Method
from treelora_ray.training.loop import begin_task, end_task, train_task

LOSSES = Path(__file__).with_name("losses.json")
STEPS = 30


def images(folder: Path) -> tuple[Method, list[Task]]:
    return toys.method(config(tiny.vit(folder))), list(toys.stream(2, rows=200).tasks)


def texts(folder: Path) -> tuple[Method, list[Task]]:
    def task(name: str, words: list[str], labels: tuple[str, ...]) -> Task:
        columns: dict[str, list[Any]] = {
            "text": [f"{word} {other} book" for word in words for other in ("a", "the", "very", "not")],
            "label": [label for label in labels for _ in range(4)],
        }
        return Task(name, MemoryRows(columns), MemoryRows(columns), labels)

    tasks = [task("mood", ["good", "bad"], ("up", "down")), task("tint", ["red", "blue"], ("warm", "cold"))]
    return toys.method(config(tiny.bert(folder)), kind="text"), tasks


def prompts(folder: Path) -> tuple[Method, list[Task]]:
    def task(name: str, prompt: str, answers: list[str]) -> Task:
        asked = [f"{prompt} {word}" for word in ("good", "bad")] * 6
        columns: dict[str, list[Any]] = {"prompt": asked, "answer": answers * 6}
        return Task(name, MemoryRows(columns), MemoryRows(columns))

    tasks = [task("tint", "what colour is", ["red", "blue"]), task("sum", "sum of one and", ["two", "three"])]
    return toys.method(config(tiny.llama(folder)), kind="prompt"), tasks


OBJECTIVES = {"images": images, "texts": texts, "prompts": prompts}


def config(backbone: Path) -> Any:
    return toys.config(
        backbone,
        {"name": "treelora", "guide": {"gate": 0.0}},
        model={"max_length": 16},
        train={"steps": STEPS // 2, "threads": 1, "lr": 1e-3},
    )


def losses(objective: str, folder: Path) -> list[float]:
    """Of two tasks, half of the steps each: the second starts warm and is pulled."""
    method, tasks = OBJECTIVES[objective](folder)
    method.learner.tasks = tasks
    found: list[float] = []
    for number in range(len(tasks)):
        begin_task(method, (number,))
        train_task(method, 0, lambda _step, _of, loss, _norm: found.append(round(loss, 6)), lambda _: None)
        end_task(method)
    return found


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_losses_are_those_of_before(objective: str, tmp_path: Path) -> None:
    found = losses(objective, tmp_path)
    assert len(found) == STEPS
    if os.environ.get("TREELORA_GOLDEN") == "write":
        kept = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
        LOSSES.write_text(json.dumps({**kept, objective: found}) + "\n")
    expected = json.loads(LOSSES.read_text())[objective]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg="meant? make golden, and say why")
