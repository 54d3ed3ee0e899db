"""SD-LoRA against its formulas, and against the mistakes that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toys
from treelora_ray.config import ConfigError
from treelora_ray.methods.sdlora import SdLora
from treelora_ray.training.loop import begin_task, end_task

ROWS = toys.images(1, 8, 3).take(range(8))
# What leaves the model as it was when a finished adapter becomes a direction.
EXACT: list[dict[str, Any]] = [{}, {"alpha_scope": "module"}, {"norm": "module", "alpha_scope": "module"}]


def sdlora(backbone: Path, **options: Any) -> SdLora:
    sections = options.pop("sections", {})
    made = toys.ready(backbone, {"name": "sd-lora", **options}, **sections)
    assert isinstance(made, SdLora)
    return made


@pytest.fixture(scope="module")
def three(backbone: Path) -> SdLora:
    """After two tasks and three steps of the third."""
    made = sdlora(backbone, sections={"train": {"steps": 3, "weight_decay": 0.1}})
    toys.learn(made, 0, 1)
    return made


@torch.no_grad()
def features(made: SdLora) -> Tensor:
    return made.learner.features(ROWS)


def products(made: SdLora, adapter: Tensor) -> list[Tensor]:
    """B A of each layer."""
    return [b @ a for _, (a, b) in made.learner.layout.views(adapter)]


def mixed(made: SdLora, weights: dict[int, float]) -> Tensor:
    """An adapter that is a mixture of two directions of rank 1 each, in ranks of its own."""
    found = torch.zeros(made.learner.layout.total)
    for place, (slot, weight) in enumerate(weights.items()):
        old = dict(made.learner.layout.views(made.bank[slot]))
        for name, (a, b) in made.learner.layout.views(found):
            a[place], b[:, place] = old[name][0][0], weight * old[name][1][:, 0]
    return found


def test_directions_have_length_one_by_the_product_not_by_its_factors(backbone: Path, three: SdLora) -> None:
    for direction in three.bank.slots.values():
        assert float(sum(part.square().sum() for part in products(three, direction))) == pytest.approx(1, abs=1e-5)
    made = sdlora(backbone, norm="module", sections={"train": {"steps": 2}})
    toys.learn(made, 0)
    assert all(float(part.norm()) == pytest.approx(1, abs=1e-5) for part in products(made, made.bank[0]))


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_the_model_is_the_same_before_and_after_an_adapter_becomes_a_direction(
    backbone: Path, options: dict[str, Any]
) -> None:
    """The released code divides from the next task on and forgets the magnitude: what was scored does not go on."""
    made = sdlora(backbone, **options, sections={"train": {"steps": 2}})
    toys.learn(made, 0)
    begin_task(made, (1,))
    with torch.no_grad():
        made.learner.adapter.add_(0.05)
        made.learner.own_parameter.mul_(1.3)
    before = features(made)
    end_task(made)
    torch.testing.assert_close(features(made), before, rtol=0, atol=1e-5)
    begin_task(made, (2,))
    torch.testing.assert_close(features(made), before, rtol=0, atol=1e-5)
    assert made.now().shape == (3, len(made.learner.layout) if options.get("alpha_scope") else 1)


def test_of_one_magnitude_and_lengths_by_layer_the_nearest_model_is_kept(backbone: Path) -> None:
    made = sdlora(backbone, norm="module", sections={"train": {"steps": 2}})
    begin_task(made, (0,))
    made.learner.adapter.add_(0.05)
    wanted = [made.learner.model.scaling * part for part in products(made, made.learner.adapter)]
    end_task(made)
    found = products(made, made.bank[0])
    best = sum(float((one * other).sum()) for one, other in zip(found, wanted, strict=True)) / len(found)
    assert float(made.magnitudes) == pytest.approx(best, rel=1e-4)


def test_directions_are_frozen_and_all_magnitudes_learn(backbone: Path, three: SdLora) -> None:
    made = sdlora(backbone, sections={"train": {"steps": 3, "weight_decay": 0.1}})
    toys.learn(made, 0)
    first, far = made.bank[0], made.magnitudes.clone()
    toys.learn(made, 1)
    assert torch.equal(made.bank[0], first)
    assert torch.equal(made.bank[0], three.bank[0])
    assert float((made.magnitudes[0] - far[0]).abs()) > 1e-3
    begin_task(made, (2,))
    assert torch.equal(made.now().detach()[:2], made.magnitudes), "carried over"
    groups = made.learner.optimizer.param_groups if made.learner.optimizer else []
    (own,) = [group for group in groups if group["params"][0] is made.learner.own_parameter]
    assert own["weight_decay"] == 0


def test_magnitudes_are_reset_where_it_is_asked_for(backbone: Path) -> None:
    made = sdlora(backbone, alpha_init="reset", alpha_start=0.8, sections={"train": {"steps": 2}})
    toys.learn(made, 0)
    assert float(made.magnitudes) != pytest.approx(0.8)
    begin_task(made, (1,))
    assert made.now().tolist() == [[pytest.approx(0.8)]] * 2


def loss_and_gradient(made: SdLora) -> tuple[float, Tensor]:
    learner = made.learner
    learner.forget_gradients()
    batch = learner.fetch([(learner.unit[0], row) for row in range(6)])
    loss = learner.objective.loss(batch)[0]
    loss.backward()
    return float(loss.detach()), learner.own_parameter.grad.clone()  # type: ignore[union-attr]


def test_magnitudes_have_the_gradient_of_the_loss_also_with_checkpoints_and_half_precision(backbone: Path) -> None:
    found = {}
    for name, sections in {
        "plain": {},
        "checkpoints": {"model": {"gradient_checkpointing": True}},
        "half": {"train": {"precision": "bf16"}},
    }.items():
        made = sdlora(backbone, sections=sections)
        begin_task(made, (0,))
        made.learner.adapter.add_(torch.linspace(-0.2, 0.3, made.learner.layout.total))
        end_task(made)
        begin_task(made, (1,))
        made.learner.adapter.add_(torch.linspace(0.3, -0.2, made.learner.layout.total))
        found[name] = made
    made = found["plain"]
    _, slope = loss_and_gradient(made)
    for place in range(2):
        ends = []
        for step in (0.01, -0.01):
            made.learner.own_parameter.data[place] += step
            ends.append(loss_and_gradient(made)[0])
            made.learner.own_parameter.data[place] -= step
        assert float(slope[place]) == pytest.approx((ends[0] - ends[1]) / 0.02, rel=0.05, abs=1e-3)
    torch.testing.assert_close(loss_and_gradient(found["checkpoints"])[1], slope)
    torch.testing.assert_close(loss_and_gradient(found["half"])[1], slope, rtol=0.1, atol=0.05)


def test_without_earlier_magnitudes_it_is_plain_training(backbone: Path) -> None:
    sections: dict[str, Any] = {"train": {"steps": 3}}
    plain = toys.ready(backbone, {"name": "seqlora"}, **sections)
    made = sdlora(backbone, sections=sections)
    first = toys.learn(made, 0)
    assert not torch.equal(first[-1][:-1], toys.learn(plain, 0)[-1]), "the first task's own magnitude learns"
    start = made.own_parameters

    def frozen() -> Tensor:
        return start() * torch.tensor([[0.0], [1.0]])

    def hold(step: int, loss: float) -> None:  # noqa: ARG001
        made.learner.grad[total : total + made.learner.own_parameter.numel()] = 0

    made.own_parameters = frozen  # type: ignore[method-assign]
    made.edit_gradients = hold  # type: ignore[method-assign]
    total = made.learner.layout.total

    def same_start() -> None:
        begun = sdlora(backbone)
        begun.learner.unit = (1,)
        begun.before_task()
        plain.learner.adapter.copy_(begun.learner.adapter)

    plain.before_task = same_start  # type: ignore[method-assign]
    for one, other in zip(toys.learn(made, 1), toys.learn(plain, 1), strict=True):
        torch.testing.assert_close(one[:total], other[:total], rtol=0, atol=1e-6)
        torch.testing.assert_close(one[total + 2 :], other[total:], rtol=0, atol=1e-6)


def test_what_answers_is_the_sum_of_all_directions_and_so_is_what_is_exported(three: SdLora) -> None:
    """An evaluation class of the released code overwrites the sum with its last term."""
    said, model = features(three), three.learner.model
    with three.plain():
        loaded = features(three)
    stacked = three.factors(1)
    for number, (name, (a, b)) in enumerate(stacked.items()):
        far = three.magnitudes[:, 0]
        terms = [far[slot] * products(three, three.bank[slot])[number] for slot in (0, 1)]
        torch.testing.assert_close(model.scaling * b @ a, sum(terms), rtol=0, atol=1e-5)
        assert len(a) == 4
        linear = model.linear(name)
        linear.weight.data = linear.weight.data + model.scaling * b @ a
    with three.plain():
        folded = features(three)
        for name, (a, b) in stacked.items():
            model.linear(name).weight.data -= model.scaling * b @ a
        back = features(three)
    torch.testing.assert_close(folded, said, rtol=0, atol=1e-4)
    torch.testing.assert_close(back, loaded, rtol=0, atol=1e-5)
    assert not torch.allclose(said, loaded, atol=1e-2)


def rank_one(backbone: Path, norm: str) -> SdLora:
    """Two directions of rank 1, learnt by hand."""
    scope = "module" if norm == "module" else "task"
    made = sdlora(backbone, absorb=9e-4, norm=norm, alpha_scope=scope, rank_schedule=[[1, 1], [3, 2]])
    for task in (0, 1):
        begin_task(made, (task,))
        draw = torch.Generator().manual_seed(task)
        for _, (a, b) in made.learner.layout.views(made.learner.adapter):
            a[0], b[:, 0] = torch.randn(16, generator=draw), torch.randn(16, generator=draw)
        with torch.no_grad():
            made.learner.own_parameter[-made.places :] = 0.01 * (task + 1)
        end_task(made)
    assert sorted(made.bank.slots) == [0, 1]
    begin_task(made, (2,))
    return made


@pytest.mark.parametrize("norm", ["joint", "module"])
def test_a_mixture_of_earlier_directions_is_absorbed_with_unchanged_answers(backbone: Path, norm: str) -> None:
    """Also where the task's magnitude is not 1, with another weight for each direction."""
    made = rank_one(backbone, norm)
    made.learner.adapter.copy_(mixed(made, {0: 0.9, 1: -0.4}))
    with torch.no_grad():
        made.learner.own_parameter[-made.places :] = 0.7
    before, far = features(made), made.magnitudes.clone()
    end_task(made)
    assert sorted(made.bank.slots) == [0, 1]
    assert made.report()["absorbed"] is True
    torch.testing.assert_close(features(made), before, rtol=0, atol=1e-4)
    gained = (made.magnitudes - far) / (0.7 * made.learner.model.scaling)
    torch.testing.assert_close(gained, torch.tensor([[0.9], [-0.4]]).expand_as(gained), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["joint", "module"])
def test_another_direction_is_kept(backbone: Path, norm: str) -> None:
    made = rank_one(backbone, norm)
    made.learner.adapter.add_(torch.linspace(-1, 1, made.learner.layout.total).sin())
    end_task(made)
    assert sorted(made.bank.slots) == [0, 1, 2]
    assert 9e-4 < made.report()["left"] <= 1


def test_an_adapter_without_length_leaves_no_direction(backbone: Path) -> None:
    made = sdlora(backbone)
    begin_task(made, (0,))
    end_task(made)
    assert made.bank.slots == {}
    assert made.report()["magnitudes"] == {}
    assert all(torch.count_nonzero(b) == 0 for _, b in made.factors(0).values())


def test_ranks_of_the_schedule_alone_are_trained_and_exported(backbone: Path) -> None:
    made = sdlora(backbone, rank_schedule=[[1, 2], [2, 1]], sections={"train": {"steps": 3, "weight_decay": 0.1}})
    for theta in toys.learn(made, 0, 1)[3:]:
        for _, (a, b) in made.learner.layout.views(theta[: made.learner.layout.total]):
            assert torch.count_nonzero(a[0])
            assert torch.count_nonzero(a[1:]) == torch.count_nonzero(b[:, 1:]) == 0
    assert {len(a) for a, _ in made.factors(1).values()} == {3}
    assert made.report()["rank"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank_schedule": [[1, 4]]}, r"rank 4, adapters have rank 2: set model\.lora\.rank to 4"),
        ({"rank_schedule": [[2, 1]]}, r"the first entry is of task 1"),
        ({"rank_schedule": [[1, 2], [1, 1]]}, r"of a later task than the one before; got \[1, 1\]"),
        ({"absorb": 0.1, "alpha_init": "reset"}, r"method\.absorb.* use alpha_init carry"),
        ({"absorb": 0.1, "norm": "module"}, r"method\.absorb.* use alpha_scope module, or norm joint"),
    ],
)
def test_what_does_not_go_together_is_refused(backbone: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sdlora(backbone, **options)


class First:
    """Another worker than the first, which is told what the first has found."""

    rank, workers = 1, 2

    def __init__(self, told: Any) -> None:
        self.told = told

    def sum_(self, tensor: Tensor) -> None:
        tensor.mul_(2)

    def share(self, value: Any) -> Any:
        assert value is None, "it finds nothing itself"
        return self.told


def test_worker_0_says_what_becomes_of_an_adapter(backbone: Path) -> None:
    made = rank_one(backbone, "joint")
    made.learner.adapter.copy_(mixed(made, {0: 0.9, 1: -0.4}))
    told = made._verdict()
    assert told.weights is not None
    made.learner.comm = First(told)  # type: ignore[assignment]
    made.learner.adapter.add_(0.3)
    end_task(made)
    assert sorted(made.bank.slots) == [0, 1]
