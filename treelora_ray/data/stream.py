"""Streams of tasks from their settings: the one entrance to data.

open_stream(config.stream, config.seed) -> TaskStream
fingerprints(stream)                       what a resumed run must find unchanged
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from treelora_ray.config import StreamConfig
from treelora_ray.core.layout import IntArray
from treelora_ray.data.batches import permuted
from treelora_ray.data.errors import DataError
from treelora_ray.data.rows import Rows, SubsetRows, column, digest
from treelora_ray.data.task import Source, Task, TaskStream, kind_of


def open_stream(config: StreamConfig, seed: int) -> TaskStream:
    """The tasks of a stream in learning order; draws depend on the seed alone."""
    tasks = _digits(config, seed) if config.source == "digits" else _opened(_source(config, seed), config, seed)
    if config.order == "random":
        order = permuted(np.arange(len(tasks)), len(tasks), f"{seed}/order")
        tasks = tuple(tasks[i] for i in order.tolist())
    kinds = {task.name: kind_of(task.train) for task in tasks}
    if len(set(kinds.values())) > 1:
        raise DataError(f"tasks of one stream must be of one kind, got {kinds}: choose some with `tasks`")
    return TaskStream(_scored(tasks, config), kinds[tasks[0].name])


def fingerprints(stream: TaskStream) -> list[dict[str, Any]]:
    """What was learnt from, task by task."""
    return [
        {
            "name": task.name,
            "labels": list(task.labels),
            "train": len(task.train),
            "test": len(task.test),
            "digest": digest(task.train.fingerprint, task.test.fingerprint, *task.labels),
        }
        for task in stream.tasks
    ]


def selected(names: Sequence[str], wanted: int | Sequence[str] | None) -> tuple[str, ...]:
    """The first so many of the names, or those asked for."""
    if wanted is None:
        return tuple(names)
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(names):
            raise DataError(f"tasks must be 1 to {len(names)}, as the source has {len(names)}, got {wanted}")
        return tuple(names[:wanted])
    for name in wanted:
        if name not in names:
            raise DataError(f"there is no task {name!r}: {_nearest(name, names)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise DataError(f"tasks must name at least one task and each once, got {', '.join(wanted) or 'none'}")
    return tuple(wanted)


def limited(rows: Rows, most: int | None, seed: int, key: str) -> Rows:
    """At most so many rows, in their order; a smaller limit draws some of a larger one's rows."""
    if most is None or len(rows) <= most:
        return rows
    return SubsetRows(rows, np.sort(permuted(np.arange(most), len(rows), f"{seed}/{key}")))


def held_out(task: Task, share: float, seed: int) -> Task:
    """The task with a share of its training rows as its test rows; drawn by seed and name, in their order.

    One row of each label stays, the last one drawn, so that what is held out has no label that is not trained. A larger
    share holds out the rows of a smaller one and more.
    """
    count = len(task.train)
    kept, held = _cut(task, f"{seed}/{task.name}/held out", max(1, round(share * count)))
    if not len(held):
        raise DataError(
            f"no row of task {task.name!r} can be held out: it has one training row of each label, which has to stay; "
            "add rows, or leave out stream.holdout"
        )
    return dataclasses.replace(task, train=SubsetRows(task.train, kept), test=SubsetRows(task.train, held))


def watched(task: Task, count: int, seed: int) -> Task:
    """The task with so many of its training rows set apart to look at while it is learnt; one of each label stays."""
    kept, apart = _cut(task, f"{seed}/{task.name}/watched", count)
    if len(apart) < count or len(apart) > len(kept):
        raise DataError(
            f"stream.watch is {count}, which is too many for task {task.name!r} with its {len(task.train)} training "
            "rows: at most half of them, and one of each label has to stay"
        )
    return dataclasses.replace(task, train=SubsetRows(task.train, kept), watch=SubsetRows(task.train, apart))


def _cut(task: Task, key: str, most: int) -> tuple[IntArray, IntArray]:
    """Training rows that stay, and at most so many that do not, in their order; the last one drawn of a label stays."""
    count = len(task.train)
    drawn = permuted(np.arange(count), count, key)
    labels = np.array(column(task.train, "label"), dtype=np.str_)[drawn] if task.labels else np.zeros(count)
    _, last = np.unique(labels[::-1], return_index=True)
    held = np.delete(drawn, count - 1 - last)[:most]
    return np.setdiff1d(np.arange(count), held), np.sort(held)


def _opened(source: Source, config: StreamConfig, seed: int) -> tuple[Task, ...]:
    opened = (source.open(name) for name in selected(source.names, config.tasks))
    tasks = opened if config.holdout is None else (held_out(task, config.holdout, seed) for task in opened)
    if config.watch is not None:
        tasks = (watched(task, config.watch, seed) for task in tasks)
    return tuple(
        dataclasses.replace(
            task,
            train=limited(task.train, config.rows, seed, f"{task.name}/training rows"),
            test=limited(task.test, config.test_rows, seed, f"{task.name}/test rows"),
        )
        for task in tasks
    )


def _digits(config: StreamConfig, seed: int) -> tuple[Task, ...]:
    from treelora_ray.data.digits import TASKS, digits_source

    wanted = config.model_copy(update={"tasks": TASKS if config.tasks is None else config.tasks})
    made = digits_source(seed, config.rows, config.test_rows, tested=config.holdout is None)
    return _opened(made, wanted, seed)


def _source(config: StreamConfig, seed: int) -> Source:
    from treelora_ray.data.folders import labels_source, parquet_source, trace_source
    from treelora_ray.data.split import split_source

    if config.source == "split":
        return split_source(config, seed)
    if config.path is None:
        raise DataError(f"source {config.source} needs a path: the folder of its tasks")
    folder = config.path.rstrip("/")
    return {"parquet": parquet_source, "trace": trace_source, "labels": labels_source}[config.source](folder, config)


def _scored(tasks: tuple[Task, ...], config: StreamConfig) -> tuple[Task, ...]:
    """The default leaves each task the score its source knows; another name is for all, a mapping for those in it."""
    if config.score == "accuracy":
        return tasks
    names = [task.name for task in tasks]
    given = config.score if isinstance(config.score, dict) else dict.fromkeys(names, config.score)
    for name in given:
        if name not in names:
            raise DataError(f"score names a task {name!r} that the stream does not have: {_nearest(name, names)}")
    return tuple(dataclasses.replace(task, score=given.get(task.name, task.score)) for task in tasks)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    folded = [each for each in names if each.casefold() == name.casefold()]
    found = list(dict.fromkeys([*folded, *near]))
    return f"did you mean {' or '.join(found)}?" if found else f"use some of {', '.join(names)}"
