"""Sweeps that never were: with a planted effect, of any size."""

from __future__ import annotations

from typing import Any

import numpy as np

PARAMETERS: dict[str, Any] = {
    "train.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    "method.lambda": {"kind": "loguniform", "low": 0.01, "high": 1.0},
    "model.lora.rank": {"kind": "choice", "values": [2, 4, 8, 16]},
    "method.start": {"kind": "choice", "values": ["similar", "previous", "fresh"]},
    "method.probe_rounds": {"kind": "randint", "low": 2, "high": 12},
}
TASKS = 12


def trial(number: int, parameters: dict[str, Any], curve: list[float], state: str = "finished", **more: Any) -> Any:
    """With a score after each of as many tasks as the curve has."""
    history = [
        {
            "percent": round(100 * (task + 1) / more.get("tasks", TASKS), 1),
            "val_op": value,
            "forgetting": more.get("forgetting", 1.0) * task / TASKS if task else None,
            "seconds": more.get("speed", 3.0) * (task + 1),
        }
        for task, value in enumerate(curve)
    ]
    last = history[-1] if history else {"percent": 0.0, "val_op": None, "forgetting": None, "seconds": None}
    name = f"{number:04d}"
    return {
        "id": name, "parameters": parameters, "seed": 0, "state": state, "error": more.get("error"),
        "run": f"trials/{name}", "history": history, **last,
    }  # fmt: skip


def sweep(trials: list[Any], parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "name": "sweep-treelora-quickstart", "space": "treelora", "base": {"train.steps": 60},
        "metric": "val_op", "mode": "max", "scheduler": "asha", "search": "random", "asked": len(trials), "seeds": 3,
        "parameters": PARAMETERS if parameters is None else parameters, "trials": trials, "again": [], "winner": None,
        "seconds": 312.0, "versions": {"treelora-ray": "0.1.0", "ray": "2.60.0"}, **more,
    }  # fmt: skip


def drawn(count: int, seed: int = 0) -> dict[str, Any]:
    """The learning rate decides, with a best in between; where tasks start matters a little; the rest is noise."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        values: dict[str, Any] = {
            "train.lr": float(10 ** rng.uniform(-4, -2)), "method.lambda": float(10 ** rng.uniform(-2, 0)),
            "model.lora.rank": int(rng.choice([2, 4, 8, 16])),
            "method.start": str(rng.choice(["similar", "previous", "fresh"])),
            "method.probe_rounds": int(rng.integers(2, 13)),
        }  # fmt: skip
        end = 78 - 22 * (np.log10(values["train.lr"]) + 2.8) ** 2 + 3 * (values["method.start"] == "similar")
        end = max(end + rng.normal(0, 1.2), 12.0)
        curve = [float(end + 14 * np.exp(-task / 3) + rng.normal(0, 0.6)) for task in range(TASKS)]
        speed = 2.4 + 0.09 * values["model.lora.rank"] + 0.06 * values["method.probe_rounds"]
        made.append((values, curve, float(speed + rng.normal(0, 0.1)), float(abs(rng.normal(3, 1.5)))))
    order = np.argsort([-curve[-1] for _, curve, _, _ in made])
    place = {int(number): rank for rank, number in enumerate(order)}
    trials = []
    for number, (values, curve, speed, forgot) in enumerate(made):
        share = place[number] / count
        if number == count // 2:
            one = trial(
                number, values, curve[:3], "failed", error="NonFiniteError: the loss is nan at step 12", speed=speed
            )
        elif count > 8 and share > 0.3:
            one = trial(number, values, curve[: 2 if share > 0.6 else 6], "stopped", speed=speed, forgetting=forgot)
        else:
            one = trial(number, values, curve, speed=speed, forgetting=forgot)
        trials.append(one)
    finished = sorted((each for each in trials if each["state"] == "finished"), key=lambda each: -each["val_op"])
    best = finished[0]
    again = []
    for other in finished[:2]:
        for offset in (1, 2):
            more = {**other, "id": f"{other['id']}-s{offset}", "seed": offset, "of": other["id"]}
            again.append({**more, "val_op": other["val_op"] - 0.4 * offset, "run": f"again/{other['id']}-{offset}"})
    scores = [best["val_op"], best["val_op"] - 0.4, best["val_op"] - 0.8]
    winner = {
        "trial": best["id"],
        "val_op": {"mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)), "seeds": [0, 1, 2]},
        "test": {"run": "winner", "op": best["val_op"] - 1.1, "bwt": 1.2, "forgetting": 1.4, "seed": 0},
    }
    return sweep(trials, again=again, winner=winner)
