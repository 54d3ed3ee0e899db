"""Rows of JSON, JSONL, CSV and Parquet files, and what lies in folders of tasks beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from treelora_ray.data.errors import DataError
from treelora_ray.data.parquet import OnBadRow, ParquetRows
from treelora_ray.data.rows import MemoryRows, Rows, SubsetRows, as_text
from treelora_ray.data.shards import addresses, open_filesystem

CSV_BLOCK = 64 * 2**20  # a row of a CSV file must fit into one block


class _Broken:
    """A row of a file that could not be parsed."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


def read_table(path: str, columns: Mapping[str, str], on_bad_row: OnBadRow = "fail") -> Rows:
    """`columns` maps names of rows to columns of the file; all but Parquet are held in memory, as texts."""
    ending = path.rsplit(".", 1)[-1].lower()
    if ending == "parquet":
        return ParquetRows(path, columns, on_bad_row)
    if ending not in READERS:
        raise DataError(f"{path} must end in .parquet, .{', .'.join(READERS)}: rename or convert it")
    records = READERS[ending](path, read_bytes(path))
    present = list(dict.fromkeys(key for record in records if isinstance(record, dict) for key in record))
    if missing := [column for column in columns.values() if column not in present]:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(map(str, present)) or 'none'}")
    values: dict[str, list[Any]] = {name: [] for name in columns}
    kept = []
    for number, record in enumerate(records):
        problem = _problem(record, columns)
        if problem and on_bad_row == "fail":
            raise DataError(f"{path}, row {number}: {problem}; mend it, or leave such rows out with on_bad_row=skip")
        if not problem:
            kept.append(number)
        for name, column in columns.items():
            values[name].append(None if problem else as_text(record[column]))
    if not kept:
        raise DataError(f"{path} has no rows that can be read: give some")
    rows = MemoryRows(values, source=path)
    return rows if len(kept) == len(records) else SubsetRows(rows, kept, skipped=len(records) - len(kept))


def read_bytes(path: str) -> bytes:
    filesystem, place = open_filesystem(path)
    try:
        with filesystem.open(place, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError:
        raise DataError(f"there is no file {path}: check the path") from None
    except Exception as error:  # each remote filesystem has errors of its own
        raise DataError(f"{path} cannot be read ({error}): check the path, the network and access") from error


def read_json(path: str) -> Any:
    return _parse(path, read_bytes(path))


def exists(path: str) -> bool:
    filesystem, place = open_filesystem(path)
    return bool(filesystem.isfile(place))


def first_of(folder: str, names: Sequence[str]) -> str:
    """The first of these files that a folder has."""
    for name in names:
        if exists(f"{folder}/{name}"):
            return f"{folder}/{name}"
    raise DataError(f"{folder} has no {' or '.join(names)}: add it")


def task_folders(path: str, file: str) -> dict[str, str]:
    """Folders anywhere below `path` that hold such a file, by their names, in order of these."""
    filesystem, place = open_filesystem(path)
    found: dict[str, str] = {}
    for name in addresses(filesystem, sorted(filesystem.glob(f"{place.rstrip('/')}/**/{file}"))):
        folder = name.rpartition("/")[0]
        task = folder.rpartition("/")[2]
        if task in found:
            raise DataError(f"{found[task]} and {folder} are both named {task!r}: tasks need names of their own")
        found[task] = folder
    if not found:
        raise DataError(f"there is no {file} in {path} or in folders below it: check the path")
    return dict(sorted(found.items()))


def read_meta(folder: str) -> dict[str, dict[str, Any]]:
    """What `meta.json` says of each task, by its name: `[{"task", "labels", "family", "score"}]`; else nothing."""
    path = f"{folder.rstrip('/')}/meta.json"
    if not exists(path):
        return {}
    entries = read_json(path)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("task"), str) for e in entries
    ):
        raise DataError(f'{path} must be a list of {{"task": name, ...}}: mend or remove it')
    found = {entry["task"]: entry for entry in entries}
    if len(found) < len(entries):
        raise DataError(f"{path} lists a task twice: list each once")
    for entry in entries:
        if entry.get("labels") is not None:
            checked_labels(entry["labels"], path)
    return found


def read_labels(folder: str) -> tuple[str, ...] | None:
    """The list in `labels.json`, where there is one."""
    path = f"{folder}/labels.json"
    return checked_labels(read_json(path), path) if exists(path) else None


def checked_labels(labels: Any, path: str) -> tuple[str, ...]:
    if not isinstance(labels, list) or not labels or not all(isinstance(each, str | int) for each in labels):
        raise DataError(f"the labels in {path} must be a list of names, got {str(labels)[:80]}")
    return tuple(as_text(each) for each in labels)


def _problem(record: Any, columns: Mapping[str, str]) -> str | None:
    if isinstance(record, _Broken):
        return record.problem
    if not isinstance(record, dict):
        return f"is a {type(record).__name__} where an object with named values is wanted"
    for column in columns.values():
        value = record.get(column)
        if value is None:
            return f"{column} is missing or null"
        if not isinstance(value, str | int | float):
            return f"{column} is a {type(value).__name__} where a text is wanted"
    return None


def _parse(path: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}): mend or convert it") from error


def _json(path: str, data: bytes) -> list[Any]:
    found = _parse(path, data)
    if not isinstance(found, list):
        raise DataError(f"{path} must be a list of rows, got a {type(found).__name__}: one object a line is .jsonl")
    return found


def _jsonl(path: str, data: bytes) -> list[Any]:
    def parsed(line: bytes) -> Any:
        try:
            return _parse(path, line)
        except DataError as error:
            return _Broken(f"cannot be parsed ({error.__cause__})")

    return [parsed(line) for line in data.split(b"\n") if line.strip()]


def _csv(path: str, data: bytes) -> list[Any]:
    """Every value as it is written: `007` is no number, `NA` is no null. Rows of another length are bad."""
    import pyarrow as pa
    from pyarrow import csv

    broken: list[tuple[int, str]] = []

    def note(row: Any) -> str:
        broken.append((row.number, f"has {row.actual_columns} values where {row.expected_columns} are wanted"))
        return "skip"

    parse = csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note)
    read = csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False)  # without threads rows have numbers
    try:
        names = csv.open_csv(pa.BufferReader(data), read, parse).schema.names
        broken.clear()
        convert = csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
        records = csv.read_csv(pa.BufferReader(data), read, parse, convert).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} is no CSV file ({error}): mend or convert it") from error
    for number, problem in broken:  # in order: each takes its place among the rows, of which the header is 1
        records.insert(number - 2, _Broken(problem))
    return list(records)


READERS: dict[str, Callable[[str, bytes], list[Any]]] = {"json": _json, "jsonl": _jsonl, "csv": _csv}
