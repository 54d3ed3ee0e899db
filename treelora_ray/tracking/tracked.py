"""What a run tells of itself goes to its journal, and from there to MLflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treelora_ray.config import TrackingConfig
from treelora_ray.tracking.about import described
from treelora_ray.tracking.journal import Journal
from treelora_ray.tracking.sender import Delivery, Sender
from treelora_ray.training.errors import RunError
from treelora_ray.training.tracker import Tracker

VARIABLE = "TREELORA_TRACKING"  # wins over `tracking.to`
FIRST_CONTACT = 90.0  # seconds that a store which is required may take to answer: a new database is made in some
HURRIED = 10.0  # seconds for the rest of a run that failed or was stopped


def tracker(
    config: TrackingConfig, folder: Path, batch: int, say: Callable[[str], None], stored: bool = False
) -> Tracker:
    """`stored`: the folder is a mirror, beside which no database can lie."""
    to = os.environ.get(VARIABLE) or config.to
    if to not in ("mlflow", "journal", "none"):
        raise RunError(f"{VARIABLE} is {to!r}; known: mlflow, journal, none")
    if to == "none":
        return Tracker()
    if to == "mlflow" and stored and not names_store(config):
        lacks = (
            "a run in an object store has no database beside it: name MLflow's in tracking.uri or MLFLOW_TRACKING_URI"
        )
        if config.required:
            raise RunError(f"{lacks}, as tracking.required is true")
        say(f"{lacks}, to have it told. The journal is kept")
        to = "journal"
    return Tracked(config, folder, batch, say) if to == "mlflow" else Told(folder, config.every, batch, say)


def names_store(config: TrackingConfig) -> bool:
    return bool(config.uri or os.environ.get("MLFLOW_TRACKING_URI"))


class Told(Journal):
    """A journal whose first lines say what the run is."""

    def begins(self, about: Mapping[str, Any], fresh: bool, left: int) -> None:
        super().begins(described(about), fresh, left)


class Tracked(Told):
    def __init__(self, config: TrackingConfig, folder: Path, batch: int, say: Callable[[str], None]) -> None:
        super().__init__(folder, config.every, batch, say)
        self.config, self.folder = config, folder
        self.sender: Sender | None = None

    def begins(self, about: Mapping[str, Any], fresh: bool, left: int) -> None:
        super().begins(about, fresh, left)
        if self.descriptor is None and not Delivery(self.folder).waiting:  # all is told, and delivered
            return
        self.sender = Sender(self.folder, self.say)
        if self.config.required and not self.sender.connected(FIRST_CONTACT):
            raise RunError("MLflow did not take the run, and tracking.required is true: mend it, or leave that out")

    def _write(self, kind: str, **fields: Any) -> None:
        super()._write(kind, **fields)
        if self.sender is not None:
            self.sender.look()

    def ends(self, status: str) -> None:
        super().ends(status)
        if self.sender is not None:
            self.sender.finish(self.config.wait if status == "FINISHED" else min(HURRIED, self.config.wait))
            self.sender = None
