import pytest
import torch
from torch import Tensor

from treelora_ray.models.head import Head

MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])


def test_a_new_head_answers_with_the_nearest_class_mean() -> None:
    head = Head(2)
    head.grow(["a", "b", "c"], MEANS)
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 3
    nearest = torch.cdist(points, MEANS).argmin(1)
    logits = points @ head.weight.T + head.bias
    assert torch.equal(logits.argmax(1), nearest)


def test_the_scale_of_new_rows_does_not_depend_on_the_scale_of_the_features() -> None:
    small, large = Head(2), Head(2)
    small.grow(["a", "b", "c"], MEANS)
    large.grow(["a", "b", "c"], MEANS * 1000)
    torch.testing.assert_close(MEANS @ small.weight.T + small.bias, MEANS * 1000 @ large.weight.T + large.bias)


def test_equal_means_give_a_head_that_prefers_nothing() -> None:
    head = Head(2)
    head.grow(["a", "b"], torch.ones(2, 2))
    assert not head.weight.any()
    assert not head.bias.any()


def test_growing_leaves_the_rows_that_are_there_and_numbers_the_new_ones_on() -> None:
    head = Head(2)
    head.grow(["a", "b"], MEANS[:2])
    before = head.weight.clone()
    head.grow(["a", "c"], MEANS[1:])
    assert head.rows == [[0, 1], [2, 3]]
    assert head.names == ["a", "b", "a", "c"]
    assert torch.equal(head.weight[:2], before)
    assert head.of_tasks([1]) == [2, 3]
    assert head.of_tasks([0, 1]) == [0, 1, 2, 3]


def test_labels_that_match_share_a_row_which_keeps_its_weights() -> None:
    head = Head(2, share_labels=True)
    head.grow(["a", "b"], MEANS[:2])
    before = head.weight.clone()
    head.grow(["b", "c"], MEANS[1:])
    assert head.rows == [[0, 1], [1, 2]]
    assert torch.equal(head.weight[:2], before)


def test_taken_rows_come_back_to_their_places_and_no_other_row_moves() -> None:
    head = Head(2)
    head.grow(["a", "b", "c"], MEANS)
    before, flat = head.weight.clone(), head.take([2, 0])
    assert flat.tolist()[:4] == [*before[2].tolist(), *before[0].tolist()]
    head.put([2, 0], flat + 1)
    torch.testing.assert_close(head.weight[[2, 0]], before[[2, 0]] + 1)
    assert torch.equal(head.weight[1], before[1])


@pytest.mark.parametrize("task", [0, 1])
def test_rows_of_labels_are_those_of_their_own_task(task: int) -> None:
    head = Head(2)
    head.grow(["a", "b"], MEANS[:2])
    head.grow(["b", "a"], MEANS[:2])
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
        head.grow([f"{task}/{row}" for row in range(len(means))], means)
    means = torch.cat(far_apart())
    near = means.repeat_interleave(50, 0)
    points = near + 0.4 * torch.randn(near.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal((points @ head.weight.T + head.bias).argmax(1), torch.cdist(points, means).argmin(1))


def test_they_start_so_again_from_other_features_of_which_the_first_task_gives_the_origin() -> None:
    head, again = Head(2), Head(2)
    head.common = again.common = True
    for task, means in enumerate(far_apart()):
        head.grow([f"{task}/{row}" for row in range(len(means))], torch.rand(means.shape))
        head.restart(task, means)
        again.grow([f"{task}/{row}" for row in range(len(means))], means)
    assert torch.equal(head.weight, again.weight)
    assert torch.equal(head.bias, again.bias)


def test_a_head_read_back_has_the_origin_of_its_first_task() -> None:
    head, read = Head(2), Head(2)
    head.common = read.common = True
    first, second = far_apart()
    head.grow(["a", "b", "c"], first)
    read.load(head.tensors(), head.names, head.rows)
    for each in (head, read):
        each.grow(["d", "e"], second)
    assert torch.equal(head.weight, read.weight)
    assert torch.equal(head.bias, read.bias)


def test_where_tasks_are_not_weighed_a_task_starts_at_a_scale_of_its_own() -> None:
    apart, alone = Head(2), Head(2)
    first, second = far_apart()
    apart.grow(["a", "b", "c"], first)
    apart.grow(["d", "e"], second)
    alone.grow(["d", "e"], second)
    assert torch.equal(apart.weight[3:], alone.weight)


def test_a_first_task_whose_classes_lie_together_does_not_set_the_scale_of_all() -> None:
    close = torch.tensor([[0.0, 0.0], [1e-3, 0.0]])
    head, sure = Head(2), Head(2)
    head.common = sure.common = True
    head.grow(["a", "b"], close, within=4.0)
    sure.grow(["a", "b"], close)
    for each in (head, sure):
        each.grow(["c", "d", "e"], MEANS)
    assert 1 < float((MEANS @ head.weight[2:].T).abs().max()) < 100
    assert float((MEANS @ sure.weight[2:].T).abs().max()) > 1e6
