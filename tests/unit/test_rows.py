import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from treelora_ray.data import parquet
from treelora_ray.data.errors import DataError
from treelora_ray.data.images import decode
from treelora_ray.data.parquet import ParquetRows
from treelora_ray.data.rows import ConcatRows, MemoryRows, Rows, SubsetRows, column, digest, distinct
from treelora_ray.data.shards import find_split

TEXT = {"text": "text", "label": "label"}
IMAGE = {"image": "image", "label": "label"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TREELORA_CACHE", str(folder))
    return folder / "arrow"


def texts(count: int, first: int = 0) -> dict[str, list[Any]]:
    numbers = range(first, first + count)
    return {"text": [f"text {i} " + "x" * (i % 7) for i in numbers], "label": [f"l{i % 3}" for i in numbers]}


def write(path: Path, columns: dict[str, Any], group: int = 10) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group, compression="snappy", use_dictionary=False)
    return str(path)


def png(shade: int, size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, "PNG")
    return file.getvalue()


def pictures(data: list[bytes | None]) -> dict[str, Any]:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(data)]
    return {"image": pa.array(structs, kind), "label": ["a"] * len(data)}


def damage(path: str, group: int) -> None:
    """Overwrites the data of a row group, and leaves the footer alone."""
    place = pq.ParquetFile(path).metadata.row_group(group).column(0)
    data = bytearray(Path(path).read_bytes())
    first = place.data_page_offset
    data[first : first + place.total_compressed_size] = b"\xff" * place.total_compressed_size
    Path(path).write_bytes(data)


def everything(rows: Rows) -> dict[str, list[Any]]:
    return rows.take(np.arange(len(rows)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.data())
def test_rows_of_a_mapped_file_are_those_of_one_held_in_memory(tmp_path: Path, data: st.DataObject) -> None:
    count, group = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 50))
    path = write(tmp_path / "train.parquet", texts(count), group)
    wanted = data.draw(st.lists(st.integers(0, count - 1), max_size=30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "BATCH", data.draw(st.integers(1, 40)))
        held = ParquetRows(path, TEXT)
        patch.setattr(parquet, "HELD_BYTES", 0)
        mapped = ParquetRows(path, TEXT)
    for rows in (held, mapped):
        assert everything(rows) == texts(count)
        assert rows.take(wanted) == {name: [values[i] for i in wanted] for name, values in texts(count).items()}
    assert held.fingerprint == mapped.fingerprint


def test_a_large_file_is_copied_once_a_batch_at_a_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "train.parquet", texts(500), group=20)
    monkeypatch.setattr(parquet, "HELD_BYTES", 100)
    written = []
    original = parquet._write

    def watched(target: Path, batches: Iterator[pa.RecordBatch]) -> None:
        def noted() -> Iterator[pa.RecordBatch]:
            for batch in batches:
                written.append(batch.num_rows)
                yield batch

        original(target, noted())

    monkeypatch.setattr(parquet, "_write", watched)
    first = ParquetRows(path, TEXT)
    assert written == [20] * 25
    again = ParquetRows(path, TEXT)
    assert len(written) == 25
    assert everything(first) == everything(again) == texts(500)
    (file,) = cache.iterdir()
    assert file.suffix == ".arrow"


def test_small_local_files_are_not_copied(tmp_path: Path, cache: Path) -> None:
    ParquetRows(write(tmp_path / "train.parquet", texts(30)), TEXT)
    assert not cache.exists()


def test_a_copy_that_was_cut_short_is_written_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "HELD_BYTES", 0)
    path = write(tmp_path / "train.parquet", texts(30))
    ParquetRows(path, TEXT)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert everything(ParquetRows(path, TEXT)) == texts(30)
    assert list(cache.iterdir()) == [file]


def test_a_copy_that_fails_leaves_nothing_behind(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "HELD_BYTES", 0)
    path = write(tmp_path / "train.parquet", texts(100))
    damage(path, 7)
    with pytest.raises(DataError, match="row group 7"):
        ParquetRows(path, TEXT)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "HELD_BYTES", 0)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written .* TREELORA_CACHE"):
        ParquetRows(write(tmp_path / "train.parquet", texts(9)), TEXT)


def test_a_fingerprint_changes_with_the_rows_but_not_with_the_place(tmp_path: Path) -> None:
    original = ParquetRows(write(tmp_path / "a.parquet", texts(30)), TEXT).fingerprint
    assert ParquetRows(write(tmp_path / "other" / "b.parquet", texts(30)), TEXT).fingerprint == original
    changed = [
        ParquetRows(write(tmp_path / "c.parquet", texts(30, first=1)), TEXT),
        ParquetRows(write(tmp_path / "d.parquet", texts(31)), TEXT),
        ParquetRows(str(tmp_path / "a.parquet"), {"text": "label", "label": "text"}),
    ]
    assert len({original, *(rows.fingerprint for rows in changed)}) == 4


def test_shards_follow_one_another_in_order_of_their_names(tmp_path: Path) -> None:
    for i in (1, 0, 2):
        write(tmp_path / "data" / f"train-0000{i}-of-00003.parquet", texts(15, first=15 * i))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", texts(5))
    path = find_split(str(tmp_path), ["train"])
    assert path is not None
    rows = ParquetRows(path, TEXT)
    assert everything(rows) == texts(45)
    assert rows.where(31).endswith("train-00002-of-00003.parquet, row 1")


def test_a_folder_of_shards_is_one_split(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0000.parquet", texts(4))
    write(tmp_path / "train" / "0001.parquet", texts(4, first=4))
    assert everything(ParquetRows(str(tmp_path / "train"), TEXT)) == texts(8)
    assert find_split(str(tmp_path), ["train"]) == f"{tmp_path}/train/*.parquet"
    assert find_split(str(tmp_path), ["test", "train"]) == f"{tmp_path}/train/*.parquet"
    assert find_split(str(tmp_path), ["test"]) is None


def test_shards_of_other_types_are_read_as_the_first(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"text": ["a"], "label": pa.array([1], pa.int64())})
    write(tmp_path / "1.parquet", {"text": pa.array(["b"], pa.large_string()), "label": pa.array([2], pa.int32())})
    assert everything(ParquetRows(str(tmp_path / "*.parquet"), TEXT)) == {"text": ["a", "b"], "label": ["1", "2"]}
    write(tmp_path / "2.parquet", {"text": ["c"], "label": ["three"]})
    with pytest.raises(DataError, match=r"2.parquet has columns of other types"):
        ParquetRows(str(tmp_path / "*.parquet"), TEXT)


def test_files_of_any_filesystem_are_copied_to_the_cache(tmp_path: Path, cache: Path) -> None:
    local = write(tmp_path / "train.parquet", texts(25))
    with fsspec.open("memory://rows/train.parquet", "wb") as file:
        file.write(Path(local).read_bytes())
    remote = ParquetRows("memory://rows/train.parquet", TEXT)
    assert everything(remote) == everything(ParquetRows(f"file://{local}", TEXT)) == texts(25)
    assert remote.fingerprint == ParquetRows(local, TEXT).fingerprint
    assert len(list(cache.iterdir())) == 1
    assert find_split("memory://rows", ["train"]) == "memory://rows/train.parquet"


def test_integers_with_names_of_classes_become_these(tmp_path: Path) -> None:
    feature = {"info": {"features": {"fine": {"names": ["apple", "worm"], "_type": "ClassLabel"}}}}
    table = pa.table({"words": ["a", "b", "c"], "fine": [1, 0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), tmp_path / "train.parquet")
    rows = ParquetRows(str(tmp_path / "train.parquet"), {"text": "words", "label": "fine"})
    assert column(rows, "label") == ["worm", "apple", "worm"]
    assert rows.label_names == ("apple", "worm")
    table = pa.table({"words": ["a", "b", "c", "d"], "fine": [1, -1, 2, None]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 1: label is null or no number of a class"):
        ParquetRows(str(tmp_path / "train.parquet"), {"text": "words", "label": "fine"})
    rows = ParquetRows(str(tmp_path / "train.parquet"), {"text": "words", "label": "fine"}, "skip")
    assert (column(rows, "label"), rows.skipped) == (["worm"], 3)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([1, 20], ["1", "20"]), ([1.0, 2.5], ["1", "2.5"]), ([True, False], ["True", "False"])],
)
def test_labels_are_texts_whatever_the_file_holds(tmp_path: Path, labels: list, expected: list[str]) -> None:
    path = write(tmp_path / "train.parquet", {"text": ["a", "b"], "label": labels})
    assert column(ParquetRows(path, TEXT), "label") == expected


@pytest.mark.parametrize("held", [0, 10**9])
def test_a_damaged_row_group_is_named_or_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(parquet, "HELD_BYTES", held)
    path = write(tmp_path / "train.parquet", texts(35))
    whole = ParquetRows(path, TEXT, "skip")
    damage(path, 1)
    if held:  # else the copy made while the file was whole serves: it has the same footer
        with pytest.raises(DataError, match=r"train.parquet: row group 1 is damaged .* on_bad_row=skip"):
            ParquetRows(path, TEXT)
    rows = ParquetRows(path, TEXT, "skip")
    assert (len(rows), rows.skipped, whole.skipped) == (25, 10, 0)
    assert column(rows, "text") == texts(10)["text"] + texts(15, first=20)["text"]
    assert rows.where(10) == f"{path}, row 20"
    assert rows.fingerprint != whole.fingerprint


def test_copies_of_what_differs_in_its_damage_or_columns_are_not_mixed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "HELD_BYTES", 0)
    paths = [write(tmp_path / f"{group}.parquet", texts(30)) for group in (0, 1)]
    for group, path in enumerate(paths):
        damage(path, group)
    found = [ParquetRows(path, TEXT, "skip") for path in paths]
    assert [rows.where(0).rpartition(" ")[2] for rows in found] == ["10", "0"]
    assert [column(rows, "text")[0].split()[1] for rows in found] == ["10", "0"]
    whole = write(tmp_path / "whole.parquet", texts(30))
    assert column(ParquetRows(whole, TEXT), "text") == texts(30)["text"]
    assert column(ParquetRows(whole, {"text": "label", "label": "text"}), "text") == texts(30)["label"]


def test_a_page_that_does_not_match_its_checksum_is_damaged(tmp_path: Path) -> None:
    path = str(tmp_path / "train.parquet")
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    pq.write_table(pa.table({"text": ["unmistakable"]}), path, write_page_checksum=True, **options)
    Path(path).write_bytes(Path(path).read_bytes().replace(b"unmistakable", b"unmistakably"))
    with pytest.raises(DataError, match=r"row group 0 is damaged .*checksum|CRC"):
        ParquetRows(path, {"text": "text"})


def test_a_fingerprint_notices_images_that_only_decoding_shows_to_be_bad(tmp_path: Path) -> None:
    found = []
    for name, data in (("a", [png(5), b"x" * len(png(5))]), ("b", [b"x" * len(png(5)), png(5)])):
        path = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table(pictures([*data])), path, compression="none", write_statistics=False)
        found.append(ParquetRows(path, IMAGE, "skip"))
    assert found[0].fingerprint != found[1].fingerprint


def test_a_file_out_of_reach_is_an_error_even_where_damage_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "train.parquet", texts(35))
    opened = fsspec.get_filesystem_class("file").open
    calls = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 2:
            raise ConnectionResetError(104, "connection reset by peer")
        return opened(*args, **options)

    monkeypatch.setattr(fsspec.get_filesystem_class("file"), "open", failing)
    with pytest.raises(DataError, match=r"row group 1 cannot be read .*connection reset"):
        ParquetRows(path, TEXT, "skip")


@pytest.mark.parametrize("held", [0, 10**9])
def test_nulls_are_named_at_opening_or_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(parquet, "HELD_BYTES", held)
    columns = texts(30)
    columns["text"][12] = columns["label"][25] = columns["label"][12] = None
    path = write(tmp_path / "train.parquet", columns)
    with pytest.raises(DataError, match=r"train.parquet, row 12: text is null; .* on_bad_row=skip"):
        ParquetRows(path, TEXT)
    floats = {"text": ["a", "b"], "label": [1.0, float("nan")]}
    assert column(ParquetRows(write(tmp_path / "nan.parquet", floats), TEXT, "skip"), "label") == ["1"]
    rows = ParquetRows(path, TEXT, "skip")
    kept = [i for i in range(30) if i not in (12, 25)]
    assert column(rows, "text") == [texts(30)["text"][i] for i in kept]
    assert [rows.where(i) for i in (11, 12)] == [f"{path}, row 11", f"{path}, row 13"]
    assert rows.skipped == 2


def test_images_that_cannot_be_decoded_are_left_out_at_opening_or_named_when_decoded(tmp_path: Path) -> None:
    data = [png(0), b"no image", png(60), png(90)[:-32], None, b""]
    path = write(tmp_path / "train.parquet", pictures(data))
    rows = ParquetRows(path, IMAGE, "skip")
    assert rows.skipped == 4
    assert [value["bytes"] for value in column(rows, "image")] == [png(0), png(60)]
    with pytest.raises(DataError, match="row 4: image is null"):
        ParquetRows(path, IMAGE)
    path = write(tmp_path / "train.parquet", pictures(data[:4]))
    strict = ParquetRows(path, IMAGE)
    assert len(strict) == 4
    with pytest.raises(DataError, match=r"train.parquet, row 3: has an image that cannot be decoded"):
        decode(strict.take([3])["image"][0], strict.where(3))


def test_texts_that_are_no_utf8_are_named_or_left_out(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", "grün".encode()], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = write(tmp_path / "train.parquet", {"text": bad, "label": ["a", "b", "c"]})
    with pytest.raises(DataError, match="row 1: text is no UTF-8"):
        ParquetRows(path, TEXT).take([2, 0, 1])
    rows = ParquetRows(path, TEXT, "skip")
    assert (column(rows, "text"), rows.skipped) == (["good", "grün"], 1)


def test_what_a_file_lacks_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", {"sentence": ["a"], "label": ["b"], "vector": [[1.0]]})
    with pytest.raises(DataError, match=r"no column 'text' \(for text\); it has sentence, label, vector"):
        ParquetRows(path, TEXT)
    with pytest.raises(DataError, match=r"holds list<.*> where text needs texts"):
        ParquetRows(path, {"text": "vector"})
    with pytest.raises(DataError, match="holds string where image needs images"):
        ParquetRows(path, {"image": "sentence"})
    with pytest.raises(DataError, match=r"there is no Parquet file .*/nowhere.parquet"):
        ParquetRows(str(tmp_path / "nowhere.parquet"), TEXT)
    with pytest.raises(DataError, match="has no rows"):
        ParquetRows(write(tmp_path / "empty.parquet", {"text": pa.array([], pa.string())}), {"text": "text"})
    (tmp_path / "page.parquet").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"page.parquet is no whole Parquet file"):
        ParquetRows(str(tmp_path / "page.parquet"), TEXT)
    with pytest.raises(DataError, match=r"nothing://x/train.parquet cannot be opened: Protocol not known"):
        ParquetRows("nothing://x/train.parquet", TEXT)


def test_a_split_of_bad_rows_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", {"text": pa.array([None, None], pa.string()), "label": ["a", "b"]})
    with pytest.raises(DataError, match="has no rows that can be read"):
        ParquetRows(path, TEXT, "skip")


def test_a_file_of_damaged_row_groups_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", texts(10))
    damage(path, 0)
    with pytest.raises(DataError, match="has no rows that can be read"):
        ParquetRows(path, TEXT, "skip")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_concatenated_rows_are_the_parts_one_after_another(sizes: list[int], data: st.DataObject) -> None:
    parts = [MemoryRows({"text": [f"{p}/{i}" for i in range(size)]}) for p, size in enumerate(sizes)]
    rows = ConcatRows(parts, {"task": [f"t{p}" for p in range(len(sizes))]})
    pairs = [(f"{p}/{i}", f"t{p}") for p, size in enumerate(sizes) for i in range(size)]
    assert len(rows) == len(pairs)
    wanted = data.draw(st.lists(st.integers(0, len(pairs) - 1))) if pairs else []
    taken = rows.take(wanted)
    assert list(zip(taken["text"], taken["task"], strict=True)) == [pairs[i] for i in wanted]
    assert rows.take(wanted, ["task"]) == {"task": taken["task"]}
    for i, (text, _) in enumerate(pairs):
        assert rows.where(i) == f"rows in memory, row {text.partition('/')[2]}"


@given(st.lists(st.integers(0, 9), max_size=20), st.data())
def test_a_subset_takes_the_rows_of_its_indices(indices: list[int], data: st.DataObject) -> None:
    whole = MemoryRows({"text": [str(i) for i in range(10)]}, source="page")
    rows = SubsetRows(whole, indices)
    assert column(rows, "text") == [str(i) for i in indices]
    if indices:
        place = data.draw(st.integers(0, len(indices) - 1))
        assert rows.where(place) == f"page, row {indices[place]}"
        assert distinct(rows, "text") == {str(i) for i in indices}


def test_subsets_and_concatenations_differ_in_their_fingerprints() -> None:
    a, b = MemoryRows({"text": ["x", "y"]}), MemoryRows({"text": ["x", "z"]})
    found: list[Rows] = [
        a, b, SubsetRows(a, [0, 1]), SubsetRows(a, [1, 0]), SubsetRows(a, [0]), ConcatRows([a, b]), ConcatRows([b, a]),
        ConcatRows([a, b], {"task": ["p", "q"]}),
    ]  # fmt: skip
    assert len({rows.fingerprint for rows in found}) == len(found)


@pytest.mark.parametrize(
    "other", [{"a": ["12", "3"]}, {"a": ["1", "23"], "b": ["", ""]}, {"a": [1, "23"]}, {"b": ["1", "23"]}]
)
def test_a_fingerprint_of_values_tells_them_apart(other: dict[str, list]) -> None:
    assert MemoryRows(other).fingerprint != MemoryRows({"a": ["1", "23"]}).fingerprint


def test_parts_of_a_digest_cannot_move_between_each_other() -> None:
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("abc", "")}) == 4


def test_what_was_left_out_is_counted_through_subsets_and_concatenations() -> None:
    rows = SubsetRows(MemoryRows({"text": ["a", "b", "c"]}), [0, 2], skipped=1)
    assert ConcatRows([rows, SubsetRows(rows, [1]), MemoryRows({"text": ["d"]})]).skipped == 2


def test_a_fingerprint_of_arrays_depends_on_their_pixels_and_shape() -> None:
    arrays = [np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), np.ones((2, 3), np.uint8)]
    assert len({MemoryRows({"image": [array]}).fingerprint for array in arrays}) == 3


def test_rows_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    whole = MemoryRows({"text": ["a", "b"]})
    every: list[Rows] = [whole, SubsetRows(whole, [0, 1]), ConcatRows([whole])]
    every.append(ParquetRows(write(tmp_path / "t.parquet", texts(2)), TEXT))
    for rows in every:
        with pytest.raises(IndexError, match="rows are 0 to 1, asked for 1 to 2"):
            rows.take([1, 2])
        with pytest.raises(IndexError):
            rows.take([-1])


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataError, match="columns must be of one length"):
        MemoryRows({"a": [1], "b": []})
    with pytest.raises(DataError, match="columns must be of one length, got none"):
        MemoryRows({})
    with pytest.raises(DataError, match="cannot be concatenated"):
        ConcatRows([MemoryRows({"a": [1]}), MemoryRows({"b": [1]})])
    with pytest.raises(DataError, match="extra column 'a' must be new"):
        ConcatRows([MemoryRows({"a": [1]})], {"a": [1]})
    with pytest.raises(DataError, match="nothing to concatenate"):
        ConcatRows([])


def test_images_are_decoded_from_structs_bytes_and_arrays() -> None:
    for value in (png(7), {"bytes": png(7), "path": "a.png"}):
        image = decode(value)
        assert not isinstance(image, np.ndarray)
        assert image.size == (4, 3)
        assert image.getpixel((0, 0)) == 7
    array = np.zeros((3, 4, 3), np.uint8)
    assert decode(array) is array


def test_no_file_is_opened_because_an_image_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    with pytest.raises(DataError, match="row 3: has no bytes of an image"):
        decode({"bytes": None, "path": str(tmp_path / "a.png")}, "x, row 3")


def test_images_that_unfold_to_huge_ones_are_refused() -> None:
    with pytest.raises(DataError, match=r"cannot be decoded .*decompression bomb"):
        decode(png(0, (12000, 12000)))


@pytest.mark.parametrize("value", [None, 3, "a.png", np.zeros((2, 2)), np.zeros(4, np.uint8), b"GIF89a"])
def test_what_is_no_image_is_refused(value: Any) -> None:
    with pytest.raises(DataError):
        decode(value)
