"""Figures of runs of 5, 12 and 48 tasks: what is drawn, and that it can be read."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests import results
from treelora_ray.api import Run
from treelora_ray.tracking import figure_parts, figures
from treelora_ray.tracking.figure_data import Data, dendrogram, figure_data, short_layers

NAMES = ["scores", "course", "forgetting", "tree", "growth", "similarity", "pulls", "times", "losses"]
Shown = tuple[int, dict[str, Data], dict[str, Figure]]

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", params=[5, 12, 48])
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    tasks = request.param
    journal = results.journal(tmp_path_factory.mktemp("run") / "journal.jsonl", tasks)
    data = figure_data(results.many(tasks), journal)
    return tasks, data, laid_out(figures.draw(data))


def laid_out(drawn: dict[str, Figure]) -> dict[str, Figure]:
    with figure_parts.style():
        for figure in drawn.values():
            figure.draw_without_rendering()
    return drawn


def labels(axis: Axes, which: str = "y") -> list[str]:
    found = axis.get_yticklabels() if which == "y" else axis.get_xticklabels()
    return [label.get_text() for label in found if label.get_text()]


def panels(figure: Figure) -> list[Axes]:
    """Without the colour bars and what is switched off."""
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>" and axis.axison]


def heat(axis: Axes) -> Any:
    (image,) = axis.get_images()
    values: Any = image.get_array()
    return np.ma.filled(values.astype(float), np.nan)


def test_a_run_with_all_there_is_to_see_has_every_figure(shown: Shown) -> None:
    _, data, drawn = shown
    assert list(data) == list(drawn) == NAMES
    for name, figure in drawn.items():
        assert figure.get_suptitle().replace("\n", " ") == data[name]["title"]


def test_every_panel_says_what_its_axes_are(shown: Shown) -> None:
    for name, figure in shown[2].items():
        notes = figure.get_supxlabel()
        for axis in panels(figure):
            inner = name in ("pulls", "similarity") and axis is not panels(figure)[-1]
            assert axis.get_xlabel() or labels(axis, "x") or notes or inner, name
        for bar in (axis for axis in figure.axes if axis.get_label() == "<colorbar>"):
            assert bar.get_ylabel() or bar.get_xlabel()


def test_scores_are_a_heatmap_in_the_order_of_learning(shown: Shown) -> None:
    tasks, data, drawn = shown
    (axis,) = panels(drawn["scores"])
    np.testing.assert_array_equal(heat(axis), np.array(data["scores"]["values"], dtype=float))
    assert labels(axis) == labels(axis, "x") == data["scores"]["tasks"]
    assert len(axis.texts) == (tasks * (tasks + 1) // 2 if tasks <= 16 else 0)
    assert "higher is better" in drawn["scores"].axes[1].get_ylabel()


def test_each_task_has_a_line_that_begins_where_it_was_learnt(shown: Shown) -> None:
    tasks, data, drawn = shown
    axis = panels(drawn["course"])[0]
    assert len(axis.lines) == tasks + 1
    for number, line in enumerate(axis.lines[:tasks]):
        assert list(np.asarray(line.get_xdata())) == list(range(number + 1, tasks + 1))
        assert list(np.asarray(line.get_ydata())) == data["course"]["lines"][number]["scores"]
    assert list(np.asarray(axis.lines[-1].get_ydata())) == data["course"]["mean"]
    named = [text.get_text().split("  ")[1] for text in axis.texts]
    assert named[-1] == "mean of the tasks seen"
    assert len(named) == (tasks + 1 if tasks <= 16 else 2 * figures.NAMED + 1)


def test_forgetting_has_a_bar_for_each_task_but_the_last(shown: Shown) -> None:
    tasks, data, drawn = shown
    (axis,) = panels(drawn["forgetting"])
    bars: list[Any] = list(axis.patches)
    assert [bar.get_width() for bar in bars] == data["forgetting"]["drops"]
    assert labels(axis) == data["forgetting"]["tasks"]
    assert len(axis.patches) == tasks - 1
    assert "positive is forgetting; lower is better" in axis.get_xlabel()


def test_between_two_tasks_of_the_tree_stands_the_split_that_separates_them(shown: Shown) -> None:
    tasks, data, drawn = shown
    left, right = panels(drawn["tree"])
    assert labels(left) == data["tree"]["leaves"]
    assert labels(right, "x") == [f"{block}.{part}_proj" for block in range(4) for part in "qv"]
    seen = heat(right)
    assert seen.shape == (tasks - 1, 8)
    for split in data["tree"]["splits"]:
        for gap in split["gaps"]:
            assert list(seen[gap]) == split["apart"]
    assert left.get_ylim() == right.get_ylim()  # rows of both stand side by side
    assert list(right.get_images()[0].get_extent()) == [-0.5, 7.5, tasks - 1, 0]


def test_the_trees_of_some_stages_stand_side_by_side_with_new_tasks_in_bold(shown: Shown) -> None:
    tasks, data, drawn = shown
    stages = data["growth"]["stages"]
    assert [len(stage["leaves"]) for stage in stages] == {
        5: [2, 3, 4, 5], 12: [2, 3, 4, 6, 8, 12], 48: [2, 4, 8, 12, 24, 48],
    }[tasks]  # fmt: skip
    for axis, stage in zip(panels(drawn["growth"]), stages, strict=True):
        assert len(labels(axis)) == len(stage["leaves"])
        bold = [label.get_fontweight() == "bold" for label in axis.get_yticklabels()]
        assert bold == [name in stage["new"] for name in stage["leaves"]]


def test_similarity_stands_in_the_order_of_the_tree(shown: Shown) -> None:
    _, data, drawn = shown
    left, right = panels(drawn["similarity"])
    assert labels(right) == labels(right, "x") == data["tree"]["leaves"]
    seen = heat(right)
    assert np.isnan(seen.diagonal()).all()
    np.testing.assert_array_equal(seen, seen.T)
    assert left.get_ylim() == right.get_ylim()


def test_comparisons_have_a_panel_for_each_layer(shown: Shown) -> None:
    _, data, drawn = shown
    pulls = data["pulls"]
    for axis, layer, values in zip(panels(drawn["pulls"]), pulls["layers"], pulls["values"], strict=True):
        assert axis.get_title(loc="left") == layer
        np.testing.assert_array_equal(heat(axis), np.array(values, dtype=float).T)
    leaning = [axis.lines for axis in panels(drawn["pulls"])]
    for lines, leaned in zip(leaning, pulls["leans_on"], strict=True):
        assert [int(np.asarray(line.get_ydata())[0]) for line in lines] == (
            [] if leaned is None else [pulls["tasks"].index(leaned)]
        )


def test_times_are_stacked_by_phase(shown: Shown) -> None:
    _, data, drawn = shown
    (axis,) = panels(drawn["times"])
    widths = [[bar.get_width() for bar in container] for container in axis.containers]
    np.testing.assert_allclose(widths, data["times"]["seconds"])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["statistics", "probe", "train", "evaluate"]  # type: ignore[union-attr]
    ends = [bar.get_x() + bar.get_width() for bar in axis.containers[-1]]
    assert ends == pytest.approx(np.sum(widths, axis=0))


def test_losses_go_on_over_the_whole_stream(shown: Shown) -> None:
    tasks, _, drawn = shown
    curves = [line for line in panels(drawn["losses"])[0].lines if len(np.asarray(line.get_xdata())) > 2]
    assert len(curves) == tasks
    assert list(np.asarray(curves[-1].get_xdata())) == [30 * tasks - 21, 30 * tasks - 11, 30 * tasks - 1]


def every_text(figure: Figure) -> Iterator[Text]:
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_text() and text.get_visible():
            yield text


def test_letters_are_large_enough_and_no_title_is_cut_off(shown: Shown) -> None:
    for name, figure in shown[2].items():
        assert min(float(text.get_fontsize()) for text in every_text(figure)) >= 6, name
        (title,) = [text for text in every_text(figure) if text.get_text() == figure.get_suptitle()]
        box = title.get_window_extent()
        assert box.x0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name


def test_labels_beside_each_other_do_not_overlap(shown: Shown) -> None:
    for name, figure in shown[2].items():
        for axis in panels(figure):
            boxes = [label.get_window_extent() for label in axis.get_yticklabels() if label.get_text()]
            boxes = sorted(boxes, key=lambda box: box.y0) if axis.yaxis.get_visible() else []
            for low, high in pairwise(boxes):
                assert low.y1 <= high.y0 + 1.5, name  # pixels; letters do not fill their boxes
    beside = [Text.get_window_extent(text) for text in panels(shown[2]["course"])[0].texts]
    for low, high in pairwise(sorted(beside, key=lambda box: box.y0)):
        assert low.y1 <= high.y0 + 1.5


# -- runs with less to see


def of(found: dict[str, Any]) -> dict[str, Data]:
    return figure_data(found)


def test_without_a_tree_and_a_journal_there_are_scores_forgetting_and_times() -> None:
    found = results.result(["a", "b"], [[50, np.nan], [40, 60]])
    assert list(laid_out(figures.draw(of(found)))) == ["scores", "course", "forgetting", "times"]


def test_tasks_learnt_at_once_have_a_row_of_scores_and_no_course() -> None:
    found = results.result(["a", "b", "c"], [[50, 60, 70]])
    data = of(found)
    assert list(laid_out(figures.draw(data))) == ["scores", "times"]
    assert data["scores"]["units"] == ["joint"]


def test_one_task_has_scores_alone() -> None:
    assert list(of(results.result(["a"], [[50]]))) == ["scores", "times"]


def test_a_run_in_its_middle_shows_what_it_has_learnt() -> None:
    found = results.result(["a", "b"], [[50, np.nan], [40, 60]])
    found["stream"] = ["a", "b", "c"]
    found["matrix"] = [[*row, None] for row in found["matrix"]]
    data = of(found)
    assert data["scores"]["values"] == [[50, None], [40, 60]]
    assert data["forgetting"]["drops"] == [10]


def test_levels_stand_in_place_of_the_heights_of_a_kd_tree() -> None:
    found = results.small()
    found["config"]["method"].update(mode="paper")
    data = of(found)
    assert (data["tree"]["axis"], data["tree"]["at"][0]) == ("levels", [2, 0.75])
    assert data["tree"]["title"] == "The tree over 3 tasks, halved level by level"
    assert data["pulls"]["unit"] == "step"
    left = panels(laid_out(figures.draw(data))["tree"])[0]
    assert left.get_xlabel() == "levels above the tasks"


def test_comparisons_made_more_than_once_are_counted() -> None:
    found = results.small()
    found["pulls"]["count"][0][0][0] = 3
    data = of(found)["pulls"]
    assert (data["kind"], data["values"]) == ("count", found["pulls"]["count"])
    figure = laid_out(figures.draw({"pulls": data}))["pulls"]
    assert np.isnan(heat(panels(figure)[0])[0, 1])  # never compared
    assert figure.axes[-1].get_ylabel() == "comparisons"
    assert (
        figure.get_supxlabel()
        == "blank: not compared; red: what the layer leans on; 2 comparisons more with groups of tasks"
    )


def test_a_search_that_saw_groups_alone_has_no_figure() -> None:
    found = results.small()
    found["pulls"]["count"] = [[[0, 0], [0, 0]]] * 2
    assert "pulls" not in of(found)


def test_a_split_of_many_tasks_separates_each_of_them() -> None:
    drawn = dendrogram([-1, 0, 0, 2, 2, 2], [None, "a", None, "b", "c", "d"], [0.8, 0, 0.5, 0, 0, 0])
    assert drawn["at"] == [[0.8, 1.0], [0, 0], [0.5, 2.0], [0, 1.0], [0, 2.0], [0, 3.0]]
    found = results.result(list("abcd"), np.where(np.tri(4, dtype=bool), 50.0, np.nan))
    heights, sizes = [0.8, 0, 0.5, 0, 0, 0], [4, 1, 3, 1, 1, 1]
    tasks = [None, "a", None, "b", "c", "d"]
    found["tree"] = [
        {"parent": parent, "task": task, "height": height, "size": size, "layers": [height] if task is None else None}
        for parent, task, height, size in zip([-1, 0, 0, 2, 2, 2], tasks, heights, sizes, strict=True)
    ]
    found["layers"] = ["only"]
    data = of(found)["tree"]
    assert [split["gaps"] for split in data["splits"]] == [[0], [1, 2]]
    assert heat(panels(laid_out(figures.draw({"tree": data}))["tree"])[1]).tolist() == [[0.8], [0.5], [0.5]]


def compared(rows: int) -> Data:
    """Rows of 50 + k percent at the end, the third of them the lowest."""
    lines = [{"label": f"row {k}", "mean": [60.0, 50.0 + k - 30 * (k == 2)], "std": [1.0, 1.0]} for k in range(rows)]
    return {"title": "Rows", "alt": "", "tasks": ["a", "b"], "lines": lines}


def test_of_many_compared_rows_the_ends_are_named_and_few_have_a_colour() -> None:
    (figure,) = laid_out(figures.draw({"compare": compared(17)})).values()
    (axis,) = figure.axes
    assert axis.get_legend() is None
    names = [text.get_text() for text in axis.texts]
    assert sorted(names, reverse=True) == names, "highest first"
    assert names[0] == "66.0  row 16"
    assert names[-1] == "22.0  row 2"
    coloured = {line.get_label() for line in axis.lines if line.get_color() != figure_parts.GREY}
    assert coloured == {"row 0", "row 2", *(f"row {k}" for k in range(12, 17))}
    assert len(axis.lines) == 17
    assert len(axis.collections) == 7, "only these have a band"
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the lines that lead there
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes)), "no name lies on another"


def test_of_few_compared_rows_each_has_a_colour_and_stands_in_the_legend() -> None:
    (figure,) = laid_out(figures.draw({"compare": compared(8)})).values()
    (axis,) = figure.axes
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"row {k}" for k in range(8)]
    assert len({line.get_color() for line in axis.lines}) == len(axis.collections) == 8


def test_layers_are_named_by_the_parts_that_differ() -> None:
    assert short_layers(["h.0.attn.q", "h.0.attn.v", "h.11.attn.q"]) == ["0.q", "0.v", "11.q"]
    assert short_layers(["low", "high"]) == ["low", "high"]
    assert short_layers(["a.b", "a"]) == ["a.b", "a"]
    assert short_layers(["only.one"]) == ["only.one"]


def test_names_of_any_letters_and_lengths_are_drawn_as_they_are() -> None:
    found = results.small()
    odd = {"one": "$x_1$ & <b>", "two": "任务", "three": "a-name-that-is-far-longer-than-any-axis-can-bear"}

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [renamed(inner) for inner in value]
        return odd.get(value, value) if isinstance(value, str) else value

    drawn = laid_out(figures.draw(of(renamed(found))))
    assert not any(text.get_parse_math() for figure in drawn.values() for text in every_text(figure))
    assert labels(panels(drawn["tree"])[0]) == ["a-name-that-i…is-can-bear", "$x_1$ & <b>", "任务"]


# -- files


def test_each_figure_is_written_as_png_and_as_svg(tmp_path: Path) -> None:
    found = results.result(["a", "b"], [[50, np.nan], [40, 60]])
    run = Run(results.write_run(tmp_path / "run", found))
    results.journal(tmp_path / "run" / "journal.jsonl", 2)
    written = figures.write_figures(run, tmp_path / "new" / "figures")
    names = ["scores", "course", "forgetting", "times", "losses"]
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_files_are_the_same_to_the_byte_and_say_nothing_of_when(kind: str) -> None:
    def written() -> bytes:
        out = io.BytesIO()
        figures.save(figures.draw({"tree": of(results.small())["tree"]})["tree"], out, kind)
        return out.getvalue()

    first = written()
    assert first == written()
    assert b"Software" not in first
    assert b"dc:date" not in first


def test_drawing_leaves_pyplot_and_the_users_settings_alone() -> None:
    code = (
        "import sys\n"
        "from tests import results\n"
        "from treelora_ray.tracking import figures\n"
        "from treelora_ray.tracking.figure_data import figure_data\n"
        "data = figure_data(results.small())\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figures.draw(data)\n"
        "import matplotlib\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams['font.size'] == 10\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=results.ROOT)
    assert done.returncode == 0, done.stderr
