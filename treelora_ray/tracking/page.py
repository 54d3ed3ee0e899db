"""HTML in one file: whatever is not made here is escaped, and nothing is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

VOID = ("img", "meta", "br")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #5b6470; --paper: #ffffff; --line: #d9dde3; --band: #f4f6f8;
  --heat: #e69f00; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a3acb8; --paper: #15181c; --line: #353b43; --band: #1e2329; --heat: #b87f00;
    --accent: #6cb8ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p { max-width: 46rem; } .soft { color: var(--soft); } .lead { font-size: 1.1rem; }
nav a, a { color: var(--accent); } nav { margin: 1rem 0; } nav a { margin-right: 1rem; }
.scroll { overflow-x: auto; margin: .6rem 0; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .45rem .6rem; color: var(--soft); }
th, td { padding: .28rem .6rem; text-align: right; border-top: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
thead th { background: var(--band); border-top: 0; vertical-align: bottom; }
th[scope=row], .text { text-align: left; } td.text { white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
th[scope=row] { position: sticky; left: 0; background: var(--band); font-weight: 600; }
td.heat { background: color-mix(in srgb, var(--heat) calc(var(--share) * 60%), transparent); }
figure { margin: 1.4rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); padding: .5rem; } figcaption { color: var(--soft); max-width: 46rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font-size: .82rem; }
ul { max-width: 46rem; padding-left: 1.2rem; }
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *inside: Any, **attributes: Any) -> Html:
    """An element; what is inside is escaped unless it is `Html`. `class_`, `aria_label`: class, aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(inside)}</{name}>")


def joined(parts: Iterable[Any]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def table(caption: str, columns: Sequence[Any], rows: Iterable[tuple[Any, Sequence[Any]]], head: str = "") -> Html:
    """Rows are a heading and cells; a cell is text, a number's text, or an element `td`."""
    rows = list(rows)
    wordy = [_is_cell(cell) and 'class="text"' in cell[:20] for cell in (rows[0][1] if rows else ())]
    words = [*wordy, *[False] * (len(columns) - len(wordy))]
    heads = (
        tag("th", column, scope="col", class_="text" if left else None)
        for column, left in zip(columns, words, strict=True)
    )
    top = tag("tr", tag("th", head, scope="col", class_="text"), *heads)
    lines = [
        tag("tr", tag("th", name, scope="row"), *(cell if _is_cell(cell) else tag("td", cell) for cell in cells))
        for name, cells in rows
    ]
    whole = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *lines))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, Html) and cell.startswith("<td")


def text(*inside: Any) -> Html:
    """A cell of words."""
    return tag("td", *inside, class_="text")


def heat(value: str, share: float) -> Html:
    """A cell whose colour says how large its number is, from 0 to 1."""
    return tag("td", value, class_="heat", style=f"--share: {min(max(share, 0.0), 1.0):.2f}")


def bullets(items: Iterable[Any]) -> Html:
    return tag("ul", *(tag("li", item) for item in items))


def page(title: str, *body: Any) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, "\n", tag("body", tag("main", *body)), lang="en") + "\n"
