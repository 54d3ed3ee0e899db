"""EWC: what mattered to earlier tasks is held where they left it, by how much it mattered.

Kirkpatrick et al. 2017, arXiv 1612.00796; the online form is Schwarz et al. 2018, arXiv 1805.06370.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods import memory, outputs, whole
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.gradients import of_each
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import EwcOptions
from treelora_ray.objectives.base import Batch

STRENGTH = {"classification": 50.0, "causal-lm": 400.0}


@register("ewc")
class Ewc(Method):
    """(lambda / 2) sum_i F_i (theta_i - theta*_i)^2 is added to the mean loss: for each task, or once (online)."""

    keeps = "one adapter; importance and anchor of all that is trained, for each task (online: once)"
    starts_from = "the task before"
    step_cost = "O(P) for each importance kept"
    reduces = "gradient; once a task the sums of squared gradients of rows"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, EwcOptions)
        self.options = options
        self.strength = STRENGTH[learner.objective.kind] if options.lambda_ is None else options.lambda_
        self.kept: list[tuple[Tensor, Tensor]] = []  # (importance, anchor), as whole vectors
        self.bound: list[tuple[Tensor, Tensor]] | None = None  # the same for what is in training now

    def before_task(self) -> None:
        self.bound = None

    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """(importance, anchor) [theta]. Rows of the head that came later have no importance."""
        if self.bound is None:
            self.bound = [(whole.trained(self.learner, f), whole.trained(self.learner, a)) for f, a in self.kept]
        return self.bound

    def penalty(self) -> Tensor:
        theta = self.learner.theta
        parts = [(importance * (theta - anchor).square()).sum() for importance, anchor in self.terms()]
        return self.strength / 2 * torch.stack([torch.zeros((), device=theta.device), *parts]).sum()

    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        learner = self.learner
        for importance, anchor in self.terms() if self.strength else []:
            learner.grad.addcmul_(importance, learner.theta - anchor, value=self.strength)

    def after_task(self) -> None:
        if not self.strength:
            return
        with self.learner.effort.timed("importance"):
            importance = whole.spread(self.learner, self.importance())
        if self.options.online and self.kept:
            before = self.kept.pop()[0].to(importance)
            importance[: len(before)] += self.options.gamma * before
        self.kept.append((importance, whole.values(self.learner)))

    def importance(self) -> Tensor:
        """[theta] the mean over the unit's rows of (d log p(y | x) / d theta)^2, row by row."""
        learner = self.learner
        count = learner.unit_rows
        chosen = memory.draw(count, self.options.rows or count, f"{learner.config.seed}/{learner.unit_name}/importance")
        refs = learner.refs(np.array(sorted(chosen)))
        total = torch.zeros_like(learner.grad, dtype=torch.float64)
        for _, gradient in of_each(learner, refs, self._surprise):
            total += gradient.double().square()
        learner.comm.sum_(total)
        return (total / len(refs)).float()

    def _surprise(self, ref: Ref, batch: Batch, said: Any) -> Tensor:
        """-log p(y | x); of an answer the mean over its tokens."""
        found = outputs.log_probabilities(batch, said)
        right = outputs.gold(batch)
        if self.options.fisher == "sampled":
            draw = memory.generator(f"{self.learner.config.seed}/{ref}/fisher")
            chances = found.detach().double().exp().cpu()
            right = torch.multinomial(chances, 1, generator=draw).squeeze(1).to(found.device)
        return F.nll_loss(found, right)

    def tensors(self) -> dict[str, Tensor]:
        pairs = enumerate(self.kept)
        return {f"{name}.{n}": value for n, pair in pairs for name, value in zip(NAMES, pair, strict=True)}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.kept = [(tensors[f"{NAMES[0]}.{n}"], tensors[f"{NAMES[1]}.{n}"]) for n in range(len(tensors) // 2)]
        self.bound = None

    def values(self, step: int) -> dict[str, float]:  # noqa: ARG002
        return {"penalty": float(self.penalty())}


NAMES = ("importance", "anchor")
