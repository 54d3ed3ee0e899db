"""The documentation is true: its examples run, its tables are the code's, what it points at is there."""

import ast
import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from tests.slow.test_mutations import MUTATIONS
from treelora_ray.core.config import MODES, GuideConfig
from treelora_ray.methods.options import METHOD_OPTIONS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```.*$", re.MULTILINE)
TEST_NAME = re.compile(r"(test_\w+\.py)::([\w:]+)")


@pytest.fixture(autouse=True)
def _own_torch() -> Iterator[None]:
    """Examples seed the global generator."""
    with torch.random.fork_rng():
        yield


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def section(path: Path, heading: str) -> str:
    """The text under a heading, down to the next of its level."""
    level = heading.split(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{path.name} has no heading {heading!r}"
    return found[1]


def rows(text: str, columns: int) -> list[list[str]]:
    """The rows, without header and rule, of all tables with so many columns."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        if len(cells[0]) == columns:
            assert all(len(line) == columns for line in cells[2:]), table
            found += cells[2:]
    return found


def test_the_example_of_the_readme_prints_what_the_readme_says() -> None:
    example, printed = blocks(ROOT / "README.md", "python")[0], io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == blocks(ROOT / "README.md", "text")[0]


def test_in_the_example_of_the_readme_the_related_task_starts_ahead() -> None:
    lines = blocks(ROOT / "README.md", "text")[0].splitlines()
    first = {line.split(":")[0]: float(line.split("loss ")[1].split(" ")[0]) for line in lines[:3]}
    assert lines[2].startswith("german: leans on ['dutch', 'dutch']")
    assert first["german"] < first["dutch"] / 4


def test_the_example_of_the_readme_is_short() -> None:
    assert blocks(ROOT / "README.md", "python")[0].count("\n") <= 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_sessions_of_a_page_give_what_they_show(page: Path) -> None:
    text = FENCE.sub("", page.read_text())  # lines stay where they are, and no fence counts as output
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    report = io.StringIO()
    failed, tried = doctest.DocTestRunner().run(session, out=report.write)
    assert failed == 0, report.getvalue()
    assert tried > 0 or ">>>" not in text
    if page.name == "algorithm.md":
        assert tried > 50


def test_the_settings_table_lists_all_fields_with_their_defaults() -> None:
    table = rows(section(ROOT / "docs" / "algorithm.md", "## Settings"), 3)
    defaults = asdict(GuideConfig())
    assert [(row[0], row[1]) for row in table] == [
        (f"`{field.name}`", f"`{defaults[field.name]!r}`") for field in fields(GuideConfig)
    ]
    assert all(row[2] for row in table)


def test_the_modes_table_lists_all_settings_in_which_modes_differ() -> None:
    table = rows(section(ROOT / "docs" / "algorithm.md", "## Modes"), 4)
    listed = {row[0]: row[1:] for row in table if row[0].startswith("`")}
    needed = {"released": {"steps_per_epoch": 1}}
    settings = {mode: asdict(GuideConfig.of(mode, **needed.get(mode, {}))) for mode in MODES}
    expected = {}
    for field in fields(GuideConfig):
        values = [f"`{settings[mode][field.name]!r}`" for mode in ("treelora", "paper", "released")]
        if field.name == "steps_per_epoch":
            values[2] = "to be given"
        if field.name != "mode" and len(set(values)) > 1:
            expected[f"`{field.name}`"] = values
    assert listed == expected


def names_of_tests(path: Path) -> set[str]:
    """Names of the tests in a file, those of a class as Class::test."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_test_named_in_the_ledger_exists() -> None:
    named = TEST_NAME.findall((ROOT / "docs" / "fidelity.md").read_text())
    known = {path.name: names_of_tests(path) for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in named if test not in known.get(file, set())]
    assert named
    assert not missing


def test_every_row_of_the_ledger_names_a_test_or_says_that_nothing_is_built() -> None:
    ledger = rows((ROOT / "docs" / "fidelity.md").read_text(), 5)
    assert len(ledger) > 20
    unverified = [row[0] for row in ledger if not TEST_NAME.search(row[4]) and row[4] != "not built yet"]
    assert not unverified


def anchors(page: Path) -> set[str]:
    """What a heading of a page is linked by."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    inline = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in inline + re.findall(r"^\[[^\]]+\]: (\S+)", prose(page), re.MULTILINE):
        link = urlsplit(target)
        if link.scheme:
            continue
        there = (page.parent / link.path).resolve() if link.path else page
        assert there.exists(), target
        assert not link.fragment or link.fragment in anchors(there), target


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_the_page_of_a_method_has_all_its_settings_and_what_it_costs(page: Path) -> None:
    options = METHOD_OPTIONS[page.stem]
    known = {field.alias or key for key, field in options.model_fields.items() if key != "name"}
    assert set(re.findall(r"`method\.(\w+)`", section(page, "## Settings"))) == known
    assert section(page, "## When").strip()
    assert section(page, "## Cost").strip()


def test_every_golden_number_names_defects_that_the_slow_tier_puts_in_for_its_test() -> None:
    golden = rows(section(ROOT / "docs" / "fidelity.md", "## Golden numbers"), 3)
    assert golden
    for _, test, defects in golden:
        for defect in defects.split("; "):
            assert MUTATIONS[defect][-1] == test.strip("`")
