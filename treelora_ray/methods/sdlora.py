"""SD-LoRA: directions of finished tasks are frozen, how far the model goes along each is learnt on.

Wu et al. 2025, arXiv 2501.13198.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.core.merge import AdapterBank
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.directions import inner, mixture
from treelora_ray.methods.folding import fresh
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import SdLoraOptions
from treelora_ray.models.adapters import NAME

LEAST = 1e-8  # the length of a product of which no direction can be told


@dataclass(frozen=True)
class Verdict:
    """What becomes of a finished task's adapter; worker 0 says it."""

    lengths: list[float]  # by layer, of s B A
    weights: list[list[float]] | None  # [slots, 1 or L] of the earlier directions that stand for it; None: its own does
    left: float | None  # of its square length, what they leave out


@register("sd-lora")
class SdLora(Method):
    """W + sum_{k < t} alpha_k D_k + alpha_t s B_t A_t is trained in A_t, B_t and all alpha; each D_k has length 1."""

    keeps = "an adapter for each task (absorb: for some), a magnitude for each (alpha_scope module: L)"
    starts_from = "fresh, beside the directions of the tasks before"
    step_cost = "O(N) times the forward and backward pass through an adapter"
    reduces = "gradient; once a task lengths, and what is absorbed, from worker 0"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, SdLoraOptions)
        self.options = options
        self.bank: AdapterBank = AdapterBank(learner.layout)  # directions, by the task they come from
        self.places = len(learner.layout) if options.alpha_scope == "module" else 1
        self.magnitudes = torch.zeros(0, self.places, device=learner.device)  # [slots, places] of the directions
        self.learning = False
        self.frozen: dict[str, tuple[Tensor, Tensor]] = {}  # by layer, all directions' A [R, d_in] and B [d_out, R]
        self.part = torch.zeros(0, 0, device=learner.device)  # [R, slots] 1 where a rank is of a direction, else 0
        self.said: dict[str, Any] = {}
        self._require_ranks()
        for number, name in enumerate(learner.layout.names):
            place = number if self.places > 1 else 0
            module = learner.model.linear_with_adapter(name)
            module.register_forward_hook(partial(self._add_frozen, name, place))
            module.lora_A[NAME].register_forward_hook(partial(self._scale_current, place))

    def _require_ranks(self) -> None:
        whole = self.learner.config.model.lora.rank
        most = max(rank for _, rank in self.options.rank_schedule or [(1, whole)])
        if most > whole:
            raise ConfigError(
                f"method.rank_schedule asks for rank {most}, adapters have rank {whole}: set model.lora.rank to {most}"
            )

    def rank(self, task: int) -> int:
        """Of a task's adapter."""
        found = self.learner.config.model.lora.rank
        for first, rank in self.options.rank_schedule or []:
            found = rank if task + 1 >= first else found
        return found

    # -- the forward pass

    def now(self) -> Tensor:
        """[slots, places] the magnitudes; while a task is learnt, its own comes last."""
        return self.learner.own_parameter.view(-1, self.places) if self.learning else self.magnitudes

    def _scale_current(self, place: int, module: Any, given: Any, said: Tensor) -> Tensor | None:  # noqa: ARG002
        return said * self.now()[-1, place] if self.learning else None

    def _add_frozen(self, name: str, place: int, module: Any, given: tuple[Tensor, ...], said: Tensor) -> Tensor | None:
        if module.disable_adapters or not self.frozen:
            return None
        a, b = self.frozen[name]
        far = self._by_rank(self.now()[: self.part.shape[1], place])
        return (said + F.linear(F.linear(given[0].to(a.dtype), a) * far, b)).to(said.dtype)

    def _by_rank(self, magnitudes: Tensor) -> Tensor:
        """[slots] -> [R]. Not by indices, whose gradient a GPU adds up in any order; nor as a product, which autocast
        rounds."""
        return (self.part * magnitudes).sum(1)

    # -- a task

    def own_parameters(self) -> Tensor:
        """All magnitudes; from here on, until the task is learnt, the forward pass uses those that are trained."""
        self.learning = True
        start = self.options.alpha_start
        known = self.magnitudes if self.options.alpha_init == "carry" else torch.full_like(self.magnitudes, start)
        return torch.cat([known, known.new_full((1, self.places), start)])

    def before_task(self) -> None:
        learner = self.learner
        learner.adapter.copy_(fresh(learner) if learner.unit[0] else learner.anchor)
        for _, (a, _) in learner.layout.views(learner.adapter):
            a[self.rank(learner.unit[0]) :] = 0  # as are B's columns: neither has a gradient, and so both stay

    @torch.no_grad()
    def after_task(self) -> None:
        learner = self.learner
        verdict = learner.comm.share(self._verdict() if learner.comm.rank == 0 else None)
        assert verdict is not None
        *known, own = self.now().detach().clone()
        past = torch.stack(known) if known else self.magnitudes
        lengths = torch.tensor(verdict.lengths, dtype=torch.float64, device=learner.device)
        whole = float(lengths.norm())
        own = own * self._magnitude(lengths)
        if verdict.weights is not None:
            past = past + own * torch.tensor(verdict.weights, dtype=own.dtype, device=own.device)
        elif whole >= LEAST:
            self.bank.put(learner.unit[0], self._direction(lengths), slot=learner.unit[0])
            past = torch.cat([past, own.unsqueeze(0)])
        self.magnitudes, self.learning = past, False
        learner.adapter.copy_(learner.anchor)
        self._stack()
        self.said = {"length": whole, "absorbed": verdict.weights is not None, "left": verdict.left}

    def _divisors(self, lengths: Tensor) -> Tensor:
        """[L] what makes directions of length 1 of the layers' products."""
        return lengths if self.options.norm == "module" else lengths.norm().expand_as(lengths)

    def _magnitude(self, lengths: Tensor) -> Tensor:
        """[places] what a magnitude is multiplied by where the direction is divided: the model stays what it was.

        With a length for each layer and one magnitude for all that cannot be; then it is the nearest there is.
        """
        divisors = self._divisors(lengths)
        if self.places == 1:
            able = divisors[divisors >= LEAST]
            divisors = able.mean(0, keepdim=True) if len(able) else divisors.new_zeros(1)
        return divisors.float()

    def _direction(self, lengths: Tensor) -> Tensor:
        """[total] of the adapter as it is: its product B A, without s, has length 1 over all layers or in each."""
        found = self.learner.adapter.clone()
        views = self.learner.layout.views(found)
        for (_, (_, b)), divisor in zip(views, self._divisors(lengths).tolist(), strict=True):
            b.mul_(self.learner.model.scaling / divisor if divisor >= LEAST else 0.0)
        return found

    def _verdict(self) -> Verdict:
        learner = self.learner
        squares = inner(learner.layout, learner.adapter, learner.adapter).clamp(min=0)
        lengths = learner.model.scaling * squares.sqrt()
        bound, slots = self.options.absorb, sorted(self.bank.slots)
        if bound is None or not slots or float(lengths.norm()) < LEAST:
            return Verdict(lengths.tolist(), None, None)
        weights, left = self._nearest(self._direction(lengths), [self.bank[slot].to(learner.device) for slot in slots])
        return Verdict(lengths.tolist(), weights.tolist() if left <= bound else None, left)

    def _nearest(self, direction: Tensor, known: list[Tensor]) -> tuple[Tensor, float]:
        """[slots, 1 or L] the mixture of known directions next to one, over all layers or in each; the square left."""
        layout = self.learner.layout
        gram = torch.stack([torch.stack([inner(layout, one, other) for other in known]) for one in known])
        products = torch.stack([inner(layout, one, direction) for one in known])
        if self.options.norm == "joint":
            weights, left = mixture(gram.sum(-1), products.sum(-1))
            return weights.unsqueeze(1), left
        there = inner(layout, direction, direction) > 0
        parts = [mixture(gram[..., layer], products[:, layer]) for layer in range(len(layout))]
        left = max((left for (_, left), has in zip(parts, there.tolist(), strict=True) if has), default=0.0)
        return torch.stack([weights for weights, _ in parts], 1), left

    def _stack(self) -> None:
        """The directions side by side, so that any number of them costs two products in a layer."""
        learner, tasks = self.learner, sorted(self.bank.slots)
        ranks = [self.rank(task) for task in tasks]
        parts = [dict(learner.layout.views(self.bank[task].to(learner.device))) for task in tasks]
        for name in learner.layout.names if tasks else ():
            pairs = [(part[name], rank) for part, rank in zip(parts, ranks, strict=True)]
            a = torch.cat([a[:rank] for (a, _), rank in pairs])
            self.frozen[name] = a, torch.cat([b[:, :rank] for (_, b), rank in pairs], dim=1)
        slots = torch.arange(len(tasks))
        of = torch.repeat_interleave(slots, torch.tensor(ranks, dtype=torch.long))
        self.part = (of.unsqueeze(1) == slots).float().to(learner.device)

    # -- what is there between tasks

    def factors(self, task: int) -> dict[str, tuple[Tensor, Tensor]]:
        """All directions side by side, each B times its magnitude; the same for every task."""
        if not self.frozen:
            return super().factors(task)
        found = {}
        for number, (name, (a, b)) in enumerate(self.frozen.items()):
            far = self._by_rank(self.magnitudes[:, number if self.places > 1 else 0])
            found[name] = a, b * far / self.learner.model.scaling
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {"magnitudes": self.magnitudes}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.magnitudes, self.learning = tensors["magnitudes"].to(self.learner.device), False
        self._stack()

    def report(self) -> dict[str, Any]:
        task, infos = self.learner.unit[0], self.learner.infos
        slots = [infos[slot].name for slot in sorted(self.bank.slots)]
        magnitudes = {slot: far.tolist() for slot, far in zip(slots, self.magnitudes, strict=True)}
        return {"rank": self.rank(task), **self.said, "magnitudes": magnitudes}

    def values(self, step: int) -> dict[str, float]:  # noqa: ARG002
        return {"magnitude": float(self.now()[-1].mean())}
