"""Files for clusters: they parse, fit their schemas, and name only settings and commands that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from treelora_ray.cli import app
from treelora_ray.config import load

ROOT = Path(__file__).parents[2]
CLUSTER, PAGE = ROOT / "cluster.yaml", ROOT / "docs" / "cluster.md"
IMAGE = ROOT / "deploy" / "Containerfile"
RAYCLUSTER, RAYJOB = (ROOT / "deploy" / "kuberay" / name for name in ("raycluster.yaml", "rayjob.yaml"))
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))
FILES = [CLUSTER, PAGE, IMAGE, RAYCLUSTER, RAYJOB, *PIPELINES]

# Fields of the custom resources of KubeRay 1.5.
FIELDS = {
    "RayCluster": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
        "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
    },
    "RayJob": {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
        "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
        "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
    },
    "group": {
        "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
        "replicas", "resources", "scaleStrategy", "suspend", "template",
    },
    "head": {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"},
}  # fmt: skip


def document(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def ray_cluster(path: Path) -> Any:
    found = document(path)["spec"]
    return found["rayClusterSpec"] if path == RAYJOB else found


def lines(path: Path) -> Iterator[str]:
    """What a shell may be given: lines of code, those of comments too, and what stands in backticks."""
    if path == RAYJOB:
        yield document(path)["spec"]["entrypoint"]
    text = path.read_text()
    yield from re.findall(r"`([^`\n]+)`", text)
    for line in text.splitlines():
        yield re.sub(r"^[#\s-]+", "", line)


def commands(path: Path, program: str) -> list[list[str]]:
    """The words behind a program's name."""
    return [
        shlex.split(line, comments=True)[len(program.split()) :]
        for line in lines(path)
        if re.match(rf"{program} [a-z]", line)
    ]


def test_the_launchers_file_is_valid_as_ray_up_reads_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(document(CLUSTER))
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["min_workers"] == 0
    broken = prepare_config({**document(CLUSTER), "idle_timeout": 3})
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(broken)


@pytest.mark.parametrize(
    "provider",
    [
        {"type": "gcp", "region": "us-west1", "availability_zone": "us-west1-b", "project_id": "p"},
        {"type": "local", "head_ip": "h", "worker_ips": ["a", "b"]},
    ],
    ids=["gcp", "local"],
)
def test_the_alternatives_of_its_comments_are_valid_too(provider: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    changed = {**document(CLUSTER), "provider": provider}
    if provider["type"] == "local":
        del changed["available_node_types"], changed["head_node_type"]
    validate_config(prepare_config(changed))


def test_the_launchers_cluster_has_a_token_and_a_dashboard_on_loopback_only() -> None:
    found = document(CLUSTER)
    starts = [line for line in found["head_start_ray_commands"] if "--head" in line]
    assert starts
    assert all("--dashboard-host=127.0.0.1" in line for line in starts)
    assert "--env=RAY_AUTH_MODE=token" in found["docker"]["run_options"]
    token = next(line.partition("RAY_AUTH_TOKEN_PATH=")[2] for line in found["docker"]["run_options"][1:])
    assert found["file_mounts"][token] == "~/.ray/auth_token"
    assert "0.0.0.0" not in CLUSTER.read_text()


def test_what_is_copied_to_the_machines_is_there_and_is_all_that_installing_needs() -> None:
    mounts = document(CLUSTER)["file_mounts"]
    local = {place for place in mounts.values() if not place.startswith("~")}
    assert all((ROOT / place).exists() for place in local)
    copied = {word for line in re.findall(r"^COPY (.*)$", IMAGE.read_text(), re.MULTILINE) for word in line.split()}
    assert local <= copied
    assert local >= {"pyproject.toml", "constraints.txt", "treelora_ray", *project()["license-files"]}
    assert all((ROOT / place).exists() for place in copied - {"./"})


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_of_ray_python_and_the_image_agree() -> None:
    ray = version("ray")
    assert document(CLUSTER)["docker"]["image"] == f"rayproject/ray:{ray}-py311-gpu"
    assert "FROM python:3.11-slim\n" in IMAGE.read_text()
    name = f"registry.example.com/treelora-ray:{project()['version']}"
    assert f"-t {name} ." in IMAGE.read_text()
    for path in (RAYCLUSTER, RAYJOB):
        spec = ray_cluster(path)
        assert spec["rayVersion"] == ray
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        assert {part["image"] for group in groups for part in group["template"]["spec"]["containers"]} == {name}


def test_torch_is_named_without_a_build_of_its_own_that_only_some_indexes_have() -> None:
    (torch,) = [row for row in (ROOT / "constraints.txt").read_text().splitlines() if row.startswith("torch==")]
    assert "+" not in torch


def test_the_image_runs_as_a_user_without_rights() -> None:
    text = IMAGE.read_text()
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    assert text.index("USER 1000") > text.index("pip install")


@pytest.mark.parametrize("path", [RAYCLUSTER, RAYJOB], ids=lambda path: path.name)
def test_manifests_have_the_fields_of_kuberay(path: Path) -> None:
    found = document(path)
    assert found["apiVersion"] == "ray.io/v1"
    assert found["spec"].keys() <= FIELDS[found["kind"]]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,46}", found["metadata"]["name"])
    spec = ray_cluster(path)
    assert spec.keys() <= FIELDS["RayCluster"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"].keys() <= FIELDS["head"]
    groups = spec["workerGroupSpecs"]
    for group in groups:
        assert group.keys() <= FIELDS["group"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *groups):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        container = pod["containers"][0]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [each["name"] for each in pod["volumes"]]
    assert any("nvidia.com/gpu" in g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups)


def test_the_manifests_write_to_the_volume_that_the_page_makes() -> None:
    claims = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)]
    assert [claim["kind"] for claim in claims] == ["PersistentVolumeClaim"]
    assert claims[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    for path in (RAYCLUSTER, RAYJOB):
        spec = ray_cluster(path)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            volume = group["template"]["spec"]["volumes"][0]
            assert volume["persistentVolumeClaim"]["claimName"] == claims[0]["metadata"]["name"]
            assert group["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"] == "/runs"
    assert "folder=/runs" in document(RAYJOB)["spec"]["entrypoint"].split()


def test_every_setting_in_these_files_loads() -> None:
    seen = []
    for path in FILES:
        starts = ["treelora train", "treelora submit", "python -m treelora_ray train"]
        runs = [words for start in starts for words in commands(path, start)]
        runs += [words for words in commands(path, "ray job submit") if "--config" in words]
        for words in runs:
            overrides = [word for word in words if "=" in word and not word.startswith("--")]
            load("quickstart", overrides)
            seen += overrides
    assert {"cluster.workers=[2,8]", "cluster.gpus_per_worker=1", "folder=/runs"} <= set(seen)


def test_settings_that_the_page_explains_exist() -> None:
    from treelora_ray.config import keys

    named = set(re.findall(r"`((?:cluster|train|stream|model)\.[a-z_]+)[`=]", PAGE.read_text()))
    assert len(named) > 8
    assert named <= set(keys())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_and_scripts_that_are_named_exist(path: Path) -> None:
    from ray.scripts.scripts import cli

    ours = getattr(get_command(app), "commands", {})
    for words in commands(path, "treelora"):
        assert words[0] in ours, words
    for words in commands(path, "ray"):
        assert words[0] in cli.commands, words
    for script in re.findall(r"\bpipelines/\w+\.py\b", path.read_text()):
        assert (ROOT / script).is_file()
    for words in commands(path, "treelora submit"):
        options = {option for parameter in ours["submit"].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
