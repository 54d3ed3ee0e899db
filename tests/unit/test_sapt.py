"""SAPT against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests import toys
from treelora_ray.api import Run
from treelora_ray.methods.sapt import Sapt, divergence, spread
from treelora_ray.tracking.export import export_task
from treelora_ray.training.errors import RunError
from treelora_ray.training.loop import begin_task
from treelora_ray.training.stream import StreamRun

HELD = {"replay": "kl", "memory": 9, "replay_batch": 4}


def sapt(backbone: Path, kind: Any = "image", **options: Any) -> Sapt:
    sections = options.pop("sections", {})
    made = toys.ready(backbone, {"name": "sapt", "hidden": 8, **options}, kind=kind, **sections)
    assert isinstance(made, Sapt)
    return made


@pytest.fixture(scope="module")
def learnt(backbone: Path) -> Sapt:
    """Three tasks, with replay."""
    made = sapt(backbone, **HELD)
    toys.learn(made, 0, 1, 2)
    return made


@pytest.fixture(scope="module")
def spoken(llama: Path) -> Sapt:
    """Two tasks of prompts."""
    made = sapt(llama, "prompt", sections={"objective": {"max_new_tokens": 4}, "train": {"lr": 0.05}})
    toys.learn(made, 0, 1)
    return made


def adapters(made: Sapt) -> list[dict[str, tuple[Tensor, ...]]]:
    return [dict(made.learner.layout.views(made.bank[task])) for task in made.bank.of_task]


def by_hand(made: Sapt, weights: Tensor) -> dict[str, Tensor]:
    """By layer the weight of one row: W + s sum_k w_k B_k A_k."""
    model, found = made.learner.model, {}
    for name in made.learner.layout.names:
        deltas = [w * one[name][1] @ one[name][0] for w, one in zip(weights, adapters(made), strict=True)]
        found[name] = model.linear(name).weight.data + model.scaling * torch.stack(deltas).sum(0)
    return found


class Weighing:
    """Within it the model has these weights and no adapters."""

    def __init__(self, made: Sapt, weights: dict[str, Tensor]) -> None:
        self.model, self.weights, self.off = made.learner.model, weights, made.learner.model.plain()

    def __enter__(self) -> None:
        self.loaded = {name: self.model.linear(name).weight.data for name in self.weights}
        for name, weight in self.weights.items():
            self.model.linear(name).weight.data = weight
        self.off.__enter__()

    def __exit__(self, *_: object) -> None:
        self.off.__exit__(None, None, None)
        for name, weight in self.loaded.items():
            self.model.linear(name).weight.data = weight


@torch.no_grad()
def test_each_row_is_answered_by_its_own_mixture_of_all_adapters(learnt: Sapt) -> None:
    rows = toys.images(1, 6, 3).take(range(6))
    found = learnt.learner.features(rows)
    weights = learnt.weights.clone()
    assert weights.shape == (6, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert float(weights.std(0).min()) > 1e-4, "rows differ in their weights"
    model = learnt.learner.model
    for row, weight in enumerate(weights):
        inputs = {name: value[row : row + 1] for name, value in model.inputs(rows).items()}
        with Weighing(learnt, by_hand(learnt, weight)):
            torch.testing.assert_close(found[row : row + 1], model.features(inputs), rtol=0, atol=1e-5)


def test_what_chooses_is_attention_of_a_small_network_over_keys(learnt: Sapt) -> None:
    """Against modules as anyone would write them."""
    inputs = learnt.learner.model.inputs(toys.images(0, 5, 3).take(range(5)))
    patches = cast(Any, learnt.learner.model.backbone).embeddings.patch_embeddings(inputs["pixel_values"])
    down, up, norm = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False), nn.LayerNorm(16)
    for module, value in zip((down, up, norm), learnt.parts(learnt.own)[:3], strict=True):
        module.weight.data = value
    norm.bias.data = learnt.parts(learnt.own)[3]
    query = norm(up(nn.functional.silu(down(patches.amax(1)))))
    expected = F.softmax(query @ learnt.keys.T / 4, dim=-1)
    torch.testing.assert_close(learnt.mixture(learnt.pooled(inputs), learnt.own).exp(), expected)


def test_one_task_is_an_ordinary_adapter_to_the_bit(backbone: Path) -> None:
    """And with more tasks, the later ones are trained, by a name that is known: adapter, key and query network."""
    made, plain = sapt(backbone), toys.ready(backbone, "seqlora")
    ours, theirs = toys.learn(made, 0), toys.learn(plain, 0)
    total, own = made.learner.layout.total, made.learner.own_parameter.numel()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(torch.cat([one[:total], one[total + own :]]), other)
    assert torch.equal(ours[0][total : total + own], ours[-1][total : total + own])
    begin_task(made, (1,))
    begun = made.learner.theta.clone()
    moved = toys.learn(made, 1)[-1] != begun
    assert all(bool(part.float().mean() > 0.9) for part in moved.split([total, own, moved.numel() - total - own]))


def test_what_earlier_tasks_have_learnt_stays(learnt: Sapt, backbone: Path) -> None:
    made = sapt(backbone, **HELD)
    toys.learn(made, 0, 1)
    for task in (0, 1):
        assert torch.equal(made.bank[task], learnt.bank[task])
        assert torch.equal(made.mixtures[task], learnt.mixtures[task])
    assert torch.equal(made.keys, learnt.keys[:2])
    assert not torch.equal(made.learnt, learnt.learnt)
    assert not torch.equal(learnt.keys[0], learnt.keys[1])


@torch.no_grad()
def test_padding_takes_no_part_in_what_is_pooled(spoken: Sapt) -> None:
    """In the released code it does: the largest values of a short text are those of its padding."""
    model = spoken.learner.model
    texts = ["is", "what colour is the very good red book"]
    together = spoken.pooled(model.inputs({"prompt": texts}))
    alone = torch.cat([spoken.pooled(model.inputs({"prompt": [text]})) for text in texts])
    assert torch.equal(together, alone)
    tokens, asks = model.embedded(model.inputs({"prompt": texts}))
    assert not torch.equal(tokens.amax(1)[0], together[0]), "padding would have made a difference"
    assert torch.equal(spoken.pooled({"input_ids": torch.zeros(1, 2).long(), "attention_mask": asks[:1, -2:]}),
                       torch.zeros(1, model.width))  # fmt: skip


@torch.no_grad()
def test_a_batch_of_one_keeps_its_shape(learnt: Sapt) -> None:
    """In the released code `squeeze` takes it away."""
    rows = toys.images(0, 1, 4).take(range(1))
    assert learnt.learner.features(rows).shape == (1, 16)
    assert learnt.weights.shape == (1, 3)
    assert learnt.learner.objective.answer(rows, [0], None)[0] in ("c0", "c1")


def test_a_language_model_chooses_by_the_prompt_alone(spoken: Sapt) -> None:
    """The answer is not there at test."""
    seen = []
    for answer in ("red", "blue film two three"):
        batch = spoken.learner.objective.batch({"prompt": ["what colour is good"], "answer": [answer]}, [0])
        spoken.learner.objective.loss(batch)
        seen.append(spoken.weights.detach().clone())
    spoken.learner.objective.answer({"prompt": ["what colour is good"]}, [0], None)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], spoken.weights)


@torch.no_grad()
def test_while_tokens_are_generated_each_row_keeps_the_weights_of_its_prompt(spoken: Sapt) -> None:
    prompts = ["is", "what colour is the very good red book", "sum of one and bad"]
    model = cast(Any, spoken.learner.model)
    seen: list[Tensor] = []
    handle = model.linear_with_adapter(spoken.learner.layout.names[0]).register_forward_hook(
        lambda *_: seen.append(spoken.weights)
    )
    together = model.generate(prompts, 4)
    handle.remove()
    assert len(seen) > 1
    assert all(torch.equal(one, seen[0]) for one in seen)
    weights, expected = seen[0], []
    for prompt, weight in zip(prompts, weights, strict=True):
        with Weighing(spoken, by_hand(spoken, weight)):
            expected += model.generate([prompt], 4)
    assert together == expected
    assert len(set(together)) > 1


@torch.no_grad()
def test_the_plain_model_is_the_frozen_one(learnt: Sapt) -> None:
    rows = toys.images(2, 4, 3).take(range(4))
    model = cast(Any, learnt.learner.model)
    mixed = learnt.learner.features(rows)
    before = learnt.weights
    plain = learnt.learner.frozen_features(rows)
    assert learnt.weights is before
    with Weighing(learnt, {name: model.linear(name).weight.data for name in model.layers}):
        torch.testing.assert_close(plain, model.features(model.inputs(rows)), rtol=0, atol=0)
    assert not torch.allclose(plain, mixed, atol=1e-3)


def slopes(made: Sapt) -> Tensor:
    learner = made.learner
    learner.forget_gradients()
    batch = learner.fetch([(1, row) for row in range(6)])
    learner.objective.loss(batch)[0].backward()
    return learner.grad.clone()


def test_gradients_are_the_same_where_blocks_are_computed_again(backbone: Path) -> None:
    found = []
    for again in (False, True):
        made = sapt(backbone, sections={"model": {"gradient_checkpointing": again}})
        toys.learn(made, 0)
        begin_task(made, (1,))
        made.learner.theta.add_(0.01)
        found.append(slopes(made))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    own = made.learner.own_parameter.grad
    assert own is not None
    assert float(own.abs().max()) > 1e-5


@torch.no_grad()
def test_weights_are_the_same_in_half_precision(learnt: Sapt) -> None:
    rows = learnt.learner.model.inputs(toys.images(2, 4, 3).take(range(4)))
    whole = learnt.learner.model.features(rows)
    weights = learnt.weights
    with learnt.learner.model.autocast("bf16"):
        half = learnt.learner.model.features(rows)
    assert torch.equal(learnt.weights, weights)
    torch.testing.assert_close(half, whole, rtol=0, atol=0.1)


def test_the_divergence_is_zero_where_the_mixture_is_what_it_was() -> None:
    then = torch.tensor([0.25, 0.75])
    scores = torch.cat([then.log(), torch.tensor([-40.0])]).requires_grad_()
    found = divergence(then, torch.log_softmax(scores, -1).unsqueeze(0))
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(scores.grad, torch.zeros(3), rtol=0, atol=1e-6)


def test_it_is_from_the_mixture_then_to_the_one_now_with_later_tasks_at_zero() -> None:
    then, scores = torch.tensor([0.9, 0.1]), torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.0, -1.0]], requires_grad=True)
    now = torch.log_softmax(scores, -1)
    found = divergence(then, now)
    expected = [sum(p * (torch.tensor(p).log() - q[k]) for k, p in enumerate([0.9, 0.1])) for q in now.detach()]
    assert float(found.detach()) == pytest.approx(float(sum(expected) / 2), rel=1e-5)
    found.backward()
    torch.testing.assert_close(scores.grad, (now.detach().exp() - torch.tensor([0.9, 0.1, 0.0])) / 2)


def test_replay_is_added_to_what_chooses_and_to_nothing_else(learnt: Sapt, backbone: Path) -> None:
    made = sapt(backbone, **{**HELD, "replay_batch": 9, "lambda": 0.7})
    toys.learn(made, 0, 1)
    begin_task(made, (2,))
    learner = made.learner
    learner.forget_gradients()
    made.edit_gradients(3, 0.0)
    own = learner.own_parameter.detach().clone().requires_grad_()
    parts = []
    for task in (0, 1):
        now = made.mixture(made.kept[task], own)
        then = F.pad(made.mixtures[task], (0, now.shape[1] - task - 1)).expand_as(now)
        parts.append(F.kl_div(now, then, reduction="batchmean"))
    (expected,) = torch.autograd.grad(0.7 * torch.stack(parts).sum(), own)
    total = learner.layout.total
    assert torch.count_nonzero(learner.grad[:total]) == 0
    assert torch.count_nonzero(learner.grad[total + own.numel() :]) == 0
    torch.testing.assert_close(learner.grad[total : total + own.numel()], expected, rtol=1e-4, atol=1e-7)
    assert made.values(0)["drift"] > 0
    assert learnt.values(0)["drift"] > 0


def test_what_is_kept_of_a_task_is_its_mean_mixture_and_pooled_tokens_of_some_rows(learnt: Sapt) -> None:
    made = learnt
    rows = made.learner.tasks[2].train
    pooled = made.pooled(made.learner.model.inputs(rows.take(range(len(rows)))))
    torch.testing.assert_close(made.mixtures[2], made.mixture(pooled, made.own).exp().mean(0).detach())
    assert [len(mixture) for mixture in made.mixtures] == [1, 2, 3]
    assert made.report() == {"mixture": [round(float(weight), 4) for weight in made.mixtures[2]]}
    assert made.kept[2].shape == (9, 16)
    near = (made.kept[2].unsqueeze(1) - pooled).abs().amax(-1).min(1)
    assert float(near.values.max()) < 1e-6
    assert len(set(near.indices.tolist())) == 9


def test_replay_holds_the_mixtures_of_earlier_tasks(backbone: Path) -> None:
    drifts = []
    for strength in (0.0, 5.0):
        made = sapt(backbone, **HELD, **{"lambda": strength})
        toys.learn(made, 0, 1)
        made.bank.of_task.pop(1)  # as while task 1 is in training
        drifts.append(float(made.drift(0, made.learner.own_parameter.detach())))
    assert drifts[1] < 0.5 * drifts[0]


def test_rows_that_come_in_parts_have_the_weight_of_their_row() -> None:
    weights = torch.tensor([[1.0], [2.0]])
    assert spread(weights, torch.zeros(6, 4, 3)).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert spread(weights, torch.zeros(2, 5, 3)).shape == (2, 1, 1)
    with pytest.raises(AssertionError, match="3 rows came to a layer for 2"):
        spread(weights, torch.zeros(3, 5, 3))


def test_a_run_has_no_folder_of_adapters_and_opens_all_the_same(tmp_path: Path, backbone: Path) -> None:
    made = sapt(backbone, sections={"train": {"epochs": 1}})
    StreamRun(made.learner.config, toys.stream(1), made, tmp_path).go()
    assert not (tmp_path / "adapters").exists()
    (tmp_path / "config.yaml").write_text(made.learner.config.to_yaml())
    run, rows = Run(tmp_path), toys.images(0, 6, 3).take(range(6))
    assert run.adapters == {}
    assert run.predict(rows).text == made.learner.objective.answer(rows, [0] * 6, None)


def test_no_adapter_is_exported_that_answers_otherwise_than_the_run(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(tasks=["t0"], address="r", config=toys.config(tmp_path, "sapt"), adapters={})
    with pytest.raises(RunError, match=r"has no adapter of t0: sapt mixes all adapters .* `treelora model`"):
        export_task(run, "t0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
