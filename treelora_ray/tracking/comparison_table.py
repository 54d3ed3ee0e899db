"""A comparison's table, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from treelora_ray.tracking.comparison_data import Column, Found, Line

NONE = "–"
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def cell(line: Line, column: Column, sign: str = "±") -> str:
    """Mean ± sample standard deviation; of one seed the number alone."""
    found = line.values.get(column.key)
    if found is None:
        return NONE
    text = column.form.format(found.mean)
    if found.std is not None:
        text += f" {sign} {column.form.format(found.std)}"
    return text + (f" ({line.never} never)" if column.key == "reach" and line.never else "")


def seeds(line: Line) -> str:
    """How many stand behind a row, and what has become of the others."""
    n = len(line.seeds)
    parts = [f"{n}" if n == line.of else f"{n} of {line.of}"]
    if line.failures:
        parts.append(f"{len(line.failures)} failed")
    return ", ".join(parts)


def failures(found: Found) -> Iterator[str]:
    for line in found.lines:
        yield from (f"{name} has failed: {error}" for name, error in line.failures.items())


def legend(found: Found) -> Iterator[str]:
    for column in found.columns:
        yield f"{column.title}: {column.words}; {column.better}"


def markdown(found: Found) -> str:
    head = ["method", "seeds", *(column.title for column in found.columns)]
    rows = [[line.label, seeds(line), *(cell(line, column) for column in found.columns)] for line in found.lines]
    table = [_row(head), "|---|" + "---:|" * (len(head) - 1), *map(_row, rows)]
    lists = [
        ["Mean ± sample standard deviation over seeds."],
        [f"- {text.replace('|', '/')}." for text in legend(found)],
        [f"- {text}" for text in failures(found)],
        [f"- {text}" for text in found.notes],
    ]
    return "\n\n".join("\n".join(lines) for lines in (table, *lists) if lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", r"\|") for text in cells) + " |"


def as_csv(found: Found) -> str:
    """For programs: numbers in full, mean and deviation in columns of their own; empty where there is none."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    names = [f"{column.key}_{what}" for column in found.columns for what in ("mean", "std")]
    never = any(column.key == "reach" for column in found.columns)
    rows.writerow(["row", "method", "seeds", *names, *(["reach_never"] if never else []), "failed", "errors"])
    for line in found.lines:
        numbers: list[float | str] = []
        for column in found.columns:
            value = line.values.get(column.key)
            numbers += ["", ""] if value is None else [value.mean, "" if value.std is None else value.std]
        errors = "; ".join(f"{name}: {error}" for name, error in line.failures.items())
        more = [line.never if "reach" in line.values else ""] if never else []
        rows.writerow([line.label, line.method, len(line.seeds), *numbers, *more, len(line.failures), errors])
    return out.getvalue()


def latex(found: Found) -> str:
    """A tabular in the style of booktabs."""
    head = ["method", "seeds", *(column.title for column in found.columns)]
    lines = [
        r"% \usepackage{booktabs}; mean and sample standard deviation over seeds",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(escaped, head)) + r" \\",
        r"\midrule",
    ]
    for line in found.lines:
        cells = [_math(cell(line, column, r"\pm")) for column in found.columns]
        lines.append(" & ".join([escaped(line.label), escaped(seeds(line)), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {' '.join(text.split())}" for text in (*legend(found), *failures(found))]
    return "\n".join(lines) + "\n"


def _math(text: str) -> str:
    if text == NONE:
        return "--"
    number, bracket, rest = text.partition(" (")
    return f"${number.replace(',', '{,}')}$" + (f" ({rest}" if bracket else "")


def escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)
