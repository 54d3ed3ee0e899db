"""Real data through the command line, where they lie beside the checkout; else skipped, saying so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import text_families
from benchmarks.encoder import encoder as installed
from tests import tiny
from treelora_ray import Run
from treelora_ray.cli import main

pytestmark = pytest.mark.slow
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def train(path: Path, folder: Path, *overrides: str) -> Run:
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), "--quiet", f"folder={folder}", "name=run", "train.threads=2", *overrides])
    assert ended.value.code in (0, None)
    return Run(folder / "run")


def needs(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} does not lie beside the checkout")
    return SHARED / name


def encoder() -> Path:
    if (found := installed()) is None:
        pytest.skip("the extra `bench` is not installed")
    return found


def test_three_text_tasks_on_a_pretrained_sentence_encoder(tmp_path: Path) -> None:
    data = needs("text_stream_15")
    (tmp_path / "text.yaml").write_text(
        json.dumps(
            {
                "stream": {
                    "source": "parquet", "path": str(data), "tasks": ["agnews", "imdb", "sst2"],
                    "rows": 240, "test_rows": 100,
                },
                "model": {"backbone": str(encoder()), "max_length": 48},
                "train": {"epochs": 2, "batch": 16, "lr": 2e-3, "warmup": 0.1},
            }
        )
    )  # fmt: skip
    done = train(tmp_path / "text.yaml", tmp_path / "runs")
    scores = dict(zip(done.tasks, np.diag(done.matrix).tolist(), strict=True))
    assert scores["agnews"] > 75
    assert scores["imdb"] > 55
    assert scores["sst2"] > 55
    said = done.predict({"text": ["a dreadful, boring film", "the company's shares fell after weak earnings"]})
    assert said.task.tolist()[1] == done.tasks.index("agnews")


def test_two_tasks_of_photographs_on_a_tiny_vision_transformer(tmp_path: Path) -> None:
    data = needs("split_cifar10")
    tiny.vit(tmp_path / "vit", size=32, channels=3)
    (tmp_path / "cifar.yaml").write_text(
        json.dumps(
            {
                "stream": {
                    "source": "split", "path": str(data), "classes_per_task": 2, "class_order": "given", "tasks": 2,
                    "rows": 400, "test_rows": 200,
                },
                "model": {"backbone": str(tmp_path / "vit")},
                "train": {"epochs": 4, "batch": 32, "lr": 0.01},
            }
        )
    )  # fmt: skip
    done = train(tmp_path / "cifar.yaml", tmp_path / "runs", "objective.routing=oracle")
    assert len(done.tasks) == 2
    assert (np.diag(done.matrix) > 55).all()  # two classes, a random backbone of a few thousand weights


def test_the_benchmark_of_text_families_judges_a_tree_and_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, few = needs("text_stream_15"), tmp_path / "data"
    encoder()
    meta = {each["task"]: each for each in json.loads((data / "meta.json").read_text())}
    few.mkdir()
    (few / "meta.json").write_text(json.dumps([meta[task] for task in ("agnews", "sst2", "dbpedia", "imdb")]))
    for task in ("agnews", "sst2", "dbpedia", "imdb"):
        (few / task).symlink_to(data / task)
    monkeypatch.setattr(text_families, "PAGE", tmp_path / "page" / "text-families.md")
    given = [str(few), "stream.rows=64", "--seeds", "0", "--rounds", "4", "--folder", str(tmp_path / "runs"), "--doc"]
    text_families.main(given)
    assert "4 rounds, seed 0: adjusted Rand index 1.00" in capsys.readouterr().out
    page = (tmp_path / "page" / "text-families.md").read_text()
    assert "| 4 | 0 | 1.00 |" in page
    for name in text_families.FIGURES:
        assert (tmp_path / "page" / "figures" / "text-families" / f"{name}.png").is_file()
