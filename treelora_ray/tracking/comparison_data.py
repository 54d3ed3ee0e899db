"""What a comparison found, as plain data: a line for each row, with mean and deviation over its seeds.

`comparison.json` and the results of its finished cells are all that is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treelora_ray.api import Run
from treelora_ray.store import joined
from treelora_ray.tracking.compare import Comparison, Entry, Value, compare_rows, counted
from treelora_ray.tracking.figure_data import Data, duration
from treelora_ray.training.errors import RunError

FILE = "comparison.json"
FINISHED, FAILED = "finished", "failed"
NOT_TRAINING = ("evaluate", "checkpoint", "watch")  # phases
PLAIN, ALONE = "seqlora", "independent"  # rows that others are measured against
MIB = 2**20


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    words: str
    higher: bool
    form: str = "{:.1f}"

    @property
    def better(self) -> str:
        return "higher is better" if self.higher else "lower is better"


COLUMNS = (
    Column("op", "OP, %", "mean score after the last task, percent", True),
    Column("bwt", "BWT", "mean drop from right after learning to the end, over all tasks, points", False),
    Column("forgetting", "forgetting", "mean drop from each task's best score to its last, points", False),
    Column("average_incremental_accuracy", "avg. inc. acc., %",
           "mean over the stream of the mean score on the tasks seen, percent", True),
    Column("train_seconds", "train time, s",
           "seconds of looking at tasks and training, without scoring and checkpoints", False),
    Column("step_cost", "step cost", "seconds of a training step over those of row {plain}, seed by seed", False,
           "{:.2f}"),
    Column("memory", "memory, MiB",
           "all tensors kept after the last task: adapters, head, router, and what the method keeps", False, "{:.2f}"),
    Column("stored", "stored, MiB", "size of the newest checkpoint with the adapters it names", False, "{:.2f}"),
    Column("device", "device, MiB", "peak memory on the device", False, "{:,.0f}"),
    Column("reach", "steps to {reach}",
           "mean over tasks of the training steps until {of}, on rows not trained on; a task that never gets there "
           "counts with all its steps", False, "{:.0f}"),
    Column("beside", "steps beside",
           "what a task needs beside them, counted as steps: probe rounds, queries and passes over rows", False,
           "{:.0f}"),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    label: str
    method: str
    seeds: list[int]  # that stand behind the values
    of: int  # seeds asked for
    values: dict[str, Value]
    never: int  # tasks, over all seeds, that did not reach the accuracy
    failures: dict[str, str]  # by cell, why


@dataclass(frozen=True)
class Found:
    about: Mapping[str, Any]  # comparison.json
    lines: list[Line]
    columns: list[Column]  # of which some line has a value
    compared: Comparison | None  # None where no cell is finished
    notes: list[str] = field(default_factory=list)

    @property
    def cells(self) -> list[Mapping[str, Any]]:
        return list(self.about["cells"])


def is_comparison(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(address: str, folder: Path) -> Found:
    """Of the comparison at an address, which `folder` is or mirrors."""
    path = folder / FILE
    try:
        about: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(
            f"{folder} is no comparison: it has no {FILE}; give the folder that `treelora compare` made"
        ) from None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): give the comparison another name to start anew") from None
    runs = {cell["id"]: Run(joined(address, cell["run"])) for cell in about["cells"] if cell["state"] == FINISHED}
    return found(about, {name: Entry(name, run.config, run.result) for name, run in runs.items()})


def found(about: Mapping[str, Any], entries: Mapping[str, Entry]) -> Found:
    """`entries`: the runs of finished cells, by their ids."""
    by_row: dict[str, list[Entry]] = {}
    kept: dict[str, Mapping[str, int]] = {}
    for cell in about["cells"]:
        if cell["id"] in entries:
            by_row.setdefault(cell["row"], []).append(entries[cell["id"]])
            kept[cell["id"]] = cell["kept"]
    rows = {label: by_row[label] for label in about["rows"] if label in by_row}
    compared = compare_rows(rows) if rows else None
    measures = {group.label: group.measures for group in compared.groups} if compared else {}
    costs = _Costs(rows, kept, about)
    lines = [_line(label, about, rows.get(label, []), measures.get(label, {}), costs) for label in about["rows"]]
    columns = [column for column in _columns(costs, about) if any(column.key in line.values for line in lines)]
    return Found(about, lines, columns, compared, list(_notes(about, compared, costs)))


def _line(
    label: str, about: Mapping[str, Any], runs: Sequence[Entry], measures: Mapping[str, Value], costs: _Costs
) -> Line:
    cells = [cell for cell in about["cells"] if cell["row"] == label]
    values = {column.key: measures[column.key] for column in COLUMNS if column.key in measures}
    for key, cost in costs.known().items():
        numbers = [number for run in runs if (number := cost(run)) is not None]
        if numbers:
            values[key] = Value.of(numbers)
    never = sum(costs.never(run) for run in runs)
    failures = {cell["id"]: str(cell["error"]) for cell in cells if cell["state"] == FAILED}
    return Line(label, about["rows"][label]["method"], [run.config.seed for run in runs], len(cells), values, never,
                failures)  # fmt: skip


class _Costs:
    """What a run cost, some of it beside the plain row's run of the same seed."""

    def __init__(
        self, rows: Mapping[str, Sequence[Entry]], kept: Mapping[str, Mapping[str, int]], about: Mapping[str, Any]
    ) -> None:
        self.kept, self.share = kept, about.get("reach")
        self.plain_row, self.alone_row = _row_of(PLAIN, about), _row_of(ALONE, about)
        self.plain = {run.config.seed: run for run in rows.get(self.plain_row or "", ())}
        self.alone = {run.config.seed: run for run in rows.get(self.alone_row or "", ())}
        self.devices = {_device(run) for runs in rows.values() for run in runs}
        self.timed_on = _timed_on(list(rows.values()))

    def known(self) -> dict[str, Callable[[Entry], float | None]]:
        return {
            "train_seconds": lambda run: train_seconds(run) if _device(run) == self.timed_on else None,
            "step_cost": self._step_cost,
            "memory": lambda run: self._kept(run, "memory"),
            "stored": lambda run: self._kept(run, "stored"),
            "device": _on_device,
            "reach": self._reach,
            "beside": lambda run: None if self._reach(run) is None else steps_beside(run),
        }

    def _kept(self, run: Entry, what: str) -> float | None:
        count = self.kept[run.name].get(what)
        return None if count is None else count / MIB

    def _step_cost(self, run: Entry) -> float | None:
        plain = self.plain.get(run.config.seed)
        if plain is None or not _device(run) == _device(plain) == self.timed_on:
            return None
        own, other = step_seconds(run), step_seconds(plain)
        return None if own is None or not other else own / other

    def _steps(self, run: Entry) -> list[tuple[float, bool]]:
        """By task, the steps to the accuracy (all of them where it was not reached), and whether it was."""
        if self.share is None or not run.one_by_one:
            return []
        alone = self.alone.get(run.config.seed)
        if self.alone_row is not None and alone is None:
            return []
        steps = []
        for number, record in enumerate(run.result["records"]):
            seen = record["effort"].get("watched")
            best = 100.0 if alone is None else _last_look(alone, number)
            if not seen or best is None:
                return []
            first = next((at for at, score in seen if score >= self.share * best - 1e-9), None)
            steps.append((record["effort"]["steps"], False) if first is None else (first, True))
        return steps

    def _reach(self, run: Entry) -> float | None:
        steps = [count for count, _ in self._steps(run)]
        return sum(steps) / len(steps) if steps else None

    def never(self, run: Entry) -> int:
        return sum(not reached for _, reached in self._steps(run))


def _device(run: Entry) -> str:
    return str(run.result.get("device"))


def _timed_on(rows: Sequence[Sequence[Entry]]) -> str | None:
    """The device on which each row has learnt a cell, of several the one with most: others' seconds do not compare."""
    count = Counter(_device(run) for runs in rows for run in runs)
    everywhere = [name for name in count if all(name in map(_device, runs) for runs in rows)]
    return max(everywhere, key=lambda name: count[name], default=None)


def _last_look(run: Entry, number: int) -> float | None:
    seen = run.result["records"][number]["effort"].get("watched")
    return float(seen[-1][1]) if seen else None


def _row_of(method: str, about: Mapping[str, Any]) -> str | None:
    """The row that is named so, else the first one of that method."""
    rows = about["rows"]
    if rows.get(method, {}).get("method") == method:
        return method
    return next((label for label, row in rows.items() if row["method"] == method), None)


def train_seconds(run: Entry) -> float:
    return sum(learning_seconds(record["effort"]) for record in run.result["records"])


def learning_seconds(effort: Mapping[str, Any]) -> float:
    """Of all phases that are part of learning; what another cell had looked at before counts here too."""
    spent = sum(seconds for phase, seconds in effort["seconds"].items() if phase not in NOT_TRAINING)
    return float(spent + effort.get("reused", {}).get("seconds", 0.0))


def step_seconds(run: Entry) -> float | None:
    efforts = [record["effort"] for record in run.result["records"]]
    steps = sum(effort["steps"] for effort in efforts)
    return float(sum(effort["seconds"].get("train", 0.0) for effort in efforts) / steps) if steps else None


def steps_beside(run: Entry) -> float:
    """A task, on average."""
    efforts = [record["effort"] for record in run.result["records"]]
    beside = [counted(effort, run.config.train.batch) - int(effort["steps"]) for effort in efforts]
    return sum(beside) / len(beside)


def _on_device(run: Entry) -> float | None:
    peak = run.result.get("peak_device_bytes")
    return peak / MIB if peak else None


def _columns(costs: _Costs, about: Mapping[str, Any]) -> Iterator[Column]:
    """With the words that depend on what is compared."""
    share = about.get("reach") or math.nan
    of = f"{share:.0%} accuracy is reached"
    if costs.alone_row is not None:
        of = f"{share:.0%} of the accuracy is reached that row {costs.alone_row} has on the task at its end"
    told = {"plain": costs.plain_row, "reach": f"{share:.0%}", "of": of}
    for column in COLUMNS:
        words = column.words.format(**told)
        yield Column(column.key, column.title.format(**told), words, column.higher, column.form)


def _notes(about: Mapping[str, Any], compared: Comparison | None, costs: _Costs) -> Iterator[str]:
    cells = about["cells"]
    left = [cell["id"] for cell in cells if cell["state"] not in (FINISHED, FAILED)]
    if left:
        yield f"{len(left)} of {len(cells)} cells have not ended yet: {', '.join(left)}."
    if about["at_once"] > 1:
        yield (
            f"Up to {about['at_once']} cells were learnt at the same time: times compare as far as the machines and "
            "what else they did were alike."
        )
    if compared is not None:
        yield from compared.notes
        if len(costs.devices) > 1:
            yield (
                f"Times in the table are of cells learnt on {costs.timed_on} alone."
                if costs.timed_on
                else "The table has no times: on no device was a cell of each row learnt."
            )


# -- figures


def figure_data(found: Found) -> dict[str, Data]:
    made = {"comparison_speed": _speed(found), "comparison_reach": _reach(found)}
    return {name: data for name, data in made.items() if data is not None}


def _speed(found: Found) -> Data | None:
    lines = [line for line in found.lines if "op" in line.values and "train_seconds" in line.values]
    if len(lines) < 2:
        return None
    points: list[Data] = [
        {
            "label": line.label,
            "seconds": line.values["train_seconds"].mean,
            "seconds_std": line.values["train_seconds"].std or 0.0,
            "op": line.values["op"].mean,
            "op_std": line.values["op"].std or 0.0,
        }
        for line in lines
    ]
    best, fast = max(points, key=lambda p: p["op"]), min(points, key=lambda p: p["seconds"])
    return {
        "title": f"Accuracy against time: {best['label']} scores highest, {best['op']:.1f}%, in "
        f"{duration(best['seconds'])}; {fast['label']} is fastest, {duration(fast['seconds'])}",
        "alt": "Points of the mean score after the last task over seconds of training. "
        + ", ".join(f"{p['label']} {p['op']:.1f} in {duration(p['seconds'])}" for p in points) + ".",
        "points": points,
    }  # fmt: skip


def _reach(found: Found) -> Data | None:
    lines = [line for line in found.lines if "reach" in line.values]
    if not lines:
        return None
    (column,) = [column for column in found.columns if column.key == "reach"]
    bars: list[Data] = [
        {
            "label": line.label,
            "steps": line.values["reach"].mean,
            "std": line.values["reach"].std or 0.0,
            "beside": line.values["beside"].mean,
            "never": line.never,
        }
        for line in lines
    ]
    least = min(bars, key=lambda bar: bar["steps"] + bar["beside"])
    return {
        "title": f"{column.title[0].upper()}{column.title[1:]}, a task: {least['label']} needs fewest, "
        f"{least['steps'] + least['beside']:.0f} with all it does beside",
        "alt": "Bars of training steps and of what counts as steps beside them. "
        + ", ".join(f"{bar['label']} {bar['steps']:.0f} + {bar['beside']:.0f}" for bar in bars) + ".",
        "bars": bars,
    }  # fmt: skip
