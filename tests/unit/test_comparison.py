"""A comparison's numbers, worked out by hand on made-up results; its table in three formats, its figures, its page."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import comparisons as made
from tests.unit.test_report import Page
from treelora_ray.tracking import comparison_table as tables
from treelora_ray.tracking import figures
from treelora_ray.tracking.comparison_data import Found, Line, figure_data, found, is_comparison, read, train_seconds
from treelora_ray.tracking.comparison_report import all_figures, comparison_page, sentence
from treelora_ray.training.errors import RunError

NAN = np.nan


def two(first: float, drop: float, then: float = 60.0) -> list[list[float]]:
    return [[first, NAN], [first - drop, then]]


def line(of: Found, label: str) -> Line:
    return next(line for line in of.lines if line.label == label)


def small(**more: Any) -> Found:
    """seqlora and treelora with two seeds, a cell that failed, and one that goes on."""
    cells = [
        made.cell("seqlora", 0),
        made.cell("seqlora", 1),
        made.cell("treelora", 0, kept={"memory": 2**21, "stored": 2**22}),
        made.cell("treelora", 1, "failed", error="NonFiniteError: a & b, 100% | of $x_1$"),
        made.cell("ncm", 0, "running"),
        made.cell("ncm", 1, "waiting"),
    ]
    spent: dict[str, Any] = {"seconds": {"statistics": 1.0, "train": 6.0, "evaluate": 2.0, "watch": 1.0}, "steps": 30}
    reused: dict[str, Any] = {"seconds": {"train": 9.0, "evaluate": 2.0}, "steps": 30, "reused": {"seconds": 0.5}}
    entries = [
        made.run("seqlora-s0", two(80, 10), 0, **spent),
        made.run("seqlora-s1", two(84, 10), 1, **spent),
        made.run("treelora-s0", two(90, 0), 0, method="treelora", **reused),
    ]
    about = made.about({"seqlora": "seqlora", "treelora": "treelora", "ncm": "ncm"}, cells, **more)
    return found(about, {entry.name: entry for entry in entries})


def test_values_are_means_over_the_seeds_that_finished() -> None:
    plain, tree, none = small().lines
    assert (plain.seeds, plain.of, tree.seeds, tree.of, none.seeds) == ([0, 1], 2, [0], 2, [])
    assert plain.values["op"].mean == 66
    assert plain.values["op"].std == pytest.approx(2**0.5)
    assert (tree.values["op"].mean, tree.values["op"].std) == (75.0, None)
    assert plain.values["forgetting"].mean == 10
    # Two tasks of 1 + 6 s; scoring and looks are no training. What was taken from another cell counts.
    assert plain.values["train_seconds"].mean == 14
    assert tree.values["train_seconds"].mean == 19
    assert tree.values["step_cost"].mean == pytest.approx(9 / 6)
    assert plain.values["step_cost"].mean == 1
    assert (tree.values["memory"].mean, tree.values["stored"].mean) == (2, 4)
    assert tree.failures == {"treelora-s1": "NonFiniteError: a & b, 100% | of $x_1$"}
    assert none.values == {}


def test_columns_that_no_row_has_are_left_out() -> None:
    assert [column.key for column in small().columns] == [
        "op", "bwt", "forgetting", "average_incremental_accuracy", "train_seconds", "step_cost", "memory", "stored",
    ]  # fmt: skip
    alone = found(made.about({"ewc": "ewc"}, [made.cell("ewc", 0)]), {"ewc-s0": made.run("ewc-s0", two(80, 10))})
    assert "step_cost" not in [column.key for column in alone.columns]  # there is no row seqlora to measure it by


@pytest.mark.parametrize(
    ("rows", "plain"), [({"a": "seqlora", "seqlora": "seqlora"}, "seqlora"), ({"a": "seqlora"}, "a")]
)
def test_step_cost_is_against_the_row_of_that_name_else_the_first_of_that_method(
    rows: dict[str, str], plain: str
) -> None:
    entries = [
        made.run(f"{label}-s0", two(80, 10), seconds={"train": 2.0 + number}) for number, label in enumerate(rows)
    ]
    of = found(made.about(rows, [made.cell(label, 0) for label in rows]), {entry.name: entry for entry in entries})
    assert line(of, plain).values["step_cost"].mean == 1
    (column,) = [column for column in of.columns if column.key == "step_cost"]
    assert f"over those of row {plain}, seed by seed" in column.words


@pytest.mark.parametrize(
    ("devices", "timed"),
    [
        ({"seqlora": ("cpu", "cpu"), "treelora": ("cuda", "cpu")}, "cpu"),
        ({"seqlora": ("cpu", "cuda"), "treelora": ("cuda", "cuda")}, "cuda"),
        ({"seqlora": ("cuda", "cuda"), "treelora": ("cpu", "cpu")}, None),
        ({"seqlora": ("cuda", "cuda"), "treelora": ("cuda", "cuda")}, "cuda"),
    ],
)
def test_times_are_of_a_device_that_every_row_has_met(devices: dict[str, tuple[str, str]], timed: str | None) -> None:
    slow, entries = {"cpu": 10.0, "cuda": 1.0}, []
    for label, by_seed in devices.items():
        for seed, device in enumerate(by_seed):
            entry = made.run(f"{label}-s{seed}", two(80, 10), seed, seconds={"train": slow[device] * (1 + seed)})
            entries.append(replace(entry, result={**entry.result, "device": device}))
    about = made.about(
        {"seqlora": "seqlora", "treelora": "treelora"}, [made.cell(n, s) for n in devices for s in (0, 1)]
    )
    of = found(about, {entry.name: entry for entry in entries})
    mixed = len({device for by_seed in devices.values() for device in by_seed}) > 1
    for each in of.lines:
        seeds = [seed for seed, device in enumerate(devices[each.label]) if device == timed]
        seconds = [2 * slow[str(timed)] * (1 + seed) for seed in seeds]  # of two tasks
        assert ("train_seconds" in each.values) == bool(seeds)
        if seeds:
            assert each.values["train_seconds"].mean == np.mean(seconds)
    # A step is measured beside that of its own seed, on the same device.
    both = [s for s in (0, 1) if timed and devices["seqlora"][s] == devices["treelora"][s] == timed]
    assert ("step_cost" in line(of, "treelora").values) == bool(both)
    said = [note for note in of.notes if note.startswith(("Times in the table", "The table has no times"))]
    assert bool(said) == mixed
    if mixed:
        assert (f"learnt on {timed} alone" if timed else "no times") in said[0]


def test_steps_to_an_accuracy_are_those_of_the_first_look_that_has_it() -> None:
    def looks(*scores: float) -> dict[str, Any]:
        return {"watched": [[10 * at, score] for at, score in enumerate(scores)], "steps": 30, "pass_rows": 64}

    rows = {"independent": "independent", "fast": "treelora", "slow": "ewc", "joint": "joint"}
    entries = [
        made.run("independent-s0", two(90, 0), **looks(20, 70, 76, 80)),  # 95% of 80 is 76: 20 steps
        made.run("fast-s0", two(90, 0), **looks(76, 75, 90, 90), probe_rounds=5),  # at once
        made.run("slow-s0", two(90, 0), **looks(10, 20, 30, 75.9)),  # never: all its steps
        made.run("joint-s0", [[90, 90]], **looks()),
    ]
    cells = [made.cell(label, 0) for label in rows]
    of = found(made.about(rows, cells, reach=0.95), {entry.name: entry for entry in entries})
    values = {each.label: each.values.get("reach") for each in of.lines}
    assert {label: value and value.mean for label, value in values.items()} == {
        "independent": 20, "fast": 0, "slow": 30, "joint": None,
    }  # fmt: skip
    assert [each.never for each in of.lines] == [0, 0, 2, 0]
    # 64 rows passed are two steps of 32; the rounds of a probe are steps too.
    assert [line(of, label).values["beside"].mean for label in ("fast", "slow")] == [5 + 2, 4 + 2]
    assert "30 (2 never)" in tables.markdown(of)
    assert "95% of the accuracy is reached that row independent has" in tables.markdown(of)
    bars = figure_data(of)["comparison_reach"]["bars"]
    assert [(bar["label"], bar["never"]) for bar in bars] == [("independent", 0), ("fast", 0), ("slow", 2)]
    # Without such a row it is the accuracy itself.
    rows.pop("independent")
    rest = {entry.name: entry for entry in entries[1:]}
    of = found(made.about(rows, cells[1:], reach=0.9), rest)
    assert line(of, "fast").values["reach"].mean == 20
    assert "until 90% accuracy is reached" in tables.markdown(of)
    # Where its seed has failed, there is nothing to measure by.
    gone = [made.cell("independent", 0, "failed", error="x"), *cells[1:]]
    of = found(made.about({"independent": "independent", **rows}, gone, reach=0.9), rest)
    assert "reach" not in line(of, "fast").values


def test_the_markdown_table_says_what_failed_and_what_is_missing() -> None:
    text = tables.markdown(small(at_once=2))
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len({row.count(" | ") for row in [rows[0], *rows[2:]]}) == 1
    assert rows[2].startswith("| seqlora | 2 | 66.0 ± 1.4 | ")
    assert rows[3].startswith("| treelora | 1 of 2, 1 failed | 75.0 | 0.0 | ")
    assert rows[4] == "| ncm | 0 of 2 |" + " – |" * 8
    assert "- treelora-s1 has failed: NonFiniteError: a & b, 100% | of $x_1$" in text
    assert "- 2 of 6 cells have not ended yet: ncm-s0, ncm-s1." in text
    assert "- Up to 2 cells were learnt at the same time" in text
    assert "- OP, %: mean score after the last task, percent; higher is better." in text


def test_the_csv_has_numbers_in_full_and_nothing_where_there_is_none() -> None:
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(small()))))
    assert [each["row"] for each in lines] == ["seqlora", "treelora", "ncm"]
    assert float(lines[0]["op_mean"]) == 66
    assert float(lines[0]["op_std"]) == pytest.approx(2**0.5, abs=1e-12)
    assert (lines[1]["op_mean"], lines[1]["op_std"], lines[2]["op_mean"]) == ("75.0", "", "")
    assert (lines[1]["failed"], lines[1]["errors"]) == ("1", "treelora-s1: NonFiniteError: a & b, 100% | of $x_1$")
    assert {len(each) for each in lines} == {3 + 2 * 8 + 2}


def test_the_latex_table_is_balanced_and_escapes_what_it_is_told() -> None:
    given = small()
    odd = replace(given, lines=[replace(given.lines[0], label="a_b & 50% {x} \\ ~^#$"), *given.lines[1:]])
    text = tables.latex(odd)
    rows = [row for row in text.splitlines() if row.endswith(r" \\")]
    assert len(rows) == 4
    assert {len(row.replace(r"\&", "").split(" & ")) for row in rows} == {10}
    assert r"a\_b \& 50\% \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}\#\$ & 2 & $66.0 \pm 1.4$" in text
    assert r"ncm & 0 of 2 & -- & --" in text
    assert text.count(r"\begin{tabular}{lrrrrrrrrr}") == text.count(r"\end{tabular}") == 1
    for row in text.splitlines():  # what is no row of the table is a rule or a comment
        assert row.startswith(("%", "\\")) or row.endswith(r" \\"), row


def test_figures_are_drawn_of_any_number_of_rows() -> None:
    of = found(*made.drawn())
    data = all_figures(of)
    assert list(data) == ["compare", "comparison_speed", "comparison_reach"]
    assert len(data["comparison_speed"]["points"]) == 8
    assert data["comparison_speed"]["title"].startswith("Accuracy against time: treelora scores highest, 89.8%")
    drawn = figures.draw(data)
    names = [text.get_text() for text in drawn["comparison_speed"].axes[0].texts]
    assert {"treelora", "ogd"} <= set(names)
    wide = {"points": [{**point, "seconds": 10.0**n} for n, point in enumerate(data["comparison_speed"]["points"])]}
    (axis,) = figures.draw({"comparison_speed": {**data["comparison_speed"], **wide}})["comparison_speed"].axes
    assert axis.get_xscale() == "log"
    nothing = found(made.about({"ewc": "ewc"}, [made.cell("ewc", 0, "waiting")]), {})
    assert all_figures(nothing) == {}


def test_the_page_stands_alone_and_has_everything() -> None:
    text = comparison_page(found(*made.drawn()))
    page = Page(text)
    assert (
        "23 of 24 cells have learnt the stream, 1 has failed. treelora scores highest at the end, 89.8 ± 0.2%"
        in page.text
    )
    assert "ogd-s1 has failed: NonFiniteError: the loss is nan at step 12" in page.text
    assert len(page.all("img")) == 3
    assert all(image["alt"] for image in page.all("img"))
    assert not page.all("script")
    assert not page.all("link")
    nothing = found(made.about({"<b>": "ewc"}, [made.cell("<b>", 0, "failed", error="<i>")]), {})
    assert "<b>" in Page(comparison_page(nothing)).text
    assert sentence(nothing) == "0 of 1 cells have learnt the stream, 1 has failed."


def test_a_folder_that_is_no_comparison_says_so(tmp_path: Path) -> None:
    assert not is_comparison(tmp_path)
    with pytest.raises(
        RunError, match=r"is no comparison: it has no comparison\.json; give the folder that `treelora c"
    ):
        read(str(tmp_path), tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    assert is_comparison(tmp_path)
    with pytest.raises(RunError, match="is damaged"):
        read(str(tmp_path), tmp_path)


def test_scoring_and_checkpoints_are_no_training() -> None:
    every = {
        "statistics": 1.0,
        "probe": 2.0,
        "train": 4.0,
        "query": 8.0,
        "evaluate": 99.0,
        "checkpoint": 99.0,
        "watch": 99.0,
    }
    assert train_seconds(made.run("r", [[50.0]], seconds=every, tasks=["one"])) == 15
