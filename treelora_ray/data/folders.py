"""Streams that lie in folders, one folder for each task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from treelora_ray.config import StreamConfig
from treelora_ray.data.errors import DataError
from treelora_ray.data.parquet import ParquetRows
from treelora_ray.data.rows import Rows
from treelora_ray.data.shards import addresses, find_split, open_filesystem, open_shards
from treelora_ray.data.tables import checked_labels, first_of, read_labels, read_meta, read_table, task_folders
from treelora_ray.data.task import Source, Task, columns_of, labelled

# The score that TRACE's tasks are measured with, which is their order as well.
TRACE_SCORES = {
    "C-STANCE": "accuracy",
    "FOMC": "accuracy",
    "MeetingBank": "rouge-l",
    "Py150": "edit-similarity",
    "ScienceQA": "first-character",
    "NumGLUE-cm": "accuracy",
    "NumGLUE-ds": "accuracy",
    "20Minuten": "sari",
}


def parquet_source(folder: str, config: StreamConfig) -> Source:
    """Folders `task/train.parquet`, `task/test.parquet` (or shards of these), in the order of `meta.json` or sorted."""
    meta = read_meta(folder)
    filesystem, place = open_filesystem(folder)
    if not filesystem.isdir(place):
        raise DataError(f"there is no folder {folder}: check the path")
    below = [f["name"].rstrip("/") for f in filesystem.ls(place, detail=True) if f["type"] == "directory"]
    folders = {path.rpartition("/")[2]: path for path in addresses(filesystem, sorted(below))}
    names = tuple(meta) + tuple(name for name in folders if name not in meta and _holds_split(folders[name]))
    if not names:
        raise DataError(f"{folder} has no folders of tasks with train.parquet and test.parquet in them")

    def open_task(name: str) -> Task:
        splits = ("train", "test") if config.holdout is None else ("train",)
        paths = [find_split(f"{folder}/{name}", [split]) for split in splits]
        for path, split in zip(paths, splits, strict=True):
            if path is None:
                raise DataError(f"task {name!r} has no {folder}/{name}/{split}.parquet, nor shards of it: add it")
        wanted = {each: getattr(config, each) for each in ("image", "text", "label", "prompt", "answer")}
        columns = columns_of(open_shards(str(paths[0]), {})[0].schema.names, wanted, str(paths[0]))
        rows = [ParquetRows(str(path), columns, config.on_bad_row) for path in paths]
        train, test = rows[0], rows[-1]
        about = meta.get(name, {})
        if "label" not in columns:
            return Task(name, train, test, (), about.get("family"), about.get("score", "accuracy"))
        listed = about.get("labels")
        labels = checked_labels(listed, f"{folder}/meta.json") if listed else read_labels(f"{folder}/{name}")
        return labelled(name, train, test, labels, about.get("family"))

    return Source(names, open_task)


def trace_source(folder: str, config: StreamConfig) -> Source:
    """TRACE's folders: `task/train.json`, `task/test.json`, lists of prompt and answer."""
    folders = task_folders(folder, "train.json")
    meta = read_meta(folder)
    columns = {"prompt": config.prompt, "answer": config.answer}

    def open_task(name: str) -> Task:
        train, test = _tables(folders[name], ["test.json", "eval.json"], columns, config)
        about = meta.get(name, {})
        score = about.get("score", TRACE_SCORES.get(name, "accuracy"))
        return Task(name, train, test, (), about.get("family"), score)

    return Source(_first(folders, [*meta, *TRACE_SCORES]), open_task)


def labels_source(folder: str, config: StreamConfig) -> Source:
    """The long-sequence benchmark's folders: lists of sentence and label, `labels.json` their order."""
    folders = task_folders(folder, "train.json")
    meta = read_meta(folder)
    # Its files say `sentence`; another name in the settings is the user's own.
    text = "sentence" if config.text == StreamConfig.model_fields["text"].default else config.text
    columns = {"text": text, "label": config.label}

    def open_task(name: str) -> Task:
        train, test = _tables(folders[name], ["test.json", "dev.json"], columns, config)
        return labelled(name, train, test, read_labels(folders[name]), meta.get(name, {}).get("family"))

    return Source(_first(folders, list(meta)), open_task)


def _tables(folder: str, tests: Sequence[str], columns: Mapping[str, str], config: StreamConfig) -> tuple[Rows, Rows]:
    train = read_table(f"{folder}/train.json", columns, config.on_bad_row)
    if config.holdout is not None:
        return train, train
    return train, read_table(first_of(folder, tests), columns, config.on_bad_row)


def _holds_split(folder: str) -> bool:
    return find_split(folder, ["train"]) is not None


def _first(names: Iterable[str], order: Sequence[str]) -> tuple[str, ...]:
    """Names in this order, those it lacks behind."""
    found = list(names)
    return tuple(name for name in dict.fromkeys([*order, *found]) if name in found)
