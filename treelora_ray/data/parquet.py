"""Rows of Parquet files, of any size: held in memory, or copied once to a file that is mapped into memory.

Parquet can be read by the row group only, and a run takes rows in random order. So files that are too
large to hold, or lie elsewhere, are copied batch by batch to an uncompressed Arrow file in the cache,
of which the operating system reads just the rows asked for.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from treelora_ray.data.errors import DataError
from treelora_ray.data.images import decode
from treelora_ray.data.rows import Indices, as_text, checked, digest, gather
from treelora_ray.data.shards import Shard, open_shards

HELD_BYTES = 256 * 2**20  # uncompressed size up to which local files are held in memory
BATCH = 1024  # rows of one batch
OnBadRow = Literal["fail", "skip"]


class ParquetRows:
    """`path` is a file, a folder of shards or a pattern; `columns` maps names of rows to columns of the files.

    Columns but `image` come as texts: integers with names of classes in the file's metadata as these names.
    A row is bad if it has a null (an image without bytes, a class without a name). With `fail` the first bad row
    or row group is an error; an image that cannot be decoded is one only when it is decoded. With `skip` all of
    them, bad images too, are found now, left out and counted in `skipped`.
    """

    def __init__(self, path: str, columns: Mapping[str, str], on_bad_row: OnBadRow = "fail") -> None:
        self.columns = tuple(columns)
        self._shards = open_shards(path, columns)
        self._names = _class_names(self._shards, columns)
        groups = [(shard, group) for shard in self._shards for group in range(shard.groups)]
        self._groups = [each for each in groups if on_bad_row == "fail" or each[0].readable(each[1])]
        self._batches = self._load() if self._groups else []
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        raw = int(self._ends[-1]) if self._batches else 0
        kept = self._find_kept(raw, on_bad_row)
        self._kept = None if len(kept) == raw else kept  # 8 bytes a row, mostly for nothing
        self._length = len(kept)
        self.skipped = sum(shard.rows for shard in self._shards) - len(self)
        if not len(self):
            raise DataError(f"{path} has no rows" + (" that can be read" if self.skipped else "") + ": give some")
        self.label_names = tuple(self._names.get("label", ()))
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return self._length

    def take(self, indices: Indices, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
        wanted = checked(indices, len(self))
        if self._kept is not None:
            wanted = self._kept[wanted]
        names = tuple(columns or self.columns)

        def take_batch(number: int, local: NDArray[np.int64]) -> dict[str, list[Any]]:
            batch, first = self._batches[number], int(self._ends[number]) - self._batches[number].num_rows
            rows = pa.array(local)
            return {name: self._values(name, batch.column(name).take(rows), local + first) for name in names}

        return gather(wanted, self._ends, names, take_batch)

    def where(self, index: int) -> str:
        return self._where(int(index if self._kept is None else self._kept[index]))

    def _where(self, raw: int) -> str:
        for shard, group in self._groups:
            rows = shard.rows_of(group)
            if raw < rows:
                return f"{shard.name}, row {shard.start_of(group) + raw}"
            raw -= rows
        raise IndexError(raw)

    def _load(self) -> list[pa.RecordBatch]:
        size = sum(shard.bytes_of(group) for shard, group in self._groups)
        if size <= HELD_BYTES and all(shard.local for shard in self._shards):
            return list(self._read())
        parts = [f"{shard.digest}/{group}" for shard, group in self._groups]
        names = json.dumps(sorted(self._shards[0].columns.items()))
        return mapped(_cache() / f"{digest(*parts, names)}.arrow", self._read())

    def _read(self) -> Iterator[pa.RecordBatch]:
        """All batches in order, their columns named and typed as those of the first."""
        schema: pa.Schema | None = None
        for shard, group in self._groups:
            for batch in shard.read(group, BATCH):
                schema = schema or batch.schema
                yield batch if batch.schema == schema else _cast(batch, schema, shard.name)

    def _find_kept(self, raw: int, on_bad_row: OnBadRow) -> NDArray[np.int64]:
        good = np.ones(raw, dtype=bool)
        for end, batch in zip(self._ends.tolist(), self._batches, strict=True):
            first = end - batch.num_rows
            for name in self.columns:
                values = batch.column(name)
                bad = self._null(name, values)
                if bad.any() and on_bad_row == "fail":
                    raise DataError(
                        f"{self._where(first + int(bad.argmax()))}: {name} is {self._wrong(name)}; "
                        "mend it, or leave such rows out with on_bad_row=skip"
                    )
                if on_bad_row == "skip":
                    bad |= _undecodable(name, values)
                good[first:end] &= ~bad
        return np.flatnonzero(good)

    def _null(self, name: str, values: pa.Array) -> NDArray[np.bool_]:
        names = self._names.get(name)
        if names is not None:
            outside = pc.or_(pc.less(values, 0), pc.greater_equal(values, len(names)))
            found = pc.fill_null(outside, True)
        elif pa.types.is_struct(values.type):
            found = pc.is_null(pc.struct_field(values, "bytes"))
        else:
            found = pc.is_null(values, nan_is_null=True)
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=bool)

    def _wrong(self, name: str) -> str:
        return "null or no number of a class" if name in self._names else "null"

    def _values(self, name: str, array: pa.Array, raw: NDArray[np.int64]) -> list[Any]:
        """As rows hold them; `raw` says which rows of the files they are."""
        try:
            values: list[Any] = array.to_pylist()
        except UnicodeDecodeError as error:
            bad = next(i for i in range(len(array)) if not _is_text(array[i]))
            raise DataError(
                f"{self._where(int(raw[bad]))}: {name} is no UTF-8 ({error}); mend it, or leave such rows out "
                "with on_bad_row=skip"
            ) from error
        if name == "image":
            return values
        names = self._names.get(name)
        return [as_text(value) for value in values] if names is None else [names[value] for value in values]

    def _fingerprint(self) -> str:
        footers = [f"{shard.digest}/{group}" for shard, group in self._groups]
        columns = json.dumps(self._shards[0].columns, sort_keys=True)
        kept = b"" if self._kept is None else self._kept.astype("<i8").tobytes()
        return digest(*footers, columns, kept)


def mapped(path: Path, batches: Iterator[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """The batches from the Arrow file at `path`, mapped into memory; written first if it is not there."""
    try:
        return _open_mapped(path)
    except (OSError, pa.ArrowInvalid):
        pass  # not there yet, or cut short by a full disk
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(temporary, batches)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}): make room there, or name another folder in "
            "TREELORA_CACHE"
        ) from error
    return _open_mapped(path)


def _open_mapped(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    first = next(batches)
    with path.open("xb") as file:
        with pa.ipc.new_file(file, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _cache() -> Path:
    return Path(os.environ.get("TREELORA_CACHE") or Path.home() / ".cache" / "treelora_ray") / "arrow"


def _cast(batch: pa.RecordBatch, schema: pa.Schema, name: str) -> pa.RecordBatch:
    try:
        return batch.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{name} has columns of other types than the shards before it ({error})") from error


def _class_names(shards: Sequence[Shard], columns: Mapping[str, str]) -> dict[str, list[str]]:
    found = shards[0].class_names()
    for shard in shards[1:]:
        if shard.class_names() != found:
            raise DataError(f"{shard.name} names classes in another way than {shards[0].name}: write both alike")
    return {name: found[name] for name in columns if name in found}


def _undecodable(name: str, values: pa.Array) -> NDArray[np.bool_]:
    """Rows that hold something, but no image and no text that can be read."""
    if name == "image":
        return np.array([value is not None and not _is_image(value) for value in values.to_pylist()])
    try:
        values.to_pylist()
    except UnicodeDecodeError:
        return np.array([not _is_text(value) for value in values])
    return np.zeros(len(values), dtype=bool)


def _is_image(value: Any) -> bool:
    try:
        decode(value)
    except DataError:
        return False
    return True


def _is_text(value: pa.Scalar[Any]) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True
