"""A trial: one run in the process of a Tune actor, which says its scores after each task and waits to hear of them.

    Tune ──► Trial.step ──► Work.next ◄── values ── the run's thread (api.run, as `treelora train` calls it)
         ◄── values, or the same as before while a task is learnt

The thread goes on with the next task when Tune asks for the next step. A trial that is stopped is asked as a run is on
Ctrl-C: it writes a checkpoint and ends as KILLED, before its actor takes another trial.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune

from treelora_ray.cluster.errors import first_line
from treelora_ray.cluster.inner_runs import learn, of_its_own_making
from treelora_ray.config import RunConfig, from_mapping
from treelora_ray.methods.shared import Shared
from treelora_ray.models.kept import Packed
from treelora_ray.training.errors import Stopped
from treelora_ray.training.record import score_table
from treelora_ray.training.stream import Listener

EVERY = 1.0  # seconds between two steps, while a task is learnt
Values = dict[str, Any]


class Scores(Listener):
    """Says what the run has achieved after each task, those learnt before it went on included."""

    def __init__(self, tell: Callable[[Values], None]) -> None:
        self.tell, self.steps, self.records = tell, [1], list[dict[str, Any]]()

    def starts(self, steps: list[int], records: list[dict[str, Any]]) -> None:
        self.steps = steps
        for record in records:
            self.scored(record)

    def scored(self, record: dict[str, Any]) -> None:
        if any(record["tasks"] == other["tasks"] for other in self.records):  # told before workers began again
            return
        self.records.append(record)
        self.tell(self.values())

    def values(self) -> Values:
        done = len(self.records)
        scores = [record["scores"] for record in self.records]
        metrics = score_table(scores, [tuple(record["tasks"]) for record in self.records])
        seconds = sum(_seconds(record["effort"]) for record in self.records)
        return {
            "percent": 100.0 * sum(self.steps[:done]) / sum(self.steps),
            "val_op": metrics["op"],
            "forgetting": metrics.get("forgetting") or 0.0,  # of one task there is none
            "seconds": seconds,
        }


def _seconds(effort: Mapping[str, Any]) -> float:
    """What a run takes that shares nothing: which trial looked first at a task says nothing of its settings."""
    return float(sum(effort["seconds"].values()) + effort.get("reused", {}).get("seconds", 0.0))


class Work:
    """The run of a trial in a thread of its own."""

    def __init__(self, config: RunConfig, shared: Shared | None = None) -> None:
        self.config, self.shared = config, shared
        self.told: queue.SimpleQueue[Values | Exception] = queue.SimpleQueue()
        self.turn, self.ending = threading.Semaphore(0), threading.Event()
        self.heard: Values = {"percent": 0.0, "done": False}
        self.waits = False  # the thread has told something and waits
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def next(self, seconds: float) -> Values:
        """What the run has achieved; after so long what it had before. Raises what ended it."""
        if self.waits:
            self.turn.release()
        self.waits = False
        try:
            found = self.told.get(timeout=seconds)
        except queue.Empty:
            return dict(self.heard)
        if isinstance(found, Exception):
            raise found
        self.waits = not found["done"]
        self.heard = found
        return dict(found)

    def end(self) -> None:
        """Stops the run at a checkpoint, if it goes on; returns when it has ended."""
        self.ending.set()
        self.turn.release()
        self.thread.join()

    def _tell(self, values: Values) -> None:
        if not self.ending.is_set():
            self.told.put({**values, "done": False})
            self.turn.acquire()

    def _work(self) -> None:
        scores = Scores(self._tell)
        try:
            learn(self.config, scores, self.ending.is_set, self.shared)
            self.told.put({**scores.values(), "done": True})
        except Stopped:
            pass
        except Exception as error:
            self.told.put(error)


class Trial(tune.Trainable):
    """The actor, which takes one trial after the other. An error of others ends it: nobody knows what it has broken."""

    def setup(self, config: dict[str, Any], packed: Packed | None = None, looks: str | None = None) -> None:
        """`packed`: the backbone, which Ray holds once on each node; `looks`: the folder of what trials have seen."""
        self.shared = Shared(None if looks is None else Path(looks), packed)
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self.work = Work(from_mapping(json.loads(config["config"])), self.shared)
        self.failed: Exception | None = None

    def step(self) -> Values:
        if self.failed is not None:
            raise self.failed
        try:
            return self.work.next(EVERY)
        except Exception as error:
            final = of_its_own_making(error)
            self.failed = None if final else error
            return {"error": f"{type(error).__name__}: {first_line(error)}", "final": final, "done": final}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.work.end()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self.work.end()
