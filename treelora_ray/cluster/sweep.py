"""A sweep: the driver.

sweep ─► connected ─► Tune ─► trials ─► the best on further seeds ─► best.yaml ─► the winner, on test rows, once
                       │ what comes next: Program, told by Conductor; what is stopped: Judge
                       ▼
                 sweep_trial.Trial, an actor that takes one trial after the other
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray._private import auto_init_hook

from treelora_ray.api import Run
from treelora_ray.cluster.errors import ClusterLostError
from treelora_ray.cluster.inner_runs import LOOKS, conclude, deliver, kind_of_stream, opened, report
from treelora_ray.cluster.run import at_once, connected, of_one_run, require_room, say_gpus
from treelora_ray.cluster.spaces import load_space
from treelora_ray.cluster.sweep_plan import Sweep, SweepOptions, sweep_name
from treelora_ray.cluster.sweep_program import Program
from treelora_ray.cluster.sweep_search import Conductor, Judge
from treelora_ray.cluster.sweep_trial import Trial as Actor
from treelora_ray.config import RunConfig, with_values
from treelora_ray.models.kept import Backbones
from treelora_ray.store import RunFolder, joined
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.stream import Listener

POLL = 0.2  # seconds between two looks at Ctrl-C
TUNE = ".tune"  # where Tune writes what nobody reads
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one shows tables even where it is to be silent
}


def sweep(
    base: RunConfig,
    options: SweepOptions,
    *,
    given: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Sweep:
    """Searches settings for a config, from where the sweep of this name was left.

    `given`: keys that the user has set by hand, which a space does not touch.
    """
    listener = listener or Listener()
    space = load_space(options.space).under(given or {})
    name = sweep_name(base, space.name, options.name)
    with_values(base, {"name": name}, "the name of the sweep")
    space.require_fits(base)
    with opened(base, name, "sweep") as folder:
        found = Sweep(base, space, options, folder)
        found.save()
        told = found.tested
        try:
            _drive(found, listener, stop)
        finally:
            report(folder, partial(_write, found), "report", listener.note)
            if not told:
                _tell(found, listener, stop())
        return found


def _drive(sweep: Sweep, listener: Listener, stop: Callable[[], bool]) -> None:
    """All that is left to do, in one experiment of Tune, whose actors take one trial after the other."""
    if sweep.tested:
        return
    base = sweep.base
    _say_where(sweep, listener)
    deliver(sweep.folder.path, sweep.base, (*sweep.trials, *sweep.again), listener.note)
    with connected(base.cluster, listener) as own, _quiet():
        require_room(of_one_run(base), listener, own)
        say_gpus(base, listener, "trials use")
        program = Program(sweep, stop, listener.note)
        conductor = Conductor(sweep, program, _at_once(sweep, listener), listener.note)
        experiment = _Experiment(_tuner(sweep, conductor, Judge(sweep, program)))
        experiment.start()
        while experiment.is_alive():
            experiment.join(POLL)
            if not any(node["Alive"] for node in ray.nodes()):
                auto_init_hook.enable_auto_connect = False  # else Tune's thread starts another one
                raise ClusterLostError(f"the cluster has died; sweep {sweep.folder} holds what was learnt")
    _clear(sweep.folder)
    if experiment.error is not None:
        raise experiment.error
    if stop():
        raise Stopped(sweep.folder.address)
    _conclude(sweep)
    shutil.rmtree(sweep.folder.path / LOOKS, ignore_errors=True)


def _write(sweep: Sweep) -> None:
    from treelora_ray.tracking.sweep_report import write_sweep_report

    write_sweep_report(sweep.folder.path)


def _tell(sweep: Sweep, listener: Listener, stopped: bool) -> None:
    """MLflow, of the whole."""
    status = "FINISHED" if sweep.tested else "KILLED" if stopped else "FAILED"
    conclude(sweep.folder, sweep.base, [*sweep.trials, *sweep.again, sweep.final], status, listener.note)


def _clear(folder: RunFolder) -> None:
    path, filesystem = folder.place()
    if filesystem is None:
        shutil.rmtree(Path(path) / TUNE, ignore_errors=True)
    else:
        with suppress(OSError):
            filesystem.delete_dir(f"{path}/{TUNE}")


def _say_where(sweep: Sweep, listener: Listener) -> None:
    over, options = sum(trial.over for trial in sweep.trials), sweep.options
    if any(trial.history or trial.over for trial in sweep.trials):
        listener.note(f"going on with {sweep.folder}: {over} of {sweep.wanted} trials have ended")
    if sweep.wanted < options.trials:
        listener.note(f"the space has {sweep.wanted} settings, fewer than the {options.trials} trials asked for")
    if options.search == "grid" and (size := sweep.space.size) > sweep.wanted:
        listener.note(f"the grid has {size} settings: {sweep.wanted} of them are tried, drawn by the seed")


def _conclude(sweep: Sweep) -> None:
    """What the winner scores on test rows; or why there is none."""
    if sweep.winner is None:
        states = [trial.state for trial in sweep.trials]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        error = next((f" ({trial.error})" for trial in sweep.trials if trial.error), "")
        raise RunError(
            f"no trial of sweep {sweep.folder} has learnt the whole stream, so there is no winner: {counted}{error}; "
            "give it more time, or search elsewhere"
        )
    final = sweep.final
    if final.state != "finished":
        raise RunError(f"the winner of sweep {sweep.folder} could not be learnt: {final.error}")
    metrics = Run(joined(sweep.folder.address, final.run)).metrics
    scores = {key: metrics.get(key) for key in ("op", "bwt", "forgetting")}
    sweep.winner["test"] = {"run": final.run, **scores, "seed": final.seed}
    sweep.save()


def _at_once(sweep: Sweep, listener: Listener) -> int:
    room, wanted = at_once(sweep.base, ray.cluster_resources()), sweep.options.concurrency
    if wanted is not None and wanted > room:
        listener.note(f"{wanted} trials at once are more than the cluster has room for: {room} at once")
    return room if wanted is None else min(wanted, room)


def _tuner(sweep: Sweep, conductor: Conductor, judge: Judge) -> tune.Tuner:
    cluster, nested = sweep.base.cluster, sweep.base.cluster.workers != 0
    if nested:  # its workers have the resources; Tune wants something that is asked for, and every node has memory
        resources: dict[str, float] = {"CPU": 0, "memory": 1}
    else:
        resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    path, filesystem = sweep.folder.place()
    actor = Actor if nested else tune.with_parameters(Actor, **_shared(sweep))
    return tune.Tuner(
        tune.with_resources(actor, tune.PlacementGroupFactory([resources])),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until the conductor says that there is no more
            search_alg=conductor,
            scheduler=judge,
            reuse_actors=not nested,
            trial_name_creator=lambda trial: str(trial.config["id"]),
            trial_dirname_creator=lambda trial: f"{trial.config['id']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs have their own
            verbose=0,
        ),
    )


def _shared(sweep: Sweep) -> dict[str, Any]:
    """What the trials need not make again, each in its own process."""
    config = with_values(sweep.base, {**sweep.space.fixed, "stream.holdout": sweep.holdout}, "the sweep")
    kind = kind_of_stream(config.stream, config.seed)
    looks = None if sweep.folder.stored else str(sweep.folder.path / LOOKS)
    return {"packed": Backbones().pack(config.model, kind), "looks": looks}


class _Experiment(threading.Thread):
    """Tune in a thread of its own, where it leaves signals to the driver."""

    def __init__(self, tuner: tune.Tuner) -> None:
        super().__init__(daemon=True)
        self.tuner = tuner
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.tuner.fit()
        except Exception as error:
            self.error = error


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune talks of what users cannot change."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
