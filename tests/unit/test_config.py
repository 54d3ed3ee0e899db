import json
from typing import Any

import pytest

from treelora_ray.core.config import MODES, GuideConfig, Mode
from treelora_ray.core.errors import SettingError


def test_the_three_modes_are_what_their_page_says() -> None:
    ours, paper, released = GuideConfig.of(), GuideConfig.of("paper"), GuideConfig.of("released", steps_per_epoch=9)
    assert (ours.signature, ours.distance, ours.tree, ours.observe) == ("anchor", "cosine", "linkage", "probe")
    assert (ours.search, ours.pulls_per_round, ours.width, ours.gate) == ("tree-lcb", 32, "noise", 0.02)
    assert (paper.signature, paper.distance, paper.tree, paper.observe) == ("delta", "l1", "kd-radius", "step")
    assert (paper.pulls_per_round, paper.lcb_c, paper.width, paper.gate) == (1, 2.0, "paper", 0.0)
    assert (paper.sketch_dim, paper.tree_update, paper.merge_signatures) == (None, "rebuild", True)
    assert (released.signature, released.distance, released.tree) == ("running", "l2", "kd-inner")
    assert (released.observe, released.merge_signatures, released.steps_per_epoch) == ("step", False, 9)
    assert GuideConfig() == ours
    assert tuple(MODES) == ("treelora", "paper", "released")


@pytest.mark.parametrize("mode", ["treelora", "paper"])
def test_changes_are_made_on_top_of_the_mode(mode: Mode) -> None:
    changed = GuideConfig.of(mode, budget=3, seed=7)
    assert (changed.mode, changed.budget, changed.seed) == (mode, 3, 7)
    assert changed.differences(GuideConfig.of(mode).to_json()) == [
        "seed is 7 here, 0 there",
        "budget is 3 here, None there",
    ]


def test_unknown_modes_and_settings_are_named_with_what_is_near() -> None:
    with pytest.raises(SettingError, match="mode 'treelore' is unknown; known: treelora, paper, released"):
        GuideConfig.of("treelore")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="mode is 'other'; known: treelora, paper, released"):
        GuideConfig(mode="other")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"'pull_per_round' is unknown; did you mean 'pulls_per_round'\?"):
        GuideConfig.of(pull_per_round=3)
    with pytest.raises(SettingError, match=r"setting 'zzz' is unknown; known: mode, seed, .*, steps_per_epoch"):
        GuideConfig.of(zzz=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth is 0; it must be a whole number from 1 up"),
        ({"budget": 0}, "budget is 0; it must be a whole number from 1 up"),
        ({"pulls_per_round": 0}, "pulls_per_round is 0; it must be a whole number from 1 up"),
        ({"sketch_dim": 0}, "sketch_dim is 0; it must be a whole number from 1 up"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0; it must be a whole number from 1 up"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 up"),
        ({"depth": 2.5}, "depth is 2.5; it must be a whole number"),
        ({"depth": None}, "depth is None; it must be a whole number"),
        ({"pulls_per_round": None}, "pulls_per_round is None; it must be a whole number"),
        ({"seed": None}, "seed is None; it must be a whole number"),
        ({"lcb_c": -0.1}, "lcb_c is -0.1; it must be a number from 0 up"),
        ({"lcb_c": float("nan")}, "lcb_c is nan; it must be a number from 0 up"),
        ({"lcb_c": float("inf")}, "lcb_c is inf; it must be a number from 0 up"),
        ({"lcb_c": "2"}, "lcb_c is '2'; it must be a number from 0 up"),
        ({"gate": 1}, r"gate is 1; it must lie in \[0, 1\)"),
        ({"gate": -0.01}, r"gate is -0.01; it must lie in \[0, 1\)"),
        ({"gate": None}, r"gate is None; it must lie in \[0, 1\)"),
        ({"distance": "l1"}, "a sketch does not keep l1: use distance cosine, or sketch_dim=None"),
        ({"signature": "delta"}, "signature is 'delta', but a probe measures gradients at the anchor"),
        ({"tree": "oak"}, "tree is 'oak'; known: linkage, kd-radius, kd-inner"),
        ({"search": "ucb"}, "search is 'ucb'; known: "),
        ({"commit": "leaf"}, "commit is 'leaf'; known: layer, task"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        GuideConfig.of(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": None, "sketch_dim": None, "distance": "l1", "lcb_c": 0, "gate": 0, "seed": 0},
        {"budget": 1, "sketch_dim": 1, "depth": 1, "pulls_per_round": 1, "steps_per_epoch": 1, "gate": 0.99},
        {"observe": "query", "signature": "grad_ema"},
        {"observe": "step", "signature": "delta"},
    ],
)
def test_settings_at_their_limits_are_taken(changes: dict[str, Any]) -> None:
    config = GuideConfig.of(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_the_released_mode_needs_the_steps_of_an_epoch_and_an_exchange_at_each() -> None:
    with pytest.raises(SettingError, match="steps_per_epoch is missing; the released mode restarts"):
        GuideConfig.of("released")
    with pytest.raises(SettingError, match=r"observe is 'query'; the released mode .*: use step"):
        GuideConfig.of("released", steps_per_epoch=3, observe="query")


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_only_our_own_mode_probes(mode: Mode) -> None:
    assert GuideConfig.of("treelora").observe == "probe"
    with pytest.raises(SettingError, match=f"observe is 'probe'; mode {mode} exchanges at every step"):
        GuideConfig(mode=mode, steps_per_epoch=3)


def test_all_errors_stand_in_one_report() -> None:
    with pytest.raises(SettingError) as error:
        GuideConfig.of("released", depth=0, budget=0, lcb_c=-1, gate=1, linkage="none", observe="probe")
    lines = str(error.value).splitlines()
    assert lines[0] == "guide settings:"
    firsts = [line.split()[0] for line in lines[1:]]
    assert firsts == [
        "linkage",
        "depth",
        "budget",
        "lcb_c",
        "gate",
        "steps_per_epoch",
        "signature",
        "observe",
    ]


def test_differences_read_back_from_json_are_said_in_words() -> None:
    config = GuideConfig.of("paper")
    data = json.loads(json.dumps(config.to_json()))
    assert config.differences(data) == []
    data["lcb_c"], data["new"] = 0.5, 1
    del data["depth"]
    assert sorted(config.differences(data)) == [
        "depth is 64 here, None there",
        "lcb_c is 2.0 here, 0.5 there",
        "new is None here, 1 there",
    ]
