"""Runs in an object store: what goes up in which order, what is fetched, what is left alone, what is said."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSystem

from tests.buckets import Watched
from treelora_ray import Run, store
from treelora_ray.config import ConfigError, from_mapping
from treelora_ray.files import write_atomically
from treelora_ray.store import RunFolder, Scratch, StoredFolder, StoreError, StoreLostError, joined, open_folder

STATE = "checkpoints/state-{:08d}.safetensors"


def write(folder: RunFolder, name: str, data: bytes = b"some") -> None:
    (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.path / name, data)


@pytest.fixture
def folder(bucket: str) -> Iterator[StoredFolder]:
    with open_folder(f"{bucket}/runs/first") as found:
        assert isinstance(found, StoredFolder)
        yield found


def watched(folder: StoredFolder) -> Watched:
    folder.filesystem = Watched(getattr(folder.filesystem, "inner", folder.filesystem))
    return folder.filesystem


def names(folder: RunFolder) -> list[str]:
    return sorted(path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file())


def test_what_one_process_stores_another_fetches(folder: StoredFolder) -> None:
    files = {"config.yaml": b"a", STATE.format(0): b"b" * 100, "adapters/t0/labels.json": b"", "journal.jsonl": b"{}\n"}
    for name, data in files.items():
        write(folder, name, data)
    folder.push()
    with open_folder(folder.address) as other:
        assert other.path != folder.path
        assert not names(other)
        other.pull("config.yaml", "adapters", "no such file")
        assert names(other) == ["adapters/t0/labels.json", "config.yaml"]
        other.pull()
        assert {name: (other.path / name).read_bytes() for name in names(other)} == files


def test_only_what_has_changed_goes_up_even_if_size_and_clock_say_nothing(folder: StoredFolder) -> None:
    for name in ("result.json", "config.yaml"):
        write(folder, name, b"old")
    folder.push()
    stamp = (folder.path / "result.json").stat()
    write(folder, "result.json", b"new")
    os.utime(folder.path / "result.json", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    seen = watched(folder)
    folder.push()
    assert seen.changes == ["put first/result.json"]
    folder.push()
    assert len(seen.changes) == 1
    with open_folder(folder.address) as other:
        other.pull()
        assert (other.path / "result.json").read_bytes() == b"new"
        again = watched(other)  # type: ignore[arg-type]
        other.push()
        assert not again.changes


def test_states_go_up_last_in_order_and_come_down_before_what_they_name(folder: StoredFolder) -> None:
    write(folder, STATE.format(0))
    write(folder, "checkpoints/adapters/one.safetensors")
    folder.push()
    for name in (STATE.format(0), "checkpoints/adapters/one.safetensors"):
        (folder.path / name).unlink()
    for name in (STATE.format(2), STATE.format(1), "checkpoints/adapters/two.safetensors", "zebra"):
        write(folder, name)
    seen = watched(folder)
    folder.push()
    assert sorted(seen.changes[:2]) == ["put first/checkpoints/adapters/two.safetensors", "put first/zebra"]
    assert seen.changes[2:] == [
        f"put first/{STATE.format(1)}",
        f"put first/{STATE.format(2)}",
        f"remove first/{STATE.format(0)}",
        "remove first/checkpoints/adapters/one.safetensors",
    ]


def test_a_push_that_broke_off_is_made_good_by_the_next(folder: StoredFolder) -> None:
    for name in ("a", "b", STATE.format(0)):
        write(folder, name)
    inner = folder.filesystem
    folder.filesystem = Watched(inner, at=1)
    with pytest.raises(OSError, match="power is gone"):
        folder.push()
    folder.filesystem = Watched(inner)
    folder.push()
    assert len(folder.filesystem.changes) == 2
    with open_folder(folder.address) as other:
        other.pull()
        assert names(other) == ["a", "b", STATE.format(0)]


def test_what_others_keep_beside_it_stays_and_locks_and_halves_do_not_travel(folder: StoredFolder) -> None:
    for name in (".lock", ".tracking.lock", ".a.json.0f.tmp", "tracking.json", "ray-train/x.json", "a.json"):
        write(folder, name)
    for name in ("ray-train/y.json", "notes.txt", "../second/config.yaml", "checkpoints/state-00000003.damaged"):
        with folder.filesystem.open_output_stream(os.path.normpath(f"{folder.base}/{name}")) as file:
            file.write(b"theirs")
    folder.push()
    with open_folder(folder.address) as other:
        other.pull()
        assert names(other) == ["a.json", "notes.txt"]
        (other.path / "a.json").unlink()
        other.push()
    with open_folder(folder.address) as other:
        other.pull()
        assert names(other) == ["notes.txt"]
    below = folder.filesystem.get_file_info(store._below(folder.base.rpartition("/")[0], recursive=True))
    kept = {info.path.split("/", 2)[2] for info in below if info.type.name == "File"}
    assert {"first/ray-train/y.json", "second/config.yaml"} <= kept
    assert store._stays("adapters/../../../elsewhere")  # a key may be named so


def test_files_that_go_while_they_are_copied_are_no_error(
    folder: StoredFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "a")
    write(folder, "b")
    here = folder._here()
    monkeypatch.setattr(folder, "_here", lambda: here)
    (folder.path / "a").unlink()
    folder.push()
    assert list(folder.known) == ["b"]
    folder.filesystem.delete_file(f"{folder.base}/b")
    folder._get("b")
    monkeypatch.undo()
    (folder.path / "b").unlink()
    folder.push()
    assert not folder.known


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path))
    child = os.fork()
    if child == 0:
        (Scratch("s3://b/killed").path / "large").write_bytes(b"x")
        os._exit(9)
    os.waitpid(child, 0)
    (left,) = tmp_path.glob("scratch/*/*/large")
    mine = Scratch("s3://b/other")
    assert not left.exists()
    (mine.path / "file").write_text("")
    other = Scratch("s3://b/other")
    assert (mine.path / "file").exists()
    other.close()
    mine.close()
    mine.close()
    assert [path.name for path in tmp_path.glob("scratch/*/*")] == []


def test_a_process_that_ends_leaves_no_folder_behind_and_its_children_leave_it_alone(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from treelora_ray.store import Scratch\n"
        "made = Scratch('s3://b/r').path\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); print(made.is_dir())"
    )
    environment = {**os.environ, "TREELORA_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n", done.stderr
    assert not list(tmp_path.glob("scratch/*/*"))


def test_a_plain_path_and_a_file_address_are_the_folder_itself(tmp_path: Path) -> None:
    for address in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        with open_folder(address) as folder:
            assert type(folder) is RunFolder
            assert folder.path == tmp_path / "a b"
            assert folder.lock == folder.path / ".lock"
            folder.pull()
            folder.push()
    assert joined("runs", "first") == "runs/first"
    assert joined("file:///a/b%20c/", "first") == "/a/b c/first"
    assert joined("s3://b/runs/?scheme=http&region=x", "first") == "s3://b/runs/first?scheme=http&region=x"
    assert joined("gs://b", "first") == "gs://b/first"


def test_options_of_an_address_name_the_endpoint_and_so_does_the_variable(
    bucket: str, store_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_folder(f"{bucket}/runs/my run") as folder:
        write(folder, "a")
        folder.push()
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    address = joined(f"{bucket}/runs?endpoint_override={store_server}&scheme=http", "my run")
    with open_folder(address) as folder:
        folder.pull()
        assert names(folder) == ["a"]
        assert folder.path.name == "my run"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://KEY:hidden@bucket/runs", "holds a user, a password or a key.* set AWS_ACCESS_KEY_ID"),
        ("s3://hidden@bucket/runs", "holds a user, a password or a key"),
        ("s3://bucket/runs?access_key=a&secret_key=hidden", "holds a user, a password or a key"),
        ("gs://bucket/runs?access_token=hidden", "holds .* set GOOGLE_APPLICATION_CREDENTIALS"),
        ("hdfs://hidden:a@host/runs", "begins with hdfs://, which is unknown; known: s3://, gs://, and paths"),
        ("s3:///runs", "names no bucket"),
        ("s3:/bucket/runs", "begins with s3:/: one / is missing"),
    ],
)
def test_an_address_that_cannot_be_is_refused_by_the_config_too_and_no_secret_is_repeated(
    address: str, says: str
) -> None:
    with pytest.raises(StoreError, match=says) as refused:
        open_folder(address)
    with pytest.raises(ConfigError, match=f"folder {says}") as told:
        from_mapping({"folder": address})
    assert "hidden" not in f"{refused.value} {told.value}"


def test_secrets_in_the_address_of_data_are_refused_and_revisions_of_the_hub_are_not() -> None:
    stream = {"source": "parquet", "path": "s3://KEY:hidden@bucket/data"}
    with pytest.raises(ConfigError, match=r"stream\.path holds a user, a password or a key") as refused:
        from_mapping({"stream": stream})
    assert "hidden" not in str(refused.value)
    assert from_mapping({"stream": {**stream, "path": "hf://datasets/user/data@main/key=1"}})
    assert not store.problem("gs://anonymous@bucket/runs")


def test_a_run_that_is_not_there_and_a_bucket_that_is_not_there_are_told_apart(bucket: str) -> None:
    with pytest.raises(store.StoreError, match=r"s3://no-such-bucket/runs: there is no such bucket"):
        open_folder("s3://no-such-bucket/runs")
    with pytest.raises(ValueError, match=rf"{bucket}/runs/first is no run: it has no config.yaml"):
        Run(f"{bucket}/runs/first")
    with pytest.raises(StoreError, match="cannot be opened: Unexpected query parameter in S3 URI: 'colour'"):
        open_folder(f"{bucket}/runs?colour=red")


@contextmanager
def answering(code: int, name: str, after: float = 0.0) -> Iterator[str]:
    """A store that answers everything with this error, after so many seconds; its options."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(after)
            body = f"<Error><Code>{name}</Code><Message>no: {name}</Message></Error>".encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"endpoint_override=127.0.0.1:{running.server_port}&scheme=http"
        running.shutdown()


def test_a_store_that_denies_access_says_what_to_set(bucket: str) -> None:
    with (
        answering(403, "AccessDenied") as options,
        pytest.raises(StoreError, match=r"access is denied.*set AWS_ACCESS_KEY_ID"),
    ):
        open_folder(f"{bucket}/runs?{options}")


def test_a_store_that_denies_only_writing_says_so_at_the_first_push(folder: StoredFolder) -> None:
    write(folder, "config.yaml")
    real = folder.filesystem
    with answering(403, "AccessDenied") as options:
        folder.filesystem = FileSystem.from_uri(f"s3://b/x?{options}&allow_delayed_open=true")[0]
        with pytest.raises(StoreError, match="access is denied"):
            folder.push()
    folder.filesystem = real
    folder.push()


def test_a_store_that_is_silent_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setattr(store, "FIRST_CONTACT", 0.1)
    with answering(403, "AccessDenied", after=1.5) as options:
        began = time.monotonic()
        with pytest.raises(StoreLostError, match=r"did not answer within 0\.1 s: check the network"):
            open_folder(f"{bucket}/runs?{options}")
        assert time.monotonic() - began < 1.4


# As pyarrow says it.
CONNECT = (
    "When getting information for key 'x' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject operation: "
    "curlCode: 7, Could not connect to server; Details: Failed to connect to 127.0.0.1 port 1 after 0 ms: no"
)
REGION = "When listing objects: AWS Error UNKNOWN (HTTP status 301) during ListObjectsV2 operation: PermanentRedirect"
EXPIRED = (
    "When listing objects under key 'x/' in bucket 'b': AWS Error UNKNOWN (HTTP status 400) during ListObjectsV2 "
    "operation: Unable to parse ExceptionName: ExpiredToken Message: old (Request ID: x7Q)"
)
TOKEN = (
    "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of Could not create a OAuth2 "
    "access token to authenticate the request. error_info={reason=, domain=})"
)
CURL = (
    "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of PerformWork() - CURL error "
    "[7]=Could not connect to server error_info={reason=})"
)


@pytest.mark.parametrize(
    ("address", "text", "kind", "says"),
    [
        ("s3://b/r", CONNECT, StoreLostError, r"s3://b/r does not answer \(NETWORK_CONNECTION .*127\.0\.0\.1 port 1"),
        ("s3://b/r", REGION, StoreError, r"another region .* set AWS_REGION"),
        ("s3://b/r", EXPIRED, StoreError, r"denied \(UNKNOWN .*Message: old\); set AWS_ACCESS_KEY_ID"),
        ("gs://b/r", TOKEN, StoreError, r"access is denied .*set GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://b/r", CURL, StoreLostError, r"does not answer \(UNAVAILABLE: PerformWork\(\) .*connect to server\)"),
        ("s3://b/r", "AWS Error INTERNAL_FAILURE during Put", StoreLostError, r"not do what .* \(INTERNAL_FAILURE"),
    ],
)  # fmt: skip
def test_errors_of_stores_are_told_in_words(address: str, text: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says), store.explaining(address):
        raise OSError(text)


def test_an_error_of_this_machines_disk_stays_what_it_is(folder: StoredFolder) -> None:
    with pytest.raises(OSError, match="No space left") as raised, store.explaining(folder.address):
        raise OSError(28, "No space left on device")
    assert not isinstance(raised.value, StoreLostError)
