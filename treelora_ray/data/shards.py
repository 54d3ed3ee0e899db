"""Parquet files wherever they lie: finding those of a split, their footers, their row groups."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from treelora_ray.data.errors import DataError
from treelora_ray.data.rows import digest
from treelora_ray.store import SCHEMES, with_secrets

# Where a split of a data set may lie: as written here, as the hub lays out uploads, and its converted branch.
LAYOUTS = (
    "{split}.parquet",
    "{split}-*.parquet",
    "{split}/*.parquet",
    "data/{split}-*.parquet",
    "*/{split}-*.parquet",
    "*/{split}/*.parquet",
)


@dataclass(frozen=True)
class Shard:
    """One Parquet file. It is opened anew for each row group: a data set may have thousands of files."""

    name: str
    filesystem: Any
    local: bool
    columns: Mapping[str, str]
    """Names of rows to columns of the file."""
    metadata: pq.FileMetaData
    digest: str
    """Of the footer and the size of the file."""

    @property
    def groups(self) -> int:
        return int(self.metadata.num_row_groups)

    @property
    def rows(self) -> int:
        return int(self.metadata.num_rows)

    @cached_property
    def schema(self) -> pa.Schema:
        return self.metadata.schema.to_arrow_schema()

    def rows_of(self, group: int) -> int:
        return int(self.metadata.row_group(group).num_rows)

    def bytes_of(self, group: int) -> int:
        return int(self.metadata.row_group(group).total_byte_size)

    def start_of(self, group: int) -> int:
        return sum(self.rows_of(before) for before in range(group))

    def class_names(self) -> dict[str, list[str]]:
        """By name of rows, what the `datasets` library notes in the schema: the classes that integers stand for."""
        try:
            features = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        except (ValueError, KeyError, TypeError):
            return {}
        found = {}
        for name, column in self.columns.items():
            feature = features.get(column) if isinstance(features, dict) else None
            names = feature.get("names") if isinstance(feature, dict) else None
            if isinstance(names, list) and names and pa.types.is_integer(self.schema.field(column).type):
                found[name] = [str(each) for each in names]
        return found

    def read(self, group: int, size: int) -> Iterator[pa.RecordBatch]:
        """Batches of at most `size` rows, with the names of rows for columns."""
        names, columns = list(self.columns), list(self.columns.values())
        try:
            with self.filesystem.open(self.name, "rb") as file:
                parquet = pq.ParquetFile(file, metadata=self.metadata, page_checksum_verification=True)
                for batch in parquet.iter_batches(size, row_groups=[group], columns=sorted(set(columns))):
                    arrays = [batch.column(column) for column in columns]
                    yield pa.RecordBatch.from_arrays(arrays, names=names)
        except Exception as error:  # Arrow's, the operating system's, or a remote filesystem's own
            problem = "is damaged" if _is_damage(error) else "cannot be read"
            raise _GroupError(
                f"{self.name}: row group {group} {problem} ({' '.join(str(error).split())}); fetch the file again"
                + (", or leave such row groups out with on_bad_row=skip" if _is_damage(error) else "")
            ) from error

    def readable(self, group: int) -> bool:
        """Whether a row group is whole. A file that is out of reach is an error, not a damaged row group."""
        try:
            for _ in self.read(group, 1024):
                pass
        except _GroupError as error:
            if error.__cause__ is not None and _is_damage(error.__cause__):
                return False
            raise
        return True


class _GroupError(DataError):
    pass


def open_shards(path: str, columns: Mapping[str, str]) -> list[Shard]:
    """Files at `path` (a file, a folder, a pattern; local or of any filesystem fsspec knows), in order of names."""
    filesystem, place = open_filesystem(path)
    names = _files(filesystem, place)
    if not names:
        raise DataError(f"there is no Parquet file {path}: check the path")
    return [_open(filesystem, name, columns) for name in names]


def open_filesystem(path: str) -> tuple[Any, str]:
    """The filesystem of a path or address, and the path there."""
    from fsspec.core import url_to_fs

    scheme = urlsplit(path).scheme
    if with_secrets(path):
        raise DataError("the address of the data holds a user, a password or a key: leave them to the environment")
    if scheme in SCHEMES and re.search(r"\?\w+=", path):
        raise DataError(f"{path}: the address of data takes no ?options; set AWS_ENDPOINT_URL, AWS_REGION and such")
    try:
        filesystem, place = url_to_fs(path)
    except (ImportError, ValueError) as error:
        if scheme not in SCHEMES or not isinstance(error, ImportError):
            raise DataError(f"{path} cannot be opened: {error}") from error
        from treelora_ray.data.buckets import open_bucket

        filesystem, place = open_bucket(path)
    return filesystem, place


def addresses(filesystem: Any, names: Iterable[Any]) -> list[str]:
    """What `open_filesystem` takes, for paths on a filesystem."""
    return [str(name) if is_local(filesystem) else str(filesystem.unstrip_protocol(name)) for name in names]


def is_local(filesystem: Any) -> bool:
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple | list) else [filesystem.protocol]
    return "file" in protocols


def find_split(folder: str, splits: Sequence[str]) -> str | None:
    """Address of the first of these splits that a data set has; of its files, where there are several."""
    filesystem, _ = open_filesystem(folder)
    for split in splits:
        for layout in LAYOUTS:
            path = f"{folder.rstrip('/')}/{layout.format(split=split)}"
            if _files(filesystem, open_filesystem(path)[1]):
                return path
    return None


def _files(filesystem: Any, place: str) -> list[str]:
    try:
        if filesystem.isfile(place):
            return [place]
        found = filesystem.glob(f"{place}/*.parquet") if filesystem.isdir(place) else filesystem.glob(place)
    except FileNotFoundError:
        return []
    except Exception as error:  # each remote filesystem has errors of its own
        raise DataError(f"{place} cannot be listed ({error}): check the address, the network and access") from error
    return sorted(str(name) for name in found if str(name).endswith(".parquet"))


def _open(filesystem: Any, name: str, columns: Mapping[str, str]) -> Shard:
    try:
        with filesystem.open(name, "rb") as file:
            metadata = pq.ParquetFile(file).metadata
            size = file.seek(0, 2)
            file.seek(-8, 2)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, 2)
            footer = file.read(length)
    except pa.ArrowException as error:
        raise DataError(f"{name} is no whole Parquet file ({error}): fetch or write it again") from error
    except Exception as error:
        raise DataError(f"{name} cannot be read ({error}): check the path, the network and access") from error
    shard = Shard(name, filesystem, is_local(filesystem), columns, metadata, digest(footer, str(size)))
    _check_columns(shard)
    return shard


def _check_columns(shard: Shard) -> None:
    present = shard.schema.names
    for name, column in shard.columns.items():
        if column not in present:
            raise DataError(f"{shard.name} has no column {column!r} (for {name}); it has {', '.join(present)}")
        kind = shard.schema.field(column).type
        if not (_is_image(kind) if name == "image" else _is_text(kind)):
            wanted = "images as bytes, or as the hub's struct of bytes and path" if name == "image" else "texts"
            raise DataError(f"column {column!r} of {shard.name} holds {kind} where {name} needs {wanted}")


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "bytes" in names and _is_image(kind.field(names.index("bytes")).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating)
    return pa.types.is_boolean(kind) or any(test(kind) for test in tests)


def _is_damage(error: BaseException) -> bool:
    """Of the data itself: Arrow raises bare OSErrors for it, filesystems give theirs a number or a class."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
