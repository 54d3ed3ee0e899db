"""What TreeLoRA is worth on the built-in stream, against plain LoRA behind the same router.

    python benchmarks/stream.py [--seeds 3] [--first 1] [--quick] [--out FILE]

Prints, over seeds: the score after the last task at equal steps and at a third of them (probe rounds and passes over
the rows counted as steps); for each task the steps after which 95% of the final accuracy of plain LoRA is reached; how
well the tree's families are those that were built in; and what a step costs beside a plain one, on the stream and on a
pre-trained sentence encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks.encoder import encoder  # noqa: E402
from benchmarks.planted import adjusted_rand, as_labels  # noqa: E402
from treelora_ray.api import Run, assemble, run  # noqa: E402
from treelora_ray.config import RunConfig, load  # noqa: E402
from treelora_ray.core.layout import IntArray  # noqa: E402
from treelora_ray.data.rows import column  # noqa: E402
from treelora_ray.data.stream import open_stream  # noqa: E402
from treelora_ray.methods.base import Method  # noqa: E402
from treelora_ray.training import loop  # noqa: E402
from treelora_ray.training.evaluate import Evaluator  # noqa: E402

STEPS = 300
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


def overhead(settings: RunConfig) -> int:
    """What treelora does before its first step, in steps: the probe, and a forward pass over the same rows.

    A pass without gradients is counted as a third of the steps of its rows. The pass over all rows that the router
    needs is made by every method here, and not counted.
    """
    options, batch = settings.method.model_dump(), settings.train.batch
    return round(4 / 3 * options["probe_rounds"] * (options["probe_batch"] or batch) / batch)


def family_index(done: Run) -> float:
    """Adjusted Rand index of the tree's families; the pair that only looks alike left out."""
    groups, families = as_labels(done.method.guide.tree.families()), done.result["families"]  # type: ignore[attr-defined]
    kept = [number for number, family in enumerate(families) if family != "permuted"]
    return adjusted_rand(groups[kept], np.array(families)[kept])


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


def step_cost(folder: Path, repeats: int, *more: str, tasks: tuple[int, int] = (0, 3)) -> list[float]:
    """Seconds of a related task's steps with treelora's pull over those of plain seqlora, in turns."""
    methods = {}
    for name in ("treelora", "seqlora, routed"):
        method = learner_of(config(name, 0, folder, 40, *more))
        method.learner.tasks = [method.learner.tasks[number] for number in tasks]
        loop.begin_task(method, (0,))
        loop.train_task(method, 0, lambda *_: None, lambda _: None)
        loop.end_task(method)
        loop.begin_task(method, (1,))
        methods[name] = method
    choice = methods["treelora"].choice  # type: ignore[attr-defined]
    if not (choice.warm >= 0).any():
        raise SystemExit("the second task leans on nothing: its steps say nothing of the pull")
    ratios = []
    for _ in range(repeats):
        took = {}
        for name, method in methods.items():
            start = time.perf_counter()
            loop.train_task(method, 0, lambda *_: None, lambda _: None)
            took[name] = time.perf_counter() - start
        ratios.append(took["treelora"] / took["seqlora, routed"])
    return ratios


def sentences(folder: Path) -> list[str]:
    """Settings of two related tasks of sentences on the encoder of the extra `bench`; none without it."""
    if (found := encoder()) is None:
        return []
    rng = np.random.default_rng(0)
    words = {
        "fruit": ["apple", "pear", "plum", "cherry", "grape", "melon"],
        "tool": ["hammer", "saw", "drill", "pliers", "wrench", "axe"],
    }
    common = ["the", "a", "we", "saw", "bought", "old", "new", "good", "that", "was", "very", "on", "in", "of", "with"]
    for task in ("one", "other"):
        (folder / "sentences" / task).mkdir(parents=True)
        for split, count in (("train", 320), ("test", 16)):
            labels = [list(words)[number % 2] for number in range(count)]
            texts = [" ".join(rng.permutation([*rng.choice(common, 24), *rng.choice(words[x], 4)])) for x in labels]
            table = pa.table({"text": texts, "label": labels})
            pq.write_table(table, folder / "sentences" / task / f"{split}.parquet")
    where = [f"stream.path={folder / 'sentences'}", f"model.backbone={found}"]
    return ["stream.source=parquet", "stream.tasks=[one, other]", *where, "model.max_length=48", "train.lr=1e-3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=1, help="the first seed; the stream was designed with seed 0")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["TREELORA_TRACKING"] = "none"
    torch.set_num_threads(1)
    seeds, steps = (1, 60) if options.quick else (options.seeds, STEPS)
    found: dict[str, Any] = {"scores": {}, "third": {}, "ari": [], "speed": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(options.first, options.first + seeds):
            compare(found, seed, folder, steps, 5)
        repeats = 3 if options.quick else 9
        found["step_cost"] = {"the built-in stream": step_cost(folder, repeats)}
        if text := sentences(folder):
            found["step_cost"]["the sentence encoder"] = step_cost(folder, repeats, *text, tasks=(0, 1))
    report(found, steps)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


def compare(found: dict[str, Any], seed: int, folder: Path, steps: int, every: int) -> None:
    settings = config("treelora", seed, folder, steps)
    stream = open_stream(settings.stream, seed)
    extra = overhead(settings)
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
    print()
    for where, cost in found["step_cost"].items():
        print(
            f"a step of treelora over a plain one, {where}: median {statistics.median(cost):.3f} of {len(cost)} pairs"
        )


if __name__ == "__main__":
    main()
