"""Runs in the terminal: live progress, plain lines, or JSON lines; tables of scores and times."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from treelora_ray.training.stream import Listener

if TYPE_CHECKING:
    from treelora_ray.tracking.comparison_data import Found

PLAIN_EVERY = 5.0  # seconds between plain lines


class Bars(Listener):
    """For a terminal: a bar over the task's steps, a line for each task learnt."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(compact=True),
            console=console, transient=True,
        )  # fmt: skip
        self.bar: TaskID | None = None
        self.title, self.began, self.first = "", 0.0, 0

    def begins(self, number: int, of: int, name: str) -> None:
        self.close()
        self.title, self.began, self.first = f"task {number + 1} of {of}  {escape(name)}", 0.0, 0
        self.bar = self.progress.add_task(self.title, total=None, rate="", loss="")
        self.progress.start()

    def phase(self, name: str) -> None:
        if self.bar is not None:
            self.progress.update(self.bar, description=f"{self.title}  {name}")

    def step(self, step: int, of: int, loss: float) -> None:
        if not self.began:
            self.began, self.first = time.monotonic(), step
        took = time.monotonic() - self.began
        rate = f"{(step - self.first) / took:.0f} steps/s" if took > 0.2 else ""
        if self.bar is not None:
            self.progress.update(self.bar, total=of, completed=step + 1, rate=rate, loss=f"loss {loss:.3f}")

    def scored(self, record: dict[str, Any]) -> None:
        self.close()
        self.console.print(escape(line_of(record)), highlight=False)

    def note(self, text: str) -> None:
        self.console.print(escape(text), highlight=False)

    def close(self) -> None:
        if self.bar is not None:
            self.progress.remove_task(self.bar)
            self.bar = None
        self.progress.stop()


class Lines(Listener):
    """For logs: a line for each task, and one every few seconds between."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.title, self.last = out, "", time.monotonic()

    def _say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def begins(self, number: int, of: int, name: str) -> None:
        self.title = f"task {number + 1} of {of} {name}"
        self._say(self.title)

    def step(self, step: int, of: int, loss: float) -> None:
        if time.monotonic() - self.last > PLAIN_EVERY:
            self.last = time.monotonic()
            self._say(f"{self.title}: step {step + 1} of {of}, loss {loss:.3f}")

    def scored(self, record: dict[str, Any]) -> None:
        self._say(line_of(record))

    def note(self, text: str) -> None:
        self._say(text)


class JsonLines(Listener):
    """For programs: an object a line."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def write(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}, ensure_ascii=False), file=self.out, flush=True)

    def begins(self, number: int, of: int, name: str) -> None:
        self.write("begins", number=number, of=of, task=name)

    def scored(self, record: dict[str, Any]) -> None:
        self.write("scored", **record)

    def note(self, text: str) -> None:
        self.write("note", text=text)


def line_of(record: Mapping[str, Any]) -> str:
    """A task learnt, in a line: its score, what it took, and what it leans on."""
    effort, seen = record["effort"], [score for score in record["scores"] if score is not None]
    own = record["scores"][record["tasks"][-1]]
    seconds = sum(effort["seconds"].values())
    text = f"  {record['unit']}: {own:.1f}, mean of {len(seen)} {sum(seen) / len(seen):.1f}, {effort['steps']} steps"
    text += f", {seconds:.1f} s"
    leans = record["report"].get("leans_on")
    if leans:
        counts = Counter(name for name in leans if name is not None).most_common()
        named = ", ".join(f"{name} ({count})" for name, count in counts)
        text += f", leans on {named} of {len(leans)} layers" if counts else ", leans on nothing"
    return text


def score_tables(result: Mapping[str, Any], console: Console) -> None:
    """The matrix (a row for each unit learnt), metrics, tree and times."""
    tasks, matrix = list(result["tasks"]), result["matrix"]
    table = Table(title="score on (column) after learning (row), percent", title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    wide = len(tasks) * 6 + 20 > console.width
    for number, task in enumerate(tasks):
        table.add_column(str(number) if wide else escape(task), justify="right")
    for number, (row, record) in enumerate(zip(matrix, result["records"], strict=True)):
        cells = ["" if x is None else f"{x:.0f}" if wide else f"{x:.1f}" for x in row[: len(tasks)]]
        table.add_row(f"{number} {escape(record['unit'])}", *cells)
    console.print(table)
    metrics_line(result["metrics"], console)
    if result.get("drawn"):
        console.print("\nTree over the tasks' gradients; δ is the mean distance between the halves of a group")
        console.print(result["drawn"], markup=False, highlight=False)
    times(result["records"], console)


def metrics_line(metrics: Mapping[str, Any], console: Console) -> None:
    names = {
        "op": "mean score after the last task",
        "bwt": "backward transfer (positive = forgetting)",
        "learning_accuracy": "mean score right after learning",
        "forgetting": "drop from each task's best",
        "average_incremental_accuracy": "average incremental accuracy",
    }
    for key, words in names.items():
        if metrics.get(key) is not None:
            console.print(f"{metrics[key]:7.2f}  {key}: {words}", highlight=False)


def sweep_table(sweep: Mapping[str, Any], console: Console) -> None:
    """Trials, the best first, each with its settings; then the winner."""
    metric, keys = sweep["metric"], list(sweep["parameters"])
    sign = 1.0 if sweep["mode"] == "max" else -1.0
    table = Table(title=f"trials by {metric} on held-out rows", title_justify="left", pad_edge=False)
    for name in ("trial", "state", "learnt", "val_op", "forgetting", "seconds"):
        table.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
    for key in keys:
        short = key.rpartition(".")[2]
        table.add_column(escape(short if sum(key.endswith(f".{short}") for key in keys) == 1 else key))

    def worth(trial: Mapping[str, Any]) -> tuple[bool, float]:
        return trial["state"] == "finished", -1e9 if trial[metric] is None else sign * trial[metric]

    for trial in sorted(sweep["trials"], key=worth, reverse=True):
        numbers = [(trial["percent"], ".0f", "%"), (trial["val_op"], ".1f", ""), (trial["forgetting"], ".1f", "")]
        numbers.append((trial["seconds"], ".0f", ""))
        cells = ["" if value is None else f"{value:{form}}{unit}" for value, form, unit in numbers]
        settings = [escape(str(trial["parameters"][key])) for key in keys]
        table.add_row(trial["id"], trial["state"], *cells, *settings)
    console.print(table)
    if (winner := sweep["winner"]) is None:
        return
    spread = "" if winner["val_op"]["std"] is None else f" ± {winner['val_op']['std']:.2f}"
    text = (
        f"winner {winner['trial']}: val_op {winner['val_op']['mean']:.2f}{spread} over {len(winner['val_op']['seeds'])}"
    )
    text += " seeds" if len(winner["val_op"]["seeds"]) > 1 else " seed"
    if winner["test"]:
        text += f"; on test rows {winner['test']['op']:.2f}"
    console.print(text, highlight=False)


def comparison_table(found: Found, console: Console) -> None:
    """A row for each method; then what has failed, and why."""
    from treelora_ray.tracking.comparison_table import cell, failures, seeds

    table = Table(title="mean ± standard deviation over seeds", title_justify="left", pad_edge=False)
    table.add_column("method", overflow="fold")
    for title in ("seeds", *(column.title for column in found.columns)):
        table.add_column(title, justify="right")
    for line in found.lines:
        table.add_row(escape(line.label), seeds(line), *(cell(line, column) for column in found.columns))
    console.print(table)
    for text in failures(found):
        console.print(escape(text), highlight=False)


def times(records: Sequence[Mapping[str, Any]], console: Console) -> None:
    phases = list(dict.fromkeys(phase for record in records for phase in record["effort"]["seconds"]))
    table = Table(title="seconds by phase", title_justify="left", pad_edge=False)
    for name in ("", "steps", "probes", *phases):
        table.add_column(name, justify="left" if not name else "right")
    for record in records:
        effort = record["effort"]
        cells = [f"{effort['seconds'].get(phase, 0.0):.1f}" for phase in phases]
        table.add_row(escape(record["unit"]), str(effort["steps"]), str(effort["probe_rounds"]), *cells)
    console.print(table)


def listener(quiet: bool, as_json: bool) -> Listener:
    """What fits the place where output goes."""
    if as_json:
        return JsonLines(sys.stdout)
    if quiet:
        return Listener()
    console = Console()
    return Bars(console) if console.is_terminal else Lines(sys.stdout)
