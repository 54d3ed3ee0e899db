"""Runs and data in an object store: what comes out is what comes out on a disk, whenever they are stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import rays, toys
from tests.buckets import Watched, filesystem
from tests.contract.test_methods import Recorder
from tests.integration.test_runs import call, config_file, png, settings
from treelora_ray import Run, run
from treelora_ray.config import StreamConfig
from treelora_ray.data import buckets
from treelora_ray.data.errors import DataError
from treelora_ray.data.shards import addresses, open_filesystem, open_shards
from treelora_ray.data.stream import fingerprints, open_stream
from treelora_ray.files import cache_folder
from treelora_ray.store import StoredFolder, joined, open_folder
from treelora_ray.tracking.journal import read
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.stream import Listener


def upload(folder: Path, endpoint: str, target: str) -> None:
    from pyarrow.fs import copy_files

    copy_files(str(folder), target.removeprefix("s3://"), destination_filesystem=filesystem(endpoint))


def same(one: Run, other: Run) -> None:
    """To the bit: the last checkpoint, what was decided, and the exported adapters."""
    files = [{path.name: path.read_bytes() for path in each.adapters["t0"].iterdir()} for each in (one, other)]
    assert files[0] == files[1]
    assert one.checkpoint().meta["done"] == other.checkpoint().meta["done"] == 3
    (tensors, decided), (expected, expected_decided) = rays.state(one.folder), rays.state(other.folder)
    assert decided == expected_decided
    assert decided["drawn"]
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert value.equal(tensors[name]), name


class Steps(rays.Notes):
    def after(self, steps: int) -> Callable[[], bool]:
        return lambda: self.steps >= steps


def test_a_run_in_a_store_that_is_stopped_twice_equals_an_undisturbed_one_on_disk(
    backbone: Path, data: Path, tmp_path: Path, bucket: str
) -> None:
    whole = run(settings(backbone, data, tmp_path / "runs"))
    found = {**settings(backbone, data, tmp_path), "folder": f"{bucket}/runs"}
    mirrors = set((cache_folder() / "scratch").glob("*/*/*"))
    for after, learnt in ((8, 1), (3, 1)):
        heard = Steps()
        with pytest.raises(Stopped, match=rf"goes on from its checkpoint in {bucket}/runs/r$"):
            run(found, listener=heard, stop=heard.after(after))
        assert set((cache_folder() / "scratch").glob("*/*/*")) == mirrors
        seen = Run(f"{bucket}/runs/r")
        assert len(seen.tasks) == learnt
        mirrors.add(seen.folder)
    heard = Steps()
    done = run(found, listener=heard)
    assert heard.notes == [f"going on with {bucket}/runs/r, 1 of 3 units learnt"]
    assert done.address == f"{bucket}/runs/r"
    same(done, whole)
    again = Run(done.address)
    rows = toys.images(1, 12, 1).take(range(12))
    assert again.predict({"image": rows["image"]}).text == whole.predict({"image": rows["image"]}).text
    with open_folder(done.address) as folder:
        folder.pull()
        assert len(list((folder.path / "checkpoints").glob("state-*"))) == 2
        assert len(list((folder.path / "checkpoints" / "adapters").iterdir())) == 3


def test_nobody_hears_of_a_checkpoint_before_it_is_stored(
    backbone: Path, data: Path, tmp_path: Path, bucket: str
) -> None:
    found = {**settings(backbone, data, tmp_path, train={"checkpoint_every": 3}), "folder": f"{bucket}/runs"}
    heard: list[str] = []

    class Looking(Listener):
        def saved(self, checkpoint: str, state: dict[str, Any]) -> None:  # noqa: ARG002
            with open_folder(f"{bucket}/runs/r") as folder:
                folder.pull(f"checkpoints/{checkpoint}")
                assert (folder.path / "checkpoints" / checkpoint).is_file()
            heard.append(checkpoint)

        def begins(self, number: int, of: int, name: str) -> None:  # noqa: ARG002
            assert Run(f"{bucket}/runs/r").config.name == "r"

        def scored(self, record: dict[str, Any]) -> None:
            assert Run(f"{bucket}/runs/r").result["records"][-1] == record

    run(found, listener=Looking())
    assert len(set(heard)) == 6


def test_the_journal_is_kept_with_the_run_and_mlflow_is_told_where_it_is_named(
    backbone: Path, data: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELORA_TRACKING", "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = {**settings(backbone, data, tmp_path, stream={"tasks": ["t0"]}), "folder": f"{bucket}/runs"}
    heard = Steps()
    with pytest.raises(Stopped):
        run(found, listener=heard, stop=lambda: heard.steps > 2)
    assert any("has no database beside it: name MLflow's in tracking.uri" in note for note in heard.notes)
    entries = read(run(found).journal)
    assert [entry["status"] for entry in entries if entry["kind"] == "ends"] == ["KILLED", "FINISHED"]
    assert len({entry["run"] for entry in entries if entry["kind"] == "begins"}) == 1
    with pytest.raises(RunError, match="has no database beside it"):
        run({**found, "name": "other", "tracking": {"required": True}})
    assert call("track", "sync", f"{bucket}/runs/r") == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("treelora_ray.tracking.sender.sync", lambda folder: len(read(folder / "journal.jsonl")))
    assert call("track", "sync", f"{bucket}/runs/r") == 0


def test_a_config_that_differs_is_refused_and_a_run_under_way_is_not_started_twice(
    backbone: Path, data: Path, tmp_path: Path, bucket: str
) -> None:
    found = {**settings(backbone, data, tmp_path, stream={"tasks": ["t0"]}), "folder": f"{bucket}/runs"}

    class Second(Listener):
        def scored(self, record: dict[str, Any]) -> None:  # noqa: ARG002
            with pytest.raises(RunError, match=rf"another process is training in {bucket}/runs/r"):
                run(found)

    run(found, listener=Second())
    with pytest.raises(ValueError, match=rf"run {bucket}/runs/r was begun with another config:\n  seed"):
        run({**found, "seed": 1})


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_store_that_fails_at_any_change_holds_a_run_that_goes_on(tasks: int, backbone: Path, bucket: str) -> None:
    """Power fails before each upload and each removal in turn; a fresh process resumes, and ends the same."""
    options, heard = {"name": "treelora", "guide": {"gate": 0.0}}, Steps()
    made = toys.config(backbone, options, train={"checkpoint_every": 2})

    def recorder(name: str, at: int | None = None) -> tuple[Recorder, Watched]:
        folder = open_folder(f"{bucket}/{name}")
        assert isinstance(folder, StoredFolder)
        folder.filesystem = Watched(folder.filesystem, at)
        found = Recorder(made, toys.stream(tasks), toys.method(made), folder, heard)
        found.thetas = []
        return found, folder.filesystem

    def stored(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        with open_folder(f"{bucket}/{name}") as folder:
            folder.pull()
            return rays.state(folder.path)

    whole, seen = recorder("whole")
    whole.go()
    whole.files.close()
    expected, expected_decided = stored("whole")
    assert any(change.startswith("remove") for change in seen.changes)
    saved = 0
    for at in range(len(seen.changes)):
        disturbed, _ = recorder(str(at), at)
        with pytest.raises(OSError, match="the power is gone"):
            disturbed.go()
        disturbed.files.close()
        resumed, _ = recorder(str(at))
        went_on = resumed.resume()
        assert went_on == (saved > 0), at
        assert not heard.notes, f"{seen.changes[at]}: the newest checkpoint cannot be read"
        resumed.go()
        resumed.files.close()
        tensors, decided = stored(str(at))
        assert decided == expected_decided
        assert tensors.keys() == expected.keys()
        assert all(value.equal(tensors[key]) for key, value in expected.items()), at
        saved += "/state-" in seen.changes[at]


def test_a_damaged_newest_checkpoint_in_the_store_costs_the_steps_since_the_one_before(
    backbone: Path, data: Path, tmp_path: Path, bucket: str, store_server: str
) -> None:
    found = {**settings(backbone, data, tmp_path, train={"checkpoint_every": 3}), "folder": f"{bucket}/runs"}
    whole = run({**found, "name": "whole"})
    heard = Steps()
    with pytest.raises(Stopped):
        run(found, listener=heard, stop=lambda: heard.steps >= 11)
    files = filesystem(store_server)
    with open_folder(f"{bucket}/runs/r") as folder:
        folder.pull("checkpoints")
        newest = sorted((folder.path / "checkpoints").glob("state-*"))[-1]
        damaged = newest.read_bytes()[:-5]
    with files.open_output_stream(f"{bucket.removeprefix('s3://')}/runs/r/checkpoints/{newest.name}") as out:
        out.write(damaged)
    heard = Steps()
    same(run(found, listener=heard), whole)
    assert any("Going on from state-" in note for note in heard.notes)
    assert any(note.startswith("going on with") for note in heard.notes)


def test_commands_look_at_a_run_in_a_store(
    backbone: Path, data: Path, tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path / "c.yaml", settings(backbone, data, tmp_path / "runs"))
    address = f"{bucket}/runs/r"
    assert call("train", path, f"folder={bucket}/runs") == 0
    said = capsys.readouterr().out
    assert f"The run lies in {address}; its adapters in {address}/adapters" in said
    assert f"treelora show {address}\n" in said
    assert call("show", address) == 0
    assert capsys.readouterr().out.startswith(f"{address}: treelora, finished")
    assert call("evaluate", address, "--json", "--routing", "last") == 0
    assert set(json.loads(capsys.readouterr().out)["scores"]) == {"t0", "t1", "t2"}
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    rows = toys.images(2, 20, 5).take(range(20))
    pq.write_table(pa.table({"image": [png(picture) for picture in rows["image"]]}), source)
    assert call("predict", address, "--input", str(source), "--output", str(target)) == 0
    assert pq.read_table(target).num_rows == 20
    capsys.readouterr()
    assert call("show", f"{bucket}/runs/other") == 2
    assert f"{bucket}/runs/other is no run" in capsys.readouterr().err
    assert call("train", path, "folder=s3://no-such-bucket/runs") == 2
    err = capsys.readouterr().err
    assert "s3://no-such-bucket/runs/r: there is no such bucket" in err
    assert "Traceback" not in err


# -- data


def test_a_stream_is_read_from_a_store_as_from_a_disk(data: Path, bucket: str, store_server: str) -> None:
    shutil.copy(data / "t1" / "train.parquet", data / "t1" / "train-00000-of-00001.parquet")
    (data / "t1" / "train.parquet").unlink()
    (data / "meta.json").write_text(json.dumps([{"task": "t2", "labels": ["c1", "c0"]}]))
    upload(data, store_server, f"{bucket}/stream")
    here = open_stream(StreamConfig(source="parquet", path=str(data)), 0)
    there = open_stream(StreamConfig(source="parquet", path=f"{bucket}/stream"), 0)
    assert [task.name for task in there.tasks] == ["t2", "t0", "t1"]
    assert fingerprints(here) == fingerprints(there)
    rows = [task.train.take([21, 3]) for task in (here.tasks[2], there.tasks[2])]
    assert rows[0]["label"] == rows[1]["label"]
    assert np.array_equal(rows[0]["image"], rows[1]["image"])


def test_texts_in_a_store_are_found_in_the_folders_of_other_layouts(
    bucket: str, store_server: str, tmp_path: Path
) -> None:
    rows = [{"sentence": f"a {word}", "label": word} for word in ("good", "bad")]
    for split in ("train", "test"):
        path = tmp_path / "long" / "one" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    upload(tmp_path / "long", store_server, f"{bucket}/deep/long")
    for address in (f"{bucket}/deep", f"{bucket}/deep/long/"):
        stream = open_stream(StreamConfig(source="labels", path=address), 0)
        assert stream.tasks[0].labels == ("bad", "good")
        assert stream.tasks[0].test.take([1])["text"] == ["a bad"]


def test_addresses_of_what_was_found_in_a_store_can_be_opened_again(data: Path, bucket: str, store_server: str) -> None:
    upload(data, store_server, f"{bucket}/my stream")
    files, place = open_filesystem(f"{bucket}/my stream/t?/train.parquet")
    found = addresses(files, sorted(files.glob(place)))
    assert found == [f"{bucket}/my stream/t{number}/train.parquet" for number in range(3)]
    assert [shard.rows for path in found for shard in open_shards(path, {"label": "label"})] == [22] * 3
    assert open_filesystem(found[0])[0] is files


def test_data_that_are_not_there_or_not_to_be_seen_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: str) -> None:
        open_stream(StreamConfig(source="parquet", path=path), 0)

    with pytest.raises(DataError, match=f"there is no folder {bucket}/none"):
        opened(f"{bucket}/none")
    with pytest.raises(DataError, match=r"s3://no-such-bucket.*: there is no such bucket"):
        opened("s3://no-such-bucket/stream")
    with pytest.raises(DataError, match=r"takes no \?options; set AWS_ENDPOINT_URL"):
        opened(f"{bucket}/stream?region=x")
    with pytest.raises(DataError, match="holds a user, a password or a key") as refused:
        open_filesystem("s3://KEY:hidden@bucket/stream")
    assert "hidden" not in str(refused.value)
    files, _ = open_filesystem(f"{bucket}/none")
    monkeypatch.setattr(files, "fs", Denying())
    with pytest.raises(DataError, match=rf"{bucket}: access is denied"):
        opened(f"{bucket}/stream")


class Denying:
    type_name = "s3"

    def get_file_info(self, _: Any) -> Any:
        raise OSError("When getting information: AWS Error ACCESS_DENIED during HeadObject operation: no")


def test_a_store_that_fails_while_rows_are_read_is_not_taken_for_damaged_rows(
    data: Path, bucket: str, store_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With on_bad_row=skip they would be left out."""
    upload(data, store_server, f"{bucket}/stream")
    (shard,) = open_shards(f"{bucket}/stream/t0/train.parquet", {"label": "label"})
    assert shard.readable(0)

    def lost(self: Any, *_: int) -> bytes:  # noqa: ARG001
        raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28")

    class Stream:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        read = lost

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    original: Any = buckets._File.__init__
    monkeypatch.setattr(
        buckets._File,
        "__init__",
        lambda self, fs, stream, *rest, **more: original(self, fs, Stream(stream), *rest, **more),
    )
    with pytest.raises(DataError, match=r"row group 0 cannot be read .*does not answer"):
        shard.readable(0)


# -- Ray


@pytest.mark.usefixtures("cluster")
def test_workers_go_on_with_a_run_in_a_store(ray_data: Path, tmp_path: Path, bucket: str, store_server: str) -> None:
    """The endpoint is in the address: the nodes of a cluster have their own environment."""
    whole = run(rays.config(ray_data, tmp_path, "treelora"))
    address = f"{bucket}/runs?endpoint_override={store_server}&scheme=http"
    mirrors = set((cache_folder() / "scratch").glob("*/*/*"))
    own = {"workers": 2, "address": "local"}
    found = {**rays.config(ray_data, tmp_path, "treelora", cluster=own), "folder": address}
    heard = Steps()
    with pytest.raises(Stopped, match=bucket):
        run(found, listener=heard, stop=lambda: heard.steps > 2)
    heard = Steps()
    done = run(found, listener=heard)
    assert any(note.startswith(f"going on with {bucket}/runs/treelora?") for note in heard.notes)
    assert done.address == joined(address, "treelora")
    done.checkpoint()
    (tensors, decided), (expected, expected_decided) = rays.state(done.folder), rays.state(whole.folder)
    assert decided == expected_decided
    for name, value in expected.items():  # sums over two workers
        torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert set((cache_folder() / "scratch").glob("*/*/*")) - mirrors == {done.folder}, "a worker has left its mirror"
