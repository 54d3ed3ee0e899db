"""What the frozen model made of a task, kept for runs that would see the same: gradients at the anchor, statistics.

A look is stored under the digest of all that it depends on. Who asks with the same gets the same tensors, to the bit,
and who asks with anything else gets nothing: `Learner.recall` has what is common to all looks, `Learner._statistics`
and `TreeLora._probed_from` have the rest. Looks live in memory, and as files where a folder is given: then for other
processes too, now or later. A file counts when it is whole and says that it is the look that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treelora_ray.core.errors import SnapshotError
from treelora_ray.files import load_snapshot, save_snapshot

VERSION = 2  # a change of what is computed makes old looks unknown
PACKAGES = ("treelora-ray", "torch", "transformers", "tokenizers", "peft", "numpy", "pillow")
Key = Mapping[str, Any]  # plain JSON


@dataclass(frozen=True)
class Look:
    tensors: dict[str, Tensor]  # on the CPU
    seconds: float  # that it took where it was computed
    told: dict[str, Any] = field(default_factory=dict)  # what else must be known of it

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Looks:
    """`most`: bytes kept in memory; the looks used least recently go first. Of files all are kept."""

    def __init__(
        self, folder: Path | None = None, most: int = 1 << 30, note: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.most, self.note = folder, most, note
        self._kept: dict[str, Look] = {}  # by name; the one used last at the end

    def find(self, kind: str, key: Key) -> Look | None:
        name = _name(kind, key)
        found = self._kept.pop(name, None) or self._read(name, kind, key)
        if found is not None:
            self._keep(name, found)
        return found

    def put(self, kind: str, key: Key, look: Look) -> None:
        name = _name(kind, key)
        tensors = {each: tensor.detach().cpu().clone() for each, tensor in look.tensors.items()}
        look = Look(tensors, look.seconds, look.told)
        self._kept.pop(name, None)
        self._keep(name, look)
        if self.folder is not None:
            meta: dict[str, Any] = {
                "kind": kind,
                "version": VERSION,
                "key": key,
                "seconds": look.seconds,
                "told": look.told,
            }
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_snapshot(self._path(name), look.tensors, meta)
            except OSError as error:
                self.note(f"{self.folder} cannot be written ({error.strerror or error}): later runs will look again")

    def _keep(self, name: str, look: Look) -> None:
        self._kept[name] = look
        while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > self.most:
            del self._kept[next(iter(self._kept))]

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _read(self, name: str, kind: str, key: Key) -> Look | None:
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            tensors, meta = load_snapshot(path)
        except SnapshotError as error:
            self.note(f"{str(error).rpartition(': ')[0]}: the task is looked at again")
            return None
        if [meta.get(each) for each in ("kind", "version", "key")] != [kind, VERSION, json.loads(json.dumps(key))]:
            self.note(f"{path} is not the look that its name says: the task is looked at again")
            return None
        return Look(tensors, float(meta["seconds"]), meta["told"])


def surroundings(device: torch.device) -> dict[str, Any]:
    """What the last bits of a sum may depend on, beside the numbers: the device, and the programs that add them up."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} {_instructions()}",
        "threads": None if cuda else torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda if cuda else None,
        "versions": {package: _version(package) for package in PACKAGES},
    }


def sha256(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _instructions() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name(kind: str, key: Key) -> str:
    text = json.dumps([VERSION, kind, key], sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
