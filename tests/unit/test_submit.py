"""Jobs: what is checked before anything is sent, what is sent, how it is followed. No cluster: a client that notes."""

from __future__ import annotations

import runpy
import shlex
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from treelora_ray.cluster import submit as module
from treelora_ray.cluster.errors import ClusterError
from treelora_ray.cluster.submit import submit
from treelora_ray.config import ConfigError, load

ROOT = Path(__file__).parents[2]
HERE, THERE = "http://127.0.0.1:8265", "http://10.1.2.3:8265"


class Client:
    """Notes what it is asked, and ends every job as it was told to."""

    def __init__(self, status: str = "SUCCEEDED", fail: BaseException | None = None) -> None:
        self.status, self.fail = status, fail
        self.sent: dict[str, Any] = {}
        self.jobs: list[Any] = []
        self.asked = 0

    def get_address(self) -> str:
        return HERE

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, **what: Any) -> str:
        self.sent = what
        return str(what["submission_id"])

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        assert job == self.sent["submission_id"]
        yield "one\ntwo\n"
        if self.fail:
            raise self.fail
        yield "three\n"

    def get_job_info(self, _: str) -> Any:
        self.asked += 1
        status = JobStatus.RUNNING if self.asked == 1 else JobStatus(self.status)
        return SimpleNamespace(status=status, message="exit code 1, last available logs (cut):\nlong log")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    made = Client()
    monkeypatch.setattr(module, "_connect", lambda _: made)
    monkeypatch.setattr("treelora_ray.cluster.submit.time.sleep", lambda _: None)
    return made


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: str) -> Any:
        raise AssertionError("connected before the checks")

    monkeypatch.setattr(module, "_connect", connect)


def go(
    folder: Path, *arguments: str, command: str = "train", address: str = HERE, detach: bool = True
) -> tuple[int, list[str]]:
    said: list[str] = []
    return submit(command, list(arguments), address, folder, detach, said.append), said


def words(client: Client) -> list[str]:
    return shlex.split(client.sent["entrypoint"])


@pytest.mark.usefixtures("no_client")
@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["quikstart"], ConfigError, "did you mean 'quickstart'"),
        (["quickstart", "train.lr=-1", "no.such=1"], ConfigError, "train.lr is -1"),
        (["quickstart"], ClusterError, "folder is 'runs', a relative path: a job runs in a temporary folder"),
        (["quickstart", "folder=/s", "stream.source=parquet", "stream.path=d"], ClusterError, "stream.path is 'd'"),
        (["quickstart", "folder=/s", "model.backbone=vit"], ClusterError, "model.backbone is 'vit'"),
        (["quickstart", "folder=/s", "method.prior=tree"], ClusterError, "method.prior is 'tree'"),
        (["--allow-change", "train.lr"], ClusterError, "config first"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    folder: Path, arguments: list[str], kind: type[Exception], said: str
) -> None:
    (folder / "vit").mkdir()
    with pytest.raises(kind, match=said):
        go(folder, *arguments, address=THERE)


@pytest.mark.parametrize("place", ["/shared/runs", "s3://bucket/runs"])
def test_an_absolute_folder_or_a_uri_goes_to_the_cluster_as_it_is(folder: Path, client: Client, place: str) -> None:
    assert go(folder, "quickstart", f"folder={place}", address=THERE)[0] == 0
    assert words(client) == [
        "python", "-m", "treelora_ray", "train", "quickstart", f"folder={place}", "cluster.address=auto",
    ]  # fmt: skip
    assert client.sent["metadata"] == {"run": f"{place}/quickstart"}


def test_on_this_machine_relative_paths_become_those_of_the_caller(folder: Path, client: Client) -> None:
    (folder / "vit").mkdir()
    given = ["quickstart", "stream.source=parquet", "stream.path=my data", "model.backbone=vit", "method.prior=tree"]
    _, said = go(folder, *given)
    effective = load("quickstart", [word for word in words(client) if "=" in word])
    assert effective.folder == str(folder / "runs")
    assert effective.stream.path == str(folder / "my data")
    assert effective.model.backbone == str(folder / "vit")
    assert effective.method.model_dump()["prior"] == str(folder / "tree")
    assert f"folder is {folder / 'runs'} of the machine on which the cluster runs" in said


def test_a_config_file_travels_by_its_place_in_the_working_folder(folder: Path, client: Client) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "run.yaml").write_text("name: first\n")
    go(folder, "mine/run.yaml", "folder=/s")
    assert words(client)[4] == "mine/run.yaml"
    assert client.sent["submission_id"].startswith("first-")
    (folder / "outside.yaml").write_text("")
    with pytest.raises(ClusterError, match=r"outside\.yaml does not lie in"):
        go(folder / "mine", "outside.yaml", "folder=/s")
    (folder / "runs").mkdir()
    (folder / "runs" / "config.yaml").write_text("name: first\n")
    with pytest.raises(ClusterError, match="runs/, which does not travel"):
        go(folder, "runs/config.yaml", "folder=/s")


def test_the_working_folder_travels_without_data_runs_and_caches(folder: Path, client: Client) -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    go(folder, "quickstart")
    environment = client.sent["runtime_env"]
    assert environment["working_dir"] == str(folder)
    excluded = _get_excludes(folder, environment["excludes"])
    for name in ("data/a", "runs/first/config.yaml", "mlruns/1", ".git/HEAD", ".venv/bin/python", "a/__pycache__/b"):
        assert excluded(folder / name), name
    for name in ("treelora_ray/data/task.py", "pipelines/train_stream.py", "mine.yaml", "treelora_ray/cluster/run.py"):
        assert not excluded(folder / name), name
    variables = environment["env_vars"]
    assert variables["PYTHONUNBUFFERED"] == "1"
    assert {name: value for name, value in variables.items() if name.startswith("RAY_TRAIN")} == {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    assert not [name for name in variables if "TOKEN" in name]


def pipeline(name: str) -> Callable[[list[str]], list[str]]:
    found: Callable[[list[str]], list[str]] = runpy.run_path(str(ROOT / "pipelines" / name))["arguments"]
    return found


def test_in_a_checkout_the_pipelines_are_started_and_pass_everything_on(folder: Path, client: Client) -> None:
    given = ["quickstart", "folder=/s", "train.lr=1e-4", "--allow-change", "train.lr", "cluster.workers=[1,2]"]
    go(ROOT, *given)
    assert words(client)[:2] == ["python", "pipelines/train_stream.py"]
    assert pipeline("train_stream.py")(words(client)[2:]) == [
        "train", "quickstart", "folder=/s", "train.lr=1e-4", "cluster.workers=[1,2]", "cluster.address=auto",
        "--allow-change", "train.lr",
    ]  # fmt: skip
    go(ROOT, "runs/first", "--routing", "oracle", command="evaluate")
    assert words(client)[:2] == ["python", "pipelines/evaluate.py"]
    assert pipeline("evaluate.py")(words(client)[2:]) == [
        "evaluate", str(folder / "runs" / "first"), "--routing", "oracle",
    ]  # fmt: skip
    assert client.sent["submission_id"].startswith("evaluate-first-")


def test_a_sweep_is_sent_with_its_options_and_its_space(folder: Path, client: Client) -> None:
    given = ["quickstart", "folder=/s", "--space=smoke", "--trials", "4", "train.lr=1e-4", "--json"]
    go(ROOT, *given, command="sweep")
    assert words(client)[:2] == ["python", "pipelines/sweep.py"]
    assert pipeline("sweep.py")(words(client)[2:]) == [
        "sweep", "quickstart", "folder=/s", "train.lr=1e-4", "cluster.address=auto", "--space", "smoke", "--trials",
        "4", "--json",
    ]  # fmt: skip
    assert client.sent["metadata"] == {"run": "/s/sweep-smoke-quickstart"}
    (folder / "mine.py").write_text("from ray import tune\ndef f():\n    return {'train.lr': tune.uniform(0.1, 1)}\n")
    go(folder, "quickstart", "folder=/s", "--space", str(folder / "mine.py"), "--name", "first", command="sweep")
    assert words(client)[-4:] == ["--space", "./mine.py", "--name", "first"]
    assert client.sent["metadata"] == {"run": "/s/first"}


@pytest.mark.usefixtures("no_client")
@pytest.mark.parametrize(
    ("space", "says"),
    [("smok", "did you mean 'smoke'"), ("./wrong.py", "train.lr is -1"), ("../outside.py", "does not lie in")],
)
def test_a_space_that_cannot_be_searched_is_refused_before_anything_is_sent(
    folder: Path, space: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = folder / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for path, low in ((inner / "wrong.py", -1), (folder / "outside.py", 0.1)):
        path.write_text(f"from ray import tune\ndef f():\n    return {{'train.lr': tune.uniform({low}, 1)}}\n")
    with pytest.raises(ValueError, match=says):
        go(inner, "quickstart", "folder=/s", "--space", space, command="sweep")


@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_all_options_that_take_a_value_are_known(command: str) -> None:
    from typer.main import get_command

    from treelora_ray.cli import app

    options = get_command(app).commands[command].params  # type: ignore[attr-defined]
    takes = {
        name for option in options if option.param_type_name == "option" and not option.is_flag for name in option.opts
    }
    assert takes == set({"sweep": module.SWEEP_VALUES, "compare": module.COMPARE_VALUES}[command])


def test_a_comparison_is_sent_with_its_options_and_its_rows(folder: Path, client: Client) -> None:
    given = ["quickstart", "folder=/s", "--methods=seqlora,ewc:method.lambda=3", "--seeds", "0,1", "--json"]
    go(ROOT, *given, command="compare")
    assert words(client)[:2] == ["python", "pipelines/compare.py"]
    assert pipeline("compare.py")(words(client)[2:]) == [
        "compare", "quickstart", "folder=/s", "cluster.address=auto", "--methods", "seqlora,ewc:method.lambda=3",
        "--seeds", "0,1", "--json",
    ]  # fmt: skip
    assert client.sent["metadata"] == {"run": "/s/compare-quickstart"}
    (folder / "rows.yaml").write_text("routed: {method: seqlora}\n")
    go(folder, "quickstart", "folder=/s", "--methods", str(folder / "rows.yaml"), "--name", "c", command="compare")
    assert words(client)[-4:] == ["--methods", "rows.yaml", "--name", "c"]
    assert client.sent["metadata"] == {"run": "/s/c"}


@pytest.mark.usefixtures("no_client")
@pytest.mark.parametrize(
    ("methods", "says"),
    [("ewd", "did you mean 'ewc'"), ("ewc:method.lamda=1", "row 'ewc lamda=1' cannot be used"), ("a.yaml", "be read")],
)
def test_rows_that_cannot_be_compared_are_refused_before_anything_is_sent(
    folder: Path, methods: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        go(folder, "quickstart", "folder=/s", "--methods", methods, command="compare")


def test_a_run_to_evaluate_elsewhere_needs_a_place_that_is_the_same_there(folder: Path, client: Client) -> None:
    with pytest.raises(ClusterError, match="the run is 'runs/first', a relative path"):
        go(folder, "runs/first", command="evaluate", address=THERE)
    go(folder, "s3://b/first", "--json", command="evaluate", address=THERE)
    assert words(client) == ["python", "-m", "treelora_ray", "evaluate", "s3://b/first", "--json"]


def test_two_jobs_never_learn_one_run(folder: Path, client: Client) -> None:
    other = {"metadata": {"run": f"{folder}/runs/quickstart"}, "submission_id": "quickstart-1"}
    client.jobs = [SimpleNamespace(**other, status=JobStatus.RUNNING), SimpleNamespace(metadata=None)]
    with pytest.raises(ClusterError, match=r"job quickstart-1 is learning run .*/runs/quickstart already"):
        go(folder, "quickstart")
    client.jobs = [SimpleNamespace(**other, status=JobStatus.FAILED)]
    assert go(folder, "quickstart")[0] == 0


def test_the_log_is_shown_until_the_job_has_succeeded(folder: Path, client: Client) -> None:
    code, said = go(folder, "quickstart", detach=False)
    assert code == 0
    assert said[-3:] == ["one\ntwo", "three", f"job {client.sent['submission_id']} succeeded"]
    assert client.asked == 2


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_a_job_that_did_not_succeed_gives_1_and_says_how_it_goes_on(folder: Path, client: Client, status: str) -> None:
    client.status = status
    code, said = go(folder, "quickstart", detach=False)
    assert code == 1
    assert f"{status.lower()}: exit code 1\n" in said[-1]
    assert "long log" not in said[-1]
    assert "goes on from its last checkpoint when the same command is submitted again" in said[-1]


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_stop_it(folder: Path, client: Client) -> None:
    client.fail = KeyboardInterrupt()
    code, said = go(folder, "quickstart", detach=False)
    assert code == 130
    assert "goes on" in said[-1]
    assert f"ray job stop --address {HERE} {client.sent['submission_id']}" in said[-1]


def test_a_lost_connection_is_not_taken_for_a_failed_job(folder: Path, client: Client) -> None:
    client.fail = RuntimeError("WebSocket closed")
    with pytest.raises(
        ClusterError, match=r"was lost \(WebSocket closed\); the job may go on\nfollow it: ray job logs"
    ):
        go(folder, "quickstart", detach=False)


def test_detached_it_says_how_to_follow_stop_and_resume(folder: Path, client: Client) -> None:
    code, said = go(folder, "quickstart")
    assert code == 0
    assert client.asked == 0
    for part in ("ray job logs --follow --address", "ray job stop --address", "same command is submitted again"):
        assert part in said[-1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Failed to connect"), "no Ray cluster answers at http://127.0.0.1:8265 .Failed to connect"),
        (requests.exceptions.HTTPError("502 Bad Gateway"), "no Ray cluster answers at"),
        (AuthenticationError("Authentication failed: s3cret"), "refuses the token .* RAY_AUTH_TOKEN_PATH"),
        (RuntimeError("Token authentication is enabled but no token was found"), "refuses the token"),
    ],
)
def test_an_address_that_does_not_answer_or_another_token_is_said_plainly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def connect(_: str) -> Any:
        raise error

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", connect)
    with pytest.raises(ClusterError, match=said) as raised:
        go(folder, "quickstart")
    assert "s3cret" not in str(raised.value)


def test_a_job_that_the_cluster_refuses_is_said(folder: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise ValueError("Package size exceeds the limit\nmore")

    monkeypatch.setattr(client, "submit_job", refuse)
    with pytest.raises(ClusterError, match=r"could not be sent from .*: Package size exceeds the limit$"):
        go(folder, "quickstart")


@pytest.mark.usefixtures("client")
def test_an_address_of_rays_variables_counts_and_does_not_silently_win(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="local cluster ends with its process"):
        go(folder, "quickstart", address="local")
    monkeypatch.setenv("RAY_ADDRESS", THERE)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS is {THERE}, but the address given is {HERE}"):
        go(folder, "quickstart")
    with pytest.raises(ClusterError, match="a relative path"):
        go(folder, "quickstart", address="auto")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("auto", True), ("http://localhost:1", True), ("http://[::1]:1", True), (THERE, False), ("http://head:1", False)],
)
def test_which_addresses_are_of_this_machine(address: str, expected: bool) -> None:
    assert module._is_loopback(address) is expected
