"""The workers that train together, as training sees them."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Comm(Protocol):
    """The workers that train together."""

    rank: int
    workers: int

    def sum_(self, tensor: Tensor) -> None:
        """Adds up a tensor over all workers, in place."""

    def share(self, value: T) -> T:
        """What worker 0 gives, on all workers."""

    def gather(self, value: T) -> list[T]:
        """What each worker gives, by rank, on all workers."""


class Alone:
    rank, workers = 0, 1

    def sum_(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def share(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]
