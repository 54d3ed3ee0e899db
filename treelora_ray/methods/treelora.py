"""TreeLoRA: a task starts from, and is pulled towards, the past tasks whose gradients its own resemble.

treelora   probe at the anchor ─► Guide commits ─► warm start, layer by layer ─► train with a pull ─► insert
paper      each step: the guide names a task a layer, the displacement's direction is compared and pulled
released   each step likewise, with the published code's sums, sampling, ramp and sign
observe: query (treelora, paper): gradients of the batch at the stored adapters are compared instead
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.core.config import GuideConfig
from treelora_ray.core.errors import SettingError
from treelora_ray.core.layout import IntArray, Layout
from treelora_ray.core.merge import AdapterBank
from treelora_ray.core.penalty import AdapterPull, DirectionPull, InnerPull, Strength
from treelora_ray.core.signature import Accumulator, directions, layer_distances
from treelora_ray.core.state import Choice, Snapshot
from treelora_ray.data.rows import contents
from treelora_ray.files import part
from treelora_ray.methods import prior
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.hide import PART, Decomposition, part_of
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.looks import Look, sha256
from treelora_ray.methods.options import FitOptions, TreeLoraOptions
from treelora_ray.objectives.base import AnchorHead

NOTHING = -1


def guide_settings(options: Options, seed: int) -> GuideConfig:
    """The guide's settings, checked together with the method's."""
    assert isinstance(options, TreeLoraOptions)
    per_task = {"steps_per_epoch": 1} if options.mode == "released" else {}  # each task brings its own
    config = GuideConfig.of(options.mode, **{**options.guide, "seed": seed, **per_task})
    wrong = []
    if options.mode == "treelora" and config.observe == "step":
        wrong.append("observe is 'step', which modes paper and released have: use probe or query")
    if options.mode == "treelora" and config.signature != "anchor":
        wrong.append(f"signature is {config.signature!r}; in mode treelora it is always anchor")
    if options.mode == "paper" and config.signature not in ("delta", "raw", "grad_ema"):
        wrong.append(f"signature is {config.signature!r}; mode paper knows delta, raw, grad_ema")
    if options.mode == "released" and config.signature != "running":
        wrong.append(f"signature is {config.signature!r}; in mode released it is always running")
    if options.start == "similar" and config.observe != "probe":
        wrong.append(f"start is 'similar', but with observe {config.observe!r} nothing is known of a task at its start")
    if options.penalty == "prox" and options.mode != "treelora":
        wrong.append(f"penalty is 'prox', which mode {options.mode} does not have: use l1")
    if options.decomposition == "hide" and config.budget is not None:
        wrong.append(
            f"decomposition is 'hide' and budget {config.budget}: adapters that merge change features of classes whose "
            "rows are gone: leave one of them out"
        )
    if wrong:
        raise SettingError("method treelora:\n  " + "\n  ".join(wrong))
    return config


@register("treelora")
class TreeLora(Method):
    keeps = "an adapter for each task, or a budget; a signature for each task"
    step_cost = "the pull: a few operations on the adapter; with observe query 1 + (tasks named) forward/backward"
    reduces = "gradient, probe gradients; what the guide says is told by worker 0"

    @classmethod
    def start_of(cls, options: Mapping[str, Any]) -> str:
        observed = options.get("guide", {}).get("observe", "probe" if options["mode"] == "treelora" else "step")
        start = options["start"] or ("similar" if observed == "probe" else "previous")
        return {
            "similar": "layer by layer from related tasks, else fresh",
            "previous": "the task before",
            "fresh": "fresh",
        }[start]

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, TreeLoraOptions)
        self.options, self.settings = options, guide_settings(options, learner.config.seed)
        self.start = options.start or ("similar" if self.settings.observe == "probe" else "previous")
        self.places, signatures = self._signature_layout()
        self.guide = learner.make_guide(signatures, self.settings)
        self.bank: AdapterBank = AdapterBank(learner.layout)
        self.choice: Choice | None = None
        self.running: Accumulator | None = None
        self.arms: IntArray = np.empty(0, np.int64)  # [L] what each layer is compared with now
        self.pull: AdapterPull | DirectionPull | InnerPull | None = None
        self.density: list[float] = []
        self.merged: list[int] = []  # stored tasks that came to share an adapter with the last insertion
        self.pulls: dict[str, Any] | None = None  # what the last task was compared with; of worker 0
        self.prior: dict[str, Any] | None = None  # where the tasks come from that guide and bank began with
        self.decomposition = self._decomposition()

    def _decomposition(self) -> Decomposition | None:
        if self.options.decomposition == "none":
            return None
        if self.learner.objective.kind != "classification":
            raise ConfigError(
                f"method.decomposition is {self.options.decomposition!r}, which fits a classifier, but the stream is "
                f"for {self.learner.objective.kind}: leave it out"
            )
        return Decomposition(self, FitOptions(name=self.options.name))

    def _signature_layout(self) -> tuple[Tensor, Layout]:
        """Where in the adapter a signature's values lie, and its layout: B of all layers, or A of the first ones."""
        learner, part = self.learner, 1 if self.options.mode == "treelora" else 0
        layers = list(learner.model.layers.items())
        if part == 0:
            layers = layers[: self.settings.depth]
        layout = Layout.of({name: pair[part] for name, pair in layers})
        numbers = torch.arange(learner.layout.total)
        at = {name: views[part] for name, views in learner.layout.views(numbers)}
        places = torch.empty(layout.total, dtype=torch.long)
        for name, (view,) in layout.views(places):
            view.copy_(at[name])
        return places.to(learner.device), layout

    # -- tasks of before: guide and bank number the prior's tasks first, then the stream's

    def before_stream(self) -> None:
        if self.options.prior is not None:
            found = prior.read(Path(self.options.prior), self.learner, self.settings)
            self.guide.restore(found.guide)
            self.bank.slots, self.bank.of_task, self.prior = found.slots, found.of_task, found.record

    def export_tree(self, path: Path) -> None:
        """One file for another run's `prior`; between two tasks only."""
        prior.write(path, self.learner, self.guide.snapshot(), self.bank)

    def stored(self, task: int) -> int:
        """The number that guide and bank have for a task of the stream."""
        return task + self.older

    def own(self, stored: Sequence[int]) -> list[int]:
        """Of tasks as guide and bank number them, those of the stream."""
        return [number - self.older for number in stored if number >= self.older]

    @property
    def older(self) -> int:
        return 0 if self.prior is None else int(self.prior["tasks"])

    # -- a task's life

    def before_task(self) -> None:
        learner, options = self.learner, self.options
        previous = self.bank[len(self.bank.of_task) - 1] if self.bank.of_task else learner.anchor
        steps = learner.plan().steps_per_epoch if options.mode == "released" else None
        self.guide.begin_task(learner.unit_name, steps_per_epoch=steps)
        self.choice, self.running, self.density = None, None, []
        self.arms = np.empty(0, np.int64)
        if options.mode == "treelora":
            self._probe()
        learner.adapter.copy_(previous if self.start == "previous" else learner.anchor)
        if self.choice is not None and self.start == "similar":
            self.bank.segments(self.choice.warm.tolist(), out=learner.adapter)
            if (self.choice.warm >= 0).any():
                learner.restart_head(learner.moved_sums)
        self._ready()

    def _probe(self) -> None:
        """Mean gradients at the anchor, on mini-batches of their own, which count as steps."""
        learner, rounds = self.learner, self.options.probe_rounds
        plan = learner.plan("probe", self.options.probe_batch, epochs=rounds)
        head, total = learner.anchor_head(), torch.zeros(len(self.places), device=learner.device)
        learner.adapter.copy_(learner.anchor)
        drawn = [learner.refs(plan.at(step)) for step in range(rounds)]
        with learner.effort.timed("probe"):
            for step, gradient in enumerate(self._gradients_at_anchor(drawn, head)):
                total += gradient
                if self.settings.observe == "probe":
                    self.guide.probe(step, gradient)
                learner.effort.probe_rounds += 1
            if self.settings.observe == "probe":
                self.choice = self.guide.commit()
        if self.settings.observe == "query":
            self.running = Accumulator(self.guide.full_layout, "anchor")
            self.running.add(total / rounds)

    def _gradients_at_anchor(self, drawn: Sequence[list[Ref]], head: AnchorHead | None) -> Iterator[Tensor]:
        """[signature] of each mini-batch: as another run saw it where it would be the same here, computed elsewhere."""
        learner = self.learner
        key, rows = self._probed_from(drawn, head) if learner.remembers else ({}, [])
        look = learner.recall("probe", key, lambda look: _agree(rows, look.told["rows"]))
        known, seconds = ([], 0.0) if look is None else (list(look.tensors["gradients"]), look.seconds)
        if known:
            most = min(len(known), len(drawn))
            learner.effort.reuse("probe_rounds", most, seconds * most / len(known))
        yield from (gradient.to(learner.device) for gradient in known[: len(drawn)])
        if len(known) >= len(drawn):
            return
        for refs in drawn[len(known) :]:
            start = time.perf_counter()
            known.append(self._gradient_at_anchor(refs[learner.comm.rank :: learner.comm.workers], head))
            seconds += time.perf_counter() - start
            yield known[-1]
        gradients = torch.stack([gradient.cpu() for gradient in known])
        learner.remember("probe", key, Look({"gradients": gradients}, seconds, {"rows": rows}))

    def _probed_from(self, drawn: Sequence[list[Ref]], head: AnchorHead | None) -> tuple[dict[str, Any], list[str]]:
        """What a gradient at the anchor depends on beside the model, and what the rows of each round hold.

        Other tasks matter where their classes compete; the head, the penalty and how training goes do not.
        """
        learner, batch = self.learner, self.options.probe_batch or self.learner.config.train.batch
        place = {row: number for number, row in enumerate(learner.rows)}
        (task,) = learner.unit
        heads = learner.head.rows[task] if learner.rows else []
        labels = learner.tasks[task].labels if learner.rows else ()
        key = {
            "anchor": sha256(learner.anchor),
            "scaling": learner.model.scaling,
            "layout": learner.layout.to_json(),
            "signature": sha256(self.places),
            "labels": [[label, place[row]] for label, row in zip(labels, heads, strict=True)],
            "head": None if head is None else [sha256(head.means), sha256(head.log_shares)],
            "micro_batch": learner.config.train.micro_batch,
            "drawn": [learner.unit_name, learner.unit_rows, batch, learner.config.seed],
        }
        return key, [contents(learner.tasks[task].train, [row for _, row in refs]) for refs in drawn]

    def _gradient_at_anchor(self, drawn: list[tuple[int, int]], head: AnchorHead | None) -> Tensor:
        """[signature] of one mini-batch, a mean over all workers."""
        learner = self.learner
        learner.forget_gradients()
        size = learner.config.train.micro_batch or len(drawn)
        for at in range(0, len(drawn), max(size, 1)):
            batch = learner.fetch(drawn[at : at + size])
            (learner.objective.anchor_loss(batch, head) * batch.count).backward()
            learner.buffer[-1] += batch.count
        learner.reduce()
        return learner.adapter_grad[self.places]

    def _ready(self) -> None:
        """Aims the pull, at a task's start and after a resume."""
        learner, mode = self.learner, self.options.mode
        epoch = learner.plan().steps_per_epoch
        ramp = self.options.ramp or ("epoch" if mode == "released" else "constant")
        self.strength = Strength(self.options.lambda_, ramp, epoch)
        self.epoch_steps = epoch
        self.pull = None
        if mode == "treelora":
            self.pull = AdapterPull(learner.layout, learner.device)
            self._aim(self.choice.warm if self.choice is not None else self.arms)
            return
        start = learner.adapter[self.places]
        if self.running is None:
            kind = self.settings.signature
            self.running = Accumulator(self.guide.full_layout, kind, start, steps_per_epoch=epoch)
        if mode == "paper":
            begins = torch.zeros_like(start) if self.settings.signature == "raw" else start
            self.pull = DirectionPull(self.guide.full_layout, begins)
        else:
            self.pull = InnerPull(self.guide.full_layout, learner.device)

    def _aim(self, tasks: IntArray) -> None:
        """The adapter is pulled, layer by layer, towards the adapters of these tasks."""
        assert isinstance(self.pull, AdapterPull)
        if len(tasks) and (tasks >= 0).any():
            target = self.bank.segments(tasks.tolist()).to(self.learner.device)
            self.pull.aim(target, torch.from_numpy(tasks >= 0))

    def edit_gradients(self, step: int, loss: float) -> None:
        learner, strength = self.learner, self.strength.at(step)
        if self.options.mode == "treelora":
            assert isinstance(self.pull, AdapterPull)
            if self.settings.observe == "query" and step % self.options.query_every == 0:
                self._query(step)
            if strength and self.options.penalty == "l1":
                self.pull.add_(learner.adapter_grad, learner.adapter, strength)
        else:
            self._follow(step, strength, loss)

    def _follow(self, step: int, strength: float, loss: float) -> None:
        """Modes paper and released: compare, tell the guide, pull."""
        learner, running = self.learner, self.running
        assert running is not None
        theta = learner.adapter[self.places]
        if step % self.epoch_steps == 0:
            running.start_epoch()
        if self.settings.signature == "running":
            running.add(theta)
        elif self.settings.signature == "grad_ema":
            running.add(-learner.adapter_grad[self.places])  # the way down, as a displacement is
        if not len(self.guide.names) or step < self.warm_up:
            return
        if self.settings.observe == "query" and step % self.options.query_every == 0:
            self._query(step)
        elif self.settings.observe == "step":
            with learner.effort.timed("exchange"):
                self.arms = self.guide.select(step)
        target = self.guide.directions(self.arms).to(learner.device)
        pulled = torch.zeros_like(theta)
        if isinstance(self.pull, InnerPull):
            away = running.value().to(target) - target
            seen = self.guide.layout.per_layer(lambda x: x.abs().sum(-1), away)
            self.pull.aim(target)
            self.pull.add_(pulled, theta, strength, torch.tensor(loss, device=learner.device))
        else:
            assert isinstance(self.pull, DirectionPull)
            self.pull.aim(target, torch.from_numpy(self.arms >= 0))
            seen = self.pull.measure(theta)
            self.pull.add_(pulled, strength)
        if self.settings.observe == "step":
            with learner.effort.timed("exchange"):
                self.guide.observe(step, seen)
        if strength:
            learner.adapter_grad.index_add_(0, self.places, pulled)

    def _query(self, step: int) -> None:
        """Compares the batch's gradient here with its gradient at the stored adapters the guide names."""
        learner = self.learner
        arms = self.guide.select(step)
        if (arms < 0).all():
            return
        drawn = learner.drawn[: self.options.query_batch][learner.comm.rank :: learner.comm.workers]
        kept = learner.buffer.clone()
        with learner.effort.timed("query"):
            own = self._query_gradient(drawn)
            there = torch.zeros_like(own)
            layers = range(len(arms))
            for arm in sorted(set(arms.tolist()) - {NOTHING}):
                with learner.holding(self.bank[arm].to(learner.device)):
                    gradient = self._query_gradient(drawn)
                for layer in layers:
                    if arms[layer] == arm:
                        learner.layout.segment(there, layer).copy_(learner.layout.segment(gradient, layer))
        learner.buffer.copy_(kept)
        kind = self.settings.distance
        here, away = directions(learner.layout, own, kind), directions(learner.layout, there, kind)
        self.guide.observe(step, layer_distances(learner.layout, here, away, kind)[: len(arms)])
        self.arms = arms
        if self.options.mode == "treelora":
            self._aim(arms)

    def _query_gradient(self, drawn: list[tuple[int, int]]) -> Tensor:
        """[total] over A and B, with the task's own head."""
        learner = self.learner
        learner.forget_gradients()
        if drawn:
            batch = learner.fetch(drawn)
            learner.objective.loss(batch)[0].backward()
            learner.buffer[-1] += batch.count
        learner.reduce()
        learner.effort.queries += 1
        return learner.adapter_grad.clone()

    @property
    def warm_up(self) -> int:
        """Steps before a displacement means anything; the released code has none."""
        return max(10, self.learner.steps // 100) if self.options.mode == "paper" else 0

    def after_step(self, step: int) -> None:
        learner = self.learner
        strength = self.strength.at(step)
        if self.options.penalty == "prox" and strength and isinstance(self.pull, AdapterPull):
            lr, second = learner.adam_step()
            self.pull.prox_(learner.adapter, strength, lr, second)
        if self.options.mode == "paper" and self.settings.signature in ("delta", "raw") and self.running is not None:
            self.running.add(learner.adapter[self.places])

    def after_task(self) -> None:
        learner = self.learner
        if isinstance(self.pull, AdapterPull):
            self.density = self.pull.density(learner.adapter).tolist()
        signature = self.running.value() if self.running is not None else None
        if learner.comm.rank == 0:
            self.pulls = self.guide.measured()["pulls"]
        done = self.guide.insert(signature)
        self.bank.put(done.task, learner.adapter, done.slot, done.merge)
        kept = None if done.merge is None else done.merge.kept
        self.merged = [task for task, slot in self.bank.of_task.items() if slot == kept]
        self.running, self.pull = None, None
        if self.decomposition is not None:
            self.decomposition.learn(*learner.unit)

    def answer(self, task: int) -> Tensor:
        number = self.stored(task)
        return self.bank[number] if number in self.bank.of_task else self.learner.adapter

    def route(self, features: Tensor) -> Tensor:
        return super().route(features) if self.decomposition is None else self.decomposition.route(features)

    def among(self, task: int) -> Sequence[int]:
        return super().among(task) if self.decomposition is None else self.decomposition.among(task)

    def changed(self, unit: Sequence[int]) -> Sequence[int]:
        refit = [] if self.decomposition is None else self.decomposition.changed(unit)
        return sorted({*unit, *self.own(self.merged), *refit})

    # -- what is kept

    def tensors(self) -> dict[str, Tensor]:
        found = {f"guide.{name}": value for name, value in self.guide.snapshot().tensors.items()}
        if len(self.arms):
            found["arms"] = torch.from_numpy(self.arms)
        if self.running is not None:
            found["running"] = self.running.total
        if isinstance(self.pull, DirectionPull):
            found["start"] = self.pull.start
        return found if self.decomposition is None else found | part_of(self.decomposition)

    def to_json(self) -> dict[str, Any]:
        count = None if self.running is None else self.running.count
        return {"guide": self.guide.snapshot().meta, "running": count, "prior": self.prior, "pulls": self.pulls}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        self.guide.restore(Snapshot(part(tensors, "guide"), data["guide"]))
        self.prior, self.pulls = data.get("prior"), data.get("pulls")
        if self.decomposition is not None:
            self.decomposition.load(part(tensors, PART))
        self.arms = tensors["arms"].numpy() if "arms" in tensors else np.empty(0, np.int64)
        current = data["guide"]["current"]
        if current is None:
            return
        self.choice = self.guide.commit() if current["committed"] else None
        self._ready()
        if isinstance(self.pull, DirectionPull):
            start = tensors["start"].to(self.learner.device)
            self.pull = DirectionPull(self.guide.full_layout, start)
            self.running = Accumulator(self.guide.full_layout, self.settings.signature, start)
        if data["running"] is not None:
            if self.running is None:
                self.running = Accumulator(self.guide.full_layout, "anchor")
            self.running.total, self.running.count = tensors["running"].clone(), data["running"]

    def values(self, step: int) -> dict[str, float]:
        learner, strength, found = self.learner, self.strength.at(step), {}
        if isinstance(self.pull, AdapterPull):
            found["penalty"] = float(self.pull.value(learner.adapter, strength))
        if (seconds := learner.effort.seconds.get("exchange")) is not None:
            found["exchange_ms"] = 1000 * seconds / (step + 1)
        return {"strength": strength, **found}

    def report(self) -> dict[str, Any]:
        """What each layer leans on, how near it is, and how much of the adapter differs from what pulls it.

        At some tasks the tree, so that its growth can be drawn; which tasks share an adapter since a merge.
        """
        more = self._grown() if self.learner.comm.rank == 0 and is_stage(len(self.guide.names)) else {}
        if self.merged:
            more["merged"] = [self.guide.names[task] for task in self.merged]
        if self.choice is None:
            return more
        names = [self.guide.names[task] if task >= 0 else None for task in self.choice.warm]
        density = {"density": self.density} if self.options.penalty == "prox" else {}
        layers = list(self.learner.layout.names)
        distance = [round(float(d), 4) if np.isfinite(d) else None for d in self.choice.distance]
        return {"layers": layers, "leans_on": names, "distance": distance, **density, **more}

    def _grown(self) -> dict[str, Any]:
        nodes = self.guide.to_data()
        tree = {key: [node[key] for node in nodes] for key in ("parent", "task")}
        return {"tree": {**tree, "height": [round(node["height"], 4) for node in nodes]}}

    def summary(self) -> dict[str, Any]:
        if not self.guide.names:
            return {}
        began = {} if self.prior is None else {"prior": self.prior}
        layers, distances = list(self.guide.layout.names), self.guide.measured()["distances"]
        more = {"layers": layers, "distances": distances, "pulls": self.pulls, **began}
        return {"tree": self.guide.to_data(), "drawn": self.guide.draw(), "guide_bytes": self.guide.nbytes(), **more}


def _agree(one: Sequence[str], other: Sequence[str]) -> bool:
    """As far as both go."""
    return all(a == b for a, b in zip(one, other, strict=False))


def is_stage(tasks: int) -> bool:
    """2, 3, 4, 6, 8, 12, 16, 24, ...: often enough to show how a tree grew, seldom enough to stay small."""
    return tasks > 1 and (tasks if tasks % 3 else tasks // 3).bit_count() == 1
