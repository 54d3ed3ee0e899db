"""Sweeps of small runs: on Ray, through the command line, killed and given again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_runs import call, config_file, settings
from tests.rays import Notes, state
from treelora_ray import Run, run
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.sweep import sweep
from treelora_ray.cluster.sweep_plan import SweepOptions
from treelora_ray.cluster.sweep_trial import Work
from treelora_ray.config import from_mapping, load
from treelora_ray.tracking.journal import read

RATES = [0.01, 1.0, 1e30, 0.02]  # good, hopeless, infinite, good


def space(folder: Path, rates: list[float]) -> str:
    path = folder / "rates.py"
    path.write_text(f"from ray import tune\n\n\ndef rates():\n    return {{'train.lr': tune.grid_search({rates})}}\n")
    return str(path)


def base(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    train = {"clip": None, "threads": 1, "lr": 0.5}
    return {**settings(data / "vit", data / "images", folder, **{"train": train, **changes}), "name": "base"}


def options(folder: Path, rates: list[float], **changes: Any) -> SweepOptions:
    found: dict[str, Any] = {
        "trials": len(rates),
        "search": "grid",
        "seeds": 2,
        "top": 1,
        "concurrency": 1,
        "grace": 50.0,
    }
    return SweepOptions(space=space(folder, rates), name="s", **{**found, **changes})


class Guarded(Notes):
    """Test rows are there once the winner has been named, and not before."""

    def __init__(self, data: Path) -> None:
        super().__init__()
        self.hidden = {path: path.read_bytes() for path in data.rglob("test.parquet")}
        for path in self.hidden:
            path.unlink()

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith("the winner is"):
            for path, rows in self.hidden.items():
                path.write_bytes(rows)


@pytest.mark.usefixtures("cluster")
def test_a_sweep_finds_the_best_config_without_a_look_at_test_rows(ray_data: Path, tmp_path: Path) -> None:
    shutil.copytree(ray_data, tmp_path / "data")
    config, wanted = from_mapping(base(tmp_path / "data", tmp_path / "runs")), options(tmp_path, RATES)
    notes = Guarded(tmp_path / "data")
    done = sweep(config, wanted, listener=notes)
    assert [trial.state for trial in done.trials] == ["finished", "stopped", "failed", "finished"]
    assert [len(trial.history) for trial in done.trials] == [3, 2, 0, 3]
    assert done.trials[1].history[-1]["percent"] == pytest.approx(200 / 3)
    assert str(done.trials[2].error).startswith("NonFiniteError: task 't0', step")
    assert [(trial.of, trial.seed, trial.state) for trial in done.again] == [("0000", 1, "finished")]
    folder = tmp_path / "runs" / "s"
    stopped = Run(folder / "trials" / "0001")
    assert (stopped.finished, stopped.tasks) == (False, ["t0", "t1"])
    assert done.winner is not None
    assert done.winner["test"]["op"] == Run(folder / "winner").metrics["op"]
    best = load(folder / "best.yaml")
    assert (best.train.lr, best.stream.holdout, best.name) == (0.01, None, "s-best")
    written = json.loads((folder / "sweep.json").read_text())
    assert written["winner"] == done.winner
    assert [trial["val_op"] for trial in written["trials"]][2] is None
    # Trials look at a task once.
    (effort,) = [record["effort"] for record in Run(folder / "trials" / "0003").result["records"]][:1]
    assert effort["reused"]["probe_rounds"] == effort["probe_rounds"] > 0
    assert done.trials[3].history[0]["seconds"] > sum(effort["seconds"].values())
    assert not (folder / ".looks").exists()
    assert "on further seeds" in (folder / "report.html").read_text()
    # A trial is the run of its config, and the winner that of best.yaml, to the bit.
    for name in ("trials/0000", "winner"):
        own = load(folder / name / "config.yaml", [f"folder={tmp_path / 'alone'}"])
        run(own)
        (tensors, decided), (expected, expected_decided) = (
            state(folder / name),
            state(tmp_path / "alone" / str(own.name)),
        )
        assert decided == expected_decided
        assert all(value.equal(tensors[key]) for key, value in expected.items())
    # Given again there is nothing to do, and more trials would be chosen by test rows.
    before = (folder / "winner" / "result.json").stat().st_mtime_ns
    again = sweep(config, wanted, listener=notes)
    assert (again.winner, (folder / "winner" / "result.json").stat().st_mtime_ns) == (done.winner, before)
    with pytest.raises(ClusterError, match="looked at test rows"):
        sweep(config, options(tmp_path, RATES, trials=5), listener=notes)


def test_a_trial_that_is_stopped_has_said_what_it_learnt_and_ends_as_killed(
    backbone: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELORA_TRACKING", "journal")
    work = Work(from_mapping(settings(backbone, data, tmp_path / "runs")))
    first = work.next(60)
    while first["percent"] == 0:
        first = work.next(60)
    work.end()
    folder = tmp_path / "runs" / "r"
    kinds = [entry["kind"] for entry in read(folder / "journal.jsonl")]
    assert (kinds.count("learnt"), kinds[-1]) == (1, "ends")
    assert read(folder / "journal.jsonl")[-1]["status"] == "KILLED"
    assert Run(folder).tasks == ["t0"]
    assert Run(folder).metrics["op"] == first["val_op"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--space", "smok"], "did you mean 'smoke'"),
        (["--space", "smoke", "--trials", "0"], "trials is 0"),
        (["--space", "smoke", "--metric", "acc"], "metric 'acc' is unknown; known: val_op"),
        (["--space", "smoke", "--scheduler", "pbt"], "scheduler pbt is not offered"),
        (["--space", "smoke", "--time-budget", "soon"], "write it like 2h, 90m or 1h30m"),
        (["--space", "smoke", "--concurrency", "many"], "auto, or how many"),
        (["--space", "smoke", "--search", "grid"], "method.lambda is a range, which no grid covers"),
        (["--space", "smoke", "model.lora.rnk=3"], "did you mean model.lora.rank"),
    ],
)
def test_a_mistake_is_said_before_anything_begins(
    given: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("sweep", "quickstart", f"folder={tmp_path}", *given) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.rglob("sweep.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_trials_with_workers_of_their_own_run_at_once_and_all_end(ray_data: Path, tmp_path: Path) -> None:
    """Two of two workers each fill the cluster's four CPUs; a third is asked for and does not fit."""
    notes = Notes()
    config = from_mapping(base(ray_data, tmp_path / "runs", cluster={"workers": 2}, stream={"tasks": ["t0", "t1"]}))
    wanted = options(tmp_path, [0.01, 0.02], concurrency=3, seeds=1, scheduler="none")
    done = sweep(config, wanted, listener=notes)
    assert [trial.state for trial in done.trials] == ["finished", "finished"]
    assert any("3 trials at once are more than the cluster has room for: 2 at once" in note for note in notes.notes)
    assert done.winner is not None
    assert Run(tmp_path / "runs" / "s" / "winner").finished


def command(data: Path, folder: Path, *more: str) -> list[str]:
    file = config_file(folder / "base.yaml", base(data, folder / "runs", cluster={"address": "local"}))
    given = ["--space", space(folder, [0.01, 0.02, 0.03, 0.04]), "--name", "s", "--search", "grid", "--seeds", "1"]
    return [sys.executable, "-m", "treelora_ray", "sweep", file, *given, "--scheduler", "none", "--trials", "4", *more]


def of_sweep(folder: Path) -> list[dict[str, Any]]:
    path = folder / "runs" / "s" / "sweep.json"
    return list(json.loads(path.read_text())["trials"]) if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_goes_on_and_mlflow_shows_all_trials_below_one_parent(
    how: signal.Signals, ray_data: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "TREELORA_TRACKING": "mlflow", "TREELORA_CACHE": str(tmp_path / "cache")}
    given = command(ray_data, tmp_path, "train.steps=60", "stream.tasks=[t0,t1,t2]")
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(given, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 400
        while not any(trial["state"] == "finished" for trial in of_sweep(tmp_path)):
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        os.kill(driver.pid, how)
        code = driver.wait(120)
    said = (tmp_path / "log").read_text()
    assert code == (130 if how == signal.SIGINT else -how), said
    before = of_sweep(tmp_path)
    finished = [trial["id"] for trial in before if trial["state"] == "finished"]
    assert 1 <= len(finished) < 4
    results = {
        name: (tmp_path / "runs" / "s" / "trials" / name / "result.json").stat().st_mtime_ns for name in finished
    }
    done = subprocess.run(given, capture_output=True, text=True, check=False, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on with {tmp_path / 'runs' / 's'}: {len(finished)} of 4 trials have ended" in done.stdout
    assert {trial["state"] for trial in of_sweep(tmp_path)} == {"finished"}
    for name, time_ns in results.items():
        assert (tmp_path / "runs" / "s" / "trials" / name / "result.json").stat().st_mtime_ns == time_ns
    assert "Traceback" not in done.stdout + done.stderr
    _require_one_parent(tmp_path / "runs")


def _require_one_parent(runs: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    found = client.search_runs([experiment.experiment_id])
    parents = [each for each in found if "treelora.group" in each.data.tags]
    children = [each for each in found if "mlflow.parentRunId" in each.data.tags]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    files = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert files >= {"report.html", "best.yaml", "sweep.json"}
    assert {each.data.tags["mlflow.parentRunId"] for each in children} == {parents[0].info.run_id}
    assert sorted(each.info.run_name for each in children) == ["0000", "0001", "0002", "0003", "winner"]
    assert {each.info.status for each in children} == {"FINISHED"}
    assert {each.data.params["train.lr"] for each in children} == {"0.01", "0.02", "0.03", "0.04"}
