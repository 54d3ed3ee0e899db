"""A-GEM: a step may not raise the loss on a few remembered rows of all earlier tasks together, to first order.

Chaudhry et al. 2019, arXiv 1812.00420.
"""

from __future__ import annotations

from treelora_ray.config import Options
from treelora_ray.methods import memory
from treelora_ray.methods.base import register
from treelora_ray.methods.gradients import mean_gradient
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import AgemOptions
from treelora_ray.methods.remembering import Remembering


@register("agem")
class Agem(Remembering):
    """g - (<g, r> / |r|^2) r where <g, r> < 0, with r the gradient of the mean loss on rows drawn from the memory."""

    step_cost = "forward/backward of `memory_batch` rows, O(P)"
    reduces = "gradient, the gradient of the rows drawn"

    def __init__(self, learner: Learner, options: Options) -> None:
        assert isinstance(options, AgemOptions)
        super().__init__(learner, options, options.memory)
        self.batch = options.memory_batch or learner.config.train.batch

    def drawn(self, step: int) -> list[Ref]:
        """Of the rows of all earlier tasks, those that a step looks at."""
        known = [ref for rows in self.memory.values() for ref in rows]
        key = f"{self.learner.config.seed}/{self.learner.unit_name}/{step}/memory"
        return [known[place] for place in memory.draw(len(known), self.batch, key)]

    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        learner = self.learner
        if not self.memory:
            return
        with learner.effort.timed("memory"):
            past = mean_gradient(learner, self.drawn(step)).double()
            along = float(past @ learner.grad.double())
            if along < 0:
                learner.grad.sub_((along / past.square().sum() * past).to(learner.grad))
                self.edited += 1
