"""A run on Ray: the driver. It finds a cluster, starts guide and workers, shows what they tell, and begins again.

connect ─► desk and guide actors ─► TorchTrainer.fit (workers: worker.work) ─► done, stopped, failed
                                          └── controller died ─► fit again, from the last checkpoint
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as TrainRun
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treelora_ray.cluster.desk import Desk
from treelora_ray.cluster.errors import ClusterError, first_line
from treelora_ray.cluster.guide_actor import start_guide_actor
from treelora_ray.cluster.worker import NAMESPACE, work
from treelora_ray.config import ClusterConfig, RunConfig
from treelora_ray.store import RunFolder
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.record import SUBMISSION, ray_job, submission
from treelora_ray.training.stream import Listener

POLL = 0.1  # seconds between two looks at the desk
SILENCE = 20.0  # seconds without a living worker after which the driver says what is missing
OLD_ACTORS = 30.0  # seconds that actors of a driver that has died may take to go
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports are fetched as often as that
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}  # after which fewer workers begin


def train(config: RunConfig, folder: RunFolder, listener: Listener, stop: Callable[[], bool]) -> None:
    """Learns a stream with Ray workers; raises `Stopped` when asked to stop."""
    with connected(config.cluster, listener) as own:
        require_room(config.cluster, listener, own)
        with _actors(config, str(folder)) as (desk, settings):
            _drive(config, folder, listener, stop, desk, settings)


# -- the cluster


@contextmanager
def connected(cluster: ClusterConfig, listener: Listener) -> Iterator[bool]:
    """Within it this process is connected to a cluster; True if that was started for the run, and ends with it."""
    if ray.is_initialized():  # by the caller, who keeps it
        yield False
        return
    for name, value in _environment(cluster).items():
        os.environ.setdefault(name, value)
    asked = signal.getsignal(signal.SIGTERM)
    try:
        own = _connect(cluster, listener)
        if callable(asked) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, asked)  # Ray has put its own there, which exits at once
        yield own
    finally:
        ray.shutdown()


def _connect(cluster: ClusterConfig, listener: Listener) -> bool:
    """Whether a cluster had to be started."""
    variables = {name: os.environ[name] for name in _environment(cluster).keys() - _of_job()}
    if (job := submission()) is not None:
        variables[SUBMISSION] = job
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "logging_level": logging.WARNING,
        "log_to_driver": False,
        "runtime_env": {"env_vars": variables},
    }
    if cluster.address not in ("auto", "local"):
        try:
            ray.init(address=cluster.address, **common)
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            raise ClusterError(f"no cluster answers at {cluster.address}: {first_line(error)}") from error
        return False
    if cluster.address == "auto" and (os.environ.get("RAY_ADDRESS") or _is_on_a_cluster()):
        try:
            ray.init(address="auto", **common)
            return False
        except ConnectionError as error:
            if os.environ.get("RAY_ADDRESS"):
                where = os.environ["RAY_ADDRESS"]
                raise ClusterError(f"no cluster answers at RAY_ADDRESS={where}: {first_line(error)}") from error
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        # Ray may be reached from beyond this machine, and then asks for a token: one that only this run knows.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it says that it asks for one
    listener.note("starting Ray on this machine")
    alone: dict[str, Any] = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
    ray.init(address="local", **alone, **common)
    return True


def _environment(cluster: ClusterConfig) -> dict[str, str]:
    return ENVIRONMENT | (ELASTIC if isinstance(cluster.workers, tuple) else {})


def _of_job() -> set[str]:
    """Variables that the job this process drives has set for all its processes; Ray refuses them a second time."""
    return set((ray_job().get("runtime_env") or {}).get("env_vars") or {})


def _is_on_a_cluster() -> bool:
    """Whether a Ray node of this user runs here."""
    from ray._private.services import find_gcs_addresses

    return bool(find_gcs_addresses())


def needed(cluster: ClusterConfig) -> dict[str, float]:
    """What the least number of workers asks for."""
    least = cluster.workers[0] if isinstance(cluster.workers, tuple) else cluster.workers
    found = {"CPU": float(least * cluster.cpus_per_worker), "GPU": float(least * cluster.gpus_per_worker)}
    return {name: count for name, count in found.items() if count}


def at_once(base: RunConfig, resources: Mapping[str, float]) -> int:
    """Runs for which there is room, with all their workers: so that none ever waits for what another holds."""
    wanted = needed(of_one_run(base, most=True))
    return max(1, min(int(resources.get(name, 0.0) / count) for name, count in wanted.items()))


def of_one_run(base: RunConfig, most: bool = False) -> ClusterConfig:
    """What a run among others asks for, as its workers do: one of them, where it learns in its own process."""
    cluster, workers = base.cluster, base.cluster.workers
    if isinstance(workers, tuple):
        workers = workers[1] if most else workers[0]
    return cluster.model_copy(update={"workers": workers or 1})


def say_gpus(base: RunConfig, listener: Listener, who: str) -> None:
    """That there are some which runs among others, such as trials, leave alone."""
    gpus, cluster = ray.cluster_resources().get("GPU", 0.0), base.cluster
    if gpus and not cluster.gpus_per_worker and base.model.device != "cpu":
        listener.note(f"{who} none of the cluster's {gpus:g} GPUs: set cluster.gpus_per_worker=1 to give each one")


def require_room(cluster: ClusterConfig, listener: Listener, own: bool) -> None:
    """Waits until the cluster has what the workers ask for; says at once what is missing."""
    deadline, said = time.monotonic() + cluster.wait, False
    while missing := _missing(needed(cluster), ray.cluster_resources()):
        if own:
            raise ClusterError(f"this machine is too small: {missing}. Ask for less: cluster.workers, cpus_per_worker")
        if time.monotonic() > deadline:
            raise ClusterError(f"the cluster did not grow within {cluster.wait:g} s (cluster.wait): {missing}")
        if not said:
            listener.note(f"waiting for the cluster to grow, at most {cluster.wait:g} s: {missing}")
            said = True
        time.sleep(1)


def _missing(wanted: dict[str, float], present: dict[str, float]) -> str:
    found = {name: (count, present.get(name, 0.0)) for name, count in wanted.items()}
    short = [f"{want:g} {name} are asked for, {have:g} exist" for name, (want, have) in found.items() if have < want]
    return ", ".join(short)


# -- actors of the run


@contextmanager
def _actors(config: RunConfig, folder: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The run's desk and guide, and the settings of its workers. Their names hold the folder: one run, one of each."""
    key = folder.strip("/").replace("/", ".")
    names = {"desk": f"desk {key}", "guide": f"guide {key}"}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    scratch = Path(tempfile.mkdtemp(prefix="treelora-guide-"))
    actors = []
    try:
        desk = ray.remote(Desk).options(
            name=names["desk"], namespace=NAMESPACE, num_cpus=0, max_restarts=-1, scheduling_strategy=here
        )
        actors.append(_as_soon_as_free(lambda: desk.remote(), folder))
        if config.method.name == "treelora":
            actors.append(_as_soon_as_free(lambda: start_guide_actor(names["guide"], NAMESPACE, scratch), folder))
        yield actors[0], {**names, "config": config.model_dump(mode="json", by_alias=True), "folder": folder}
    finally:
        for actor in actors:
            with suppress(RayError):
                ray.kill(actor)
        shutil.rmtree(scratch, ignore_errors=True)


def _as_soon_as_free(start: Callable[[], Any], folder: str) -> Any:
    """Actors of a driver that has just died keep their names for a moment."""
    deadline = time.monotonic() + OLD_ACTORS
    while True:
        try:
            return start()
        except (ValueError, ClusterError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"another driver trains in {folder} on this cluster: wait for it, or give `name` another value"
                ) from error
            time.sleep(0.5)


# -- training


def _drive(
    config: RunConfig,
    folder: RunFolder,
    listener: Listener,
    stop: Callable[[], bool],
    desk: Any,
    settings: dict[str, Any],
) -> None:
    """Fits until the stream is learnt; the controller's death counts as a failure like a worker's."""
    shown = _Shown(config.cluster, listener, desk, stop)
    _say_shares(config, listener)
    for attempt in range(config.cluster.max_failures + 1):
        fit = _Fit(_trainer(config, folder, settings))
        fit.start()
        while fit.is_alive():
            shown.look()
            fit.join(POLL)
        shown.look()
        if (error := ray.get(desk.failed.remote())) is not None:
            raise error
        if shown.stopping:
            raise Stopped(str(folder))
        if fit.error is None:
            return
        if not isinstance(fit.error, RayActorError) or attempt == config.cluster.max_failures:
            raise RunError(
                f"training failed {config.cluster.max_failures + 1} times (cluster.max_failures): {fit.error}"
            ) from fit.error
        listener.note("the controller died; beginning again from the last checkpoint")


def _trainer(config: RunConfig, folder: RunFolder, settings: dict[str, Any]) -> TorchTrainer:
    cluster = config.cluster
    path, filesystem = folder.place()
    per_worker: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        per_worker["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,  # type: ignore[arg-type]  # elastic: (least, most)
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=per_worker,
            placement_strategy=cluster.strategy,
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.gpus_per_worker else "gloo"),
        run_config=TrainRun(  # type: ignore[call-arg]  # the stubs show the old one
            name="ray-train",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _say_shares(config: RunConfig, listener: Listener) -> None:
    count = config.cluster.workers if isinstance(config.cluster.workers, int) else None
    batch = config.train.batch
    if count and batch % count:
        least, more = divmod(batch, count)
        listener.note(
            f"{batch} rows over {count} workers: {more} take {least + 1} of each step, the others {least}; "
            "gradients are means over all rows, so the result is that of one worker"
        )


class _Fit(threading.Thread):
    """`fit` in a thread of its own, so that the driver can look and be interrupted meanwhile."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            self.error = error


class _Shown:
    """What workers leave at the desk, given to the listener; and the watch over a cluster that gives no workers."""

    def __init__(self, cluster: ClusterConfig, listener: Listener, desk: Any, stop: Callable[[], bool]) -> None:
        self.cluster, self.listener, self.desk, self.stop = cluster, listener, desk, stop
        self.stopping, self.said, self.heard, self.starts = False, False, time.monotonic(), 0

    def look(self) -> None:
        if not self.stopping and self.stop():
            self.stopping = True
            ray.get(self.desk.stop.remote())
        for event, values in ray.get(self.desk.take.remote()):
            self.heard, self.said = time.monotonic(), False
            if event == "alive":
                self._alive(*values)
            else:
                getattr(self.listener, event)(*values)
        self._watch()

    def _alive(self, workers: int) -> None:
        self.starts += 1
        if self.starts > 1:
            self.listener.note(f"workers began again, {workers} of them, from the last checkpoint")

    def _watch(self) -> None:
        """A task's steps are told several times a second; silence means that workers are missing or busy."""
        silent, wanted = time.monotonic() - self.heard, needed(self.cluster)
        if silent > SILENCE and not self.said and (missing := _missing(wanted, ray.cluster_resources())):
            self.listener.note(f"waiting for workers, at most {self.cluster.wait:.0f} s: {missing}")
            self.said = True
        if silent > self.cluster.wait and (missing := _missing(wanted, ray.cluster_resources())):
            raise ClusterError(f"no workers for {self.cluster.wait:.0f} s (cluster.wait): {missing}")
