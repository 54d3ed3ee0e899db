"""Figures of a sweep, drawn from `sweep_data.figure_data`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from treelora_ray.tracking import figure_parts as parts
from treelora_ray.tracking.figure_data import Data
from treelora_ray.tracking.sweep_data import FAILED, FINISHED, STOPPED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 24  # points with a name
REST, LINES = "#B0B0B0", "viridis"
BEST = (parts.BLACK, parts.BLUE, parts.ORANGE, parts.GREEN, parts.PINK)
ENDS: dict[str, Data] = {
    STOPPED: {"marker": "x", "color": parts.GREY, "ms": 4.5, "mew": 1.2},
    FAILED: {"marker": "X", "color": parts.RED, "ms": 7, "mew": 0.5},
}
UNITS = {"val_op": "accuracy on validation rows, percent", "forgetting": "forgetting, points", "seconds": "seconds"}


def direction(metric: str, mode: str) -> str:
    return f"{UNITS.get(metric, metric)} ({'higher' if mode == 'max' else 'lower'} is better)"


def front(data: Data) -> Figure:
    figure = parts.figure(data, 7.5, 4.4)
    axis = figure.subplots()
    points = data["points"]
    x, y = ([point[key] for point in points] for key in ("seconds", "val_op"))
    forgot = [point["forgetting"] for point in points]
    if all(value is not None for value in forgot):
        image = axis.scatter(x, y, c=forgot, cmap=parts.HEAT, s=42, zorder=3, lw=0)
        if max(forgot) == min(forgot):  # one colour has no scale of its own
            image.set_clim(forgot[0] - 0.5, forgot[0] + 0.5)
        parts.bar(figure, axis, image, "forgetting, points (lower is better)")
    else:
        axis.scatter(x, y, color=parts.BLUE, s=42, zorder=3, lw=0)
    on = [point for point in points if point["front"]]
    ring: Data = {"s": 110, "facecolors": "none", "edgecolors": parts.RED, "linewidths": 1.5, "zorder": 4}
    axis.scatter([point["seconds"] for point in on], [point["val_op"] for point in on], label="on the front", **ring)
    for point in points:
        if point["trial"] == data["winner"]:
            star: Data = {"marker": "*", "s": 55, "color": "white", "edgecolors": parts.BLACK, "zorder": 5, "lw": 0.8}
            axis.scatter(point["seconds"], point["val_op"], label="winner", **star)
    axis.set(xlabel="seconds (lower is better)", ylabel=direction("val_op", "max"))
    axis.margins(0.08, 0.1)
    axis.grid(color=parts.PALE)
    axis.set_axisbelow(True)
    named = on if len(points) > MANY else points
    parts.names_beside(figure, axis, [(p["seconds"], p["val_op"], p["trial"]) for p in named])
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return figure


def importance(data: Data) -> Figure:
    bars = data["bars"]
    n = len(bars)
    figure = parts.figure(data, 7.5, n * parts.row_height(n) + 1.5)
    axis = figure.subplots()
    for row, bar in enumerate(bars):
        share = max(bar["share"], 0.0)
        axis.barh(row, share, color=parts.BLUE if bar["sure"] else REST, height=0.62)
        axis.plot([max(bar["low"], 0), max(bar["high"], 0)], [row, row], color=parts.BLACK, lw=1.1, zorder=3)
        tick: Data = {"marker": "|", "ms": min(11, 60 * parts.row_height(n)), "mew": 1.8, "color": parts.RED, "ls": ""}
        axis.plot(max(bar["chance"], 0), row, zorder=4, **tick)
    axis.set_yticks(range(n), parts.labels([bar["parameter"] for bar in bars]), size=parts.letters(n))
    most = max(max(bar["share"], bar["high"], bar["chance"]) for bar in bars)
    axis.set(ylim=(n - 0.4, -0.6), xlim=(0, min(1.0, 1.08 * max(most, 0.1))))
    axis.set(xlabel=f"share of the differences between {data['trials']} trials that it explains by itself")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(axis="x", color=parts.PALE)
    axis.set_axisbelow(True)
    _legend(axis, list(_marks({bar["sure"] for bar in bars})), 2)
    return figure


def _marks(sure: set[bool]) -> Iterator[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if True in sure:
        yield Patch(color=parts.BLUE, label="told from chance")
    if False in sure:
        yield Patch(color=REST, label="not told from chance")
    yield Line2D([], [], color=parts.BLACK, lw=1.4, label="leaving any one trial out")
    yield Line2D([], [], color=parts.RED, marker="|", ms=8, mew=1.8, ls="", label="chance reaches this in 1 of 20")


def parallel(data: Data) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes, lines = data["axes"], data["lines"]
    n = len(axes)
    figure = parts.figure(data, 2.0 + 1.15 * (n + 1), 4.3)
    axis = figure.subplots()
    low, high = data["range"]
    room = (high - low) or 1.0
    cmap = LINES if data["mode"] == "max" else f"{LINES}_r"
    scale = ScalarMappable(Normalize(low, low + room), cmap)  # bright: better
    for line in lines:
        done = line["score"] is not None
        at = [*line["at"], (line["score"] - low) / room if done and high > low else 0.5 if done else None]
        known = [(place, value) for place, value in enumerate(at) if value is not None]
        ink: Data = {"color": scale.to_rgba(line["score"]), "lw": 1.5, "zorder": 3} if done else {
            "color": REST, "lw": 0.8, "ls": (0, (3, 2)), "zorder": 2,
        }  # fmt: skip
        axis.plot([place for place, _ in known], [value for _, value in known], alpha=0.9, **ink)
    for place, each in enumerate([*axes, {"name": data["metric"], "kind": "number", "low": low, "high": high}]):
        axis.axvline(place, color=parts.BLACK, lw=0.9, zorder=4)
        for value, text in _ticks(each):
            axis.plot([place - 0.02, place + 0.02], [value, value], color=parts.BLACK, lw=0.9, zorder=4)
            box: Data = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.8}
            axis.text(place + 0.045, value, parts.label(text), size=7.5, va="center", zorder=5, bbox=box)
    names = [each["name"] for each in axes]
    axis.set_xticks(range(n + 1), [_broken(name) for name in [*names, data["metric"]]], size=8)
    axis.tick_params(axis="x", length=0, pad=7)
    axis.set(xlim=(-0.15, n + 0.5), ylim=(-0.04, 1.04), yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    bright = f"bright: better; the axis at the right: {direction(data['metric'], data['mode'])}"
    grey = "grey: stopped early" if any(line["score"] is None for line in lines) else ""
    left = f"{data['left_out']} parameters that mattered less are left out" if data["left_out"] else ""
    parts.note(figure, "; ".join(filter(None, (bright, grey, left))))
    return figure


def _broken(name: str) -> str:
    """A dotted key on lines of its own."""
    return "\n".join(parts.label(part) for part in name.split("."))


def _ticks(axis: Data) -> list[tuple[float, str]]:
    if axis["kind"] == "choice":
        values = axis["values"]
        return [(place / (len(values) - 1), value) for place, value in enumerate(values)]
    low, high = axis["low"], axis["high"]
    if low == high:
        return [(0.5, f"{low:.4g}")]
    if axis["kind"] == "log":
        middle = [math.exp(math.log(low) + share * math.log(high / low)) for share in (0, 1 / 3, 2 / 3, 1)]
        return [(share, f"{value:.2g}") for share, value in zip((0, 1 / 3, 2 / 3, 1), middle, strict=True)]
    return [(share, f"{low + share * (high - low):.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]


def curves(data: Data) -> Figure:
    lines, named = data["lines"], data["named"]
    figure = parts.figure(data, 7.8, 4.4)
    axis = figure.subplots()
    best = []
    for place, line in reversed(list(enumerate(lines))):  # the best lie above the rest
        if place < named:
            label = f"trial {line['trial']}, {line['value'][-1]:.1f}"
            best += axis.plot(line["percent"], line["value"], color=BEST[place], lw=2, zorder=4, label=label)
        else:
            colour = parts.SKY if line["state"] == FINISHED else REST
            alone = "." if len(line["percent"]) == 1 else None
            axis.plot(line["percent"], line["value"], color=colour, lw=0.9, alpha=0.8, zorder=2, marker=alone, ms=3)
        if line["state"] in ENDS:
            axis.plot(line["percent"][-1], line["value"][-1], ls="", zorder=5, **ENDS[line["state"]])
    axis.set(xlim=(0, 101), xlabel="percent of the stream learnt", ylabel=direction(data["metric"], data["mode"]))
    axis.grid(axis="y", color=parts.PALE)
    axis.set_axisbelow(True)
    if best:
        figure.legend(handles=best[::-1], loc="outside right center")
    _legend(axis, [*_finished(lines[named:]), *_ended(lines)])
    return figure


def _finished(lines: Sequence[Data]) -> Iterator[Any]:
    from matplotlib.lines import Line2D

    if any(line["state"] == FINISHED for line in lines):
        yield Line2D([], [], color=parts.SKY, lw=1.4, label="finished")


def _ended(lines: Sequence[Data]) -> Iterator[Any]:
    from matplotlib.lines import Line2D

    names = {STOPPED: "stopped early", FAILED: "failed"}
    for state in dict.fromkeys(line["state"] for line in lines):
        if state in names:
            yield Line2D([], [], ls="", label=names[state], **ENDS[state])


def _legend(axis: Axes, handles: Sequence[Any], columns: int = 4) -> None:
    """Above what is drawn."""
    if handles:
        where: Data = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "fontsize": 8}
        axis.legend(handles=handles, ncols=columns, handlelength=1.2, **where)
