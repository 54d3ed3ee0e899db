"""The journal of a run: `journal.jsonl` in its folder, a line for each thing that was told. MLflow is fed from it.

    {"at": 1790000000000, "kind": "begins", "run": "3f…", "about": {…}}            each start of the run
    {"at": …, "kind": "step", "unit": 0, "step": 9, "global": 9, "metrics": {…}}   every so many steps
    {"at": …, "kind": "learnt", "number": 0, "name": …, "metrics": {…}}            a unit learnt
    {"at": …, "kind": "ends", "status": "FINISHED"}

Writing a line is all that the training thread does: delivery is the work of another process (`sender.py`), which
may be slow, fail or die without anybody waiting for it. A resumed run learns some steps again: they stay as they
were told first, and are not told twice.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treelora_ray.training.tracker import Tracker

FILE = "journal.jsonl"


class Journal(Tracker):
    def __init__(self, folder: Path, every: int, batch: int, say: Callable[[str], None]) -> None:
        self.path, self.every, self.batch, self.say = folder / FILE, every, batch, say
        self.descriptor: int | None = None
        self.told = (-1, -1)  # the last (unit, step) in the journal
        self.learnt_units = 0
        self.losses: list[float] = []
        self.clock = time.monotonic()

    def begins(self, about: Mapping[str, Any], fresh: bool, left: int) -> None:
        if fresh and self.path.exists():
            self.path.replace(self.path.with_suffix(".old.jsonl"))  # of a run that never came to a checkpoint
        entries = read(self.path)
        for entry in entries:
            self._note(entry)
        if not left and entries and entries[-1].get("status") == "FINISHED":
            return  # all was told
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self.descriptor, whole_lines(self.path))  # a line cut short by a crash was never told
        run = next((entry["run"] for entry in entries if entry["kind"] == "begins"), secrets.token_hex(16))
        self._write("begins", run=run, about=dict(about))
        self.clock = time.monotonic()

    def _note(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step":
            self.told = max(self.told, (entry["unit"], entry["step"]))
        elif entry["kind"] == "learnt":
            self.learnt_units = max(self.learnt_units, entry["number"] + 1)

    def step(
        self, unit: int, step: int, of: int, whole: int, loss: float, values: Callable[[], dict[str, float]]
    ) -> None:
        self.losses.append(loss)
        if (step + 1) % self.every and step + 1 < of:
            return
        now, count, mean = time.monotonic(), len(self.losses), math.fsum(self.losses) / len(self.losses)
        took, self.clock, self.losses = now - self.clock, now, []
        if (unit, step) <= self.told:
            return
        found = {"loss": mean, "samples_per_second": count * self.batch / max(took, 1e-9), **values()}
        metrics = {name: value for name, value in found.items() if math.isfinite(value)}
        self._write("step", unit=unit, step=step, **{"global": whole}, metrics=metrics)

    def learnt(self, number: int, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        self.losses, self.clock = [], time.monotonic()
        if number < self.learnt_units:
            return
        self._write("learnt", number=number, **record, metrics=dict(metrics))

    def ends(self, status: str) -> None:
        if self.descriptor is not None:
            self._write("ends", status=status)
            os.fsync(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None

    def _write(self, kind: str, **fields: Any) -> None:
        if self.descriptor is None:
            return
        line = json.dumps({"at": int(time.time() * 1000), "kind": kind, **fields}, ensure_ascii=False) + "\n"
        try:
            os.write(self.descriptor, line.encode())
        except OSError as error:
            os.close(self.descriptor)
            self.descriptor = None
            self.say(f"the journal {self.path} cannot be written ({error.strerror}): the run goes on without it")


def read(path: Path) -> list[dict[str, Any]]:
    """All entries; none where there is no journal."""
    return [entry for _, entry in read_on(path, 0)]


def beginning(path: Path) -> dict[str, Any] | None:
    """The first entry that says what the run is; None where nothing was told yet."""
    return next((entry for entry in read(path) if entry["kind"] == "begins"), None)


def read_on(path: Path, start: int) -> list[tuple[int, dict[str, Any]]]:
    """Entries from an offset on, each with the offset behind it; what is damaged is left out."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        return []
    found = []
    for line in data.splitlines(keepends=True):
        start += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "kind" in entry:
            found.append((start, entry))
    return found


def whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    with path.open("rb") as file:
        return file.read().rfind(b"\n") + 1
