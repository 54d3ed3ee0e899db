"""Steps to an accuracy, task by task: a method's beside those of an adapter that starts anew and is trained alone.

    told = reached(table, results, "treelora", 0.95)        of the cells that are there
    print(markdown(table, results, ["treelora"]))           a section of the table's page

The accuracy is a share of what the row `independent` has on the task at its end, on training rows kept out of training.
What a method does beyond `independent` before its first step (probe rounds) counts as steps, and its seconds as time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import Results, Table
from benchmarks.growth import looking
from benchmarks.paired import ALONE
from treelora_ray.tracking.compare import counted

SHARES = (0.95, 0.98)


@dataclass(frozen=True)
class Reached:
    task: str
    seed: int
    related: bool  # whether an earlier task is of its family
    alone: int  # steps of `independent`
    own: int | None  # steps of the method; None: never
    extra: int  # what it does beyond `independent` beside its steps, as steps
    seconds: tuple[float, float] | None  # of `independent` and of the method; None: of other devices

    @property
    def ratio(self) -> float | None:
        """None where `independent` is there before its first step; 0 where the method never is."""
        if not self.alone:
            return None
        return 0.0 if self.own is None else self.alone / max(self.own + self.extra, 1)

    @property
    def ratio_of_seconds(self) -> float | None:
        """None also where times do not compare."""
        if not self.alone or self.seconds is None:
            return None
        return 0.0 if self.own is None else self.seconds[0] / self.seconds[1]


def reached(table: Table, results: Results, row: str, share: float) -> list[Reached]:
    found, batch = [], next(cell.config.train.batch for cell in table.cells if cell.row == row)
    for seed in table.seeds:
        one, other = results.get((ALONE, seed)), results.get((row, seed))
        if one is None or other is None:
            continue
        met: set[str] = set()
        timed = one.get("device") == other.get("device")
        for plain, own in zip(one["records"], other["records"], strict=True):
            task, family = own["unit"], table.families.get(own["unit"], own["unit"])
            target = share * plain["effort"]["watched"][-1][1]
            alone, steps = first(plain["effort"], target), first(own["effort"], target)
            assert alone is not None  # its last look reaches it
            extra = max(beside(own["effort"], batch) - beside(plain["effort"], batch), 0)
            looks = max(looking(own) - looking(plain), 0)
            seconds = (alone * step(plain), max((steps or 0) * step(own) + looks, step(own))) if timed else None
            found.append(Reached(task, seed, family in met, alone, steps, extra, seconds))
            met.add(family)
    return found


def first(effort: Mapping[str, Any], target: float) -> int | None:
    return next((int(step) for step, score in effort["watched"] if score >= target - 1e-9), None)


def step(record: Mapping[str, Any]) -> float:
    """Seconds of a training step."""
    return float(record["effort"]["seconds"]["train"] / record["effort"]["steps"])


def beside(effort: Mapping[str, Any], batch: int) -> int:
    return counted(effort, batch) - int(effort["steps"])


def markdown(table: Table, results: Results, rows: Sequence[str]) -> str:
    """Medians over tasks and seeds, and below them the first row's task by task."""
    lines, single = [], list[str]()
    for number, row in enumerate(rows):
        for share in SHARES:
            told = reached(table, results, row, share)
            if not told:
                continue
            related = [each.ratio for each in told if each.related and each.ratio is not None]
            others = [each for each in told if not each.related and each.alone]
            clock = [each.ratio_of_seconds for each in told if each.related and each.ratio_of_seconds is not None]
            more = [each.own + each.extra - each.alone for each in others if each.own is not None]
            lines.append(
                f"| {row} | {share:.0%} | {_median(related)} | {_median(clock)} | {len(related)} | {_median(more)} "
                f"| {len(others)} | {sum(each.own is None for each in told)} | {sum(not each.alone for each in told)} |"
            )
            single += (
                []
                if number
                else [
                    f"| {share:.0%} | {each.task} ({each.seed}) | {'yes' if each.related else 'no'} | {each.alone} "
                    f"| {'never' if each.own is None else each.own} | {each.extra} | {_number(each.ratio)} |"
                    for each in told
                ]
            )
    if not lines:
        return ""
    return "\n".join([
        "## Steps to an accuracy",
        "",
        f"Of the accuracy that `{ALONE}` has on a task at its end. Its steps over those of the method, with what the "
        "method does beyond it before the first step; a task that never gets there counts as 0. The same in seconds: "
        "of training steps, and of looking at a task.",
        "",
        "| method | share | ratio, tasks with an earlier relative (median) | in seconds | tasks "
        "| more steps, other tasks (median) | tasks | never there | there at once |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *lines,
        "",
        f"Task by task, `{rows[0]}`:",
        "",
        "| share | task (seed) | relative | independent | method | beside | ratio |",
        "|---:|---|---|---:|---:|---:|---:|",
        *single,
    ])  # fmt: skip


def _median(values: list[Any]) -> str:
    return _number(statistics.median(values)) if values else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
