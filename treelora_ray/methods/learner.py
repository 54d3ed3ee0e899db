"""What learns: the model, its head and router, and the one flat buffer in which a task is trained.

The buffer holds the adapter, then what the method trains beside it (prompts, keys, ...), then the rows of the head that
compete; its gradient has two places more, for the sum of losses and its count: one all-reduce per optimizer step
carries everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.config import RunConfig
from treelora_ray.core.guide import Guide
from treelora_ray.core.layout import Layout
from treelora_ray.data.batches import BatchPlan, permuted
from treelora_ray.data.images import naming
from treelora_ray.data.rows import contents
from treelora_ray.data.task import Task
from treelora_ray.methods.comm import Alone, Comm
from treelora_ray.methods.guides import MakeGuide
from treelora_ray.methods.looks import Look, surroundings
from treelora_ray.methods.shared import Shared
from treelora_ray.models.backbone import CausalModel, Model
from treelora_ray.models.head import Head, log_shares
from treelora_ray.models.router import ClassSums, Router
from treelora_ray.objectives.base import AnchorHead, Batch, Objective, TaskInfo
from treelora_ray.objectives.causal_lm import CausalLM
from treelora_ray.objectives.classification import Classification

Ref = tuple[int, int]  # (task, row of its training data)
SAMPLED, FEWEST = 96, 4  # rows of a task whose frozen features are kept while it is learnt: in all, and of each class


@dataclass
class Effort:
    """What a task has cost: seconds by phase, and what counts as steps."""

    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    probe_rounds: int = 0
    queries: int = 0
    pass_rows: int = 0
    reused: dict[str, float] = field(default_factory=dict)  # of these what another run had computed, and its seconds
    watched: list[list[float]] = field(default_factory=list)  # [steps, percent] at each look while it was learnt

    def __post_init__(self) -> None:
        self._within: list[float] = []  # seconds that inner phases have taken of each phase under way

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """What runs within another phase is counted for itself, not twice."""
        start = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + whole - self._within.pop()
            if self._within:
                self._within[-1] += whole

    def reuse(self, what: str, count: int, seconds: float) -> None:
        self.reused[what] = self.reused.get(what, 0) + count
        self.reused["seconds"] = self.reused.get("seconds", 0.0) + seconds


class Learner:
    def __init__(
        self,
        config: RunConfig,
        model: Model,
        comm: Comm | None = None,
        make_guide: MakeGuide = Guide,
        shared: Shared | None = None,
    ) -> None:
        self.config, self.model, self.comm, self.make_guide = config, model, comm or Alone(), make_guide
        assert shared is None or model.digest, "who shares what it saw of a model must know which model it is"
        self.shared = shared  # on all workers, or on none
        self.layout = Layout.of(model.layers)
        self.device = model.device
        self.anchor = self.layout.flatten(model.layers).clone()  # A as drawn from the seed, B = 0
        self.infos: list[TaskInfo] = []  # of all tasks met so far
        self.head = Head(model.width, config.objective.label_match == "string", self.device)
        self.router = Router(model.width, self.device, config.objective.router)
        self.means: dict[int, Tensor] = {}  # by task of the unit: class means [C, d] of frozen features
        self.counts: dict[int, Tensor] = {}  # likewise: rows of each class [C]
        self.samples: dict[int, tuple[list[int], Tensor]] = {}  # likewise: some rows, and their frozen features [n, d]
        self.objective: Objective
        if isinstance(model, CausalModel):
            self.objective = CausalLM(model, config.objective.max_new_tokens, config.train.precision)
        else:
            self.objective = Classification(model, self.head, self.infos, config.train.precision)
        self.effort = Effort()
        self.unit: tuple[int, ...] = ()
        self.tasks: Sequence[Task] = ()  # the stream's, while there is one to learn from
        self.rows: list[int] = []  # of the head, that are trained now
        self.steps = 0  # of the unit
        self.drawn: list[Ref] = []  # rows of the step over all workers
        self.optimizer: torch.optim.AdamW | None = None
        self.bind([])

    # -- the buffer

    def bind(self, rows: Sequence[int], own: Tensor | None = None, adapts: bool = True) -> None:
        """Lays adapter, parameters of the method's own and these rows of the head into one buffer, with one gradient.

        `own` [n]: their values at first. `adapts`: whether the adapter is trained.
        """
        none = torch.empty(0, device=self.device)
        parts = (none if own is None else own.reshape(-1).to(self.device), self.head.take(rows) if rows else none)
        size = self.layout.total
        ends = size, size + parts[0].numel(), size + parts[0].numel() + parts[1].numel()
        self.rows = list(rows)
        self.theta = torch.empty(ends[-1], device=self.device)
        self.buffer = torch.zeros(ends[-1] + 2, device=self.device)  # gradient, loss, count
        self.theta[size:] = torch.cat(parts)
        self.layout.bind(self.model.layers, self.theta[:size], self.buffer[:size])
        for factor in (factor for pair in self.model.layers.values() for factor in pair):
            factor.requires_grad_(adapts)
        places = {"adapter": slice(0, size), "own": slice(size, ends[1]), "head": slice(ends[1], ends[2])}
        self.parameters = {}
        for name, place in places.items():
            self.parameters[name] = torch.nn.Parameter(self.theta[place], requires_grad=name != "adapter" or adapts)
            self.parameters[name].grad = self.buffer[place]

    def compete(self, own: Sequence[int] | None) -> None:
        """Tells the objective which classes it trains: those in the buffer."""
        if isinstance(self.objective, Classification) and self.rows:
            self.objective.compete(self.rows, self.head_parameter, own)

    @property
    def adapter_parameter(self) -> torch.nn.Parameter:
        return self.parameters["adapter"]

    @property
    def own_parameter(self) -> torch.nn.Parameter:
        """What the method trains beside the adapter: what is computed from it is trained."""
        return self.parameters["own"]

    @property
    def head_parameter(self) -> torch.nn.Parameter:
        return self.parameters["head"]

    @property
    def adapter(self) -> Tensor:
        """[total] the adapter the model holds, a view."""
        return self.theta[: self.layout.total]

    @property
    def grad(self) -> Tensor:
        """[adapter, own and head] a view."""
        return self.buffer[:-2]

    @property
    def adapter_grad(self) -> Tensor:
        return self.buffer[: self.layout.total]

    def forget_gradients(self) -> None:
        self.buffer.zero_()

    def reduce(self) -> float:
        """Sums gradients and losses over the workers, and makes means of them; the mean loss."""
        self.comm.sum_(self.buffer)
        loss, count = self.buffer[-2:].tolist()
        self.grad.div_(max(count, 1.0))
        return float(loss / max(count, 1.0))

    @contextmanager
    def holding(self, adapter: Tensor) -> Iterator[None]:
        """The model answers through this adapter [total], then through its own again.

        Autograd does not hear of it: what was said before is differentiated after, when the own values are back.
        """
        own = self.adapter.clone()
        self.adapter.data.copy_(adapter)
        try:
            yield
        finally:
            self.adapter.data.copy_(own)

    @contextmanager
    def answering_as_trained(self) -> Iterator[None]:
        """The head answers with the rows in training as they are now, then as it was again."""
        before = self.head.take(self.rows) if self.rows else None
        if before is not None:
            self.head.put(self.rows, self.head_parameter.detach())
        try:
            yield
        finally:
            if before is not None:
                self.head.put(self.rows, before)

    # -- the optimizer

    def start_optimizer(self) -> torch.optim.AdamW:
        """A new one for each task: moments of the task before would move what has no gradient now."""
        train = self.config.train
        settings = {
            "adapter": {"lr": train.lr, "weight_decay": self._adapter_decay()},
            "own": {"lr": train.lr, "weight_decay": 0.0},
            "head": {"lr": train.head_lr or train.lr, "weight_decay": 0.0},
        }
        trained = {name: each for name, each in self.parameters.items() if each.requires_grad}
        groups = [{"params": [each], **settings[name]} for name, each in trained.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=train.betas, fused=True)
        for group in self.optimizer.param_groups:
            group["base_lr"] = group["lr"]
        return self.optimizer

    def _adapter_decay(self) -> float:
        # A proximal pull holds the adapter at its target, from which decay would drag it away.
        prox = getattr(self.config.method, "penalty", None) == "prox"
        return 0.0 if prox else self.config.train.weight_decay

    def adam_step(self) -> tuple[float, Tensor]:
        """The adapter's learning rate now, and Adam's bias-corrected second moment [total]."""
        assert self.optimizer is not None
        state = self.optimizer.state[self.adapter_parameter]
        correction = 1 - self.config.train.betas[1] ** float(state["step"])
        return self.optimizer.param_groups[0]["lr"], state["exp_avg_sq"] / correction

    # -- rows

    def fetch(self, refs: Sequence[Ref]) -> Batch:
        """Training rows of any tasks as one batch."""
        columns: dict[str, list[Any]] = {}
        tasks: list[int] = []
        for task in dict.fromkeys(task for task, _ in refs):
            wanted = [row for other, row in refs if other == task]
            for name, values in self.tasks[task].train.take(wanted).items():
                columns.setdefault(name, []).extend(values)
            tasks += [task] * len(wanted)
        with naming(lambda place: self._where(refs, place), columns):
            return self.objective.batch(columns, tasks)

    def _where(self, refs: Sequence[Ref], place: int) -> str:
        """Where the row at a place of a batch comes from; batches go task by task."""
        ordered = [ref for task in dict.fromkeys(task for task, _ in refs) for ref in refs if ref[0] == task]
        task, row = ordered[place]
        return self.tasks[task].train.where(row)

    def refs(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> list[Ref]:
        """Numbers of rows, counted through the tasks of the unit, as (task, row)."""
        ends = np.cumsum([len(self.tasks[task].train) for task in self.unit])
        place = np.searchsorted(ends, rows, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        return [(self.unit[p], int(row - starts[p])) for p, row in zip(place, rows, strict=True)]

    @property
    def unit_rows(self) -> int:
        return sum(len(self.tasks[task].train) for task in self.unit)

    def plan(self, purpose: str = "", batch: int | None = None, epochs: int = 1) -> BatchPlan:
        """Which rows of the unit make which step; another purpose draws other batches."""
        name = self.unit_name + (f"/{purpose}" if purpose else "")
        return BatchPlan(self.unit_rows, batch or self.config.train.batch, epochs, self.config.seed, name)

    @property
    def unit_name(self) -> str:
        return self.tasks[self.unit[0]].name if len(self.unit) == 1 else "joint"

    # -- looking at a task before it is learnt

    def meet(self, task: int) -> None:
        """One pass of the frozen model over a task's training rows: routing statistics and class means."""
        data = self.tasks[task]
        if task < len(self.infos):
            return
        sums = self._statistics(task)
        self.infos.append(TaskInfo(data.name, tuple(data.labels), data.score))
        self.router.add(task, sums)
        self.means[task], self.counts[task] = sums.means.float(), sums.counts.float()
        if data.labels:
            self.head.grow(data.labels, sums)

    def _statistics(self, task: int) -> ClassSums:
        """Of the frozen features of all training rows: the same with every method, adapter and tasks before."""
        data = self.tasks[task]
        rows, labels, sample = range(len(data.train)), list(data.labels), self._sample(data)
        content = contents(data.train, rows) if self.remembers else ""
        key = {"labels": labels, "batch": self.config.evaluate.batch, "rows": content}
        if (look := self.recall("statistics", key)) is not None:
            sums = ClassSums(max(len(labels), 1), self.model.width, self.device)
            sums.flat.copy_(look.tensors["sums"])
            features = look.tensors["sample"].to(self.device)
            own = len(rows[self.comm.rank :: self.comm.workers])
            self.effort.pass_rows += own
            self.effort.reuse("pass_rows", own, look.seconds)
        else:
            start = time.perf_counter()
            sums, features = self._sums(task, rows, self.frozen_features, sample)
            look = Look({"sums": sums.flat, "sample": features}, time.perf_counter() - start)
            self.remember("statistics", key, look)
        self.samples = {other: kept for other, kept in self.samples.items() if other in self.unit}
        self.samples[task] = sample, features
        return sums

    def _sample(self, data: Task) -> list[int]:
        """Some rows, as many of each class where there are as many; which ones depends on the labels alone."""
        if not data.labels:
            return []
        count, most = len(data.train), max(FEWEST, SAMPLED // len(data.labels))
        labels = data.train.take(range(count), ["label"])["label"]
        found: dict[str, list[int]] = {label: [] for label in data.labels}
        for row in permuted(np.arange(count), count, "sample").tolist():
            if len(found[labels[row]]) < most:
                found[labels[row]].append(row)
        return sorted(row for rows in found.values() for row in rows)

    def _sums(
        self, task: int, rows: Sequence[int], features: Callable[[Any], Tensor], sample: Sequence[int] = ()
    ) -> tuple[ClassSums, Tensor]:
        """Of the features of a task's training rows, each seen once whatever the number of workers; a sample's own."""
        sums = ClassSums(max(len(self.tasks[task].labels), 1), self.model.width, self.device)
        kept = torch.zeros(len(sample), self.model.width, device=self.device)
        place = {row: number for number, row in enumerate(sample)}
        own = iter(rows[self.comm.rank :: self.comm.workers])
        with self.effort.timed("statistics"):
            for found, labels in self._seen(task, rows, features):
                sums.add(found, labels)
                for feature, row in zip(found, own, strict=False):
                    if row in place:
                        kept[place[row]] = feature
            self.comm.sum_(sums.flat)
            self.comm.sum_(kept)
        return sums, kept

    def _seen(
        self, task: int, rows: Sequence[int], features: Callable[[Any], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [B, d] and numbers of labels [B] of this worker's share of a task's training rows."""
        data, batch = self.tasks[task], self.config.evaluate.batch
        own = rows[self.comm.rank :: self.comm.workers]
        for at in range(0, len(own), batch):
            part = own[at : at + batch]
            taken = data.train.take(part)
            count = len(next(iter(taken.values())))
            labels = [data.labels.index(label) for label in taken["label"]] if data.labels else [0] * count
            with torch.no_grad(), naming(lambda place, part=part: data.train.where(part[place]), taken):  # type: ignore[misc]
                found = features(taken)
            self.effort.pass_rows += count
            yield found, torch.tensor(labels, device=self.device)

    def class_features(
        self, task: int, features: Callable[[Any], Tensor], rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [n, d] and numbers of labels [n] of a task's training rows, in their order, on all workers.

        Of these rows, or of all.
        """
        rows, comm = range(len(self.tasks[task].train)) if rows is None else rows, self.comm
        found = torch.zeros(len(rows), self.model.width, device=self.device)
        labels = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        if seen := list(self._seen(task, rows, features)):
            found[comm.rank :: comm.workers] = torch.cat([part for part, _ in seen])
            labels[comm.rank :: comm.workers] = torch.cat([part for _, part in seen])
        comm.sum_(found)
        comm.sum_(labels)
        return found, labels

    def class_sums(self, task: int) -> ClassSums:
        """Counts, sums and products of a task's features, class by class, through the adapter as it is."""
        return self._sums(task, range(len(self.tasks[task].train)), self.features)[0]

    def moved_sums(self, task: int) -> ClassSums:
        """About what `class_sums` gives, from the sample alone.

        Means over the sample are off by how far its rows lie from their classes' true means. For frozen features that
        is known; what the adapter leaves of it (a share, fitted over all rows) is taken off again. Around the means all
        rows lie as those of the sample do.
        """
        rows, before = self.samples[task]
        with self.effort.timed("statistics"):
            after, labels = self.class_features(task, self.features, rows)
        frozen, moved, found = (ClassSums(len(self.counts[task]), self.model.width, self.device) for _ in range(3))
        frozen.add(before, labels)
        moved.add(after, labels)
        away, still = before - frozen.means[labels], after - moved.means[labels]
        share = (away * still).sum() / away.square().sum().clamp(min=1e-12)
        counts = self.counts[task].double()
        means = moved.means + share * (self.means[task].double() - frozen.means)
        free = len(rows) - int((moved.counts > 0).sum())
        found.counts.copy_(counts)
        found.sums.copy_(means * counts.unsqueeze(1))
        found.products.copy_(moved.scatter() * (counts.sum() / max(free, 1)) + found.sums.T @ means)
        return found

    def restart_head(self, sums_of: Callable[[int], ClassSums]) -> None:
        """The unit's rows of the head start again, from features through the adapter as it is now.

        Where it is warm it has moved them: means of frozen ones would belong to another model.
        """
        for task in self.unit:
            if self.tasks[task].labels:
                self.head.restart(task, sums_of(task))
        if self.rows:
            with torch.no_grad():
                self.head_parameter.copy_(self.head.take(self.rows))

    # -- what earlier runs of this process or sweep have seen already

    def recall(self, kind: str, key: Mapping[str, Any], fits: Callable[[Look], bool] = lambda _: True) -> Look | None:
        """What another run saw where it depends on the same; worker 0 says whether there is such a look."""
        if self.shared is None:
            return None
        found = self.shared.looks.find(kind, self._whole(key)) if self.remembers else None
        return self.comm.share(found if found is None or fits(found) else None)

    def remember(self, kind: str, key: Mapping[str, Any], look: Look) -> None:
        if self.shared is not None and self.remembers:
            self.shared.looks.put(kind, self._whole(key), look)

    def _whole(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """With all that every pass through the model depends on."""
        model, train = self.config.model, self.config.train
        return {
            "backbone": self.model.digest,
            "kind": self.model.kind,
            "pooling": getattr(self.model, "pooling", None),
            "length": [model.max_length, model.on_long],
            "checkpointing": model.gradient_checkpointing,
            "precision": train.precision,
            "workers": self.comm.workers,
            **surroundings(self.device),
            **key,
        }

    @property
    def remembers(self) -> bool:
        """Whether this worker's looks are kept, and so need a key."""
        return self.shared is not None and self.comm.rank == 0

    def features(self, rows: Any) -> Tensor:
        """[B, d] through the adapter as it is."""
        with self.model.autocast(self.config.train.precision):
            return self.model.features(self.model.inputs(rows)).float()

    def frozen_features(self, rows: Any) -> Tensor:
        """[B, d] of the model without adapters."""
        with self.model.plain():
            return self.features(rows)

    def anchor_head(self) -> AnchorHead | None:
        if not self.rows:
            return None
        place = {row: number for number, row in enumerate(self.rows)}
        means = torch.zeros(len(self.rows), self.model.width, device=self.device)
        counts = torch.zeros(len(self.rows), device=self.device)
        for task in self.unit:
            at = [place[row] for row in self.head.rows[task]]
            means[at], counts[at] = self.means[task], self.counts[task]
        return AnchorHead(means, log_shares(counts).float())
