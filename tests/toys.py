"""Small streams in memory, and configs that learn them in a blink."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from treelora_ray.config import RunConfig, from_mapping
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task, TaskStream
from treelora_ray.methods.base import Method
from treelora_ray.methods.catalogue import make
from treelora_ray.methods.comm import Comm
from treelora_ray.methods.learner import Learner
from treelora_ray.models.backbone import load_model
from treelora_ray.training.loop import begin_task, end_task, train_task


def images(task: int, rows: int, seed: int, classes: int = 2) -> MemoryRows:
    """A class is a bright bar at a place of its own, a task is a slant of it; much noise."""
    rng = np.random.default_rng([task, seed])
    labels = rng.integers(0, classes, rows)
    pictures = rng.integers(0, 120, (rows, 8, 8))
    for picture, label in zip(pictures, labels, strict=True):
        place = 2 * label + (task % 3)
        if task % 2:
            picture[:, place % 8] += 110
        else:
            picture[place % 8, :] += 110
    columns = {"image": list(pictures.astype(np.uint8)), "label": [f"c{label}" for label in labels]}
    return MemoryRows(columns)


def stream(tasks: int = 3, rows: int = 22, test_rows: int = 12) -> TaskStream:
    made = [
        Task(f"t{number}", images(number, rows, 0), images(number, test_rows, 1), ("c0", "c1"))
        for number in range(tasks)
    ]
    return TaskStream(tuple(made), "image")


def config(backbone: Path, method: str | Mapping[str, Any] = "treelora", **sections: Any) -> RunConfig:
    options = {"name": method} if isinstance(method, str) else dict(method)
    if options["name"] == "treelora":
        options = {"probe_rounds": 2, **options}
    data: dict[str, Any] = {
        "model": {"backbone": str(backbone), "lora": {"rank": 2, "alpha": 4}},
        "train": {"epochs": 2, "batch": 8, "lr": 0.01, "checkpoint_every": None},
        "method": options,
    }
    for name, section in sections.items():
        data[name] = {**data[name], **section} if isinstance(section, Mapping) and name in data else section
    return from_mapping(data)


def answering_by(batch: int, made: RunConfig) -> RunConfig:
    """The config with another batch of answers; a section that is at its defaults is shared by all configs."""
    return made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"batch": batch})})


def method(made: RunConfig, comm: Comm | None = None, kind: str = "image") -> Method:
    return make(Learner(made, load_model(made.model, kind, made.seed), comm))


def prompts(tasks: int = 2, rows: int = 12) -> TaskStream:
    """Each task asks something of its own of two words, and has an answer for each."""
    asked = [("what colour is", ["red", "blue"]), ("sum of one and", ["two", "three"]), ("is the book", ["yes", "no"])]
    made = []
    for number in range(tasks):
        ask, answers = asked[number % 3]
        columns: dict[str, list[Any]] = {
            "prompt": [f"{ask} {word}" for word in ("good", "bad")] * (rows // 2),
            "answer": [answers[0], f"{answers[1]} film"] * (rows // 2),
        }
        made.append(Task(f"p{number}", MemoryRows(columns), MemoryRows(columns)))
    return TaskStream(tuple(made), "prompt")


def ready(
    backbone: Path, options: str | Mapping[str, Any], tasks: int = 3, kind: str = "image", **sections: Any
) -> Method:
    """A method before the first task of a stream."""
    if kind == "prompt":
        sections = {"model": {"max_length": 32}, **sections}
    found = method(config(backbone, options, **sections), kind=kind)
    found.learner.tasks = (prompts if kind == "prompt" else stream)(tasks).tasks
    return found


def learn(made: Method, *tasks: int) -> list[Tensor]:
    """Learns tasks; theta after each step."""
    thetas: list[Tensor] = []
    for task in tasks:
        begin_task(made, (task,))
        train_task(made, 0, lambda *_: thetas.append(made.learner.theta.clone()), lambda _: None)
        end_task(made)
    return thetas
