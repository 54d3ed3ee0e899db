"""The pull towards the chosen tasks: added to gradients, or applied after the optimizer's step.

No autograd graph, no host synchronisation, no memory beyond a few buffers of the adapter's size, whatever
the number of tasks. All vectors are flat [total] in one layout and on one device; targets are set with `aim`,
strengths are Python numbers or tensors [L] already on the device.

| class | penalty | where |
|---|---|---|
| AdapterPull | lambda/L sum_l |theta_l - theta_l^k|_1 / (|theta_l^k|_1 + eps) | `add_` (l1), `prox_` (prox) |
| DirectionPull | lambda/L sum_l |c_l/|c_l|_1 - s_l|_1, c = theta - start | `add_` (mode paper) |
| InnerPull | -lambda loss R/(R + 1e-5), R = -sum_l <theta_l, G_l> | `add_` (mode released) |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from treelora_ray.core.errors import SettingError
from treelora_ray.core.layout import Layout

EPS = 1e-12


@dataclass(frozen=True)
class Strength:
    """lambda over the steps of a task: constant, or rising from 0 in each epoch as the released code does."""

    value: float
    ramp: Literal["constant", "epoch"] = "constant"
    steps_per_epoch: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise SettingError(f"lambda must be a number from 0 up, got {self.value}")
        if self.ramp not in ("constant", "epoch"):
            raise SettingError(f"ramp {self.ramp!r} is unknown; known: constant, epoch")
        if self.ramp == "epoch" and self.steps_per_epoch < 1:
            raise SettingError("ramp 'epoch' needs steps_per_epoch, the steps of one epoch")

    def at(self, step: int) -> float:
        if self.ramp == "constant":
            return self.value
        return self.value * (step % self.steps_per_epoch) / self.steps_per_epoch


class _Pull:
    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.target = torch.zeros(layout.total, device=device)
        self.buffer = torch.empty(layout.total, device=device)
        self.weights = torch.zeros(len(layout), device=device)  # per layer, 0 where nothing pulls

    def _add_scaled(self, out: Tensor, values: Tensor, factors: Tensor) -> None:
        """out += factors (a layer) * values, in place."""
        for number, block in enumerate(self.layout.blocks):
            block.view(out).addcmul_(block.view(values), self.layout.pick(factors, number).unsqueeze(-1))


class AdapterPull(_Pull):
    """Pulls the adapter itself towards the adapters of the committed tasks."""

    def aim(self, target: Tensor, related: Tensor | None = None) -> None:
        """Towards `target` [total]; only where `related` [L] is true."""
        self.target.copy_(target)
        norms = self.layout.per_layer(lambda x: x.abs().sum(-1), self.target)
        self.weights = 1 / (len(self.layout) * (norms + EPS))
        # A layer whose target is zero has no scale to be pulled by: 1/eps would be a wall, not a pull.
        self.weights = torch.where(norms > 0, self.weights, 0.0)
        if related is not None:
            self.weights = torch.where(related.to(self.weights.device), self.weights, 0.0)

    def value(self, theta: Tensor, strength: float | Tensor) -> Tensor:
        """The penalty, a scalar tensor on the device."""
        torch.sub(theta, self.target, out=self.buffer)
        away = self.layout.per_layer(lambda x: x.abs().sum(-1), self.buffer)
        return (away * self.weights * strength).sum()

    def add_(self, grad: Tensor, theta: Tensor, strength: float | Tensor) -> None:
        """grad += the penalty's subgradient (0 where theta meets the target)."""
        torch.sub(theta, self.target, out=self.buffer).sign_()
        self._add_scaled(grad, self.buffer, self.weights * strength)

    def prox_(
        self,
        theta: Tensor,
        strength: float | Tensor,
        lr: float,
        second_moment: Tensor | None = None,
        eps: float = 1e-8,
    ) -> None:
        """theta <- the proximal point of the penalty after an optimizer step of size `lr`.

        `second_moment` [total] is Adam's bias-corrected v: the step is then taken in Adam's own metric,
        threshold lr lambda_l / (sqrt(v) + eps). Where theta is within the threshold of the target it
        becomes the target exactly, so that the difference is sparse.
        """
        torch.sub(theta, self.target, out=self.buffer)
        limits = self.weights * (strength * lr)
        for number, block in enumerate(self.layout.blocks):
            away = block.view(self.buffer)
            limit = self.layout.pick(limits, number).unsqueeze(-1)
            if second_moment is not None:
                limit = limit / (block.view(second_moment).sqrt() + eps)
            shrunk = torch.copysign((away.abs() - limit).clamp_(min=0), away)
            free = limit <= 0  # no pull on this layer: leave theta as it is, to the bit
            block.view(theta).copy_(torch.where(free, block.view(theta), block.view(self.target) + shrunk))

    def density(self, theta: Tensor) -> Tensor:
        """[L] the share of values that differ from the target."""
        return self.layout.per_layer(lambda a, b: (a != b).float().mean(-1), theta, self.target)


class DirectionPull(_Pull):
    """Pulls the direction of the adapter's displacement towards stored directions (mode `paper`).

    `measure` gives the bandit its distances and leaves the difference of the directions in the buffer,
    of which `add_` takes the signs.
    """

    def __init__(self, layout: Layout, start: Tensor) -> None:
        super().__init__(layout, start.device)
        self.start = start.detach().float().clone()
        self.scratch = torch.empty_like(self.start)
        self.norms = torch.zeros(len(layout), device=start.device)

    def aim(self, target: Tensor, related: Tensor | None = None) -> None:
        """Towards the unit-L1 directions `target` [total]; only where `related` [L] is true.

        On CPU the caller may fill `self.target` in place and pass it.
        """
        if target is not self.target:
            self.target.copy_(target, non_blocking=True)
        self.weights.fill_(1 / len(self.layout))
        if related is not None:
            self.weights.mul_(related.to(self.weights))

    def measure(self, theta: Tensor) -> Tensor:
        """[L] distances 1/2 |c/|c|_1 - s|_1, on the device."""
        torch.sub(theta, self.start, out=self.buffer)
        self.norms = self._lengths()
        inverse = torch.where(self.norms > 0, 1 / self.norms, 0.0)
        self.layout.scale_(self.buffer, inverse).sub_(self.target)
        return self._lengths() / 2

    def _lengths(self) -> Tensor:
        """[L] l1 norms of what the buffer holds."""
        torch.abs(self.buffer, out=self.scratch)
        return self.layout.per_layer(lambda x: x.sum(-1), self.scratch)

    def value(self, distances: Tensor, strength: float | Tensor) -> Tensor:
        return (2 * distances * self.weights * strength).sum()

    def add_(self, grad: Tensor, strength: float | Tensor) -> None:
        """grad += the subgradient at the theta last measured, |c|_1 held constant."""
        self.buffer.sign_()
        # A layer that has not moved has no direction: 1/eps would throw it anywhere.
        factors = torch.where(self.norms > 0, self.weights * strength / (self.norms + EPS), 0.0)
        self._add_scaled(grad, self.buffer, factors)


class InnerPull(_Pull):
    """The released code's regulariser: ascent on the log-magnitude of an inner product.

    Its value is lambda times the task's loss whatever the tasks are; its sign is lost with R's.
    """

    def aim(self, target: Tensor) -> None:
        self.target.copy_(target, non_blocking=True)

    def product(self, theta: Tensor) -> Tensor:
        """R, a scalar tensor on the device."""
        return -torch.dot(theta.float(), self.target)

    def value(self, theta: Tensor, strength: float, loss: Tensor) -> Tensor:
        """What is taken off the loss, a scalar tensor on the device."""
        product = self.product(theta)
        return strength * loss.detach() * product / (product + 1e-5)

    def add_(self, grad: Tensor, theta: Tensor, strength: float, loss: Tensor) -> None:
        factor = strength * loss.detach() / (self.product(theta) + 1e-5)
        grad.addcmul_(self.target, factor)
