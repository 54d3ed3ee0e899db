"""Runs that are part of something larger, a sweep or a comparison: where they lie, how they are learnt and delivered.

Knows nothing of Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from treelora_ray.api import run
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.config import RunConfig, StreamConfig, flat, with_values
from treelora_ray.data.stream import open_stream
from treelora_ray.data.task import Kind
from treelora_ray.files import locked
from treelora_ray.methods.shared import Shared
from treelora_ray.store import RunFolder, joined, local_path, open_folder
from treelora_ray.tracking.journal import FILE as JOURNAL
from treelora_ray.tracking.journal import read
from treelora_ray.tracking.parent import tell_parent
from treelora_ray.tracking.sender import Delivery, sync
from treelora_ray.tracking.store import explained, local_address
from treelora_ray.tracking.tracked import VARIABLE
from treelora_ray.training.errors import BusyError, NonFiniteError
from treelora_ray.training.stream import Listener

LOOKS = ".looks"  # what the runs have seen of tasks, for other runs of the whole
PLACES = ("stream.path", "method.prior")
OLD_PROCESS = 60.0  # seconds that the process of a driver that has died may take to let go of a run
TRIES = 3  # of a run that fails


class Inner(Protocol):
    id: str
    run: str  # its folder, below the whole's
    state: Any

    @property
    def over(self) -> bool: ...


@contextmanager
def opened(base: RunConfig, name: str, what: str) -> Iterator[RunFolder]:
    """The folder of the whole, a sweep or a comparison, which no other process may go on with meanwhile."""
    address = joined(base.folder, name)
    if (path := local_path(address)) is not None:
        address = str(path.absolute())
    with open_folder(address) as folder:
        folder.lock.parent.mkdir(parents=True, exist_ok=True)
        busy = ClusterError(
            f"another process runs {what} {folder}: wait for it, or give the {what} another name (--name)"
        )
        with locked(folder.lock, busy):
            yield folder


def report(whole: RunFolder, write: Callable[[], object], what: str, say: Callable[[str], None]) -> None:
    """Of what is known, however the whole has ended."""
    try:
        write()
        whole.push()
    except Exception as error:  # what has been learnt, and what has ended it, weigh more
        say(f"the {what} could not be written ({error}): treelora report {whole} tries again")


def absolute(base: RunConfig) -> RunConfig:
    """They run in processes that lie elsewhere: paths of this one must mean the same there."""
    data = flat(base.model_dump(mode="json", by_alias=True))
    found = {key: str(data[key]) for key in PLACES if data.get(key) and "://" not in data[key]}
    if Path(base.model.backbone).is_dir():
        found["model.backbone"] = base.model.backbone
    if local_path(base.folder) is not None:
        found["folder"] = base.folder
    return with_values(base, {key: str(Path(value).absolute()) for key, value in found.items()}, "the config")


def placed(base: RunConfig, values: Mapping[str, Any], name: str, folder: str, group: str, source: str) -> RunConfig:
    """The config of one run: below the whole in its folder and in MLflow."""
    place: dict[str, Any] = {"name": name, "folder": folder, "tracking.group": base.tracking.group or group}
    if not base.train.threads:
        place["train.threads"] = base.cluster.cpus_per_worker
    told = base.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not told and (path := local_path(base.folder)) is not None:
        place["tracking.uri"] = local_address(path)  # one database for these and other runs
    return with_values(base, {**values, **place}, source)


def kind_of_stream(config: StreamConfig, seed: int) -> Kind:
    """By its first task. Where rows are held out, that is not to be seen by its test rows, which must stay unopened."""
    first = config.tasks[:1] if isinstance(config.tasks, list) else 1
    least: dict[str, Any] = {"tasks": first, "watch": None, "score": "accuracy"}
    if config.holdout is None:
        least |= {"rows": 1, "test_rows": 1}
    return open_stream(config.model_copy(update=least), seed).kind


def learn(config: RunConfig, listener: Listener, stop: Callable[[], bool], shared: Shared | None) -> None:
    """As `treelora train` does, once a process that has lost its driver has let go of the run."""
    deadline = time.monotonic() + OLD_PROCESS
    while True:
        try:
            run(config, listener=listener, stop=stop, shared=shared)
            return
        except BusyError:
            if time.monotonic() > deadline or stop():
                raise
            time.sleep(0.5)


def of_its_own_making(error: BaseException) -> bool:
    """Our own errors say what is wrong with a run's settings: no other try mends it, and nothing is broken."""
    ours = type(error).__module__.startswith("treelora_ray")
    return ours and isinstance(error, ValueError | NonFiniteError)


def tells_mlflow(base: RunConfig) -> bool:
    return (os.environ.get(VARIABLE) or base.tracking.to) == "mlflow"


def deliver(whole: Path, base: RunConfig, runs: Iterable[Inner], say: Callable[[str], None]) -> None:
    """A driver that died took the messengers of its runs along: what these had still to tell MLflow is told now."""
    if not tells_mlflow(base):
        return
    for each in runs:
        folder = whole / each.run
        if not each.over or not (entries := read(folder / JOURNAL)):
            continue
        if each.state == "finished" and entries[-1]["kind"] != "ends":
            each.state = "waiting"  # it has nothing left to learn, and says that it has ended
            continue
        _sync(each, folder, say)


def conclude(whole: RunFolder, base: RunConfig, runs: Sequence[Inner], status: str, say: Callable[[str], None]) -> None:
    """MLflow hears what is left to tell of each run, for which those that failed or were stopped leave it little time,
    and what came of the whole."""
    if not tells_mlflow(base) or whole.stored:
        return
    for each in runs:
        folder = whole.path / each.run
        entries = read(folder / JOURNAL)
        if entries and entries[-1]["kind"] == "ends" and Delivery(folder).waiting:
            _sync(each, folder, say)
    tell_parent(whole.path, status, [whole.path / each.run for each in runs], base.tracking.wait, say)


def _sync(each: Inner, folder: Path, say: Callable[[str], None]) -> None:
    try:
        sync(folder)
    except Exception as error:  # of MLflow, which may come back
        say(f"MLflow does not hear of {each.id} ({explained(error)}): treelora track sync {folder}")
