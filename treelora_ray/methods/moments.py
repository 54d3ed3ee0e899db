"""What the adapted layers read while they learn a unit: second moments of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.methods.learner import Learner
from treelora_ray.models.backbone import Model


@torch.no_grad()
def of_inputs(learner: Learner) -> dict[str, Tensor]:
    """By layer [d_in, d_in] the mean of x x^T over the tokens of all training rows of the unit, in double precision.

    Of texts padding does not count; of prompts the answers do. Each row is seen once, whatever the number of workers.
    """
    widths = {name: a.shape[1] for name, (a, _) in learner.model.layers.items()}
    sizes = [width * width + 1 for width in widths.values()]  # sums of products, and how many tokens these are of
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=learner.device)
    sums = dict(zip(widths, flat.split(sizes), strict=True))
    own = learner.refs(np.arange(learner.unit_rows))[learner.comm.rank :: learner.comm.workers]
    size = learner.config.evaluate.batch
    with learner.effort.timed("statistics"), learner.model.steady():
        for at in range(0, len(own), size):
            inputs = learner.fetch(own[at : at + size]).inputs
            adding = _adding(learner.model, sums, inputs.get("attention_mask"))
            with adding, learner.model.autocast(learner.config.train.precision):
                learner.model.features(inputs)
        learner.effort.pass_rows += len(own)
        learner.comm.sum_(flat)
    for part in sums.values():
        part[:-1].div_(part[-1].clamp(min=1))
    return {name: part[:-1].view(widths[name], widths[name]) for name, part in sums.items()}


@contextmanager
def _adding(model: Model, sums: Mapping[str, Tensor], mask: Tensor | None) -> Iterator[None]:
    """Within it a forward pass adds to the sums what each layer reads."""

    def hook(into: Tensor) -> Any:
        def add(_: Any, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            if mask is not None and mask.numel() == len(x):
                x = x[mask.flatten().bool()]
            exact = x.double()
            into[:-1].view(x.shape[1], x.shape[1]).addmm_(exact.T, exact)
            into[-1] += len(x)

        return add

    with ExitStack() as stack:
        for name, into in sums.items():
            handle = model.linear_with_adapter(name).register_forward_pre_hook(hook(into))
            stack.callback(handle.remove)
        yield
