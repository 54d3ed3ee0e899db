"""The parts of HiDe against their formulas, and against the mistakes that are made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treelora_ray.methods.hide import Summaries, averaged, contrast, fit, kmeans, summarised
from treelora_ray.methods.options import FitOptions

KINDS = pytest.mark.parametrize("kind", ["centroids", "covariance"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(seed: int = 0) -> Tensor:
    """[60, 4] three groups of different sizes, each stretched in a direction of its own."""
    mixing, centres = noise(3, 4, 4, seed=seed), 8 * noise(3, 4, seed=seed + 1)
    parts = [noise(size, 4, seed=size) @ mixing[n] + centres[n] for n, size in enumerate((10, 20, 30))]
    return torch.cat(parts)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    away = rows.double() - rows.double().mean(0)
    return rows.double().mean(0), away.T @ away / len(rows)


@KINDS
def test_pseudo_features_have_the_moments_of_the_class(kind: str) -> None:
    rows, found = blobs(), Summaries(4)
    found.add(0, 0, summarised(rows[:1], kind, 3, "other"))
    found.add(0, 1, summarised(rows, kind, 3, "own"))
    features, entries = found.draw(20_000, "draw")
    mean, covariance = moments(features[entries == 1])
    expected, spread = moments(rows)
    if kind == "centroids":  # what lies within a group keeps its variances alone
        groups = kmeans(rows.double(), 3, "own")
        spread = torch.zeros(4, 4, dtype=torch.float64)
        for own in (rows[groups == group] for group in range(3)):
            away = own.double().mean(0) - expected
            spread += (moments(own)[1].diag().diag() + torch.outer(away, away)) * len(own) / len(rows)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.1)
    torch.testing.assert_close(covariance, spread, rtol=0.05, atol=0.5)
    assert torch.equal(features[entries == 0], rows[:1].expand(20_000, 4)), "of one row nothing varies"


@KINDS
def test_what_is_drawn_is_a_function_of_the_key(kind: str) -> None:
    found = Summaries(4)
    for entry in range(2):
        found.add(0, entry, summarised(blobs(entry), kind, 3, "own"))
    features, entries = found.draw(50, "one")
    torch.manual_seed(123)
    assert torch.equal(found.draw(50, "one")[0], features)
    assert not torch.equal(found.draw(50, "other")[0], features)
    assert entries.bincount().tolist() == [50, 50]
    assert entries[:50].bincount().min() > 5, "classes are mixed"


def test_components_are_drawn_by_their_rows() -> None:
    found = Summaries(1)
    found.add(0, 0, [(30, torch.tensor([0.0]), torch.zeros(1)), (10, torch.tensor([1.0]), torch.zeros(1))])
    for key in ("a", "b", "c"):
        features, _ = found.draw(40, key)
        assert int(features.sum()) == 10
    assert found.centres().tolist() == [[0.25]]


def test_groups_are_a_function_of_points_and_key() -> None:
    points = noise(200, 3).double()
    groups = kmeans(points, 10, "key")
    torch.manual_seed(5)
    torch.randn(7)
    assert torch.equal(kmeans(points, 10, "key"), groups)
    assert not torch.equal(kmeans(points, 10, "another"), groups)
    means = torch.stack([points[groups == group].mean(0) for group in range(10)])
    assert torch.equal(torch.cdist(points, means).argmin(1), groups), "each point is with the nearest mean"


def test_there_are_no_more_groups_than_different_points() -> None:
    points = noise(3, 4).double().repeat(5, 1)
    groups = kmeans(points, 10, "key")
    assert len(groups.unique()) == 3
    assert torch.equal(groups[:3].repeat(5), groups)
    assert kmeans(points[:1].repeat(4, 1), 10, "key").tolist() == [0] * 4
    rows = [count for count, *_ in summarised(points, "centroids", 10, "key")]
    assert rows == [5, 5, 5]


def test_a_head_is_fit_as_sgd_with_a_cosine_over_all_that_is_drawn() -> None:
    """Codes that take as many batches as there are old classes leave most of a larger sample out."""
    options = FitOptions(name="any", samples=8, fit_epochs=4, fit_lr=0.05)
    weight, bias, drawn = (
        noise(3, 5),
        noise(3, seed=1),
        [(noise(24, 5, seed=s), torch.arange(24) % 3) for s in range(4)],
    )
    found = fit(weight, bias, lambda epoch: drawn[epoch], options)
    head = torch.nn.Linear(5, 3)
    head.weight.data, head.bias.data = weight.clone(), bias.clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for features, targets in drawn:
        for part, right in zip(features.split(8), targets.split(8), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(part), right).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(found, torch.cat([head.weight, head.bias.unsqueeze(1)], 1).detach())
    assert not torch.allclose(found[:, :-1], weight)


def test_the_mean_of_earlier_tasks_takes_its_share() -> None:
    own, earlier = torch.tensor([1.0, 0.0]), [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0])]
    torch.testing.assert_close(averaged(own, earlier, 0.25), torch.tensor([0.75, 0.5]))
    assert averaged(own, [], 0.25) is own
    assert averaged(own, earlier, 0.0) is own


def test_the_contrast_is_the_cross_entropy_of_each_row_with_itself() -> None:
    stored, features = noise(3, 4), noise(2, 4, seed=1).requires_grad_()
    rows = [*stored, *features]
    by_hand = torch.zeros(())
    for row in rows:
        products = torch.stack([row @ other / 0.8 for other in rows])
        by_hand = by_hand + products.logsumexp(0) - row @ row / 0.8
    found = contrast(stored, features, 0.8)
    torch.testing.assert_close(found, by_hand / 5)
    torch.testing.assert_close(
        torch.autograd.grad(found, features), torch.autograd.grad(by_hand / 5, features), rtol=1e-4, atol=1e-6
    )


def test_the_contrast_leads_away_from_stored_means() -> None:
    stored = torch.tensor([[1.0, 0.0]])
    features = torch.tensor([[0.6, 0.8]], requires_grad=True)
    (slope,) = torch.autograd.grad(contrast(stored, features, 0.8), features)
    assert (features - 0.01 * slope)[0] @ stored[0] < features[0] @ stored[0]
