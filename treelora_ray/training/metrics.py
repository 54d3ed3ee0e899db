"""What a continual-learning run achieved, as pure functions of its score matrix.

a[i, j] is the score (percent) on task j after training task i, tasks in the order they were learnt. Only
what a metric needs must be there: cells above the diagonal may be NaN, except for forward transfer. A run
that has learnt n of its tasks so far is judged by its first n rows and columns.

Signs: `bwt` is positive when the model forgot, as in the TreeLoRA paper; `bwt_gem` is negative then.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scores = NDArray[np.float64]


class ScoreError(ValueError):
    """A score matrix lacks what a metric needs."""


def _matrix(scores: ArrayLike, least: int = 1) -> Scores:
    """A checked copy: square, at least `least` tasks, no NaN on or below the diagonal."""
    a = np.array(scores, dtype=np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ScoreError(f"a score matrix has a row and a column for each task; got shape {list(a.shape)}")
    if len(a) < least:
        raise ScoreError(f"this metric needs at least {least} tasks; the matrix has {len(a)}")
    learnt = np.tril(np.ones_like(a, dtype=bool))
    if not np.isfinite(a[learnt]).all():
        i, j = (int(k) for k in np.argwhere(learnt & ~np.isfinite(a))[0])
        raise ScoreError(f"the score on task {j} after task {i} is {a[i, j]}; it must be measured")
    return a


def overall_performance(scores: ArrayLike) -> float:
    """OP: mean score over all tasks after the last. Higher is better."""
    return float(_matrix(scores)[-1].mean())


def learning_accuracy(scores: ArrayLike) -> float:
    """LA: mean score on each task right after it was learnt."""
    return float(np.diag(_matrix(scores)).mean())


def bwt(scores: ArrayLike, norm: Literal["n", "n-1"] = "n") -> float:
    """Mean drop on each task from right after it was learnt to the end; positive = forgetting.

    `norm` "n" divides by all tasks (the paper's text; OP = LA - BWT), "n-1" leaves out the last, which
    cannot have been forgotten (what the paper's tables for vision seem to use).
    """
    if norm not in ("n", "n-1"):
        raise ScoreError(f"norm is {norm!r}; known: n, n-1")
    a = _matrix(scores, least=1 if norm == "n" else 2)
    drops = np.diag(a) - a[-1]
    return float(drops.sum() / (len(a) if norm == "n" else len(a) - 1))


def bwt_gem(scores: ArrayLike) -> float:
    """Backward transfer of GEM (1706.08840): mean change over all tasks but the last; negative = forgetting."""
    return -bwt(scores, norm="n-1")


def bwt_released(scores: ArrayLike) -> float:
    """What the released TreeLoRA script prints: gains are discarded, the sign is GEM's, the norm is n."""
    a = _matrix(scores)
    return float(np.minimum(0.0, a[-1] - np.diag(a)).mean())


def forgetting(scores: ArrayLike, include_last: bool = False) -> float:
    """Mean drop from each task's best score to its last (1801.10112); lower is better.

    The best is taken over l < n, so a task that improved to the end counts as negative; with
    `include_last` (as HiDe does) over l <= n, so that nothing is below zero.
    """
    a = _matrix(scores, least=2)
    n = len(a)
    rows = n if include_last else n - 1
    best = np.array([a[j:rows, j].max() for j in range(n - 1)])
    return float((best - a[-1, :-1]).mean())


def forward_transfer_gem(scores: ArrayLike, untrained: ArrayLike) -> float:
    """FWT of GEM: mean score on each task just before it is learnt, less that of the untrained model."""
    a, base = _matrix(scores, least=2), _per_task(untrained, len(_matrix(scores)), "untrained scores")
    before = np.diag(a, k=1)
    if not np.isfinite(before).all():
        j = int(np.flatnonzero(~np.isfinite(before))[0]) + 1
        raise ScoreError(f"forward transfer needs the score on task {j} before it is learnt (after task {j - 1})")
    return float((before - base[1:]).mean())


def forward_transfer_sapt(scores: ArrayLike, independent: ArrayLike) -> float:
    """FWT of SAPT: mean score on each task right after it is learnt, less that of a model trained on it alone."""
    a = _matrix(scores)
    return float((np.diag(a) - _per_task(independent, len(a), "independent scores")).mean())


def average_incremental_accuracy(scores: ArrayLike, samples: ArrayLike | None = None) -> float:
    """Mean over n of the average score after task n; with test sample counts, samples are pooled instead."""
    a = _matrix(scores)
    weights = np.ones(len(a)) if samples is None else _per_task(samples, len(a), "sample counts")
    if (weights <= 0).any():
        raise ScoreError(f"sample counts must be positive, got {weights.tolist()}")
    return float(np.mean([np.average(a[n, : n + 1], weights=weights[: n + 1]) for n in range(len(a))]))


def summary(scores: ArrayLike) -> dict[str, Any]:
    """All metrics that a score matrix alone allows, by the names under which they are recorded."""
    several = len(_matrix(scores)) > 1
    return {
        "op": overall_performance(scores),
        "bwt": bwt(scores),
        "bwt_n_minus_1": bwt(scores, norm="n-1") if several else None,
        "forgetting": forgetting(scores) if several else None,
        "average_incremental_accuracy": average_incremental_accuracy(scores),
        "learning_accuracy": learning_accuracy(scores),
    }


def _per_task(values: ArrayLike, tasks: int, what: str) -> Scores:
    found = np.array(values, dtype=np.float64)
    if found.shape != (tasks,) or not np.isfinite(found).all():
        raise ScoreError(f"{what} must be one number a task, {tasks} in all; got {found.tolist()}")
    return found
