"""Figures of a run, drawn from `figure_data`. matplotlib is imported when something is drawn, never its pyplot."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora_ray.tracking import comparison_figures, figure_trees, sweep_figures
from treelora_ray.tracking import figure_parts as parts
from treelora_ray.tracking.figure_data import Data, figure_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from treelora_ray.api import Run

DPI = 150
NAMED = 4  # lines at either end, where there are too many to name all


def figures_of(run: Run) -> dict[str, Figure]:
    """By name, what there is to see of a run; a figure that it has no data for is left out."""
    return draw(figure_data(run.result, run.journal))


def draw(data: Mapping[str, Data]) -> dict[str, Figure]:
    with parts.style():
        return {name: DRAWN[name](shown) for name, shown in data.items()}


def write_figures(run: Run, folder: Path) -> list[Path]:
    """Each figure as PNG and SVG, the same bytes for the same run; the files written."""
    return write(figures_of(run), folder)


def write(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            save(figure, path, kind)
            figure.set_layout_engine("none")  # laid out once is enough
            written.append(path)
    return written


def save(figure: Figure, target: Any, kind: str) -> None:
    """To a path or an open file, without dates or versions."""
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with parts.style():
        figure.savefig(target, format=kind, dpi=DPI, metadata=metadata)


# -- scores


def _scores(data: Data) -> Figure:
    rows, columns = len(data["units"]), len(data["tasks"])
    cell = parts.cell(max(rows, columns))
    size = parts.letters(columns)
    wide = columns * cell + parts.width(data["units"], size) + 1.6
    figure = parts.figure(data, wide, rows * cell + parts.slanted(data["tasks"]) + 0.9)
    axis = figure.subplots()
    values = np.array(data["values"], dtype=np.float64)
    low = min(90.0, 10 * np.floor(np.nanmin(values) / 10))
    image = parts.heat(axis, values, parts.HEAT, low, 100)
    if max(rows, columns) <= 16:
        parts.numbers(axis, values, "{:.0f}", low, 100, size)
    parts.slanted_labels(axis, range(columns), data["tasks"], size)
    axis.set_yticks(range(rows), parts.labels(data["units"]), size=size)
    axis.set(xlabel="scored on", ylabel="after learning")
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    if rows == columns:
        edges = np.repeat(np.arange(rows + 1), 2)[1:-1] - 0.5
        axis.plot(edges[1:], edges[:-1], color=parts.RED, lw=1.2, clip_on=False)
        axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    parts.bar(figure, axis, image, "score, percent (higher is better)")
    return figure


def _course(data: Data) -> Figure:
    n = len(data["tasks"])
    few = n <= 16
    figure = parts.figure(data, 7.5 if few else 9, max(3.6, (n + 1) * 0.2 + 1.1) if few else 4.8)
    axis = figure.subplots()
    colours, after = parts.colours(n), np.arange(1, n + 1)
    for line, colour in zip(data["lines"], colours, strict=True):
        at = after[line["from"] :]
        axis.plot(at, line["scores"], color=colour, lw=1.4 if few else 0.9, marker="o" if few else None, ms=3)
    axis.plot(after, data["mean"], color=parts.BLACK, lw=2.4, ls=(0, (4, 1.5)))
    everything = [score for line in data["lines"] for score in line["scores"]]
    low, high = min(everything), max(everything)
    room = max(high - low, 5.0)
    axis.set(xlim=(0.7, n + 0.2), ylim=(low - 0.06 * room, high + 0.06 * room))
    axis.set(xlabel="tasks learnt", ylabel="score, percent (higher is better)")
    parts.whole_numbers(axis)
    axis.grid(axis="y", color=parts.PALE)
    ends = [(line["scores"][-1], line["task"], colour) for line, colour in zip(data["lines"], colours, strict=True)]
    if not few:
        ranked = sorted(ends, key=lambda end: end[0])
        ends = ranked[:NAMED] + ranked[-NAMED:]
        _order_bar(figure, axis, n)
    _end_labels(
        axis, [*ends, (data["mean"][-1], "mean of the tasks seen", parts.BLACK)], n + 0.2, figure.get_figheight()
    )
    return figure


def _order_bar(figure: Figure, axis: Axes, n: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    image = ScalarMappable(Normalize(0.5, n + 0.5), ListedColormap(parts.colours(n)))
    parts.bar(figure, axis, image, f"order of learning (named: the {NAMED} lowest and highest at the end)")


def _end_labels(
    axis: Axes, ends: Sequence[tuple[float, str, str]], right: float, height: float, form: str = "{:.0f}"
) -> None:
    """Names at the right of lines, moved apart where they would lie on each other; a thin line leads to each."""
    low, high = axis.get_ylim()
    inches = (height - 1.1) / (high - low)
    places = _apart([(value - low) * inches for value, _, _ in ends], 0.19, height - 1.1)
    beside = right + 0.045 * (right - 0.7)
    for (value, name, colour), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axis.annotate(
            f"{form.format(value)}  {parts.label(name)}", (right, value), (beside, low + place / inches), size=8.5,
            color=parts.dark(colour), weight="bold" if colour == parts.BLACK else "normal", va="center",
            annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def _apart(places: Sequence[float], step: float, height: float) -> list[float]:
    """The places, at least a step from each other, moved as little as a sweep from either side can."""
    order = np.argsort(places, kind="stable")
    step = min(step, height / max(len(places) - 1, 1))
    at = np.array(places, dtype=np.float64)[order]
    for number in range(1, len(at)):
        at[number] = max(at[number], at[number - 1] + step)
    over = at[-1] - height
    if over > 0:
        at[-1] -= over
        for number in range(len(at) - 2, -1, -1):
            at[number] = min(at[number], at[number + 1] - step)
    out = np.empty(len(at))
    out[order] = at
    return out.tolist()


def _forgetting(data: Data) -> Figure:
    n = len(data["tasks"])
    size = parts.letters(n)
    figure = parts.figure(data, 7, n * parts.row_height(n) + 1.5)
    axis = figure.subplots()
    drops = data["drops"]
    axis.barh(range(n), drops, color=[parts.RED if drop > 0 else parts.BLUE for drop in drops], height=0.7)
    tick: Data = {"marker": "|", "ms": min(9, 60 * parts.row_height(n)), "mew": 1.6, "color": parts.BLACK}
    axis.plot(data["from_best"], range(n), ls="", label="from its best", **tick)
    axis.axvline(0, color=parts.BLACK, lw=0.8)
    axis.axvline(data["mean"], color=parts.GREY, lw=1.2, ls="--", label=f"mean, {data['mean']:.1f}")
    axis.set_yticks(range(n), parts.labels(data["tasks"]), size=size)
    what = "points lost from right after learning to the end (positive is forgetting; lower is better)"
    low, high = min(0.0, *drops, *data["from_best"]), max(0.0, *drops, *data["from_best"])
    room = 0.05 * max(high - low, 1.0)
    axis.set(ylim=(n - 0.4, -0.6), xlim=(low - room, high + room), xlabel=what)
    axis.grid(axis="x", color=parts.PALE)
    axis.set_axisbelow(True)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return figure


# -- what it cost


def _times(data: Data) -> Figure:
    n = len(data["units"])
    figure = parts.figure(data, 7.5, n * parts.row_height(n) + 1.6)
    axis = figure.subplots()
    left = np.zeros(n)
    for phase, seconds, colour in zip(data["phases"], data["seconds"], parts.colours(len(data["phases"])), strict=True):
        axis.barh(range(n), seconds, left=left, color=colour, height=0.75, label=phase)
        left += np.array(seconds)
    axis.set_yticks(range(n), parts.labels(data["units"]), size=parts.letters(n))
    axis.set(ylim=(n - 0.4, -0.6), xlabel="seconds (lower is better)")
    axis.grid(axis="x", color=parts.PALE)
    axis.set_axisbelow(True)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(data["phases"]), borderaxespad=0, handlelength=1)
    return figure


def _losses(data: Data) -> Figure:
    curves = data["curves"]
    n = len(curves)
    figure = parts.figure(data, 9, 3.6)
    axis = figure.subplots()
    for number, curve in enumerate(curves):
        axis.plot(curve["at"], curve["loss"], color=(parts.BLUE, parts.ORANGE)[number % 2], lw=1)
        axis.axvline(curve["first"], color=parts.PALE, lw=0.8, zorder=0)
    lowest = min(min(curve["loss"]) for curve in curves)
    axis.set(xlabel="step", ylabel="training loss (lower is better)", ylim=(min(0, lowest), None))
    axis.margins(x=0.01)
    above = axis.secondary_xaxis("top")
    shown = range(0, n, -(-n // 24))
    middles = [(curves[number]["at"][0] + curves[number]["at"][-1]) / 2 for number in shown]
    parts.slanted_labels(above, middles, [curves[number]["task"] for number in shown], parts.letters(n))
    above.spines["top"].set_visible(False)
    above.tick_params(length=0)
    return figure


# -- several runs


def _compare(data: Data) -> Figure:
    """Each line in its colour; of many the first one, those that end highest and the lowest, and the others in grey."""
    n, lines = len(data["tasks"]), data["lines"]
    many = len(lines) > len(parts.CATEGORIES)
    ranked = sorted(range(len(lines)), key=lambda number: -lines[number]["mean"][-1])
    strong = list(dict.fromkeys([0, *ranked[: NAMED + 1], ranked[-1]])) if many else list(range(len(lines)))
    colours = dict(zip(strong, parts.CATEGORIES, strict=False))
    figure = parts.figure(data, 7.5, max(3.6, 0.24 * len(lines) + 0.6))
    axis = figure.subplots()
    after = np.arange(1, n + 1)
    for number, line in enumerate(lines):
        mean, std = np.array(line["mean"]), np.array(line["std"])
        if number not in colours:
            axis.plot(after, mean, color=parts.GREY, lw=0.7)
            continue
        mark: Data = {"marker": "osD^v<>"[number % 7], "ms": 4 if n <= 24 else 2, "zorder": 3}
        axis.plot(after, mean, color=colours[number], lw=1.8, label=textwrap.fill(line["label"], 34), **mark)
        axis.fill_between(after, mean - std, mean + std, color=colours[number], alpha=0.18, lw=0)
    axis.set(xlabel="tasks learnt", ylabel="mean score, percent (higher is better)")
    parts.whole_numbers(axis)
    axis.grid(axis="y", color=parts.PALE)
    if many:
        axis.set(xlim=(0.7, n + 0.2), ylim=axis.get_ylim())
        ends = [
            (lines[number]["mean"][-1], lines[number]["label"], colours.get(number, parts.GREY)) for number in ranked
        ]
        _end_labels(axis, ends, n + 0.2, figure.get_figheight(), "{:.1f}")
    else:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), labelspacing=0.7)
    return figure


DRAWN: dict[str, Callable[[Data], Figure]] = {
    "scores": _scores,
    "course": _course,
    "forgetting": _forgetting,
    "tree": figure_trees.tree,
    "growth": figure_trees.growth,
    "similarity": figure_trees.similarity,
    "pulls": figure_trees.pulls,
    "times": _times,
    "losses": _losses,
    "compare": _compare,
    "comparison_speed": comparison_figures.speed,
    "comparison_reach": comparison_figures.reach,
    "sweep_front": sweep_figures.front,
    "sweep_importance": sweep_figures.importance,
    "sweep_parallel": sweep_figures.parallel,
    "sweep_curves": sweep_figures.curves,
}
