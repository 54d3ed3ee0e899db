"""What every method must satisfy, whatever it does: U1 to U8. A method is not added without standing here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import toys
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.stream import watched
from treelora_ray.data.task import TaskStream
from treelora_ray.files import load_snapshot
from treelora_ray.methods.base import Method
from treelora_ray.methods.catalogue import METHODS
from treelora_ray.models.backbone import backbone_digest
from treelora_ray.training import metrics
from treelora_ray.training.errors import Stopped
from treelora_ray.training.evaluate import Evaluator
from treelora_ray.training.state import Checkpoints, capture
from treelora_ray.training.stream import StreamRun

Options = dict[str, Any]
VARIANTS: dict[str, Options] = {
    "seqlora": {"name": "seqlora"},
    "seqlora-merge": {"name": "seqlora", "variant": "merge_new"},
    "independent": {"name": "independent"},
    "joint": {"name": "joint"},
    "replay": {"name": "replay", "memory": 9, "replay_batch": 3},
    "replay-all": {"name": "replay", "memory": 9, "policy": "reservoir", "scope": "all", "weight": 0.3},
    "ewc": {"name": "ewc"},
    "ewc-online": {"name": "ewc", "online": True, "gamma": 0.5, "fisher": "sampled", "rows": 9},
    "lwf": {"name": "lwf"},
    "agem": {"name": "agem", "memory": 7, "memory_batch": 5},
    "gem": {"name": "gem", "memory": 7},
    "ogd": {"name": "ogd", "memory": 7},
    "der++": {"name": "der++", "memory": 9, "replay_batch": 4, "top_k": 5},
    "der++-past": {"name": "der++", "memory": 9, "scope": "past", "shared_draw": True, "logits_at": "task_end"},
    "o-lora": {"name": "o-lora", "lambda_2": 0.01},
    "ncm": {"name": "ncm"},
    "ncm-first": {"name": "ncm", "features": "first_task", "score": "mahalanobis"},
    "sd-lora": {"name": "sd-lora"},
    "sd-lora-absorb": {
        "name": "sd-lora",
        "norm": "module",
        "alpha_scope": "module",
        "rank_schedule": [[1, 2], [2, 1]],
        "absorb": 0.995,
    },
    "tasl": {"name": "tasl", "warmup": 2},
    "tasl-matrix": {"name": "tasl", "unit": "matrix", "weights": "softmax", "warmup": 0},
    "inflora": {"name": "inflora"},
    "slao": {"name": "slao"},
    "slao-ncm": {"name": "slao", "start": "continuous", "lambda": "mean", "head": "ncm"},
    "fix": {"name": "fix", "shots": 2},
    "hide-lora": {"name": "hide-lora", "centroids": 2, "samples": 8, "fit_epochs": 3, "contrast": 0.1},
    "hide-lora-fresh": {"name": "hide-lora", "summary": "covariance", "samples": 8, "fit_epochs": 3, "start": "fresh"},
    "sapt": {"name": "sapt", "hidden": 8},
    "sapt-kl": {"name": "sapt", "hidden": 8, "replay": "kl", "memory": 5, "replay_batch": 3},
    "osf": {"name": "osf"},
    "osf-adaptive": {"name": "osf", "schedule": "adaptive", "sample": 6},
    "l2p": {"name": "l2p", "pool": 4, "length": 3, "top_k": 2},
    "dualprompt": {"name": "dualprompt", "g_layers": [0], "g_length": 2, "e_layers": [1], "e_length": 3, "spread": 0.1},
    "dualprompt-drawn": {
        "name": "dualprompt",
        "g_layers": [],
        "e_layers": [0],
        "e_length": 2,
        "key_start": "drawn",
        "spread": 0.5,
    },
    "hide-prompt": {
        "name": "hide-prompt",
        "layers": [0, 1],
        "length": 2,
        "centroids": 2,
        "samples": 8,
        "fit_epochs": 3,
        "contrast": 0.1,
        "momentum": 0.1,
    },
    "treelora": {"name": "treelora", "guide": {"gate": 0.0}},
    "treelora-hide": {"name": "treelora", "decomposition": "hide", "guide": {"gate": 0.0}},
    "treelora-prox": {"name": "treelora", "penalty": "prox", "guide": {"gate": 0.0}},
    "treelora-budget": {"name": "treelora", "guide": {"budget": 1, "gate": 0.0}},
    "treelora-query": {"name": "treelora", "query_every": 2, "query_batch": 4, "guide": {"observe": "query"}},
    "paper": {"name": "treelora", "mode": "paper"},
    "paper-raw": {"name": "treelora", "mode": "paper", "guide": {"signature": "raw"}},
    "paper-ema": {"name": "treelora", "mode": "paper", "guide": {"signature": "grad_ema"}},
    "paper-query": {"name": "treelora", "mode": "paper", "guide": {"observe": "query"}},
    "released": {"name": "treelora", "mode": "released"},
}
# What they have learnt is in the weights, and the loaded ones come back where they are asked for.
REWRITES = {"seqlora-merge", "o-lora", "inflora", "osf", "osf-adaptive"}
TRAINED = {"ncm": 0, "ncm-first": 1, "fix": 0}  # tasks that are trained on; of the others all
# Methods whose memory, or whose teacher, trains the rows of past tasks in the head.
TRAINS_OLD_ROWS = {"replay", "lwf", "agem", "gem", "der++", "ncm", "hide-lora", "hide-prompt"}
CLASSIFY = [name for name in VARIANTS if "classification" in METHODS[VARIANTS[name]["name"]].objectives]
FIRST = {options["name"]: variant for variant, options in reversed(VARIANTS.items())}.values()  # one of each method


def cases(variants: Iterable[str]) -> list[Any]:
    """Further variants of a method are slow."""
    return [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in variants]


# test_fix.py says the same of fix, which is for prompts alone
ALL = pytest.mark.parametrize("variant", CLASSIFY)
EACH = pytest.mark.parametrize("variant", cases(CLASSIFY))
# A method's coefficients at 0, and the plain training that is then the same to the bit.
WITHOUT = {
    "replay, no rows": ({"name": "replay", "replay_batch": 0}, {"name": "seqlora"}),
    "replay, no weight": ({"name": "replay", "weight": 0}, {"name": "seqlora"}),
    "replay, no memory": ({"name": "replay", "memory": 0}, {"name": "seqlora"}),
    "ewc": ({"name": "ewc", "lambda": 0}, {"name": "seqlora"}),
    "lwf": ({"name": "lwf", "lambda": 0}, {"name": "seqlora"}),
    "agem": ({"name": "agem", "memory": 0}, {"name": "seqlora"}),
    "gem": ({"name": "gem", "memory": 0}, {"name": "seqlora"}),
    "ogd": ({"name": "ogd", "memory": 0}, {"name": "seqlora"}),
    "der++": ({"name": "der++", "alpha": 0, "beta": 0}, {"name": "seqlora"}),
    "der++, no memory": ({"name": "der++", "memory": 0}, {"name": "seqlora"}),
    "o-lora": ({"name": "o-lora", "lambda": 0}, {"name": "seqlora", "variant": "merge_new"}),
    "hide-lora": ({"name": "hide-lora", "momentum": 0, "contrast": 0}, {"name": "seqlora"}),
    "sapt": ({"name": "sapt", "replay": "kl", "lambda": 0}, {"name": "sapt"}),
    "treelora": ({"name": "treelora", "lambda": 0, "start": "fresh"}, {"name": "independent"}),
    "treelora, prox": (
        {"name": "treelora", "lambda": 0, "start": "fresh", "penalty": "prox"},
        {"name": "independent"},
    ),
    "treelora, query": (
        {"name": "treelora", "lambda": 0, "start": "fresh", "guide": {"observe": "query"}},
        {"name": "independent"},
    ),
    "treelora, previous": ({"name": "treelora", "lambda": 0, "start": "previous"}, {"name": "seqlora"}),
    "paper": ({"name": "treelora", "mode": "paper", "lambda": 0}, {"name": "seqlora"}),
    "released": ({"name": "treelora", "mode": "released", "lambda": 0}, {"name": "seqlora"}),
}


# Classes of all tasks are weighed, and the toy tasks lie far apart: rows of the head are large, and long steps would
# make of rounding more than what is looked for; how much, depends on the processor. So do heads of `ncm`, which are
# fit to features that training has moved.
CALM: dict[str, dict[str, Any]] = {name: {"train": {"lr": 1e-3}} for name in ("l2p", "treelora-hide", "ncm-first")}


class Recorder(StreamRun):
    """Keeps theta after every step."""

    thetas: list[Tensor]
    stop_after: int | None = None

    def _after_step(self, step: int, of: int, loss: float, norm: float) -> None:
        self.thetas.append(self.learner.theta.clone())
        if self.stop_after is not None and len(self.thetas) == self.stop_after:
            self.stop = lambda: True
        super()._after_step(step, of, loss, norm)


def recorder(
    folder: Path,
    backbone: Path,
    options: Mapping[str, Any],
    tasks: int = 3,
    comm: Any = None,
    kind: str = "image",
    **sections: Any,
) -> Recorder:
    folder.mkdir(parents=True, exist_ok=True)
    made = toys.config(backbone, options, **sections)
    stream = toys.prompts(tasks) if kind == "prompt" else toys.stream(tasks)
    found = Recorder(made, stream, toys.method(made, comm, kind), folder)
    found.thetas = []
    return found


def learnt(*arguments: Any, **keywords: Any) -> Recorder:
    found = recorder(*arguments, **keywords)
    found.go()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Callable[[str], Recorder]:
    """The run of a variant, learnt once for all tests that only look at it."""
    known: dict[str, Recorder] = {}

    def whole(variant: str) -> Recorder:
        if variant not in known:
            known[variant] = learnt(tmp_path_factory.mktemp("whole"), backbone, VARIANTS[variant])
        return known[variant]

    return whole


def test_every_registered_method_is_in_this_suite() -> None:
    assert {options["name"] for options in VARIANTS.values()} == set(METHODS)


@pytest.mark.parametrize("case", list(WITHOUT))
def test_u1_coefficients_of_zero_leave_plain_training_bit_for_bit(case: str, tmp_path: Path, backbone: Path) -> None:
    options, plain = WITHOUT[case]
    # Where classes of all tasks compete, rows of the head start otherwise: they do so for both then.
    same: dict[str, Any] = {"objective": {"routing": "last"}} if case == "hide-lora" else {}
    one, other = learnt(tmp_path / "a", backbone, options, **same), learnt(tmp_path / "b", backbone, plain, **same)
    assert len(one.thetas) == 18
    assert all(torch.equal(a, b) for a, b in zip(one.thetas, other.thetas, strict=True))
    if (one.method.bank is None) == (other.method.bank is None):
        assert one.scores == other.scores


def test_coefficients_above_zero_do_change_the_training(tmp_path: Path, backbone: Path) -> None:
    plain = {name: learnt(tmp_path / name, backbone, {"name": name}).thetas[-1] for name in ("seqlora", "independent")}
    for name in set(VARIANTS) - {"seqlora", "seqlora-merge", "independent", "joint", *TRAINED}:
        # The warm-up of mode paper is ten steps.
        more = {"train": {"epochs": 5}} if name.startswith("paper") else {}
        if more:
            plain["seqlora"] = learnt(tmp_path / f"plain-{name}", backbone, {"name": "seqlora"}, **more).thetas[-1]
        theta = learnt(tmp_path / name, backbone, VARIANTS[name], **more).thetas[-1]
        for other in plain.values():
            assert theta.shape != other.shape or not torch.equal(theta, other), name


@EACH
def test_u2_the_backbone_is_never_changed(variant: str, tmp_path: Path, backbone: Path) -> None:
    made = recorder(tmp_path, backbone, VARIANTS[variant])
    before = backbone_digest(made.learner.model)
    made.go()
    with made.method.plain():  # some fold adapters into the weights, and give the loaded ones back here
        assert backbone_digest(made.learner.model) == before
    assert (backbone_digest(made.learner.model) == before) == (variant not in REWRITES)


@EACH
def test_u3_what_is_kept_of_earlier_tasks_is_frozen(variant: str, tmp_path: Path, backbone: Path) -> None:
    made = recorder(tmp_path, backbone, VARIANTS[variant])
    if len(made.units) == 1 or variant == "treelora-budget":
        pytest.skip("nothing is kept of earlier tasks, or it is merged")
    made._learn(made.units[0])
    head = made.learner.head.weight.clone()
    kept = made.method.bank[0] if made.method.bank is not None else None
    made._learn(made.units[1])
    if VARIANTS[variant]["name"] not in TRAINS_OLD_ROWS and "decomposition" not in VARIANTS[variant]:
        assert torch.equal(made.learner.head.weight[:2], head)
    if kept is not None:
        assert made.method.bank is not None
        assert torch.equal(made.method.bank[0], kept)


class Together:
    """Workers in threads that add up their tensors."""

    def __init__(self, workers: int) -> None:
        self.barrier, self.parts = threading.Barrier(workers), list[Any]([None] * workers)

    def comm(self, rank: int) -> Any:
        barrier, parts = self.barrier, self.parts

        class Comm:
            def __init__(self) -> None:
                self.rank, self.workers = rank, len(parts)

            def sum_(self, tensor: Tensor) -> None:
                parts[rank] = tensor.clone()
                barrier.wait(60)
                total = torch.stack(parts).sum(0)
                barrier.wait(60)
                tensor.copy_(total)

            def gather(self, value: Any) -> list[Any]:
                parts[rank] = value
                barrier.wait(60)
                found = list(parts)
                barrier.wait(60)
                return found

            def share(self, value: Any) -> Any:
                return self.gather(value)[0]

        return Comm()


def by_workers(count: int, folder: Path, backbone: Path, options: Options, **keywords: Any) -> list[Recorder]:
    group = Together(count)
    workers = [recorder(folder, backbone, options, comm=group.comm(rank), **keywords) for rank in range(count)]
    threads = [threading.Thread(target=worker.go, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return workers


@ALL
def test_u4_several_workers_learn_as_one_does(variant: str, tmp_path: Path, backbone: Path) -> None:
    calm = CALM.get(variant, {})
    alone = learnt(tmp_path / "alone", backbone, VARIANTS[variant], tasks=2, **calm)
    workers = by_workers(4, tmp_path / "four", backbone, VARIANTS[variant], tasks=2, **calm)
    assert [len(worker.thetas) for worker in workers] == [6 * min(2, TRAINED.get(variant, 2))] * 4
    for worker in workers:
        assert worker.scores == alone.scores
        torch.testing.assert_close(worker.learner.head.weight, alone.learner.head.weight, rtol=1e-3, atol=1e-5)
        for own, theirs in zip(alone.thetas, worker.thetas, strict=True):
            torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)


def everything(made: StreamRun) -> tuple[dict[str, Tensor], dict[str, Any], dict[int, Tensor]]:
    """All state but what time took."""
    tensors, meta = capture(made.method, made.step)
    slots = dict(made.method.bank.slots) if made.method.bank is not None else {}
    records = [{k: v for k, v in record.items() if k != "effort"} for record in made.records]
    efforts = [{k: v for k, v in record["effort"].items() if k != "seconds"} for record in made.records]
    return tensors, {**meta, "scores": made.scores, "records": records, "efforts": efforts}, slots


def assert_same(one: StreamRun, other: StreamRun) -> None:
    (tensors, meta, slots), (tensors2, meta2, slots2) = everything(one), everything(other)
    assert tensors.keys() == tensors2.keys()
    for name, value in tensors.items():
        assert torch.equal(value, tensors2[name]), name
    assert json.dumps(meta, default=str) == json.dumps(meta2, default=str)
    assert slots.keys() == slots2.keys()
    assert all(torch.equal(slots[slot], slots2[slot]) for slot in slots)


def stops() -> Iterator[Any]:
    """Each variant stopped at some step of its own, in the middle of a task and at the end of one."""
    draw = np.random.default_rng(5)
    for variant in VARIANTS:
        tasks = TRAINED.get(variant, 3)
        if tasks:
            first, last = (7, 17) if tasks > 1 else (1, 6)
            yield pytest.param(variant, int(draw.integers(first, last)), id=f"{variant}-any")
            marks = () if variant in FIRST else pytest.mark.slow
            yield pytest.param(variant, 12 if tasks > 1 else 6, id=f"{variant}-boundary", marks=marks)


@pytest.mark.parametrize(("variant", "at"), list(stops()))
def test_u5_a_resumed_run_is_the_uninterrupted_one(
    variant: str, at: int, tmp_path: Path, backbone: Path, undisturbed: Callable[[str], Recorder]
) -> None:
    whole = undisturbed(variant)
    stopped = recorder(tmp_path / "parts", backbone, VARIANTS[variant])
    stopped.stop_after = at
    with pytest.raises(Stopped):
        stopped.go()
    resumed = recorder(tmp_path / "parts", backbone, VARIANTS[variant])
    assert resumed.resume()
    resumed.go()
    assert len(stopped.thetas) + len(resumed.thetas) == len(whole.thetas)
    for own, theirs in zip(whole.thetas, stopped.thetas + resumed.thetas, strict=True):
        assert torch.equal(own, theirs)
    assert_same(whole, resumed)


SPEAKS = [
    name
    for name, options in VARIANTS.items()
    if "causal-lm" in METHODS[options["name"]].objectives and not {"decomposition", "head"} & set(options)
]
# Shorter steps as well: of gradients near zero Adam makes steps as long as of others, and their signs are rounding.
LANGUAGE = {"model": {"max_length": 32}, "objective": {"max_new_tokens": 3}, "train": {"lr": 1e-3}}


@pytest.mark.parametrize("variant", cases(SPEAKS))
def test_of_language_models_too_workers_learn_as_one_and_a_stop_changes_nothing(
    variant: str, tmp_path: Path, llama: Path
) -> None:
    options = VARIANTS[variant]
    same: dict[str, Any] = {"tasks": 2, "kind": "prompt", **LANGUAGE}
    whole = learnt(tmp_path / "whole", llama, options, **same)
    if whole.thetas:
        stopped = recorder(tmp_path / "parts", llama, options, **same)
        stopped.stop_after = len(whole.thetas) - 1
        with pytest.raises(Stopped):
            stopped.go()
    resumed = recorder(tmp_path / ("parts" if whole.thetas else "whole"), llama, options, **same)
    assert resumed.resume()
    resumed.go()
    assert whole.thetas[-1:] == [] or torch.equal(whole.thetas[-1], resumed.thetas[-1])
    assert_same(whole, resumed)
    for worker in by_workers(2, tmp_path / "two", llama, options, **same):
        assert len(worker.thetas) == len(whole.thetas)
        assert worker.scores == whole.scores
        for own, theirs in zip(whole.thetas, worker.thetas, strict=True):
            torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)


class CrashError(Exception):
    pass


@EACH
@pytest.mark.parametrize("where", ["before_task", "after_task", "save"])
def test_u5_a_crash_between_checkpoints_changes_nothing(
    variant: str,
    where: str,
    tmp_path: Path,
    backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], Recorder],
) -> None:
    """In the probe phase, while a task is being stored, and before its checkpoint is written."""
    whole = undisturbed(variant)
    made = recorder(tmp_path / "parts", backbone, VARIANTS[variant])
    crash_in = min(1, len(made.units) - 1)

    if where == "save":
        save = made.save

        def saving(step: int | None) -> None:
            if step is None and made.done > crash_in:
                raise CrashError
            save(step)

        monkeypatch.setattr(made, "save", saving)
    else:
        real = getattr(made.method, where)

        def hook() -> None:
            real()
            if made.done == crash_in:
                raise CrashError

        monkeypatch.setattr(made.method, where, hook)
    with pytest.raises(CrashError):
        made.go()
    resumed = recorder(tmp_path / "parts", backbone, VARIANTS[variant])
    assert resumed.resume() == (len(resumed.units) > 1 or where != "before_task")
    resumed.go()
    assert_same(whole, resumed)


@EACH
def test_u6_answers_do_not_depend_on_the_batch(variant: str, tmp_path: Path, backbone: Path) -> None:
    made = learnt(tmp_path, backbone, VARIANTS[variant], **CALM.get(variant, {}))
    rows = toys.images(1, 40, 7)
    order = np.random.default_rng(0).permutation(len(rows))

    def answers(batch: int, places: np.ndarray) -> list[str]:
        made.learner.config = toys.answering_by(batch, made.config)
        found = Evaluator(made.method)
        taken = MemoryRows(rows.take(places))
        return found.answer(taken, found.routes(taken)).text

    expected = answers(64, np.arange(len(rows)))
    assert answers(1, np.arange(len(rows))) == expected
    assert answers(64, order) == [expected[place] for place in order]
    assert len(set(expected)) > 1


def test_u7_one_task_is_ordinary_fine_tuning(tmp_path: Path, backbone: Path) -> None:
    """Against a loop of its own: modules and optimizer as anyone would write it."""
    ours = learnt(tmp_path, backbone, {"name": "seqlora"}, tasks=1, train={"schedule": "constant", "clip": None})
    plain = recorder(tmp_path / "plain", backbone, {"name": "seqlora"}, tasks=1)
    learner, task = plain.learner, plain.stream.tasks[0]
    learner.unit = (0,)
    learner.meet(0)
    head = torch.nn.Linear(learner.model.width, 2)
    head.weight.data, head.bias.data = learner.head.weight.clone(), learner.head.bias.clone()
    factors = [torch.nn.Parameter(part.detach().clone()) for pair in learner.model.layers.values() for part in pair]
    for old, new in zip((p for pair in learner.model.layers.values() for p in pair), factors, strict=True):
        old.data, old.grad = new.data, None
    trained = [part for pair in learner.model.layers.values() for part in pair]
    optimizer = torch.optim.Adam([*trained, *head.parameters()], lr=0.01)
    for step in range(6):
        rows = task.train.take(learner.plan(epochs=2).at(step))
        features = learner.model.features(learner.model.inputs(rows))
        targets = torch.tensor([task.labels.index(label) for label in rows["label"]])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), targets).backward()
        optimizer.step()
    found = dict(learner.layout.views(ours.thetas[-1][: learner.layout.total]))
    for name, pair in learner.model.layers.items():
        for expected, part in zip(pair, found[name], strict=True):
            torch.testing.assert_close(part, expected.data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.learner.head.weight, head.weight.data, rtol=1e-4, atol=1e-5)


@EACH
def test_u8_overall_performance_is_learning_accuracy_less_what_was_forgotten(
    variant: str, undisturbed: Callable[[str], Recorder]
) -> None:
    made = undisturbed(variant)
    found = json.loads((made.folder / "result.json").read_text())
    if variant == "joint":
        assert found["metrics"] == {"op": pytest.approx(np.mean(np.array(made.scores[-1], dtype=float)))}
        return
    table = found["metrics"]
    assert table["op"] == pytest.approx(table["learning_accuracy"] - table["bwt"])
    assert table["op"] == pytest.approx(metrics.overall_performance(np.array(found["matrix"], dtype=float)))


@pytest.mark.parametrize("variant", ["independent", "treelora", "treelora-prox"])
def test_an_adapter_for_each_task_forgets_nothing_when_the_task_is_known(
    variant: str, tmp_path: Path, backbone: Path
) -> None:
    learnt(tmp_path, backbone, VARIANTS[variant], objective={"routing": "oracle"})
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["bwt"] == 0


def test_merging_into_the_weights_leaves_the_answers_as_they_were(tmp_path: Path, backbone: Path) -> None:
    made = recorder(tmp_path, backbone, VARIANTS["seqlora-merge"])
    rows = made.stream.tasks[0].test.take(range(12))
    seen: dict[str, Tensor] = {}
    real = made.method.after_task
    inputs = made.learner.model.inputs(rows)

    def after_task() -> None:
        seen["before"] = made.learner.model.features(inputs).detach()
        real()
        seen["after"] = made.learner.model.features(inputs).detach()

    made.method.after_task = after_task  # type: ignore[method-assign]
    made._learn(made.units[0])
    with made.method.plain():
        frozen = made.learner.model.features(inputs)
    torch.testing.assert_close(seen["before"], seen["after"], rtol=0, atol=1e-5)
    assert not torch.allclose(frozen, seen["after"], atol=1e-3)


def test_checkpoints_hold_what_is_needed_and_no_more(tmp_path: Path, backbone: Path) -> None:
    learnt(tmp_path, backbone, VARIANTS["treelora-budget"])
    found = Checkpoints(tmp_path / "checkpoints")
    assert len(found.paths()) == 2
    named = set()
    for path in found.paths():
        named |= set(load_snapshot(path)[1]["bank"]["slots"].values())
    assert {path.stem for path in found.adapters.glob("*")} == named


def test_a_mistyped_hook_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Wrong.before_tsk is no hook .* did you mean 'before_task'"):

        class Wrong(Method):
            def before_tsk(self) -> None: ...


LOOKED_AT = ("seqlora", "treelora", "sapt", "l2p", "dualprompt", "hide-prompt")  # that answer in ways of their own


@pytest.mark.parametrize(
    "variant", [name if name in LOOKED_AT else pytest.param(name, marks=pytest.mark.slow) for name in CLASSIFY]
)
def test_looking_at_the_accuracy_on_the_way_changes_nothing(variant: str, tmp_path: Path, backbone: Path) -> None:
    """Neither weights nor scores, and a run that goes on has looked as often as one that was never stopped."""
    sections = {"stream": {"watch": 6}, "evaluate": {"every": 2}}

    def made(name: str, **more: Any) -> Recorder:
        found = recorder(tmp_path / name, backbone, VARIANTS[variant], **more)
        found.stream = TaskStream(tuple(watched(task, 6, 0) for task in found.stream.tasks), "image")
        found.learner.tasks = found.stream.tasks
        return found

    plain, looking, stopped = made("plain"), made("looking", **sections), made("stopped", **sections)
    plain.go()
    looking.go()
    assert all(torch.equal(a, b) for a, b in zip(plain.thetas, looking.thetas, strict=True))
    assert plain.scores == looking.scores
    looks = [record["effort"]["watched"] for record in looking.records]
    if len(looking.units) == 1:  # all tasks at once: there is none whose accuracy it would be
        assert looks == [[]]
        return
    for record, seen in zip(looking.records, looks, strict=True):
        steps = record["effort"]["steps"]
        assert [at for at, _ in seen] == sorted({*range(0, steps + 1, 2), steps})
        assert all(
            0 <= score <= 100 and (score * 6 / 100) == pytest.approx(round(score * 6 / 100)) for _, score in seen
        )
    if not looking.thetas:
        return
    stopped.stop_after = 3
    with pytest.raises(Stopped):
        stopped.go()
    again = made("stopped", **sections)
    assert again.resume()
    again.go()
    assert [record["effort"]["watched"] for record in again.records] == looks
