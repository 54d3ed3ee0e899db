"""Object stores in the clothes of fsspec, where fsspec lacks a package of its own for them: pyarrow does the work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.implementations.arrow import ArrowFile, ArrowFSWrapper

from treelora_ray.data.errors import DataError
from treelora_ray.store import StoreError, StoreLostError, connected, explaining

_OPENED: dict[tuple[str, str | None], Bucket] = {}


def open_bucket(path: str) -> tuple[Bucket, str]:
    """The filesystem of an address s3:// or gs://, and the path there."""
    scheme, _, place = path.partition("://")
    address = f"{scheme}://{place.split('/')[0]}"
    key = (address, os.environ.get("AWS_ENDPOINT_URL"))
    if key not in _OPENED:
        with _telling(address):
            filesystem, _ = connected(re.split(r"[*?\[]", path)[0])
        _OPENED[key] = Bucket(filesystem, address)
    return _OPENED[key], place


class Bucket(ArrowFSWrapper):  # type: ignore[misc]
    """Says what is wrong where fsspec would say that nothing is there, and where Parquet would be called damaged."""

    def __init__(self, filesystem: Any, address: str, **options: Any) -> None:
        super().__init__(filesystem, **options)
        self.address = address

    def info(self, path: str, **options: Any) -> Any:
        with _telling(self.address):
            return super().info(path, **options)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        with _telling(self.address):
            return super().ls(path, detail, **options)

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> Any:
        with _telling(self.address):
            return _File(self, self.fs.open_input_file(path), path, mode, block_size, **options)


class _File(ArrowFile):  # type: ignore[misc]
    def read(self, *size: int) -> Any:
        with explaining(self.fs.address):
            return self.stream.read(*size)


@contextmanager
def _telling(address: str) -> Iterator[None]:
    try:
        with explaining(address):
            yield
    except (StoreError, StoreLostError) as error:
        raise DataError(str(error)) from error
