"""What a sweep is and how far it has come: its trials, which `sweep.json` in its folder holds. Knows nothing of Ray.

    SWEEP/sweep.json          trials, their settings, scores after each task, the winner
    SWEEP/trials/0007         a trial: an ordinary run, judged on rows held out of training
    SWEEP/best.yaml           the config of the winner, without held-out rows
    SWEEP/winner              the run of best.yaml: the only one that has seen test rows

The settings of trials are written down before they run. So whatever dies when: a trial that has ended is not run
again, and one that has not goes on from its run's checkpoints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np

from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.inner_runs import absolute, placed
from treelora_ray.cluster.parameters import Space, grid_settings, random_settings
from treelora_ray.config import RunConfig, flat, free_key, run_name, with_values
from treelora_ray.files import write_atomically
from treelora_ray.store import RunFolder, joined

FILE, WINNER = "sweep.json", "winner"
METRICS = {"val_op": "max", "forgetting": "min", "seconds": "min"}  # what a trial reports, and which end is the better
SEARCHES, SCHEDULERS = ("random", "optuna", "grid"), ("asha", "none")
HOLDOUT = 0.2  # of each task's training rows, where the config does not say
PACKAGES = ("treelora-ray", "torch", "ray", "optuna")
NO_PBT = (
    "scheduler pbt is not offered: it copies weights from one trial into another and changes settings on the way, so "
    "that no trial is a run of one config, and no config would be the best one; use asha or none"
)

State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class SweepOptions:
    """How to search; what is searched says the space."""

    space: str = "treelora"
    trials: int = 32
    concurrency: int | None = None  # None: as many as there is room for
    scheduler: str = "asha"
    grace: float = 15.0  # percent of the stream before anything is stopped
    search: str = "random"
    seeds: int = 3
    top: int = 3
    metric: str = "val_op"
    time_budget: float | None = None  # seconds of the search, over all its starts
    name: str | None = None

    def __post_init__(self) -> None:
        if self.scheduler == "pbt":
            raise ClusterError(NO_PBT)
        wrong = [
            f"{what} {value!r} is unknown; known: {', '.join(allowed)}" + _nearest(value, allowed)
            for what, value, allowed in (
                ("scheduler", self.scheduler, SCHEDULERS),
                ("search", self.search, SEARCHES),
                ("metric", self.metric, tuple(METRICS)),
            )
            if value not in allowed
        ]
        counts = {"trials": self.trials, "seeds": self.seeds, "top": self.top, "concurrency": self.concurrency}
        wrong += [f"{what} is {n}; it must be at least 1" for what, n in counts.items() if n is not None and n < 1]
        if not 0 < self.grace <= 100:
            wrong.append(f"grace is {self.grace:g}; it is a percentage of the stream, above 0")
        if self.time_budget is not None and self.time_budget <= 0:
            wrong.append("time budget is 0; leave it out, or give some, such as 2h")
        if wrong:
            raise ClusterError("the sweep cannot begin:\n  " + "\n  ".join(wrong))


@dataclass
class Trial:
    id: str
    parameters: dict[str, Any]
    seed: int
    run: str  # its folder, below the sweep's
    of: str | None = None  # the trial whose settings it repeats on another seed
    state: State = "waiting"
    error: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # after each task
    failures: int = 0

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    def note(self, values: Mapping[str, float]) -> bool:
        """Scores after a task; False if they are known: a trial that goes on says all of them again."""
        if self.history and values["percent"] <= self.history[-1]["percent"]:
            return False
        self.history.append(dict(values))
        return True

    def to_json(self) -> dict[str, Any]:
        last = self.history[-1] if self.history else dict.fromkeys((*METRICS, "percent"))
        found = {each.name: getattr(self, each.name) for each in fields(self)} | last
        if self.of is None:
            del found["of"]
        return found

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Trial:
        made = cls(**{each.name: data[each.name] for each in fields(cls) if each.name in data})
        if not made.over:  # its process is gone, perhaps with the cluster, for which it is not to blame
            made.state, made.failures = "waiting", 0
        return made


def sweep_name(base: RunConfig, space: str, name: str | None) -> str:
    return name or f"sweep-{space}-{run_name(base)}"


class Sweep:
    """One sweep in its folder, new or as it was left."""

    def __init__(self, base: RunConfig, space: Space, options: SweepOptions, folder: RunFolder) -> None:
        self.base, self.space, self.options, self.folder = absolute(base), space, options, folder
        self.name = sweep_name(base, space.name, options.name)
        self.trials: list[Trial] = []
        self.again: list[Trial] = []
        self.final = Trial(WINNER, {}, base.seed, WINNER)  # the winner, on all rows
        self.winner: dict[str, Any] | None = None
        self.seconds, self.clock = 0.0, time.monotonic()
        folder.pull(FILE)
        self._resume()
        self._plan()

    # -- what it is

    def about(self) -> dict[str, Any]:
        """What must be the same when it goes on."""
        return {
            "name": self.name,
            "space": self.space.name,
            "fixed": {key: value for key, value in self.space.fixed.items() if not free_key(key)},
            "base": flat(self.base.model_dump(mode="json", by_alias=True)),
            "metric": self.options.metric,
            "mode": METRICS[self.options.metric],
            "scheduler": self.options.scheduler,
            "search": self.options.search,
            "parameters": {key: parameter.to_json() for key, parameter in self.space.parameters.items()},
        }

    def _resume(self) -> None:
        path = self.folder.path / FILE
        if not path.is_file():
            return
        found = json.loads(path.read_text())
        if changed := _differences(found, json.loads(json.dumps(self.about()))):
            raise ClusterError(
                f"sweep {self.folder} was begun with something else:\n  "
                + "\n  ".join(changed)
                + "\ngive it another name (--name)"
            )
        self.trials = [Trial.of_json(each) for each in found["trials"]]
        self.again = [Trial.of_json(each) for each in found["again"]]
        self.winner, self.seconds = found["winner"], found["seconds"]
        if self.winner is not None and self.options.trials > len(self.trials):
            raise ClusterError(
                f"sweep {self.folder} has named its winner, which has looked at test rows: more trials would be chosen "
                "by them; give the sweep another name"
            )

    def _plan(self) -> None:
        """Draws the settings of trials that are not there yet, but for those that depend on others' scores."""
        search, parameters, seed = self.options.search, self.space.parameters, self.base.seed
        if search == "random":
            settings = random_settings(parameters, self.options.trials, seed)
        elif search == "grid":
            settings = grid_settings(parameters, self.options.trials, seed)
        else:
            return
        known = [trial.parameters for trial in self.trials]
        for setting in settings:
            if setting not in known and len(self.trials) < self.options.trials:
                self.add(setting)

    def add(self, parameters: dict[str, Any]) -> Trial:
        number = f"{len(self.trials):04d}"
        self.trials.append(Trial(number, parameters, self.base.seed, f"trials/{number}"))
        return self.trials[-1]

    @property
    def wanted(self) -> int:
        """Trials of the search: fewer than asked for where there are no more settings."""
        return self.options.trials if self.options.search == "optuna" else len(self.trials)

    # -- configs of its runs

    @property
    def holdout(self) -> float:
        return self.base.stream.holdout or HOLDOUT

    def config(self, trial: Trial) -> RunConfig:
        """Of a trial's run: judged on held-out rows, shown in MLflow below the sweep, without what is made to look at.

        The winner's has all rows, and what the base config asks for.
        """
        if trial.id == WINNER:
            return self._placed(self._chosen(), {"stream.holdout": None}, WINNER, self.folder.address)
        quiet = {"tracking.report": False, "tracking.model": False, "tracking.register": None}
        own = {"seed": trial.seed, "stream.holdout": self.holdout, **quiet}
        return self._placed(trial.parameters, own, trial.id, joined(self.folder.address, "trials"))

    def best_config(self) -> RunConfig:
        """What `best.yaml` holds: a run of its own beside the sweep."""
        own = {"stream.holdout": None, "name": f"{self.name}-best"}
        return with_values(self.base, {**self.space.fixed, **self._chosen(), **own}, "the winner")

    def _chosen(self) -> dict[str, Any]:
        assert self.winner is not None
        return next(trial.parameters for trial in self.trials if trial.id == self.winner["trial"])

    def _placed(self, parameters: Mapping[str, Any], own: Mapping[str, Any], name: str, folder: str) -> RunConfig:
        values = {**self.space.fixed, **parameters, **own}
        return placed(self.base, values, name, folder, self.name, f"trial {name}")

    # -- how far it is

    @property
    def spent(self) -> float:
        """Seconds, over all starts of the sweep."""
        return self.seconds + time.monotonic() - self.clock

    @property
    def tested(self) -> bool:
        return bool(self.winner and self.winner["test"])

    def best(self, count: int | None = None) -> list[Trial]:
        """Finished trials, the best first; of equal ones the older."""
        done = [trial for trial in self.trials if trial.state == "finished"]
        return sorted(done, key=lambda trial: -self.worth(trial))[:count]

    def worth(self, trial: Trial) -> float:
        """Higher is better, whatever the metric."""
        return self.sign * trial.history[-1][self.options.metric]

    @property
    def sign(self) -> float:
        return 1.0 if METRICS[self.options.metric] == "max" else -1.0

    def plan_again(self) -> list[Trial]:
        """The best trials on further seeds."""
        for trial in self.best(self.options.top):
            for seed in range(trial.seed + 1, trial.seed + self.options.seeds):
                name = f"{trial.id}-seed{seed}"
                if all(other.id != name for other in self.again):
                    self.again.append(Trial(name, trial.parameters, seed, f"trials/{name}", of=trial.id))
        return self.again

    def choose(self) -> None:
        """The winner: of the best on most seeds, that with the best mean over them."""
        ranked = []
        for trial in self.best(self.options.top):
            seeds = [trial, *(each for each in self.again if each.of == trial.id and each.state == "finished")]
            ranked.append((len(seeds), float(np.mean([self.worth(each) for each in seeds])), trial.id, seeds))
        if ranked:
            *_, winner, seeds = max(ranked, key=lambda each: each[:2])
            scores = {name: _over_seeds(name, seeds) for name in dict.fromkeys(("val_op", self.options.metric))}
            self.winner = {"trial": winner, **scores, "test": None}

    def to_json(self) -> dict[str, Any]:
        return {
            **self.about(),
            "holdout": self.holdout,
            "asked": self.options.trials,
            "seeds": self.options.seeds,
            "trials": [trial.to_json() for trial in self.trials],
            "again": [trial.to_json() for trial in self.again],
            "winner": self.winner,
            "seconds": self.seconds,
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
        }

    def save(self) -> None:
        self.seconds, self.clock = self.spent, time.monotonic()
        data = self.to_json()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder.path / FILE, json.dumps(data, indent=1, allow_nan=False).encode())
        self.folder.push()

    def write_best(self) -> None:
        write_atomically(self.folder.path / "best.yaml", self.best_config().to_yaml().encode())
        self.folder.push()


def _over_seeds(metric: str, trials: Sequence[Trial]) -> dict[str, Any]:
    values = [trial.history[-1][metric] for trial in trials]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "seeds": [trial.seed for trial in trials], "scores": values}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words; `new` as it comes back from JSON."""
    found = [
        f"{key}: {old.get(key)!r} then, {new[key]!r} now" for key in new if key != "base" and old.get(key) != new[key]
    ]
    was, now = old["base"], new["base"]
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key) and not free_key(key)]
    return found + [f"base {key}: {was.get(key)!r} then, {now.get(key)!r} now" for key in keys]


def _nearest(value: str, allowed: Sequence[str]) -> str:
    near = get_close_matches(value, allowed, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
