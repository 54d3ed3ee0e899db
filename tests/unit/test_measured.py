"""What the guide measures for figures alone: distances, splits by layer, and comparisons of the task in progress."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.lives import RAGGED, gradient
from treelora_ray.cluster.guide_server import answer_of
from treelora_ray.core import Guide, GuideConfig, Layout
from treelora_ray.core import guide as guide_module
from treelora_ray.core.signature import directions, layer_distances

LAYOUT = Layout.of_sizes([16, 16], ["low", "high"])


def signs(text: str) -> Tensor:
    return torch.tensor([1.0 if sign == "+" else -1.0 for sign in text.replace(" ", "")])


def worked_example() -> Guide:
    """The five tasks of the algorithm's page."""
    signatures = {
        "reviews": ("++++ ++++ ++++ ++++", "++++ ---- ++++ ----"),
        "films": ("-+++ ++++ ++++ +++-", "-++- +--+ ++++ ----"),
        "news": ("++++ ++++ ---- ----", "++-- ++-- ++-- ++--"),
        "wiki": ("++++ +++- -+-- ----", "++-- ++-- -++- ++--"),
        "code": ("+--+ ++++ ++-- ----", "+-+- +-+- +-+- +-+-"),
    }
    guide = Guide(LAYOUT)
    for name, parts in signatures.items():
        guide.begin_task(name)
        guide.insert(LAYOUT.flatten(dict(zip(LAYOUT.names, map(signs, parts), strict=True))))
    return guide


def test_distances_are_those_of_each_task_to_the_ones_before_it() -> None:
    found = worked_example().measured()["distances"]
    assert found["tasks"] == ["reviews", "films", "news", "wiki", "code"]
    # Of sign vectors: the root of the share of signs that differ, meant over the two layers.
    half, near, alike = 0.7071, round((8**-0.5 + 0.5) / 2, 4), 0.3536
    code = round((0.5 + 0.5**0.5) / 2, 4)
    expected = [[], [near], [half] * 2, [half, half, alike], [half, half, code, code]]
    assert found["rows"] == [pytest.approx(row, abs=2e-4) for row in expected]


def test_a_split_has_each_layers_mean_distance_between_its_halves() -> None:
    nodes = {
        tuple(below(guide_nodes, n)): guide_nodes[n] for guide_nodes in [worked_example().to_data()] for n in range(9)
    }
    apart = {tasks: node["layers"] for tasks, node in nodes.items() if len(tasks) > 1}
    assert apart[("reviews", "films")] == pytest.approx([8**-0.5, 0.5], abs=1e-3)
    assert apart[("news", "wiki")] == pytest.approx([8**-0.5, 8**-0.5], abs=1e-3)
    assert apart[("news", "wiki", "code")] == pytest.approx([0.5, 0.5**0.5], abs=1e-3)
    assert apart[("reviews", "films", "news", "wiki", "code")] == pytest.approx([0.5**0.5] * 2, abs=1e-3)
    assert all("layers" not in node for tasks, node in nodes.items() if len(tasks) == 1)


def below(nodes: list[dict[str, Any]], node: int) -> list[str]:
    if nodes[node]["task"] is not None:
        return [nodes[node]["task"]]
    return [task for n, child in enumerate(nodes) if child["parent"] == node for task in below(nodes, n)]


@pytest.mark.parametrize("depth", [64, 1])
def test_the_layers_of_a_split_mean_to_the_height_of_an_average_linkage(depth: int) -> None:
    guide = Guide(RAGGED, GuideConfig(depth=depth))
    for task in range(9):
        guide.begin_task(f"t{task}")
        guide.insert(gradient(task, 0))
    for number, node in enumerate(guide.to_data()):
        if node["task"] is None and len(guide.tree.children[number]) == 2:
            assert np.mean(node["layers"]) == pytest.approx(node["height"], abs=1e-4)
        if node["task"] is None and len(guide.tree.children[number]) > 2:  # all pairs of tasks of different children
            members = guide.tree.members(number)
            rows = [layer_distances(guide.layout, guide.store.rows[i], guide.store.rows[j], "cosine")
                    for i in members for j in members if i < j]  # fmt: skip
            assert node["layers"] == pytest.approx(torch.stack(rows).mean(0).tolist(), abs=1e-3)


def test_exact_rounds_show_every_task_once_a_round_with_the_distance_seen() -> None:
    guide = worked_example()
    guide.begin_task("new")
    flats = [torch.randn(LAYOUT.total, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for step, flat in enumerate(flats):
        guide.probe(step, flat)
    found = guide.measured()["pulls"]
    assert (found["task"], found["layers"], found["starts"], found["groups"]) == (
        "new",
        ["low", "high"],
        [0, 1, 2, 3],
        0,
    )
    assert np.array(found["count"]).shape == (2, 3, 5)
    assert (np.array(found["count"]) == 1).all()
    seen = [guide.store.from_rows(directions(LAYOUT, flat, "cosine"), np.arange(5)) for flat in flats]  # [5, L] each
    expected = torch.stack(seen).permute(2, 0, 1).numpy()
    np.testing.assert_allclose(np.array(found["distance"], float), expected, atol=1e-4)


def test_a_search_counts_what_it_looked_at_and_leaves_the_rest_empty() -> None:
    guide = Guide(RAGGED, GuideConfig(pulls_per_round=3))
    for task in range(12):
        guide.begin_task(f"t{task}")
        for step in range(2):
            guide.probe(step, gradient(task, step))
        pulls = guide.measured()["pulls"]
        guide.insert()
    count, distance = np.array(pulls["count"]), np.array(pulls["distance"], dtype=float)
    assert count.sum() + pulls["groups"] == 2 * 3 * len(RAGGED)  # rounds, pulls a round, layers
    assert pulls["groups"] > 0
    assert count.sum((1, 2)).min() < 11
    np.testing.assert_array_equal(np.isnan(distance), count == 0)


@pytest.mark.parametrize("steps", [1, 11, 12, 13, 24, 25, 300])
def test_steps_are_summed_up_in_at_most_twelve_stretches_with_mean_distances(steps: int) -> None:
    guide = Guide(RAGGED, GuideConfig.of("paper"))
    guide.begin_task("first")
    guide.insert(gradient(0, 0))
    guide.begin_task("second")
    assert guide.measured()["pulls"] is None
    for step in range(10, 10 + steps):
        guide.select(step)
        guide.observe(step, np.full(len(RAGGED), step / 1000))
    found = guide.measured()["pulls"]
    length = 2 ** max(0, math.ceil(math.log2(steps / 12)))
    starts = [*range(10, 10 + steps, length), 10 + steps]
    assert found["starts"] == starts
    stretches = list(itertools.pairwise(starts))
    assert found["count"] == [[[end - first] for first, end in stretches]] * len(RAGGED)
    means = [[pytest.approx((first + end - 1) / 2000, abs=1e-4)] for first, end in stretches]
    assert found["distance"] == [means] * len(RAGGED)


def test_of_many_layers_eight_are_shown_the_first_and_the_last_among_them() -> None:
    layout = Layout.of_sizes([8] * 30)
    guide = Guide(layout)
    for task in range(2):
        guide.begin_task(f"t{task}")
        guide.probe(0, torch.randn(layout.total, generator=torch.Generator().manual_seed(task)))
        pulls = guide.measured()["pulls"]
        guide.insert()
    assert len(pulls["layers"]) == len(pulls["count"]) == 8
    assert (pulls["layers"][0], pulls["layers"][-1]) == (layout.names[0], layout.names[-1])


@pytest.mark.parametrize("mode", ["treelora", "paper"])
def test_the_comparisons_of_a_task_survive_a_snapshot_in_its_middle(mode: str) -> None:
    config = GuideConfig.of(mode, pulls_per_round=2)  # type: ignore[arg-type]

    def live(guide: Guide, task: int, steps: range) -> None:
        for step in steps:
            if mode == "treelora":
                guide.probe(step, gradient(task, step))
            else:
                guide.observe(step, np.abs(np.sin(guide.select(step) + step)))

    whole = Guide(RAGGED, config)
    for task in range(6):
        whole.begin_task(f"t{task}")
        live(whole, task, range(4 if task else 0))
        whole.insert(gradient(task, 0))
    whole.begin_task("last")
    live(whole, 6, range(2))
    half = whole.snapshot()
    live(whole, 6, range(2, 5))
    resumed = Guide(RAGGED, config)
    resumed.restore(half)
    live(resumed, 6, range(2, 5))
    assert resumed.measured() == whole.measured()


def test_with_many_tasks_nothing_is_kept_or_measured_for_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_module, "MOST_DRAWN", 4)
    guide = worked_example()
    guide.begin_task("new")
    guide.probe(0, torch.ones(LAYOUT.total))
    assert guide.current is not None
    assert guide.current.pulls is None
    assert guide.measured() == {"distances": None, "pulls": None}
    assert all("layers" not in node for node in guide.to_data())


def test_signatures_too_large_to_compare_all_pairs_have_no_splits_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = worked_example()
    monkeypatch.setattr(guide_module, "MOST_COMPARED", 25 * LAYOUT.total)
    assert len([node for node in guide.to_data() if "layers" in node]) == 4
    monkeypatch.setattr(guide_module, "MOST_COMPARED", 25 * LAYOUT.total - 1)
    assert not [node for node in guide.to_data() if "layers" in node]


def test_a_server_answers_with_the_same() -> None:
    guide = worked_example()
    guide.begin_task("new")
    guide.probe(0, torch.ones(LAYOUT.total))
    assert answer_of(guide, "measured", {}) == guide.measured()
