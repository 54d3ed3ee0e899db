"""The package works without its checkout: built, installed elsewhere, run from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(command: list[str], folder: Path, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_wheel_learns_a_stream_in_an_empty_environment(tmp_path: Path) -> None:
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")], tmp_path)
    binaries = tmp_path / "venv" / "bin"
    constraints = str(ROOT / "constraints.txt")
    run([str(binaries / "pip"), "install", "-q", "-c", constraints, str(wheel)], tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    treelora, cache = str(binaries / "treelora"), {"TREELORA_CACHE": str(tmp_path / "cache")}
    for preset in ("quickstart", "paper/trace", "paper/vit-cifar100"):
        assert "ok: run" in run([treelora, "config", "check", preset], elsewhere)
    assert "treelora: " in run([treelora, "methods"], elsewhere)
    said = run([treelora, "train", "quickstart", "stream.tasks=2", "train.steps=20", "name=two"], elsewhere, **cache)
    assert "halves-0" in said
    assert (elsewhere / "runs" / "two" / "adapters" / "rotated-0" / "adapter_model.safetensors").is_file()
