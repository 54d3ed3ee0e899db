"""TaSL against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toys
from treelora_ray.methods.tasl import Tasl, by_unit, normalised, spread
from treelora_ray.training.loop import begin_task, end_task, train_task

STEPS: dict[str, Any] = {"train": {"steps": 4}}


def tasl(backbone: Path, **options: Any) -> Tasl:
    sections = options.pop("sections", STEPS)
    made = toys.ready(backbone, {"name": "tasl", "warmup": 1, **options}, **sections)
    assert isinstance(made, Tasl)
    return made


@pytest.fixture(scope="module")
def two(backbone: Path) -> dict[str, Tasl]:
    """After two tasks, by unit."""
    found = {unit: tasl(backbone, unit=unit) for unit in ("rank", "matrix")}
    for made in found.values():
        toys.learn(made, 0, 1)
    return found


def end_with(made: Tasl, before: Tensor, after: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The adapter where a task began and ended so, of units that are so important."""
    learner = made.learner
    learner.adapter.copy_(after)
    made.importance = old
    made.moving = {
        "before": before,
        "trend": spread(learner.layout, new, made.by_rank),
        "swing": torch.ones_like(after),
    }
    made.after_task()
    return learner.adapter.clone()


def units(made: Tasl) -> int:
    return len(made.learner.layout) * 2


@pytest.mark.parametrize("unit", ["rank", "matrix"])
@pytest.mark.parametrize("weights", ["thresholds", "softmax"])
def test_an_adapter_that_did_not_change_stays_to_the_bit(backbone: Path, unit: str, weights: str) -> None:
    made = tasl(backbone, unit=unit, weights=weights)
    begin_task(made, (0,))
    same = torch.linspace(-1, 1, made.learner.layout.total)
    old, new = torch.linspace(0, 1, units(made)), torch.linspace(1, 0, units(made)).double() ** 2
    assert torch.equal(end_with(made, same, same, old.double(), new), same)


@pytest.mark.parametrize("unit", ["rank", "matrix"])
@pytest.mark.parametrize("weights", ["thresholds", "softmax"])
def test_weights_are_one_number_a_unit_and_add_up_to_one(backbone: Path, unit: str, weights: str) -> None:
    made = tasl(backbone, unit=unit, weights=weights, quantile=0.5)
    begin_task(made, (0,))
    nothing, ones = torch.zeros(made.learner.layout.total), torch.ones(made.learner.layout.total)
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.rand(units(made), generator=draw, dtype=torch.float64) for _ in range(2))
    of_old, of_new = end_with(made, ones, nothing, old, new), end_with(made, nothing, ones, old, new)
    torch.testing.assert_close(of_old + of_new, ones)
    assert 0 <= float(of_old.min()) < float(of_old.max()) <= 1
    for _, (a, b) in made.learner.layout.views(of_old):
        if unit == "rank":
            assert torch.equal(a, a[:, :1].expand_as(a))
            assert torch.equal(b, a[:, 0].expand_as(b)), "a column of B goes with its row of A"
        else:
            assert len(a.unique()) == len(b.unique()) == 1


def test_the_four_cases_of_thresholds(backbone: Path) -> None:
    made = tasl(backbone, quantile=0.6)
    old = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.1])
    new = torch.tensor([1.0, 0.2, 1.0, 0.3, 0.1])
    assert made.old_shares(old, new).tolist() == [pytest.approx(0.7), 1.0, 0.0, 0.5, 0.5]
    assert made.report() == {"units": {"both": 1, "old": 1, "new": 1, "neither": 2}}
    ten = torch.arange(10.0)
    assert tasl(backbone).old_shares(ten, ten).tolist() == [0.5] * 8 + [pytest.approx(0.7)] * 2, (
        "the upper fifth is important"
    )


def test_soft_weights_are_the_softmax_of_both_importances(backbone: Path) -> None:
    made = tasl(backbone, weights="softmax")
    old, new = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0.0, 0.8, 0.1])
    expected = torch.softmax(torch.stack([old, new]) / 0.25, 0)[0]
    torch.testing.assert_close(made.old_shares(old, new), expected)


def test_importance_is_smoothed_sensitivity_of_the_step_s_gradient_after_the_warm_up(backbone: Path) -> None:
    made = tasl(backbone, warmup=2, sections={"train": {"steps": 6, "clip": 1e-3}})
    learner, real = made.learner, made.edit_gradients
    seen: list[Tensor] = []

    def edit(step: int, loss: float) -> None:
        seen.append(learner.adapter.clone() * learner.adapter_grad)
        real(step, loss)

    made.edit_gradients = edit  # type: ignore[method-assign]
    begin_task(made, (0,))
    train_task(made, 0, lambda *_: None, lambda _: None)
    kept = dict(made.moving)
    end_task(made)
    trend, swing = torch.zeros(learner.layout.total), torch.zeros(learner.layout.total)
    for product in seen[2:]:
        trend = 0.85 * trend + 0.15 * product.abs()
        swing = 0.85 * swing + 0.15 * (product.abs() - trend).abs()
    torch.testing.assert_close(kept["trend"], trend, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(kept["swing"], swing, rtol=1e-4, atol=1e-9)
    parts = [
        (t[rank] * s[rank]).sum() + (u[:, rank] * v[:, rank]).sum()
        for (_, (t, u)), (_, (s, v)) in zip(learner.layout.views(trend), learner.layout.views(swing), strict=True)
        for rank in range(2)
    ]
    assert made.importance is not None
    torch.testing.assert_close(made.importance.float(), normalised(torch.stack(parts)), rtol=1e-3, atol=1e-5)


def test_a_task_of_few_steps_is_measured_over_its_second_half(backbone: Path) -> None:
    made = tasl(backbone, warmup=50)
    toys.learn(made, 0)
    assert made.importance is not None
    assert float(made.importance.max()) == 1


@pytest.mark.parametrize("unit", ["rank", "matrix"])
def test_every_layer_is_measured_and_something_is_consolidated(two: dict[str, Tasl], unit: str) -> None:
    """In the released code of the comparison no tensor has the name that is looked for, and nothing happens."""
    made = two[unit]
    assert made.importance is not None
    assert len(made.importance) == units(made)
    assert torch.count_nonzero(made.importance) >= units(made) - 1
    begin_task(made, (2,))
    start = made.learner.adapter.clone()
    made.learner.adapter.add_(0.1)
    made.moving["trend"], made.moving["swing"] = torch.rand(len(start)), torch.rand(len(start))
    moved = made.learner.adapter.clone()
    end_task(made)
    assert not torch.equal(made.learner.adapter, moved)
    assert not torch.equal(made.learner.adapter, start)


def test_old_importance_fades_and_stays_between_0_and_1(backbone: Path) -> None:
    made = tasl(backbone)
    begin_task(made, (0,))
    some = torch.zeros(made.learner.layout.total)
    old, new = torch.linspace(0, 1, units(made)).double(), torch.linspace(0, 5, units(made)).double().sin().abs()
    end_with(made, some, some, old, new)
    mixed = 0.7 * old + 0.3 * (new - new.min()) / (new.max() - new.min())
    expected = (mixed - mixed.min()) / (mixed.max() - mixed.min())
    assert made.importance is not None
    torch.testing.assert_close(made.importance, expected, rtol=1e-5, atol=1e-6)


def test_units_by_rank_keep_the_products_of_one_side_where_matrices_pair_old_with_new(backbone: Path) -> None:
    found = {}
    for unit in ("rank", "matrix"):
        made = tasl(backbone, unit=unit, keep=1.0, quantile=0.5)
        begin_task(made, (0,))
        draw = torch.Generator().manual_seed(1)
        before, after = (torch.randn(made.learner.layout.total, generator=draw) for _ in range(2))
        turn = torch.tensor([0.0, 1.0]).repeat(units(made) // 2).double()
        mixed = end_with(made, before, after, turn, 1 - turn)
        sides = []
        for (_, (a, b)), (_, (c, d)), (_, (e, f)) in zip(
            *(made.learner.layout.views(each) for each in (mixed, before, after)), strict=True
        ):
            product = b[:, :1] @ a[:1]
            sides.append(any(torch.allclose(product, side, atol=1e-5) for side in (d[:, :1] @ c[:1], f[:, :1] @ e[:1])))
        found[unit] = sides
    assert all(found["rank"])
    assert not any(found["matrix"])


def test_the_first_task_is_plain_training_to_the_bit_and_the_next_starts_from_what_was_consolidated(
    backbone: Path,
) -> None:
    made, plain = tasl(backbone), toys.ready(backbone, {"name": "seqlora"}, **STEPS)
    for one, other in zip(toys.learn(made, 0), toys.learn(plain, 0), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(made.learner.adapter, plain.learner.adapter)
    trained = toys.learn(made, 1)[-1][: made.learner.layout.total]
    consolidated = made.learner.adapter.clone()
    assert not torch.equal(consolidated, trained)
    begin_task(made, (2,))
    assert torch.equal(made.learner.adapter, consolidated)
    assert torch.equal(made.moving["before"], consolidated)


def test_scores_are_means_over_the_places_of_a_unit(backbone: Path) -> None:
    layout = tasl(backbone).learner.layout
    for by_rank in (True, False):
        values = torch.linspace(1, 2, len(layout) * 2).double()
        torch.testing.assert_close(by_unit(layout, spread(layout, values, by_rank), by_rank), values, rtol=1e-6, atol=0)
    assert normalised(torch.ones(3)).tolist() == [0, 0, 0]
