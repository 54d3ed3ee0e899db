"""What it costs a run to tell of itself, with a batch of metrics a second going to MLflow.

    python benchmarks/tracking.py [--repeats 9] [--steps 400]

Prints the share of the training thread's time that its calls to the tracker take, and the time of a step that is told
over that of one that is not (pairs, in turns, on the built-in stream; another process delivers meanwhile).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from treelora_ray.api import assemble
from treelora_ray.config import RunConfig, load
from treelora_ray.data.stream import open_stream
from treelora_ray.tracking import tracked
from treelora_ray.training import loop
from treelora_ray.training.stream import StreamRun
from treelora_ray.training.tracker import Tracker


class Timed:
    """A tracker, and the seconds spent in it."""

    def __init__(self, inner: Tracker) -> None:
        self.inner, self.seconds = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def prepared(config: RunConfig, folder: Path, tracker: Any) -> StreamRun:
    """A run within its first task, whose steps can be taken again and again."""
    stream = open_stream(config.stream, config.seed)
    run = StreamRun(config, stream, assemble(config, stream.kind), folder, tracker=tracker)
    loop.begin_task(run.method, (0,))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.pop(tracked.VARIABLE, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        changes = [f"folder={name}", "name=run", f"train.steps={options.steps}", "tracking.model=false"]
        config = load("quickstart", [*changes, "train.checkpoint_every=null"])
        teller = Timed(tracked.tracker(config.tracking, folder, config.train.batch, print))
        told, plain = prepared(config, folder, teller), prepared(config, folder, Tracker())
        teller.begins(told.about(), fresh=True, left=1)
        teller.inner.sender.connected(tracked.FIRST_CONTACT)  # type: ignore[attr-defined]
        ratios, shares = [], []
        for number in range(options.repeats):
            took = {}
            told.done = number  # of another unit each time, since what was told is not told again
            for label, run in (("told", told), ("plain", plain)):
                before, start = teller.seconds, time.perf_counter()
                loop.train_task(run.method, 0, run._after_step, lambda _: None)
                took[label] = time.perf_counter() - start
                if label == "told":
                    shares.append((teller.seconds - before) / took[label])
            ratios.append(took["told"] / took["plain"])
        teller.ends("KILLED")
    middle, most = (100 * x for x in (statistics.median(shares), max(shares)))
    print(f"share of the training thread's time: median {middle:.2f}%, most {most:.2f}%")
    print(f"a step that is told over one that is not: median {statistics.median(ratios):.3f} of {len(ratios)} pairs")


if __name__ == "__main__":
    main()
