"""What a comparison is and how far it has come: its rows, seeds and cells, which `comparison.json` holds. No Ray here.

    COMPARISON/comparison.json          what is compared, on which data, by which code; the state of each cell
    COMPARISON/cells/seqlora-s0         a cell: an ordinary run of one row with one seed
    COMPARISON/table.{md,csv,tex}       the result, with report.html and figures/

A cell that has ended is not learnt again, and one that has not goes on from its run's checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from treelora_ray.cluster.compare_rows import Row, read_rows
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.inner_runs import TRIES, absolute, placed
from treelora_ray.config import ConfigError, RunConfig, flat, free_key, run_name
from treelora_ray.files import write_atomically
from treelora_ray.methods.base import unfit
from treelora_ray.methods.catalogue import METHODS
from treelora_ray.store import RunFolder, joined
from treelora_ray.training.record import PACKAGES, version_of

FILE, CELLS = "comparison.json", "cells"
WATCH, EVERY = 64, 10  # rows and steps of looks at the accuracy, where the config does not say
CODE = ("core", "data", "models", "objectives", "methods", "training", "api.py", "config.py")
State = Literal["waiting", "running", "finished", "failed"]


@dataclass(frozen=True)
class CompareOptions:
    """How to compare; what is compared says the config."""

    methods: str = "all"
    seeds: tuple[int, ...] = (0,)
    name: str | None = None
    reach: float | None = None  # share of the accuracy of row `independent` to which steps are counted
    concurrency: int | None = None  # None: as many cells as there is room for

    def __post_init__(self) -> None:
        wrong = []
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            wrong.append(f"seeds are {', '.join(map(str, self.seeds)) or 'none'}: give each once, as in --seeds 0,1,2")
        if self.reach is not None and not 0 < self.reach <= 1:
            wrong.append(f"reach is {self.reach:g}; it is a share of an accuracy, above 0 and at most 1, such as 0.95")
        if self.concurrency is not None and self.concurrency < 1:
            wrong.append(f"concurrency is {self.concurrency}; it must be at least 1")
        if wrong:
            raise ClusterError("the comparison cannot begin:\n  " + "\n  ".join(wrong))


@dataclass
class Cell:
    """One row learnt with one seed."""

    id: str
    row: str
    seed: int
    run: str  # its folder, below the comparison's
    state: State = "waiting"
    error: str | None = None
    failures: int = 0
    kept: dict[str, int] = field(default_factory=dict)  # bytes, once it is finished

    @property
    def over(self) -> bool:
        return self.state in ("finished", "failed")

    def to_json(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


def comparison_name(base: RunConfig, name: str | None) -> str:
    return name or f"compare-{run_name(base)}"


def with_looks(base: RunConfig, options: CompareOptions) -> dict[str, Any]:
    """What a config has to say more, where steps to an accuracy are asked for."""
    if options.reach is None or base.stream.watch is not None:
        return {}
    return {"stream.watch": WATCH, "evaluate.every": EVERY}


class Comparison:
    """One comparison in its folder, new or as it was left."""

    def __init__(self, base: RunConfig, objective: str, options: CompareOptions, folder: RunFolder) -> None:
        self.base, self.options, self.folder = absolute(base), options, folder
        self.name = comparison_name(base, options.name)
        self.rows = {row.label: row for row in read_rows(options.methods, _fitting(objective))}
        self.objective = objective
        self.data: dict[str, dict[str, str]] = {}  # by seed: digest of each task's rows, once a cell has opened them
        self.seconds, self.clock, self.at_once = 0.0, time.monotonic(), 1
        self.cells = [self._cell(row, seed) for seed in options.seeds for row in self.rows.values()]
        self.configs = self._checked()
        folder.pull(FILE)
        self.resumed = (folder.path / FILE).is_file()
        self._resume()

    def _cell(self, row: Row, seed: int) -> Cell:
        name = f"{row.slug}-s{seed}"
        return Cell(name, row.label, seed, f"{CELLS}/{name}")

    def _checked(self) -> dict[str, RunConfig]:
        """By row, its config with the first seed; all that is wrong with any at once."""
        found, wrong = {}, []
        for row in self.rows.values():
            if said := unfit(row.method, self.objective):
                wrong.append(f"row {row.label!r}: {said}")
                continue
            try:
                found[row.label] = self.config(self._cell(row, self.options.seeds[0]))
            except ConfigError as error:
                wrong.append(str(error))
        if wrong:
            raise ClusterError("the methods cannot be compared:\n  " + "\n  ".join(wrong))
        return found

    def config(self, cell: Cell) -> RunConfig:
        """Of a cell's run, shown in MLflow below the comparison, without what is made to look at."""
        quiet = {"tracking.report": False, "tracking.model": False, "tracking.register": None}
        values = {**self.rows[cell.row].values(self.base), **quiet}
        folder = joined(self.folder.address, CELLS)
        return placed(self.base, {**values, "seed": cell.seed}, cell.id, folder, self.name, f"row {cell.row!r}")

    # -- what it is

    def about(self) -> dict[str, Any]:
        """What must be the same when it goes on; rows and seeds may be added."""
        return {
            "name": self.name,
            "rows": {
                label: {"method": row.method, "settings": row.settings, "config": _identity(self.configs[label])}
                for label, row in self.rows.items()
            },
            "seeds": list(self.options.seeds),
            "code": code(),
        }

    def _resume(self) -> None:
        if not self.resumed:
            return
        found = json.loads((self.folder.path / FILE).read_text())
        if changed := list(_differences(found, json.loads(json.dumps(self.about())))):
            raise ClusterError(
                f"comparison {self.folder} was begun with something else, and cells of both would not compare:\n  "
                + "\n  ".join(changed)
                + "\ngive it another name (--name)"
            )
        self.data, self.seconds, self.at_once = found["data"], found["seconds"], found["at_once"]
        before = {each["id"]: each for each in found["cells"]}
        for cell in self.cells:
            for name, value in before.get(cell.id, {}).items():
                setattr(cell, name, value)
            if cell.state != "finished" or self._is_gone(cell):
                # A process that is gone is not to blame; what has failed is tried again, from where it stands.
                cell.state, cell.failures, cell.error = "waiting", 0, None
        self.cells.sort(key=lambda cell: before.get(cell.id, {}).get("state") != "running")

    def _is_gone(self, cell: Cell) -> bool:
        return not self.folder.stored and not (self.folder.path / cell.run / "result.json").is_file()

    # -- how far it is

    @property
    def left(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.over]

    def next(self) -> Cell | None:
        return next((cell for cell in self.cells if cell.state == "waiting"), None)

    def begins(self, cell: Cell) -> None:
        cell.state = "running"
        self.save()

    def waits(self, cell: Cell) -> None:
        cell.state = "waiting"
        self.save()

    def finished(self, cell: Cell, kept: Mapping[str, int]) -> None:
        cell.state, cell.error, cell.kept = "finished", None, dict(kept)
        self.save()

    def failed(self, cell: Cell, error: str, final: bool) -> None:
        """Marks it where no other try mends it."""
        cell.failures = TRIES if final else cell.failures + 1
        cell.error = error
        cell.state = "failed" if cell.failures >= TRIES else "waiting"
        self.save()

    def pin(self, cell: Cell, data: Mapping[str, str]) -> None:
        """All cells of a seed learn the same rows."""
        known = self.data.setdefault(str(cell.seed), dict(data))
        if changed := changed_data(known, data):
            raise ClusterError(
                f"the stream is not the one that earlier cells of comparison {self.folder} have learnt ({changed}): "
                "put the data back, or give the comparison another name (--name)"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            **self.about(),
            "objective": self.objective,
            "reach": self.options.reach,
            "at_once": self.at_once,
            "data": self.data,
            "cells": [cell.to_json() for cell in self.cells],
            "seconds": self.seconds,
        }

    def save(self) -> None:
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.folder.path.mkdir(parents=True, exist_ok=True)
        data = json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
        write_atomically(self.folder.path / FILE, data.encode())
        self.folder.push()


def changed_data(known: Mapping[str, str], data: Mapping[str, str]) -> str:
    """In words, how rows differ from those known; empty where they do not."""
    if list(known) != list(data):
        return f"its tasks were {', '.join(known)}, now they are {', '.join(data)}"
    names = [name for name in known if known[name] != data[name]]
    return f"the rows of {', '.join(names)} have changed" if names else ""


def _fitting(objective: str) -> list[str]:
    return [name for name in METHODS if unfit(name, objective) is None]


def _identity(config: RunConfig) -> dict[str, Any]:
    """What results of a row depend on, but for the seed."""
    data = flat(config.model_dump(mode="json", by_alias=True))
    return {key: value for key, value in data.items() if not free_key(key) and key != "seed"}


@cache
def code() -> dict[str, str]:
    """Of what cells are learnt by: digest of the sources, versions of packages."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for part in CODE:
        path = root / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            found.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    versions = {name: version_of(name) for name in PACKAGES}
    return {"sources": found.hexdigest()[:16], **{name: found for name, found in versions.items() if found}}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """In words; `new` as it comes back from JSON."""
    for label, was in old["rows"].items():
        if label not in new["rows"]:
            yield f"row {label!r} is of the comparison, but is not asked for: rows may be added, not left out"
            continue
        one, other = was["config"], new["rows"][label]["config"]
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        yield from (f"row {label!r}, {key}: {one.get(key)!r} then, {other.get(key)!r} now" for key in keys)
    if missing := [seed for seed in old["seeds"] if seed not in new["seeds"]]:
        yield f"seeds {_listed(missing)} are of the comparison, but are not asked for: seeds may be added, not left out"
    for name in {**old["code"], **new["code"]}:
        was, now = old["code"].get(name), new["code"].get(name)
        if was != now:
            what = "the code that cells are learnt by" if name == "sources" else f"the version of {name}"
            yield f"{what}: {was} then, {now} now"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
