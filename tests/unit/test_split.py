import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from treelora_ray.config import StreamConfig
from treelora_ray.data.errors import DataError
from treelora_ray.data.images import decode
from treelora_ray.data.rows import column, distinct
from treelora_ray.data.split import PRESETS
from treelora_ray.data.stream import fingerprints, open_stream
from treelora_ray.data.task import TaskStream

CLASSES = [f"class {letter}" for letter in "gfedcba"]  # an order of their own, unlike the sorted one
CIFAR10 = Path(__file__).parents[2].parent / "shared" / "data" / "split_cifar10"


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, labels: list[Any], image: str = "img", label: str = "fine_label", named: bool = True) -> None:
    """As the hub writes images and classes."""
    images = [{"bytes": png(i % 256), "path": None} for i in range(len(labels))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(images, kind), label: labels, "coarse_label": [0] * len(labels)})
    if named:
        feature = {label: {"names": CLASSES, "_type": "ClassLabel"}, image: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=16)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """7 classes, 6 training rows of each in two shards, 2 test rows of each."""
    labels = [i % 7 for i in range(42)]
    write(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", labels[:20])
    write(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", labels[20:])
    write(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", labels[:14])
    return tmp_path / "hub"


def opened(folder: Path, seed: int = 0, **settings: Any) -> TaskStream:
    given: dict[str, Any] = {"source": "split", "path": str(folder), "image": "img", "label": "fine_label"}
    return open_stream(StreamConfig(**(given | settings)), seed)


def test_classes_come_together_in_the_order_of_their_numbers(hub: Path) -> None:
    stream = opened(hub, classes_per_task=3, class_order="given")
    assert stream.kind == "image"
    assert stream.names == ("classes-00", "classes-01", "classes-02")
    assert [task.labels for task in stream.tasks] == [tuple(CLASSES[:3]), tuple(CLASSES[3:6]), tuple(CLASSES[6:])]
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(18, 6), (18, 6), (6, 2)]


def test_every_row_is_in_the_task_of_its_class_and_in_no_other(hub: Path) -> None:
    stream = opened(hub, classes_per_task=2)
    found = []
    for task in stream.tasks:
        assert distinct(task.train, "label") == distinct(task.test, "label") == set(task.labels)
        found += [task.train.where(i) for i in range(len(task.train))]
    assert len(found) == len(set(found)) == 42
    (image,) = stream.tasks[0].train.take([0], ["image"])["image"]
    assert getattr(decode(image), "size", None) == (4, 4)


def test_a_random_order_of_classes_depends_on_the_seed(hub: Path) -> None:
    def classes(seed: int) -> list[tuple[str, ...]]:
        return [task.labels for task in opened(hub, seed, classes_per_task=2).tasks]

    assert classes(1) == classes(1)
    assert len({str(classes(seed)) for seed in range(8)}) == 8
    assert sorted(name for group in classes(4) for name in group) == sorted(CLASSES)


def test_classes_of_the_list_without_rows_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "s" / "train.parquet", [5, 5, 1, 1])
    write(tmp_path / "s" / "test.parquet", [5, 1])
    stream = opened(tmp_path / "s", classes_per_task=1, class_order="given")
    assert [task.labels for task in stream.tasks] == [(CLASSES[1],), (CLASSES[5],)]


def test_without_names_classes_are_sorted_or_in_the_order_of_meta(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "s" / f"{split}.parquet", ["10", "9", "b"], named=False)

    def given() -> list[str]:
        tasks = opened(tmp_path / "s", classes_per_task=1, class_order="given").tasks
        return [label for task in tasks for label in task.labels]

    assert given() == ["9", "10", "b"]
    (tmp_path / "s" / "meta.json").write_text('{"classes": ["b", "9", "10", "none"]}')
    assert given() == ["b", "9", "10"]
    (tmp_path / "s" / "meta.json").write_text('{"classes": ["b", "9"]}')
    with pytest.raises(DataError, match="rows of classes that its list lacks: 10"):
        given()


def test_a_data_set_of_one_split_is_cut_by_the_seed_with_its_share_of_each_class(tmp_path: Path) -> None:
    labels = [0] * 20 + [1] * 3 + [2] * 2
    write(tmp_path / "s" / "test.parquet", labels)

    def cut(seed: int) -> list[tuple[list[str], list[str]]]:
        tasks = opened(tmp_path / "s", seed, classes_per_task=1, class_order="given").tasks
        return [tuple([rows.where(i) for i in range(len(rows))] for rows in (t.train, t.test)) for t in tasks]  # type: ignore[misc]

    assert [(len(train), len(test)) for train, test in cut(0)] == [(16, 4), (2, 1), (1, 1)]
    assert cut(0) == cut(0)
    assert cut(0)[0] != cut(1)[0]
    for train, test in cut(0):
        assert not set(train) & set(test)
    write(tmp_path / "s" / "test.parquet", [0] * 20 + [1] * 20)
    places = [sorted(int(row.rpartition(" ")[2]) % 20 for row in test) for _, test in cut(0)]
    assert places[0] != places[1]
    write(tmp_path / "s" / "test.parquet", [*labels, 3])
    with pytest.raises(DataError, match="class 'class d' has one row only"):
        cut(0)


def test_a_preset_knows_columns_and_classes_of_a_task(hub: Path) -> None:
    stream = opened(hub, preset="cifar100", image="image", label="label")
    assert stream.names == ("cifar100-00",)
    assert opened(hub, preset="cifar100", image="image", label="label", classes_per_task=4).names == (
        "cifar100-00",
        "cifar100-01",
    )


def test_settings_of_the_columns_go_before_those_of_a_preset(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "s" / f"{split}.parquet", [0, 1], image="picture", label="fine_label")
    stream = opened(tmp_path / "s", preset="cifar100", image="picture", label="label")
    assert stream.tasks[0].train.columns == ("image", "label")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_addresses_of_the_hub(preset: str) -> None:
    """The address parses to a data set, the branch of converted files and a folder there, without the network."""
    import huggingface_hub

    class Offline(huggingface_hub.HfFileSystem):
        def _repo_and_revision_exist(self, *_: Any) -> tuple[bool, None]:
            return True, None

    assert PRESETS[preset].address.startswith("hf://")
    found: Any = Offline(skip_instance_cache=True).resolve_path(PRESETS[preset].address.removeprefix("hf://"))
    assert found.repo_type == "dataset"
    assert found.revision == "refs/convert/parquet"
    assert found.path_in_repo in ("cifar100", "default")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None, "classes_per_task": 2}, r"needs a path, or a preset \(cifar100, imagenet-r, cub200\)"),
        ({}, "needs classes_per_task"),
        ({"preset": "cifar1000"}, "there is no preset 'cifar1000': use cifar100, imagenet-r, cub200"),
        (
            {"classes_per_task": 2, "image": "image"},
            "needs columns 'image' and 'fine_label' or 'text' and 'fine_label'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(hub: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(hub, **settings)


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Parquet files of a split: looked for train.parquet, train-\*.parquet"):
        opened(tmp_path, classes_per_task=2)


@pytest.mark.parametrize(
    ("test", "message"), [([0, 1, 2], "classes that no training row has: class e"), ([0], "no rows of classes")]
)
def test_classes_of_one_split_only_are_named(tmp_path: Path, test: list[int], message: str) -> None:
    write(tmp_path / "s" / "train.parquet", [0, 1])
    write(tmp_path / "s" / "test.parquet", test)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "s", classes_per_task=2)


def test_texts_are_split_as_images_are(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [2, 0, 1]}), tmp_path / f"{split}.parquet")
    stream = opened(tmp_path, text="text", label="label", classes_per_task=2, class_order="given")
    assert stream.kind == "text"
    assert [column(task.train, "text") for task in stream.tasks] == [["b", "c"], ["a"]]


def test_limits_and_fingerprints_go_by_task(hub: Path) -> None:
    stream = opened(hub, classes_per_task=3, class_order="given", rows=4, test_rows=3, tasks=["classes-01"])
    assert [(f["name"], f["train"], f["test"]) for f in fingerprints(stream)] == [("classes-01", 4, 3)]
    other = opened(hub, 1, classes_per_task=3)
    assert fingerprints(other)[0]["digest"] != fingerprints(opened(hub, 2, classes_per_task=3))[0]["digest"]


@pytest.mark.slow
def test_split_cifar10_is_five_tasks_of_two_classes() -> None:
    if not CIFAR10.exists():
        pytest.skip(f"there is no {CIFAR10}")
    stream = opened(CIFAR10, image="image", label="label", classes_per_task=2, class_order="given")
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(2000, 400)] * 5
    assert stream.tasks[0].labels == ("airplane", "automobile")
    values = stream.tasks[3].train.take(np.arange(0, 2000, 10))
    assert {getattr(decode(image), "size", None) for image in values["image"]} == {(32, 32)}
