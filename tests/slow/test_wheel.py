"""The package works without its checkout: built, installed elsewhere, run from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.integration.test_runs import png
from treelora_ray.data.digits import digits_stream

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ANSWER = """
import sys, mlflow, pandas as pd
mlflow.pyfunc.load_model(sys.argv[1]).predict(pd.read_parquet(sys.argv[2])).to_parquet(sys.argv[3])
"""


def run(command: list[str], folder: Path, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], folder)
    (wheel,) = folder.glob("*.whl")
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    binaries = folder / "venv" / "bin"
    run([str(binaries / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)], folder)
    return binaries


def test_the_wheel_learns_a_stream_in_an_empty_environment(binaries: Path, tmp_path: Path) -> None:
    treelora, cache = str(binaries / "treelora"), {"TREELORA_CACHE": str(tmp_path / "cache")}
    for preset in ("quickstart", "paper/trace", "paper/vit-cifar100"):
        assert "ok: run" in run([treelora, "config", "check", preset], tmp_path)
    assert "treelora: " in run([treelora, "methods"], tmp_path)
    spaces = "from treelora_ray.cluster.spaces import known, load_space; print(known(), load_space('smoke').name)"
    assert run([str(binaries / "python"), "-c", spaces], tmp_path).split("\n")[0].endswith("'treelora'] smoke")
    said = run([treelora, "train", "quickstart", "stream.tasks=2", "train.steps=20", "name=two"], tmp_path, **cache)
    assert "turned-0" in said
    assert (tmp_path / "runs" / "two" / "adapters" / "striped-0" / "adapter_model.safetensors").is_file()


def test_models_of_the_wheel_answer_without_run_backbone_and_network(binaries: Path, tmp_path: Path) -> None:
    """Images, texts and prompts: learnt, packed and answered by the wheel alone, as `treelora predict` answers."""
    home, treelora = tmp_path / "home", str(binaries / "treelora")
    for name, columns in {
        "texts": {"text": ["good film", "bad film"] * 8, "label": ["good", "bad"] * 8},
        "prompts": {"prompt": ["sum of one", "sum of two"] * 8, "answer": ["two", "three"] * 8},
    }.items():
        for task in ("one", "two"):
            (home / name / task).mkdir(parents=True)
            for split in ("train", "test"):
                pq.write_table(pa.table(columns), home / name / task / f"{split}.parquet")
    for make in (tiny.bert, tiny.llama):
        (home / make.__name__).mkdir()
        make(home / make.__name__)
    pictures = digits_stream(1).tasks[0].test.take(range(20))["image"]
    rows: dict[str, Any] = {
        "images": {"image": [png(picture) for picture in pictures]},
        "texts": {"text": ["good film", "a bad book"]},
        "prompts": {"prompt": ["sum of two", "sum of good"]},
    }
    more = {
        "images": ["stream.tasks=2", "train.steps=20"],
        "texts": ["stream={source: parquet, path: texts}", "model={backbone: bert, max_length: 16}"],
        "prompts": ["stream={source: parquet, path: prompts}", "model={backbone: llama, max_length: 32}"],
    }
    environment = {
        "TREELORA_CACHE": str(home / "cache"), "TREELORA_TRACKING": "none", "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name, columns in rows.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        (home / f"{name}.yaml").write_text("train: {steps: 20, batch: 8}\n")
        run([treelora, "train", f"{name}.yaml", f"name={name}", *more[name]], home, **environment)
        files = ["--input", str(tmp_path / f"{name}.parquet"), "--output", str(tmp_path / f"{name}-run.parquet")]
        run([treelora, "predict", f"runs/{name}", *files], home, **environment)
        run([treelora, "model", f"runs/{name}", "--output", str(tmp_path / name)], home, **environment)
    shutil.rmtree(home)
    offline = environment | {"HF_HUB_OFFLINE": "1", "TREELORA_CACHE": str(tmp_path / "none")}
    for name in rows:
        files = [name, f"{name}.parquet", f"{name}-model.parquet"]
        run([str(binaries / "python"), "-c", ANSWER, *files], tmp_path, **offline)
        expected, found = (pq.read_table(tmp_path / f"{name}-{by}.parquet").to_pydict() for by in ("run", "model"))
        assert found == {key: expected[key] for key in found}, json.dumps([found, expected])
        assert len(found) == 2
    assert not (tmp_path / "none").exists()
