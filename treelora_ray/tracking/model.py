"""Finished runs as MLflow models: all that is needed to answer, in a folder that may be moved anywhere.

    MLmodel, requirements.txt, input_example.json …     MLflow's own
    data/run/config.yaml, data/run/checkpoints/          what the run has learnt
    data/run/backbone/                                   the frozen model, as it was loaded

MLflow finds `_load_pyfunc` below by the name of this module, so nothing is pickled.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora_ray.api import Run
from treelora_ray.config import RunConfig, from_mapping
from treelora_ray.files import save_snapshot
from treelora_ray.methods import outside
from treelora_ray.models.loading import stored
from treelora_ray.tracking.export import origin, placed
from treelora_ray.training.errors import RunError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import Model, ModelSignature

PINNED = ("treelora-ray", "torch", "transformers", "peft")
# What answers depend on. Nothing is kept of where the run lay, what it ran on and who was told of it.
KEPT = ("name", "seed", "stream", "model", "objective", "method", "train", "evaluate")
UNREAD = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf")  # weights in other formats


def save_model(run: Run, target: Path | str, *, copy_backbone: bool = True, force: bool = False) -> None:
    """Writes a finished run as a folder that `mlflow.pyfunc.load_model` loads anywhere, without the network.

    `copy_backbone=False` keeps a hub id in place of the backbone's files.
    """
    with placed(Path(target), force) as folder:
        _write(run, folder, copy_backbone)


def log_model(
    run: Run,
    client: MlflowClient | None = None,
    run_id: str | None = None,
    *,
    name: str = "model",
    register: str | None = None,
    copy_backbone: bool = True,
) -> str:
    """Logs a finished run to an MLflow run, the active one where none is given; the URI that loads it.

    `register`: the name under which it becomes a new version in the model registry.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    client, active = client or mlflow.MlflowClient(), mlflow.active_run()
    run_id = run_id or (None if active is None else active.info.run_id)
    if run_id is None:
        raise RunError("no MLflow run is active: give `run_id`, or log within mlflow.start_run()")
    with TemporaryDirectory() as scratch:
        there = client.get_run(run_id)
        _clear(client, there, name)
        made = client.create_logged_model(there.info.experiment_id, name, run_id, params=there.data.params)
        try:
            folder = Path(scratch) / "model"
            folder.mkdir()
            model = Model(made.artifact_location, run_id, model_uuid=made.model_id, model_id=made.model_id)
            _write(run, folder, copy_backbone, model)
            client.log_model_artifacts(made.model_id, str(folder))
        except BaseException:
            client.finalize_logged_model(made.model_id, "FAILED")
            raise
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step=0)])
    if register is not None:
        _register(client, register, made, run_id)
    return f"models:/{made.model_id}"


def _clear(client: MlflowClient, run: Any, name: str) -> None:
    """Models of the run that an outage has left half made."""
    from mlflow.entities import LoggedModelStatus

    where = f"source_run_id = '{run.info.run_id}' AND name = '{name}'"
    for left in client.search_logged_models([run.info.experiment_id], where):
        if left.status != LoggedModelStatus.READY:
            client.delete_logged_model(left.model_id)


def _register(client: MlflowClient, name: str, made: LoggedModel, run_id: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not `models:/ID`, which a database looks up where the process tracks, not where the client does.
    added = client.create_model_version(name, made.artifact_location, run_id, model_id=made.model_id)
    entry = [{"name": name, "version": added.version}]
    client.set_logged_model_tags(made.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(entry)})


def _write(run: Run, folder: Path, copy_backbone: bool, model: Model | None = None) -> None:
    import mlflow.pyfunc

    found = run.checkpoint()
    if not run.finished or found.meta["step"] is not None or len(found.meta["infos"]) != len(run.tasks):
        raise RunError(f"run {run.address} is not finished: go on with `treelora train`")
    kind = str(found.meta["kind"])
    with TemporaryDirectory() as scratch:
        data = Path(scratch) / "run"
        (data / "checkpoints" / "adapters").mkdir(parents=True)
        config = _portable(run.config, kind, data / "backbone" if copy_backbone else None)
        (data / "config.yaml").write_text(config.to_yaml())
        meta = {**found.meta, "config": config.model_dump(mode="json", by_alias=True)}
        save_snapshot(data / "checkpoints" / found.path.name, found.tensors, meta)
        for slot, name in found.meta["bank"]["slots"].items():
            save_snapshot(
                data / "checkpoints" / "adapters" / f"{name}.safetensors", {"adapter": found.slots[int(slot)]}, {}
            )
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(data),
            mlflow_model=model,
            signature=_signature(config, kind),
            input_example=_example(kind),
            pip_requirements=[f"{name}=={installed.split('+')[0]}" for name, installed in _pinned(run.config)],
            metadata={
                "tasks": run.tasks,
                "method": run.config.method.name,
                "backbone": origin(run.config.model.backbone),
                "digest": run.config.digest,
            },
        )


def _pinned(config: RunConfig) -> list[tuple[str, str]]:
    """Packages that answer, and their versions; the one that the method comes from among them."""
    origin = outside.distribution(config.method.name)
    return [(name, version(name)) for name in PINNED] + ([origin] if origin else [])


def _portable(config: RunConfig, kind: str, backbone: Path | None) -> RunConfig:
    """The config without what holds on one machine only. The backbone's files are linked into a folder."""
    data = {key: value for key, value in config.model_dump(mode="json", by_alias=True).items() if key in KEPT}
    for section, key in (("stream", "path"), ("method", "prior")):
        if (path := data[section].get(key)) and "://" not in path:
            data[section][key] = Path(path).name
    data["model"]["device"] = "auto"
    name = config.model.backbone
    if backbone is None:
        if Path(name).expanduser().is_dir():
            raise RunError(f"the backbone {name} is a folder, not a hub id: it has to be copied")
        return from_mapping(data)
    source = stored(config.model, kind)
    backbone.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix not in UNREAD:
            (backbone / file.name).symlink_to(file.resolve())
    data["model"] |= {"backbone": "./backbone", "revision": None}
    return from_mapping(data)


def _signature(config: RunConfig, kind: str) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    said = "answer" if kind == "prompt" else "label"
    routing = "last" if config.objective.routing == "last" else "inferred"
    return ModelSignature(
        Schema([ColSpec("binary" if kind == "image" else "string", kind)]),
        Schema([ColSpec("string", "task"), ColSpec("string", said)]),
        ParamSchema([ParamSpec("routing", "string", routing)]),
    )


def _example(kind: str) -> Any:
    import pandas as pd

    if kind != "image":
        return pd.DataFrame({kind: [f"a {kind}"]})
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(out, format="PNG")
    return pd.DataFrame({kind: [out.getvalue()]})


class Packed(Run):
    """A run within a model: its backbone lies beside its config."""

    @cached_property
    def config(self) -> RunConfig:
        config, folder = super().config, (self.folder / "backbone").absolute()
        if not folder.is_dir():
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"backbone": str(folder)})})


class Answerer:
    """What MLflow calls to predict."""

    def __init__(self, run: Run) -> None:
        self.run, self.model = run, run.method.learner.model
        self.lock = threading.Lock()  # one call at a time holds its adapter; servers call from many threads

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """A frame with the column image, text or prompt -> a frame with its index, `task` and `label` or `answer`."""
        import pandas as pd

        kind = self.model.kind
        if (missing := data[kind].isna()).any():
            raise RunError(f"row {int(missing.argmax())} has no {kind}: leave it out")
        with self.lock:
            answers = self.run.predict({kind: data[kind].tolist()}, (params or {}).get("routing"))
        names = [info.name for info in self.run.method.learner.infos]
        columns = {
            "task": [names[task] for task in answers.task.tolist()],
            "answer" if kind == "prompt" else "label": answers.text,
        }
        return pd.DataFrame(columns, index=data.index, dtype="object")


def _load_pyfunc(path: str) -> Answerer:
    return Answerer(Packed(path))
