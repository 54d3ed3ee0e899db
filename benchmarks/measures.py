"""Other measures of how alike tasks are, beside gradients at the anchor: which see the families of the text tasks?

    python benchmarks/measures.py DATA [--seeds 1 2 3] [--rounds 12] [--folder DIR] [--doc]

Each measure gives the distances of all pairs of tasks; average linkage and the tree's own cut make groups of them, as
for gradients, and the adjusted Rand index compares these with the families. Measures of frozen features need no
gradient: the pass that prepares routing has all they take. DATA and runs in DIR are those of text_families.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks.text_families import FAMILIES, Judged, arguments, families_of, judged, settings  # noqa: E402
from treelora_ray.api import Run, run  # noqa: E402
from treelora_ray.core.grow import linkage_tree  # noqa: E402
from treelora_ray.core.tree import Tree  # noqa: E402
from treelora_ray.methods.shared import Shared  # noqa: E402
from treelora_ray.models.router import Router  # noqa: E402

Distances = NDArray[np.float64]  # [tasks, tasks]
PAGE = ROOT / "docs" / "results" / "measures.md"
GRADIENTS = {
    "gradients, cosine": [],
    "gradients, l2": ["method.guide={commit: task, distance: l2}"],
    "gradients, l1": ["method.guide={commit: task, distance: l1, sketch_dim: null}"],
}


def by_mean(router: Router, tasks: int) -> Distances:
    """Cosines between mean features, from the mean over all tasks: what the texts are about."""
    means = torch.stack([router.means[router.task == task].mean(0) for task in range(tasks)])
    away = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    return _numbers(1 - away @ away.T)


def by_classes(router: Router, tasks: int) -> Distances:
    """From each class mean to the nearest of the other task, in standard deviations within classes; their mean."""
    white = torch.linalg.cholesky(torch.linalg.inv(router.covariance()))  # C^-1 = L L^T
    points = router.means @ white
    far = torch.cdist(points, points)
    found = torch.zeros(tasks, tasks, dtype=far.dtype)
    for one in range(tasks):
        for other in range(tasks):
            found[one, other] = far[router.task == one][:, router.task == other].amin(1).mean()
    return _numbers((found + found.T) / 2)


def by_directions(router: Router, tasks: int) -> Distances:
    """Between the spaces in which class means of a task differ, one less the mean squared cosine: what is asked."""
    spaces = []
    for task in range(tasks):
        means = router.means[router.task == task]
        left, size, _ = torch.linalg.svd((means - means.mean(0)).T, full_matrices=False)
        spaces.append(left[:, size > 1e-6 * size[0]])
    found = [[1 - float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1]) for b in spaces] for a in spaces]
    return np.array(found)


FEATURES: dict[str, Callable[[Router, int], Distances]] = {
    "frozen features, mean of the task": by_mean,
    "frozen features, nearest classes": by_classes,
    "frozen features, directions between classes": by_directions,
}


def _numbers(found: torch.Tensor) -> Distances:
    return found.double().numpy()


def grown(distances: Distances) -> Tree:
    """By average linkage. Pairs are given with tasks numbered last to first."""
    turned = distances[::-1, ::-1]
    return linkage_tree(turned[np.triu_indices(len(turned), 1)], len(turned), "average", 64)


def judge(done: dict[str, Run], families: dict[str, str], seed: int) -> dict[str, Judged]:
    """By measure; `done`: by measure of gradients, the run with its tree."""
    found = {name: judged(own.method.guide.tree, own.tasks, families, seed) for name, own in done.items()}  # type: ignore[attr-defined]
    first = next(iter(done.values()))
    router = first.method.learner.router
    for name, measure in FEATURES.items():
        found[name] = judged(grown(measure(router, len(first.tasks))), first.tasks, families, seed)
    return found


def page(rows: dict[str, list[Judged]], seeds: list[int], rounds: int) -> str:
    lines = "\n".join(
        f"| {name} | {np.mean([each.score for each in own]):.2f} | {', '.join(f'{each.score:.2f}' for each in own)} "
        f"| {max(each.p for each in own):.4f} | {np.mean([each.best for each in own]):.2f} |"
        for name, own in rows.items()
    )
    return f"""# Other measures of how alike tasks are

Fifteen text tasks and a pre-trained sentence encoder, as in [text families](text-families.md): {rounds} probe rounds
of 16 rows for gradients, 400 rows a task for features. Distances of all pairs, average linkage, the tree's own cut; the
adjusted Rand index compares its groups with the families {", ".join(FAMILIES)}. p is the largest over the seeds; the
best cut is an upper bound.

| measure | adjusted Rand index | seed by seed | p at most | best cut |
|---|---:|---|---:|---:|
{lines}

    python benchmarks/measures.py DATA --seeds {" ".join(map(str, seeds))} --rounds {rounds} --doc
"""


def main(given: list[str] | None = None) -> None:
    parser = arguments(__doc__, PAGE)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args(given)
    data = options.data.resolve()
    families = families_of(data)
    rows: dict[str, list[Judged]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, shared = options.folder or Path(scratch), Shared()
        for seed in options.seeds:
            done = {}
            for number, (name, changes) in enumerate(GRADIENTS.items()):
                more = [*options.changes, *changes, *([f"name=measure-{number}-seed-{seed}"] if number else [])]
                config = settings(data, list(families), options.rounds, seed, folder, more)
                done[name] = run(config, shared=shared)
            for name, found in judge(done, families, seed).items():
                rows.setdefault(name, []).append(found)
                print(f"seed {seed}, {name}: {found.score:.2f}, p {found.p:.5f}, best cut {found.best:.2f}", flush=True)
    text = page(rows, options.seeds, options.rounds)
    print(text)
    if options.doc:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
