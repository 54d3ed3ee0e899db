"""Which rows of a task make which step, whatever the number of workers and wherever training resumes.

The order of an epoch depends on (seed, task, epoch) only, and is a permutation computed row by row: no
list of the rows is held, so that a task larger than memory needs none. A step takes the next `batch`
positions; worker r of K takes every K-th of these, from its r-th. So K workers together see the rows that
one would, each row once an epoch, and any step can be computed without the steps before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 12  # of the Feistel network: four would do for many rows, but show in tasks of a dozen
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """The steps of one task. `batch` is global: over all workers and all accumulation steps."""

    rows: int
    batch: int
    epochs: int
    seed: int
    task: str

    def __post_init__(self) -> None:
        for name in ("rows", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of task {self.task!r} must be at least 1, got {getattr(self, name)}")

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left: no row is dropped, none is taken twice."""
        return -(-self.rows // self.batch)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def at(self, step: int, rank: int = 0, workers: int = 1) -> Rows:
        """The rows of one step for one worker; a worker may get none of a short last step."""
        if not 0 <= step < self.steps:
            raise ValueError(f"task {self.task!r} has steps 0 to {self.steps - 1}, got {step}")
        if not 0 <= rank < workers:
            raise ValueError(f"rank must lie in 0 to {workers - 1}, got {rank}")
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.batch
        positions = np.arange(first, min(first + self.batch, self.rows))[rank::workers]
        return permuted(positions, self.rows, f"{self.seed}/{self.task}/{epoch}")

    def size(self, step: int) -> int:
        """Rows of a step over all workers: what a mean over the global batch divides by."""
        place = step % self.steps_per_epoch
        return min(self.batch, self.rows - place * self.batch)

    def walk(self, start: int = 0, rank: int = 0, workers: int = 1) -> Iterator[tuple[int, Rows]]:
        """(step, rows) from a step on."""
        for step in range(start, self.steps):
            yield step, self.at(step, rank, workers)


def permuted(positions: Rows, count: int, key: str) -> Rows:
    """Where a keyed permutation of 0 .. count - 1 puts the positions.

    A Feistel network permutes the smallest square power of two that holds `count`; what falls outside goes
    round again until it falls inside (cycle walking), at most four times in the mean.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.frombuffer(hashlib.shake_128(key.encode()).digest(8 * ROUNDS), dtype="<u8").astype(np.uint64)
    found = _feistel(positions.astype(np.uint64), keys, np.uint64(half), mask)
    while (outside := found >= count).any():
        found[outside] = _feistel(found[outside], keys, np.uint64(half), mask)
    return found.astype(np.int64)


def _feistel(x: NDArray[np.uint64], keys: NDArray[np.uint64], half: np.uint64, mask: np.uint64) -> NDArray[np.uint64]:
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
