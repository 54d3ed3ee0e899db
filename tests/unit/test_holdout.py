"""Rows held out of training stand in for test rows, which nobody opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_stream import words, write_task
from treelora_ray.config import StreamConfig
from treelora_ray.data import digits
from treelora_ray.data.errors import DataError
from treelora_ray.data.parquet import ParquetRows
from treelora_ray.data.rows import MemoryRows, column
from treelora_ray.data.stream import held_out, open_stream, watched
from treelora_ray.data.task import Task, TaskStream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("imdb", "rte", "yelp"):
        write_task(tmp_path / "stream" / name, words(name, 40), words(name, 20))
    return tmp_path / "stream"


def opened(path: Path, seed: int = 0, **settings: Any) -> TaskStream:
    settings = {"source": "parquet", "path": str(path), "holdout": 0.25, **settings}
    return open_stream(StreamConfig(**settings), seed)


def split(task: Task) -> tuple[list[str], list[str]]:
    name = next(name for name in task.train.columns if name in ("text", "prompt"))
    return column(task.train, name), column(task.test, name)


@given(
    st.lists(st.sampled_from("abc"), min_size=2, max_size=40).filter(lambda x: len(x) > len(set(x))),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_what_is_held_out_and_what_is_left_are_all_rows_once_and_each_label_is_trained(
    labels: list[str], one: float, two: float, seed: int
) -> None:
    rows = MemoryRows({"text": [str(i) for i in range(len(labels))], "label": labels})
    task = Task("some", rows, rows, tuple(sorted(set(labels))))
    small, large = (held_out(task, share, seed) for share in sorted((one, two)))
    for made in (small, large):
        train, test = split(made)
        assert sorted(train + test, key=int) == [str(i) for i in range(len(labels))]
        assert train == sorted(train, key=int)
        assert test
        assert set(column(made.train, "label")) == set(labels)
    assert set(split(small)[1]) <= set(split(large)[1])
    most = len(labels) - len(set(labels))
    assert len(split(small)[1]) == min(most, max(1, round(min(one, two) * len(labels))))


@pytest.mark.parametrize("removed", ["test.parquet", "nothing"])
def test_test_rows_are_never_read(folder: Path, removed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in folder.rglob(removed):
        path.unlink()
    read: list[str] = []
    original = ParquetRows.__init__

    def noted(self: ParquetRows, path: str, *others: Any) -> None:
        read.append(Path(path).name)
        original(self, path, *others)

    monkeypatch.setattr(ParquetRows, "__init__", noted)
    for task in opened(folder).tasks:
        train, test = split(task)
        assert sorted(train + test) == sorted(words(task.name, 40)["text"])
        assert len(test) == 10
    assert read == ["train.parquet"] * 3


def test_the_draw_depends_on_seed_and_name_and_limits_come_after_it(folder: Path) -> None:
    whole = opened(folder)
    other = opened(folder, tasks=["yelp", "rte"], rows=12, test_rows=4)
    for task in other.tasks:
        train, test = split(next(each for each in whole.tasks if each.name == task.name))
        assert (len(task.train), len(task.test)) == (12, 4)
        assert set(split(task)[0]) < set(train)
        assert set(split(task)[1]) < set(test)
    held = [{text.split()[1] for text in split(task)[1]} for task in whole.tasks]
    assert held[0] != held[1]
    assert split(opened(folder, seed=1).tasks[0]) != split(whole.tasks[0])
    assert split(opened(folder).tasks[0]) == split(whole.tasks[0])


def test_without_it_a_stream_is_what_it_was(folder: Path) -> None:
    task = opened(folder, holdout=None).tasks[0]
    assert (len(task.train), len(task.test)) == (40, 20)


def test_prompts_need_no_labels(tmp_path: Path) -> None:
    rows = {"prompt": [f"p{i}" for i in range(10)], "answer": ["a"] * 10}
    write_task(tmp_path / "one", rows, rows)
    (tmp_path / "one" / "test.parquet").unlink()
    train, test = split(opened(tmp_path, holdout=0.3).tasks[0])
    assert len(test) == 3
    assert sorted(train + test) == sorted(rows["prompt"])


def test_a_task_with_one_row_of_each_label_says_what_to_do(tmp_path: Path) -> None:
    write_task(tmp_path / "few", words("few", 3), words("few", 3))
    with pytest.raises(DataError, match=r"'few' can be held out: .*; add rows, or leave out stream\.holdout"):
        opened(tmp_path)


@pytest.mark.parametrize(("files", "cut"), [(("train", "test"), 40), (("train",), 32)])
def test_of_a_data_set_cut_by_classes_no_row_of_its_test_share_is_given(
    files: tuple[str, ...], cut: int, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in files:
        pq.write_table(pa.table(words(name, 40, 4)), tmp_path / f"{name}.parquet")
    settings: dict[str, Any] = {"source": "split", "classes_per_task": 2}
    own = opened(tmp_path, holdout=None, **settings)
    stream = opened(tmp_path, **settings)
    for task, whole in zip(stream.tasks, own.tasks, strict=True):
        train, test = split(task)
        assert sorted(train + test) == sorted(split(whole)[0])
        assert not set(train + test) & set(split(whole)[1])
    assert sum(len(task.train) + len(task.test) for task in stream.tasks) == cut


def test_no_test_picture_of_the_digits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_stream(StreamConfig(tasks=2, rows=40, test_rows=8), 0)
    original = digits.draw

    def draw(wanted: Any, part: str, rng: Any) -> Any:
        assert part == "train"
        return original(wanted, part, rng)

    monkeypatch.setattr(digits, "draw", draw)
    stream = open_stream(StreamConfig(tasks=2, rows=40, holdout=0.25), 0)
    for task, other in zip(stream.tasks, whole.tasks, strict=True):
        assert (len(task.train), len(task.test)) == (30, 10)
        pictures = [image.tobytes() for image in column(task.train, "image") + column(task.test, "image")]
        assert sorted(pictures) == sorted(image.tobytes() for image in column(other.train, "image"))


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=40), st.integers(1, 20), st.integers(0, 9))
def test_rows_to_watch_are_not_trained_on_and_each_label_stays(labels: list[str], count: int, seed: int) -> None:
    rows = MemoryRows({"text": [str(i) for i in range(len(labels))], "label": labels})
    task = Task("some", rows, rows, tuple(sorted(set(labels))))
    if count > len(labels) - len(set(labels)) or 2 * count > len(labels):
        with pytest.raises(DataError, match=rf"stream.watch is {count}, which is too many for task 'some' with its"):
            watched(task, count, seed)
        return
    made = watched(task, count, seed)
    assert made.watch is not None
    assert len(made.watch) == count
    assert set(column(made.train, "label")) == set(labels)
    assert sorted(column(made.train, "text") + column(made.watch, "text"), key=int) == column(rows, "text")
    assert made.test is rows


def test_rows_are_watched_of_what_is_left_after_the_held_out_ones(folder: Path) -> None:
    held, both = opened(folder), opened(folder, watch=6)
    for one, other in zip(held.tasks, both.tasks, strict=True):
        assert split(one)[1] == split(other)[1]
        assert other.watch is not None
        assert sorted(split(other)[0] + column(other.watch, "text")) == sorted(split(one)[0])
    assert {task.watch for task in held.tasks} == {None}
