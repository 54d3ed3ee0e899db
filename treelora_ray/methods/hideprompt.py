"""HiDe-Prompt: prompts for each task, a head that infers the task, and a classifier fit over all classes seen.

Wang et al. 2023, arXiv 2310.07234.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods.base import register
from treelora_ray.methods.hide import Hide
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import HidePromptOptions
from treelora_ray.methods.prompted import Prompted, prefixes
from treelora_ray.models.backbone import Inputs
from treelora_ray.models.prompting import Inserted

LAYERS = (0, 1, 2, 3, 4)  # where the config does not say


@register("hide-prompt")
class HidePrompt(Prompted, Hide):
    keeps = "prompts for each task; of a class 2 summaries of its features, and a row of the head that infers tasks"
    starts_from = "none: prompts alone"
    step_cost = "the prompts' rows in their blocks, and the contrast"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, HidePromptOptions)
        self.layers = self.blocks("layers", options.layers, LAYERS)
        self.spread, self.continues = options.spread, options.start == "previous"
        self.shape = len(self.layers), 2, options.length, self.prompting.width
        self.prompts: list[Tensor] = []  # [n] of finished tasks

    def own_parameters(self) -> Tensor:
        if self.prompts and self.continues:
            return self.prompts[-1]
        return self.drawn(f"hide-prompt/{self.learner.unit_name}", self.shape, self.spread)

    @property
    def finished(self) -> int:
        return len(self.prompts)

    def inserted(self, inputs: Inputs) -> Inserted:  # noqa: ARG002
        values = self.learner.own_parameter if self.task is None else self.prompts[self.task]
        return Inserted(prefixes=prefixes(self.layers, values.view(self.shape)))

    def values_trained(self) -> Tensor:
        return self.learner.own_parameter.detach()

    def values_kept(self) -> list[Tensor]:
        return self.prompts

    def keep(self, task: int, values: Tensor) -> None:
        assert task == len(self.prompts), "tasks are learnt in order"
        self.prompts.append(values)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"prompt.{task}": values for task, values in enumerate(self.prompts)}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        super().load(tensors, data)
        count = sum(name.startswith("prompt.") for name in tensors)
        self.prompts = [tensors[f"prompt.{task}"].to(self.learner.device) for task in range(count)]
