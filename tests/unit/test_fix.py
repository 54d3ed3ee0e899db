"""FIX against what it promises, and against the mistakes that are made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import toys
from treelora_ray.api import Run
from treelora_ray.config import ConfigError, from_mapping
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task, TaskStream
from treelora_ray.methods.fix import Fix
from treelora_ray.models.backbone import CausalModel, Shown, backbone_digest
from treelora_ray.tracking.export import export_task
from treelora_ray.training.errors import RunError
from treelora_ray.training.evaluate import Evaluator
from treelora_ray.training.stream import StreamRun

WORDS = ["good", "bad", "film", "red", "blue", "one", "two", "three"]


def rows(asked: str, answer: str, count: int = 8) -> MemoryRows:
    words = [f"{WORDS[number % 8]} {WORDS[number // 8]}" for number in range(count)]
    return MemoryRows({"prompt": [f"{asked} {word}" for word in words], "answer": [answer] * count})


def stream() -> TaskStream:
    """Answers of training rows are never those of test rows."""
    asked = [("what colour is", "yes", "no"), ("sum of", "positive", "negative")]
    made = [Task(f"p{n}", rows(ask, train), rows(ask, test, 5)) for n, (ask, train, test) in enumerate(asked)]
    return TaskStream(tuple(made), "prompt")


def run(folder: Path, llama: Path, options: Any = (), **sections: Any) -> StreamRun:
    folder.mkdir(parents=True, exist_ok=True)
    sections = {"objective": {"max_new_tokens": 3}, "model": {"max_length": 32}, **sections}
    config = toys.config(llama, {"name": "fix", "shots": 3, **dict(options)}, **sections)
    (folder / "config.yaml").write_text(config.to_yaml())
    return StreamRun(config, stream(), toys.method(config, None, "prompt"), folder)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> StreamRun:
    made = run(tmp_path_factory.mktemp("run"), llama, objective={"max_new_tokens": 3, "routing": "oracle"})
    made.before = backbone_digest(made.learner.model)  # type: ignore[attr-defined]
    made.go()
    return made


def method(made: StreamRun) -> Fix:
    assert isinstance(made.method, Fix)
    return made.method


@contextmanager
def heard(model: Any) -> Iterator[list[str]]:
    """The texts that the model goes on from."""
    found: list[str] = []
    real = model._padded

    def padded(ids: list[list[int]], left: bool) -> Any:
        found.extend(model.tokenizer.decode(row) for row in ids)
        return real(ids, left)

    model._padded = padded
    yield found
    model._padded = real


def test_every_task_has_its_demonstrations_of_training_rows_drawn_by_the_seed(
    learnt: StreamRun, llama: Path, tmp_path: Path
) -> None:
    for number, task in enumerate(learnt.stream.tasks):
        known = list(zip(*task.train.take(range(len(task.train))).values(), strict=True))
        found = method(learnt).demonstrations[number]
        assert len(set(found)) == 3
        assert set(found) <= set(known), "an answer of a test row would be another"
    again, other = run(tmp_path / "a", llama), run(tmp_path / "b", llama, seed=1)
    for made in (again, other):
        made.go()
    assert method(again).demonstrations == method(learnt).demonstrations
    assert method(other).demonstrations != method(learnt).demonstrations


def test_nothing_is_trained_and_the_backbone_stays(learnt: StreamRun) -> None:
    assert [record["effort"]["steps"] for record in learnt.records] == [0, 0]
    assert torch.equal(learnt.learner.adapter, learnt.learner.anchor)
    assert backbone_digest(learnt.learner.model) == learnt.before  # type: ignore[attr-defined]


def test_the_model_goes_on_from_demonstrations_with_their_answers_then_the_prompt(learnt: StreamRun) -> None:
    with heard(learnt.learner.model) as texts, learnt.method.answering(1):
        learnt.learner.objective.answer({"prompt": ["sum of red blue"]}, [1], None)
    shown = " ".join(f"{prompt} {answer}" for prompt, answer in method(learnt).demonstrations[1])
    assert texts == [f"{shown} sum of red blue"]
    with heard(learnt.learner.model) as texts:
        learnt.learner.objective.answer({"prompt": ["sum of red blue"]}, [1], None)
    assert texts == ["sum of red blue"], "outside of an answer nothing stands before a prompt"


def test_with_the_task_told_each_row_sees_its_own_tasks_demonstrations_and_no_score_changes(
    learnt: StreamRun,
) -> None:
    for number, task in enumerate(learnt.stream.tasks):
        with heard(learnt.learner.model) as texts:
            Evaluator(learnt.method).score(number, task)
        assert len(texts) == 5
        first = method(learnt).demonstrations[number][0][0]
        assert all(text.startswith(first) for text in texts)
    assert learnt.scores[0][0] == learnt.scores[1][0]
    result = json.loads((learnt.folder / "result.json").read_text())
    assert result["metrics"]["bwt"] == 0
    assert {record["report"]["demonstrations_of"] for record in result["records"]} == {"the task by routing: oracle"}


def test_without_an_oracle_the_inferred_tasks_demonstrations_are_shown(learnt: StreamRun) -> None:
    evaluator, task = Evaluator(learnt.method, "inferred"), learnt.stream.tasks[0]
    routes = np.array([0, 1, 1, 0, 1])
    with heard(learnt.learner.model) as texts:
        answers = evaluator.answer(task.test, routes)
    firsts = [method(learnt).demonstrations[number][0][0] for number in (0, 0, 1, 1, 1)]
    assert [text.startswith(first) for text, first in zip(texts, firsts, strict=True)] == [True] * 5
    assert answers.task.tolist() == routes.tolist()
    assert set(evaluator.routes(task.test).tolist()) <= {0, 1}


@pytest.mark.parametrize(("room", "left"), [(100, 3), (18, 2), (13, 1), (9, 0), (4, 0)])
def test_demonstrations_are_left_out_from_the_front_and_the_prompt_never(
    learnt: StreamRun, room: int, left: int
) -> None:
    model, found = learnt.learner.model, method(learnt).demonstrations[0]
    assert isinstance(model, CausalModel)
    prompt = "what colour is the film"
    with heard(model) as texts:
        model.generate([prompt], 2, Shown(tuple(found), "\n\n", room))
    whole = " ".join([*(f"{ask} {answer}" for ask, answer in found[len(found) - left :]), prompt])
    assert texts == [" ".join(whole.split()[-room:])]


def test_the_models_places_are_a_bound_too_and_the_limit_on_training_rows_is_none(llama: Path, tmp_path: Path) -> None:
    made = run(tmp_path, llama, {"shots": 8}, model={"max_length": 6})
    made.go()  # eight demonstrations have more tokens than the model's 64 places
    with heard(made.learner.model) as texts, made.method.answering(0):
        made.learner.objective.answer({"prompt": ["what colour is red blue"]}, [0], None)
    assert 6 < len(texts[0].split()) <= 64 - 3
    assert texts[0].endswith("what colour is red blue")
    assert made.records[0]["report"]["demonstration_tokens"] == 8 * 6


def test_special_tokens_stand_in_front_once(llama: Path) -> None:
    model = toys.ready(llama, {"name": "fix"}, kind="prompt").learner.model
    assert isinstance(model, CausalModel)
    real = model._ids
    model._ids = lambda texts, special: [[7] * special + row for row in real(texts, special)]  # type: ignore[method-assign]
    shown = Shown((("sum of one", "two"), ("sum of two", "three")), "", 50)
    with heard(model) as texts:
        model.generate(["sum of red"], 2, shown)
    special = model.tokenizer.decode([7])
    assert texts == [f"{special} sum of one two sum of two three sum of red"]


def test_without_demonstrations_it_is_the_model_as_loaded(llama: Path, tmp_path: Path) -> None:
    made = run(tmp_path, llama, {"shots": 0})
    made.go()
    prompts = made.stream.tasks[0].test.take(range(5))["prompt"]
    plain = made.learner.model.generate(prompts, 3)  # type: ignore[attr-defined]
    assert Evaluator(made.method, "last").answer(made.stream.tasks[0].test, np.zeros(5, int)).text == plain


def test_answers_do_not_depend_on_the_batch(learnt: StreamRun) -> None:
    task, routes = learnt.stream.tasks[0], np.array([0, 1, 1, 0, 0])
    found = []
    for batch in (64, 1):
        learnt.learner.config = toys.answering_by(batch, learnt.config)
        found.append(Evaluator(learnt.method).answer(task.test, routes).text)
    assert found[0] == found[1]
    order = np.array([4, 2, 0, 1, 3])
    shuffled = Evaluator(learnt.method).answer(MemoryRows(task.test.take(order)), routes[order]).text
    assert shuffled == [found[0][place] for place in order]


def test_a_resumed_and_a_stored_run_show_the_same(learnt: StreamRun, llama: Path) -> None:
    again = run(learnt.folder, llama)
    assert again.resume()
    assert method(again).demonstrations == method(learnt).demonstrations
    kept = Run(learnt.folder)
    assert isinstance(kept.method, Fix)
    assert kept.method.demonstrations == method(learnt).demonstrations
    prompts = {"prompt": ["what colour is red red"]}
    with heard(kept.method.learner.model) as texts:
        kept.predict(prompts, "last")
    assert texts[0].startswith(method(learnt).demonstrations[1][0][0])


def test_no_adapter_is_exported(learnt: StreamRun, tmp_path: Path) -> None:
    assert not (learnt.folder / "adapters").exists()
    with pytest.raises(RunError, match="method fix answers with is more than an adapter"):
        export_task(Run(learnt.folder), "p0", tmp_path / "out")


def test_a_stream_of_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.name 'fix' learns causal-lm only, not classification"):
        from_mapping({"method": {"name": "fix"}, "objective": {"kind": "classification"}})
