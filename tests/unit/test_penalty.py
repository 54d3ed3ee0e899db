from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treelora_ray.core.errors import SettingError
from treelora_ray.core.layout import Layout
from treelora_ray.core.penalty import EPS, AdapterPull, DirectionPull, InnerPull, Strength
from treelora_ray.core.signature import directions, layer_distances
from treelora_ray.core.store import SignatureStore

RAGGED = Layout.of_sizes([4, 2, 4, 3])
L = len(RAGGED)
LAYERS = range(L)
check = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 9999)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(flat: Tensor, i: int) -> Tensor:
    return RAGGED.segment(flat, i)


def some(seed: int) -> Tensor:
    """[L] a random choice of layers."""
    return random(L, seed=seed + 1) > 0


class Recorder(TorchDispatchMode):
    """What the operations inside it read back to the host, and the bytes they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.syncs: list[str] = []
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in before}
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known]
        self.allocated += sum(t.untyped_storage().nbytes() for t in new)
        self.ops.append(str(func))
        reads = any(word in str(func) for word in ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select"))
        by_mask = "index" in str(func) and any(t.dtype == torch.bool for t in before[1:])
        if reads or by_mask:
            self.syncs.append(str(func))
        return out


# -- the strength


@pytest.mark.parametrize("steps", [1, 4])
def test_the_ramp_starts_at_zero_in_every_epoch_and_grows_evenly(steps: int) -> None:
    strength = Strength(0.5, "epoch", steps)
    expected = [0.5 * t / steps for t in range(steps)]
    assert [strength.at(step) for step in range(3 * steps)] == expected * 3
    assert strength.at(0) == 0.0


def test_a_constant_strength_is_constant() -> None:
    assert {Strength(0.5).at(step) for step in range(9)} == {0.5}
    assert Strength(0).at(3) == 0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"value": -0.1}, "lambda must be a number from 0 up, got -0.1"),
        ({"value": float("nan")}, "got nan"),
        ({"value": float("inf")}, "got inf"),
        ({"value": 1, "ramp": "linear"}, "ramp 'linear' is unknown; known: constant, epoch"),
        ({"value": 1, "ramp": "epoch"}, "ramp 'epoch' needs steps_per_epoch"),
    ],
)
def test_a_strength_that_makes_no_sense_is_refused(settings_: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Strength(**settings_)


# -- AdapterPull


def adapter_penalty(theta: Tensor, target: Tensor, strength: float, related: Tensor) -> Tensor:
    """As the specification writes it."""
    parts = [
        (layer(theta, i) - layer(target, i)).abs().sum() / (layer(target, i).abs().sum() + EPS)
        for i in LAYERS
        if related[i] and layer(target, i).any()
    ]
    return strength / L * sum(parts, theta.sum() * 0)


@check
@given(seeds, st.booleans(), st.booleans())
def test_adapter_pull_adds_the_gradient_that_autograd_finds(seed: int, zero: bool, choose: bool) -> None:
    theta, target, grad = random(3, RAGGED.total, seed=seed)
    theta[::3] = target[::3]  # where they meet, the subgradient is 0
    if zero:
        layer(target, 2).zero_()
    related = some(seed) if choose else torch.ones(L, dtype=torch.bool)
    theta.requires_grad_()
    value = adapter_penalty(theta, target, 0.3, related)
    (expected,) = torch.autograd.grad(value, theta)
    pull = AdapterPull(RAGGED)
    pull.aim(target, related if choose else None)
    found = grad.clone()
    pull.add_(found, theta.detach(), 0.3)
    torch.testing.assert_close(found, grad + expected)
    torch.testing.assert_close(pull.value(theta.detach(), 0.3), value.detach())


def test_aiming_anew_forgets_the_old_aim() -> None:
    theta, one, other = random(3, RAGGED.total)
    pull, fresh = AdapterPull(RAGGED), AdapterPull(RAGGED)
    pull.aim(one, torch.tensor([True, False, False, True]))
    for each in (pull, fresh):
        each.aim(other)
    assert torch.equal(pull.value(theta, 1.0), fresh.value(theta, 1.0))
    other.zero_()  # the target is copied
    assert torch.equal(pull.value(theta, 1.0), fresh.value(theta, 1.0))


def minimiser(y: float, target: float, metric_over_lr: float, weight: float) -> float:
    """argmin_x 1/2 (x - y)^2 metric/lr + weight |x - target|, by looking everywhere, then closer."""
    low, high = min(y, target) - 0.1, max(y, target) + 0.1
    for _ in range(12):
        x = np.linspace(low, high, 201)
        cost = (x - y) ** 2 / 2 * metric_over_lr + weight * np.abs(x - target)
        best = int(cost.argmin())
        low, high = x[max(best - 2, 0)], x[min(best + 2, 200)]
    return float((low + high) / 2)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("strength", [0.3, 4.0])
def test_prox_finds_the_minimiser_in_the_optimizers_metric(adam: bool, strength: float) -> None:
    theta, target = random(2, RAGGED.total, seed=4)
    target[0] = theta[0]
    moment = random(RAGGED.total, seed=5).square() * 0.5 if adam else None
    lr, eps = 0.2, 1e-3
    pull = AdapterPull(RAGGED)
    pull.aim(target)
    found = theta.clone()
    pull.prox_(found, strength, lr, moment, eps)
    for i in LAYERS:
        weight = strength / L / float(layer(target, i).abs().sum())
        metric = layer(moment, i).sqrt() + eps if moment is not None else torch.ones(RAGGED.sizes[i])
        for j, value in enumerate(layer(found, i).tolist()):
            y, t = float(layer(theta, i)[j]), float(layer(target, i)[j])
            assert abs(value - minimiser(y, t, float(metric[j]) / lr, weight)) < 1e-5
    assert int((found == target).sum()) > 0
    assert strength > 1 or int((found == target).sum()) < RAGGED.total


@check
@given(seeds, st.sampled_from([(0.0, 5.0), (0.3, 5.0), (100.0, 5.0), (0.0, 1e4)]))
def test_prox_is_a_soft_threshold_around_the_target_with_exact_zeros(seed: int, how: tuple[float, float]) -> None:
    offset, strength = how  # sums that round: the target must come back to the bit
    theta, target = random(2, RAGGED.total, seed=seed)
    target = target + offset
    theta = target + theta * (0.01 if offset else 3)
    pull = AdapterPull(RAGGED)
    pull.aim(target)
    found = theta.clone()
    pull.prox_(found, strength, 1.0)
    for i in LAYERS:
        threshold = strength / L / float(layer(target, i).abs().sum())
        away = (layer(theta, i) - layer(target, i)).double()
        inside = away.abs() < threshold * 0.999
        assert torch.equal(layer(found, i)[inside], layer(target, i)[inside])
        soft = away.sign() * (away.abs() - threshold).clamp(min=0)
        torch.testing.assert_close(layer(found, i).double(), layer(target, i) + soft, atol=3e-5, rtol=0)
    shares = [float((layer(found, i) != layer(target, i)).float().mean()) for i in LAYERS]
    torch.testing.assert_close(pull.density(found), torch.tensor(shares))


def test_prox_leaves_layers_without_a_pull_to_the_bit() -> None:
    target, theta = 1000 + random(RAGGED.total), random(RAGGED.total, seed=1)
    layer(target, 1).zero_()  # no scale to be pulled by
    related = torch.tensor([True, True, False, True])
    pull = AdapterPull(RAGGED)
    pull.aim(target, related)
    for moment in (None, torch.zeros(RAGGED.total), torch.ones(RAGGED.total)):
        found = theta.clone()
        pull.prox_(found, 1e6, 1.0, moment)
        same = [torch.equal(layer(found, i), layer(theta, i)) for i in LAYERS]
        assert same == [False, True, True, False]
    pull.aim(target)
    found = theta.clone()
    pull.prox_(found, 0.0, 1.0)
    assert torch.equal(found, theta)


def test_density_is_the_share_of_values_off_the_target() -> None:
    target = random(RAGGED.total)
    pull = AdapterPull(RAGGED)
    pull.aim(target)
    theta = target.clone()
    layer(theta, 0)[:1] += 1
    layer(theta, 3)[:] += 1
    assert torch.equal(pull.density(theta), torch.tensor([0.25, 0, 0, 1]))


# -- DirectionPull


def moved(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A start, a theta that left it in all layers but the second, and a target."""
    start, theta, target = random(3, RAGGED.total, seed=seed)
    layer(theta, 1).copy_(layer(start, 1))
    return start, theta, directions(RAGGED, target, "l1")


@check
@given(seeds)
def test_measure_is_half_the_l1_distance_of_directions(seed: int) -> None:
    start, theta, target = moved(seed)
    pull = DirectionPull(RAGGED, start)
    pull.aim(target)
    expected = layer_distances(RAGGED, directions(RAGGED, theta - start, "l1"), target, "l1")
    torch.testing.assert_close(pull.measure(theta), expected)
    assert float(pull.measure(theta)[1]) == pytest.approx(0.5)  # a layer that has not moved has no direction
    layer(pull.target, 1).zero_()
    assert float(pull.measure(theta)[1]) == 0  # nor has its like


@check
@given(seeds, st.booleans())
def test_direction_pull_adds_the_gradient_that_autograd_finds(seed: int, choose: bool) -> None:
    start, theta, target = moved(seed)
    related = some(seed) if choose else torch.ones(L, dtype=torch.bool)
    theta.requires_grad_()
    parts = []
    for i in LAYERS:
        c = layer(theta - start, i)
        if related[i]:
            parts.append((c / (c.abs().sum().detach() + EPS) - layer(target, i)).abs().sum())
    value = 0.3 / L * sum(parts, theta.sum() * 0)
    (expected,) = torch.autograd.grad(value, theta)
    layer(expected, 1).zero_()  # not moved: 1/eps would throw it anywhere
    pull = DirectionPull(RAGGED, start)
    pull.aim(target, related if choose else None)
    measured, grad = pull.measure(theta.detach()), random(RAGGED.total, seed=seed + 2)
    torch.testing.assert_close(pull.value(measured, 0.3), value.detach())
    for _ in range(2):  # measured once, added as often as wanted
        found = grad.clone()
        pull.add_(found, 0.3)
        torch.testing.assert_close(found, grad + expected)


@check
@given(seeds, st.sampled_from([1e-4, 0.3, 1.0, 50.0]))
def test_coinciding_directions_have_zero_value_and_zero_subgradient(seed: int, scale: float) -> None:
    c = scale * random(RAGGED.total, seed=seed)
    pull = DirectionPull(RAGGED, torch.zeros(RAGGED.total))
    pull.aim(directions(RAGGED, c, "l1"))
    distances = pull.measure(c)
    assert not distances.any()
    assert float(pull.value(distances, 0.5)) == 0
    grad = random(RAGGED.total)
    before = grad.clone()
    pull.add_(grad, 0.5)
    assert torch.equal(grad, before)


def test_the_caller_may_fill_the_target_in_place() -> None:
    start, theta, target = moved(0)
    pull, other = DirectionPull(RAGGED, start), DirectionPull(RAGGED, start)
    pull.aim(target)
    other.target.copy_(target)
    other.aim(other.target)
    assert torch.equal(pull.measure(theta), other.measure(theta))
    start.zero_()  # the start is copied
    assert torch.equal(pull.measure(theta), other.measure(theta))


# -- InnerPull


@check
@given(seeds)
def test_inner_pull_adds_the_gradient_that_autograd_finds(seed: int) -> None:
    theta, target, grad = random(3, RAGGED.total, seed=seed)
    theta.requires_grad_()
    loss = (theta**2).sum()
    product = -torch.dot(theta, target)
    penalty = -0.3 * loss.detach() * product / (product.detach() + 1e-5)
    (expected,) = torch.autograd.grad(penalty, theta)
    pull = InnerPull(RAGGED)
    pull.aim(target)
    found = grad.clone()
    pull.add_(found, theta.detach(), 0.3, loss)
    torch.testing.assert_close(found, grad + expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pull.product(theta.detach()), product.detach())
    torch.testing.assert_close(pull.value(theta.detach(), 0.3, loss), -penalty.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", range(6))
def test_its_value_is_lambda_times_the_loss_whatever_the_arms(step: int) -> None:
    strength, theta, loss = Strength(0.5, "epoch", 3).at(step), random(RAGGED.total), torch.tensor(2.5)
    pull = InnerPull(RAGGED)
    products = []
    for arm in range(8):
        pull.aim(random(RAGGED.total, seed=arm + 1))
        products.append(float(pull.product(theta)))
        torch.testing.assert_close(pull.value(theta, strength, loss), strength * loss, rtol=1e-3, atol=0)
    assert min(products) < -0.1  # the sign of the product is lost
    assert max(products) > 0.1


# -- all of them

Act = Callable[[Tensor, Tensor, Tensor, float | Tensor], None]  # theta, target, grad, strength


def act_adapter(theta: Tensor, target: Tensor, grad: Tensor, strength: float | Tensor) -> None:
    pull = AdapterPull(RAGGED)
    pull.aim(target)
    pull.add_(grad, theta, strength)


def act_direction(theta: Tensor, target: Tensor, grad: Tensor, strength: float | Tensor) -> None:
    pull = DirectionPull(RAGGED, torch.zeros_like(theta))
    pull.aim(target)
    pull.measure(theta)
    pull.add_(grad, strength)


def act_inner(theta: Tensor, target: Tensor, grad: Tensor, strength: float | Tensor) -> None:
    pull = InnerPull(RAGGED)
    pull.aim(target)
    pull.add_(grad, theta, strength, torch.tensor(2.0))  # type: ignore[arg-type]


every_pull = pytest.mark.parametrize("act", [act_adapter, act_direction, act_inner])


@every_pull
@pytest.mark.parametrize("strength", [0, 0.0, Strength(0.5, "epoch", 10).at(20)])
def test_strength_zero_leaves_the_gradient_as_it_was(act: Act, strength: float) -> None:
    theta, target, grad = random(3, RAGGED.total)
    before = grad.clone()
    act(theta, target, grad, strength)
    assert torch.equal(grad, before)


@every_pull
def test_a_step_against_the_pull_alone_makes_the_penalty_smaller_or_the_product_larger(act: Act) -> None:
    theta, target, grad = random(3, RAGGED.total, seed=3)
    grad.zero_()
    act(theta, target, grad, 0.1)
    after = theta - 1e-3 * grad
    if act is act_inner:  # ascent on log |R|
        pull = InnerPull(RAGGED)
        pull.aim(target)
        assert float(pull.product(after).abs()) > float(pull.product(theta).abs())
        return
    to_direction = act is act_direction
    ends = [directions(RAGGED, t, "l1") if to_direction else t for t in (theta, after)]
    near = [(end - target).abs().sum() for end in ends]
    assert float(near[1]) < float(near[0])


@every_pull
def test_adapters_in_half_precision_are_pulled_like_others(act: Act) -> None:
    theta, target = random(2, RAGGED.total).bfloat16()
    grad, grad_half = torch.zeros(RAGGED.total), torch.zeros(RAGGED.total, dtype=torch.bfloat16)
    act(theta.float(), target.float(), grad, 0.5)
    act(theta, target, grad_half, 0.5)
    torch.testing.assert_close(grad_half.float(), grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("act", [act_adapter, act_direction])
def test_strengths_a_layer_are_strengths_one_by_one(act: Act) -> None:
    theta, target = random(2, RAGGED.total)
    strengths, found = torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.zeros(RAGGED.total)
    act(theta, target, found, strengths)
    for i, strength in enumerate(strengths.tolist()):
        alone = torch.zeros(RAGGED.total)
        act(theta, target, alone, strength)
        torch.testing.assert_close(layer(found, i), layer(alone, i))


def test_strengths_a_layer_hold_for_prox_and_values_too() -> None:
    theta, target = random(2, RAGGED.total)
    strengths = torch.tensor([0.0, 0.5, 1.0, 2.0])
    pull, direction = AdapterPull(RAGGED), DirectionPull(RAGGED, torch.zeros(RAGGED.total))
    pull.aim(target)
    direction.aim(directions(RAGGED, target, "l1"))
    found = theta.clone()
    pull.prox_(found, strengths, 0.3)
    value = direction_value = 0.0
    for i, strength in enumerate(strengths.tolist()):
        alone = theta.clone()
        pull.prox_(alone, strength, 0.3)
        torch.testing.assert_close(layer(found, i), layer(alone, i))
        only = torch.arange(L) == i
        value += float(pull.value(theta, only * strengths))
        direction_value += float(direction.value(direction.measure(theta) * only, strength))
    torch.testing.assert_close(pull.value(theta, strengths), torch.tensor(value))
    torch.testing.assert_close(direction.value(direction.measure(theta), strengths), torch.tensor(direction_value))


def one_step(store: SignatureStore, theta: Tensor, grad: Tensor) -> Recorder:
    """Everything that happens to the flat vectors within one step, recorded."""
    layout = store.layout
    rows = np.arange(len(layout)) % len(store)
    related = torch.arange(len(layout)) % 2 == 0
    pulls = AdapterPull(layout), DirectionPull(layout, torch.zeros(layout.total)), InnerPull(layout)
    adapter, direction, inner = pulls
    moment = theta.square()
    target = store.rows.segments(rows)
    adapter.aim(target, related)  # index tensors are made at the first call on a device
    adapter.density(theta)
    with Recorder() as recorder:
        chosen = store.rows.segments(rows, target)
        segments = recorder.syncs.copy()
        adapter.aim(chosen, related)
        direction.aim(chosen, related)
        inner.aim(chosen)
        distances = direction.measure(theta)
        direction.add_(grad, 0.1)
        adapter.add_(grad, theta, 0.1)
        inner.add_(grad, theta, 0.1, distances.sum())
        values = direction.value(distances, 0.1), adapter.value(theta, 0.1), inner.value(theta, 0.1, grad.sum())
        adapter.prox_(theta, 0.1, 0.1)
        adapter.prox_(theta, 0.1, 0.1, moment)
        adapter.density(theta)
    recorder.syncs = recorder.syncs[len(segments) :]  # the store lives on the host, the pulls may not
    assert not any(t.requires_grad or t.grad_fn for t in (theta, grad, distances, *values))
    return recorder


LARGE = Layout.of_sizes([600, 200, 600, 200])


def steps_with(tasks: int) -> Recorder:
    store = SignatureStore(LARGE, "l1")
    store.extend(random(tasks, LARGE.total))
    return one_step(store, *random(2, LARGE.total, seed=1))


def test_a_step_makes_no_graph_and_never_waits_for_the_device() -> None:
    recorder = steps_with(3)
    assert len(recorder.ops) > 50
    assert recorder.syncs == []
    with Recorder() as control:  # the recorder does see them
        x = torch.ones(2)
        float(x.sum())
        x[x > 0] = 0
        x.nonzero()
    assert len(control.syncs) == 3


def test_a_step_allocates_the_same_whatever_the_number_of_tasks() -> None:
    few, many = steps_with(2), steps_with(120)
    assert few.ops == many.ops
    assert few.allocated == many.allocated
    assert few.allocated < 40 * 4 * LARGE.total
