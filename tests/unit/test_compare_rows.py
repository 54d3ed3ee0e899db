"""What may be asked for as a row, and what a comparison is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_ray.cluster.compare_plan import CompareOptions, Comparison, changed_data
from treelora_ray.cluster.compare_rows import Row, read_rows
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.inner_runs import TRIES
from treelora_ray.config import load
from treelora_ray.methods.options import METHOD_OPTIONS
from treelora_ray.store import RunFolder

FITTING = ["seqlora", "ncm"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("seqlora, ewc", [Row("seqlora", "seqlora"), Row("ewc", "ewc")]),
        ("all", [Row("seqlora", "seqlora"), Row("ncm", "ncm")]),
        ("all,der++", [Row("seqlora", "seqlora"), Row("ncm", "ncm"), Row("der++", "der++")]),
        (
            "seqlora:objective.ce_scope=current:train.lr=1e-3",
            [Row("seqlora ce_scope=current lr=1e-3", "seqlora", {"objective.ce_scope": "current", "train.lr": 1e-3})],
        ),
        ("mine=ewc:method.lambda=3", [Row("mine", "ewc", {"method.lambda": 3})]),
        # Commas in lists and colons in values are no marks.
        (
            "seqlora:model.lora.layers=[0, 1]:model.backbone=builtin:digits-vit,ncm",
            [
                Row(
                    "seqlora layers=[0, 1] backbone=builtin:digits-vit",
                    "seqlora",
                    {"model.lora.layers": [0, 1], "model.backbone": "builtin:digits-vit"},
                ),
                Row("ncm", "ncm"),
            ],
        ),
    ],
)
def test_rows_on_the_command_line(text: str, rows: list[Row]) -> None:
    assert read_rows(text, FITTING) == rows


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(
        "seqlora:\nrouted: {method: seqlora, objective: {routing: inferred}}\n"
        "paper: {method: {name: treelora, mode: paper}, train.lr: 0.1}\newc: {method: {online: true}}\n"
    )
    assert read_rows(str(path), FITTING) == [
        Row("seqlora", "seqlora"),
        Row("routed", "seqlora", {"objective.routing": "inferred"}),
        Row("paper", "treelora", {"method": {"name": "treelora", "mode": "paper"}, "train.lr": 0.1}),
        Row("ewc", "ewc", {"method": {"name": "ewc", "online": True}}),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "must hold rows, each a label with its settings"),
        ("a: 3", "row 'a' of .* is 3: write its settings"),
        ("a: [", "is not valid YAML"),
        ("x: {train.steps: 3, method: ewc}", "row 'x' sets train.steps, which all rows have in common"),
        ("{}", "no method is named"),
    ],
)
def test_files_that_cannot_be_read_as_rows(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=says):
        read_rows(str(path), FITTING)


def test_all_mistakes_stand_in_one_report() -> None:
    with pytest.raises(ClusterError) as error:
        read_rows("ewd,a b=ewc,a-b=ewc,ncm:seed=3,=ewc", FITTING)
    said = str(error.value)
    assert "method 'ewd' is unknown; did you mean 'ewc'?" in said
    assert "two rows are named 'a-b'" in said  # their folders would be
    assert "row 'ncm seed=3' sets seed" in said
    assert "the label '' must have" in said


@given(st.text(min_size=1, max_size=30))
def test_a_label_always_gives_a_name_for_a_folder(label: str) -> None:
    load("quickstart", [f"name={Row(label, 'ewc').slug}-s0"])


def test_a_row_has_the_options_of_the_config_where_they_are_its_methods() -> None:
    base = load("quickstart")
    assert Row("treelora", "treelora").values(base) == {}
    assert Row("ewc", "ewc").values(base) == {"method": {"name": "ewc"}}
    own: dict[str, Any] = {"method": {"name": "treelora", "mode": "paper"}}
    assert Row("paper", "treelora", own).values(base) == own


# -- the plan


def plan(folder: Path, methods: str = "seqlora,routed=seqlora:train.lr=0.1", **options: Any) -> Comparison:
    base = load("quickstart", [f"folder={folder}", "train.threads=1"])
    options = {"seeds": (0, 1), "name": "c", **options}
    return Comparison(base, "classification", CompareOptions(methods=methods, **options), RunFolder(folder / "c"))


def test_cells_differ_in_their_row_and_their_seed_alone(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert [cell.id for cell in found.cells] == ["seqlora-s0", "routed-s0", "seqlora-s1", "routed-s1"]
    one, other = found.config(found.cells[0]), found.config(found.cells[3])
    assert (one.seed, one.train.lr, one.method.name) == (0, 5e-3, "seqlora")
    assert (other.seed, other.train.lr, other.name) == (1, 0.1, "routed-s1")
    assert one.stream == other.stream
    assert (one.tracking.group, one.tracking.report, one.folder) == ("c", False, str(tmp_path / "c" / "cells"))


def test_all_are_the_methods_that_learn_the_streams_objective(tmp_path: Path) -> None:
    assert set(plan(tmp_path, "all").rows) == set(METHOD_OPTIONS) - {"fix"}  # it is for prompts alone
    base = load("llm", [f"folder={tmp_path}"])
    made = Comparison(base, "causal-lm", CompareOptions(name="d"), RunFolder(tmp_path / "d"))
    assert "ncm" not in made.rows
    assert "treelora" in made.rows
    with pytest.raises(ClusterError, match=r"row 'ncm': method\.name 'ncm' learns classification only"):
        Comparison(base, "causal-lm", CompareOptions("ncm", name="d"), RunFolder(tmp_path / "d"))


def test_what_is_over_stays_over_what_was_cut_off_comes_first_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    found = plan(tmp_path)
    done, failed, _, cut = found.cells
    found.finished(done, {"memory": 1, "stored": 2})
    (tmp_path / "c" / done.run).mkdir(parents=True)
    (tmp_path / "c" / done.run / "result.json").write_text("{}")
    found.failed(failed, "NonFiniteError: x", final=True)
    found.at_once = 2
    found.begins(cut)
    again = plan(tmp_path, seeds=(0, 1, 2))
    assert again.at_once == 2  # which their times are read by, though nothing may be left to learn
    assert again.seconds == pytest.approx(found.seconds)
    assert [(cell.id, cell.state) for cell in again.cells] == [
        ("routed-s1", "waiting"), ("seqlora-s0", "finished"), ("routed-s0", "waiting"), ("seqlora-s1", "waiting"),
        ("seqlora-s2", "waiting"), ("routed-s2", "waiting"),
    ]  # fmt: skip
    assert [cell.kept for cell in again.cells if cell.state == "finished"] == [{"memory": 1, "stored": 2}]
    assert again.next() is again.cells[0]
    (tmp_path / "c" / done.run / "result.json").unlink()  # by its user, who wants it again
    assert {cell.state for cell in plan(tmp_path).cells} == {"waiting"}


def test_a_cell_is_marked_at_once_or_after_some_tries(tmp_path: Path) -> None:
    found = plan(tmp_path)
    one, other = found.cells[:2]
    found.failed(one, "NonFiniteError: x", final=True)
    assert (one.state, one.error) == ("failed", "NonFiniteError: x")
    states = []
    for _ in range(TRIES):
        found.failed(other, "its process has died", final=False)
        states.append(other.state)
    assert states == ["waiting"] * (TRIES - 1) + ["failed"]


def test_all_cells_of_a_seed_learn_the_same_rows(tmp_path: Path) -> None:
    found = plan(tmp_path)
    found.pin(found.cells[0], {"a": "1", "b": "2"})
    found.pin(found.cells[1], {"a": "1", "b": "2"})
    found.pin(found.cells[2], {"a": "9", "b": "2"})  # another seed draws others
    with pytest.raises(ClusterError, match=r"the rows of b have changed\): put the data back, or give"):
        found.pin(found.cells[1], {"a": "1", "b": "3"})
    assert changed_data({"a": "1"}, {"a": "1", "b": "2"}) == "its tasks were a, now they are a, b"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": ()}, "seeds are none"),
        ({"seeds": (1, 1)}, "seeds are 1, 1: give each once"),
        ({"reach": 0.0}, "reach is 0; it is a share"),
        ({"concurrency": 0}, "concurrency is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ClusterError, match=says):
        CompareOptions(**options)
