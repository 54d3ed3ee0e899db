"""What the guide costs, against what is unavoidable, measured in one run.

    python benchmarks/guide.py [--quick] [--out benchmarks/out/guide.json] [--figure docs/figures/regret.png]

1. One full exchange of mode `paper` (select one pull a layer, measure, observe, add the penalty) against
   `torch.add` over vectors of the same size, and against a plain loop over layers that gives the same answers.
2. Search alone, with 100 and 10,000 stored tasks, and inserting into 10,000.
3. Bytes of stored state.
4. Cumulative regret of four searches on a smooth tree of tasks, by the number of tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core.bandit import Exhaustive, FlatLCB, PooledTreeLCB, Random, Search
from treelora_ray.core.config import GuideConfig
from treelora_ray.core.grow import GROWTH, linkage_tree
from treelora_ray.core.guide import Guide
from treelora_ray.core.layout import Layout
from treelora_ray.core.nodes import NodeStats
from treelora_ray.core.penalty import DirectionPull

STRENGTH = 0.1


def medians_ms(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median ms of each call, called in turn, so that all meet the same machine and nobody's warm cache."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) * 1e3 for name, taken in times.items()}


# -- 1. the exchange


class Exchange:
    """Mode `paper` with `tasks` stored, ready for one exchange after another."""

    def __init__(self, layers: int, size: int, tasks: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = Layout.of_sizes([size] * layers)
        self.guide = Guide(self.layout, GuideConfig.of("paper"))
        for number in range(tasks):
            self.guide.begin_task(f"task{number}")
            self.guide.insert(torch.randn(self.layout.total, generator=generator))
        self.start = torch.randn(self.layout.total, generator=generator)
        self.theta = self.start + 1e-3 * torch.randn(self.layout.total, generator=generator)
        self.grad = torch.randn(self.layout.total, generator=generator)
        self.pull = DirectionPull(self.layout, self.start)
        self.guide.begin_task("now")
        self.step = 0

    def vectorised(self) -> tuple[np.ndarray, Tensor]:
        arms = self.guide.select(self.step)
        self.pull.aim(self.guide.directions(arms, self.pull.target))
        seen = self.pull.measure(self.theta)
        self.guide.observe(self.step, seen)
        self.pull.add_(self.grad, STRENGTH)
        self.step += 1
        return arms, seen

    def reference(self) -> tuple[np.ndarray, Tensor]:
        """The same, one layer after the other."""
        arms = self.guide.select(self.step)
        seen = torch.zeros(len(self.layout))
        for layer, arm in enumerate(arms):
            moved = self.layout.segment(self.theta, layer) - self.layout.segment(self.start, layer)
            norm = moved.abs().sum() + 1e-12
            stored = self.layout.segment(self.guide.store.rows.values[arm], layer).float()
            away = moved / norm - stored * self.guide.store.rows.scales[arm, layer]
            seen[layer] = away.abs().sum() / 2
            self.layout.segment(self.grad, layer).add_(away.sign() * (STRENGTH / len(self.layout) / norm))
        self.guide.observe(self.step, seen)
        self.step += 1
        return arms, seen


def check_equal(layers: int, size: int, tasks: int) -> None:
    fast, plain = Exchange(layers, size, tasks), Exchange(layers, size, tasks)
    for _ in range(5):
        one, other = fast.vectorised(), plain.reference()
        assert (one[0] == other[0]).all(), "the loop chooses other tasks"
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-6)
    same = torch.isclose(fast.grad, plain.grad, rtol=1e-4, atol=1e-6)
    # Where a difference is zero but for rounding its sign is anyone's.
    assert same.float().mean() > 1 - 1e-5, "the loop adds another penalty"


def exchange(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for layers, size, tasks in ((64, 32_768, 24), (64, 2_048, 24), (8, 262_144, 24)):
        check_equal(layers, min(size, 32_768), 6)
        bench = Exchange(layers, size, tasks)
        a, b, c = (torch.randn(layers * size) for _ in range(3))
        add = partial(torch.add, a, b, out=c)
        sides: dict[str, Callable[[], Any]] = {"add": add, "ours": bench.vectorised, "loop": bench.reference}
        rounds = [medians_ms(sides, repeats) for _ in range(5)]
        rows.append(
            {
                "layers": layers,
                "values": size,
                "tasks": tasks,
                "exchange_ms": statistics.median(took["ours"] for took in rounds),
                "times_torch_add": statistics.median(took["ours"] / took["add"] for took in rounds),
                "loop_over_ours": statistics.median(took["loop"] / took["ours"] for took in rounds),
            }
        )
    return rows


# -- 2. and 3. search, insertion, memory with many tasks


def stocked_guide(tasks: int, layers: int, dim: int, family: int = 12) -> Guide:
    """A guide of mode `treelora` with so many stored tasks, in families, filled in bulk."""
    layout = Layout.of_sizes([dim] * layers)
    guide = Guide(layout, GuideConfig.of("treelora", sketch_dim=None))
    generator = torch.Generator().manual_seed(tasks)
    centres = torch.randn(-(-tasks // family), layout.total, generator=generator)
    rows = guide.store.rows
    for number in range(tasks):
        rows.append(centres[number // family] * 0.65 + torch.randn(layout.total, generator=generator))
    guide.names = [f"task{number}" for number in range(tasks)]
    guide.slots.of_task = list(range(tasks))
    guide.store.pairs = pair_distances(guide, block=1000)
    guide.keeper.refresh([guide.store.pair_row(task) for task in range(tasks)])
    return guide


def pair_distances(guide: Guide, block: int) -> np.ndarray:
    """All pairs by matrix products; the store itself appends one row a task."""
    rows, n, layers = guide.store.rows, len(guide.store), len(guide.layout)
    mean = np.zeros(n * (n - 1) // 2, np.float32)
    for low in range(0, n, block):
        for left in range(0, low + 1, block):
            total = torch.zeros(min(block, n - low), min(block, n - left))
            for layer in range(layers):
                one = rows.layer(np.arange(low, min(low + block, n)), layer)
                other = rows.layer(np.arange(left, min(left + block, n)), layer)
                total += (2 - 2 * one @ other.T).clamp_(min=0).sqrt_()
            for row in range(len(total)):
                i, width = low + row, min(block, max(low + row - left, 0))
                start = i * (i - 1) // 2 + left
                mean[start : start + width] = total[row, :width].numpy() / (2 * layers)
    return mean


def search_cost(guide: Guide, pulls: int, repeats: int) -> float:
    """Median ms of a round of so many pulls for every layer, begun anew each time."""
    guide.config = GuideConfig.of("treelora", sketch_dim=None, pulls_per_round=pulls)
    generator = torch.Generator().manual_seed(1)
    times: list[float] = []
    for number in range(repeats):
        direction = guide.store.rows[number % len(guide.store)] + torch.randn(guide.layout.total, generator=generator)
        guide.current = None
        guide.begin_task("now")
        now: Any = guide.current
        now.exact, now.search = False, guide._make_search(exact=False, steps_per_epoch=None)
        start = time.perf_counter()
        guide._round(now, now.search, 0, direction)
        times.append(time.perf_counter() - start)
    guide.current = None
    return statistics.median(times) * 1e3


def many_tasks(sizes: tuple[int, int], repeats: int) -> dict[str, Any]:
    layers, dim = 64, 512
    found: dict[str, Any] = {"layers": layers, "values": dim, "sizes": list(sizes)}
    for tasks in sizes:
        torch.set_num_threads(2)
        guide = stocked_guide(tasks, layers, dim)
        torch.set_num_threads(1)
        guide.stats = NodeStats.build(guide.store, guide.tree)
        found[f"one_pull_ms_{tasks}"] = search_cost(guide, 1, repeats)
        found[f"pulls32_ms_{tasks}"] = search_cost(guide, 32, repeats)
    found["one_pull_ratio"] = found[f"one_pull_ms_{sizes[1]}"] / found[f"one_pull_ms_{sizes[0]}"]
    found["pulls32_ratio"] = found[f"pulls32_ms_{sizes[1]}"] / found[f"pulls32_ms_{sizes[0]}"]
    found |= insertion(guide, repeats)
    n = len(guide.store)
    found["stored_bytes"] = guide.nbytes()
    found["signature_bytes"] = n * guide.layout.total * 2
    found["pair_bytes"] = n * (n - 1) // 2 * 4
    found["stored_gib"] = guide.nbytes() / 2**30
    return found


def insertion(guide: Guide, repeats: int) -> dict[str, float]:
    """Mean cost of an insertion, and with the share of a rebuild that it brings nearer."""
    generator = torch.Generator().manual_seed(2)
    start = time.perf_counter()
    guide.keeper.rebuild()
    guide.stats = NodeStats.build(guide.store, guide.tree)
    rebuild = time.perf_counter() - start
    tasks, rebuilt = len(guide.store), 0
    times: list[float] = []
    for number in range(repeats):
        near = guide.store.rows[int(torch.randint(tasks, (1,), generator=generator))]
        signature = (
            near * 0.5 + 0.9 * torch.randn(guide.layout.total, generator=generator) / guide.layout.sizes[0] ** 0.5
        )
        guide.begin_task(f"late{number}")
        before = guide.keeper.built
        start = time.perf_counter()
        guide.insert(signature)
        times.append(time.perf_counter() - start)
        rebuilt += guide.keeper.built != before
    mean = statistics.mean(times)
    return {
        "insert_ms": mean * 1e3,
        "insert_max_ms": max(times) * 1e3,
        "rebuild_s": rebuild,
        "rebuilds_seen": rebuilt,
        "insert_amortised_ms": (mean + rebuild / (GROWTH * tasks)) * 1e3,
    }


# -- 4. regret


def smooth_tree(tasks: int) -> np.ndarray:
    """[N, N] distances that rise evenly with the level at which two tasks' branches meet, from 0.05 to 0.7."""
    index = np.arange(tasks)
    level = np.ceil(np.log2(np.bitwise_xor.outer(index, index) + 1))
    return np.asarray(0.05 + 0.65 * level / np.log2(tasks))


def regret(kind: str, tasks: int, pulls: int, layers: int, seed: int) -> np.ndarray:
    """[pulls] cumulative regret, mean over layers; each layer looks for a task of its own."""
    rng = np.random.default_rng(seed)
    distances = smooth_tree(tasks)
    shuffled = rng.permutation(tasks)  # ids say nothing about kinship
    distances = distances[np.ix_(shuffled, shuffled)]
    mean = distances[rng.integers(tasks, size=layers)]
    search: Search
    if kind == "tree-lcb":
        between = distances[np.tril_indices(tasks, -1)] - 0.05
        tree = linkage_tree(between[::-1].astype(np.float64), tasks, "complete", 64)
        search = PooledTreeLCB(layers, tree, 1.0, "noise", by_level=False)
    elif kind == "flat-lcb":
        search = FlatLCB(layers, tasks, 1.0, "noise")
    elif kind == "random":
        search = Random(layers, tasks, 1.0, "noise", seed)
    else:
        search = Exhaustive(layers, tasks, 1.0, "noise")
    lines, lost = np.arange(layers), np.zeros((pulls, layers))
    for pull in range(pulls):
        search.begin_round()
        arms = search.select()
        expected = mean[lines, arms]
        search.observe(arms, np.clip(expected + 0.05 * rng.standard_normal(layers), 0, 1))
        lost[pull] = expected - mean.min(1)
    return np.asarray(lost.mean(1).cumsum())


def regrets(sizes: tuple[int, ...], pulls: int, seeds: int) -> dict[str, Any]:
    kinds = ("tree-lcb", "flat-lcb", "random", "exhaustive")
    curves = {
        kind: {n: np.mean([regret(kind, n, pulls, 16, seed) for seed in range(seeds)], axis=0) for n in sizes}
        for kind in kinds
    }
    final = {kind: [float(curves[kind][n][-1]) for n in sizes] for kind in kinds}
    slope = {kind: float(np.polyfit(np.log(sizes), np.log(final[kind]), 1)[0]) for kind in kinds}
    return {
        "sizes": list(sizes),
        "pulls": pulls,
        "seeds": seeds,
        "final": final,
        "slope": slope,
        "curves": {kind: {str(n): curve.tolist() for n, curve in by.items()} for kind, by in curves.items()},
    }


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    looks: dict[str, dict[str, Any]] = {  # random lies under exhaustive, hence broad and pale
        "random": {"color": "#BBBBBB", "lw": 6},
        "exhaustive": {"color": "#CC79A7", "lw": 1.5, "ls": "-."},
        "flat-lcb": {"color": "#D55E00", "lw": 2, "ls": "--"},
        "tree-lcb": {"color": "#0072B2", "lw": 2},
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    largest = str(result["sizes"][-1])
    for kind, look in looks.items():
        left.plot(result["curves"][kind][largest], label=kind, **look)
        label = f"{kind}, slope {result['slope'][kind]:.2f}"
        right.loglog(result["sizes"], result["final"][kind], marker="o", ms=4, label=label, **look)
    left.set(xlabel="pulls", ylabel="cumulative regret", title=f"{largest} tasks", yscale="log")
    right.set(xlabel="stored tasks N", ylabel=f"regret after {result['pulls']} pulls", title="growth with N")
    right.set_xticks(result["sizes"], [str(n) for n in result["sizes"]])
    right.minorticks_off()
    top = max(result["final"]["exhaustive"])
    left.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.08))
    right.set_ylim(top=top * 25)
    right.legend(frameon=False, loc="upper left", ncols=2, fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(result: dict[str, Any]) -> None:
    print("\nexchange (mode paper, one thread)")
    print(f"{'layers x values':>18} {'tasks':>6} {'ms':>8} {'x torch.add':>12} {'loop / ours':>12}")
    for row in result["exchange"]:
        shape = f"{row['layers']} x {row['values']}"
        cost = f"{row['exchange_ms']:>8.2f} {row['times_torch_add']:>12.2f} {row['loop_over_ours']:>12.2f}"
        print(f"{shape:>18} {row['tasks']:>6} {cost}")
    many = result["many_tasks"]
    print(f"\nsearch, {many['layers']} layers x {many['values']} (one thread)")
    for tasks in many["sizes"]:
        one, more = many[f"one_pull_ms_{tasks}"], many[f"pulls32_ms_{tasks}"]
        print(f"{tasks:>8} tasks: one pull {one:.2f} ms, 32 pulls {more:.2f} ms")
    print(f"   ratio of the two: one pull {many['one_pull_ratio']:.2f}, 32 pulls {many['pulls32_ratio']:.2f}")
    print(
        f"   insert {many['insert_ms']:.0f} ms, with its share of a rebuild ({many['rebuild_s']:.1f} s) "
        f"{many['insert_amortised_ms']:.0f} ms; stored {many['stored_gib']:.2f} GiB"
    )
    lost = result["regret"]
    print(f"\ncumulative regret after {lost['pulls']} pulls")
    print(f"{'':>12}" + "".join(f"{n:>9}" for n in lost["sizes"]) + f"{'slope':>9}")
    for kind, values in lost["final"].items():
        print(f"{kind:>12}" + "".join(f"{value:>9.1f}" for value in values) + f"{lost['slope'][kind]:>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 tasks in place of 10,000, fewer repeats")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/guide.json"))
    parser.add_argument("--figure", type=Path, default=None, help="write the regret curves here as PNG")
    options = parser.parse_args()
    repeats = 5 if options.quick else 20
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "exchange": exchange(repeats),
        "regret": regrets((8, 32, 128, 512), 1000 if options.quick else 2000, 1 if options.quick else 3),
        "many_tasks": many_tasks((100, 1_000 if options.quick else 10_000), repeats),
    }
    report(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))
    if options.figure is not None:
        draw(result["regret"], options.figure)


if __name__ == "__main__":
    main()
