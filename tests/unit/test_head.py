import pytest
import torch

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
