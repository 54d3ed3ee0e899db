"""One cell of a comparison: its run, what came of it in words and numbers, and where that is written. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

import torch

from treelora_ray.api import Run
from treelora_ray.cluster.compare_plan import Cell, Comparison, changed_data
from treelora_ray.cluster.errors import first_line
from treelora_ray.cluster.inner_runs import learn, of_its_own_making
from treelora_ray.config import RunConfig, run_name
from treelora_ray.data.stream import fingerprints
from treelora_ray.methods.shared import Shared
from treelora_ray.store import joined
from treelora_ray.training.errors import Stopped
from treelora_ray.training.stream import Listener


class Outcome(TypedDict, total=False):
    state: Literal["finished", "stopped", "failed", "refused"]
    error: str
    final: bool  # no other try mends it
    data: dict[str, str]  # digest of each task's rows
    kept: dict[str, int]  # bytes
    op: float
    seconds: float


class Progress(Listener):
    """How far a cell is."""

    def __init__(self) -> None:
        self.done, self.of = 0, 0

    def starts(self, steps: list[int], records: list[dict[str, Any]]) -> None:
        self.done, self.of = len(records), len(steps)

    def scored(self, record: dict[str, Any]) -> None:  # noqa: ARG002
        self.done += 1


def learn_cell(
    config: RunConfig,
    known: Mapping[str, str] | None,
    listener: Listener,
    stop: Callable[[], bool],
    shared: Shared | None,
) -> Outcome:
    """Learns it, or goes on. `known`: digests of the rows that other cells of its seed have learnt."""
    try:
        if known and shared is not None:
            data = digests(fingerprints(shared.streams.open(config.stream, config.seed)))
            if changed := changed_data(known, data):
                return {"state": "refused", "error": changed, "data": data}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # else it would be that of the cells before
        learn(config, listener, stop, shared)
        done = Run(joined(config.folder, run_name(config)))
        efforts = [record["effort"] for record in done.result["records"]]
        return {
            "state": "finished",
            "data": digests(done.result["data"]),
            "kept": done.checkpoints.bytes_of_newest(),
            "op": done.metrics["op"],
            "seconds": sum(sum(effort["seconds"].values()) for effort in efforts),
        }
    except Stopped:
        return {"state": "stopped"}
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        return {"state": "failed", "error": text, "final": of_its_own_making(error)}


def take(found: Comparison, cell: Cell, outcome: Outcome, listener: Listener) -> None:
    """Writes down what came of a cell, and says it."""
    if "data" in outcome:
        found.pin(cell, outcome["data"])
    if outcome["state"] == "finished":
        found.finished(cell, outcome["kept"])
        over = len(found.cells) - len(found.left)
        took = f"{outcome['op']:.1f}%, {outcome['seconds']:.0f} s"
        listener.note(f"{cell.id} is learnt: {took}; {over} of {len(found.cells)} cells have ended")
    elif outcome["state"] == "stopped":
        found.waits(cell)
    else:
        found.failed(cell, outcome["error"], outcome["final"])
        what = "has failed" if cell.over else "failed, and is tried again"
        listener.note(f"{cell.id} {what}: {outcome['error']}")


def digests(prints: list[dict[str, Any]]) -> dict[str, str]:
    return {each["name"]: each["digest"] for each in prints}
