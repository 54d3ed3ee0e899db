"""The driver is killed, and the same command goes on; a node is lost, and the run goes on when another comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rays import config, state
from treelora_ray import run
from treelora_ray.cluster.run import ELASTIC, ENVIRONMENT
from treelora_ray.config import from_mapping

pytestmark = pytest.mark.slow


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "treelora_ray", "train", str(path), "--json"]


def same(one: Path, other: Path) -> None:
    (tensors, decided), (expected, expected_decided) = state(one), state(other)
    assert decided == expected_decided
    assert tensors.keys() == expected.keys()
    assert all(value.equal(tensors[name]) for name, value in expected.items())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_drivers_run_that_a_signal_ends_goes_on_with_the_same_command(
    number: int, code: int, ray_data: Path, tmp_path: Path
) -> None:
    made = config(ray_data, tmp_path / "ray", "treelora", cluster={"workers": 1, "address": "local"})
    made["train"]["epochs"] = 20
    run({**made, "folder": str(tmp_path / "local"), "cluster": {"workers": 0}})
    path = tmp_path / "run.yaml"
    path.write_text(from_mapping(made).to_yaml())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_worker_niceness": "0"}
    driver = subprocess.Popen(command(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert driver.stdout is not None
    said = ""
    for said in driver.stdout:
        if '"begins"' in said and '"t1"' in said:
            break
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == code, said + errors
    assert ("go on: treelora train" in errors) == (number == signal.SIGTERM)
    assert not (tmp_path / "ray" / "treelora" / "result.json").read_text().count('"finished": true')
    done = subprocess.run(command(path), capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "going on with" in done.stdout
    same(tmp_path / "ray" / "treelora", tmp_path / "local" / "treelora")


NODES = """
import json, sys, threading
import ray
from ray.cluster_utils import Cluster
from treelora_ray import run
from treelora_ray.cluster.run import ELASTIC, ENVIRONMENT
from treelora_ray.tracking.ui import free_port
from treelora_ray.training.stream import Listener

made, replaced = json.load(open(sys.argv[1])), sys.argv[2] == "replaced"
head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, namespace="treelora", log_to_driver=False)
seen = threading.Event()

class Watch(Listener):
    def begins(self, number, of, name):
        if name == "t1":
            seen.set()
    def note(self, text):
        print("note:", text, flush=True)

failure = []
def learn():
    try:
        run(made, listener=Watch())
    except BaseException as error:
        failure.append(error)

thread = threading.Thread(target=learn)
thread.start()
assert seen.wait(120), failure
cluster.remove_node(nodes[1], allow_graceful=False)
print("lost a node", flush=True)
if replaced:
    cluster.add_node(num_cpus=1)
thread.join(120)
print("ended:", failure or "well", flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.parametrize(("kind", "workers"), [("replaced", 2), ("lost", [1, 2])])
def test_a_lost_node_costs_steps_and_not_the_run(kind: str, workers: Any, ray_data: Path, tmp_path: Path) -> None:
    """Two workers go on when a node comes in its place; an elastic run goes on with one."""
    made = config(ray_data, tmp_path, "treelora", cluster={"workers": workers, "wait": 200})
    made["train"]["epochs"] = 20
    (tmp_path / "made.json").write_text(json.dumps(made))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}
    environment |= ENVIRONMENT | ELASTIC | {"RAY_worker_niceness": "0"}
    done = subprocess.run(
        [sys.executable, "-c", NODES, str(tmp_path / "made.json"), kind],
        capture_output=True, text=True, check=False, timeout=200, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "lost a node" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "ended: well" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "began again" in done.stdout
    tensors, decided = state(tmp_path / "treelora")
    assert decided["finished"]
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
