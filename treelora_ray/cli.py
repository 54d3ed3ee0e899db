"""The command line: parses, calls, prints. What is heavy is imported inside the commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

EPILOG = "Exit codes: 0 done, 1 failure, 2 a mistake in what was asked for, 130 interrupted (and saved)."
app = typer.Typer(
    add_completion=False, no_args_is_help=True, epilog=EPILOG, pretty_exceptions_enable=False, rich_markup_mode=None
)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check, show and list configs.")
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Import and describe data.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
tree_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Hand a run's tree on.")
app.add_typer(tree_app, name="tree")
track_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What MLflow is told of runs.")
app.add_typer(track_app, name="track")

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a preset (treelora config list).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.lr=1e-3.")]
RunFolder = Annotated[str, typer.Argument(help="The folder of a run, or its address (s3://, gs://).")]
Json = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
Routing = Annotated[str | None, typer.Option(help="inferred, oracle or last; left out: as the run's config says.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"treelora-ray {version('treelora-ray')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Continual learning with TreeLoRA: learn a stream of tasks, one low-rank adapter each."""


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    allow_change: Annotated[list[str] | None, typer.Option(help="A key that may differ when a run goes on.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, whatever cluster.workers says.")] = False,
    quiet: Annotated[bool, typer.Option(help="Print the run's folder only.")] = False,
    as_json: Json = False,
) -> None:
    """Learn a stream, or go on with a run from its last checkpoint. Ctrl-C once: save and stop."""
    from treelora_ray.config import load

    found = load(config, [*(overrides or []), *(["cluster.workers=0"] if local else [])])
    from treelora_ray.api import run
    from treelora_ray.store import joined
    from treelora_ray.tracking import console as shown

    listener = shown.listener(quiet, as_json)
    with _stoppable() as stop:
        done = run(found, allow=allow_change or [], listener=listener, stop=stop)
    if isinstance(listener, shown.JsonLines):
        listener.write("finished", folder=done.address, metrics=done.metrics)
    elif quiet:
        typer.echo(done.address)
    else:
        shown.score_tables(done.result, _console())
        adapters = f"; its adapters in {joined(done.address, 'adapters')}" if done.adapters else ""
        typer.echo(f"\nThe run lies in {done.address}{adapters}")
        typer.echo(f"Look again: treelora show {done.address}")


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    space: Annotated[str, typer.Option(help="treelora, smoke, baselines:METHOD, or a file of your own.")] = "treelora",
    trials: Annotated[int, typer.Option(help="Settings to try.")] = 32,
    concurrency: Annotated[str, typer.Option(help="Trials at once; auto: as many as there is room for.")] = "auto",
    scheduler: Annotated[str, typer.Option(help="asha: stop what is hopeless early; none.")] = "asha",
    grace: Annotated[float, typer.Option(help="Percent of the stream before asha stops anything.")] = 15.0,
    search: Annotated[str, typer.Option(help="random, optuna or grid.")] = "random",
    seeds: Annotated[int, typer.Option(help="Seeds by which the best are judged.")] = 3,
    top: Annotated[int, typer.Option(help="How many of the best are learnt on further seeds.")] = 3,
    metric: Annotated[str, typer.Option(help="val_op, forgetting or seconds.")] = "val_op",
    time_budget: Annotated[str | None, typer.Option(help="Of the search, such as 90m or 2h.")] = None,
    name: Annotated[str | None, typer.Option(help="Left out: made of space and config.")] = None,
    quiet: Annotated[bool, typer.Option(help="Print the sweep's folder only.")] = False,
    as_json: Json = False,
) -> None:
    """Search settings on held-out rows, and learn with the best. The same again goes on: docs/sweeps.md."""
    from treelora_ray.config import load, overridden

    base = load(config, overrides or [])
    from treelora_ray.cluster.sweep import sweep as search_settings
    from treelora_ray.cluster.sweep_plan import SweepOptions
    from treelora_ray.store import joined
    from treelora_ray.tracking import console as shown

    options = SweepOptions(
        space=space, trials=trials, concurrency=_concurrency(concurrency), scheduler=scheduler, grace=grace,
        search=search, seeds=seeds, top=top, metric=metric, time_budget=_seconds(time_budget), name=name,
    )  # fmt: skip
    listener = shown.listener(quiet, as_json)
    with _stoppable() as stop:
        done = search_settings(base, options, given=overridden(overrides or []), listener=listener, stop=stop)
    address = done.folder.address
    if isinstance(listener, shown.JsonLines):
        listener.write("finished", folder=address, winner=done.winner)
    elif quiet:
        typer.echo(address)
    else:
        shown.sweep_table(done.to_json(), _console())
        typer.echo(f"\nThe sweep lies in {address}; the winner's run in {joined(address, 'winner')}")
        typer.echo(f"Learn with its config again: treelora train {joined(address, 'best.yaml')}")


def _concurrency(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number: auto, or how many", param_hint="--concurrency") from None


def _seconds(text: str | None) -> float | None:
    """Of 2h, 90m, 1h30m, 45s."""
    if text is None:
        return None
    import re

    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or found is None:
        raise typer.BadParameter(f"{text!r} is no time: write it like 2h, 90m or 1h30m", param_hint="--time-budget")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(3600 * hours + 60 * minutes + seconds)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    config: Config,
    address: Annotated[str, typer.Option(help="Of the cluster's dashboard, http://HEAD:8265, or auto.")] = "auto",
    working_dir: Annotated[Path, typer.Option(help="What travels: code and configs.")] = Path("."),
    detach: Annotated[bool, typer.Option("--detach", help="Send it, and do not follow its log.")] = False,
    run: Annotated[bool, typer.Option("--evaluate", help="CONFIG is a run: measure its scores again.")] = False,
    search: Annotated[bool, typer.Option("--sweep", help="Search settings, with the options of sweep.")] = False,
) -> None:
    """Learn a stream as a job of a Ray cluster: CONFIG [KEY=VALUE]... as for train. The same again goes on."""
    from treelora_ray.cluster.submit import submit as send

    if run and search:
        raise typer.BadParameter("give --evaluate or --sweep, not both")
    command = "evaluate" if run else "sweep" if search else "train"
    code = send(command, [config, *context.args], address, working_dir, detach, lambda text: typer.echo(text))
    raise typer.Exit(code)


@app.command()
def evaluate(run: RunFolder, routing: Routing = None, as_json: Json = False) -> None:
    """Measure a run's scores again, with another routing if wanted."""
    from treelora_ray.api import Run

    scores = Run(run).evaluate(_routing(routing))
    mean = sum(scores.values()) / len(scores)
    if as_json:
        typer.echo(json.dumps({"scores": scores, "mean": mean}))
        return
    for task, score in scores.items():
        typer.echo(f"{score:6.2f}  {task}")
    typer.echo(f"{mean:6.2f}  mean of {len(scores)}")


@app.command()
def predict(
    run: RunFolder,
    source: Annotated[Path, typer.Option("--input", help="Parquet with the column image, text or prompt.")],
    target: Annotated[Path, typer.Option("--output", help="Parquet to write: the rows with their answers.")],
    routing: Routing = None,
    force: Annotated[bool, typer.Option(help="Replace the output where it is there already.")] = False,
) -> None:
    """Answer rows of unknown tasks: a column `task` and a column `label` or `answer` are added."""
    from treelora_ray.api import Run

    if target.exists() and not force:
        raise typer.BadParameter(f"{target} is there already: give --force to replace it", param_hint="--output")
    from treelora_ray.tracking.predict import predict_file

    count = predict_file(Run(run), source, target, _routing(routing))
    typer.echo(f"{count} rows answered in {target}")


@app.command()
def export(
    run: RunFolder,
    task: Annotated[str, typer.Option(help="The task whose adapter is wanted.")],
    target: Annotated[Path, typer.Option("--output", help="The folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="The backbone with the adapter in its weights.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an export that is there already.")] = False,
) -> None:
    """Write a task's adapter as a folder that peft loads, or merged into its backbone, for transformers alone."""
    from treelora_ray.api import Run
    from treelora_ray.tracking.export import export_task

    export_task(Run(run), task, target, merge, force)
    typer.echo(f"written to {target}")


@app.command()
def model(
    run: RunFolder,
    target: Annotated[Path, typer.Option("--output", help="The folder to write.")],
    copy_backbone: Annotated[
        bool, typer.Option("--backbone/--no-backbone", help="Copy the backbone, or keep the hub id alone.")
    ] = True,
    force: Annotated[bool, typer.Option(help="Replace a model that is there already.")] = False,
) -> None:
    """Write a finished run as an MLflow model, that routes and answers rows anywhere: docs/models.md."""
    from treelora_ray.api import Run
    from treelora_ray.tracking.model import save_model

    save_model(Run(run), target, copy_backbone=copy_backbone, force=force)
    typer.echo(f"written to {target}; load it: mlflow.pyfunc.load_model({str(target)!r}).predict(frame)")


@app.command()
def show(run: RunFolder, as_json: Json = False) -> None:
    """The score matrix, metrics, tree and times of a run."""
    from treelora_ray.api import Run

    found = Run(run)
    if as_json:
        typer.echo(json.dumps(found.result))
        return
    from treelora_ray.tracking.console import score_tables

    result = found.result
    state = "finished" if found.finished else f"{len(found.tasks)} of {len(result['stream'])} tasks learnt"
    typer.echo(f"{run}: {found.config.method.name}, {state}, routing {found.config.objective.routing}")
    score_tables(result, _console())


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, of which several are compared; or a sweep's."),
    ],
    target: Annotated[
        Path | None, typer.Option("--output", help="The file; left out: RUN/report.html, of several ./report.html.")
    ] = None,
) -> None:
    """Write one HTML file about a run, several side by side, or a sweep: scores, figures, settings, what it ran on."""
    from treelora_ray.tracking.report import beside, one_sweep, open_run, write_report

    if (sweep := one_sweep(runs)) is not None:
        from treelora_ray.tracking.sweep_report import write_sweep_report

        typer.echo(f"written to {write_sweep_report(sweep, target)}")
        return
    found = [open_run(run) for run in runs]
    typer.echo(f"written to {write_report(found, target or beside(found, 'report.html'))}")


@app.command()
def figures(
    run: RunFolder,
    target: Annotated[Path | None, typer.Option("--output", help="The folder; left out: RUN/figures.")] = None,
) -> None:
    """Write the figures of a run or a sweep, as PNG and SVG."""
    from treelora_ray.tracking.figures import write_figures
    from treelora_ray.tracking.report import beside, one_sweep, open_run

    if (sweep := one_sweep([run])) is not None:
        from treelora_ray.tracking.sweep_report import write_sweep_figures

        written = write_sweep_figures(sweep, target)
    else:
        found = open_run(run)
        written = write_figures(found, target or beside([found], "figures"))
    if not written:
        raise typer.BadParameter(f"{run} has nothing to show yet: no trial has a score", param_hint="RUN")
    typer.echo(f"{len(written)} files written to {written[0].parent}")


@app.command()
def methods() -> None:
    """All methods: what each learns, keeps and costs, and its options."""
    from rich.table import Table

    from treelora_ray.methods.catalogue import METHODS
    from treelora_ray.methods.options import METHOD_OPTIONS

    table = Table(pad_edge=False)
    for title in ("method", "learns", "kept after N tasks", "extra per step", "added up over workers"):
        table.add_column(title)
    for name, method in METHODS.items():
        table.add_row(name, "\n".join(method.objectives), method.keeps, method.step_cost, method.reduces)
    _console().print(table)
    for name, options in METHOD_OPTIONS.items():
        typer.echo(f"{name}: {(options.__doc__ or '').strip()}")
        for key, field in options.model_fields.items():
            if key != "name":
                typer.echo(f"  {field.alias or key} = {field.get_default(call_default_factory=True)}")
                typer.echo(f"      {' '.join((field.description or '').split())}")


@config_app.command("check")
def config_check(config: Config, overrides: Overrides = None) -> None:
    """Say everything that is wrong with a config, or that nothing is."""
    from treelora_ray.config import load, run_name

    found = load(config, overrides or [])
    typer.echo(f"ok: run {run_name(found)}, digest {found.digest}")


@config_app.command("show")
def config_show(config: Config, overrides: Overrides = None) -> None:
    """A config with every default filled in."""
    from treelora_ray.config import load

    typer.echo(load(config, overrides or []).to_yaml(), nl=False)


@config_app.command("list")
def config_list() -> None:
    """Configs that come with the package."""
    from treelora_ray.config import presets

    for name in presets():
        typer.echo(name)


@data_app.command("describe")
def data_describe(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tasks of a config's stream, or of a folder of Parquet tasks: rows, labels, lengths."""
    from treelora_ray.config import from_mapping, load
    from treelora_ray.data.importers import describe
    from treelora_ray.data.stream import open_stream

    if "://" in config or Path(config).is_dir():
        stream: dict[str, Any] = {"source": "parquet", "path": config}
        found = from_mapping({"stream": stream})
    else:
        found = load(config, overrides or [])
    rows = describe(open_stream(found.stream, found.seed))
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(pad_edge=False)
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*(escape("" if value is None else str(value)) for value in row.values()))
    _console().print(table)


@data_app.command("import")
def data_import(
    kind: Annotated[str, typer.Argument(help="trace, labels, or table.")],
    source: Annotated[Path, typer.Argument(help="The folder (table: the file of training rows).")],
    target: Annotated[Path, typer.Argument(help="The folder to write: task/train.parquet, task/test.parquet.")],
    test: Annotated[Path | None, typer.Option(help="table: the file of test rows.")] = None,
    task: Annotated[str, typer.Option(help="table: the name of the task.")] = "task",
    column: Annotated[list[str] | None, typer.Option(help="table: name=column, such as text=review.")] = None,
) -> None:
    """Turn TRACE folders, folders of sentences and labels, or any table into a stream of Parquet files."""
    from treelora_ray.data import importers

    if kind == "trace":
        importers.import_trace(str(source), str(target))
    elif kind == "labels":
        importers.import_labels(str(source), str(target))
    elif kind == "table":
        if test is None:
            raise typer.BadParameter("a table needs its test rows too", param_hint="--test")
        columns = dict(pair.partition("=")[::2] for pair in column or [])
        importers.import_table(str(source), str(test), str(target), task, columns)
    else:
        raise typer.BadParameter(f"{kind!r} is unknown; known: trace, labels, table")
    typer.echo(f"written to {target}; look at it: treelora data describe {target}")


@track_app.command("sync")
def track_sync(run: RunFolder) -> None:
    """Deliver what MLflow has not yet been told of a run."""
    from treelora_ray.api import Run
    from treelora_ray.store import open_folder
    from treelora_ray.tracking.sender import sync
    from treelora_ray.tracking.store import explained
    from treelora_ray.tracking.tracked import names_store

    if not names_store(Run(run).config.tracking) and "://" in run:
        raise typer.BadParameter("a run in an object store has no database beside it: set MLFLOW_TRACKING_URI")
    try:
        with open_folder(run) as folder:
            folder.pull()
            count = sync(folder.path)
    except ValueError:
        raise
    except Exception as error:  # of MLflow, of its database or of the network
        _fail(1, f"error: {explained(error)}")
    typer.echo(f"{count} entries delivered" if count else "nothing was left to deliver")


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(help="The folder of runs, or one run.")] = Path("runs"),
    port: Annotated[int | None, typer.Option(help="Left out: a free one.")] = None,
) -> None:
    """Look at runs in MLflow, on this machine alone. Ctrl-C ends it."""
    from treelora_ray.tracking.ui import serve

    with _stoppable("ending the server") as stop:
        serve(folder, port, lambda text: typer.echo(text), stop)


@tree_app.command("export")
def tree_export(
    run: RunFolder,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, FILE.safetensors.")],
    force: Annotated[bool, typer.Option(help="Replace the file where it is there already.")] = False,
) -> None:
    """Write a run's tree and adapters to one file, with which another run begins: method.prior=FILE."""
    from treelora_ray.api import Run

    if target.exists() and not force:
        raise typer.BadParameter(f"{target} is there already: give --force to replace it", param_hint="FILE")
    Run(run).export_tree(target)
    typer.echo(f"written to {target}; begin with it: treelora train CONFIG method.prior={target}")


def _routing(value: str | None) -> str | None:
    if value not in (None, "inferred", "oracle", "last"):
        raise typer.BadParameter(f"{value!r} is unknown; known: inferred, oracle, last", param_hint="--routing")
    return value


def _console() -> Any:
    from rich.console import Console

    return Console()


@contextlib.contextmanager
def _stoppable(words: str = "stopping at a checkpoint; once more to stop at once") -> Iterator[Callable[[], bool]]:
    """The first signal asks the run to stop at a checkpoint, the second stops it at once."""
    asked: list[int] = []

    def handle(number: int, _: object) -> None:
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        asked.append(number)
        print(words, file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command; says what went wrong in words, and exits with a code of EPILOG."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(given, standalone_mode=True)
    except KeyboardInterrupt:
        _fail(130, "interrupted")
    except ValueError as error:
        if not type(error).__module__.startswith("treelora_ray"):
            raise
        _fail(2, f"error: {error}")
    except OSError as error:
        _fail(1, f"error: {error}\nCheckpoints written before are intact: the same command goes on from the last one")
    except Exception as error:
        kind = type(error).__name__
        if not type(error).__module__.startswith("treelora_ray"):
            raise
        again = f"go on: treelora {' '.join(given)}"
        _fail(130 if kind == "Stopped" else 1, f"{error}\n{again}" if kind == "Stopped" else f"error: {error}\n{again}")
    raise AssertionError("typer exits by itself")
