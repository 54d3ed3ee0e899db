"""Runs: start or go on with one, look at one, let one predict. The command line is made of these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treelora_ray.config import ConfigError, RunConfig, differences, from_mapping, load, run_name
from treelora_ray.core.guide import Guide
from treelora_ray.core.layout import FloatArray
from treelora_ray.data.rows import MemoryRows, Rows
from treelora_ray.data.stream import open_stream
from treelora_ray.data.task import TaskStream
from treelora_ray.files import locked, write_atomically
from treelora_ray.methods.base import Method
from treelora_ray.methods.catalogue import METHODS, make
from treelora_ray.methods.comm import Comm
from treelora_ray.methods.guides import MakeGuide
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.shared import Shared
from treelora_ray.methods.treelora import TreeLora
from treelora_ray.models.backbone import load_model
from treelora_ray.store import RunFolder, StoreError, joined, local_path, open_folder
from treelora_ray.tracking.tracked import tracker
from treelora_ray.training.errors import BusyError, RunError, Stopped
from treelora_ray.training.evaluate import Answers, Evaluator
from treelora_ray.training.state import Checkpoints, Loaded, restore
from treelora_ray.training.stream import Listener, StreamRun
from treelora_ray.training.tracker import Tracker

# What may differ when a run goes on, where the caller says so. `whole` only between two tasks: they make its steps.
MAY_CHANGE = ("train.", "evaluate.", "objective.routing", "objective.max_new_tokens", "method.lambda", "stream.path")
WHOLE = ("train.batch", "train.epochs", "train.steps", "train.warmup", "train.schedule")


class Run:
    """A run as its folder holds it. Of one in an object store, what is asked for is fetched, and kept as long as the
    process lives."""

    def __init__(self, folder: Path | str) -> None:
        self._files = open_folder(folder)
        self._fetched: set[str] = set()
        self.folder, self.address = self._files.path, self._files.address
        self._files.pull("config.yaml", "result.json")
        if not (self.folder / "config.yaml").is_file():
            raise RunError(f"{self.address} is no run: it has no config.yaml; give the folder that `train` made")

    def _fetch(self, name: str) -> Path:
        if name not in self._fetched:
            self._files.pull(name)
            self._fetched.add(name)
        return self.folder / name

    @cached_property
    def config(self) -> RunConfig:
        return load(self.folder / "config.yaml")

    @cached_property
    def result(self) -> dict[str, Any]:
        path = self.folder / "result.json"
        if not path.is_file():
            raise RunError(f"run {self.address} has learnt no task yet: go on with `treelora train`")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @property
    def finished(self) -> bool:
        return bool(self.result["finished"])

    @property
    def tasks(self) -> list[str]:
        """Tasks learnt so far, in order."""
        return list(self.result["tasks"])

    @property
    def matrix(self) -> FloatArray:
        """[units learnt, tasks] percent; NaN where a task was not scored."""
        rows = [[np.nan if x is None else x for x in row] for row in self.result["matrix"]]
        return np.array(rows, dtype=np.float64)

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.result["metrics"])

    @property
    def adapters(self) -> dict[str, Path]:
        """By task, its folder that peft loads; none where no adapter answers as the run does."""
        if METHODS[self.config.method.name].unexported:
            return {}
        folder = self._fetch("adapters")
        return {task: folder / task for task in self.tasks}

    @property
    def journal(self) -> Path:
        """What was told while it was learnt; need not be there."""
        return self._fetch("journal.jsonl")

    def checkpoint(self) -> Loaded:
        """The newest that is whole."""
        found = Checkpoints(self._fetch("checkpoints")).load(lambda _: None)
        if found is None:
            raise RunError(f"run {self.address} has no checkpoint: go on with `treelora train`")
        return found

    @cached_property
    def method(self) -> Method:
        """The method as it was after its last task, ready to answer."""
        found = self.checkpoint()
        if found.meta["step"] is not None:
            raise RunError(f"run {self.address} is in the middle of a task: finish it with `treelora train` first")
        method = assemble(self.config, found.meta["kind"])
        restore(method, found.tensors, found.meta, found.slots)
        return method

    def predict(self, rows: Rows | Mapping[str, Sequence[Any]], routing: str | None = None) -> Answers:
        """Labels or texts for rows with the input column alone (image, text or prompt), tasks unknown."""
        if routing == "oracle":
            raise RunError("oracle routing needs to know the tasks of the rows: use inferred or last")
        if routing not in (None, "inferred", "last"):
            raise RunError(f"routing {routing!r} is unknown: use inferred or last")
        table = MemoryRows({k: list(v) for k, v in rows.items()}) if isinstance(rows, Mapping) else rows
        needed = self.method.learner.model.kind
        if needed not in table.columns:
            raise RunError(f"rows to predict need a column {needed!r}; they have {', '.join(table.columns)}")
        evaluator = Evaluator(self.method, routing or ("inferred" if self._asks_oracle else None))
        return evaluator.answer(table, evaluator.routes(table))

    @property
    def _asks_oracle(self) -> bool:
        return self.config.objective.routing == "oracle"

    def evaluate(self, routing: str | None = None, stream: TaskStream | None = None) -> dict[str, float]:
        """The score on each task learnt, measured again."""
        found = stream or open_stream(self.config.stream, self.config.seed)
        evaluator = Evaluator(self.method, routing)
        tasks = enumerate(found.tasks[: len(self.method.learner.infos)])
        return {task.name: evaluator.score(number, task) for number, task in tasks}

    def export_tree(self, path: Path | str) -> None:
        """Writes tree and adapters to one file, with which another run may begin: its `method.prior`."""
        if self.config.method.name != "treelora":
            raise RunError(f"run {self.address} was learnt by {self.config.method.name}: only treelora has a tree")
        method = self.method
        assert isinstance(method, TreeLora)
        method.export_tree(Path(path))


def run(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    allow: Sequence[str] = (),
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
    shared: Shared | None = None,
) -> Run:
    """Learns the config's stream, from the run's last checkpoint where there is one.

    In this process, or by Ray workers where `cluster.workers` says so. `allow`: keys in which the config may differ
    from the one the run began with. `shared`: what runs of this process, one after the other, need not make again;
    workers of Ray are other processes.
    """
    config = _as_config(config)
    listener = listener or Listener()
    address = joined(config.folder, run_name(config))
    with open_folder(_absolute(address)) as folder, _locked(folder):
        folder.pull("config.yaml")
        _require_same_config(folder, config, allow, listener)
        if config.cluster.workers == 0:
            learn(config, folder, listener=listener, stop=stop, shared=shared)
        else:
            from treelora_ray.cluster.run import train  # the only way from here to ray

            train(config, folder, listener, stop)
    return Run(address)


def _absolute(address: str) -> str:
    path = local_path(address)
    return address if path is None else str(path.absolute())


def learn(
    config: RunConfig,
    folder: RunFolder,
    *,
    listener: Listener,
    stop: Callable[[], bool] = lambda: False,
    comm: Comm | None = None,
    make_guide: MakeGuide = Guide,
    shared: Shared | None = None,
) -> None:
    """What each worker of a run does, and the only one where there are no others. `shared`: all of them, or none."""
    opened = open_stream if shared is None else shared.streams.open
    stream = opened(config.stream, config.seed)
    threads = config.train.threads or (config.cluster.cpus_per_worker if config.cluster.workers else None)
    with torch.random.fork_rng(), _threads(threads):
        method = assemble(config, stream.kind, comm, make_guide, shared)
        told = Tracker()
        if method.learner.comm.rank == 0:
            told = tracker(config.tracking, folder.path, config.train.batch, listener.note, folder.stored)
        stream_run = StreamRun(config, stream, method, folder, listener, stop, told)
        resumed = stream_run.resume()
        if not resumed:
            method.before_stream()
        if stream_run.leads:
            if resumed:
                _require_whole(folder, config, stream_run)
                listener.note(f"going on with {folder}, {stream_run.done} of {len(stream_run.units)} units learnt")
            write_atomically(folder.path / "config.yaml", config.to_yaml().encode())
            folder.push()
        try:
            _followed(stream_run.go, told)
        except Exception:
            with suppress(StoreError, OSError):
                _store(folder, stream_run)
            raise
        _store(folder, stream_run)


def _store(folder: RunFolder, stream_run: StreamRun) -> None:
    """The rest: what the tracker has written last."""
    if stream_run.leads:
        folder.push()


def _followed(go: Callable[[], None], told: Tracker) -> None:
    """Whatever happens, the tracker hears how it ended."""
    try:
        go()
    except (Stopped, KeyboardInterrupt):
        told.ends("KILLED")
        raise
    except BaseException:
        told.ends("FAILED")
        raise
    told.ends("FINISHED")


def assemble(
    config: RunConfig,
    kind: str,
    comm: Comm | None = None,
    make_guide: MakeGuide = Guide,
    shared: Shared | None = None,
) -> Method:
    """Model, learner and method of a config, as they are before the first task."""
    wanted = "causal-lm" if kind == "prompt" else "classification"
    if config.objective.kind not in ("auto", wanted):
        raise ConfigError(f"objective.kind is {config.objective.kind}, but the stream of {kind}s is for {wanted}")
    model = load_model(config.model, kind, config.seed, None if shared is None else shared.backbones)
    return make(Learner(config, model, comm, make_guide, shared))


def _as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    return from_mapping(config) if isinstance(config, Mapping) else load(config)


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """One process of this machine trains a run at a time."""
    folder.lock.parent.mkdir(parents=True, exist_ok=True)
    busy = BusyError(f"another process is training in {folder}: wait for it, or give `name` another value")
    with locked(folder.lock, busy):
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_same_config(folder: RunFolder, config: RunConfig, allow: Sequence[str], listener: Listener) -> None:
    """Refuses a config that differs from the run's own, beyond what is free and what is allowed."""
    path = folder.path / "config.yaml"
    if not path.is_file():
        return
    changed = differences(load(path), config)
    for key in allow:
        if not key.startswith(MAY_CHANGE):
            raise ConfigError(f"{key} cannot change within a run: give the run another name to start anew")
    # More tasks at the end of the stream are no change; `StreamRun.resume` compares the tasks themselves.
    refused = [line for line in changed if line.split(":")[0] not in {*allow, "stream.tasks"}]
    if refused:
        raise ConfigError(
            f"run {folder} was begun with another config:\n  " + "\n  ".join(refused) + "\ngive the run another name, "
            "or allow a change with --allow-change KEY"
        )
    for line in changed:
        listener.note(f"changed: {line}")


def _require_whole(folder: RunFolder, config: RunConfig, stream_run: StreamRun) -> None:
    path = folder.path / "config.yaml"
    if stream_run.step is None or not path.is_file():
        return
    changed = [line for line in differences(load(path), config) if line.split(":")[0] in WHOLE]
    if changed:
        raise ConfigError("a task is in progress, whose steps would change; end it first:\n  " + "\n  ".join(changed))
