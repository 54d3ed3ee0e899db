"""DER++ and its memory against their formulas, and against the mistakes that are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny, toys
from treelora_ray.config import ConfigError
from treelora_ray.methods import memory, outputs
from treelora_ray.methods.derpp import DerPlusPlus, Said, _likeliest
from treelora_ray.methods.gradients import mean_gradient
from treelora_ray.methods.memory import Buffer
from treelora_ray.training.loop import begin_task


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "image": tiny.vit(tmp_path_factory.mktemp("vit")),
        "prompt": tiny.llama(tmp_path_factory.mktemp("llama")),
    }


KINDS = pytest.mark.parametrize("kind", ["image", "prompt"])


def derpp(folders: dict[str, Path], kind: Any = "image", **options: Any) -> DerPlusPlus:
    sections = options.pop("sections", {})
    made = toys.ready(folders[kind], {"name": "der++", "memory": 12, **options}, kind=kind, **sections)
    assert isinstance(made, DerPlusPlus)
    return made


def second_task(folders: dict[str, Path], kind: str = "image", **options: Any) -> DerPlusPlus:
    made = derpp(folders, kind, **options)
    toys.learn(made, 0)
    begin_task(made, (1,))
    return made


def presented(made: DerPlusPlus, rows: list[tuple[int, int]]) -> None:
    """As a step of these rows does: heard in its forward pass, then offered."""
    learner = made.learner
    learner.drawn = made.rows(0, rows)
    batch = learner.fetch(rows)
    made.loss_terms(batch, learner.objective.loss(batch)[1])
    made.offer(learner.drawn, made.presented)


# -- the memory


def filled(size: int, offers: list[tuple[tuple[int, int], int]], seed: int = 0, balanced: bool = True) -> Buffer:
    found = Buffer(seed, balanced)
    for offer in offers:
        found.offer([offer], size)
    return found


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    size=st.integers(0, 24),
    order=st.randoms(use_true_random=False),
    chunk=st.integers(1, 7),
)
def test_the_memory_is_a_function_of_the_set_of_rows_offered(
    counts: list[int], size: int, order: Any, chunk: int
) -> None:
    """Whatever the order, the epochs and the number offered at a time."""
    rows = [((0, 10 * group + row), group) for group, count in enumerate(counts) for row in range(count)]
    expected = filled(size, rows)
    again = list(rows) * 3
    order.shuffle(again)
    found = Buffer(0, True)
    for at in range(0, len(again), chunk):
        found.offer(again[at : at + chunk], size)
    for at in range(0, len(rows), chunk):  # so that each was offered at least once in chunks of every shape
        found.offer(rows[at : at + chunk], size)
    assert found.rows() == expected.rows()
    assert len(found.rows()) == min(size, len(rows)), "full whenever so many rows were seen"


@given(counts=st.lists(st.integers(10, 14), min_size=1, max_size=5), size=st.integers(1, 24))
def test_groups_that_are_large_enough_differ_by_one_at_most(counts: list[int], size: int) -> None:
    rows = [((0, 20 * group + row), group) for group, count in enumerate(counts) for row in range(count)]
    found = filled(min(size, 10 * len(counts)), rows)
    sizes = [len(found.groups.get(group, [])) for group in range(len(counts))]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the remainder goes to the first groups"


def test_rows_are_kept_with_equal_chances() -> None:
    rows = [((0, row), 0) for row in range(40)]
    kept = torch.zeros(40)
    for seed in range(1500):
        buffer = Buffer(seed, False)
        buffer.offer(rows, 10)
        for _, row in buffer.rows():
            kept[row] += 1
    spread = np.sqrt(0.25 * 0.75 / 1500)
    assert float((kept / 1500 - 0.25).abs().max()) < 4 * spread


def test_a_smaller_memory_keeps_the_largest_keys() -> None:
    rows = [((0, row), 0) for row in range(30)]
    large, small = filled(20, rows, balanced=False), filled(20, rows, balanced=False)
    small.offer([], 7)
    assert small.rows() == large.rows()[:7]
    assert [memory.number(f"0/{ref}") for ref in small.rows()] == sorted(
        (memory.number(f"0/{ref}") for ref, _ in rows), reverse=True
    )[:7]


# -- the terms


def test_with_equal_widths_the_error_is_the_mean_squared_error(folders: dict[str, Path]) -> None:
    made = derpp(folders)
    begin_task(made, (0,))
    refs = [(0, row) for row in range(6)]
    presented(made, refs)
    made.learner.theta.add_(0.1)
    batch = made.learner.fetch(refs)
    said = made.learner.objective.loss(batch)[1]
    then = torch.cat([made.said[ref].values for ref in refs]).float()
    expected = torch.nn.functional.mse_loss(said["logits"], then) * 6
    torch.testing.assert_close(made.error(refs, batch, said), expected)


@KINDS
def test_right_after_storing_the_term_and_its_gradient_are_zero(folders: dict[str, Path], kind: str) -> None:
    made = derpp(folders, kind)
    begin_task(made, (0,))
    refs = [(0, row) for row in range(6)]
    presented(made, refs)
    learner, term = made.learner, made.term(1.0, 0.0)
    near = mean_gradient(learner, refs, term)
    batch = learner.fetch(refs)
    value = float(term(refs, batch).detach())
    learner.theta.add_(0.05)
    away = mean_gradient(learner, refs, term)
    assert value < 1e-3 * float(term(refs, batch).detach())
    assert float(near.norm()) < 1e-2 * float(away.norm()), "half precision is all that is left"


def test_classes_that_came_later_are_left_alone(folders: dict[str, Path]) -> None:
    """Padding what was stored with zeros would tell new logits to be 0 for every old row."""
    made = second_task(folders)
    old = [ref for ref in made.buffer.rows() if ref[0] == 0]
    learner = made.learner
    assert {made.said[ref].values.shape[1] for ref in old} == {2}
    learner.theta.add_(0.1)
    gradient = mean_gradient(learner, old, made.term(1.0, 0.0))
    width, head = learner.model.width, gradient[learner.layout.total :]
    weights, biases = head[: 4 * width].view(4, width), head[4 * width :]
    assert (weights[:2].norm(dim=1) > 0).all()
    assert torch.count_nonzero(weights[2:]) == torch.count_nonzero(biases[2:]) == 0
    learner.theta[learner.layout.total :][2 * width : 4 * width] += 3.0  # new classes may become as large as they like
    torch.testing.assert_close(
        mean_gradient(learner, old, made.term(1.0, 0.0))[: learner.layout.total], gradient[: learner.layout.total]
    )


def test_the_error_of_a_row_is_a_mean_over_the_classes_it_was_stored_with(folders: dict[str, Path]) -> None:
    made = derpp(folders, sections={"objective": {"ce_scope": "seen"}})
    toys.learn(made, 0)
    begin_task(made, (1,))
    presented(made, [(1, row) for row in range(6)])
    refs = [made.buffer.rows()[0], next(ref for ref in made.buffer.rows() if ref[0] == 1)]
    made.learner.theta.add_(0.1)
    batch = made.learner.fetch(refs)
    said = made.learner.objective.loss(batch)[1]
    each = [
        (said["logits"][n, : t.values.shape[1]] - t.values[0].float()).square().mean()
        for n, t in enumerate(made.said[r] for r in refs)
    ]
    assert [made.said[ref].values.shape[1] for ref in refs] == [2, 4]
    torch.testing.assert_close(made.error(refs, batch, said), torch.stack(each).sum())


def test_with_all_tokens_kept_the_error_is_that_of_all_log_probabilities(folders: dict[str, Path]) -> None:
    made = derpp(folders, "prompt", top_k=1000)
    begin_task(made, (0,))
    refs = [(0, row) for row in range(4)]
    batch = made.learner.fetch(refs)
    before = torch.log_softmax(outputs.logits(batch, made.learner.objective.loss(batch)[1]), -1).detach()
    presented(made, refs)
    made.learner.adapter.add_(0.1)
    said = made.learner.objective.loss(batch)[1]
    after = torch.log_softmax(outputs.logits(batch, said), -1)
    expected = (after - before.half().float()).square().mean(1).sum()
    torch.testing.assert_close(made.error(refs, batch, said), expected, rtol=1e-4, atol=1e-6)


def test_the_right_token_is_among_those_kept() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    gold = torch.arange(50) % 30
    values, indices = _likeliest(logits, gold, 4)
    assert (indices == gold.unsqueeze(1)).any(1).all()
    assert all(len(set(row)) == 4 for row in indices.tolist())
    torch.testing.assert_close(values, torch.log_softmax(logits, -1).gather(1, indices))
    likeliest = logits.topk(3, dim=1).indices
    assert all(set(few) <= set(row) for few, row in zip(likeliest.tolist(), indices.tolist(), strict=True))


def test_other_tokens_than_those_stored_are_refused(folders: dict[str, Path]) -> None:
    made = derpp(folders, "prompt")
    begin_task(made, (0,))
    presented(made, [(0, 0)])
    said = made.said[0, 0]
    made.said[0, 0] = Said(said.values, said.indices, said.tokens + 1)
    batch = made.learner.fetch([(0, 0)])
    with pytest.raises(ConfigError, match="row 0 of task 0 has other tokens than when it was remembered: go on with"):
        made.error([(0, 0)], batch, made.learner.objective.loss(batch)[1])


def test_what_is_stored_is_neither_masked_nor_part_of_a_graph(folders: dict[str, Path]) -> None:
    made = second_task(folders)
    presented(made, [(1, row) for row in range(8)])
    later = [said for ref, said in made.said.items() if ref[0] == 1]
    assert later
    for said in later:
        assert said.values.shape[1] == 4
        assert torch.isfinite(said.values).all(), "classes of the first task are masked in the loss alone"
        assert not said.values.requires_grad
        assert said.values.dtype == torch.half
        assert said.values.untyped_storage().nbytes() == 8


# -- when what is stored


@pytest.mark.parametrize(("refresh", "changes"), [("last", True), ("first", False)])
def test_a_later_presentation_renews_what_was_said_or_does_not(
    folders: dict[str, Path], refresh: str, changes: bool
) -> None:
    made = derpp(folders, refresh=refresh)
    begin_task(made, (0,))
    refs = [(0, row) for row in range(6)]
    presented(made, refs)
    first = made.said[0, 3].values.clone()
    made.learner.theta.add_(0.1)
    presented(made, refs)
    assert torch.equal(made.said[0, 3].values, first) != changes


def test_what_was_said_of_a_finished_task_is_frozen(folders: dict[str, Path]) -> None:
    made = derpp(folders, memory=40)
    toys.learn(made, 0)
    kept = {ref: said.values.clone() for ref, said in made.said.items()}
    toys.learn(made, 1)
    old = [ref for ref in made.said if ref[0] == 0]
    assert len(old) > 8
    assert all(torch.equal(made.said[ref].values, kept[ref]) for ref in old)


def test_a_step_reads_the_memory_before_its_own_rows_are_offered(folders: dict[str, Path]) -> None:
    made = derpp(folders)
    begin_task(made, (0,))
    learner = made.learner
    learner.drawn = made.rows(0, [(0, row) for row in range(8)])
    batch = learner.fetch(learner.drawn)
    made.loss_terms(batch, learner.objective.loss(batch)[1])
    learner.forget_gradients()
    made.edit_gradients(0, 0.0)
    assert torch.count_nonzero(learner.grad) == 0, "there was nothing to read"
    assert len(made.said) == 8


@pytest.mark.parametrize(("scope", "tasks"), [("all", {0, 1}), ("past", {0})])
def test_scope_says_whether_the_task_in_progress_is_replayed(
    folders: dict[str, Path], scope: str, tasks: set[int]
) -> None:
    made = second_task(folders, scope=scope, replay_batch=12)
    presented(made, [(1, row) for row in range(22)])
    drawn = {ref[0] for step in range(8) for refs, _, _ in made.draws(step) for ref in refs}
    assert drawn == tasks


def test_both_terms_have_draws_of_their_own_unless_one_is_shared(folders: dict[str, Path]) -> None:
    made = second_task(folders, replay_batch=4)
    (logits, alpha, none), (labels, nothing, beta) = made.draws(0)
    assert (alpha, none, nothing, beta) == (0.3, 0, 0, 0.5)
    assert len(set(logits)) == len(set(labels)) == 4
    assert any(made.draws(step)[0][0] != made.draws(step)[1][0] for step in range(5))
    assert made.draws(3) == made.draws(3)
    shared = second_task(folders, replay_batch=4, shared_draw=True)
    assert [(a, b) for _, a, b in shared.draws(0)] == [(0.3, 0.5)]
    few = second_task(folders, replay_batch=400)
    assert {len(refs) for refs, _, _ in few.draws(0)} == {12}


@KINDS
def test_a_shared_draw_gives_the_sum_of_both_terms(folders: dict[str, Path], kind: str) -> None:
    made = second_task(folders, kind)
    learner, refs = made.learner, made.buffer.rows()[:5]
    learner.theta.add_(0.02)
    both = mean_gradient(learner, refs, made.term(0.3, 0.5))
    apart = mean_gradient(learner, refs, made.term(0.3, 0.0)) + mean_gradient(learner, refs, made.term(0.0, 0.5))
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-6)


def test_a_term_without_coefficient_costs_no_forward_pass(folders: dict[str, Path]) -> None:
    assert [(a, b) for _, a, b in second_task(folders, beta=0).draws(0)] == [(0.3, 0)]
    assert [(a, b) for _, a, b in second_task(folders, alpha=0).draws(0)] == [(0, 0.5)]
    off = second_task(folders, "prompt", lm_logits="off")
    assert [(a, b) for _, a, b in off.draws(0)] == [(0, 0.5)]
    assert all(len(said.values.reshape(-1)) == 0 for said in off.said.values())


def test_labels_of_remembered_rows_compete_among_all_classes_seen(folders: dict[str, Path]) -> None:
    made = second_task(folders)
    learner, refs = made.learner, [ref for ref in made.buffer.rows() if ref[0] == 0]
    gradient = mean_gradient(learner, refs, made.term(0.0, 1.0))
    biases = gradient[-4:]
    assert (biases.abs() > 0).all(), "also those that came later"
    own = mean_gradient(learner, refs)[-4:]
    assert torch.count_nonzero(own[2:]) == 0


@KINDS
def test_at_the_end_of_a_task_everything_is_offered_as_the_model_says_it_then(
    folders: dict[str, Path], kind: str
) -> None:
    made = derpp(folders, kind, logits_at="task_end", memory=8)
    begin_task(made, (0,))
    learner = made.learner
    learner.adapter.add_(0.05)
    assert made.draws(0) == []
    made.after_task()
    assert len(made.said) == 8
    refs = made.buffer.rows()
    batch = learner.fetch(refs)
    assert float(made.error(refs, batch, learner.objective.loss(batch)[1]).detach()) < 1e-4


def test_the_memory_has_room_for_a_hundred_rows_of_each_task_unless_it_is_given(folders: dict[str, Path]) -> None:
    assert derpp(folders, memory=None).capacity == 300
    assert derpp(folders).capacity == 12
