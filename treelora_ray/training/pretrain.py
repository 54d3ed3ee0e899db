"""The stage before a stream: a backbone whose weights are all trained on labelled rows known from the start.

pretrain(backbone, data, output) -> Pretrained     a folder of transformers that `model.backbone` can name

The classifier starts at the class means of the untrained features, and is thrown away at the end: a stream grows a
head of its own. The same seed, rows and number of threads give the same weights on CPU.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from treelora_ray.config import ModelConfig, StreamConfig
from treelora_ray.data.batches import BatchPlan, permuted
from treelora_ray.data.parquet import ParquetRows
from treelora_ray.data.rows import Rows, SubsetRows, column
from treelora_ray.data.shards import open_shards
from treelora_ray.data.split import TEST_SHARE, split_source
from treelora_ray.data.stream import limited
from treelora_ray.data.task import Task, columns_of, kind_of, labelled
from treelora_ray.models.backbone import Model, load_model
from treelora_ray.models.head import nearest_mean, origin_of_means
from treelora_ray.models.router import ClassSums
from treelora_ray.training.errors import RunError

WEIGHT_DECAY, WARMUP, CLIP = 0.01, 0.1, 1.0
EVALUATED = 64  # rows of one forward pass where nothing is trained


@dataclass(frozen=True)
class Pretrained:
    folder: str
    classes: int
    train_rows: int
    test_rows: int
    before: float
    """Percent of test rows answered rightly by the nearest class mean of the features as they were."""
    after: float
    """The same by the trained classifier on the trained features."""


def pretrain(
    backbone: str,
    data: str,
    output: Path,
    *,
    epochs: int = 3,
    batch: int = 32,
    lr: float = 1e-4,
    seed: int = 0,
    rows: int | None = None,
    max_length: int = 128,
    device: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> Pretrained:
    """Trains all weights on `data`: a Parquet file, or a folder with train.parquet and test.parquet."""
    if output.exists():
        raise RunError(f"{output} is there already: name another folder, or remove it")
    if epochs < 1 or batch < 1 or not lr > 0:
        raise RunError(f"epochs and batch must be at least 1 and lr above 0, got {epochs}, {batch} and {lr}")
    task = open_rows(data, seed)
    train = limited(task.train, rows, seed, "pretraining rows")
    kind = kind_of(train)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = load_model(ModelConfig(backbone=backbone, max_length=max_length, device=device), kind, seed)
        model.net = net = model.net.unload()  # without adapters: all weights are trained
        head = nn.Linear(model.width, len(task.labels)).to(model.device)
        means = class_means(model, train, task.labels)
        weight, bias = nearest_mean(means, origin_of_means(means))
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        before = accuracy(model, head, task.test, task.labels)
        tell(f"{len(train)} rows of {len(task.labels)} classes; before: {before:.2f}% of {len(task.test)} test rows")
        net.requires_grad_(True)
        plan = BatchPlan(len(train), batch, epochs, seed, "pretraining")
        for epoch, loss in enumerate(_epochs(model, head, train, task.labels, plan, lr), 1):
            tell(f"epoch {epoch} of {epochs}: loss {loss:.4f}")
    after = accuracy(model, head, task.test, task.labels)
    tell(f"after: {after:.2f}% of {len(task.test)} test rows")
    done = Pretrained(str(output), len(task.labels), len(train), len(task.test), before, after)
    settings = {"backbone": backbone, "epochs": epochs, "batch": batch, "lr": lr, "seed": seed, "rows": rows}
    _save(model, output, {**asdict(done), **settings, "data": {"train": train.fingerprint, "path": data}})
    return done


def open_rows(data: str, seed: int) -> Task:
    """Labelled rows; of one file, or of a folder without test rows, a share of each class is kept for the test."""
    if not data.endswith(".parquet"):
        source = split_source(
            StreamConfig(source="split", path=data, classes_per_task=2**31, class_order="given"), seed
        )
        return source.open(source.names[0])
    names = {name: name for name in ("image", "text", "label")}
    rows = ParquetRows(data, columns_of(open_shards(data, {})[0].schema.names, names, data))
    labels, held_out = np.array(column(rows, "label"), dtype=np.str_), np.zeros(len(rows), dtype=bool)
    for label in np.unique(labels).tolist():
        places = np.flatnonzero(labels == label)
        share = np.arange(round(TEST_SHARE * len(places)))
        held_out[places[permuted(share, len(places), f"{seed}/test share/{label}")]] = True
    if not held_out.any():
        raise RunError(f"{data} has too few rows of each class to keep some for the test: give at least three of one")
    train, test = (SubsetRows(rows, np.flatnonzero(part)) for part in (~held_out, held_out))
    return labelled("pretraining", train, test)


@torch.no_grad()
def class_means(model: Model, rows: Rows, labels: tuple[str, ...]) -> Tensor:
    """[C, d] of features; a class without rows gets the mean of all."""
    sums = ClassSums(len(labels), model.width, model.device)
    for columns, targets in _batches(rows, labels, model.device):
        sums.add(model.features(model.inputs(columns)), targets)
    return torch.where(sums.counts.unsqueeze(-1) > 0, sums.means, sums.sums.sum(0) / sums.counts.sum())


@torch.no_grad()
def accuracy(model: Model, head: nn.Linear, rows: Rows, labels: tuple[str, ...]) -> float:
    """Percent."""
    right = 0
    for columns, targets in _batches(rows, labels, model.device):
        right += int((head(model.features(model.inputs(columns))).argmax(-1) == targets).sum())
    return 100 * right / len(rows)


def _epochs(
    model: Model, head: nn.Linear, rows: Rows, labels: tuple[str, ...], plan: BatchPlan, lr: float
) -> Iterator[float]:
    """Trains; the mean loss of each epoch. Leaves the model in evaluation mode."""
    weights = [*model.net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=WEIGHT_DECAY)
    warm = max(1, math.ceil(WARMUP * plan.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / plan.steps)) / 2)
    )
    total = 0.0
    model.net.train()
    for step, indices in plan.walk():
        columns = rows.take(indices)
        targets = _targets(columns["label"], labels, model.device)
        loss = F.cross_entropy(head(model.features(model.inputs(columns))), targets)
        if not math.isfinite(loss.item()):
            raise RunError(f"the loss is {loss.item()} at step {step}: lower lr, which is {lr}; nothing was written")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % plan.steps_per_epoch == 0:
            yield total / plan.steps_per_epoch
            total = 0.0
    model.net.eval()


def _batches(
    rows: Rows, labels: tuple[str, ...], device: torch.device
) -> Iterator[tuple[dict[str, list[Any]], Tensor]]:
    for start in range(0, len(rows), EVALUATED):
        columns = rows.take(np.arange(start, min(start + EVALUATED, len(rows))))
        yield columns, _targets(columns["label"], labels, device)


def _targets(values: list[Any], labels: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([labels.index(value) for value in values], dtype=torch.long, device=device)


def _save(model: Model, output: Path, record: dict[str, Any]) -> None:
    """Writes beside the folder and renames: it is there whole, or not at all."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.net.save_pretrained(temporary)
        helper: Any = getattr(model, "processor", None) or getattr(model, "tokenizer", None)
        helper.save_pretrained(temporary)
        (temporary / "pretraining.json").write_text(json.dumps(record, indent=1))
        temporary.chmod(0o755)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
