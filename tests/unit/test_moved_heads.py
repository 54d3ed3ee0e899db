"""Heads that start again at a warm adapter, from a few sampled rows and what is known of frozen features."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toys
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task
from treelora_ray.methods import learner as learners
from treelora_ray.methods.learner import FEWEST, SAMPLED, Learner
from treelora_ray.models.router import ClassSums
from treelora_ray.training.loop import begin_task

CLASSES, ROWS = 3, 400


def task(number: int, rows: int = ROWS, labels: int = CLASSES) -> Task:
    names = tuple(f"c{label}" for label in range(labels))
    return Task(f"t{number}", toys.images(number, rows, 0, labels), toys.images(number, 12, 1, labels), names)


def met(backbone: Path, seed: int = 0, *tasks: Task) -> Learner:
    """A learner that has looked at the first task, not learnt."""
    made = toys.ready(backbone, "independent", seed=seed)
    made.learner.tasks = tasks or (task(0),)
    begin_task(made, (0,))
    return made.learner


def moved(learner: Learner, size: float) -> None:
    """The adapter becomes another one."""
    generator = torch.Generator().manual_seed(3)
    learner.adapter.add_(size * torch.randn(learner.adapter.shape, generator=generator))


def assert_alike(one: ClassSums, other: ClassSums) -> None:
    torch.testing.assert_close(one.counts, other.counts, rtol=0, atol=0)
    torch.testing.assert_close(one.means, other.means, rtol=0, atol=1e-5)


def test_where_the_adapter_moves_nothing_the_means_stay_those_of_all_rows(backbone: Path) -> None:
    learner = met(backbone)
    before = learner.effort.pass_rows
    found = learner.moved_sums(0)
    assert learner.effort.pass_rows - before == 96 < ROWS
    assert_alike(found, learner.class_sums(0))


@pytest.mark.parametrize(("labels", "sampled"), [(CLASSES, SAMPLED), (20, 60)])
def test_means_that_move_as_one_are_met_exactly(
    backbone: Path, monkeypatch: pytest.MonkeyPatch, labels: int, sampled: int
) -> None:
    monkeypatch.setattr(learners, "SAMPLED", sampled)
    monkeypatch.setattr(learners, "FEWEST", 2)
    learner = met(backbone, 0, task(0, labels=labels))
    assert len(learner.samples[0][0]) == sampled
    away = torch.randn(labels, learner.model.width, generator=torch.Generator().manual_seed(1))
    plain = learner.features

    def features(rows: Any) -> Tensor:
        return plain(rows) + away[[int(label[1:]) for label in rows["label"]]]

    monkeypatch.setattr(learner, "features", features)
    found = learner.moved_sums(0)
    torch.testing.assert_close(found.means, learner.means[0].double() + away.double(), rtol=0, atol=1e-5)
    # Rows lie around their means as before: as far as so few rows tell, without bias.
    spread, true = found.scatter().trace(), learner.class_sums(0).scatter().trace()
    assert float(spread) == pytest.approx(float(true), rel=0.2)


@pytest.mark.parametrize(("size", "at_most"), [(0.01, 0.3), (0.3, 1.02)])
def test_what_is_known_of_frozen_features_brings_means_nearer(backbone: Path, size: float, at_most: float) -> None:
    """Than means over the sample alone; not where an adapter leaves nothing of what a row was."""
    learner = met(backbone)
    moved(learner, size)
    true = learner.class_sums(0).means
    few = learner._sums(0, learner.samples[0][0], learner.features)[0].means
    assert float((true - learner.means[0]).norm()) > 0.3  # it has moved
    assert float((learner.moved_sums(0).means - true).norm()) < at_most * float((few - true).norm())


def test_the_head_starts_from_them(backbone: Path) -> None:
    learner = met(backbone)
    moved(learner, 0.3)
    learner.restart_head(learner.moved_sums)
    by_sample = learner.head_parameter.detach().clone()
    learner.restart_head(learner.class_sums)
    of_all = learner.head_parameter.detach()
    assert float((by_sample - of_all).norm()) < 0.15 * float(of_all.norm())


def test_a_sample_has_as_many_rows_of_each_class_and_depends_on_the_labels_alone(backbone: Path) -> None:
    rows, features = met(backbone).samples[0]
    labels = task(0).train.take(rows)["label"]
    assert Counter(labels) == dict.fromkeys(["c0", "c1", "c2"], SAMPLED // CLASSES)
    assert rows == sorted(rows) == met(backbone, 7).samples[0][0]
    assert features.shape == (SAMPLED, 16)
    # Of many classes a few rows each, of rare ones what there is.
    images, names = toys.images(0, 200, 0).take(range(200))["image"], [f"c{number}" for number in range(40)]
    given = [names[number % 39] for number in range(199)] + ["c39"]
    many = Task("many", MemoryRows({"image": images, "label": given}), toys.images(0, 12, 1), tuple(names))
    rows, _ = met(backbone, 0, many).samples[0]
    assert Counter(given[row] for row in rows) == {**dict.fromkeys(names, FEWEST), "c39": 1}


def test_a_class_of_which_no_row_is_there_stays_where_it_was(backbone: Path) -> None:
    rows = toys.images(0, 40, 0)
    lacking = Task("t0", rows, toys.images(0, 12, 1), ("c0", "c1", "c2"))
    learner = met(backbone, 0, lacking)
    moved(learner, 0.3)
    found = learner.moved_sums(0)
    assert found.counts.tolist()[2] == 0
    assert torch.isfinite(found.flat).all()
    assert_alike(found, learner.class_sums(0))  # of 40 rows all are in the sample


def test_one_row_of_each_class_gives_numbers(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "SAMPLED", 1)
    monkeypatch.setattr(learners, "FEWEST", 1)
    learner = met(backbone)
    moved(learner, 0.3)
    learner.restart_head(learner.moved_sums)
    assert len(learner.samples[0][0]) == CLASSES
    assert torch.isfinite(learner.head_parameter).all()


def test_samples_of_tasks_before_are_let_go(backbone: Path) -> None:
    made = toys.ready(backbone, "independent")
    toys.learn(made, 0, 1)
    assert list(made.learner.samples) == [1]
