"""Real data through the command line, where they lie beside the checkout; else skipped, saying so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import measures, text_families, warm_heads
from benchmarks.encoder import encoder as installed
from tests import tiny
from treelora_ray import Run
from treelora_ray.cli import main
from treelora_ray.models.router import ClassSums, Router

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


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Four tasks of two families."""
    data, few = needs("text_stream_15"), tmp_path / "data"
    encoder()
    meta = {each["task"]: each for each in json.loads((data / "meta.json").read_text())}
    few.mkdir()
    (few / "meta.json").write_text(json.dumps([meta[task] for task in ("agnews", "sst2", "dbpedia", "imdb")]))
    for task in ("agnews", "sst2", "dbpedia", "imdb"):
        (few / task).symlink_to(data / task)
    return few


def test_the_benchmark_of_text_families_judges_a_tree_and_writes_its_page(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_families, "PAGE", tmp_path / "page" / "text-families.md")
    given = [str(few), "stream.rows=64", "--seeds", "0", "--rounds", "4", "--folder", str(tmp_path / "runs"), "--doc"]
    text_families.main(given)
    assert "4 rounds, seed 0: adjusted Rand index 1.00" in capsys.readouterr().out
    page = (tmp_path / "page" / "text-families.md").read_text()
    assert "| 4 | 0 | 1.00 |" in page
    for name in text_families.FIGURES:
        assert (tmp_path / "page" / "figures" / "text-families" / f"{name}.png").is_file()


def test_the_benchmark_of_measures_compares_them_on_the_same_runs(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measures, "PAGE", tmp_path / "measures.md")
    measures.main([str(few), "stream.rows=64", "--seeds", "0", "--rounds", "4", "--doc"])
    printed, page = capsys.readouterr().out, (tmp_path / "measures.md").read_text()
    assert "seed 0, gradients, cosine: 1.00" in printed
    for name in (*measures.GRADIENTS, *measures.FEATURES):
        assert f"| {name} | " in page
    assert page in printed


def test_the_benchmark_of_warm_heads_prints_each_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = needs("text_stream_15")
    encoder()
    monkeypatch.setattr(warm_heads, "PAGE", tmp_path / "warm-heads.md")
    monkeypatch.setattr(warm_heads, "PAIRS", [("agnews", "dbpedia")])
    less = {"stream.tasks": ["agnews", "dbpedia"], "stream.rows": 400, "stream.test_rows": 100, "train.steps": 20}
    learnt = warm_heads.scores
    monkeypatch.setattr(warm_heads, "scores", lambda path, seed, changes: learnt(path, seed, {**changes, **less}))
    warm_heads.main([str(data), "--seeds", "0", "--doc"])
    page = (tmp_path / "warm-heads.md").read_text()
    assert page in capsys.readouterr().out
    (line,) = [line for line in page.splitlines() if line.startswith("| agnews → dbpedia |")]
    fresh, _, few, every, sample = (float(text) for text in line.split("|")[2:7])
    assert few < min(every, sample) - 5  # fourteen classes, six rows of each
    assert min(fresh, every, sample) > 70


def test_distances_of_features_are_symmetric_and_zero_of_a_task_from_itself() -> None:
    router = Router(6, "cpu")
    generator = torch.Generator().manual_seed(0)
    for task in range(3):
        sums = ClassSums(2, 6)
        sums.add(torch.randn(40, 6, generator=generator) + task, torch.arange(40) % 2)
        router.add(task, sums)
    for name, measure in measures.FEATURES.items():
        found = measure(router, 3)
        np.testing.assert_allclose(found, found.T, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(np.diag(found), 0, atol=1e-6, err_msg=name)
        assert (found[np.triu_indices(3, 1)] > 1e-4).all(), name
    tree = measures.grown(np.array([[0, 1, 5.0], [1, 0, 5], [5, 5, 0]]))
    assert sorted(len(group) for group in tree.cut(2.0)) == [1, 2]
    assert set(tree.siblings(0)) | {0} >= {0, 1}
