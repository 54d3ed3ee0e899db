"""What several runs say together: over seeds, and only where they have learnt the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treelora_ray.config import RunConfig, free_key
from treelora_ray.tracking.about import settings
from treelora_ray.training import metrics

MISSING = "–"  # in place of a setting that a method does not have
FEWEST_SEEDS = 3  # behind a number that may be trusted
MEASURES = ("op", "learning_accuracy", "bwt", "forgetting", "average_incremental_accuracy")
# In what runs may differ so that their scores answer different questions.
PROTOCOL = {
    "objective.routing": "which adapter answers at test",
    "objective.ce_scope": "which classes compete in training",
    "objective.label_match": "what counts as one class",
    "model.backbone": "the frozen model",
    "stream.rows": "rows to learn from",
    "stream.test_rows": "rows to be scored on",
    "train.epochs": "the budget",
    "train.steps": "the budget",
    "train.batch": "rows of a step",
}


@dataclass(frozen=True)
class Entry:
    """A run, as far as it is compared."""

    name: str
    config: RunConfig
    result: Mapping[str, Any]

    @property
    def tasks(self) -> list[str]:
        return list(self.result["tasks"])

    @property
    def one_by_one(self) -> bool:
        return len(self.result["records"]) == len(self.tasks)


@dataclass(frozen=True)
class Value:
    """Mean over n seeds, with the sample standard deviation, which one seed has not."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), std, len(values))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only."""

    label: str
    runs: list[Entry]  # those that could be measured
    measures: dict[str, Value]
    scores: dict[str, Value]  # by task, at the end of what is compared
    course: list[Value]  # mean score over the tasks seen, after each; [] where stages are not compared


@dataclass(frozen=True)
class Comparison:
    groups: list[Group]
    tasks: list[str]  # what is compared
    basis: str  # in words
    notes: list[str]
    differences: dict[str, list[Any]]  # by key of the config, its value in each group


def compare(entries: Sequence[Entry]) -> Comparison:
    together: dict[str, list[Entry]] = {}
    notes = []
    for entry in entries:
        group = together.setdefault(entry.config.model_copy(update={"seed": 0}).digest, [])
        twin = next((other for other in group if other.config.seed == entry.config.seed), None)
        if twin is None:
            group.append(entry)
        else:
            notes.append(f"{entry.name} is left out: {twin.name} has the same settings and the same seed.")
    return _compared(list(together.values()), None, notes)


def compare_rows(rows: Mapping[str, Sequence[Entry]]) -> Comparison:
    """Groups that are known beforehand, by their labels; each has runs of other seeds."""
    return _compared([list(runs) for runs in rows.values()], list(rows), [])


def _compared(groups: list[list[Entry]], labels: Sequence[str] | None, notes: list[str]) -> Comparison:
    kept = [entry for group in groups for entry in group]
    tasks, staged, basis = shared(kept)
    if staged:
        notes += [
            f"{entry.name} learnt all its tasks at once: it has no scores after {len(tasks)} of them."
            for entry in kept
            if not entry.one_by_one and len(entry.tasks) > len(tasks)
        ]
    differences = _differences(groups)
    notes += _notes(groups, differences, tasks)
    labels = labels or _labels(groups, differences)
    found = [_group(label, group, tasks, staged) for label, group in zip(labels, groups, strict=True)]
    return Comparison(found, tasks, basis, notes, differences)


def shared(entries: Sequence[Entry]) -> tuple[list[str], bool, str]:
    """The tasks to compare, whether as a stage of all streams (else by last scores alone), and that in words."""
    orders = [entry.tasks for entry in entries]
    first = orders[0]
    common = [task for task in first if all(task in order for order in orders)]
    prefix = 0
    while prefix < len(common) and all(order[prefix : prefix + 1] == first[prefix : prefix + 1] for order in orders):
        prefix += 1
    if not common:
        return [], False, "The runs have no task in common: nothing of them can be compared."
    if all(order == first for order in orders):
        return common, True, f"All runs learnt the same {_tasks(common)} in the same order: everything is compared."
    if prefix == len(common):
        return common, True, (
            f"The streams begin with the same {_tasks(common)} and then differ. They are compared as they stood after "
            f"{'it' if prefix == 1 else 'these'}; what came later is left out."
        )  # fmt: skip
    if all(len(order) == len(common) for order in orders):
        return common, False, (
            f"All runs learnt the same {_tasks(common)}, in different orders. Scores at the end are compared; "
            "forgetting is not, as it depends on the order."
        )  # fmt: skip
    return common, False, (
        f"The runs have {_tasks(common)} in common, learnt among different others. Scores on these at the end are "
        "compared, with the reservation that other tasks were learnt between; forgetting and time are not."
    )  # fmt: skip


def _tasks(tasks: Sequence[str]) -> str:
    return f"{len(tasks)} task{'' if len(tasks) == 1 else 's'}"


def _group(label: str, runs: list[Entry], tasks: Sequence[str], staged: bool) -> Group:
    both = [(run, found) for run in runs if (found := _measured(run, tasks, staged))]
    measured = [found for _, found in both]
    names = dict.fromkeys(name for found, _, _ in measured for name in found)
    values = {name: Value.of([found[name] for found, _, _ in measured if name in found]) for name in names}
    scores = {task: Value.of([scores[task] for _, scores, _ in measured]) for task in tasks if measured}
    courses = [course for _, _, course in measured if course]
    return Group(
        label, [run for run, _ in both], values, scores, [Value.of(column) for column in zip(*courses, strict=True)]
    )


def _measured(
    run: Entry, tasks: Sequence[str], staged: bool
) -> tuple[dict[str, float], dict[str, float], list[float]] | None:
    """Measures, last scores by task, and the course of one run; None where it cannot be compared."""
    if not tasks:
        return None
    at, n = [run.tasks.index(task) for task in tasks], len(tasks)
    if not staged or not run.one_by_one:
        if staged and len(run.tasks) > n:
            return None
        last = {task: float(run.result["matrix"][-1][place]) for task, place in zip(tasks, at, strict=True)}
        found = {"op": float(np.mean(list(last.values())))}
        return (found | (_effort(run) if len(run.tasks) == n else {})), last, []
    a = np.array([row[:n] for row in run.result["matrix"][:n]], dtype=np.float64)
    summary = metrics.summary(a)
    found = {name: summary[name] for name in MEASURES if summary[name] is not None}
    course = [float(a[row, : row + 1].mean()) for row in range(n)]
    return found | _effort(run, n), dict(zip(tasks, a[-1].tolist(), strict=True)), course


def _effort(run: Entry, units: int | None = None) -> dict[str, float]:
    efforts = [record["effort"] for record in run.result["records"][:units]]
    steps = sum(effort["steps"] for effort in efforts)
    train = sum(effort["seconds"].get("train", 0.0) for effort in efforts)
    return {
        "steps": steps,
        "counted": sum(counted(effort, run.config.train.batch) for effort in efforts),
        "step_ms": 1000 * train / max(steps, 1),
        "seconds": sum(sum(effort["seconds"].values()) for effort in efforts),
    }


def counted(effort: Mapping[str, Any], batch: int) -> int:
    """Steps, with all that counts as some: probe rounds, queries, and passes over rows that train nothing."""
    passes = math.ceil(effort["pass_rows"] / batch)
    return int(effort["steps"] + effort["probe_rounds"] + effort["queries"] + passes)


def _differences(groups: Sequence[Sequence[Entry]]) -> dict[str, list[Any]]:
    configs = [settings(group[0].config.model_dump(mode="json", by_alias=True)) for group in groups]
    keys = [
        key for key in dict.fromkeys(key for config in configs for key in config) if not free_key(key) and key != "seed"
    ]
    found = {key: [config.get(key, MISSING) for config in configs] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _labels(groups: Sequence[Sequence[Entry]], differences: Mapping[str, list[Any]]) -> list[str]:
    """Each group's method, with what sets it apart from others of that method."""
    methods = [group[0].config.method.name for group in groups]
    labels = []
    for number, method in enumerate(methods):
        same = [other for other, name in enumerate(methods) if name == method]
        keys = [key for key, values in differences.items() if len({str(values[other]) for other in same}) > 1]
        keys = [key for key in keys if key != "stream.tasks"] or keys
        apart = ", ".join(f"{key.split('.')[-1]} {differences[key][number]}" for key in keys)
        labels.append(method + (f" ({apart})" if apart else ""))
    return labels if len(set(labels)) == len(labels) else [f"{number}: {x}" for number, x in enumerate(labels, start=1)]


def _notes(groups: Sequence[Sequence[Entry]], differences: Mapping[str, list[Any]], tasks: Sequence[str]) -> list[str]:
    entries = [entry for group in groups for entry in group]
    notes: list[str] = []
    if not tasks:
        return notes
    for key, words in PROTOCOL.items():
        if key in differences:
            values = ", ".join(dict.fromkeys(str(value) for value in differences[key]))
            notes.append(f"{key} differs ({values}), that is {words}: compare scores with that in mind.")
    for task in tasks:
        by_seed: dict[int, set[str]] = {}
        for entry in entries:
            prints = {each["name"]: each["digest"] for each in entry.result.get("data", ())}
            if task in prints:
                by_seed.setdefault(entry.config.seed, set()).add(prints[task])
        if any(len(found) > 1 for found in by_seed.values()):
            notes.append(f"The rows of {task} are not the same in all runs of one seed: its scores are not comparable.")
    few = [len(group) for group in groups if len(group) < FEWEST_SEEDS]
    if few and len(groups) > 1:
        notes.append(
            f"Fewer than {FEWEST_SEEDS} seeds stand behind some rows: differences between these may be chance."
        )
    devices = dict.fromkeys(str(entry.result.get("device")) for entry in entries)
    if len(devices) > 1:
        notes.append(f"Times were taken on different devices ({', '.join(devices)}): they are not comparable.")
    for what, found in (("commits", {str(e.result.get("commit")) for e in entries}),
                        ("versions of packages", {str(e.result.get("packages")) for e in entries})):  # fmt: skip
        if len(found) > 1:
            notes.append(f"The runs were made by different {what} of the program.")
    unfinished = [entry.name for entry in entries if not entry.result["finished"]]
    if unfinished:
        notes.append(f"Not finished yet: {', '.join(unfinished)}.")
    return notes
