"""Does the tree see which real tasks are kin? Text tasks of known families, a pre-trained sentence encoder.

    python benchmarks/text_families.py DATA [KEY=VALUE ...] [--seeds 1 2 3] [--rounds 6 12 24] [--folder DIR] [--doc]

DATA holds a folder a task (train.parquet, test.parquet) and meta.json, which names the family of each. Signatures are
taken before a task's first step, so each task is trained for one step only. Printed: the adjusted Rand index between
the families and the tree's own groups, and how often a random assignment of the same families reaches it. Runs in DIR
that are finished are not learnt again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks.encoder import needed_encoder  # noqa: E402
from benchmarks.planted import adjusted_rand, as_labels  # noqa: E402
from treelora_ray.api import Run, run  # noqa: E402
from treelora_ray.config import RunConfig, load  # noqa: E402
from treelora_ray.core.tree import Tree  # noqa: E402
from treelora_ray.methods.shared import Shared  # noqa: E402
from treelora_ray.tracking.figures import write_figures  # noqa: E402

FAMILIES = ("nli", "sentiment", "topic")
PERMUTATIONS = 20_000
PAGE = ROOT / "docs" / "results" / "text-families.md"
FIGURES = {"tree": "the tree over all tasks", "growth": "the tree as tasks arrive", "similarity": "distances of tasks"}
SETTINGS = ["stream.rows=400", "stream.test_rows=1", "train.steps=1", "train.batch=16", "objective.routing=oracle"]


@dataclass(frozen=True)
class Judged:
    groups: dict[str, int]  # by task, the number of its group
    score: float  # adjusted Rand index of the groups, over tasks of FAMILIES
    p: float  # how often a random assignment of the same families reaches it
    largest: float  # where the largest gap counts whatever stands below it
    best: float  # of all cuts


@dataclass(frozen=True)
class Row:
    rounds: int
    seed: int
    found: Judged


def settings(data: Path, tasks: list[str], rounds: int, seed: int, folder: Path, more: list[str]) -> RunConfig:
    own = [f"stream.path={data}", f"stream.tasks={json.dumps(tasks)}", f"method.probe_rounds={rounds}", f"seed={seed}"]
    place = [f"folder={folder}", f"name=rounds-{rounds}-seed-{seed}", "tracking.to=none", "train.threads=1"]
    return load("text", [*SETTINGS, *own, *place, f"model.backbone={needed_encoder()}", *more])


def judged(tree: Tree, tasks: list[str], families: dict[str, str], seed: int) -> Judged:
    """A tree over these tasks; the seed is that of the random assignments."""
    asked = [place for place, task in enumerate(tasks) if families[task] in FAMILIES]
    true = np.array([FAMILIES.index(families[tasks[place]]) for place in asked])

    def score(groups: list[np.ndarray]) -> float:
        return adjusted_rand(as_labels(groups)[asked], true)

    heights = np.sort(tree.height[tree.task < 0])
    gap = int(np.argmax(np.diff(heights)))
    found, draw = as_labels(tree.families()), np.random.default_rng(seed)
    own = adjusted_rand(found[asked], true)
    chance = [adjusted_rand(found[asked], draw.permutation(true)) for _ in range(PERMUTATIONS)]
    return Judged(
        dict(zip(tasks, found.tolist(), strict=True)),
        own,
        (1 + sum(value >= own - 1e-12 for value in chance)) / (1 + PERMUTATIONS),
        score(tree.cut(float(heights[gap] + heights[gap + 1]) / 2)),
        max(score(tree.cut(float(height))) for height in heights),
    )


def said(groups: dict[str, int], families: dict[str, str]) -> str:
    """Groups of at least two in words, tasks that belong to none of FAMILIES in italics."""
    parts = []
    for group in dict.fromkeys(groups.values()):
        tasks = [task for task, other in groups.items() if other == group]
        if len(tasks) > 1:
            parts.append(", ".join(task if families[task] in FAMILIES else f"*{task}*" for task in tasks))
    return "; ".join(parts)


def write_page(rows: list[Row], shown: Run, families: dict[str, str], seeds: list[int], rounds: list[int]) -> None:
    pictures = PAGE.parent / "figures" / PAGE.stem
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_figures(shown, Path(scratch))
        for name in FIGURES:
            (pictures / f"{name}.png").write_bytes((Path(scratch) / f"{name}.png").read_bytes())
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    told = [{"rounds": row.rounds, "seed": row.seed, **asdict(row.found)} for row in rows]
    record = {"versions": versions, "settings": SETTINGS, "families": families, "rows": told}
    PAGE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    table = "\n".join(
        f"| {row.rounds} | {row.seed} | {row.found.score:.2f} | {row.found.p:.5f} | {row.found.largest:.2f} "
        f"| {row.found.best:.2f} | {said(row.found.groups, families)} |"
        for row in rows
    )
    means = [
        f"{count} rounds {np.mean([row.found.score for row in rows if row.rounds == count]):.2f}" for count in rounds
    ]
    figures = "\n\n".join(f"![{words}](figures/{PAGE.stem}/{name}.png)" for name, words in FIGURES.items())
    asked = [" ".join(map(str, numbers)) for numbers in (seeds, rounds)]
    known = "; ".join(f"{family}: {', '.join(t for t in families if families[t] == family)}" for family in FAMILIES)
    PAGE.write_text(f"""# Does the tree see which text tasks are kin?

Fifteen text tasks and a pre-trained sentence encoder (22 million weights, 64 tokens). A task's signature is its
mean gradient at the anchor over some rounds of 16 rows, taken before any training; the tree over all fifteen is cut
by its own rule (`Tree.families`: the largest gap between heights, which counts as often as there are tasks in groups
below it). The adjusted Rand index compares its groups with the families ({known});
1 is equal, 0 is chance. Means: {", ".join(means)}.

| rounds | seed | adjusted Rand index | p | plain largest gap | best cut | groups of at least two tasks |
|---:|---:|---:|---:|---:|---:|---|
{table}

p is how often {PERMUTATIONS:,} random assignments of the same families to the same tasks reach the index. The
plain largest gap mostly lies right above one pair of topics that are nearer than any others, where all else still
stands alone; the best cut is an upper bound.

    python benchmarks/text_families.py DATA --seeds {asked[0]} --rounds {asked[1]} --doc

Learnt with {", ".join(f"{name} {number}" for name, number in versions.items())}. Pictures: {shown.config.name}.

{figures}
""")


def arguments(about: str | None, page: Path) -> argparse.ArgumentParser:
    """What a benchmark over the families of the text tasks is asked."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder where it is left out")
    parser.add_argument("--doc", action="store_true", help=f"rewrite {page.name} and its figures")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    return parser


def families_of(data: Path) -> dict[str, str]:
    """By task, in their order."""
    return {each["task"]: each["family"] for each in json.loads((data / "meta.json").read_text())}


def main(given: list[str] | None = None) -> None:
    parser = arguments(__doc__, PAGE)
    parser.add_argument("--rounds", type=int, nargs="+", default=[6, 12, 24])
    options = parser.parse_args(given)
    data = options.data.resolve()
    families = families_of(data)
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows, shared = options.folder or Path(scratch), [], Shared()
        for seed in options.seeds:
            for rounds in sorted(options.rounds):
                config = settings(data, list(families), rounds, seed, folder, options.changes)
                done = run(config, shared=shared)
                found = judged(done.method.guide.tree, done.tasks, families, seed)  # type: ignore[attr-defined]
                rows.append(Row(rounds, seed, found))
                print(
                    f"{rounds} rounds, seed {seed}: adjusted Rand index {found.score:.2f}, p {found.p:.5f}, plain gap "
                    f"{found.largest:.2f}, best cut {found.best:.2f}; {said(found.groups, families)}",
                    flush=True,
                )
        if options.doc:
            shown = folder / f"rounds-{options.rounds[len(options.rounds) // 2]}-seed-{options.seeds[0]}"
            write_page(sorted(rows, key=lambda row: row.rounds), Run(shown), families, options.seeds, options.rounds)


if __name__ == "__main__":
    main()
