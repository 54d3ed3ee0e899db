"""TaSL: after a task each part of the adapter is the old one, the new one or between, by whom it matters to.

Feng et al. 2024, arXiv 2408.09857; the longer paper, with parts by rank and soft weights, is arXiv 2408.05200.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.core.layout import Layout
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import TaslOptions


@register("tasl")
class Tasl(Method):
    """theta <- w theta_old + (1 - w) theta after each task, w by unit: a row of A with its column of B, or a matrix."""

    keeps = "one adapter, a number for each unit of it"
    starts_from = "the task before"
    step_cost = "a few operations on the adapter, three more of its size"
    reduces = "gradient; once a task the units' scores, from worker 0"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, TaslOptions)
        self.options, self.by_rank = options, options.unit == "rank"
        self.importance: Tensor | None = None  # [units] from 0 to 1, to the tasks learnt so far
        # While a task is learnt, each [total]: the adapter it began with, |theta g| smoothed, its distance from that.
        self.moving: dict[str, Tensor] = {}
        self.said: dict[str, Any] = {}

    def before_task(self) -> None:
        adapter = self.learner.adapter
        self.moving = {"before": adapter.clone(), "trend": adapter.new_zeros(len(adapter))}
        self.moving["swing"] = self.moving["trend"].clone()

    @torch.no_grad()
    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        learner, options = self.learner, self.options
        if step < min(options.warmup, learner.steps // 2):
            return
        trend, swing = self.moving["trend"], self.moving["swing"]
        now = (learner.adapter * learner.adapter_grad).abs()
        trend.lerp_(now, 1 - options.beta_1)
        swing.lerp_((now - trend).abs(), 1 - options.beta_2)

    @torch.no_grad()
    def after_task(self) -> None:
        learner, keep = self.learner, self.options.keep_importance
        scores = by_unit(learner.layout, self.moving["trend"] * self.moving["swing"], self.by_rank)
        told = learner.comm.share(scores.tolist() if learner.comm.rank == 0 else None)
        new = normalised(torch.tensor(told, dtype=torch.float64, device=learner.device))
        before, self.moving, self.said = self.moving["before"], {}, {}
        if self.importance is None:
            self.importance = new
            return
        shares = self.old_shares(self.importance, new)
        learner.adapter.copy_(learner.adapter.lerp(before, spread(learner.layout, shares, self.by_rank)))
        self.importance = normalised(keep * self.importance + (1 - keep) * new)

    def old_shares(self, old: Tensor, new: Tensor) -> Tensor:
        """[units] the share of the old adapter in each, by its importance to the tasks before and to the new one."""
        options = self.options
        if options.weights == "softmax":
            found = torch.sigmoid((old - new) / options.temperature)
            self.said = {"old_share": float(found.mean())}
            return found
        matters = [each >= each.quantile(options.quantile) for each in (old, new)]
        kinds = {"both": (True, True), "old": (True, False), "new": (False, True), "neither": (False, False)}
        parts = {"both": options.keep, "old": 1.0, "new": 0.0, "neither": 0.5}
        found, counts = torch.zeros_like(old), {}
        for kind, (to_old, to_new) in kinds.items():
            which = (matters[0] == to_old) & (matters[1] == to_new)
            found[which], counts[kind] = parts[kind], int(which.sum())
        self.said = {"units": counts}
        return found

    def tensors(self) -> dict[str, Tensor]:
        return self.moving | ({} if self.importance is None else {"importance": self.importance})

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.moving = {name: value.to(self.learner.device) for name, value in tensors.items()}
        self.importance = self.moving.pop("importance", None)

    def report(self) -> dict[str, Any]:
        return self.said


def by_unit(layout: Layout, values: Tensor, by_rank: bool) -> Tensor:
    """Means of [total] over each unit, in double precision: [units], layer by layer."""
    found = []
    for _, (a, b) in layout.views(values.double()):
        if by_rank:
            found.append((a.sum(1) + b.sum(0)) / (a.shape[1] + b.shape[0]))
        else:
            found.append(torch.stack([a.mean(), b.mean()]))
    return torch.cat(found)


def spread(layout: Layout, values: Tensor, by_rank: bool) -> Tensor:
    """[units] -> [total]: to each place of the adapter the value of its unit."""
    found, at = torch.empty(layout.total, device=values.device), 0
    for _, (a, b) in layout.views(found):
        units = values[at : at + (len(a) if by_rank else 2)].float()
        at += len(units)
        if by_rank:
            a.copy_(units.unsqueeze(1).expand_as(a))
            b.copy_(units.expand_as(b))
        else:
            a.fill_(units[0])
            b.fill_(units[1])
    return found


def normalised(values: Tensor) -> Tensor:
    """From 0, the least, to 1, the largest; 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
