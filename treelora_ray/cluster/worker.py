"""What a worker of Ray Train does: the same as a run in one process, together with others."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train

from treelora_ray.api import learn
from treelora_ray.cluster.comm import TorchComm
from treelora_ray.cluster.desk import Reporter, Stop
from treelora_ray.cluster.errors import GuideLostError, GuideTimeoutError
from treelora_ray.cluster.guide_actor import RemoteGuide
from treelora_ray.config import from_mapping
from treelora_ray.core.config import GuideConfig
from treelora_ray.core.layout import Layout
from treelora_ray.methods.guides import AnyGuide, SharedGuide
from treelora_ray.store import RunFolder, StoreError, open_folder
from treelora_ray.training.errors import NonFiniteError, RunError, Stopped

NAMESPACE = "treelora"
TOKEN = ".begun"  # by which workers see that they share a folder


def work(settings: dict[str, Any]) -> None:
    """Learns the stream from the last checkpoint on; `settings` are plain data."""
    _quiet()
    comm = TorchComm()
    desk = ray.get_actor(settings["desk"], namespace=NAMESPACE)
    if comm.share(bool(ray.get(desk.over.remote())) if comm.rank == 0 else False):
        return

    def remote(layout: Layout, guide: GuideConfig) -> AnyGuide:
        actor = ray.get_actor(settings["guide"], namespace=NAMESPACE)
        return RemoteGuide(layout, guide, actor, config.cluster.guide_timeout, settings["guide"])

    def make_guide(layout: Layout, guide: GuideConfig) -> AnyGuide:
        return remote(layout, guide) if comm.workers == 1 else SharedGuide(comm, layout, guide, remote)

    if comm.rank == 0:
        desk.tell.remote("alive", comm.workers)
    try:
        config = from_mapping(settings["config"])  # a method of another package may not be installed here
        with _shared_folder(settings["folder"], comm) as folder:
            learn(
                config,
                folder,
                listener=Reporter(desk, comm, _report),
                stop=Stop(desk, comm),
                comm=comm,
                make_guide=make_guide,
            )
    except Stopped:
        return
    except (GuideLostError, GuideTimeoutError):
        raise  # the workers start again, from the last checkpoint
    except Exception as error:
        ours = type(error).__module__.startswith("treelora_ray")
        if ours and isinstance(error, ValueError | NonFiniteError):
            ray.get(desk.fail.remote(error))
        raise


@contextmanager
def _shared_folder(address: str, comm: TorchComm) -> Iterator[RunFolder]:
    """The run's folder, or this worker's mirror of it. Every worker must see what worker 0 writes there."""
    where = f"worker {comm.rank} on node {ray.util.get_node_ip_address()}"
    try:
        folder = open_folder(address)
    except StoreError as error:
        raise RunError(f"{where}: {error}") from error
    with folder:
        path = folder.path / TOKEN
        if comm.rank == 0:
            path.write_text("")
            folder.push()
        comm.share(None)
        if comm.rank > 0:
            folder.pull(TOKEN)
        if not path.is_file():
            raise RunError(
                f"{where} does not see what worker 0 writes in {folder}: give `folder` a place that all nodes share"
            )
        yield folder


def _report(checkpoint: str, state: dict[str, Any]) -> None:
    """Tells Ray Train; its checkpoint names ours, which lies in the run's folder."""
    with tempfile.TemporaryDirectory() as name:
        Path(name, "checkpoint.json").write_text(json.dumps({"checkpoint": checkpoint, **state}))
        own = ray.train.Checkpoint.from_directory(name) if ray.train.get_context().get_world_rank() == 0 else None
        ray.train.report({"done": state["done"], "step": state["step"] or 0}, checkpoint=own)


def _quiet() -> None:
    """Ray Train says at every report that there was one."""
    for name in list(logging.root.manager.loggerDict):
        if "ray.train" in name or "train/v2" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
