"""Figures of a comparison, drawn from `comparison_data.figure_data`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_ray.tracking import figure_parts as parts
from treelora_ray.tracking.figure_data import Data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 20.0  # times between fastest and slowest, above which seconds stand on a log scale


def speed(data: Data) -> Figure:
    figure = parts.figure(data, 7.5, 4.4)
    axis = figure.subplots()
    points = data["points"]
    for point, colour in zip(points, parts.colours(len(points)), strict=True):
        axis.errorbar(
            point["seconds"], point["op"], xerr=point["seconds_std"], yerr=point["op_std"], fmt="o", color=colour,
            ms=6, elinewidth=1, alpha=0.9,
        )  # fmt: skip
    seconds = [point["seconds"] for point in points]
    if min(seconds) > 0 and max(seconds) > WIDE * min(seconds):
        axis.set_xscale("log")
    axis.set(xlabel="seconds of looking at tasks and training (lower is better)")
    axis.set(ylabel="score after the last task, percent (higher is better)")
    axis.margins(0.12, 0.12)
    axis.grid(color=parts.PALE)
    axis.set_axisbelow(True)
    parts.names_beside(figure, axis, [(p["seconds"], p["op"], parts.label(p["label"])) for p in points])
    return figure


def reach(data: Data) -> Figure:
    bars = data["bars"]
    n = len(bars)
    figure = parts.figure(data, 7.5, n * parts.row_height(n) + 1.5)
    axis = figure.subplots()
    steps, beside = ([bar[key] for bar in bars] for key in ("steps", "beside"))
    axis.barh(range(n), steps, color=parts.BLUE, height=0.66, label="training steps")
    axis.barh(range(n), beside, left=steps, color=parts.ORANGE, height=0.66, label="counted beside them")
    axis.errorbar(steps, range(n), xerr=[bar["std"] for bar in bars], fmt="none", ecolor=parts.BLACK, elinewidth=1)
    for row, bar in enumerate(bars):
        if bar["never"]:
            end = bar["steps"] + max(bar["beside"], bar["std"])
            axis.annotate(f"{bar['never']} never", (end, row), (4, 0), textcoords="offset points", va="center", size=8)
    axis.set_yticks(range(n), parts.labels([bar["label"] for bar in bars]), size=parts.letters(n))
    axis.set(ylim=(n - 0.4, -0.6), xlabel="steps a task (lower is better)")
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    axis.grid(axis="x", color=parts.PALE)
    axis.set_axisbelow(True)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handlelength=1)
    return figure
