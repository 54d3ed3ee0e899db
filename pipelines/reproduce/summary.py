"""The main table: of all methods on all streams, in docs/results/README.md, from what the streams' pages say.

table.py writes it along with a page that it tells of.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from treelora_ray.tracking.comparison_table import NONE

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
STREAMS = {
    "text-7a": "seven text tasks",
    "text-7b": "second order",
    "text-15": "fifteen text tasks",
    "vision-24": "24 of digits",
}
COSTS = {
    "train_seconds": ("train time, s", "{:.0f}"),
    "step_cost": ("step cost", "{:.2f}"),
    "memory": ("memory, MiB", "{:.2f}"),
}
OTHER_KIND = {"agem": "keeps rows", "replay": "keeps rows", "independent": "shares nothing", "joint": "all at once"}
BEGIN, END = "<!-- summary.py: begin -->", "<!-- summary.py: end -->"


def lines(page: str, folder: Path) -> dict[str, dict[str, str]]:
    """What a page's CSV file says, by row."""
    with (folder / f"{page}.csv").open(newline="") as file:
        return {line["row"]: line for line in csv.DictReader(file)}


def score(line: Mapping[str, str]) -> str:
    """Mean ± deviation over seeds, and in brackets the mean drop since a task was learnt."""
    if not line.get("op_mean"):
        return NONE
    spread = f" ± {float(line['op_std']):.1f}" if line["op_std"] else ""
    drop = f" ({float(line['bwt_mean']):.1f})" if line["bwt_mean"] else ""
    return f"{float(line['op_mean']):.1f}{spread}{drop}"


def cost(line: Mapping[str, str], key: str, form: str) -> str:
    return form.format(float(line[f"{key}_mean"])) if line.get(f"{key}_mean") else NONE


def table(folder: Path = RESULTS) -> str:
    """Rows in order of their mean score over the streams, those of another kind last; costs are of the first stream."""
    pages = {page: lines(page, folder) for page in STREAMS}
    first = pages["text-7a"]

    def order(row: str) -> tuple[bool, float]:
        return row in OTHER_KIND, -sum(float(page.get(row, {}).get("op_mean") or 0) for page in pages.values())

    titles = [f"[{title}]({page}.md)" for page, title in STREAMS.items()]
    told = [["method", *titles, *(title for title, _ in COSTS.values())]]
    for row in sorted(first, key=order):
        name = f"{row} ({OTHER_KIND[row]})" if row in OTHER_KIND else row
        costs = (cost(first[row], key, form) for key, (_, form) in COSTS.items())
        told.append([name, *(score(page.get(row, {})) for page in pages.values()), *costs])
    head, *rows = ("| " + " | ".join(cells) + " |" for cells in told)
    return "\n".join([head, "|---|" + "---:|" * (len(told[0]) - 1), *rows])


def with_table(text: str, table: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def write(folder: Path = RESULTS) -> None:
    page = folder / "README.md"
    page.write_text(with_table(page.read_text(), table(folder)))
