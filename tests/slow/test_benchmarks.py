"""The benchmarks run, and what they claim holds; claims about time with room for a busy machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cells
from benchmarks.guide import regret
from treelora_ray.models.loading import BUILTIN

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(script: str, *options: str) -> str:
    command = [sys.executable, f"benchmarks/{script}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_guide_benchmark_prints_its_table_and_meets_its_bounds(tmp_path: Path) -> None:
    out, figure = tmp_path / "guide.json", tmp_path / "regret.png"
    printed = run("guide.py", "--quick", "--out", str(out), "--figure", str(figure))
    assert "x torch.add" in printed
    assert figure.stat().st_size > 10_000
    result: dict[str, Any] = json.loads(out.read_text())
    large, small, _ = result["exchange"]
    assert large["times_torch_add"] <= 2 * 8
    assert small["loop_over_ours"] > 1.5
    many = result["many_tasks"]
    assert many["one_pull_ms_1000"] <= 2 * 2
    assert many["pulls32_ms_1000"] <= 2 * 20
    assert max(many["one_pull_ratio"], many["pulls32_ratio"]) <= 4
    assert many["insert_amortised_ms"] <= 500


def test_the_regret_of_the_tree_search_grows_at_most_half_as_fast_as_that_of_the_flat_one() -> None:
    sizes, slope = (8, 32, 128, 512), {}
    for kind in ("tree-lcb", "flat-lcb"):
        final = [np.mean([regret(kind, n, 2000, 16, seed)[-1] for seed in range(3)]) for n in sizes]
        slope[kind] = np.polyfit(np.log(sizes), np.log(final), 1)[0]
    assert slope["tree-lcb"] <= slope["flat-lcb"] / 2


def test_the_families_benchmark_prints_its_table() -> None:
    assert "| kd-radius, best level |" in run("families.py", "--quick", "--seeds", "1")


def test_the_sharing_benchmark_prints_a_ratio_and_a_second_run_that_shares_starts_sooner() -> None:
    printed = run("sharing.py", "--quick")
    ratio = re.search(r"^alone over sharing: median ([0-9.]+)", printed, re.MULTILINE)
    assert ratio is not None
    assert float(ratio[1]) > 1.2


def test_a_step_with_the_pull_costs_what_a_plain_one_does(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    assert "| the built-in stream |" in run("step_cost.py", "--repeats", "3", "--out", str(out))
    found: dict[str, list[float]] = json.loads(out.read_text())
    assert found
    for ratios in found.values():
        assert np.median(ratios) < 1.15


def test_the_sweep_benchmark_prints_its_table(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    printed = run("sweep.py", "--quick", "--trials", "4", "--out", str(out))
    assert "| seconds of learning |" in printed
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["whole"]["stopped"] == 0
    assert result["asha"]["learning"] <= 1.5 * result["whole"]["learning"]


def test_a_small_device_is_enough_and_one_that_is_too_small_is_named() -> None:
    printed = run("small_device.py", "--tiny", "--repeats", "1")
    (peak,) = re.findall(r"\| images \| treelora \| (\d+) \|", printed)
    assert 100 < int(peak) < 2048
    command = [sys.executable, "benchmarks/small_device.py", "--tiny", "--repeats", "1", "--gib", "0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "seqlora failed within 0.1 GiB" in done.stderr


def test_the_benchmark_of_steps_on_a_gpu_runs_on_tiny_models(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    tiny = ("--tiny", "--models", "0.5B", "vit", "--stored", "2", "--steps", "4", "--repeats", "2", "--out", str(out))
    printed = run("gpu_step.py", *tiny)
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["models"].keys() == {"0.5B", "vit"}
    for told in result["models"].values():
        assert told.keys() == {"seqlora", "treelora", "o-lora"}
        assert all(second > 0 for each in told.values() for second in each["seconds"])
    assert printed.count("| treelora |") == 2


def test_the_built_in_backbone_is_the_one_that_the_tables_were_learnt_with() -> None:
    kept = [json.loads(path.read_text()) for path in sorted((cells.CELLS / "vision-24").glob("*.json"))]
    assert kept
    assert {cell["identity"]["backbone"] for cell in kept} == {cells._backbone(BUILTIN)}
