"""What a run leaves for its figures, wherever it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import toys
from treelora_ray.files import write_atomically
from treelora_ray.tracking.figure_data import figure_data
from treelora_ray.training.errors import Stopped
from treelora_ray.training.stream import StreamRun

TREELORA = {"name": "treelora", "guide": {"gate": 0.0}}
OUTSIDE = ("seconds", "peak_memory_bytes", "commit")  # what a run does not decide


def run_in(folder: Path, backbone: Path, options: dict[str, Any], tasks: int = 4) -> StreamRun:
    made = toys.config(backbone, options, train={"steps": 6})
    run = StreamRun(made, toys.stream(tasks), toys.method(made), folder)
    write_atomically(folder / "config.yaml", made.to_yaml().encode())
    return run


def result(folder: Path) -> dict[str, Any]:
    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(inner) for key, inner in value.items() if key not in OUTSIDE}
        return [timeless(inner) for inner in value] if isinstance(value, list) else value

    found: dict[str, Any] = timeless(json.loads((folder / "result.json").read_text()))
    return found


@pytest.mark.parametrize("mode", ["treelora", "paper", "released", "query"])
def test_a_run_that_was_stopped_in_a_task_leaves_what_an_uninterrupted_one_leaves(
    mode: str, tmp_path: Path, backbone: Path
) -> None:
    options = {"name": "treelora", "mode": mode} if mode != "query" else {**TREELORA, "guide": {"observe": "query"}}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    run_in(tmp_path / "whole", backbone, options).go()
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps > 4 * 7 - 4  # in the last task; asked before each task too

    stopped = run_in(tmp_path / "parts", backbone, options)
    stopped.stop = stop
    with pytest.raises(Stopped):
        stopped.go()
    assert stopped.done == 3
    resumed = run_in(tmp_path / "parts", backbone, options)
    resumed.resume()
    resumed.go()
    whole = result(tmp_path / "whole")
    assert result(tmp_path / "parts") == whole
    assert whole["pulls"]["task"] == "t3" if mode != "paper" else whole["pulls"] is None  # its warm-up is longer
    again = run_in(tmp_path / "parts", backbone, options)
    again.resume()
    again.go()  # nothing is left to learn, and the result is written anew
    anew = result(tmp_path / "parts")
    assert all(anew[key] == whole[key] for key in ("records", "matrix", "tree", "distances", "pulls"))


def test_a_tree_over_a_budget_leaves_its_growth_its_merges_and_its_figures(tmp_path: Path, backbone: Path) -> None:
    run_in(tmp_path, backbone, {"name": "treelora", "guide": {"gate": 0.0, "budget": 2}}, tasks=5).go()
    found = json.loads((tmp_path / "result.json").read_text())
    reports = [record["report"] for record in found["records"]]
    assert [len(report.get("tree", {}).get("parent", ())) for report in reports] == [0, 3, 5, 7, 0]
    assert [len(report.get("merged", ())) >= 2 for report in reports] == [False, False, True, True, True]
    assert [len(row) for row in found["distances"]["rows"]] == [0, 1, 2, 3, 4]
    assert found["layers"] == reports[0]["layers"]
    assert [each["name"] for each in found["data"]] == found["stream"]
    names = ["scores", "course", "forgetting", "tree", "growth", "similarity", "pulls", "times"]
    assert list(figure_data(found)) == names


def test_of_other_methods_there_are_scores_and_times(tmp_path: Path, backbone: Path) -> None:
    run_in(tmp_path, backbone, {"name": "seqlora"}, tasks=2).go()
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(figure_data(found)) == ["scores", "course", "forgetting", "times"]
