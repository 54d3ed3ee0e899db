"""A comparison as a page, and all files that are written of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treelora_ray.files import write_atomically
from treelora_ray.tracking import comparison_table as tables
from treelora_ray.tracking import figures
from treelora_ray.tracking.comparison_data import FAILED, FINISHED, Found, figure_data, read
from treelora_ray.tracking.figure_data import Data, duration
from treelora_ray.tracking.page import Html, bullets, page, table, tag, text
from treelora_ray.tracking.report import comparison_data, value
from treelora_ray.tracking.report_run import figure, sections

REPORT = "report.html"


def write_comparison(address: str, folder: Path) -> Found:
    """Table, page and figures, into the comparison's folder; also of one that goes on."""
    found = read(address, folder)
    for name, made in (("md", tables.markdown), ("csv", tables.as_csv), ("tex", tables.latex)):
        write_atomically(folder / f"table.{name}", made(found).encode())
    write_atomically(folder / REPORT, comparison_page(found).encode())
    figures.write(figures.draw(all_figures(found)), folder / "figures")
    return found


def write_comparison_report(address: str, folder: Path, target: Path | None = None) -> Path:
    target = target or folder / REPORT
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, comparison_page(read(address, folder)).encode())
    return target


def write_comparison_figures(address: str, folder: Path, target: Path | None = None) -> list[Path]:
    return figures.write(figures.draw(all_figures(read(address, folder))), target or folder / "figures")


def all_figures(found: Found) -> dict[str, Data]:
    courses = [group for group in found.compared.groups if group.course] if found.compared else []
    made: dict[str, Data] = {}
    if courses and found.compared is not None and len(found.compared.tasks) > 1:
        made["compare"] = comparison_data(courses, found.compared.tasks)
    return made | figure_data(found)


def comparison_page(found: Found) -> str:
    shown = {name: figure(name, data) for name, data in all_figures(found).items()}
    parts = {
        "Summary": [tag("p", sentence(found), class_="lead"), tag("p", _spent(found))],
        "Table": [_table(found), bullets(f"{text}." for text in tables.legend(found))],
        "What has failed": [bullets(tables.failures(found))] if any(line.failures for line in found.lines) else [],
        "With reservations": [bullets(found.notes)] if found.notes else [],
        "Figures": list(shown.values()),
        "Scores by task": list(_scores(found)),
        "Rows": [_rows(found)],
        "Cells": [_cells(found)],
        "Code": [_code(found)],
    }
    title = str(found.about["name"])
    about = f"{len(found.lines)} rows, seeds {', '.join(map(str, found.about['seeds']))}, {found.about['objective']}"
    inside = {name: part for name, part in parts.items() if part}
    return page(title, tag("h1", title), tag("p", about, class_="soft"), *sections(inside))


def sentence(found: Found) -> str:
    """What the numbers say."""
    states = [cell["state"] for cell in found.cells]
    said = f"{states.count(FINISHED)} of {len(states)} cells have learnt the stream"
    failed = states.count(FAILED)
    said += f", {failed} {'has' if failed == 1 else 'have'} failed." if failed else "."
    lines = sorted((x for x in found.lines if "op" in x.values), key=lambda x: -x.values["op"].mean)
    if not lines:
        return said
    best = lines[0]
    said += f" {best.label} scores highest at the end, {value(best.values['op'])}%"
    return said + (f", then {lines[1].label}, {value(lines[1].values['op'])}%." if len(lines) > 1 else ".")


def _spent(found: Found) -> str:
    return f"It took {duration(found.about['seconds'])} in all, with up to {found.about['at_once']} cells at once."


def _table(found: Found) -> Html:
    rows = [
        (line.label, [tables.seeds(line), *(tables.cell(line, column) for column in found.columns)])
        for line in found.lines
    ]
    columns = ["seeds", *(column.title for column in found.columns)]
    return table("Mean ± sample standard deviation over seeds", columns, rows, "method")


def _scores(found: Found) -> Iterator[Html]:
    if found.compared is None:
        return
    groups = [group for group in found.compared.groups if group.scores]
    rows = [(task, [value(group.scores.get(task)) for group in groups]) for task in found.compared.tasks]
    yield table("Score on each task at the end, percent", [group.label for group in groups], rows, "task")


def _rows(found: Found) -> Html:
    rows = [
        (label, [text(row["method"]), text(", ".join(f"{k}={v}" for k, v in row["settings"].items()) or "as it is")])
        for label, row in found.about["rows"].items()
    ]
    return table("What is compared", ["method", "settings of its own"], rows, "row")


def _cells(found: Found) -> Html:
    rows: list[tuple[str, list[Any]]] = [
        (cell["id"], [text(cell["state"]), cell["seed"], text(cell["run"]), text(cell["error"] or "")])
        for cell in found.cells
    ]
    return table("Each an ordinary run", ["state", "seed", "folder", "error"], rows, "cell")


def _code(found: Found) -> Html:
    rows = ((name, [text(version)]) for name, version in found.about["code"].items())
    return table("What it was learnt by", ["version, or digest of the sources"], rows, "part")
