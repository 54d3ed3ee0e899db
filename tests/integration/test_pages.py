"""The examples of the documentation run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny, toys
from treelora_ray.methods.base import METHODS
from treelora_ray.methods.options import METHOD_OPTIONS
from treelora_ray.reference import reference
from treelora_ray.training.stream import StreamRun

DOCS = Path(__file__).parents[2] / "docs"


def example(page: str) -> str:
    found = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found
    return found.group(1)


def test_the_page_of_settings_is_what_the_code_says() -> None:
    assert (DOCS / "config.md").read_text() == reference(), "run: python -m treelora_ray.reference > docs/config.md"


def test_the_quickstart_from_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(example("quickstart.md"), {"folder": str(tmp_path)})
    assert capsys.readouterr().out == "['striped-0', 'turned-0'] (2, 2)\n"


def test_the_worked_method_learns_resumes_and_at_zero_is_plain(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    try:
        exec(compile(example("adding-a-method.md"), "page", "exec", dont_inherit=True), names)
        backbone = tiny.vit(tmp_path)
        theta = {}
        for label, options in (
            ("plain", {"name": "seqlora"}),
            ("zero", {"name": "stay", "strength": 0.0}),
            ("strong", {"name": "stay", "strength": 5.0}),
        ):
            config = toys.config(backbone, options)
            (tmp_path / label).mkdir()
            done = StreamRun(config, toys.stream(2), toys.method(config), tmp_path / label)
            done.go()
            theta[label] = done.learner.adapter.clone()
            again = StreamRun(config, toys.stream(2), toys.method(config), tmp_path / label)
            assert again.resume()
            assert torch.equal(again.learner.adapter, theta[label])
        assert torch.equal(theta["plain"], theta["zero"])
        assert not torch.equal(theta["plain"], theta["strong"])
    finally:
        METHODS.pop("stay", None)
        METHOD_OPTIONS.pop("stay", None)
