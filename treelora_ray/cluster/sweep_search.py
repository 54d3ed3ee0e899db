"""How Tune is told what a sweep does: which trial comes next, and when one is stopped.

Tune knows a trial by a number of its own, which is another each time one is tried or goes on; scores and the rungs of
ASHA are kept by the sweep's. Tune writes down what it knows, and nobody reads it: `sweep.json` is the sweep's memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from treelora_ray.cluster.inner_runs import TRIES
from treelora_ray.cluster.sweep_plan import METRICS, WINNER, Sweep, Trial
from treelora_ray.cluster.sweep_program import Program

REDUCTION = 3  # of so many trials at a rung of ASHA one goes on
BEYOND = 101.0  # percent that no trial reaches: Tune ends those that reach its limit


class Forgetful:
    """Tune stores its parts with pickle; these have nothing to store."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, *_: Any) -> None: ...

    def restore(self, *_: Any) -> None: ...


class Conductor(Forgetful, Searcher):
    """Gives out what the program says, `at_once` trials at the same time, and notes what comes of each."""

    def __init__(self, sweep: Sweep, program: Program, at_once: int, say: Callable[[str], None]) -> None:
        super().__init__()
        self.sweep, self.program, self.at_once, self.say = sweep, program, at_once, say
        self.active: dict[str, Trial] = {}  # by Tune's number

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        if len(self.active) >= self.at_once:
            return None
        trial = self.program.next(busy=bool(self.active))
        if trial is None:
            return None if self.active else str(Searcher.FINISHED)
        self.active[trial_id] = trial
        trial.state, trial.error = "running", None
        self.sweep.save()
        return {"id": trial.id, "config": json.dumps(self.sweep.config(trial).model_dump(mode="json", by_alias=True))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._note(self.active[trial_id], result)

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        trial.error = result.get("error", trial.error)
        if "val_op" in result and trial.note({key: float(result[key]) for key in ("percent", *METRICS)}):
            self.sweep.save()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.active.pop(trial_id, None)
        if trial is None:
            return
        self._note(trial, result or {})
        percent = trial.history[-1]["percent"] if trial.history else 0.0
        if error or trial.error:
            self._failed(trial, final=bool((result or {}).get("final")))
        elif percent >= 100.0:
            trial.state = "finished"
            self.say(f"  {trial.id} finished: {_scores(trial)}")
        elif self.program.halts(trial.id):
            trial.state = "waiting"
        else:
            trial.state = "stopped"
            self.say(f"  {trial.id} stopped after {percent:.0f}% of the stream: {_scores(trial)}")
        self.sweep.save()

    def _failed(self, trial: Trial, final: bool) -> None:
        trial.failures = TRIES if final else trial.failures + 1
        trial.error = trial.error or "its process died, often for want of memory"
        trial.state = "failed" if trial.failures >= TRIES else "waiting"
        self.say(f"  {trial.id} failed{'' if trial.over else ', and is tried again'}: {trial.error}")


class Judge(Forgetful, FIFOScheduler):
    """Stops trials: those that the program halts, and hopeless ones by ASHA over the share of the stream learnt."""

    def __init__(self, sweep: Sweep, program: Program) -> None:
        super().__init__()
        self.program, options = program, sweep.options
        self.asha: Any = None
        if options.scheduler == "asha":
            places: dict[str, Any] = {"max_t": BEYOND, "grace_period": options.grace}  # annotated as whole numbers
            best: dict[str, Any] = {"metric": options.metric, "mode": METRICS[options.metric]}
            self.asha = ASHAScheduler(time_attr="percent", reduction_factor=REDUCTION, **best, **places)
        for trial in sweep.trials:  # what was said before the sweep went on counts at the rungs
            for values in trial.history:
                self.judge(trial.id, values)

    def judge(self, name: str, values: dict[str, Any]) -> str:
        """What ASHA says, which judges a trial once at each rung, however often it is told the same."""
        if self.asha is None or "val_op" not in values or not self.program.searches(name):
            return str(TrialScheduler.CONTINUE)
        if name not in self.asha._trial_info:
            self.asha.on_trial_add(None, SimpleNamespace(trial_id=name))
        return str(self.asha.on_trial_result(None, SimpleNamespace(trial_id=name), values))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        name = trial.config["id"]
        return str(TrialScheduler.STOP) if self.program.halts(name) else self.judge(name, result)


def _scores(trial: Trial) -> str:
    last = trial.history[-1]
    score = f"on test rows {last['val_op']:.1f}" if trial.id == WINNER else f"val_op {last['val_op']:.1f}"
    return f"{score}, forgetting {last['forgetting']:.1f}, {last['seconds']:.0f} s"
