"""The journal of a run: whole lines, nothing told twice, nothing that waits."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from treelora_ray.tracking.journal import FILE, Journal, read, read_on

ABOUT = {"name": "run"}


def journal(folder: Path, every: int = 5, fresh: bool = True, left: int = 2) -> Journal:
    made = Journal(folder, every, batch=32, say=pytest.fail)
    made.begins(ABOUT, fresh, left)
    return made


def steps(told: Journal, unit: int, first: int, last: int, of: int = 12) -> None:
    for step in range(first, last):
        told.step(unit, step, of, unit * of + step, float(step), lambda: {"lr": 0.5})


def seen(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in read(folder / FILE) if entry["kind"] == kind]


def record(number: int) -> dict[str, Any]:
    return {"unit": f"task {number}", "tasks": [number], "scores": [50.0]}


def test_every_so_many_steps_and_the_last_make_an_entry_with_the_mean_of_their_losses(tmp_path: Path) -> None:
    steps(journal(tmp_path), 0, 0, 12)
    found = seen(tmp_path, "step")
    assert [entry["step"] for entry in found] == [4, 9, 11]
    assert [entry["metrics"]["loss"] for entry in found] == [2.0, 7.0, 10.5]
    assert all(entry["metrics"]["lr"] == 0.5 and entry["metrics"]["samples_per_second"] > 0 for entry in found)


def test_values_are_asked_for_only_where_an_entry_is_made(tmp_path: Path) -> None:
    told = journal(tmp_path)
    asked: list[int] = []

    def values(step: int) -> dict[str, float]:
        asked.append(step)
        return {}

    for step in range(10):
        told.step(0, step, 12, step, 0.0, partial(values, step))
    assert asked == [4, 9]


def test_steps_learnt_again_after_a_resume_are_told_once(tmp_path: Path) -> None:
    first = journal(tmp_path)
    steps(first, 0, 0, 12)
    first.learnt(0, record(0), {"op": 50.0})
    steps(first, 1, 0, 11)  # the last checkpoint was at step 3 of unit 1, or even within unit 0
    again = journal(tmp_path, fresh=False)
    steps(again, 0, 7, 12)
    again.learnt(0, record(0), {"op": 50.0})
    steps(again, 1, 0, 12)
    again.learnt(1, record(1), {"op": 51.0})
    again.ends("FINISHED")
    assert [(entry["unit"], entry["step"]) for entry in seen(tmp_path, "step")] == [
        (0, 4), (0, 9), (0, 11), (1, 4), (1, 9), (1, 11),
    ]  # fmt: skip
    assert [entry["number"] for entry in seen(tmp_path, "learnt")] == [0, 1]
    runs = {entry["run"] for entry in seen(tmp_path, "begins")}
    assert len(seen(tmp_path, "begins")) == 2
    assert len(runs) == 1


def test_a_finished_run_that_is_asked_again_tells_nothing(tmp_path: Path) -> None:
    told = journal(tmp_path)
    told.ends("FINISHED")
    before = (tmp_path / FILE).read_bytes()
    again = journal(tmp_path, fresh=False, left=0)
    again.ends("FINISHED")
    assert (tmp_path / FILE).read_bytes() == before


def test_a_run_that_died_before_it_could_say_so_says_it_when_it_is_asked_again(tmp_path: Path) -> None:
    journal(tmp_path)
    journal(tmp_path, fresh=False, left=0).ends("FINISHED")
    assert [entry["status"] for entry in seen(tmp_path, "ends")] == ["FINISHED"]


def test_a_run_that_starts_over_has_a_journal_of_its_own(tmp_path: Path) -> None:
    steps(journal(tmp_path), 0, 0, 5)
    old = seen(tmp_path, "begins")[0]["run"]
    steps(journal(tmp_path, fresh=True), 0, 0, 5)
    assert [entry["run"] != old for entry in seen(tmp_path, "begins")] == [True]
    assert len(seen(tmp_path, "step")) == 1


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_short_by_a_crash_is_told_again(tmp_path: Path, cut: int) -> None:
    steps(journal(tmp_path), 0, 0, 10)
    path = tmp_path / FILE
    os.truncate(path, path.stat().st_size - cut)
    assert [entry["step"] for entry in seen(tmp_path, "step")] == [4]
    steps(journal(tmp_path, fresh=False), 0, 5, 10)
    assert [entry["step"] for entry in seen(tmp_path, "step")] == [4, 9]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_reading_on_begins_where_it_ended(tmp_path: Path) -> None:
    told = journal(tmp_path)
    steps(told, 0, 0, 5)
    [*_, (offset, last)] = read_on(tmp_path / FILE, 0)
    assert last["step"] == 4
    assert read_on(tmp_path / FILE, offset) == []
    steps(told, 0, 5, 10)
    assert [entry["step"] for _, entry in read_on(tmp_path / FILE, offset)] == [9]


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    told = journal(tmp_path, every=1)
    told.step(0, 0, 2, 0, 1.0, lambda: {"penalty": float("nan"), "lr": float("inf"), "strength": 0.0})
    assert set(seen(tmp_path, "step")[0]["metrics"]) == {"loss", "samples_per_second", "strength"}


def test_a_full_disk_ends_the_journal_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    told = Journal(tmp_path, 5, 32, said.append)
    told.begins(ABOUT, True, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    steps(told, 0, 0, 12)
    told.ends("FINISHED")
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "goes on without it" in said[0]
