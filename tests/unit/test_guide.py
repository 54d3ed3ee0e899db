from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treelora_ray.core import Choice, Guide, GuideConfig, GuideError, Layout, LayoutError, Snapshot, SnapshotError
from treelora_ray.core.bandit import NOTHING, BestFirstTreeLCB, Exhaustive, FlatLCB, PooledTreeLCB, Random
from treelora_ray.core.errors import SettingError
from treelora_ray.core.signature import directions
from treelora_ray.files import load_snapshot, save_snapshot

RAGGED = Layout.of_sizes([96, 32, 96, 32], ["q0", "v0", "q1", "v1"])


def family_gradients(families: int, seed: int = 0, layout: Layout = RAGGED) -> Callable[[int, int], Tensor]:
    """gradient(task, step): tasks t and t + families are kin; batches scatter around the task's mean."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(families, layout.total, generator=generator)

    def gradient(task: int, step: int) -> Tensor:
        own = torch.Generator().manual_seed(1000 * task + 7 + seed)
        mean = centres[task % families] + 0.5 * torch.randn(layout.total, generator=own)
        batch = torch.Generator().manual_seed(1000 * task + step + 13 + seed)
        return mean + 0.3 * torch.randn(layout.total, generator=batch)

    return gradient


def learn(guide: Guide, gradient: Callable[[int, int], Tensor], tasks: range, rounds: int = 3) -> list[Choice]:
    choices = []
    for task in tasks:
        guide.begin_task(f"task{task}")
        for step in range(rounds):
            guide.probe(step, gradient(task, step))
        choices.append(guide.commit())
        guide.insert()
    return choices


def stepwise(guide: Guide, task: int, steps: range) -> list[list[int]]:
    """One exchange a step, distances made up from kinship: what `paper` and `released` do."""
    taken = []
    for step in steps:
        arms = guide.select(step)
        noise = np.random.default_rng((task, step)).normal(0, 0.02, len(arms))
        kin = (arms - task) % 3 == 0
        guide.observe(step, np.where(arms < 0, 0.0, np.where(kin, 0.2, 0.7) + noise))
        taken.append(arms.tolist())
    return taken


def config_of(mode: str, **changes: Any) -> GuideConfig:
    extra = {"steps_per_epoch": 5} if mode == "released" else {}
    return GuideConfig.of(mode, **{**extra, **changes})  # type: ignore[arg-type]


def same(one: Snapshot, other: Snapshot) -> bool:
    if one.meta != other.meta or one.tensors.keys() != other.tensors.keys():
        return False
    return all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())


# -- what it finds


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_a_task_leans_on_its_kin_at_every_layer_and_on_nobody_when_it_has_none(distance: str) -> None:
    config = config_of("treelora", distance=distance, sketch_dim=None)
    choices = learn(Guide(RAGGED, config), family_gradients(3), range(9))
    for choice in choices[:3]:
        assert choice.warm.tolist() == [NOTHING] * 4
    for task, choice in enumerate(choices[3:], start=3):
        assert choice.related.all()
        assert ((choice.task - task) % 3 == 0).all()


def test_noise_is_read_off_differences_of_rounds_that_share_nothing() -> None:
    """Of n rounds, n - 1: none holds what all rounds share, and of independent rounds no two are correlated."""
    guide = Guide(RAGGED, config_of("treelora", sketch_dim=None))
    guide.begin_task("first")
    rounds, common = torch.eye(5, RAGGED.total), torch.full((RAGGED.total,), 3.0)
    for step, own in enumerate(rounds):
        guide.probe(step, own + common)
    assert guide.current is not None
    found = torch.stack(guide.current.differences)
    assert found.shape == (4, RAGGED.total)
    torch.testing.assert_close(found.sum(1), torch.zeros(4), atol=1e-5, rtol=0)  # as much of one round as of others
    torch.testing.assert_close(found @ found.T, torch.diag((found @ found.T).diagonal()), atol=1e-5, rtol=0)


def test_the_first_task_has_nothing_to_lean_on() -> None:
    guide = Guide(RAGGED)
    guide.begin_task("first")
    assert guide.probe(0, torch.ones(RAGGED.total)).tolist() == []
    choice = guide.commit()
    assert choice.task.tolist() == [NOTHING] * 4
    assert not choice.related.any()
    assert guide.insert().task == 0


def test_commit_takes_the_nearest_stored_task_of_each_layer() -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", gate=0.0)), family_gradients(5)
    learn(guide, gradient, range(12))
    guide.begin_task("new")
    flats = [gradient(12, step) for step in range(4)]
    for step, flat in enumerate(flats):
        guide.probe(step, flat)
    mean = torch.stack(flats).mean(0)
    choice = guide.commit()
    for layer in range(4):
        own = RAGGED.segment(mean, layer)
        away = [float((own / own.norm() - RAGGED.segment(guide.store.rows[t], layer)).norm() / 2) for t in range(12)]
        assert choice.task[layer] == int(np.argmin(away))
        assert choice.distance[layer] == pytest.approx(min(away), abs=1e-5)
    assert guide.commit() is choice


def test_commit_task_takes_one_task_for_all_layers() -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", commit="task", gate=0.0)), family_gradients(4)
    for choice in learn(guide, gradient, range(12)):
        assert len(set(choice.task.tolist())) == 1
    guide.begin_task("new")
    guide.probe(0, gradient(12, 0))
    choice = guide.commit()
    assert (choice.task % 4 == 0).all()
    away = guide.store.from_rows(directions(RAGGED, gradient(12, 0), "cosine"), np.arange(12)).mean(1)
    assert choice.task[0] == int(away.argmin())


def test_commit_task_relates_all_layers_or_none() -> None:
    layout = Layout.of_sizes([256] * 8)
    draw = torch.Generator().manual_seed(0)
    families = [torch.randn(layout.total, generator=draw) for _ in range(3)]
    weak = torch.ones(layout.total)
    layout.segment(weak, 7).zero_()  # a layer of which no family says anything
    related = {True: 0, False: 0}
    for seed in range(20):
        guide = Guide(layout, config_of("treelora", commit="task"))
        noise = torch.Generator().manual_seed(seed)
        for number, own in enumerate(families[:2]):
            guide.begin_task(f"task{number}")
            guide.insert(own * weak + torch.randn(layout.total, generator=noise))
        for kin in (True, False):
            guide.begin_task("new", attempt=int(not kin))
            own = families[0 if kin else 2] * weak
            for step in range(8):
                guide.probe(step, own + 2 * torch.randn(layout.total, generator=noise))
            found = guide.commit().related
            assert found.all() or not found.any()
            related[kin] += bool(found.all())
    assert related[True] == 20
    assert related[False] <= 1


@pytest.mark.parametrize("arms", [1, 11, 47])
def test_at_most_a_tenth_of_the_layers_of_unrelated_tasks_pass_for_related(arms: int) -> None:
    layout = Layout.of_sizes([128] * 64)
    passed = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        guide = Guide(layout, config_of("treelora", pulls_per_round=64))
        for task in range(arms):
            guide.begin_task(f"task{task}")
            guide.insert(torch.randn(layout.total, generator=generator))
        guide.begin_task("new")
        own = torch.randn(layout.total, generator=generator)
        for step in range(4):
            guide.probe(step, own + torch.randn(layout.total, generator=generator))
        passed.append(guide.commit().related.mean())
    assert np.mean(passed) <= 0.10


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_the_tree_search_compares_with_the_mean_of_the_batches_so_far(distance: str) -> None:
    """With l2 the size matters: the sum of five batches would be far from everything."""
    config = config_of("treelora", distance=distance, sketch_dim=None, pulls_per_round=4)
    guide, gradient = Guide(RAGGED, config), family_gradients(4)
    learn(guide, gradient, range(24), rounds=5)
    guide.begin_task("new")
    for step in range(5):
        guide.probe(step, gradient(24, step))
    assert guide.current is not None
    search = guide.current.search
    assert isinstance(search, BestFirstTreeLCB)
    known = (search.born == 5) & (search.node >= 0)
    mean = directions(RAGGED, torch.stack([gradient(24, step) for step in range(5)]).mean(0), guide.config.distance)
    for layer, column in zip(*np.nonzero(known), strict=True):
        members = guide.tree.members(int(search.node[layer, column]))
        exact = guide.store.from_rows(mean, members)[:, layer].square().mean().sqrt()
        assert search.estimate[layer, column] == pytest.approx(float(exact), rel=0.1)


def test_without_the_gate_every_layer_counts_as_related() -> None:
    guide = Guide(RAGGED, config_of("treelora", gate=0.0))
    choices = learn(guide, family_gradients(9), range(4))
    assert all(choice.related.all() for choice in choices[1:])


def test_few_tasks_are_all_compared_with_in_every_round() -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", pulls_per_round=6)), family_gradients(3)
    learn(guide, gradient, range(6))
    guide.begin_task("new")
    assert guide.probe(0, gradient(6, 0)).tolist() == list(range(6))
    assert guide.current is not None
    assert isinstance(guide.current.search, Exhaustive)
    assert (guide.current.search.count == 1).all()


@pytest.mark.parametrize(
    ("search", "kind"),
    [("tree-lcb", BestFirstTreeLCB), ("flat-lcb", FlatLCB), ("random", Random), ("exhaustive", Exhaustive)],
)
@pytest.mark.parametrize("tree", ["linkage", "kd-radius", "kd-inner"])
def test_every_search_on_every_tree_stays_within_its_pulls(search: str, kind: type, tree: str) -> None:
    config = config_of("treelora", search=search, tree=tree, pulls_per_round=7)
    guide, gradient = Guide(RAGGED, config), family_gradients(4)
    choices = learn(guide, gradient, range(24), rounds=5)
    guide.begin_task("new")
    compared = guide.probe(0, gradient(24, 0))
    assert guide.current is not None
    assert guide.current.search is not None
    assert isinstance(guide.current.search, kind)
    assert guide.current.search.pulls == 7
    assert len(compared) <= 2 * 7 * len(RAGGED)
    kin = [np.mean((choice.warm - task) % 4 == 0) for task, choice in enumerate(choices[8:], start=8)]
    assert np.mean(kin) > (0.8 if search != "random" else 0.5)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_stepwise_modes_name_stored_tasks_and_paper_prefers_kin(mode: str) -> None:
    guide, gradient = Guide(RAGGED, config_of(mode)), family_gradients(3)
    for task in range(7):
        guide.begin_task(f"task{task}")
        taken = stepwise(guide, task, range(200))
        assert ((np.array(taken) >= 0) == (task > 0)).all()
        assert np.max(taken) < max(task, 1)
        if mode == "paper" and task >= 3:
            kin = (np.array(taken[100:]) - task) % 3 == 0
            kin_share = np.mean([(arm - task) % 3 == 0 for arm in range(task)])
            assert kin.mean() > 1.2 * kin_share
        guide.insert(gradient(task, 0))


def test_query_observations_commit_by_the_mean_distance_seen() -> None:
    config = config_of("treelora", observe="query", search="flat-lcb")
    guide, gradient = Guide(RAGGED, config), family_gradients(3)
    for task in range(6):
        guide.begin_task(f"task{task}")
        stepwise(guide, task, range(12))
        choice = guide.commit()
        if task >= 3:
            assert ((choice.warm - task) % 3 == 0).all()
        guide.insert(gradient(task, 0))


def test_commit_task_counts_the_layers_at_which_a_task_was_seen() -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", observe="step", commit="task")), family_gradients(3)
    for task in range(3):
        guide.begin_task(f"task{task}")
        guide.insert(gradient(task, 0))
    guide.begin_task("new")
    guide.select(0)
    assert guide.current is not None
    guide.current.offered = 0, np.array([0, 1, 2, 2])
    guide.observe(0, np.array([0.9, 0.5, 0.2, 0.4]))
    choice = guide.commit()
    assert choice.task.tolist() == [2] * 4
    assert choice.warm.tolist() == [NOTHING, NOTHING, 2, 2]


# -- degenerate tasks


@pytest.mark.parametrize("mode", ["treelora", "paper", "released"])
@pytest.mark.parametrize("tree", ["linkage", "kd-radius", "kd-inner"])
def test_identical_tasks_and_tasks_without_gradient_at_a_layer_are_taken_in(mode: str, tree: str) -> None:
    guide = Guide(RAGGED, config_of(mode, tree=tree))
    flat = family_gradients(1)(0, 0)
    partly = flat.clone()
    RAGGED.segment(partly, 2).zero_()
    for number, signature in enumerate([flat, flat, partly, partly, torch.zeros(RAGGED.total), flat]):
        guide.begin_task(f"task{number}")
        if mode == "treelora":
            guide.probe(0, signature)
            choice = guide.commit()
            assert np.isfinite(choice.distance).all() == (number > 0)
        else:
            guide.select(0)
            guide.observe(0, np.zeros(4))
        guide.insert(signature)
    assert guide.tree.tasks.tolist() == list(range(6))


def test_a_twin_is_found_and_counts_as_related() -> None:
    guide, gradient = Guide(RAGGED), family_gradients(8)
    learn(guide, gradient, range(5))
    guide.begin_task("twin")
    for step in range(3):
        guide.probe(step, gradient(2, step))
    choice = guide.commit()
    assert choice.warm.tolist() == [2] * 4
    assert choice.distance == pytest.approx(0.0, abs=2e-3)


# -- the sketch


def test_a_gradient_sketched_by_the_caller_counts_like_the_whole() -> None:
    layout = Layout.of_sizes([600, 40, 600])
    one, other = (Guide(layout, config_of("treelora", sketch_dim=64)) for _ in range(2))
    gradient = family_gradients(2, layout=layout)
    assert other.sketch is not None
    sketch = other.sketch
    learn(one, gradient, range(5))
    learn(other, lambda task, step: sketch(gradient(task, step)), range(5))
    assert same(one.snapshot(), other.snapshot())
    assert one.layout.sizes == (64, 40, 64)


def test_sketched_signatures_find_the_same_kin() -> None:
    layout = Layout.of_sizes([4096] * 3)
    for choice_full, choice_small in zip(
        learn(Guide(layout, config_of("treelora", sketch_dim=None)), family_gradients(3, layout=layout), range(7)),
        learn(Guide(layout, config_of("treelora", sketch_dim=512)), family_gradients(3, layout=layout), range(7)),
        strict=True,
    ):
        assert (choice_full.warm % 3).tolist() == (choice_small.warm % 3).tolist()
        assert choice_full.related.tolist() == choice_small.related.tolist()


# -- calls that come again, or too late


def test_calls_that_come_again_change_nothing() -> None:
    guide, gradient = Guide(RAGGED), family_gradients(3)
    learn(guide, gradient, range(4))
    guide.begin_task("new", attempt=1)
    first = guide.probe(0, gradient(4, 0), task="new", attempt=1)
    guide.probe(1, gradient(4, 1))
    before = guide.snapshot()
    guide.begin_task("new", attempt=1)
    assert guide.probe(1, gradient(4, 1), task="new", attempt=1).tolist() == first.tolist()
    guide.probe(0, gradient(4, 0))
    assert same(before, guide.snapshot())
    done = guide.insert(task="new", attempt=1)
    before = guide.snapshot()
    assert guide.insert(task="new", attempt=1) == done
    guide.begin_task("next")
    assert guide.insert(task="new", attempt=1) == done
    before = guide.snapshot()
    guide.begin_task("new", attempt=1)
    guide.probe(2, gradient(4, 2), task="new", attempt=1)
    assert same(before, guide.snapshot())
    assert guide.current is not None
    assert guide.current.name == "next"


def test_a_probe_that_comes_again_is_answered_as_the_first_time() -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", pulls_per_round=2)), family_gradients(3)
    learn(guide, gradient, range(9))
    guide.begin_task("new")
    answers = [guide.probe(step, gradient(9, step)).tolist() for step in range(4)]
    assert [guide.probe(step, gradient(9, step)).tolist() for step in range(4)] == answers
    assert len({tuple(answer) for answer in answers}) > 1


def test_exchanges_that_come_again_change_nothing() -> None:
    guide, gradient = Guide(RAGGED, config_of("paper")), family_gradients(3)
    for task in range(3):
        guide.begin_task(f"task{task}")
        guide.insert(gradient(task, 0))
    guide.begin_task("new")
    stepwise(guide, 3, range(5))
    arms = guide.select(5)
    assert (guide.select(5) == arms).all()
    assert guide.observe(5, np.full(4, 0.3))
    before = guide.snapshot()
    assert not guide.observe(5, np.full(4, 0.3))
    assert not guide.observe(3, np.full(4, 0.9))
    assert (guide.select(5) == arms).all()
    assert same(before, guide.snapshot())


def test_a_new_attempt_starts_the_task_over_and_the_old_one_is_ignored() -> None:
    guide, gradient = Guide(RAGGED), family_gradients(3)
    learn(guide, gradient, range(4))
    undisturbed = Guide(RAGGED)
    learn(undisturbed, gradient, range(4))
    guide.begin_task("new")
    guide.probe(0, gradient(9, 0))
    guide.commit()
    guide.begin_task("new", attempt=1)
    undisturbed.begin_task("new", attempt=1)
    for step in range(2):
        guide.probe(step, gradient(4, step))
        undisturbed.probe(step, gradient(4, step))
        assert guide.probe(5, gradient(9, 5), task="new", attempt=0).tolist() == []
    with pytest.raises(GuideError, match="attempt 0 of task 'new' is over"):
        guide.begin_task("new", attempt=0)
    with pytest.raises(GuideError, match="insertion comes too late"):
        guide.insert(task="new", attempt=0)
    with pytest.raises(GuideError, match="commits too late"):
        guide.commit(task="new", attempt=0)
    assert same(guide.snapshot(), undisturbed.snapshot())


def test_late_observations_of_stored_tasks_are_ignored() -> None:
    guide, gradient = Guide(RAGGED, config_of("paper")), family_gradients(3)
    for task in range(2):
        guide.begin_task(f"task{task}")
        guide.insert(gradient(task, 0))
    guide.begin_task("new")
    before = guide.snapshot()
    assert not guide.observe(9, np.zeros(4), task="task1", attempt=0)
    assert (guide.select(9, task="task1") == NOTHING).all()
    assert same(before, guide.snapshot())


# -- bad input leaves the state as it was


def bad(value: float, layer: int) -> Tensor:
    flat = torch.ones(RAGGED.total)
    RAGGED.segment(flat, layer)[3] = value
    return flat


PROBING: list[tuple[str, Callable[[Guide], object], type[ValueError], str]] = [
    ("short", lambda g: g.probe(2, torch.ones(7)), LayoutError, r"shape \[7\], the layout needs \[256\]"),
    ("nan", lambda g: g.probe(2, bad(float("nan"), 1)), LayoutError, "NaN or infinite values in layer 'v0'"),
    ("inf", lambda g: g.insert(bad(float("inf"), 2)), LayoutError, "NaN or infinite values in layer 'q1'"),
    ("matrix", lambda g: g.insert(torch.ones(4, 64)), LayoutError, r"signature of task 'new' has shape \[4, 64\]"),
    ("select", lambda g: g.select(0), GuideError, "call `probe` with a gradient"),
    ("other", lambda g: g.begin_task("other"), GuideError, "task 'new' is in progress"),
    ("stored", lambda g: g.begin_task("task0"), GuideError, "'task0' is already stored"),
    ("unknown", lambda g: g.probe(2, torch.ones(256), task="nobody"), GuideError, "'nobody', which is unknown"),
    ("attempt", lambda g: g.probe(2, torch.ones(256), attempt=3), GuideError, "attempt 3 .* call `begin_task`"),
    ("negative", lambda g: g.probe(-2, torch.ones(256)), GuideError, "steps count from 0, got -2"),
    ("twice", lambda g: g.probe(1, torch.ones(256)), GuideError, "step 1 of task 'new' came twice"),
    ("number", lambda g: g.task_number("nobody"), GuideError, "'nobody' is unknown; stored: task0, task1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [p[1:] for p in PROBING], ids=[p[0] for p in PROBING])
def test_bad_input_while_probing_is_refused_and_changes_nothing(
    call: Callable[[Guide], object], error: type[ValueError], message: str
) -> None:
    guide, gradient = Guide(RAGGED), family_gradients(2)
    learn(guide, gradient, range(2))
    guide.begin_task("new")
    for step in range(2):
        guide.probe(step, gradient(2, step))
    before = guide.snapshot()
    with pytest.raises(error, match=message):
        call(guide)
    assert same(before, guide.snapshot())


STEPPING: list[tuple[str, Callable[[Guide], object], type[ValueError], str]] = [
    ("probe", lambda g: g.probe(0, torch.ones(256)), GuideError, "call `select` and `observe`"),
    ("unselected", lambda g: g.observe(7, np.zeros(4)), GuideError, r"step 7 .* never selected; call `select\(7\)`"),
    ("over", lambda g: g.select(1), GuideError, "step 1 of task 'new' is over: step 2 was observed"),
    ("short", lambda g: g.observe(3, np.zeros(3)), LayoutError, r"shape \[3\], one a layer makes \[4\]"),
    ("nan", lambda g: g.observe(3, np.array([0, 0, np.nan, 0])), LayoutError, "layer 'q1' at step 3 is nan"),
    ("unsigned", lambda g: g.insert(), GuideError, "task 'new' has no signature"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [p[1:] for p in STEPPING], ids=[p[0] for p in STEPPING])
def test_bad_input_between_steps_is_refused_and_changes_nothing(
    call: Callable[[Guide], object], error: type[ValueError], message: str
) -> None:
    guide, gradient = Guide(RAGGED, config_of("paper")), family_gradients(2)
    for task in range(2):
        guide.begin_task(f"task{task}")
        guide.insert(gradient(task, 0))
    guide.begin_task("new")
    stepwise(guide, 2, range(3))
    before = guide.snapshot()
    with pytest.raises(error, match=message):
        call(guide)
    assert same(before, guide.snapshot())


@pytest.mark.parametrize("call", ["probe", "commit", "insert"])
def test_calls_before_begin_say_what_is_missing(call: str) -> None:
    guide = Guide(RAGGED)
    calls: dict[str, Callable[[], object]] = {
        "probe": lambda: guide.probe(0, torch.ones(256)),
        "commit": guide.commit,
        "insert": lambda: guide.insert(torch.ones(256)),
    }
    with pytest.raises(GuideError, match=f"{call} without a task in progress; call `begin_task` first"):
        calls[call]()
    with pytest.raises(GuideError, match="no task is stored yet"):
        guide.draw()


def test_probing_after_commit_and_commit_without_probe_are_refused() -> None:
    guide = Guide(RAGGED)
    guide.begin_task("first")
    with pytest.raises(GuideError, match="nothing was observed of task 'first'"):
        guide.commit()
    guide.probe(0, torch.ones(256))
    guide.commit()
    with pytest.raises(GuideError, match="has committed"):
        guide.probe(1, torch.ones(256))


@pytest.mark.parametrize("changes", [{"depth": 0}, {"budget": 0}, {"pulls_per_round": 0}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(changes))):
        Guide(RAGGED, config_of("treelora", **changes))


# -- snapshots


CASES = [
    ("treelora", {}),
    ("treelora", {"pulls_per_round": 2}),
    ("treelora", {"pulls_per_round": 3, "search": "flat-lcb", "budget": 4}),
    ("treelora", {"pulls_per_round": 3, "search": "random", "tree": "kd-radius", "tree_update": "insert"}),
    ("treelora", {"pulls_per_round": 2, "tree_update": "insert", "sketch_dim": 16}),
    ("treelora", {"observe": "query"}),
    ("paper", {"budget": 3}),
    ("paper", {"search": "random"}),
    ("released", {}),
]


def live(guide: Guide, gradient: Callable[[int, int], Tensor], calls: int | None = None) -> list[Any]:
    """Eight tasks, call by call; goes on where the guide stands, for so many calls."""

    def probe(task: int, step: int) -> list[int]:
        return guide.probe(step, gradient(task, step)).tolist()

    def select(step: int) -> list[int]:
        return guide.select(step).tolist()

    def observe(task: int, step: int) -> bool:
        return guide.observe(step, np.asarray((guide.select(step) - task) % 3 * 0.3 + 0.01 * step, np.float64))

    def commit() -> list[int]:
        return guide.commit().warm.tolist()

    seen: list[Any] = []
    for task in range(len(guide.names), 8):
        steps: list[Callable[[], Any]] = []
        now = guide.current
        if now is None:
            steps.append(partial(guide.begin_task, f"task{task}"))
        for step in range(0 if now is None else now.step + 1, 4):
            if guide.config.observe == "probe":
                steps.append(partial(probe, task, step))
                continue
            if now is None or now.offered is None or now.offered[0] < step:
                steps.append(partial(select, step))
            steps.append(partial(observe, task, step))
        if now is None or now.choice is None:
            steps.append(commit)
        steps.append(partial(guide.insert, gradient(task, 99)))
        for call in steps:
            if calls is not None and len(seen) == calls:
                return seen
            seen.append(call())
    return seen


@pytest.mark.parametrize(("mode", "changes"), CASES)
@given(stop=st.integers(0, 80))
@settings(deadline=None, max_examples=8)
def test_a_guide_restored_at_any_call_continues_bit_for_bit(mode: str, changes: dict[str, Any], stop: int) -> None:
    gradient = family_gradients(3)
    config = config_of(mode, **changes)
    whole, first, second = (Guide(RAGGED, config) for _ in range(3))
    everything = live(whole, gradient)
    begun = live(first, gradient, stop)
    second.restore(first.snapshot())
    assert begun + live(second, gradient) == everything
    assert same(second.snapshot(), whole.snapshot())
    assert begun + live(first, gradient) == everything  # the snapshot shares nothing with its guide


def test_a_snapshot_survives_its_file(tmp_path: Any) -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", pulls_per_round=2)), family_gradients(3)
    learn(guide, gradient, range(7))
    guide.begin_task("new")
    guide.probe(0, gradient(7, 0))
    snapshot = guide.snapshot()
    save_snapshot(tmp_path / "guide.safetensors", snapshot.tensors, snapshot.meta)
    other = Guide(RAGGED, guide.config)
    other.restore(Snapshot(*load_snapshot(tmp_path / "guide.safetensors")))
    assert same(other.snapshot(), snapshot)
    whole = (tmp_path / "guide.safetensors").read_bytes()
    (tmp_path / "guide.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SnapshotError):
        load_snapshot(tmp_path / "guide.safetensors")


def test_snapshots_of_another_layout_settings_or_version_are_refused_and_change_nothing() -> None:
    guide, gradient = Guide(RAGGED), family_gradients(2)
    learn(guide, gradient, range(3))
    before = guide.snapshot()
    other = Guide(Layout.of_sizes([96, 32, 96, 33], RAGGED.names))
    with pytest.raises(SnapshotError, match=r"layer 3 is 'v1' \[\[32\]\] here and 'v1' \[\[33\]\] there"):
        guide.restore(other.snapshot())
    with pytest.raises(SnapshotError, match="other settings: depth is 64 here, 3 there"):
        guide.restore(Guide(RAGGED, config_of("treelora", depth=3)).snapshot())
    with pytest.raises(SnapshotError, match="version 99, this code reads 1"):
        guide.restore(Snapshot(before.tensors, {**before.meta, "version": 99}))
    assert same(before, guide.snapshot())


def test_a_snapshot_with_anything_missing_is_refused_and_changes_nothing() -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", pulls_per_round=2)), family_gradients(2)
    learn(guide, gradient, range(5))
    guide.begin_task("new")
    guide.probe(0, gradient(5, 0))
    guide.commit()
    full = guide.snapshot()
    learn_more = Guide(RAGGED, guide.config)
    learn(learn_more, gradient, range(2))
    before = learn_more.snapshot()
    for name in full.tensors:
        if name.startswith("stats."):
            continue  # all or nothing: without any the statistics are built anew
        with pytest.raises(SnapshotError, match="incomplete or damaged"):
            learn_more.restore(Snapshot({k: v for k, v in full.tensors.items() if k != name}, full.meta))
    for key in full.meta:
        cut = {k: v for k, v in full.meta.items() if k != key}
        with pytest.raises(SnapshotError):
            learn_more.restore(Snapshot(full.tensors, cut))
    with pytest.raises(SnapshotError, match="incomplete or damaged"):
        learn_more.restore(Snapshot(full.tensors, {**full.meta, "names": full.meta["names"][:-1]}))
    assert same(before, learn_more.snapshot())


# -- budget, memory, looking


@pytest.mark.parametrize("mode", ["treelora", "paper"])
def test_a_budget_bounds_the_slots_and_paper_averages_the_signatures_of_merged_tasks(mode: str) -> None:
    guide, gradient = Guide(RAGGED, config_of(mode, budget=3)), family_gradients(3)
    for task in range(9):
        guide.begin_task(f"task{task}")
        guide.insert(gradient(task, 0))
        assert len(set(guide.slots.of_task)) <= 3
    slots = guide.slots.of_task
    assert [slots[t] == slots[t % 3] for t in range(9)] == [True] * 9
    rows = guide.store.rows
    assert torch.equal(rows[0], rows[3]) == (mode == "paper")
    if mode == "paper":
        assert guide.tree.siblings(0).tolist() in ([3], [6], [3, 6])
        for one in set(slots):
            for other in set(slots) - {one}:
                between = [
                    guide.store.pair_row(i)[j]
                    for i in range(9)
                    for j in range(9)
                    if (slots[i], slots[j]) == (one, other)
                ]
                assert guide.slots.sums[one, other] == pytest.approx(sum(between))


def test_stored_bytes_are_signatures_pair_distances_and_a_share_for_groups() -> None:
    layout = Layout.of_sizes([256] * 8)
    guide = Guide(layout, config_of("treelora", pulls_per_round=4))
    generator = torch.Generator().manual_seed(0)
    for task in range(120):
        guide.begin_task(f"task{task}")
        guide.insert(torch.randn(layout.total, generator=generator))
    guide.begin_task("new")
    signatures, pairs = 120 * (layout.total * 2 + 8 * 4), 120 * 119 // 2 * 4
    groups = signatures + 120 * 8 * 4  # centroids and spreads, of at most as many groups as tasks
    assert signatures + pairs <= guide.nbytes() <= 1.6 * (signatures + pairs + groups)


def test_what_is_compared_with_is_the_size_of_one_signature_whatever_the_number_of_tasks() -> None:
    guide, gradient = Guide(RAGGED), family_gradients(3)
    learn(guide, gradient, range(6))
    out = torch.empty(RAGGED.total)
    arms = np.array([5, 0, NOTHING, 3])
    assert guide.directions(arms, out) is out
    for layer, arm in enumerate(arms):
        expected = RAGGED.segment(guide.store.rows[int(arm)], layer) if arm >= 0 else torch.zeros(RAGGED.sizes[layer])
        assert torch.equal(RAGGED.segment(out, layer), expected)


def test_the_tree_is_shown_by_names() -> None:
    guide, gradient = Guide(RAGGED), family_gradients(2)
    learn(guide, gradient, range(4))
    lines = guide.draw().splitlines()
    assert [line.split("─ ")[1] for line in lines if "task" in line] == ["task0", "task2", "task1", "task3"]
    assert [node["task"] for node in guide.to_data() if node["task"]] == ["task0", "task2", "task1", "task3"]
    assert guide.task_number("task3") == 3


def test_insertions_beyond_the_rebuild_limit_keep_search_statistics_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treelora_ray.core.grow.REBUILD_BELOW", 10)
    guide, gradient = Guide(RAGGED, config_of("treelora", pulls_per_round=3)), family_gradients(4)
    choices = learn(guide, gradient, range(40), rounds=4)
    kin = [np.mean((choice.warm - task) % 4 == 0) for task, choice in enumerate(choices[12:], start=12)]
    assert np.mean(kin) > 0.8
    guide.begin_task("new")
    assert guide.stats is not None
    members = {int(row): guide.tree.members(node) for node, row in enumerate(guide.stats.row) if row >= 0}
    for row, tasks in members.items():
        mean = guide.store.rows[tasks].mean(0)
        torch.testing.assert_close(guide.stats.centroids[row], mean, atol=2e-3, rtol=0)


def test_pooled_search_serves_observations_made_by_the_caller() -> None:
    guide, gradient = Guide(RAGGED, config_of("treelora", observe="step", signature="delta")), family_gradients(3)
    for task in range(4):
        guide.begin_task(f"task{task}")
        stepwise(guide, task, range(3))
        assert guide.current is not None
        assert task == 0 or isinstance(guide.current.search, PooledTreeLCB)
        guide.insert(gradient(task, 0))
