"""What a step with TreeLoRA's pull costs beside a plain one, on the built-in stream and on a pre-trained encoder.

    python benchmarks/step_cost.py [--repeats 9] [--out FILE]

Both learn a task that leans on the one before, in the same process and in turn; printed is the median of their ratios.
Without the extra `bench` the encoder is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks.encoder import encoder  # noqa: E402
from treelora_ray.api import assemble  # noqa: E402
from treelora_ray.config import load  # noqa: E402
from treelora_ray.data.stream import open_stream  # noqa: E402
from treelora_ray.methods.base import Method  # noqa: E402
from treelora_ray.training import loop  # noqa: E402

PRESETS = {
    "treelora": ("quickstart", ["method.guide={commit: task, gate: 0}"]),  # it leans on the one before, whatever it is
    "seqlora": ("seqlora", ["objective.ce_scope=current", "objective.routing=inferred"]),
}


def learner_of(name: str, folder: Path, *more: str) -> Method:
    preset, changes = PRESETS[name]
    own = [f"folder={folder}", "train.threads=1", "train.steps=40", "train.checkpoint_every=null", "tracking.to=none"]
    settings = load(preset, [*changes, *own, *more])
    stream = open_stream(settings.stream, settings.seed)
    method = assemble(settings, stream.kind)
    method.learner.tasks = stream.tasks
    return method


def step_cost(folder: Path, repeats: int, *more: str, tasks: tuple[int, int] = (0, 3)) -> list[float]:
    """Seconds of a related task's steps with treelora's pull over those of plain LoRA, in turn."""
    methods = {}
    for name in PRESETS:
        method = learner_of(name, folder, *more)
        method.learner.tasks = [method.learner.tasks[number] for number in tasks]
        loop.begin_task(method, (0,))
        loop.train_task(method, 0, lambda *_: None, lambda _: None)
        loop.end_task(method)
        loop.begin_task(method, (1,))
        methods[name] = method
    assert (methods["treelora"].choice.warm >= 0).all()  # type: ignore[attr-defined]
    ratios = []
    for _ in range(repeats):
        took = {}
        for name, method in methods.items():
            start = time.perf_counter()
            loop.train_task(method, 0, lambda *_: None, lambda _: None)
            took[name] = time.perf_counter() - start
        ratios.append(took["treelora"] / took["seqlora"])
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"the built-in stream": step_cost(folder, options.repeats)}
        if text := sentences(folder):
            found["the sentence encoder"] = step_cost(folder, options.repeats, *text, tasks=(0, 1))
    print(f"| step of treelora over a plain one | median | lowest to highest of {options.repeats} |\n|---|---:|---:|")
    for where, cost in found.items():
        print(f"| {where} | {statistics.median(cost):.3f} | {min(cost):.3f} to {max(cost):.3f} |")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
