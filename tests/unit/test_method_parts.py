"""What holds for methods as such: what they say of themselves, which streams they take, what they have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny, toys
from treelora_ray.config import ConfigError, Options, from_mapping
from treelora_ray.methods import memory, whole
from treelora_ray.methods.base import Method, register
from treelora_ray.methods.catalogue import METHODS
from treelora_ray.methods.gradients import mean_gradient, of_each
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import METHOD_OPTIONS
from treelora_ray.objectives.base import AnchorHead, Batch
from treelora_ray.training.loop import begin_task, steps_of


class SpeechlessOptions(Options):
    """For this test."""


@pytest.fixture
def speechless() -> Iterator[None]:
    """A method for classification alone."""

    @register("speechless", SpeechlessOptions)
    class Speechless(Method):
        objectives = ("classification",)

    yield
    METHODS.pop("speechless")
    METHOD_OPTIONS.pop("speechless")


@pytest.mark.usefixtures("speechless")
def test_a_stream_that_a_method_cannot_learn_is_refused(tmp_path: Path) -> None:
    says = "method.name 'speechless' learns classification only, not causal-lm: use one of .*seqlora"
    with pytest.raises(ConfigError, match=says):
        toys.ready(tiny.llama(tmp_path), "speechless", kind="prompt")
    with pytest.raises(ConfigError, match=says):
        from_mapping({"method": {"name": "speechless"}, "objective": {"kind": "causal-lm"}})
    from_mapping({"method": {"name": "speechless"}, "objective": {"kind": "classification"}})


@pytest.mark.parametrize("given", [(), ("clasification",), "classification"])
def test_objectives_that_there_are_not_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"Wrong.objectives is .*: name one or more of .*causal-lm"):

        class Wrong(Method):
            objectives = given


def test_every_method_says_what_it_learns_keeps_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    from treelora_ray.cli import main

    with pytest.raises(SystemExit) as done:
        main(["methods"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    table, options = shown.split("└")
    for name, method in METHODS.items():
        assert name in table
        assert name + ":" in options
        assert set(method.objectives) <= {"classification", "causal-lm"}
        assert method.objectives
        assert method.keeps
        assert method.step_cost
        assert method.reduces
    said = {name: (method.keeps, method.step_cost) for name, method in METHODS.items()}
    assert len(set(said.values())) == len(said), "two methods say the same of themselves"


@pytest.mark.parametrize("scope", ["current", "seen"])
def test_the_whole_vector_holds_adapter_and_head_whatever_rows_compete(backbone: Path, scope: str) -> None:
    made = toys.ready(backbone, "seqlora", objective={"ce_scope": scope})
    toys.learn(made, 0)
    first = whole.values(made.learner)
    begin_task(made, (1,))
    learner = made.learner
    places = whole.places(learner)
    assert len(places.unique()) == len(learner.theta)
    assert torch.equal(whole.values(learner)[: len(first)], first)
    kept = whole.spread(learner, learner.theta)
    assert torch.equal(whole.trained(learner, kept), learner.theta)
    for number, row in enumerate(learner.rows):
        width, start = learner.model.width, learner.layout.total + row * (learner.model.width + 1)
        head = learner.theta[learner.layout.total :]
        assert torch.equal(kept[start : start + width], head[number * width : (number + 1) * width])
        assert kept[start + width] == head[len(learner.rows) * width + number]


def test_gradients_aside_leave_the_gradient_of_the_step_alone_and_are_means_of_those_of_rows(backbone: Path) -> None:
    made = toys.ready(backbone, "seqlora", train={"micro_batch": 3})
    begin_task(made, (0,))
    learner, refs = made.learner, [(0, row) for row in (4, 1, 7, 2, 9)]
    learner.buffer.fill_(0.5)
    mean = mean_gradient(learner, refs)
    rows = [gradient.clone() for _, gradient in of_each(learner, refs, lambda _, batch, said: loss(batch, said))]
    assert torch.equal(learner.buffer, torch.full_like(learner.buffer, 0.5))
    torch.testing.assert_close(mean, torch.stack(rows).mean(0), rtol=1e-4, atol=1e-7)


def loss(batch: Batch, said: Any) -> Tensor:
    assert batch.targets is not None
    return torch.nn.functional.cross_entropy(said["logits"], batch.targets)


@given(count=st.integers(1, 60), wanted=st.integers(1, 70), step=st.integers(0, 40))
def test_rows_are_drawn_without_repeats(count: int, wanted: int, step: int) -> None:
    drawn = memory.draw(count, wanted, f"key/{step}")
    assert len(set(drawn)) == len(drawn) == min(count, wanted)
    assert set(drawn) <= set(range(count))


def test_rows_are_drawn_evenly() -> None:
    times = torch.zeros(20)
    for seed in range(2000):
        times[memory.draw(20, 5, f"{seed}/key")] += 1
    spread = (2000 * 0.25 * 0.75) ** 0.5
    assert float((times - 500).abs().max()) < 4 * spread


@pytest.mark.parametrize(
    ("options", "objective", "weighed"),
    [
        ("seqlora", {}, False),
        ("treelora", {}, False),
        ("seqlora", {"ce_scope": "seen"}, True),
        ("seqlora", {"routing": "last"}, True),
        ("joint", {}, False),
        ("joint", {"routing": "last"}, True),
        ({"name": "joint", "classes": "all"}, {}, True),
        ("l2p", {}, True),
        ({"name": "dualprompt", "g_layers": [0], "e_layers": [1]}, {}, True),
        ("sapt", {}, True),
        ("hide-lora", {}, True),
        ({"name": "treelora", "decomposition": "hide"}, {}, True),
    ],
)
def test_the_head_has_one_origin_where_classes_of_different_tasks_are_weighed(
    backbone: Path, options: Any, objective: dict[str, str], weighed: bool
) -> None:
    method = toys.ready(backbone, options, objective=objective)
    assert method.learner.head.common == weighed


@pytest.mark.parametrize(
    ("options", "objective", "apart"),
    [
        ({}, {}, True),
        ({}, {"routing": "oracle"}, True),
        ({}, {"routing": "last"}, False),
        ({}, {"ce_scope": "seen"}, False),
        ({"classes": "all"}, {}, False),
        ({"classes": "own"}, {"routing": "last"}, True),
    ],
)
def test_joint_weighs_in_training_the_classes_that_are_weighed_for_an_answer(
    backbone: Path, options: dict[str, str], objective: dict[str, str], apart: bool
) -> None:
    method = toys.ready(backbone, {"name": "joint", **options}, objective=objective)
    begin_task(method, (0, 1, 2))
    learner = method.learner
    _, said = learner.objective.loss(batch := learner.fetch([(0, 0), (2, 1)]))
    chances = said["logits"].softmax(-1) if batch.allowed is None else None
    if apart:
        assert batch.allowed is not None
        assert [row.nonzero().flatten().tolist() for row in batch.allowed] == [[0, 1], [4, 5]]
    else:
        assert chances is not None
        assert (chances > 0).all()
        assert chances.shape == (2, 6)


def begun(backbone: Path) -> Learner:
    made = toys.ready(backbone, "seqlora")
    begin_task(made, (0,))
    return made.learner


def test_that_a_class_is_rare_is_no_part_of_a_gradient_at_the_anchor(backbone: Path) -> None:
    """Rows that look alike lie equally far from both classes: all there is to learn is how often each class is."""
    learner = begun(backbone)
    batch = learner.fetch([(0, 0)] * 8)
    batch = replace(batch, targets=torch.tensor([0] * 7 + [1]))
    (feature, *_) = learner.model.features(batch.inputs).detach()
    aside = torch.linalg.qr(torch.stack([feature, torch.arange(len(feature)) % 3.0], 1))[0][:, 1]
    means = torch.stack([feature + aside, feature - aside])
    norms = []
    for shares in ([7 / 8, 1 / 8], [1 / 2, 1 / 2]):
        learner.forget_gradients()
        learner.objective.anchor_loss(batch, AnchorHead(means, torch.tensor(shares).log())).backward()
        norms.append(float(learner.adapter_grad.norm()))
    assert norms[0] < 1e-4 * norms[1]


def test_the_anchor_knows_how_often_classes_are_in_the_order_in_which_they_compete(backbone: Path) -> None:
    learner = begun(backbone)
    head, task = learner.anchor_head(), learner.tasks[0]
    assert head is not None
    assert head.log_shares.exp().sum() == pytest.approx(1)
    labels = task.train.take(range(len(task.train)))["label"]
    for row, label in zip(learner.head.rows[0], task.labels, strict=True):
        place = learner.rows.index(row)
        share = (list(labels).count(label) + 1) / (len(labels) + len(task.labels))
        assert float(head.log_shares[place].exp()) == pytest.approx(share)
        assert torch.equal(head.means[place], learner.means[0][task.labels.index(label)])


def test_tasks_at_once_take_as_many_steps_as_one_by_one(backbone: Path) -> None:
    for train, each in (({"steps": 3, "epochs": 1}, 3), ({"epochs": 2}, 6)):
        made = toys.ready(backbone, "joint", train=train)
        learner = made.learner
        assert [steps_of(learner, (task,)) for task in range(3)] == [each] * 3
        whole = steps_of(learner, (0, 1, 2))
        assert whole == 9 if "steps" in train else 3 * each - 3 <= whole <= 3 * each  # fewer batches are cut short
