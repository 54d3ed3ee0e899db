"""Does it run on a small device? One thread and 2 GiB of memory for data, in a process of its own for each run.

    python benchmarks/small_device.py [DATA] [--gib 2] [--repeats 3] [--tiny]

The built-in stream with its own small backbone and, where DATA (the text tasks) is given, a pre-trained sentence
encoder of 22 million weights. The limit is the kernel's (RLIMIT_DATA: heap and private pages); a run that needs more
fails. Printed: peak resident memory, and seconds of a step and of all training over those of seqlora, runs in turn.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks.encoder import needed_encoder  # noqa: E402
from treelora_ray.api import Run  # noqa: E402
from treelora_ray.cluster.compare_rows import Row  # noqa: E402
from treelora_ray.config import load, with_values  # noqa: E402
from treelora_ray.tracking.compare import Entry  # noqa: E402
from treelora_ray.tracking.comparison_data import step_seconds, train_seconds  # noqa: E402

METHODS = ("seqlora", "treelora")
TINY = ["stream.rows=40", "stream.test_rows=20", "train.steps=3"]


def streams(data: Path | None, tiny: bool) -> dict[str, tuple[str, list[str]]]:
    """By name a preset and what is changed of it."""
    found = {"images": ("quickstart", ["stream.tasks=6", "train.epochs=2", *(TINY if tiny else [])])}
    if data is not None:
        tasks = "stream.tasks=[yelp, amazon, dbpedia, agnews]"
        rows = ["stream.rows=400", "stream.test_rows=50", "train.steps=40", "train.batch=16", *(TINY if tiny else [])]
        place = [f"stream.path={data}", f"model.backbone={needed_encoder()}", "model.max_length=64"]
        found["texts"] = ("text", [tasks, *rows, *place])
    return found


def learn(preset: str, changes: list[str], method: str, folder: Path, gib: float) -> tuple[float, float, float]:
    """MiB at the peak, seconds of a step and of all training, of a process that gets so much memory and no more."""
    base = load(preset, [*changes, f"folder={folder}", f"name={method}", "tracking.to=none", "train.threads=1"])
    config = with_values(base, Row(method, method).values(base), method)
    path, most = folder / f"{method}.yaml", int(gib * 2**30)
    path.write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "treelora_ray", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{method} failed within {gib:g} GiB:\n{done.stderr[-2000:]}")
    run = Run(folder / method)
    entry = Entry(method, run.config, run.result)
    return run.result["peak_memory_bytes"] / 2**20, step_seconds(entry) or 0.0, train_seconds(entry)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few rows and steps")
    options = parser.parse_args(given)
    data = None if options.data is None else options.data.resolve()
    asked = streams(data, options.tiny)
    print(f"One thread, {options.gib:g} GiB for data; medians of {options.repeats} runs each, in turn.\n")
    print("| stream | method | MiB at the peak | ms a step | step over seqlora | training over seqlora |")
    print("|---|---|---:|---:|---:|---:|")
    for name, (preset, changes) in asked.items():
        found: dict[str, list[tuple[float, float, float]]] = {method: [] for method in METHODS}
        with tempfile.TemporaryDirectory() as scratch:
            for number in range(options.repeats):
                folder = Path(scratch) / str(number)
                folder.mkdir()
                for method, of_method in found.items():
                    of_method.append(learn(preset, changes, method, folder, options.gib))
        for method, of_method in found.items():
            pairs = zip(of_method, found[METHODS[0]], strict=True)
            step, training = zip(*((own[1] / plain[1], own[2] / plain[2]) for own, plain in pairs), strict=True)
            print(
                f"| {name} | {method} | {max(each[0] for each in of_method):,.0f} "
                f"| {1000 * statistics.median(each[1] for each in of_method):.1f} "
                f"| {statistics.median(step):.2f} | {statistics.median(training):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
