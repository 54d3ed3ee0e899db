"""OGD: a step keeps to what is orthogonal to the gradients of earlier tasks' outputs.

Farajtabar et al. 2020, arXiv 1910.07104.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods import memory, outputs, whole
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.gradients import of_each
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import OgdOptions
from treelora_ray.objectives.base import Batch

NEGLIGIBLE = 1e-6  # of a gradient's norm: what is left of one that lies in the span already


@register("ogd")
class Ogd(Method):
    """g - U^T (U g): U has orthonormal rows, made of gradients of the right logit for some rows of each past task."""

    keeps = "one adapter; up to `memory` directions of all that is trained, for each task"
    starts_from = "the task before"
    step_cost = "O(P) for each direction"
    reduces = "gradient; once a task the gradients of the chosen rows"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, OgdOptions)
        self.per_task = options.memory
        self.basis = torch.empty(0, learner.layout.total, device=learner.device)  # [q, size] whole vectors
        self.bound: Tensor | None = None

    def before_task(self) -> None:
        self.bound = None

    def directions(self) -> Tensor:
        """[q, theta] orthonormal, of the same span where no other row of the head can move."""
        if self.bound is None:
            self.bound = whole.trained(self.learner, self.basis)
            if self.bound.shape[1] < whole.size(self.learner):
                # Parts in rows that are not trained now are gone, and with them lengths and right angles.
                self.bound = extended(self.bound[:0], self.bound)
        return self.bound

    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        if len(self.basis):
            known, grad = self.directions(), self.learner.grad
            grad.sub_(known.T @ (known @ grad))

    def after_task(self) -> None:
        learner = self.learner
        key = f"{learner.config.seed}/{learner.unit_name}/memory"
        chosen = sorted(memory.draw(learner.unit_rows, self.per_task, key))
        if not chosen:
            return
        refs = learner.refs(torch.tensor(chosen).numpy())
        found = torch.zeros(len(refs), len(learner.theta), device=learner.device)
        with learner.effort.timed("importance"):
            for place, gradient in of_each(learner, refs, right_logit):
                found[place] = gradient
            learner.comm.sum_(found)
        self.basis = extended(whole.grown(learner, self.basis), whole.spread(learner, found))

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.basis, self.bound = tensors["basis"].to(self.learner.device), None

    def report(self) -> dict[str, Any]:
        return {"directions": len(self.basis)}


def right_logit(ref: Ref, batch: Batch, said: Any) -> Tensor:  # noqa: ARG001
    """The right class's logit; of an answer the sum of its tokens' logits."""
    return outputs.logits(batch, said).gather(1, outputs.gold(batch).unsqueeze(1)).sum()


def extended(basis: Tensor, vectors: Tensor) -> Tensor:
    """[q, P] orthonormal and [m, P] -> orthonormal rows that span both.

    Each vector is made orthogonal twice, since once leaves the rounding of a large part; one that lies in the span
    already is dropped, so that its rounding is not blown up into a direction.
    """
    count = len(basis)
    found = torch.cat([basis, torch.empty_like(vectors)])
    for vector in vectors:
        known, left = found[:count], vector.clone()
        for _ in range(2):
            left -= known.T @ (known @ left)
        if float(left.norm()) > NEGLIGIBLE * float(vector.norm()):
            found[count] = left / left.norm()
            count += 1
    return found[:count].clone()
