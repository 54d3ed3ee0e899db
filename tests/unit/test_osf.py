"""OSF against its formulas, against peft's, and against the mistakes that are made of it."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests import tiny, toys
from treelora_ray.config import ConfigError
from treelora_ray.methods import osf as module
from treelora_ray.methods.osf import Osf, above, block_of, singular
from treelora_ray.tracking.export import export_task
from treelora_ray.training.errors import RunError
from treelora_ray.training.loop import begin_task, end_task, train_task

BOTH = {"model": {"lora": {"targets": ["q_proj", "fc1"]}}}  # square, and [32, 16]


def osf(backbone: Path, tasks: int = 3, **options: Any) -> Osf:
    sections = options.pop("sections", {})
    made = toys.ready(backbone, {"name": "osf", **options}, tasks, **sections)
    assert isinstance(made, Osf)
    return made


def weights(made: Osf) -> dict[str, Tensor]:
    return {name: made.weight(name).clone() for name in made.learner.layout.names}


def begun(made: Osf, task: int) -> dict[str, Tensor]:
    """Begins a task; the weights by layer."""
    begin_task(made, (task,))
    return weights(made)


def train(made: Osf) -> None:
    train_task(made, 0, lambda *_: None, lambda _: None)


class Told:
    """A stream of two tasks, looked at where it matters."""

    def __init__(self, backbone: Path) -> None:
        self.made = made = osf(backbone, 2, sections={**BOTH, "train": {"weight_decay": 0.1, "lr": 0.02}})
        self.others = self.frozen_digest()
        self.loaded = begun(made, 0)
        self.rows = toys.images(0, 6, 3).take(range(6))
        self.first = made.splits
        self.plain, self.wrapped = made.learner.frozen_features(self.rows).detach(), self.features()
        train(made)
        self.before = self.features()
        end_task(made)
        self.after, self.merged = self.features(), weights(made)
        self.frozen, self.overtaken = made.frozen, made.overtaken
        begin_task(made, (1,))
        self.again, self.second = self.features(), made.splits

    def features(self) -> Tensor:
        return self.made.learner.features(self.rows).detach()

    def frozen_digest(self) -> str:
        """Of all that is not adapted."""
        digest = hashlib.sha256()
        for name, tensor in self.made.learner.model.net.state_dict().items():
            if "lora_" not in name and not any(name.endswith(f"{layer}.base_layer.weight") for layer in self.layers):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def layers(self) -> tuple[str, ...]:
        return self.made.learner.layout.names


@pytest.fixture(scope="module")
def told(backbone: Path) -> Told:
    return Told(backbone)


def test_at_the_start_of_a_task_answers_are_unchanged(told: Told) -> None:
    torch.testing.assert_close(told.wrapped, told.plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(told.again, told.after, rtol=0, atol=1e-6)
    for name, split in told.first.items():
        (hu, hs, hv), (u, s, v) = split.high, split.low
        torch.testing.assert_close((hu * hs) @ hv + (u * s) @ v, told.loaded[name], rtol=0, atol=1e-5)
        assert float(hs.min()) >= float(s.max())


def test_what_is_frozen_stays_whatever_the_optimizer_does(told: Told) -> None:
    moved = 0.0
    for name, split in told.first.items():
        u, s, v = split.high
        now = told.merged[name]
        torch.testing.assert_close(u.T @ now, s.unsqueeze(1) * v, rtol=0, atol=1e-5)
        torch.testing.assert_close(now @ v.T, u * s, rtol=0, atol=1e-5)
        moved = max(moved, float((now - told.loaded[name]).abs().max()))
    assert moved > 1e-2


def test_the_merged_weights_answer_as_the_factors_did(told: Told) -> None:
    """And the task is not thrown away, as peft's `unload` would."""
    torch.testing.assert_close(told.after, told.before, rtol=0, atol=1e-5)
    assert not torch.allclose(told.after, told.plain, atol=1e-2)


def test_nothing_but_the_adapted_weights_changes_and_the_loaded_ones_come_back(told: Told) -> None:
    assert told.frozen_digest() == told.others
    with told.made.plain():
        assert all(torch.equal(weight, told.loaded[name]) for name, weight in weights(told.made).items())
        again = told.made.learner.features(told.rows).detach()
    torch.testing.assert_close(again, told.plain, rtol=0, atol=0)
    assert torch.equal(told.made.learner.adapter, told.made.learner.anchor)


def test_directions_once_frozen_lie_in_what_is_frozen_next(told: Told) -> None:
    ranks = [len(split.high[1]) for split in told.second.values()]
    least = [k + more for k, more in zip(told.frozen, told.overtaken, strict=True)]
    assert all(k >= wanted for k, wanted in zip(ranks, least, strict=True))
    for name, split in told.first.items():
        u, _, v = split.high
        next_u, _, next_v = told.second[name].high
        torch.testing.assert_close(next_u @ (next_u.T @ u), u, rtol=0, atol=1e-4)
        torch.testing.assert_close((v @ next_v.T) @ next_v, v, rtol=0, atol=1e-4)


def test_learned_directions_that_have_grown_above_frozen_ones_are_counted(backbone: Path) -> None:
    frozen = torch.tensor([5.0, 3.0])
    u, v = torch.linalg.qr(torch.randn(6, 3))[0], torch.linalg.qr(torch.randn(4, 3))[0].T
    assert above(frozen, (u, torch.tensor([4.0, 3.1, 2.9]), v)) == 2
    assert above(frozen, (u[:, :0], torch.zeros(0), v[:0])) == 0
    found = []
    for keeps in (True, False):
        made = osf(backbone, 2, keep_frozen=keeps, first=0.25, last=0.25)
        before = begun(made, 0)
        for split, (_, s, _) in zip(
            made.splits.values(), made.views(made.learner.own_parameter.data).values(), strict=True
        ):
            s[0] = 2 * split.high[1][0]  # learned: a direction larger than all that are frozen
        made.after_task()
        assert made.overtaken == [1] * len(before)
        begin_task(made, (1,))
        found.append([len(split.high[1]) for split in made.splits.values()])
    assert found == [[5] * 4, [4] * 4]


def test_without_retraction_the_optimizer_leaves_what_the_gradient_keeps_to(backbone: Path) -> None:
    """The gradient is projected; AdamW's step is not along it."""
    leaks = []
    for retract in (True, False):
        made = osf(backbone, retract=retract)
        before = begun(made, 0)
        train(made)
        made.after_task()
        leaks.append(max(float((split.high[0].T @ (made.weight(name) - before[name])).abs().max()) for name, split in
                         first_splits(made, before).items()))  # fmt: skip
    assert leaks[0] < 1e-5
    assert leaks[1] > 1e-3


def first_splits(made: Osf, before: dict[str, Tensor]) -> dict[str, module.Split]:
    found = {}
    for (name, weight), k in zip(before.items(), made.frozen, strict=True):
        u, s, v = singular(weight)
        found[name] = module.Split((u[:, :k], s[:k], v[:k]), (u[:, k:], s[k:], v[k:]))
    return found


def test_gradients_have_nothing_along_what_is_frozen(backbone: Path) -> None:
    made = osf(backbone, sections=BOTH)
    begin_task(made, (0,))
    learner = made.learner
    learner.forget_gradients()
    learner.objective.loss(learner.fetch([(0, row) for row in range(8)]))[0].backward()
    grad = learner.own_parameter.grad
    assert grad is not None
    raw = {name: [part.clone() for part in parts] for name, parts in made.views(grad).items()}
    made.edit_gradients(0, 0.0)
    for name, (u, s, v) in made.views(grad).items():
        high_u, _, high_v = made.splits[name].high
        assert float((high_u.T @ raw[name][0]).abs().max()) > 1e-4
        assert float((high_u.T @ u).abs().max()) < 1e-6
        assert float((v @ high_v.T).abs().max()) < 1e-6
        assert torch.equal(s, raw[name][1])
    once = grad.clone()
    made.edit_gradients(0, 0.0)
    torch.testing.assert_close(grad, once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (12, 6), (6, 12)])
def test_a_step_is_that_of_peft(shape: tuple[int, int], backbone: Path) -> None:
    """Forward, gradients and merged weight of one layer, square, tall and wide."""
    import peft

    torch.manual_seed(3)
    base, k = nn.Linear(shape[1], shape[0]), 3
    weight, x, above_it = base.weight.data.clone(), torch.randn(5, shape[1]), torch.randn(5, shape[0])
    theirs: Any = peft.get_peft_model(
        cast(Any, nn.Sequential(base)), cast(Any, peft).OSFConfig(target_modules=["0"], effective_rank=k)
    )
    layer = theirs.base_model.model[0]
    parameters = [layer.osf_svd_params["default"][name] for name in ("U_low", "S_low", "V_low")]
    begun_with = tuple(part.detach().clone() for part in parameters)
    with torch.no_grad():
        for part in parameters:
            part.add_(0.1)
    said = theirs(x)
    (said * above_it).sum().backward()

    made = osf(backbone)
    u, s, v = singular(weight)
    made.splits = {"one": module.Split((u[:, :k], s[:k], v[:k]), cast(Any, begun_with))}
    flat = torch.cat([part.detach().reshape(-1) for part in parameters])
    made.learner.parameters["own"] = nn.Parameter(flat)
    own = made.learner.own_parameter
    own.grad = torch.zeros_like(own)
    ours = made._add("one", None, (x,), nn.functional.linear(x, weight, base.bias))
    torch.testing.assert_close(ours, said, rtol=1e-5, atol=1e-5)
    (ours * above_it).sum().backward()
    made.edit_gradients(0, 0.0)
    for mine, part in zip(made.views(own.grad)["one"], parameters, strict=True):
        torch.testing.assert_close(mine, part.grad, rtol=1e-4, atol=1e-5)
    (u1, s1, v1), (u0, s0, v0) = made.views(own.detach())["one"], made.splits["one"].low
    merged = theirs.merge_and_unload(safe_merge=True)[0].weight.data
    torch.testing.assert_close(weight + (u1 * s1) @ v1 - (u0 * s0) @ v0, merged, rtol=1e-5, atol=1e-5)


def test_what_is_frozen_altogether_does_not_change_a_bit(backbone: Path) -> None:
    made = osf(backbone, first=1.0, last=1.0)
    before = begun(made, 0)
    train(made)
    end_task(made)
    assert made.learner.own_parameter.numel() == 0
    assert all(torch.equal(made.weight(name), weight) for name, weight in before.items())


def test_the_linear_schedule_goes_from_the_first_share_to_the_last(backbone: Path) -> None:
    made, found = osf(backbone, 3, first=0.25, last=0.75), []
    for made.done in range(3):
        found.append(made.plan())
    assert found == [[4] * 4, [8] * 4, [12] * 4]
    assert osf(backbone, 1, first=0.25).plan() == [4] * 4
    assert osf(backbone, 2, first=0.01).plan() == [1] * 4, "never nothing"
    made.least = [13, 1, 1, 99]
    assert made.plan() == [13, 12, 12, 16]


def test_the_adaptive_schedule_freezes_by_how_like_a_blocks_output_is_to_its_input(backbone: Path) -> None:
    made = osf(backbone, schedule="adaptive", sample=9)
    begin_task(made, (0,))
    alike = made.likeness()
    assert sum(alike) / len(alike) == pytest.approx(1)
    backbone_, rows = cast(Any, made.learner.model.backbone), made._sampled()
    assert [len(part["image"]) for part in rows] == [9]
    with torch.no_grad():
        hidden = backbone_(**made.learner.model.inputs(rows[0]), output_hidden_states=True).hidden_states
    means = [float(nn.functional.cosine_similarity(*pair, dim=-1).mean()) for pair in pairwise(hidden)]
    expected = {str(block): mean / (sum(means) / len(means)) for block, mean in enumerate(means)}
    assert expected["0"] != pytest.approx(expected["1"], rel=1e-4)
    for name, value in zip(made.learner.layout.names, alike, strict=True):
        assert value == pytest.approx(expected[block_of(name).split(".")[-1]], rel=1e-4)
    wanted = [round(16 * min(max(0.1 + 0.7 * value, 0.1), 0.95)) for value in alike]
    assert [len(split.high[1]) for split in made.splits.values()] == wanted


def test_layers_outside_of_blocks_have_no_adaptive_schedule() -> None:
    assert block_of("encoder.layer.11.attention.query") == "encoder.layer.11"
    assert block_of("stages.0.blocks.3.mlp.fc1") == "stages.0.blocks.3"
    with pytest.raises(ConfigError, match="query lies in none: use linear"):
        block_of("attention.query")


def test_weights_that_are_stored_the_other_way_round_are_trained_and_merged_as_others(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    words = tiny.tokenizer(tmp_path)
    sizes: dict[str, Any] = {"vocab_size": len(words), "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2)).save_pretrained(tmp_path)
    made = toys.ready(tmp_path, "osf", 1, "prompt", train={"lr": 0.05, "epochs": 1})
    assert isinstance(made, Osf)
    before = begun(made, 0)
    assert [weight.shape for weight in before.values()] == [(48, 16)]
    train(made)
    (split,) = made.splits.values()
    rows = made.learner.tasks[0].test.take(range(2))
    seen = made.learner.features(rows).detach()
    end_task(made)
    torch.testing.assert_close(made.learner.features(rows).detach(), seen, rtol=0, atol=1e-5)
    u, s, v = split.high
    for name, weight in weights(made).items():
        torch.testing.assert_close(u.T @ weight, s.unsqueeze(1) * v, rtol=0, atol=1e-5)
        assert float((weight - before[name]).abs().max()) > 1e-3


def test_gradients_are_the_same_where_blocks_are_computed_again(backbone: Path) -> None:
    found = []
    for again in (False, True):
        made = osf(backbone, sections={"model": {"gradient_checkpointing": again}})
        begin_task(made, (0,))
        learner = made.learner
        for part in ([(0, 0), (0, 1)], [(0, 2)]):  # gradients of parts add up in the buffer
            learner.objective.loss(learner.fetch(part))[0].backward()
        found.append(learner.grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert float(found[0][learner.layout.total :].abs().min()) > 0


def test_factors_do_not_decay(told: Told) -> None:
    """It would erase the pretrained tail."""
    optimizer = told.made.learner.start_optimizer()
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert told.made.learner.config.train.weight_decay == 0.1
    assert decays == [0.0, 0.0]


def test_a_fresh_process_goes_on_with_the_weights_and_what_was_frozen(told: Told, backbone: Path) -> None:
    made = osf(backbone, 2, sections={**BOTH, "train": {"weight_decay": 0.1, "lr": 0.02}})
    made.learner.unit = (1,)
    made.load(told.made.tensors(), told.made.to_json())
    assert all(torch.equal(weight, told.merged[name]) for name, weight in weights(made).items())
    own = made.own_parameters()
    assert torch.equal(own, told.made.learner.own_parameter.detach())


def test_the_change_of_the_weights_is_there_in_full_rank(told: Told) -> None:
    for name, (a, b) in told.made.factors(0).items():
        change = told.made.learner.model.scaling * b @ a
        torch.testing.assert_close(change, told.merged[name] - told.loaded[name], rtol=0, atol=1e-6)


def test_no_adapter_is_exported_that_answers_otherwise_than_the_run(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(tasks=["t0"], address="r", config=toys.config(tmp_path, "osf"), adapters={})
    with pytest.raises(RunError, match=r"has no adapter of t0: osf rewrites .* `treelora model`"):
        export_task(run, "t0", tmp_path / "out")
