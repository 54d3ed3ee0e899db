"""L2P against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

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
from treelora_ray.methods.l2p import L2p
from treelora_ray.methods.prompted import nearest, nearness
from treelora_ray.models.backbone import backbone_digest
from treelora_ray.models.head import log_shares
from treelora_ray.training.loop import begin_task

SMALL: dict[str, Any] = {"name": "l2p", "pool": 6, "length": 2, "top_k": 2, "spread": 0.5}
ONCE = {"train": {"epochs": 1}}


def l2p(backbone: Path, sections: Any = ONCE, **options: Any) -> L2p:
    made = toys.ready(backbone, {**SMALL, **options}, **sections)
    assert isinstance(made, L2p)
    return made


@pytest.fixture(scope="module")
def learnt(backbone: Path) -> L2p:
    """After two tasks."""
    made = l2p(backbone)
    made.learner.loaded = backbone_digest(made.learner.model)  # type: ignore[attr-defined]
    toys.learn(made, 0, 1)
    return made


def inputs(made: L2p, count: int = 8) -> Any:
    return made.learner.model.inputs(toys.images(1, count, 3).take(range(count)))


def taken(made: L2p, given: Any) -> Tensor:
    """[B, k length, d] what stands before each sample."""
    tokens = made.inserted(given).tokens
    assert tokens is not None
    return tokens


def test_only_pool_and_head_are_trained(learnt: L2p) -> None:
    learner = learnt.learner
    assert backbone_digest(learner.model) == learner.loaded  # type: ignore[attr-defined]
    assert torch.equal(learner.adapter, learner.anchor)
    assert all(torch.count_nonzero(b) == 0 for _, b in learner.model.layers.values())
    fresh = l2p(learner_backbone(learnt))
    for part, before in zip(learnt.pool(), fresh.pool(), strict=True):
        assert not torch.equal(part, before)
        assert part.shape == before.shape, "the pool is the same size whatever the number of tasks"


def learner_backbone(made: L2p) -> Path:
    return Path(made.learner.config.model.backbone)


@torch.no_grad()
def test_each_sample_takes_its_own_prompts_whoever_stands_beside_it(learnt: L2p) -> None:
    """A vote of the batch would tell it which task the batch is of."""
    given = inputs(learnt)
    query, (prompts, keys) = learnt.query(given), learnt.pool()
    chosen = F.cosine_similarity(query.unsqueeze(1), keys.unsqueeze(0), dim=-1).topk(2).indices
    keys.data[chosen[0, 0]] *= -1  # so that samples differ in what is nearest
    try:
        chosen = F.cosine_similarity(query.unsqueeze(1), keys.unsqueeze(0), dim=-1).topk(2).indices
        keys.data[chosen[0, 1]] = query[0] - query.mean(0)
        keys.data[chosen[0, 0]] = query.mean(0) - query[0]
        chosen = F.cosine_similarity(query.unsqueeze(1), keys.unsqueeze(0), dim=-1).topk(2).indices
        assert len({tuple(row) for row in chosen.tolist()}) > 1
        torch.testing.assert_close(taken(learnt, given), prompts[chosen].flatten(1, 2))
        together = learnt.learner.model.features(given)
        for place in range(8):
            alone = {name: value[place : place + 1] for name, value in given.items()}
            torch.testing.assert_close(learnt.learner.model.features(alone)[0], together[place], rtol=0, atol=1e-5)
    finally:
        learnt.learner.own_parameter.data.copy_(learnt.kept)


def gradients(made: L2p, which: str) -> tuple[Tensor, Tensor]:
    """Of the loss, or of the pull alone, for prompts and for keys."""
    made.learner.forget_gradients()
    batch = made.learner.fetch([(1, row) for row in range(8)])
    kept = made.learner.head_parameter.detach().clone()
    made.learner.head_parameter.data.mul_(1e-5)  # of a row that the head is sure of nothing flows back
    loss, said = made.learner.objective.loss(batch)
    term = made.loss_terms(batch, said)
    assert term is not None
    (loss if which == "loss" else term).backward()
    made.learner.head_parameter.data.copy_(kept)
    assert torch.count_nonzero(made.learner.adapter_grad) == 0
    own = made.learner.own_parameter.grad
    assert own is not None
    return own[: 6 * 2 * 16].view(6, -1).clone(), own[6 * 2 * 16 :].view(6, -1).clone()


def test_the_pull_reaches_keys_alone_and_only_those_that_were_taken(learnt: L2p) -> None:
    prompts, keys = gradients(learnt, "pull")
    assert torch.count_nonzero(prompts) == 0
    query, held = learnt.query(inputs_of_task(learnt)), learnt.pool()[1].detach().clone().requires_grad_()
    found = F.cosine_similarity(query.unsqueeze(1), held.unsqueeze(0), dim=-1)
    (-0.1 * found.topk(2).values.sum()).backward()
    assert held.grad is not None
    torch.testing.assert_close(keys, held.grad, rtol=1e-4, atol=1e-6)
    assert 0 < int((keys.abs().sum(1) > 0).sum()) < 6


def inputs_of_task(made: L2p) -> Any:
    return made.learner.model.inputs(made.learner.tasks[1].train.take(range(8)))


def test_the_loss_reaches_the_prompts_that_were_taken_and_no_key(learnt: L2p) -> None:
    prompts, keys = gradients(learnt, "loss")
    assert torch.count_nonzero(keys) == 0
    of_pull = gradients(learnt, "pull")[1].abs().sum(1) > 0
    assert torch.equal(prompts.abs().sum(1) > 0, of_pull)


def test_a_pool_of_one_is_prompt_tuning(backbone: Path) -> None:
    """Against a loop of its own, as anyone would write it."""
    train = {"train": {"epochs": 1, "schedule": "constant", "clip": None}}
    made = l2p(backbone, train, pool=1, top_k=1)
    begin_task(made, (0,))
    learner, net = made.learner, made.learner.model.net.base_model.model
    prompt = torch.nn.Parameter(made.pool()[0][0].detach().clone())
    head = torch.nn.Linear(16, 2)
    head.weight.data, head.bias.data = learner.head.weight.clone(), learner.head.bias.clone()
    optimizer = torch.optim.Adam([prompt, *head.parameters()], lr=0.01)
    made.prompting.now = None
    for step in range(3):
        rows = learner.tasks[0].train.take(learner.plan(epochs=1).at(step))
        hidden = net.embeddings(learner.model.inputs(rows)["pixel_values"])
        hidden = torch.cat([prompt.expand(len(hidden), -1, -1), hidden], dim=1)
        for layer in net.layers:
            hidden = layer(hidden, None)
        targets = torch.tensor([int(label[1]) for label in rows["label"]])
        optimizer.zero_grad()
        F.cross_entropy(head(net.layernorm(hidden)[:, :2].mean(1)), targets).backward()
        optimizer.step()
    other = l2p(backbone, train, pool=1, top_k=1)
    toys.learn(other, 0)
    torch.testing.assert_close(other.pool()[0][0], prompt.data, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(prompt.data, made.pool()[0][0].data, atol=1e-3)


def test_new_rows_of_the_head_start_at_means_of_what_prompts_say(backbone: Path) -> None:
    made = l2p(backbone)
    begin_task(made, (0,))
    sums = made.learner.class_sums(0)
    found = sums.means @ made.learner.head.weight.double().T + made.learner.head.bias - log_shares(sums.counts)
    assert found.argmax(1).tolist() == [0, 1]
    torch.testing.assert_close(found[0, 0] - found[0, 1], found[1, 1] - found[1, 0], rtol=1e-2, atol=1e-2)


def test_texts_are_learnt_too(tmp_path: Path) -> None:
    columns = {"text": ["good film", "a very bad book", "good book", "bad"] * 3, "label": ["+", "-"] * 6}
    made = toys.method(toys.config(tiny.bert(tmp_path), SMALL, **ONCE, model={"max_length": 16}), kind="text")
    made.learner.tasks = (Task("films", MemoryRows(columns), MemoryRows(columns), ("+", "-")),)
    before = made.tensors()["pool"].clone()
    toys.learn(made, 0)
    assert not torch.equal(made.tensors()["pool"], before)
    with torch.no_grad():
        together = made.learner.features({"text": columns["text"][:2]})
        alone = made.learner.features({"text": columns["text"][:1]})
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_what_is_equally_near_is_taken_in_order() -> None:
    keys = torch.eye(3)[[0, 1, 0, 1]]
    assert nearest(nearness(torch.tensor([[2.0, 2.0, 0.0], [0.0, 1.0, 0.0]]), keys), 2).tolist() == [[0, 1], [1, 3]]


def test_more_prompts_than_the_pool_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k is 7, but pool has 6 prompts: raise pool, or lower top_k"):
        toys.config(tmp_path, {**SMALL, "top_k": 7})
