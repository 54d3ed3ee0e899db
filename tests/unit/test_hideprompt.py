"""HiDe-Prompt against its invariants; those of the decomposition itself are in test_hide.py and test_hidelora.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toys
from treelora_ray.config import ConfigError
from treelora_ray.methods.hideprompt import HidePrompt
from treelora_ray.models.backbone import backbone_digest
from treelora_ray.training.loop import begin_task, end_task, train_task

SMALL: dict[str, Any] = {
    "name": "hide-prompt", "layers": [0, 1], "length": 2, "centroids": 2, "samples": 8, "fit_epochs": 3,
    "contrast": 0.1, "momentum": 0.25, "spread": 0.5,
}  # fmt: skip


def hideprompt(backbone: Path, **options: Any) -> HidePrompt:
    made = toys.ready(backbone, {**SMALL, **options}, train={"epochs": 1, "weight_decay": 0.1})
    assert isinstance(made, HidePrompt)
    return made


@dataclass
class Learnt:
    """Two tasks, and what was there in between."""

    made: HidePrompt
    trained: list[Tensor]  # by task, its prompts as its last step left them
    starts: list[Tensor]
    heads: list[Tensor]  # after the first task, and before and after the second one's end
    routes: Tensor  # when one task is known
    digests: list[str]


@pytest.fixture(scope="module")
def learnt(backbone: Path) -> Learnt:
    made = hideprompt(backbone)
    learner = made.learner
    found = Learnt(made, [], [], [], torch.empty(0), [backbone_digest(learner.model)])
    for task in (0, 1):
        begin_task(made, (task,))
        found.starts.append(learner.own_parameter.detach().clone())
        train_task(made, 0, lambda *_: None, lambda _: None)
        found.trained.append(learner.own_parameter.detach().clone())
        found.heads.append(learner.head.weight.clone())
        end_task(made)
        found.heads.append(learner.head.weight.clone())
        if task == 0:
            found.routes = made.route(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)))
    found.digests.append(backbone_digest(learner.model))
    return found


def test_prompts_are_averaged_with_those_of_earlier_tasks_and_these_stay(learnt: Learnt) -> None:
    first, second = learnt.made.prompts
    assert torch.equal(first, learnt.trained[0])
    torch.testing.assert_close(second, 0.75 * learnt.trained[1] + 0.25 * first)
    assert torch.equal(learnt.starts[1], first), "a task starts from the one before"
    assert not torch.equal(learnt.trained[1], first)


def test_the_fit_of_the_classifier_changes_the_head_alone(learnt: Learnt) -> None:
    learner = learnt.made.learner
    assert learnt.digests[0] == learnt.digests[1]
    assert torch.equal(learner.adapter, learner.anchor)
    assert torch.equal(learner.own_parameter, learnt.made.prompts[1])
    assert not torch.equal(learnt.heads[3][:2], learnt.heads[1]), "rows of all classes seen are fit"


@torch.no_grad()
def test_features_are_summarised_through_the_averaged_prompts(learnt: Learnt) -> None:
    """Summaries taken before the averaging are of prompts that never answer."""
    made = learnt.made
    assert made.decomposition is not None
    rows = made.learner.tasks[1].train.take(range(22))
    with made.answering(1):
        features = made.learner.features(rows)
    summaries = made.decomposition.trained
    for number, label in enumerate(("c0", "c1")):
        own = features[torch.tensor([found == label for found in rows["label"]])]
        torch.testing.assert_close(summaries.centres()[2 + number], own.mean(0), rtol=1e-4, atol=1e-5)
    with made.answering(0):
        assert not torch.allclose(made.learner.features(rows), features, atol=1e-3)


def test_one_task_is_always_inferred_and_two_are_told_apart(learnt: Learnt) -> None:
    assert learnt.routes.tolist() == [0] * 6
    assert [list(learnt.made.among(task)) for task in (0, 1)] == [[0, 1, 2, 3]] * 2


def test_a_fresh_start_is_drawn_for_each_task(backbone: Path) -> None:
    made = hideprompt(backbone, start="fresh", contrast=0, fit_epochs=0)
    toys.learn(made, 0)
    begin_task(made, (1,))
    started = made.learner.own_parameter.detach()
    assert not torch.equal(started, made.prompts[0])
    assert float(started.abs().max()) <= 0.5


def test_blocks_that_the_model_lacks_are_refused_and_left_out_where_none_are_named(backbone: Path) -> None:
    assert hideprompt(backbone, layers=None).layers == [0, 1]
    with pytest.raises(ConfigError, match=r"method.layers has \[2, 3, 4\], but .* has 2 blocks: 0 to 1"):
        hideprompt(backbone, layers=[0, 1, 2, 3, 4])
