"""O-LoRA: each task's adapter reads directions that no earlier one reads.

Wang et al. 2023, arXiv 2310.14152.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods.base import register
from treelora_ray.methods.folding import Folding
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import OLoraOptions


@register("o-lora")
class OLora(Folding):
    """lambda sum_k |A_k A_t^T| + lambda_2 |theta_t| is added to the mean loss; finished adapters are in the weights."""

    keeps = "an adapter for each task: its A for the penalty, its product in the weights"
    step_cost = "O(N r) times the adapter's size"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, OLoraOptions)
        self.strength, self.shrink, self.squares = options.lambda_, options.lambda_2, options.norm == "squares"
        self.known: dict[str, Tensor] = {}  # by layer, the A of all finished tasks [N r, d_in]

    def past(self) -> dict[str, Tensor]:
        if self.folded and not self.known:
            parts = [dict(self.learner.layout.views(adapter)) for adapter in self.folded]
            self.known = {name: torch.cat([part[name][0] for part in parts]) for name in self.learner.layout.names}
        return self.known

    def fold(self, adapter: Tensor) -> None:
        super().fold(adapter)
        self.known = {}

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Over all layers |A_k A_t^T|, entry by entry: magnitudes, or squares."""
        found = torch.zeros((), device=self.learner.device)
        for name, (a, _) in self.learner.layout.views(self.learner.adapter):
            if name in self.past():
                product = a @ self.known[name].T
                found += product.square().sum() if self.squares else product.abs().sum()
        return found

    @torch.no_grad()
    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        layout, learner = self.learner.layout, self.learner
        slopes = dict(layout.views(learner.adapter_grad))
        for name, (a, b) in layout.views(learner.adapter):
            if self.strength and name in self.past():
                product = a @ self.known[name].T
                weights = 2 * product if self.squares else product.sign()
                slopes[name][0].add_(weights @ self.known[name], alpha=self.strength)
            for part, slope in zip((a, b), slopes[name], strict=True) if self.shrink else ():
                if (length := part.norm()) > 0:
                    slope.add_(part / length, alpha=self.shrink)

    def values(self, step: int) -> dict[str, float]:  # noqa: ARG002
        return {"penalty": self.strength * float(self.penalty())}
