"""Who answers for a sample, and how well: every sample is routed by itself, then answered with its like.

Samples are put together by the adapter that answers for them, so that any mixture of tasks costs one frozen
forward (for inferred routing) and one through the adapters, and answers do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from treelora_ray.core.layout import IntArray
from treelora_ray.data.images import naming
from treelora_ray.data.rows import Rows, SubsetRows, column
from treelora_ray.data.task import Task
from treelora_ray.methods.base import Method
from treelora_ray.objectives.classification import Classification
from treelora_ray.objectives.scores import SCORES


@dataclass(frozen=True)
class Answers:
    task: IntArray  # [n] the task that answered
    text: list[str]  # [n] label or generated text
    row: IntArray | None = None  # [n] row of the head


class Evaluator:
    def __init__(self, method: Method, routing: str | None = None) -> None:
        self.method, self.learner = method, method.learner
        self.routing = routing or self.learner.config.objective.routing
        if self.routing == "inferred" and not method.routes:
            self.routing = "last"
        self.features: dict[int, torch.Tensor] = {}  # frozen features of test rows never change

    def score(self, number: int, task: Task) -> float:
        """Percent, on all test rows of a task; each worker answers its share of them."""
        comm = self.learner.comm
        own = task.test
        if comm.workers > 1:
            own = SubsetRows(task.test, np.arange(comm.rank, len(task.test), comm.workers))
        answers = self.answer(own, self.routes(own, number if self.routing == "oracle" else None, number))
        if isinstance(self.learner.objective, Classification):
            right = torch.tensor(self._right(number, task, own, answers), dtype=torch.float64)
            comm.sum_(right)
            return 100 * float(right) / len(task.test)
        chosen, texts = SCORES[task.score], [""] * len(task.test)
        for rank, part in enumerate(comm.gather(answers.text)):
            texts[rank :: comm.workers] = part
        references = [str(value) for value in column(task.test, "answer")]
        sources = ([str(value) for value in column(task.test, "prompt")],) if chosen.needs_sources else ()
        return chosen.function(*sources, texts, references)

    def _right(self, number: int, task: Task, rows: Rows, answers: Answers) -> int:
        """How many rows of a task are answered rightly."""
        assert answers.row is not None
        truth = [str(label) for label in column(rows, "label")]
        if number >= len(self.learner.infos):  # not met yet: no answer can be right but by the name of a label
            return int(np.sum(np.array(answers.text) == np.array(truth)))
        return int(np.sum(answers.row == np.array(self.learner.head.row(number, truth, task.labels))))

    def routes(self, rows: Rows, oracle: int | None = None, key: int | None = None) -> IntArray:
        """[n] the task that answers for each row; `key` names rows whose frozen features may be kept."""
        learner, last = self.learner, len(self.learner.infos) - 1
        if oracle is not None:
            return np.full(len(rows), min(oracle, last))
        if self.routing == "last" or last == 0:
            return np.full(len(rows), last)
        if key is None or key not in self.features:
            features = self._frozen(rows)
            if key is not None:
                self.features[key] = features
        else:
            features = self.features[key]
        return self.method.route(features.to(learner.device)).cpu().numpy()

    @torch.no_grad()
    def _frozen(self, rows: Rows) -> torch.Tensor:
        found, batch = [], self.learner.config.evaluate.batch
        with self.method.plain():
            for at in range(0, len(rows), batch):
                columns = rows.take(range(at, min(at + batch, len(rows))))
                with naming(lambda place, at=at: rows.where(at + place), columns):  # type: ignore[misc]
                    found.append(self.learner.frozen_features(columns).cpu())
        return torch.cat(found) if found else torch.empty(0, self.learner.model.width)

    def answer(self, rows: Rows, routes: IntArray) -> Answers:
        """What the model answers to each row, through the adapter and among the classes of its route."""
        learner = self.learner
        texts, heads = [""] * len(rows), np.full(len(rows), -1)
        classifies = isinstance(learner.objective, Classification)
        for task in np.unique(routes).tolist():
            mine = np.flatnonzero(routes == task)
            among = self._classes(task) if classifies else None
            with self.method.answering(task):
                for at in range(0, len(mine), learner.config.evaluate.batch):
                    part = mine[at : at + learner.config.evaluate.batch]
                    columns = rows.take(part)
                    if isinstance(learner.objective, Classification):
                        heads[part] = learner.objective.choose(columns, among)
                        said = [learner.head.names[row] for row in heads[part]]
                    else:
                        said = learner.objective.answer(columns, [task] * len(part), None)
                    for place, text in zip(part.tolist(), said, strict=True):
                        texts[place] = text
        return Answers(routes, texts, heads if classifies else None)

    def _classes(self, task: int) -> Sequence[int] | None:
        """Classes that compete in an answer: the route's own, or all seen where nothing is routed."""
        return self.learner.head.of_all() if self.routing == "last" else self.method.among(task)
