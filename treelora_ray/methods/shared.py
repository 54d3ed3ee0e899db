"""What runs of one process need not make again: open streams, the frozen backbone, and what it made of the tasks.

    shared = Shared(folder)
    api.run(config, shared=shared)      any number of runs, one at a time

A run with it learns what it would learn without, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from treelora_ray.data.kept import Streams
from treelora_ray.methods.looks import Looks
from treelora_ray.models.kept import Backbones, Packed


class Shared:
    """For one run at a time. `folder`: where looks are kept for other processes; `packed`: a backbone from another
    process; `note`: what to do with remarks."""

    def __init__(
        self, folder: Path | None = None, packed: Packed | None = None, note: Callable[[str], None] = lambda _: None
    ) -> None:
        self.streams = Streams()
        self.backbones = Backbones(packed, note)
        self.looks = Looks(folder, note=note)
