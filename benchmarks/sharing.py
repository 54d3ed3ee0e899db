"""What a run saves that shares backbone, stream and looks with one before it, as a sweep's trials do.

    python benchmarks/sharing.py [--repeats 5] [--quick] [--config quickstart] [KEY=VALUE ...]

Prints the time from a run's start to its first optimizer step, of a second run with sharing over that of one without
(pairs, in turns, in one process), and where the time goes. The second run has another penalty and learning rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from treelora_ray.api import learn
from treelora_ray.config import RunConfig, load
from treelora_ray.methods.shared import Shared
from treelora_ray.store import open_folder
from treelora_ray.training.stream import Listener

QUICK = ["stream.tasks=2", "stream.rows=64", "stream.test_rows=20", "train.steps=5", "method.probe_rounds=2"]
OTHER = ["method.lambda=0.5", "train.lr=0.001"]


class Started(Exception):  # noqa: N818
    """The first step has been taken."""


class UntilFirstStep(Listener):
    def step(self, step: int, of: int, loss: float) -> None:  # noqa: ARG002
        raise Started


def seconds_to_first_step(config: RunConfig, folder: Path, shared: Shared | None) -> float:
    folder.mkdir(parents=True)
    start = time.perf_counter()
    try:
        with open_folder(str(folder)) as opened:
            learn(config, opened, listener=UntilFirstStep(), shared=shared)
    except Started:
        return time.perf_counter() - start
    raise AssertionError("the run took no step")


def seconds_of_looking(config: RunConfig, folder: Path, shared: Shared | None) -> dict[str, float]:
    """A whole run: its own seconds, those of its probes and passes, and what others had paid for."""
    folder.mkdir(parents=True)
    start = time.perf_counter()
    with open_folder(str(folder)) as opened:
        learn(config, opened, listener=Listener(), shared=shared)
    found = {"whole": time.perf_counter() - start}
    efforts = [record["effort"] for record in json.loads((folder / "result.json").read_text())["records"]]
    for phase in ("probe", "statistics"):
        found[phase] = sum(effort["seconds"].get(phase, 0.0) for effort in efforts)
    return found | {"reused": sum(effort["reused"].get("seconds", 0.0) for effort in efforts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: says that it works, not what it saves")
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes = ["tracking.to=none", "train.checkpoint_every=null", *(QUICK if options.quick else []), *options.changes]
    first, second = load(options.config, changes), load(options.config, [*changes, *OTHER])
    with tempfile.TemporaryDirectory() as name:
        folder, shared = Path(name), Shared()
        spent = {"first": seconds_of_looking(first, folder / "first", shared)}
        pairs: list[tuple[float, float]] = []
        for number in range(options.repeats):
            alone = seconds_to_first_step(second, folder / f"alone-{number}", None)
            pairs.append((alone, seconds_to_first_step(second, folder / f"shared-{number}", shared)))
        spent["second, shared"] = seconds_of_looking(second, folder / "second", shared)
        spent["second, alone"] = seconds_of_looking(second, folder / "alone", None)
    alone, together = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
    ratios = [one / other for one, other in pairs]
    print(f"start to first step: alone {alone:.3f} s, sharing {together:.3f} s, medians of {len(pairs)} pairs")
    print(f"alone over sharing: median {statistics.median(ratios):.1f}, {min(ratios):.1f} to {max(ratios):.1f}")
    for label, took in spent.items():
        print(f"{label}: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in took.items()))


if __name__ == "__main__":
    main()
