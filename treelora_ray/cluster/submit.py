"""Sends a command to a Ray cluster as a job: checks it first, then follows it.

A job runs in a copy of the working folder, whose place changes with every change of the code. So what shall stay
must not lie in it, and what shall travel must.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from treelora_ray.cluster.errors import ClusterError, first_line
from treelora_ray.config import RunConfig, load, overridden, run_name
from treelora_ray.store import joined

# At the top of the working folder: packages of the same names lie further down.
STAY = ("data", "runs", "mlruns", "build", "dist", "benchmarks/out")
CACHES = (".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "*.egg-info")
EXCLUDES = [*(f"/{name}" for name in STAY), *CACHES, "/mlflow.db"]

SWEEP_VALUES = (
    "--space", "--trials", "--concurrency", "--scheduler", "--grace", "--search", "--seeds", "--top", "--metric",
    "--time-budget", "--name",
)  # fmt: skip

COMPARE_VALUES = ("--methods", "--seeds", "--reach", "--concurrency", "--name")

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # these two only fill the console
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports wait for it
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # time to write a checkpoint when the job is stopped
}


@dataclass(frozen=True)
class Job:
    """What is sent. Two jobs of the same `run` would write into one folder."""

    name: str
    run: str
    entrypoint: str
    notes: tuple[str, ...]


def submit(
    command: str,
    arguments: list[str],
    address: str,
    working_dir: Path,
    detach: bool,
    echo: Callable[[str], None],
) -> int:
    """Sends `treelora COMMAND ARGUMENTS` (train, evaluate, sweep or compare) and follows its log unless `detach`.

    `address` is the dashboard's, http://HEAD:8265, or auto for a cluster on this machine. Exit code: 0 if the job
    succeeded (detached: if it was sent), 1 if it did not, 130 if Ctrl-C ended the following.
    """
    address = _address(address)
    here = _is_loopback(address)
    if not arguments or arguments[0].startswith("-"):
        raise ClusterError(f"{command} needs its {'run' if command == 'evaluate' else 'config'} first, got {arguments}")
    prepare = {"train": _train, "evaluate": _evaluate, "sweep": _sweep, "compare": _compare}[command]
    job = prepare(arguments, here, working_dir.resolve())
    client = _connect(address)
    _require_alone(client, job)
    for note in job.notes:
        echo(note)
    sent = _send(client, job, working_dir.resolve())
    where = f"--address {client.get_address()} {sent}"
    follow, stop = f"follow it: ray job logs --follow {where}", f"stop it: ray job stop {where}"
    again = "stopped or failed, it goes on from its last checkpoint when the same command is submitted again"
    echo(f"job {sent} is sent to {client.get_address()}")
    if detach:
        echo("\n".join([follow, stop, again]))
        return 0
    try:
        status, message = _follow(client, sent, echo)
    except KeyboardInterrupt:
        echo("\n".join([f"job {sent} goes on", follow, stop]))
        return 130
    except Exception as error:  # of aiohttp, requests or Ray: whatever it is, the job is not touched by it
        raise ClusterError(
            f"the connection to job {sent} was lost ({first_line(error)}); the job may go on\n{follow}\n{stop}"
        ) from error
    if status == "SUCCEEDED":
        echo(f"job {sent} succeeded")
        return 0
    echo(f"job {sent} {status.lower()}: {message}\n{again}")
    return 1


def _train(arguments: Sequence[str], here: bool, working_dir: Path) -> Job:
    overrides, options = _split(arguments[1:], ["--allow-change"])
    config = load(arguments[0], overrides)
    added, notes = _places(config, here)
    start = _start("train", "train_stream.py", arguments[0], working_dir)
    words = [*overrides, *added, "cluster.address=auto", *options]
    return _job(config, run_name(config), [*start, *words], notes, here)


def _sweep(arguments: Sequence[str], here: bool, working_dir: Path) -> Job:
    """Its space is checked here, and travels where it is a file."""
    from treelora_ray.cluster.spaces import load_space
    from treelora_ray.cluster.sweep_plan import SweepOptions, sweep_name

    overrides, options = _split(arguments[1:], SWEEP_VALUES)
    config = load(arguments[0], overrides)
    given = dict(pairwise(options))
    wanted = given.get("--space", SweepOptions.space)
    space = load_space(wanted).under(overridden(overrides))
    space.require_fits(config)
    added, notes = _places(config, here)
    file, _, function = wanted.partition(":")
    if Path(file).is_file():
        place = "./" + _travelling(Path(file), working_dir) + (f":{function}" if function else "")
        options[options.index("--space") + 1] = place
    start = _start("sweep", "sweep.py", arguments[0], working_dir)
    words = [*overrides, *added, "cluster.address=auto", *options]
    return _job(config, sweep_name(config, space.name, given.get("--name")), [*start, *words], notes, here)


def _compare(arguments: Sequence[str], here: bool, working_dir: Path) -> Job:
    """Its rows are checked here, but for what only the data can tell, and travel where they are a file."""
    from treelora_ray.cluster.compare_plan import comparison_name
    from treelora_ray.cluster.compare_rows import read_rows
    from treelora_ray.config import with_values

    overrides, options = _split(arguments[1:], COMPARE_VALUES)
    config = load(arguments[0], overrides)
    given = dict(pairwise(options))
    wanted = given.get("--methods", "all")
    for row in read_rows(wanted, [config.method.name]):
        with_values(config, row.values(config), f"row {row.label!r}")
    added, notes = _places(config, here)
    if Path(wanted).is_file():
        options[options.index("--methods") + 1] = _travelling(Path(wanted), working_dir)
    start = _start("compare", "compare.py", arguments[0], working_dir)
    words = [*overrides, *added, "cluster.address=auto", *options]
    return _job(config, comparison_name(config, given.get("--name")), [*start, *words], notes, here)


def _places(config: RunConfig, here: bool) -> tuple[list[str], list[str]]:
    """Overrides that make paths mean the same in the job, and what is to be said of them."""
    added, notes = [], []
    places = {"folder": config.folder, "stream.path": config.stream.path, "model.backbone": config.model.backbone}
    places["method.prior"] = getattr(config.method, "prior", None)
    for key, value in places.items():
        local = key != "model.backbone" or Path(str(value)).is_dir()  # else it is a name on the hub
        if value and local and (absolute := _absolute(key, value, here)) != value:
            added.append(f"{key}={json.dumps(absolute, ensure_ascii=False)}")
            notes.append(f"{key} is {absolute} of the machine on which the cluster runs")
    return added, notes


def _start(command: str, pipeline: str, source: str, working_dir: Path) -> list[str]:
    """The first words of the job's command: the pipeline of a checkout, else the installed package."""
    if Path(source).is_file():
        source = _travelling(Path(source), working_dir)
    if (working_dir / "pipelines" / pipeline).is_file():
        return ["python", f"pipelines/{pipeline}", "--config", source]
    return ["python", "-m", "treelora_ray", command, source]


def of_pipeline(command: str, description: str | None, given: Sequence[str] | None) -> list[str]:
    """What a pipeline is given, as `treelora COMMAND` takes it: its config is an option, which may stand anywhere."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s --config X [key=value ...] [options of `treelora {command}`]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a preset")
    found, rest = parser.parse_known_args(given)
    return [command, found.config, *rest]


def _job(config: RunConfig, name: str, words: list[str], notes: list[str], here: bool) -> Job:
    return Job(name, joined(_absolute("folder", config.folder, here), name), shlex.join(words), tuple(notes))


def _evaluate(arguments: Sequence[str], here: bool, working_dir: Path) -> Job:
    run = _absolute("the run", arguments[0], here)
    if (working_dir / "pipelines" / "evaluate.py").is_file():
        start = ["python", "pipelines/evaluate.py", run]
    else:
        start = ["python", "-m", "treelora_ray", "evaluate", run]
    name = run.partition("?")[0].rstrip("/").split("/")[-1]
    return Job(f"evaluate-{name}", "", shlex.join([*start, *arguments[1:]]), ())


def _split(arguments: Sequence[str], with_values: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and options, of which these are followed by a value (`--name=x` becomes two words)."""
    overrides: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in with_values:
            options += [name, value if equals else next(rest, "")]
        else:
            (options if word.startswith("-") else overrides).append(word)
    return overrides, options


def _absolute(what: str, value: str, here: bool) -> str:
    """A path that means the same in the job as here."""
    if "://" in value or Path(value).is_absolute():
        return value
    if here:
        return str(Path(value).absolute())
    raise ClusterError(
        f"{what} is {value!r}, a relative path: a job runs in a temporary folder that changes with the code, and on "
        "another machine; give an absolute path on storage that all nodes share"
    )


def _travelling(config: Path, working_dir: Path) -> str:
    """Where a config file lies in the copy of the working folder."""
    path = config.resolve()
    if not path.is_relative_to(working_dir):
        raise ClusterError(
            f"{config} does not lie in {working_dir}, the folder that travels with the job: copy it there, or name "
            "a folder that holds it as the working folder"
        )
    inner = path.relative_to(working_dir).as_posix()
    if any(inner.startswith(f"{name}/") for name in STAY):
        raise ClusterError(f"{config} lies in {inner.split('/')[0]}/, which does not travel with the job: copy it out")
    return inner


def _address(given: str) -> str:
    """Ray lets its own variables win over what is given, so a contradiction is refused."""
    variable = next((name for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if os.environ.get(name)), None)
    if variable and given not in ("auto", os.environ[variable]):
        raise ClusterError(f"{variable} is {os.environ[variable]}, but the address given is {given}: unset one of them")
    address = os.environ[variable] if variable else given
    if address == "local":
        raise ClusterError("a local cluster ends with its process: use `treelora train` for it, or give an address")
    return address if address == "auto" or "://" in address else f"http://{address}"


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    if address == "auto" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _connect(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("job.sdk", "dashboard_sdk"):  # which tell of every package and socket
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise _denied(address) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if "token" in str(error).lower():
            raise _denied(address) from error
        where = "runs on this machine" if address == "auto" else f"answers at {address}"
        raise ClusterError(
            f"no Ray cluster {where} ({first_line(error)}): give the address of its dashboard, such as "
            "http://HEAD:8265, or start one with `ray start --head`"
        ) from error


def _denied(address: str) -> ClusterError:
    return ClusterError(
        f"the cluster at {address} refuses the token of this machine: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
        "to a file with the token that the cluster was started with"
    )


def _require_alone(client: Any, job: Job) -> None:
    for other in client.list_jobs() if job.run else ():
        if (other.metadata or {}).get("run") == job.run and not other.status.is_terminal():
            raise ClusterError(
                f"job {other.submission_id} is learning run {job.run} already: wait for it, stop it, or give `name` "
                "another value"
            )


def _send(client: Any, job: Job, working_dir: Path) -> str:
    environment = {"working_dir": str(working_dir), "excludes": EXCLUDES, "env_vars": ENVIRONMENT}
    try:
        sent: str = client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=f"{job.name}-{secrets.token_hex(3)}",
            runtime_env=environment,
            metadata={"run": job.run},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"the job could not be sent from {working_dir}: {first_line(error)}") from error
    return sent


def _follow(client: Any, job: str, echo: Callable[[str], None]) -> tuple[str, str]:
    """How the job ended, and the first line of why."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            echo(text.removesuffix("\n"))

    asyncio.run(tail())
    while not (found := client.get_job_info(job)).status.is_terminal():
        time.sleep(1)
    return str(found.status), first_line(found.message or "").partition(", last available logs")[0]
