"""GEM: a step may not raise the loss on what is remembered of any earlier task, to first order.

Lopez-Paz and Ranzato 2017, arXiv 1706.08840.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize
import torch

from treelora_ray.config import Options
from treelora_ray.core.layout import FloatArray
from treelora_ray.methods.base import register
from treelora_ray.methods.gradients import mean_gradient
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import GemOptions
from treelora_ray.methods.remembering import Remembering

MARGIN = {"classification": 0.05, "causal-lm": 0.5}


@register("gem")
class Gem(Remembering):
    """g + G^T v with v = argmin over v >= margin of v^T (G G^T + ridge) v / 2 + (G g)^T v, where any G g < 0.

    G has a row for each earlier task: the gradient of the mean loss on its memory. One problem for all that is trained.
    """

    step_cost = "a forward/backward of `memory` rows and O(P) for each earlier task, a small quadratic program"
    reduces = "gradient, the memory gradient of each earlier task; worker 0 tells v"

    def __init__(self, learner: Learner, options: Options) -> None:
        assert isinstance(options, GemOptions)
        super().__init__(learner, options, options.memory)
        self.margin = MARGIN[learner.objective.kind] if options.margin is None else options.margin
        self.ridge = options.ridge

    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        learner = self.learner
        if not self.memory:
            return
        with learner.effort.timed("memory"):
            past = torch.stack([mean_gradient(learner, refs) for refs in self.memory.values()]).double()
            along = past @ learner.grad.double()
            if not bool((along < 0).any()):
                return
            found = multipliers((past @ past.T).cpu().numpy(), along.cpu().numpy(), self.margin, self.ridge)
            v = torch.from_numpy(learner.comm.share(found)).to(past)
            learner.grad.add_((v @ past).to(learner.grad))
            self.edited += 1


def multipliers(gram: FloatArray, along: FloatArray, margin: float, ridge: float) -> FloatArray:
    """[k] argmin over v >= margin of v^T Q v / 2 + along^T v, with Q = gram + ridge x its mean diagonal.

    With w = v - margin >= 0 and Q = C^T C it is the least-squares problem |C w + C^-T (along + Q margin)|.
    """
    q = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    upper = scipy.linalg.cholesky(q)
    wanted = -scipy.linalg.solve_triangular(upper, along + margin * q.sum(1), trans="T")
    over, _ = scipy.optimize.nnls(upper, wanted)
    found: FloatArray = over + margin
    return found
