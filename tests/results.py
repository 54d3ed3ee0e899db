"""Results of runs that never were: by hand, and of any size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treelora_ray.config import from_mapping
from treelora_ray.core import Guide, GuideConfig, Layout
from treelora_ray.methods.treelora import is_stage
from treelora_ray.training.metrics import summary

ROOT = Path(__file__).parents[1]
LAYERS = [f"blocks.{block}.attention.{part}_proj" for block in range(4) for part in "qv"]


def result(tasks: Sequence[str], matrix: Any, **more: Any) -> dict[str, Any]:
    """As a run with these scores would leave it; NaN where there is none."""
    a = np.array(matrix, dtype=np.float64)
    rows = [[None if np.isnan(x) else float(x) for x in row] for row in a]
    seconds = {"statistics": 0.5, "probe": 1.0, "train": 8.0, "evaluate": 0.5}
    effort = {"seconds": seconds, "steps": 30, "probe_rounds": 4, "queries": 0, "pass_rows": 65}
    names = list(tasks) if len(a) == len(tasks) else ["joint"]
    units = [[number] for number in range(len(tasks))] if len(a) == len(tasks) else [list(range(len(tasks)))]
    records = [
        {"unit": name, "tasks": unit, "scores": row, "report": {}, "effort": effort}
        for name, unit, row in zip(names, units, rows, strict=True)
    ]
    config = from_mapping({"name": "made", "seed": 0}).model_dump(mode="json", by_alias=True)
    found = {
        "finished": True, "tasks": list(tasks), "stream": list(tasks), "families": [None] * len(tasks),
        "matrix": rows, "metrics": summary(a) if len(a) == len(tasks) else {"op": float(a[-1].mean())},
        "records": records, "config": config, "digest": "0123456789abcdef", "trainable_parameters": 8452,
        "adapter_bytes_per_task": 32768, "peak_memory_bytes": 2**29, "peak_device_bytes": None, "device": "cpu",
        "packages": {"treelora-ray": "0.1.0", "torch": "2.13.0"}, "python": "3.11.7", "commit": None,
        "submission": None,
    }  # fmt: skip
    return {**found, **more}


def small() -> dict[str, Any]:
    """Three tasks, of which the first two are kin; every number is written here."""
    found = result(["one", "two", "three"], [[80.0, np.nan, np.nan], [85.0, 60.0, np.nan], [70.0, 66.0, 90.0]])
    layers = ["layers.0.q_proj", "layers.0.v_proj"]
    reports: list[dict[str, Any]] = [
        {"leans_on": [None, None]},
        {
            "leans_on": ["one", None],
            "tree": {"parent": [-1, 0, 0], "task": [None, "one", "two"], "height": [0.3, 0, 0]},
        },
        {"leans_on": [None, "two"]},
    ]
    for record, report, seconds in zip(found["records"], reports, (9.0, 10.0, 11.0), strict=True):
        record["report"] = {"layers": layers, **report}
        record["effort"] = {**record["effort"], "seconds": {"train": seconds, "evaluate": 1.0}}
    tree = [
        {"node": 0, "parent": -1, "depth": 0, "height": 0.7, "size": 3, "task": None, "layers": [0.6, 0.8]},
        {"node": 1, "parent": 0, "depth": 1, "height": 0.0, "size": 1, "task": "three"},
        {"node": 2, "parent": 0, "depth": 1, "height": 0.3, "size": 2, "task": None, "layers": [0.4, 0.2]},
        {"node": 3, "parent": 2, "depth": 2, "height": 0.0, "size": 1, "task": "one"},
        {"node": 4, "parent": 2, "depth": 2, "height": 0.0, "size": 1, "task": "two"},
    ]
    pulls = {
        "task": "three", "tasks": ["one", "two"], "layers": layers, "starts": [0, 1, 2],
        "count": [[[1, 1], [0, 1]], [[1, 0], [1, 1]]],
        "distance": [[[0.7, 0.6], [None, 0.5]], [[0.8, None], [0.7, 0.6]]], "groups": 2,
    }  # fmt: skip
    distances = {"tasks": ["one", "two", "three"], "rows": [[], [0.3], [0.65, 0.75]]}
    return {**found, "tree": tree, "layers": layers, "distances": distances, "pulls": pulls}


def many(tasks: int, seed: int = 0, families: int = 5) -> dict[str, Any]:
    """A stream of families, whose tree, distances and comparisons a guide has made."""
    rng = np.random.default_rng(seed)
    kinds = ("rotated", "halves", "edges", "permuted", "shuffled")
    names = [f"{kinds[n % families]}-{n // families}" for n in range(tasks)]
    learnt = rng.uniform(70, 92, tasks)
    drops = np.cumsum(rng.exponential(0.25, (tasks, tasks)) * (rng.random((tasks, tasks)) < 0.4), axis=0)
    matrix = np.where(np.tri(tasks, dtype=bool), learnt - drops + np.diag(drops), np.nan)
    found = result(names, matrix)
    layout = Layout.of_sizes([64] * len(LAYERS), LAYERS)
    guide = Guide(layout, GuideConfig(pulls_per_round=12))
    centres = rng.normal(size=(families, layout.total))
    for number, (name, record) in enumerate(zip(names, found["records"], strict=True)):
        mean = centres[number % families] + 0.6 * rng.normal(size=layout.total)
        guide.begin_task(name)
        for step in range(8):
            guide.probe(step, _tensor(mean + 0.8 * rng.normal(size=layout.total)))
        choice = guide.commit()
        pulls = guide.measured()["pulls"]
        guide.insert()
        leans = [guide.names[task] if task >= 0 else None for task in choice.warm]
        record["report"] = {"layers": LAYERS, "leans_on": leans}
        if is_stage(number + 1):
            nodes = guide.to_data()
            record["report"]["tree"] = {key: [node[key] for node in nodes] for key in ("parent", "task", "height")}
        record["effort"] = {
            **record["effort"],
            "seconds": {k: v * rng.uniform(0.7, 1.6) for k, v in record["effort"]["seconds"].items()},
        }
    more = {"tree": guide.to_data(), "layers": LAYERS, "distances": guide.measured()["distances"], "pulls": pulls}
    return json.loads(json.dumps({**found, **more}))


def _tensor(flat: Any) -> Any:
    import torch

    return torch.tensor(flat, dtype=torch.float32)


def journal(path: Path, tasks: int, steps: int = 30, every: int = 10) -> Path:
    """Losses that fall from 2 to 0.5 in each task."""
    lines = []
    for unit in range(tasks):
        for step in range(every - 1, steps, every):
            loss = 0.5 + 1.5 * np.exp(-3 * step / steps)
            entry = {"at": 0, "kind": "step", "unit": unit, "step": step, "global": unit * steps + step}
            lines.append(json.dumps({**entry, "metrics": {"loss": float(loss)}}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_run(folder: Path, found: dict[str, Any], seed: int = 0, **config: Any) -> Path:
    """A run's folder with this result."""
    folder.mkdir(parents=True, exist_ok=True)
    made = from_mapping({"name": folder.name, "seed": seed, **config})
    (folder / "config.yaml").write_text(made.to_yaml())
    data = {**found, "config": made.model_dump(mode="json", by_alias=True), "digest": made.digest}
    (folder / "result.json").write_text(json.dumps(data))
    return folder
