"""What Ray costs and gives: step times in one process, with one worker and with two; start and recovery.

    python benchmarks/ray_overhead.py [--repeats 5] [--quick] [--out FILE]

Both sides of a ratio are measured in turn in the same process, on two related tasks of sentences on a pre-trained
encoder (without the extra `bench`: on the built-in stream). One thread a worker; the global batch stays the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.step_cost import sentences
from treelora_ray.cluster import run as cluster_run
from treelora_ray.config import RunConfig, load
from treelora_ray.store import open_folder
from treelora_ray.training.errors import Stopped
from treelora_ray.training.stream import Listener

PLACES = {"treelora": [], "paper": ["method.mode=paper", "method.probe_rounds=2"]}


def settings(name: str, folder: Path, stream: list[str], steps: int, workers: int, mode: str) -> RunConfig:
    own = [f"name={name}", f"folder={folder}", f"train.steps={steps}", "train.threads=1", "train.checkpoint_every=null"]
    limits = ["stream.test_rows=8", *stream] if stream else ["stream.tasks=2", "stream.test_rows=8"]
    return load("quickstart", [*own, *limits, *PLACES[mode], f"cluster.workers={workers}"])


def timed(task: dict[Any, Any]) -> None:
    """On each worker: runs in turn, alone (worker 0 only, where `alone`) and together; seconds of their steps."""
    import torch.distributed as dist

    from treelora_ray.api import learn
    from treelora_ray.cluster import worker
    from treelora_ray.cluster.desk import Reporter
    from treelora_ray.config import from_mapping
    from treelora_ray.store import open_folder

    class Clock(Listener):
        def __init__(self) -> None:
            self.times: list[float] = []

        def step(self, step: int, of: int, loss: float) -> None:  # noqa: ARG002
            self.times.append(time.perf_counter() if step else float("nan"))

        def seconds(self) -> float:
            """The median time between two steps, without the first ten of each task."""
            apart = [b - a for a, b in zip(self.times[:-1], self.times[1:], strict=True)]
            return statistics.median(x for x in apart[10:] if x == x)

    clock = Clock()
    original = Reporter.step

    def step(self: Reporter, number: int, of: int, loss: float) -> None:
        clock.step(number, of, loss)
        original(self, number, of, loss)

    setattr(Reporter, "step", step)  # noqa: B010
    found: dict[str, list[float]] = {}
    for pair in task["pairs"]:
        if pair["alone"] and dist.get_rank() == 0:
            clock.times.clear()
            config = from_mapping(pair["alone"])
            folder = Path(config.folder) / f"{config.name}-alone"
            folder.mkdir()
            learn(config, open_folder(folder), listener=clock)
            found.setdefault(f"{pair['mode']} alone", []).append(clock.seconds())
        clock.times.clear()
        worker.work(pair["together"])
        found.setdefault(f"{pair['mode']} together", []).append(clock.seconds())
    if dist.get_rank() == 0:
        Path(task["out"]).write_text(json.dumps(found))


def measure(folder: Path, stream: list[str], steps: int, repeats: int, workers: int) -> dict[str, list[float]]:
    from ray.train import RunConfig as TrainRun
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    pairs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for repeat in range(repeats):
            for mode in PLACES:
                config = settings(f"{mode}-{workers}-{repeat}", folder, stream, steps, workers, mode)
                own = folder / str(config.name)
                own.mkdir(parents=True)
                actors = stack.enter_context(cluster_run._actors(config, str(own)))
                plain = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 0})})
                alone = plain.model_dump(mode="json", by_alias=True) if workers == 1 else None
                pairs.append({"mode": mode, "alone": alone, "together": actors[1]})
        out = folder / f"times-{workers}.json"
        TorchTrainer(
            timed,
            train_loop_config={"pairs": pairs, "out": str(out)},
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            torch_config=TorchConfig(backend="gloo"),
            run_config=TrainRun(name=f"times-{workers}", storage_path=str(folder)),
        ).fit()
    result: dict[str, list[float]] = json.loads(out.read_text())
    for pair in pairs:
        result.setdefault(f"{pair['mode']} exchange", []).append(exchange(Path(pair["together"]["folder"])))
    return result


def exchange(run: Path) -> float:
    """The share of the training thread's time in which it asked the guide, or told it something."""
    spent = [record["effort"]["seconds"] for record in json.loads((run / "result.json").read_text())["records"]]
    return sum(each.get("exchange", 0.0) for each in spent) / sum(each["train"] for each in spent)


def recovery(folder: Path, stream: list[str], steps: int) -> tuple[float, float]:
    """Seconds from the driver's call to the first step, and from the kill of a worker to the next one."""
    import psutil

    class Watch(Listener):
        first = killed = again = 0.0

        def step(self, step: int, of: int, loss: float) -> None:  # noqa: ARG002
            now = time.perf_counter()
            if not self.first:
                self.first = now
            elif not self.killed and now - self.first > 1:
                found = [p for p in psutil.process_iter() if "RayTrainWorker" in " ".join(_words(p))]
                os.kill(found[0].pid, signal.SIGKILL)
                self.killed = now
            elif self.killed and not self.again and now - self.killed > 0.5:
                self.again = now

    watch, config = Watch(), settings("recovery", folder, stream, 20 * steps, 2, "treelora")
    began = time.perf_counter()
    with suppress(Stopped):  # as asked, once it has recovered
        cluster_run.train(config, open_folder(folder / "recovery"), watch, lambda: bool(watch.again))
    return watch.first - began, watch.again - watch.killed


def _words(process: Any) -> list[str]:
    import psutil

    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["TREELORA_TRACKING"] = "none"
    repeats, steps = (1, 30) if options.quick else (options.repeats, 60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stream = sentences(folder)
        os.environ.setdefault("RAY_worker_niceness", "0")
        local = load("quickstart", ["cluster.workers=2", "cluster.address=local"]).cluster
        with cluster_run.connected(local, Listener()):
            one = measure(folder, stream, steps, repeats, 1)
            two = measure(folder, stream, steps, repeats, 2)
            tell(one, two)
            start, again = recovery(folder, stream, steps)
    print(f"\nfirst step after {start:.1f} s, next step after a worker's death {again:.1f} s")
    found: dict[str, Any] = {"one": one, "two": two, "first_step": start, "recovery": again}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


def tell(one: dict[str, list[float]], two: dict[str, list[float]]) -> None:
    print("| | ratio |\n|---|---:|")
    for mode in PLACES:
        pairs = zip(one[f"{mode} together"], one[f"{mode} alone"], strict=True)
        print(
            f"| step of mode {mode}, one worker over one process | {statistics.median(a / b for a, b in pairs):.3f} |"
        )
        share = statistics.median(one[f"{mode} exchange"])
        print(f"| exchanges with the guide while it trains, of a worker's time, mode {mode} | {share:.4f} |")
    faster = statistics.median(one["treelora together"]) / statistics.median(two["treelora together"])
    print(f"| rows a second, two workers over one | {faster:.2f} |", flush=True)


if __name__ == "__main__":
    main()
