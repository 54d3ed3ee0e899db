"""A run's tree as the beginning of another run (`method.prior`)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import toys
from tests.integration.test_runs import call, config_file, png, settings, write
from treelora_ray import Run, run
from treelora_ray.config import ConfigError, from_mapping
from treelora_ray.core.errors import GuideError
from treelora_ray.files import load_snapshot, save_snapshot
from treelora_ray.methods import prior
from treelora_ray.methods.treelora import TreeLora
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.state import Checkpoints
from treelora_ray.training.stream import Listener

FOUR = ["t0", "t1", "t2", "t3"]
PRIOR = {"t0": "prior/t0", "t1": "prior/t1"}
VARIANTS: dict[str, dict[str, Any]] = {
    "treelora": {"guide": {"gate": 0.0}},
    "budget": {"guide": {"gate": 0.0, "budget": 2}},
    "sketch": {"guide": {"gate": 0.0, "sketch_dim": 8, "pulls_per_round": 1}},
    "previous": {"start": "previous"},
    "query": {"query_every": 2, "query_batch": 4, "guide": {"observe": "query"}},
    "paper": {"mode": "paper"},
    "paper-budget": {"mode": "paper", "guide": {"budget": 2}},
    "released": {"mode": "released"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder, 4)
    return folder


@pytest.fixture(scope="module")
def tree(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has learnt t0 and t1."""
    folder = tmp_path_factory.mktemp("first")
    run(of(backbone, data, folder, ["t0", "t1"])).export_tree(folder / "tree.safetensors")
    return folder / "tree.safetensors"


def of(
    backbone: Path, data: Path, folder: Path, tasks: list[str], known: Path | None = None, **changes: Any
) -> dict[str, Any]:
    """A config for some of the tasks."""
    method = {"probe_rounds": 2, **changes.pop("method", VARIANTS["treelora"])}
    if known is not None:
        method["prior"] = str(known)
    return settings(backbone, data, folder, **{**changes, "stream": {"tasks": tasks}, "method": method})


@dataclass
class State:
    tensors: dict[str, Tensor]  # of the last checkpoint, with the adapters it names
    bank: dict[str, Any]
    guide: dict[str, Any]
    files: dict[str, bytes]  # adapters by task


def state(done: Run) -> State:
    found = Checkpoints(done.folder / "checkpoints").load(lambda _: None)
    assert found is not None
    tensors = found.tensors | {f"slot.{slot}": adapter for slot, adapter in found.slots.items()}
    files = {task: (folder / "adapter_model.safetensors").read_bytes() for task, folder in done.adapters.items()}
    return State(tensors, found.meta["bank"], found.meta["method"]["guide"], files)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def starts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The adapters that tasks will have started from."""
    seen: list[Tensor] = []
    real = TreeLora.before_task

    def before_task(self: TreeLora) -> None:
        real(self)
        seen.append(self.learner.adapter.clone())

    monkeypatch.setattr(TreeLora, "before_task", before_task)
    return seen


class Steps(Listener):
    steps = 0

    def step(self, step: int, of: int, loss: float) -> None:  # noqa: ARG002
        self.steps += 1


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_stream_learnt_in_two_runs_has_the_adapters_and_the_tree_of_one_run(
    variant: str, backbone: Path, data: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"method": VARIANTS[variant]}
    if "paper" in variant:
        changes["train"] = {"epochs": 5}  # its warm-up is ten steps
    whole = run(of(backbone, data, tmp_path / "whole", FOUR, **changes))
    first = run(of(backbone, data, tmp_path / "first", FOUR[:2], **changes))
    path = tmp_path / "tree.safetensors"
    first.export_tree(path)
    second = run(of(backbone, data, tmp_path / "second", FOUR[2:], path, **changes))
    one, other = state(whole), state(second)
    assert other.files == {task: one.files[task] for task in FOUR[2:]}
    assert other.bank == one.bank  # adapters are named by what they hold
    assert other.guide == json.loads(json.dumps(one.guide).replace('"t0"', '"prior/t0"').replace('"t1"', '"prior/t1"'))
    assert same(second.method.tensors(), whole.method.tensors())
    leans = [record["report"].get("leans_on") for record in whole.result["records"]]
    renamed = [[PRIOR.get(name, name) for name in names or []] for names in leans]
    assert [record["report"].get("leans_on") or [] for record in second.result["records"]] == renamed[2:]
    assert second.result["drawn"] == whole.result["drawn"].replace("t0", "prior/t0").replace("t1", "prior/t1")


def test_the_tasks_of_a_prior_are_no_tasks_of_the_stream(
    backbone: Path, data: Path, tree: Path, tmp_path: Path
) -> None:
    """Not even one of the same name."""
    done = run(of(backbone, data, tmp_path, ["t1", "t2"], tree))
    assert done.tasks == ["t1", "t2"]
    assert done.matrix.shape == (2, 2)
    assert len(done.result["records"]) == 2
    assert sorted(os.listdir(done.folder / "adapters")) == ["t1", "t2"]
    assert [info.name for info in done.method.learner.infos] == ["t1", "t2"]
    assert done.method.learner.router.route(torch.zeros(1, done.method.learner.model.width)).item() in (0, 1)
    for routing in ("oracle", "inferred"):
        assert done.evaluate(routing).keys() == {"t1", "t2"}
    assert list(done.evaluate().values()) == pytest.approx(done.matrix[-1].tolist())
    for number, task in enumerate(done.tasks):  # what answers is what was learnt
        exported = load_file(done.adapters[task] / "adapter_model.safetensors")
        assert sorted(value.sum().item() for value in exported.values()) == pytest.approx(
            sorted(part.sum().item() for pair in done.method.factors(number).values() for part in pair)
        )
    sha256 = hashlib.sha256(tree.read_bytes()).hexdigest()
    assert done.result["prior"] == {"path": str(tree), "sha256": sha256, "tasks": 2}
    assert "prior" not in Run(tree.parent / "r").result
    done.export_tree(tmp_path / "both.safetensors")
    third = run(of(backbone, data, tmp_path / "third", ["t1"], tmp_path / "both.safetensors"))
    names = ["prior/prior/t0", "prior/prior/t1", "prior/t1", "prior/t2", "t1"]
    assert isinstance(third.method, TreeLora)
    found = prior.read(tmp_path / "both.safetensors", third.method.learner, third.method.settings)
    assert (found.guide.meta["names"], found.guide.meta["last"]) == (names[:-1], None)
    assert third.method.guide.names == names
    assert all(name in third.result["drawn"] for name in names)


def test_a_relative_leans_on_the_prior_and_starts_from_its_adapter(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write(data, 2)
    for split, rows, seed in (("train", 40, 7), ("test", 12, 8)):  # other pictures of what t0 asks
        columns = toys.images(0, rows, seed).take(range(rows))
        (data / "again").mkdir(exist_ok=True)
        table = pa.table({"image": [png(picture) for picture in columns["image"]], "label": columns["label"]})
        pq.write_table(table, data / "again" / f"{split}.parquet")
    gated: dict[str, Any] = {"method": {"probe_rounds": 4}}
    first = run(of(backbone, data, tmp_path / "first", ["t0", "t1"], **gated))
    first.export_tree(tmp_path / "tree.safetensors")
    begun = starts(monkeypatch)
    second = run(of(backbone, data, tmp_path / "second", ["again"], tmp_path / "tree.safetensors", **gated))
    leans = second.result["records"][0]["report"]["leans_on"]
    assert set(leans) - {None} == {"prior/t0"}
    learner = first.method.learner
    for layer, name in enumerate(leans):
        expected = first.method.answer(0) if name else learner.anchor
        assert torch.equal(learner.layout.segment(begun[0], layer), learner.layout.segment(expected, layer))
    assert "prior/t0" in second.result["drawn"]
    assert "prior" not in first.result["drawn"]


@pytest.mark.parametrize("steps", [2, 8])  # within the first task, within the second
def test_a_run_that_goes_on_needs_the_file_no_more(
    steps: int, backbone: Path, data: Path, tree: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tree.safetensors"
    shutil.copy(tree, path)
    whole = run(of(backbone, data, tmp_path / "whole", FOUR[2:], path))
    parts = of(backbone, data, tmp_path / "parts", FOUR[2:], path)
    heard = Steps()
    with pytest.raises(Stopped):
        run(parts, listener=heard, stop=lambda: heard.steps == steps)
    assert heard.steps == steps
    path.unlink()
    done = run(parts)
    one, other = state(whole), state(done)
    assert same(one.tensors, other.tensors)
    assert (one.files, one.bank, one.guide) == (other.files, other.bank, other.guide)
    assert done.result["prior"] == whole.result["prior"]
    assert done.result["matrix"] == whole.result["matrix"]


def test_a_prior_that_does_not_fit_is_refused_with_all_that_differs(
    backbone: Path, data: Path, tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(backbone, tmp_path / "moved")
    changed = shutil.copytree(backbone, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    name = next(name for name in weights if "layernorm" in name)  # no adapter lies there
    weights[name][0] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    lora = {"rank": 2, "alpha": 4}
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"seed": 1}, ["seed, which draws where adapters start, is 1 here, 0 there"]),
        ({"model": {"lora": {**lora, "rank": 3, "alpha": 6}}}, ["model.lora (rank, targets, layers): layer 0 is"]),
        ({"model": {"lora": {**lora, "targets": ["q_proj"]}}}, ["model.lora (rank, targets, layers): layer 1 is"]),
        ({"model": {"lora": {**lora, "alpha": 8}}}, ["model.lora.alpha / rank is 4.0 here, 2.0 there"]),
        ({"model": {"pooling": "mean"}}, ["model.pooling is 'mean' here, 'cls' there"]),
        (
            {"model": {"backbone": str(changed)}},
            [f"the frozen weights differ: model.backbone is '{changed}' here, '{backbone}' there"],
        ),
        (
            {"method": {"guide": {"gate": 0.1, "budget": 2}}},
            ["guide: gate is 0.1 here, 0.0 there", "guide: budget is 2"],
        ),
        ({"method": {"mode": "released"}, "seed": 1}, ["guide: mode is 'released' here", "seed, which draws where"]),
    ]
    for changes, says in cases:
        with pytest.raises(ConfigError, match="does not fit this run") as caught:
            run(of(backbone, data, tmp_path / "runs", ["t2"], tree, **changes))
        lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
        if "mode" not in changes.get("method", {}):  # in which many settings of the guide differ
            assert len(lines) == len(says), lines
        for words in says:
            assert any(line.startswith(words) for line in lines), (words, lines)
    tensors, meta = load_snapshot(tree)
    for key, words in (
        ("kind", "the kind of the stream is 'image' here, 'x' there"),
        ("anchor", "adapters start elsewhere, though the seed is the same"),
        ("weights", "the frozen weights differ: they were changed where model.backbone lies"),
    ):
        save_snapshot(tmp_path / "other", tensors, {**meta, "start": {**meta["start"], key: "x"}})
        with pytest.raises(ConfigError, match=rf"does not fit this run:\n  {words}.*\ngive this run the settings"):
            run(of(backbone, data, tmp_path / "runs", ["t2"], tmp_path / "other"))
    assert run(of(tmp_path / "moved", data, tmp_path / "runs", ["t2"], tree)).finished  # nothing stands in its way


def test_a_file_that_is_no_tree_is_refused(
    backbone: Path, data: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(path: Path, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            run(of(backbone, data, tmp_path / "runs", ["t2"], path))

    says(tmp_path / "none", "method.prior .*none is not there; `treelora tree export RUN FILE` writes one")
    spoilt = bytearray(tree.read_bytes())
    spoilt[-5] ^= 1
    (tmp_path / "spoilt").write_bytes(bytes(spoilt))
    says(tmp_path / "spoilt", "spoilt cannot be used .*does not match its checksum")
    says(Checkpoints(tree.parent / "r" / "checkpoints").paths()[-1], "holds no tree that this program reads")
    tensors, meta = load_snapshot(tree)
    save_snapshot(tmp_path / "newer", tensors, {**meta, "version": 99})
    says(tmp_path / "newer", "holds no tree that this program reads")
    save_snapshot(tmp_path / "empty", {}, {**meta, "guide": {**meta["guide"], "names": []}})
    says(tmp_path / "empty", "holds a tree without tasks: leave it out")
    path = config_file(tmp_path / "c.yaml", of(backbone, data, tmp_path / "runs", ["t2"], tmp_path / "none"))
    assert call("train", path) == 2
    assert "none is not there" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "r" / "config.yaml").exists()


def test_a_tree_is_exported_between_tasks_by_a_run_that_has_one(
    backbone: Path, data: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "tree.safetensors"
    assert call("tree", "export", str(tree.parent / "r"), str(target)) == 0
    assert f"method.prior={target}" in capsys.readouterr().out
    assert target.read_bytes() == tree.read_bytes()
    assert call("tree", "export", str(tree.parent / "r"), str(target)) == 2
    assert "is there already: give --force to replace it" in capsys.readouterr().err
    assert call("tree", "export", str(tree.parent / "r"), str(target), "--force") == 0
    other = run({**of(backbone, data, tmp_path / "other", ["t0"]), "method": {"name": "independent"}})
    with pytest.raises(RunError, match="was learnt by independent: only treelora has a tree"):
        other.export_tree(target)
    heard, config = Steps(), of(backbone, data, tmp_path / "runs", ["t0", "t1"])
    with pytest.raises(Stopped):
        run(config, listener=heard, stop=lambda: heard.steps == 8)
    with pytest.raises(RunError, match="is in the middle of a task: finish it with `treelora train` first"):
        Run(tmp_path / "runs" / "r").export_tree(target)
    made = from_mapping(config)
    method = toys.method(made)
    assert isinstance(method, TreeLora)
    with pytest.raises(GuideError, match="no task is stored yet, so there is no tree to export"):
        method.export_tree(target)
    method.guide.begin_task("t0")
    with pytest.raises(GuideError, match="task 't0' is in progress"):
        method.export_tree(target)
    assert target.read_bytes() == tree.read_bytes()
