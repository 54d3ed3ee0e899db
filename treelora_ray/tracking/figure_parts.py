"""What figures are made of: colours, heatmaps, sizes that fit the number of labels."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora_ray.tracking.figure_data import Data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which those can tell apart who see no red or no green.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
CATEGORIES = (BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW, BLACK)
GREY, PALE = "#666666", "#EEEEEE"
HEAT, NEAR = "cividis", "cividis_r"  # bright: much, or near
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "axes.edgecolor": GREY,
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "xtick.color": GREY,
    "ytick.color": GREY, "xtick.labelcolor": BLACK, "ytick.labelcolor": BLACK, "legend.frameon": False,
    "figure.facecolor": "white", "savefig.facecolor": "white", "svg.hashsalt": "treelora-ray", "svg.fonttype": "path",
    "text.parse_math": False,
}  # fmt: skip
LONGEST = 26  # of a label, characters


@contextmanager
def style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names may have any letters
        yield


def figure(data: Data, wide: float, high: float) -> Figure:
    """With its title; in inches, without the title's own."""
    from matplotlib.figure import Figure

    wide = max(wide, 4.8)
    title = textwrap.fill(data["title"], int(wide * 11))
    made = Figure(figsize=(wide, high + 0.35 + 0.17 * title.count("\n")), layout="constrained")
    made.suptitle(title, x=0.01, ha="left", weight="bold", size=10.5)
    return made


def note(figure: Figure, text: str) -> None:
    if text:
        figure.supxlabel(text, x=0.01, ha="left", size=8, color=GREY)


def heat(
    axis: Axes, values: Any, cmap: str, low: float | None = None, high: float | None = None, extent: Any = None
) -> Any:
    """Blank where a value is NaN."""
    axis.set_facecolor(PALE)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    return axis.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest", extent=extent)


def numbers(axis: Axes, values: Any, form: str, low: float, high: float, size: float, dark_low: bool = True) -> None:
    """The value of each cell, in letters that can be read on its colour."""
    middle = (low + high) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if (value < middle) == dark_low else BLACK
            axis.text(column, row, form.format(value), ha="center", va="center", size=size, color=ink)


def bar(figure: Figure, axes: Any, image: Any, label: str, whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(integer=True) if whole else None
    made: Any = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, aspect=30, label=label, ticks=ticks)
    made.outline.set_visible(False)


def slanted_labels(axis: Any, places: Sequence[float], names: Sequence[str], size: float) -> None:
    axis.set_xticks(places, labels(names), rotation=60, ha="left", rotation_mode="anchor", size=size)


def whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def colours(n: int) -> list[str]:
    """Of few things colours that are far apart, of many a scale from dark to bright."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if n <= len(CATEGORIES):
        return list(CATEGORIES[:n])
    return [to_hex(colormaps["viridis"](0.95 * number / (n - 1))) for number in range(n)]


def dark(colour: str) -> Any:
    """For letters: what is too bright to be read on white is darkened."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    light = 0.3 * red + 0.59 * green + 0.11 * blue
    share = min(1.0, 0.42 / light) if light else 1.0
    return red * share, green * share, blue * share


def names_beside(figure: Figure, axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Beside each point, where no other point or name lies; else left out."""
    size = 7.5
    along = np.log10 if axis.get_xscale() == "log" else float
    (left, right), (low, high) = map(along, axis.get_xlim()), axis.get_ylim()
    per_x, per_y = (
        (figure.get_figwidth() - 1.9) * 72 / (right - left),
        (figure.get_figheight() - 1.0) * 72 / (high - low),
    )
    taken = [((along(x) - left) * per_x, (y - low) * per_y, 7.0, 7.0) for x, y, _ in points]
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        at, wide = ((along(x) - left) * per_x, (y - low) * per_y), 0.3 * size * len(name)
        for dx, dy in ((0, 11), (0, -11), (wide + 9, 0), (-wide - 9, 0)):
            box = (at[0] + dx, at[1] + dy, wide, size / 2)
            if not any(abs(box[0] - b[0]) < box[2] + b[2] and abs(box[1] - b[1]) < box[3] + b[3] for b in taken):
                taken.append(box)
                axis.annotate(
                    name, (x, y), (dx, dy), textcoords="offset points", size=size, ha="center", va="center", zorder=6
                )
                break


def label(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 2 :]}"


def labels(names: Sequence[str]) -> list[str]:
    return [label(name) for name in names]


def letters(n: int) -> float:
    """Size of letters for n labels in a row."""
    return 9.0 if n <= 12 else 8.0 if n <= 24 else 6.5


def row_height(n: int) -> float:
    """Inches between n labelled rows."""
    return 0.28 if n <= 12 else 0.2 if n <= 24 else 0.15


def cell(n: int) -> float:
    """Inches of a cell of a heatmap with n of them in a row."""
    return 0.5 if n <= 8 else 0.42 if n <= 16 else 0.24 if n <= 24 else 0.16


def width(names: Sequence[str], size: float) -> float:
    """Inches that labels take."""
    return max((len(label(name)) for name in names), default=0) * size * 0.0088 + 0.1


def slanted(names: Sequence[str]) -> float:
    """Inches that they take above a heatmap."""
    return width(names, letters(len(names))) * 0.87 + 0.15
