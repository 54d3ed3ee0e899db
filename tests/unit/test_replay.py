"""Replay against its formula, and against the mistakes that are made of it. Its memory is that of test_derpp.py."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny, toys
from treelora_ray.methods.gradients import mean_gradient
from treelora_ray.methods.learner import Ref
from treelora_ray.methods.replay import Replay
from treelora_ray.objectives.classification import Classification
from treelora_ray.training.loop import begin_task, end_task, train_task
from treelora_ray.training.state import capture, restore


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "image": tiny.vit(tmp_path_factory.mktemp("vit")),
        "prompt": tiny.llama(tmp_path_factory.mktemp("llama")),
    }


def replay(folders: dict[str, Path], kind: str = "image", **options: Any) -> Replay:
    sections = options.pop("sections", {})
    made = toys.ready(folders[kind], {"name": "replay", **options}, kind=kind, **sections)
    assert isinstance(made, Replay)
    return made


def second_task(folders: dict[str, Path], kind: str = "image", **options: Any) -> Replay:
    made = replay(folders, kind, **options)
    toys.learn(made, 0)
    begin_task(made, (1,))
    return made


def edited(made: Replay, refs: list[Ref], step: int = 0) -> tuple[Tensor, Tensor]:
    """The gradient of a step of these rows, before and after."""
    learner = made.learner
    learner.drawn = made.rows(step, refs)
    assert learner.drawn == refs, "remembered rows are no rows of the step, whose mean is another"
    learner.forget_gradients()
    learner.grad.copy_(mean_gradient(learner, refs))
    before = learner.grad.clone()
    made.edit_gradients(step, 0.0)
    return before, learner.grad.clone()


OWN = [(1, row) for row in range(8)]


def test_by_default_it_keeps_100_rows_a_task_and_sees_as_many_as_a_step(folders: dict[str, Path]) -> None:
    made = replay(folders)
    assert made.capacity == 300
    assert (made.batch, made.weight, made.scope, made.buffer.balanced) == (8, 0.5, "past", True)
    assert replay(folders, replay_batch=24).weight == 0.75


def test_of_classes_the_gradient_is_that_of_one_batch_of_both(folders: dict[str, Path]) -> None:
    made = second_task(folders, replay_batch=5, sections={"objective": {"ce_scope": "seen"}})
    drawn = made.draw(3, "memory")
    assert len(drawn) == 5
    assert {task for task, _ in drawn} == {0}
    _, after = edited(made, OWN, step=3)
    torch.testing.assert_close(after, mean_gradient(made.learner, OWN + drawn), rtol=1e-4, atol=1e-6)


def test_of_answers_both_means_are_weighted_not_their_tokens(folders: dict[str, Path]) -> None:
    made = second_task(folders, "prompt", replay_batch=3, weight=0.3)
    drawn = [(0, 0), (0, 1), (0, 3)]  # their answers are longer, on the whole, than those of the step's rows
    made.draw = lambda *_: drawn  # type: ignore[method-assign]
    own = [(1, row) for row in (0, 2, 4)]
    before, after = edited(made, own)
    expected = 0.7 * before + 0.3 * mean_gradient(made.learner, drawn)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(after, mean_gradient(made.learner, own + drawn), rtol=1e-2)


def test_remembered_labels_compete_among_all_classes_and_the_steps_own_as_the_config_says(
    folders: dict[str, Path],
) -> None:
    made = second_task(folders, weight=1.0)  # ce_scope: current
    before, after = edited(made, OWN)
    width = made.learner.model.width

    def of_head(gradient: Tensor) -> Tensor:
        return gradient[made.learner.layout.total :][: 4 * width].view(4, width).abs().sum(1)

    assert made.learner.rows == [0, 1, 2, 3]
    assert (of_head(before)[:2] == 0).all(), "the stream's rows leave old classes alone"
    assert (of_head(before)[2:] > 0).all()
    assert (of_head(after) > 0).all(), "a remembered row also pushes new classes down"


def test_a_step_draws_different_rows_and_others_than_the_step_before(folders: dict[str, Path]) -> None:
    made = second_task(folders, memory=20, replay_batch=6)
    draws = [made.draw(step, "memory") for step in range(40)]
    assert all(len(set(drawn)) == 6 for drawn in draws)
    assert len({tuple(drawn) for drawn in draws}) > 35
    counts = [sum(ref in drawn for drawn in draws) for ref in made.buffer.rows()]
    assert max(counts) < 24 < sum(counts)
    assert min(counts) > 2


def test_draws_do_not_listen_to_global_generators(folders: dict[str, Path]) -> None:
    found = []
    for seed in (1, 2):
        for generator in (torch.manual_seed, np.random.seed, random.seed):
            generator(seed)
        made = second_task(folders, memory=9, replay_batch=4)
        found.append((made.buffer.rows(), [made.draw(step, "memory") for step in range(5)]))
    assert found[0] == found[1]


def test_a_memory_smaller_than_a_draw_is_replayed_whole_with_the_same_weight(folders: dict[str, Path]) -> None:
    made = second_task(folders, memory=3, replay_batch=8)
    drawn = made.draw(0, "memory")
    assert sorted(drawn) == sorted(made.buffer.rows())
    assert len(drawn) == 3
    before, after = edited(made, OWN)
    expected = (before + mean_gradient(made.learner, drawn, made.loss_among_all)) / 2
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["past", "all"])
def test_every_class_has_its_share_and_no_row_stands_twice_whatever_the_epochs(
    folders: dict[str, Path], scope: str
) -> None:
    found = []
    for epochs in (1, 3):
        made = replay(folders, memory=14, replay_batch=2, scope=scope, sections={"train": {"epochs": epochs}})
        toys.learn(made, 0, 1, 2)
        rows = made.buffer.rows()
        assert len(set(rows)) == len(rows) == 14
        found.append(rows)
        objective = made.learner.objective
        assert isinstance(objective, Classification)
        classes = [
            objective.targets(made.learner.tasks[task].train.take([row], ["label"]), [task])[0] for task, row in rows
        ]
        assert classes == made.buffer.groups_of_rows()
        assert sorted(np.bincount(classes).tolist()) == [2, 2, 2, 2, 3, 3]
    assert found[0] == found[1]


def test_of_language_models_every_task_has_its_share(folders: dict[str, Path]) -> None:
    made = replay(folders, "prompt", memory=7)
    toys.learn(made, 0, 1, 2)
    assert np.bincount([task for task, _ in made.buffer.rows()]).tolist() == [3, 2, 2]


def test_a_reservoir_keeps_the_largest_keys_of_all_rows_seen(folders: dict[str, Path]) -> None:
    made = replay(folders, memory=9, policy="reservoir")
    toys.learn(made, 0, 1)
    seen = [(task, row) for task in range(2) for row in range(22)]
    assert made.buffer.rows() == sorted(seen, key=lambda ref: -made.buffer.key(ref))[:9]


def test_rows_of_the_task_in_progress_are_replayed_where_asked_for(folders: dict[str, Path]) -> None:
    made = replay(folders, scope="all", replay_batch=4)
    begin_task(made, (0,))
    rows = [(0, row) for row in range(8)]
    before, after = edited(made, rows)
    assert torch.equal(before, after), "the memory is read before the step's own rows are offered"
    assert set(made.buffer.rows()) == set(rows)
    before, after = edited(made, rows, step=1)
    assert not torch.equal(before, after)
    past = replay(folders, replay_batch=4)
    begin_task(past, (0,))
    edited(past, rows)
    assert past.buffer.rows() == []


def test_one_task_is_ordinary_fine_tuning(folders: dict[str, Path]) -> None:
    plain = toys.learn(toys.ready(folders["image"], "seqlora", 1), 0)
    made = toys.learn(toys.ready(folders["image"], "replay", 1), 0)
    assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))


def test_a_weight_of_zero_asks_the_model_about_no_remembered_row(folders: dict[str, Path]) -> None:
    made = replay(folders, weight=0)
    toys.learn(made, 0)
    passed = made.learner.effort.pass_rows
    toys.learn(made, 1)
    assert made.learner.effort.pass_rows == passed + 22, "those of the look at the task alone"
    assert not made.buffer.rows()


def test_stopped_within_a_task_it_draws_and_keeps_on_as_if_it_had_not(folders: dict[str, Path]) -> None:
    options: dict[str, Any] = {"memory": 9, "replay_batch": 4, "scope": "all"}
    options["sections"] = {"train": {"schedule": "constant"}}
    whole, parts = (second_task(folders, **options) for _ in range(2))

    def nothing(*_: Any) -> None: ...

    train_task(whole, 0, nothing, nothing)
    parts.learner.steps = 3
    train_task(parts, 0, nothing, nothing)
    again = replay(folders, **options)
    restore(again, *capture(parts, 3), {})
    assert again.buffer.groups_of_rows() == parts.buffer.groups_of_rows()
    train_task(again, 3, nothing, nothing)
    assert torch.equal(again.learner.theta, whole.learner.theta)
    for made in (whole, again):
        end_task(made)
    assert again.buffer.rows() == whole.buffer.rows(), "later rows are admitted as often as they would have been"
    assert again.draw(0, "memory") == whole.draw(0, "memory")


def test_the_size_of_the_memory_stands_with_every_result(folders: dict[str, Path]) -> None:
    made = replay(folders, memory=14)
    toys.learn(made, 0)
    assert made.report() == {"memory": 14, "remembered": 14}
