"""A run as a page, and the parts that pages of several runs share."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from treelora_ray.api import Run
from treelora_ray.methods.catalogue import METHODS
from treelora_ray.tracking import figures
from treelora_ray.tracking.compare import Entry, counted
from treelora_ray.tracking.figure_data import Data, duration, figure_data
from treelora_ray.tracking.page import Html, bullets, heat, joined, page, table, tag, text

MEASURES = {  # by name of the metric: what it is, and which way is better
    "op": ("mean score after the last task, percent", "higher is better"),
    "learning_accuracy": ("mean score on each task right after it was learnt, percent", "higher is better"),
    "bwt": (
        "backward transfer: mean drop from right after learning to the end, over all tasks, in points; positive is "
        "forgetting, as in the TreeLoRA paper (op = learning_accuracy - bwt)",
        "lower is better",
    ),
    "bwt_n_minus_1": ("the same over all tasks but the last, which cannot have been forgotten", "lower is better"),
    "forgetting": ("mean drop from each task's best score to its last, in points", "lower is better"),
    "average_incremental_accuracy": ("mean over the stream of the mean score on the tasks seen", "higher is better"),
}
CAPTIONS = {
    "scores": "A row after each task learnt, a column for each task. Down a column is one task's score as others "
    "follow it; the red line lies above the scores right after learning.",
    "course": "A line begins where its task is learnt. One that falls is being forgotten.",
    "forgetting": "From right after learning to the end. The black tick is the drop from the task's best score since.",
    "tree": "Tasks whose gradients point alike stand together. The further left a group splits, the less its halves "
    "have in common. Between two tasks the heatmap shows the split that separates them: bright layers hold its halves "
    "apart.",
    "growth": "The same tree at earlier stages. Tasks find their place when they come; groups may form anew.",
    "similarity": "Bright squares along the diagonal are families of tasks.",
    "pulls": "Which stored tasks the last task's layers were compared with, and what the search saw.",
    "times": "Probing and statistics are what the method costs beside training.",
    "losses": "Means over stretches of steps; each colour change is a new task.",
    "compare": "Means over seeds of the mean score on the tasks seen so far; the band is one standard deviation.",
    "comparison_speed": "Means over seeds; the lines are one standard deviation. Up and to the left is better.",
    "comparison_reach": "Means over tasks and seeds. A task that never came so far counts with all its steps.",
    "sweep_front": "Trials that came to the end. Ringed are those that no other beats in one of accuracy, time and "
    "forgetting without losing in another; one that lies within the ringed ones' reach forgets less.",
    "sweep_importance": "Longer bars matter more. One that ends left of its red tick explains no more than shuffled "
    "scores do; the black line is how far one trial moves it.",
    "sweep_parallel": "A line for each trial. Where bright lines gather on an axis, good settings lie; the parameters "
    "that matter most come first.",
    "sweep_curves": "What trials scored after each task. A cross ends a trial that was stopped.",
}
NOT_RECORDED = "not recorded"
REUSED = ("probe_rounds", "pass_rows", "seconds")  # of `Effort.reused`


def one_run(run: Run) -> str:
    result, config = run.result, run.config
    name = run.address.rstrip("/").rpartition("/")[2]
    data = figure_data(result, run.journal)
    parts = {
        "Summary": [_summary(config.method.name, result), _measures(result["metrics"])],
        "Scores": [score_table(result)],
        "Figures": [figure(key, shown) for key, shown in data.items()],
        "What tasks leaned on": list(_leaning(result)),
        "Protocol": [_protocol(Entry(name, config, result))],
        "Config": [tag("details", tag("summary", "Every setting, defaults filled in"), tag("pre", config.to_yaml()))],
        "Versions": [_versions(result)],
    }
    parts = {title: inside for title, inside in parts.items() if inside}
    state = (
        "finished" if result["finished"] else f"{len(result['tasks'])} of {len(result['stream'])} tasks learnt so far"
    )
    source = config.stream.preset or config.stream.path or config.stream.source
    about = f"{config.method.name} on {source}, seed {config.seed}, routing {config.objective.routing}, {state}"
    return page(name, tag("h1", name), tag("p", about, class_="soft"), *sections(parts))


def sections(parts: Mapping[str, Sequence[Html]]) -> Iterator[Html]:
    ids = {title: title.lower().replace(" ", "-") for title in parts}
    yield tag("nav", *(tag("a", title, href=f"#{ids[title]}") for title in parts), aria_label="Sections")
    for title, inside in parts.items():
        yield tag("section", tag("h2", title, id=ids[title]), *inside, aria_labelledby=ids[title])


def sentence(method: str, result: Mapping[str, Any]) -> str:
    """What the numbers say."""
    found, n = result["metrics"], len(result["tasks"])
    said = f"After {n} task{'' if n == 1 else 's'}, {method} scores {found['op']:.1f}% on average"
    drop = found.get("bwt_n_minus_1")
    if drop is None:
        return said + "."
    before = found["learning_accuracy"]
    if abs(drop) < 0.5:
        kept = "it has forgotten practically nothing"
    elif drop < 0:
        kept = f"earlier tasks have gained {-drop:.1f} points each since they were learnt"
    else:
        kept = f"each earlier task has lost {drop:.1f} points on average since"
    said += f". Right after learning it scored {before:.1f}%; {kept}."
    leans = [name for record in result["records"] for name in record["report"].get("leans_on", ())]
    if leans:
        said += (
            f" {sum(name is not None for name in leans)} of {len(leans)} layers of its tasks leaned on an earlier task."
        )
    return said


def _summary(method: str, result: Mapping[str, Any]) -> Html:
    seconds = sum(sum(record["effort"]["seconds"].values()) for record in result["records"])
    steps = sum(record["effort"]["steps"] for record in result["records"])
    took = f"It took {duration(seconds)} and {steps} training steps."
    return joined([tag("p", sentence(method, result), class_="lead"), tag("p", took)])


def _measures(found: Mapping[str, Any]) -> Html:
    rows = [
        (name, [f"{found[name]:.2f}", text(words), text(better)])
        for name, (words, better) in MEASURES.items()
        if found.get(name) is not None
    ]
    return table("Metrics, from the score matrix", ["value", "what it is", "better"], rows, "metric")


def score_table(result: Mapping[str, Any]) -> Html:
    tasks = list(result["tasks"])
    rows = []
    for row, record in zip(result["matrix"], result["records"], strict=True):
        cells = [tag("td") if x is None else heat(f"{x:.1f}", x / 100) for x in row[: len(tasks)]]
        rows.append((record["unit"], cells))
    return table("Score on (column) after learning (row), percent; higher is better", tasks, rows, "after learning")


def figure(name: str, data: Data) -> Html:
    out = io.BytesIO()
    figures.save(figures.draw({name: data})[name], out, "svg")
    source = "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
    return tag(
        "figure", tag("img", src=source, alt=f"{data['title']}. {data['alt']}"), tag("figcaption", CAPTIONS[name])
    )


def _leaning(result: Mapping[str, Any]) -> Iterator[Html]:
    rows, merged = [], []
    for record in result["records"]:
        report = record["report"]
        if report.get("leans_on"):
            leans = list(report["leans_on"])
            named = ", ".join(f"{name} ({leans.count(name)})" for name in dict.fromkeys(leans) if name is not None)
            rows.append(
                (record["unit"], [text(named or "nothing"), f"{sum(x is not None for x in leans)} of {len(leans)}"])
            )
        if report.get("merged"):
            merged.append(f"Since {record['unit']}: {', '.join(report['merged'])} share one adapter.")
    if rows:
        yield table(
            "Earlier tasks that layers started from and were pulled towards",
            ["earlier task (layers)", "layers"],
            rows,
            "task",
        )
    if merged:
        yield bullets(merged)


def _reused(efforts: Sequence[Mapping[str, Any]]) -> str:
    """What another run had paid for; steps count wherever they were taken, seconds do not."""
    found = {key: sum(effort.get("reused", {}).get(key, 0) for effort in efforts) for key in REUSED}
    if not any(found.values()):
        return ""
    return (
        f". Of these, {found['probe_rounds']} rounds and {found['pass_rows']} rows were taken from another run, where "
        f"they had taken {found['seconds']:.1f} s that are not in this run's times"
    )


def _protocol(entry: Entry) -> Html:
    config, result = entry.config, entry.result
    train, lora, objective = config.train, config.model.lora, config.objective
    efforts = [record["effort"] for record in result["records"]]
    phases = dict.fromkeys(phase for effort in efforts for phase in effort["seconds"])
    spent = {phase: sum(effort["seconds"].get(phase, 0.0) for effort in efforts) for phase in phases}
    total = {key: sum(effort[key] for effort in efforts) for key in ("steps", "probe_rounds", "queries", "pass_rows")}
    budget = f"{train.steps} steps a task" if train.steps is not None else f"epochs a task: {train.epochs}"
    made = (
        f"{total['steps']} training steps; {total['probe_rounds']} probe rounds, {total['queries']} queries and passes "
        f"over {total['pass_rows']} rows beside them. Counted as steps: {sum(counted(e, train.batch) for e in efforts)}"
    )
    made += _reused(efforts)
    rate = f"{train.lr:g}, {train.schedule}, warm-up over {train.warmup:.0%}, head {train.head_lr or train.lr:g}"
    rows = {
        "seed": config.seed,
        "tasks, in order": ", ".join(result["tasks"]),
        "rows": ", ".join(f"{x['name']} {x['train']} + {x['test']}" for x in result.get("data", ())) or NOT_RECORDED,
        "global batch": f"{train.batch} rows, {_workers(config.cluster.workers)}",
        "budget": budget,
        "steps made": made,
        "learning rate": rate,
        "ce_scope": f"{objective.ce_scope}: classes that compete in training",
        "routing": f"{objective.routing}: which adapter answers at test",
        "label_match": objective.label_match,
        "adapters": f"rank {lora.rank}, alpha {lora.alpha:g}, targets {lora.targets}, dropout {lora.dropout:g}",
        "a task starts from": start_of(config.method.model_dump(by_alias=True)),
        "time": ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in spent.items())
        + "; start-up is not recorded",
        "trainable parameters": f"{result['trainable_parameters']:,} with the last task's head",
        "bytes stored a task": f"{result['adapter_bytes_per_task']:,} of adapter",
        "bytes of the guide": f"{result['guide_bytes']:,}" if "guide_bytes" in result else "none",
        "peak memory": _mib(result["peak_memory_bytes"]) + _on_device(result),
        "device": f"{result['device']}, precision {train.precision}",
        "digest of settings": result["digest"],
    }
    return table(
        "What must be the same, or said, where results are compared",
        ["here"],
        ((k, [text(v)]) for k, v in rows.items()),
        "what",
    )


def _workers(count: int | tuple[int, int]) -> str:
    if isinstance(count, tuple):
        return f"on {count[0]} to {count[1]} workers"
    return f"on {count} workers" if count else "in one process"


def start_of(method: Mapping[str, Any]) -> str:
    """Where a task's adapter starts from, in words."""
    known = METHODS.get(method["name"])
    return (known.start_of(method) if known is not None else "") or NOT_RECORDED


def _mib(count: int | None) -> str:
    return NOT_RECORDED if count is None else f"{count / 2**20:,.0f} MiB"


def _on_device(result: Mapping[str, Any]) -> str:
    return f", {_mib(result['peak_device_bytes'])} on the device" if result.get("peak_device_bytes") else ""


def _versions(result: Mapping[str, Any]) -> Html:
    found = {**result["packages"], "python": result["python"], "commit": result["commit"]}
    return table("What it ran on", ["version"], ((k, [text(v or NOT_RECORDED)]) for k, v in found.items()), "package")
