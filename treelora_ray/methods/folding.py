"""Adapters that go into the weights when their task is learnt; the weights as loaded come back where asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.core.layout import Layout
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method
from treelora_ray.methods.learner import Learner


def fresh(learner: Learner) -> Tensor:
    """[total] A drawn as a new adapter's is, from seed and task; B = 0."""
    found = torch.zeros(learner.layout.total)
    for name, (a, _) in learner.layout.views(found):
        generator = memory.generator(f"{learner.config.seed}/{learner.unit_name}/{name}/fresh")
        bound = 1 / math.sqrt(a.shape[1])  # what kaiming_uniform_ with a = sqrt(5) draws from
        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
    return found


def side_by_side(layout: Layout, adapters: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer [A_1; A_2; ...] and [B_1, B_2, ...], whose product is the sum of the adapters' products."""
    found = [dict(layout.views(adapter)) for adapter in adapters]
    return {
        name: (torch.cat([part[name][0] for part in found]), torch.cat([part[name][1] for part in found], dim=1))
        for name in layout.names
    }


class Folding(Method):
    """What methods have in common that fold. Each task has a fresh adapter, the first one the anchor."""

    starts_from = "fresh, on weights with the tasks before folded in"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        self.folded: list[Tensor] = []  # adapters [total] in the order in which they went into the weights
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}  # by layer: as loaded, and with all that was folded in

    def before_task(self) -> None:
        if self.folded:
            self.learner.adapter.copy_(fresh(self.learner))

    def after_task(self) -> None:
        self.fold(self.learner.adapter.clone())
        self.learner.adapter.copy_(self.learner.anchor)

    @torch.no_grad()
    def fold(self, adapter: Tensor) -> None:
        """W <- W + s B A, in each layer; the weights as loaded are kept for `plain`."""
        model = self.learner.model
        self.folded.append(adapter)
        for name, (a, b) in self.learner.layout.views(adapter):
            linear = model.linear(name)
            if name not in self.weights:
                self.weights[name] = linear.weight.data, linear.weight.data.clone()
            now = self.weights[name][1]
            delta = model.scaling * (b @ a)
            now.add_((delta.T if model.transposed(name) else delta).to(now.dtype))
            linear.weight.data = now

    def factors(self, task: int) -> dict[str, tuple[Tensor, Tensor]]:
        """All that was folded in."""
        return side_by_side(self.learner.layout, self.folded) if self.folded else super().factors(task)

    def plain(self) -> AbstractContextManager[None]:
        return self._unfolded()

    @contextmanager
    def _unfolded(self) -> Iterator[None]:
        model = self.learner.model
        for name, (loaded, _) in self.weights.items():
            model.linear(name).weight.data = loaded
        try:
            with model.plain():
                yield
        finally:
            for name, (_, now) in self.weights.items():
                model.linear(name).weight.data = now

    def tensors(self) -> dict[str, Tensor]:
        return {f"folded.{number}": adapter for number, adapter in enumerate(self.folded)}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        for number in range(len(tensors)):
            self.fold(tensors[f"folded.{number}"].to(self.learner.device))
