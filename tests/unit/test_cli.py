"""The command line itself: what it costs to start, what two signals do, what a terminal shows."""

from __future__ import annotations

import io
import resource
import signal
import subprocess
import sys
from typing import Any

from rich.console import Console

from treelora_ray.tracking.console import Bars, sweep_table

HEAVY = ("torch", "transformers", "peft", "pyarrow", "ray", "mlflow", "scipy", "sklearn", "pandas", "numpy")
HELP = f"""
import sys
from treelora_ray.cli import main
try:
    main(["--help"])
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
TWICE = """
import os, signal
from treelora_ray.cli import _stoppable
with _stoppable() as stop:
    print(stop(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print(stop(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still there", flush=True)
"""


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    took = []
    for _ in range(3):
        before = child_seconds()
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
        took.append(child_seconds() - before)
        assert "Continual learning with TreeLoRA" in done.stdout
        assert done.stderr.strip() == "[]"
    assert min(took) < 0.5


def test_the_first_signal_asks_and_the_second_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"]
    assert done.returncode == -signal.SIGINT
    assert done.stderr.count("once more to stop at once") == 1


def record(unit: str) -> dict[str, Any]:
    return {
        "unit": unit, "tasks": [0], "scores": [75.0], "effort": {"seconds": {"train": 1.5}, "steps": 4},
        "report": {"leans_on": ["a", None]},
    }  # fmt: skip


def test_a_terminal_sees_the_step_and_the_loss_and_keeps_a_line_for_each_task() -> None:
    out = io.StringIO()
    bars = Bars(Console(file=out, force_terminal=True, width=120, color_system=None))
    bars.begins(0, 2, "[odd] name")
    bars.phase("probe")
    bars.step(0, 4, 1.25)
    bars.progress.refresh()
    assert "task 1 of 2  [odd] name  probe" in out.getvalue()
    assert "1/4" in out.getvalue()
    assert "loss 1.250" in out.getvalue()
    bars.scored(record("[odd] name"))
    bars.note("a [note]")
    assert "[odd] name: 75.0, mean of 1 75.0, 4 steps, 1.5 s, leans on a (1) of 2 layers" in out.getvalue()
    assert "a [note]" in out.getvalue()
    assert not bars.progress.live.is_started
    bars.begins(1, 2, "next")
    bars.close()
    assert not bars.progress.tasks


def test_a_sweep_is_a_table_of_its_trials_the_best_first() -> None:
    def trial(name: str, state: str, score: float | None, rank: int) -> dict[str, Any]:
        values = {"val_op": score, "forgetting": score, "seconds": score, "percent": score}
        return {"id": name, "state": state, **values, "parameters": {"model.lora.rank": rank, "train.lr": 0.1}}

    made = [trial("0", "finished", 40.0, 4), trial("1", "stopped", 90.0, 8), trial("2", "finished", 60.0, 16)]
    winner = {"trial": "2", "val_op": {"mean": 60.0, "std": 1.5, "seeds": [0, 1]}, "test": {"op": 55.5}}
    found = {
        "metric": "val_op", "mode": "max", "parameters": {"model.lora.rank": {}, "train.lr": {}},
        "trials": [*made, trial("3", "failed", None, 2)], "winner": winner,
    }  # fmt: skip
    out = io.StringIO()
    sweep_table(found, Console(file=out, width=120, color_system=None))
    rows = [line.split() for line in out.getvalue().splitlines() if line.startswith("│")]
    assert [row[0].strip("│") for row in rows] == ["2", "0", "1", "3"]
    assert "rank" in out.getvalue()
    assert "winner 2: val_op 60.00 ± 1.50 over 2 seeds; on test rows 55.50" in out.getvalue()
