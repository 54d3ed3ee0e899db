"""Checkpoints: everything a run needs to go on as if it had never stopped.

    <run>/checkpoints/state-00000007.safetensors     the newest, and the one before it
    <run>/checkpoints/adapters/<hash>.safetensors    adapters of finished tasks, written once, named by content

A checkpoint counts when it has been read back. Until then the one before it is kept; after that as well, so
that a damaged file costs the steps since the one before, not the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from treelora_ray.core.errors import SnapshotError
from treelora_ray.core.merge import AdapterBank
from treelora_ray.files import load_snapshot, part, save_snapshot, snapshot_header
from treelora_ray.methods.base import Method
from treelora_ray.objectives.base import TaskInfo
from treelora_ray.training.errors import RunError
from treelora_ray.training.loop import attach

VERSION = 1
KEPT = 2


@dataclass(frozen=True)
class Loaded:
    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    slots: dict[int, Tensor]  # adapters of the bank


class Checkpoints:
    def __init__(self, folder: Path) -> None:
        self.folder, self.adapters = folder, folder / "adapters"
        self.needed: dict[Path, set[str]] = {}  # by checkpoint kept: the adapters it names

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], bank: AdapterBank | None) -> Path:
        self.adapters.mkdir(parents=True, exist_ok=True)
        slots = {} if bank is None else {str(slot): self._keep(adapter) for slot, adapter in bank.slots.items()}
        of_task = {} if bank is None else {str(task): slot for task, slot in bank.of_task.items()}
        number = int(self.paths()[-1].stem.split("-")[1]) + 1 if self.paths() else 0
        path = self.folder / f"state-{number:08d}.safetensors"
        save_snapshot(path, tensors, {**meta, "version": VERSION, "bank": {"slots": slots, "of_task": of_task}})
        try:
            load_snapshot(path)
        except SnapshotError:
            path.unlink()
            raise
        self.needed[path] = set(slots.values())
        self._tidy()
        return path

    def _keep(self, adapter: Tensor) -> str:
        name = hashlib.sha256(adapter.numpy().tobytes()).hexdigest()[:24]
        path = self.adapters / f"{name}.safetensors"
        if not path.exists():
            save_snapshot(path, {"adapter": adapter}, {})
        return name

    def _tidy(self) -> None:
        for path in self.paths()[:-KEPT]:
            path.unlink()
            self.needed.pop(path, None)
        if all(path in self.needed for path in self.paths()):
            named = set().union(*self.needed.values())
            for path in self.adapters.glob("*.safetensors"):
                if path.stem not in named:
                    path.unlink()

    def bytes_of_newest(self) -> dict[str, int]:
        """`memory`: all tensors of the newest checkpoint and of the adapters it names; `stored`: these files."""
        newest = self.paths()[-1]
        memory, meta = snapshot_header(newest)
        adapters = [self.adapters / f"{name}.safetensors" for name in set(meta["bank"]["slots"].values())]
        return {
            "memory": memory + sum(snapshot_header(path)[0] for path in adapters),
            "stored": sum(path.stat().st_size for path in (newest, *adapters)),
        }

    def load(self, note: Callable[[str], None]) -> Loaded | None:
        """The newest checkpoint that is whole; None where there is none."""
        problems = []
        for path in reversed(self.paths()):
            try:
                found = self.read(path)
            except SnapshotError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                note(f"{problem}. Going on from {path.name}")
            for damaged in self.paths()[self.paths().index(path) + 1 :]:
                damaged.rename(damaged.with_suffix(".damaged"))
            self.needed[path] = set(found.meta["bank"]["slots"].values())
            return found
        if problems:
            raise RunError("no checkpoint of this run can be read:\n  " + "\n  ".join(problems))
        return None

    def read(self, path: Path) -> Loaded:
        """One checkpoint with the adapters it names."""
        tensors, meta = load_snapshot(path)
        if meta["version"] != VERSION:
            raise RunError(f"{path} has version {meta['version']}, this program reads {VERSION}")
        slots = {int(slot): self._adapter(name) for slot, name in meta["bank"]["slots"].items()}
        return Loaded(path, tensors, meta, slots)

    def _adapter(self, name: str) -> Tensor:
        tensors, _ = load_snapshot(self.adapters / f"{name}.safetensors")
        return tensors["adapter"]


def capture(method: Method, step: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of learner and method: before step `step` of the unit, or between units (None)."""
    learner = method.learner
    tensors = {"theta": learner.theta}
    tensors |= {f"head.{name}": value for name, value in learner.head.tensors().items()}
    tensors |= {f"router.{name}": value for name, value in learner.router.tensors().items()}
    tensors |= {f"method.{name}": value for name, value in method.tensors().items()}
    if step is not None and learner.optimizer is not None:
        for kind, parameter in learner.parameters.items():
            for name, value in learner.optimizer.state[parameter].items():
                tensors[f"adam.{kind}.{name}"] = value
    meta = {
        "step": step,
        "unit": list(learner.unit),
        "infos": [info.to_json() for info in learner.infos],
        "head": learner.head.to_json(),
        "method": method.to_json(),
    }
    return tensors, meta


def restore(method: Method, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], slots: dict[int, Tensor]) -> None:
    """Learner and method become what `capture` saw."""
    learner = method.learner
    learner.infos.extend(TaskInfo.from_json(info) for info in meta["infos"])
    learner.head.load(part(tensors, "head"), meta["head"]["names"], meta["head"]["rows"])
    learner.router.load(part(tensors, "router"))
    if method.bank is not None:
        method.bank.slots = slots
        method.bank.of_task = {int(task): slot for task, slot in meta["bank"]["of_task"].items()}
    learner.unit = tuple(meta["unit"])
    method.load(part(tensors, "method"), meta["method"])
    if meta["step"] is None:
        learner.adapter.copy_(tensors["theta"][: learner.layout.total])
        return
    attach(method)
    learner.theta.copy_(tensors["theta"])
    optimizer = learner.start_optimizer()
    for kind, parameter in learner.parameters.items():
        # The count of steps too: fused AdamW keeps it where the moments are.
        moments = {name: value.clone().to(learner.device) for name, value in part(tensors, f"adam.{kind}").items()}
        if moments:
            optimizer.state[parameter] = moments
