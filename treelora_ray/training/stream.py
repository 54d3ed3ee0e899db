"""A stream, learnt unit by unit: begin ─► train ─► end ─► score ─► export ─► checkpoint ─► result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from treelora_ray.config import RunConfig
from treelora_ray.data.stream import fingerprints
from treelora_ray.data.task import TaskStream
from treelora_ray.files import write_atomically
from treelora_ray.methods.base import Method
from treelora_ray.methods.learner import Effort
from treelora_ray.training import loop
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.evaluate import Evaluator
from treelora_ray.training.export import export_adapter
from treelora_ray.training.record import provenance, score_table
from treelora_ray.training.state import Checkpoints, capture, restore


class Listener:
    """What may be shown while a run goes on; all of it does nothing here."""

    def begins(self, number: int, of: int, name: str) -> None: ...

    def phase(self, name: str) -> None: ...

    def step(self, step: int, of: int, loss: float) -> None: ...

    def scored(self, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def saved(self, checkpoint: str, state: dict[str, Any]) -> None:
        """A checkpoint can be resumed from; called on every worker."""


class StreamRun:
    """One run in its folder. `stop` is asked after every step whether to stop at a checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        stream: TaskStream,
        method: Method,
        folder: Path,
        listener: Listener | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.stream, self.method, self.folder = config, stream, method, folder
        self.listener, self.stop = listener or Listener(), stop
        self.learner = method.learner
        self.leads = self.learner.comm.rank == 0  # the worker that writes
        self.learner.tasks = stream.tasks
        self.units = method.units(len(stream.tasks))
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.evaluator = Evaluator(method)
        self.prints = fingerprints(stream)
        self.done = 0  # units
        self.step: int | None = None  # within the unit in progress
        self.scores: list[list[float | None]] = []  # a row for each unit learnt; None where a task was not scored
        self.records: list[dict[str, Any]] = []  # what each unit cost and said

    def resume(self) -> bool:
        """Goes back to the last checkpoint; whether there was one. Worker 0 says which, all read it."""
        comm = self.learner.comm
        found = self.checkpoints.load(self.listener.note) if self.leads else None
        name = comm.share(None if found is None else found.path.name)
        if name is None:
            return False
        found = found or self.checkpoints.read(self.checkpoints.folder / name)
        tensors, meta, slots = found.tensors, found.meta, found.slots
        self._require_same_tasks(meta["prints"])
        restore(self.method, tensors, meta, slots)
        self.done, self.step = meta["done"], meta["step"]
        self.scores, self.records = meta["scores"], meta["records"]
        self.learner.effort = Effort(**meta["effort"])
        return True

    def _require_same_tasks(self, before: list[dict[str, Any]]) -> None:
        for number, old in enumerate(before):
            now = self.prints[number] if number < len(self.prints) else None
            if now is None:
                raise RunError(f"the run has learnt task {old['name']!r}, which the stream has no more: put it back")
            if now != old:
                keys = [f"{key}: {old[key]!r} then, {now[key]!r} now" for key in old if old[key] != now[key]]
                raise RunError(
                    f"task {number} of the stream is not the one the run has learnt ({'; '.join(keys)}): "
                    "tasks may be added at the end only; give the run another name to start anew"
                )

    def go(self) -> None:
        while self.done < len(self.units):
            if self.stop():
                raise Stopped(self.folder)
            self._learn(self.units[self.done])
        self.write_result(finished=True)

    def _learn(self, unit: tuple[int, ...]) -> None:
        learner = self.learner
        name = self.stream.tasks[unit[0]].name if len(unit) == 1 else "joint"
        self.listener.begins(self.done, len(self.units), name)
        if self.step is None:
            learner.effort = Effort()
            self.listener.phase("looking")
            loop.begin_task(self.method, unit)
            self.step = 0
        self.listener.phase("training")
        with learner.effort.timed("train"):
            loop.train_task(self.method, self.step, self._after_step, self.save)
            loop.end_task(self.method)
        report = self.method.report()
        self.step = None
        self.listener.phase("scoring")
        with learner.effort.timed("evaluate"):
            self.scores.append(self._score(unit))
        record = {"unit": name, "tasks": list(unit), "scores": self.scores[-1], "report": report}
        self.records.append({**record, "effort": asdict(learner.effort)})
        self.done += 1
        self._export(unit)
        self.save(None)
        self.write_result(finished=self.done == len(self.units))
        self.listener.scored(self.records[-1])

    def _after_step(self, step: int, of: int, loss: float, norm: float) -> None:  # noqa: ARG002
        self.listener.step(step, of, loss)
        if self.stop():
            self.save(step + 1)
            raise Stopped(self.folder)

    def _score(self, unit: tuple[int, ...]) -> list[float | None]:
        """Of every task; None for tasks not learnt yet, unless they are asked for."""
        last = max(unit)
        wanted = range(len(self.stream.tasks)) if self.config.evaluate.future else range(last + 1)
        scores: list[float | None] = [None] * len(self.stream.tasks)
        for number in wanted:
            scores[number] = self.evaluator.score(number, self.stream.tasks[number])
        return scores

    def save(self, step: int | None) -> None:
        with self.learner.effort.timed("checkpoint"):
            name = self._write(step).name if self.leads else ""
            name = self.learner.comm.share(name)  # so that no worker goes on before it is written
            self.listener.saved(name, {"done": self.done, "step": step, "of": self.learner.steps})

    def _write(self, step: int | None) -> Path:
        tensors, meta = capture(self.method, step)
        met = len(self.learner.infos)
        more = {
            "done": self.done,
            "scores": self.scores,
            "records": self.records,
            "effort": asdict(self.learner.effort),
            "kind": self.stream.kind,
            "prints": self.prints[:met],
            "config": self.config.model_dump(mode="json", by_alias=True),
        }
        return self.checkpoints.save(tensors, {**meta, **more}, self.method.bank)

    def _export(self, unit: tuple[int, ...]) -> None:
        """Adapters of the unit's tasks as plain peft folders, each with its rows of the head."""
        if not self.leads:
            return
        for task in self.method.changed(unit):
            export_adapter(self.method, task, self.folder / "adapters" / self.stream.tasks[task].name)

    def write_result(self, finished: bool) -> None:
        if not self.leads:
            return
        names = [task.name for task in self.stream.tasks]
        result = {
            "finished": finished,
            "tasks": names[: max((max(unit) for unit in self.units[: self.done]), default=-1) + 1],
            "stream": names,
            "families": [task.family for task in self.stream.tasks],
            "matrix": [row + [None] * (len(names) - len(row)) for row in self.scores],
            "metrics": score_table(self.scores, self.units[: self.done]),
            "records": self.records,
            **self.method.summary(),
            **provenance(self.config, self.learner),
        }
        data = json.dumps(result, indent=1, allow_nan=False).encode()
        write_atomically(self.folder / "result.json", data)
