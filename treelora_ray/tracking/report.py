"""A report of one run, or of several side by side: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from treelora_ray.api import Run
from treelora_ray.files import write_atomically
from treelora_ray.store import local_path
from treelora_ray.tracking.compare import Comparison, Entry, Group, Value, compare
from treelora_ray.tracking.comparison_data import is_comparison
from treelora_ray.tracking.figure_data import Data
from treelora_ray.tracking.page import Html, bullets, page, table, tag, text
from treelora_ray.tracking.report_run import MEASURES, NOT_RECORDED, figure, one_run, score_table, sections, sentence
from treelora_ray.tracking.sweep_data import is_sweep
from treelora_ray.training.errors import RunError

COSTS = {  # by name: what it is, and how it is written
    "steps": ("training steps", "{:,.0f}"),
    "counted": ("steps, with all that counts as some", "{:,.0f}"),
    "step_ms": ("ms a training step", "{:.1f}"),
    "seconds": ("seconds in all", "{:,.0f}"),
}


def open_run(address: str) -> Run:
    """A run; where there is none, the error names those that lie near."""
    path = local_path(address)
    if path is None or (path / "config.yaml").is_file():
        return Run(address)
    inside = sorted(found.parent.name for found in path.glob("*/config.yaml"))
    if inside:
        raise RunError(f"{address} is a folder of runs: name one, such as {path / inside[0]}")
    beside = sorted(found.parent.name for found in path.parent.glob("*/config.yaml"))
    near = get_close_matches(path.name, beside, 3, 0.4) or beside[:8]
    hint = f"; did you mean {', '.join(str(path.parent / name) for name in near)}?" if near else ""
    raise RunError(f"{address} is no run: it has no config.yaml{hint or '; give the folder that `train` made'}")


def one_sweep(addresses: Sequence[str]) -> Path | None:
    """The folder of a sweep; None where these are runs."""
    return _alone(addresses, is_sweep, "a sweep, whose page already compares its trials")


def one_comparison(addresses: Sequence[str]) -> Path | None:
    """The folder of a comparison; None where these are runs."""
    return _alone(addresses, is_comparison, "a comparison, whose page already compares its runs")


def _alone(addresses: Sequence[str], is_it: Callable[[Path], bool], what: str) -> Path | None:
    """The folder of what is reported by itself."""
    folders = [path for address in addresses if (path := local_path(address)) is not None and is_it(path)]
    if folders and len(addresses) > 1:
        raise RunError(f"{folders[0]} is {what}: give it alone")
    return folders[0] if folders else None


def beside(runs: Sequence[Run], name: str) -> Path:
    """Where something about runs is written to, if nobody says: to the run, or here."""
    home = local_path(runs[0].address) if len(runs) == 1 else None
    return (home or Path()) / name


def write_report(runs: Sequence[Run], target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    text = one_run(runs[0]) if len(runs) == 1 else several_runs(runs)
    write_atomically(target, text.encode())
    return target


# -- several runs


def several_runs(runs: Sequence[Run]) -> str:
    names = _distinct([run.address for run in runs])
    entries = [Entry(name, run.config, run.result) for name, run in zip(names, runs, strict=True)]
    found = compare(entries)
    parts = {
        "What is compared": [tag("p", found.basis, class_="lead"), *([bullets(found.notes)] if found.notes else [])],
        "Comparison": [*_comparison(found)],
        "Settings that differ": [_differing(found)] if found.differences else [],
        "Runs": [_runs(entries)],
        **{
            f"Run {entry.name}": [tag("p", sentence(entry.config.method.name, entry.result)), score_table(entry.result)]
            for entry in entries
        },
    }
    parts = {title: inside for title, inside in parts.items() if inside}
    title = f"{len(runs)} runs compared"
    return page(title, tag("h1", title), *sections(parts))


def _distinct(addresses: Sequence[str]) -> list[str]:
    """Last parts of the addresses, with the folder before where two would be alike."""
    parts = [address.rstrip("/").split("/") for address in addresses]
    short = [part[-1] for part in parts]
    return ["/".join(part[-2:]) if short.count(part[-1]) > 1 else part[-1] for part in parts]


def value(found: Value | None, form: str = "{:.1f}", spread: bool = True) -> str:
    """Mean ± sample standard deviation; of one seed the number alone."""
    if found is None:
        return "–"
    return form.format(found.mean) + ("" if found.std is None or not spread else f" ± {form.format(found.std)}")


def _comparison(found: Comparison) -> Iterator[Html]:
    groups = [group for group in found.groups if group.measures]
    if not groups:
        return
    n = len(found.tasks)
    shown = [name for name in MEASURES if any(name in group.measures for group in groups)]
    columns = ["seeds (n)", *(name.replace("_", " ") for name in shown)]
    rows = [(group.label, [_seeds(group), *(value(group.measures.get(name)) for name in shown)]) for group in groups]
    yield table(
        f"Mean ± sample standard deviation over seeds, of {n} tasks; percent and points", columns, rows, "settings"
    )
    words = ((name.replace("_", " "), *MEASURES[name]) for name in shown)
    yield bullets(f"{name}: {what}; {better}." for name, what, better in words)
    courses = [group for group in groups if group.course]
    if courses and len(found.tasks) > 1:
        yield figure("compare", comparison_data(courses, found.tasks))
    rows = [(task, [value(group.scores.get(task)) for group in groups]) for task in found.tasks]
    yield table("Score on each task at the end of what is compared, percent", [g.label for g in groups], rows, "task")
    if any("steps" in group.measures for group in groups):
        rows = [
            (group.label, [value(group.measures.get(name), form, name != "steps") for name, (_, form) in COSTS.items()])
            for group in groups
        ]
        yield table(
            f"What {n} tasks cost; times compare on one machine only", [x for x, _ in COSTS.values()], rows, "settings"
        )


def _seeds(group: Group) -> str:
    return f"{', '.join(str(run.config.seed) for run in group.runs)} ({len(group.runs)})"


def comparison_data(groups: Sequence[Group], tasks: Sequence[str]) -> Data:
    ends = sorted(((group.course[-1].mean, group.label) for group in groups), reverse=True)
    best = f"{ends[0][1]} ends {'highest, ' if len(ends) > 1 else ''}at {ends[0][0]:.1f}%"
    return {
        "title": f"Mean score on the tasks seen: {best}",
        "alt": f"Lines of the mean score on the tasks seen after each of {len(tasks)} tasks. At the end: "
        + ", ".join(f"{label} {mean:.1f}" for mean, label in ends) + ".",
        "tasks": list(tasks),
        "lines": [
            {
                "label": f"{group.label}, n = {len(group.runs)}",
                "mean": [each.mean for each in group.course],
                "std": [each.std or 0.0 for each in group.course],
            }
            for group in groups
        ],
    }  # fmt: skip


def _differing(found: Comparison) -> Html:
    rows = ((key, [text(str(value)) for value in values]) for key, values in found.differences.items())
    return table(
        "Settings in which the groups differ, seeds and names left out", [g.label for g in found.groups], rows, "key"
    )


def _runs(entries: Sequence[Entry]) -> Html:
    rows = [
        (
            entry.name,
            [
                entry.config.method.name,
                entry.config.seed,
                f"{len(entry.tasks)} of {len(entry.result['stream'])}",
                f"{entry.result['metrics']['op']:.1f}",
                entry.config.objective.routing,
                entry.result["digest"],
                (entry.result["commit"] or NOT_RECORDED)[:10],
            ],
        )
        for entry in entries
    ]
    columns = ["method", "seed", "tasks", "op, own tasks", "routing", "digest", "commit"]
    return table("The runs, each with all of its own tasks", columns, rows, "run")
