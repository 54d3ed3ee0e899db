"""The guide's settings, and the three modes as sets of them."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from treelora_ray.core.bandit import SearchKind, Width
from treelora_ray.core.errors import SettingError
from treelora_ray.core.grow import Linkage, TreeKind, TreeUpdate
from treelora_ray.core.signature import Distance, SignatureKind

Mode = Literal["treelora", "paper", "released"]
Commit = Literal["layer", "task"]
Observe = Literal["probe", "step", "query"]


@dataclass(frozen=True)
class GuideConfig:
    mode: Mode = "treelora"
    seed: int = 0
    signature: SignatureKind = "anchor"
    distance: Distance = "cosine"
    sketch_dim: int | None = 512  # values a layer; keeps l2 and cosine, not l1
    tree: TreeKind = "linkage"
    linkage: Linkage = "average"
    tree_update: TreeUpdate = "auto"  # rebuild each time while that is cheap, then insert and rebuild now and then
    depth: int = 64  # groups lie at depths 0 .. depth; what would lie deeper shares a leaf
    # probe: rounds at the anchor, the guide compares. step: the caller measures one distance a layer at each
    # step. query: likewise, with the batch's gradient at the stored task's adapter.
    observe: Observe = "probe"
    search: SearchKind = "tree-lcb"
    pulls_per_round: int = 32  # comparisons a layer makes with one mini-batch
    lcb_c: float = 1.0
    width: Width = "noise"
    commit: Commit = "layer"
    gate: float = 0.02  # chance that an unrelated task passes for related at a layer; 0 turns the test off
    budget: int | None = None  # adapters kept; above it the nearest two merge
    merge_signatures: bool = False  # merged tasks share one averaged signature
    steps_per_epoch: int | None = None  # released mode only

    @classmethod
    def of(cls, mode: Mode = "treelora", **changes: Any) -> GuideConfig:
        """A mode's settings, with changes."""
        if mode not in MODES:
            raise SettingError(f"mode {mode!r} is unknown; known: {', '.join(MODES)}")
        known = [field.name for field in fields(cls)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise SettingError(f"setting {name!r} is unknown{hint}")
        return cls(**{"mode": mode, **MODES[mode], **changes})

    def __post_init__(self) -> None:
        choices = {
            "mode": Mode, "signature": SignatureKind, "distance": Distance, "tree": TreeKind, "linkage": Linkage,
            "tree_update": TreeUpdate,
            "observe": Observe, "search": SearchKind, "width": Width, "commit": Commit,
        }  # fmt: skip
        wrong = [
            f"{name} is {getattr(self, name)!r}; known: {', '.join(get_args(kind))}"
            for name, kind in choices.items()
            if getattr(self, name) not in get_args(kind)
        ]
        least = {
            "depth": 1,
            "pulls_per_round": 1,
            "budget": 1,
            "sketch_dim": 1,
            "steps_per_epoch": 1,
            "seed": 0,
        }
        wrong += [
            f"{name} is {getattr(self, name)!r}; it must be a whole number from {low} up"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None or name not in ("budget", "sketch_dim", "steps_per_epoch")
            if not isinstance(value, int) or value < low
        ]
        if not isinstance(self.lcb_c, int | float) or not 0 <= self.lcb_c < float("inf"):
            wrong.append(f"lcb_c is {self.lcb_c!r}; it must be a number from 0 up")
        if not isinstance(self.gate, int | float) or not 0 <= self.gate < 1:
            wrong.append(f"gate is {self.gate!r}; it must lie in [0, 1)")
        if self.sketch_dim is not None and self.distance == "l1":
            wrong.append("sketch_dim is set, but a sketch does not keep l1: use distance cosine, or sketch_dim=None")
        if self.mode == "released" and self.steps_per_epoch is None:
            wrong.append("steps_per_epoch is missing; the released mode restarts its statistics every epoch")
        if self.observe == "probe" and self.signature != "anchor":
            wrong.append(
                f"signature is {self.signature!r}, but a probe measures gradients at the anchor: "
                "use signature anchor, or observe step or query"
            )
        if self.mode != "treelora" and self.observe == "probe":
            wrong.append(
                f"observe is 'probe'; mode {self.mode} exchanges at every step: GuideConfig.of({self.mode!r}) sets it"
            )
        if self.mode == "released" and self.observe == "query":
            wrong.append("observe is 'query'; the released mode exchanges at every step: use step")
        if wrong:
            raise SettingError("guide settings:\n  " + "\n  ".join(wrong))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """In words, the settings in which this configuration differs from one read back."""
        own = self.to_json()
        return [
            f"{k} is {own.get(k)!r} here, {other.get(k)!r} there" for k in own | other if own.get(k) != other.get(k)
        ]


PAPER: dict[str, Any] = {
    "signature": "delta", "distance": "l1", "sketch_dim": None, "tree": "kd-radius", "tree_update": "rebuild",
    "observe": "step", "pulls_per_round": 1, "lcb_c": 2.0, "width": "paper", "gate": 0.0, "merge_signatures": True,
}  # fmt: skip
RELEASED = {**PAPER, "signature": "running", "distance": "l2", "tree": "kd-inner", "merge_signatures": False}
# In what each mode departs from the defaults above; released has no default for steps_per_epoch.
MODES: dict[Mode, dict[str, Any]] = {"treelora": {}, "paper": PAPER, "released": RELEASED}
