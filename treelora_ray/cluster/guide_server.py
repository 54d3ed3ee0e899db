"""A guide that outlives its process: a call is on the disk before its caller hears of it.

    snapshot-7.safetensors    the guide as it was at some call
    journal-7                 the calls since then, in order

A server that starts again loads the snapshot and repeats the calls. The guide is deterministic, so it becomes what it
was. Nothing here imports ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load, save
from torch import Tensor

from treelora_ray.cluster.errors import GuideLostError
from treelora_ray.core import (
    Choice,
    Guide,
    GuideConfig,
    GuideError,
    Layout,
    LayoutError,
    Snapshot,
    SnapshotError,
)
from treelora_ray.core.layout import IntArray
from treelora_ray.files import JSON, load_snapshot, save_snapshot, write_atomically

Values: TypeAlias = dict[str, Any]  # arguments or an answer, by name: tensors, and what JSON can hold

UNANSWERED = 4  # calls that a caller may send before it takes the answer of the first
LIMIT = 8 << 20  # bytes of a journal; above it, and above the guide's own size, a snapshot takes its place
CHANGING = ("begin_task", "probe", "commit", "select", "observe", "insert", "exchange")
READING = ("directions", "snapshot", "draw", "to_data", "measured", "nbytes")
HEAD = struct.Struct("<Q32s")  # of a record: length and SHA-256 of its payload
OURS = re.compile(r"\.?(?:snapshot|journal)-(\d+)\b.*")  # files of the journal, temporary ones included


class CallMissingError(GuideLostError):
    """A call came before the one ahead of it. Ray may do so when it repeats calls: then sending it again helps."""


def pack(values: Mapping[str, Any]) -> bytes:
    """One line of JSON, then the tensors as safetensors."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in values.items() if name not in tensors}
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    return json.dumps(plain).encode() + b"\n" + save(copies)


def unpack(payload: bytes) -> Values:
    plain, _, tensors = payload.partition(b"\n")
    return {**json.loads(plain), **load(tensors)}


class Journal:
    """A snapshot and the records after it, in a folder of its own on a local disk.

    A crash at any moment leaves the records that were acknowledged, and perhaps the one that was being written. After
    an error a journal takes no more records: make a new one, which reads what the disk holds.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.number, self.snapshot = self._newest()
        self._open()

    def append(self, payload: bytes) -> None:
        """Returns when the record is on the disk."""
        record = HEAD.pack(len(payload), hashlib.sha256(payload).digest()) + payload
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.write(self.file.fileno(), rest) :]
            os.fsync(self.file.fileno())
        except BaseException:
            self.file.close()  # whatever came after half a record would be lost with it
            raise
        self.size += len(record)

    def restart(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        """A snapshot in place of all before it. It counts from the moment its file has its name."""
        self.file.close()
        number = max(self._numbers(), default=0) + 1  # above damaged snapshots too: their journals are not for us
        save_snapshot(self._snapshot(number), tensors, meta)
        self.number, self.snapshot = number, None
        self._open()
        for path in self.folder.iterdir():
            if OURS.fullmatch(path.name) and path not in (self._snapshot(number), self._journal(number)):
                path.unlink(missing_ok=True)

    def _newest(self) -> tuple[int, tuple[dict[str, Tensor], dict[str, Any]] | None]:
        for number in sorted(self._numbers(), reverse=True):
            try:
                return number, load_snapshot(self._snapshot(number))
            except SnapshotError:
                continue  # damaged, or there is none: the one before it
        return 0, None

    def _open(self) -> None:
        """Reads the whole records of this number's journal and cuts off what follows them."""
        path = self._journal(self.number)
        if not path.exists():
            write_atomically(path, b"")
        self.file = path.open("r+b", buffering=0)
        data = self.file.read()
        self.records, self.size = _whole_records(data)
        if self.size < len(data):
            self.file.truncate(self.size)
            os.fsync(self.file.fileno())
        self.file.seek(self.size)

    def _numbers(self) -> set[int]:
        found = (OURS.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(match[1]) for match in found if match}

    def _snapshot(self, number: int) -> Path:
        return self.folder / f"snapshot-{number}.safetensors"

    def _journal(self, number: int) -> Path:
        return self.folder / f"journal-{number}"


def _whole_records(data: bytes) -> tuple[list[bytes], int]:
    """Payloads up to the first torn or damaged record, and how many bytes they take."""
    records, at = [], 0
    while at + HEAD.size <= len(data):
        length, checksum = HEAD.unpack_from(data, at)
        payload = data[at + HEAD.size : at + HEAD.size + length]
        if len(payload) < length or hashlib.sha256(payload).digest() != checksum:
            break
        records.append(payload)
        at += HEAD.size + length
    return records, at


class GuideServer:
    """Serves a guide to one caller at a time and keeps it in a folder.

    A caller opens a generation, which ends the one before, and numbers its changing calls 1, 2, 3, ... A call that
    comes again gets the answer it had. A reading call carries the number of the last changing one. A call that fails
    by a user's error changes nothing, and its number is free for the next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.guide: Guide | None = None
        self.generation, self.number = 0, 0  # the number of the last changing call
        self.answers: dict[int, tuple[int, Values]] = {}  # of the last calls, by number, with the call's checksum
        self._recover()

    def open(self, layout: Mapping[str, Any], config: Mapping[str, Any], snapshot: Snapshot | None) -> int:
        """Begins a generation, with a new guide or the snapshot's, whatever was there before; returns its number."""
        guide = Guide(Layout.from_json(layout), GuideConfig(**config))
        if snapshot is not None:
            guide.restore(snapshot)
        # From nothing it counts from the clock: another node may have served generations that this one never saw.
        self.generation = self.generation + 1 if self.generation else time.time_ns() // 1_000_000
        self.guide, self.number, self.answers = guide, 0, {}
        self._restart_or_recover()
        return self.generation

    def call(self, generation: int, number: int, name: str, arguments: Mapping[str, Any]) -> Values:
        """Does a call of the guide, once; see `answer_of` for what arguments and answers hold."""
        guide = self._guide_of(generation)
        if name not in CHANGING:
            self._expect(number, self.number, name)
            return answer_of(guide, name, arguments)
        record = pack({"call": [number, name], **arguments})
        checksum = zlib.crc32(record)
        known = self.answers.get(number)
        if known is not None and known[0] == checksum:
            return dict(known[1])
        self._expect(number, self.number + 1, name)
        try:
            answer = answer_of(guide, name, arguments)
            self.journal.append(record)
        except (GuideError, LayoutError):  # they leave a guide as it was
            raise
        except Exception:
            self._recover()
            raise
        self._note(number, checksum, answer)
        if self.journal.size > max(LIMIT, guide.nbytes()):
            self._restart_or_recover()
        return answer

    def _guide_of(self, generation: int) -> Guide:
        back = "go back to the last checkpoint"
        if self.guide is None:
            raise GuideLostError(f"the guide has no state: it started without its journal ({self.folder}); {back}")
        if generation < self.generation:
            raise GuideLostError(f"a newer run of the workers has taken over the guide; {back}")
        if generation > self.generation:
            raise GuideLostError(f"the guide has fallen behind its caller: its journal is an old one; {back}")
        return self.guide

    def _expect(self, number: int, expected: int, name: str) -> None:
        if number > expected:
            raise CallMissingError(
                f"call {number} ({name}) came, but {expected} is next: calls before it are lost; "
                "go back to the last checkpoint"
            )
        if number < expected:
            raise GuideLostError(
                f"call {number} ({name}) came after call {self.number}: another caller has taken its place, or the "
                "answer is too old to be kept; go back to the last checkpoint"
            )

    def _note(self, number: int, checksum: int, answer: Values) -> None:
        """Ray may repeat any call whose answer did not arrive: the unanswered ones and the one that is awaited."""
        self.number = number
        self.answers[number] = checksum, answer
        self.answers.pop(number - UNANSWERED - 1, None)

    # -- on the disk

    def _restart_or_recover(self) -> None:
        assert self.guide is not None
        snapshot = self.guide.snapshot()
        tensors = {f"guide.{name}": value for name, value in snapshot.tensors.items()}
        for number, (_, answer) in self.answers.items():
            tensors[f"answer.{number}"] = torch.frombuffer(bytearray(pack(answer)), dtype=torch.uint8)
        meta: dict[str, Any] = {
            "generation": self.generation,
            "number": self.number,
            "guide": snapshot.meta,
            "answers": [[number, checksum] for number, (checksum, _) in self.answers.items()],
        }
        try:
            self.journal.restart(tensors, meta)
        except Exception:
            self._recover()
            raise

    def _recover(self) -> None:
        """Becomes what the disk holds; without a guide where there is nothing, or what this code cannot read."""
        self.journal = Journal(self.folder)
        self.guide, self.generation, self.number, self.answers = None, 0, 0, {}
        snapshot, records = self.journal.snapshot, self.journal.records
        self.journal.snapshot, self.journal.records = None, []
        if snapshot is None:
            return
        tensors, meta = snapshot
        self.generation, self.number = meta["generation"], meta["number"]
        try:
            guide = Guide(Layout.from_json(meta["guide"]["layout"]), GuideConfig(**meta["guide"]["config"]))
            own = {name[6:]: value for name, value in tensors.items() if name.startswith("guide.")}
            guide.restore(Snapshot(own, meta["guide"]))
            for number, checksum in meta["answers"]:
                self.answers[number] = checksum, unpack(tensors[f"answer.{number}"].numpy().tobytes())
            for record in records:
                arguments = unpack(record)
                number, name = arguments.pop("call")
                self._note(number, zlib.crc32(record), answer_of(guide, name, arguments))
        except (ValueError, TypeError, KeyError) as error:  # of another version of this code
            logging.getLogger(__name__).warning("The guide's journal in %s cannot be used: %s", self.folder, error)
            return
        self.guide = guide


# -- calls as plain data


def answer_of(guide: Guide, name: str, arguments: Mapping[str, Any]) -> Values:
    """Calls the guide. `exchange` is `observe` of a step, then `select` of the next; no arms if the step was known."""
    match name:
        case "begin_task":
            guide.begin_task(**arguments)
            return {}
        case "probe":
            return {"compared": _tensor(guide.probe(**arguments))}
        case "commit":
            return choice_to_values(guide.commit(**arguments))
        case "select":
            return {"arms": _tensor(guide.select(**arguments))}
        case "observe":
            return {"new": guide.observe(**arguments)}
        case "exchange":
            new = guide.observe(**arguments)
            return {"new": new, "arms": _tensor(guide.select(arguments["step"] + 1)) if new else None}
        case "insert":
            return guide.insert(**arguments).to_json()
        case "directions":
            return {"directions": guide.directions(arguments["tasks"].numpy())}
        case "snapshot":
            snapshot = guide.snapshot()
            return {"tensors": snapshot.tensors, "meta": snapshot.meta}
        case "draw":
            return {"text": guide.draw()}
        case "to_data":
            return {"nodes": guide.to_data()}
        case "measured":
            return guide.measured()
        case "nbytes":
            return {"nbytes": guide.nbytes()}
    raise GuideError(f"the guide has no call {name!r}; it has: {', '.join(CHANGING + READING)}")


def choice_to_values(choice: Choice) -> Values:
    """Task, distance and relatedness, each a tensor [L]."""
    return {name: torch.tensor(getattr(choice, name)) for name in ("task", "distance", "related")}


def choice_from_values(values: Values) -> Choice:
    return Choice(**{name: value.numpy() for name, value in values.items()})


def _tensor(numbers: IntArray) -> Tensor:
    return torch.tensor(numbers)
