"""The process ends, as by SIGKILL, at each call that touches the disk while a checkpoint is written; it resumes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.contract.test_methods import Recorder, assert_same, recorder
from treelora_ray import files
from treelora_ray.training.state import Checkpoints

OPTIONS = {"name": "treelora", "guide": {"gate": 0.0}}
TRAIN = {"checkpoint_every": 4}
SAVES = (2, 3)  # one in the middle of the second task, and the one at its end, which stores its adapter too
CALLS = [(os, "open"), (os, "fsync"), (os, "replace"), (Path, "open"), (Path, "unlink"), (Path, "read_bytes")]
ENDED = 9


def learn(folder: Path, backbone: Path) -> Recorder:
    made = recorder(folder, backbone, OPTIONS, tasks=2, train=TRAIN)
    made.resume()
    made.go()
    return made


def dying(at: int, save: int, patch: pytest.MonkeyPatch) -> list[str]:
    """From now on the process ends before the `at`-th such call of the `save`-th checkpoint; the calls so far."""
    calls: list[str] = []
    saves = [0]
    inside = [False]

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if inside[0]:
                calls.append(name)
                if len(calls) == at:
                    os._exit(ENDED)
            return original(*arguments, **keywords)

        return call

    for owner, name in CALLS:
        patch.setattr(owner, name, wrapped(name, getattr(owner, name)))
    original = Checkpoints.save

    def saving(self: Checkpoints, *arguments: Any) -> Path:
        saves[0] += 1
        inside[0] = saves[0] == save
        try:
            return original(self, *arguments)
        finally:
            inside[0] = False

    patch.setattr(Checkpoints, "save", saving)
    return calls


@pytest.mark.parametrize("save", SAVES)
def test_a_crash_at_any_call_while_a_checkpoint_is_written_costs_steps_and_nothing_else(
    save: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny.vit(tmp_path / "vit")
    with monkeypatch.context() as patch:
        calls = dying(0, save, patch)
        whole = learn(tmp_path / "whole", backbone)
    assert calls.count("fsync") >= 2
    assert "replace" in calls
    for at in range(1, len(calls) + 1):
        folder = tmp_path / str(at)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                dying(at, save, patch)
                learn(folder, backbone)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == ENDED, calls[at - 1]
        assert_same(whole, learn(folder, backbone))


def test_the_checkpoint_before_is_kept_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was written last can be read, and nothing half written lies about."""
    backbone = tiny.vit(tmp_path / "vit")
    made = recorder(tmp_path / "run", backbone, OPTIONS, tasks=2, train=TRAIN)
    original, writes = files.write_atomically, [0]

    def full(path: Path, data: bytes) -> None:
        writes[0] += 1
        if writes[0] == 6:
            raise OSError(28, "No space left on device")
        original(path, data)

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        made.go()
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    resumed = recorder(tmp_path / "run", backbone, OPTIONS, tasks=2, train=TRAIN)
    assert resumed.resume()
    resumed.go()
    whole = recorder(tmp_path / "whole", backbone, OPTIONS, tasks=2, train=TRAIN)
    whole.go()
    assert torch.equal(whole.learner.theta, resumed.learner.theta)
