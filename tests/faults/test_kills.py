"""Processes of a run are killed with SIGKILL at named points of the protocol and at random steps; the run goes on by
itself, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rays import config, state, together
from treelora_ray import run
from treelora_ray.cluster import run as cluster_run
from treelora_ray.cluster.worker import work

TARGETS = ("worker", "guide", "controller")
POINTS = {  # by point: what is wrapped, in which process of the run it is called, and the mode that has it
    "during the probe": ("treelora_ray.cluster.guide_actor", "RemoteGuide", "probe", "treelora"),
    "between select and observe": ("treelora_ray.cluster.guide_actor", "RemoteGuide", "observe", "paper"),
    "inside after_task": ("treelora_ray.cluster.guide_actor", "RemoteGuide", "insert", "treelora"),
    "between snapshot and report": ("treelora_ray.cluster.desk", "Reporter", "saved", "treelora"),
    "at a step": ("treelora_ray.cluster.desk", "Reporter", "step", "treelora"),
}


def schedules(count: int, first: int, marks: Any = ()) -> list[Any]:
    """(point, call at which it happens, target), drawn by the seed; every point and target comes up."""
    drawn = []
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        point = list(POINTS)[seed % len(POINTS)]
        target = TARGETS[seed % len(TARGETS)]
        drawn.append(pytest.param(point, int(rng.integers(1, 4)), target, id=f"{target} {point} {seed}", marks=marks))
    return drawn


def killing(point: str, call: int, target: str, marker: Path) -> Callable[[dict[str, Any]], None]:
    """`work`, in which worker 0 kills the target once, at that call. A closure, so that it travels by value."""
    module, owner, method, _ = POINTS[point]

    def faulty(settings: dict[str, Any]) -> None:
        import importlib

        import psutil
        import ray

        cls, calls = getattr(importlib.import_module(module), owner), 0
        original = getattr(cls, method)

        def pid() -> int:
            if target == "worker":
                return os.getpid()
            if target == "guide":
                actor: Any = ray.get_actor(settings["guide"], namespace="treelora")
                return int(ray.get(actor.pid.remote()))
            raylet = psutil.Process(os.getpid()).parent()
            assert raylet is not None
            found: list[Any] = [child for child in raylet.children() if "TrainController" in " ".join(child.cmdline())]
            return int(found[0].pid)

        def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            leads = getattr(self, "leads", True)
            if calls == call and leads and not marker.exists():
                victim = pid()
                marker.write_text(str(victim))
                os.kill(victim, signal.SIGKILL)
            return original(self, *arguments, **keywords)

        setattr(cls, method, wrapped)
        try:
            work(settings)
        finally:
            setattr(cls, method, original)

    return faulty


pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def undisturbed(ray_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    together(ray_data, folder, ["treelora", "paper"], 2)
    return folder


@pytest.mark.parametrize(("point", "call", "target"), [*schedules(4, 0), *schedules(16, 4, marks=pytest.mark.slow)])
def test_a_run_survives_a_kill(
    point: str,
    call: int,
    target: str,
    undisturbed: Path,
    ray_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mode, marker = POINTS[point][3], tmp_path / "killed"
    monkeypatch.setattr(cluster_run, "work", killing(point, call, target, marker))
    run(config(ray_data, tmp_path, mode, cluster={"workers": 2}))
    assert marker.is_file(), "nothing was killed"
    assert not Path(f"/proc/{marker.read_text()}").exists()
    tensors, decided = state(tmp_path / mode)
    expected, expected_decided = state(undisturbed / mode)
    assert decided == expected_decided
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert value.equal(tensors[name]), name
