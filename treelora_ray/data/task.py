"""A task, and tasks in the order they are learnt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from treelora_ray.data.errors import DataError
from treelora_ray.data.rows import Rows, distinct

Kind = Literal["image", "text", "prompt"]
COLUMNS: dict[Kind, tuple[str, str]] = {
    "image": ("image", "label"),
    "text": ("text", "label"),
    "prompt": ("prompt", "answer"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Task:
    name: str
    train: Rows
    test: Rows
    labels: tuple[str, ...] = ()
    """Classification: names of the labels in a fixed order; empty for prompts and answers."""
    family: str | None = None
    """Which tasks belong together, where that is known: for judging trees, never an input of a method."""
    score: str = "accuracy"
    """Prompts and answers: how generated answers are scored, a name of `objectives.scores.SCORES`."""
    watch: Rows | None = None
    """Rows that are not trained on, for looks at the accuracy while the task is learnt."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DataError(
                f"task {self.name!r} must be named in letters, digits, '.', '_' and '-', since files are named "
                "after it: rename it"
            )
        if doubled := _doubled(self.labels):
            raise DataError(f"task {self.name!r} lists label {doubled!r} twice: list each once")


@dataclass(frozen=True)
class TaskStream:
    tasks: tuple[Task, ...]
    kind: Kind

    def __post_init__(self) -> None:
        if not self.tasks:
            raise DataError("the stream has no tasks: give at least one")
        if doubled := _doubled(task.name for task in self.tasks):
            raise DataError(f"two tasks are named {doubled!r}: give each its own name")
        for task in self.tasks:
            for split, rows in (("training", task.train), ("test", task.test)):
                _check_columns(task.name, split, rows, self.kind)
            if self.kind != "prompt" and not task.labels:
                raise DataError(f"task {task.name!r} has no labels: name those it may have")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)


@dataclass(frozen=True)
class Source:
    """What tasks there are, in the order given; a task is opened when it is chosen.

    Where rows are held out no test rows are opened: all training rows stand in for them until they are cut.
    """

    names: tuple[str, ...]
    open: Callable[[str], Task]


def columns_of(present: Sequence[str], wanted: Mapping[str, str], where: str) -> dict[str, str]:
    """Names of rows to columns, of the first kind of stream whose two columns are present."""
    pairs = [{name: wanted[name] for name in pair} for pair in COLUMNS.values() if set(pair) <= set(wanted)]
    for pair in pairs:
        if all(column in present for column in pair.values()):
            return pair
    shown = " or ".join(" and ".join(map(repr, pair.values())) for pair in pairs)
    raise DataError(f"{where} needs columns {shown}; it has {', '.join(present)}: name them in the stream's settings")


def kind_of(rows: Rows) -> Kind:
    return next(kind for kind, pair in COLUMNS.items() if set(pair) <= set(rows.columns))


def labelled(
    name: str, train: Rows, test: Rows, labels: Sequence[str] | None = None, family: str | None = None
) -> Task:
    """A classification task, its rows' labels checked; without `labels` they are those of training, in order."""
    trained, tested = distinct(train, "label"), distinct(test, "label")
    if unseen := tested - trained:
        raise DataError(
            f"task {name!r} has test rows of labels that no training row has: {_listed(unseen)}; "
            "add training rows of them, or leave these test rows out"
        )
    if labels is None:
        return Task(name, train, test, ordered(trained), family)
    if unknown := trained - set(labels):
        raise DataError(
            f"task {name!r} has rows of labels that its list of labels does not have: {_listed(unknown)}; "
            f"it lists {_listed(labels)}"
        )
    return Task(name, train, test, tuple(labels), family)


def ordered(labels: Iterable[str]) -> tuple[str, ...]:
    """Numbers by their value, then the rest by their letters."""
    return tuple(sorted(labels, key=lambda label: (0, int(label), label) if _is_number(label) else (1, 0, label)))


def _is_number(label: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", label) is not None


def _check_columns(task: str, split: str, rows: Rows, kind: Kind) -> None:
    if missing := [name for name in COLUMNS[kind] if name not in rows.columns]:
        raise DataError(
            f"the {split} rows of task {task!r} lack {', '.join(missing)} of a stream of kind {kind}; "
            f"they have {', '.join(rows.columns)}"
        )
    if not len(rows):
        raise DataError(f"task {task!r} has no {split} rows: give at least one")


def _doubled(names: Iterable[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _listed(labels: Iterable[str], most: int = 10) -> str:
    names = [repr(label) for label in ordered(set(labels))]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
