from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import squareform
from torch import Tensor

from treelora_ray.core import store as store_module
from treelora_ray.core.layout import FloatArray, Layout
from treelora_ray.core.signature import Distance, directions, layer_distances
from treelora_ray.core.store import Rows, SignatureStore

DISTANCES: tuple[Distance, ...] = get_args(Distance)
LAYOUTS = [Layout.of_sizes(sizes) for sizes in ([5, 3, 5, 2], [4, 4, 4], [7])]
DTYPES = [torch.float16, torch.float32]
check = settings(deadline=None, max_examples=25)

layouts, distances, dtypes = st.sampled_from(LAYOUTS), st.sampled_from(DISTANCES), st.sampled_from(DTYPES)
seeds, counts = st.integers(0, 9999), st.integers(1, 24)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layout: Layout, distance: Distance, n: int, seed: int = 0, dtype: torch.dtype = DTYPES[0]) -> SignatureStore:
    store = SignatureStore(layout, distance, dtype)
    store.extend(random(n, layout.total, seed=seed))
    return store


def plain_matrix(store: SignatureStore) -> FloatArray:
    """All pairs, one by one, from the stored directions."""
    rows = [store.rows[task] for task in range(len(store))]
    return np.array(
        [[float(layer_distances(store.layout, x, y, store.distance).mean()) for x in rows] for y in rows]
    ).reshape(len(rows), len(rows))


@check
@given(layouts, distances, dtypes, counts, seeds)
def test_append_returns_the_distances_to_the_stored_directions_before_it(
    layout: Layout, distance: Distance, dtype: torch.dtype, n: int, seed: int
) -> None:
    store = SignatureStore(layout, distance, dtype)
    for number, flat in enumerate(random(n, layout.total, seed=seed)):
        row = store.append(flat)
        assert row.shape == (number,)
        assert row.dtype == np.float64
        if number:
            before = torch.stack([store.rows[task] for task in range(number)])
            expected = layer_distances(layout, before, store.rows[number], distance).mean(-1)
            np.testing.assert_allclose(row, expected, atol=1e-6)
        np.testing.assert_array_equal(row, store.pair_row(number)[:number])


@check
@given(layouts, distances, dtypes, counts, seeds)
def test_pairs_rows_and_condensed_are_the_full_matrix(
    layout: Layout, distance: Distance, dtype: torch.dtype, n: int, seed: int
) -> None:
    store = filled(layout, distance, n, seed, dtype)
    matrix = plain_matrix(store)
    backwards = np.ascontiguousarray(matrix[::-1, ::-1])  # condensed numbers tasks from last to first
    np.testing.assert_allclose(store.condensed, squareform(backwards, checks=False), atol=1e-6)
    assert store.condensed.dtype == np.float64
    rows = np.stack([store.pair_row(task) for task in range(n)])
    np.testing.assert_allclose(rows, matrix, atol=1e-6)
    np.testing.assert_array_equal(rows, rows.T)
    assert not rows.diagonal().any()


@check
@given(layouts, distances, dtypes, counts, seeds)
def test_the_distances_are_those_of_the_signatures_given(
    layout: Layout, distance: Distance, dtype: torch.dtype, n: int, seed: int
) -> None:
    store = filled(layout, distance, n, seed, dtype)
    exact = directions(layout, random(n, layout.total, seed=seed), distance)
    expected = layer_distances(layout, exact, exact[0], distance)
    atol, rtol = (2e-3, 2e-3) if dtype == torch.float16 else (1e-5, 1e-5)
    np.testing.assert_allclose(store.pair_row(0), expected.mean(-1), atol=atol, rtol=rtol)
    torch.testing.assert_close(store.from_rows(exact[0], list(range(n))), expected, atol=atol, rtol=rtol)
    np.testing.assert_allclose(store.from_all(exact[0]), expected.mean(-1), atol=atol, rtol=rtol)


@check
@given(layouts, distances, dtypes, counts, seeds)
def test_reading_changes_nothing(layout: Layout, distance: Distance, dtype: torch.dtype, n: int, seed: int) -> None:
    store = filled(layout, distance, n, seed, dtype)
    before = store.tensors()
    first = store.rows[n - 1]
    store.rows[n - 1].zero_()  # what one gets is one's own
    store.rows[: n - 1].zero_()
    store.rows[np.arange(n)].zero_()
    store.rows.layer(np.arange(n), 0).zero_()
    store.rows.segments(np.zeros(len(layout), np.int64)).zero_()
    store.pair_row(0)[:] = 9
    store.condensed[:] = 9
    assert torch.equal(store.rows[n - 1], first)
    assert all(torch.equal(value, before[name]) for name, value in store.tensors().items())


@pytest.mark.parametrize("distance", DISTANCES)
def test_extend_equals_one_at_a_time(distance: Distance) -> None:
    layout, flats = LAYOUTS[0], random(30, LAYOUTS[0].total)
    one, many = SignatureStore(layout, distance), SignatureStore(layout, distance)
    rows = [one.append(flat) for flat in flats]
    many.extend(flats[:11])
    many.extend(flats[11:])
    assert len(one) == len(many) == 30
    assert [len(row) for row in rows] == list(range(30))
    assert all(torch.equal(value, one.tensors()[name]) for name, value in many.tensors().items())


@pytest.mark.parametrize("chunk", [1, 40])
def test_the_chunk_size_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled(LAYOUTS[0], "l1", 12)
    monkeypatch.setattr(store_module, "CHUNK_VALUES", chunk)
    parts = filled(LAYOUTS[0], "l1", 12)
    np.testing.assert_allclose(parts.condensed, whole.condensed, atol=1e-7)


# -- precision


@check
@given(layouts, st.sampled_from(["l1", "cosine"]), dtypes, st.sampled_from([1e-9, 1e-4, 1.0, 1e6]), seeds)
def test_stored_directions_have_unit_norm_whatever_the_scale(
    layout: Layout, distance: Distance, dtype: torch.dtype, scale: float, seed: int
) -> None:
    rows = Rows(layout, distance, dtype)
    flat = random(layout.total, seed=seed) * scale
    rows.append(flat)
    stored, order = rows[0].double(), 1 if distance == "l1" else 2
    norms = layout.per_layer(lambda x: torch.linalg.vector_norm(x, order, dim=-1), stored)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-6, rtol=0)
    error = layer_distances(layout, stored, directions(layout, flat, distance).double(), distance)
    assert float(error.max()) < 6e-4  # half a unit in the last place is 2^-12 of each value, 2^-11 with the norm's


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_l2_keeps_magnitudes_within_half_precision(scale: float) -> None:
    layout = LAYOUTS[0]
    flat = random(layout.total) * scale
    rows = Rows(layout, "l2")
    rows.append(flat)
    peaks = layout.per_layer(lambda x: x.abs().amax(-1), flat)
    error = layout.per_layer(lambda x: x.abs().amax(-1), rows[0] - flat)
    assert (error <= peaks * 2**-11).all()


def test_tiny_values_beside_large_layers_survive() -> None:
    layout = Layout.of_sizes([3, 3])
    rows = Rows(layout, "cosine")
    rows.append(torch.tensor([1e-9, -2e-9, 2e-9, 1e6, 2e6, -2e6]))
    third = torch.tensor([1, -2, 2, 1, 2, -2]) / 3
    torch.testing.assert_close(rows[0], third, atol=3e-4, rtol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_layers_are_stored_as_zero(distance: Distance) -> None:
    layout = LAYOUTS[0]
    store = SignatureStore(layout, distance)
    flat = torch.ones(layout.total)
    layout.segment(flat, 1).zero_()
    store.append(flat)
    store.append(torch.zeros(layout.total))
    assert torch.equal(store.rows[0] != 0, flat != 0)
    assert not store.rows[1].any()
    expected = layer_distances(layout, store.rows[0], store.rows[1], distance).mean()
    np.testing.assert_allclose(store.pair_row(0)[1], expected, rtol=1e-6)


def test_a_signature_given_is_left_as_it_was() -> None:
    flat = random(LAYOUTS[0].total)
    before = flat.clone()
    store = SignatureStore(LAYOUTS[0], "l1", torch.float32)
    store.append(flat)
    store.replace(0, flat)
    assert torch.equal(flat, before)


# -- segments

LONG = Layout.of_sizes([5000, 3, 5000])  # long segments are copied one by one


@pytest.mark.parametrize("layout", [*LAYOUTS, LONG])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gaps", [False, True])
def test_segments_takes_layer_l_from_its_own_row_and_leaves_the_others(
    layout: Layout, dtype: torch.dtype, gaps: bool
) -> None:
    store = filled(layout, "l1", 5, dtype=dtype)
    layers = len(layout)
    for shift in range(3):
        rows = (np.arange(layers) * 3 + shift) % 5
        if gaps:
            rows[shift % layers :: 2] = -1
        out = torch.full((layout.total,), 7.0)
        given_out = store.rows.segments(rows, out)
        fresh = store.rows.segments(rows)
        assert given_out is out
        for i, row in enumerate(rows):
            expected = layout.segment(store.rows[int(row)], i) if row >= 0 else None
            found, zeros = layout.segment(out, i), layout.segment(fresh, i)
            assert torch.equal(found, torch.full_like(found, 7) if expected is None else expected)
            assert torch.equal(zeros, torch.zeros_like(found) if expected is None else expected)


def test_layer_gives_one_layer_of_several_rows() -> None:
    layout = LAYOUTS[0]
    store = filled(layout, "cosine", 5)
    rows = np.array([4, 0, 4])
    for i in range(len(layout)):
        assert torch.equal(store.rows.layer(rows, i), layout.segment(store.rows[rows], i))


# -- replace, memory, tensors


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("task", [0, 3, 8])
def test_replace_updates_all_distances_of_the_task_and_no_other(distance: Distance, task: int) -> None:
    layout, flats = LAYOUTS[0], random(9, LAYOUTS[0].total)
    store = filled(layout, distance, 9)
    before = squareform(store.condensed)
    other = random(layout.total, seed=1)
    store.replace(task, other)
    flats[task] = other
    afresh = SignatureStore(layout, distance)
    afresh.extend(flats)
    np.testing.assert_allclose(store.condensed, afresh.condensed, atol=1e-6)
    changed = before != squareform(store.condensed)
    changed[8 - task], changed[:, 8 - task] = False, False
    assert not changed.any()


def test_memory_is_n_signatures_and_half_n_squared_distances() -> None:
    layout = Layout.of_sizes([20, 12, 20])
    store = SignatureStore(layout, "cosine")
    signature = 2 * layout.total + 4 * len(layout)  # halves, and a float scale a layer
    for n, flat in enumerate(random(200, layout.total), 1):
        store.append(flat)
        pairs = 4 * n * (n - 1) // 2
        assert store.nbytes() >= n * signature + pairs
        assert store.nbytes() <= max(8, 1.5 * n) * signature + max(4 * 64, 1.25 * pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 13])
def test_tensors_and_load_are_exact_and_do_not_alias(n: int, dtype: torch.dtype) -> None:
    layout = LAYOUTS[0]
    store = filled(layout, "l1", n, dtype=dtype)
    written = store.tensors()
    kept = {name: value.clone() for name, value in written.items()}
    back = SignatureStore(layout, "l1", dtype)
    back.load(written)
    assert len(back) == n
    assert {name: value.shape[0] for name, value in written.items()} == {
        "values": n,
        "scales": n,
        "pairs": n * (n - 1) // 2,
    }
    more = random(7, layout.total, seed=9)
    for each in (store, back):
        if n:
            each.replace(0, more[3])  # while there is no need to grow
        each.extend(more)
        each.replace(0, more[4])
    assert all(torch.equal(value, kept[name]) for name, value in written.items())
    assert all(torch.equal(value, store.tensors()[name]) for name, value in back.tensors().items())
    np.testing.assert_allclose(back.condensed[::-1][:1], plain_matrix(back)[1, :1], atol=1e-6)
