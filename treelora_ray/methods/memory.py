"""Rows that are remembered, and which of them a step looks at: functions of seed, task, row and step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from treelora_ray.data.batches import permuted
from treelora_ray.methods.learner import Ref


def draw(count: int, wanted: int, key: str) -> list[int]:
    """So many different ones of 0 .. count - 1, uniformly, in an order of their own; all where there are fewer."""
    if count == 0:
        return []
    found: list[int] = permuted(np.arange(min(wanted, count)), count, key).tolist()
    return found


def generator(key: str) -> torch.Generator:
    """Draws that depend on the key alone, and touch no others."""
    return torch.Generator().manual_seed(number(key))


def number(key: str) -> int:
    """63 bits that depend on the key alone: what a generator starts from, or the rank of a row."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


class Buffer:
    """Of all rows offered, those with the largest keys: in each group its share, and what small groups leave over.

    A row's key depends on seed, task and row alone. So what is kept is a uniform sample, and a function of the set of
    rows offered: neither order nor repeats, nor how many workers offer them, nor a restart makes a difference.
    """

    def __init__(self, seed: int, balanced: bool) -> None:
        self.seed, self.balanced = seed, balanced  # not balanced: all are one group
        self.groups: dict[int, list[tuple[int, Ref]]] = {}  # (minus the key, row), by falling key

    def key(self, ref: Ref) -> int:
        return number(f"{self.seed}/{ref}")

    def offer(self, rows: Iterable[tuple[Ref, int]], size: int) -> None:
        """Rows with their groups; of all that are there now, `size` stay."""
        new: dict[int, set[tuple[int, Ref]]] = {}
        for ref, group in rows:
            new.setdefault(group if self.balanced else 0, set()).add((-self.key(ref), ref))
        for group, more in new.items():
            self.groups[group] = sorted(more.union(self.groups.get(group, [])))
        for group, share in shares({group: len(kept) for group, kept in self.groups.items()}, size).items():
            del self.groups[group][share:]

    def rows(self) -> list[Ref]:
        """By group, in each by falling key."""
        return [ref for group in sorted(self.groups) for _, ref in self.groups[group]]

    def groups_of_rows(self) -> list[int]:
        return [group for group in sorted(self.groups) for _ in self.groups[group]]


def shares(sizes: Mapping[int, int], size: int) -> dict[int, int]:
    """By group how many of its rows stay: equal parts, the first groups one more, and what small groups leave over."""
    found, left, open_ = dict[int, int](), size, sorted(sizes)
    while open_:
        parts = {group: left // len(open_) + (place < left % len(open_)) for place, group in enumerate(open_)}
        small = [group for group in open_ if sizes[group] <= parts[group]]
        if not small:
            return found | parts
        found |= {group: sizes[group] for group in small}
        left -= sum(sizes[group] for group in small)
        open_ = [group for group in open_ if group not in small]
    return found
