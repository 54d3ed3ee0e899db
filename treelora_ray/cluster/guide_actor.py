"""The guide as an actor of Ray, and a guide that asks it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayError, RayTaskError
from ray.util.metrics import Counter, Gauge, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from treelora_ray.cluster.errors import ClusterError, GuideLostError, GuideTimeoutError
from treelora_ray.cluster.guide_server import (
    CHANGING,
    UNANSWERED,
    CallMissingError,
    GuideServer,
    Values,
    choice_from_values,
)
from treelora_ray.core import Choice, Guide, GuideConfig, Inserted, Layout, Snapshot
from treelora_ray.core.layout import FloatArray, IntArray

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 20]  # bounds of the histogram


class GuideActor:
    """A `GuideServer` that shows what it does as metrics of Ray."""

    def __init__(self, run: str, folder: str) -> None:
        self.server = GuideServer(Path(folder))
        self.pulls = Counter(
            "treelora_guide_pulls_total", "Comparisons of new tasks with a stored task", tag_keys=("run", "task")
        )
        self.depth = Gauge("treelora_guide_tree_depth", "Depth of the tree of tasks", tag_keys=("run",))
        self.stored = Gauge("treelora_guide_stored_bytes", "Bytes of the guide's state", tag_keys=("run",))
        for metric in (self.pulls, self.depth, self.stored):
            metric.set_default_tags({"run": run})
        self._show_size()

    def pid(self) -> int:
        return os.getpid()

    def open(self, layout: Mapping[str, Any], config: Mapping[str, Any], snapshot: Snapshot | None) -> int:
        generation = self.server.open(layout, config, snapshot)
        self._show_size()
        return generation

    def call(self, generation: int, number: int, name: str, arguments: Mapping[str, Any]) -> Values:
        before = self.server.number
        answer = self.server.call(generation, number, name, arguments)
        if self.server.number > before:  # not for a call that came again
            self._show(name, answer)
        return answer

    def _show(self, name: str, answer: Values) -> None:
        arms = answer.get("compared", answer.get("arms"))
        if arms is not None and self.server.guide is not None:
            for arm in arms[arms >= 0].unique().tolist():
                self.pulls.inc(tags={"task": self.server.guide.names[arm]})
        if name == "insert":
            self._show_size()

    def _show_size(self) -> None:
        guide = self.server.guide
        self.depth.set(guide.tree.max_depth if guide is not None and guide.names else 0)
        self.stored.set(0 if guide is None else guide.nbytes())


def start_guide_actor(name: str, namespace: str, folder: Path) -> Any:
    """Starts the guide's actor on this node and returns its handle. Its state lies in the folder, on a local disk.

    It lives as long as the process that starts it. Ray restarts it on the same node while that is up; on another node
    it has no state and says so.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(GuideActor).options(
        name=name,
        namespace=namespace,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    )
    try:
        return actor.remote(name, str(folder.absolute()))
    except ActorAlreadyExistsError as error:
        raise ClusterError(
            f"the actor {name!r} runs already in namespace {namespace!r}: wait for the other run, or give this one "
            "another name"
        ) from error


@dataclass
class Sent:
    """A call on its way. Its arguments are kept, as it may have to be sent again."""

    number: int
    name: str
    arguments: Values
    answer: Any  # reference to it
    again: bool = False


class RemoteGuide:
    """A guide in an actor, for one caller: the calls of `Guide`, less the checks for calls that come twice or late.

    Answers that nobody needs at once are not waited for. An error of such a call is raised by a later call, at the
    latest by the next one that waits; the calls sent in between were not done. Nothing is sent before the first call,
    which opens a generation unless `restore` did. After GuideLostError only `restore` helps.
    """

    def __init__(
        self, layout: Layout, config: GuideConfig, actor: Any, timeout: float = 60.0, name: str | None = None
    ) -> None:
        empty = Guide(layout, config)
        self.full_layout, self.config, self.layout, self.sketch = layout, config, empty.layout, empty.sketch
        self.actor, self.timeout, self.name = actor, timeout, name or repr(actor)
        self.names: list[str] = []  # of the stored tasks
        self.waited = 0.0  # seconds, in total
        self._generation: int | None = None
        self._number = 0  # of the last changing call
        self._sent: deque[Sent] = deque()  # not yet answered, the oldest first
        self._task: str | None = None
        self._step = -1  # last step observed
        self._ahead: tuple[int, IntArray] | None = None  # step and arms [L] that came with an observation's answer
        self._directions: dict[int, Tensor] = {}  # by task, [total]
        self._seconds = Histogram(
            "treelora_guide_exchange_seconds", "Wait for an answer", boundaries=SECONDS, tag_keys=("run",)
        )
        self._seconds.set_default_tags({"run": self.name})

    # -- a task's life

    def begin_task(self, name: str, steps_per_epoch: int | None = None) -> None:
        self._ask("begin_task", name=name, steps_per_epoch=steps_per_epoch)

    def probe(self, step: int, gradient: Tensor) -> None:
        """Sends a mini-batch's gradient [total of the full layout] as its sketch, and does not wait."""
        self._send("probe", step=step, gradient=self._sketched(gradient, f"probe gradient at step {step}"))

    def commit(self) -> Choice:
        return choice_from_values(self._ask("commit"))

    def select(self, step: int) -> IntArray:
        """[L] the stored task to compare each layer with at this step (-1: none)."""
        if self._sent:
            self._settle()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = None
            arms: IntArray = self._ask("select", step=step)["arms"].numpy()
            return arms
        return self._ahead[1].copy()

    def observe(self, step: int, distances: Tensor | FloatArray) -> bool:
        """The distances [L] seen to what `select` named; False if this step was observed before.

        Where every step is observed the arms of the next step come with the answer, and nothing waits here.
        """
        x = torch.as_tensor(distances).detach().to("cpu", torch.float64, copy=True)
        if self.config.observe != "step":
            return bool(self._ask("observe", step=step, distances=x)["new"])
        self._send("exchange", step=step, distances=x)
        new, self._step = step > self._step, max(step, self._step)
        return new

    def insert(self, signature: Tensor | None = None) -> Inserted:
        """Stores the task; by its signature [total of the full layout], or by the mean of its probe gradients."""
        flat = None if signature is None else self._sketched(signature, f"signature of task {self._task!r}")
        return Inserted.from_json(self._ask("insert", signature=flat))

    # -- looking

    def directions(self, tasks: IntArray) -> Tensor:
        """Layer by layer the stored direction of another task: [L] -> [total]; zero where a task is -1."""
        out = torch.zeros(self.layout.total)
        for layer, task in enumerate(tasks.tolist()):
            if task >= 0:
                self.layout.segment(out, layer).copy_(self.layout.segment(self._direction(task), layer))
        return out

    def _direction(self, task: int) -> Tensor:
        """[total] of one task; it never changes, but where tasks that merge share a signature."""
        if task not in self._directions:
            everywhere = torch.full((len(self.layout),), task)
            self._directions[task] = self._ask("directions", tasks=everywhere)["directions"]
        return self._directions[task]

    def draw(self) -> str:
        return str(self._ask("draw")["text"])

    def to_data(self) -> list[dict[str, Any]]:
        return list(self._ask("to_data")["nodes"])

    def measured(self) -> dict[str, Any]:
        return dict(self._ask("measured"))

    def nbytes(self) -> int:
        return int(self._ask("nbytes")["nbytes"])

    def snapshot(self) -> Snapshot:
        return Snapshot(**self._ask("snapshot"))

    def restore(self, snapshot: Snapshot) -> None:
        """Opens a generation with this snapshot, whatever the actor has seen; on any error stays what it was."""
        self._open(snapshot)

    # -- calls

    def _sketched(self, flat: Tensor, what: str) -> Tensor:
        """What `Guide` would make of it, as a copy on the host."""
        if self.sketch is not None and flat.numel() != self.layout.total:
            self.full_layout.require_flat(flat, what)
            return self.sketch(flat.detach().float()).cpu()
        self.layout.require_flat(flat, what)
        return flat.detach().to("cpu", torch.float32, copy=True)

    def _open(self, snapshot: Snapshot | None) -> None:
        ref = self.actor.open.remote(self.full_layout.to_json(), self.config.to_json(), snapshot)
        self._generation = self._wait(Sent(0, "open", {}, ref))
        meta: dict[str, Any] = {"names": [], "current": None} if snapshot is None else snapshot.meta
        now = meta["current"]
        self.names = list(meta["names"])
        self._task, self._step = (None, -1) if now is None else (now["name"], now["step"])
        self._number, self._ahead = 0, None
        if self._sent:
            self._drop()
        self._directions.clear()

    def _ask(self, call: str, /, **arguments: Any) -> Values:
        self._send(call, **arguments)
        return self._settle()

    def _send(self, call: str, /, **arguments: Any) -> None:
        if self._generation is None:
            self._open(None)
        while self._sent and (len(self._sent) >= UNANSWERED or ray.wait([self._sent[0].answer], timeout=0)[0]):
            self._take()
        self._number += call in CHANGING
        self._sent.append(Sent(self._number, call, arguments, self._call(self._number, call, arguments)))

    def _call(self, number: int, name: str, arguments: Values) -> Any:
        return self.actor.call.remote(self._generation, number, name, arguments)

    def _settle(self) -> Values:
        """Waits for everything sent; returns the last answer."""
        began = time.monotonic()
        while len(self._sent) > 1:
            self._take()
        answer = self._take()
        self._seconds.observe(time.monotonic() - began)
        return answer

    def _take(self) -> Values:
        """Waits for the oldest call's answer and notes what it brought."""
        call = self._sent[0]
        try:
            answer: Values = self._wait(call)
        except GuideTimeoutError:
            raise
        except CallMissingError:
            if call.again:
                self._drop()
                raise
            # Ray keeps no order among calls that it repeats. All before this one are answered by now.
            call.answer, call.again = self._call(call.number, call.name, call.arguments), True
            return self._take()
        except Exception as error:
            if not isinstance(error, GuideLostError):  # not done, so its number is free for the next
                self._number = call.number - (call.name in CHANGING)
            if call.name == "exchange":
                self._step = call.arguments["step"] - 1
            self._drop()
            raise
        self._sent.popleft()
        self._note(call, answer)
        return answer

    def _drop(self) -> None:
        """Waits until nothing sent is on its way, whatever comes of it: it is refused, or of another generation."""
        ready, _ = ray.wait([call.answer for call in self._sent], num_returns=len(self._sent), timeout=self.timeout)
        for answer in ready:
            with suppress(Exception):
                ray.get(answer)  # an error that nobody takes would be logged
        self._sent.clear()

    def _note(self, call: Sent, answer: Values) -> None:
        if call.name == "begin_task" and call.arguments["name"] != self._task:
            self._task, self._step, self._ahead = call.arguments["name"], -1, None
        if call.name == "exchange" and answer["arms"] is not None:
            self._ahead = call.arguments["step"] + 1, answer["arms"].numpy()
        if call.name == "insert":
            assert self._task is not None
            self.names.append(self._task)
            self._task = None
            if answer["merge"] is not None and self.config.merge_signatures:
                self._directions.clear()

    def _wait(self, call: Sent) -> Any:
        began = time.monotonic()
        try:
            return ray.get(call.answer, timeout=self.timeout)
        except GetTimeoutError:
            task = call.arguments.get("name", self._task)
            raise GuideTimeoutError(
                f"{self.name} did not answer {call.name} (task {task!r}, step {call.arguments.get('step')}) within "
                f"{time.monotonic() - began:.1f} s: look at the load of its node, or give it more time"
            ) from None
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise GuideLostError(
                f"{self.name} is gone at {call.name} of task {self._task!r}; go back to the last checkpoint: {error}"
            ) from error
        finally:
            self.waited += time.monotonic() - began
