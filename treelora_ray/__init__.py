"""Continual learning with TreeLoRA: a stream of tasks, an adapter each, and a tree that says who resembles whom.

from treelora_ray import run
done = run("quickstart")       # a config file, a preset, a mapping or a RunConfig
done.matrix, done.metrics, done.adapters, done.predict({"image": [...]})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treelora_ray.api import Run, run
    from treelora_ray.config import RunConfig
    from treelora_ray.methods.shared import Shared

__all__ = ["Run", "RunConfig", "Shared", "run"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line must answer --help without torch.
    if name in ("run", "Run", "Shared"):
        from treelora_ray import api

        return getattr(api, name)
    if name == "RunConfig":
        from treelora_ray.config import RunConfig

        return RunConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
