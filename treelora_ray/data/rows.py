"""Rows of a task: columns of equal length, any rows of which can be taken at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treelora_ray.data.errors import DataError

Indices: TypeAlias = "Sequence[int] | NDArray[np.int64]"
CHUNK = 4096  # rows taken at once where all are gone through


class Rows(Protocol):
    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str:
        """Short hash that changes when the rows do; the same wherever they lie."""

    @property
    def skipped(self) -> int:
        """Rows left out because they could not be read."""

    def __len__(self) -> int: ...

    def take(self, indices: Indices, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
        """Values by column (all columns, or these), in the order asked for; repeats are allowed."""

    def where(self, index: int) -> str:
        """Where a row comes from, for messages: its file and its number there, from 0."""


class MemoryRows:
    """Columns held as lists."""

    skipped = 0

    def __init__(self, columns: Mapping[str, Sequence[Any]], fingerprint: str | None = None, source: str = "") -> None:
        """`source` is what `where` names; without `fingerprint` one is made of all values."""
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"columns must be of one length, got {sizes or 'none'}")
        self._values = {name: list(values) for name, values in columns.items()}
        self._source = source or "rows in memory"
        self.columns = tuple(columns)
        self.fingerprint = fingerprint or _digest_of_values(self._values)

    def __len__(self) -> int:
        return len(self._values[self.columns[0]])

    def take(self, indices: Indices, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
        wanted = checked(indices, len(self)).tolist()
        return {name: [self._values[name][i] for i in wanted] for name in columns or self.columns}

    def where(self, index: int) -> str:
        return f"{self._source}, row {index}"


class SubsetRows:
    """Some rows of others, in the order of `indices`; `skipped` were left out because they could not be read."""

    def __init__(self, rows: Rows, indices: Indices, skipped: int = 0) -> None:
        self._rows = rows
        self._indices = checked(indices, len(rows))
        self.columns = rows.columns
        self.skipped = rows.skipped + skipped
        self.fingerprint = digest(rows.fingerprint, self._indices.astype("<i8").tobytes())

    def __len__(self) -> int:
        return len(self._indices)

    def take(self, indices: Indices, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
        return self._rows.take(self._indices[checked(indices, len(self))], columns)

    def where(self, index: int) -> str:
        return self._rows.where(int(self._indices[index]))


class ConcatRows:
    """Rows one after another; `extra` adds columns that hold one value in each part."""

    def __init__(self, parts: Sequence[Rows], extra: Mapping[str, Sequence[Any]] | None = None) -> None:
        if not parts:
            raise DataError("there is nothing to concatenate: give at least one set of rows")
        for part in parts[1:]:
            if set(part.columns) != set(parts[0].columns):
                raise DataError(f"rows of columns {parts[0].columns} and {part.columns} cannot be concatenated")
        self._parts = tuple(parts)
        self._extra = {name: list(values) for name, values in (extra or {}).items()}
        for name, values in self._extra.items():
            if len(values) != len(parts) or name in parts[0].columns:
                raise DataError(f"extra column {name!r} must be new and have {len(parts)} values, got {len(values)}")
        self._ends = np.cumsum([len(part) for part in parts])
        self.columns = (*parts[0].columns, *self._extra)
        self.skipped = sum(part.skipped for part in parts)
        self.fingerprint = digest(*(part.fingerprint for part in parts), _digest_of_values(self._extra))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: Indices, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
        names = tuple(columns or self.columns)
        own = [name for name in names if name not in self._extra]

        def take_part(number: int, local: NDArray[np.int64]) -> dict[str, list[Any]]:
            found = self._parts[number].take(local, own) if own else {}
            return found | {name: [self._extra[name][number]] * len(local) for name in names if name in self._extra}

        return gather(checked(indices, len(self)), self._ends, names, take_part)

    def where(self, index: int) -> str:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part].where(int(index - (self._ends[part] - len(self._parts[part]))))


def gather(
    indices: NDArray[np.int64], ends: NDArray[Any], names: Sequence[str], take_part: Any
) -> dict[str, list[Any]]:
    """Rows of consecutive parts (that end at `ends`) in the order asked for.

    `take_part(number, local)` gives the values of one part; each part is asked once.
    """
    found: dict[str, list[Any]] = {name: [None] * len(indices) for name in names}
    numbers = np.searchsorted(ends, indices, side="right")
    starts = np.concatenate([[0], ends[:-1]])
    for number in np.unique(numbers).tolist():
        places = np.flatnonzero(numbers == number)
        taken = take_part(number, indices[places] - starts[number])
        for name in names:
            values = found[name]
            for place, value in zip(places.tolist(), taken[name], strict=True):
                values[place] = value
    return found


def distinct(rows: Rows, column: str) -> set[Any]:
    """The values that occur in a column, a chunk at a time."""
    values: set[Any] = set()
    for start in range(0, len(rows), CHUNK):
        values.update(rows.take(np.arange(start, min(start + CHUNK, len(rows))), [column])[column])
    return values


def column(rows: Rows, name: str) -> list[Any]:
    """One column whole."""
    return rows.take(np.arange(len(rows)), [name])[name]


def as_text(value: Any) -> str:
    """Whole floats as integers: a column of integers that once had gaps comes as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def checked(indices: Indices, count: int) -> NDArray[np.int64]:
    """As an array; a negative index is a mistake here, not a count from the end."""
    found = np.asarray(indices, dtype=np.int64).reshape(-1)
    if found.size and (found.min() < 0 or found.max() >= count):
        raise IndexError(f"rows are 0 to {count - 1}, asked for {found.min()} to {found.max()}")
    return found


def digest(*parts: str | bytes) -> str:
    """Short hash of the parts, and of where each ends."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()[:16]


def contents(rows: Rows, indices: Indices) -> str:
    """Short hash of the values of some rows. A fingerprint may trust what a file says of itself; this reads."""
    places = checked(indices, len(rows))
    parts = [_digest_of_values(rows.take(places[at : at + CHUNK])) for at in range(0, len(places), CHUNK)]
    return digest(*parts)


def _digest_of_values(columns: Mapping[str, Sequence[Any]]) -> str:
    parts: list[str | bytes] = []
    for name, values in columns.items():
        parts += [name, str(len(values))]
        for value in values:
            parts += _parts_of(value)
    return digest(*parts)


def _parts_of(value: Any) -> list[str | bytes]:
    if isinstance(value, np.ndarray):
        return [f"{value.dtype}{value.shape}", np.ascontiguousarray(value).tobytes()]
    if isinstance(value, bytes):
        return ["bytes", value]
    if isinstance(value, Mapping):
        return ["struct", *(part for key in sorted(value) for part in (str(key), *_parts_of(value[key])))]
    return [type(value).__name__, str(value)]
