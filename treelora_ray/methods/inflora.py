"""InfLoRA: each task's adapter reads only what earlier tasks' inputs have left free.

Liang and Li 2024, arXiv 2404.00228; what is kept of inputs is DualGPM's, Liang and Li 2023 (CVPR).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.files import part
from treelora_ray.methods import moments
from treelora_ray.methods.base import register
from treelora_ray.methods.folding import Folding
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import InfLoraOptions

ROUNDING = 1e-12  # of a layer's energy


@register("inflora")
class InfLora(Folding):
    """A is set once, to the strongest directions of the task's inputs that are free, and B alone is trained."""

    keeps = "for each layer at most d / 2 directions of its input; an adapter for each task, in the weights"
    step_cost = "none: two passes over a task's rows, two singular value decompositions a layer"
    reduces = "gradient; twice a task the second moments of each layer's input; worker 0 tells A"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, InfLoraOptions)
        self.epsilon = options.epsilon
        self.bases: dict[str, Tensor] = {}  # by layer [d, q], orthonormal: what earlier inputs span, ...
        self.retained: set[str] = set()  # ... or, in these layers, what they leave free
        self.is_a = torch.zeros(learner.layout.total, dtype=torch.bool, device=learner.device)
        for _, (a, _b) in learner.layout.views(self.is_a):
            a.fill_(True)
        self.before = learner.adapter.clone()  # the last step

    # -- which directions are free

    def free(self, name: str) -> Tensor:
        """[d, n] orthonormal: what an adapter of the layer may read."""
        if name not in self.bases:
            width = self.learner.model.layers[name][0].shape[1]
            return torch.eye(width, dtype=torch.float64, device=self.learner.device)
        basis = self.bases[name]
        if name in self.retained:
            return basis
        whole: Tensor = torch.linalg.qr(basis, mode="complete").Q
        return whole[:, basis.shape[1] :]

    def leading(self, name: str, moment: Tensor) -> Tensor:
        """[d, n] the free directions turned so that the strongest of these inputs come first.

        Left singular vectors of R - M M^T R (remove) or M M^T R (retain), found within the free space, so that they
        lie in it exactly, however weak the inputs are there.
        """
        free = self.free(name)
        found: Tensor = free @ torch.linalg.svd(free.T @ moment, full_matrices=False).U
        largest = found.abs().argmax(0, keepdim=True)
        return found * found.gather(0, largest).sign()  # of the two signs always the same

    def reading(self, name: str, moment: Tensor) -> Tensor:
        """[r, d] the task's A; its last rows are 0 where fewer than r directions are free."""
        rows = torch.zeros_like(self.learner.model.layers[name][0], dtype=torch.float64)
        found = self.leading(name, moment)[:, : len(rows)].T / math.sqrt(3)
        rows[: len(found)] = found
        return rows

    def set_aside(self, name: str, moment: Tensor, share: float) -> None:
        """Free directions become used ones, the strongest first, until these hold `share` of the inputs' energy.

        That is the sum of squares of what is read, u^T R u for a direction u, not its square.
        """
        leading = self.leading(name, moment)
        energy = (leading * (moment @ leading)).sum(0)
        left = energy.flip(0).cumsum(0).flip(0)  # [n] what stays free after 0, 1, ... directions
        taken = int((left > (1 - share + ROUNDING) * moment.trace()).sum())
        if name in self.retained:
            self.bases[name] = leading[:, taken:]
            return
        basis = torch.cat([self.bases.get(name, leading[:, :0]), leading[:, :taken]], dim=1)
        if 2 * basis.shape[1] > len(basis):
            self.retained.add(name)
            basis = leading[:, taken:]
        self.bases[name] = basis

    # -- a task's life

    @torch.no_grad()
    def before_task(self) -> None:
        learner = self.learner
        learner.adapter.copy_(learner.anchor)  # B = 0
        found = moments.of_inputs(learner)
        with learner.effort.timed("directions"):
            told = {name: self.reading(name, moment).cpu() for name, moment in found.items()} if self._leads else None
            told = learner.comm.share(told)
        assert told is not None
        for name, (a, _) in learner.layout.views(learner.adapter):
            a.copy_(told[name])

    @property
    def _leads(self) -> bool:
        return self.learner.comm.rank == 0

    @torch.no_grad()
    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        learner = self.learner
        learner.adapter_grad.masked_fill_(self.is_a, 0.0)
        self.before = learner.adapter.clone()

    @torch.no_grad()
    def after_step(self, step: int) -> None:  # noqa: ARG002
        """Weight decay moves what has no gradient, too: A goes back."""
        learner = self.learner
        learner.adapter.copy_(torch.where(self.is_a, self.before, learner.adapter))

    @torch.no_grad()
    def after_task(self) -> None:
        super().after_task()
        learner = self.learner
        share = self.epsilon + (1 - self.epsilon) * learner.unit[0] / len(learner.tasks)
        found = moments.of_inputs(learner)
        with learner.effort.timed("directions"):
            for name, moment in found.items():
                self.set_aside(name, moment, share)

    def changed(self, unit: Sequence[int]) -> Sequence[int]:
        return range(max(unit) + 1)

    def report(self) -> dict[str, Any]:
        """By layer how many directions are still free."""
        return {"free_directions": {name: self.free(name).shape[1] for name in self.learner.layout.names}}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"basis.{name}": basis for name, basis in self.bases.items()}

    def to_json(self) -> dict[str, Any]:
        return {"retained": sorted(self.retained)}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        super().load({name: value for name, value in tensors.items() if name.startswith("folded.")}, data)
        self.bases = {name: basis.to(self.learner.device) for name, basis in part(tensors, "basis").items()}
        self.retained = set(data["retained"])
