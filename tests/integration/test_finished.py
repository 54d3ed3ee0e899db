"""Finished runs leave their folder: as MLflow models that answer anywhere, as adapters, as merged models."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from tests import tiny
from tests.integration.test_pages import example
from tests.integration.test_runs import call, png
from treelora_ray import Run, run
from treelora_ray.config import load
from treelora_ray.data.digits import digits_stream
from treelora_ray.files import new_folder
from treelora_ray.models.errors import ModelError
from treelora_ray.tracking import export, model
from treelora_ray.training.errors import RunError, Stopped

# Answers of several models, in a process that may read nothing but them: (model, input, routing) -> output.
ELSEWHERE = """
import json, socket, sys
import pandas as pd

def refuse(*_):
    sys.exit("asked the network")

socket.socket.connect = socket.getaddrinfo = refuse
import mlflow
for place, source, target, params in json.loads(sys.argv[1]):
    mlflow.pyfunc.load_model(place).predict(pd.read_parquet(source), params=params).to_parquet(target)
"""


@pytest.fixture(autouse=True, scope="module")
def _no_telemetry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


FILMS = ["good film", "bad film", "very good film", "the bad film"]
COLOURS = ["red book", "blue book", "what is red", "not blue"]


def write(folder: Path, tasks: dict[str, dict[str, list[str]]]) -> Path:
    for name, columns in tasks.items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            pq.write_table(pa.table(columns), folder / name / f"{split}.parquet")
    return folder


def learn(folder: Path, name: str, **sections: Any) -> Run:
    return run({"name": name, "folder": str(folder / "runs"), "method": {"probe_rounds": 2}, **sections})


def digits(folder: Path) -> Run:
    return learn(folder, "digits", stream={"tasks": 2, "rows": 96, "test_rows": 40}, train={"steps": 6})


def texts(folder: Path) -> Run:
    (folder / "bert").mkdir()
    data = write(
        folder / "texts",
        {
            "films": {"text": FILMS * 6, "label": ["+", "-"] * 12},
            "colours": {"text": COLOURS * 6, "label": ["r", "b"] * 12},
        },
    )  # fmt: skip
    return learn(
        folder, "texts", stream={"source": "parquet", "path": str(data)}, train={"epochs": 3, "batch": 8, "lr": 0.01},
        model={"backbone": str(tiny.bert(folder / "bert")), "max_length": 16, "device": "cpu"},
    )  # fmt: skip


def prompts(folder: Path) -> Run:
    (folder / "llama").mkdir()
    data = write(
        folder / "prompts",
        {
            "colours": {"prompt": ["what colour good", "what colour bad"] * 8, "answer": ["red", "blue"] * 8},
            "sums": {"prompt": ["sum of one", "sum of two"] * 8, "answer": ["two", "three"] * 8},
        },
    )
    return learn(
        folder, "prompts", stream={"source": "parquet", "path": str(data)},
        model={"backbone": str(tiny.llama(folder / "llama")), "max_length": 32},
        train={"epochs": 20, "batch": 8, "lr": 0.02}, objective={"max_new_tokens": 4},
    )  # fmt: skip


ROWS: dict[str, Any] = {
    "digits": [png(picture) for t in (0, 1) for picture in digits_stream(2).tasks[t].test.take(range(9))["image"]],
    "texts": ["good film", "a red book", "what is blue", "the very bad film", "question"],
    "prompts": ["what colour bad", "sum of one", "sum of two", "what colour good", "what colour yes"],
}
COLUMN = {"digits": ("image", "label"), "texts": ("text", "label"), "prompts": ("prompt", "answer")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("finished")
    return {"digits": digits(folder), "texts": texts(folder), "prompts": prompts(folder)}


def answers(done: Run, kind: str, routing: str | None = None) -> dict[str, list[str]]:
    said = done.predict({COLUMN[kind][0]: ROWS[kind]}, routing)
    return {"task": [done.tasks[task] for task in said.task.tolist()], COLUMN[kind][1]: said.text}


def test_models_answer_in_another_process_when_all_else_is_gone(runs: dict[str, Run], tmp_path: Path) -> None:
    home, learnt_in = tmp_path / "home", runs["digits"].folder.parents[1]
    shutil.copytree(learnt_in, home)
    for path in home.glob("runs/*/config.yaml"):
        path.write_text(path.read_text().replace(str(learnt_in), str(home)))
    made = {kind: Run(home / "runs" / kind) for kind in COLUMN}
    expected: dict[Any, Any] = {}
    jobs: list[tuple[Any, ...]] = []
    for kind, done in made.items():
        place, source = tmp_path / "models" / kind, tmp_path / f"{kind}.parquet"
        model.save_model(done, place)
        column = COLUMN[kind][0]
        values = [value["bytes"] for value in ROWS[kind]] if kind == "digits" else ROWS[kind]
        pd.DataFrame({"id": range(len(values)), column: values}).to_parquet(source)
        for routing in (None, "last"):
            expected[kind, routing] = answers(done, kind, routing)
            target = str(tmp_path / f"{kind}-{routing}.parquet")
            jobs.append((str(place), str(source), target, routing and {"routing": routing}))
        for path in place.rglob("*"):
            assert not path.is_symlink()
            data = path.read_bytes() if path.is_file() else b""
            assert not any(str(folder).encode() in data for folder in (tmp_path, learnt_in)), path
            assert path.suffix not in (".pkl", ".pickle", ".bin", ".pt", ".tmp")
        assert (place / "data" / "run" / "backbone" / "model.safetensors").is_file()
    assert all(len(set(expected[kind, None]["task"])) == 2 for kind in made)
    assert all(expected[kind, None] != expected[kind, "last"] for kind in made)
    shutil.move(tmp_path / "models", tmp_path / "moved")
    shutil.rmtree(home)
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TREELORA_CACHE": str(tmp_path / "none"),
        "HF_HOME": str(tmp_path / "hub"), "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    moved = json.dumps([(place.replace("/models/", "/moved/"), *rest) for place, *rest in jobs])
    ended = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, moved], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert not (tmp_path / "none").exists()
    for kind, routing in expected:
        found = pd.read_parquet(tmp_path / f"{kind}-{routing}.parquet").to_dict("list")
        assert found == expected[kind, routing], (kind, routing)


@pytest.fixture(scope="module")
def saved(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for kind, done in runs.items():
        model.save_model(done, folder / kind)
    return {kind: folder / kind for kind in runs}


def loaded(place: Path) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(str(place))


def test_a_model_says_what_goes_in_and_comes_out_and_what_it_needs(
    runs: dict[str, Run], saved: dict[str, Path]
) -> None:
    for kind, place in saved.items():
        column, said = COLUMN[kind]
        meta = loaded(place).metadata
        assert meta.signature.inputs.to_dict() == [
            {"type": "binary" if kind == "digits" else "string", "name": column, "required": True}
        ]
        assert meta.signature.outputs.input_names() == ["task", said]
        assert [(spec.name, spec.default) for spec in meta.signature.params.params] == [("routing", "inferred")]
        assert meta.metadata["tasks"] == runs[kind].tasks
        assert meta.metadata["backbone"] in ("builtin:digits-vit", "bert", "llama")
        needs = (place / "requirements.txt").read_text().split()
        assert {re.split("==", line)[0] for line in needs} == {"mlflow", *model.PINNED}
        assert f"torch=={torch.__version__.split('+')[0]}" in needs
        example = meta.load_input_example(str(place))
        assert list(loaded(place).predict(example).columns) == ["task", said]
        config = load(place / "data" / "run" / "config.yaml")
        assert config.model.backbone == "./backbone"
        assert config.model.device == "auto"
        assert config.folder == "runs"


def test_images_come_as_bytes_structs_or_arrays_and_over_json(runs: dict[str, Run], saved: dict[str, Path]) -> None:
    from mlflow.pyfunc import scoring_server

    answerer, expected = loaded(saved["digits"]), answers(runs["digits"], "digits")
    encoded = [value["bytes"] for value in ROWS["digits"]]
    pictures = [np.asarray(_open(data)) for data in encoded]
    for values in (encoded, ROWS["digits"], pictures, [bytearray(data) for data in encoded]):
        frame = pd.DataFrame({"image": pd.Series(values, index=range(7, 7 + len(values)), dtype="object")})
        found = answerer.predict(frame)
        assert found.index.tolist() == frame.index.tolist()
        assert found.to_dict("list") == expected
    payload = {
        "dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(data).decode()] for data in encoded]}
    }
    said = scoring_server.invocations(
        json.dumps(payload), "application/json", answerer, answerer.metadata.get_input_schema()
    )
    assert said.status == 200, said.response
    assert pd.DataFrame(json.loads(said.response)["predictions"]).to_dict("list") == expected


def _open(data: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data))


def test_the_page_of_models_shows_what_runs(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved["digits"], tmp_path / "model")
    (tmp_path / "picture.png").write_bytes(ROWS["digits"][0]["bytes"])
    monkeypatch.chdir(tmp_path)
    exec(example("models.md"), {})
    assert [line.split() for line in capsys.readouterr().out.splitlines()[::2]] == [["task", "label"]] * 2


def test_rows_that_cannot_be_answered_are_told(saved: dict[str, Path]) -> None:
    answerer = loaded(saved["texts"])
    empty = answerer.predict(pd.DataFrame({"text": pd.Series([], dtype="object")}))
    assert (len(empty), list(empty.columns)) == (0, ["task", "label"])
    with pytest.raises(RunError, match="row 1 has no text"):
        answerer.predict(pd.DataFrame({"text": ["good film", None]}))
    with pytest.raises(RunError, match="oracle routing needs to know the tasks"):
        answerer.predict(pd.DataFrame({"text": ["good film"]}), params={"routing": "oracle"})
    with pytest.raises(RunError, match="routing 'best' is unknown: use inferred or last"):
        answerer.predict(pd.DataFrame({"text": ["good film"]}), params={"routing": "best"})


def test_calls_at_the_same_time_answer_as_one_after_another(runs: dict[str, Run], saved: dict[str, Path]) -> None:
    answerer, expected = loaded(saved["prompts"]), answers(runs["prompts"], "prompts")
    assert len(set(expected["answer"])) > 2
    frames = [pd.DataFrame({"prompt": [prompt]}) for prompt in ROWS["prompts"]] * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answerer.predict, frames))
    assert [frame["answer"][0] for frame in found] == expected["answer"] * 8


def test_a_model_is_logged_to_a_run_and_registered(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("streams", artifact_location=(tmp_path / "artifacts").as_uri())
    there = client.create_run(experiment).info.run_id
    client.log_param(there, "method.name", "treelora")
    for version in ("1", "2"):
        found = model.log_model(runs["texts"], client, there, name="stream", register="films")
        assert client.get_model_version("films", version).run_id == there
    made = client.get_logged_model(found.removeprefix("models:/"))
    assert (made.name, made.source_run_id, made.status) == ("stream", there, "READY")
    assert made.params == {"method.name": "treelora"}
    assert [str(entry["version"]) for entry in json.loads(made.tags["mlflow.modelVersions"])] == ["2"]
    outputs = client.get_run(there).outputs
    assert outputs is not None
    assert found.removeprefix("models:/") in [output.model_id for output in outputs.model_outputs]
    with pytest.raises(RunError, match="no MLflow run is active: give `run_id`"):
        model.log_model(runs["texts"], client)
    before = mlflow.get_tracking_uri()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # which the next line sets too, and nothing takes back
    mlflow.set_tracking_uri(uri)
    try:
        frame = pd.DataFrame({"text": ROWS["texts"]})
        for place in (found, "models:/films/2"):
            assert mlflow.pyfunc.load_model(place).predict(frame).to_dict("list") == answers(runs["texts"], "texts")
        with mlflow.start_run(experiment_id=experiment) as active:
            found = model.log_model(runs["texts"])
        assert client.get_logged_model(found.removeprefix("models:/")).source_run_id == active.info.run_id
        with mlflow.start_run(experiment_id=experiment), pytest.raises(RunError, match="is a folder, not a hub id"):
            model.log_model(runs["texts"], copy_backbone=False)
        (failed,) = [made for made in client.search_logged_models([experiment]) if made.status == "FAILED"]
        assert failed.source_run_id is not None
        assert failed.source_run_id != active.info.run_id
        model.log_model(runs["texts"], client, failed.source_run_id)  # what is left half made goes
        assert {made.status for made in client.search_logged_models([experiment])} == {"READY"}
    finally:
        mlflow.set_tracking_uri(before)


def test_a_backbone_of_the_hub_is_copied_from_its_cache_or_named(runs: dict[str, Run], tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(runs["texts"].config.model.backbone, repository / "snapshots" / "abc")
    (repository / "snapshots" / "abc" / "pytorch_model.bin").write_bytes(b"pickled")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    learnt = tmp_path / "run"
    shutil.copytree(runs["texts"].folder, learnt)
    config = (learnt / "config.yaml").read_text()
    (learnt / "config.yaml").write_text(re.sub("backbone: .*", "backbone: owner/tiny", config))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    both = (
        "import sys; from treelora_ray import Run; from treelora_ray.tracking.model import save_model\n"
        "save_model(Run('run'), 'copied'); save_model(Run('run'), 'named', copy_backbone=False)"
    )
    subprocess.run([sys.executable, "-c", both], cwd=tmp_path, env=environment, check=True, timeout=200)
    assert not (tmp_path / "copied" / "data" / "run" / "backbone" / "pytorch_model.bin").exists()
    frame = pd.DataFrame({"text": ROWS["texts"]})
    assert loaded(tmp_path / "copied").predict(frame).to_dict("list") == answers(runs["texts"], "texts")
    assert loaded(tmp_path / "copied").metadata.metadata["backbone"] == "owner/tiny"
    assert not (tmp_path / "named" / "data" / "run" / "backbone").exists()
    assert load(tmp_path / "named" / "data" / "run" / "config.yaml").model.backbone == "owner/tiny"
    with pytest.raises(ModelError, match="the backbone owner/tiny is not in the hub's cache here"):
        model.save_model(Run(learnt), tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_run_that_is_not_finished_is_no_model(runs: dict[str, Run], tmp_path: Path) -> None:
    found = runs["texts"].config.model_dump(mode="json", by_alias=True)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(0)
        return len(asked) > 12  # in the second task

    with pytest.raises(Stopped):
        run(found | {"folder": str(tmp_path), "name": "half"}, stop=stop)
    half = Run(tmp_path / "half")
    assert half.tasks == ["colours"]
    with pytest.raises(RunError, match="is not finished: go on with `treelora train`"):
        model.save_model(half, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


@pytest.mark.parametrize("kind", ["digits", "texts", "prompts"])
def test_the_exported_adapter_is_the_run_s_own(kind: str, runs: dict[str, Run], tmp_path: Path) -> None:
    done = runs[kind]
    task = done.tasks[1]
    export.export_task(done, task, tmp_path / "out")
    for path in done.adapters[task].iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    card = json.loads((tmp_path / "out" / "treelora.json").read_text())
    assert (card["task"], card["merged"], card["digest"]) == (task, False, done.config.digest)


PROMPTED: list[dict[str, Any]] = [
    {"name": "l2p"},
    {"name": "dualprompt", "g_layers": [0], "e_layers": [1, 2]},
    {"name": "hide-prompt", "layers": [0, 1], "samples": 8, "fit_epochs": 2},
]


@pytest.mark.parametrize("method", PROMPTED, ids=lambda method: method["name"])
def test_prompts_are_no_adapter_but_a_model(method: dict[str, Any], tmp_path: Path) -> None:
    stream = {"tasks": 2, "rows": 64, "test_rows": 40}
    done = run({"folder": str(tmp_path), "method": method, "stream": stream, "train": {"steps": 2, "threads": 1}})
    assert done.adapters == {}
    assert not (done.folder / "adapters").exists()
    with pytest.raises(RunError, match=r"has no adapter of .*: prompts within the model answer, .*`treelora model`"):
        export.export_task(done, done.tasks[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_model(Run(done.folder), tmp_path / "model")
    frame = pd.DataFrame({"image": ROWS["digits"]})
    expected = done.predict({"image": ROWS["digits"]})
    found = model._load_pyfunc(str(tmp_path / "model" / "data" / "run")).predict(frame)
    assert found["label"].tolist() == expected.text
    assert len(set(expected.text)) > 1


def test_a_merged_language_model_is_base_and_adapter_in_one(runs: dict[str, Run], tmp_path: Path) -> None:
    done, out = runs["prompts"], tmp_path / "out"
    assert call("export", str(done.folder), "--task", "sums", "--merge", "--output", str(out)) == 0
    assert not any(str(tmp_path.parent).encode() in path.read_bytes() for path in out.iterdir())
    assert not list(out.glob("*.bin"))
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(done.config.model.backbone)
    merged = auto.from_pretrained(out)
    ids = transformers.AutoTokenizer.from_pretrained(out)(ROWS["prompts"], padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = base(**ids).logits
        both = peft.PeftModel.from_pretrained(base, str(done.adapters["sums"])).eval()(**ids).logits
        torch.testing.assert_close(merged(**ids).logits, both, rtol=0, atol=1e-5)
    assert float((alone - both).abs().max()) > 0.1
    names: dict[str, Any] = {}
    exec(_snippet(out), names)
    assert torch.equal(names["inputs"]["input_ids"], names["tokenizer"](["a prompt"], return_tensors="pt")["input_ids"])


def _snippet(folder: Path) -> str:
    """The example of an export's page, from another folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    for name in (".", "head.safetensors", "labels.json", "picture.png"):
        code = code.replace(f'"{name}"', repr(str(folder / name)))
    return str(code)


@pytest.mark.parametrize(
    ("kind", "pooling"), [("digits", "auto"), ("digits", "cls"), ("texts", "auto"), ("texts", "cls")]
)
def test_the_page_of_a_merged_encoder_says_how_to_classify(
    kind: str, pooling: str, runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = runs[kind]
    if pooling != "auto":
        shutil.copytree(done.folder, tmp_path / "run")
        config = (tmp_path / "run" / "config.yaml").read_text()
        (tmp_path / "run" / "config.yaml").write_text(re.sub("pooling: .*", f"pooling: {pooling}", config))
        done = Run(tmp_path / "run")
    out = tmp_path / "out"
    export.export_task(done, done.tasks[0], out, merge=True)
    data = _big_picture()
    (out / "picture.png").write_bytes(data)
    names: dict[str, Any] = {}
    exec(_snippet(out), names)
    learner = done.method.learner
    column, value = ("image", data) if kind == "digits" else ("text", "a text")
    with learner.holding(done.method.answer(0)), torch.no_grad():
        features = learner.model.features(learner.model.inputs({column: [value]}))
    rows = learner.head.rows[0]
    expected = features @ learner.head.weight[rows].T + learner.head.bias[rows]
    torch.testing.assert_close(names["logits"], expected, rtol=0, atol=1e-5)
    label = done.method.learner.infos[0].labels[int(expected.argmax())]
    assert capsys.readouterr().out.splitlines()[-1] == str([label])


def _big_picture() -> bytes:
    picture = np.random.default_rng(0).integers(0, 255, (40, 30)).astype(np.uint8)
    return bytes(png(picture)["bytes"])


def test_a_matrix_that_two_layers_share_is_not_merged(tmp_path: Path) -> None:
    transformers.set_seed(0)
    words = tiny.tokenizer(tmp_path / "tied")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    data = write(tmp_path / "data", {"one": {"prompt": ["sum of one"] * 8, "answer": ["two"] * 8}})
    done = learn(
        tmp_path, "tied", stream={"source": "parquet", "path": str(data)}, train={"steps": 2},
        model={"backbone": str(tmp_path / "tied"), "max_length": 32, "lora": {"targets": ["lm_head", "q_proj"]}},
    )  # fmt: skip
    with pytest.raises(ModelError, match="tied uses one matrix as input and as output embedding"):
        export.export_task(done, "one", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_what_stands_in_the_way_is_kept_and_failures_leave_nothing(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, out = runs["texts"], tmp_path / "out"
    command = ["export", str(done.folder), "--output", str(out), "--task"]
    assert call(*command, "film") == 2
    assert "has learnt no task 'film'; did you mean 'films'?" in capsys.readouterr().err
    assert call(*command, "films") == 0
    assert call(*command, "colours") == 2
    assert "is there already: give --force to replace it" in capsys.readouterr().err
    assert json.loads((out / "treelora.json").read_text())["task"] == "films"
    assert call(*command, "colours", "--force") == 0
    assert json.loads((out / "treelora.json").read_text())["task"] == "colours"
    assert call("model", str(done.folder), "--output", str(out), "--force") == 0
    assert f"mlflow.pyfunc.load_model('{out}')" in capsys.readouterr().out
    assert not (out / "treelora.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    for name in ("mine", "mine/config.json"):
        with pytest.raises(RunError, match="is no export and no model, so it is not replaced"):
            export.export_task(done, "films", tmp_path / name, force=True)
    monkeypatch.setattr(export, "_readme", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export_task(done, "films", out, merge=True, force=True)
    assert (out / "MLmodel").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if source.name.endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"), new_folder(tmp_path / "there") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["old"]


def test_an_adapter_that_is_gone_is_told(runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["texts"].folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapters" / "films")
    with pytest.raises(RunError, match="lacks the adapter of films"):
        export.export_task(Run(tmp_path / "run"), "films", tmp_path / "out")
