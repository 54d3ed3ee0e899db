"""Runs on a Ray cluster of this machine: what one process learns, workers learn too."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.rays import METHODS, Notes, config, state, together
from treelora_ray import run
from treelora_ray.cluster import submit
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.run import ENVIRONMENT, connected
from treelora_ray.config import ClusterConfig
from treelora_ray.training.errors import NonFiniteError, Stopped
from treelora_ray.training.record import SUBMISSION
from treelora_ray.training.stream import Listener


@pytest.mark.usefixtures("cluster")
def test_one_worker_learns_what_one_process_does_to_the_bit_and_two_within_rounding(
    ray_data: Path, tmp_path: Path
) -> None:
    names = [*METHODS, "prompts", "prior"]
    for name in names:
        done = run(config(ray_data, tmp_path / "local", name))
        if name == "treelora":
            done.export_tree(tmp_path / "tree.safetensors")
    together(ray_data, tmp_path / "one", names, 1)
    together(ray_data, tmp_path / "two", names, 2)
    for name in names:
        local, decided = state(tmp_path / "local" / name)
        one, decided_one = state(tmp_path / "one" / name)
        two, decided_two = state(tmp_path / "two" / name)
        assert decided["finished"]
        assert decided == decided_one == decided_two, name
        assert local.keys() == one.keys() == two.keys(), name
        for key, value in local.items():
            assert torch.equal(value, one[key]), (name, key)
            torch.testing.assert_close(
                value, two[key], rtol=1e-3, atol=1e-5, msg=partial("{} {}: {}".format, name, key)
            )


@pytest.mark.usefixtures("cluster")
def test_a_run_is_stopped_at_a_checkpoint_and_goes_on_with_another_number_of_workers(
    ray_data: Path, tmp_path: Path
) -> None:
    notes = Notes()
    made = config(ray_data, tmp_path, "treelora", cluster={"workers": 3}, train={"steps": 200})
    with pytest.raises(Stopped):
        run(made, listener=notes, stop=lambda: notes.steps > 0)
    assert any("8 rows over 3 workers: 2 take 3 of each step, the others 2" in note for note in notes.notes)
    assert not (tmp_path / "treelora" / "result.json").exists()
    again = {**made, "cluster": {"workers": 1}, "train": {**made["train"]}}
    done = run({**again, "stream": {**made["stream"], "tasks": ["t0"]}}, listener=notes)
    assert done.tasks == ["t0"]
    assert any(note.startswith("going on with") for note in notes.notes)


@pytest.mark.usefixtures("cluster")
def test_a_loss_that_is_not_finite_ends_the_run_with_task_and_step(ray_data: Path, tmp_path: Path) -> None:
    made = config(ray_data, tmp_path, "seqlora", cluster={"workers": 2}, train={"lr": 1e30, "clip": None, "epochs": 4})
    with pytest.raises(NonFiniteError, match="task 't0', step"):
        run(made)


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_the_cluster_has_room_for_are_said_at_once_and_refused_in_time(
    ray_data: Path, tmp_path: Path
) -> None:
    notes = Notes()
    made = config(ray_data, tmp_path, "seqlora", cluster={"workers": 9, "wait": 0.5})
    with pytest.raises(ClusterError, match=r"did not grow within 0\.5 s .*: 9 CPU are asked for, 4 exist"):
        run(made, listener=notes)
    assert any("waiting for the cluster to grow" in note for note in notes.notes)


def test_no_cluster_at_the_address_is_said(ray_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**_: Any) -> None:
        raise ConnectionError("could not connect")

    monkeypatch.setattr(ray, "init", refuse)
    made = config(ray_data, tmp_path, "seqlora", cluster={"workers": 1, "address": "127.0.0.1:1"})
    with pytest.raises(ClusterError, match=r"no cluster answers at 127\.0\.0\.1:1: could not connect"):
        run(made)


def test_the_driver_of_a_job_sends_nothing_that_the_job_has_sent_already(
    ray_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses a driver whose environment names a variable of its job's, even with the same value."""
    from ray.runtime_env.runtime_env import RuntimeEnv, _merge_runtime_env

    job: dict[str, Any] = {"env_vars": submit.ENVIRONMENT}
    for name, value in submit.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    told = {"runtime_env": job, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    asked: list[dict[str, Any]] = []

    def init(**keywords: Any) -> None:
        asked.append(keywords["runtime_env"])
        raise ConnectionError("far enough")

    monkeypatch.setattr(ray, "init", init)
    made = config(ray_data, tmp_path, "seqlora", cluster={"workers": 1, "address": "127.0.0.1:1"})
    with pytest.raises(ClusterError, match="far enough"):
        run(made)
    merged = _merge_runtime_env(RuntimeEnv(**job), RuntimeEnv(**asked[0]))
    assert merged is not None
    assert merged["env_vars"].keys() >= ENVIRONMENT.keys()
    assert merged["env_vars"][SUBMISSION] == "raysubmit_1"


def test_a_signal_asks_the_run_to_stop_where_ray_would_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)))
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        with connected(ClusterConfig(address="127.0.0.1:1"), Listener()):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
