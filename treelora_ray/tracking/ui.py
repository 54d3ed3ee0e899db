"""MLflow's server for a store of ours, on this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from treelora_ray.tracking.sender import ENVIRONMENT
from treelora_ray.tracking.store import ARTIFACTS, DATABASE, local_address
from treelora_ray.training.errors import RunError

HOST = "127.0.0.1"
START = 90.0  # seconds the server may take
GRACE = 10.0  # seconds it may take to end
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # evaluations on the server, which take seven more processes


def serve(folder: Path, port: int | None, say: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Serves the store of a run, or of a folder of runs, until `stop` says so."""
    runs = next((place for place in (folder, folder.parent) if (place / DATABASE).is_file()), None)
    if runs is None:
        raise RunError(
            f"there is no {DATABASE} in {folder} or beside it: give the folder of your runs; runs that were told to a "
            "server of their own (tracking.uri) are seen there"
        )
    port = port or free_port()
    with (runs / ".mlflow-server.log").open("w") as log:
        process = start(runs, port, log)
    try:
        wait_until_up(process, port, Path(log.name))
        say(f"MLflow shows {runs} at http://{HOST}:{port}   (Ctrl-C ends it)")
        while not stop():
            if process.poll() is not None:
                raise RunError(f"the MLflow server has ended: look at {log.name}")
            time.sleep(0.2)
    finally:
        end(process)


def start(runs: Path, port: int, log: IO[str]) -> subprocess.Popen[bytes]:
    """In a group of its own: Ctrl-C is for the command, which then ends the server and its workers."""
    files = (runs / ARTIFACTS).absolute().as_uri()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", local_address(runs), "--artifacts-destination", files),
    ]
    variables = os.environ | ENVIRONMENT | LEAN
    return subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"the MLflow server did not start: look at {log}")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunError(f"the MLflow server did not answer within {START:g} s: look at {log}")


def end(process: subprocess.Popen[bytes]) -> None:
    """The server and its workers, which are a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return
