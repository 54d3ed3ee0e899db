"""Result tables: what their files say, which cell counts, and that what is kept is not learnt again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import cells, paired, reach
from benchmarks.cells import ROOT, Cell, Table, further, identity, kept, learn, read_cell, read_table, results
from pipelines.reproduce import table as command
from treelora_ray.config import with_values
from treelora_ray.tracking.comparison_table import markdown

FILES = sorted((ROOT / "pipelines" / "reproduce" / "tables").glob("*.yaml"))
TINY: dict[str, Any] = {
    "title": "Two tasks",
    "preset": "quickstart",
    "settings": {"stream.tasks": 2, "stream.rows": 40, "stream.test_rows": 20, "train.steps": 2, "train.batch": 8},
    "seeds": [0],
    "rows": {"independent": None, "weak": {"method": "treelora", "method.lambda": 0.01}},
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cells, "CELLS", tmp_path / "cells")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_table_can_be_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "needed_encoder", lambda: tmp_path)
    found = read_table(path, tmp_path)
    assert found.title
    assert len({cell.id for cell in found.cells}) == len(found.rows) * len(found.seeds)


def test_a_table_that_needs_data_says_so() -> None:
    path = next(path for path in FILES if path.stem.startswith("text"))
    with pytest.raises(SystemExit, match="give their folder"):
        read_table(path, None)


def test_a_table_like_another_has_from_it_what_it_does_not_say(table: Path) -> None:
    more = {"like": "tiny", "title": "Three tasks", "settings": {"stream.tasks": 3}}
    (table.parent / "other.yaml").write_text(yaml.safe_dump(more))
    one, other = read_table(table, None), read_table(table.parent / "other.yaml", None)
    assert (other.title, other.name, list(other.rows), other.seeds) == ("Three tasks", "other", list(one.rows), [0])
    streams = [each.cells[0].config.stream for each in (one, other)]
    assert [(stream.tasks, stream.rows) for stream in streams] == [(2, 40), (3, 40)]


def test_rows_that_are_not_there_are_refused_by_name(table: Path) -> None:
    with pytest.raises(SystemExit, match="tiny has no rows strong: it has independent, weak"):
        read_table(table, None, only=["strong"])


def test_a_cell_is_told_by_settings_data_backbone_and_code_and_by_no_place(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_table(table, None).cells[0].config
    first = identity(config)
    assert identity(with_values(config, {"folder": "elsewhere", "name": "other", "cluster.workers": 2}, "")) == first
    assert identity(with_values(config, {"train.lr": 0.5}, ""))["config"] != first["config"]
    assert identity(with_values(config, {"stream.rows": 39}, ""))["data"] != first["data"]
    monkeypatch.setattr(cells, "code", lambda: {"sources": "others"})
    assert identity(config)["code"] != first["code"]


def test_a_folder_of_a_backbone_is_known_by_its_files(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("weights" if name != "three" else "others")
    (tmp_path / "two" / ".gitattributes").write_text("no part of a model")
    one, two, three = (cells._backbone(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three


def filled(table: Table, cell: Cell, op: float) -> None:
    """A cell as if it had been learnt."""
    effort = {"seconds": {"train": 1.0}, "steps": 4, "pass_rows": 80, "probe_rounds": 0, "queries": 0}
    result = {
        "finished": True,
        "tasks": ["a", "b"],
        "matrix": [[op, op]],
        "metrics": {"op": op},
        "records": [{"unit": 0, "tasks": [0, 1], "scores": [op, op], "effort": effort}],
        "commit": "abc",
        "packages": {"torch": "0"},
    }
    own = {"row": cell.row, "seed": cell.seed, "at_once": 1, "kept": {"memory": 1, "stored": 1}}
    found = {**own, "identity": identity(cell.config), "result": result}
    table.folder.mkdir(parents=True, exist_ok=True)
    (table.folder / f"{cell.id}.json").write_text(json.dumps(found))


def test_what_is_there_is_not_learnt_again(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, said = read_table(table, None), list[str]()
    for number, cell in enumerate(whole.cells):
        filled(whole, cell, 50.0 + number)
    assert learn(whole, tmp_path / "work", say=said.append) == {}
    found = kept(whole)
    assert said == ["tiny: 0 of 2 cells to learn"]
    assert "| independent | 1 | 50.0 |" in markdown(found)
    monkeypatch.setattr(cells, "code", lambda: {"sources": "others"})
    assert [read_cell(whole, cell) for cell in whole.cells] == [None, None]
    assert all(read_cell(whole, cell, any_code=True) for cell in whole.cells)
    assert "1 of 2" not in markdown(kept(whole, any_code=True))


def test_a_row_is_told_beside_independent_with_the_same_seed(table: Path) -> None:
    whole = read_table(table, None, seeds=[0, 1, 2])
    scores = {"independent": (50.0, 60.0, 70.0), "weak": (51.0, 63.0, None)}
    for cell in whole.cells:
        if (score := scores[cell.row][cell.seed]) is not None:
            filled(whole, cell, score)
    told = results(kept(whole))
    assert paired.differences(whole, told) == {"weak": {0: 1.0, 1: 3.0}}
    assert "| weak | +2.0 ± 1.4 | +1.0, +3.0 |" in paired.markdown(whole, told)


def test_further_seeds_are_compared_seed_by_seed_alone(table: Path, tmp_path: Path) -> None:
    rows = {**TINY["rows"], "plain": {"method": "seqlora"}}
    table.write_text(yaml.safe_dump({**TINY, "rows": rows, "further": {"seeds": [3], "rows": ["independent", "weak"]}}))
    whole = read_table(table, None)
    assert [cell.id for cell in whole.further] == ["independent-s3", "weak-s3"]
    said = list[str]()
    for cell, score in zip([*whole.cells, *whole.further], (50.0, 40.0, 51.0, 60.0, 64.0), strict=True):
        filled(whole, cell, score)
    learn(whole, tmp_path / "work", say=said.append)
    assert said == ["tiny: 0 of 5 cells to learn"]
    found = kept(whole)
    assert "| weak | 1 | 51.0 |" in markdown(found)
    told = paired.differences(whole, {**results(found), **further(whole)})
    assert told == {"weak": {0: 1.0, 3: 4.0}, "plain": {0: -10.0}}
    # Of seeds that are asked for there are no further ones.
    assert read_table(table, None, seeds=[0]).further == []
    assert [cell.id for cell in read_table(table, None, only=["weak", "plain"]).further] == ["weak-s3"]


@pytest.mark.slow
def test_what_is_missing_is_learnt_and_kept_small(table: Path, tmp_path: Path) -> None:
    whole = read_table(table, None)
    assert learn(whole, tmp_path / "work", jobs=2, say=lambda _: None) == {}
    assert [path.name for path in (tmp_path / "work" / "tiny").iterdir()] == [".looks"], "runs are not kept"
    found = kept(whole)
    assert [cell["state"] for cell in found.cells] == ["finished", "finished"]
    files = sorted(whole.folder.glob("*.json"))
    assert [path.stem for path in files] == ["independent-s0", "weak-s0"]
    assert all(path.stat().st_size < 20_000 for path in files)
    assert str(tmp_path) not in "".join(path.read_text() for path in files)
    page = command.write(whole, found, {}, tmp_path)
    assert "python pipelines/reproduce/table.py tiny" in page.read_text()
    for line in page.read_text().splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).is_file()


@pytest.mark.slow
def test_the_command_learns_again_says_how_it_compares_and_writes_the_page(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_table(table, None)
    filled(whole, whole.cells[0], 12.5)
    for name, place in (("TABLES", table.parent), ("RESULTS", tmp_path)):
        monkeypatch.setattr(command, name, place)
    given = ["tiny", "--rows", "independent", "--jobs", "1", "--work", str(tmp_path / "work")]
    command.main(given)
    assert "tiny: 0 of 1 cells to learn" in capsys.readouterr().out
    command.main([*given, "--again"])
    said = capsys.readouterr().out
    assert "tiny: 1 of 1 cells to learn" in said
    assert ", before 12.5% (" in said
    command.main(["tiny", "--dry"])
    assert "missing: weak-s0" in capsys.readouterr().out
    assert (tmp_path / "tiny.md").is_file()


def test_steps_to_an_accuracy_count_what_a_method_does_beforehand(table: Path) -> None:
    """Three tasks of two families; the second is a relative of the first, and the third is known at its start."""
    about = {**TINY, "families": {"a": "x", "b": "x", "c": "y"}}
    table.write_text(yaml.safe_dump(about))
    found = read_table(table, None)

    def cell(probe: int, looks: dict[str, list[list[int]]], pace: float) -> dict[str, Any]:
        spent = {"train": 20 * pace, "statistics": 1.0, "probe": 0.5 * probe}
        more = {"probe_rounds": probe, "queries": 0, "pass_rows": 40, "seconds": spent, "reused": {}}
        records = [
            {"unit": task, "effort": {"steps": seen[-1][0], "watched": seen, **more}} for task, seen in looks.items()
        ]
        return {"records": records}

    plain = {"a": [[0, 50], [10, 80], [20, 100]], "b": [[0, 0], [10, 94], [20, 100]], "c": [[0, 99], [20, 100]]}
    weak = {"a": [[0, 0], [10, 50], [20, 60]], "b": [[0, 90], [2, 96], [20, 97]], "c": [[0, 99], [20, 100]]}
    there = {("independent", 0): cell(0, plain, 1.0), ("weak", 0): cell(3, weak, 1.25)}
    told = {each.task: each for each in reach.reached(found, there, "weak", 0.95)}
    assert [(each.alone, each.own, each.extra, each.related) for each in told.values()] == [
        (20, None, 3, False), (20, 2, 3, True), (0, 0, 3, False)
    ]  # fmt: skip
    assert [each.ratio for each in told.values()] == [0.0, 4.0, None]
    assert told["b"].seconds == (20.0, 2 * 1.25 + 1.5), "steps of its own pace, and three rounds of half a second"
    assert [each.ratio_of_seconds for each in told.values()] == [0.0, 5.0, None]
    quick = {**there, ("weak", 0): cell(0, {**weak, "b": [[0, 99], [20, 100]]}, 1.25)}
    assert [each.seconds for each in reach.reached(found, quick, "weak", 0.95)][1] == (20.0, 1.25), "never in no time"
    page = reach.markdown(found, there, ["weak"])
    assert "| weak | 95% | 4.00 | 5.00 | 1 | – | 1 | 1 | 1 |" in page
    assert "| weak | 98% | 0.00 | 0.00 | 1 | – | 1 | 2 | 1 |" in page
    there["weak", 0]["device"] = "cuda"
    assert "| weak | 95% | 4.00 | – | 1 | – | 1 | 1 | 1 |" in reach.markdown(found, there, ["weak"])
    assert not reach.markdown(found, there, [])
