"""SLAO: one adapter goes on from task to task, and its merged twin answers for all.

Merge before forget, 2025, arXiv 2512.23017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import SlaoOptions

WEAK = 1e-6  # what a row adds to those before it, beside what the strongest adds: below, it adds nothing


@register("slao")
class Slao(Method):
    """A is that of the last task, B a weighted mean over tasks; training goes on from the B as it was trained."""

    keeps = "two adapters: as last trained, and merged"
    starts_from = "the task before, with the rows of its A made orthonormal"
    reduces = "gradient; worker 0 tells a task's start; head ncm: counts and sums of features"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, SlaoOptions)
        self.options = options
        self.merged: Tensor | None = None  # [total] A of the last task, B of all: what answers
        self.turned: dict[str, float] = {}  # by layer, degrees by which the last task turned what A reads
        if options.head == "ncm" and learner.objective.kind != "classification":
            raise ConfigError(
                "method.head is 'ncm', the class means of features, but a language model has no head: leave it out"
            )
        for name, (a, _) in learner.model.layers.items():
            if a.shape[0] > a.shape[1]:
                raise ConfigError(
                    f"model.lora.rank is {a.shape[0]}, but slao needs as many orthogonal rows, and layer {name} has "
                    f"inputs of {a.shape[1]} values: use {a.shape[1]} at most"
                )

    def answer(self, task: int) -> Tensor:  # noqa: ARG002
        return self.learner.adapter if self.merged is None else self.merged

    def changed(self, unit: Sequence[int]) -> Sequence[int]:
        return range(max(unit) + 1)

    # -- where a task starts

    @torch.no_grad()
    def before_task(self) -> None:
        learner = self.learner
        if self.merged is not None:
            told = learner.comm.share(self.start().cpu() if learner.comm.rank == 0 else None)
            assert told is not None
            learner.adapter.copy_(told)
        if self.options.head == "ncm":  # a class that had no rows may have some now
            learner.head_parameter.nan_to_num_(neginf=0.0)

    def start(self) -> Tensor:
        """[total] A with orthonormal rows that span what the last A's do, B as last trained.

        With A = R^T Q^T that is another function than before, B Q^T for B R^T Q^T, unless B takes R^T over
        (`continuous`).
        """
        found = self.learner.adapter.clone()
        for name, (a, b) in self.learner.layout.views(found):
            rows = orthonormal(a.double(), lambda place, name=name: self._drawn(name, place))  # type: ignore[misc]
            if self.options.start == "continuous":
                b.copy_(b.double() @ (a.double() @ rows.T))
            a.copy_(rows)
        return found

    def _drawn(self, name: str, place: int) -> Tensor:
        """[d_in] of length 1, in place of a row that adds nothing to those before it."""
        learner = self.learner
        key = f"{learner.config.seed}/{learner.unit_name}/{name}/{place}/completed"
        generator = memory.generator(key)
        width = learner.model.layers[name][0].shape[1]
        drawn = torch.randn(width, dtype=torch.float64, generator=generator)
        return F.normalize(drawn, dim=0).to(learner.device)

    # -- what it leaves behind

    def weight(self, number: int) -> float:
        """How much the `number`-th task's B counts, from 1 on."""
        kind = self.options.lambda_
        if number == 1:
            return 1.0
        if kind == "sqrt":
            return 1 / math.sqrt(number)
        return 1 / number if kind == "mean" else float(kind)

    @torch.no_grad()
    def after_task(self) -> None:
        learner, layout = self.learner, self.learner.layout
        before = learner.anchor if self.merged is None else self.merged
        self.merged, self.turned = learner.adapter.clone(), {}
        weight = self.weight(learner.unit[0] + 1)
        for (name, (a, b)), (_, (a_before, b_before)) in zip(
            layout.views(self.merged), layout.views(before), strict=True
        ):
            self.turned[name] = largest_angle(a_before, a)
            b.copy_(torch.lerp(b_before, b, weight))
        if self.options.head == "ncm":
            self.take_means()

    def take_means(self) -> None:
        """The head's rows of the unit become class means of features through the merged adapter, compared by cosine.

        A class without rows is never the nearest, unless an earlier task has set its row.
        """
        learner, head = self.learner, self.learner.head
        assert self.merged is not None
        for task in learner.unit:
            with learner.holding(self.merged):
                sums = learner.class_sums(task)
            earlier, means = head.of_tasks(range(task)), F.normalize(sums.means, dim=1)
            for row, mean, count in zip(head.rows[task], means, sums.counts.tolist(), strict=True):
                if count or row not in earlier:
                    bias = mean.new_full((1,), 0.0 if count else float("-inf"))
                    head.put([row], torch.cat([mean, bias]).to(head.weight))
        learner.head_parameter.copy_(head.take(learner.rows))

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.merged is None else {"merged": self.merged}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        if "merged" in tensors:
            self.merged = tensors["merged"].to(self.learner.device)

    def report(self) -> dict[str, Any]:
        weight = self.weight(self.learner.unit[0] + 1)
        return {"lambda": weight, "head": self.options.head, "turned": self.turned}


def orthonormal(rows: Tensor, drawn: Callable[[int], Tensor]) -> Tensor:
    """[r, d] -> [r, d] with orthonormal rows: the first i span what the first i given ones do.

    A row that adds nothing to those before it is replaced by `drawn` of its place.
    """
    while True:
        q: Tensor
        q, triangle = torch.linalg.qr(rows.T)
        diagonal = triangle.diagonal()
        most = float(diagonal.abs().max())
        weak = (diagonal.abs() <= WEAK * most).nonzero()
        if not len(weak):
            return (q * torch.where(diagonal < 0, -1.0, 1.0)).T
        place = int(weak[0])
        rows = rows.clone()
        rows[place] = drawn(place) * (most or 1.0)


def largest_angle(one: Tensor, other: Tensor) -> float:
    """Degrees between the spaces that the rows of two matrices [r, d] span."""
    bases = [torch.linalg.qr(rows.double().T).Q for rows in (one, other)]
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(bases[0].T @ bases[1]).min()))))
