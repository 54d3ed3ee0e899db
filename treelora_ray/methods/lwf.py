"""LwF: what the model said of old classes before a task, it is to say of the task's rows still.

Li and Hoiem 2016, arXiv 1606.09282.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods import outputs, whole
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import LwfOptions
from treelora_ray.objectives.base import Batch


@register("lwf")
class Lwf(Method):
    """lambda T^2 KL(softmax(z_old / T) || softmax(z_new / T)) over old classes (tokens) is added to the mean loss."""

    keeps = "one adapter; a copy of it and of the head as they were after the task before"
    starts_from = "the task before"
    step_cost = "one forward"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, LwfOptions)
        self.strength, self.temperature = options.lambda_, options.temperature
        self.teacher: Tensor | None = None  # as a whole vector

    @property
    def looks_back(self) -> bool:
        """Old rows of the head are trained by what is distilled, and by nothing else."""
        return bool(self.strength) and self.teacher is not None

    def loss_terms(self, batch: Batch, said: Any) -> Tensor | None:
        if not self.looks_back:
            return None
        old = self.taught(batch)
        return self.strength * distillation(outputs.logits(batch, said)[:, : old.shape[1]], old, self.temperature)

    @torch.no_grad()
    def taught(self, batch: Batch) -> Tensor:
        """[n, old classes or vocabulary] what the teacher says, without dropout."""
        learner, teacher = self.learner, self.teacher
        assert teacher is not None
        total = learner.layout.total
        with learner.model.steady(), learner.holding(teacher[:total]):
            said = learner.objective.loss(batch)[1]
        if batch.targets is None:
            return outputs.logits(batch, said)
        known = teacher[total:].to(learner.device).view(-1, learner.model.width + 1)
        # As many rows as the head has now, so that equal weights say the same to the bit.
        head = F.pad(known, (0, 0, 0, len(learner.head) - len(known)))
        return F.linear(said["features"].float(), head[:, :-1].contiguous(), head[:, -1].contiguous())[:, : len(known)]

    def after_task(self) -> None:
        if self.strength:
            self.teacher = whole.values(self.learner)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.teacher = tensors.get("teacher")


class _Distillation(torch.autograd.Function):
    """With its gradient by formula, which is 0 exactly where both sides agree.

    Autograd's is rounding there, from which Adam would make full steps of old rows of the head at the start of a task,
    in directions that depend on the shape of the batch.
    """

    @staticmethod
    def forward(context: Any, new: Tensor, old: Tensor, temperature: float) -> Tensor:
        before, now = torch.log_softmax(old / temperature, -1), torch.log_softmax(new / temperature, -1)
        context.save_for_backward(temperature * (now.exp() - before.exp()))
        return temperature**2 * (before.exp() * (before - now)).sum()

    @staticmethod
    def backward(context: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = context.saved_tensors
        return above * slope, None, None


def distillation(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(old / T) || softmax(new / T)), summed over the rows of [n, K]."""
    found: Tensor = _Distillation.apply(new, old, temperature)
    return found
