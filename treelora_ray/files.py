"""Durable files: after a crash at any moment a path holds the old contents or the new, whole.

A snapshot is one safetensors file. Its single metadata entry is `<sha256> <meta as JSON>`: one entry,
since safetensors orders several at random, and equal snapshots shall be equal files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from treelora_ray.core.errors import SnapshotError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

ENTRY = "snapshot"
RESERVED = "__metadata__"  # where the header of a safetensors file keeps its metadata


def cache_folder() -> Path:
    """Where things lie that can be made again: `$TREELORA_CACHE`, or a folder in the user's own cache."""
    return Path(os.environ.get("TREELORA_CACHE") or Path.home() / ".cache" / "treelora_ray")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path`; a failure leaves the old one as it was."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def locked(path: Path, busy: Exception | None = None) -> Iterator[None]:
    """Holds a lock file. While another process does, it waits, or raises `busy`."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError:
            assert busy is not None
            raise busy from None
        yield


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill. Filled, it stands at `target`, in place of what was there; after a failure it is gone."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{secrets.token_hex(8)}.{end}") for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_snapshot(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
    """Store tensors (of any device) and meta, of which tuples come back as lists."""
    if RESERVED in tensors:
        raise SnapshotError(f"a snapshot cannot hold a tensor named {RESERVED!r}: give it another name")
    stored = _on_host(tensors)
    text = json.dumps(meta)
    write_atomically(path, save(stored, metadata={ENTRY: f"{_checksum(stored, text)} {text}"}))


def load_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU and in order of their names, and the meta of a snapshot that is whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SnapshotError(f"there is no snapshot {path}: check the path, or use the previous snapshot") from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise _damaged(path, f"is cut short or is not a safetensors file ({error})") from error
    checksum, _, text = _entry(data).partition(" ")
    if not checksum:
        raise _damaged(path, "has no checksum, so it was not written as a snapshot")
    if checksum != _checksum(tensors, text):
        raise _damaged(path, "does not match its checksum, so it was changed after it was written")
    return dict(sorted(tensors.items())), json.loads(text)


def snapshot_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of all tensors of a snapshot, and its meta, without reading the tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    _, _, text = header.pop(RESERVED)[ENTRY].partition(" ")
    return max((entry["data_offsets"][1] for entry in header.values()), default=0), json.loads(text)


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of a file, or of all files in a folder: a look from outside, which costs little."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    seen = [(each, each.stat()) for each in found if each.is_file()]
    return tuple((str(each.relative_to(path)), stat.st_size, stat.st_mtime_ns) for each, stat in seen)


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those named `NAME.…`, without that."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _sync_folder(folder: Path) -> None:
    """Make the new name durable: syncing the file alone keeps its contents, not its entry in the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU with memory of their own, as safetensors refuses shared memory."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        if host.untyped_storage().data_ptr() in storages or host.numel() < 2:
            # None or one value is contiguous at any stride, and at stride 0 cannot be seen as bytes.
            host = torch.empty(host.shape, dtype=host.dtype).copy_(host)
        storages.add(host.untyped_storage().data_ptr())
        stored[name] = host
    return stored


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    names = sorted(tensors)
    # JSON ends itself and gives the length of all bytes that follow: nothing can move between the parts.
    index = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([text, index]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _entry(data: bytes) -> str:
    """Our metadata entry, from bytes that safetensors found valid; empty if there is none."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    entry: str = (header.get(RESERVED) or {}).get(ENTRY, "")
    return entry


def _damaged(path: Path, problem: str) -> SnapshotError:
    return SnapshotError(f"snapshot {path} {problem}: use the previous snapshot")
