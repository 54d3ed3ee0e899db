"""The built-in stream: handwritten digits, turned into families of related tasks.

A task shows nine of the ten digits of scikit-learn's collection on a noisy 16 x 16 canvas, in a look of its own,
and asks which one a picture shows. Tasks of one family share a transformation of the pictures and differ in their
digits; loners have a transformation of their own; the pair `permuted` shares a transformation and asks for groups of
digits, each of its tasks for different ones. Pictures of the backbone's pre-training, of training and of test come
from source images kept apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treelora_ray.data.errors import DataError
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Source, Task, TaskStream

Pictures = NDArray[np.float32]  # [n, 16, 16], 0 .. 1
SIZE = 16
TASKS, ROWS, TEST_ROWS = 12, 1600, 300
APART = {"pretrain": (0, 500), "train": (500, 1350), "test": (1350, 1797)}  # places in a fixed shuffle
NOISE, FRAME = 0.04, 0.6


def _shuffled(pictures: Pictures) -> Pictures:
    """Quarters of quarters change places, the same way in every picture."""
    order = np.random.default_rng(11).permutation(16)
    patches = pictures.reshape(-1, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4, 4)[:, order]
    return patches.reshape(-1, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, SIZE, SIZE)


def _edges(pictures: Pictures) -> Pictures:
    down, right = np.diff(pictures, axis=1, append=0), np.diff(pictures, axis=2, append=0)
    return np.clip(np.hypot(down, right), 0, 1)


def _sheared(pictures: Pictures) -> Pictures:
    return np.stack([np.roll(pictures[:, row], row - SIZE // 2, axis=1) for row in range(SIZE)], axis=1)


def _striped(pictures: Pictures) -> Pictures:
    """Two rows as they are, two rows negative, and so on."""
    bright = (np.arange(SIZE) % 4 < 2).astype(np.float32)[:, None]
    found: Pictures = np.abs(pictures - bright)
    return found


def _combed(pictures: Pictures) -> Pictures:
    """Every other column first, then the rest."""
    return np.concatenate([pictures[:, :, ::2], pictures[:, :, 1::2]], axis=2)


TRANSFORMS: dict[str, Callable[[Pictures], Pictures]] = {
    "plain": lambda x: x,
    "rotated": lambda x: np.rot90(x, axes=(1, 2)),
    "negative": lambda x: 1 - x,
    "shuffled": _shuffled,
    "flipped": lambda x: x[:, ::-1],
    "edges": _edges,
    "sheared": _sheared,
    "striped": _striped,
    "combed": _combed,
    "turned": lambda x: 1 - np.rot90(x, 3, axes=(1, 2)),
    "rows": lambda x: np.concatenate([x[:, ::2], x[:, 1::2]], axis=1),
}


@dataclass(frozen=True)
class Recipe:
    name: str
    family: str
    transform: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple("or".join(map(str, group)) for group in self.groups)


def _order(key: int) -> list[int]:
    return [int(digit) for digit in np.random.default_rng(key).permutation(10)]


def _pairs(key: int) -> tuple[tuple[int, ...], ...]:
    """Eight of the digits in four pairs."""
    order = _order(key)
    return tuple(tuple(sorted(order[at : at + 2])) for at in range(0, 8, 2))


def _member(family: str, number: int, key: int) -> Recipe:
    """Each digit by itself, but for one: each member of a family lacks another."""
    lacking = _order(key)[number]
    return Recipe(f"{family}-{number}", family, family, tuple((digit,) for digit in range(10) if digit != lacking))


def recipes() -> list[Recipe]:
    """All tasks there are, in their order; a stream takes the first so many."""

    def loner(name: str, key: int) -> Recipe:
        return replace(_member(name, 4, key), name=name)

    pair = [Recipe(f"permuted-{n}", "permuted", "sheared", _pairs(key)) for n, key in enumerate((21, 22))]
    first = [
        _member("striped", 0, 1), _member("turned", 0, 2), loner("edges", 8), _member("striped", 1, 1),
        pair[0], _member("turned", 1, 2), _member("striped", 2, 1), loner("shuffled", 9),
        _member("turned", 2, 2), pair[1], _member("striped", 3, 1), _member("turned", 3, 2),
    ]  # fmt: skip
    more = [_member(family, 4, key) for key, family in enumerate(("striped", "turned"), start=1)]
    for key, family in enumerate(("plain", "flipped", "combed", "rotated", "rows", "negative"), start=4):
        more += [_member(family, n, key + 10) for n in range(5)]
    more += [Recipe(f"permuted-{n}", "permuted", "sheared", _pairs(20 + n)) for n in (3, 4, 5, 6)]
    # Interleaved, so that a relative seldom follows directly.
    return first + [more[place] for step in range(4) for place in range(step, len(more), 4)]


@cache
def _source() -> tuple[Pictures, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order] / 16).astype(np.float32), found.target[order].astype(np.int64)


def draw(digits: NDArray[np.int64], split: str, rng: np.random.Generator) -> Pictures:
    """A picture of each digit: a source image of the split, somewhere on the canvas."""
    images, targets = _source()
    low, high = APART[split]
    canvas = np.zeros((len(digits), SIZE, SIZE), np.float32)
    where = {digit: low + np.flatnonzero(targets[low:high] == digit) for digit in range(10)}
    for row, digit in enumerate(digits.tolist()):
        image = images[rng.choice(where[digit])]
        large = np.repeat(np.repeat(image, 3, 0), 3, 1)[::2, ::2]  # 12 x 12
        top, left = rng.integers(1, 4, 2)
        canvas[row, top : top + 12, left : left + 12] = large * rng.uniform(0.6, 1.0)
    return canvas


def frames(rng: np.random.Generator, count: int = 1) -> Pictures:
    """Random patterns of 0 and 1 in the outer two pixels."""
    found = rng.integers(0, 2, (count, SIZE, SIZE)).astype(np.float32)
    found[:, 2:-2, 2:-2] = 0
    return found


def spoil(pictures: Pictures, rng: np.random.Generator, frame: Pictures) -> NDArray[np.uint8]:
    """Frame and noise, as bytes."""
    framed = pictures + FRAME * frame * (1 - 2 * pictures)  # towards grey
    spoiled = framed + rng.normal(0, NOISE, pictures.shape)
    return (np.clip(spoiled, 0, 1) * 255).round().astype(np.uint8)


def _rows(recipe: Recipe, split: str, count: int, seed: int) -> MemoryRows:
    number = [other.name for other in recipes()].index(recipe.name)
    rng = np.random.default_rng([seed, number, split == "test"])
    labels = rng.permutation(np.arange(count) % len(recipe.groups))
    digits = np.array([rng.choice(recipe.groups[label]) for label in labels])
    frame = frames(np.random.default_rng([77, number]))
    pictures = spoil(np.ascontiguousarray(TRANSFORMS[recipe.transform](draw(digits, split, rng))), rng, frame)
    columns: dict[str, list[Any]] = {"image": list(pictures), "label": [recipe.labels[label] for label in labels]}
    return MemoryRows(columns)


def digits_source(seed: int = 0, rows: int | None = None, test_rows: int | None = None, tested: bool = True) -> Source:
    """All tasks there are; the seed decides which pictures they show.

    Where they are not `tested` no test picture is made, and training rows stand in.
    """
    known = {recipe.name: recipe for recipe in recipes()}

    def open_task(name: str) -> Task:
        train = _rows(known[name], "train", rows or ROWS, seed)
        test = _rows(known[name], "test", test_rows or TEST_ROWS, seed) if tested else train
        return Task(name, train, test, known[name].labels, known[name].family)

    return Source(tuple(known), open_task)


def digits_stream(
    tasks: int = TASKS, seed: int = 0, rows: int | None = None, test_rows: int | None = None
) -> TaskStream:
    """The first tasks of the stream."""
    source = digits_source(seed, rows, test_rows)
    if not 1 <= tasks <= len(source.names):
        raise DataError(f"the digits stream has 1 to {len(source.names)} tasks, not {tasks}")
    return TaskStream(tuple(source.open(name) for name in source.names[:tasks]), "image")
