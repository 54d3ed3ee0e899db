"""The MLflow run above the runs of a comparison or a sweep: what came of all of them together, told by a process of
its own.

    python -m treelora_ray.tracking.parent WHOLE STATUS RUN

It is made when the first of its runs is delivered, and found by any that has been.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from treelora_ray.tracking.sender import CURSOR, ENVIRONMENT

FILES = ("table.md", "table.csv", "table.tex", "report.html", "comparison.json", "sweep.json", "best.yaml")
FIGURES = "figures"


def tell_parent(whole: Path, status: str, runs: Sequence[Path], seconds: float, say: Callable[[str], None]) -> None:
    """Files and status of the whole, as long as MLflow may take; `runs`: their folders, delivered or not."""
    delivered = [str(run) for run in runs if (run / CURSOR).is_file()]
    if not delivered:
        return
    path = os.pathsep.join(dict.fromkeys(sys.path))
    command = [sys.executable, "-m", "treelora_ray.tracking.parent", str(whole), status, *delivered[:1]]
    environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            start_new_session=True,
        )
        trouble = done.stdout.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        trouble = f"it took more than {seconds:g} s (tracking.wait)"
    if trouble:
        say(f"MLflow does not hear of the whole ({trouble}): the same command again tells it")


def main(whole: Path, status: str, run: Path) -> int:
    from treelora_ray.tracking.mlflow_sink import close_parent
    from treelora_ray.tracking.store import explained

    run_id = json.loads((run / CURSOR).read_text())["run_id"]
    files = [path for name in FILES if (path := whole / name).is_file()]
    try:
        close_parent(run, run_id, files, whole / FIGURES, status)
    except Exception as error:  # of MLflow or of the network
        print(explained(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
