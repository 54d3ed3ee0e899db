"""The loop: how one unit of tasks is learnt. Everything that trains goes through `train_task`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch

from treelora_ray.methods.base import Method
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.training.errors import NonFiniteError

Step = Callable[[int, int, float, float], None]  # (step, of, loss, norm of the gradient)


def begin_task(method: Method, unit: tuple[int, ...]) -> None:
    """Looks at the unit's tasks, makes room for their classes, and lets the method prepare."""
    learner = method.learner
    learner.unit = unit
    with method.plain():
        for task in unit:
            learner.meet(task)
    attach(method)
    learner.model.train(False)
    method.before_task()
    learner.start_optimizer()


def attach(method: Method) -> None:
    """Binds the unit's part of the head, which the loss then competes in; also after a resume."""
    learner = method.learner
    learner.bind(method.competing() if learner.head.rows else [], method.own_parameters(), method.adapts)
    learner.compete(method.own_classes())
    learner.steps = method.steps(steps_of(learner, learner.unit))


def train_task(method: Method, first: int, after_step: Step, checkpoint: Callable[[int], None]) -> None:
    """Steps of the unit from `first` on, of which the hooks of the method and these callbacks are part."""
    learner, train = method.learner, method.learner.config.train
    optimizer = learner.optimizer
    assert optimizer is not None
    plan = learner.plan(epochs=max(1, -(-learner.steps // learner.plan().steps_per_epoch)))
    for step in range(first, learner.steps):
        seed_step(learner, step)
        learner.model.train(True)
        learner.forget_gradients()
        learner.drawn = method.rows(step, learner.refs(plan.at(step)))
        for refs in micro_batches(learner):
            batch = learner.fetch(refs)
            loss, said = learner.objective.loss(batch)
            extra = method.loss_terms(batch, said)
            (loss if extra is None else loss + extra).backward()
            learner.buffer[-2] += loss.detach()
            learner.buffer[-1] += batch.count
        mean = learner.reduce()
        learner.model.train(False)
        method.edit_gradients(step, mean)
        norm = float(learner.grad.norm())
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise NonFiniteError(learner.unit_name, step, mean, norm)
        if train.clip is not None and norm > train.clip:
            learner.grad.mul_(train.clip / norm)
        share = schedule(train.schedule, train.warmup, step, learner.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
        optimizer.step()
        method.after_step(step)
        learner.effort.steps += 1
        after_step(step, learner.steps, mean, norm)
        done = step + 1
        at_epoch = done % plan.steps_per_epoch == 0
        if done < learner.steps and (at_epoch or (train.checkpoint_every and done % train.checkpoint_every == 0)):
            checkpoint(done)


def end_task(method: Method) -> None:
    method.after_task()
    learner = method.learner
    if learner.rows:
        learner.head.put(learner.rows, learner.head_parameter.detach())
    learner.optimizer = None


def micro_batches(learner: Learner) -> Iterator[list[Ref]]:
    """This worker's rows of the step, in parts of one forward pass."""
    own = learner.drawn[learner.comm.rank :: learner.comm.workers]
    size = learner.config.train.micro_batch or max(len(own), 1)
    for at in range(0, len(own), size):
        yield own[at : at + size]


def steps_of(learner: Learner, unit: tuple[int, ...]) -> int:
    """Optimizer steps of a unit: what the config says for each of its tasks, or its epochs over the unit's rows."""
    train = learner.config.train
    if train.steps is not None:
        return train.steps * len(unit)
    rows = [len(learner.tasks[task].train) for task in unit]
    per_epoch = -(-sum(rows) // train.batch)
    if isinstance(train.epochs, int):
        return train.epochs * per_epoch
    passes = [train.epochs[task] for task in unit]
    epochs = sum(n * e for n, e in zip(rows, passes, strict=True)) / sum(rows)
    return max(1, round(epochs * per_epoch))


def schedule(kind: str, warmup: float, step: int, steps: int) -> float:
    """The share of the learning rate that a step takes; it falls to 0 just after the last."""
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(steps - rising, 1)
    if kind == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1.0


def seed_step(learner: Learner, step: int) -> None:
    """Dropout depends on (seed, task, step, worker) alone, so that a resume draws as the first time."""
    key = f"{learner.config.seed}/{learner.unit_name}/{step}/{learner.comm.rank}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little"))
