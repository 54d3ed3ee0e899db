"""What people see: a run in MLflow's pages, and its report, in a browser; and a server that dies and comes back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Page, browse
from tests.integration.test_tracking import complete, mlflow_run
from treelora_ray import run
from treelora_ray.config import load
from treelora_ray.tracking import tracked, ui
from treelora_ray.training.stream import Listener
from treelora_ray.training.tracker import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("told")]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TREELORA_TRACKING")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Server:
    """MLflow's server on a port that stays, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, ui.free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://{ui.HOST}:{self.port}"

    def start(self) -> None:
        with (self.folder / "server.log").open("a") as log:
            self.process = ui.start(self.folder, self.port, log)
        ui.wait_until_up(self.process, self.port, self.folder / "server.log")

    def kill(self) -> None:
        if self.process is not None:
            ui.end(self.process)
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.kill()


def test_a_run_of_two_workers_is_found_in_mlflows_pages_and_its_report_needs_no_network(
    tmp_path: Path, server: Server
) -> None:
    server.start()
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    changes = [f"folder={tmp_path}", "name=seen", "stream.tasks=4", "train.steps=30", "tracking.group=evening"]
    ray = ["cluster.workers=2", "cluster.address=local", f"tracking.uri={server.address}"]
    command = [sys.executable, "-m", "treelora_ray", "train", "quickstart", *changes, *ray]
    subprocess.run(command, check=True, timeout=600)
    _, found = mlflow_run(tmp_path / "seen", server.address)
    experiment, one = found.info.experiment_id, found.info.run_id

    async def look(page: Page) -> None:
        await page.go(f"{server.address}/#/experiments/{experiment}/runs?viewStateShareKey=&compareRunsMode=TABLE")
        await page.shows("evening")
        await page.picture(pictures / "experiment.png")
        await page.go(f"{server.address}/#/experiments/{experiment}/runs/{one}")
        await page.shows("seen", "Finished", "method.probe_rounds", "backbone", "op", "Parent")
        await page.picture(pictures / "run.png")
        await page.go(f"{server.address}/#/experiments/{experiment}/runs/{one}/model-metrics")
        await page.shows("seen (score/striped-0)", "seconds", "train")  # a chart, and headings of charts further down
        await page.picture(pictures / "metrics.png")
        await page.go(f"{server.address}/#/experiments/{experiment}/runs/{one}/artifacts")
        await page.shows("adapters", "config.yaml", "figures", "matrix.csv", "report.html", "tree.json")
        await page.picture(pictures / "artifacts.png")

    browse(look, tmp_path / "browser")
    assert all(path.stat().st_size > 20_000 for path in pictures.iterdir())

    report = tmp_path / "report.html"
    client, _ = mlflow_run(tmp_path / "seen", server.address)
    Path(client.download_artifacts(one, "report.html", str(tmp_path)))

    async def read(page: Page) -> None:
        await page.go(report.as_uri())
        await page.shows("seen", "striped-0")
        assert page.errors == []
        assert [address for address in page.requests if not address.startswith(("file:", "data:"))] == []

    browse(read, tmp_path / "reader")


class Timed(Tracker):
    """The seconds that calls to a tracker take."""

    spent = 0.0

    def __init__(self, inner: Tracker) -> None:
        self.inner = inner

    def begins(self, *given: Any, **named: Any) -> None:
        self.inner.begins(*given, **named)

    def ends(self, status: str) -> None:
        self.inner.ends(status)

    def step(self, *given: Any) -> None:
        start = time.perf_counter()
        self.inner.step(*given)
        Timed.spent += time.perf_counter() - start

    def learnt(self, *given: Any) -> None:
        start = time.perf_counter()
        self.inner.learnt(*given)
        Timed.spent += time.perf_counter() - start


def test_a_server_killed_in_mid_run_and_started_again_costs_nothing_and_loses_nothing(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.start()
    made = tracked.tracker
    monkeypatch.setattr("treelora_ray.api.tracker", lambda *given: Timed(made(*given)))
    notes: list[str] = []

    class Weather(Listener):
        def begins(self, number: int, of: int, name: str) -> None:  # noqa: ARG002
            if number == 1:
                server.kill()
            if number == 3:
                server.start()

        def note(self, text: str) -> None:
            notes.append(text)

    changes = [f"folder={tmp_path}", "name=weather", "stream.tasks=5", "train.steps=100", "tracking.model=false"]
    config = load("quickstart", [*changes, f"tracking.uri={server.address}"])
    start = time.perf_counter()
    done = run(config, listener=Weather())
    trained = sum(record["effort"]["seconds"]["train"] for record in done.result["records"])
    assert Timed.spent < 0.01 * trained, f"{Timed.spent:.3f} s of {trained:.1f} s"
    assert len([note for note in notes if "does not answer" in note]) == 1
    assert time.perf_counter() - start < 600
    complete(done.folder, server.address)
    assert mlflow_run(done.folder, server.address)[1].info.status == "FINISHED"
