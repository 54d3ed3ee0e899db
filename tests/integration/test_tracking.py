"""Runs as MLflow holds them: each entry of the journal once, whatever dies, starts late or is asked twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from tests.rays import Notes, config, data
from treelora_ray import run
from treelora_ray.cli import main
from treelora_ray.config import from_mapping
from treelora_ray.tracking import sender, ui
from treelora_ray.tracking.journal import FILE, read
from treelora_ray.tracking.store import explained, local_address, shown
from treelora_ray.training.errors import RunError, Stopped
from treelora_ray.training.stream import Listener


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, and so one database, for all: to make its tables takes longer than any run."""
    return tmp_path_factory.mktemp("runs")


pytestmark = pytest.mark.usefixtures("tracked")


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TREELORA_TRACKING")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def made(stream: Path, runs: Path, name: str, **tracking: Any) -> dict[str, Any]:
    found = config(stream, runs, "treelora", tracking={"every": 2, "model": False, "report": False, **tracking})
    return {**found, "name": name}


def mlflow_run(folder: Path, uri: str | None = None) -> tuple[MlflowClient, MlflowRun]:
    client = MlflowClient(uri or local_address(folder.parent))
    cursor = json.loads((folder / sender.CURSOR).read_text())
    return client, client.get_run(cursor["run_id"])


def delivered(folder: Path, uri: str | None = None) -> Counter[tuple[str, int, float]]:
    """Every point that MLflow holds of what the journal tells, with how often it does."""
    client, found = mlflow_run(folder, uri)
    points: Counter[tuple[str, int, float]] = Counter()
    for key in found.data.metrics:
        if not key.startswith("system/"):
            points.update((key, point.step, point.value) for point in client.get_metric_history(found.info.run_id, key))
    return points


def told(folder: Path) -> Counter[tuple[str, int, float]]:
    points: Counter[tuple[str, int, float]] = Counter()
    for entry in read(folder / FILE):
        if entry["kind"] == "step":
            points.update((f"train/{key}", entry["global"], value) for key, value in entry["metrics"].items())
        elif entry["kind"] == "learnt":
            points.update(
                (k, entry["number"] + 1, v) for k, v in entry["metrics"].items() if isinstance(v, int | float)
            )
    return points


def complete(folder: Path, uri: str | None = None) -> None:
    expected, found = told(folder), delivered(folder, uri)
    assert expected
    assert set(expected.values()) == {1}
    assert set(found.values()) == {1}
    assert expected.keys() <= found.keys()
    extra = {key.split("/")[0] for key, _, _ in found.keys() - expected.keys()}
    assert extra <= {"score", "seconds", "task"}


def test_a_run_is_in_mlflow_with_its_params_tags_data_metrics_and_files(stream: Path, runs: Path) -> None:
    done = run(made(stream, runs, "whole", group="night", report=True))
    complete(done.folder)
    client, found = mlflow_run(done.folder)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "whole"
    assert not [key for key in found.data.tags if key.startswith("missing.")]
    assert found.data.params["method.probe_rounds"] == "2"
    assert found.data.params["train.lr"] == "0.01"
    assert not any(key.startswith(("tracking.", "cluster.")) for key in found.data.params)
    tags = found.data.tags
    assert tags["method"] == "treelora"
    assert tags["rank"] == "2"
    assert tags["routing"] == "inferred"
    assert tags["stream_order"] == "t0, t1, t2"
    assert tags["config_digest"] == done.config.digest
    parent = client.get_run(tags["mlflow.parentRunId"])
    assert parent.info.run_name == "night"
    assert found.inputs is not None
    assert [each.dataset.name for each in found.inputs.dataset_inputs] == ["t0", "t1", "t2"]
    assert found.data.metrics["op"] == pytest.approx(done.metrics["op"])
    assert found.data.metrics["score/t2"] == pytest.approx(done.matrix[-1][2])
    files = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert files >= {"config.yaml", "matrix.csv", "tree.json", "report.html", "figures", "adapters"}
    adapters = {item.path for item in client.list_artifacts(found.info.run_id, "adapters")}
    assert adapters == {"adapters/00-t0", "adapters/01-t1", "adapters/02-t2"}
    matrix = Path(client.download_artifacts(found.info.run_id, "matrix.csv")).read_text().splitlines()
    assert matrix[0] == "learnt,t0,t1,t2"
    assert [float(x) for x in matrix[3].split(",")[1:]] == pytest.approx(done.matrix[-1].tolist())
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.name == "images"


def test_runs_of_one_group_have_one_parent(stream: Path, runs: Path) -> None:
    folders = [run(made(stream, runs, name, group="pair")).folder for name in ("one", "other")]
    parents = {mlflow_run(folder)[1].data.tags["mlflow.parentRunId"] for folder in folders}
    assert len(parents) == 1


def test_without_a_server_a_run_ends_as_ever_and_sync_delivers_later(
    stream: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Notes()
    begun = time.monotonic()
    port = ui.free_port()
    done = run(made(stream, runs, "late", uri=f"http://127.0.0.1:{port}"), listener=said)
    assert time.monotonic() - begun < 120
    assert done.finished
    trouble = [note for note in said.notes if "does not answer" in note]
    assert len(trouble) == 1
    assert any("treelora track sync" in note for note in said.notes)
    with served(runs, port):
        for words in ("entries delivered", "nothing was left"):
            with pytest.raises(SystemExit) as ended:
                main(["track", "sync", str(done.folder)])
            assert ended.value.code == 0
            assert words in capsys.readouterr().out
        complete(done.folder, done.config.tracking.uri)
        assert mlflow_run(done.folder, done.config.tracking.uri)[1].info.status == "FINISHED"


def test_a_finished_run_whose_messenger_died_is_delivered_when_it_is_trained_again(
    stream: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as alone:
        alone.setenv("TREELORA_TRACKING", "journal")
        done = run(made(stream, runs, "unheard"))
    assert not (done.folder / sender.CURSOR).exists()
    run(made(stream, runs, "unheard"))
    complete(done.folder)
    assert mlflow_run(done.folder)[1].info.status == "FINISHED"


def test_what_is_delivered_twice_is_stored_once(stream: Path, runs: Path) -> None:
    done = run(made(stream, runs, "twice"))
    client, before = mlflow_run(done.folder)
    (done.folder / sender.CURSOR).unlink()  # as if the sender had died before it noted anything
    assert sender.sync(done.folder) == len(read(done.folder / FILE))
    _, again = mlflow_run(done.folder)
    assert again.info.run_id == before.info.run_id
    complete(done.folder)
    assert again.inputs is not None
    assert len(again.inputs.dataset_inputs) == 3
    assert len(client.search_runs([before.info.experiment_id], "tags.mlflow.runName = 'twice'")) == 1


@pytest.mark.parametrize("when", ["steps", "learnt", "ends"])
def test_an_error_in_the_middle_leaves_the_rest_for_the_next_time(
    stream: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from treelora_ray.tracking import mlflow_sink

    monkeypatch.setenv("TREELORA_TRACKING", "journal")
    done = run(made(stream, runs, f"cut-{when}"))
    assert not (done.folder / sender.CURSOR).exists()
    method = {"steps": "steps", "learnt": "learnt", "ends": "end"}[when]
    good, calls = getattr(mlflow_sink.Sink, method), []

    def once(self: Any, *arguments: Any) -> None:
        good(self, *arguments)
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(mlflow_sink.Sink, method, once)
    with pytest.raises(ConnectionError):
        sender.sync(done.folder)
    sender.sync(done.folder)
    complete(done.folder)
    assert mlflow_run(done.folder)[1].info.status == "FINISHED"


def test_a_stopped_run_is_killed_in_mlflow_and_goes_on_as_the_same_run(stream: Path, runs: Path) -> None:
    asked = iter([False] * 7 + [True] * 1000)
    with pytest.raises(Stopped):
        run(made(stream, runs, "stopped"), stop=lambda: next(asked))
    folder = runs / "stopped"
    assert mlflow_run(folder)[1].info.status == "KILLED"
    first = mlflow_run(folder)[1].info.run_id
    run(made(stream, runs, "stopped"))
    found = mlflow_run(folder)[1]
    assert found.info.run_id == first
    assert found.info.status == "FINISHED"
    complete(folder)


def test_a_run_that_fails_is_failed_in_mlflow(stream: Path, runs: Path) -> None:
    class Breaks(Listener):
        def step(self, *_: Any) -> None:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        run(made(stream, runs, "failed"), listener=Breaks())
    assert mlflow_run(runs / "failed")[1].info.status == "FAILED"


def test_a_run_killed_without_a_word_is_killed_in_mlflow_and_finished_when_resumed(
    stream: Path, runs: Path, tmp_path: Path
) -> None:
    wanted = made(stream, runs, "sigkill")
    wanted["train"]["epochs"] = 60
    path, folder = tmp_path / "run.yaml", runs / "sigkill"
    path.write_text(from_mapping(wanted).to_yaml())
    command = [sys.executable, "-m", "treelora_ray", "train", str(path), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    assert any('"t1"' in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    wait_for(lambda: (folder / sender.CURSOR).is_file() and mlflow_run(folder)[1].info.status == "KILLED")
    with sender.only(folder, wait=True):  # its sender has gone
        pass
    run(wanted)
    assert mlflow_run(folder)[1].info.status == "FINISHED"
    complete(folder)


def test_a_required_store_that_does_not_answer_ends_the_run_before_it_learns(stream: Path, runs: Path) -> None:
    uri = f"http://127.0.0.1:{ui.free_port()}"
    with pytest.raises(RunError, match=r"tracking\.required"):
        run(made(stream, runs, "required", uri=uri, required=True))
    assert not list((runs / "required" / "checkpoints").glob("state-*"))


def test_an_address_with_a_password_is_refused_and_never_shown(stream: Path, runs: Path) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        from_mapping(made(stream, runs, "secret", uri="http://me:secret@host"))
    assert shown("postgresql://me:secret@host/db") == "postgresql://…@host/db"
    assert "secret" not in explained(RuntimeError("no route to http://me:secret@host: refused"))


def test_the_store_of_another_version_says_what_to_do() -> None:
    error = RuntimeError("Detected out-of-date database schema (found version a, but expected b)")
    assert "mlflow db upgrade" in explained(error)


def test_an_experiment_made_through_a_server_is_not_written_past_it(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are the server's: what MLflow then fails on is said, and delivered through the server."""
    said, port = Notes(), ui.free_port()
    uri = f"http://127.0.0.1:{port}"
    with served(tmp_path, port):
        MlflowClient(uri).create_experiment("images")
        done = run(made(stream, tmp_path, "past"), listener=said)
        assert done.finished
        assert any("made through an MLflow server" in note for note in said.notes)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        sender.sync(done.folder)
        complete(done.folder, uri)
        assert mlflow_run(done.folder, uri)[1].info.status == "FINISHED"


@contextlib.contextmanager
def served(runs: Path, port: int) -> Iterator[None]:
    with (runs / "server.log").open("w") as log:
        process = ui.start(runs, port, log)
    try:
        ui.wait_until_up(process, port, runs / "server.log")
        yield
    finally:
        ui.end(process)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
