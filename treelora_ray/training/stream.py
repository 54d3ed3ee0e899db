"""A stream, learnt unit by unit: begin ─► train ─► end ─► score ─► export ─► checkpoint ─► result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from treelora_ray.config import ConfigError, RunConfig
from treelora_ray.data.rows import digest
from treelora_ray.data.stream import fingerprints
from treelora_ray.data.task import TaskStream
from treelora_ray.files import write_atomically
from treelora_ray.methods.base import Method
from treelora_ray.methods.learner import Effort
from treelora_ray.store import RunFolder
from treelora_ray.training import loop
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.evaluate import Evaluator
from treelora_ray.training.export import export_adapter
from treelora_ray.training.record import provenance, score_table
from treelora_ray.training.state import Checkpoints, capture, restore
from treelora_ray.training.tracker import Tracker


class Listener:
    """What may be shown while a run goes on; all of it does nothing here."""

    def starts(self, steps: list[int], records: list[dict[str, Any]]) -> None:
        """The run begins or goes on: optimizer steps of each unit, and the records of units learnt before."""

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
        folder: RunFolder | Path,
        listener: Listener | None = None,
        stop: Callable[[], bool] = lambda: False,
        tracker: Tracker | None = None,
    ) -> None:
        self.config, self.stream, self.method = config, stream, method
        self.files = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        self.folder = self.files.path
        self.listener, self.stop, self.tracker = listener or Listener(), stop, tracker or Tracker()
        self.learner = method.learner
        self.leads = self.learner.comm.rank == 0  # the worker that writes
        self.learner.tasks = stream.tasks
        _require_epochs(config, len(stream.tasks))
        self.units = method.units(len(stream.tasks))
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.evaluator = Evaluator(method)
        self.prints = fingerprints(stream)
        self.done = 0  # units
        self.step: int | None = None  # within the unit in progress
        self.scores: list[list[float | None]] = []  # a row for each unit learnt; None where a task was not scored
        self.records: list[dict[str, Any]] = []  # what each unit cost and said

    def resume(self) -> bool:
        """Goes back to the last checkpoint; whether there was one. Worker 0 says which, all read it."""
        comm = self.learner.comm
        if self.leads:
            self.files.pull()
        found = self.checkpoints.load(self.listener.note) if self.leads else None
        name = comm.share(None if found is None else found.path.name)
        if name is None:
            return False
        if found is None:
            self.files.pull(f"checkpoints/{name}", "checkpoints/adapters")
            found = self.checkpoints.read(self.checkpoints.folder / name)
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
        if self.leads:
            left = len(self.units) - self.done
            self.tracker.begins(self.about(), fresh=not self.done and self.step is None, left=left)
        self.listener.starts([loop.steps_of(self.learner, unit) for unit in self.units], list(self.records))
        while self.done < len(self.units):
            if self.stop():
                raise Stopped(str(self.files))
            self._learn(self.units[self.done])
        if self.leads and not self._result_stands():
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
        self.tracker.learnt(self.done - 1, self.records[-1], score_table(self.scores, self.units[: self.done]))
        self.listener.scored(self.records[-1])

    def about(self) -> dict[str, Any]:
        """What the run is, wherever it stands."""
        return {
            **provenance(self.config, self.learner),
            "objective": type(self.learner.objective).__name__,
            "workers": self.learner.comm.workers,
            "data": self.prints,
            "data_digest": digest(*(each["digest"] for each in self.prints)),
            "folder": str(self.files),
        }

    def _after_step(self, step: int, of: int, loss: float, norm: float) -> None:
        self.listener.step(step, of, loss)
        whole = sum(record["effort"]["steps"] for record in self.records) + step
        self.tracker.step(self.done, step, of, whole, loss, lambda: self._values(step, norm))
        if self.stop():
            self.save(step + 1)
            raise Stopped(str(self.files))

    def _values(self, step: int, norm: float) -> dict[str, float]:
        """What may be plotted over the steps, beside the loss."""
        optimizer = self.learner.optimizer
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else 0.0
        return {"lr": rate, "grad_norm": norm, **self.method.values(step)}

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
        path = self.checkpoints.save(tensors, {**meta, **more}, self.method.bank)
        self.files.push()
        return path

    def _export(self, unit: tuple[int, ...]) -> None:
        """Adapters of the unit's tasks as plain peft folders, each with its rows of the head, where these answer."""
        if not self.leads or self.method.unexported:
            return
        for task in self.method.changed(unit):
            export_adapter(self.method, task, self.folder / "adapters" / self.stream.tasks[task].name)

    def _result_stands(self) -> bool:
        path = self.folder / "result.json"
        if not path.is_file():
            return False
        result = json.loads(path.read_text())
        return bool(result["finished"]) and len(result["records"]) == self.done

    def write_result(self, finished: bool) -> None:
        if not self.leads:
            return
        names = [task.name for task in self.stream.tasks]
        result = {
            "finished": finished,
            "tasks": names[: max((max(unit) for unit in self.units[: self.done]), default=-1) + 1],
            "stream": names,
            "families": [task.family for task in self.stream.tasks],
            "data": [{key: each[key] for key in ("name", "train", "test", "digest")} for each in self.prints],
            "matrix": [row + [None] * (len(names) - len(row)) for row in self.scores],
            "metrics": score_table(self.scores, self.units[: self.done]),
            "records": self.records,
            **self.method.summary(),
            **provenance(self.config, self.learner),
        }
        data = json.dumps(result, indent=1, allow_nan=False).encode()
        write_atomically(self.folder / "result.json", data)
        self.files.push()


def _require_epochs(config: RunConfig, tasks: int) -> None:
    given = config.train.epochs
    if config.train.steps is None and isinstance(given, list) and len(given) < tasks:
        raise ConfigError(
            f"train.epochs has {len(given)} entries, the stream {tasks} tasks: give each one, or one number for all"
        )
