"""OGD against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny, toys
from treelora_ray.methods import outputs, whole
from treelora_ray.methods.ogd import Ogd, extended
from treelora_ray.training.loop import begin_task


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "current": tiny.vit(tmp_path_factory.mktemp("vit")),
        "prompt": tiny.llama(tmp_path_factory.mktemp("llama")),
    }


CASES = pytest.mark.parametrize("case", ["current", "seen", "prompt"])


def ogd(folders: dict[str, Path], case: Any = "current", **options: Any) -> Ogd:
    scope: dict[str, Any] = {"objective": {"ce_scope": "seen"}} if case == "seen" else {}
    kind = "prompt" if case == "prompt" else "image"
    folder = folders["prompt" if case == "prompt" else "current"]
    made = toys.ready(folder, {"name": "ogd", "memory": 6, **options}, kind=kind, **scope)
    assert isinstance(made, Ogd)
    return made


def third_task(folders: dict[str, Path], case: str = "current", **options: Any) -> Ogd:
    made = ogd(folders, case, **options)
    toys.learn(made, 0, 1)
    begin_task(made, (2,))
    return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edited(made: Ogd, gradient: Tensor) -> Tensor:
    made.learner.grad.copy_(gradient)
    made.edit_gradients(0, 0.0)
    return made.learner.grad.clone()


def right_logits(made: Ogd, task: int) -> Tensor:
    """[rows] of a task, the right class's logit (of an answer the sum over its tokens)."""
    learner, found = made.learner, []
    for row in range(len(learner.tasks[task].train)):
        columns = learner.tasks[task].train.take([row])
        with torch.no_grad():
            if learner.rows:
                place = learner.head.rows[task][learner.tasks[task].labels.index(columns["label"][0])]
                weight, bias = learner.head.weight.clone(), learner.head.bias.clone()
                end, width = len(learner.rows) * learner.model.width, learner.model.width
                weight[learner.rows] = learner.head_parameter[:end].view(-1, width)
                bias[learner.rows] = learner.head_parameter[end:]
                found.append(learner.features(columns)[0] @ weight[place] + bias[place])
            else:
                batch = learner.objective.batch(columns, [task])
                said = learner.objective.loss(batch)[1]
                gold = outputs.gold(batch).unsqueeze(1)
                found.append(outputs.logits(batch, said).gather(1, gold).sum())
    return torch.stack(found)


@CASES
def test_directions_are_orthonormal_and_nothing_of_an_edited_gradient_lies_along_them(
    folders: dict[str, Path], case: str
) -> None:
    made = third_task(folders, case)
    known = made.directions()
    assert len(known) >= 4
    torch.testing.assert_close(known @ known.T, torch.eye(len(known)), rtol=0, atol=1e-5)
    torch.testing.assert_close(made.basis @ made.basis.T, torch.eye(len(made.basis)), rtol=0, atol=1e-5)
    gradient = random(len(made.learner.theta))
    once = edited(made, gradient)
    assert float((known @ once).abs().max()) < 1e-5 < float((known @ gradient).abs().max())
    torch.testing.assert_close(edited(made, once), once, rtol=0, atol=1e-5)
    assert float(once.norm()) > 0.5 * float(gradient.norm())


@CASES
def test_a_step_changes_what_is_remembered_in_second_order_only(folders: dict[str, Path], case: str) -> None:
    """Twice the step is four times the change; of a step that is not edited, twice."""
    made = ogd(folders, case, memory=22)
    toys.learn(made, 0)
    begin_task(made, (1,))  # at the weights at which the gradients were taken
    learner = made.learner
    start, before = learner.theta.clone(), right_logits(made, 0)
    gradient = random(len(start))
    for step, order in ((edited(made, gradient), 2), (gradient, 1)):
        changes = []
        for size in (0.005, 0.01):
            learner.theta.copy_(start - size * step)
            changes.append(float((right_logits(made, 0) - before).norm()))
        assert changes[0] > 1e-5
        assert 2 ** (order - 0.25) < changes[1] / changes[0] < 2 ** (order + 0.5), "third order is small beside it"


def test_directions_are_of_the_right_classs_logit_not_of_the_loss(folders: dict[str, Path]) -> None:
    made = ogd(folders, "seen", memory=22)
    begin_task(made, (0,))
    learner, logits, losses = made.learner, list[Tensor](), list[Tensor]()
    for row in range(22):
        for kind, found in (("logit", logits), ("loss", losses)):
            learner.forget_gradients()
            batch = learner.fetch([(0, row)])
            loss, said = learner.objective.loss(batch)
            assert batch.targets is not None
            (said["logits"][0, batch.targets[0]] if kind == "logit" else loss).backward()
            found.append(learner.grad.clone())
    learner.forget_gradients()
    made.after_task()
    known = whole.trained(learner, made.basis)

    def outside(vectors: list[Tensor]) -> float:
        return max(float((v - known.T @ (known @ v)).norm() / v.norm()) for v in vectors)

    assert outside(logits) < 1e-4
    assert outside(losses) > 1e-2


def test_of_an_answer_it_is_the_sum_of_its_tokens_logits(folders: dict[str, Path]) -> None:
    made = ogd(folders, "prompt", memory=1)
    begin_task(made, (0,))
    made.after_task()
    learner, (direction,) = made.learner, made.basis
    cosines = []
    for row in range(12):
        learner.forget_gradients()
        batch = learner.fetch([(0, row)])
        logits, labels = learner.objective.loss(batch)[1]["logits"][0], batch.inputs["labels"][0]
        places = [(at - 1, token) for at, token in enumerate(labels.tolist()) if token >= 0]
        torch.stack([logits[at, token] for at, token in places]).sum().backward()
        cosines.append(float(torch.nn.functional.cosine_similarity(learner.grad, direction, dim=0)))
    assert max(cosines) == pytest.approx(1, abs=1e-5)


def test_what_lies_in_the_span_already_is_dropped_not_blown_up() -> None:
    """Normalised rounding would give directions that are nearly parallel, subtracted again and again."""
    vectors = random(3, 40)
    mixed = torch.cat([vectors, vectors[:1], 1000 * vectors[1:2], vectors[:1] - 2 * vectors[2:], torch.zeros(1, 40)])
    found = extended(torch.empty(0, 40), mixed)
    assert found.shape == (3, 40)
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(vectors @ found.T @ found, vectors, rtol=0, atol=1e-5)
    assert torch.equal(extended(found, mixed), found)


def test_nearly_parallel_gradients_still_give_right_angles() -> None:
    base = random(1, 500)
    close = base + 1e-4 * random(20, 500, seed=1)
    found = extended(torch.empty(0, 500), close)
    assert len(found) == 20
    torch.testing.assert_close(found @ found.T, torch.eye(20), rtol=0, atol=1e-5)


def test_a_task_adds_as_many_directions_as_rows_at_most(folders: dict[str, Path]) -> None:
    made = ogd(folders)
    counts = []
    for task in range(3):
        toys.learn(made, task)
        counts.append(len(made.basis))
    assert counts[0] <= 6
    assert counts == sorted(counts)
    assert counts[2] <= 18
    assert made.report() == {"directions": counts[2]}


def test_directions_of_different_rows_differ(folders: dict[str, Path]) -> None:
    """One buffer for all of them would leave a single direction."""
    made = ogd(folders, "seen")
    toys.learn(made, 0)
    assert len(made.basis) == 6


@pytest.mark.parametrize("case", ["current", "seen"])
def test_directions_keep_their_places_when_the_head_grows(folders: dict[str, Path], case: str) -> None:
    made = ogd(folders, case)
    toys.learn(made, 0)
    before = made.basis.clone()
    begin_task(made, (1,))
    known, learner = made.directions(), made.learner
    total, width = learner.layout.total, learner.model.width
    if case == "current":
        assert learner.rows == [2, 3]
        assert torch.count_nonzero(known[:, total:]) == 0, "the first task says nothing of later rows"
        span = before[:, :total]
        torch.testing.assert_close(span @ known[:, :total].T @ known[:, :total], span, rtol=0, atol=1e-5)
    else:
        weights = known[:, total : total + 4 * width].view(-1, 4, width)
        old = before[:, total:].view(-1, 2, width + 1)
        assert torch.equal(weights[:, :2], old[..., :-1])
        assert torch.count_nonzero(weights[:, 2:]) == 0
