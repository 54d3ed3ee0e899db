"""The hooks of a method, in the order in which a task calls them; before a new run's first one, `before_stream`.

    before_task ─► per step: rows ─► loss_terms ─► (backward, all-reduce) ─► edit_gradients ─► (clip, optimizer)
    ─► after_step ─► … ─► after_task;   later: answer

A method finds everything it may touch in its `learner`. Whatever it keeps for later it returns from `tensors`
and `to_json`, so that stop and resume between any two steps changes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.core.merge import AdapterBank
from treelora_ray.methods import outside
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.options import METHOD_OPTIONS
from treelora_ray.objectives.base import Batch

METHODS: dict[str, type[Method]] = {}
OBJECTIVES = ("classification", "causal-lm")
HOOKS = ("before_stream", "before_task", "after_task", "before_step", "after_step")


class Method:
    name: ClassVar[str] = ""
    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES
    """What it can be trained for; a stream of another kind is refused."""
    keeps: ClassVar[str] = "one adapter"
    """What is there after N tasks, beside the head."""
    step_cost: ClassVar[str] = "none"
    """What a training step costs more than plain training."""
    reduces: ClassVar[str] = "gradient"
    """What workers add up or tell each other."""
    routes: ClassVar[bool] = True
    """Whether a task is inferred first, whose classes then answer; else classes of all tasks compete."""
    starts_from: ClassVar[str] = ""
    """In words, where a task's adapter starts from, where no option says; empty: it is not said."""
    adapts: ClassVar[bool] = True
    """Whether the adapter is trained."""
    unexported: ClassVar[str] = ""
    """In words, why no LoRA adapter answers as the run does; empty where one does for each task."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if not cls.objectives or not set(cls.objectives) <= set(OBJECTIVES):
            raise TypeError(f"{cls.__name__}.objectives is {cls.objectives!r}: name one or more of {OBJECTIVES}")
        known = [hook for hook in HOOKS if hasattr(Method, hook)]
        for name in vars(cls):
            if name.startswith(("before_", "after_")) and name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{cls.__name__}.{name} is no hook and would never be called{hint}")

    def __init__(self, learner: Learner, options: Options) -> None:  # noqa: ARG002
        self.learner = learner
        learner.head.common = self.weighs_tasks
        self.bank: AdapterBank | None = None  # adapters of finished tasks, for methods that keep them

    @classmethod
    def start_of(cls, options: Mapping[str, Any]) -> str:  # noqa: ARG003
        """In words, where a task's adapter starts from with these options; empty: it is not said."""
        return cls.starts_from

    def units(self, tasks: int) -> list[tuple[int, ...]]:
        """Which tasks are learnt together, in order."""
        return [(task,) for task in range(tasks)]

    @property
    def weighs_tasks(self) -> bool:
        """Whether classes of different tasks are weighed against each other, in training or for an answer."""
        return not self.routes or self.learner.config.objective.routing == "last" or not self._current

    @property
    def looks_back(self) -> bool:
        """Whether the unit also trains the head's rows of earlier tasks, whatever competes in the loss of its own."""
        return False

    @property
    def _current(self) -> bool:
        return self.learner.config.objective.ce_scope == "current"

    def competing(self) -> list[int]:
        """The rows of the head that are trained with this unit."""
        head = self.learner.head
        return head.of_tasks(self.learner.unit) if self._current and not self.looks_back else head.of_all()

    def own_classes(self) -> Sequence[int] | None:
        """Tasks whose classes compete together, where rows of other tasks compete among their own; None: all do."""
        return self.learner.unit if self._current and self.looks_back else None

    def steps(self, planned: int) -> int:
        """How many of the steps that the config plans for a unit it takes; 0: the unit is looked at, not trained on."""
        return planned

    def own_parameters(self) -> Tensor | None:
        """[n] values at first of what is trained with the unit beside adapter and head; None: nothing.

        They are `learner.own_parameter` then, which the forward pass may use in any way.
        """
        return None

    def before_stream(self) -> None:
        """A new run begins; not called where one goes on."""

    def before_task(self) -> None:
        """The unit is met and its buffer bound; sets the adapter it starts from."""

    def rows(self, step: int, drawn: list[Ref]) -> list[Ref]:  # noqa: ARG002
        """The training rows of a step over all workers."""
        return drawn

    def loss_terms(self, batch: Batch, said: Any) -> Tensor | None:  # noqa: ARG002
        """What is added to the sum of a batch's losses; None: nothing."""
        return None

    def edit_gradients(self, step: int, loss: float) -> None:
        """Once a step, on gradients that are means over all workers, before they are clipped."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step."""

    def after_task(self) -> None:
        """The unit is learnt."""

    def answer(self, task: int) -> Tensor:  # noqa: ARG002
        """[total] the adapter that answers for a task."""
        return self.learner.adapter

    def answering(self, task: int) -> AbstractContextManager[None]:
        """Within it the model says what it says for a task."""
        return self.learner.holding(self.answer(task))

    def route(self, features: Tensor) -> Tensor:
        """Frozen features [B, d] -> the task [B] that answers for each."""
        return self.learner.router.route(features)

    def among(self, task: int) -> Sequence[int]:
        """The rows of the head that compete for an answer, once a task is inferred or told."""
        return self.learner.head.rows[task]

    def changed(self, unit: Sequence[int]) -> Sequence[int]:
        """Tasks whose answering adapter has changed with this unit."""
        return unit

    def factors(self, task: int) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer the (A, B) that stand for a task beside the weights as loaded."""
        return {name: (a, b) for name, (a, b) in self.learner.layout.views(self.answer(task))}

    def plain(self) -> AbstractContextManager[None]:
        """Within it the model is as it was loaded."""
        return self.learner.model.plain()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def to_json(self) -> dict[str, Any]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Becomes what `tensors` and `to_json` wrote; learner and bank are as they were then."""

    def report(self) -> dict[str, Any]:
        """What the method has to say about the unit it has just learnt."""
        return {}

    def values(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """What may be plotted over the steps; asked for once in a while, after a step."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What it has to say about all tasks so far."""
        return {}


M = TypeVar("M", bound=type[Method])


def register(name: str, options: type[Options] | None = None) -> Callable[[M], M]:
    """Makes a method known by a name; `options` for methods that do not come with the package."""

    def add(cls: M) -> M:
        if name in METHODS:
            raise ValueError(f"method {name!r} is registered already, by {METHODS[name].__name__}")
        if options is not None:
            METHOD_OPTIONS[name] = options
        if name not in METHOD_OPTIONS:
            raise ValueError(f"method {name!r} has no options: give `register` a subclass of Options")
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def make(learner: Learner) -> Method:
    """The method that a learner's config names."""
    options = learner.config.method
    if said := unfit(options.name, learner.objective.kind):
        raise ConfigError(said)
    return find(options.name)(learner, options)


def find(name: str) -> type[Method]:
    """The method of a name, wherever it comes from."""
    if name not in METHODS:
        outside.load(name)
    return METHODS[name]


def unfit(name: str, objective: str) -> str | None:
    """In words, why a method cannot be trained for an objective; None where it can."""
    can = find(name).objectives
    if objective in can:
        return None
    others = ", ".join(other for other, method in METHODS.items() if objective in method.objectives)
    return f"method.name {name!r} learns {' and '.join(can)} only, not {objective}: use one of {others}"
