"""Other layouts made into the native one, and what a stream holds.

The native layout is `task/train.parquet` and `task/test.parquet` with the standard columns, and `meta.json` with
each task's labels, family and score. The sources `trace` and `labels` need no import: it is for data that
several runs share, or that one file of another format holds.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from treelora_ray.config import StreamConfig
from treelora_ray.data.errors import DataError
from treelora_ray.data.folders import labels_source, trace_source
from treelora_ray.data.images import decode
from treelora_ray.data.parquet import OnBadRow
from treelora_ray.data.rows import Rows
from treelora_ray.data.tables import read_meta, read_table
from treelora_ray.data.task import Source, Task, TaskStream, kind_of, labelled

GROUP = 1024  # rows of a row group
SAMPLE = 200  # rows of a task that are measured
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def import_trace(source: str, target: str, on_bad_row: OnBadRow = "fail") -> list[Task]:
    """TRACE's folders; the scores its tasks are measured with go into `meta.json`."""
    config = StreamConfig(source="trace", path=source, on_bad_row=on_bad_row)
    return _import(trace_source(source.rstrip("/"), config), target)


def import_labels(source: str, target: str, on_bad_row: OnBadRow = "fail") -> list[Task]:
    """The long-sequence benchmark's folders; the order of `labels.json` goes into `meta.json`."""
    config = StreamConfig(source="labels", path=source, on_bad_row=on_bad_row)
    return _import(labels_source(source.rstrip("/"), config), target)


def import_table(
    train: str, test: str, target: str, task: str, columns: Mapping[str, str], on_bad_row: OnBadRow = "fail"
) -> Task:
    """One task from two files (CSV, JSON, JSONL, Parquet), added to the folder `target`.

    `columns` maps `text` and `label`, or `image` and `label`, or `prompt` and `answer`, to columns of the files.
    """
    if set(columns) not in ({"text", "label"}, {"image", "label"}, {"prompt", "answer"}):
        raise DataError(
            f"columns must be text and label, image and label, or prompt and answer; got {', '.join(columns)}"
        )
    trained, tested = (read_table(path, columns, on_bad_row) for path in (train, test))
    made = labelled(task, trained, tested) if "label" in columns else Task(task, trained, tested)
    _write_task(Path(target), made)
    return made


def describe(stream: TaskStream) -> list[dict[str, Any]]:
    """Of each task what it holds; lengths (in characters) and sizes are those of rows spread evenly, at most SAMPLE."""
    return [
        {
            "task": task.name,
            "kind": stream.kind,
            "train": len(task.train),
            "test": len(task.test),
            "skipped": task.train.skipped + task.test.skipped,
            "labels": list(task.labels),
            "family": task.family,
            **_sizes(task.train),
        }
        for task in stream.tasks
    ]


def _import(source: Source, target: str) -> list[Task]:
    tasks = [source.open(name) for name in source.names]  # all are read before anything is written
    for task in tasks:
        _write_task(Path(target), task)
    return tasks


def _write_task(target: Path, task: Task) -> None:
    meta = read_meta(str(target))
    folder = target / task.name
    if folder.exists() or task.name in meta:
        raise DataError(f"{target} already has a task {task.name!r}: remove it, or choose another name or folder")
    folder.mkdir(parents=True)
    _write_rows(folder / "train.parquet", task.train)
    _write_rows(folder / "test.parquet", task.test)
    about = {"labels": list(task.labels)} if task.labels else {"score": task.score}
    counts = {"train": len(task.train), "test": len(task.test)}
    entry = {"task": task.name, "family": task.family, **about, **counts}
    text = json.dumps([*meta.values(), entry], indent=1, ensure_ascii=False)
    _replace(target / "meta.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))


def _write_rows(path: Path, rows: Rows) -> None:
    schema = pa.schema([(name, IMAGE if name == "image" else pa.string()) for name in rows.columns])

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(rows), GROUP):
                values = rows.take(np.arange(start, min(start + GROUP, len(rows))))
                if "image" in values:
                    values["image"] = [_as_struct(value) for value in values["image"]]
                writer.write_table(pa.table(values, schema=schema))

    _replace(path, write)


def _replace(path: Path, write: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_struct(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {"bytes": value, "path": None}


def _sizes(rows: Rows) -> dict[str, Any]:
    sample = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).round().astype(np.int64))
    if kind_of(rows) == "image":
        images = rows.take(sample, ["image"])["image"]
        where = [rows.where(int(index)) for index in sample]
        sizes = [_size(image, place) for image, place in zip(images, where, strict=True)]
        least, most = np.min(sizes, axis=0).tolist(), np.max(sizes, axis=0).tolist()
        return {"smallest": least, "largest": most}
    column = rows.columns[0]
    lengths = [len(text) for text in rows.take(sample, [column])[column]]
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95, 1.0], method="nearest")
    return dict(zip(("length_5", "length_50", "length_95", "length_max"), map(int, quantiles), strict=True))


def _size(value: Any, where: str) -> tuple[int, int]:
    """Height and width."""
    image = decode(value, where)
    if isinstance(image, np.ndarray):
        return int(image.shape[0]), int(image.shape[1])
    return image.height, image.width
