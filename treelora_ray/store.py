"""Where runs lie: in a folder of this machine, or in an object store (s3://, gs://), which a folder here mirrors.

    open_folder("runs/first")               that folder; `pull` and `push` have nothing to do
    open_folder("s3://bucket/runs/first")   a folder of this process in the cache; `pull` fetches, `push` stores

All that reads and writes a run does so in the folder. An object is replaced whole or not at all, a checkpoint goes
up after everything it names, and nothing is removed before: whenever a process dies, the store can be resumed from.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
OPTIONS = {"s3": "allow_delayed_open=true", "gs": "retry_limit_seconds=10"}  # one request a file; an end to tries
VARIABLES = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
FIRST_CONTACT = 30.0  # seconds that a store may take to answer at all
AT_ONCE = 8  # files on their way at the same time
STATES = "checkpoints/state-"
STAYS = {"ray-train", "tracking.json"}  # Ray writes its files to the store itself; how far MLflow was told is found out

# What pyarrow's messages contain, which have no other mark.
NO_BUCKET = ("NO_SUCH_BUCKET", "bucket does not exist", "Bucket '")
DENIED = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "ExpiredToken", "InvalidToken",
    "HTTP status 401", "HTTP status 403", "PERMISSION_DENIED", "UNAUTHENTICATED", "OAuth2 access token",
)  # fmt: skip
UNREACHABLE = ("NETWORK_CONNECTION", "UNAVAILABLE", "curlCode", "CURL error")
ELSEWHERE = ("HTTP status 301", "PermanentRedirect", "AuthorizationHeaderMalformed")
NOISE = re.compile(
    r" \(Request ID: [^)]*\)|^.*AWS Error "  # of S3
    r"|google::cloud::Status\(|Retry policy[^,]*, with a last message of | error_info=.*"  # of GCS
)

T = TypeVar("T")
Stamp = tuple[int, int, int]


class StoreError(ValueError):
    """An address that cannot be used, or a store that refuses it."""


class StoreLostError(OSError):
    """A store that does not answer, or not as it should. What it holds is whole."""


# -- addresses


def local_path(address: str) -> Path | None:
    """The path of an address on this machine; None for one in an object store."""
    parts = urlsplit(address)
    if "://" not in address:
        return Path(address)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return None


def joined(address: str, name: str) -> str:
    """The address of what lies below another, whose ?options stay at the end."""
    if (path := local_path(address)) is not None:
        return str(path / name)
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def with_secrets(address: str) -> bool:
    """Whether an address in a store holds a user, a password or a key, which would be kept with the run."""
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES or "://" not in address:
        return False
    user = parts.netloc.rpartition("@")[0]
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if user and (parts.scheme == "s3" or user != "anonymous"):
        return True
    return any(re.search("key|secret|token|password", name, re.I) for name in names)


def problem(address: str) -> str | None:
    """What is wrong with the address of a run or of runs; says nothing of it that is secret."""
    if collapsed := re.match(r"(s3|gcs|gs):/(?!/)", address):
        return f"begins with {collapsed[0]}: one / is missing, as in a Path made of an address; give it as a text"
    if local_path(address) is not None:
        return None
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES:
        return f"begins with {parts.scheme}://, which is unknown; known: s3://, gs://, and paths"
    if with_secrets(address):
        return (
            "holds a user, a password or a key, which would be kept with the run: leave them out and set "
            f"{VARIABLES[SCHEMES[parts.scheme]]}"
        )
    return None if parts.netloc.rpartition("@")[2] else "names no bucket: give s3://BUCKET/FOLDER"


# -- folders


class RunFolder:
    """A run's files, on this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.address, self.stored = path, str(path), False

    def __str__(self) -> str:
        return self.address

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.path / ".lock"

    def pull(self, *names: str) -> None:
        """Fetches these files and folders, or everything."""

    def push(self) -> None:
        """Stores what has changed."""

    def place(self) -> tuple[str, Any]:
        """Path and pyarrow filesystem of the run itself, for others that write there; None: this machine's."""
        return str(self.path), None

    def close(self) -> None:
        """The end of a mirror."""

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoredFolder(RunFolder):
    """A run in a store, and the folder of this process that mirrors it."""

    def __init__(self, address: str) -> None:
        self.filesystem, self.base = connected(address)
        self.scratch = Scratch(address)
        super().__init__(self.scratch.path / self.base.rpartition("/")[2])
        self.path.mkdir()
        self.address, self.stored = address, True
        self.known: dict[str, Stamp] = {}  # by name: a file that is here and there alike

    @property
    def lock(self) -> Path:
        """Of this machine alone: stores know no locks."""
        return self.scratch.home / ".lock"

    def pull(self, *names: str) -> None:
        with explaining(self.address):
            found = self.filesystem.get_file_info([f"{self.base}/{name}" for name in names or self._names()])
            for folder in [info for info in found if info.type.name == "Directory"]:
                found += self.filesystem.get_file_info(_below(folder.path, recursive=True))
            files = (info.path for info in found if info.type.name == "File")
            _at_once(self._get, (path[len(self.base) + 1 :] for path in files))

    def _names(self) -> list[str]:
        """What lies at the top."""
        infos = self.filesystem.get_file_info(_below(self.base, recursive=False))
        return [info.base_name for info in infos if not _stays(info.base_name)]

    def _get(self, name: str) -> None:
        from treelora_ray.files import write_atomically

        if _stays(name) or name.endswith(".damaged"):
            return
        try:
            with self.filesystem.open_input_file(f"{self.base}/{name}") as file:
                data = file.readall()
        except FileNotFoundError:  # removed meanwhile, by the process that trains
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        self.known[name] = _stamp(path)

    def push(self) -> None:
        """States go up last and come down first: each finds there what it names."""
        here = self._here()
        changed = [name for name, stamp in here.items() if self.known.get(name) != stamp]
        gone = [name for name in self.known if name not in here]
        with explaining(self.address):
            _at_once(lambda name: self._put(name, here[name]), (name for name in changed if not _is_state(name)))
            for name in sorted(filter(_is_state, changed)):
                self._put(name, here[name])
            for name in filter(_is_state, gone):
                self._remove(name)
            _at_once(self._remove, (name for name in gone if not _is_state(name)))

    def _here(self) -> dict[str, Stamp]:
        found = {}
        for folder, _, files in os.walk(self.path):
            for path in (Path(folder, file) for file in files):
                name = path.relative_to(self.path).as_posix()
                if not _stays(name):
                    with suppress(FileNotFoundError):
                        found[name] = _stamp(path)
        return found

    def _put(self, name: str, stamp: Stamp) -> None:
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError:
            return
        with self.filesystem.open_output_stream(f"{self.base}/{name}") as file:
            file.write(data)
        self.known[name] = stamp

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.base}/{name}")
        del self.known[name]

    def place(self) -> tuple[str, Any]:
        return self.base, self.filesystem

    def close(self) -> None:
        self.scratch.close()


def open_folder(address: Path | str) -> RunFolder:
    """A run's folder; the mirror of one in a store is empty at first, and gone after `close`."""
    if wrong := problem(str(address)):
        raise StoreError(f"the address of the run {wrong}")
    path = local_path(str(address))
    return StoredFolder(str(address)) if path is None else RunFolder(path)


def _stays(name: str) -> bool:
    """Whether a file is not mirrored: locks, half of a file, what others look after, names that lead elsewhere."""
    parts = name.split("/")
    return parts[0] in STAYS or ".." in parts or any(re.fullmatch(r"\..*(lock|tmp)", part) for part in parts)


def _is_state(name: str) -> bool:
    return name.startswith(STATES)


def _stamp(path: Path) -> Stamp:
    """Differs after every write: files are replaced, so two in a row have other numbers, whatever the clock says."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _below(path: str, recursive: bool) -> Any:
    from pyarrow.fs import FileSelector

    return FileSelector(path, recursive=recursive, allow_not_found=True)


def _at_once(call: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(call, names):
            pass


class Scratch:
    """A folder in the cache until `close` or the end of the process. The next process removes those of killed ones."""

    def __init__(self, key: str) -> None:
        from treelora_ray.files import cache_folder

        self.root, self.owner = cache_folder() / "scratch", os.getpid()
        self.home = self.root / hashlib.sha256(key.encode()).hexdigest()[:24]
        with self._alone():
            _sweep(self.root)
            self.home.mkdir(exist_ok=True)
            self.path = self.home / secrets.token_hex(8)
            self.held = _held(self.path).open("w")
            fcntl.flock(self.held, fcntl.LOCK_EX)
            self.path.mkdir()
        atexit.register(self.close)

    def _alone(self) -> AbstractContextManager[None]:
        from treelora_ray.files import locked

        self.root.mkdir(parents=True, exist_ok=True)
        return locked(self.root / ".lock")

    def close(self) -> None:
        if self.held.closed or self.owner != os.getpid():  # a fork's exit is not ours
            return
        atexit.unregister(self.close)
        with self._alone():
            shutil.rmtree(self.path, ignore_errors=True)
            _held(self.path).unlink(missing_ok=True)
            self.held.close()
            with suppress(OSError):  # others are in it
                self.home.rmdir()


def _held(path: Path) -> Path:
    return path.with_suffix(".held")


def _sweep(root: Path) -> None:
    for path in root.glob("*/*.held"):
        with path.open("r+") as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()


# -- stores


def connected(address: str) -> tuple[Any, str]:
    """pyarrow's filesystem of an address in a store, and the path there; the bucket is there and lets us look."""
    if wrong := problem(address):
        raise StoreError(f"the address {wrong}")
    return within(FIRST_CONTACT, lambda: _connected(address), address)


def _connected(address: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    parts = urlsplit(address)
    scheme = SCHEMES[parts.scheme]
    option = OPTIONS[scheme]
    if option.split("=")[0] not in dict(parse_qsl(parts.query)):
        parts = parts._replace(query=f"{parts.query}&{option}".lstrip("&"))
    with explaining(address):
        uri = urlunsplit(parts._replace(scheme=scheme, path=quote(parts.path)))
        filesystem, path = FileSystem.from_uri(uri)
        path = path.rstrip("/")
        if _is_missing(filesystem, path):
            with suppress(OSError):  # who may look at a folder may not always look at its bucket
                if _is_missing(filesystem, path.split("/")[0]):
                    raise StoreError(f"{address}: there is no such bucket; make it, or check the address")
    return filesystem, path


def _is_missing(filesystem: Any, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type.name == "NotFound")


def within(seconds: float, call: Callable[[], T], address: str) -> T:
    """A call's answer, or an error in time: to a store that is silent, clients listen for minutes."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise StoreLostError(f"{address} did not answer within {seconds:g} s: check the network and the endpoint")
    return found[0]


@contextmanager
def explaining(address: str) -> Iterator[None]:
    """Errors of a store in words. Those of this machine's disk have a number, and stay what they are."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        if isinstance(error, StoreLostError) or getattr(error, "errno", None) is not None:
            raise
        raise explained(address, error) from error


def explained(address: str, error: BaseException) -> StoreError | StoreLostError:
    """What a store's error means and what to do, as far as its text says."""
    text = NOISE.sub("", " ".join(str(error).split()))
    variables = VARIABLES[SCHEMES[urlsplit(address).scheme]]
    if any(mark in text for mark in NO_BUCKET):
        return StoreError(f"{address}: there is no such bucket ({text}); make it, or check the address")
    if any(mark in text for mark in DENIED):
        return StoreError(
            f"{address}: access is denied ({text}); set {variables}, or let this machine's account list, read, write "
            "and delete there"
        )
    if any(mark in text for mark in ELSEWHERE):
        return StoreError(f"{address}: the bucket lies in another region ({text}); set AWS_REGION, or add ?region=")
    if any(mark in text for mark in UNREACHABLE):
        return StoreLostError(f"{address} does not answer ({text}): check the network and the endpoint")
    if isinstance(error, ValueError):
        return StoreError(f"{address} cannot be opened: {text}")
    return StoreLostError(f"{address} does not do what it is asked ({text})")
