"""A sweep as a page: its winner, what mattered, the front, every trial. One HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treelora_ray.files import write_atomically
from treelora_ray.tracking import figures
from treelora_ray.tracking.figure_data import duration
from treelora_ray.tracking.page import Html, bullets, page, table, tag, text
from treelora_ray.tracking.report_run import figure, sections
from treelora_ray.tracking.sweep_data import (
    FAILED,
    FINISHED,
    SURE,
    Sweep,
    Trial,
    figure_data,
    front,
    mattered,
    of_state,
    ranked,
    read,
    score,
)

REPORT = "report.html"
NONE = "–"
HOW = (
    "A trial's standing is the share of other trials that it beats at the last percent of the stream that both have "
    "reached, so that trials that were stopped early count too. A number explains what a parabola over its ranks "
    "explains of the standings, a choice what the means of its groups do, corrected for what any numbers would "
    "(adjusted R²; it can fall below 0). p is that of a permutation test; for several parameters it is corrected by "
    "Holm's method. What parameters do only together is not seen, and where a search follows the scores, or a "
    "parameter comes with another, one can be lent the other's share."
)


def write_sweep_report(folder: Path, target: Path | None = None) -> Path:
    """Of the sweep in a folder, also of one that goes on; the file, which lies in the folder if nobody says where."""
    target = target or folder / REPORT
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, sweep_page(read(folder)).encode())
    return target


def write_sweep_figures(folder: Path, target: Path | None = None) -> list[Path]:
    """Each figure as PNG and SVG; the files written."""
    return figures.write(figures.draw(figure_data(read(folder))), target or folder / "figures")


def sweep_page(sweep: Sweep) -> str:
    data = figure_data(sweep)
    shown = {name: figure(name, found) for name, found in data.items()}
    parts = {
        "Summary": [tag("p", sentence(sweep), class_="lead"), tag("p", _spent(sweep))],
        "Winner": list(_winner(sweep)),
        "What mattered": list(_mattered(sweep, shown.get("sweep_importance"))),
        "Accuracy, time, forgetting": [*_shown(shown, "sweep_front"), *_front(sweep)],
        "Settings": list(_shown(shown, "sweep_parallel")),
        "Over the stream": list(_shown(shown, "sweep_curves")),
        "Trials": [_trials(sweep)],
        "What was searched": [_space(sweep), _about(sweep)],
        "Base": [_base(sweep)],
        "Versions": [_versions(sweep)],
    }  # fmt: skip
    about = f"space {sweep['space']}, {_asked(sweep)}, search {sweep['search']}, scheduler {sweep['scheduler']}"
    return page(
        sweep["name"],
        tag("h1", sweep["name"]),
        tag("p", about, class_="soft"),
        *sections({title: inside for title, inside in parts.items() if inside}),
    )


def _shown(shown: Mapping[str, Html], name: str) -> Iterator[Html]:
    if name in shown:
        yield shown[name]


def _asked(sweep: Sweep) -> str:
    return f"{sweep['asked']} trial{'' if sweep['asked'] == 1 else 's'}"


# -- what was found


def sentence(sweep: Sweep) -> str:
    """What the trials say."""
    states = [trial["state"] for trial in sweep["trials"]]
    words = {"finished": "came to the end", "stopped": "stopped early", "failed": "failed", "running": "going on",
             "waiting": "not begun"}  # fmt: skip
    counts = ", ".join(f"{states.count(state)} {said}" for state, said in words.items() if state in states)
    said = f"Of {_asked(sweep)}: {counts or 'none has begun'}."
    first = ranked(sweep)[:1]
    value = score(sweep, first[0]) if first else None
    if value is None:
        failed = of_state(sweep, FAILED)
        why = f" The first to fail: {failed[0]['error']}" if failed and failed[0].get("error") else ""
        return f"{said} None has a score at the end of the stream yet.{why}"
    return f"{said} Trial {first[0]['id']} is best on one seed, with {sweep['metric']} {value:.1f}."


def _spent(sweep: Sweep) -> str:
    inside = sum(float(trial.get("seconds") or 0.0) for trial in [*sweep["trials"], *sweep["again"]])
    return f"The sweep took {duration(sweep['seconds'])}, its trials {duration(inside)} together."


def _winner(sweep: Sweep) -> Iterator[Html]:
    winner = sweep["winner"]
    if winner is None:
        return
    found = winner["val_op"]
    seeds = ", ".join(map(str, found["seeds"]))
    spread = "" if found.get("std") is None else f" ± {found['std']:.1f}"
    over = (
        f"mean ± sample standard deviation over the seeds {seeds}" if len(found["seeds"]) > 1 else f"seed {seeds} alone"
    )
    said = f"Trial {winner['trial']}: {found['mean']:.1f}{spread}% on validation rows, {over}."
    yield tag("p", said, class_="lead")
    test = winner.get("test")
    if test:
        numbers = ", ".join(
            f"{key} {test[key]:.1f}" for key in ("op", "bwt", "forgetting") if test.get(key) is not None
        )
        yield tag("p", f"On test rows, which nothing was chosen by, once, seed {test['seed']}: {numbers}.")
    (parameters,) = (trial["parameters"] for trial in sweep["trials"] if trial["id"] == winner["trial"])
    yield table("Its settings", ["value"], ((key, [text(shown(value))]) for key, value in parameters.items()), "key")
    yield from _again(sweep)


def _again(sweep: Sweep) -> Iterator[Html]:
    """The best on further seeds, beside the seed that they were found with."""
    if not sweep["again"]:
        return
    rows: list[tuple[str, list[Any]]] = []
    for name in dict.fromkeys(entry["of"] for entry in sweep["again"]):
        entries = [trial for trial in sweep["trials"] if trial["id"] == name]
        entries += [entry for entry in sweep["again"] if entry["of"] == name]
        rows += [(name, [entry["seed"], text(entry["state"]), *_numbers(entry)]) for entry in entries]
    yield table("The best again, on further seeds", ["seed", "state", *NUMBERS], rows, "trial")


def _mattered(sweep: Sweep, shown_figure: Html | None) -> Iterator[Html]:
    found = mattered(sweep)
    if shown_figure is not None:
        yield shown_figure
    if found.found:
        rows = [
            (
                each.parameter,
                [
                    f"{each.share:.0%}", f"{each.low:.0%} to {each.high:.0%}", f"{each.chance:.0%}",
                    _p(each.p), _p(each.adjusted), text("yes" if each.sure else "no"), each.trials,
                ],
            )
            for each in found.found
        ]  # fmt: skip
        columns = [
            "explained", "leaving any one trial out", "chance, 1 of 20", "p", "p, of so many parameters",
            f"told from chance (p < {SURE})", "trials",
        ]  # fmt: skip
        yield table("What each parameter explains by itself of how trials rank", columns, rows, "parameter")
        yield tag("p", HOW, class_="soft")
    if found.notes:
        yield bullets(found.notes)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# -- tables

NUMBERS = ("val_op", "forgetting", "time", "percent of the stream")


def _numbers(trial: Trial) -> list[str]:
    def number(key: str, form: str) -> str:
        return NONE if trial.get(key) is None else form.format(trial[key])

    seconds = trial.get("seconds")
    return [
        number("val_op", "{:.1f}"),
        number("forgetting", "{:.1f}"),
        NONE if seconds is None else duration(seconds),
        number("percent", "{:.0f}"),
    ]


def _front(sweep: Sweep) -> Iterator[Html]:
    """Each trial of the front, the most accurate first."""
    names = set(front(sweep))
    best = [trial for trial in sweep["trials"] if trial["id"] in names]
    if best:
        rows = ((trial["id"], _row(sweep, trial)) for trial in sorted(best, key=lambda trial: -trial["val_op"]))
        yield table(
            "The front: no other trial is as good in everything and better in something", _columns(sweep), rows, "trial"
        )


def _columns(sweep: Sweep) -> list[str]:
    return ["state", *NUMBERS, *sweep["parameters"]]


def _row(sweep: Sweep, trial: Trial) -> list[Any]:
    values = [shown(trial["parameters"][key]) if key in trial["parameters"] else NONE for key in sweep["parameters"]]
    return [text(trial["state"]), *_numbers(trial), *values]


def _trials(sweep: Sweep) -> Html:
    """All of them, best first; scores of trials that were stopped are those of an earlier percent."""
    names = set(front(sweep))
    errors = any(trial.get("error") for trial in sweep["trials"])
    rows = []
    for trial in ranked(sweep):
        last = [text(trial.get("error") or "")] if errors else []
        rows.append((trial["id"] + (" (front)" if trial["id"] in names else ""), [*_row(sweep, trial), *last]))
    return table(
        f"Trials: those that came to the end by {sweep['metric']}, then by how far they came",
        [*_columns(sweep), *(["error"] if errors else [])],
        rows,
        "trial",
    )


def _space(sweep: Sweep) -> Html:
    rows = ((key, [text(searched(found))]) for key, found in sweep["parameters"].items())
    return table("Parameters", ["values"], rows, "key")


def searched(found: Mapping[str, Any]) -> str:
    """What a parameter may be, in words."""
    if found["kind"] == "choice":
        return f"one of {', '.join(map(shown, found['values']))}"
    words = {"uniform": "", "loguniform": ", on a log scale", "randint": ", whole numbers",
             "lograndint": ", whole numbers on a log scale"}  # fmt: skip
    return f"{shown(found['low'])} to {shown(found['high'])}{words.get(found['kind'], ', ' + found['kind'])}"


def _about(sweep: Sweep) -> Html:
    better = "higher" if sweep["mode"] == "max" else "lower"
    rows = {
        "metric": f"{sweep['metric']}, {better} is better, on validation rows cut from training rows",
        "scheduler": sweep["scheduler"],
        "search": sweep["search"],
        "trials": sweep["asked"],
        "finished": len(of_state(sweep, FINISHED)),
        "seeds of the best": sweep["seeds"],
    }
    return table("The search", ["here"], ((key, [text(value)]) for key, value in rows.items()), "what")


def _versions(sweep: Sweep) -> Html:
    rows = ((package, [text(version or NONE)]) for package, version in sweep["versions"].items())
    return table("What it ran on", ["version"], rows, "package")


def _base(sweep: Sweep) -> Html:
    lines = "\n".join(f"{key}: {shown(value)}" for key, value in sweep["base"].items())
    return tag("details", tag("summary", "The config that trials change"), tag("pre", lines))


def shown(value: Any) -> str:
    """A value in few letters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)
