"""What is recorded with every result, so that it may be compared and repeated."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treelora_ray.config import RunConfig
from treelora_ray.methods import outside
from treelora_ray.methods.learner import Learner
from treelora_ray.training import metrics

SUBMISSION = "TREELORA_SUBMISSION"  # by which workers know the job they are part of
PACKAGES = ("treelora-ray", "torch", "transformers", "peft", "numpy", "pyarrow", "safetensors")


def score_table(scores: Sequence[Sequence[float | None]], units: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Metrics of the tasks learnt so far; of tasks learnt all at once only the mean of the last scores."""
    if not scores:
        return {}
    learnt = max(max(unit) for unit in units) + 1
    matrix = np.full((len(scores), learnt), np.nan)
    for number, row in enumerate(scores):  # rows are shorter where tasks were added to the stream later
        matrix[number, : len(row)] = np.array(row[:learnt], dtype=np.float64)
    if learnt != len(scores):
        return {"op": float(matrix[-1].mean())}
    return metrics.summary(matrix)


def provenance(config: RunConfig, learner: Learner) -> dict[str, Any]:
    origin = outside.distribution(config.method.name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "config": config.model_dump(mode="json", by_alias=True),
        "digest": config.digest,
        "trainable_parameters": learner.theta.numel(),
        "adapter_bytes_per_task": learner.layout.total * 4,
        "peak_memory_bytes": peak,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "device": str(learner.device),
        "packages": {name: version_of(name) for name in PACKAGES} | dict([origin] if origin else []),
        "python": sys.version.split()[0],
        "commit": _commit(),
        "submission": submission(),
    }


def ray_job() -> dict[str, Any]:
    """What Ray has told the driver of a submitted job of it; {} elsewhere."""
    found: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return found


def submission() -> str | None:
    """The id of the Ray job that a run is part of."""
    return os.environ.get(SUBMISSION) or (ray_job().get("metadata") or {}).get("job_submission_id")


@cache
def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """Of the checkout this code lies in, where it lies in one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
