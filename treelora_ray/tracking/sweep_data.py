"""What a sweep found, as plain data: which trials are best, what mattered, and what its figures show.

`sweep.json` in the sweep's folder is all that is read. Trials are compared where both have come: one that was stopped
early is judged against each other one at the last percent of the stream that both have reached.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treelora_ray.tracking.figure_data import Data, duration
from treelora_ray.training.errors import RunError

FILE = "sweep.json"
LEAST = 6  # trials, below which nothing is said of what mattered
PERMUTATIONS, SURE = 2000, 0.05
GROUPED = 3  # values of a number, up to which each is a group of its own
AXES = 10  # of parallel coordinates
NAMED = 5  # curves with a name
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
Sweep = Mapping[str, Any]
Trial = Mapping[str, Any]
Floats = NDArray[np.float64]


def read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{folder} is no sweep: it has no {FILE}; give the folder that `treelora sweep` made") from None
    except ValueError as error:
        raise RunError(
            f"{path} is damaged ({error}): run the same `treelora sweep` again, which writes it anew"
        ) from None
    return found


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).is_file()


# -- scores


def better(sweep: Sweep) -> Callable[[float], float]:
    """A score as a number of which more is better."""
    sign = 1.0 if sweep["mode"] == "max" else -1.0

    def worth(score: float) -> float:
        return sign * score

    return worth


def score(sweep: Sweep, trial: Trial) -> float | None:
    """Of a trial that has come to the end."""
    value = trial.get(sweep["metric"])
    return float(value) if trial["state"] == FINISHED and value is not None else None


def ranked(sweep: Sweep) -> list[Trial]:
    """Trials with their scores, best first; then by how far they have come."""

    def place(trial: Trial) -> tuple[float, ...]:
        found = score(sweep, trial)
        return (-math.inf, -better(sweep)(found)) if found is not None else (-float(trial.get("percent") or 0.0), 0.0)

    return sorted(sweep["trials"], key=place)


def of_state(sweep: Sweep, state: str) -> list[Trial]:
    return [trial for trial in sweep["trials"] if trial["state"] == state]


def standing(sweep: Sweep) -> dict[str, float]:
    """By trial, the share of other trials that it beats at the last percent that both have reached, a tie as half.

    This is one number a trial, in which no early score stands beside a late one. Failed trials are left out: what they
    had reached says little of their settings.
    """
    worth = better(sweep)
    courses = {trial["id"]: _course(sweep, trial) for trial in sweep["trials"] if trial["state"] != FAILED}
    courses = {name: course for name, course in courses.items() if course}

    def beats(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
        most = min(one[-1][0], other[-1][0])
        a, b = (worth(_at(course, most)) for course in (one, other))
        return (a > b) + 0.5 * (a == b)

    return {
        name: sum(beats(course, other) for key, other in courses.items() if key != name) / max(len(courses) - 1, 1)
        for name, course in courses.items()
    }


def _course(sweep: Sweep, trial: Trial) -> list[tuple[float, float]]:
    metric = sweep["metric"]
    return [(float(each["percent"]), float(each[metric])) for each in trial["history"] if each.get(metric) is not None]


def _at(course: Sequence[tuple[float, float]], percent: float) -> float:
    """The last value so far, or the first there is."""
    return next((value for at, value in reversed(course) if at <= percent + 1e-9), course[0][1])


# -- the front


def front(sweep: Sweep) -> list[str]:
    """Finished trials than which none is at least as good in score, time and forgetting, and better in one."""
    points = {trial["id"]: objectives(trial) for trial in of_state(sweep, FINISHED)}
    known = {name: point for name, point in points.items() if point is not None}
    return [name for name, point in known.items() if not any(dominates(other, point) for other in known.values())]


def objectives(trial: Trial) -> tuple[float, float, float] | None:
    """Accuracy, seconds, forgetting, of which less is better; one task alone cannot be forgotten."""
    if trial.get("val_op") is None or trial.get("seconds") is None:
        return None
    return -float(trial["val_op"]), float(trial["seconds"]), float(trial.get("forgetting") or 0.0)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


# -- what mattered


@dataclass(frozen=True)
class Importance:
    """What a parameter explains of how trials rank."""

    parameter: str
    trials: int
    share: float  # of the differences in standing, corrected for what chance explains; below 0: less than chance
    low: float  # the least and the most when any one trial is left out
    high: float
    chance: float  # what one of twenty shuffles explains
    p: float  # of a permutation test
    adjusted: float  # the same, corrected for the number of parameters (Holm)

    @property
    def sure(self) -> bool:
        return self.adjusted < SURE


@dataclass(frozen=True)
class Mattered:
    """By importance; and why there is none, of all parameters or of some."""

    found: tuple[Importance, ...]
    notes: tuple[str, ...]


def mattered(sweep: Sweep) -> Mattered:
    """How much each parameter by itself explains of the trials' standings.

    A number explains what a parabola over its ranks explains: a rise, a fall, or a best value in between, whatever its
    scale. A choice explains what the means of its groups do. The share is an adjusted R², so that a parameter without
    effect has 0 on average, whatever its number of values. How far chance goes is found by shuffling the standings, and
    how much hangs on one trial by leaving each out. What two parameters do only together is not seen.
    """
    stands = standing(sweep)
    if len(stands) < LEAST:
        return Mattered((), (f"{len(stands)} trials have a score: what mattered is told from {LEAST} on.",))
    if len(set(stands.values())) == 1:
        return Mattered((), ("All trials score alike, so no parameter explains a difference.",))
    trials = [trial for trial in sweep["trials"] if trial["id"] in stands]
    found, notes = [], []
    for name, searched in sweep["parameters"].items():
        having = [trial for trial in trials if name in trial["parameters"]]
        values = [trial["parameters"][name] for trial in having]
        alike = len({_plain(value) for value in values}) < 2
        if len(having) < LEAST or alike:
            why = "is the same in all trials with a score" if alike else f"was searched in {len(having)} of them only"
            notes.append(f"{name} {why}.")
            continue
        y = np.array([stands[trial["id"]] for trial in having])
        if len(set(y.tolist())) == 1:
            notes.append(f"{name}: the trials that have it score alike.")
            continue
        found.append(_explained(name, searched, values, y))
    return Mattered(tuple(sorted(_holm(found), key=lambda each: -each.share)), tuple(notes))


def _explained(name: str, searched: Mapping[str, Any], values: Sequence[Any], y: Floats) -> Importance:
    numeric = ordered(searched, values)
    share = _share(_design(values, numeric), y[None])[0]
    rng = np.random.default_rng(0)
    shuffled = _share(_design(values, numeric), np.stack([rng.permutation(y) for _ in range(PERMUTATIONS)]))
    without = [
        float(_share(_design([*values[:n], *values[n + 1 :]], numeric), np.delete(y, n)[None])[0])
        for n in range(len(y))
    ]
    p = (1 + int((shuffled >= share - 1e-12).sum())) / (1 + PERMUTATIONS)
    chance = float(np.quantile(shuffled, 1 - SURE))
    return Importance(name, len(y), float(share), min(without), max(without), chance, p, p)


def ordered(searched: Mapping[str, Any], values: Sequence[Any]) -> bool:
    """Whether a parameter's values are numbers, and too many to be groups."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and (searched["kind"] != "choice" or len(set(values)) > GROUPED)


def _design(values: Sequence[Any], numeric: bool) -> Floats:
    """[n, degrees of freedom] orthonormal columns without the mean."""
    if numeric:
        ranks = _ranks(np.array(values, dtype=np.float64))
        columns = np.stack([ranks, ranks**2], 1)
    else:
        plain = [_plain(value) for value in values]
        columns = np.array([[value == group for group in dict.fromkeys(plain)] for value in plain], dtype=np.float64)
    left, sizes, _ = np.linalg.svd(columns - columns.mean(0), full_matrices=False)
    return np.asarray(left[:, sizes > 1e-9 * max(float(sizes[0]), 1.0)] if len(sizes) else left)


def _share(design: Floats, responses: Floats) -> Floats:
    """[k] adjusted R² of responses [k, n]; 0 where the design says nothing, or leaves nothing to say."""
    n, freedom = design.shape
    centred = responses - responses.mean(1, keepdims=True)
    total = np.square(centred).sum(1)
    left = n - 1 - freedom
    if freedom == 0 or left <= 0:
        return np.zeros(len(responses))
    explained = np.square(centred @ design).sum(1) / np.where(total > 0, total, 1)
    return np.where(total > 0, 1 - (1 - explained) * (n - 1) / left, 0.0)


def _ranks(values: Floats) -> Floats:
    """From -1 to 1, ties in the middle of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(2 * middle[place] / max(len(values) - 1, 1) - 1)


def _holm(found: Sequence[Importance]) -> list[Importance]:
    order, out, most = sorted(found, key=lambda each: each.p), [], 0.0
    for number, each in enumerate(order):
        most = max(most, min(1.0, each.p * (len(found) - number)))
        out.append(Importance(**{**vars(each), "adjusted": most}))
    return out


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# -- what figures show


def figure_data(sweep: Sweep) -> dict[str, Data]:
    """By name of the figure, what it shows; one without data is left out."""
    found = {
        "sweep_front": _front(sweep),
        "sweep_importance": _importance(sweep),
        "sweep_parallel": _parallel(sweep),
        "sweep_curves": _curves(sweep),
    }
    return {name: data for name, data in found.items() if data is not None}


def _front(sweep: Sweep) -> Data | None:
    best = set(front(sweep))
    trials = [trial for trial in of_state(sweep, FINISHED) if objectives(trial) is not None]
    if not trials:
        return None
    points = [
        {
            "trial": trial["id"],
            "seconds": float(trial["seconds"]),
            "val_op": float(trial["val_op"]),
            "forgetting": None if trial.get("forgetting") is None else float(trial["forgetting"]),
            "front": trial["id"] in best,
        }
        for trial in sorted(trials, key=lambda trial: (trial["seconds"], trial["id"]))
    ]
    first, last = (pick(points, key=lambda point: point["val_op"]) for pick in (min, max))
    return {
        "title": f"Accuracy against time: {_trials(len(best))} of {len(points)} on the front",
        "alt": f"Points of {_trials(len(points))} that came to the end. Accuracy goes from {first['val_op']:.1f} to "
        f"{last['val_op']:.1f} percent, time from {duration(points[0]['seconds'])} to "
        f"{duration(points[-1]['seconds'])}. On the front: {_listed(sorted(best))}.",
        "points": points,
        "winner": None if sweep["winner"] is None else sweep["winner"]["trial"],
    }


def _importance(sweep: Sweep) -> Data | None:
    found = mattered(sweep).found
    if not found:
        return None
    sure = [each.parameter for each in found if each.sure]
    said = f"{_listed(sure)} can be told from chance" if sure else "no parameter can be told from chance"
    bars = ("parameter", "share", "low", "high", "chance", "adjusted", "sure")
    return {
        "title": f"What mattered: {said}",
        "alt": "Bars of the share of the differences between trials that each parameter explains: "
        + ", ".join(f"{each.parameter} {max(each.share, 0):.0%}" for each in found)
        + ".",
        "trials": found[0].trials,
        "bars": [{key: getattr(each, key) for key in bars} for each in found],
    }


def _parallel(sweep: Sweep) -> Data | None:
    shown = [trial for trial in sweep["trials"] if trial["state"] in (FINISHED, STOPPED)]
    scores = {trial["id"]: score(sweep, trial) for trial in shown}
    known = [value for value in scores.values() if value is not None]
    important = [each.parameter for each in mattered(sweep).found]
    names = sorted(sweep["parameters"], key=lambda name: important.index(name) if name in important else len(important))
    axes = [axis for name in names if (axis := _axis(name, sweep["parameters"][name], shown)) is not None]
    if not known or not axes:
        return None
    left, axes = max(len(axes) - AXES, 0), axes[:AXES]
    lines = []
    for trial in sorted(shown, key=lambda trial: _order(sweep, scores[trial["id"]])):
        at = [_place(axis, trial["parameters"].get(axis["name"])) for axis in axes]
        lines.append({"trial": trial["id"], "at": at, "score": scores[trial["id"]]})
    best = max(known, key=better(sweep))
    top = next(line["trial"] for line in reversed(lines) if line["score"] == best)
    return {
        "title": f"Settings of {_trials(len(shown))}: trial {top} is best, {sweep['metric']} {best:.1f}",
        "alt": f"A line for each of {_trials(len(shown))} through its values of {_listed([a['name'] for a in axes])}. "
        f"{len(known)} came to the end, with {sweep['metric']} from {min(known):.1f} to {max(known):.1f}; "
        f"{len(shown) - len(known)} were stopped.",
        "metric": sweep["metric"],
        "mode": sweep["mode"],
        "axes": axes,
        "left_out": left,
        "range": [min(known), max(known)],
        "lines": lines,
    }


def _order(sweep: Sweep, value: float | None) -> float:
    """Drawn last, and so above all: the best."""
    return -math.inf if value is None else better(sweep)(value)


def _axis(name: str, searched: Mapping[str, Any], trials: Sequence[Trial]) -> Data | None:
    """Where values lie on it; None where there is nothing to tell apart."""
    values = [trial["parameters"][name] for trial in trials if name in trial["parameters"]]
    groups = list(dict.fromkeys(map(_plain, values)))
    if len(groups) < 2:
        return None
    if searched["kind"] == "choice":
        asked = [_plain(value) for value in searched["values"]]
        return {"name": name, "kind": "choice", "values": sorted(groups, key=[*asked, *groups].index)}
    low, high = float(min(values)), float(max(values))
    return {"name": name, "kind": "log" if searched["kind"].startswith("log") else "number", "low": low, "high": high}


def _place(axis: Data, value: Any) -> float | None:
    """From 0 to 1."""
    if value is None:
        return None
    if axis["kind"] == "choice":
        place: int = axis["values"].index(_plain(value))
        return place / (len(axis["values"]) - 1)
    low, high, at = float(axis["low"]), float(axis["high"]), float(value)
    if axis["kind"] == "log":
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)


def _curves(sweep: Sweep) -> Data | None:
    lines = []
    for trial in ranked(sweep):
        course = _course(sweep, trial)
        if course:
            at, values = zip(*course, strict=True)
            lines.append({"trial": trial["id"], "state": trial["state"], "percent": list(at), "value": list(values)})
    if not lines:
        return None
    states = [line["state"] for line in lines]
    words = {FINISHED: "came to the end", STOPPED: "stopped early", FAILED: "failed"}
    ended = ", ".join(f"{states.count(state)} {said}" for state, said in words.items() if state in states)
    ended = ended or "none has ended"
    return {
        "title": f"{sweep['metric']} over the stream: of {_trials(len(lines))}, {ended}",
        "alt": f"Lines of {sweep['metric']} over the percent of the stream learnt, of {_trials(len(lines))}: {ended}. "
        "The best end with "
        + ", ".join(f"{line['value'][-1]:.1f} (trial {line['trial']})" for line in lines[:NAMED])
        + ".",
        "metric": sweep["metric"],
        "mode": sweep["mode"],
        "named": min(NAMED, states.count(FINISHED)),
        "lines": lines,
    }


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
