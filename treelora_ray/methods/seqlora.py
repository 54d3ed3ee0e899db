"""One adapter for all tasks, one after the other: what every method is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import SeqLoraOptions


@register("seqlora")
class SeqLora(Method):
    keeps = "one adapter (merge_new: all, folded into the weights)"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, SeqLoraOptions)
        self.folds = options.variant == "merge_new"
        self.folded: list[Tensor] = []  # adapters [total] in the order in which they went into the weights
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}  # by layer: as loaded, and with all that was folded in

    def after_task(self) -> None:
        if self.folds:
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
        """All that was folded in, side by side: [A_1; A_2; ...] and [B_1, B_2, ...]."""
        if not self.folds:
            return super().factors(task)
        found = [dict(self.learner.layout.views(adapter)) for adapter in self.folded]
        return {
            name: (torch.cat([part[name][0] for part in found]), torch.cat([part[name][1] for part in found], dim=1))
            for name in self.learner.layout.names
        }

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
