"""Cells of a comparison on Ray: a few processes, each of which learns one cell after the other.

on_ray ─► a Worker for each place in the cluster ─► Learner, an actor ─► learn_cell
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from treelora_ray.cluster.compare_cell import Outcome, Progress, learn_cell, take
from treelora_ray.cluster.compare_plan import Cell, Comparison
from treelora_ray.cluster.errors import ClusterLostError, first_line
from treelora_ray.cluster.inner_runs import LOOKS
from treelora_ray.cluster.run import at_once, connected, of_one_run, require_room, say_gpus
from treelora_ray.config import from_mapping
from treelora_ray.data.task import Kind
from treelora_ray.methods.shared import Shared
from treelora_ray.models.kept import Backbones, Packed
from treelora_ray.training.stream import Listener

POLL = 0.2  # seconds between two looks at cells and at Ctrl-C
SAY = 60.0  # seconds between two lines on how far cells are


class Learner:
    """The actor. `packed`: the backbone, which Ray holds once on each node; `looks`: what cells have seen of tasks."""

    def __init__(self, packed: Packed | None, looks: str | None, nested: bool) -> None:
        self.shared = None if nested else Shared(None if looks is None else Path(looks), packed)
        self.stopping, self.progress = threading.Event(), Progress()

    def learn(self, config: str, known: dict[str, str] | None) -> Outcome:
        self.progress = Progress()
        return learn_cell(from_mapping(json.loads(config)), known, self.progress, self.stopping.is_set, self.shared)

    def stop(self) -> None:
        self.stopping.set()

    def heard(self) -> tuple[int, int]:
        """Tasks learnt of all; of a cell that has not opened its data yet, 0 of 0."""
        return self.progress.done, self.progress.of


class Worker:
    """An actor, seen from the driver, and the cell it is at."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.cell: Cell | None = None
        self.result: Any = None
        self.asked: Any = None  # how far it is
        self.progress: tuple[int, int] | None = None  # None until the process is there

    def begin(self, found: Comparison, cell: Cell) -> None:
        found.begins(cell)
        config = json.dumps(found.config(cell).model_dump(mode="json", by_alias=True))
        self.cell, self.progress = cell, self.progress and (0, 0)
        self.result = self.actor.learn.remote(config, found.data.get(str(cell.seed)))

    def look(self) -> None:
        """Asks how far it is; the answer comes with a later look."""
        if self.asked is not None and ray.wait([self.asked], timeout=0)[0]:
            try:
                self.progress = ray.get(self.asked)
            except RayError:
                return  # its cell's own result says what has happened
            self.asked = None
        if self.asked is None:
            self.asked = self.actor.heard.remote()

    def end(self) -> None:
        ray.kill(self.actor)


def on_ray(found: Comparison, kind: Kind, listener: Listener, stop: Callable[[], bool]) -> None:
    """All cells that are left, or as many as there is time for until `stop`."""
    base = found.base
    with connected(base.cluster, listener) as own:
        require_room(of_one_run(base), listener, own)
        say_gpus(base, listener, "cells use")
        pool = Pool(found, kind, listener)
        try:
            pool.run(stop)
        finally:
            pool.end()


class Pool:
    def __init__(self, found: Comparison, kind: Kind, listener: Listener) -> None:
        self.found, self.listener = found, listener
        self.workers: list[Worker] = []
        self.stopping, self.said = False, time.monotonic()
        cluster = found.base.cluster
        nested = cluster.workers != 0
        looks = None if found.folder.stored else str(found.folder.path / LOOKS)
        packed = None if nested else ray.put(Backbones().pack(found.base.model, kind))
        # With workers of its own a cell's process only starts them and waits: they have the resources.
        resources = {"num_cpus": 0} if nested else {"num_cpus": cluster.cpus_per_worker}
        if not nested and cluster.gpus_per_worker:
            resources["num_gpus"] = cluster.gpus_per_worker
        learner = ray.remote(Learner).options(max_concurrency=3, **resources)
        self.start: Callable[[], Any] = lambda: learner.remote(packed, looks, nested)

    def run(self, stop: Callable[[], bool]) -> None:
        while True:
            self._stop(stop)
            if not self.stopping:
                self._give()
            if not self.busy:
                return
            self._take()
            self._say()

    @property
    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.cell is not None]

    def _stop(self, stop: Callable[[], bool]) -> None:
        if not self.stopping and stop():
            self.stopping = True
            for worker in self.busy:
                worker.actor.stop.remote()
        if self.stopping:
            for worker in [worker for worker in self.busy if worker.progress is None]:  # it has not begun
                self._lose(worker)

    def _give(self) -> None:
        """Cells to those that have none, and processes for which there is room."""
        idle = [worker for worker in self.workers if worker.cell is None]
        while (cell := self.found.next()) is not None:
            if idle:
                worker = idle.pop()
            elif len(self.workers) < self._room():
                worker = Worker(self.start())
                self.workers.append(worker)
            else:
                return
            worker.begin(self.found, cell)
            self.listener.note(f"{cell.id} begins")

    def _room(self) -> int:
        """Of the cluster as it is now; it may have grown."""
        room, wanted = at_once(self.found.base, ray.cluster_resources()), self.found.options.concurrency
        self.found.at_once = max(self.found.at_once, room if wanted is None else min(wanted, room))
        return room if wanted is None else min(wanted, room)

    def _take(self) -> None:
        """What came of cells that have ended."""
        for worker in self.busy:
            worker.look()
        done, _ = ray.wait([worker.result for worker in self.busy], timeout=POLL)
        if not done and not any(node["Alive"] for node in ray.nodes()):
            raise ClusterLostError(f"the cluster has died; comparison {self.found.folder} holds what was learnt")
        for worker in [worker for worker in self.busy if worker.result in done]:
            cell, worker.cell = worker.cell, None
            assert cell is not None
            outcome = _outcome(worker.result)
            if outcome["state"] == "failed" and not outcome["final"]:
                self._lose(worker)  # nobody knows what the error has broken
            take(self.found, cell, outcome, self.listener)

    def _lose(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.end()
        if worker.cell is not None:
            self.found.waits(worker.cell)

    def _say(self) -> None:
        if time.monotonic() - self.said > SAY and self.busy:
            self.said = time.monotonic()
            shown = [(worker.cell, worker.progress or (0, 0)) for worker in self.busy]
            parts = [f"{cell.id} ({done} of {of} learnt)" for cell, (done, of) in shown if cell is not None and of]
            if parts:
                self.listener.note(f"at work: {', '.join(parts)}")

    def end(self) -> None:
        for worker in self.workers:
            worker.end()


def _outcome(result: Any) -> Outcome:
    try:
        found: Outcome = ray.get(result)
    except RayActorError as error:
        return {"state": "failed", "error": f"its process has died ({first_line(error)})", "final": False}
    except RayError as error:
        return {"state": "failed", "error": first_line(error), "final": False}
    return found
