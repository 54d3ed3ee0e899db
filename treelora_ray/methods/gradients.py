"""Gradients beside that of the step: of the mean over chosen rows, and of single rows.

The step's own gradient stays as it was, so that both may be asked for anywhere between a backward pass and an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.objectives.base import Batch

Term = Callable[[Sequence[Ref], Batch], Tensor]  # rows and their batch -> the sum of something over what it counts
Value = Callable[[Ref, Batch, Any], Tensor]  # a row, its batch, what the model said -> a number


def mean_gradient(learner: Learner, refs: Sequence[Ref], term: Term | None = None) -> Tensor:
    """[theta] of the mean over rows, the same on all workers; of their loss where no other term is given."""
    ordered = sorted(refs, key=lambda ref: ref[0])  # as `fetch` orders them
    own = ordered[learner.comm.rank :: learner.comm.workers]
    size = learner.config.train.micro_batch or max(len(own), 1)
    with _aside(learner):
        for at in range(0, len(own), size):
            part = own[at : at + size]
            batch = learner.fetch(part)
            value = learner.objective.loss(batch)[0] if term is None else term(part, batch)
            value.backward()
            learner.buffer[-2] += value.detach()
            learner.buffer[-1] += batch.count
        learner.effort.pass_rows += len(own)
        learner.reduce()
        return learner.grad.clone()


def of_each(learner: Learner, refs: Sequence[Ref], value: Value) -> Iterator[tuple[int, Tensor]]:
    """(place, gradient [theta] of the value) of each row that is this worker's, one by one."""
    with _aside(learner):
        for place in range(learner.comm.rank, len(refs), learner.comm.workers):
            learner.forget_gradients()
            batch = learner.fetch([refs[place]])
            value(refs[place], batch, learner.objective.loss(batch)[1]).backward()
            learner.effort.pass_rows += 1
            yield place, learner.grad


@contextmanager
def _aside(learner: Learner) -> Iterator[None]:
    kept = learner.buffer.clone()
    learner.forget_gradients()
    try:
        yield
    finally:
        learner.buffer.copy_(kept)
