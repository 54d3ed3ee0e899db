"""Cells of result tables: one row with one seed, learnt once and kept as a small JSON file beside the results.

    table = read_table(path, data)                 rows, seeds and settings of a YAML file
    failed = learn(table, work, jobs=2)            learns what is not there yet, in so many processes
    found = kept(table, failed=failed)             what is there

A cell counts as long as its config, its data, its backbone and the code that learns are what they were when it was
learnt. No path of a machine is part of that.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.encoder import needed_encoder
from treelora_ray.api import Run
from treelora_ray.cluster.compare_cell import Outcome, learn_cell
from treelora_ray.cluster.compare_plan import code
from treelora_ray.cluster.compare_rows import Row, rows_of
from treelora_ray.config import RunConfig, StreamConfig, flat, free_key, load, with_values
from treelora_ray.data.rows import digest
from treelora_ray.data.stream import fingerprints, open_stream
from treelora_ray.files import write_atomically
from treelora_ray.methods.shared import Shared
from treelora_ray.models.digits_vit import digits_vit_folder
from treelora_ray.models.loading import BUILTIN
from treelora_ray.store import joined
from treelora_ray.tracking import comparison_data
from treelora_ray.tracking.compare import Entry
from treelora_ray.tracking.comparison_data import Found
from treelora_ray.training.stream import Listener

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "docs" / "results" / "cells"
PLACES = ("stream.path", "model.backbone")  # that differ from machine to machine; what lies there counts
ENCODER = "bench:all-MiniLM-L6-v2"  # in place of a backbone: the pre-trained one of the extra `bench`
RESULT = ("finished", "tasks", "families", "matrix", "metrics", "trainable_parameters", "adapter_bytes_per_task",
          "peak_memory_bytes", "peak_device_bytes", "device", "packages", "python", "commit")  # fmt: skip
RECORD = ("unit", "tasks", "scores", "effort")
Results = Mapping[tuple[str, int], Mapping[str, Any]]  # by row and seed, of the cells that are there


@dataclass(frozen=True)
class Cell:
    id: str
    row: str
    config: RunConfig

    @property
    def seed(self) -> int:
        return self.config.seed


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    rows: dict[str, Row]
    cells: list[Cell]
    further: list[Cell]  # of more seeds, for some rows: to compare these seed by seed
    reach: float | None
    families: dict[str, str]  # by task, where steps to an accuracy are told for tasks with earlier relatives
    seeds: list[int]
    notes: list[str]  # what the page says beside its numbers
    growth: int  # in how many parts of the stream the cost of a task is told

    @property
    def folder(self) -> Path:
        return CELLS / self.name


def read_table(path: Path, data: Path | None, seeds: Iterable[int] = (), only: Iterable[str] = ()) -> Table:
    """Of a file with title, preset, settings, rows, seeds and, where wanted, notes and `further` seeds for some rows;
    if steps are counted, reach and families; growth, where the cost of a task is told part by part. A file `like`
    another has what it does not say, settings one by one, from that.

    `data` takes the place of DATA in its settings, `seeds` that of its seeds; of its rows `only` these, where some are
    named.
    """
    about = _read(path)
    settings = [f"{key}={json.dumps(value)}" for key, value in about.get("settings", {}).items()]
    base = load(about["preset"], [*settings, "tracking.to=none", "train.threads=1"])
    if base.stream.path == "DATA":
        if data is None:
            raise SystemExit(f"{path.stem} learns from data that do not come with the package: give their folder")
        base = with_values(base, {"stream.path": str(data.resolve())}, str(path))
    if base.model.backbone == ENCODER:
        base = with_values(base, {"model.backbone": str(needed_encoder())}, str(path))
    rows = {row.label: row for row in rows_of(about["rows"], path)}
    if unknown := set(only) - set(rows):
        raise SystemExit(f"{path.stem} has no rows {', '.join(sorted(unknown))}: it has {', '.join(rows)}")
    rows = {label: row for label, row in rows.items() if not set(only) or label in only}
    asked, more = list(seeds) or list(about["seeds"]), {} if seeds else about.get("further", {})

    def cells(numbers: Iterable[int], labels: Iterable[str]) -> list[Cell]:
        return [
            Cell(f"{row.slug}-s{seed}", label, with_values(base, {**row.values(base), "seed": seed}, f"row {label!r}"))
            for seed in numbers
            for label, row in rows.items()
            if label in labels
        ]

    further = cells(more.get("seeds", ()), more.get("rows", ()))
    return Table(path.stem, about["title"], rows, cells(asked, rows), further, about.get("reach"),
                 about.get("families", {}), asked, about.get("notes", []), about.get("growth", 0))  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = yaml.safe_load(path.read_text())
    if (other := about.get("like")) is None:
        return about
    base = _read(path.parent / f"{other}.yaml")
    return {**base, **about, "settings": {**base.get("settings", {}), **about.get("settings", {})}}


# -- which cell it is


def identity(config: RunConfig) -> dict[str, str]:
    """What a cell's numbers depend on."""
    data = flat(config.model_dump(mode="json", by_alias=True))
    settings = {key: value for key, value in data.items() if not free_key(key) and key not in PLACES}
    stream = config.stream.model_dump_json()
    return {
        "config": digest(json.dumps(settings, sort_keys=True)),
        "data": _data(stream, config.seed),
        "backbone": _backbone(config.model.backbone),
        "code": code()["sources"],
    }


@cache
def _data(stream: str, seed: int) -> str:
    return digest(json.dumps(fingerprints(open_stream(StreamConfig.model_validate_json(stream), seed))))


@cache
def _backbone(name: str) -> str:
    if name == BUILTIN:
        return digest((digits_vit_folder() / "model.safetensors").read_bytes())
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(each for each in folder.rglob("[!.]*") if each.is_file() and each.suffix != ".py")
    return digest(*(part for each in files for part in (each.name, each.read_bytes())))


def read_cell(table: Table, cell: Cell, any_code: bool = False) -> dict[str, Any] | None:
    """What was learnt, where it is the same that would be learnt now."""
    path = table.folder / f"{cell.id}.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    now = identity(cell.config)
    same = all(found["identity"][key] == now[key] for key in now if not (any_code and key == "code"))
    return found if same else None


# -- learning


def _tell(text: str) -> None:
    print(text, flush=True)


def learn(
    table: Table,
    work: Path,
    jobs: int = 2,
    *,
    any_code: bool = False,
    again: bool = False,
    say: Callable[[str], None] = _tell,
) -> dict[str, str]:
    """Why cells failed, by their ids. Runs lie below `work`, where cells that were broken off go on. `again`: learns
    what is there, too, and says how it compares."""
    every = [*table.cells, *table.further]
    left = [cell for cell in every if again or read_cell(table, cell, any_code) is None]
    say(f"{table.name}: {len(left)} of {len(every)} cells to learn")
    failed: dict[str, str] = {}
    folder = (work / table.name).absolute()
    known = {cell.id: identity(cell.config) for cell in left}  # before: sources may change while cells are learnt
    start = time.monotonic()
    if left:
        # Spawned, not forked: threads of torch do not outlive a fork.
        with ProcessPoolExecutor(min(jobs, len(left)), get_context("spawn"), _begin, (str(folder),)) as pool:
            waiting = {}
            for cell in left:
                place = {"name": _place(cell, known[cell.id]), "folder": str(folder)}
                waiting[pool.submit(_learn, with_values(cell.config, place, cell.id))] = cell
            for future in as_completed(waiting):
                cell, outcome = waiting[future], future.result()
                if outcome["state"] == "finished":
                    said = f"{outcome['op']:.1f}%, {outcome['seconds']:.0f} s" + _before(table, cell)
                    _keep(table, cell, known[cell.id], folder, outcome, min(jobs, len(left)))
                else:
                    failed[cell.id] = outcome.get("error", outcome["state"])
                    said = failed[cell.id]
                say(f"{cell.id}: {said} ({time.monotonic() - start:.0f} s in all)")
    return failed


def _before(table: Table, cell: Cell) -> str:
    """What was kept of a cell, whatever code it was learnt by."""
    path = table.folder / f"{cell.id}.json"
    if not path.is_file():
        return ""
    return f", before {json.loads(path.read_text())['result']['metrics']['op']:.1f}%"


def _place(cell: Cell, known: Mapping[str, str]) -> str:
    """A folder's name: a run of other code or settings is another run."""
    return f"{cell.id}-{digest(json.dumps(known))[:8]}"


_shared: Shared | None = None


def _begin(folder: str) -> None:
    global _shared
    os.environ["TREELORA_TRACKING"] = "none"
    torch.set_num_threads(1)
    _shared = Shared(Path(folder) / ".looks")


def _learn(config: RunConfig) -> Outcome:
    return learn_cell(config, None, Listener(), lambda: False, _shared)


def _keep(table: Table, cell: Cell, known: Mapping[str, str], folder: Path, outcome: Outcome, at_once: int) -> None:
    """In place of its run, which is not needed any more."""
    place = _place(cell, known)
    done = Run(joined(str(folder), place))
    result = {key: done.result[key] for key in RESULT if key in done.result}
    result["records"] = [{key: record[key] for key in RECORD} for record in done.result["records"]]
    found = {
        "row": cell.row,
        "seed": cell.seed,
        "identity": known,
        "at_once": at_once,
        "kept": outcome["kept"],
        "result": _rounded(result),
    }
    table.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(table.folder / f"{cell.id}.json", (json.dumps(found, separators=(",", ":")) + "\n").encode())
    shutil.rmtree(folder / place)


def _rounded(data: Any) -> Any:
    """Six digits of a number are enough, and the file is smaller."""
    if isinstance(data, float):
        return float(f"{data:.6g}")
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, list) else data


def kept(table: Table, any_code: bool = False, failed: Mapping[str, str] | None = None) -> Found:
    """Of the cells that are there, as a comparison; `failed`: why others are not."""
    cells, entries, at_once, failed = [], dict[str, Entry](), 1, failed or {}
    for cell in table.cells:
        found = read_cell(table, cell, any_code)
        state = "finished" if found else "failed" if cell.id in failed else "waiting"
        own = {"id": cell.id, "row": cell.row, "seed": cell.seed, "state": state, "error": failed.get(cell.id)}
        cells.append({**own, "kept": found["kept"] if found else {}})
        if found:
            entries[cell.id] = Entry(cell.id, cell.config, found["result"])
            at_once = max(at_once, found["at_once"])
    about = {
        "name": table.title,
        "rows": {label: {"method": row.method, "settings": row.settings} for label, row in table.rows.items()},
        "seeds": table.seeds,
        "cells": cells,
        "reach": table.reach,
        "at_once": at_once,
        "code": code(),
    }
    return comparison_data.found(about, entries)


def results(found: Found) -> Results:
    by_id = {run.name: run.result for group in (found.compared.groups if found.compared else []) for run in group.runs}
    return {(cell["row"], cell["seed"]): by_id[cell["id"]] for cell in found.cells if cell["id"] in by_id}


def further(table: Table, any_code: bool = False) -> Results:
    """Of the cells of more seeds, those that are there."""
    read = {(cell.row, cell.seed): read_cell(table, cell, any_code) for cell in table.further}
    return {place: found["result"] for place, found in read.items() if found}
