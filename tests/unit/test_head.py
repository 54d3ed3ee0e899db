import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.models.head import Head
from treelora_ray.models.router import ClassSums

MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])


def around(means: Tensor, away: float = 1.0, copies: int = 10) -> ClassSums:
    """Rows of classes with these means, whose variance is the same along all directions."""
    sums = ClassSums(*means.shape)
    steps = away * torch.cat([torch.eye(means.shape[1]), -torch.eye(means.shape[1])]).repeat(copies, 1)
    for number, mean in enumerate(means):
        sums.add(mean + steps, torch.full((len(steps),), number))
    return sums


def scores(head: Head, points: Tensor) -> Tensor:
    return points @ head.weight.T + head.bias


def test_a_new_head_answers_with_the_nearest_class_mean() -> None:
    head = Head(2)
    head.grow(["a", "b", "c"], around(MEANS))
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(scores(head, points).argmax(1), torch.cdist(points, MEANS).argmin(1))


def test_it_is_as_sure_as_the_rows_are_far_apart() -> None:
    """Of Gaussians of one width it knows how likely each class is: no other scale has a smaller loss."""
    head, generator = Head(2), torch.Generator().manual_seed(0)
    targets = torch.randint(3, (20_000,), generator=generator)
    points = MEANS[targets] + 1.5 * torch.randn(20_000, 2, generator=generator)
    sums = ClassSums(3, 2)
    sums.add(points, targets)
    head.grow(["a", "b", "c"], sums)
    losses = [F.cross_entropy(scores(head, points) * factor, targets).item() for factor in (0.8, 0.9, 1.0, 1.1, 1.25)]
    assert min(losses) == losses[2]


def test_what_it_says_does_not_depend_on_the_scale_of_the_features() -> None:
    small, large = Head(2), Head(2)
    small.grow(["a", "b", "c"], around(MEANS))
    large.grow(["a", "b", "c"], around(MEANS * 1000, 1000.0))
    torch.testing.assert_close(scores(small, MEANS), scores(large, MEANS * 1000))


def test_of_classes_that_do_not_vary_it_is_not_surer_than_numbers_can_hold() -> None:
    head = Head(2)
    head.grow(["a", "b", "c"], around(MEANS, 0.0))
    assert float(scores(head, MEANS).abs().max()) < 1000


def test_equal_means_give_a_head_that_prefers_nothing() -> None:
    head = Head(2)
    head.grow(["a", "b"], around(torch.ones(2, 2)))
    assert not head.weight.any()
    assert head.bias[0] == head.bias[1]


def test_a_class_without_rows_says_nothing_of_the_others() -> None:
    with_it, without = Head(2), Head(2)
    sums = ClassSums(3, 2)
    few = around(MEANS[:2] + 5)
    for part in ("counts", "sums"):
        getattr(sums, part)[:2] = getattr(few, part)
    sums.products.copy_(few.products)
    with_it.grow(["a", "b", "none"], sums)
    without.grow(["a", "b"], few)
    torch.testing.assert_close(with_it.weight[:2], without.weight)


def test_growing_leaves_the_rows_that_are_there_and_numbers_the_new_ones_on() -> None:
    head = Head(2)
    head.grow(["a", "b"], around(MEANS[:2]))
    before = head.weight.clone()
    head.grow(["a", "c"], around(MEANS[1:]))
    assert head.rows == [[0, 1], [2, 3]]
    assert head.names == ["a", "b", "a", "c"]
    assert torch.equal(head.weight[:2], before)
    assert head.of_tasks([1]) == [2, 3]
    assert head.of_tasks([0, 1]) == [0, 1, 2, 3]


def test_labels_that_match_share_a_row_which_keeps_its_weights() -> None:
    head = Head(2, share_labels=True)
    head.grow(["a", "b"], around(MEANS[:2]))
    before = head.weight.clone()
    head.grow(["b", "c"], around(MEANS[1:]))
    assert head.rows == [[0, 1], [1, 2]]
    assert torch.equal(head.weight[:2], before)


def test_taken_rows_come_back_to_their_places_and_no_other_row_moves() -> None:
    head = Head(2)
    head.grow(["a", "b", "c"], around(MEANS))
    before, flat = head.weight.clone(), head.take([2, 0])
    assert flat.tolist()[:4] == [*before[2].tolist(), *before[0].tolist()]
    head.put([2, 0], flat + 1)
    torch.testing.assert_close(head.weight[[2, 0]], before[[2, 0]] + 1)
    assert torch.equal(head.weight[1], before[1])


@pytest.mark.parametrize("task", [0, 1])
def test_rows_of_labels_are_those_of_their_own_task(task: int) -> None:
    head = Head(2)
    head.grow(["a", "b"], around(MEANS[:2]))
    head.grow(["b", "a"], around(MEANS[:2]))
    known = [["a", "b"], ["b", "a"]][task]
    assert head.row(task, ["a", "b", "a"], known) == [[0, 1, 0], [3, 2, 3]][task]


def far_apart() -> tuple[Tensor, Tensor]:
    """Means of two tasks far from each other, those of the second nearer together: of their own origins no
    comparison between tasks comes out."""
    return MEANS, torch.tensor([[20.0, 21.0], [20.0, 20.5]])


def test_classes_of_tasks_that_are_weighed_start_as_one_classifier_of_the_nearest_mean() -> None:
    head = Head(2)
    head.common = True
    for task, means in enumerate(far_apart()):
        head.grow([f"{task}/{row}" for row in range(len(means))], around(means))
    means = torch.cat(far_apart())
    near = means.repeat_interleave(50, 0)
    points = near + 0.4 * torch.randn(near.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal((points @ head.weight.T + head.bias).argmax(1), torch.cdist(points, means).argmin(1))


def test_they_start_again_from_other_features_with_the_origin_they_had() -> None:
    head = Head(2)
    head.common = True
    for task, means in enumerate(far_apart()):
        head.grow([f"{task}/{row}" for row in range(len(means))], around(means))
    before = head.weight.clone()
    head.restart(0, around(far_apart()[0] + 1, 5.0))
    head.restart(1, around(far_apart()[1] + 1, 0.1))
    assert head.origin is not None
    torch.testing.assert_close(head.weight, before + float(head.origin[-1]))


def test_a_head_read_back_has_the_origin_of_its_first_task() -> None:
    head, read = Head(2), Head(2)
    head.common = read.common = True
    first, second = far_apart()
    head.grow(["a", "b", "c"], around(first))
    read.load(head.tensors(), head.names, head.rows)
    for each in (head, read):
        each.grow(["d", "e"], around(second, 0.1))
    assert torch.equal(head.weight, read.weight)
    assert torch.equal(head.bias, read.bias)


def test_where_tasks_are_not_weighed_a_task_starts_at_a_scale_of_its_own() -> None:
    apart, alone = Head(2), Head(2)
    first, second = far_apart()
    apart.grow(["a", "b", "c"], around(first))
    apart.grow(["d", "e"], around(second, 0.1))
    alone.grow(["d", "e"], around(second, 0.1))
    assert torch.equal(apart.weight[3:], alone.weight)


def test_a_class_that_is_rare_is_answered_as_rarely_where_nothing_tells_it_from_others() -> None:
    head, sums = Head(2), ClassSums(2, 2)
    sums.add(torch.randn(999, 2), torch.zeros(999, dtype=torch.long))
    sums.add(sums.means[:1].repeat(1, 1), torch.ones(1, dtype=torch.long))
    head.grow(["often", "seldom"], sums)
    torch.testing.assert_close(scores(head, torch.randn(5, 2)).softmax(1)[:, 1], torch.full((5,), 2 / 1002))
