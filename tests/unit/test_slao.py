"""SLAO against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests import tiny, toys
from treelora_ray.config import ConfigError
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task
from treelora_ray.methods.slao import Slao, largest_angle, orthonormal
from treelora_ray.models.adapters import load_exported
from treelora_ray.training.evaluate import Evaluator
from treelora_ray.training.export import export_adapter
from treelora_ray.training.loop import begin_task, end_task, train_task

TASKS = 3


def slao(backbone: Path, **options: Any) -> Slao:
    sections, kind = options.pop("sections", {}), options.pop("kind", "image")
    made = toys.ready(backbone, {"name": "slao", **options}, kind=kind, **sections)
    assert isinstance(made, Slao)
    return made


@dataclass
class Learnt:
    """Three tasks, and what was there before and after the training of each."""

    made: Slao
    starts: list[Tensor] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)
    merged: list[Tensor] = field(default_factory=list)
    thetas: list[Tensor] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)


def learn(made: Slao, tasks: int = TASKS) -> Learnt:
    found, learner = Learnt(made), made.learner
    for task in range(tasks):
        begin_task(made, (task,))
        found.starts.append(learner.adapter.clone())
        train_task(made, 0, lambda *_: found.thetas.append(learner.theta.clone()), lambda _: None)
        end_task(made)
        found.ends.append(learner.adapter.clone())
        found.merged.append(made.answer(task).clone())
        found.reports.append(made.report())
    return found


@pytest.fixture(scope="module")
def learnt(backbone: Path) -> Learnt:
    return learn(slao(backbone))


def factors(made: Slao, adapter: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (a, b) for name, (a, b) in made.learner.layout.views(adapter)}


def by_layer(made: Slao, *adapters: Tensor) -> list[tuple[tuple[Tensor, Tensor], ...]]:
    return list(zip(*(factors(made, adapter).values() for adapter in adapters), strict=True))


def unused(_: int) -> Tensor:
    raise AssertionError("no row is to be completed")


def random_rows(count: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_task_starts_with_orthonormal_rows_in_the_row_space_of_the_last_a(learnt: Learnt) -> None:
    """Not in a space orthogonal to it."""
    for task in (1, 2):
        for (a, b), (last, b_last) in by_layer(learnt.made, learnt.starts[task], learnt.ends[task - 1]):
            assert torch.equal(b, b_last)
            torch.testing.assert_close(a @ a.T, torch.eye(2), rtol=0, atol=1e-6)
            torch.testing.assert_close(last @ a.T @ a, last, rtol=0, atol=1e-6)


def test_of_a_first_row_the_direction_is_kept() -> None:
    rows = random_rows(3)
    found = orthonormal(rows, unused)
    torch.testing.assert_close(found[0], F.normalize(rows[0], dim=0))
    assert bool(((rows @ found.T).diagonal() > 0).all()), "signs are those of the given rows"


def test_orthonormal_rows_are_a_fixed_point() -> None:
    found = orthonormal(random_rows(4), unused)
    torch.testing.assert_close(orthonormal(found, unused), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["a row twice", "a zero row first", "all zero"])
def test_rows_that_add_nothing_are_completed_and_the_others_still_spanned(case: str) -> None:
    rows = random_rows(3)
    if case == "a row twice":
        rows[1] = 2 * rows[0]
    elif case == "a zero row first":  # QR then takes (1, 0, ...) for it, which the second row must not lose
        rows[0] = 0
        rows[1] = F.one_hot(torch.tensor(0), 6).double()
    else:
        rows.zero_()
    drawn = {place: F.normalize(random_rows(9)[5 + place], dim=0) for place in range(3)}
    found = orthonormal(rows, drawn.__getitem__)
    torch.testing.assert_close(found @ found.T, torch.eye(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows @ found.T @ found, rows, rtol=0, atol=1e-9)


def test_completed_rows_depend_on_seed_task_and_layer_alone(backbone: Path) -> None:
    made = slao(backbone)
    toys.learn(made, 0)
    begin_task(made, (1,))
    for _, (a, _b) in made.learner.layout.views(made.learner.adapter):
        a[1] = a[0]
    one = made.start()
    assert torch.equal(one, made.start())
    spans = [a[1] for a, _ in factors(made, one).values()]
    assert not torch.allclose(spans[0].abs(), spans[1].abs(), atol=1e-3)


@pytest.mark.parametrize("start", ["paper", "continuous"])
def test_b_goes_on_as_trained_not_as_merged(start: str, backbone: Path, learnt: Learnt) -> None:
    """One port starts from the merged B, which is another method."""
    made = slao(backbone, start=start)
    made.learner.unit, made.merged = (1,), learnt.merged[1]
    made.learner.adapter.copy_(learnt.ends[1])
    jumps = []
    for (a, b), (a_last, b_last), (_, b_merged) in by_layer(made, made.start(), learnt.ends[1], learnt.merged[1]):
        assert not torch.allclose(b_last, b_merged, atol=1e-4)
        if start == "paper":
            assert torch.equal(b, b_last)
        jumps.append(float((b @ a - b_last @ a_last).abs().max()))
    if start == "paper":
        assert min(jumps) > 1e-4
    else:
        assert max(jumps) < 1e-6


def test_the_merged_a_is_the_last_and_the_merged_b_the_weighted_mean(learnt: Learnt) -> None:
    for task in range(1, TASKS):
        weight = 1 / math.sqrt(task + 1)
        parts = by_layer(learnt.made, learnt.merged[task], learnt.ends[task], learnt.merged[task - 1])
        for (a, b), (a_last, b_last), (_, b_before) in parts:
            assert torch.equal(a, a_last)
            torch.testing.assert_close(b, b_before + weight * (b_last - b_before), rtol=0, atol=1e-7)
    assert [report["lambda"] for report in learnt.reports] == [1, 1 / math.sqrt(2), 1 / math.sqrt(3)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sqrt", [1, 1.7071, 2.4536, 3.2268]),
        ("mean", [1, 1.5, 2, 2.5]),
        (0.5, [1, 1.5, 2.25, 3.125]),
        (0, [1, 1, 1, 1]),
    ],
)
def test_of_scalars_1_2_3_4_the_merged_ones_are_as_by_hand(rule: Any, expected: list[float], backbone: Path) -> None:
    made = slao(backbone, **{"lambda": rule})
    found = []
    for task in range(4):
        made.learner.unit = (task,)
        for _, (_, b) in made.learner.layout.views(made.learner.adapter):
            b.fill_(task + 1)
        made.after_task()
        found += [float(b.max()) for _, b in list(factors(made, made.answer(task)).values())[:1]]
    assert found == pytest.approx(expected, abs=1e-4)


def test_of_four_tasks_each_has_its_weight(backbone: Path) -> None:
    made, weights = slao(backbone), list[float]()
    for task in range(4):
        weight = made.weight(task + 1)
        weights = [old * (1 - weight) for old in weights] + [weight]
    assert weights == pytest.approx([0.0619, 0.1494, 0.2887, 0.5], abs=1e-4)
    assert made.weight(400) == 0.05, "no floor"


def test_a_b_that_is_the_merged_one_changes_nothing(backbone: Path, learnt: Learnt) -> None:
    made = slao(backbone)
    made.learner.unit, made.merged = (2,), learnt.merged[1].clone()
    made.learner.adapter.copy_(learnt.merged[1])
    made.after_task()
    assert torch.equal(made.answer(2), learnt.merged[1])


def test_one_task_is_ordinary_fine_tuning(backbone: Path, learnt: Learnt) -> None:
    plain = toys.ready(backbone, "seqlora")
    thetas = toys.learn(plain, 0)
    assert all(torch.equal(one, other) for one, other in zip(thetas, learnt.thetas, strict=False))
    assert torch.equal(learnt.merged[0], plain.answer(0))


def test_the_merged_pair_answers_and_training_goes_on_from_the_trained_one(learnt: Learnt) -> None:
    made = learnt.made
    learner = made.learner
    rows = toys.images(0, 6, 5).take(range(6))
    own = learner.adapter.clone()
    with torch.no_grad():
        trained = learner.features(rows)
        with made.answering(0):
            merged = learner.features(rows)
            assert torch.equal(learner.adapter, learnt.merged[-1])
    assert not torch.allclose(trained, merged, atol=1e-4)
    assert torch.equal(learner.adapter, own)
    assert torch.equal(own, learnt.thetas[-1][: learner.layout.total])
    for (a, b), (a_merged, b_merged) in zip(
        made.factors(1).values(), factors(made, learnt.merged[-1]).values(), strict=True
    ):
        assert torch.equal(a, a_merged)
        assert torch.equal(b, b_merged)


def test_folders_of_all_tasks_hold_what_answers_after_the_last(learnt: Learnt, tmp_path: Path) -> None:
    made = learnt.made
    assert list(made.changed((2,))) == [0, 1, 2]
    export_adapter(made, 0, tmp_path)
    for name, (a, b) in factors(made, learnt.merged[-1]).items():
        assert all(torch.equal(*pair) for pair in zip((a, b), load_exported(tmp_path)[name], strict=True))


def test_within_a_task_the_merged_pair_of_the_tasks_before_answers(backbone: Path, learnt: Learnt) -> None:
    made = slao(backbone)
    toys.learn(made, 0, 1)
    begin_task(made, (2,))
    train_task(made, 4, lambda *_: None, lambda _: None)
    assert torch.equal(made.answer(0), learnt.merged[1])


def test_how_far_a_task_turned_what_a_reads_is_said(learnt: Learnt) -> None:
    made = learnt.made
    for task, report in enumerate(learnt.reports):
        for (a, _), (a_end, _), degrees in zip(
            factors(made, learnt.starts[task]).values(),
            factors(made, learnt.ends[task]).values(),
            report["turned"].values(),
            strict=True,
        ):
            worst = torch.linalg.svdvals(torch.linalg.qr(a.T).Q.T @ torch.linalg.qr(a_end.T).Q).min()
            assert degrees == pytest.approx(math.degrees(math.acos(float(worst))), abs=0.1)
            assert 0.1 < degrees <= 90
    plane = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    tilted = torch.tensor([[1.0, 0, 0], [5.0, 1, 1]])
    assert largest_angle(plane, tilted) == pytest.approx(45, abs=1e-4)
    assert largest_angle(plane, plane) == 0


def test_class_means_of_merged_features_may_be_the_head(backbone: Path) -> None:
    made = slao(backbone, head="ncm")
    found = learn(made, 2)
    learner = made.learner
    assert found.reports[-1]["head"] == "ncm"
    for task in (0, 1):
        data = learner.tasks[task].train
        columns = data.take(range(len(data)))
        with torch.no_grad(), learner.holding(found.merged[task]):
            features = learner.features(columns)
        for row, label in zip(learner.head.rows[task], ("c0", "c1"), strict=True):
            mine = torch.tensor([own == label for own in columns["label"]])
            mean = F.normalize(features[mine].mean(0), dim=0)
            torch.testing.assert_close(learner.head.weight[row], mean, rtol=0, atol=1e-5)
            assert float(learner.head.bias[row]) == 0


def test_of_class_means_one_without_rows_is_never_the_nearest_and_old_ones_stay(backbone: Path) -> None:
    """A label of two tasks is one class here; the second task has no rows of one, and none of another that is new."""
    made = slao(backbone, head="ncm", sections={"objective": {"label_match": "string"}})
    learner = made.learner
    first = learner.tasks[0]
    columns = toys.images(1, 8, 0).take(range(8))
    rows = MemoryRows({"image": columns["image"], "label": ["c0"] * 8})
    later = MemoryRows({"image": columns["image"], "label": ["c2"] * 8})
    second, third = Task("u", rows, rows, ("c0", "c1", "c2")), Task("v", later, later, ("c2",))
    learner.tasks = (first, second, third)
    toys.learn(made, 0)
    before = learner.head.weight.clone()
    toys.learn(made, 1)
    assert learner.head.names == ["c0", "c1", "c2"]
    assert torch.equal(learner.head.weight[1], before[1])
    assert not torch.equal(learner.head.weight[0], before[0])
    assert float(learner.head.bias[2]) == -math.inf
    answers = Evaluator(made, "last")
    assert "c2" not in answers.answer(first.test, answers.routes(first.test)).text
    toys.learn(made, 2)
    assert float(learner.head.bias[2]) == 0
    assert float(learner.head.weight[2].norm()) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_is_refused(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.head is 'ncm'.* a language model has no head: leave it out"):
        slao(tiny.llama(tmp_path), head="ncm", kind="prompt")
    with pytest.raises(ConfigError, match=r"model.lora.rank is 17, .* inputs of 16 values: use 16 at most"):
        slao(backbone, sections={"model": {"lora": {"rank": 17, "alpha": 1}}})
