"""NCM against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny, toys
from treelora_ray.config import ConfigError
from treelora_ray.data.rows import MemoryRows
from treelora_ray.methods.ncm import Ncm
from treelora_ray.models.router import ClassSums
from treelora_ray.training.evaluate import Evaluator

SCORES = pytest.mark.parametrize("score", ["cosine", "euclid", "mahalanobis"])


def ncm(backbone: Path, **options: Any) -> Ncm:
    sections = options.pop("sections", {})
    made = toys.ready(backbone, {"name": "ncm", **options}, **sections)
    assert isinstance(made, Ncm)
    return made


def told(made: Ncm, features: Tensor, classes: Tensor) -> Ncm:
    """As if it had seen these features [n, d] of these classes [n]."""
    sums = ClassSums(int(classes.max()) + 1, features.shape[1])
    sums.add(features, classes)
    made.counts, made.sums, made.products = sums.counts.clone(), sums.sums.clone(), sums.products.clone()
    return made


def nearest(made: Ncm, features: Tensor) -> list[int]:
    weight, bias = made.scores()
    found: list[int] = (features.double() @ weight.T + bias).argmax(1).tolist()
    return found


def cloud(seed: int, per_class: int = 30, classes: int = 4, width: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(classes, width, generator=draw, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=draw, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), width, generator=draw, dtype=torch.float64) @ mixing
    return means[labels] + noise / 3, labels


def test_scores_find_the_class_that_their_distance_says(backbone: Path) -> None:
    features, labels = cloud(0)
    queries, _ = cloud(1)
    means = torch.stack([features[labels == each].mean(0) for each in range(4)])
    away = features - means[labels]
    inverse = torch.linalg.inv(away.T @ away / (len(features) - 4))
    gaps = queries[:, None] - means[None]
    by_hand = {
        "cosine": torch.nn.functional.cosine_similarity(queries[:, None], means[None], dim=-1).argmax(1),
        "euclid": gaps.norm(dim=-1).argmin(1),
        "mahalanobis": torch.einsum("qcd,de,qce->qc", gaps, inverse, gaps).argmin(1),
    }
    assert len({tuple(found.tolist()) for found in by_hand.values()}) == 3
    for score, expected in by_hand.items():
        assert nearest(told(ncm(backbone, score=score, shrinkage=0.0), features, labels), queries) == expected.tolist()


@SCORES
def test_one_row_a_class_is_classified_as_itself(backbone: Path, score: str) -> None:
    features = torch.nn.functional.normalize(cloud(2, per_class=1, classes=6)[0], dim=1)
    assert nearest(told(ncm(backbone, score=score), features, torch.arange(6)), features) == list(range(6))


def test_with_the_identity_as_covariance_mahalanobis_is_euclid(backbone: Path) -> None:
    features, labels = cloud(3)
    queries, _ = cloud(4)
    plain = told(ncm(backbone, score="euclid"), features, labels)
    shrunk = told(ncm(backbone, score="mahalanobis", shrinkage=1.0), features, labels)
    assert nearest(shrunk, queries) == nearest(plain, queries)
    unlike = told(ncm(backbone, score="mahalanobis"), features, labels)
    assert nearest(unlike, queries) != nearest(plain, queries)


def test_mahalanobis_does_not_depend_on_a_linear_map_nor_cosine_on_a_scale(backbone: Path) -> None:
    features, labels = cloud(5)
    queries, _ = cloud(6)
    mapped = torch.randn(16, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for options, change in (
        ({"score": "mahalanobis", "shrinkage": 0.0}, mapped),
        ({"score": "cosine"}, 7.5 * torch.eye(16)),
    ):
        here = told(ncm(backbone, **options), features, labels)
        there = told(ncm(backbone, **options), features @ change.double(), labels)
        assert nearest(there, queries @ change.double()) == nearest(here, queries)


def test_of_two_gaussians_the_boundary_is_that_of_linear_discriminant_analysis(backbone: Path) -> None:
    draw = torch.Generator().manual_seed(8)
    mixing = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    means = torch.randn(2, 16, generator=draw, dtype=torch.float64)
    labels = torch.arange(2).repeat_interleave(20_000)
    features = means[labels] + torch.randn(len(labels), 16, generator=draw, dtype=torch.float64) @ mixing
    weight, _ = told(ncm(backbone, score="mahalanobis"), features, labels).scores()
    exact = torch.linalg.solve(mixing.T @ mixing, means[0] - means[1])
    cosine = torch.nn.functional.cosine_similarity(weight[0] - weight[1], exact, dim=0)
    assert float(cosine) > 0.98


def test_a_class_of_several_tasks_is_the_mean_of_all_its_rows(backbone: Path) -> None:
    """Not of the tasks' means, nor of the old mean and the new one."""
    made = ncm(backbone, sections={"objective": {"label_match": "string"}})
    made.learner.tasks = toys.stream(2, rows=22).tasks
    uneven = made.learner.tasks[1].train.take(range(7))
    object.__setattr__(made.learner.tasks[1], "train", MemoryRows(uneven))
    toys.learn(made, 0, 1)
    features, labels = [], []
    for task in made.learner.tasks:
        columns = task.train.take(range(len(task.train)))
        with torch.no_grad():
            features.append(made.learner.frozen_features(columns).double())
        labels += columns["label"]
    rows, chosen = torch.cat(features), np.array(labels)
    assert made.counts.tolist() == [(chosen == "c0").sum(), (chosen == "c1").sum()]
    for number, label in enumerate(("c0", "c1")):
        torch.testing.assert_close(
            made.means[number], rows[torch.from_numpy(chosen == label)].mean(0), rtol=1e-6, atol=1e-8
        )


def test_any_order_of_tasks_gives_the_same_means_and_answers(backbone: Path) -> None:
    one, other = ncm(backbone, score="mahalanobis"), ncm(backbone, score="mahalanobis")
    other.learner.tasks = tuple(reversed(one.learner.tasks))
    toys.learn(one, 0, 1, 2)
    toys.learn(other, 0, 1, 2)
    order = [4, 5, 2, 3, 0, 1]
    torch.testing.assert_close(one.means, other.means[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.products, other.products, rtol=1e-12, atol=1e-12)
    said: list[list[int]] = [[], []]
    for task in range(3):
        rows = toys.images(task, 20, 9)
        for number, made in enumerate((one, other)):
            found = Evaluator(made).answer(rows, np.full(20, 2)).row
            assert found is not None
            said[number] += found.tolist()
    assert said[0] == [order[row] for row in said[1]]
    assert len(set(said[0])) > 2, "classes of all tasks compete"


def test_classes_of_all_tasks_compete_unless_the_task_is_given(backbone: Path) -> None:
    made = ncm(backbone)
    assert made.learner.config.objective.routing == "inferred"
    assert Evaluator(made).routing == "last"
    assert Evaluator(made, "oracle").routing == "oracle"


@pytest.mark.parametrize(("features", "trained"), [("frozen", 0), ("first_task", 6)])
def test_nothing_is_trained_but_the_first_task_where_it_is_asked_for(
    backbone: Path, features: str, trained: int
) -> None:
    made = ncm(backbone, features=features)
    assert len(toys.learn(made, 0)) == trained
    adapter = made.learner.adapter.clone()
    assert torch.equal(adapter, made.learner.anchor) == (trained == 0)
    assert toys.learn(made, 1, 2) == []
    assert torch.equal(made.learner.adapter, adapter)
    if trained:
        columns = made.learner.tasks[2].train.take(range(22))
        with torch.no_grad():
            adapted = made.learner.features(columns).double()
        here = torch.from_numpy(np.array(columns["label"]) == "c0")
        torch.testing.assert_close(made.means[4], adapted[here].mean(0), rtol=1e-5, atol=1e-6)


def test_a_class_without_rows_is_never_the_nearest(backbone: Path) -> None:
    """A zero vector would take part in the distance."""
    features, labels = cloud(10, classes=3)
    labels = labels + (labels > 0).long()
    for score in ("cosine", "euclid", "mahalanobis"):
        made = told(ncm(backbone, score=score), features, labels)
        assert 1 not in nearest(made, torch.cat([features, torch.zeros(1, 16).double()]))


def test_features_of_another_model_are_refused(backbone: Path, tmp_path: Path) -> None:
    made = ncm(backbone)
    toys.learn(made, 0)
    tensors, data = made.tensors(), made.to_json()
    again = ncm(backbone)
    again.load(tensors, data)
    assert torch.equal(again.means, made.means)
    wider = tiny.vit(tmp_path / "other", initializer_range=0.5)
    with pytest.raises(ConfigError, match="features of other weights than model"):
        ncm(wider).load(tensors, data)
