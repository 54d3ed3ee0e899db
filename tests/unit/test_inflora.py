"""InfLoRA against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny, toys
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task
from treelora_ray.methods import moments
from treelora_ray.methods.inflora import InfLora
from treelora_ray.models.adapters import load_exported
from treelora_ray.training.export import export_adapter
from treelora_ray.training.loop import begin_task, end_task, train_task

WIDTH = 16


def inflora(backbone: Path, **options: Any) -> InfLora:
    sections, kind = options.pop("sections", {}), options.pop("kind", "image")
    made = toys.ready(backbone, {"name": "inflora", **options}, kind=kind, **sections)
    assert isinstance(made, InfLora)
    return made


@dataclass
class Learnt:
    """Three tasks, learnt with weight decay and dropout, and what was seen of them."""

    made: InfLora
    used: list[dict[str, Tensor]] = field(default_factory=list)  # by layer M, before each task
    starts: list[Tensor] = field(default_factory=list)
    thetas: list[list[Tensor]] = field(default_factory=list)
    shares: list[set[float]] = field(default_factory=list)
    told: list[dict[str, Tensor]] = field(default_factory=list)  # moments that directions are set aside by
    dropping: list[bool] = field(default_factory=list)  # whether dropout was on, in each forward pass with gradients
    looking: list[bool] = field(default_factory=list)  # and in each one without


@pytest.fixture(scope="module")
def learnt(backbone: Path) -> Learnt:
    lora = {"rank": 2, "alpha": 2, "dropout": 0.2}
    made = inflora(
        backbone, epsilon=0.6, sections={"model": {"lora": lora}, "train": {"weight_decay": 0.5, "steps": 5}}
    )
    found, real = Learnt(made), made.set_aside

    def set_aside(name: str, moment: Tensor, share: float) -> None:
        found.shares[-1].add(share)
        found.told[-1][name] = moment.clone()
        real(name, moment, share)

    made.set_aside = set_aside  # type: ignore[method-assign]
    first = made.learner.model.linear_with_adapter(made.learner.layout.names[0])
    first.register_forward_pre_hook(
        lambda *_: (found.dropping if torch.is_grad_enabled() else found.looking).append(first.lora_dropout[
            "default"
        ].training)
    )  # fmt: skip
    for task in range(3):
        assert not made.retained
        found.used.append(dict(made.bases))
        found.thetas.append([])
        found.shares.append(set())
        found.told.append({})
        begin_task(made, (task,))
        found.starts.append(made.learner.adapter.clone())
        train_task(made, 0, lambda *_: found.thetas[-1].append(made.learner.theta.clone()), lambda _: None)
        end_task(made)
    return found


def factors(made: InfLora, adapter: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (a, b) for name, (a, b) in made.learner.layout.views(adapter[: made.learner.layout.total])}


def random_moment(seed: int, width: int = WIDTH) -> Tensor:
    """Of inputs whose directions are of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, dtype=torch.float64, generator=generator)
    turned = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    x = x * torch.logspace(0, -2, width, dtype=torch.float64) @ turned
    return x.T @ x / len(x)


def test_adapters_read_nothing_of_what_earlier_inputs_span(learnt: Learnt) -> None:
    made = learnt.made
    for task in (1, 2):
        for name, (a, b) in factors(made, made.folded[task]).items():
            basis = learnt.used[task][name]
            assert 1 <= basis.shape[1] <= WIDTH / 2
            x = basis @ torch.randn(basis.shape[1], 5, dtype=torch.float64)
            assert float((a.double() @ basis).abs().max()) < 1e-6
            assert float((b.double() @ (a.double() @ x)).abs().max()) < 1e-5
            assert float(b.abs().max()) > 1e-3, "it has learnt something"


def test_rows_of_a_are_orthogonal_and_of_length_one_over_root_three(learnt: Learnt) -> None:
    for adapter in learnt.made.folded:
        for a, _ in factors(learnt.made, adapter).values():
            torch.testing.assert_close(a @ a.T, torch.eye(2) / 3, rtol=0, atol=1e-6)


def test_what_is_kept_is_orthonormal(learnt: Learnt) -> None:
    for basis in learnt.made.bases.values():
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-12)


def test_training_and_weight_decay_leave_a_as_it_was(learnt: Learnt) -> None:
    made = learnt.made
    for start, thetas in zip(learnt.starts, learnt.thetas, strict=True):
        for theta in thetas:
            for (a, b), (a_now, b_now) in zip(
                factors(made, start).values(), factors(made, theta).values(), strict=True
            ):
                assert torch.equal(a, a_now)
                assert torch.count_nonzero(b) == 0
                assert torch.count_nonzero(b_now)


def test_dropout_is_on_in_training_and_off_where_inputs_are_looked_at(learnt: Learnt) -> None:
    """The released code trains in evaluation mode."""
    assert len(learnt.dropping) == 15
    assert all(learnt.dropping)
    assert learnt.looking
    assert not any(learnt.looking)


def test_the_share_set_aside_rises_evenly_over_the_stream(learnt: Learnt) -> None:
    assert [sorted(found) for found in learnt.shares] == [
        [pytest.approx(share)] for share in (0.6, 0.6 + 0.4 / 3, 0.6 + 0.8 / 3)
    ]


def test_directions_are_set_aside_by_inputs_of_the_new_model(learnt: Learnt) -> None:
    """Of the last task: its adapter is in the weights when its inputs are looked at again."""
    made = learnt.made
    again = moments.of_inputs(made.learner)
    for name, moment in learnt.told[-1].items():
        torch.testing.assert_close(moment, again[name], rtol=1e-6, atol=1e-9)
    with made.plain():
        loaded = moments.of_inputs(made.learner)
    last = made.learner.layout.names[-1]
    assert not torch.allclose(again[last], loaded[last], rtol=1e-3)


def test_the_first_a_is_the_leading_eigenvectors_of_all_inputs(learnt: Learnt, backbone: Path) -> None:
    """Found here row by row."""
    made = inflora(backbone)
    begin_task(made, (0,))
    rows = made.learner.tasks[0].train
    for number, (name, (a, _)) in enumerate(factors(made, made.learner.adapter).items()):
        read: list[Tensor] = []
        module = made.learner.model.linear_with_adapter(name)
        handle = module.register_forward_pre_hook(lambda _, arguments, read=read: read.append(arguments[0]))
        with torch.no_grad():
            for row in range(len(rows)):
                made.learner.features(rows.take([row]))
        handle.remove()
        x = torch.cat([each.flatten(0, -2) for each in read]).double()
        vectors = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors.flip(1)[:, :2]
        torch.testing.assert_close((a.double() @ vectors).abs(), torch.eye(2).double() / 3**0.5, rtol=0, atol=1e-4)
        torch.testing.assert_close(a, factors(made, learnt.starts[0])[name][0], rtol=0, atol=1e-6)
        assert number < 4


def test_energy_is_of_the_inputs_not_of_their_covariance(backbone: Path) -> None:
    """Of variances 4, 3, 2, 1 three hold 80 percent; of their squares two do."""
    made = inflora(backbone)
    name = made.learner.layout.names[0]
    variances = torch.tensor([4.0, 3, 2, 1] + [0] * 12, dtype=torch.float64)
    made.set_aside(name, variances.diag(), 0.8)
    torch.testing.assert_close(made.bases[name].abs(), torch.eye(WIDTH, 3, dtype=torch.float64))


def test_a_share_of_one_takes_what_has_energy_and_no_more(backbone: Path) -> None:
    made = inflora(backbone)
    name = made.learner.layout.names[0]
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q[:, :5]
    made.set_aside(name, turned @ torch.diag(torch.arange(1.0, 6).double()) @ turned.T, 1.0)
    basis = made.bases[name]
    assert basis.shape == (WIDTH, 5)
    torch.testing.assert_close(basis @ basis.T, turned @ turned.T, rtol=0, atol=1e-9)


def test_leading_directions_are_the_left_singular_vectors_of_what_is_left(backbone: Path) -> None:
    made = inflora(backbone)
    name = made.learner.layout.names[0]
    made.set_aside(name, random_moment(0), 0.7)
    basis, moment = made.bases[name], random_moment(1)
    kept = basis.shape[1]
    assert 1 <= kept <= 8
    inside, outside = basis @ basis.T @ moment, moment - basis @ basis.T @ moment
    for retained, rest, free in ((set[str](), outside, WIDTH - kept), ({name}, inside, kept)):
        made.retained = retained
        found = made.leading(name, moment)
        assert found.shape == (WIDTH, free)
        expected = torch.linalg.svd(rest).U[:, :free]
        torch.testing.assert_close((found.T @ expected).abs(), torch.eye(free).double(), rtol=0, atol=1e-6)
        at = found.abs().argmax(0)
        assert bool((found[at, torch.arange(free)] > 0).all()), "one of two signs, always the same"


def test_what_is_set_aside_holds_the_share_and_one_direction_less_does_not(backbone: Path) -> None:
    made = inflora(backbone)
    name = made.learner.layout.names[0]
    for task, share in enumerate((0.5, 0.7, 0.9, 0.99)):
        moment = random_moment(task)
        leading = made.leading(name, moment)
        before = made.free(name).shape[1]
        made.set_aside(name, moment, share)
        free = made.free(name)
        taken = before - free.shape[1]
        left = [float((leading[:, k:].T @ moment @ leading[:, k:]).trace() / moment.trace()) for k in range(before + 1)]
        assert 1 - left[taken] >= share
        assert taken == 0 or 1 - left[taken - 1] < share
        assert float((free.T @ leading[:, :taken]).abs().max() if taken else 0) < 1e-9


def test_with_more_than_half_used_up_what_is_free_is_kept_instead(backbone: Path) -> None:
    made = inflora(backbone)
    name = made.learner.layout.names[0]
    free = []
    for task in range(6):
        made.set_aside(name, random_moment(task), 0.9)
        basis = made.bases[name]
        assert basis.shape[1] <= WIDTH / 2
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-10)
        free.append(made.free(name))
        if len(free) > 1:  # never freed again
            outside = free[-1] - free[-2] @ (free[-2].T @ free[-1])
            assert outside.numel() == 0 or float(outside.abs().max()) < 1e-9
        a = made.reading(name, random_moment(20))
        inside = a @ free[-1] @ free[-1].T
        torch.testing.assert_close(a, inside, rtol=0, atol=1e-9)
    sizes = [part.shape[1] for part in free]
    assert sizes[0] >= WIDTH / 2 > sizes[-1]
    assert name in made.retained


@pytest.mark.parametrize("left", [0, 1])
def test_with_fewer_directions_free_than_the_rank_the_other_rows_read_nothing(backbone: Path, left: int) -> None:
    made = inflora(backbone)
    name = made.learner.layout.names[0]
    made.retained, made.bases[name] = {name}, torch.eye(WIDTH, left, dtype=torch.float64)
    a = made.reading(name, random_moment(3))
    assert torch.count_nonzero(a) == left
    assert float(a.abs().max()) == pytest.approx(left / math.sqrt(3))
    made.set_aside(name, random_moment(4), 1.0)
    assert made.free(name).shape == (WIDTH, 0)
    assert made.report()["free_directions"][name] == 0


TEXTS = {"text": ["good", "bad film is not very good", "red blue"], "label": ["a", "b", "a"]}
PROMPTS = {"prompt": ["good", "what colour is the very good book"], "answer": ["red", "yes no film"]}


@pytest.mark.parametrize(
    ("kind", "columns", "tokens"), [("text", TEXTS, 9), ("prompt", PROMPTS, 8 + 4 + 2)], ids=["text", "prompt"]
)
def test_padding_does_not_count_and_answers_do(
    kind: str, columns: dict[str, list[Any]], tokens: int, tmp_path: Path
) -> None:
    """Against the rows one by one, which need no padding; an answer has an end."""
    folder = (tiny.bert if kind == "text" else tiny.llama)(tmp_path)
    made = toys.method(toys.config(folder, "inflora", model={"max_length": 32}), kind=kind)
    learner, rows = made.learner, MemoryRows(columns)
    learner.tasks = (Task("t", rows, rows, ("a", "b") if kind == "text" else ()),)
    begin_task(made, (0,))
    found = moments.of_inputs(learner)
    read: dict[str, list[Tensor]] = {name: [] for name in found}
    for name, parts in read.items():
        learner.model.linear_with_adapter(name).register_forward_pre_hook(
            lambda _, arguments, parts=parts: parts.append(arguments[0][0])
        )
    with torch.no_grad():
        for row in range(len(rows)):
            learner.model.features(learner.fetch([(0, row)]).inputs)
    for name, moment in found.items():
        x = torch.cat(read[name]).double()
        assert len(x) == tokens
        torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_what_answers_is_one_adapter_beside_the_loaded_weights(learnt: Learnt) -> None:
    made = learnt.made
    rows = toys.images(2, 6, 5).take(range(6))
    with torch.no_grad():
        said = made.learner.features(rows)
        for name, (a, b) in made.factors(2).items():
            assert a.shape == (6, WIDTH)
            loaded, now = made.weights[name]
            torch.testing.assert_close(loaded + made.learner.model.scaling * b @ a, now, rtol=0, atol=1e-5)
        begin_task(made, (2,))
        torch.testing.assert_close(made.learner.features(rows), said, rtol=0, atol=1e-6)


def test_folders_of_all_tasks_hold_what_answers_after_the_last(learnt: Learnt, tmp_path: Path) -> None:
    made = learnt.made
    assert list(made.changed((2,))) == [0, 1, 2]
    export_adapter(made, 0, tmp_path)
    for name, (a, b) in load_exported(tmp_path).items():
        loaded, now = made.weights[name]
        torch.testing.assert_close(loaded + made.learner.model.scaling * b @ a, now, rtol=0, atol=1e-5)
    scale = json.loads((tmp_path / "adapter_config.json").read_text())
    assert scale["lora_alpha"] / scale["r"] == made.learner.model.scaling == 1
