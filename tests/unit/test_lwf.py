"""LwF against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny, toys
from treelora_ray.methods import outputs
from treelora_ray.methods.lwf import Lwf, distillation
from treelora_ray.training.loop import begin_task


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "image": tiny.vit(tmp_path_factory.mktemp("vit")),
        "prompt": tiny.llama(tmp_path_factory.mktemp("llama")),
    }


KINDS = pytest.mark.parametrize("kind", ["image", "prompt"])


def lwf(folders: dict[str, Path], kind: Any = "image", **options: Any) -> Lwf:
    sections = options.pop("sections", {})
    made = toys.ready(folders[kind], {"name": "lwf", **options}, kind=kind, **sections)
    assert isinstance(made, Lwf)
    return made


def second_task(folders: dict[str, Path], kind: str = "image", **options: Any) -> tuple[Lwf, Any, Any]:
    """At the first step of the second task: method, batch, what the model says of it."""
    made = lwf(folders, kind, **options)
    toys.learn(made, 0)
    begin_task(made, (1,))
    batch = made.learner.fetch([(1, row) for row in range(6)])
    return made, batch, made.learner.objective.loss(batch)[1]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@KINDS
def test_the_term_and_its_gradient_are_zero_on_the_first_step(folders: dict[str, Path], kind: str) -> None:
    made, batch, said = second_task(folders, kind)
    term = made.loss_terms(batch, said)
    assert term is not None
    made.learner.forget_gradients()
    term.backward()
    assert abs(float(term.detach())) < 1e-5
    assert torch.count_nonzero(made.learner.grad) == 0, "Adam makes full steps of whatever is left"
    made.learner.adapter.add_(0.1)
    moved = made.loss_terms(batch, made.learner.objective.loss(batch)[1])
    assert moved is not None
    assert float(moved.detach()) > 1e-4


def test_its_gradient_is_lambda_t_times_the_difference_of_the_softmaxes() -> None:
    new, old, t = random(5, 7).requires_grad_(), random(5, 7, seed=1), 3.0
    (0.7 * distillation(new, old, t)).backward()
    expected = 0.7 * t * (torch.softmax(new / t, -1) - torch.softmax(old / t, -1))
    torch.testing.assert_close(new.grad, expected.detach())


def test_the_divergence_is_from_the_old_to_the_new() -> None:
    old, new = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    by_hand = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    assert float(distillation(new, old, 1.0)) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(distillation(old, new, 1.0)) != pytest.approx(float(by_hand), rel=1e-2)


def test_of_answers_it_is_a_mean_over_their_tokens(folders: dict[str, Path]) -> None:
    made, batch, _ = second_task(folders, "prompt")
    made.learner.adapter.add_(random(made.learner.layout.total), alpha=0.1)
    said = made.learner.objective.loss(batch)[1]
    term, old = made.loss_terms(batch, said), made.taught(batch)
    lengths = outputs.answer_lengths(batch)
    assert len(set(lengths)) > 1
    assert batch.count == sum(lengths) == len(old)
    new, each = outputs.logits(batch, said), []
    for token in range(len(old)):
        before, now = torch.log_softmax(old[token] / 2, -1), torch.log_softmax(new[token] / 2, -1)
        each.append(4 * (before.exp() * (before - now)).sum())
    assert term is not None
    # The loop divides sums by `batch.count`.
    torch.testing.assert_close(term / batch.count, torch.stack(each).mean(), rtol=1e-4, atol=1e-7)


@KINDS
def test_the_teacher_is_the_model_after_the_task_before(folders: dict[str, Path], kind: str) -> None:
    made = lwf(folders, kind, sections={"objective": {"ce_scope": "seen"} if kind == "image" else {}})
    toys.learn(made, 0)
    begin_task(made, (1,))
    batch = made.learner.fetch([(1, row) for row in range(6)])
    before = outputs.logits(batch, made.learner.objective.loss(batch)[1]).detach()
    made.learner.theta.add_(random(len(made.learner.theta)), alpha=0.1)
    taught = made.taught(batch)
    torch.testing.assert_close(taught, before[:, : taught.shape[1]], rtol=1e-4, atol=1e-5)
    assert not taught.requires_grad


@KINDS
def test_the_teacher_has_no_dropout_and_leaves_that_of_the_student_on(folders: dict[str, Path], kind: str) -> None:
    length = {"max_length": 32} if kind == "prompt" else {}
    made, batch, _ = second_task(
        folders, kind, sections={"model": {"lora": {"rank": 2, "alpha": 4, "dropout": 0.5}, **length}}
    )
    model = made.learner.model
    model.train(True)
    state = torch.random.get_rng_state()
    taught = made.taught(batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(model.linear_with_adapter(name).lora_dropout["default"].training for name in model.layers)
    model.train(False)
    torch.testing.assert_close(taught, made.taught(batch), rtol=0, atol=0)


def test_the_teacher_is_asked_about_the_rows_at_hand_in_any_order(folders: dict[str, Path]) -> None:
    made, batch, _ = second_task(folders)
    shuffled = made.learner.fetch([(1, row) for row in (5, 3, 4, 0, 2, 1)])
    torch.testing.assert_close(made.taught(shuffled), made.taught(batch)[[5, 3, 4, 0, 2, 1]], rtol=1e-4, atol=1e-5)


def test_each_batch_has_a_teacher_of_its_own(folders: dict[str, Path]) -> None:
    """Logits kept by the number of the step would be those of other rows as soon as these are shuffled."""
    made, batch, said = second_task(folders)
    first = made.loss_terms(batch, said)
    other = made.learner.fetch([(1, row) for row in range(8, 14)])
    second = made.loss_terms(other, made.learner.objective.loss(other)[1])
    assert first is not None
    assert second is not None
    assert abs(float(second.detach())) < 1e-5, "the model is still what it was"


def test_old_classes_alone_are_distilled_and_their_rows_of_the_head_are_trained(folders: dict[str, Path]) -> None:
    made, batch, _ = second_task(folders)
    learner = made.learner
    assert learner.rows == [0, 1, 2, 3]
    learner.adapter.add_(0.1)
    learner.forget_gradients()
    term = made.loss_terms(batch, learner.objective.loss(batch)[1])
    assert term is not None
    term.backward()
    width, head = learner.model.width, learner.grad[learner.layout.total :]
    weights, biases = head[: 4 * width].view(4, width), head[4 * width :]
    assert (weights[:2].norm(dim=1) > 0).all()
    assert torch.count_nonzero(weights[2:]) == torch.count_nonzero(biases[2:]) == 0


def test_in_the_first_task_and_without_strength_there_is_no_teacher(folders: dict[str, Path]) -> None:
    made = lwf(folders)
    begin_task(made, (0,))
    batch = made.learner.fetch([(0, 0)])
    assert made.loss_terms(batch, made.learner.objective.loss(batch)[1]) is None
    off = lwf(folders, **{"lambda": 0})
    toys.learn(off, 0)
    assert off.teacher is None
