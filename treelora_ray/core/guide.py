"""The guide: one object that remembers past tasks and says which of them a new task should lean on.

    begin_task ─► probe (a round a mini-batch) ─► commit ─► … train … ─► insert        mode treelora
    begin_task ─► (select ─► observe) at every step ─────────────────► insert        modes paper, released

Everything is deterministic: the same seed and the same observations give the same choices wherever the
guide lives. Calls carry their task's attempt and a step that grows; a call that comes again changes nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core.bandit import (
    DIGITS,
    NOTHING,
    BestFirstTreeLCB,
    Exhaustive,
    FlatLCB,
    PooledTreeLCB,
    Random,
    Search,
)
from treelora_ray.core.config import GuideConfig
from treelora_ray.core.errors import GuideError, LayoutError, SnapshotError
from treelora_ray.core.grow import TreeKeeper
from treelora_ray.core.layout import FloatArray, IntArray, Layout
from treelora_ray.core.merge import Merge, Slots
from treelora_ray.core.nodes import NodeStats
from treelora_ray.core.released import ReleasedSearch
from treelora_ray.core.signature import Sketch, aligned, apart, directions, related_layers
from treelora_ray.core.state import GROUP, Choice, Current, Inserted, Pulls, Snapshot
from treelora_ray.core.store import SignatureStore
from treelora_ray.core.tree import Tree

SNAPSHOT_VERSION = 1
MOST_DIFFERENCES = 16  # between probe gradients, kept for the relatedness gate
MOST_DRAWN = 128  # stored tasks above which nothing is kept or measured for figures alone
MOST_COMPARED = 1 << 32  # values of all pairs of signatures above which no splits are measured by layer: seconds a task


class Guide:
    def __init__(self, layout: Layout, config: GuideConfig | None = None) -> None:
        config = config or GuideConfig()
        self.config, self.full_layout = config, layout
        released = config.mode == "released"
        shrinks = config.sketch_dim is not None and max(layout.sizes) > config.sketch_dim
        self.sketch = Sketch(layout, config.sketch_dim or 1, config.seed) if shrinks else None
        self.layout = self.sketch.layout if self.sketch else layout
        dtype = torch.float32 if released else torch.float16  # released: differences of nearly equal sums
        self.store = SignatureStore(self.layout, config.distance, dtype)
        kind, depth = config.tree, config.depth
        self.keeper = TreeKeeper(self.store, kind, config.linkage, depth, config.tree_update, released)
        self.stats: NodeStats | None = None
        self.slots = Slots(config.budget)
        self.names: list[str] = []
        self.current: Current | None = None
        self.last: tuple[str, int, Inserted] | None = None

    # -- a task's life

    def begin_task(self, name: str, attempt: int = 0, steps_per_epoch: int | None = None) -> None:
        """Starts a task. The same call again changes nothing; a higher attempt starts the task over.

        `steps_per_epoch` of this task, where it differs from the settings' (released mode only).
        """
        if name in self.names:
            if self.last is not None and self.last[:2] == (name, attempt):
                return
            raise GuideError(f"task {name!r} is already stored; every task needs a name of its own")
        now = self.current
        if now is not None and now.name != name:
            raise GuideError(f"task {now.name!r} is in progress; insert it before {name!r} begins")
        if now is not None and attempt <= now.attempt:
            if attempt < now.attempt:
                raise GuideError(f"attempt {attempt} of task {name!r} is over: attempt {now.attempt} has begun")
            return
        self.current = self._new_task(name, attempt, steps_per_epoch)

    def _new_task(self, name: str, attempt: int, steps_per_epoch: int | None) -> Current:
        exact = self.config.observe == "probe" and self.config.pulls_per_round >= len(self.store)
        steps = steps_per_epoch or self.config.steps_per_epoch
        search = self._make_search(exact, steps) if len(self.store) else None
        pulls = Pulls(len(self.layout), len(self.store)) if len(self.store) <= MOST_DRAWN else None
        return Current(name, attempt, search, exact, torch.zeros(self.layout.total), steps_per_epoch, pulls=pulls)

    def _make_search(self, exact: bool, steps_per_epoch: int | None) -> Search:
        config, layers, n, tree = self.config, len(self.layout), len(self.store), self.tree
        if config.mode == "released":
            assert steps_per_epoch is not None
            return ReleasedSearch(layers, tree, self.keeper.depth, steps_per_epoch, config.seed + n)
        if exact or config.search == "exhaustive":
            return Exhaustive(layers, n, config.lcb_c, config.width)
        if config.search == "flat-lcb":
            return FlatLCB(layers, n, config.lcb_c, config.width)
        if config.search == "random":
            return Random(layers, n, config.lcb_c, config.width, config.seed * 1_000_003 + n)
        if config.observe != "probe":
            return PooledTreeLCB(layers, tree, config.lcb_c, config.width, config.tree != "linkage")
        if self.stats is None:
            self.stats = NodeStats.build(self.store, tree)
        return BestFirstTreeLCB(layers, tree, self.stats)

    def probe(self, step: int, gradient: Tensor, task: str | None = None, attempt: int | None = None) -> IntArray:
        """One round with a mini-batch's gradient at the anchor; returns the tasks it was compared with.

        The gradient is [total] of the full layout, or of the sketch's where the caller has sketched it.
        """
        now = self._in_progress("probe", task, attempt)
        if now is None:
            return np.empty(0, np.int64)
        if self.config.observe != "probe":
            raise GuideError(f"this guide has observe {self.config.observe!r}: call `select` and `observe`")
        sketched = self._sketched(gradient, f"probe gradient of task {now.name!r} at step {step}")
        if now.choice is not None and step > now.step:
            raise GuideError(f"task {now.name!r} has committed; it cannot be probed at step {step} any more")
        if not self._is_new(now, step, sketched):
            return now.history.get(step, np.empty(0, np.int64)).copy()
        if now.rounds and len(now.differences) < MOST_DIFFERENCES:
            now.differences.append(now.gradient / now.rounds - sketched)  # of independent rounds uncorrelated
        now.gradient += sketched
        now.rounds += 1
        compared = np.empty(0, np.int64)
        if now.search is not None:
            seen = now.gradient / now.rounds if isinstance(now.search, BestFirstTreeLCB) else sketched
            compared = self._round(now, now.search, step, directions(self.layout, seen, self.config.distance))
        now.history[step] = compared
        return compared.copy()

    def _round(self, now: Current, search: Search, step: int, direction: Tensor) -> IntArray:
        search.begin_round()
        if now.exact:
            everything = np.arange(len(self.store))
            seen = self.store.from_rows(direction, everything).double().numpy()
            for arm in everything:
                search.observe(np.full(len(self.layout), arm), seen[arm])
                self._note(now, step, np.full(len(self.layout), arm), seen[arm])
            return everything
        for _ in range(min(self.config.pulls_per_round, len(self.store))):
            nodes = search.select()
            if (nodes == NOTHING).all():
                break
            distances = self._compare(direction, nodes, search)
            search.observe(nodes, distances)
            self._note(now, step, nodes, distances)
        return search.seen(this_round=True)

    def _note(self, now: Current, step: int, nodes: IntArray, distances: FloatArray) -> None:
        """Counts a comparison for the figures, while there are few enough tasks to draw."""
        if now.pulls is None:
            return
        tasks = nodes
        if isinstance(now.search, BestFirstTreeLCB):
            at = self.tree.task[nodes]
            tasks = np.where(nodes < 0, NOTHING, np.where(at < 0, GROUP, at))
        now.pulls.add(step, tasks, distances)

    def _compare(self, direction: Tensor, nodes: IntArray, search: Search) -> FloatArray:
        """Distances [L] of a direction to, layer by layer, another task or another group's centroid."""
        tasks, out = nodes, torch.zeros(self.layout.total)
        if isinstance(search, BestFirstTreeLCB):
            assert self.stats is not None
            tasks = np.where(nodes >= 0, self.tree.task[nodes], NOTHING)
            groups = np.where((nodes >= 0) & (tasks < 0), self.stats.row[nodes], NOTHING)
            if (groups >= 0).any():
                self.stats.centroids.segments(groups, out)
        self.store.rows.segments(tasks, out).sub_(direction)
        return self.layout.per_layer(lambda d: apart(d, self.config.distance), out).double().numpy()

    def select(self, step: int, task: str | None = None, attempt: int | None = None) -> IntArray:
        """[L] the stored task to compare each layer with at this step (-1: none)."""
        now = self._in_progress("select", task, attempt)
        if self.config.observe == "probe":
            raise GuideError("this guide compares for itself: call `probe` with a gradient, not `select`")
        if now is None:
            return np.full(len(self.layout), NOTHING)
        if now.offered is None or now.offered[0] != step:
            if step <= now.step:
                raise GuideError(f"step {step} of task {now.name!r} is over: step {now.step} was observed")
            arms = np.full(len(self.layout), NOTHING)
            if now.search is not None:
                now.search.begin_round()
                arms = now.search.select()
            now.offered = step, arms
        return now.offered[1].copy()

    def observe(
        self, step: int, distances: Tensor | FloatArray, task: str | None = None, attempt: int | None = None
    ) -> bool:
        """The distances [L] seen to what `select` named; False if they were known or come too late."""
        now = self._in_progress("observe", task, attempt)
        if now is None:
            return False
        x = np.asarray(torch.as_tensor(distances).detach().cpu().double().numpy())
        if x.shape != (len(self.layout),):
            raise LayoutError(f"distances have shape {list(x.shape)}, one a layer makes [{len(self.layout)}]")
        if not np.isfinite(x).all():
            bad = self.layout.names[int(np.flatnonzero(~np.isfinite(x))[0])]
            raise LayoutError(f"the distance of layer {bad!r} at step {step} is {x[~np.isfinite(x)][0]}")
        if step > now.step and (now.offered is None or now.offered[0] != step):
            raise GuideError(f"step {step} of task {now.name!r} was never selected; call `select({step})` first")
        if not self._is_new(now, step, torch.from_numpy(x)):
            return False
        if now.search is not None and now.offered is not None:
            now.search.observe(now.offered[1], x)
            self._note(now, step, now.offered[1], x)
        return True

    def commit(self, task: str | None = None, attempt: int | None = None) -> Choice:
        """Each layer's nearest task among those any layer was compared with.

        By the mean of the probe gradients, or by the mean of the distances the caller observed.
        """
        now = self._in_progress("commit", task, attempt)
        if now is None:
            raise GuideError(f"attempt {attempt} of task {task!r} is over; it commits too late")
        if now.choice is None:
            if now.step < 0:
                raise GuideError(f"nothing was observed of task {now.name!r}; it cannot commit yet")
            now.choice = self._choose(now)
        return now.choice

    def _choose(self, now: Current) -> Choice:
        layers = len(self.layout)
        if now.search is None or len(candidates := now.search.seen()) == 0:
            return Choice(np.full(layers, NOTHING), np.full(layers, np.inf), np.zeros(layers, bool))
        probed = self.config.observe == "probe"
        mean = directions(self.layout, now.gradient / max(now.rounds, 1), self.config.distance)
        if probed:
            away = self.store.from_rows(mean, candidates).double().numpy().round(DIGITS)
        else:
            away = now.search.mean[:, candidates].T.round(DIGITS)
        best = away.argmin(0)
        if self.config.commit == "task":
            known = np.ma.masked_invalid(away)  # a caller's distances may be missing at some layers
            best = np.full(layers, int(known.mean(1).argmin()))
        task, distance = candidates[best], away[best, np.arange(layers)]
        related = np.isfinite(distance)
        if probed and self.config.gate > 0:
            related &= np.isin(task, candidates[self._aligned(now, mean, candidates).numpy()])
            if self.config.commit == "layer":
                leaning, arms, gate = self.store.rows.segments(task), len(self.store), self.config.gate
                related &= related_layers(self.layout, mean, leaning, self.config.distance, arms, gate).numpy()
        return Choice(task, distance, related)

    def _aligned(self, now: Current, mean: Tensor, candidates: IntArray) -> Tensor:
        others = torch.stack([self.store.rows.segments(np.full(len(self.layout), arm)) for arm in candidates])
        noise = torch.stack(now.differences) if now.differences else torch.empty(0, self.layout.total)
        return aligned(self.layout, mean, others, self.config.gate / len(self.store), noise)

    def insert(self, signature: Tensor | None = None, task: str | None = None, attempt: int | None = None) -> Inserted:
        """Stores the task in progress; without a signature, by the mean of its probe gradients."""
        if self.last is not None and self.last[:2] == (task, attempt):
            return self.last[2]
        now = self._in_progress("insert", task, attempt)
        if now is None:
            raise GuideError(f"attempt {attempt} of task {task!r} is over; its insertion comes too late")
        if signature is None:
            if now.rounds == 0:
                raise GuideError(f"task {now.name!r} has no signature: give one, or probe it before")
            flat = now.gradient / now.rounds
        else:
            flat = self._sketched(signature, f"signature of task {now.name!r}")
        row = self.store.append(flat)
        slot, merge = self.slots.add(row)
        self.names.append(now.name)
        self._grow(row, merge)
        done = Inserted(len(self.names) - 1, slot, merge)
        self.last, self.current = (now.name, now.attempt, done), None
        return done

    def _grow(self, row: FloatArray, merge: Merge | None) -> None:
        rebuilt = self.keeper.add(row)
        if merge is not None and self.config.merge_signatures:
            shared = self.slots.tasks_of(merge.kept)
            mean = self.store.rows[np.array(shared)].mean(0)
            for task in shared:
                self.store.replace(task, mean)
            rows = [self.store.pair_row(task) for task in range(len(self.store))]
            self.keeper.refresh(rows)
            self.slots.remeasure(rows)
            rebuilt = True
        if self.stats is not None:
            self.stats = None if rebuilt else self.stats.after_insert(self.tree, len(row))

    # -- checks

    def _in_progress(self, call: str, task: str | None, attempt: int | None) -> Current | None:
        """The task in progress; None for a late call of one that is over, which must change nothing."""
        now = self.current
        if task is not None and task in self.names:
            return None
        if now is None:
            raise GuideError(f"{call} without a task in progress; call `begin_task` first")
        if task is not None and task != now.name:
            raise GuideError(f"{call} names task {task!r}, which is unknown; {now.name!r} is in progress")
        if attempt is not None and attempt < now.attempt:
            return None
        if attempt is not None and attempt > now.attempt:
            raise GuideError(f"{call} names attempt {attempt} of task {now.name!r}; call `begin_task` for it first")
        return now

    @staticmethod
    def _is_new(now: Current, step: int, what: Tensor) -> bool:
        """Notes a step; False if it was seen before, an error if it then brought something else."""
        if step < 0:
            raise GuideError(f"steps count from 0, got {step} for task {now.name!r}")
        checksum = zlib.crc32(what.contiguous().numpy().tobytes())
        if step > now.step:
            now.step, now.seen = step, checksum
            return True
        if step == now.step and checksum != now.seen:
            raise GuideError(f"step {step} of task {now.name!r} came twice with different values")
        return False

    def _sketched(self, flat: Tensor, what: str) -> Tensor:
        if self.sketch is not None and flat.numel() != self.layout.total:
            self.full_layout.require_flat(flat, what)
            return self.sketch(flat.detach().float()).cpu()
        self.layout.require_flat(flat, what)
        return flat.detach().to("cpu", torch.float32)

    # -- looking

    @property
    def tree(self) -> Tree:
        if self.keeper.tree is None:
            raise GuideError("no task is stored yet, so there is no tree; insert a task first")
        return self.keeper.tree

    def task_number(self, name: str) -> int:
        if name not in self.names:
            raise GuideError(f"task {name!r} is unknown; stored: {', '.join(self.names) or 'none'}")
        return self.names.index(name)

    def directions(self, tasks: IntArray, out: Tensor | None = None) -> Tensor:
        """Layer by layer the stored direction of another task: [L] -> [total]; zero where a task is -1."""
        if out is not None and (tasks < 0).any():
            out.zero_()
        return self.store.rows.segments(tasks, out)

    def draw(self) -> str:
        """The tree as text."""
        return self.tree.draw(self.names)

    def to_data(self) -> list[dict[str, Any]]:
        """The tree's nodes, as data for a figure or a file."""
        nodes = self.tree.to_data(self.names)
        for node, layers in self._splits().items():
            nodes[node]["layers"] = layers
        return nodes

    def _splits(self) -> dict[int, list[float]]:
        """By group, each layer's mean distance [L] between tasks of different children; {} for too many tasks."""
        n = len(self.store)
        if n > MOST_DRAWN or n * n * self.layout.total > MOST_COMPARED:
            return {}
        tree, away = self.tree, self.store.by_layer()
        within = np.zeros((len(tree), len(self.layout)))  # sums over ordered pairs
        for node in range(len(tree)):
            members = tree.members(node)
            within[node] = away[np.ix_(members, members)].sum((0, 1))
        found = {}
        for node in np.flatnonzero(tree.task < 0).tolist():
            below = tree.children[node]
            pairs = int(tree.size[node] ** 2 - (tree.size[below] ** 2).sum())
            if pairs:
                found[node] = np.round((within[node] - within[below].sum(0)) / pairs, 4).tolist()
        return found

    def measured(self) -> dict[str, Any]:
        """For figures: distances of each task to those before it, and the comparisons of the task in progress."""
        if len(self.store) > MOST_DRAWN:
            return {"distances": None, "pulls": None}
        rows = [np.round(self.store.pair_row(task)[:task], 4).tolist() for task in range(len(self.store))]
        now = self.current
        pulls = None if now is None or now.pulls is None else now.pulls.to_data(now.name, self.names, self.layout.names)
        return {"distances": {"tasks": list(self.names), "rows": rows}, "pulls": pulls}

    def nbytes(self) -> int:
        """Bytes of stored state: signatures, pairwise distances, centroids."""
        return self.store.nbytes() + (self.stats.nbytes() if self.stats else 0)

    # -- snapshots

    def snapshot(self) -> Snapshot:
        """All state, complete enough that a restored guide continues bit for bit."""
        tensors = {f"store.{k}": v for k, v in self.store.tensors().items()}
        tensors |= {f"tree.{k}": v for k, v in self.keeper.tensors().items()}
        if self.stats is not None:
            tensors |= {f"stats.{k}": v for k, v in self.stats.tensors().items()}
        meta: dict[str, Any] = {
            "version": SNAPSHOT_VERSION,
            "layout": self.full_layout.to_json(),
            "config": self.config.to_json(),
            "names": list(self.names),
            "keeper": self.keeper.to_json(),
            "slots": self.slots.to_json(),
            "last": None,
            "current": None,
        }
        if self.last is not None:
            name, attempt, done = self.last
            meta["last"] = {"name": name, "attempt": attempt, **done.to_json()}
        if self.current is not None:
            tensors |= self.current.tensors()
            meta["current"] = self.current.to_json()
        return Snapshot(tensors, meta)

    def restore(self, snapshot: Snapshot) -> None:
        """Becomes what the snapshot holds; on any error stays what it was."""
        meta = snapshot.meta
        if meta.get("version") != SNAPSHOT_VERSION:
            raise SnapshotError(f"the snapshot has version {meta.get('version')!r}, this code reads {SNAPSHOT_VERSION}")
        try:
            difference = self.full_layout.first_difference(Layout.from_json(meta["layout"]))
            settings = self.config.differences(meta["config"])
            if difference is None and not settings:
                fresh = Guide(self.full_layout, self.config)
                fresh._load(snapshot.tensors, meta)
        except (KeyError, TypeError, IndexError, RuntimeError, ValueError) as error:
            raise SnapshotError(f"the snapshot is incomplete or damaged ({error!r}); use the one before it") from error
        if difference is not None:
            raise SnapshotError(f"the snapshot is of another layout: {difference}")
        if settings:
            raise SnapshotError("the snapshot was made with other settings: " + "; ".join(settings))
        self.__dict__.update(fresh.__dict__)

    def _load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {
            "store": {},
            "tree": {},
            "stats": {},
            "search": {},
            "current": {},
        }
        for name, value in tensors.items():
            part, key = name.split(".", 1)
            parts[part][key] = value
        self.names = list(meta["names"])
        self.store.load(parts["store"])
        self.keeper.load(parts["tree"], meta["keeper"])
        self.slots.load(meta["slots"])
        if len(self.store) != len(self.names) or len(self.slots.of_task) != len(self.names):
            raise SnapshotError(f"{len(self.names)} names, but {len(self.store)} signatures")
        if parts["stats"]:
            self.stats = NodeStats.from_tensors(self.store, self.tree, parts["stats"])
        if (last := meta["last"]) is not None:
            self.last = last["name"], last["attempt"], Inserted.from_json(last)
        if (data := meta["current"]) is not None:
            self.current = self._new_task(data["name"], data["attempt"], data["steps_per_epoch"])
            self.current.load(data, parts["current"], parts["search"])
