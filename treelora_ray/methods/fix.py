"""FIX: a few demonstrations of the task stand before each prompt, and nothing is trained.

In-context learning of Brown et al. 2020, arXiv 2005.14165.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import FixOptions
from treelora_ray.models.backbone import Shown
from treelora_ray.objectives.causal_lm import CausalLM


@register("fix")
class Fix(Method):
    """Demonstrations are kept as texts: prompt and answer, so that a run answers without its data."""

    objectives = ("causal-lm",)
    keeps = "the texts of `shots` rows of each task"
    step_cost = "no steps; prompts of up to `max_prompt` tokens"
    reduces = "nothing"
    adapts = False
    unexported = (
        "what method fix answers with is more than an adapter, so there is none to export: write the whole run with "
        "`treelora model`"
    )

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, FixOptions)
        assert isinstance(learner.objective, CausalLM)
        self.options, self.objective = options, learner.objective
        self.demonstrations: dict[int, list[tuple[str, str]]] = {}  # by task: prompts and answers

    def steps(self, planned: int) -> int:  # noqa: ARG002
        return 0

    def after_task(self) -> None:
        """Of training rows: one of the test would stand before itself, with its answer."""
        learner = self.learner
        for task in learner.unit:
            rows = learner.tasks[task].train
            key = f"{learner.config.seed}/{learner.tasks[task].name}/demonstrations"
            taken = rows.take(memory.draw(len(rows), self.options.shots, key), ["prompt", "answer"])
            self.demonstrations[task] = [
                (str(prompt), str(answer)) for prompt, answer in zip(taken["prompt"], taken["answer"], strict=True)
            ]

    def shown(self, task: int) -> Shown:
        return Shown(tuple(self.demonstrations[task]), self.options.separator, self.options.max_prompt)

    @contextmanager
    def answering(self, task: int) -> Iterator[None]:
        objective = self.objective
        objective.shown = self.shown(task)
        try:
            yield
        finally:
            objective.shown = None

    def to_json(self) -> dict[str, Any]:
        return {"demonstrations": {str(task): found for task, found in self.demonstrations.items()}}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.demonstrations = {
            int(task): [(prompt, answer) for prompt, answer in found] for task, found in data["demonstrations"].items()
        }

    def report(self) -> dict[str, Any]:
        """How many tokens the demonstrations have: where these are more than fit, the first are left out."""
        model, (task,) = self.objective.model, self.learner.unit
        return {
            "demonstrations": len(self.demonstrations[task]),
            "demonstration_tokens": sum(map(len, model.shown_ids(self.shown(task)))),
            "demonstrations_of": f"the task by routing: {self.learner.config.objective.routing}",
        }
