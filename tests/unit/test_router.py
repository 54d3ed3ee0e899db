from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from tests import tiny, toys
from treelora_ray.models.router import ClassSums, Router


def features(seed: int = 0, classes: int = 6, rows: int = 80, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian classes with one crooked covariance."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(classes, width, generator=generator)
    shape = torch.randn(width, width, generator=generator)
    labels = torch.arange(classes).repeat_interleave(rows)
    return means[labels] + torch.randn(len(labels), width, generator=generator) @ shape, labels


def router_of(x: torch.Tensor, labels: torch.Tensor, per_task: int = 2) -> Router:
    router = Router(x.shape[1])
    for task in range(int(labels.max()) // per_task + 1):
        mine = labels // per_task == task
        sums = ClassSums(per_task, x.shape[1])
        sums.add(x[mine], labels[mine] % per_task)
        router.add(task, sums)
    return router


def test_means_and_scatter_of_sums_are_those_of_the_rows() -> None:
    x, labels = features()
    sums = ClassSums(6, 5)
    for part in torch.arange(len(x)).split(7):
        sums.add(x[part], labels[part])
    groups = [x[labels == c].double() for c in range(6)]
    torch.testing.assert_close(sums.means, torch.stack([g.mean(0) for g in groups]))
    scatter = torch.stack([(g - g.mean(0)).T @ (g - g.mean(0)) for g in groups]).sum(0)
    torch.testing.assert_close(sums.scatter(), scatter)


def test_sums_gathered_by_several_workers_add_up_to_those_of_one() -> None:
    x, labels = features()
    whole, parts = ClassSums(6, 5), [ClassSums(6, 5) for _ in range(3)]
    whole.add(x, labels)
    for rank, part in enumerate(parts):
        part.add(x[rank::3], labels[rank::3])
    torch.testing.assert_close(sum((p.flat for p in parts), torch.zeros_like(whole.flat)), whole.flat)


def test_routes_agree_with_linear_discriminant_analysis() -> None:
    x, labels = features(rows=400)
    reference = LinearDiscriminantAnalysis(priors=np.full(6, 1 / 6)).fit(x.double().numpy(), labels.numpy())
    expected = reference.predict(x.double().numpy()) // 2
    assert (router_of(x, labels).route(x).numpy() == expected).mean() > 0.995


def test_the_covariance_is_shrunk_as_oas_does() -> None:
    x, _ = features(classes=1, rows=100, width=200)
    router = router_of(x, torch.zeros(100, dtype=torch.long), per_task=1)
    router.count = 100.0  # scikit-learn divides by the rows, and leaves the terms 2/d of the formula out
    found, expected = router.covariance().numpy(), OAS().fit(x.double().numpy()).covariance_
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    raw = np.cov(x.double().numpy().T, bias=True)
    assert np.abs(raw - expected).max() > 0.1 * np.abs(expected).max()


def test_fewer_rows_than_dimensions_still_route() -> None:
    x, labels = features(rows=2, width=40, classes=4)
    assert (router_of(x, labels).route(x) == labels // 2).float().mean() > 0.9


@pytest.mark.parametrize("rows", [1, 3])
def test_constant_features_have_a_covariance_that_can_be_inverted(rows: int) -> None:
    x = torch.ones(2 * rows, 3)
    router = router_of(x, torch.arange(2).repeat_interleave(rows), per_task=1)
    assert torch.isfinite(router.route(x).double()).all()


def test_a_route_does_not_depend_on_the_other_rows_of_the_batch() -> None:
    x, labels = features()
    router = router_of(x, labels)
    together = router.route(x)
    alone = torch.cat([router.route(row[None]) for row in x])
    assert torch.equal(together, alone)


def test_classes_without_rows_attract_nothing() -> None:
    sums = ClassSums(3, 2)
    sums.add(torch.tensor([[5.0, 5.0], [6.0, 5.0], [-5.0, 5.0], [-6.0, 5.0]]), torch.tensor([0, 0, 2, 2]))
    router = Router(2)
    router.add(0, sums)
    assert len(router.means) == 2


def test_the_mean_likelihood_of_a_tasks_classes_may_decide_in_place_of_the_likeliest_class() -> None:
    """Against the densities of scipy's Gaussians."""
    x, labels = features(rows=40)
    x += 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))  # so that classes overlap
    router = router_of(x, labels, per_task=3)
    gaussians = [multivariate_normal(mean.numpy(), router.covariance().numpy()) for mean in router.means]
    queries = 2 * torch.randn(300, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    densities = np.stack([each.pdf(queries.numpy()) for each in gaussians], 1).reshape(300, 2, 3)
    by_class = router.route(queries).numpy()
    assert (by_class == densities.max(2).argmax(1)).all()
    router.task_score = "lse"
    by_task = router.route(queries).numpy()
    assert (by_task == densities.mean(2).argmax(1)).all()
    assert (by_task != by_class).any()


def test_a_task_does_not_win_by_the_number_of_its_classes() -> None:
    """Five classes in one place are as likely as one there, so between them and another the middle decides."""
    spread = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    router = Router(2, task_score="lse")
    for task, (classes, place) in enumerate([(5, -3.0), (1, 3.0)]):
        sums = ClassSums(classes, 2)
        for number in range(classes):
            sums.add(spread + torch.tensor([place, 0.0]), torch.full((4,), number))
        router.add(task, sums)
    assert router.route(torch.tensor([[-0.1, 0.0], [0.1, 0.0]])).tolist() == [0, 1]


def test_a_run_routes_as_its_config_says(tmp_path: Path) -> None:
    backbone = tiny.vit(tmp_path)
    assert toys.ready(backbone, "seqlora").learner.router.task_score == "class"
    assert toys.ready(backbone, "seqlora", objective={"router": "lse"}).learner.router.task_score == "lse"


def test_of_one_class_a_task_both_rules_are_one() -> None:
    x, labels = features()
    router = router_of(x, labels, per_task=1)
    found = router.route(x)
    router.task_score = "lse"
    assert torch.equal(router.route(x), found)


def test_a_restored_router_routes_alike() -> None:
    x, labels = features()
    router = router_of(x, labels)
    other = Router(5)
    other.load({name: value.clone() for name, value in router.tensors().items()})
    assert torch.equal(router.route(x), other.route(x))
    assert torch.equal(router.covariance(), other.covariance())
