"""A Ray cluster of this machine for tests, small streams for it, and what a run has become."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.train import RunConfig as TrainRun
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from tests import buckets, tiny
from tests.integration.test_runs import settings, write
from treelora_ray.cluster import run as cluster_run
from treelora_ray.cluster.worker import NAMESPACE, work
from treelora_ray.config import from_mapping
from treelora_ray.files import load_snapshot
from treelora_ray.training.state import Checkpoints
from treelora_ray.training.stream import Listener

METHODS: dict[str, dict[str, Any]] = {
    "treelora": {"guide": {"gate": 0.0}},
    "treelora-query": {"query_every": 2, "query_batch": 4, "guide": {"observe": "query"}},
    "paper": {"mode": "paper"},
    "released": {"mode": "released"},
    "seqlora": {"name": "seqlora"},
    "ewc": {"name": "ewc"},
    "derpp": {"name": "der++", "memory": 9, "replay_batch": 8},
    "hide": {"name": "hide-lora", "contrast": 0.1, "centroids": 2, "samples": 16, "fit_epochs": 3},
}


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, of: int, loss: float) -> None:  # noqa: ARG002
        self.steps += 1


@contextmanager
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        for name, value in (cluster_run.ENVIRONMENT | buckets.ENVIRONMENT).items():
            patch.setenv(name, value)
        ray.init(
            address="local",  # whatever else runs on this machine
            num_cpus=4,
            include_dashboard=True,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            dashboard_host="127.0.0.1",
        )
        yield
        ray.shutdown()


def data(folder: Path) -> Path:
    """Streams of pictures and of prompts, and backbones for both."""
    write(folder / "images", 3)
    asked = {"tint": ("what colour is", ["red", "blue"]), "sum": ("sum of", ["two", "three"])}
    for task, (ask, answers) in asked.items():
        (folder / "prompts" / task).mkdir(parents=True)
        table = pa.table({"prompt": [f"{ask} {w}" for w in ("good", "bad")] * 8, "answer": answers * 8})
        for split in ("train", "test"):
            pq.write_table(table, folder / "prompts" / task / f"{split}.parquet")
    tiny.vit(folder / "vit")
    tiny.llama(folder / "llama")
    return folder


def config(data: Path, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    if name == "prompts":
        changes = {
            "stream": {"path": str(data / "prompts"), "tasks": ["tint", "sum"]},
            "objective": {"max_new_tokens": 3},
            "model": {"max_length": 32},
            **changes,
        }
    method = METHODS.get(name, METHODS["treelora"])
    if name == "prior":
        method = {**method, "prior": str(folder.parent / "tree.safetensors")}
    backbone = data / ("llama" if name == "prompts" else "vit")
    epochs = 5 if name in ("paper", "released") else 2  # the warm-up of mode paper is ten steps
    train = {"threads": 1, "epochs": epochs, "checkpoint_every": 3}
    found = settings(backbone, data / "images", folder, **{"name": name, "train": train, **changes})
    return {**found, "method": method if "name" in method else {"probe_rounds": 2, **method}}


def together(data: Path, folder: Path, names: list[str], workers: int) -> None:
    """All configs one after the other within one start of the workers, which takes longer than any of them."""
    with ExitStack() as stack:
        every = []
        for name in names:
            made = from_mapping(config(data, folder, name, cluster={"workers": workers}))
            (folder / name).mkdir(parents=True)
            every.append(stack.enter_context(cluster_run._actors(made, str(folder / name)))[1])

        def each(settings: dict[Any, Any]) -> None:
            for one in settings["every"]:
                work(one)

        TorchTrainer(
            each,
            train_loop_config={"every": every},
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            torch_config=TorchConfig(backend="gloo"),
            run_config=TrainRun(name="together", storage_path=str(folder)),
        ).fit()


def state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The last checkpoint's tensors with the adapters it names, and what was decided."""
    tensors, meta = load_snapshot(Checkpoints(folder / "checkpoints").paths()[-1])
    for slot, name in meta["bank"]["slots"].items():
        stored, _ = load_snapshot(folder / "checkpoints" / "adapters" / f"{name}.safetensors")
        tensors[f"slot.{slot}"] = stored["adapter"]
    result = json.loads((folder / "result.json").read_text())
    decided = {key: result.get(key) for key in ("tasks", "matrix", "metrics", "drawn")}
    leans = [record["report"].get("leans_on") for record in result["records"]]
    return tensors, {**decided, "leans": leans, "finished": result["finished"]}
