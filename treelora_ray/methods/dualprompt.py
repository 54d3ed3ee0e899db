"""DualPrompt: prompts before keys and values of some blocks, one for all tasks (G) and one for each (E), with a key.

Wang et al. 2022, arXiv 2204.04799.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods.base import register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import DualPromptOptions
from treelora_ray.methods.prompted import Prompted, nearest, nearness, prefixes
from treelora_ray.models.backbone import Inputs
from treelora_ray.models.prompting import Inserted
from treelora_ray.objectives.base import Batch

E_LAYERS = (2, 3, 4)  # where the config does not say


@register("dualprompt")
class DualPrompt(Prompted):
    """-beta cos(q, key_t) is added to each sample's loss; the task of the nearest key answers, among all classes."""

    keeps = "a prompt and a key for each task, a prompt for all"
    starts_from = "none: a new prompt, beside that of all tasks"
    step_cost = "one forward (beta 0: none), and the prompts' rows in their blocks"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, DualPromptOptions)
        self.options, self.width = options, self.prompting.width
        self.g_layers = self.blocks("g_layers", options.g_layers)
        self.e_layers = self.blocks("e_layers", options.e_layers, E_LAYERS)
        self.shapes = (
            (len(self.g_layers), 2, options.g_length, self.width),  # blocks, keys or values, rows, width
            (len(self.e_layers), 2, options.e_length, self.width),
        )
        self.shared = self.drawn("dualprompt/g", self.shapes[0], options.spread)
        self.experts: list[Tensor] = []  # of finished tasks
        self.keys: list[Tensor] = []  # [d] of finished tasks, and of no other
        self.pull: Tensor | None = None  # sum over the batch in training of its cosines with the task's key

    def own_parameters(self) -> Tensor:
        """G as the last task left it, E drawn anew, and a key."""
        learner = self.learner
        (task,) = learner.unit
        expert = self.drawn(f"dualprompt/{learner.unit_name}/e", self.shapes[1], self.options.spread)
        if self.options.key_start == "mean" and task in learner.means:
            key = learner.means[task].mean(0)
        else:
            key = self.drawn(f"dualprompt/{learner.unit_name}/key", (learner.model.width,))
        return torch.cat([part.reshape(-1) for part in (self.shared, expert, key)])

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """G, E and key in training."""
        sizes = [self.shared.numel(), torch.Size(self.shapes[1]).numel(), self.learner.model.width]
        shared, expert, key = self.learner.own_parameter.split(sizes)
        return shared.view(self.shapes[0]), expert.view(self.shapes[1]), key

    @property
    def finished(self) -> int:
        return len(self.experts)

    def inserted(self, inputs: Inputs) -> Inserted:
        self.pull = None
        if self.task is not None:
            return self._prefixes(self.shared, self.experts[self.task])
        shared, expert, key = self.parts()
        if self.options.beta and torch.is_grad_enabled():
            self.pull = nearness(self.query(inputs), key.unsqueeze(0)).sum()
        return self._prefixes(shared, expert)

    def _prefixes(self, shared: Tensor, expert: Tensor) -> Inserted:
        return Inserted(prefixes=prefixes(self.g_layers, shared) | prefixes(self.e_layers, expert))

    def loss_terms(self, batch: Batch, said: Any) -> Tensor | None:  # noqa: ARG002
        return None if self.pull is None else -self.options.beta * self.pull

    def after_task(self) -> None:
        self.shared, expert, key = (part.detach().clone() for part in self.parts())
        self.experts.append(expert)
        self.keys.append(key)

    @property
    def weighs_tasks(self) -> bool:
        return True

    def route(self, features: Tensor) -> Tensor:
        return nearest(nearness(features, torch.stack(self.keys)), 1)[:, 0]

    def among(self, task: int) -> Sequence[int]:  # noqa: ARG002
        return self.learner.head.of_all()

    def tensors(self) -> dict[str, Tensor]:
        experts = {f"expert.{task}": expert for task, expert in enumerate(self.experts)}
        return {"shared": self.shared, **experts, **{f"key.{task}": key for task, key in enumerate(self.keys)}}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        device, tasks = self.learner.device, len(tensors) // 2
        self.shared = tensors["shared"].to(device)
        self.experts = [tensors[f"expert.{task}"].to(device) for task in range(tasks)]
        self.keys = [tensors[f"key.{task}"].to(device) for task in range(tasks)]
