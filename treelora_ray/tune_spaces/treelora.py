"""What makes a difference to treelora."""

from __future__ import annotations

from typing import Any

from ray import tune


def treelora() -> dict[str, Any]:
    """Rank and scale of the adapters, the pull and its strength, the learning rate, probe, tree, search and start."""
    return {
        "method.name": "treelora",
        "model.lora.rank": tune.choice([4, 8, 16, 32]),
        "model.lora.alpha": tune.choice([8.0, 16.0, 32.0]),
        "method.penalty": tune.choice(["l1", "prox"]),
        "method.lambda": tune.loguniform(0.01, 1.0),
        "train.lr": tune.loguniform(5e-4, 2e-2),
        "method.probe_rounds": tune.choice([4, 6, 8, 12]),
        "method.guide.depth": tune.choice([2, 4, 8, 64]),
        "method.guide.search": tune.choice(["tree-lcb", "random"]),
        "method.start": tune.choice(["similar", "previous", "fresh"]),
    }
