"""Planted families: tasks whose kinship is known, to measure what a tree finds of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core.layout import IntArray, Layout
from treelora_ray.core.signature import Distance
from treelora_ray.core.store import SignatureStore

LAYERS, VALUES = 12, 64


@dataclass(frozen=True)
class Planted:
    """Signatures [n, layers * values] of tasks in random order, and each task's family; a loner has its own."""

    signatures: Tensor
    labels: IntArray
    layout: Layout

    @property
    def families(self) -> int:
        return len(np.unique(self.labels))

    def store(self, distance: Distance, dtype: torch.dtype = torch.float16) -> SignatureStore:
        store = SignatureStore(self.layout, distance, dtype)
        store.extend(self.signatures)
        return store


def planted(
    sizes: Sequence[int], noise: float, loners: int = 0, seed: int = 0, layers: int = LAYERS, values: int = VALUES
) -> Planted:
    """Family centre + noise: normal values, the noise `noise` times as long as a centre. A loner is a family of one.

    Two tasks of a family have cosine 1 / (1 + noise^2), up to chance.
    """
    rng, labels = _start([*sizes, *[1] * loners], seed)
    centres = rng.standard_normal((len(sizes) + loners, layers * values))
    own = rng.standard_normal((len(labels), layers * values))
    return _planted(centres[labels] + noise * own, labels, layers, values)


def planted_cosine(
    sizes: Sequence[int], cosine: float, loners: int = 0, seed: int = 0, layers: int = LAYERS, values: int = VALUES
) -> Planted:
    """Layer by layer sqrt(cosine) * f + sqrt(1 - cosine) * e, f the family's and e the task's own unit vector."""
    rng, labels = _start([*sizes, *[1] * loners], seed)
    centres = rng.standard_normal((len(sizes) + loners, layers, values))
    own = rng.standard_normal((len(labels), layers, values))
    centres /= np.linalg.norm(centres, axis=2, keepdims=True)
    own /= np.linalg.norm(own, axis=2, keepdims=True)
    return _planted(np.sqrt(cosine) * centres[labels] + np.sqrt(1 - cosine) * own, labels, layers, values)


def _start(sizes: Sequence[int], seed: int) -> tuple[np.random.Generator, IntArray]:
    rng = np.random.default_rng(seed)
    return rng, rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def _planted(signatures: np.ndarray, labels: IntArray, layers: int, values: int) -> Planted:
    flat = torch.from_numpy(signatures.reshape(len(labels), layers * values)).float()
    return Planted(flat, labels, Layout.of_sizes([values] * layers))


def as_labels(partition: Iterable[IntArray]) -> IntArray:
    """Groups of tasks 0 .. n - 1 -> the number of each task's group."""
    groups = list(partition)
    labels = np.full(sum(len(group) for group in groups), -1, np.int64)
    for number, group in enumerate(groups):
        labels[group] = number
    return labels


def adjusted_rand(labels_a: Sequence[int] | IntArray, labels_b: Sequence[int] | IntArray) -> float:
    """Adjusted Rand index of two partitions: 1 if they are equal, 0 in the mean over random ones."""
    a, b = (np.unique(labels, return_inverse=True)[1] for labels in (labels_a, labels_b))
    if len(a) != len(b):
        raise ValueError(f"the partitions are of {len(a)} and {len(b)} tasks")
    table = np.zeros((a.max(initial=-1) + 1, b.max(initial=-1) + 1))
    np.add.at(table, (a, b), 1)
    both, in_a, in_b = (_pairs(counts) for counts in (table, table.sum(1), table.sum(0)))
    every = _pairs(np.array([len(a)]))
    chance = in_a * in_b / every if every else 0.0
    most = (in_a + in_b) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def _pairs(counts: np.ndarray) -> float:
    return float((counts * (counts - 1) / 2).sum())
