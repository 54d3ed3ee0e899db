"""What stopping early is worth: a sweep of the built-in stream with ASHA against the same trials in full.

    python benchmarks/sweep.py [--trials 16] [--quick] [--out FILE]

Both sweeps draw the same settings of the space `treelora`. Printed are the best score on held-out rows of both, the
time of the search with ASHA over that of the whole (of its learning, and on the clock), and how long a trial takes to
begin in an actor that has had one before: from its turn until its stream, backbone and method stand ready.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from treelora_ray.cluster import sweep as module
from treelora_ray.cluster.sweep_plan import SweepOptions
from treelora_ray.cluster.sweep_search import Conductor
from treelora_ray.config import RunConfig, load
from treelora_ray.training.stream import Listener

QUICK = ["stream.tasks=4", "stream.rows=160", "stream.test_rows=40", "train.epochs=1"]


class Timed(Conductor):
    """When each trial of the search was given out, and when it ended; seconds since the epoch."""

    given: dict[str, float]
    ended: dict[str, float]

    def suggest(self, trial_id: str) -> Any:
        found = super().suggest(trial_id)
        if isinstance(found, dict):
            self.given[found["id"]] = time.time()
        return found

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.active.get(trial_id)
        super().on_trial_complete(trial_id, result, error)
        if trial is not None:
            self.ended[trial.id] = time.time()


class Shown(Listener):
    def note(self, text: str) -> None:
        print(text, flush=True)


def measure(base: RunConfig, scheduler: str, trials: int) -> dict[str, Any]:
    Timed.given, Timed.ended = {}, {}
    options = SweepOptions(trials=trials, scheduler=scheduler, seeds=1, top=1, name=scheduler)
    done = module.sweep(base, options, listener=Shown())
    names = [trial.id for trial in done.trials]
    ready = {name: (done.folder.path / "trials" / name / "config.yaml").stat().st_mtime for name in names}
    assert done.winner is not None
    return {
        "best": done.best(1)[0].history[-1]["val_op"],
        "test": done.winner["test"]["op"],
        "stopped": sum(trial.state == "stopped" for trial in done.trials),
        "learning": sum(trial.history[-1]["seconds"] for trial in done.trials if trial.history),
        "clock": max(Timed.ended[name] for name in names) - min(Timed.given[name] for name in names),
        "starts": [ready[name] - Timed.given[name] for name in names],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="four short tasks: whether it runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["TREELORA_TRACKING"] = "none"
    os.environ.setdefault("RAY_worker_niceness", "0")
    setattr(module, "Conductor", Timed)  # noqa: B010
    with tempfile.TemporaryDirectory() as folder:
        base = load("quickstart", [f"folder={folder}", "cluster.address=local", *(QUICK if options.quick else [])])
        whole, asha = (measure(base, scheduler, options.trials) for scheduler in ("none", "asha"))
    tell(whole, asha)
    if options.out:
        options.out.write_text(json.dumps({"whole": whole, "asha": asha}, indent=1))


def tell(whole: dict[str, Any], asha: dict[str, Any]) -> None:
    later = [seconds for each in (whole, asha) for seconds in sorted(each["starts"])[: len(each["starts"]) // 2]]
    print("| | all in full | ASHA | |\n|---|---:|---:|---:|")
    best = asha["best"] - whole["best"]
    print(f"| best score, held-out rows | {whole['best']:.2f} | {asha['best']:.2f} | {best:+.2f} |")
    print(f"| score of the winner, test rows | {whole['test']:.2f} | {asha['test']:.2f} | |")
    for key, words in (("learning", "seconds of learning"), ("clock", "seconds of the search")):
        print(f"| {words} | {whole[key]:.0f} | {asha[key]:.0f} | {100 * asha[key] / whole[key]:.0f}% |")
    print(f"| trials stopped early | {whole['stopped']} | {asha['stopped']} | |")
    print(f"\nA trial begins within {statistics.median(later):.2f} s in an actor that has had one before.", flush=True)


if __name__ == "__main__":
    main()
