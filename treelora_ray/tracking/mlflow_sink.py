"""Entries of a journal as an MLflow run. Everything here may be said twice and is stored once."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from treelora_ray.files import locked
from treelora_ray.tracking.journal import FILE, beginning
from treelora_ray.tracking.store import address, local_artifacts

KEY = "treelora.run"  # the tag by which a run is found again
GROUP = "treelora.group"
AT_ONCE = 1000  # metrics MLflow takes in one call
NAMES = re.compile(r"[^\w\-. /:]")


class Sink:
    """The MLflow run of one journal; made, or found again, when this is."""

    def __init__(self, folder: Path, begins: Mapping[str, Any], run_id: str | None) -> None:
        self.folder, self.about = folder, begins["about"]
        self.tracking = self.about["config"]["tracking"]
        self.uri = address(self.tracking, folder)
        # Processes that make tables or experiments at the same time stumble over each other.
        with locked(folder.parent / ".mlflow.lock"):
            self.client = MlflowClient(self.uri, registry_uri=self.uri)
            self.experiment_id = self._experiment()
            self.run_id = run_id or self._found(f"tags.`{KEY}` = '{begins['run']}'") or self._created(begins)
        self.monitor: SystemMetricsMonitor | None = None

    # -- the run

    def _experiment(self) -> str:
        name = self.about["benchmark"]
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(name, artifact_location=local_artifacts(self.uri)))
        except MlflowException:  # another process was faster
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def _found(self, filter_string: str) -> str | None:
        """The oldest of such runs: two processes may have made one each."""
        found = self.client.search_runs([self.experiment_id], filter_string, order_by=["start_time ASC"], max_results=1)
        return str(found[0].info.run_id) if found else None

    def _created(self, begins: Mapping[str, Any]) -> str:
        tags = {KEY: begins["run"], "mlflow.source.name": "treelora", "mlflow.user": self.about["user"]}
        if self.tracking["group"]:
            tags["mlflow.parentRunId"] = self._parent(self.tracking["group"], begins["at"])
        made = self.client.create_run(self.experiment_id, begins["at"], tags, self.about["name"])
        return str(made.info.run_id)

    def _parent(self, group: str, at: int) -> str:
        where = f"tags.`{GROUP}` = '{group}'"
        if (found := self._found(where)) is None:
            made = self.client.create_run(self.experiment_id, at, {GROUP: group}, group)
            self.client.set_terminated(made.info.run_id)  # it has no work of its own, and so cannot fail
        return found or self._found(where) or str(made.info.run_id)

    # -- entries

    def begin(self, entry: Mapping[str, Any], cursor: Mapping[str, Any]) -> None:
        about = entry["about"]
        if cursor["run_id"] is None:
            params = [Param(key, str(value)[:6000]) for key, value in about["params"].items()]
            for part in _parts(params, 100):
                self.client.log_batch(self.run_id, params=part)
            self._datasets(about["data"])
            self.client.log_text(self.run_id, about["yaml"], "config.yaml")
        tags = [RunTag(key, str(value)) for key, value in about["tags"].items()]
        self.client.log_batch(self.run_id, tags=tags)
        self.client.update_run(self.run_id, "RUNNING")
        self._watch()

    def _watch(self) -> None:
        if self.monitor is None:
            self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self.monitor.start()

    def _datasets(self, data: Sequence[Mapping[str, Any]]) -> None:
        inputs = [
            DatasetInput(
                Dataset(
                    name=each["name"], digest=each["digest"][:36], source_type=each["source_type"],
                    source=json.dumps(each["source"]), profile=json.dumps(each["profile"]),
                ),
                [],
            )
            for each in data
        ]  # fmt: skip
        self.client.log_inputs(self.run_id, inputs)

    def steps(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._metrics(
            Metric(f"train/{_name(key)}", value, entry["at"], entry["global"])
            for entry in entries
            for key, value in entry["metrics"].items()
        )

    def learnt(self, entry: Mapping[str, Any], last: bool) -> None:
        number, tasks = entry["number"] + 1, self.about["stream"]
        values: dict[str, float] = {k: v for k, v in entry["metrics"].items() if isinstance(v, int | float)}
        values |= {f"score/{task}": x for task, x in zip(tasks, entry["scores"], strict=False) if x is not None}
        seconds = entry["effort"]["seconds"]
        values |= {f"seconds/{phase}": value for phase, value in seconds.items()}
        values |= {"task/seconds": sum(seconds.values()), "task/steps": entry["effort"]["steps"]}
        values |= {"task/probe_rounds": entry["effort"]["probe_rounds"]}
        density = entry["report"].get("density")
        if density:
            values["task/sparsity"] = 1 - sum(density) / len(density)
        self._metrics(Metric(_name(key), value, entry["at"], number) for key, value in values.items())
        if last:
            self._files()
        for task in entry["tasks"]:
            name = tasks[task]
            if (path := self.folder / "adapters" / name).is_dir():
                self.client.log_artifacts(self.run_id, str(path), f"adapters/{task:02d}-{name}")

    def end(self, entry: Mapping[str, Any]) -> None:
        self._files()
        if entry["status"] == "FINISHED":
            self._finished()
        self._unwatch()
        self.client.set_terminated(self.run_id, entry["status"], entry["at"])

    def close(self, status: str) -> None:
        """The run's process has died."""
        self._unwatch()
        self.client.set_terminated(self.run_id, status)

    # -- artifacts

    def _files(self) -> None:
        """The matrix and the tree as they are now."""
        path = self.folder / "result.json"
        if not path.is_file():
            return
        result = json.loads(path.read_text())
        self.client.log_text(self.run_id, matrix_csv(result), "matrix.csv")
        if result.get("tree"):
            self.client.log_dict(self.run_id, result["tree"], "tree.json")

    def _finished(self) -> None:
        """Figures, report and model. One that cannot be made is named in a tag, and keeps back nothing else."""
        from treelora_ray.api import Run
        from treelora_ray.tracking.figures import write_figures
        from treelora_ray.tracking.model import log_model
        from treelora_ray.tracking.report import write_report

        run, wanted = Run(self.folder), self.tracking
        report = wanted.get("report", True)  # journals of older runs do not say
        with tempfile.TemporaryDirectory() as name:
            makers: dict[str, Callable[[], Any]] = {
                "figures": lambda: report and write_figures(run, Path(name) / "figures"),
                "report": lambda: report and write_report([run], Path(name) / "report.html"),
                "model": lambda: (
                    wanted["model"] and log_model(run, self.client, self.run_id, register=wanted["register"])
                ),
            }
            for what, make in makers.items():
                try:
                    make()
                except (MlflowException, OSError):  # of the store or the way to it: tried again
                    raise
                except Exception as error:
                    self.client.set_tag(self.run_id, f"missing.{what}", f"{type(error).__name__}: {error}"[:4000])
            self.client.log_artifacts(self.run_id, name)

    def _metrics(self, metrics: Iterable[Metric]) -> None:
        for part in _parts(list(metrics), AT_ONCE):
            self.client.log_batch(self.run_id, metrics=part)

    def _unwatch(self) -> None:
        if self.monitor is not None:
            self.monitor.finish()
            self.monitor = None


def close_parent(folder: Path, run_id: str, files: Sequence[Path], figures: Path, status: str) -> None:
    """What came of a group, for the run above that of a member in `folder`; files of the same name are replaced."""
    begins = beginning(folder / FILE)
    assert begins is not None, "a run that was delivered has told what it is"
    uri = address(begins["about"]["config"]["tracking"], folder)
    client = MlflowClient(uri, registry_uri=uri)
    parent = client.get_run(run_id).data.tags["mlflow.parentRunId"]
    for path in files:
        client.log_artifact(parent, str(path))
    if figures.is_dir():
        client.log_artifacts(parent, str(figures), "figures")
    client.set_terminated(parent, status)


def matrix_csv(result: Mapping[str, Any]) -> str:
    """A row for each unit learnt, a column for each task; empty where a task was not scored."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["learnt", *result["stream"]])
    for record, scores in zip(result["records"], result["matrix"], strict=True):
        rows.writerow([record["unit"], *("" if x is None else x for x in scores)])
    return out.getvalue()


def _name(text: str) -> str:
    return NAMES.sub("_", text)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]
