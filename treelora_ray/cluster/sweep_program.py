"""What a sweep does next: its trials, then the best of them on further seeds, then the winner. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from treelora_ray.cluster.parameters import Parameter
from treelora_ray.cluster.sweep_plan import Sweep, Trial

Choose = Callable[[], "Trial | None"]


class Program:
    """Three parts; one begins when all trials of the one before have ended."""

    def __init__(self, sweep: Sweep, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
        self.sweep, self.stop, self.say = sweep, stop, say
        self.choose = by_optuna(sweep) if sweep.options.search == "optuna" else planned(sweep.trials)
        self.further = [self._further_seeds, self._winner]
        if sweep.winner is not None:  # named before: it stays
            self.choose, self.further = planned([]), [self._winner]

    @property
    def spent(self) -> bool:
        budget = self.sweep.options.time_budget
        return budget is not None and self.sweep.spent >= budget

    def searches(self, name: str) -> bool:
        """Whether a trial is of the first part, which alone is cut short."""
        return any(trial.id == name for trial in self.sweep.trials)

    def halts(self, name: str) -> bool:
        """Whether a trial is to end where it stands, though it is not over."""
        return self.stop() or (self.spent and self.searches(name))

    def next(self, busy: bool) -> Trial | None:
        """The next trial; None if there is none, or none while others are at work (`busy`)."""
        while not self.stop():
            cut = self.spent and self._further_seeds in self.further  # it is still searching, and has no more time
            if not cut and (trial := self.choose()) is not None:
                return trial
            if busy or not self.further:
                return None
            self.choose = self.further.pop(0)()
        return None

    def _further_seeds(self) -> Choose:
        sweep = self.sweep
        if self.spent and not all(trial.over for trial in sweep.trials):
            self.say("the time budget is used up: trials that have not ended are left out")
        again = sweep.plan_again()
        if any(not trial.over for trial in again):
            self.say(f"the best on further seeds: {', '.join(t.id for t in sweep.best(sweep.options.top))}")
        return planned(again)

    def _winner(self) -> Choose:
        sweep = self.sweep
        if sweep.winner is None:
            sweep.choose()
        if sweep.winner is None:
            return planned([])
        sweep.save()
        sweep.write_best()
        self.say(f"the winner is {sweep.winner['trial']}: learning its config without held-out rows")
        return planned([self.sweep.final])


def planned(trials: Sequence[Trial]) -> Callable[[], Trial | None]:
    """Those that wait, those that have come furthest first: an unfinished one before a new one."""

    def choose() -> Trial | None:
        waiting = [trial for trial in trials if trial.state == "waiting"]
        return max(waiting, key=lambda trial: len(trial.history), default=None)

    return choose


def by_optuna(sweep: Sweep) -> Callable[[], Trial | None]:
    """Settings by Optuna's TPE, from the scores so far; `sweep.json` is its memory too."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces = {key: _distribution(parameter) for key, parameter in sweep.space.parameters.items()}
    left = planned(sweep.trials)

    def study() -> Any:
        sampler = optuna.samplers.TPESampler(seed=sweep.base.seed + len(sweep.trials), constant_liar=True)
        made = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in sweep.trials:
            made.add_trial(_told(trial))
        return made

    def _told(trial: Trial) -> Any:
        states, scores = optuna.trial.TrialState, {}
        if trial.history:
            scores = {round(each["percent"]): sweep.sign * each[sweep.options.metric] for each in trial.history}
        state = {"finished": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}.get(
            trial.state, states.RUNNING
        )
        return optuna.trial.create_trial(
            state=state,
            params={key: _place(sweep.space.parameters[key], value) for key, value in trial.parameters.items()},
            distributions=spaces,
            intermediate_values=scores,
            value=sweep.worth(trial) if trial.state == "finished" else None,
        )

    def choose() -> Trial | None:
        if (trial := left()) is not None:
            return trial
        if len(sweep.trials) >= sweep.options.trials:
            return None
        asked = study().ask(spaces)
        return sweep.add({key: _value(p, asked.params[key]) for key, p in sweep.space.parameters.items()})

    return choose


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(range(len(parameter.values)))  # by place: values may be anything
    low, high = parameter.ends()
    return (IntDistribution if parameter.whole else FloatDistribution)(low, high, log=parameter.log)


def _place(parameter: Parameter, value: Any) -> Any:
    return parameter.values.index(value) if parameter.kind == "choice" else value


def _value(parameter: Parameter, value: Any) -> Any:
    return parameter.values[value] if parameter.kind == "choice" else parameter.near(value)
