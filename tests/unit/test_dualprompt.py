"""DualPrompt against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests import toys
from treelora_ray.config import ConfigError
from treelora_ray.methods.dualprompt import DualPrompt
from treelora_ray.training.evaluate import Evaluator
from treelora_ray.training.loop import begin_task

SMALL: dict[str, Any] = {
    "name": "dualprompt", "g_layers": [0], "g_length": 2, "e_layers": [1], "e_length": 3, "spread": 0.5,
}  # fmt: skip


def dualprompt(backbone: Path, **options: Any) -> DualPrompt:
    made = toys.ready(backbone, {**SMALL, **options}, train={"epochs": 1})
    assert isinstance(made, DualPrompt)
    return made


@pytest.fixture(scope="module")
def learnt(backbone: Path) -> DualPrompt:
    """After two tasks, with what they left after the first."""
    made = dualprompt(backbone)
    toys.learn(made, 0)
    made.first = made.shared.clone(), made.experts[0].clone(), made.keys[0].clone()  # type: ignore[attr-defined]
    toys.learn(made, 1)
    return made


def heads(rows: Tensor) -> Tensor:
    """[n, 16] as the attention has them: [2, n, 8]."""
    return rows.view(len(rows), 2, 8).transpose(0, 1)


@torch.no_grad()
def test_at_every_place_of_a_batch_the_prefixes_are_those_that_are_stored(
    learnt: DualPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reshape that mixes layers, batch and keys with values gives half a batch keys as values."""
    seen: list[tuple[Tensor, Tensor]] = []
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((key, value))
        return real(query, key, value, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    for task in (0, 1):
        seen.clear()
        with learnt.answering(task):
            learnt.learner.features(toys.images(0, 5, 3).take(range(5)))
        for found, prompt in zip(seen, (learnt.shared[0], learnt.experts[task][0]), strict=True):
            for part, stored in zip(found, prompt, strict=True):
                assert part.shape == (5, 2, len(stored) + 5, 8)
                for sample in part:
                    assert torch.equal(sample[:, : len(stored)], heads(stored))


def test_what_earlier_tasks_have_learnt_stays_and_the_common_prompt_goes_on(learnt: DualPrompt) -> None:
    shared, expert, key = learnt.first  # type: ignore[attr-defined]
    assert torch.equal(learnt.experts[0], expert)
    assert torch.equal(learnt.keys[0], key)
    assert not torch.equal(learnt.shared, shared)
    assert not torch.equal(learnt.experts[1], expert)
    assert torch.equal(learnt.learner.adapter, learnt.learner.anchor)


def test_a_task_trains_its_own_prompt_alone_however_many_there_are(learnt: DualPrompt, backbone: Path) -> None:
    """A pool with fewer prompts than tasks would silently train the nearest ones."""
    made = dualprompt(backbone)
    toys.learn(made, 0, 1)
    begin_task(made, (2,))
    found = made.inserted(made.learner.model.inputs(made.learner.tasks[2].train.take(range(4))))
    assert found.prefixes.keys() == {0, 1}
    for part, own in zip(found.prefixes[1], made.parts()[1][0], strict=True):
        assert torch.equal(part[0], own)
        assert not any(torch.equal(part[0], expert[0][0]) for expert in made.experts)
    assert len(made.experts) == len(made.keys) == 2
    assert torch.equal(made.experts[1], learnt.experts[1])


def test_the_nearest_key_of_a_task_seen_answers_and_all_classes_seen_compete(learnt: DualPrompt) -> None:
    keys = torch.stack(learnt.keys)
    assert len(keys) == len(learnt.learner.infos) == 2, "there is no key of a task to come"
    assert learnt.route(3 * keys.flip(0)).tolist() == [1, 0]
    assert learnt.route(torch.ones(1, 16) - 5 * keys[1:]).tolist() == [0]
    assert [list(learnt.among(task)) for task in (0, 1)] == [[0, 1, 2, 3]] * 2
    rows = learnt.learner.tasks[1].test
    evaluator = Evaluator(learnt)
    with learnt.answering(0):
        own = learnt.learner.features(rows.take(range(12)))
    said = evaluator.answer(rows, evaluator.routes(rows, 0)).row
    expected = (own @ learnt.learner.head.weight.T + learnt.learner.head.bias).argmax(1)
    assert said is not None
    assert said.tolist() == expected.tolist()


def gradients(made: DualPrompt, which: str) -> list[Tensor]:
    """Of the loss, or of the pull alone: for G, E and the key."""
    made.learner.forget_gradients()
    batch = made.learner.fetch([(1, row) for row in range(8)])
    loss, said = made.learner.objective.loss(batch)
    term = made.loss_terms(batch, said)
    assert term is not None
    (loss if which == "loss" else term).backward()
    own = made.learner.own_parameter.grad
    assert own is not None
    return [part.clone() for part in own.split([2 * 2 * 16, 2 * 3 * 16, 16])]


def test_the_pull_reaches_the_key_alone_and_the_loss_all_but_the_key(learnt: DualPrompt) -> None:
    shared, expert, key = gradients(learnt, "loss")
    assert torch.count_nonzero(shared)
    assert torch.count_nonzero(expert)
    assert torch.count_nonzero(key) == 0
    shared, expert, key = gradients(learnt, "pull")
    assert torch.count_nonzero(shared) == torch.count_nonzero(expert) == 0
    query = learnt.query(learnt.learner.model.inputs(learnt.learner.tasks[1].train.take(range(8))))
    held = learnt.parts()[2].detach().clone().requires_grad_()
    (-0.1 * F.cosine_similarity(query, held.unsqueeze(0)).sum()).backward()
    torch.testing.assert_close(key, held.grad, rtol=1e-4, atol=1e-6)


def test_a_key_starts_at_its_tasks_features_or_is_drawn(backbone: Path) -> None:
    for start in ("mean", "drawn"):
        made = dualprompt(backbone, key_start=start)
        begin_task(made, (0,))
        assert torch.equal(made.parts()[2], made.learner.means[0].mean(0)) == (start == "mean")


def test_without_strength_no_query_is_asked_for(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dualprompt(backbone, beta=0)
    monkeypatch.setattr(made, "query", lambda _: pytest.fail("a forward for nothing"))
    toys.learn(made, 0)
    torch.testing.assert_close(made.keys[0], made.learner.means[0].mean(0))


@pytest.mark.parametrize("name", ["g_layers", "e_layers"])
def test_blocks_that_the_model_lacks_are_refused(name: str, backbone: Path) -> None:
    other = {"g_layers": [0], "e_layers": [1]} | {name: [3, 4]}
    with pytest.raises(ConfigError, match=rf"method.{name} has \[3, 4\], but .* has 2 blocks: 0 to 1"):
        dualprompt(backbone, **other)


def test_left_out_blocks_are_those_of_the_usual_ones_that_the_model_has(backbone: Path) -> None:
    with pytest.raises(ConfigError, match=r"e_layers is left out, and is \[2, 3, 4\] then, but .* has 2 blocks"):
        dualprompt(backbone, e_layers=None)
    made = dualprompt(backbone)
    assert made.blocks("e_layers", None, (1, 2)) == [1]


def test_a_block_with_two_prompts_is_refused(backbone: Path) -> None:
    with pytest.raises(ConfigError, match=r"g_layers \[0, 1\] and e_layers \[1\] name a block twice"):
        dualprompt(backbone, g_layers=[0, 1])
