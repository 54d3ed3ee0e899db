"""SAPT: all adapters answer each row, in a mixture that the row's tokens choose.

Zhao et al. 2024, arXiv 2401.08295.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import Options
from treelora_ray.core.merge import AdapterBank
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.folding import side_by_side
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import SaptOptions
from treelora_ray.models import adapters
from treelora_ray.models.backbone import Inputs


@register("sapt")
class Sapt(Method):
    """W x + s sum_k w_k B_k A_k x, w = softmax(keys phi(pooled tokens) / sqrt(e)).

    Trained are the task's adapter, its key, and phi.
    """

    keeps = "an adapter and a key for each task, a query network (kl: pooled tokens of `memory` rows of each task)"
    starts_from = "fresh"
    step_cost = "O(N) times the adapters' forward/backward (kl: the query network on kept rows)"
    reduces = "gradient; once a task the sum of its rows' mixtures (kl: the pooled tokens kept)"
    routes = False
    unexported = (
        "sapt mixes all adapters anew for each row, which no single adapter can do; `treelora model` writes the whole "
        "run for other programs"
    )

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, SaptOptions)
        self.options = options
        self.bank: AdapterBank = AdapterBank(learner.layout)
        self.width = self.pooled(learner.model.probe()).shape[1]
        self.shapes = [(options.hidden, self.width), (self.width, options.hidden), (self.width,), (self.width,)]
        nothing = torch.zeros(self.width, device=learner.device)
        self.learnt = torch.cat([self.first(), nothing])  # query network and key as the last unit left them
        self.keys = torch.zeros(0, self.width, device=learner.device)  # [N, e] of finished tasks
        self.kept: list[Tensor] = []  # by task, pooled tokens [m, e]
        self.mixtures: list[Tensor] = []  # by task, the mean over its rows [tasks then], when it was learnt
        self.weights = torch.ones(1, 1, device=learner.device)  # [B, tasks] of the rows in the model
        self.stacked: tuple[list[int], dict[str, tuple[Tensor, Tensor]]] = [], {}
        self._hook()

    # -- what chooses: phi and the keys

    def first(self) -> Tensor:
        """The query network as it is drawn from the seed: two layers, then scale and shift of its norm."""
        generator = memory.generator(f"{self.learner.config.seed}/query")
        down, up, scale, shift = (torch.empty(shape) for shape in self.shapes)
        for layer in (down, up):
            bound = 1 / math.sqrt(layer.shape[1])
            layer.uniform_(-bound, bound, generator=generator)
        return torch.cat([part.reshape(-1) for part in (down, up, scale.fill_(1), shift.zero_())]).to(
            self.learner.device
        )

    def own_parameters(self) -> Tensor:
        key = f"{self.learner.config.seed}/{self.learner.unit_name}/key"
        drawn = torch.randn(self.width, generator=memory.generator(key))
        return torch.cat([self.learnt[: -self.width], drawn.to(self.learnt)])

    @property
    def own(self) -> Tensor:
        """Query network and key in training, or as they were learnt last."""
        bound = self.learner.own_parameter
        return bound if bound.numel() else self.learnt

    def pooled(self, inputs: Inputs) -> Tensor:
        """[B, e] for each coordinate its largest value over the tokens that ask; without such tokens 0."""
        with torch.no_grad(), torch.autocast(self.learner.device.type, enabled=False):
            tokens, asks = self.learner.model.embedded(inputs)
            found = tokens.float().masked_fill(~asks.unsqueeze(-1), float("-inf")).amax(1)
            return found.masked_fill(~asks.any(1, keepdim=True), 0.0)

    def mixture(self, pooled: Tensor, own: Tensor) -> Tensor:
        """Pooled tokens [B, e] -> log weights [B, tasks], the task in training last."""
        down, up, scale, shift = self.parts(own)
        with torch.autocast(self.learner.device.type, enabled=False):
            query = F.layer_norm(F.silu(pooled @ down.T) @ up.T, (self.width,), scale, shift)
            keys = torch.cat([self.keys[: len(self.past)], own[-self.width :].unsqueeze(0)])
            return torch.log_softmax(query @ keys.T / math.sqrt(self.width), -1)

    def parts(self, own: Tensor) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in self.shapes]
        found = own[: -self.width].split(sizes)
        return [part.view(shape) for part, shape in zip(found, self.shapes, strict=True)]

    # -- what is mixed

    @property
    def past(self) -> list[int]:
        """Finished tasks but the one whose adapter the model holds."""
        return [task for task in self.bank.of_task if task not in self.learner.unit]

    def _hook(self) -> None:
        model = self.learner.model
        model.asked = self._asked
        for name in model.layers:
            layer = model.linear_with_adapter(name)
            layer.lora_B[adapters.NAME].register_forward_hook(self._weigh)
            layer.register_forward_hook(partial(self._add, name))

    def _asked(self, inputs: Inputs) -> None:
        """Each row's weights stay with it until others are asked: while tokens are generated, and while a block is
        computed again in the backward pass."""
        if not self.learner.model.is_plain:
            self.weights = self.mixture(self.pooled(inputs), self.own).exp()

    def _weigh(self, _layer: Any, _inputs: Any, said: Tensor) -> Tensor:
        """Of the task in training: peft multiplies what its B says by the scaling."""
        return said * spread(self.weights[:, -1:], said)

    def _add(self, name: str, _layer: Any, inputs: tuple[Tensor, ...], said: Tensor) -> Tensor:
        past = self.past
        if self.learner.model.is_plain or not past:
            return said
        a, b = self.stacks(past)[name]
        inner = F.linear(inputs[0].to(a.dtype), a)
        each = self.weights[:, :-1].repeat_interleave(len(a) // len(past), 1)
        return said + (self.learner.model.scaling * F.linear(inner * spread(each, inner), b)).to(said.dtype)

    def stacks(self, past: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer the adapters of finished tasks, side by side."""
        if self.stacked[0] != past:
            finished = [self.bank[task].to(self.learner.device) for task in past]
            self.stacked = past, side_by_side(self.learner.layout, finished)
        return self.stacked[1]

    # -- a task

    def before_task(self) -> None:
        self.learner.adapter.copy_(self.learner.anchor)

    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        if self.options.replay == "kl" and self.options.lambda_ and self.past:
            own = self.learner.own_parameter
            values = own.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.drift(step, values), values)
            assert own.grad is not None
            own.grad.add_(slope, alpha=self.options.lambda_)

    def drift(self, step: int, own: Tensor) -> Tensor:
        """sum_k KL(mean mixture of task k when it was learnt || mixture now), a mean over some of its kept rows."""
        learner, found = self.learner, []
        for task in self.past:
            key = f"{learner.config.seed}/{learner.unit_name}/{step}/{task}/mixtures"
            rows = memory.draw(len(self.kept[task]), self.options.replay_batch or learner.config.train.batch, key)
            found.append(divergence(self.mixtures[task], self.mixture(self.kept[task][rows], own)))
        return torch.stack(found).sum()

    def after_task(self) -> None:
        (task,) = self.learner.unit
        self.bank.put(task, self.learner.adapter, slot=task)
        self.learnt = self.learner.own_parameter.detach().clone()
        self.keys = torch.cat([self.keys, self.learnt[-self.width :].unsqueeze(0)])
        with self.learner.effort.timed("mixtures"):
            self._look(task)

    @torch.no_grad()
    def _look(self, task: int) -> None:
        """The mean mixture over a task's rows, and the pooled tokens of some, the same on all workers."""
        learner, data = self.learner, self.learner.tasks[task]
        key = f"{learner.config.seed}/{learner.unit_name}/pooled"
        wanted = memory.draw(len(data.train), self.options.memory, key) if self.options.replay == "kl" else []
        places = {row: place for place, row in enumerate(sorted(wanted))}
        total = torch.zeros(len(self.past) + 1, dtype=torch.float64, device=learner.device)
        kept = torch.zeros(len(places), self.width, device=learner.device)
        own, batch = range(learner.comm.rank, len(data.train), learner.comm.workers), learner.config.evaluate.batch
        for at in range(0, len(own), batch):
            rows = own[at : at + batch]
            pooled = self.pooled(learner.model.inputs(data.train.take(rows)))
            total += self.mixture(pooled, self.learnt).exp().double().sum(0)
            for row, each in zip(rows, pooled, strict=True):
                if row in places:
                    kept[places[row]] = each
        learner.comm.sum_(total)
        learner.comm.sum_(kept)
        self.mixtures.append((total / len(data.train)).float())
        self.kept.append(kept)

    def tensors(self) -> dict[str, Tensor]:
        found = {"learnt": self.learnt, "keys": self.keys}
        found |= {f"mixture.{task}": value for task, value in enumerate(self.mixtures)}
        return found | {f"kept.{task}": value for task, value in enumerate(self.kept)}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        there = {name: value.to(self.learner.device) for name, value in tensors.items()}
        self.learnt, self.keys = there["learnt"], there["keys"]
        self.mixtures = [there[f"mixture.{task}"] for task in range(len(self.keys))]
        self.kept = [there[f"kept.{task}"] for task in range(len(self.keys))]

    def report(self) -> dict[str, Any]:
        return {"mixture": [round(float(weight), 4) for weight in self.mixtures[-1]]}

    def values(self, step: int) -> dict[str, float]:
        if self.options.replay == "none" or not self.past:
            return {}
        return {"drift": float(self.drift(step, self.learner.own_parameter.detach()))}


def spread(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [B, K] of rows as factors of values [B, ..., K], or of [B n, ..., K] with n windows or tokens a row."""
    several, rest = divmod(len(values), len(weights))
    assert rest == 0, f"{len(values)} rows came to a layer for {len(weights)} that were asked"
    each = weights.repeat_interleave(several, 0) if several > 1 else weights
    return each.view(len(values), *[1] * (values.ndim - 2), weights.shape[1]).to(values.dtype)


def divergence(then: Tensor, now: Tensor) -> Tensor:
    """Weights [k] and log weights [B, K], K >= k -> the mean KL(then || now); tasks that came later had no weight."""
    padded = F.pad(then, (0, now.shape[1] - len(then)))
    each: Tensor = (torch.special.xlogy(padded, padded) - padded * now).sum(-1)
    return each.mean()
