"""Spaces: where they are found, what is wrong with them, how settings are drawn from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_ray.cluster.errors import SpaceError
from treelora_ray.cluster.parameters import Parameter, Space, drawn, grid_settings, random_settings, variations
from treelora_ray.cluster.spaces import known, load_space
from treelora_ray.config import ConfigError, load
from treelora_ray.methods.options import METHOD_OPTIONS

HEAD = "from ray import tune\n\n\n"


def space(folder: Path, body: str, name: str = "mine.py") -> Space:
    (folder / name).write_text(HEAD + body)
    return load_space(str(folder / name))


def of(folder: Path, value: str) -> dict[str, Any]:
    found = space(folder, f'def space():\n    """One."""\n    return {{"train.lr": {value}}}\n')
    return found.parameters["train.lr"].to_json()


# Each method that is compared with treelora has one, under a name that Python knows.
COMPARED = sorted(name.replace("++", "pp").replace("-", "_") for name in METHOD_OPTIONS.keys() - {"treelora"})


@pytest.mark.parametrize("name", ["treelora", "smoke", *(f"baselines:{method}" for method in COMPARED)])
def test_the_spaces_of_the_package_fit_the_built_in_stream(name: str) -> None:
    found = load_space(name)
    found.require_fits(load("quickstart"))
    assert found.name == name.replace(":", "-")
    assert found.parameters
    assert name.split(":")[0] in known()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tune.choice([1, 'a', None])", {"kind": "choice", "values": [1, "a", None]}),
        ("tune.grid_search([1, 2])", {"kind": "choice", "values": [1, 2]}),
        ("tune.uniform(0, 1)", {"kind": "uniform", "low": 0, "high": 1}),
        ("tune.quniform(0, 1, 0.1)", {"kind": "uniform", "low": 0, "high": 1, "step": 0.1}),
        ("tune.loguniform(0.01, 1)", {"kind": "loguniform", "low": 0.01, "high": 1}),
        ("tune.randint(1, 5)", {"kind": "randint", "low": 1, "high": 4}),
        ("tune.qrandint(2, 8, 2)", {"kind": "randint", "low": 2, "high": 8, "step": 2}),
        ("tune.lograndint(1, 100)", {"kind": "lograndint", "low": 1, "high": 99}),
    ],
)
def test_what_tune_describes_is_understood(value: str, expected: dict[str, Any], tmp_path: Path) -> None:
    assert of(tmp_path, value) == expected


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def space():\n    return {'train.lr': tune.randn()}\n", "has no ends"),
        ("def space():\n    return {'train.lr': tune.sample_from(lambda _: 1)}\n", "cannot be repeated"),
        ("def space():\n    return {'train.lr': tune.choice([])}\n", "no values to choose from"),
        ("def space():\n    return {'train.lr': tune.choice([{1}])}\n", "must be such as a config has"),
        ("def space():\n    return {'train.lr': tune.uniform(2, 1)}\n", "the smaller end first"),
        ("def space():\n    return [1]\n", "must return a mapping of dotted keys, got list"),
        ("def space():\n    return {'a': tne.choice([1])}\n", r"mine\.py, line 5: NameError: .*\n    return {'a': tne"),
        ("def space(:\n", r"mine\.py, line 4: SyntaxError"),
        ("raise KeyError('x')\n", r"mine\.py, line 4: KeyError: 'x'\n    raise KeyError"),
        ("X = 1\n", "say which space: none"),
        ("def one():\n    return {}\n\n\ndef two():\n    return {}\n", "say which space: .*:one, .*:two"),
    ],
)
def test_a_file_that_is_no_space_says_where_and_why(body: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=says):
        space(tmp_path, body)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("treelra", "did you mean 'treelora'"),
        ("baselines", "say which space: baselines:"),
        ("baselines:repaly", "did you mean baselines:replay"),
        ("./none.py", r"there is no file \./none\.py"),
    ],
)
def test_a_space_that_there_is_not_names_the_nearest(name: str, says: str) -> None:
    with pytest.raises(SpaceError, match=says):
        load_space(name)


def test_a_key_that_is_unknown_and_a_value_that_is_refused_are_named(tmp_path: Path) -> None:
    base = load("quickstart")
    with pytest.raises(
        ConfigError, match=r"space mine cannot be used:\n  method\.lamda is unknown; did you mean method\.l"
    ):
        space(tmp_path, "def f():\n    return {'method.lamda': tune.uniform(0, 1)}\n").require_fits(base)
    for value in ("tune.choice([0.1, 0.2, -1])", "tune.uniform(-1, 1)"):
        with pytest.raises(ConfigError, match=r"train\.lr is -1"):
            space(tmp_path, f"def f():\n    return {{'train.lr': {value}}}\n").require_fits(base)


def test_keys_set_by_hand_are_left_alone(tmp_path: Path) -> None:
    body = "def f():\n    return {'method': {'name': 'replay'}, 'method.memory': tune.choice([1, 2]), 'train.lr': 0.1,"
    found = space(tmp_path, body + " 'train.batch': tune.choice([4, 8])}\n")
    under = found.under({"train.lr": 0.3, "method.memory": 7})
    assert under.fixed == {"method": {"name": "replay"}, "method.memory": 7}  # the base has the learning rate
    assert set(under.parameters) == {"train.batch"}
    under.require_fits(load("quickstart"))
    with pytest.raises(SpaceError, match="leaves nothing to search"):
        found.under({"train": {}, "method.memory": 1}).require_fits(load("quickstart"))


RANGES = st.one_of(
    st.builds(lambda v: Parameter("choice", tuple(v)), st.lists(st.integers(), min_size=1, max_size=5)),
    st.builds(
        lambda kind, low, more: Parameter(kind, (), low, low + more),
        st.sampled_from(["uniform", "loguniform"]), st.floats(1e-3, 10), st.floats(0, 10),
    ),
    st.builds(
        lambda kind, low, more, step: Parameter(kind, (), low * (step or 1), (low + more) * (step or 1), step),
        st.sampled_from(["randint", "lograndint"]), st.integers(1, 9), st.integers(0, 9),
        st.sampled_from([None, 2, 5]),
    ),
)  # fmt: skip


@given(RANGES, st.integers(0, 99), st.integers(0, 99))
def test_what_is_drawn_lies_in_its_range_and_is_drawn_again(parameter: Parameter, seed: int, number: int) -> None:
    value = drawn({"a": parameter}, seed, number)["a"]
    assert value == drawn({"b": Parameter("choice", (1,)), "a": parameter}, seed, number)["a"]
    if parameter.kind == "choice":
        assert value in parameter.values
        return
    assert parameter.low <= value <= parameter.high
    assert isinstance(value, int) == parameter.whole
    if parameter.step:
        assert value % parameter.step == 0


def test_draws_are_spread_over_the_range() -> None:
    log = [drawn({"a": Parameter("loguniform", (), 1e-3, 1.0)}, 0, n)["a"] for n in range(400)]
    assert 0.4 < sum(value < math.sqrt(1e-3) for value in log) / 400 < 0.6
    whole = [drawn({"a": Parameter("randint", (), 1, 4)}, 0, n)["a"] for n in range(400)]
    assert all(0.15 < whole.count(value) / 400 < 0.35 for value in range(1, 5))


def test_more_trials_begin_with_the_settings_of_fewer_and_none_stands_twice() -> None:
    parameters = {"a": Parameter("choice", (1, 2, 3)), "b": Parameter("choice", ("x", "y"))}
    found = random_settings(parameters, 6, 0)
    assert len({(s["a"], s["b"]) for s in found}) == 6
    assert random_settings(parameters, 4, 0) == found[:4]
    assert random_settings(parameters, 9, 0) == found
    assert random_settings(parameters, 6, 1) != found


def test_a_grid_is_all_settings_or_some_drawn_from_all() -> None:
    parameters = {"a": Parameter("choice", (1, 2, 3)), "b": Parameter("choice", ("x", "y"))}
    whole = grid_settings(parameters, 10, 0)
    assert Space("grid", {}, parameters).size == len(whole) == 6
    assert [(s["a"], s["b"]) for s in whole[:3]] == [(1, "x"), (1, "y"), (2, "x")]
    some = grid_settings(parameters, 3, 0)
    assert len(some) == 3
    assert [s for s in whole if s in some] == some
    assert grid_settings(parameters, 3, 1) != some
    with pytest.raises(SpaceError, match="a is a range, which no grid covers"):
        grid_settings({"a": Parameter("uniform", (), 0, 1)}, 3, 0)


def test_every_value_that_must_be_checked_occurs() -> None:
    parameters = {"a": Parameter("choice", (1, 2, 3)), "b": Parameter("uniform", (), 0.0, 1.0)}
    found = list(variations(parameters))
    assert {s["a"] for s in found} == {1, 2, 3}
    assert {s["b"] for s in found} == {0.0, 1.0}
