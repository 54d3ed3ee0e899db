"""Comparisons of small runs: here and on Ray, with rows that fail, killed and given again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_runs import call, config_file, settings, write
from tests.rays import Notes, state
from treelora_ray import Run, run
from treelora_ray.cluster.compare import compare
from treelora_ray.cluster.compare_plan import CompareOptions, Comparison
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.inner_runs import LOOKS
from treelora_ray.config import RunConfig, from_mapping, load
from treelora_ray.tracking.journal import read
from treelora_ray.training.errors import RunError, Stopped

ROWS = "seqlora,independent,hot=seqlora:train.lr=1e30:train.clip=null,ncm"


def base(backbone: Path, data: Path, folder: Path, **changes: Any) -> RunConfig:
    return from_mapping({**settings(backbone, data, folder, **{"train": {"threads": 1}, **changes}), "name": "base"})


def options(methods: str = ROWS, **changes: Any) -> CompareOptions:
    return CompareOptions(methods=methods, **{"seeds": (0, 1), "name": "c", **changes})


def stamps(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "c" / "cells").glob("*/result.json")}


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "c" / "table.csv").open() as file:
        return {line["row"]: line for line in csv.DictReader(file)}


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {cell["id"]: cell for cell in json.loads((folder / "c" / "comparison.json").read_text())["cells"]}


def test_one_row_fails_and_the_others_are_compared(backbone: Path, data: Path, tmp_path: Path) -> None:
    runs, notes = tmp_path / "runs", Notes()
    config = base(backbone, data, runs, stream={"watch": 6}, evaluate={"every": 2})
    done = compare(config, options(reach=0.9), listener=notes, local=True)
    assert not any("going on" in note for note in notes.notes)
    assert [cell.id for cell in done.cells][:4] == ["seqlora-s0", "independent-s0", "hot-s0", "ncm-s0"]
    assert {cell.id for cell in done.cells if cell.state == "failed"} == {"hot-s0", "hot-s1"}
    lines = table(runs)
    assert list(lines) == ["seqlora", "independent", "hot", "ncm"]
    assert (lines["hot"]["seeds"], lines["hot"]["failed"], lines["hot"]["op_mean"]) == ("0", "2", "")
    assert lines["hot"]["errors"].startswith("hot-s0: NonFiniteError: task 't0', step")
    for label in ("seqlora", "independent", "ncm"):
        scores = [Run(runs / "c" / "cells" / f"{label}-s{seed}").metrics["op"] for seed in (0, 1)]
        assert float(lines[label]["op_mean"]) == pytest.approx(sum(scores) / 2)
        assert float(lines[label]["op_std"]) == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
        assert float(lines[label]["memory_mean"]) < float(lines[label]["stored_mean"])
    assert float(lines["seqlora"]["step_cost_mean"]) == 1
    assert lines["ncm"]["step_cost_mean"] == ""  # it takes no steps
    assert 0 <= float(lines["independent"]["reach_mean"]) <= 4
    # It keeps an adapter of each task: more than the one that goes on.
    assert float(lines["independent"]["memory_mean"]) > float(lines["seqlora"]["memory_mean"])
    page = (runs / "c" / "report.html").read_text()
    assert "hot-s0 has failed: NonFiniteError" in page
    assert {path.name for path in (runs / "c" / "figures").glob("*.png")} == {
        "compare.png", "comparison_speed.png", "comparison_reach.png",
    }  # fmt: skip
    # Cells look at a task once, and a cell is the run of its config, to the bit.
    effort = Run(runs / "c" / "cells" / "independent-s0").result["records"][0]["effort"]
    assert effort["reused"]["pass_rows"] == effort["pass_rows"] > 0
    own = load(runs / "c" / "cells" / "independent-s1" / "config.yaml", [f"folder={tmp_path / 'alone'}"])
    run(own)
    (tensors, decided), (expected, expected_decided) = (
        state(runs / "c" / "cells" / "independent-s1"),
        state(tmp_path / "alone" / "independent-s1"),
    )
    assert decided == expected_decided
    assert all(value.equal(tensors[key]) for key, value in expected.items())
    assert own.tracking.group == "c"
    # Given again, with a further row and a further seed: what is finished is not learnt again, what failed is tried.
    before = stamps(runs)
    again = compare(config, options(ROWS + ",joint", seeds=(0, 1, 2), reach=0.9), listener=notes, local=True)
    assert len(again.cells) == 15
    after = stamps(runs)
    assert {name: after[name] for name in before if "hot" not in name} == {
        name: time for name, time in before.items() if "hot" not in name
    }
    assert "going on with" in "".join(notes.notes)
    assert table(runs)["joint"]["bwt_mean"] == ""
    assert table(runs)["seqlora"]["seeds"] == "3"


def test_what_was_begun_with_something_else_is_refused_in_words(backbone: Path, data: Path, tmp_path: Path) -> None:
    config = base(backbone, data, tmp_path / "runs", stream={"tasks": ["t0"]})
    wanted = options("seqlora,ncm", seeds=(0, 1))
    compare(config, options("seqlora,ncm", seeds=(0,)), local=True)

    def said(changed: RunConfig, asked: CompareOptions) -> str:
        with pytest.raises(ClusterError) as error:
            compare(changed, asked, local=True)
        return str(error.value)

    other = base(backbone, data, tmp_path / "runs", stream={"tasks": ["t0"]}, train={"lr": 0.5, "threads": 1})
    assert "row 'seqlora', train.lr: 0.01 then, 0.5 now" in said(other, wanted)
    assert "row 'ncm' is of the comparison, but is not asked for" in said(config, options("seqlora"))
    assert "seeds 0 are of the comparison" in said(config, options("seqlora,ncm", seeds=(1,)))
    path = tmp_path / "runs" / "c" / "comparison.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "code": {**found["code"], "sources": "0" * 16, "torch": "0.1"}}))
    text = said(config, wanted)
    assert "the code that cells are learnt by: 0000000000000000 then" in text
    assert "the version of torch: 0.1 then" in text
    path.write_text(json.dumps(found))
    # Rows that have changed are seen by the first cell that opens them.
    shutil.rmtree(data)
    write(data, 1, 0)
    found["data"]["1"] = dict.fromkeys(found["data"]["0"], "another digest")
    path.write_text(json.dumps(found))
    text = said(config, wanted)
    assert "the stream is not the one that earlier cells of comparison" in text
    assert "the rows of t0 have changed" in text


def test_a_comparison_that_is_stopped_goes_on_where_it_was(backbone: Path, data: Path, tmp_path: Path) -> None:
    config, wanted = base(backbone, data, tmp_path / "runs"), options("seqlora,independent", seeds=(0,))
    asked: list[bool] = []

    class Watch(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith("independent-s0 begins"):
                asked.append(True)

    with pytest.raises(Stopped):
        compare(config, wanted, listener=Watch(), stop=lambda: len(asked) > 0, local=True)
    found = cells(tmp_path / "runs")
    assert {name: cell["state"] for name, cell in found.items()} == {
        "seqlora-s0": "finished",
        "independent-s0": "waiting",
    }
    assert table(tmp_path / "runs")["independent"]["seeds"] == "0"
    assert "1 of 2 cells have not ended yet: independent-s0." in (tmp_path / "runs" / "c" / "table.md").read_text()
    before = stamps(tmp_path / "runs")
    notes = Notes()
    compare(config, wanted, listener=notes, local=True)
    assert stamps(tmp_path / "runs")["seqlora-s0"] == before["seqlora-s0"]
    assert notes.notes[0] == f"going on with {tmp_path / 'runs' / 'c'}: 1 of 2 cells have ended"
    assert {cell["state"] for cell in cells(tmp_path / "runs").values()} == {"finished"}


def test_where_all_cells_fail_the_command_says_why(
    backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = base(backbone, data, tmp_path / "runs", stream={"tasks": ["t0"]})
    with pytest.raises(RunError, match=r"no cell of comparison .*\n  hot-s0: NonFiniteError: task 't0'"):
        compare(config, options("hot=seqlora:train.lr=1e30:train.clip=null", seeds=(0,)), local=True)
    file = config_file(tmp_path / "base.yaml", {**config.model_dump(mode="json", by_alias=True)})
    given = ["--local", "--name", "d", "--methods", "ncm,hot=seqlora:train.lr=1e30:train.clip=null"]
    assert call("compare", file, *given) == 1
    said = capsys.readouterr()
    assert "1 of 2 cells have failed; the same command tries these again" in said.err
    assert "hot-s0 has failed: NonFiniteError" in said.out.replace("\n", " ")
    assert call("compare", file, "--local", "--name", "e", "--methods", "ncm", "--quiet") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "runs" / "e")
    assert call("report", str(tmp_path / "runs" / "e")) == 0
    assert call("figures", str(tmp_path / "runs" / "e")) == 2  # one row with one task has none


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--methods", "seqlor"], "method 'seqlor' is unknown; did you mean 'seqlora'?"),
        (["--methods", "seqlora,seqlora"], "two rows are named 'seqlora': give one a label"),
        (["--methods", "seqlora:stream.tasks=2"], "sets stream.tasks, which all rows have in common"),
        (["--methods", "ewc:method.lamda=2"], "method.lamda is unknown; did you mean method.lambda"),
        (["--seeds", "0,0"], "seeds are 0, 0: give each once"),
        (["--seeds", "x"], "write them like 0,1,2"),
        (["--reach", "95"], "reach is 95; it is a share"),
        (["--methods", "nowhere.yaml"], "cannot be read from nowhere.yaml"),
    ],
)
def test_a_mistake_is_said_before_anything_begins(
    given: list[str], says: str, backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(backbone, data, tmp_path / "runs")
    assert call("compare", config_file(tmp_path / "base.yaml", config), "--local", *given) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.rglob("comparison.json"))


def test_a_table_that_cannot_be_written_does_not_hide_what_was_learnt(
    backbone: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("treelora_ray.tracking.comparison_report.write_comparison", broken)
    notes, config = Notes(), base(backbone, data, tmp_path / "runs", stream={"tasks": ["t0"]})
    done = compare(config, options("ncm", seeds=(0,)), listener=notes, local=True)
    assert isinstance(done, Comparison)
    assert LOOKS not in {path.name for path in (tmp_path / "runs" / "c").iterdir()}
    assert any("the table could not be written (the disk is full): treelora report" in note for note in notes.notes)


def test_mlflow_shows_the_table_above_the_cells(
    backbone: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELORA_TRACKING", "mlflow")
    config = base(backbone, data, tmp_path / "runs", stream={"tasks": ["t0"]})
    compare(config, options("ncm,hot=seqlora:train.lr=1e30:train.clip=null", seeds=(0,)), local=True)
    parent, children = _parent_and_children(tmp_path / "runs", "FAILED")
    assert {each.data.tags["mlflow.parentRunId"] for each in children} == {parent.info.run_id}
    assert {each.info.run_name: each.info.status for each in children} == {"ncm-s0": "FINISHED", "hot-s0": "FAILED"}


@pytest.mark.usefixtures("cluster")
def test_on_ray_processes_take_one_cell_after_the_other_and_learn_the_same(ray_data: Path, tmp_path: Path) -> None:
    notes, rows = Notes(), "seqlora,hot=seqlora:train.lr=1e30:train.clip=null,independent"
    config = base(ray_data / "vit", ray_data / "images", tmp_path / "runs", stream={"tasks": ["t0", "t1"]})
    done = compare(config, options(rows, seeds=(0,), concurrency=1), listener=notes)
    assert [cell.state for cell in done.cells] == ["finished", "failed", "finished"]
    assert table(tmp_path / "runs")["hot"]["errors"].startswith("hot-s0: NonFiniteError: task 't0'")
    effort = Run(tmp_path / "runs" / "c" / "cells" / "independent-s0").result["records"][0]["effort"]
    assert effort["reused"]["pass_rows"] == effort["pass_rows"] > 0  # seqlora's process had passed over them
    own = load(tmp_path / "runs" / "c" / "cells" / "independent-s0" / "config.yaml", [f"folder={tmp_path / 'alone'}"])
    run(own)
    tensors, decided = state(tmp_path / "runs" / "c" / "cells" / "independent-s0")
    expected, expected_decided = state(tmp_path / "alone" / "independent-s0")
    assert decided == expected_decided
    assert all(value.equal(tensors[key]) for key, value in expected.items())
    # Given again, what has failed is tried and nothing else; asked to stop, nothing begins.
    before = stamps(tmp_path / "runs")
    with pytest.raises(Stopped):
        compare(config, options(rows, seeds=(0,)), listener=notes, stop=lambda: True)
    assert cells(tmp_path / "runs")["hot-s0"]["state"] == "waiting"
    compare(config, options(rows, seeds=(0,)), listener=notes)
    assert cells(tmp_path / "runs")["hot-s0"]["state"] == "failed"
    assert stamps(tmp_path / "runs") == before


@pytest.mark.usefixtures("cluster")
def test_a_cell_whose_process_dies_is_tried_again(ray_data: Path, tmp_path: Path) -> None:
    import psutil

    class Murder(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            if text == "seqlora-s0 begins" and not any("failed" in note for note in self.notes):
                threading.Thread(target=self._kill, daemon=True).start()

        def _kill(self) -> None:
            deadline, path = time.monotonic() + 60, tmp_path / "runs" / "c" / "cells" / "seqlora-s0" / "config.yaml"
            while not path.is_file() and time.monotonic() < deadline:
                time.sleep(0.02)
            own = psutil.Process().children(recursive=True)
            for process in own:
                if "Learner" in " ".join(process.cmdline()):
                    process.kill()

    config = base(ray_data / "vit", ray_data / "images", tmp_path / "runs", train={"steps": 60, "threads": 1})
    notes = Murder()
    done = compare(config, options("seqlora", seeds=(0,)), listener=notes)
    assert [cell.state for cell in done.cells] == ["finished"]
    assert any(note.startswith("seqlora-s0 failed, and is tried again: its process has died") for note in notes.notes)


def command(data: Path, folder: Path, *more: str) -> list[str]:
    changes: dict[str, Any] = {"cluster": {"address": "local"}, "train": {"threads": 1, "steps": 60}}
    config = base(data / "vit", data / "images", folder / "runs", **changes)
    file = config_file(folder / "base.yaml", config.model_dump(mode="json", by_alias=True))
    given = ["--methods", "seqlora,ewc,treelora", "--seeds", "0,1", "--concurrency", "2", "--name", "c"]
    return [sys.executable, "-m", "treelora_ray", "compare", file, *given, *more]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_goes_on_and_mlflow_shows_all_cells_below_one_parent(
    how: signal.Signals, ray_data: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "TREELORA_TRACKING": "mlflow", "TREELORA_CACHE": str(tmp_path / "cache")}
    given, path = command(ray_data, tmp_path), tmp_path / "runs" / "c" / "comparison.json"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(given, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 400
        while not path.exists() or all(cell["state"] != "finished" for cell in cells(tmp_path / "runs").values()):
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        os.kill(driver.pid, how)
        code = driver.wait(120)
    assert code == (130 if how == signal.SIGINT else -how), (tmp_path / "log").read_text()
    before = cells(tmp_path / "runs")
    finished = [name for name, cell in before.items() if cell["state"] == "finished"]
    assert 1 <= len(finished) < 6
    if how == signal.SIGINT:
        assert "waiting" in {cell["state"] for cell in before.values()}
        ends = [read(path)[-1] for path in (tmp_path / "runs" / "c" / "cells").glob("*/journal.jsonl")]
        assert {entry["status"] for entry in ends} <= {"FINISHED", "KILLED"}
        _, children = _parent_and_children(tmp_path / "runs", "KILLED")
        assert {each.info.status for each in children} == {entry["status"] for entry in ends}
    times = {name: time for name, time in stamps(tmp_path / "runs").items() if name in finished}
    done = subprocess.run(given, capture_output=True, text=True, check=False, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on with {tmp_path / 'runs' / 'c'}: {len(finished)} of 6 cells have ended" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    after = stamps(tmp_path / "runs")
    assert {name: after[name] for name in times} == times
    assert {cell["state"] for cell in cells(tmp_path / "runs").values()} == {"finished"}
    _require_one_parent(tmp_path / "runs")


def _parent_and_children(runs: Path, status: str) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [each for each in found if "treelora.group" in each.data.tags]
    assert parent.info.status == status
    files = {each.path for each in client.list_artifacts(parent.info.run_id)}
    assert {"table.md", "table.csv", "table.tex", "report.html", "figures"} <= files
    return parent, [each for each in found if each.info.run_id != parent.info.run_id]


def _require_one_parent(runs: Path) -> None:
    parent, children = _parent_and_children(runs, "FINISHED")
    assert {each.data.tags["mlflow.parentRunId"] for each in children} == {parent.info.run_id}
    assert sorted(each.info.run_name for each in children) == sorted(cells(runs))
    assert {each.info.status for each in children} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_cells_with_workers_of_their_own_run_at_once_and_all_end(ray_data: Path, tmp_path: Path) -> None:
    """Two of two workers each fill the cluster's four CPUs; a third has no room, and waits without holding any."""
    changes: dict[str, Any] = {"cluster": {"workers": 2}, "stream": {"tasks": ["t0", "t1"]}}
    config = base(ray_data / "vit", ray_data / "images", tmp_path / "runs", **changes)
    done = compare(config, options("seqlora,independent,treelora", seeds=(0,)))
    assert [cell.state for cell in done.cells] == ["finished"] * 3
    assert done.at_once == 2


@pytest.mark.slow
def test_three_methods_on_the_built_in_stream_through_the_command_line(tmp_path: Path) -> None:
    rows = "seqlora,treelora,seen=seqlora:objective.ce_scope=seen:objective.routing=last"
    given = ["stream.tasks=4", "train.epochs=2", f"folder={tmp_path}", "cluster.address=local", "--reach", "0.95"]
    command = [sys.executable, "-m", "treelora_ray", "compare", "quickstart", *given, "--methods", rows]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "compare-quickstart"
    with (folder / "table.csv").open() as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["seqlora", "treelora", "seen"]
    assert float(lines["treelora"]["op_mean"]) > float(lines["seen"]["op_mean"])
    assert {path.name for path in folder.glob("table.*")} == {"table.md", "table.csv", "table.tex"}
    assert len(list((folder / "figures").glob("*.svg"))) == 3
    assert "objective.routing differs" in (folder / "table.md").read_text()
