"""The main table of docs/results/README.md: what it says of the streams' pages, and that it is what they say."""

from __future__ import annotations

from pathlib import Path

from pipelines.reproduce import summary

COLUMNS = ("row", "op_mean", "op_std", "bwt_mean", "train_seconds_mean", "step_cost_mean", "memory_mean")


def page(path: Path, *lines: tuple[str, ...]) -> None:
    path.write_text("\n".join(",".join(line) for line in (COLUMNS, *lines)) + "\n")


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_page_holds_the_table_that_its_streams_make() -> None:
    text = (summary.RESULTS / "README.md").read_text()
    assert summary.with_table(text, summary.table()) == text


def test_rows_stand_in_the_order_of_their_scores_and_those_of_another_kind_last(tmp_path: Path) -> None:
    for number, name in enumerate(summary.STREAMS):
        page(
            tmp_path / f"{name}.csv",
            ("ewc", f"{50 + number}", "1.25", "0.5", "200.4", "1.01", "3.5"),
            ("replay", "90", "", "2", "", "", "4"),
            ("treelora", "60.04", "", "", "", "", "3"),
            ("joint", "95", "", "", "", "", ""),
        )
    _, _, *told = rows(summary.table(tmp_path))
    assert [row[0] for row in told] == ["treelora", "ewc", "joint (all at once)", "replay (keeps rows)"]
    assert told[1][1:] == [*(f"{score}.0 ± 1.2 (0.5)" for score in (50, 51, 52, 53)), "200", "1.01", "3.50"]
    assert told[0][1:] == ["60.0"] * 4 + ["–", "–", "3.00"]


def test_what_has_not_been_learnt_is_left_open(tmp_path: Path) -> None:
    for name in summary.STREAMS:
        known = name != "text-15"
        page(tmp_path / f"{name}.csv", ("seqlora" if name != "vision-24" else "lwf", "40" if known else "", *[""] * 5))
    assert rows(summary.table(tmp_path))[2] == ["seqlora", "40.0", "40.0", "–", "–", "–", "–", "–"]


def test_what_stands_around_the_table_is_kept(tmp_path: Path) -> None:
    for name in summary.STREAMS:
        page(tmp_path / f"{name}.csv", ("lwf", "40", "", "", "", "", ""))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{summary.BEGIN}old{summary.END}\nafter\n")
    summary.write(tmp_path)
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert summary.table(tmp_path) in once
    summary.write(tmp_path)
    assert readme.read_text() == once
