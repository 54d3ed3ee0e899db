"""One labelled data set cut into tasks by class: the class-incremental setting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treelora_ray.config import StreamConfig
from treelora_ray.data.batches import permuted
from treelora_ray.data.errors import DataError
from treelora_ray.data.parquet import ParquetRows
from treelora_ray.data.rows import Rows, SubsetRows, column
from treelora_ray.data.shards import find_split, open_shards
from treelora_ray.data.tables import checked_labels, exists, read_json
from treelora_ray.data.task import Source, Task, columns_of, ordered

TEST_SHARE = 0.2


@dataclass(frozen=True)
class Preset:
    """Where a known data set lies, what its columns are, and the usual number of classes of a task."""

    address: str
    image: str
    label: str
    classes_per_task: int


# The branch to which the hub converts every public data set: one layout, `config/split/0000.parquet`.
PRESETS = {
    "cifar100": Preset("hf://datasets/uoft-cs/cifar100@refs/convert/parquet/cifar100", "img", "fine_label", 10),
    # All of ImageNet-R is one split, so that the test share is cut off here. WordNet's ids tell classes apart.
    "imagenet-r": Preset("hf://datasets/axiong/imagenet-r@refs/convert/parquet/default", "image", "wnid", 20),
    "cub200": Preset(
        "hf://datasets/bentrevett/caltech-ucsd-birds-200-2011@refs/convert/parquet/default", "image", "label", 20
    ),
}


@dataclass(frozen=True)
class _Split:
    rows: Rows
    labels: NDArray[np.str_]

    def of(self, labels: tuple[str, ...]) -> Rows:
        return SubsetRows(self.rows, np.flatnonzero(np.isin(self.labels, labels)))


def split_source(config: StreamConfig, seed: int) -> Source:
    """Tasks of `classes_per_task` classes each, the last of what is left.

    Classes come in the order given (that of the numbers in the file's metadata, of `classes` in `meta.json`, or
    else sorted), or in an order drawn by the seed. A data set that has one split only is cut: a share of each
    class, drawn by the seed, becomes test rows (TEST_SHARE, at least one row, and at least one stays).
    """
    preset = _preset(config)
    folder = config.path or (preset.address if preset else None)
    if folder is None:
        raise DataError(f"source split needs a path, or a preset ({', '.join(PRESETS)})")
    per_task = config.classes_per_task or (preset.classes_per_task if preset else None)
    if per_task is None:
        raise DataError("source split needs classes_per_task: how many classes make a task")
    train, test, given = _open(folder, config, preset, seed)
    classes = _in_order(given, config, seed)
    prefix = config.preset or "classes"
    count = -(-len(classes) // per_task)
    digits = max(2, len(str(count - 1)))
    groups = {f"{prefix}-{i:0{digits}d}": classes[i * per_task : (i + 1) * per_task] for i in range(count)}

    def open_task(name: str) -> Task:
        return Task(name, train.of(groups[name]), test.of(groups[name]), groups[name])

    return Source(tuple(groups), open_task)


def _preset(config: StreamConfig) -> Preset | None:
    if config.preset is None:
        return None
    if config.preset not in PRESETS:
        raise DataError(f"there is no preset {config.preset!r}: use {', '.join(PRESETS)}, or a path")
    return PRESETS[config.preset]


def _open(
    folder: str, config: StreamConfig, preset: Preset | None, seed: int
) -> tuple[_Split, _Split, tuple[str, ...]]:
    """Training rows, test rows, and the classes in the order given."""
    train = find_split(folder, ["train"])
    test = find_split(folder, ["test", "validation"])
    first = train or test
    if first is None:
        raise DataError(
            f"{folder} has no Parquet files of a split: looked for train.parquet, train-*.parquet, train/*.parquet, "
            "the same in data/ and other folders there, and for test and validation"
        )
    columns = _columns(first, config, preset)
    rows = ParquetRows(first, columns, config.on_bad_row)
    whole = _labelled(rows)
    trained, tested = (whole, whole) if train and test else _cut(whole, seed)
    if config.holdout is not None:
        tested = trained
    elif train and test:
        tested = _labelled(ParquetRows(test, columns, config.on_bad_row))
    present = set(np.unique(trained.labels).tolist())
    if unseen := set(np.unique(tested.labels).tolist()) - present:
        raise DataError(
            f"{test} has classes that no training row has: {', '.join(ordered(unseen)[:10])}; add training rows of "
            "them, or leave these test rows out"
        )
    if untested := present - set(np.unique(tested.labels).tolist()):
        raise DataError(
            f"{test} has no rows of classes that training has: {', '.join(ordered(untested)[:10])}; add test rows"
        )
    return trained, tested, _given(folder, rows, present)


def _columns(path: str, config: StreamConfig, preset: Preset | None) -> dict[str, str]:
    """A preset's columns stand in for those left at their defaults."""
    defaults = StreamConfig.model_fields
    wanted = {"image": config.image, "text": config.text, "label": config.label}
    for name in ("image", "label") if preset else ():
        if wanted[name] == defaults[name].default:
            wanted[name] = getattr(preset, name)
    present = open_shards(path, {})[0].schema.names
    return columns_of(present, wanted, path)


def _labelled(rows: Rows) -> _Split:
    return _Split(rows, np.array(column(rows, "label"), dtype=np.str_))


def _cut(whole: _Split, seed: int) -> tuple[_Split, _Split]:
    held_out = np.zeros(len(whole.rows), dtype=bool)
    for label in np.unique(whole.labels).tolist():
        places = np.flatnonzero(whole.labels == label)
        if len(places) < 2:
            raise DataError(f"class {label!r} has one row only, which cannot be both trained and tested: add rows")
        share = max(1, round(TEST_SHARE * len(places)))
        held_out[places[permuted(np.arange(share), len(places), f"{seed}/test share/{label}")]] = True
    parts = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    train, test = (_Split(SubsetRows(whole.rows, part), whole.labels[part]) for part in parts)
    return train, test


def _given(folder: str, rows: ParquetRows, present: set[str]) -> tuple[str, ...]:
    listed = rows.label_names or _listed(folder) or ordered(present)
    if unknown := present - set(listed):
        raise DataError(f"{folder} has rows of classes that its list lacks: {', '.join(ordered(unknown)[:10])}")
    return tuple(label for label in listed if label in present)


def _listed(folder: str) -> tuple[str, ...] | None:
    path = f"{folder.rstrip('/')}/meta.json"
    meta = read_json(path) if exists(path) else None
    return checked_labels(meta["classes"], path) if isinstance(meta, dict) and "classes" in meta else None


def _in_order(given: tuple[str, ...], config: StreamConfig, seed: int) -> tuple[str, ...]:
    if config.class_order == "given":
        return given
    order = permuted(np.arange(len(given)), len(given), f"{seed}/classes")
    return tuple(given[i] for i in order.tolist())
