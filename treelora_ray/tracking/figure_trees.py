"""Figures of the tree over the tasks, and of the search in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from treelora_ray.tracking import figure_parts as parts
from treelora_ray.tracking.figure_data import Data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALONG = {"distance": "distance between the halves of a group", "levels": "levels above the tasks"}


def _branches(axis: Axes, data: Data, wide: float = 1.3) -> None:
    """The root at the left, tasks at the right, row 0 at the top."""
    at = data["at"]
    for node, below in enumerate(data["children"]):
        if below:
            rows = [at[child][1] for child in below]
            axis.plot([at[node][0]] * 2, [min(rows), max(rows)], color=parts.GREY, lw=wide)
            for child in below:
                axis.plot([at[node][0], at[child][0]], [at[child][1]] * 2, color=parts.GREY, lw=wide)
    top = max(place[0] for place in at)
    leaves = len(data["leaves"])
    axis.set(xlim=(top * 1.04, 0), ylim=(leaves - 0.5, -0.5))
    axis.spines["left"].set_visible(False)
    axis.yaxis.tick_right()
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(ALONG[data["axis"]])
    if data["axis"] == "levels":
        parts.whole_numbers(axis)


def tree(data: Data) -> Figure:
    leaves, layers, splits = len(data["leaves"]), data["layers"], data["splits"]
    size, row = parts.letters(leaves), parts.row_height(leaves)
    wide = len(layers) * parts.cell(len(layers)) if layers else 0
    labels = parts.width(data["leaves"], size)
    above = parts.slanted(layers) if layers else 0
    figure = parts.figure(data, 3.8 + labels + (wide + 1.6 if layers else 0), leaves * row + above + 1.2)
    left, right = (
        figure.subplots(1, 2, width_ratios=[3.6 + labels, wide + 1.2]) if layers else (figure.subplots(), None)
    )
    _branches(left, data)
    left.set_yticks(range(leaves), parts.labels(data["leaves"]), size=size)
    if right is None:
        return figure
    values = np.full((leaves - 1, len(layers)), np.nan)
    for split in splits:
        values[split["gaps"]] = split["apart"] or np.nan
    image = parts.heat(right, values, parts.HEAT, extent=(-0.5, len(layers) - 0.5, leaves - 1, 0))
    right.set(ylim=(leaves - 0.5, -0.5), facecolor="white", yticks=[])
    dot: Data = {"ls": "", "marker": "o", "ms": min(5, 24 * row), "mfc": "white", "mec": parts.BLACK, "mew": 0.8}
    known = np.flatnonzero(np.isfinite(values).any(1))
    right.plot(np.nanargmax(values[known], axis=1), known + 0.5, **dot)
    shown = range(0, len(layers), -(-len(layers) // 32))
    parts.slanted_labels(right, shown, [layers[number] for number in shown], parts.letters(len(layers)))
    right.xaxis.tick_top()
    right.set_xlabel("layer (dot: where the halves are furthest apart)")
    parts.bar(figure, right, image, "distance between the halves")
    parts.note(figure, "a row of the heatmap is the split that separates the two tasks it lies between")
    return figure


def growth(data: Data) -> Figure:
    stages = data["stages"]
    columns = min(3, len(stages))
    rows = [stages[at : at + columns] for at in range(0, len(stages), columns)]
    tallest = [max(len(stage["leaves"]) for stage in row) for row in rows]
    named = tallest[-1] <= 16
    step, size = (0.2, 8.0) if named else (0.15, 6.5)
    wide = columns * (2.3 + (parts.width(stages[-1]["leaves"], size) if named else 0.2))
    figure = parts.figure(data, wide, sum(tallest) * step + 0.85 * len(rows) + 0.7)
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=[count * step + 0.45 for count in tallest])
    numbers = data["numbers"]
    far = max(place[0] for stage in stages for place in stage["at"])
    for (row, column), axis in np.ndenumerate(axes):
        if column >= len(rows[row]):
            axis.set_axis_off()
            continue
        stage = rows[row][column]
        _branches(axis, stage, wide=1.0)
        leaves = stage["leaves"]
        axis.set_xlim(far * 1.04, 0)
        axis.set_ylim(tallest[row] - 0.5, -0.5)
        axis.spines["bottom"].set_position(("data", len(leaves) - 0.4))
        axis.set_xlabel("")
        order = [f"{numbers[name] + 1}" if name in numbers else parts.label(name) for name in leaves]
        if named:
            order = [
                f"{numbers[name] + 1} {parts.label(name)}" if name in numbers else parts.label(name) for name in leaves
            ]
        axis.set_yticks(range(len(leaves)), order, size=size)
        for label, name in zip(axis.get_yticklabels(), leaves, strict=True):
            if name in stage["new"]:
                label.set(color=parts.dark(parts.RED), weight="bold")
        axis.set_title(f"{len(leaves)} tasks, after {parts.label(stage['after'])}", loc="left")
    along = ALONG[stages[-1]["axis"]]
    parts.note(figure, f"across: {along}; numbers: order of learning; bold red: new since the tree before")
    return figure


def similarity(data: Data) -> Figure:
    n = len(data["leaves"])
    size, cell = parts.letters(n), parts.cell(n)
    labels = parts.width(data["leaves"], size)
    figure = parts.figure(data, n * cell + labels + 3.4, n * cell + parts.slanted(data["leaves"]) + 1.0)
    left, right = figure.subplots(1, 2, width_ratios=[1.6, n * cell + labels + 1.2], sharey=True)
    _branches(left, data)
    left.set_xlabel(ALONG[data["axis"]].replace(" the ", "\nthe ", 1))
    values = np.array(data["values"])
    np.fill_diagonal(values, np.nan)
    low, high = np.nanmin(values), np.nanmax(values)
    image = parts.heat(right, values, parts.NEAR, low, high)
    right.set_aspect("auto")
    if n <= 14:
        parts.numbers(right, values, "{:.2f}", low, high, size - 1.5, dark_low=False)
    parts.slanted_labels(right, range(n), data["leaves"], size)
    right.xaxis.tick_top()
    right.tick_params(axis="y", labelright=False, labelleft=True, length=0)
    right.set_yticks(range(n), parts.labels(data["leaves"]), size=size)
    left.tick_params(axis="y", labelright=False)
    parts.bar(figure, right, image, "distance between gradients (lower is more alike)")
    return figure


# -- the search


def pulls(data: Data) -> Figure:
    values = np.array(data["values"], dtype=np.float64)  # [layers, stretches, tasks]
    if data["kind"] == "count":
        values[values == 0] = np.nan
    layers, stretches, tasks = values.shape
    size, row = parts.letters(tasks), parts.row_height(tasks)
    columns = min(4, layers)
    rows = -(-layers // columns)
    labels = parts.width(data["tasks"], size)
    figure = parts.figure(data, labels + columns * 1.75 + 1.3, rows * (tasks * row + 0.75) + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low, high = np.nanmin(values), np.nanmax(values)
    cmap = parts.NEAR if data["kind"] == "distance" else parts.HEAT
    for number, axis in enumerate(axes.flat):
        if number >= layers:
            axis.set_axis_off()
            continue
        image = parts.heat(axis, values[number].T, cmap, low, high)
        axis.set_aspect("auto")
        axis.set_title(data["layers"][number], loc="left")
        axis.tick_params(axis="y", labelsize=size)
        leaned = data["leans_on"][number]
        if leaned in data["tasks"]:
            arrow = {"marker": "<", "ms": 6, "color": parts.RED, "clip_on": False}
            axis.plot(1.03, data["tasks"].index(leaned), transform=axis.get_yaxis_transform(), **arrow)
        if number + columns >= layers:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(data["unit"])
    starts = data["starts"]
    shown = range(0, stretches, -(-stretches // 4))
    axes[0, 0].set_xticks(shown, [str(starts[number] + (data["unit"] != "step")) for number in shown])
    axes[0, 0].set_yticks(range(tasks), parts.labels(data["tasks"]), size=size)
    what = "distance seen (lower is more alike)" if data["kind"] == "distance" else "comparisons"
    parts.bar(figure, axes, image, what, whole=data["kind"] == "count")
    notes = ["blank: not compared"] if np.isnan(values).any() else []
    if any(leaned in data["tasks"] for leaned in data["leans_on"]):
        notes.append("red: what the layer leans on")
    if data["groups"]:
        notes.append(f"{data['groups']} comparisons more with groups of tasks")
    parts.note(figure, "; ".join(notes))
    return figure
