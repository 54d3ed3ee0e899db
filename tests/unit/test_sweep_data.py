"""What is said of a sweep: its front, standings and importances, on trials whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import sweeps
from tests.sweeps import PARAMETERS, sweep, trial
from treelora_ray.tracking import sweep_data
from treelora_ray.tracking.sweep_data import (
    LEAST,
    Importance,
    dominates,
    figure_data,
    front,
    mattered,
    objectives,
    ordered,
    ranked,
    read,
    standing,
)
from treelora_ray.training.errors import RunError

UNIFORM: dict[str, Any] = {"kind": "uniform", "low": 0.0, "high": 1.0}
LOG: dict[str, Any] = {"kind": "loguniform", "low": 1e-4, "high": 1.0}
CHOICE: dict[str, Any] = {"kind": "choice", "values": ["a", "b", "c"]}


def finished(values: list[dict[str, Any]], scores: list[float], parameters: dict[str, Any]) -> dict[str, Any]:
    trials = [trial(n, at, [score]) for n, (at, score) in enumerate(zip(values, scores, strict=True))]
    for each in trials:
        each["percent"] = each["history"][-1]["percent"] = 100.0
    return sweep(trials, parameters)


def by_name(found: dict[str, Any]) -> dict[str, Importance]:
    return {each.parameter: each for each in mattered(found).found}


# -- the front


POINTS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12)


@settings(max_examples=200)
@given(POINTS)
def test_no_trial_of_the_front_is_dominated_and_all_others_are(points: list[tuple[int, int, int]]) -> None:
    trials = []
    for number, (score, seconds, forgetting) in enumerate(points):
        made = trial(number, {}, [50.0])
        trials.append({**made, "val_op": score, "seconds": seconds, "forgetting": forgetting})
    found = sweep(trials)
    best = set(front(found))
    at = {each["id"]: objectives(each) for each in trials}
    assert best
    for name, point in at.items():
        beaten = any(dominates(other, point) for other in at.values())  # type: ignore[arg-type]
        assert beaten == (name not in best)
    top = max(points)
    assert any(trials[n]["id"] in best for n, point in enumerate(points) if point[0] == top[0])


def test_only_trials_that_came_to_the_end_are_on_the_front() -> None:
    values = [trial(0, {}, [60.0, 50.0], tasks=2), trial(1, {}, [90.0], "stopped"), trial(2, {}, [95.0], "failed")]
    assert front(sweep(values)) == ["0000"]


@pytest.mark.parametrize(("better", "worse"), [((0, 0, 0), (0, 0, 1)), ((-1, 2, 3), (0, 2, 3)), ((0, 1, 0), (0, 2, 0))])
def test_one_dominates_where_it_is_better_in_one_and_worse_in_none(better: Any, worse: Any) -> None:
    assert dominates(better, worse)
    assert not dominates(worse, better)
    assert not dominates(better, better)
    assert not dominates((0, 5), (1, 0))


# -- standings


def test_trials_are_compared_at_the_last_percent_that_both_have_reached() -> None:
    """The one that was stopped scores most of all at its end, since scores fall; where it ended, it was last."""
    found = sweep(
        [
            trial(0, {}, [90.0, 80.0, 70.0], tasks=3),
            trial(1, {}, [88.0, 70.0, 75.0], tasks=3),
            trial(2, {}, [85.0], "stopped", tasks=3),
        ]
    )
    assert standing(found) == {"0000": 0.5, "0001": 1.0, "0002": 0.0}


def test_a_tie_counts_half_and_less_is_better_where_the_sweep_says_so() -> None:
    found = sweep([trial(n, {}, [value]) for n, value in enumerate([3.0, 3.0, 1.0])])
    assert standing(found) == {"0000": 0.75, "0001": 0.75, "0002": 0.0}
    assert standing({**found, "mode": "min"}) == {"0000": 0.25, "0001": 0.25, "0002": 1.0}


def test_failed_trials_and_trials_without_a_score_have_no_standing() -> None:
    found = sweep(
        [trial(0, {}, [5.0]), trial(1, {}, [9.0], "failed"), trial(2, {}, [], "running"), trial(3, {}, [4.0])]
    )
    assert standing(found) == {"0000": 1.0, "0003": 0.0}


def test_the_best_come_first_then_those_that_came_far() -> None:
    done = [trial(n, {}, [value] * 12) for n, value in enumerate([70.0, 80.0])]
    cut = [trial(2, {}, [99.0], "stopped"), trial(3, {}, [50.0] * 4, "stopped")]
    assert [each["id"] for each in ranked(sweep([*cut, *done]))] == ["0001", "0000", "0003", "0002"]


# -- importance


@pytest.mark.parametrize("count", [12, 24, 64])
@pytest.mark.parametrize("shape", ["rise", "best in between", "log scale", "choice"])
def test_a_parameter_that_decides_is_told_from_those_that_do_not(count: int, shape: str) -> None:
    rng = np.random.default_rng(count)
    values = [
        {
            "deciding": float(10 ** rng.uniform(-4, 0)),
            "idle": float(rng.uniform()),
            "word": str(rng.choice(["a", "b", "c"])),
        }
        for _ in range(count)
    ]
    effect = {
        "rise": lambda at: at["deciding"],
        "best in between": lambda at: -((np.log10(at["deciding"]) + 2) ** 2),
        "log scale": lambda at: np.log10(at["deciding"]),
        "choice": lambda at: {"a": 0.0, "b": 3.0, "c": 1.0}[at["word"]],
    }[shape]
    parameters = {"deciding": LOG, "idle": UNIFORM, "word": CHOICE}
    found = by_name(finished(values, [50 + 10 * effect(at) + rng.normal(0, 0.3) for at in values], parameters))
    first = "word" if shape == "choice" else "deciding"
    assert next(iter(found)) == first
    assert found[first].sure
    assert found[first].share > 0.6
    assert found[first].low > 0.4
    for name in set(parameters) - {first}:
        assert found[name].share < found[first].share - 0.3


def test_of_parameters_that_do_nothing_few_are_taken_for_more_and_their_shares_have_mean_0() -> None:
    sure, shares = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        values = [{"x": float(rng.uniform()), "word": str(rng.choice(["a", "b", "c"]))} for _ in range(12)]
        found = by_name(finished(values, rng.normal(60, 5, 12).tolist(), {"x": UNIFORM, "word": CHOICE}))
        sure += any(each.sure for each in found.values())
        shares += [each.share for each in found.values()]
    assert sure <= 6  # of 40 sweeps, where 2 are expected
    assert abs(np.mean(shares)) < 0.06


def test_the_share_is_what_a_parabola_of_ranks_explains_worked_out_by_hand() -> None:
    scores = [1.0, 2.0, 4.0, 3.0, 5.0, 6.0, 8.0, 7.0]
    found = by_name(finished([{"x": n / 10} for n in range(8)], scores, {"x": UNIFORM}))["x"]
    ranks, y = np.arange(8.0), (np.array(scores) - 1) / 7
    left = y - np.polyval(np.polyfit(ranks, y, 2), ranks)
    assert found.share == pytest.approx(1 - (left @ left / 5) / (((y - y.mean()) ** 2).sum() / 7))
    assert found.low <= found.share <= found.high or found.low < found.high


def test_scales_do_not_matter_and_nor_does_the_order_of_trials() -> None:
    rng = np.random.default_rng(3)
    xs, scores = rng.uniform(size=10), rng.normal(size=10).tolist()
    one = by_name(finished([{"x": float(x)} for x in xs], scores, {"x": UNIFORM}))["x"]
    other = by_name(finished([{"x": float(np.exp(9 * x))} for x in xs], scores, {"x": LOG}))["x"]
    assert one == other
    back = by_name(finished([{"x": float(x)} for x in xs[::-1]], scores[::-1], {"x": UNIFORM}))["x"]
    assert back.share == pytest.approx(one.share)


def test_trials_that_were_stopped_count() -> None:
    """All good settings came to the end, all bad ones were stopped: among finished ones alone nothing differs."""
    values = [{"x": n / 12} for n in range(12)]
    trials = [
        trial(n, at, [60.0 + n] * 12) if n > 5 else trial(n, at, [60.0 + n] * 2, "stopped")
        for n, at in enumerate(values)
    ]
    assert by_name(sweep(trials, {"x": UNIFORM}))["x"].sure


def test_too_few_trials_say_so() -> None:
    few = finished([{"x": n / 9} for n in range(LEAST - 1)], [float(n) for n in range(LEAST - 1)], {"x": UNIFORM})
    assert mattered(few).found == ()
    assert mattered(few).notes == (f"{LEAST - 1} trials have a score: what mattered is told from {LEAST} on.",)


def test_a_constant_parameter_and_constant_scores_say_so() -> None:
    values = [{"x": n / 9, "same": 3} for n in range(8)]
    found = mattered(
        finished(values, [float(n) for n in range(8)], {"x": UNIFORM, "same": {"kind": "choice", "values": [3]}})
    )
    assert [each.parameter for each in found.found] == ["x"]
    assert found.notes == ("same is the same in all trials with a score.",)
    flat = mattered(finished(values, [5.0] * 8, {"x": UNIFORM}))
    assert (flat.found, flat.notes) == ((), ("All trials score alike, so no parameter explains a difference.",))


def test_a_parameter_that_few_trials_have_says_so() -> None:
    values: list[dict[str, Any]] = [{"x": n / 9, **({"rare": n} if n < 3 else {})} for n in range(9)]
    found = mattered(finished(values, [float(n) for n in range(9)], {"x": UNIFORM, "rare": UNIFORM}))
    assert found.notes == ("rare was searched in 3 of them only.",)


def test_a_choice_of_which_every_trial_has_another_explains_nothing() -> None:
    words = [f"w{n}" for n in range(8)]
    found = by_name(
        finished(
            [{"w": word} for word in words], [float(n) for n in range(8)], {"w": {"kind": "choice", "values": words}}
        )
    )
    assert (found["w"].share, found["w"].p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("searched", "values", "expected"),
    [
        (UNIFORM, [0.1, 0.2], True),
        ({"kind": "randint", "low": 1, "high": 9}, [1, 2], True),
        ({"kind": "choice", "values": [2, 4, 8]}, [2, 4, 8], False),
        ({"kind": "choice", "values": [2, 4, 8, 16]}, [2, 4, 8, 16], True),
        ({"kind": "choice", "values": [True, False]}, [True, False], False),
        (CHOICE, ["a", "b"], False),
        ({"kind": "choice", "values": [None, 1]}, [None, 1], False),
        ({"kind": "choice", "values": [["q"], ["q", "v"]]}, [["q"], ["q", "v"]], False),
    ],
)
def test_numbers_are_ordered_unless_they_are_few_choices(searched: Any, values: Any, expected: bool) -> None:
    assert ordered(searched, values) == expected


def test_holm_corrects_for_the_number_of_parameters() -> None:
    found = by_name(sweeps.drawn(64))
    ordered_by_p = sorted(found.values(), key=lambda each: each.p)
    most = 0.0
    for number, each in enumerate(ordered_by_p):
        most = max(most, min(1.0, each.p * (len(found) - number)))
        assert each.adjusted == pytest.approx(most)


# -- what figures show


def test_a_sweep_has_every_figure_and_one_without_scores_none() -> None:
    assert list(figure_data(sweeps.drawn(16))) == ["sweep_front", "sweep_importance", "sweep_parallel", "sweep_curves"]
    values = [{"train.lr": 0.001}, {"train.lr": 0.002}]
    nothing = [trial(n, at, [], "failed", error="ValueError: no") for n, at in enumerate(values)]
    assert figure_data(sweep(nothing)) == {}
    assert list(figure_data(sweep([trial(0, values[0], [60.0, 50.0], tasks=2)]))) == ["sweep_front", "sweep_curves"]


def test_figures_are_plain_data() -> None:
    data = figure_data(sweeps.drawn(24))
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_on_parallel_axes_ends_are_the_ends_and_logs_are_even() -> None:
    values = [
        {"train.lr": lr, "method.start": start} for lr, start in ((1e-4, "fresh"), (1e-3, "similar"), (1e-2, "similar"))
    ]
    trials = [trial(n, at, [60.0 + n] * 12) for n, at in enumerate(values)]
    parameters = {key: PARAMETERS[key] for key in ("train.lr", "method.start")}
    data = figure_data(sweep(trials, parameters))["sweep_parallel"]
    assert [axis["name"] for axis in data["axes"]] == ["train.lr", "method.start"]
    assert data["axes"][1]["values"] == ["similar", "fresh"]
    at = {line["trial"]: line["at"] for line in data["lines"]}
    assert at == {"0000": [0.0, 1.0], "0001": [pytest.approx(0.5), 0.0], "0002": [1.0, 0.0]}
    assert [line["trial"] for line in data["lines"]] == ["0000", "0001", "0002"]  # the best is drawn last
    upside = figure_data({**sweep(trials, parameters), "mode": "min"})["sweep_parallel"]
    assert [line["trial"] for line in upside["lines"]] == ["0002", "0001", "0000"]


def test_many_parameters_are_shown_as_far_as_they_matter() -> None:
    rng = np.random.default_rng(0)
    names = [f"p{n}" for n in range(sweep_data.AXES + 4)]
    values = [{name: float(rng.uniform()) for name in names} for _ in range(20)]
    trials = [trial(n, at, [60 + 30 * at[names[-1]]] * 12) for n, at in enumerate(values)]
    data = figure_data(sweep(trials, dict.fromkeys(names, UNIFORM)))["sweep_parallel"]
    assert (len(data["axes"]), data["left_out"]) == (sweep_data.AXES, 4)
    assert data["axes"][0]["name"] == names[-1]


def test_a_folder_without_a_sweep_and_a_damaged_one_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"is no sweep: it has no sweep\.json; give the folder that `treelora sweep` made"
    ):
        read(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(RunError, match=r"is damaged .* run the same `treelora sweep` again"):
        read(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps(sweeps.drawn(8)))
    assert len(read(tmp_path)["trials"]) == 8
