"""DER++: remembered rows are to get the answers they got when they were learnt, and their labels.

Buzzega et al. 2020, arXiv 2004.07211.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.methods import outputs
from treelora_ray.methods.base import register
from treelora_ray.methods.gradients import mean_gradient
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import DerOptions
from treelora_ray.methods.remembering import Buffered
from treelora_ray.objectives.base import Batch


@dataclass(frozen=True)
class Said:
    """What the model said of a row: of its classes then, or of the likeliest tokens at each place of its answer."""

    values: Tensor  # [T, k] half precision: logits (T = 1), or log-probabilities
    indices: Tensor  # [T, k] which tokens; [0, 0] for classes, which are the first k
    tokens: int  # digest of the answer's tokens


@register("der++")
class DerPlusPlus(Buffered):
    """CE + alpha mean (1 / w) |z - z_then|^2 on remembered rows + beta CE on others, drawn independently."""

    keeps = "one adapter; the numbers of `memory` rows and what was said of them"
    step_cost = "two forward/backward of `replay_batch` rows (shared_draw: one)"
    reduces = "gradient, gradients of both draws, what was said of the step's rows"

    def __init__(self, learner: Learner, options: Options) -> None:
        assert isinstance(options, DerOptions)
        super().__init__(learner, options)
        self.options = options
        speaks = learner.objective.kind == "causal-lm"
        self.alpha = 0.0 if speaks and options.lm_logits == "off" else options.alpha
        self.beta = options.beta
        self.said: dict[Ref, Said] = {}  # of the rows in the buffer
        self.presented: list[tuple[int, Said]] = []  # this worker's rows of the step: group, what was said

    @property
    def looks_back(self) -> bool:
        return bool(self.alpha or self.beta) and self.capacity > 0

    # -- a step: presented ─► draws from the buffer as it was ─► offered

    def rows(self, step: int, drawn: list[Ref]) -> list[Ref]:  # noqa: ARG002
        self.presented = []
        return drawn

    def loss_terms(self, batch: Batch, said: Any) -> None:
        if self.looks_back and self.options.logits_at == "presentation":
            self.presented += self.heard(batch, said)

    def edit_gradients(self, step: int, loss: float) -> None:  # noqa: ARG002
        if not self.looks_back:
            return
        learner = self.learner
        with learner.effort.timed("memory"):
            learner.model.train(True)
            for refs, alpha, beta in self.draws(step):
                learner.grad.add_(mean_gradient(learner, refs, self.term(alpha, beta)))
            learner.model.train(False)
            if self.options.logits_at == "presentation":
                self.offer(learner.drawn, self.presented)

    def draws(self, step: int) -> list[tuple[list[Ref], float, float]]:
        """Rows of the memory for a step, and the coefficients of both terms on them."""
        wanted = [("logits", self.alpha, 0.0), ("labels", 0.0, self.beta)]
        if self.options.shared_draw:
            wanted = [("both", self.alpha, self.beta)]
        found = []
        for name, alpha, beta in wanted:
            if (alpha or beta) and (refs := self.draw(step, name)):
                found.append((refs, alpha, beta))
        return found

    def term(self, alpha: float, beta: float) -> Callable[[Sequence[Ref], Batch], Tensor]:
        """alpha (z - z_then)^2 + beta CE, summed over the batch; all classes seen compete."""

        def total(refs: Sequence[Ref], batch: Batch) -> Tensor:
            loss, said = self.learner.objective.loss(replace(batch, allowed=None))
            found = beta * loss
            if alpha:
                found = found + alpha * self.error(refs, batch, said)
            return found

        return total

    def error(self, refs: Sequence[Ref], batch: Batch, said: Any) -> Tensor:
        """The mean squared difference from what was said then, summed over rows (tokens of answers)."""
        now, then = outputs.logits(batch, said), [self.said[ref] for ref in refs]
        if batch.targets is not None:
            # Of the classes there were: rows of the head that came later are not told to be 0.
            target, weight = torch.zeros_like(now), torch.zeros_like(now)
            for row, each in enumerate(then):
                width = each.values.shape[1]
                target[row, :width], weight[row, :width] = each.values[0].to(now), 1 / width
            return (weight * (now - target).square()).sum()
        for ref, each, tokens in zip(refs, then, _answers(batch), strict=True):
            if each.tokens != _digest(tokens):
                raise ConfigError(
                    f"row {ref[1]} of task {ref[0]} has other tokens than when it was remembered: go on with the "
                    "tokenizer the run began with, or give the run another name to start anew"
                )
        kept = torch.cat([each.indices for each in then]).to(now.device).long()
        target = torch.cat([each.values for each in then]).to(now)
        return (torch.log_softmax(now, -1).gather(1, kept) - target).square().mean(1).sum()

    # -- the memory

    def heard(self, batch: Batch, said: Any) -> list[tuple[int, Said]]:
        """Of each row its group and what the model says of it."""
        logits, learner = outputs.logits(batch, said).detach(), self.learner
        if batch.targets is not None:
            groups = [learner.rows[place] for place in batch.targets.tolist()]
            halves, nothing = logits.half().cpu(), torch.empty(0, 0, dtype=torch.int32)
            return [
                (group, Said(row.clone().unsqueeze(0), nothing, 0)) for group, row in zip(groups, halves, strict=True)
            ]
        found = []
        parts = logits.split(outputs.answer_lengths(batch))
        for part, tokens in zip(parts, _answers(batch), strict=True):
            values, indices = _likeliest(part, tokens, self.options.top_k if self.alpha else 0)
            found.append((learner.unit[0], Said(values.half().cpu(), indices.int().cpu(), _digest(tokens))))
        return found

    def offer(self, refs: Sequence[Ref], own: Sequence[tuple[int, Said]]) -> None:
        """Rows in the order over all workers, of which each worker has heard its own."""
        comm, heard = self.learner.comm, dict[Ref, tuple[int, Said]]()
        for rank, part in enumerate(comm.gather(list(own))):
            heard |= zip(refs[rank :: comm.workers], part, strict=True)
        self.buffer.offer([(ref, group) for ref, (group, _) in heard.items()], self.capacity)
        for ref, (_, said) in heard.items():
            if self.options.refresh == "last" or ref not in self.said:
                self.said[ref] = said
        self.said = {ref: self.said[ref] for ref in self.buffer.rows()}

    @torch.no_grad()
    def after_task(self) -> None:
        self.presented = []
        if not self.looks_back or self.options.logits_at == "presentation":
            return
        learner, size = self.learner, self.learner.config.evaluate.batch * self.learner.comm.workers
        refs = learner.refs(np.arange(learner.unit_rows))
        for at in range(0, len(refs), size):
            part = refs[at : at + size]
            own = part[learner.comm.rank :: learner.comm.workers]
            heard = []
            if own:
                batch = learner.fetch(own)
                heard = self.heard(batch, learner.objective.loss(batch)[1])
            learner.effort.pass_rows += len(own)
            self.offer(part, heard)

    def tensors(self) -> dict[str, Tensor]:
        said = [self.said[row] for row in self.buffer.rows()]
        shapes = [(*each.values.shape, each.tokens) for each in said]
        return super().tensors() | {
            "shapes": torch.tensor(shapes, dtype=torch.long).view(-1, 3),
            "values": torch.cat([torch.empty(0, dtype=torch.half), *(each.values.reshape(-1) for each in said)]),
            "indices": torch.cat([torch.empty(0, dtype=torch.int32), *(each.indices.reshape(-1) for each in said)]),
        }

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        super().load(tensors, data)
        rows = self.buffer.rows()
        shapes, speaks = tensors["shapes"].tolist(), len(tensors["indices"]) > 0
        values = tensors["values"].split([length * width for length, width, _ in shapes])
        indices = tensors["indices"].split([length * width if speaks else 0 for length, width, _ in shapes])
        self.said = {}
        for ref, (length, width, tokens), value, index in zip(rows, shapes, values, indices, strict=True):
            kept = index.view(length, width) if speaks else index.view(0, 0)
            self.said[ref] = Said(value.view(length, width).clone(), kept.clone(), tokens)

    def report(self) -> dict[str, Any]:
        return {"remembered": len(self.said)}


def _likeliest(logits: Tensor, gold: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[T, k] log-probabilities and tokens: the k likeliest at each place, the right one among them."""
    found = torch.log_softmax(logits, -1)
    indices = found.topk(min(count, found.shape[1]), dim=1).indices
    if indices.shape[1]:
        missing = ~(indices == gold.unsqueeze(1)).any(1)
        indices[missing, -1] = gold[missing]
    return found.gather(1, indices), indices


def _answers(batch: Batch) -> tuple[Tensor, ...]:
    """By row, the tokens of its answer."""
    found: tuple[Tensor, ...] = outputs.gold(batch).split(outputs.answer_lengths(batch))
    return found


def _digest(tokens: Tensor) -> int:
    return zlib.crc32(tokens.cpu().numpy().astype("<i8").tobytes())
