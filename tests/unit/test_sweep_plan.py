"""What a sweep plans, remembers and decides, without Ray: runs are told of, none is learnt."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treelora_ray.cluster import inner_runs
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.parameters import Parameter, Space
from treelora_ray.cluster.run import at_once
from treelora_ray.cluster.sweep_plan import FILE, Sweep, SweepOptions, Trial
from treelora_ray.cluster.sweep_program import Program
from treelora_ray.cluster.sweep_search import Conductor, Judge
from treelora_ray.cluster.sweep_trial import Scores, Work
from treelora_ray.config import ConfigError, from_mapping, load
from treelora_ray.store import open_folder
from treelora_ray.tracking.journal import FILE as JOURNAL
from treelora_ray.training.errors import Stopped
from treelora_ray.training.stream import Listener

RATES = Space("mine", {"train.epochs": 2}, {"train.lr": Parameter("choice", (0.1, 0.2, 0.3, 0.4))})


def base(folder: Path, **changes: Any) -> Any:
    return from_mapping({"folder": str(folder), "name": "base", **changes})


def made(folder: Path, space: Space = RATES, config: Any = None, **options: Any) -> Sweep:
    options = {"trials": 4, "search": "grid", "seeds": 1, **options}
    with open_folder(folder / "s") as opened:
        sweep = Sweep(config or base(folder), space, SweepOptions(name="s", **options), opened)
        sweep.save()
    return sweep


def scores(*values: float, of: int = 0) -> list[dict[str, Any]]:
    """Results as Tune hands them on, of a stream of so many tasks."""
    whole = of or len(values)
    return [
        {"percent": 100 * (n + 1) / whole, "val_op": value, "forgetting": 1.0, "seconds": float(n), "done": False}
        for n, value in enumerate(values)
    ]


class Tune:
    """Asks conductor and judge as Tune does; `learn` says what comes of each trial."""

    def __init__(self, sweep: Sweep, learn: Callable[[str], list[dict[str, Any]]], at_once: int = 1) -> None:
        self.sweep, self.learn, self.stopped = sweep, learn, False
        self.said: list[str] = []
        self.program = Program(sweep, lambda: self.stopped, self.said.append)
        self.conductor = Conductor(sweep, self.program, at_once, self.said.append)
        self.judge = Judge(sweep, self.program)
        self.given: list[str] = []

    def go(self, most: int = 99) -> None:
        for number in range(most):
            config = self.conductor.suggest(str(number))
            if config == "FINISHED":
                return
            assert isinstance(config, dict)
            self.given.append(config["id"])
            self._learn(str(number), config["id"])

    def _learn(self, number: str, name: str) -> None:
        trial = type("Trial", (), {"config": {"id": name}})
        for result in self.learn(name):
            if result.get("done") or self.judge.on_trial_result(None, trial, result) == "STOP":
                self.conductor.on_trial_complete(number, result, error=bool(result.get("died")))
                return
            self.conductor.on_trial_result(number, result)
        self.conductor.on_trial_complete(number, {"done": True})


def states(sweep: Sweep) -> dict[str, str]:
    return {trial.id: trial.state for trial in [*sweep.trials, *sweep.again]}


def test_settings_are_written_down_before_anything_runs(tmp_path: Path) -> None:
    made(tmp_path)
    found = json.loads((tmp_path / "s" / FILE).read_text())
    assert [trial["parameters"]["train.lr"] for trial in found["trials"]] == [0.1, 0.2, 0.3, 0.4]
    assert {trial["state"] for trial in found["trials"]} == {"waiting"}
    assert found["parameters"] == {"train.lr": {"kind": "choice", "values": [0.1, 0.2, 0.3, 0.4]}}
    assert found["base"]["train.lr"] == 0.002


def test_all_trials_then_the_best_on_further_seeds_then_the_winner(tmp_path: Path) -> None:
    sweep = made(tmp_path, seeds=3, top=2, scheduler="none")
    seen = {"0000": 50.0, "0001": 80.0, "0002": 79.0, "0003": 10.0, "0001-seed1": 20.0}
    tune = Tune(sweep, lambda name: scores(0.0, seen.get(name, 79.0)))
    tune.go()
    assert tune.given[:4] == ["0000", "0001", "0002", "0003"]
    assert tune.given[4:] == ["0001-seed1", "0001-seed2", "0002-seed1", "0002-seed2", "winner"]
    assert sweep.winner is not None
    assert (sweep.winner["trial"], sweep.winner["val_op"]["scores"]) == ("0002", [79.0, 79.0, 79.0])
    assert sweep.winner["val_op"]["seeds"] == [0, 1, 2]
    assert load(tmp_path / "s" / "best.yaml").train.lr == 0.3


def test_trials_are_judged_on_held_out_rows_and_the_winner_on_test_rows(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    Tune(sweep, lambda _: scores(1.0, 2.0)).go()
    for trial in sweep.trials:
        config = sweep.config(trial)
        assert config.stream.holdout == 0.2
        assert (config.folder, config.name) == (str(tmp_path / "s" / "trials"), trial.id)
        assert (config.train.lr, config.train.epochs) == (trial.parameters["train.lr"], 2)
        assert config.tracking.group == "s"
        assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    final = sweep.config(Trial("winner", {}, 0, "winner"))
    assert final.stream.holdout is None
    assert (final.folder, final.name, final.train.lr) == (str(tmp_path / "s"), "winner", 0.1)
    assert load(tmp_path / "s" / "best.yaml").stream.holdout is None


def test_a_driver_that_dies_anywhere_loses_no_trial_and_runs_none_twice(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", seeds=2, top=1, scheduler="none")
    tune = Tune(whole, lambda name: scores(1.0, float(ord(name[3]))))
    tune.go()
    for dies in range(1, len(tune.given)):
        sweep = made(tmp_path / str(dies), seeds=2, top=1, scheduler="none")
        first = Tune(sweep, lambda name: scores(1.0, float(ord(name[3]))))
        first.go(dies)
        first.conductor.suggest("dies")  # given out, and never heard of again
        again = made(tmp_path / str(dies), seeds=2, top=1, scheduler="none")
        second = Tune(again, lambda name: scores(1.0, float(ord(name[3]))))
        second.go()
        assert first.given + second.given == tune.given
        assert again.winner == whole.winner
        assert [t.history for t in again.trials] == [t.history for t in whole.trials]


def test_what_a_trial_says_again_when_it_goes_on_is_known(tmp_path: Path) -> None:
    sweep = made(tmp_path, trials=1, scheduler="none")
    tune = Tune(sweep, lambda _: scores(5.0, 6.0, of=3))
    tune.conductor.suggest("1")
    for result in scores(5.0, 6.0, of=3):
        tune.conductor.on_trial_result("1", result)
    again = made(tmp_path, trials=1, scheduler="none")
    Tune(again, lambda _: scores(5.0, 6.0, 7.0)).go()
    assert [each["val_op"] for each in again.trials[0].history] == [5.0, 6.0, 7.0]
    percents = [each["percent"] for each in again.trials[0].history]
    assert percents == sorted(set(percents))


def test_a_trial_that_dies_is_tried_again_then_given_up_and_the_sweep_goes_on(tmp_path: Path) -> None:
    sweep = made(tmp_path, scheduler="none")
    tune = Tune(sweep, lambda name: [{"done": True, "died": True}] if name == "0001" else scores(1.0))
    tune.go()
    assert tune.given.count("0001") == 3
    assert states(sweep) == {"0000": "finished", "0001": "failed", "0002": "finished", "0003": "finished"}
    assert "its process died" in str(sweep.trials[1].error)
    assert any("0001 failed, and is tried again" in line for line in tune.said)


def test_an_error_of_the_settings_is_not_tried_again(tmp_path: Path) -> None:
    sweep = made(tmp_path, scheduler="none")
    wrong = {"error": "NonFiniteError: the loss is nan", "final": True, "done": True}
    tune = Tune(sweep, lambda name: [wrong] if name == "0001" else scores(1.0))
    tune.go()
    assert tune.given.count("0001") == 1
    assert (sweep.trials[1].state, sweep.trials[1].error) == ("failed", "NonFiniteError: the loss is nan")


def test_a_hopeless_trial_is_stopped_and_a_slow_starter_is_not(tmp_path: Path) -> None:
    seen = {"0000": [50, 60, 60, 60], "0001": [55, 62, 63, 64], "0002": [10, 70, 80, 90], "0003": [40, 20, 20, 20]}
    sweep = made(tmp_path, grace=50.0)
    Tune(sweep, lambda name: scores(*map(float, seen.get(name, [1, 1, 1, 1])))).go()
    assert states(sweep)["0002"] == "finished"
    assert states(sweep)["0003"] == "stopped"
    assert [each["val_op"] for each in sweep.trials[3].history] == [40.0, 20.0]
    assert sweep.winner is not None
    assert sweep.winner["trial"] == "0002"


def test_asha_judges_as_if_the_driver_had_never_died(tmp_path: Path) -> None:
    sweep = made(tmp_path, grace=50.0)
    Tune(sweep, lambda _: scores(50.0, 50.0)).go(3)
    again = made(tmp_path, grace=50.0)
    Tune(again, lambda _: scores(20.0, 20.0, of=4)).go()
    assert states(again)["0003"] == "stopped"


def test_a_sweep_that_is_asked_to_stop_keeps_what_was_learnt_for_later(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    tune = Tune(sweep, lambda _: scores(50.0, 60.0))

    def learn(name: str) -> list[dict[str, Any]]:
        tune.stopped = name == "0001"
        return scores(50.0, 60.0)

    tune.learn = learn
    tune.go()
    assert states(sweep) == {"0000": "finished", "0001": "waiting", "0002": "waiting", "0003": "waiting"}
    assert sweep.winner is None


def test_a_time_budget_ends_the_search_and_not_what_comes_after_it(tmp_path: Path) -> None:
    sweep = made(tmp_path, time_budget=1e6, seeds=2, top=1)

    def learn(name: str) -> list[dict[str, Any]]:
        sweep.seconds = 2e6 * (name == "0001")
        return scores(50.0, 60.0)

    tune = Tune(sweep, learn)
    tune.go()
    assert tune.given == ["0000", "0001", "0000-seed1", "winner"]
    assert states(sweep)["0001"] == "waiting"
    assert any("time budget is used up" in line for line in tune.said)


def test_no_further_setting_is_proposed_when_the_time_is_spent(tmp_path: Path) -> None:
    sweep = made(tmp_path, search="optuna", trials=9, time_budget=1e6)

    def learn(_: str) -> list[dict[str, Any]]:
        sweep.seconds = 2e6
        return scores(50.0)

    tune = Tune(sweep, learn)
    tune.go()
    assert tune.given == ["0000", "winner"]
    assert states(sweep) == {"0000": "finished"}  # it had learnt its whole stream


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": Space("other", {}, RATES.parameters)}, "space: 'mine' then, 'other' now"),
        ({"space": Space("mine", {}, RATES.parameters)}, "fixed: {'train.epochs': 2} then, {} now"),
        ({"metric": "forgetting"}, "metric: 'val_op' then, 'forgetting' now"),
        ({"config": {"train": {"batch": 8}}}, "base train.batch: 32 then, 8 now"),
        ({"search": "random"}, "search: 'grid' then, 'random' now"),
    ],
)
def test_a_sweep_of_the_same_name_that_is_another_is_refused(changes: Any, says: str, tmp_path: Path) -> None:
    made(tmp_path)
    if "config" in changes:
        changes = {"config": base(tmp_path, **changes["config"])}
    with pytest.raises(ClusterError) as raised:
        made(tmp_path, **changes)
    assert says in str(raised.value)
    assert "another name (--name)" in str(raised.value)


def test_what_results_do_not_depend_on_may_change_and_trials_may_be_added_until_test_rows_were_seen(
    tmp_path: Path,
) -> None:
    made(tmp_path, trials=2)
    sweep = made(tmp_path, config=base(tmp_path, evaluate={"batch": 3}), trials=4, seeds=5)
    assert len(sweep.trials) == 4
    assert len({trial.parameters["train.lr"] for trial in sweep.trials}) == 4
    Tune(sweep, lambda _: scores(1.0)).go()
    assert sweep.winner is not None
    again = made(tmp_path, trials=4)
    tune = Tune(again, lambda _: scores(1.0))
    tune.go()
    assert tune.given == ["winner"]  # its run had not been recorded
    with pytest.raises(ClusterError, match="looked at test rows"):
        made(tmp_path, trials=5)


def test_optuna_goes_on_from_the_file_and_learns_from_scores(tmp_path: Path) -> None:
    space = Space(
        "mine", {}, {"train.lr": Parameter("loguniform", (), 0.001, 1.0), "seed": Parameter("choice", (0, 1))}
    )

    def learn(sweep: Sweep) -> Callable[[str], list[dict[str, Any]]]:
        return lambda name: scores(
            -abs(sweep.trials[int(name[:4])].parameters["train.lr"] - 0.1) if name[0] == "0" else 0
        )

    options: dict[str, Any] = {"search": "optuna", "trials": 24, "scheduler": "none"}
    whole = made(tmp_path / "a", space, **options)
    assert whole.trials == []
    Tune(whole, learn(whole)).go()
    first = made(tmp_path / "b", space, **options)
    Tune(first, learn(first)).go(7)
    again = made(tmp_path / "b", space, **options)
    Tune(again, learn(again)).go()
    assert [t.parameters for t in again.trials] == [t.parameters for t in whole.trials]
    late = [abs(trial.parameters["train.lr"] - 0.1) for trial in whole.trials[12:]]
    early = [abs(trial.parameters["train.lr"] - 0.1) for trial in whole.trials[:10]]
    assert sorted(late)[6] < sorted(early)[5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trials": 0}, "trials is 0; it must be at least 1"),
        (
            {"metric": "val_opp"},
            "metric 'val_opp' is unknown; known: val_op, forgetting, seconds; did you mean 'val_op'",
        ),
        ({"scheduler": "ahsa"}, "did you mean 'asha'"),
        ({"scheduler": "pbt"}, "scheduler pbt is not offered: it copies weights"),
        ({"search": "bayes"}, "search 'bayes' is unknown; known: random, optuna, grid"),
        ({"time_budget": 0.0}, "time budget is 0"),
        ({"grace": 0.0}, "grace is 0"),
        ({"concurrency": 0, "seeds": 0}, "concurrency is 0"),
    ],
)
def test_what_cannot_be_searched_is_said(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ClusterError) as raised:
        SweepOptions(**options)
    assert says in str(raised.value)


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    from treelora_ray.cluster.sweep import sweep

    with pytest.raises(ConfigError, match="name is 'a/b'"):
        sweep(base(tmp_path), SweepOptions(space="smoke", name="a/b"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cluster", "resources", "room"),
    [
        ({}, {"CPU": 2.0}, 2),
        ({"cpus_per_worker": 2}, {"CPU": 5.0}, 2),
        ({"workers": 2}, {"CPU": 4.0}, 2),
        ({"workers": 2}, {"CPU": 5.0, "GPU": 1.0}, 2),
        ({"workers": [1, 3]}, {"CPU": 5.0}, 1),
        ({"workers": 2, "gpus_per_worker": 1}, {"CPU": 64.0, "GPU": 6.0}, 3),
        ({"gpus_per_worker": 1}, {"CPU": 64.0}, 1),
    ],
)
def test_there_are_never_more_trials_at_once_than_all_their_workers_have_room(
    cluster: dict[str, Any], resources: dict[str, float], room: int, tmp_path: Path
) -> None:
    assert at_once(base(tmp_path, cluster=cluster), resources) == room


# -- a trial's run


def record(number: int, *scored: float | None) -> dict[str, Any]:
    return {"tasks": [number], "scores": list(scored), "effort": {"seconds": {"train": 1.5, "evaluate": 0.5}}}


def test_progress_is_the_share_of_steps_and_the_score_the_mean_over_tasks_learnt() -> None:
    told: list[dict[str, Any]] = []
    scores = Scores(told.append)
    scores.starts([30, 10, 60], [record(0, 80.0, None, None)])
    scores.starts([30, 10, 60], [record(0, 80.0, None, None)])  # workers that begin again say it again
    scores.scored(record(1, 60.0, 90.0, 5.0))  # a task that is not learnt yet does not count
    scores.scored(record(2, 60.0, 90.0, 30.0))
    assert [each["percent"] for each in told] == [30.0, 40.0, 100.0]
    assert [each["val_op"] for each in told] == [80.0, 75.0, 60.0]
    assert [each["forgetting"] for each in told] == [0.0, 20.0, 10.0]
    assert [each["seconds"] for each in told] == [2.0, 4.0, 6.0]


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of three tasks, and what happened in it."""
    seen: list[str] = []
    alone = threading.Lock()

    def run(_: Any, listener: Listener, stop: Callable[[], bool], **__: Any) -> None:
        assert alone.acquire(blocking=False), "two runs at once"
        try:
            listener.starts([1, 1, 1], [])
            for number in range(3):
                if stop():
                    seen.append("stopped")
                    raise Stopped("here")
                seen.append(f"task {number}")
                listener.scored(record(number, *[50.0] * (number + 1), *[None] * (2 - number)))
            seen.append("finished")
        finally:
            alone.release()

    monkeypatch.setattr(inner_runs, "run", run)
    return seen


def test_a_run_goes_on_when_its_scores_were_heard(lives: list[str], tmp_path: Path) -> None:
    work = Work(base(tmp_path))
    assert work.next(9)["percent"] == pytest.approx(100 / 3)
    assert lives == ["task 0"]
    assert work.next(9)["val_op"] == 50.0
    assert lives == ["task 0", "task 1"]
    assert not work.next(9)["done"]
    assert work.next(9)["done"]
    work.end()
    assert lives[-1] == "finished"


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_a_run_that_is_ended_stops_where_it_is_before_another_begins(
    heard: int, lives: list[str], tmp_path: Path
) -> None:
    work = Work(base(tmp_path))
    for _ in range(heard):
        work.next(9)
    work.end()
    assert lives[-1] == "stopped"
    other = Work(base(tmp_path))
    other.next(9)
    other.end()


def test_while_a_task_is_learnt_the_last_scores_are_said_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learnt = threading.Event()

    def run(_: Any, listener: Listener, stop: Callable[[], bool], **__: Any) -> None:  # noqa: ARG001
        listener.starts([1], [])
        learnt.wait()
        listener.scored(record(0, 50.0))

    monkeypatch.setattr(inner_runs, "run", run)
    work = Work(base(tmp_path))
    assert work.next(0.01) == {"percent": 0.0, "done": False}
    learnt.set()
    assert work.next(9)["val_op"] == 50.0
    work.end()


def test_what_ends_a_run_is_raised_where_tune_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(inner_runs, "run", run)
    work = Work(base(tmp_path))
    with pytest.raises(OSError, match="disk is full"):
        work.next(9)
    work.end()


@pytest.mark.parametrize(("last", "becomes"), [("learnt", "waiting"), ("ends", "finished")])
def test_a_finished_trial_that_never_said_its_end_is_taken_up_again_to_say_it(
    last: str, becomes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver was killed between the last task and the end: MLflow would show it running for ever."""
    monkeypatch.setenv("TREELORA_TRACKING", "mlflow")
    delivered: list[Path] = []
    monkeypatch.setattr(inner_runs, "sync", delivered.append)
    sweep = made(tmp_path)
    trial = sweep.trials[0]
    trial.state = "finished"
    folder = sweep.folder.path / trial.run
    folder.mkdir(parents=True)
    journal = [{"kind": kind, "at": 0} for kind in ("begins", last)]
    (folder / JOURNAL).write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    inner_runs.deliver(sweep.folder.path, sweep.base, sweep.trials, Listener().note)
    assert trial.state == becomes
    assert delivered == ([folder] if last == "ends" else [])
