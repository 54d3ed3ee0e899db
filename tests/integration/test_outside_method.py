"""The guide to adding a method, followed from outside the package: the page's own code, found by its entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import tiny
from tests.unit.test_outside import install
from treelora_ray.files import load_snapshot

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding-a-method.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    assert found
    return found.group(1)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The package that the guide describes, installed, and a broken one beside it."""
    project = tomllib.loads(block("toml"))["project"]
    entries = project["entry-points"]["treelora_ray.methods"]
    (module,) = entries.values()
    install(tmp_path / "site", project["name"], entries, **{module: block("python")})
    install(tmp_path / "site", "broken-method", {"broken": "not_there"})
    return tmp_path / "site"


def learn(tmp_path: Path, site: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    backbone = tiny.vit(tmp_path / "vit")
    config = {
        "name": "stays",
        "folder": str(tmp_path / "runs"),
        "stream": {"source": "digits", "tasks": 2, "rows": 16, "test_rows": 8},
        "model": {"backbone": str(backbone), "lora": {"rank": 2}},
        "method": {"name": "stay", "strength": 2.0},
        "train": {"steps": 3, "batch": 8, "threads": 1},
        "tracking": {"to": "none"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    paths = os.pathsep.join([str(site), str(ROOT)])
    command = [sys.executable, "-m", "treelora_ray", "train", str(tmp_path / "config.yaml"), "--quiet", *overrides]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path
    )


def assert_learnt(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert result["finished"]
    assert [record["effort"]["steps"] for record in result["records"]] == [3, 3]
    assert result["config"]["method"] == {"name": "stay", "strength": 2.0}
    assert result["packages"]["stay-method"] == "0.3"
    tensors, _ = load_snapshot(sorted((folder / "checkpoints").glob("state-*"))[-1])
    assert "method.before" in tensors


def test_the_method_of_the_guide_learns_from_a_package_of_its_own(tmp_path: Path, site: Path) -> None:
    done = learn(tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert_learnt(tmp_path / "runs" / "stays")


@pytest.mark.slow
def test_workers_of_ray_find_it_too(tmp_path: Path, site: Path) -> None:
    done = learn(tmp_path, site, "cluster.workers=2")
    assert done.returncode == 0, done.stderr
    assert_learnt(tmp_path / "runs" / "stays")
