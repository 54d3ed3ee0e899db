"""What a method trains beside the adapter: in the one buffer, stopped and resumed with it, and the adapter left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny, toys
from treelora_ray.config import Options
from treelora_ray.methods import options as known
from treelora_ray.methods.base import METHODS, Method, register
from treelora_ray.training.errors import Stopped
from treelora_ray.training.stream import StreamRun


class ShiftOptions(Options):
    """A vector of its own that is added to the features."""


class Shift(Method):
    adapts = False

    def __init__(self, learner: Any, options: Options) -> None:
        super().__init__(learner, options)
        self.shift = torch.zeros(learner.model.width)
        features = learner.model.features
        learner.model.features = lambda inputs: features(inputs) + self.now()

    def now(self) -> Tensor:
        own: Tensor = self.learner.own_parameter
        return own if own.numel() else self.shift

    def own_parameters(self) -> Tensor:
        return self.shift

    def after_task(self) -> None:
        self.shift = self.learner.own_parameter.detach().clone()

    def tensors(self) -> dict[str, Tensor]:
        return {"shift": self.shift}

    def load(self, tensors: Any, data: Any) -> None:  # noqa: ARG002
        self.shift = tensors["shift"]


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treelora_ray.methods.base.METHODS", dict(METHODS))
    monkeypatch.setitem(known.METHOD_OPTIONS, "shift", ShiftOptions)
    register("shift")(Shift)


def stream(folder: Path, backbone: Path, stop_after: int = 10**6) -> StreamRun:
    class Stopping(StreamRun):
        steps = 0

        def _after_step(self, *arguments: Any) -> None:
            self.steps += 1
            if self.steps == stop_after:
                self.stop = lambda: True
            super()._after_step(*arguments)

    folder.mkdir(exist_ok=True)
    made = toys.config(backbone, {"name": "shift"}, train={"weight_decay": 0.1})
    return Stopping(made, toys.stream(2), toys.method(made, None, "image"), folder)


@pytest.mark.usefixtures("shift")
def test_own_parameters_learn_and_the_adapter_stays(tmp_path: Path) -> None:
    made = stream(tmp_path / "run", tiny.vit(tmp_path / "vit"))
    before = made.learner.adapter.clone()
    made.go()
    assert torch.equal(made.learner.adapter, before)
    assert torch.count_nonzero(made.method.tensors()["shift"])
    assert made.learner.theta.numel() == before.numel() + made.learner.model.width * 3 + 2


@pytest.mark.usefixtures("shift")
@pytest.mark.parametrize("at", [2, 8])
def test_own_parameters_go_on_where_they_were(at: int, tmp_path: Path) -> None:
    backbone = tiny.vit(tmp_path / "vit")
    whole = stream(tmp_path / "whole", backbone)
    whole.go()
    stopped = stream(tmp_path / "parts", backbone, at)
    with pytest.raises(Stopped):
        stopped.go()
    resumed = stream(tmp_path / "parts", backbone)
    assert resumed.resume()
    resumed.go()
    assert torch.equal(resumed.learner.theta, whole.learner.theta)
    assert torch.equal(resumed.method.tensors()["shift"], whole.method.tensors()["shift"])
