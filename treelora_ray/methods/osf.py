"""OSF: the weights are trained where their largest singular directions do not lie.

Nayak et al. 2025, arXiv 2504.07097; what is trained and how gradients are projected is as in peft's OSF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.methods import memory
from treelora_ray.methods.base import register
from treelora_ray.methods.folding import Folding
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import OsfOptions

MOST = 0.95  # of a matrix's directions that the adaptive schedule freezes

Factors = tuple[Tensor, Tensor, Tensor]  # U [d_out, q], S [q], V [q, d_in]


@dataclass(frozen=True)
class Split:
    """A matrix [d_out, d_in] as its unit began: the k largest singular directions, and the others."""

    high: Factors
    low: Factors


@register("osf")
class Osf(Folding):
    """W = U_h S_h V_h + U_l S_l V_l, of which U_l, S_l, V_l are trained at right angles to U_h and V_h."""

    keeps = "the weights of the adapted layers, rewritten"
    starts_from = "none: the weights go on, with the largest singular directions frozen"
    step_cost = "two products of the layers' size in each, and projections"
    reduces = "gradient; once a task the factors, which worker 0 makes"
    adapts = False
    unexported = (
        "osf rewrites the weights of the adapted layers, which is no low-rank adapter; `treelora model` writes the "
        "whole run for other programs"
    )

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, OsfOptions)
        self.options = options
        self.done = 0  # units
        self.ranks: list[int] = []  # by layer, how many directions are frozen in the unit; empty between units
        self.least = [0] * len(learner.layout)  # by layer, how many the next unit has to freeze
        self.frozen: list[int] = []  # by layer, in the last unit
        self.overtaken: list[int] = []  # by layer, directions learnt in it that have grown above those
        self.splits: dict[str, Split] = {}  # by layer, while a unit is learnt
        self.leaves: tuple[Tensor | None, dict[str, Factors]] = None, {}  # of which parameter
        for name in learner.layout.names:
            learner.model.linear_with_adapter(name).register_forward_hook(partial(self._add, name))

    # -- what is trained

    def weight(self, name: str) -> Tensor:
        """[d_out, d_in] of a layer, as it is now."""
        model = self.learner.model
        found: Tensor = model.linear(name).weight.data
        return (found.T if model.transposed(name) else found).float()

    def own_parameters(self) -> Tensor:
        """The factors that are trained, layer after layer."""
        with self.learner.effort.timed("decompose"), torch.no_grad():
            self.ranks = self.ranks or self.plan()
            self.splits = self.decompose()
        parts = [part.reshape(-1) for split in self.splits.values() for part in split.low]
        return torch.cat(parts)

    def decompose(self) -> dict[str, Split]:
        """By worker 0: where singular values tie, their vectors are the machine's choice."""
        learner, found = self.learner, {}
        for name, k in zip(learner.layout.names, self.ranks, strict=True):
            weight = self.weight(name)
            d = min(weight.shape)
            if learner.comm.rank == 0:
                flat = torch.cat([part.reshape(-1) for part in singular(weight)])
            else:
                flat = torch.zeros((sum(weight.shape) + 1) * d, device=weight.device)
            learner.comm.sum_(flat)
            u, s, v = factors(flat, weight.shape, d)
            found[name] = Split((u[:, :k], s[:k], v[:k]), (u[:, k:], s[k:], v[k:]))
        return found

    def views(self, flat: Tensor) -> dict[str, Factors]:
        """Of a vector like `own_parameters`, by layer."""
        found, at = {}, 0
        for name, split in self.splits.items():
            shape, inner = (len(split.low[0]), split.low[2].shape[1]), len(split.low[1])
            size = (sum(shape) + 1) * inner
            found[name] = factors(flat[at : at + size], shape, inner)
            at += size
        return found

    def trained(self) -> dict[str, Factors]:
        """By layer what is trained, as leaves that share values and gradients with the learner's buffer.

        Were they taken from the parameter within the graph, each layer's backward pass would fill a gradient of all.
        """
        own = self.learner.own_parameter
        if self.leaves[0] is not own:
            assert own.grad is not None
            found = self.views(own.data)
            for parts, slopes in zip(found.values(), self.views(own.grad).values(), strict=True):
                for part, slope in zip(parts, slopes, strict=True):
                    part.requires_grad_().grad = slope
            self.leaves = own, found
        return self.leaves[1]

    def _add(self, name: str, _layer: Any, inputs: tuple[Tensor, ...], said: Tensor) -> Tensor:
        """W x + (U_l S_l V_l - as they were) x."""
        if name not in self.splits or self.learner.model.is_plain:
            return said
        (u, s, v), (u0, s0, v0) = self.trained()[name], self.splits[name].low
        inner = F.linear(inputs[0].to(v.dtype), torch.cat([v, v0]))
        return said + F.linear(inner, torch.cat([u * s, -u0 * s0], dim=1)).to(said.dtype)

    # -- how much is frozen

    def plan(self) -> list[int]:
        """By layer, how many directions the unit freezes."""
        learner, options = self.learner, self.options
        sizes = [min(self.weight(name).shape) for name in learner.layout.names]
        if options.schedule == "linear":
            tasks = len(learner.tasks)
            way = self.done / (tasks - 1) if tasks > 1 else 0.0
            shares = [options.first + (options.last - options.first) * way] * len(sizes)
        else:
            alike = self.likeness()
            shares = [options.least + each * (options.usual - options.least) for each in alike]
            shares = [min(max(share, options.least), MOST) for share in shares]
        wanted = [max(1, round(size * share)) for size, share in zip(sizes, shares, strict=True)]
        return [min(max(k, least), size) for k, least, size in zip(wanted, self.least, sizes, strict=True)]

    def likeness(self) -> list[float]:
        """By layer, the mean cosine of its block's input and output over some rows of the unit; their mean is 1."""
        learner, model = self.learner, self.learner.model
        blocks = [block_of(name) for name in learner.layout.names]
        names = list(dict.fromkeys(blocks))
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=learner.device)
        mask: Tensor | None = None

        def note(place: int, _block: Any, args: tuple[Any, ...], more: dict[str, Any], said: Any) -> None:
            before, after = args[0] if args else more["hidden_states"], said[0] if isinstance(said, tuple) else said
            if before.shape != after.shape:
                raise ConfigError(
                    f"method.schedule adaptive compares a block's input with its output, and those of {names[place]} "
                    f"have shapes {list(before.shape)} and {list(after.shape)}: use linear"
                )
            cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)
            counts = torch.ones_like(cosine) if mask is None else mask.to(cosine)
            sums[place] += torch.stack([(cosine * counts).sum(), counts.sum()])

        hooks = [
            model.backbone.get_submodule(name).register_forward_hook(partial(note, place), with_kwargs=True)
            for place, name in enumerate(names)
        ]
        try:
            for rows in self._sampled():
                inputs = model.inputs(rows)
                mask = inputs.get("attention_mask")
                with model.autocast(learner.config.train.precision):
                    model.features(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        learner.comm.sum_(sums)
        means = dict(zip(names, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), strict=True))
        each = [means[block] for block in blocks]
        usual = sum(each) / len(each)
        return [value / usual for value in each] if usual > 0 else [1.0] * len(each)

    def _sampled(self) -> list[Mapping[str, Sequence[Any]]]:
        """This worker's part of the rows."""
        learner = self.learner
        found: list[Mapping[str, Sequence[Any]]] = []
        for task in learner.unit:
            rows = learner.tasks[task].train
            key = f"{learner.config.seed}/{learner.unit_name}/alike"
            own = sorted(memory.draw(len(rows), self.options.sample, key))[learner.comm.rank :: learner.comm.workers]
            batch = learner.config.evaluate.batch
            found += [rows.take(own[at : at + batch]) for at in range(0, len(own), batch)]
            learner.effort.pass_rows += len(own)
        return found

    # -- a task

    def before_task(self) -> None:
        """The adapter says nothing and is not trained."""

    @torch.no_grad()
    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        assert self.learner.own_parameter.grad is not None
        self._clear(self.learner.own_parameter.grad)

    @torch.no_grad()
    def after_step(self, step: int) -> None:  # noqa: ARG002
        if self.options.retract:
            self._clear(self.learner.own_parameter.data)

    def _clear(self, flat: Tensor) -> None:
        """U_l <- (I - U_h U_h^T) U_l and V_l <- V_l (I - V_h^T V_h), of factors or of their gradients."""
        for name, (u, _, v) in self.views(flat).items():
            high_u, _, high_v = self.splits[name].high
            u.sub_(high_u @ (high_u.T @ u))
            v.sub_((v @ high_v.T) @ high_v)

    @torch.no_grad()
    def after_task(self) -> None:
        learned = self.views(self.learner.own_parameter.detach())
        self.frozen = self.ranks
        with self.learner.effort.timed("decompose"):
            leads = self.learner.comm.rank == 0
            counts = [above(self.splits[name].high[1], each) for name, each in learned.items()] if leads else []
            self.overtaken = self.learner.comm.share(counts)
        for name, (u, s, v) in learned.items():
            if len(s):
                u0, s0, v0 = self.splits[name].low
                self.rewrite(name, self.weight(name) + ((u * s) @ v - (u0 * s0) @ v0))
        if self.options.keep_frozen:
            self.least = [k + more for k, more in zip(self.frozen, self.overtaken, strict=True)]
        self.done, self.ranks, self.splits, self.leaves = self.done + 1, [], {}, (None, {})

    def rewrite(self, name: str, weight: Tensor) -> None:
        """[d_out, d_in] in place of a layer's weight; the one that was loaded is kept for `plain`."""
        model = self.learner.model
        linear = model.linear(name)
        loaded = self.weights[name][0] if name in self.weights else linear.weight.data
        now = (weight.T if model.transposed(name) else weight).to(loaded.dtype).contiguous()
        self.weights[name] = loaded, now
        linear.weight.data = now

    def factors(self, task: int) -> dict[str, tuple[Tensor, Tensor]]:  # noqa: ARG002
        """The whole change of each weight, with the identity as A: of the layer's full rank."""
        found, scaling = {}, self.learner.model.scaling
        now = {name: self.weight(name) for name in self.learner.layout.names}
        with self.plain():
            for name, weight in now.items():
                change = (weight - self.weight(name)) / scaling
                found[name] = torch.eye(change.shape[1], device=change.device), change
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {f"weight.{name}": now for name, (_, now) in self.weights.items()}

    def to_json(self) -> dict[str, Any]:
        return {"done": self.done, "ranks": self.ranks, "least": self.least}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        model = self.learner.model
        self.done, self.ranks, self.least = data["done"], data["ranks"], data["least"]
        for name, weight in tensors.items():
            layer = name.removeprefix("weight.")
            found = weight.to(self.learner.device)
            self.rewrite(layer, found.T if model.transposed(layer) else found)

    def report(self) -> dict[str, Any]:
        return {"frozen": self.frozen, "overtaken": self.overtaken}


def singular(weight: Tensor) -> Factors:
    """U, S and V of a matrix. The largest entry of each column of U is positive: signs are not left to the machine."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, s, v * signs.T


def factors(flat: Tensor, shape: Sequence[int], inner: int) -> Factors:
    """U, S and V as views of a vector, of a matrix of this shape."""
    u, s, v = flat.split([shape[0] * inner, inner, inner * shape[1]])
    return u.view(shape[0], inner), s, v.view(inner, shape[1])


def above(frozen: Tensor, learned: Factors) -> int:
    """How many singular values of U S V are larger than the smallest frozen one."""
    u, s, v = learned
    if not len(s):
        return 0
    left, right = torch.linalg.qr(u).R, torch.linalg.qr(v.T).R
    return int((torch.linalg.svdvals(left * s @ right.T) > frozen[-1]).sum())


def block_of(name: str) -> str:
    """The innermost numbered module that a layer lies in."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    if not numbers:
        raise ConfigError(f"method.schedule adaptive compares blocks, and {name} lies in none: use linear")
    return ".".join(parts[: numbers[-1] + 1])
