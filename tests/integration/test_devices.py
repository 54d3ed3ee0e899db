"""Runs on a GPU that is only said to be one: nothing mixes devices, and the CPU's results come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.test_runs import settings
from tests.rays import METHODS, config, state
from tests.rehearsal import rehearsal
from treelora_ray import run
from treelora_ray.models.backbone import Model
from treelora_ray.training.errors import Stopped
from treelora_ray.training.stream import Listener

MORE: dict[str, dict[str, Any]] = {
    "prox": {"penalty": "prox", "guide": {"gate": 0.0}},
    "budget": {"guide": {"gate": 0.0, "budget": 1}},
    "replay": {"name": "replay"},
    "joint": {"name": "joint"},
    "independent": {"name": "independent"},
}


class Counted(Listener):
    """Asks the run to stop in the middle of its second task."""

    def __init__(self) -> None:
        self.unit, self.steps = 0, 0

    def begins(self, number: int, of: int, name: str) -> None:  # noqa: ARG002
        self.unit, self.steps = number, 0

    def step(self, step: int, of: int, loss: float) -> None:  # noqa: ARG002
        self.steps += 1

    def stop(self) -> bool:
        return self.unit == 1 and self.steps == 2


def made(data: Path, folder: Path, name: str, device: str) -> dict[str, Any]:
    if name not in MORE:
        found = config(data, folder, name)
    else:
        found = {**settings(data / "vit", data / "images", folder, name=name), "method": MORE[name]}
    return {**found, "model": {**found["model"], "device": device}}


@pytest.mark.parametrize(
    "name", ["treelora", *(pytest.param(name, marks=pytest.mark.slow) for name in [*METHODS, "prompts", *MORE][1:])]
)
def test_a_run_that_is_stopped_and_goes_on_keeps_its_tensors_on_its_device(
    name: str, ray_data: Path, tmp_path: Path
) -> None:
    whole = run(made(ray_data, tmp_path / "cpu", name, "cpu"))
    counted = Counted()
    with rehearsal():
        gpu = made(ray_data, tmp_path / "gpu", name, "cuda")
        if name != "joint":
            with pytest.raises(Stopped):
                run(gpu, listener=counted, stop=counted.stop)
        done = run(gpu)
        assert done.result["device"] == "cuda"
        assert list(done.evaluate().values()) == whole.matrix[-1].tolist()
    np.testing.assert_array_equal(done.matrix, whole.matrix)
    (tensors, _), (expected, _) = state(done.folder), state(whole.folder)
    assert tensors.keys() == expected.keys()
    assert all(value.equal(tensors[key]) for key, value in expected.items())


def test_batches_come_from_pinned_memory_and_are_not_waited_for(
    ray_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Model.to_device, [0]

    with rehearsal() as calls:

        def to_device(self: Model, inputs: Any) -> Any:
            before = len(calls.moves)
            out = original(self, inputs)
            assert calls.moves[before:] == [(True, True)] * len(out)
            seen[0] += len(out)
            return out

        monkeypatch.setattr(Model, "to_device", to_device)
        run({**made(ray_data, tmp_path, "treelora", "cuda"), "train": {"steps": 2, "threads": 1}})
    assert seen[0] > 12  # pictures and targets of each step


def test_the_rehearsal_sees_what_a_gpu_refuses() -> None:
    with rehearsal():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(TypeError, match=r"\.cpu\(\) is missing"):
            there[:2].numpy()
        with pytest.raises(RuntimeError, match="two devices"):
            here.index_add_(0, torch.tensor([0], device="cuda"), here[:1])
        assert (there + 1).device.type == "cuda"
        assert (there[torch.tensor([0])] + torch.tensor(2.0)).is_cuda
        assert there.cpu().numpy().tolist() == here.copy_(there).tolist()
        assert not here.is_cuda
