"""What TreeLoRA is worth on the built-in stream, against plain LoRA behind the same router.

    python benchmarks/stream.py [--seeds 3] [--quick] [--out FILE]

Prints, over seeds: the score after the last task at equal steps and at a third of them (probe rounds and passes over
the rows counted as steps); for each task the steps after which 95% of the final accuracy of plain LoRA is reached; how
well the tree's largest gap finds the families; and what a step costs beside a plain one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treelora_ray.api import Run, assemble, run
from treelora_ray.config import RunConfig, load
from treelora_ray.core.layout import IntArray
from treelora_ray.data.rows import column
from treelora_ray.data.stream import open_stream
from treelora_ray.methods.base import Method
from treelora_ray.training import loop
from treelora_ray.training.evaluate import Evaluator

STEPS = 250
SETTINGS = {
    "treelora": ("quickstart", []),
    "independent": ("seqlora", ["method.name=independent", "objective.ce_scope=current", "objective.routing=inferred"]),
    "seqlora, routed": ("seqlora", ["objective.ce_scope=current", "objective.routing=inferred"]),
    "seqlora": ("seqlora", []),
}


def config(name: str, seed: int, folder: Path, steps: int, *more: str) -> RunConfig:
    preset, changes = SETTINGS[name]
    own = [f"name={name.replace(', ', '-')}-{seed}-{steps}", f"folder={folder}", f"seed={seed}", "train.threads=1"]
    return load(preset, [*changes, *own, f"train.steps={steps}", "train.checkpoint_every=null", *more])


def overhead(settings: RunConfig, rows: int) -> int:
    """What treelora does before its first step, as steps: probe rounds by their rows, two passes without gradients.

    A pass is counted as a third of the steps of its rows: forward is about a third of a step. Plain LoRA makes one of
    the two passes as well, for its router and head.
    """
    options, batch = settings.method.model_dump(), settings.train.batch
    probes = options["probe_rounds"] * (options["probe_batch"] or batch) / batch
    return round(probes + rows / batch / 3)


def family_index(done: Run) -> float:
    """Adjusted Rand index of the groups at the largest gap between heights; the pair that only looks alike left out."""
    from scipy.cluster.hierarchy import fcluster
    from sklearn.metrics import adjusted_rand_score

    guide = done.method.guide  # type: ignore[attr-defined]
    merges = linkage_of(guide)
    heights = merges[:, 2]
    at = int(np.argmax(np.diff(heights)))
    groups = fcluster(merges, (heights[at] + heights[at + 1]) / 2, "distance")
    families = done.result["families"]
    kept = [n for n, family in enumerate(families) if family != "permuted"]
    return float(adjusted_rand_score([families[n] for n in kept], [groups[n] for n in kept]))


def linkage_of(guide: Any) -> Any:
    from scipy.cluster.hierarchy import linkage

    n = len(guide.names)
    rows = [np.asarray(guide.store.pair_row(task)) for task in range(n)]
    return linkage(np.concatenate([np.asarray([rows[j][i] for j in range(i + 1, n)]) for i in range(n - 1)]), "average")


def steps_to(method: Method, target: IntArray | list[float], every: int) -> list[int | None]:
    """Task after task, the steps until its accuracy (the task known) reaches its target; None where it never does."""
    learner, found = method.learner, []
    evaluator = Evaluator(method, "oracle")
    for number, task in enumerate(learner.tasks):
        loop.begin_task(method, (number,))
        truth = np.array(learner.head.row(number, [str(x) for x in column(task.test, "label")], task.labels))
        reached: list[int] = []

        def look(step: int, *_: Any, number: int = number, truth: Any = truth, reached: list[int] = reached) -> None:
            if (step + 1) % every or reached:
                return
            learner.head.put(learner.rows, learner.head_parameter.detach())
            answers = evaluator.answer(learner.tasks[number].test, np.full(len(truth), number))
            if 100 * float(np.mean(answers.row == truth)) >= target[number]:
                reached.append(step + 1)

        look(every - 1)
        if reached:
            reached[0] = 0
        loop.train_task(method, 0, look, lambda _: None)
        loop.end_task(method)
        found.append(reached[0] if reached else None)
    return found


def learner_of(settings: RunConfig) -> Method:
    stream = open_stream(settings.stream, settings.seed)
    method = assemble(settings, stream.kind)
    method.learner.tasks = stream.tasks
    return method


def step_cost(folder: Path, repeats: int) -> list[float]:
    """Seconds of a task's steps with treelora's pull over those with plain seqlora, in turns."""
    methods = {}
    for name in ("treelora", "seqlora, routed"):
        method = learner_of(config(name, 0, folder, 40))
        method.learner.tasks = [method.learner.tasks[0], method.learner.tasks[5]]  # relatives: the pull is at work
        for number in (0, 1):
            loop.begin_task(method, (number,))
            if number == 0:
                loop.train_task(method, 0, lambda *_: None, lambda _: None)
                loop.end_task(method)
        methods[name] = method
    ratios = []
    for _ in range(repeats):
        took = {}
        for name, method in methods.items():
            start = time.perf_counter()
            loop.train_task(method, 0, lambda *_: None, lambda _: None)
            took[name] = time.perf_counter() - start
        ratios.append(took["treelora"] / took["seqlora, routed"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (1, 60) if options.quick else (options.seeds, STEPS)
    found: dict[str, Any] = {"scores": {}, "third": {}, "ari": [], "speed": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(seeds):
            compare(found, seed, folder, steps, 5)
        found["step_cost"] = step_cost(folder, 3 if options.quick else 9)
    report(found, steps)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


def compare(found: dict[str, Any], seed: int, folder: Path, steps: int, every: int) -> None:
    settings = config("treelora", seed, folder, steps)
    stream = open_stream(settings.stream, seed)
    extra = overhead(settings, len(stream.tasks[0].train))
    for share, key in ((1, "scores"), (3, "third")):
        for name in SETTINGS if share == 1 else ("treelora", "independent"):
            count = max(1, round(steps / share) - (extra if name == "treelora" else 0))
            done = run(config(name, seed, folder, count))
            found[key].setdefault(name, []).append(done.metrics["op"])
            if name == "treelora" and share == 1:
                found["ari"].append(family_index(done))
    plain = run(config("independent", seed, folder, steps, "objective.routing=oracle", f"name=oracle-{seed}"))
    target = [0.95 * score for score in plain.matrix[-1].tolist()]
    fresh = steps_to(learner_of(config("independent", seed, folder, steps)), target, every)
    warm = steps_to(learner_of(settings), target, every)
    families = [task.family for task in stream.tasks]
    for number, task in enumerate(stream.tasks):
        known = task.family in families[:number]
        plain_steps, warm_steps = fresh[number], warm[number]
        row = {
            "task": task.name,
            "seed": seed,
            "kind": "pair" if task.family == "permuted" else "relative" if known else "first",
            "fresh": steps if plain_steps is None else plain_steps,
            "treelora": (steps if warm_steps is None else warm_steps) + extra,
        }
        found["speed"].append(row)


def report(found: dict[str, Any], steps: int) -> None:
    def cell(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.1f} ± {spread:.1f}"

    print(f"| method | score, {steps} steps a task | score, a third of the steps |\n|---|---|---|")
    for name in SETTINGS:
        third = cell(found["third"][name]) if name in found["third"] else ""
        print(f"| {name} | {cell(found['scores'][name])} | {third} |")
    print(f"\nadjusted Rand index of the families: {', '.join(f'{x:.2f}' for x in found['ari'])}")
    print("\n| task | kind | fresh | treelora, with all it does before | ratio |\n|---|---|---|---|---|")
    for row in found["speed"]:
        ratio = row["fresh"] / row["treelora"]
        print(f"| {row['task']} ({row['seed']}) | {row['kind']} | {row['fresh']} | {row['treelora']} | {ratio:.2f} |")
    for kind in ("relative", "first", "pair"):
        ratios = [row["fresh"] / row["treelora"] for row in found["speed"] if row["kind"] == kind]
        print(f"median ratio, {kind}: {statistics.median(ratios):.2f}")
    cost = found["step_cost"]
    print(f"\na step of treelora over a plain one: median {statistics.median(cost):.3f} of {len(cost)} pairs")


if __name__ == "__main__":
    main()
