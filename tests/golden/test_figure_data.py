"""What figures of a small run and a small sweep show, against what was looked at last; `make golden` writes it anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests import results, sweeps
from treelora_ray.tracking.figure_data import figure_data
from treelora_ray.tracking.sweep_data import figure_data as sweep_figures

SHOWN = Path(__file__).with_name("figures.json")
SWEEP = Path(__file__).with_name("sweep_figures.json")


def found(folder: Path) -> dict[str, Any]:
    data = figure_data(results.small(), results.journal(folder / "journal.jsonl", 3))
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def test_figures_show_what_they_showed_before(tmp_path: Path) -> None:
    data = found(tmp_path)
    if os.environ.get("TREELORA_GOLDEN") == "write":
        SHOWN.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    expected = json.loads(SHOWN.read_text())
    assert list(data) == list(expected)
    for name, shown in expected.items():
        same(data[name], shown, name)


def test_figures_of_a_sweep_show_what_they_showed_before() -> None:
    data = json.loads(json.dumps(sweep_figures(sweeps.drawn(12))))
    if os.environ.get("TREELORA_GOLDEN") == "write":
        SWEEP.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    expected = json.loads(SWEEP.read_text())
    assert list(data) == list(expected)
    same(data, expected, "sweep")


def same(one: Any, other: Any, where: str) -> None:
    """Numbers to nine digits, all else to the letter."""
    if isinstance(other, dict):
        assert list(one) == list(other), where
        for key, value in other.items():
            same(one[key], value, f"{where}.{key}")
    elif isinstance(other, list):
        assert len(one) == len(other), where
        for number, value in enumerate(other):
            same(one[number], value, f"{where}[{number}]")
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12), where
    else:
        assert one == other, where
