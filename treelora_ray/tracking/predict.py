"""Answers for a Parquet file, row group by row group."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from treelora_ray.api import Run
from treelora_ray.training.errors import RunError


def predict_file(run: Run, source: Path, target: Path, routing: str | None) -> int:
    """Writes the rows with `task` and `label` or `answer` beside their columns but images; how many there were."""
    if not source.is_file():
        raise RunError(f"there is no file {source}")
    try:
        file = pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise RunError(f"{source} is no Parquet file: {error}") from None
    kind = run.method.learner.model.kind
    if kind not in file.schema_arrow.names:
        raise RunError(f"{source} has no column {kind!r}; it has {', '.join(file.schema_arrow.names)}")
    said = "answer" if kind == "prompt" else "label"
    kept = [name for name in file.schema_arrow.names if name not in ("image", "task", said)]
    names = [info.name for info in run.method.learner.infos]
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    writer = None
    try:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            answers = run.predict({kind: table.column(kind).to_pylist()}, routing)
            added = pa.table({"task": [names[task] for task in answers.task.tolist()], said: answers.text})
            out = table.select(kept)
            for name in added.column_names:
                out = out.append_column(name, added.column(name))
            writer = writer or pq.ParquetWriter(temporary, out.schema)
            writer.write_table(out)
        if writer is None:
            raise RunError(f"{source} has no rows")
        writer.close()
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return int(file.metadata.num_rows)
