"""The offline stage: all weights trained on labelled rows, written as a folder that runs can start from."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests import tiny, toys
from treelora_ray.config import ModelConfig
from treelora_ray.models.backbone import Model, load_model
from treelora_ray.models.loading import from_pretrained
from treelora_ray.training import pretrain as module
from treelora_ray.training.errors import RunError
from treelora_ray.training.pretrain import open_rows, pretrain

ROOT = Path(__file__).parents[2]


def write_images(path: Path, rows: int, seed: int) -> None:
    columns = toys.images(0, rows, seed, classes=3).take(range(rows))
    pictures = []
    for picture in columns["image"]:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, format="PNG")
        pictures.append({"bytes": out.getvalue(), "path": None})
    pq.write_table(pa.table({"image": pictures, "label": columns["label"]}), path)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.vit(tmp_path_factory.mktemp("vit")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train.parquet", 96, 0)
    write_images(folder / "test.parquet", 48, 1)
    return str(folder)


def go(backbone: str, data: str, output: Path, **changes: Any) -> Any:
    return pretrain(backbone, data, output, **{"epochs": 12, "batch": 16, "lr": 5e-3, "device": "cpu", **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_model(ModelConfig(backbone=str(folder), device="cpu"), "image", 0).net.state_dict()
    return {name: tensor for name, tensor in found.items() if "lora_" not in name}


def test_training_all_weights_answers_more_test_rows_and_gives_a_folder_that_loads(
    backbone: str, data: str, tmp_path: Path
) -> None:
    told: list[str] = []
    done = go(backbone, data, tmp_path / "deep" / "mine", tell=told.append)
    assert (done.classes, done.train_rows, done.test_rows) == (3, 96, 48)
    assert done.after > done.before + 10
    assert told[0].endswith(f"before: {done.before:.2f}% of 48 test rows")
    assert told[-1] == f"after: {done.after:.2f}% of 48 test rows"
    old, new = weights(Path(backbone)), weights(tmp_path / "deep" / "mine")
    assert old.keys() == new.keys()
    assert not any(torch.equal(old[name], new[name]) for name in old)
    record = json.loads((tmp_path / "deep" / "mine" / "pretraining.json").read_text())
    assert (record["seed"], record["after"]) == (0, done.after)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mine"]


def test_the_written_folder_holds_the_trained_weights_and_can_be_trained_again(
    backbone: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[dict[str, torch.Tensor]] = []
    save = module._save

    def watched(model: Model, output: Path, record: dict[str, Any]) -> None:
        trained.append(model.net.state_dict())
        save(model, output, record)

    monkeypatch.setattr(module, "_save", watched)
    go(backbone, data, tmp_path / "one", epochs=1)
    written, _ = from_pretrained(str(tmp_path / "one"), ModelConfig(), "image")
    assert written.state_dict().keys() == trained[0].keys()
    assert all(torch.equal(tensor, trained[0][name]) for name, tensor in written.state_dict().items())
    assert go(str(tmp_path / "one"), data, tmp_path / "two", epochs=1, rows=8).train_rows == 8


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(backbone: str, data: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(backbone, data, tmp_path / name, epochs=1, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_of_a_single_file_a_fifth_of_each_class_is_kept_for_the_test(tmp_path: Path) -> None:
    write_images(tmp_path / "all.parquet", 90, 0)
    task = open_rows(str(tmp_path / "all.parquet"), 0)
    train, test = (np.array(rows.take(range(len(rows)))["label"]) for rows in (task.train, task.test))
    assert len(train) + len(test) == 90
    for label in task.labels:
        count = (train == label).sum() + (test == label).sum()
        assert (test == label).sum() == round(0.2 * count)


def test_texts_are_pretrained_too(tmp_path: Path) -> None:
    words = ["good film", "bad film", "very good book", "not good", "a good one", "bad book", "bad", "good"] * 4
    labels = ["yes" if "good" in text and "not" not in text else "no" for text in words]
    pq.write_table(pa.table({"text": words, "label": labels}), tmp_path / "all.parquet")
    bert, data = str(tiny.bert(tmp_path / "bert")), str(tmp_path / "all.parquet")
    done = go(bert, data, tmp_path / "out", epochs=2, max_length=32)
    assert done.classes == 2
    assert load_model(ModelConfig(backbone=str(tmp_path / "out"), max_length=32), "text", 0).kind == "text"


def test_what_cannot_work_is_said_and_writes_nothing(backbone: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is there already"):
        go(backbone, data, tmp_path)
    with pytest.raises(RunError, match="at least 1"):
        go(backbone, data, tmp_path / "out", epochs=0)
    with pytest.raises(RunError, match="lower lr"):
        go(backbone, data, tmp_path / "out", lr=1e30)
    write_images(tmp_path / "few.parquet", 2, 0)
    with pytest.raises(RunError, match="too few rows"):
        go(backbone, str(tmp_path / "few.parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_pipeline_prints_accuracy_before_and_after(
    backbone: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "pipelines" / "pretrain.py"))["main"]
    words = ["--backbone", backbone, "--data", data, "--output", str(tmp_path / "out"), "--epochs", "1"]
    assert main([*words, "--rows", "20", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("20 rows of 3 classes; before: ")
    assert "after: " in out
    assert f"model.backbone={tmp_path / 'out'}" in out
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
