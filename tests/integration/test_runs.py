"""Whole runs through `treelora_ray.run` and the command line, on small streams in files."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests import tiny, toys
from treelora_ray import Run, files, run
from treelora_ray.cli import main
from treelora_ray.config import ConfigError, from_mapping
from treelora_ray.data.errors import DataError
from treelora_ray.training import state
from treelora_ray.training import stream as stream_module
from treelora_ray.training.errors import NonFiniteError, RunError, Stopped
from treelora_ray.training.loop import train_task


def png(picture: np.ndarray) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG")
    return {"bytes": out.getvalue(), "path": None}


def write(folder: Path, tasks: int, first: int = 0) -> None:
    """Tasks as the hub lays out image data."""
    for number in range(first, tasks):
        (folder / f"t{number}").mkdir(parents=True)
        for split, rows, seed in (("train", 22, 0), ("test", 12, 1)):
            columns = toys.images(number, rows, seed).take(range(rows))
            table = pa.table({"image": [png(picture) for picture in columns["image"]], "label": columns["label"]})
            pq.write_table(table, folder / f"t{number}" / f"{split}.parquet", row_group_size=8)


def settings(backbone: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "r",
        "folder": str(folder),
        "stream": {"source": "parquet", "path": str(data)},
        "model": {"backbone": str(backbone), "lora": {"rank": 2, "alpha": 4}},
        "method": {"probe_rounds": 2, "guide": {"gate": 0.0}},
        "train": {"epochs": 2, "batch": 8, "lr": 0.01},
    }
    for name, section in changes.items():
        found[name] = {**found[name], **section} if isinstance(section, dict) and name in found else section
    return found


def config_file(path: Path, found: dict[str, Any]) -> str:
    path.write_text(from_mapping(found).to_yaml())
    return str(path)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_a_run_says_what_it_learnt_and_answers_rows_of_unknown_tasks(
    backbone: Path, data: Path, tmp_path: Path
) -> None:
    done = run(settings(backbone, data, tmp_path / "runs"))
    assert done.finished
    assert done.tasks == ["t0", "t1", "t2"]
    assert done.matrix.shape == (3, 3)
    assert np.isnan(done.matrix[0, 1])
    assert done.metrics["op"] == pytest.approx(done.matrix[-1].mean())
    assert set(os.listdir(done.adapters["t1"])) == {
        "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "labels.json",
    }  # fmt: skip
    rows = toys.images(1, 12, 1).take(range(12))
    answers = done.predict({"image": rows["image"]})
    assert set(answers.text) <= {"c0", "c1"}
    again = Run(done.folder)
    assert again.predict({"image": rows["image"]}).text == answers.text
    assert list(again.evaluate().values()) == pytest.approx(done.matrix[-1].tolist())
    routed = again.evaluate("oracle")
    assert routed["t2"] == pytest.approx(
        100
        * np.mean(
            [a == b for a, b in zip(_oracle(again, 2), toys.images(2, 12, 1).take(range(12))["label"], strict=True)]
        )
    )
    with pytest.raises(RunError, match="oracle routing needs to know the tasks"):
        done.predict({"image": rows["image"]}, "oracle")
    with pytest.raises(RunError, match="rows to predict need a column 'image'; they have text"):
        done.predict({"text": ["a"]})


def _oracle(done: Run, task: int) -> list[str]:
    from treelora_ray.training.evaluate import Evaluator

    rows = toys.images(task, 12, 1)
    return Evaluator(done.method, "oracle").answer(rows, np.full(len(rows), task)).text


def test_a_finished_run_is_not_learnt_again_and_more_tasks_go_on(backbone: Path, data: Path, tmp_path: Path) -> None:
    found = settings(backbone, data, tmp_path / "runs", stream={"tasks": ["t0", "t1"]})
    first = run(found)
    stamp = (first.adapters["t0"] / "adapter_model.safetensors").stat().st_mtime_ns
    result = (first.folder / "result.json").read_bytes()
    run(found)
    assert (first.adapters["t0"] / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert (first.folder / "result.json").read_bytes() == result
    more = run(settings(backbone, data, tmp_path / "runs", stream={"tasks": ["t0", "t1", "t2"]}))
    whole = run(settings(backbone, data, tmp_path / "whole", stream={"tasks": ["t0", "t1", "t2"]}))
    np.testing.assert_array_equal(more.matrix[-1], whole.matrix[-1])
    for name in ("t0", "t1", "t2"):
        file = "adapter_model.safetensors"
        assert (more.adapters[name] / file).read_bytes() == (whole.adapters[name] / file).read_bytes()
    with pytest.raises(RunError, match="task 0 of the stream is not the one the run has learnt"):
        run(settings(backbone, data, tmp_path / "runs", stream={"tasks": ["t2", "t1", "t0"]}))


def test_another_config_is_refused_with_its_keys(backbone: Path, data: Path, tmp_path: Path) -> None:
    run(settings(backbone, data, tmp_path / "runs", stream={"tasks": ["t0"]}))
    other = settings(backbone, data, tmp_path / "runs", stream={"tasks": ["t0", "t1"]}, train={"lr": 0.02}, seed=0)
    with pytest.raises(ConfigError, match=r"begun with another config:\n  train.lr: 0.01 -> 0.02"):
        run(other)
    assert run(other, allow=["train.lr"]).tasks == ["t0", "t1"]
    with pytest.raises(ConfigError, match="seed cannot change within a run"):
        run({**other, "seed": 1}, allow=["seed"])


def test_too_few_epochs_for_the_tasks_are_refused(backbone: Path, data: Path, tmp_path: Path) -> None:
    given = settings(backbone, data, tmp_path / "runs", train={"epochs": [1, 2]})
    with pytest.raises(ConfigError, match=r"train\.epochs has 2 entries, the stream 3 tasks: give each"):
        run(given)
    run({**given, "stream": {**given["stream"], "tasks": 1}})


def test_other_rows_of_a_learnt_task_are_refused(backbone: Path, data: Path, tmp_path: Path) -> None:
    run(settings(backbone, data, tmp_path / "runs", stream={"tasks": ["t0"]}))
    table = pq.read_table(data / "t0" / "train.parquet")
    pq.write_table(table.slice(0, 21), data / "t0" / "train.parquet")
    with pytest.raises(RunError, match="is not the one the run has learnt"):
        run(settings(backbone, data, tmp_path / "runs", stream={"tasks": ["t0", "t1"]}))


def test_a_flipped_byte_costs_the_steps_since_the_checkpoint_before(backbone: Path, data: Path, tmp_path: Path) -> None:
    found = settings(backbone, data, tmp_path / "runs")
    whole = run({**found, "name": "whole"})
    run({**found, "stream": {**found["stream"], "tasks": ["t0", "t1"]}})
    newest = sorted((tmp_path / "runs" / "r" / "checkpoints").glob("state-*.safetensors"))[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 1
    newest.write_bytes(bytes(damaged))
    said: list[str] = []

    class Heard(stream_module.Listener):
        def note(self, text: str) -> None:
            said.append(text)

    again = run(found, listener=Heard())
    assert any("does not match its checksum" in text and "Going on from state-" in text for text in said)
    np.testing.assert_array_equal(again.matrix[-1], whole.matrix[-1])


def test_a_full_disk_leaves_the_previous_checkpoint(
    backbone: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = settings(backbone, data, tmp_path / "runs")
    path = config_file(tmp_path / "c.yaml", found)
    whole = run({**found, "name": "whole"})
    real, calls = files.save_snapshot, 0

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(state, "save_snapshot", full)
    assert call("train", path) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "goes on from the last one" in said
    monkeypatch.undo()
    np.testing.assert_array_equal(run(found).matrix[-1], whole.matrix[-1])


def test_a_loss_that_is_not_finite_stops_before_the_update(
    backbone: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treelora_ray.objectives.classification import Classification

    real, calls = Classification.loss, 0

    def broken(self: Classification, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, said = real(self, batch)
        return (loss * float("nan") if calls == 3 else loss), said

    monkeypatch.setattr(Classification, "loss", broken)
    with pytest.raises(NonFiniteError, match=r"task 't0', step 2: the loss is nan"):
        run(settings(backbone, data, tmp_path / "runs"))


def test_two_processes_do_not_train_in_one_folder(backbone: Path, data: Path, tmp_path: Path) -> None:
    import fcntl

    found = settings(backbone, data, tmp_path / "runs")
    (tmp_path / "runs" / "r").mkdir(parents=True)
    with (tmp_path / "runs" / "r" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is training in"):
            run(found)
    assert run(found).finished


def test_the_callers_random_state_and_threads_are_left_alone(backbone: Path, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(settings(backbone, data, tmp_path / "runs", train={"threads": 2}))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_loop_stands_on_one_screen() -> None:
    import inspect

    assert len(inspect.getsource(train_task).splitlines()) <= 80


@pytest.fixture
def learnt(backbone: Path, data: Path, tmp_path: Path) -> Path:
    return run(settings(backbone, data, tmp_path / "runs")).folder


def test_commands_look_at_a_run(learnt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", str(learnt)) == 0
    shown = capsys.readouterr().out
    assert "3 tasks" not in shown
    assert "positive = forgetting" in shown
    assert "t1" in shown
    assert call("show", str(learnt), "--json") == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == ["t0", "t1", "t2"]
    assert call("evaluate", str(learnt), "--json", "--routing", "last") == 0
    assert set(json.loads(capsys.readouterr().out)["scores"]) == {"t0", "t1", "t2"}
    assert call("evaluate", str(learnt), "--routing", "best") == 2
    assert "known: inferred, oracle, last" in capsys.readouterr().err


def test_predictions_of_a_file_are_those_of_the_run(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = toys.images(2, 20, 5).take(range(20))
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = pa.table({"id": range(20), "image": [png(picture) for picture in rows["image"]]})
    pq.write_table(table, source, row_group_size=7)
    assert call("predict", str(learnt), "--input", str(source), "--output", str(target)) == 0
    found = pq.read_table(target).to_pydict()
    assert found["id"] == list(range(20))
    assert found["label"] == Run(learnt).predict({"image": rows["image"]}).text
    assert set(found["task"]) <= {"t0", "t1", "t2"}
    capsys.readouterr()
    assert call("predict", str(learnt), "--input", str(source), "--output", str(target)) == 2
    assert "is there already" in capsys.readouterr().err
    assert (
        call("predict", str(learnt), "--input", str(data_without_images(tmp_path)), "--output", str(target), "--force")
        == 2
    )
    assert "has no column 'image'; it has text" in capsys.readouterr().err
    assert pq.read_table(target).num_rows == 20


def data_without_images(folder: Path) -> Path:
    pq.write_table(pa.table({"text": ["a"]}), folder / "text.parquet")
    return folder / "text.parquet"


def test_training_on_the_command_line_reports_as_asked(
    backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path / "c.yaml", settings(backbone, data, tmp_path / "runs"))
    assert call("train", path, "--json", "name=a", "method.name=independent", "method.probe_rounds=null") == 2
    assert "method.probe_rounds is unknown" in capsys.readouterr().err
    assert call("train", path, "--json", "name=a") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["begins", "scored"] * 3 + ["finished"]
    assert call("train", path, "--quiet", "name=b") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'runs' / 'b'}\n"
    assert call("train", path, "name=c") == 0
    plain = capsys.readouterr().out
    assert "task 2 of 3 t1" in plain
    assert "\x1b" not in plain
    assert f"treelora show {tmp_path / 'runs' / 'c'}" in plain


def emptied(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(0, 0), path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: (data / "t1" / "test.parquet").unlink(), "t1"),
        (lambda data: pq.write_table(pa.table({"picture": [1]}), data / "t1" / "train.parquet"), "picture"),
        (lambda data: emptied(data / "t1" / "test.parquet"), "test"),
    ],
)  # fmt: skip
def test_bad_data_are_told_in_words(
    spoil: Any, says: str, backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(data)
    assert call("train", config_file(tmp_path / "c.yaml", settings(backbone, data, tmp_path / "runs"))) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_a_corrupt_image_is_named_or_skipped(backbone: Path, data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data / "t1" / "train.parquet").to_pylist()
    table[4]["image"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(table), data / "t1" / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet.*row 4"):
        run(settings(backbone, data, tmp_path / "runs"))
    done = run(settings(backbone, data, tmp_path / "skip", stream={"on_bad_row": "skip"}))
    assert done.tasks == ["t0", "t1", "t2"]


def test_a_signal_stops_a_run_at_a_checkpoint(backbone: Path, data: Path, tmp_path: Path) -> None:
    found = settings(backbone, data, tmp_path / "runs", train={"epochs": 400, "checkpoint_every": None})
    path = config_file(tmp_path / "c.yaml", found)
    command = [sys.executable, "-m", "treelora_ray", "train", path, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "begins"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping at a checkpoint; once more to stop at once" in err
    assert f"go on: treelora train {path}" in err
    assert list((tmp_path / "runs" / "r" / "checkpoints").glob("state-*"))
    with pytest.raises(Stopped):
        run(found, stop=lambda: True)


def test_a_language_model_learns_generates_and_gives_its_adapter_to_peft(tmp_path: Path) -> None:
    import peft
    import transformers

    folder = tmp_path / "llama"
    folder.mkdir()
    tiny.llama(folder)
    for task, (prompt, answers) in enumerate(
        (("what colour is the book", ["red", "blue"]), ("sum of one and", ["two", "three"]))
    ):
        (tmp_path / "data" / f"t{task}").mkdir(parents=True)
        rows = {"prompt": [f"{prompt} {w}" for w in ("good", "bad")] * 8, "answer": answers * 8}
        for split in ("train", "test"):
            pq.write_table(pa.table(rows), tmp_path / "data" / f"t{task}" / f"{split}.parquet")
    found = settings(
        folder, tmp_path / "data", tmp_path / "runs", train={"epochs": 80, "lr": 0.03, "checkpoint_every": None},
        objective={"max_new_tokens": 4}, evaluate={"batch": 5},
    )  # fmt: skip
    found["model"] |= {"max_length": 32, "lora": {"rank": 8, "alpha": 16}}
    done = run(found)
    assert done.matrix[-1].tolist() == [100.0, 100.0]
    said = done.predict({"prompt": ["what colour is the book bad", "sum of one and good"]})
    assert said.text == ["blue", "two"]
    assert said.task.tolist() == [0, 1]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = peft.PeftModel.from_pretrained(base, done.adapters["t1"]).eval()
    model = done.method.learner.model
    inputs = model.inputs({"prompt": ["sum of one and good"]})
    with done.method.learner.holding(done.method.answer(1)), torch.no_grad():
        assert torch.equal(model.logits(inputs), plain(**inputs).logits)  # type: ignore[attr-defined]
