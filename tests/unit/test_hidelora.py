"""HiDe-LoRA against its invariants, and against the mistakes that are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny, toys
from tests.contract.test_methods import Together, by_workers
from tests.unit.test_docs import blocks
from treelora_ray.config import ConfigError, from_mapping
from treelora_ray.data.rows import MemoryRows
from treelora_ray.methods import hide
from treelora_ray.methods.base import Method
from treelora_ray.methods.hide import Decomposition, contrast
from treelora_ray.methods.hidelora import HideLora
from treelora_ray.methods.treelora import TreeLora
from treelora_ray.models.backbone import backbone_digest
from treelora_ray.training.evaluate import Evaluator
from treelora_ray.training.loop import begin_task
from treelora_ray.training.stream import StreamRun

SMALL = {"name": "hide-lora", "centroids": 3, "samples": 16, "fit_epochs": 4, "fit_lr": 0.05}
PLAIN = {**SMALL, "momentum": 0, "contrast": 0, "start": "fresh"}


def hidelora(backbone: Path, **options: Any) -> HideLora:
    sections = options.pop("sections", {})
    made = toys.ready(backbone, {**SMALL, **options}, **sections)
    assert isinstance(made, HideLora)
    return made


def independent(backbone: Path) -> Method:
    """With rows of the head that start as those of hide-lora do."""
    made = toys.ready(backbone, "independent")
    made.learner.head.common = True
    return made


def parts(made: HideLora | TreeLora) -> Decomposition:
    assert made.decomposition is not None
    return made.decomposition


@dataclass
class Learnt:
    """Three tasks of a run, and what was there between them."""

    made: HideLora
    folder: Path
    trained: list[Tensor]  # by task, the adapter as its last step left it
    banks: list[dict[int, Tensor]]  # after each task
    heads: list[Tensor]
    starts: list[Tensor]
    digests: list[str]


@pytest.fixture(scope="module")
def learnt(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    config = toys.config(backbone, {**SMALL, "momentum": 0.25, "contrast": 0.1}, train={"weight_decay": 0.1})
    method = toys.method(config)
    assert isinstance(method, HideLora)
    made: HideLora = method
    found = Learnt(made, tmp_path_factory.mktemp("run"), [], [], [], [], [backbone_digest(made.learner.model)])

    class Watched(StreamRun):
        def _after_step(self, step: int, of: int, loss: float, norm: float) -> None:
            super()._after_step(step, of, loss, norm)
            if step == of - 1:
                found.trained.append(made.learner.adapter.clone())

        def _score(self, unit: tuple[int, ...]) -> list[float | None]:
            found.banks.append({task: made.bank[task] for task in made.bank.of_task})
            found.heads.append(torch.cat([made.learner.head.weight, made.learner.head.bias.unsqueeze(1)], 1))
            found.digests.append(backbone_digest(made.learner.model))
            return super()._score(unit)

    before = made.before_task

    def before_task() -> None:
        before()
        found.starts.append(made.learner.adapter.clone())

    made.before_task = before_task  # type: ignore[method-assign]
    Watched(config, toys.stream(3), made, found.folder).go()
    return found


def test_a_task_starts_from_the_one_before_and_takes_its_share_of_all(learnt: Learnt) -> None:
    kept = [learnt.banks[2][task] for task in range(3)]
    assert torch.equal(learnt.starts[0], learnt.made.learner.anchor)
    assert torch.equal(learnt.starts[1], kept[0])
    assert torch.equal(learnt.starts[2], kept[1])
    assert torch.equal(kept[0], learnt.trained[0])
    torch.testing.assert_close(kept[1], 0.75 * learnt.trained[1] + 0.25 * kept[0])
    torch.testing.assert_close(kept[2], 0.75 * learnt.trained[2] + 0.25 * (kept[0] + kept[1]) / 2)


def test_adapters_of_earlier_tasks_are_frozen(learnt: Learnt) -> None:
    """Under weight decay too, which would move what a shared pool holds."""
    for bank in learnt.banks:
        assert all(torch.equal(adapter, learnt.banks[-1][task]) for task, adapter in bank.items())


def test_classes_are_summarised_through_the_adapter_that_answers(learnt: Learnt) -> None:
    """Through the mean of adapters, not through the one that was trained."""
    made = learnt.made
    for task in range(3):
        for summaries, adapter in ((parts(made).trained, made.bank[task]), (parts(made).frozen, made.learner.anchor)):
            with made.learner.holding(adapter), torch.no_grad():
                columns = made.learner.tasks[task].train.take(range(22))
                features = made.learner.features(columns)
            for number, row in enumerate(made.learner.head.rows[task]):
                own = torch.tensor([label == f"c{number}" for label in columns["label"]])
                torch.testing.assert_close(
                    summaries.centres()[2 * task + number], features[own].mean(0), rtol=0, atol=1e-5
                )
                assert summaries.entries[2 * task + number].tolist() == [task, row]
        with made.learner.holding(learnt.trained[task]), torch.no_grad():
            other = made.learner.features(columns)
        assert torch.allclose(other, features, atol=1e-4) is False


def test_the_fit_of_the_classifier_changes_its_rows_alone(learnt: Learnt) -> None:
    assert len(set(learnt.digests)) == 1
    first, second, third = learnt.heads
    assert first.shape[0] == 2
    assert not torch.allclose(second[:2], first, atol=1e-4), "old classes are fit again"
    assert not torch.allclose(third[:4], second, atol=1e-4)


def test_the_head_beside_each_exported_adapter_is_the_one_that_answers(learnt: Learnt) -> None:
    head = learnt.made.learner.head
    for task in range(3):
        found = load_file(learnt.folder / "adapters" / f"t{task}" / "head.safetensors")
        assert torch.equal(found["weight"], head.weight[head.rows[task]])
        assert torch.equal(found["bias"], head.bias[head.rows[task]])


def test_all_classes_seen_compete_and_no_others(learnt: Learnt, backbone: Path) -> None:
    assert learnt.made.among(0) == [0, 1, 2, 3, 4, 5]
    made = hidelora(backbone)
    toys.learn(made, 0, 1)
    begin_task(made, (2,))
    assert len(made.learner.head) == 6
    assert made.among(0) == [0, 1, 2, 3]


def test_tasks_are_inferred_by_the_head_that_is_fit_for_it(learnt: Learnt, monkeypatch: pytest.MonkeyPatch) -> None:
    made = learnt.made
    features = parts(made).frozen.draw(20, "features")[0]
    found = made.route(features)
    assert found.unique().tolist() == [0, 1, 2]
    monkeypatch.setattr(parts(made), "inference", parts(made).inference.roll(2, 0))  # classes of the next task
    assert torch.equal(made.route(features), (found + 1) % 3)


def test_one_task_is_ordinary_fine_tuning_and_always_inferred(backbone: Path) -> None:
    made, plain = hidelora(backbone, contrast=0.5), toys.ready(backbone, "seqlora")
    ours, theirs = toys.learn(made, 0), toys.learn(plain, 0)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(made.learner.head.weight, plain.learner.head.weight)
    assert torch.equal(made.bank[0], plain.learner.adapter)
    assert made.route(100 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))).tolist() == [0] * 50


def test_told_the_task_it_is_independent_with_a_classifier_fit_over_all_classes(backbone: Path) -> None:
    made, plain = hidelora(backbone, **PLAIN), independent(backbone)
    assert plain.bank is not None
    toys.learn(plain, 0, 1)
    toys.learn(made, 0, 1)
    assert all(torch.equal(made.bank[task], plain.bank[task]) for task in range(2))
    head, summaries = plain.learner.head, parts(made).trained
    targets = summaries.entries[:, 1]

    def drawn(epoch: int) -> tuple[Tensor, Tensor]:
        features, entries = summaries.draw(16, f"0/t1/classifier/{epoch}")
        return features, targets[entries]

    # Rows of the first task were not fit when it was the only one.
    fitted = hide.fit(head.weight, head.bias, drawn, made.options)
    assert torch.equal(torch.cat([made.learner.head.weight, made.learner.head.bias.unsqueeze(1)], 1), fitted)
    head.weight, head.bias = fitted[:, :-1].clone(), fitted[:, -1].clone()
    plain.among = made.among  # type: ignore[method-assign]
    for task in range(2):
        rows, routes = toys.images(task, 30, 9), np.full(30, task)
        ours, theirs = Evaluator(made, "oracle").answer(rows, routes), Evaluator(plain, "oracle").answer(rows, routes)
        assert ours.text == theirs.text
        assert len(set(ours.text)) > 1


def test_without_epochs_the_classifier_stays_as_trained_and_class_means_say_the_task(backbone: Path) -> None:
    made, plain = hidelora(backbone, **{**PLAIN, "fit_epochs": 0}), independent(backbone)
    toys.learn(made, 0, 1)
    toys.learn(plain, 0, 1)
    assert torch.equal(made.learner.head.weight, plain.learner.head.weight)
    assert list(made.changed((1,))) == [1]
    centres = parts(made).frozen.centres()
    queries = centres.repeat(10, 1) + 0.1 * torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(queries, centres).argmin(1) // 2
    assert made.route(queries).tolist() == nearest.tolist()


def test_the_contrast_is_part_of_every_step_after_the_first_task(backbone: Path) -> None:
    """In released code it stands as a comment, or contrasts LoRA's A with itself."""
    made = hidelora(backbone, contrast=0.5)
    toys.learn(made, 0)
    begin_task(made, (1,))
    learner = made.learner
    learner.drawn = learner.refs(np.arange(8))
    batch = learner.fetch(learner.drawn)
    loss, said = learner.objective.loss(batch)
    term = made.loss_terms(batch, said)
    stored = parts(made).trained.means
    assert stored.shape == (6, 16), "every centroid of every class before"
    expected = 0.5 * contrast(stored, learner.features(learner.tasks[1].train.take(range(8))), 0.8)
    assert term is not None
    torch.testing.assert_close(term / 8, expected)
    term.backward()
    assert float(learner.adapter_grad.norm()) > 1e-4
    assert loss.requires_grad


def test_workers_contrast_all_rows_of_a_step_and_one_of_them_draws_and_fits(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 22 rows in steps of 7 the last has 1, so that a worker has none."""
    options, train = {**SMALL, "contrast": 0.5}, {"batch": 7, "epochs": 1}
    made, real = list[str](), hide.kmeans

    def kmeans(points: Tensor, most: int, key: str) -> Tensor:
        made.append(key)
        return real(points, most, key)

    monkeypatch.setattr(hide, "kmeans", kmeans)
    alone, *workers = [
        *by_workers(1, tmp_path / "one", backbone, options, tasks=2, train=train),
        *by_workers(2, tmp_path / "two", backbone, options, tasks=2, train=train),
    ]
    for worker in workers:
        assert len(worker.thetas) == len(alone.thetas) == 8
        torch.testing.assert_close(worker.thetas[-1], alone.thetas[-1], rtol=0, atol=1e-5)
    assert len(made) == 2 * len(set(made)) == 16, "once for two classes of two tasks, frozen and trained"
    one, other = (worker.method.tensors() for worker in workers)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert one["decomposition.trained.means"].shape == (12, 16)


def test_too_small_parts_of_a_step_are_refused(backbone: Path) -> None:
    small = {"train": {"micro_batch": 4}}
    with pytest.raises(ConfigError, match=r"train.micro_batch is 4, less than a worker's share .* method.contrast=0"):
        hidelora(backbone, sections=small)
    hidelora(backbone, contrast=0, sections=small)
    config = toys.config(backbone, SMALL, **small)
    toys.method(config, Together(2).comm(0))


def test_a_class_of_several_tasks_is_one_of_the_classifier_and_says_each_task(backbone: Path) -> None:
    made = hidelora(backbone, sections={"objective": {"label_match": "string"}})
    toys.learn(made, 0, 1)
    assert len(made.learner.head) == 2
    assert parts(made).trained.entries.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert made.route(parts(made).frozen.centres()).tolist() == [0, 0, 1, 1]
    assert made.among(1) == [0, 1]


def test_of_a_class_without_rows_nothing_is_drawn(backbone: Path) -> None:
    made = hidelora(backbone)
    task = made.learner.tasks[1]
    present = [row for row in range(22) if task.train.take([row])["label"] == ["c1"]]
    object.__setattr__(task, "train", MemoryRows(task.train.take(present)))
    toys.learn(made, 0, 1)
    assert parts(made).trained.entries.tolist() == [[0, 0], [0, 1], [1, 3]]
    assert parts(made).inference.shape == (3, 17)
    assert bool(torch.isfinite(made.learner.head.weight).all())
    assert made.route(parts(made).frozen.centres()).tolist() == [0, 0, 1]


def test_of_language_models_tasks_are_inferred_by_gaussians_and_nothing_is_fit(tmp_path: Path) -> None:
    made = toys.ready(tiny.llama(tmp_path), SMALL, tasks=2, kind="prompt")
    assert isinstance(made, HideLora)
    thetas = toys.learn(made, 0, 1)
    assert made.decomposition is None
    assert not made.tensors()
    features = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.route(features), made.learner.router.route(features))
    own = thetas[-1][: made.learner.layout.total]
    torch.testing.assert_close(made.bank[1], 0.9 * own + 0.1 * made.bank[0])


def test_the_settings_of_the_papers_fit_a_vision_transformer(backbone: Path) -> None:
    (block,) = blocks(Path(__file__).parents[2] / "docs" / "methods" / "hide-lora.md", "yaml")
    data = yaml.safe_load(block)
    data["model"] |= {"backbone": str(backbone), "lora": {**data["model"]["lora"], "layers": [0, 1]}}
    made = toys.method(from_mapping(data))
    assert isinstance(made, HideLora)
    assert [name.split(".")[-1] for name in made.learner.layout.names] == ["k_proj", "v_proj"] * 2


# -- the decomposition around treelora


def treelora(backbone: Path, **options: Any) -> TreeLora:
    made = toys.ready(backbone, {"name": "treelora", "guide": {"gate": 0.0}, **options})
    assert isinstance(made, TreeLora)
    return made


def test_around_treelora_it_leaves_the_adapters_as_they_were(backbone: Path) -> None:
    plain, made = treelora(backbone), treelora(backbone, decomposition="hide")
    plain.learner.head.common = True
    ours, theirs = toys.learn(made, 0, 1, 2), toys.learn(plain, 0, 1, 2)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert made.bank is not None
    assert plain.bank is not None
    assert all(torch.equal(made.bank[task], plain.bank[task]) for task in range(3))
    assert not torch.allclose(made.learner.head.weight, plain.learner.head.weight, atol=1e-4)
    assert made.among(1) == [0, 1, 2, 3, 4, 5]
    assert plain.among(1) == [2, 3]
    assert made.route(parts(made).frozen.centres()).tolist() == [0, 0, 1, 1, 2, 2]
    assert list(made.changed((2,))) == [0, 1, 2]


def test_around_treelora_it_is_refused_with_a_budget_and_for_language_models(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="decomposition is 'hide' and budget 2"):
        treelora(backbone, decomposition="hide", guide={"budget": 2})
    options = {"name": "treelora", "decomposition": "hide"}
    with pytest.raises(ConfigError, match="fits a classifier, but the stream is for causal-lm"):
        toys.ready(tiny.llama(tmp_path), options, kind="prompt")
