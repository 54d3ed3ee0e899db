"""What the other methods have to set: a function for each, named `baselines:METHOD`.

Each replaces the base config's method whole, and searches rank and learning rate over the ranges of treelora.
"""

from __future__ import annotations

from typing import Any

from ray import tune


def seqlora() -> dict[str, Any]:
    """One adapter for all tasks, kept or folded into the weights."""
    return {**_common("seqlora"), "method.variant": tune.choice(["continue", "merge_new"])}


def independent() -> dict[str, Any]:
    """An adapter of its own for each task."""
    return _common("independent")


def joint() -> dict[str, Any]:
    """All tasks at once. There is one score, at the end: a scheduler has nothing to stop by."""
    return _common("joint")


def replay() -> dict[str, Any]:
    """One adapter and a memory of past rows."""
    return {
        **_common("replay"),
        "method.memory": tune.choice([100, 200, 400, 800]),
        "method.replay_batch": tune.choice([4, 8, 16]),
    }


def _common(method: str) -> dict[str, Any]:
    return {
        "method": {"name": method},
        "model.lora.rank": tune.choice([4, 8, 16, 32]),
        "train.lr": tune.loguniform(5e-4, 2e-2),
    }
