"""Streams that stay open from one run of a process to the next: rows are read, unpacked and drawn once."""

from __future__ import annotations

from pathlib import Path

from treelora_ray.config import StreamConfig
from treelora_ray.data.stream import open_stream
from treelora_ray.data.task import TaskStream
from treelora_ray.files import stamp
from treelora_ray.store import local_path

MOST = 4  # streams kept: a sweep's own, and those of its further seeds


class Streams:
    def __init__(self) -> None:
        self._open: dict[tuple[object, ...], TaskStream] = {}  # the one used last at the end

    def open(self, config: StreamConfig, seed: int) -> TaskStream:
        """`open_stream`, or the stream it gave before to equal settings, as long as files here have not changed."""
        key = (config.model_dump_json(), seed, _stamp(config.path))
        stream = self._open.pop(key, None)
        self._open[key] = open_stream(config, seed) if stream is None else stream
        while len(self._open) > MOST:
            del self._open[next(iter(self._open))]
        return self._open[key]


def _stamp(address: str | None) -> tuple[object, ...] | None:
    """Of files on this machine; what lies elsewhere is taken for unchanged."""
    path = None if address is None else local_path(address)
    return None if path is None else stamp(Path(path).expanduser())
