"""Which MLflow a run is told to: an address of its own, the environment's, or a database beside the runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"


def address(tracking: Mapping[str, Any], folder: Path) -> str:
    """Of the store of a run in `folder`; `tracking` is that section of its config."""
    return tracking["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or local_address(folder.parent)


def local_address(runs: Path) -> str:
    return f"sqlite:///{(runs / DATABASE).absolute()}"


def local_artifacts(uri: str) -> str | None:
    """Where a database of ours keeps its files; None for other stores, which know it themselves."""
    path = uri.removeprefix("sqlite:///")
    return (Path(path).parent / ARTIFACTS).as_uri() if path != uri else None


def shown(uri: str) -> str:
    """Without a password."""
    return re.sub(r"//[^/@]*@", "//…@", uri)


def explained(error: Exception) -> str:
    """An error of MLflow or of the network in a sentence, and what to do."""
    text = " ".join(shown(str(error)).split())
    if "out-of-date database schema" in text or "Detected out-of-date" in text:
        return "the MLflow store has the schema of another version: `mlflow db upgrade URI` after a backup"
    if "mlflow-artifacts URI was supplied" in text:
        return (
            "the experiment was made through an MLflow server, which keeps its files: give the server's address "
            "(tracking.uri or MLFLOW_TRACKING_URI), here and for `treelora track sync`"
        )
    if "Permission denied" in text or isinstance(error, PermissionError):
        return f"MLflow's store or its artifacts cannot be written ({text[:200]}): check the rights"
    if any(word in text for word in ("Max retries exceeded", "Connection refused", "Failed to establish", "timed out")):
        host = re.search(r"host='([^']+)', port=(\d+)", text)
        where = f" at {host[1]}:{host[2]}" if host else ""
        return f"MLflow{where} does not answer"
    return f"MLflow refuses what it is told ({text[:300]})"
