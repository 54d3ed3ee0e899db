"""L2P: a pool of prompts with keys; each sample takes those whose keys are nearest to its frozen features.

Wang et al. 2022, arXiv 2112.08654.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods.base import register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import L2pOptions
from treelora_ray.methods.prompted import Prompted, nearest, nearness
from treelora_ray.models.backbone import Inputs
from treelora_ray.models.prompting import Inserted
from treelora_ray.objectives.base import Batch


@register("l2p")
class L2p(Prompted):
    """-beta sum_taken cos(q, key) is added to a sample's loss; its feature is the mean of its prompts' outputs."""

    keeps = "a pool of prompts with keys, whatever N"
    starts_from = "none: the pool of prompts of the task before"
    step_cost = "one forward, and top_k length more tokens"
    routes = False

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, L2pOptions)
        self.options, self.width = options, learner.model.width
        prompts = self.drawn("l2p/prompts", (options.pool, options.length, self.width), options.spread)
        keys = self.drawn("l2p/keys", (options.pool, self.width))
        self.kept = torch.cat([prompts.reshape(-1), keys.reshape(-1)])
        self.pull: Tensor | None = None  # sum over the batch in training of its cosines with the keys it took

    def own_parameters(self) -> Tensor:
        return self.kept

    def pool(self) -> tuple[Tensor, Tensor]:
        """Prompts [M, length, d] and keys [M, d]: in training, or as the last task left them."""
        own = self.learner.own_parameter
        options, flat = self.options, own if own.numel() else self.kept
        prompts, keys = flat.split([options.pool * options.length * self.width, options.pool * self.width])
        return prompts.view(options.pool, options.length, self.width), keys.view(options.pool, self.width)

    def inserted(self, inputs: Inputs) -> Inserted:
        prompts, keys = self.pool()
        found = nearness(self.query(inputs), keys)
        chosen = nearest(found, self.options.top_k)
        self.pull = found.gather(1, chosen).sum() if torch.is_grad_enabled() else None
        return Inserted(tokens=prompts[chosen].flatten(1, 2))

    def loss_terms(self, batch: Batch, said: Any) -> Tensor | None:  # noqa: ARG002
        return None if self.pull is None or not self.options.beta else -self.options.beta * self.pull

    def before_task(self) -> None:
        """New rows of the head start at class means of features as the prompts make them, not of frozen ones."""
        learner = self.learner
        old = learner.head.of_tasks(range(min(learner.unit)))
        before = learner.head.take(old)
        learner.restart_head(learner.class_sums)
        learner.head.put(old, before)  # of classes that earlier tasks have had too
        with torch.no_grad():
            learner.head_parameter.copy_(learner.head.take(learner.rows))

    def after_task(self) -> None:
        self.kept = self.learner.own_parameter.detach().clone()

    def tensors(self) -> dict[str, Tensor]:
        return {"pool": self.kept}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.kept = tensors["pool"].to(self.learner.device)
