"""EWC against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import toys
from tests.contract.test_methods import Together
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task
from treelora_ray.methods import whole
from treelora_ray.methods.ewc import Ewc
from treelora_ray.methods.gradients import of_each
from treelora_ray.training.loop import begin_task


def ewc(backbone: Path, **options: Any) -> Ewc:
    kind, sections = options.pop("kind", "image"), options.pop("sections", {})
    made = toys.ready(backbone, {"name": "ewc", **options}, kind=kind, **sections)
    assert isinstance(made, Ewc)
    return made


def pull(made: Ewc) -> Tensor:
    """[theta] what it adds to a gradient of zero."""
    made.learner.forget_gradients()
    made.edit_gradients(0, 0.0)
    return made.learner.grad.clone()


def squares(made: Ewc) -> Tensor:
    """[theta] the mean over rows of the squared gradient of the loss, worked out row by row."""
    learner = made.learner
    total = torch.zeros_like(learner.theta)
    for row in range(learner.unit_rows):
        learner.forget_gradients()
        batch = learner.fetch([(learner.unit[0], row)])
        (learner.objective.loss(batch)[0] / batch.count).backward()
        total += learner.grad.square()
    return total / learner.unit_rows


@pytest.mark.parametrize("scope", ["current", "seen"])
def test_penalty_and_its_gradient_are_zero_at_the_anchor_and_the_gradient_is_its_derivative(
    backbone: Path, scope: str
) -> None:
    made = ewc(backbone, sections={"objective": {"ce_scope": scope}})
    toys.learn(made, 0)
    begin_task(made, (1,))
    assert float(made.penalty()) == 0
    assert torch.count_nonzero(pull(made)) == 0
    learner = made.learner
    learner.theta.add_(torch.randn(learner.theta.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    moved = learner.theta.clone().requires_grad_()
    made.learner.theta = moved
    (expected,) = torch.autograd.grad(made.penalty(), moved)
    made.learner.theta = moved.detach()
    torch.testing.assert_close(pull(made), expected)
    assert float(expected.norm()) > 0


def test_the_penalty_quadruples_when_the_displacement_doubles(backbone: Path) -> None:
    made = ewc(backbone)
    toys.learn(made, 0)
    begin_task(made, (1,))
    theta = made.learner.theta
    start, away = theta.clone(), torch.randn(theta.shape, generator=torch.Generator().manual_seed(1)) / 10
    found = []
    for times in (1, 2):
        theta.copy_(start + times * away)
        found.append(float(made.penalty()))
    assert found[0] > 0
    assert found[1] == pytest.approx(4 * found[0], rel=1e-4)


def test_the_penalty_has_the_half_of_the_paper(backbone: Path) -> None:
    made = ewc(backbone, **{"lambda": 3.0})
    toys.learn(made, 0)
    begin_task(made, (1,))
    (importance, anchor), theta = made.kept[0], made.learner.theta
    theta[: made.learner.layout.total] += 0.1
    adapter = slice(0, made.learner.layout.total)
    by_hand = 3.0 / 2 * (importance[adapter] * (theta[adapter] - anchor[adapter]).square()).sum()
    assert float(made.penalty()) == pytest.approx(float(by_hand), rel=1e-5)


def test_importance_is_the_mean_of_squared_gradients_of_rows_not_the_square_of_a_batch(backbone: Path) -> None:
    made = ewc(backbone)
    begin_task(made, (0,))
    found, expected = made.importance(), squares(made)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-10)
    learner = made.learner
    learner.forget_gradients()
    batch = learner.fetch([(0, row) for row in range(learner.unit_rows)])
    (learner.objective.loss(batch)[0] / batch.count).backward()
    assert float(learner.grad.square().sum()) < 0.9 * float(found.sum())


def test_importance_of_logistic_regression_is_p_1_minus_p_x_squared(backbone: Path) -> None:
    """Two classes, the head alone: the squared gradients of both labels, weighted by their chances."""
    made = ewc(backbone)
    begin_task(made, (0,))
    learner = made.learner
    picture = toys.images(0, 1, 5).take([0])["image"][0]
    both = MemoryRows({"image": [picture, picture], "label": ["c0", "c1"]})
    learner.tasks = (Task("both", both, both, ("c0", "c1")),)
    squared = [gradient.square().clone() for _, gradient in of_each(learner, [(0, 0), (0, 1)], made._surprise)]
    batch = learner.fetch([(0, 0)])
    said = learner.objective.loss(batch)[1]
    chances, x = said["logits"].softmax(-1)[0].detach(), said["features"][0].detach()
    found = sum(chance * each for chance, each in zip(chances, squared, strict=True))
    assert isinstance(found, Tensor)
    width, head = learner.model.width, found[learner.layout.total :]
    p = float(chances[0])
    torch.testing.assert_close(head[:width], p * (1 - p) * x.square(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(head[-2:], torch.full((2,), p * (1 - p)), rtol=1e-4, atol=1e-8)


def test_sampled_labels_give_the_importance_of_the_model_not_of_the_labels(backbone: Path) -> None:
    made = ewc(backbone, fisher="sampled")
    picture = toys.images(0, 1, 5).take([0])["image"][0]
    same = MemoryRows({"image": [picture] * 400, "label": ["c0", "c1"] + ["c0"] * 398})
    made.learner.tasks = (Task("same", same, same, ("c0", "c1")),)
    begin_task(made, (0,))
    made.learner.head_parameter.data[-2:] = torch.tensor([0.3, -0.3])
    learner = made.learner
    said = learner.objective.loss(learner.fetch([(0, 0)]))[1]
    p = float(said["logits"].detach().softmax(-1)[0, 0])
    # The squared gradient of a bias is (1 - p)^2 with chance p, else p^2.
    spread = np.sqrt(p * (1 - p)) * abs((1 - p) ** 2 - p**2) / np.sqrt(400)
    found = float(made.importance()[-1])
    assert abs(found - p * (1 - p)) < 4 * spread
    assert abs((1 - p) ** 2 - p * (1 - p)) > 5 * spread, "labels would give something else"
    torch.testing.assert_close(made.importance(), made.importance(), rtol=0, atol=0)


def test_importance_of_an_answer_is_that_of_the_mean_over_its_tokens(llama: Path) -> None:
    made = ewc(llama, kind="prompt")
    begin_task(made, (0,))
    torch.testing.assert_close(made.importance(), squares(made), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("kind", ["image", "prompt"])
def test_importance_does_not_depend_on_the_number_of_workers(backbone: Path, llama: Path, kind: str) -> None:
    folder = llama if kind == "prompt" else backbone
    alone = ewc(folder, kind=kind, fisher="sampled")
    begin_task(alone, (0,))
    expected, group, found = alone.importance(), Together(3), dict[int, Tensor]()

    def work(rank: int) -> None:
        made = ewc(folder, kind=kind, fisher="sampled")
        made.learner.comm = group.comm(rank)
        begin_task(made, (0,))
        found[rank] = made.importance()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank in range(3):
        torch.testing.assert_close(found[rank], expected, rtol=1e-5, atol=1e-12)


def test_importance_is_taken_once_at_the_final_weights_whatever_the_epochs(backbone: Path) -> None:
    made = ewc(backbone, sections={"train": {"epochs": 3}})
    learner = made.learner
    begin_task(made, (0,))
    expected = squares(made)
    made.after_task()  # no step was taken: three epochs are not three passes
    torch.testing.assert_close(whole.trained(learner, made.kept[0][0]), expected, rtol=1e-4, atol=1e-10)


def test_importance_is_of_the_loss_without_the_penalty(backbone: Path) -> None:
    strong, none = ewc(backbone, **{"lambda": 1e4}), ewc(backbone, **{"lambda": 1e-9})
    for made in (strong, none):
        toys.learn(made, 0)
        begin_task(made, (1,))
        made.learner.adapter.add_(0.05)
    torch.testing.assert_close(strong.importance(), none.importance(), rtol=0, atol=0)


def test_online_keeps_one_pair_and_lets_older_importance_fade(backbone: Path) -> None:
    made = ewc(backbone, online=True, gamma=0.25)
    toys.learn(made, 0)
    first = made.kept[0][0].clone()
    begin_task(made, (1,))
    made.learner.adapter.add_(0.03)
    new = whole.spread(made.learner, made.importance())
    made.after_task()
    assert len(made.kept) == 1
    importance, anchor = made.kept[0]
    new[: len(first)] += 0.25 * first
    torch.testing.assert_close(importance, new)
    assert torch.equal(anchor, whole.values(made.learner))


def test_separate_keeps_a_pair_for_each_task(backbone: Path) -> None:
    made = ewc(backbone)
    toys.learn(made, 0, 1, 2)
    assert len(made.kept) == 3
    assert [len(anchor) for _, anchor in made.kept] == sorted(len(anchor) for _, anchor in made.kept)


def test_new_rows_of_the_head_have_no_importance_and_old_ones_keep_theirs(backbone: Path) -> None:
    made = ewc(backbone, sections={"objective": {"ce_scope": "seen"}})
    toys.learn(made, 0)
    begin_task(made, (1,))
    (importance, _), width = made.terms()[0], made.learner.model.width
    head = importance[made.learner.layout.total :]
    weights, biases = head[: 4 * width].view(4, width), head[4 * width :]
    assert (weights[:2] > 0).any()
    assert (biases[:2] > 0).all()
    assert torch.count_nonzero(weights[2:]) == torch.count_nonzero(biases[2:]) == 0


def test_strength_is_that_of_the_objective_unless_it_is_given(backbone: Path, llama: Path) -> None:
    assert ewc(backbone).strength == 50
    assert ewc(llama, kind="prompt").strength == 400
    assert ewc(llama, kind="prompt", **{"lambda": 2}).strength == 2


def test_without_strength_nothing_is_looked_at(backbone: Path) -> None:
    made = ewc(backbone, **{"lambda": 0})
    toys.learn(made, 0, 1)
    assert made.kept == []
    assert "importance" not in made.learner.effort.seconds
