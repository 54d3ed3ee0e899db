"""A comparison: the driver.

compare ─► Comparison (comparison.json) ─► cells, one after the other here, or by a pool of processes on Ray
                                       └─► table, figures, report, whatever ended it
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

from treelora_ray.cluster.compare_cell import learn_cell, take
from treelora_ray.cluster.compare_plan import CompareOptions, Comparison, comparison_name, with_looks
from treelora_ray.cluster.inner_runs import LOOKS, conclude, deliver, kind_of_stream, opened, report
from treelora_ray.config import RunConfig, with_values
from treelora_ray.data.task import Kind
from treelora_ray.methods.shared import Shared
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.stream import Listener


def compare(
    base: RunConfig,
    options: CompareOptions,
    *,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
    local: bool = False,
) -> Comparison:
    """Learns a config's stream with several methods and seeds, from where the comparison of this name was left.

    `local`: in this process, one cell after the other, without Ray. Raises `Stopped` when asked to stop; a cell that
    fails is marked, and the others go on.
    """
    listener = listener or Listener()
    name = comparison_name(base, options.name)
    base = with_values(base, {"name": name, **with_looks(base, options)}, "the comparison")
    if local:
        base = with_values(base, {"cluster.workers": 0}, "the comparison")
    kind = kind_of_stream(base.stream, base.seed)
    with opened(base, name, "comparison") as folder:
        found = Comparison(base, "causal-lm" if kind == "prompt" else "classification", options, folder)
        found.save()
        try:
            _learn(found, kind, listener, stop, local)
        finally:
            report(folder, partial(_write, found), "table", listener.note)
            _tell(found, listener, stop())
        return found


def _learn(found: Comparison, kind: Kind, listener: Listener, stop: Callable[[], bool], local: bool) -> None:
    deliver(found.folder.path, found.base, found.cells, listener.note)
    if not found.left:
        return
    over = len(found.cells) - len(found.left)
    if found.resumed:
        listener.note(f"going on with {found.folder}: {over} of {len(found.cells)} cells have ended")
    if local:
        _here(found, listener, stop)
    else:
        from treelora_ray.cluster.compare_pool import on_ray  # the only way from here to ray

        on_ray(found, kind, listener, stop)
    if found.left:
        raise Stopped(found.folder.address)
    shutil.rmtree(found.folder.path / LOOKS, ignore_errors=True)
    if not any(cell.state == "finished" for cell in found.cells):
        errors = "\n  ".join(f"{cell.id}: {cell.error}" for cell in found.cells)
        raise RunError(f"no cell of comparison {found.folder} has learnt the stream:\n  {errors}")


def _here(found: Comparison, listener: Listener, stop: Callable[[], bool]) -> None:
    shared = Shared(note=listener.note)
    while not stop() and (cell := found.next()) is not None:
        found.begins(cell)
        listener.note(f"{cell.id} begins")
        known = found.data.get(str(cell.seed))
        take(found, cell, learn_cell(found.config(cell), known, listener, stop, shared), listener)


def _write(found: Comparison) -> None:
    from treelora_ray.tracking.comparison_report import write_comparison

    write_comparison(found.folder.address, found.folder.path)


def _tell(found: Comparison, listener: Listener, stopped: bool) -> None:
    """MLflow, of the whole."""
    failed = any(cell.state == "failed" for cell in found.cells)
    status = "KILLED" if stopped or found.left else "FAILED" if failed else "FINISHED"
    conclude(found.folder, found.base, found.cells, status, listener.note)
