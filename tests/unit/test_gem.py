"""GEM and A-GEM against their formulas, and against the mistakes that are made of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import toys
from treelora_ray.data.batches import BatchPlan
from treelora_ray.methods import agem, gem
from treelora_ray.methods.agem import Agem
from treelora_ray.methods.gem import Gem, multipliers
from treelora_ray.methods.gradients import mean_gradient
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.methods.remembering import Remembering
from treelora_ray.training.loop import begin_task

EXACT = 1e-10  # a ridge that changes nothing visible


def ready(backbone: Path, name: str, **options: Any) -> Remembering:
    kind, sections = options.pop("kind", "image"), options.pop("sections", {})
    made = toys.ready(backbone, {"name": name, "memory": 5, **options}, kind=kind, **sections)
    assert isinstance(made, Remembering)
    return made


def third_task(backbone: Path, name: str, **options: Any) -> Remembering:
    """At the start of the third task, two tasks remembered."""
    made = ready(backbone, name, **options)
    toys.learn(made, 0, 1)
    begin_task(made, (2,))
    return made


def told(monkeypatch: pytest.MonkeyPatch, vectors: Sequence[Tensor]) -> None:
    """The memory gradient of task k is vectors[k]."""

    def given(learner: Learner, refs: Sequence[Ref]) -> Tensor:  # noqa: ARG001
        return vectors[refs[0][0]]

    monkeypatch.setattr(gem, "mean_gradient", given)
    monkeypatch.setattr(agem, "mean_gradient", given)


def edited(made: Remembering, gradient: Tensor) -> Tensor:
    made.learner.grad.copy_(gradient)
    made.edit_gradients(0, 0.0)
    return made.learner.grad.clone()


def projected(past: np.ndarray, g: np.ndarray, margin: float = 0.0, ridge: float = EXACT) -> np.ndarray:
    along = past @ g
    return g + multipliers(past @ past.T, along, margin, ridge) @ past if (along < 0).any() else g


def conflicting(seed: int, tasks: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(tasks, size)), draw.normal(size=size)


@given(seed=st.integers(0, 10_000), tasks=st.integers(1, 6))
def test_without_margin_no_remembered_loss_rises_to_first_order(seed: int, tasks: int) -> None:
    past, g = conflicting(seed, tasks)
    assert (past @ projected(past, g) >= -1e-6).all()


@given(seed=st.integers(0, 10_000), tasks=st.integers(1, 6))
def test_projecting_twice_is_projecting_once(seed: int, tasks: int) -> None:
    past, g = conflicting(seed, tasks)
    once = projected(past, g)
    again = once + multipliers(past @ past.T, past @ once, 0.0, EXACT) @ past
    np.testing.assert_allclose(again, once, atol=1e-5)


@given(seed=st.integers(0, 10_000), tasks=st.integers(1, 4), margin=st.sampled_from([0.0, 0.05, 0.5]))
def test_the_multipliers_are_the_least_of_all_corners(seed: int, tasks: int, margin: float) -> None:
    """Of a convex problem with bounds: each set of multipliers at their bound, the others where the slope is 0."""
    past, g = conflicting(seed, tasks)
    gram, along, ridge = past @ past.T, past @ g, 1e-3
    q = gram + ridge * np.trace(gram) / tasks * np.eye(tasks)

    def value(v: np.ndarray) -> float:
        return float(v @ q @ v / 2 + along @ v)

    best = np.inf
    for bound in itertools.product([True, False], repeat=tasks):
        free = [k for k in range(tasks) if not bound[k]]
        v = np.full(tasks, margin)
        if free:
            fixed = [k for k in range(tasks) if bound[k]]
            v[free] = np.linalg.solve(q[np.ix_(free, free)], -along[free] - q[np.ix_(free, fixed)] @ v[fixed])
        if (v >= margin - 1e-12).all():
            best = min(best, value(v))
    found = multipliers(gram, along, margin, ridge)
    assert (found >= margin).all()
    assert value(found) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_a_single_memory_gives_the_closed_form_and_never_doubles_the_conflict() -> None:
    past, g = conflicting(3, 1)
    g = g if past[0] @ g < 0 else -g
    closed = g - (past[0] @ g) / (past[0] @ past[0]) * past[0]
    found = projected(past, g)
    np.testing.assert_allclose(found, closed, atol=1e-6)
    assert abs(past[0] @ found) < 1e-6 < abs(past[0] @ g)


@given(seed=st.integers(0, 1000), factor=st.sampled_from([1e-4, 1e-2, 10.0]))
def test_the_edit_scales_with_the_gradients(seed: int, factor: float) -> None:
    """A ridge of a fixed size would undo the projection where gradients have become small."""
    past, g = conflicting(seed, 3)
    whole = projected(past, g, 0.05, 1e-3)
    np.testing.assert_allclose(projected(factor * past, factor * g, 0.05, 1e-3), factor * whole, rtol=1e-6)


def test_both_methods_edit_one_vector_of_all_that_is_trained(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each tensor alone there would be no conflict, or another one."""
    both = [third_task(backbone, "gem", margin=0, ridge=EXACT), third_task(backbone, "agem")]
    for made in both:
        size = len(made.learner.theta)
        g, past = torch.ones(size), torch.zeros(size)
        past[: size // 4], past[size // 4 : size // 2] = 1.0, -2.0
        told(monkeypatch, [past, past])
        expected = g - (g @ past) / (past @ past) * past
        torch.testing.assert_close(edited(made, g), expected, rtol=1e-4, atol=1e-5)
        assert made.report() == {"steps_edited": 1}


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_without_a_conflict_the_gradient_stays_to_the_bit(
    backbone: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = third_task(backbone, name)
    g = torch.randn(len(made.learner.theta), generator=torch.Generator().manual_seed(0))
    told(monkeypatch, [g, 2 * g])
    assert torch.equal(edited(made, g), g)
    assert made.report() == {"steps_edited": 0}


def test_gem_asks_for_each_task_and_agem_for_all_together(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Ref]] = []

    def note(learner: Learner, refs: Sequence[Ref]) -> Tensor:
        asked.append(list(refs))
        return mean_gradient(learner, refs)

    monkeypatch.setattr(gem, "mean_gradient", note)
    monkeypatch.setattr(agem, "mean_gradient", note)
    made = third_task(backbone, "gem")
    asked.clear()
    made.edit_gradients(0, 0.0)
    assert asked == [made.memory[0], made.memory[1]]
    made = third_task(backbone, "agem", memory_batch=6)
    asked.clear()
    for step in range(4):
        made.edit_gradients(step, 0.0)
    known = set(made.memory[0] + made.memory[1])
    assert [len(set(refs)) for refs in asked] == [6] * 4
    assert all(set(refs) <= known for refs in asked)
    assert len({tuple(sorted(refs)) for refs in asked}) > 1, "each step draws anew"
    assert any(len({task for task, _ in refs}) == 2 for refs in asked)
    assert isinstance(made, Agem)
    assert made.drawn(2) == asked[2], "from the step alone"


def test_memory_gradients_are_those_of_the_weights_now(backbone: Path) -> None:
    made = third_task(backbone, "gem")
    learner, (first, second) = made.learner, made.memory.values()
    before = mean_gradient(learner, first)
    edited(made, -before)
    learner.adapter.add_(0.1)
    after, other = mean_gradient(learner, first), mean_gradient(learner, second)
    assert not torch.allclose(before, after)
    g = -after
    past = torch.stack([after, other]).double().numpy()
    expected = projected(past, g.double().numpy(), 0.05, 1e-3)
    assert isinstance(made, Gem)
    torch.testing.assert_close(edited(made, g), torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_the_memory_is_drawn_from_all_rows_of_a_task(backbone: Path, name: str) -> None:
    made = third_task(backbone, name)
    assert [len(rows) for rows in made.memory.values()] == [5, 5]
    assert {task for rows in made.memory.values() for task, _ in rows} == {0, 1}
    for task, rows in made.memory.items():
        first = BatchPlan(22, 8, 1, made.learner.config.seed, f"t{task}").at(0).tolist()  # what one port stores
        assert {row for _, row in rows} - set(first)
    assert [row for _, row in made.memory[0]] != [row for _, row in made.memory[1]]
    everything = ready(backbone, name, memory=1000)
    toys.learn(everything, 0)
    assert everything.memory[0] == [(0, row) for row in range(22)]


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_old_rows_of_the_head_are_part_of_what_is_edited(backbone: Path, name: str) -> None:
    made = third_task(backbone, name)
    assert made.learner.rows == list(range(6))
    gradient = mean_gradient(made.learner, made.memory[0])
    width, head = made.learner.model.width, gradient[made.learner.layout.total :]
    weights = head[: 6 * width].view(6, width)
    assert (weights[:2].norm(dim=1) > 0).all()
    assert torch.count_nonzero(weights[2:]) == 0, "with ce_scope current a row's own classes compete"


def test_the_margin_is_that_of_the_objective_unless_it_is_given(backbone: Path, llama: Path) -> None:
    for folder, kind, options, expected in (
        (backbone, "image", {}, 0.05),
        (llama, "prompt", {}, 0.5),
        (llama, "prompt", {"margin": 0.0}, 0.0),
    ):
        made = ready(folder, "gem", kind=kind, **options)
        assert isinstance(made, Gem)
        assert made.margin == expected


def test_a_margin_pushes_along_every_remembered_gradient_of_an_edited_step() -> None:
    past, g = np.eye(3), np.array([-1.0, 2.0, 3.0])
    np.testing.assert_allclose(multipliers(past @ past.T, past @ g, 0.5, EXACT), [1.0, 0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(projected(past, g, 0.5), [0.0, 2.5, 3.5], atol=1e-6)
