"""O-LoRA against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toys
from treelora_ray.methods.folding import fresh
from treelora_ray.methods.olora import OLora
from treelora_ray.training.loop import begin_task


def olora(backbone: Path, **options: Any) -> OLora:
    sections = options.pop("sections", {})
    made = toys.ready(backbone, {"name": "o-lora", **options}, **sections)
    assert isinstance(made, OLora)
    return made


def third_task(backbone: Path, **options: Any) -> OLora:
    made = olora(backbone, **options)
    toys.learn(made, 0, 1)
    begin_task(made, (2,))
    return made


def factors(made: OLora, adapter: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (a, b) for name, (a, b) in made.learner.layout.views(adapter)}


def pull(made: OLora) -> Tensor:
    made.learner.forget_gradients()
    made.edit_gradients(0, 0.0)
    return made.learner.adapter_grad.clone()


def test_the_penalty_is_zero_where_the_rows_of_a_are_orthogonal_to_all_before(backbone: Path) -> None:
    made = third_task(backbone)
    assert float(made.penalty()) > 0.1
    for name, (a, _) in factors(made, made.learner.adapter).items():
        basis = torch.linalg.qr(made.past()[name].T).Q
        a.sub_(a @ basis @ basis.T)
    assert float(made.penalty()) < 1e-4


@pytest.mark.parametrize(("norm", "value"), [("magnitudes", 2.5), ("squares", 6.25)])
def test_of_rank_one_it_is_the_magnitude_of_the_inner_product_or_its_square(
    backbone: Path, norm: str, value: float
) -> None:
    made = olora(backbone, norm=norm, sections={"model": {"lora": {"rank": 1, "alpha": 1}}})
    toys.learn(made, 0)
    begin_task(made, (1,))
    one = torch.zeros(16)
    one[3], one[5] = 2.0, 1.0
    other = torch.zeros(16)
    other[3], other[5] = -1.0, -0.5
    for adapter, row in ((made.folded[0], one), (made.learner.adapter, other)):
        for a, _ in factors(made, adapter).values():
            a.copy_(row)
    made.known = {}
    layers = len(made.learner.layout)
    assert float(made.penalty()) == pytest.approx(layers * value)


@pytest.mark.parametrize("norm", ["magnitudes", "squares"])
def test_what_is_added_to_the_gradient_is_what_autograd_finds(backbone: Path, norm: str) -> None:
    made = third_task(backbone, norm=norm, **{"lambda": 0.7, "lambda_2": 0.2})
    layout, learner = made.learner.layout, made.learner
    learner.adapter.add_(0.01)
    theta = learner.adapter.clone().requires_grad_()
    total = torch.zeros(())
    for name, (a, b) in layout.views(theta):
        for old in made.folded:
            product = factors(made, old)[name][0] @ a.T
            total = total + 0.7 * (product.abs().sum() if norm == "magnitudes" else product.square().sum())
        total = total + 0.2 * (a.norm() + b.norm())
    (expected,) = torch.autograd.grad(total, theta)
    torch.testing.assert_close(pull(made), expected, rtol=1e-4, atol=1e-6)


def test_every_earlier_task_takes_part(backbone: Path) -> None:
    """In the released code the earlier matrices have no rows, and the penalty is always 0."""
    made = third_task(backbone)
    assert {len(rows) for rows in made.past().values()} == {2 * 2}
    whole = float(made.penalty())
    made.known = {name: rows[:2] for name, rows in made.past().items()}
    first = float(made.penalty())
    made.known = {name: torch.cat([rows, -rows]) for name, rows in made.known.items()}
    assert float(made.penalty()) == pytest.approx(2 * first, rel=1e-5)
    assert whole > first > 0


def test_the_penalty_keeps_new_adapters_off_the_directions_of_earlier_ones(backbone: Path) -> None:
    train = {"train": {"epochs": 6}}
    plain, held = olora(backbone, **{"lambda": 0}, sections=train), olora(backbone, **{"lambda": 5}, sections=train)
    found = []
    for made in (plain, held):
        toys.learn(made, 0)
        begin_task(made, (1,))
        before = float(made.penalty())
        made = olora(backbone, **{"lambda": made.strength}, sections=train)
        toys.learn(made, 0, 1)
        last = made.folded.pop()
        made.known = {}
        made.learner.adapter.copy_(last)
        found.append(float(made.penalty()) / before)
    assert found[1] < 0.7 * found[0]


def test_answers_are_unchanged_at_the_start_of_a_task(backbone: Path) -> None:
    made = olora(backbone)
    toys.learn(made, 0)
    rows = toys.images(1, 8, 3).take(range(8))
    with torch.no_grad():
        after = made.learner.features(rows)
        begin_task(made, (1,))
        started = made.learner.features(rows)
        plain = made.learner.frozen_features(rows)
        with made.plain():
            loaded = made.learner.features(rows)
    torch.testing.assert_close(started, after, rtol=0, atol=1e-5)
    assert not torch.allclose(after, loaded, atol=1e-3)
    torch.testing.assert_close(plain, after, rtol=0, atol=1e-5)


def test_what_answers_is_the_sum_of_all_adapters(backbone: Path) -> None:
    made = olora(backbone)
    model, layout = made.learner.model, made.learner.layout
    loaded = {name: model.linear(name).weight.clone() for name in layout.names}
    toys.learn(made, 0, 1, 2)
    stacked = made.factors(2)
    for name in layout.names:
        deltas = [model.scaling * b @ a for a, b in (factors(made, adapter)[name] for adapter in made.folded)]
        torch.testing.assert_close(model.linear(name).weight.data, loaded[name] + sum(deltas), rtol=0, atol=1e-5)
        a, b = stacked[name]
        torch.testing.assert_close(model.scaling * b @ a, sum(deltas), rtol=0, atol=1e-5)


def test_earlier_adapters_stay_as_they_are(backbone: Path) -> None:
    made = olora(backbone)
    toys.learn(made, 0, 1)
    before = [adapter.clone() for adapter in made.folded]
    toys.learn(made, 2)
    assert all(torch.equal(one, other) for one, other in zip(before, made.folded, strict=False))


def test_each_task_draws_an_adapter_of_its_own_from_the_seed(backbone: Path) -> None:
    made = third_task(backbone)
    learner = made.learner
    assert torch.equal(learner.adapter, fresh(learner))
    assert torch.equal(third_task(backbone).learner.adapter, learner.adapter)
    other = third_task(backbone, sections={"seed": 5}).learner.adapter
    assert not torch.equal(other, learner.adapter)
    for name, (a, b) in factors(made, learner.adapter).items():
        assert torch.count_nonzero(b) == 0
        assert 0.8 / 4 < float(a.abs().max()) <= 1 / 4, "uniform up to 1 / sqrt(d_in)"
        assert not torch.equal(a, factors(made, learner.anchor)[name][0])
