import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from treelora_ray.core.errors import SnapshotError
from treelora_ray.files import JSON, load_snapshot, save_snapshot, write_atomically

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
META: dict[str, JSON] = {
    "version": 1,
    "scale": 0.1,
    "name": "Größe π\n\"'",
    "tree": [1, [2, None]],
    "on": {"a": True},
}


def small_tensors() -> dict[str, Tensor]:
    return {
        "halves": torch.tensor([[1.5, -2.0, 3.0], [0.0, 4.0, 5.0]], dtype=torch.float16),
        "numbers": torch.tensor([3, -1, 2**40]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(True),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        bits, expected_bits = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor))
        assert torch.equal(bits, expected_bits)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guide.snapshot"


@pytest.fixture
def saved(path: Path) -> bytes:
    save_snapshot(path, small_tensors(), META)
    return path.read_bytes()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "guide.snapshot"


def files_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class TestRoundTrip:
    @pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (4, 5), (2, 3, 4)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_every_dtype_and_shape(self, path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
        tensors = {"x": values.to(dtype)}
        save_snapshot(path, tensors, {})
        assert_same(load_snapshot(path)[0], tensors)

    def test_keeps_nan_infinities_and_negative_zero_bit_by_bit(self, path: Path) -> None:
        tensors = {"x": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])}
        save_snapshot(path, tensors, {})
        assert_same(load_snapshot(path)[0], tensors)

    def test_keeps_meta(self, path: Path, saved: bytes) -> None:
        assert saved
        assert load_snapshot(path)[1] == META

    @pytest.mark.parametrize("value", [float("inf"), -float("inf"), 5e-324, 2**70])
    def test_keeps_unusual_numbers_in_meta(self, path: Path, value: float) -> None:
        save_snapshot(path, {}, {"value": value})
        assert load_snapshot(path) == ({}, {"value": value})

    def test_nothing_at_all_is_a_snapshot(self, path: Path) -> None:
        save_snapshot(path, {}, {})
        assert load_snapshot(path) == ({}, {})

    @pytest.mark.parametrize("name", ["", " ", "a.b/c", "Σ–é", "snapshot", 'quote"\\'])
    def test_keeps_unusual_names(self, path: Path, name: str) -> None:
        tensors = {name: torch.ones(2)}
        save_snapshot(path, tensors, {name: name})
        assert_same(load_snapshot(path)[0], tensors)
        assert load_snapshot(path)[1] == {name: name}

    def test_tensors_that_share_memory_come_back_as_separate_tensors(self, path: Path) -> None:
        base = torch.arange(12.0)
        tensors = {
            "whole": base,
            "again": base,
            "slice": base[2:7],
            "overlapping": base[5:9],
            "strided": base[::3],
            "transposed": base.view(3, 4).T,
            "expanded": base[:1].expand(4),
        }
        save_snapshot(path, tensors, {})
        loaded, _ = load_snapshot(path)
        assert_same(loaded, tensors)
        loaded["whole"].zero_()
        assert torch.equal(loaded["again"], torch.arange(12.0))

    def test_parameters_that_need_gradients_can_be_saved(self, path: Path) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        save_snapshot(path, {"weight": weight}, {})
        assert_same(load_snapshot(path)[0], {"weight": weight})

    def test_names_come_back_sorted(self, path: Path) -> None:
        save_snapshot(path, {name: torch.ones(len(name)) for name in ("b", "aa", "c")}, {})
        assert list(load_snapshot(path)[0]) == ["aa", "b", "c"]

    def test_equal_snapshots_are_equal_files(self, tmp_path: Path) -> None:
        paths = [tmp_path / str(number) for number in range(20)]
        for place in paths:
            save_snapshot(place, small_tensors(), META)
        assert len({place.read_bytes() for place in paths}) == 1

    def test_refuses_a_name_that_could_not_be_loaded(self, path: Path) -> None:
        with pytest.raises(SnapshotError, match=r"cannot hold a tensor named '__metadata__'.*another name"):
            save_snapshot(path, {"__metadata__": torch.ones(1)}, {})
        assert not path.exists()


class TestDamage:
    def test_every_truncation_is_detected(self, path: Path, saved: bytes) -> None:
        for length in range(len(saved)):
            path.write_bytes(saved[:length])
            with pytest.raises(SnapshotError, match="cut short or is not a safetensors file"):
                load_snapshot(path)

    def test_appended_bytes_are_detected(self, path: Path, saved: bytes) -> None:
        path.write_bytes(saved + b"\0")
        with pytest.raises(SnapshotError, match="use the previous snapshot"):
            load_snapshot(path)

    def test_every_flipped_bit_is_detected(self, path: Path, saved: bytes) -> None:
        for position in range(len(saved)):
            for bit in range(8):
                damaged = bytearray(saved)
                damaged[position] ^= 1 << bit
                path.write_bytes(damaged)
                with pytest.raises(SnapshotError, match="use the previous snapshot"):
                    load_snapshot(path)

    @settings(deadline=None)  # a slow disk is no failure
    @given(position=st.integers(min_value=0), replacement=st.binary(min_size=1, max_size=12))
    def test_overwritten_bytes_are_detected_or_change_nothing(
        self, scratch: Path, position: int, replacement: bytes
    ) -> None:
        save_snapshot(scratch, small_tensors(), META)
        damaged = bytearray(scratch.read_bytes())
        start = position % (len(damaged) - len(replacement))
        damaged[start : start + len(replacement)] = replacement
        scratch.write_bytes(damaged)
        try:
            tensors, meta = load_snapshot(scratch)
        except SnapshotError:
            return
        assert_same(tensors, small_tensors())
        assert meta == META

    @settings(deadline=None)  # a slow disk is no failure
    @given(data=st.binary(max_size=200))
    def test_arbitrary_bytes_are_not_a_snapshot(self, scratch: Path, data: bytes) -> None:
        scratch.write_bytes(data)
        with pytest.raises(SnapshotError):
            load_snapshot(scratch)

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors: {"b": tensors["a"], "a": tensors["b"]},
            lambda tensors: {"a": tensors["a"], "c": tensors["b"]},
            lambda tensors: {"a": tensors["a"]},
            lambda tensors: {**tensors, "c": torch.empty(0)},
            lambda tensors: {**tensors, "a": tensors["a"].view(torch.int16)},
            lambda tensors: {**tensors, "a": tensors["a"].view(3, 2)},
            lambda tensors: {**tensors, "a": tensors["a"] + 1},
        ],
        ids=["swapped", "renamed", "removed", "added", "other-dtype", "other-shape", "other-values"],
    )
    def test_a_valid_file_with_other_tensors_is_detected(
        self, path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        tensors = {"a": torch.ones(2, 3, dtype=torch.float16), "b": torch.zeros(2, 3, dtype=torch.float16)}
        save_snapshot(path, tensors, META)
        path.write_bytes(save(change(tensors), metadata=metadata_of(path)))
        with pytest.raises(SnapshotError, match="does not match its checksum"):
            load_snapshot(path)

    def test_a_valid_file_with_other_meta_is_detected(self, path: Path, saved: bytes) -> None:
        metadata = metadata_of(path)
        changed = {key: text.replace('"version": 1', '"version": 2') for key, text in metadata.items()}
        assert changed != metadata
        path.write_bytes(save(load(saved), metadata=changed))
        with pytest.raises(SnapshotError, match="does not match its checksum"):
            load_snapshot(path)

    @pytest.mark.parametrize("metadata", [None, {}, {"snapshot": ""}, {"format": "pt"}])
    def test_a_safetensors_file_without_checksum_is_refused(self, path: Path, metadata: dict[str, str] | None) -> None:
        path.write_bytes(save(small_tensors(), metadata=metadata))
        with pytest.raises(SnapshotError, match="has no checksum"):
            load_snapshot(path)

    def test_a_header_with_null_metadata_is_refused(self, path: Path) -> None:
        header = b'{"__metadata__":null}'
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(SnapshotError, match="has no checksum"):
            load_snapshot(path)

    def test_a_missing_file_is_named(self, path: Path) -> None:
        with pytest.raises(SnapshotError, match=r"no snapshot .*guide\.snapshot: check the path"):
            load_snapshot(path)

    def test_a_folder_is_not_a_snapshot(self, tmp_path: Path) -> None:
        with pytest.raises(SnapshotError, match=r"cannot be read.*use the previous snapshot"):
            load_snapshot(tmp_path)

    def test_damage_names_the_file(self, path: Path, saved: bytes) -> None:
        path.write_bytes(saved[:-1])
        with pytest.raises(SnapshotError, match=r"guide\.snapshot .*: use the previous snapshot"):
            load_snapshot(path)


def metadata_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header["__metadata__"]


class TestWriteAtomically:
    @pytest.mark.parametrize("data", [b"", b"new", bytes(range(256)) * 1000])
    def test_replaces_the_file(self, path: Path, data: bytes) -> None:
        path.write_bytes(b"old")
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert files_in(path.parent) == [path.name]

    @pytest.mark.parametrize("function", ["fsync", "replace"])
    def test_a_failing_write_leaves_the_old_file_and_nothing_else(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        save_snapshot(path, small_tensors(), META)
        monkeypatch.setattr(os, function, fail)
        with pytest.raises(OSError, match="disk full"):
            save_snapshot(path, {}, {})
        monkeypatch.undo()
        assert files_in(path.parent) == [path.name]
        tensors, meta = load_snapshot(path)
        assert_same(tensors, small_tensors())
        assert meta == META

    def test_an_interrupt_leaves_the_old_file_and_nothing_else(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        path.write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert files_in(path.parent) == [path.name]

    def test_a_failing_write_of_a_new_file_leaves_nothing(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"new")
        assert files_in(path.parent) == []

    def test_a_folder_that_cannot_be_synced_is_reported_with_the_new_file_whole(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fsync = os.fsync

        def fail_for_folders(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError("folder not synced")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fail_for_folders)
        with pytest.raises(OSError, match="folder not synced"):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"new"
        assert files_in(path.parent) == [path.name]

    def test_contents_are_complete_and_durable_before_the_replace_and_the_name_after_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[tuple[str, object]] = []
        fsync, replace = os.fsync, os.replace

        def record_fsync(descriptor: int) -> None:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                steps.append(("sync folder", status.st_ino))
            else:
                steps.append(("sync file of size", status.st_size))
            fsync(descriptor)

        def record_replace(source: Path, target: Path) -> None:
            assert source.parent == target.parent
            steps.append(("replace", source.read_bytes()))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "replace", record_replace)
        write_atomically(path, b"new" * 100_000)
        assert steps == [
            ("sync file of size", 300_000),
            ("replace", b"new" * 100_000),
            ("sync folder", path.parent.stat().st_ino),
        ]

    def test_readers_and_other_writers_never_see_a_partial_file(self, path: Path) -> None:
        contents = [bytes([number]) * 200_000 for number in range(4)]
        write_atomically(path, contents[0])

        def write(data: bytes) -> None:
            for _ in range(10):
                write_atomically(path, data)

        writers = [threading.Thread(target=write, args=(data,)) for data in contents]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            assert path.read_bytes() in contents
        for writer in writers:
            writer.join()
        assert path.read_bytes() in contents
        assert files_in(path.parent) == [path.name]


@pytest.mark.parametrize("count", [0, 1])
def test_no_or_one_value_at_stride_zero_is_stored(tmp_path: Path, count: int) -> None:
    value = torch.ones(4).as_strided((count,), (0,))
    save_snapshot(tmp_path / "a", {"value": value}, {})
    assert load_snapshot(tmp_path / "a")[0]["value"].tolist() == [1.0] * count
