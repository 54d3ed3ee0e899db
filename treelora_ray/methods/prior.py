"""What a run has learnt, as one file that another run begins with (`method.prior`): its guide and its adapters.

Signatures are gradients at the anchor and adapters are added to frozen weights, so they mean something only where both
are the same. What must be the same is kept in the file, and compared before anything is taken from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treelora_ray.config import ConfigError
from treelora_ray.core.config import GuideConfig
from treelora_ray.core.errors import GuideError, SnapshotError
from treelora_ray.core.layout import Layout
from treelora_ray.core.merge import AdapterBank
from treelora_ray.core.state import Snapshot
from treelora_ray.files import load_snapshot, part, save_snapshot
from treelora_ray.methods.learner import Learner
from treelora_ray.models.backbone import backbone_digest

KIND, VERSION = "treelora tree", 1
PREFIX = "prior/"  # no task of a stream has a slash in its name
EXPORT = "`treelora tree export RUN FILE` writes one"


@dataclass(frozen=True)
class Prior:
    guide: Snapshot  # its tasks named with the prefix
    slots: dict[int, Tensor]  # adapters [total]
    of_task: dict[int, int]  # slots
    record: dict[str, Any]  # path, sha256, number of tasks


def write(path: Path, learner: Learner, guide: Snapshot, bank: AdapterBank) -> None:
    """Replaces the file at `path`."""
    if guide.meta["current"] is not None:
        raise GuideError(f"task {guide.meta['current']['name']!r} is in progress: end it, then export the tree")
    if not guide.meta["names"]:
        raise GuideError("no task is stored yet, so there is no tree to export: learn a task first")
    tensors = {f"guide.{name}": value for name, value in guide.tensors.items()}
    tensors |= {f"slot.{slot}": adapter for slot, adapter in bank.slots.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_snapshot(path, tensors, {"kind": KIND, "version": VERSION, "guide": guide.meta, "start": _start(learner)})


def read(path: Path, learner: Learner, settings: GuideConfig) -> Prior:
    """Of a run that stood on the same model, with these settings of its guide; any other is refused."""
    try:
        tensors, meta = load_snapshot(path)
    except SnapshotError as error:
        what = f"cannot be used ({error})" if path.exists() else "is not there"
        raise ConfigError(f"method.prior {path} {what}; {EXPORT}") from error
    if meta.get("kind") != KIND or meta["version"] != VERSION:
        raise ConfigError(f"method.prior {path} holds no tree that this program reads; {EXPORT}")
    guide = meta["guide"]
    if not guide["names"]:
        raise ConfigError(f"method.prior {path} holds a tree without tasks: leave it out")
    wrong = [*_differences(_start(learner), meta["start"])]
    wrong += [f"guide: {line}" for line in settings.differences(guide["config"]) if not line.startswith("seed ")]
    if wrong:
        raise ConfigError(
            f"method.prior {path} does not fit this run:\n  " + "\n  ".join(wrong) + "\ngive this run the settings of "
            "the one that was exported, or export one that has these"
        )
    names = [PREFIX + name for name in guide["names"]]
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Prior(
        Snapshot(part(tensors, "guide"), {**guide, "names": names, "last": None}),
        {int(slot): adapter for slot, adapter in part(tensors, "slot").items()},
        dict(enumerate(guide["slots"]["of_task"])),
        {"path": str(path), "sha256": sha256, "tasks": len(names)},
    )


def _start(learner: Learner) -> dict[str, Any]:
    """What gradients at the anchor and adapters depend on, beside the rows."""
    model, config = learner.model, learner.config
    return {
        "kind": model.kind,
        "layout": learner.layout.to_json(),
        "seed": config.seed,
        "anchor": _sha256(learner.anchor),
        "backbone": {key: getattr(config.model, key) for key in ("backbone", "revision", "dtype")},
        "weights": backbone_digest(model),
        "scaling": model.scaling,
        "pooling": getattr(model, "pooling", None),
    }


def _sha256(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """In words, all that differs and must not."""

    def two(what: str, one: Any, other: Any) -> str:
        return f"{what} is {one!r} here, {other!r} there"

    if here["kind"] != there["kind"]:
        yield two("the kind of the stream", here["kind"], there["kind"])
    layout = Layout.from_json(here["layout"]).first_difference(Layout.from_json(there["layout"]))
    if layout is not None:
        yield f"model.lora (rank, targets, layers): {layout}"
    elif here["weights"] != there["weights"]:
        names = [
            two(f"model.{key}", here["backbone"][key], value)
            for key, value in there["backbone"].items()
            if here["backbone"][key] != value
        ]
        yield "the frozen weights differ: " + (", ".join(names) or "they were changed where model.backbone lies")
    if here["seed"] != there["seed"]:
        yield two("seed, which draws where adapters start,", here["seed"], there["seed"])
    elif layout is None and here["anchor"] != there["anchor"]:
        yield "adapters start elsewhere, though the seed is the same: another version of this program drew them"
    if here["scaling"] != there["scaling"]:
        yield two("model.lora.alpha / rank", here["scaling"], there["scaling"])
    if here["pooling"] != there["pooling"]:
        yield two("model.pooling", here["pooling"], there["pooling"])
