"""A look whether everything works."""

from __future__ import annotations

from typing import Any

from ray import tune


def smoke() -> dict[str, Any]:
    """Three settings of treelora on four short tasks: seconds for a trial on the built-in stream."""
    return {
        "method.name": "treelora",
        "stream.tasks": 4,
        "stream.rows": 320,
        "train.epochs": 2,
        "model.lora.rank": tune.choice([4, 8]),
        "method.lambda": tune.loguniform(0.01, 1.0),
        "train.lr": tune.loguniform(5e-4, 2e-2),
    }
