"""Runs that share what they need not make again learn what each would learn alone, to the bit."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from tests import tiny, toys
from tests.contract.test_methods import VARIANTS, Together, everything
from tests.integration.test_finished import COLOURS
from tests.integration.test_finished import write as write_texts
from tests.integration.test_prior import same
from tests.integration.test_runs import settings
from treelora_ray import Run, Shared, run
from treelora_ray.config import from_mapping
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task, TaskStream
from treelora_ray.methods.catalogue import make
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.treelora import TreeLora
from treelora_ray.models import backbone as backbones
from treelora_ray.models.backbone import load_model
from treelora_ray.tracking.compare import counted
from treelora_ray.training.stream import StreamRun

TASKS, ROUNDS, ROWS = 3, 2, 22


@dataclass
class Work:
    """What the frozen model was asked for."""

    gradients: int = 0
    passes: int = 0

    def spent(self) -> tuple[int, int]:
        found = self.gradients, self.passes
        self.gradients = self.passes = 0
        return found


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    done = Work()
    gradient, frozen = TreeLora._gradient_at_anchor, Learner._sums

    def counted_gradient(self: TreeLora, *arguments: Any) -> Tensor:
        done.gradients += 1
        return gradient(self, *arguments)

    def counted_sums(self: Learner, task: int, rows: Any, features: Any, *more: Any) -> Any:
        done.passes += features == self.frozen_features
        return frozen(self, task, rows, features, *more)

    monkeypatch.setattr(TreeLora, "_gradient_at_anchor", counted_gradient)
    monkeypatch.setattr(Learner, "_sums", counted_sums)
    return done


NOTHING, ALL = (0, 0), (TASKS * ROUNDS, TASKS)


def assert_same(one: Run, other: Run) -> None:
    """Adapters, head, router, guide, matrix, tree and choices: all but what time took, and where it lies."""
    a, b = one.checkpoint(), other.checkpoint()
    assert same(a.tensors, b.tensors)
    assert same({str(slot): x for slot, x in a.slots.items()}, {str(slot): x for slot, x in b.slots.items()})
    assert all(a.meta[key] == b.meta[key] for key in ("bank", "method", "head", "infos"))
    for task, folder in one.adapters.items():
        for file in folder.glob("*.safetensors"):
            assert file.read_bytes() == (other.adapters[task] / file.name).read_bytes()
    results = [json.loads(json.dumps(each.result)) for each in (one, other)]
    for result in results:
        for key in ("config", "peak_memory_bytes", "digest"):
            del result[key]
        for record in result["records"]:
            del record["effort"]["seconds"], record["effort"]["reused"]
    assert results[0] == results[1]
    assert one.result["digest"] == other.result["digest"]


def reused(done: Run) -> list[tuple[float, float]]:
    """Probe rounds and rows of each task that another run had looked at."""
    found = [record["effort"]["reused"] for record in done.result["records"]]
    return [(each.get("probe_rounds", 0), each.get("pass_rows", 0)) for each in found]


# One that looks at statistics alone, those that probe in ways of their own, and what changes a look; others are slow.
LOOKING = ["seqlora", "treelora", "treelora-query", "paper", "ncm", "o-lora", "scope-seen", "labels-shared"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in LOOKING]


@pytest.mark.parametrize("variant", [*LOOKING, *OTHERS])
def test_the_second_of_two_runs_learns_what_it_learns_alone(
    variant: str, backbone: Path, data: Path, tmp_path: Path, work: Work
) -> None:
    sections: dict[str, Any] = {"method": VARIANTS.get(variant, {"name": "treelora", "guide": {"gate": 0.0}})}
    if sections["method"]["name"] == "treelora":
        sections["method"] = {"probe_rounds": ROUNDS, **sections["method"]}
    if variant == "scope-seen":
        sections["objective"] = {"ce_scope": "seen"}
    elif variant == "labels-shared":
        sections["objective"] = {"label_match": "string"}
    found = {"method": {}, **settings(backbone, data, tmp_path / "alone"), **sections}
    alone, shared = run(found), Shared(tmp_path / "looks")
    spent = work.spent()
    assert spent[1] == TASKS
    first = run({**found, "folder": str(tmp_path / "first")}, shared=shared)
    assert work.spent() == spent
    second = run({**found, "folder": str(tmp_path / "second")}, shared=shared)
    assert work.spent() == NOTHING
    third = run({**found, "folder": str(tmp_path / "third")}, shared=Shared(tmp_path / "looks"))
    assert work.spent() == NOTHING
    for other in (first, second, third):
        assert_same(alone, other)


KINDS = {"text": (tiny.bert, "text", "label"), "prompt": (tiny.llama, "prompt", "answer")}


@pytest.mark.parametrize("kind", list(KINDS))
def test_texts_and_prompts_are_shared_too(kind: str, tmp_path: Path, work: Work) -> None:
    make_backbone, asked, said = KINDS[kind]
    columns = {asked: COLOURS * 4, said: ["yes", "no", "no", "yes"] * 4}
    data = write_texts(tmp_path / "data", {"a": columns, "b": {**columns, said: ["no", "yes", "no", "yes"] * 4}})
    sections = {"model": {"backbone": str(make_backbone(tmp_path / "b")), "max_length": 16}}
    found = settings(tmp_path, data, tmp_path / "alone", objective={"max_new_tokens": 2})
    found["model"] = sections["model"]
    alone, shared = run(found), Shared(tmp_path / "looks")
    assert work.spent() == (2 * ROUNDS, 2)
    assert_same(alone, run({**found, "folder": str(tmp_path / "first")}, shared=shared))
    assert work.spent() == (2 * ROUNDS, 2)
    assert_same(alone, run({**found, "folder": str(tmp_path / "second")}, shared=shared))
    assert work.spent() == NOTHING


MATTERS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {  # a change, and what must then be computed
    "rank": ({"model": {"lora": {"rank": 3, "alpha": 4}}}, (6, 0)),
    "alpha": ({"model": {"lora": {"rank": 2, "alpha": 5}}}, (6, 0)),
    "targets": ({"model": {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"]}}}, (6, 0)),
    "layers": ({"model": {"lora": {"rank": 2, "alpha": 4, "layers": [1]}}}, (6, 0)),
    "seed": ({"seed": 1}, (6, 0)),
    "probe batch": ({"method": {"probe_batch": 5}}, (6, 0)),
    "batch": ({"train": {"batch": 7}}, (6, 0)),
    "micro batch": ({"train": {"micro_batch": 3}}, (6, 0)),
    "precision": ({"train": {"precision": "bf16"}}, ALL),
    "dtype": ({"model": {"dtype": "bfloat16"}}, ALL),
    "attention": ({"model": {"attention": "eager"}}, ALL),
    "pooling": ({"model": {"pooling": "mean"}}, ALL),
    "checkpointing": ({"model": {"gradient_checkpointing": True}}, ALL),
    # The first task's classes compete with no others; those of later ones do.
    "competing classes": ({"objective": {"ce_scope": "seen"}}, (4, 0)),
    "more rounds": ({"method": {"probe_rounds": 5}}, (9, 0)),
}
INDIFFERENT: dict[str, dict[str, Any]] = {
    "lambda": {"method": {"lambda": 0.7}},
    "learning rates": {"train": {"lr": 0.003, "head_lr": 0.1, "schedule": "constant", "warmup": 0.1}},
    "epochs": {"train": {"epochs": 1}},
    "steps": {"train": {"steps": 3}},
    "decay and clipping": {"train": {"weight_decay": 0.1, "clip": 0.5}},
    "start": {"method": {"start": "fresh"}},
    "penalty": {"method": {"penalty": "prox"}},
    "guide": {"method": {"guide": {"gate": 0.5, "tree": "kd-radius", "budget": 1}}},
    "dropout": {"model": {"lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}},
    "routing": {"objective": {"routing": "oracle"}},
    "fewer rounds": {"method": {"probe_rounds": 1}},
    "order": {"stream": {"tasks": ["t2", "t0", "t1"]}},
    "fewer tasks": {"stream": {"tasks": ["t1"]}},
    "checkpoints": {"train": {"checkpoint_every": 2}},
}


def merged(one: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: {**one[key], **value} if isinstance(value, dict) and key in one else value for key, value in change.items()
    }
    return {**one, **both}


@pytest.fixture
def begun(backbone: Path, data: Path, tmp_path: Path, work: Work) -> tuple[dict[str, Any], Shared]:
    """A config, and what a run of it has left."""
    found, shared = settings(backbone, data, tmp_path / "base"), Shared(tmp_path / "looks")
    run(found, shared=shared)
    assert work.spent() == ALL
    return found, shared


@pytest.mark.parametrize("change", list(MATTERS))
def test_what_a_look_depends_on_makes_a_run_look_again(
    change: str, begun: tuple[dict[str, Any], Shared], tmp_path: Path, work: Work
) -> None:
    (found, shared), (changes, needed) = begun, MATTERS[change]
    other = {**merged(found, changes), "folder": str(tmp_path / "other")}
    with_shared = run(other, shared=shared)
    assert work.spent() == needed
    assert_same(run({**other, "folder": str(tmp_path / "alone")}), with_shared)


@pytest.mark.parametrize("change", list(INDIFFERENT))
def test_what_a_look_does_not_depend_on_needs_no_new_one(
    change: str, begun: tuple[dict[str, Any], Shared], tmp_path: Path, work: Work
) -> None:
    found, shared = begun
    other = {**merged(found, INDIFFERENT[change]), "folder": str(tmp_path / "other")}
    with_shared = run(other, shared=shared)
    assert work.spent() == NOTHING
    assert_same(run({**other, "folder": str(tmp_path / "alone")}), with_shared)


def test_a_changed_weight_of_the_backbone_is_noticed(
    begun: tuple[dict[str, Any], Shared], backbone: Path, tmp_path: Path, work: Work
) -> None:
    found, shared = begun
    made = load_model(from_mapping(found).model, "image", 0)
    name = next(iter(made.layers))
    made.linear(name).weight.data[0, 0] += 1e-3
    net = made.net.unload()
    changed = tmp_path / "changed"
    net.save_pretrained(changed)
    (changed / "preprocessor_config.json").write_bytes((backbone / "preprocessor_config.json").read_bytes())
    other = merged(found, {"model": {"backbone": str(changed)}, "folder": str(tmp_path / "other")})
    with_shared = run(other, shared=shared)
    assert work.spent() == ALL
    assert_same(run({**other, "folder": str(tmp_path / "alone")}), with_shared)


@pytest.mark.parametrize("what", ["picture", "label", "order"])
def test_changed_rows_are_noticed(
    what: str, begun: tuple[dict[str, Any], Shared], data: Path, tmp_path: Path, work: Work
) -> None:
    found, shared = begun
    path = data / "t1" / "train.parquet"
    table = pq.read_table(path).to_pydict()
    if what == "picture":
        table["image"][3] = table["image"][4]
    elif what == "label":
        table["label"][3] = {"c0": "c1", "c1": "c0"}[table["label"][3]]
    else:
        table = {name: values[::-1] for name, values in table.items()}
    pq.write_table(pa.table(table), path, row_group_size=8)
    other = {**found, "folder": str(tmp_path / "other")}
    with_shared = run(other, shared=shared)
    gradients, passes = work.spent()
    assert passes == 1
    assert 0 < gradients <= ROUNDS
    assert_same(run({**other, "folder": str(tmp_path / "alone")}), with_shared)


def test_rows_that_change_without_a_new_fingerprint_are_noticed(backbone: Path, tmp_path: Path, work: Work) -> None:
    made, shared = toys.config(backbone, "treelora"), Shared(tmp_path)
    streams = [toys.stream(), toys.stream()]
    picture = streams[1].tasks[1].train._values["image"]  # type: ignore[attr-defined]
    for number in range(len(picture)):
        picture[number] = np.roll(picture[number], 1)
    for number, (stream, needed) in enumerate(zip([*streams, streams[1]], [ALL, (2, 1), NOTHING], strict=True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = load_model(made.model, "image", made.seed, shared.backbones)
        StreamRun(made, stream, make(Learner(made, model, shared=shared)), folder).go()
        assert work.spent() == needed


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_prompts_that_change_without_a_new_fingerprint_are_noticed(column: str, tmp_path: Path, work: Work) -> None:
    """Prompts have no class means, which would tell: the rows of each round do."""
    sections = {"model": {"backbone": str(tiny.llama(tmp_path / "b")), "max_length": 16}}
    made, shared = toys.config(tmp_path / "b", "treelora", **sections), Shared()
    columns = {"prompt": COLOURS * 4, "answer": ["yes", "no", "no", "yes"] * 4}
    for number, (other, needed) in enumerate([(False, (ROUNDS, 1)), (True, (ROUNDS, 1)), (True, NOTHING)]):
        shown = {**columns, column: columns[column][1:] + columns[column][:1]} if other else columns
        rows = MemoryRows(shown, fingerprint="the same")
        (folder := tmp_path / str(number)).mkdir()
        model = load_model(made.model, "prompt", made.seed, shared.backbones)
        stream = TaskStream((Task("t", rows, rows),), "prompt")
        StreamRun(made, stream, make(Learner(made, model, shared=shared)), folder).go()
        assert work.spent() == needed


def test_more_rounds_go_on_from_fewer_and_fewer_are_the_first_of_more(
    backbone: Path, data: Path, tmp_path: Path, work: Work
) -> None:
    found, shared = settings(backbone, data, tmp_path / "runs"), Shared(tmp_path / "looks")
    for rounds, computed in ((2, 2), (7, 5), (3, 0), (7, 0)):
        other = {**merged(found, {"method": {"probe_rounds": rounds}}), "name": f"{rounds}-{computed}"}
        assert reused(run(other, shared=shared))[0][0] == rounds - computed
        assert work.spent()[0] == TASKS * computed


def test_what_is_reused_counts_as_steps_and_is_told_apart(begun: tuple[dict[str, Any], Shared], tmp_path: Path) -> None:
    found, shared = begun
    first = Run(tmp_path / "base" / "r")
    second = run({**found, "folder": str(tmp_path / "second")}, shared=shared)
    assert reused(first) == [(0, 0)] * TASKS
    assert reused(second) == [(ROUNDS, ROWS)] * TASKS
    for one, other in zip(first.result["records"], second.result["records"], strict=True):
        assert other["effort"]["reused"]["seconds"] > 0
        assert counted(one["effort"], 8) == counted(other["effort"], 8)
        assert one["effort"]["probe_rounds"] == other["effort"]["probe_rounds"] == ROUNDS
        assert one["effort"]["pass_rows"] == other["effort"]["pass_rows"]


def test_a_damaged_and_a_foreign_file_are_said_and_looked_at_again(
    begun: tuple[dict[str, Any], Shared], tmp_path: Path, work: Work
) -> None:
    found, _ = begun
    probes = sorted((tmp_path / "looks").glob("probe-*"))
    assert len(probes) == TASKS
    probes[0].write_bytes(probes[0].read_bytes()[:-7])
    probes[1].write_bytes(probes[2].read_bytes())
    notes: list[str] = []
    done = run({**found, "folder": str(tmp_path / "other")}, shared=Shared(tmp_path / "looks", note=notes.append))
    assert work.spent() == (2 * ROUNDS, 0)
    assert len(notes) == 2
    assert any(str(probes[0]) in note and note.endswith("the task is looked at again") for note in notes)
    assert any(note == f"{probes[1]} is not the look that its name says: the task is looked at again" for note in notes)
    assert_same(Run(tmp_path / "base" / "r"), done)
    run({**found, "folder": str(tmp_path / "mended")}, shared=Shared(tmp_path / "looks", note=pytest.fail))
    assert work.spent() == NOTHING


def test_a_folder_that_cannot_be_written_costs_no_run(backbone: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "looks").write_text("a file")
    notes: list[str] = []
    assert run(
        settings(backbone, data, tmp_path / "runs"), shared=Shared(tmp_path / "looks", note=notes.append)
    ).finished
    assert "cannot be written" in notes[0]


def test_workers_share_what_worker_0_knows(backbone: Path, tmp_path: Path, work: Work) -> None:
    """The workers' own looks differ, as sums over workers do: they are found by as many workers only."""
    made, shared = toys.config(backbone, VARIANTS["treelora"]), Shared()
    ends = []
    for number, needed in enumerate([(2 * TASKS * ROUNDS, 2 * TASKS), NOTHING]):
        group, runs = Together(2), list[StreamRun]()
        (folder := tmp_path / str(number)).mkdir()
        for rank in range(2):
            model = load_model(made.model, "image", made.seed, shared.backbones)
            learner = Learner(made, model, group.comm(rank), shared=shared)
            runs.append(StreamRun(made, toys.stream(), make(learner), folder))
        threads = [threading.Thread(target=each.go, daemon=True) for each in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert work.spent() == needed
        ends.append(everything(runs[0]))
    assert same(ends[0][0], ends[1][0])
    assert same({str(k): v for k, v in ends[0][2].items()}, {str(k): v for k, v in ends[1][2].items()})


def test_runs_without_sharing_make_no_keys(backbone: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(TreeLora, "_probed_from", lambda *_: pytest.fail("nobody asks"))
    monkeypatch.setattr(backbones, "Backbones", lambda *_: pytest.fail("nobody asks"))
    done = run(settings(backbone, data, tmp_path / "runs"))
    assert [record["effort"]["reused"] for record in done.result["records"]] == [{}] * TASKS


def test_a_run_that_was_stopped_goes_on_with_what_is_shared(
    begun: tuple[dict[str, Any], Shared], tmp_path: Path, work: Work
) -> None:
    from treelora_ray.training.errors import Stopped

    found, shared = begun
    other, asked = {**found, "folder": str(tmp_path / "other")}, iter(range(99))
    with pytest.raises(Stopped):
        run(other, shared=shared, stop=lambda: next(asked) > 9)
    assert_same(Run(tmp_path / "base" / "r"), run(other, shared=shared))
    assert work.spent() == NOTHING


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_another_number_of_threads_is_another_look(
    begun: tuple[dict[str, Any], Shared], tmp_path: Path, work: Work
) -> None:
    found, shared = begun
    run(merged(found, {"train": {"threads": 2}, "folder": str(tmp_path / "other")}), shared=shared)
    assert work.spent() == ALL
