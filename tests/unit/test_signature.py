from statistics import NormalDist, mean
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treelora_ray.core.errors import SettingError
from treelora_ray.core.layout import Layout
from treelora_ray.core.signature import (
    Accumulator,
    Distance,
    SignatureKind,
    Sketch,
    aligned,
    apart,
    directions,
    layer_distances,
    related_layers,
)

RAGGED = Layout.of_sizes([4, 2, 4, 1])
DISTANCES: tuple[Distance, ...] = get_args(Distance)
check = settings(deadline=None, max_examples=60)

numbers = st.just(0.0) | st.floats(2**-20, 2**20, width=32) | st.floats(-(2**20), -(2**-20), width=32)
vectors = st.lists(numbers, min_size=RAGGED.total, max_size=RAGGED.total).map(torch.tensor)


def norm_order(distance: Distance) -> int:
    return 1 if distance == "l1" else 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- accumulators

ONE = Layout.of_sizes([2])
OBSERVED = [torch.tensor([1.0, 8.0]), torch.tensor([3.0, 0.0]), torch.tensor([5.0, -2.0])]
START = torch.tensor([1.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("anchor", [3.0, 2.0]),  # mean of all three
        ("raw", [4.0, -1.0]),  # mean of the last epoch, the last two
        ("delta", [3.0, -2.0]),  # the same, from the start
        ("grad_ema", [(0.25 * 1 + 0.5 * 3 + 5) / 1.75, (0.25 * 8 - 2) / 1.75]),  # weights 1/4, 1/2, 1
        ("running", [4.0, -1.0]),  # (3 + 5) * 1 layer / 2 steps
    ],
)
def test_each_kind_equals_its_hand_computation(kind: SignatureKind, expected: list[float]) -> None:
    start = START.clone()
    accumulator = Accumulator(ONE, kind, start=start, decay=0.5, steps_per_epoch=2)
    start.fill_(99)  # the start is copied
    accumulator.start_epoch()
    accumulator.add(OBSERVED[0])
    accumulator.start_epoch()
    accumulator.add(OBSERVED[1])
    accumulator.add(OBSERVED[2])
    torch.testing.assert_close(accumulator.value(), torch.tensor(expected))


def test_delta_is_the_mean_over_the_last_epoch_only() -> None:
    accumulator = Accumulator(RAGGED, "delta", start=torch.full((RAGGED.total,), 10.0))
    for epoch in range(3):
        accumulator.start_epoch()
        for step in range(4):
            accumulator.add(torch.full((RAGGED.total,), 100.0 * epoch + step))
    assert torch.equal(accumulator.value(), torch.full((RAGGED.total,), 200 + 1.5 - 10))


@pytest.mark.parametrize("modules", [1, 3, 8])
def test_a_constant_weight_of_one_over_an_epoch_gives_q_equal_to_the_number_of_modules(modules: int) -> None:
    layout = Layout.of_sizes([2] * modules)
    accumulator = Accumulator(layout, "running", steps_per_epoch=4)
    for _ in range(2):  # Q starts again every epoch
        accumulator.start_epoch()
        for step in range(4):
            accumulator.add(torch.ones(layout.total))
            assert torch.equal(accumulator.value(), torch.full((layout.total,), modules * (step + 1) / 4))


@pytest.mark.parametrize("kind", get_args(SignatureKind))
def test_a_value_stays_what_it_was_when_more_is_added(kind: SignatureKind) -> None:
    accumulator = Accumulator(ONE, kind, start=START, steps_per_epoch=1)
    accumulator.add(OBSERVED[0])
    first = accumulator.value()
    kept = first.clone()
    accumulator.add(OBSERVED[1])
    assert torch.equal(first, kept)
    assert not torch.equal(accumulator.value(), kept)


@pytest.mark.parametrize("kind", get_args(SignatureKind))
def test_a_signature_lives_where_its_observations_live(kind: SignatureKind) -> None:
    accumulator = Accumulator(ONE, kind, start=START, steps_per_epoch=1)
    accumulator.add(torch.ones(2, device="meta"))
    assert accumulator.value().device.type == "meta"


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kind": "gradient"}, "'gradient' is unknown; known: anchor, delta, grad_ema, raw, running"),
        ({"kind": "delta"}, "needs `start`"),
        ({"kind": "running"}, "needs `steps_per_epoch`"),
        ({"kind": "running", "steps_per_epoch": 0}, "needs `steps_per_epoch`"),
        ({"kind": "grad_ema", "decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"kind": "grad_ema", "decay": -0.1}, "got -0.1"),
    ],
)
def test_an_accumulator_says_what_it_needs(settings_: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Accumulator(ONE, **settings_)


def test_a_signature_of_nothing_is_refused() -> None:
    accumulator = Accumulator(ONE, "raw")
    with pytest.raises(SettingError, match="'raw' signature needs at least one observation"):
        accumulator.value()
    accumulator.add(OBSERVED[0])
    accumulator.start_epoch()
    with pytest.raises(SettingError, match="at least one observation"):
        accumulator.value()


# -- directions and distances


@check
@given(vectors, st.sampled_from(["l1", "cosine"]))
def test_directions_have_unit_norm_and_zero_layers_stay_zero(x: Tensor, distance: Distance) -> None:
    before = x.clone()
    unit = directions(RAGGED, x, distance)
    assert torch.equal(x, before)
    for i in range(len(RAGGED)):
        given_, found = RAGGED.segment(x, i), RAGGED.segment(unit, i)
        if given_.any():
            torch.testing.assert_close(found.norm(norm_order(distance)), torch.tensor(1.0))
            length = given_.norm(norm_order(distance))
            torch.testing.assert_close(found * length, given_, rtol=1e-5, atol=1e-5 * float(length))
        else:
            assert not found.any()


@check
@given(vectors)
def test_l2_directions_keep_the_magnitude_in_a_vector_of_their_own(x: Tensor) -> None:
    unit = directions(RAGGED, x, "l2")
    assert torch.equal(unit, x)
    assert unit.data_ptr() != x.data_ptr()
    assert directions(RAGGED, x.double(), "l2").dtype == torch.float32


@check
@given(vectors, vectors, st.sampled_from(["l1", "cosine"]))
def test_distances_lie_between_0_and_1_and_equal_their_formula(x: Tensor, y: Tensor, distance: Distance) -> None:
    found = layer_distances(RAGGED, directions(RAGGED, x, distance), directions(RAGGED, y, distance), distance)
    assert (found >= 0).all()
    assert (found <= 1 + 1e-6).all()
    for i in range(len(RAGGED)):
        a, b = RAGGED.segment(x, i).double(), RAGGED.segment(y, i).double()
        order = norm_order(distance)
        u, v = (z / z.norm(order) if z.any() else z for z in (a, b))
        torch.testing.assert_close(found[i].double(), (u - v).norm(order) / 2, rtol=1e-4, atol=1e-6)


@check
@given(vectors, vectors, vectors, st.sampled_from(DISTANCES))
def test_distances_are_a_metric_of_directions(x: Tensor, y: Tensor, z: Tensor, distance: Distance) -> None:
    u, v, w = (directions(RAGGED, t, distance) for t in (x, y, z))

    def apart_by(a: Tensor, b: Tensor) -> Tensor:
        return layer_distances(RAGGED, a, b, distance)

    assert torch.equal(apart_by(u, u), torch.zeros(len(RAGGED)))
    assert torch.equal(apart_by(u, v), apart_by(v, u))
    longest = apart_by(u, w) + apart_by(w, v)
    assert (apart_by(u, v) <= longest * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("distance", ["l1", "cosine"])
def test_a_zero_layer_is_half_away_from_any_and_nothing_from_its_like(distance: Distance) -> None:
    x, zero = directions(RAGGED, random(RAGGED.total), distance), torch.zeros(RAGGED.total)
    torch.testing.assert_close(layer_distances(RAGGED, x, zero, distance), torch.full((4,), 0.5))
    assert not layer_distances(RAGGED, zero, zero, distance).any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_opposite_layers_are_farthest_and_scale_matters_to_l2_only(distance: Distance) -> None:
    x = random(RAGGED.total)
    unit, opposite, longer = (directions(RAGGED, c * x, distance) for c in (1, -3, 3))
    far, scaled = (layer_distances(RAGGED, unit, other, distance) for other in (opposite, longer))
    lengths = RAGGED.per_layer(lambda s: s.norm(dim=-1), x)
    torch.testing.assert_close(far, 4 * lengths if distance == "l2" else torch.ones(4))
    torch.testing.assert_close(scaled, 2 * lengths if distance == "l2" else torch.zeros(4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_direction_meets_many_and_none_is_changed(distance: Distance) -> None:
    many, one = random(3, RAGGED.total), random(RAGGED.total, seed=1)
    before = many.clone(), one.clone()
    found = layer_distances(RAGGED, many, one, distance)
    assert torch.equal(found, torch.stack([layer_distances(RAGGED, row, one, distance) for row in many]))
    assert torch.equal(many, before[0])
    assert torch.equal(one, before[1])


def test_apart_on_numbers_one_can_check() -> None:
    gap = torch.tensor([[3.0, -4.0]])
    found = {distance: float(apart(gap.clone(), distance)) for distance in DISTANCES}
    assert found == {"l1": 3.5, "l2": 5.0, "cosine": 2.5}


# -- sketches

WIDE = Layout.of_sizes([40, 6, 33, 8])


@check
@given(st.integers(0, 99), st.floats(-4, 4, width=32))
def test_a_sketch_is_linear(seed: int, factor: float) -> None:
    sketch = Sketch(WIDE, 8, seed)
    flats = random(5, WIDE.total, seed=seed)
    sketched = torch.stack([sketch(flat) for flat in flats])
    torch.testing.assert_close(sketch(flats.mean(0)), sketched.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sketch(factor * flats[0]), factor * sketched[0], rtol=1e-5, atol=1e-5)


def test_the_seed_makes_the_sketch() -> None:
    x = random(WIDE.total)
    assert torch.equal(Sketch(WIDE, 8, seed=3)(x), Sketch(WIDE, 8, seed=3)(x))
    one, other = (Sketch(WIDE, 8, seed)(x) for seed in (3, 4))
    layout = Sketch(WIDE, 8).layout
    changed = [not torch.equal(layout.segment(one, i), layout.segment(other, i)) for i in range(4)]
    assert changed == [True, False, True, False]  # small layers pass as they are


def test_layers_of_a_sketch_have_maps_of_their_own() -> None:
    twice = Layout.of_sizes([64, 64])
    x = random(64)
    one, other = Sketch(twice, 16)(torch.cat([x, x])).chunk(2)
    assert not torch.equal(one, other)


def test_small_layers_pass_unchanged_and_names_stay() -> None:
    sketch = Sketch(WIDE, 8)
    x = random(WIDE.total)
    assert sketch.layout.sizes == (8, 6, 8, 8)
    assert sketch.layout.names == WIDE.names
    for i in (1, 3):
        assert torch.equal(sketch.layout.segment(sketch(x), i), WIDE.segment(x, i))


def test_every_value_goes_to_one_bin_with_a_sign() -> None:
    sketch = Sketch(Layout.of_sizes([33]), 8)
    columns = torch.stack([sketch(row) for row in torch.eye(33)])
    assert torch.equal(columns.abs().sum(1), torch.ones(33))
    assert columns.count_nonzero() == 33
    assert sorted(columns.abs().sum(0).tolist()) == [4.0] * 7 + [5.0]  # balanced
    assert columns.min() == -1
    assert columns.max() == 1


def test_a_sketch_keeps_inner_products_in_the_mean_with_the_stated_error() -> None:
    layers, size, dim = 64, 256, 32
    layout = Layout.of_sizes([size] * layers)
    x, y = (v / v.norm() for v in random(2, size, seed=5))
    errors = torch.cat(
        [
            sketch.layout.per_layer(lambda a, b: (a * b).sum(-1), sketch(x.repeat(layers)), sketch(y.repeat(layers)))
            for sketch in (Sketch(layout, dim, seed) for seed in range(8))
        ]
    ) - torch.dot(x, y)
    stated = dim**-0.5
    assert abs(float(errors.mean())) < 4 * stated / len(errors) ** 0.5
    assert 0.8 * stated < float(errors.std()) < 1.2 * stated


def test_a_sketch_keeps_cosine_and_does_not_keep_l1() -> None:
    layout = Layout.of_sizes([2048])
    x, y = torch.zeros(2, 2048)
    x[:1024], y[1024:] = random(2, 1024).abs()  # nothing in common: l1 distance 1, chord sqrt(2)/2
    sketch = Sketch(layout, 256)

    def sketched(distance: Distance) -> float:
        u, v = (directions(sketch.layout, sketch(z), distance) for z in (x, y))
        return float(layer_distances(sketch.layout, u, v, distance))

    assert abs(sketched("cosine") - 0.5**0.5) < 0.05
    assert sketched("l1") < 0.8


def test_a_sketch_takes_half_and_double_and_gives_float() -> None:
    x = random(WIDE.total).half()
    sketch = Sketch(WIDE, 8)
    for flat in (x, x.float(), x.double()):
        assert sketch(flat).dtype == torch.float32
        torch.testing.assert_close(sketch(flat), sketch(x.float()), rtol=1e-2, atol=1e-2)
    assert sketch(x.to("meta")).device.type == "meta"


def test_a_sketch_to_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="sketch_dim must be at least 1, got 0"):
        Sketch(WIDE, 0)


# -- relatives

MANY = Layout.of_sizes([256] * 64)


def observed_z(x: Tensor, y: Tensor, distance: Distance) -> float:
    """How many deviations of the null below its mean the two lie, found from the answers alone."""
    layout, low, high = Layout.of_sizes([len(x)]), -5.0, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        if bool(related_layers(layout, x, y, distance, 1, NormalDist().cdf(middle))):
            high = middle
        else:
            low = middle
    return (low + high) / 2


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_closed_form_null_is_what_random_sign_flips_converge_to(distance: Distance) -> None:
    x, y = (directions(Layout.of_sizes([48]), flat, distance).double() for flat in random(2, 48, seed=2))
    flips = torch.randint(0, 2, (8000, 48), generator=torch.Generator().manual_seed(3)) * 2 - 1

    def seen(a: Tensor) -> Tensor:
        gap = a - x
        return gap.abs().sum(-1) if distance == "l1" else gap.square().sum(-1)

    null = seen(flips * y)
    # Two sign patterns with known distances, and where each lies in the null, give its mean and deviation.
    one, other = (flips * y)[null.argsort()[[400, 7600]]]
    z_one, z_other = observed_z(x, one, distance), observed_z(x, other, distance)
    deviation = float(seen(other) - seen(one)) / (z_other - z_one)
    mean = float(seen(one)) - z_one * deviation
    assert abs(mean - float(null.mean())) < 4 * float(null.std()) / len(null) ** 0.5
    assert abs(deviation / float(null.std()) - 1) < 0.04


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("arms", [1, 11, 47])
def test_planted_relatives_pass(distance: Distance, arms: int) -> None:
    x, noise = random(2, MANY.total)
    u, v = (directions(MANY, flat, distance) for flat in (x + noise, x - noise))
    w = directions(MANY, x + 0.5 * noise, distance)
    assert related_layers(MANY, u, w, distance, arms, 0.05).all()
    assert not related_layers(MANY, u, v, distance, arms, 0.05).all()  # orthogonal: |x|^2 - |noise|^2 in the mean


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("arms", [1, 11, 47])
def test_few_layers_pass_when_the_nearest_of_unrelated_tasks_is_chosen(distance: Distance, arms: int) -> None:
    passed = []
    for seed in range(6):
        flats = random(arms + 1, MANY.total, seed=100 * arms + seed)
        mine, theirs = directions(MANY, flats[0], distance), directions(MANY, flats[1:], distance)
        nearest = layer_distances(MANY, theirs, mine, distance).argmin(0)
        chosen = torch.cat([MANY.segment(theirs[task], i) for i, task in enumerate(nearest.tolist())])
        passed.append(related_layers(MANY, mine, chosen, distance, arms, 0.05).float().mean())
    assert float(torch.stack(passed).mean()) <= 0.10


def test_many_arms_make_the_test_as_strict_as_one_arm_at_their_share_of_the_level() -> None:
    x, y = (directions(MANY, flat, "cosine") for flat in random(2, MANY.total))
    y = y + 0.05 * x
    assert torch.equal(related_layers(MANY, x, y, "cosine", 8, 0.8), related_layers(MANY, x, y, "cosine", 1, 0.1))
    shares = [int(related_layers(MANY, x, y, "cosine", arms, 0.8).sum()) for arms in (1, 4, 64)]
    assert shares[0] > shares[1] > shares[2]


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_zero_layer_never_passes(distance: Distance) -> None:
    x = directions(RAGGED, torch.ones(RAGGED.total), distance)
    y, zero = x.clone(), torch.zeros(RAGGED.total)
    RAGGED.segment(y, 0).zero_()
    for level in (0.05, 0.999):
        assert not related_layers(RAGGED, x, y, distance, 1, level)[0]
        assert not related_layers(RAGGED, zero, zero, distance, 1, level).any()
    assert not related_layers(RAGGED, x, x, distance, 1, 0.0).any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_layers_without_a_value_in_common_never_pass(distance: Distance) -> None:
    x, y = (directions(MANY, flat, distance) for flat in random(2, MANY.total))
    x[::2], y[1::2] = 0, 0
    assert not related_layers(MANY, x, y, distance, 1, 0.999).any()


def low_rank_task(
    key: int, base: torch.Tensor | None, rounds: int = 12
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(signature, differences, base) of a task whose gradients all lie in six directions of the 64 of each layer."""
    generator = torch.Generator().manual_seed(key)
    common = torch.randn(6, MANY.total, generator=torch.Generator().manual_seed(0))
    if base is None:
        base = torch.randn(len(MANY), 6, generator=generator)
    batches = base + 2 * torch.randn(rounds, len(MANY), 6, generator=generator)
    gradients = torch.stack(
        [torch.cat([batch[layer] @ MANY.segment(common, layer) for layer in range(len(MANY))]) for batch in batches]
    )
    differences = [gradients[:count].mean(0) - gradients[count] for count in range(1, rounds)]
    return gradients.mean(0), torch.stack(differences), base


def test_values_that_hang_together_pass_for_related_no_more_often_than_the_level_says() -> None:
    assert MANY.offsets == tuple(sorted(MANY.offsets))  # segments follow each other, as `low_rank_task` lays them
    passed, naive, found = [], [], []
    for key in range(1, 121):
        mine, noise, base = low_rank_task(key, None)
        other, relative = low_rank_task(1000 + key, None)[0], low_rank_task(2000 + key, base)[0]
        by_chance, by_kin = aligned(MANY, mine, torch.stack([other, relative]), 0.05, noise).tolist()
        passed.append(by_chance)
        here, there = directions(MANY, mine, "cosine"), directions(MANY, other, "cosine")
        naive.append(float(related_layers(MANY, here, there, "cosine", 1, 0.05).float().mean()))
        found.append(by_kin)
    assert mean(passed) <= 0.1
    assert mean(naive) > 0.15  # what signs of single values make of the same tasks
    assert mean(found) >= 0.99


def test_fewer_than_two_differences_say_nothing() -> None:
    mine, noise, _ = low_rank_task(1, None)
    others = torch.stack([mine, -mine])
    assert aligned(MANY, mine, others, 0.05, noise[:1]).tolist() == [True, True]
    assert aligned(MANY, mine, others, 0.05, noise).tolist() == [True, False]


def test_noise_that_leans_on_the_other_tasks_asks_for_more_alignment() -> None:
    """Differences that have little in common with each other, and much with a stored task, warn of that task."""
    generator = torch.Generator().manual_seed(4)
    stored, free = (torch.randn(n, MANY.total, generator=generator) for n in (2, 8))
    mine = stored[0] + 2 * torch.randn(MANY.total, generator=generator)
    assert aligned(MANY, mine, stored, 0.05, free).tolist() == [True, False]
    signs = torch.tensor([1.0, -1.0] * 4)[:, None]
    assert not aligned(MANY, mine, stored, 0.05, free + signs * stored[0]).any()


def test_more_tasks_to_choose_from_ask_for_more_alignment() -> None:
    mine, noise, base = low_rank_task(3, None)
    weak = low_rank_task(5, 0.25 * base)[0]
    passed = [bool(aligned(MANY, mine, weak[None], 0.05 / arms, noise)) for arms in (1, 10**12)]
    assert passed == sorted(passed, reverse=True)
