"""What the figures of a run show, as plain data: from its `result.json`, and its journal of steps where there is one.

Each function returns None where the run has nothing to show; else a mapping with `title`, what is seen, and `alt`, the
same for those who cannot see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treelora_ray.tracking.journal import read

Data = dict[str, Any]
PHASES = ("statistics", "probe", "train", "query", "watch", "evaluate", "checkpoint")
STAGES = 6  # trees drawn side by side
POINTS = 120  # of a loss curve, a task


def figure_data(result: Mapping[str, Any], journal: Path | None = None) -> dict[str, Data]:
    """By name of the figure, what it shows."""
    found = {
        "scores": scores(result),
        "course": course(result),
        "forgetting": forgetting(result),
        "tree": tree(result),
        "growth": growth(result),
        "similarity": similarity(result),
        "pulls": pulls(result),
        "times": times(result),
        "losses": None if journal is None else losses(result, journal),
    }
    return {name: data for name, data in found.items() if data is not None}


# -- scores


def scores(result: Mapping[str, Any]) -> Data | None:
    tasks, units = list(result["tasks"]), [record["unit"] for record in result["records"]]
    if not units:
        return None
    values = [row[: len(tasks)] for row in result["matrix"]]
    last = [score for score in values[-1] if score is not None]
    mean = sum(last) / len(last)
    low, high = min(last), max(last)
    return {
        "title": f"What is known after each task: {mean:.1f}% on average at the end",
        "alt": f"Heatmap of scores in percent, a row after each of {_count(units, 'unit')} learnt, a column for each "
        f"of {_count(tasks, 'task')}. The last row has a mean of {mean:.1f}, from {low:.1f} to {high:.1f}.",
        "units": units,
        "tasks": tasks,
        "values": values,
    }


def square(result: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """[n, n] scores where tasks are learnt one at a time, NaN where there is none."""
    n = len(result["tasks"])
    if n < 2 or len(result["records"]) != n:
        return None
    return np.array([row[:n] for row in result["matrix"]], dtype=np.float64)


def course(result: Mapping[str, Any]) -> Data | None:
    a = square(result)
    if a is None:
        return None
    tasks, n = list(result["tasks"]), len(a)
    mean = [float(a[row, : row + 1].mean()) for row in range(n)]
    return {
        "title": f"Each task's score as the stream goes on: the mean goes from {mean[0]:.1f} to {mean[-1]:.1f}%",
        "alt": f"Lines of the scores of {n} tasks over the tasks learnt. The mean over the tasks seen is {mean[0]:.1f} "
        f"after the first task, {mean[-1]:.1f} after the last, and never below {min(mean):.1f}.",
        "tasks": tasks,
        "lines": [{"task": task, "from": j, "scores": a[j:, j].tolist()} for j, task in enumerate(tasks)],
        "mean": mean,
    }


def forgetting(result: Mapping[str, Any]) -> Data | None:
    a = square(result)
    if a is None:
        return None
    n, tasks = len(a), list(result["tasks"])[:-1]
    drops = (np.diag(a) - a[-1])[:-1]
    best = [float(a[j:-1, j].max() - a[-1, j]) for j in range(n - 1)]
    worst = int(drops.argmax())
    most = f"{tasks[worst]} most: {drops[worst]:.1f}" if drops[worst] > 0 else "no task lost anything"
    return {
        "title": f"Lost since learning: {drops.mean():.1f} points a task on average; {most}",
        "alt": f"Bars of the points that each of {_count(tasks, 'task')} lost from right after it was learnt to the "
        f"end; positive is forgetting, lower is better. Their mean is {drops.mean():.1f}; {most}.",
        "tasks": tasks,
        "drops": drops.tolist(),
        "from_best": best,
        "mean": float(drops.mean()),
    }


# -- trees


def dendrogram(parent: Sequence[int], task: Sequence[str | None], height: Sequence[float], linked: bool = True) -> Data:
    """Where the nodes of a tree (in preorder) are drawn: `at` holds (height, row) of each; tasks are rows 0, 1, 2, ...

    In place of the heights of a K-D tree, which are no distances between halves, stand levels above the tasks.
    """
    count = len(parent)
    children: list[list[int]] = [[] for _ in range(count)]
    for node in range(1, count):
        children[parent[node]].append(node)
    row, level = [0.0] * count, [0.0] * count
    leaves = [node for node in range(count) if task[node] is not None]
    for place, node in enumerate(leaves):
        row[node] = float(place)
    for node in range(count - 1, -1, -1):
        if children[node]:
            row[node] = (row[children[node][0]] + row[children[node][-1]]) / 2
            level[node] = 1 + max(level[child] for child in children[node])
    along = list(height) if linked else level
    return {
        "axis": "distance" if linked else "levels",
        "leaves": [task[node] for node in leaves],
        "at": [[round(float(along[node]), 4), row[node]] for node in range(count)],
        "children": children,
    }


def _of_result(result: Mapping[str, Any]) -> Data | None:
    nodes = result.get("tree")
    if not nodes or len(nodes) < 3:
        return None
    parent, task, height = ([node[key] for node in nodes] for key in ("parent", "task", "height"))
    return dendrogram(parent, task, height, _linked(result))


def _linked(result: Mapping[str, Any]) -> bool:
    method = result["config"]["method"]
    usual = "linkage" if method.get("mode") == "treelora" else "kd-radius"
    return bool(method.get("guide", {}).get("tree", usual) == "linkage")


def _first_row(node: int, at: Sequence[Sequence[float]], children: Sequence[Sequence[int]]) -> float:
    while children[node]:
        node = children[node][0]
    return at[node][1]


def tree(result: Mapping[str, Any]) -> Data | None:
    """`gaps` of a split: the rows whose task it separates from the next one; between any two rows lies one split."""
    drawn = _of_result(result)
    if drawn is None:
        return None
    nodes, at, children = result["tree"], drawn["at"], drawn["children"]
    names = short_layers(result.get("layers", [])) if any(node.get("layers") for node in nodes) else []
    splits: list[Data] = []
    for node in sorted((node for node, below in enumerate(children) if below), key=lambda node: (-at[node][0], node)):
        apart = nodes[node].get("layers")
        gaps = [int(_first_row(child, at, children)) - 1 for child in children[node][1:]]
        most = names[int(np.argmax(apart))] if apart and names else None
        splits.append({"gaps": gaps, "height": round(nodes[node]["height"], 4), "apart": apart, "most": most})
    leaves = len(drawn["leaves"])
    title = f"The tree over {leaves} tasks, halved level by level"
    if drawn["axis"] == "distance":
        where = f", most of all at layer {splits[0]['most']}" if splits[0]["most"] else ""
        title = f"The tree over {leaves} tasks: its first halves lie {splits[0]['height']:.2f} apart{where}"
    return {
        "title": title,
        "alt": f"Tree with {leaves} tasks as leaves and {_count(splits, 'split')}, and beside it how far each layer "
        "holds the halves of each group apart. " + _nested(nodes),
        **drawn,
        "splits": splits,
        "layers": names,
    }


def _nested(nodes: Sequence[Mapping[str, Any]]) -> str:
    """In words, the smallest groups of a tree."""
    last = [node["parent"] for node in nodes if node["task"] is not None]
    pairs = [
        [n["task"] for n in nodes if n["parent"] == group and n["task"] is not None] for group in dict.fromkeys(last)
    ]
    together = ["{" + ", ".join(pair) + "}" for pair in pairs if len(pair) > 1]
    return f"Side by side stand {' '.join(together)}." if together else "No two tasks stand alone side by side."


def growth(result: Mapping[str, Any]) -> Data | None:
    last = _of_result(result)
    if last is None:
        return None
    stages = [
        {"after": record["unit"], **dendrogram(found["parent"], found["task"], found["height"], _linked(result))}
        for record in result["records"]
        if (found := record["report"].get("tree"))
    ]
    if not stages or len(stages[-1]["leaves"]) < len(last["leaves"]):
        stages.append({"after": result["records"][-1]["unit"], **last})
    if len(stages) < 2:
        return None
    chosen = np.unique(np.linspace(0, len(stages) - 1, min(STAGES, len(stages))).round().astype(int))
    shown = [stages[number] for number in chosen]
    for before, stage in zip([None, *shown], shown, strict=False):
        old = set() if before is None else set(before["leaves"])
        stage["new"] = [name for name in stage["leaves"] if name not in old]
    sizes = ", ".join(str(len(stage["leaves"])) for stage in shown)
    return {
        "title": f"How the tree grew: after {sizes} tasks",
        "alt": f"Trees after {sizes} tasks, side by side; tasks that are new since the one before are marked.",
        "numbers": {name: number for number, name in enumerate(result["tasks"])},
        "stages": shown,
    }


def similarity(result: Mapping[str, Any]) -> Data | None:
    drawn, known = _of_result(result), result.get("distances")
    if drawn is None or not known:
        return None
    place = {name: number for number, name in enumerate(known["tasks"])}
    n = len(place)
    away = np.zeros((n, n))
    for task, row in enumerate(known["rows"]):
        away[task, :task] = away[:task, task] = row
    order = [place[name] for name in drawn["leaves"]]
    i, j = divmod(int((away + np.where(np.eye(n, dtype=bool), np.inf, 0.0)).argmin()), n)
    near = f"{known['tasks'][min(i, j)]} and {known['tasks'][max(i, j)]}"
    return {
        "title": f"How alike the tasks' gradients are: {near} most, {away[i, j]:.2f} apart",
        "alt": f"Heatmap of the distances of {n} tasks from each other, in the order of their tree; lower is more "
        f"alike. Nearest are {near}, at {away[i, j]:.2f}; the mean distance is {away.sum() / (n * (n - 1)):.2f}.",
        **drawn,
        "values": away[np.ix_(order, order)].tolist(),
    }


# -- the search


def pulls(result: Mapping[str, Any]) -> Data | None:
    found = result.get("pulls")
    if not found:
        return None
    count = np.array(found["count"])
    if not count.sum():  # with groups alone
        return None
    once = bool((count <= 1).all())
    method = result["config"]["method"]
    probed = method.get("mode") == "treelora" and method.get("guide", {}).get("observe", "probe") == "probe"
    record: Data = next((record for record in result["records"] if record["unit"] == found["task"]), {"report": {}})
    leans = dict(zip(record["report"].get("layers", ()), record["report"].get("leans_on", ()), strict=False))
    seen, arms = int((count.sum((0, 1)) > 0).sum()), len(found["tasks"])
    word = "probe round" if probed else "step"
    tasks = f"all {arms} stored tasks" if seen == arms else f"{seen} of {arms} stored tasks"
    made = found["starts"][-1] - found["starts"][0]
    groups = f", and {found['groups']} times with groups of them" if found["groups"] else ""
    return {
        "title": f"What {found['task']} was compared with: {tasks}, in {made} {word}s",
        "alt": f"For each of {_count(found['layers'], 'layer')} a heatmap: {word}s across, stored tasks down. "
        f"{found['task']} was compared {int(count.sum())} times with {tasks}{groups}.",
        "task": found["task"],
        "tasks": found["tasks"],
        "layers": short_layers(found["layers"]),
        "leans_on": [leans.get(layer) for layer in found["layers"]],
        "starts": found["starts"],
        "unit": word,
        "kind": "distance" if once else "count",
        "values": found["distance"] if once else found["count"],
        "groups": found["groups"],
    }


# -- what it cost


def times(result: Mapping[str, Any]) -> Data | None:
    spent = [record["effort"]["seconds"] for record in result["records"]]
    total = sum(sum(seconds.values()) for seconds in spent)
    if not total:
        return None
    found = {phase for seconds in spent for phase in seconds}
    phases = [*(phase for phase in PHASES if phase in found), *sorted(found.difference(PHASES))]
    share = sum(seconds.get("train", 0.0) for seconds in spent) / total
    return {
        "title": f"Where the time went: {duration(total)} in all, {share:.0%} of it training",
        "alt": f"Bars of the seconds that each of {_count(spent, 'unit')} took, by phase. All took {duration(total)}: "
        + ", ".join(f"{phase} {duration(sum(s.get(phase, 0.0) for s in spent))}" for phase in phases) + ".",
        "units": [record["unit"] for record in result["records"]],
        "phases": phases,
        "seconds": [[seconds.get(phase, 0.0) for seconds in spent] for phase in phases],
    }  # fmt: skip


def losses(result: Mapping[str, Any], journal: Path) -> Data | None:
    """Means over stretches of steps."""
    steps: dict[tuple[int, int], tuple[int, float]] = {}
    for entry in read(journal):
        if entry["kind"] == "step" and "loss" in entry["metrics"]:
            steps[entry["unit"], entry["step"]] = entry["global"], entry["metrics"]["loss"]
    by_unit: dict[int, list[tuple[int, float]]] = {}
    for (unit, _), (at, loss) in sorted(steps.items()):
        by_unit.setdefault(unit, []).append((at, loss))
    if not by_unit:
        return None
    names = [record["unit"] for record in result["records"]]
    curves = []
    for unit, points in by_unit.items():
        parts = np.array_split(np.array(points, dtype=np.float64), min(POINTS, len(points)))
        means = np.array([part.mean(0) for part in parts])
        name = names[unit] if unit < len(names) else result["stream"][min(unit, len(result["stream"]) - 1)]
        curves.append({"task": name, "first": points[0][0], "at": means[:, 0].tolist(), "loss": means[:, 1].tolist()})
    ends, count = [curve["loss"][-1] for curve in curves], 1 + max(at for at, _ in steps.values())
    low, high = f"{min(ends):.2f}", f"{max(ends):.2f}"
    where = f"at {low}" if low == high else f"between {low} and {high}"
    return {
        "title": f"Training loss over {count} steps: tasks end {where}",
        "alt": f"Curve of the training loss of {_count(curves, 'task')}, one after the other, over {count} steps. "
        f"They end {where}.",
        "curves": curves,
    }


# -- words


def short_layers(names: Sequence[str]) -> list[str]:
    """Names without the parts that all have in common."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) != 1:
        return list(names)
    differ = [column for column in range(len(parts[0])) if len({part[column] for part in parts}) > 1]
    return [".".join(part[column] for column in differ) or name for part, name in zip(parts, names, strict=True)]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(things: Sequence[Any], what: str) -> str:
    return f"{len(things)} {what}" + ("" if len(things) == 1 else "s")
