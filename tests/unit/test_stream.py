import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_ray.config import StreamConfig
from treelora_ray.data.errors import DataError
from treelora_ray.data.rows import MemoryRows, column
from treelora_ray.data.stream import fingerprints, limited, open_stream, selected
from treelora_ray.data.task import Task, TaskStream, labelled, ordered

FAMILIES = {"rte": "nli", "yelp": "sentiment", "imdb": "sentiment"}


def write_task(folder: Path, train: dict[str, list[Any]], test: dict[str, list[Any]]) -> None:
    folder.mkdir(parents=True)
    for split, columns in (("train", train), ("test", test)):
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")


def words(name: str, count: int, labels: int = 3) -> dict[str, list[Any]]:
    return {"text": [f"{name} {i}" for i in range(count)], "label": [f"l{i % labels}" for i in range(count)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks imdb, rte and yelp."""
    for name in FAMILIES:
        write_task(tmp_path / "stream" / name, words(name, 40), words(name, 20))
    return tmp_path / "stream"


def opened(path: Path, seed: int = 0, **settings: Any) -> TaskStream:
    return open_stream(StreamConfig(source="parquet", path=str(path), **settings), seed)


def memory(labels: list[str]) -> MemoryRows:
    return MemoryRows({"text": labels, "label": labels})


def test_a_folder_of_tasks_is_a_stream_in_order_of_their_names(folder: Path) -> None:
    (folder / "notes").mkdir()
    stream = opened(folder)
    assert stream.names == ("imdb", "rte", "yelp")
    assert stream.kind == "text"
    assert [task.labels for task in stream.tasks] == [("l0", "l1", "l2")] * 3
    assert column(stream.tasks[1].test, "text") == words("rte", 20)["text"]
    assert [task.family for task in stream.tasks] == [None] * 3


def test_meta_gives_order_labels_and_families(folder: Path) -> None:
    meta = [{"task": name, "family": family, "labels": ["l2", "l0", "l1"]} for name, family in FAMILIES.items()]
    (folder / "meta.json").write_text(json.dumps(meta[:2]))
    stream = opened(folder)
    assert stream.names == ("rte", "yelp", "imdb")
    assert [task.family for task in stream.tasks] == ["nli", "sentiment", None]
    assert [task.labels for task in stream.tasks] == [("l2", "l0", "l1")] * 2 + [("l0", "l1", "l2")]
    (folder / "imdb" / "labels.json").write_text('["l1", "l0", "l2"]')
    assert opened(folder).tasks[2].labels == ("l1", "l0", "l2")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"classes": []}, "must be a list"),
        ([{"name": "rte"}], "must be a list"),
        ([{"task": "rte"}, {"task": "rte"}], "lists a task twice"),
        ([{"task": "rte", "labels": "l0"}], "must be a list of names"),
        ([{"task": "rte", "labels": ["l0", "l1"]}], "labels that its list of labels does not have: 'l2'"),
        ([{"task": "gone"}], r"task 'gone' has no .*/gone/train.parquet"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_refused(folder: Path, meta: Any, message: str) -> None:
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=message):
        opened(folder)


def test_a_task_that_is_not_chosen_is_not_opened(folder: Path) -> None:
    (folder / "imdb" / "train.parquet").write_text("damaged")
    assert opened(folder, tasks=["yelp"]).names == ("yelp",)
    with pytest.raises(DataError, match=r"imdb/train.parquet is no whole Parquet file"):
        opened(folder)


def test_tasks_are_the_first_so_many_or_those_named_in_their_order(folder: Path) -> None:
    assert opened(folder, tasks=2).names == ("imdb", "rte")
    assert opened(folder, tasks=["yelp", "imdb"]).names == ("yelp", "imdb")


def test_a_random_order_depends_on_the_seed_alone(folder: Path) -> None:
    orders = {opened(folder, seed, order="random").names for seed in range(20)}
    assert len(orders) == 6
    assert opened(folder, 3, order="random").names == opened(folder, 3, order="random").names
    assert set(opened(folder, 3, order="random", tasks=2).names) == {"imdb", "rte"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["yelpp"], r"there is no task 'yelpp': did you mean yelp\?"),
        (["RTE"], r"did you mean rte\?"),
        (["qqq"], "use some of imdb, rte, yelp"),
        (["rte", "rte"], "each once, got rte, rte"),
        ([], "at least one task"),
        (4, "tasks must be 1 to 3"),
        (0, "tasks must be 1 to 3"),
    ],
)
def test_a_choice_of_tasks_that_there_are_not_is_refused(wanted: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        selected(["imdb", "rte", "yelp"], wanted)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 70), st.integers(0, 5))
def test_a_smaller_limit_draws_some_of_the_rows_of_a_larger_one(count: int, one: int, two: int, seed: int) -> None:
    rows = MemoryRows({"text": [str(i) for i in range(count)]})
    fewer, more = (
        [int(text) for text in column(limited(rows, most, seed, "yelp"), "text")] for most in sorted([one, two])
    )
    assert set(fewer) <= set(more)
    assert len(fewer) == min(count, one, two)
    assert fewer == sorted(fewer)


def test_drawn_rows_depend_on_seed_and_task_alone(folder: Path) -> None:
    def drawn(seed: int, name: str, **settings: Any) -> list[str]:
        task = next(t for t in opened(folder, seed, rows=9, test_rows=5, **settings).tasks if t.name == name)
        assert (len(task.train), len(task.test)) == (9, 5)
        return [text.rpartition(" ")[2] for text in column(task.train, "text")]

    alone = drawn(0, "yelp", tasks=["yelp"])
    assert drawn(0, "yelp") == drawn(0, "yelp", order="random") == alone
    assert drawn(1, "yelp") != alone
    assert drawn(0, "rte") != alone


def test_the_rows_a_seed_draws_never_change() -> None:
    """A run resumed with a newer version must find the same rows."""
    rows = MemoryRows({"text": [str(i) for i in range(30)]})
    assert column(limited(rows, 5, 7, "yelp/training rows"), "text") == ["5", "7", "9", "19", "25"]


def test_labels_stay_those_of_all_rows_under_a_limit(folder: Path) -> None:
    assert opened(folder, rows=1, tasks=1).tasks[0].labels == ("l0", "l1", "l2")


def test_columns_of_other_names_are_found_by_the_settings(tmp_path: Path) -> None:
    columns = {"q": ["a", "b"], "a": ["x", "y"]}
    write_task(tmp_path / "s" / "ask", columns, columns)
    with pytest.raises(DataError, match=r"needs columns 'image' and 'label' or 'text' and 'label' or 'prompt' and"):
        opened(tmp_path / "s")
    stream = opened(tmp_path / "s", prompt="q", answer="a")
    assert stream.kind == "prompt"
    assert stream.tasks[0].labels == ()
    assert stream.tasks[0].train.take([1]) == {"prompt": ["b"], "answer": ["y"]}
    assert opened(tmp_path / "s", text="q", label="a").kind == "text"


def test_images_make_a_stream_of_images(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"image": [{"bytes": b"x", "path": "a"}], "label": [3], "text": ["t"]}
    write_task(tmp_path / "s" / "one", columns, columns)
    stream = opened(tmp_path / "s")
    assert stream.kind == "image"
    assert stream.tasks[0].train.take([0]) == {"image": [{"bytes": b"x", "path": "a"}], "label": ["3"]}


def test_tasks_of_two_kinds_are_no_stream(folder: Path) -> None:
    columns = {"prompt": ["a"], "answer": ["x"]}
    write_task(folder / "ask", columns, columns)
    with pytest.raises(DataError, match=r"one kind, got .*'ask': 'prompt', 'imdb': 'text'"):
        opened(folder)


def test_scores_are_one_for_all_or_one_a_task(tmp_path: Path) -> None:
    columns = {"prompt": ["a"], "answer": ["x"]}
    for name in ("one", "two"):
        write_task(tmp_path / "s" / name, columns, columns)
    (tmp_path / "s" / "meta.json").write_text('[{"task": "one", "score": "rouge-l"}]')

    def scores(**settings: Any) -> list[str]:
        return [task.score for task in opened(tmp_path / "s", **settings).tasks]

    assert scores() == ["rouge-l", "accuracy"]
    assert scores(score="sari") == ["sari", "sari"]
    assert scores(score={"two": "sari"}) == ["rouge-l", "sari"]
    assert scores(score={"one": "accuracy"}) == ["accuracy", "accuracy"]
    with pytest.raises(DataError, match=r"score names a task 'too' .* did you mean two\?"):
        scores(score={"too": "sari"})


def test_rows_that_cannot_be_read_are_left_out_and_counted_when_asked(tmp_path: Path) -> None:
    write_task(tmp_path / "s" / "rte", {"text": ["a", None, "c"], "label": ["x", "x", None]}, words("rte", 3, 1))
    with pytest.raises(DataError, match="row 1: text is null"):
        opened(tmp_path / "s")
    with pytest.raises(DataError, match="test rows of labels that no training row has: 'l0'"):
        opened(tmp_path / "s", on_bad_row="skip")
    write_task(tmp_path / "t" / "rte", {"text": ["a", None, "c"], "label": ["l0", "x", None]}, words("rte", 3, 1))
    assert opened(tmp_path / "t", on_bad_row="skip").tasks[0].train.skipped == 2


def test_fingerprints_notice_other_rows_labels_and_tasks(folder: Path) -> None:
    first = fingerprints(opened(folder))
    assert [(f["name"], f["labels"], f["train"], f["test"]) for f in first] == [
        (name, ["l0", "l1", "l2"], 40, 20) for name in ("imdb", "rte", "yelp")
    ]
    assert fingerprints(opened(folder)) == first == json.loads(json.dumps(first))
    assert [f["digest"] for f in fingerprints(opened(folder, rows=40))] == [f["digest"] for f in first]
    assert fingerprints(opened(folder, rows=39))[0]["digest"] != first[0]["digest"]
    (folder / "meta.json").write_text('[{"task": "imdb", "labels": ["l1", "l0", "l2"]}]')
    relabelled = fingerprints(opened(folder))
    assert relabelled[0]["digest"] != first[0]["digest"]
    assert relabelled[1:] == first[1:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "parquet"}, "source parquet needs a path"),
        ({"source": "trace"}, "source trace needs a path"),
        ({"source": "parquet", "path": "nowhere/at/all"}, "there is no folder nowhere/at/all"),
        ({"source": "labels", "path": "nowhere/at/all"}, r"there is no train.json in nowhere/at/all"),
    ],
)
def test_a_source_that_is_not_there_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_stream(StreamConfig(**settings), 0)


def test_a_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match="has no folders of tasks"):
        opened(tmp_path)


def test_a_task_without_a_test_split_is_refused(folder: Path) -> None:
    (folder / "rte" / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"task 'rte' has no .*/rte/test.parquet"):
        opened(folder)


def test_labels_are_in_order_of_their_numbers_then_of_their_letters() -> None:
    assert ordered(["10", "9", "-1", "b", "a", "²"]) == ("-1", "9", "10", "a", "b", "²")
    assert labelled("t", memory(["10", "9"]), memory(["9"])).labels == ("9", "10")


def test_labels_in_test_that_training_never_shows_are_named() -> None:
    with pytest.raises(DataError, match="task 't' has test rows of labels that no training row has: 'b', 'c'; add"):
        labelled("t", memory(["a"]), memory(["a", "c", "b"]))
    assert labelled("t", memory(["a"]), memory(["a"]), ["z", "a"]).labels == ("z", "a")


def test_tasks_and_streams_are_checked() -> None:
    rows = memory(["a"])
    task = Task("one", rows, rows, ("a",))
    with pytest.raises(DataError, match="two tasks are named 'one'"):
        TaskStream((task, task), "text")
    with pytest.raises(DataError, match="no tasks"):
        TaskStream((), "text")
    with pytest.raises(DataError, match=r"training rows of task 'one' lack prompt, answer .* they have text, label"):
        TaskStream((task,), "prompt")
    with pytest.raises(DataError, match="task 'one' has no labels"):
        TaskStream((Task("one", rows, rows),), "text")
    with pytest.raises(DataError, match="task 'one' has no test rows"):
        TaskStream((Task("one", rows, memory([]), ("a",)),), "text")
    with pytest.raises(DataError, match=r"task '../up' must be named in letters"):
        Task("../up", rows, rows, ("a",))
    with pytest.raises(DataError, match="lists label 'a' twice"):
        Task("one", rows, rows, ("a", "a"))


def test_digits_are_the_first_tasks_or_those_named_with_the_same_rows() -> None:
    def digits(**settings: Any) -> TaskStream:
        return open_stream(StreamConfig(rows=8, test_rows=4, **settings), 3)

    stream = digits()
    assert (stream.kind, len(stream.tasks), len(stream.tasks[0].train)) == ("image", 12, 8)
    assert digits(tasks=5).names == stream.names[:5]
    named = digits(tasks=[stream.names[4], stream.names[1]])
    assert named.names == (stream.names[4], stream.names[1])
    assert fingerprints(named) == [fingerprints(stream)[4], fingerprints(stream)[1]]
    assert set(digits(order="random").names) == set(stream.names)
    assert digits(order="random").names != stream.names
    with pytest.raises(DataError, match="there is no task 'digits'"):
        digits(tasks=["digits"])
