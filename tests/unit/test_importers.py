import io
import json
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from treelora_ray.config import StreamConfig
from treelora_ray.data import tables
from treelora_ray.data.errors import DataError
from treelora_ray.data.folders import TRACE_SCORES
from treelora_ray.data.importers import describe, import_labels, import_table, import_trace
from treelora_ray.data.rows import MemoryRows, column
from treelora_ray.data.stream import open_stream
from treelora_ray.data.tables import read_table
from treelora_ray.data.task import Task, TaskStream
from treelora_ray.objectives.scores import SCORES

TEXT = {"text": "sentence", "label": "label"}


def write(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    for name in ("20Minuten", "FOMC", "C-STANCE", "Extra", "Py150"):
        for split, count in (("train", 4), ("eval", 2), ("test", 3)):
            rows = [{"prompt": f"{name} {split} {i}: größer?", "answer": f"A{i}"} for i in range(count)]
            write(tmp_path / "trace" / name / f"{split}.json", rows)
    return tmp_path / "trace"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    for place in ("TC/agnews", "SC/yelp"):
        folder = tmp_path / "labels" / place
        rows = [{"sentence": f"{place} {i}", "label": ["World", "Business"][i % 2]} for i in range(6)]
        write(folder / "train.json", rows)
        write(folder / "test.json", rows[:2])
    write(tmp_path / "labels" / "TC" / "agnews" / "labels.json", ["World", "Sports", "Business"])
    return tmp_path / "labels"


def opened(source: Any, path: Path, **settings: Any) -> TaskStream:
    return open_stream(StreamConfig(source=source, path=str(path), **settings), 0)


def same(one: TaskStream, other: TaskStream) -> None:
    assert [(t.name, t.labels, t.score, t.family) for t in one.tasks] == [
        (t.name, t.labels, t.score, t.family) for t in other.tasks
    ]
    for a, b in zip(one.tasks, other.tasks, strict=True):
        assert a.train.take(range(len(a.train))) == b.train.take(range(len(b.train)))
        assert a.test.take(range(len(a.test))) == b.test.take(range(len(b.test)))


def test_trace_folders_are_a_stream_in_the_order_of_trace_with_its_scores(trace: Path) -> None:
    stream = opened("trace", trace)
    assert stream.kind == "prompt"
    assert {task.name: task.score for task in stream.tasks} == {
        "C-STANCE": "accuracy",
        "FOMC": "accuracy",
        "Py150": "edit-similarity",
        "20Minuten": "sari",
        "Extra": "accuracy",
    }
    assert stream.names == ("C-STANCE", "FOMC", "Py150", "20Minuten", "Extra")
    assert stream.tasks[1].test.take([2, 0]) == {
        "prompt": ["FOMC test 2: größer?", "FOMC test 0: größer?"],
        "answer": ["A2", "A0"],
    }


def test_every_score_of_trace_exists() -> None:
    assert set(TRACE_SCORES.values()) <= set(SCORES)


def test_imported_trace_folders_are_the_same_stream(trace: Path, tmp_path: Path) -> None:
    import_trace(str(trace), str(tmp_path / "native"))
    same(opened("parquet", tmp_path / "native"), opened("trace", trace))


def test_folders_of_labels_are_a_stream_in_the_order_of_their_lists(labels: Path) -> None:
    stream = opened("labels", labels)
    assert stream.kind == "text"
    assert stream.names == ("agnews", "yelp")
    assert stream.tasks[0].labels == ("World", "Sports", "Business")
    assert stream.tasks[1].labels == ("Business", "World")
    assert stream.tasks[1].train.take([3]) == {"text": ["SC/yelp 3"], "label": ["Business"]}


def test_imported_folders_of_labels_are_the_same_stream(labels: Path, tmp_path: Path) -> None:
    write(labels / "meta.json", [{"task": "yelp", "family": "sentiment"}])
    import_labels(str(labels), str(tmp_path / "native"))
    same(opened("parquet", tmp_path / "native"), opened("labels", labels))


def test_remote_folders_are_read_as_local_ones(labels: Path) -> None:
    for path in labels.rglob("*.json"):
        with fsspec.open(f"memory://bench/{path.relative_to(labels)}", "wb") as file:
            file.write(path.read_bytes())
    same(open_stream(StreamConfig(source="labels", path="memory://bench"), 0), opened("labels", labels))


def test_folders_without_what_they_need_are_refused(trace: Path, labels: Path) -> None:
    (trace / "FOMC" / "test.json").unlink()
    assert len(opened("trace", trace, tasks=["FOMC"]).tasks[0].test) == 2  # its eval.json
    (trace / "FOMC" / "eval.json").unlink()
    with pytest.raises(DataError, match=r"FOMC has no test.json or eval.json"):
        opened("trace", trace)
    write(labels / "again" / "yelp" / "train.json", [])
    with pytest.raises(DataError, match=r"SC/yelp and .*again/yelp are both named 'yelp'"):
        opened("labels", labels)


def test_an_import_never_writes_over_a_task(trace: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "native")
    import_trace(str(trace), target)
    with pytest.raises(DataError, match="already has a task 'C-STANCE'"):
        import_trace(str(trace), target)


def test_an_import_of_bad_rows_writes_nothing(trace: Path, tmp_path: Path) -> None:
    write(trace / "Extra" / "test.json", [{"prompt": "a"}, {"prompt": "b", "answer": "c"}])
    with pytest.raises(DataError, match=r"Extra/test.json, row 0: answer is missing or null"):
        import_trace(str(trace), str(tmp_path / "native"))
    assert not (tmp_path / "native").exists()
    tasks = import_trace(str(trace), str(tmp_path / "native"), on_bad_row="skip")
    assert {task.name: task.test.skipped for task in tasks}["Extra"] == 1


TABLES = {
    "t.csv": 'id,sentence,label\n1,"a, b\nc",007\n2,NA,x\n3,,y\n',
    "t.json": [
        {"sentence": "a, b\nc", "label": "007"},
        {"sentence": "NA", "label": "x"},
        {"sentence": "", "label": "y"},
    ],
    "t.jsonl": '{"sentence": "a, b\\nc", "label": "007"}\n\n{"sentence": "NA", "label": "x"}\n'
    '{"sentence": "", "label": "y"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_as_they_are_written(tmp_path: Path, name: str) -> None:
    rows = read_table(write(tmp_path / name, TABLES[name]), TEXT)
    assert rows.take([0, 1, 2]) == {"text": ["a, b\nc", "NA", ""], "label": ["007", "x", "y"]}
    assert rows.where(2) == f"{tmp_path / name}, row 2"


@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\r\0")), st.text('ab",\n ')), min_size=1
    )
)
@settings(max_examples=40, deadline=None)
def test_any_texts_survive_every_format(rows: list[tuple[str, str]]) -> None:
    import csv
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        records = [{"sentence": text, "label": label} for text, label in rows]
        write(path / "t.json", records)
        write(path / "t.jsonl", "\n".join(json.dumps(record, ensure_ascii=False) for record in records))
        with (path / "t.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["sentence", "label"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(records)
        found = [read_table(str(path / name), TEXT) for name in ("t.json", "t.jsonl", "t.csv")]
    for each in found:
        assert list(zip(column(each, "text"), column(each, "label"), strict=True)) == rows
    assert len({each.fingerprint for each in found}) == 1


def test_long_csv_files_are_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CSV_BLOCK", 100)
    lines = ["".join(f'"line {i}\nand, {i}",x\n' for i in range(start, start + 20)) for start in (0, 20)]
    path = write(tmp_path / "t.csv", "sentence,label\n" + lines[0] + "bad\n" + lines[1])
    rows = read_table(path, TEXT, "skip")
    assert column(rows, "text") == [f"line {i}\nand, {i}" for i in range(40)]
    assert rows.where(20) == f"{path}, row 21"


BAD = {
    "t.csv": ("sentence,label\na,x\nb\nc,y\nd,y,z\ne,x\n", [1, 3], "has 1 values where 2 are wanted"),
    "t.jsonl": (
        '{"sentence": "a", "label": "x"}\nnot json\n{"sentence": "c", "label": "y"}\n7\n'
        '{"sentence": "e", "label": "x"}',
        [1, 3],
        "cannot be parsed",
    ),
    "t.json": (
        [{"sentence": "a", "label": "x"}, {"sentence": None, "label": "x"}, {"sentence": "c", "label": "y"},
         {"sentence": ["d"], "label": "x"}, {"sentence": "e", "label": "x"}],
        [1, 3],
        "sentence is missing or null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_of_tables_are_named_or_left_out_and_counted(tmp_path: Path, name: str) -> None:
    content, bad, problem = BAD[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=re.escape(f"{path}, row {bad[0]}: {problem}")):
        read_table(path, TEXT)
    rows = read_table(path, TEXT, "skip")
    assert column(rows, "text") == ["a", "c", "e"]
    assert rows.skipped == len(bad)
    assert rows.where(2) == f"{path}, row 4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", {"sentence": []}, "must be a list of rows, got a dict"),
        ("t.json", "[{", "is no JSON"),
        ("t.json", "[" * 100_000, "is no JSON"),
        ("t.json", [], "has no column 'sentence'; it has none"),
        ("t.json", [{"text": "a", "label": "b"}], "has no column 'sentence'; it has text, label"),
        ("t.csv", "text,label\na,b\n", "has no column 'sentence'; it has text, label"),
        ("t.csv", "", "is no CSV file"),
        ("t.xlsx", "", r"must end in .parquet, .json, .jsonl, .csv"),
        ("t.pkl", "", r"must end in .parquet, .json, .jsonl, .csv"),
        ("t.jsonl", '{"sentence": "a"}\n{"label": "b"}', "row 0: label is missing or null"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / name, content), TEXT)
    with pytest.raises(DataError, match=r"there is no file .*gone.json"):
        read_table(str(tmp_path / "gone.json"), TEXT)


def test_tables_of_bad_rows_only_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", [{"sentence": None, "label": None}])
    with pytest.raises(DataError, match="no rows that can be read"):
        read_table(path, TEXT, "skip")


def test_two_tables_become_a_task_of_the_native_layout(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "sentence,label\na,10\nb,9\n")
    test = write(tmp_path / "test.jsonl", '{"sentence": "c", "label": 9}')
    target = str(tmp_path / "native")
    import_table(train, test, target, "sst", TEXT)
    import_table(train, train, target, "cola", TEXT)
    stream = opened("parquet", tmp_path / "native")
    assert stream.names == ("sst", "cola")
    assert stream.tasks[0].labels == ("9", "10")
    assert stream.tasks[0].test.take([0]) == {"text": ["c"], "label": ["9"]}
    assert not [path for path in (tmp_path / "native").rglob("*") if path.name.startswith(".")]
    with pytest.raises(DataError, match="columns must be text and label, image and label, or prompt and answer"):
        import_table(train, test, target, "x", {"text": "sentence"})
    with pytest.raises(DataError, match="task 'a/b' must be named in letters"):
        import_table(train, test, target, "a/b", TEXT)


def test_prompts_of_a_table_become_a_task_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", [{"q": "1+1", "a": 2}])
    import_table(path, path, str(tmp_path / "native"), "sums", {"prompt": "q", "answer": "a"})
    (task,) = opened("parquet", tmp_path / "native").tasks
    assert (task.labels, task.train.take([0])) == ((), {"prompt": ["1+1"], "answer": ["2"]})


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_images_of_a_table_get_the_layout_of_the_hub(tmp_path: Path) -> None:
    path = str(tmp_path / "raw.parquet")
    pq.write_table(pa.table({"pixels": [png(4, 4), png(6, 4)], "name": ["a", "b"]}), path)
    import_table(path, path, str(tmp_path / "native"), "shapes", {"image": "pixels", "label": "name"})
    stream = opened("parquet", tmp_path / "native")
    assert stream.kind == "image"
    assert stream.tasks[0].train.take([1])["image"] == [{"bytes": png(6, 4), "path": None}]


def test_a_stream_is_described_task_by_task() -> None:
    def texts(lengths: range) -> MemoryRows:
        return MemoryRows({"text": ["x" * n for n in lengths], "label": ["a"] * len(lengths)})

    one = Task("one", texts(range(0, 101)), texts(range(0, 3)), ("a",), "nli")
    assert describe(TaskStream((one,), "text")) == [
        {
            "task": "one", "kind": "text", "train": 101, "test": 3, "skipped": 0, "labels": ["a"], "family": "nli",
            "length_5": 5, "length_50": 50, "length_95": 95, "length_max": 100,
        }
    ]  # fmt: skip
    images = [{"bytes": png(5, 4), "path": None}, np.zeros((2, 9, 3), np.uint8)]
    rows = MemoryRows({"image": images, "label": ["a", "a"]})
    (described,) = describe(TaskStream((Task("two", rows, rows, ("a",)),), "image"))
    assert (described["smallest"], described["largest"]) == ([2, 5], [4, 9])


def test_a_description_of_damaged_images_names_the_row(tmp_path: Path) -> None:
    path = str(tmp_path / "native" / "one")
    Path(path).mkdir(parents=True)
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": [png(2, 2), b"none"], "label": ["a", "a"]}), f"{path}/{split}.parquet")
    with pytest.raises(DataError, match=r"one/train.parquet, row 1: has an image that cannot be decoded"):
        describe(opened("parquet", tmp_path / "native"))
