"""Rows that are remembered, and which of them a step looks at: functions of seed, task, row and step alone."""

from __future__ import annotations

import hashlib

import numpy as np

from treelora_ray.data.batches import permuted


def draw(count: int, wanted: int, key: str) -> list[int]:
    """So many different ones of 0 .. count - 1, uniformly, in an order of their own; all where there are fewer."""
    if count == 0:
        return []
    found: list[int] = permuted(np.arange(min(wanted, count)), count, key).tolist()
    return found


def walk(count: int, per_step: int, step: int, key: str) -> list[int]:
    """A step's share of 0 .. count - 1, gone through again and again in a new order each time."""
    places = np.arange(step * per_step, (step + 1) * per_step)
    return [int(permuted(np.array([p % count]), count, f"{key}/{p // count}")[0]) for p in places]


def number(key: str) -> int:
    """63 bits that depend on the key alone: what a generator starts from, or the rank of a row."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
