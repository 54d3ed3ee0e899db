"""A head that asks for a token: jobs are sent to it as users do, followed, killed in mid-run and sent again."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests import tiny
from tests.rays import state
from treelora_ray import run as learn
from treelora_ray.cluster.submit import EXCLUDES
from treelora_ray.config import load
from treelora_ray.core.errors import SnapshotError
from treelora_ray.files import load_snapshot
from treelora_ray.training.state import Checkpoints

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = "pipelines/train_stream.py"
MARK = "TREELORA_TEST_HEAD"  # a variable that all processes of a head inherit
PORTS = (
    "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
    "metrics-export-port", "ray-client-server-port",
)  # fmt: skip


def until(condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what()}"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in held]


class Head:
    """`ray start --head` in a folder with a short name, for sockets lie in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(32)
        self.token_path, self.log = folder / "token", folder / "head.log"
        self.token_path.touch(0o600)
        self.token_path.write_text(self.token)
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        start = [str(BIN / "ray"), "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--num-cpus=4"]
        start += [f"--temp-dir={folder / 'ray'}", "--object-store-memory=100000000", "--disable-usage-stats"]
        start += [f"--{name}={port}" for name, port in ports.items()]
        with self.log.open("w") as log:
            environment = {**self.environment(), MARK: str(folder), "RAY_worker_niceness": "0"}
            self.process = subprocess.Popen(
                start, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def environment(self) -> dict[str, str]:
        """Of a user who has the token, where the project is installed."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        return {**clean, **path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}

    def get(self, path: str, token: str | None) -> int:
        """The status that the dashboard answers with; 0 where it does not answer."""
        with suppress(requests.RequestException):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return requests.get(f"{self.address}{path}", headers=headers, timeout=5).status_code
        return 0

    def wait(self) -> None:
        def up() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return self.get("/api/version", self.token) == 200

        until(up, 120, lambda: self.log.read_text()[-3000:])

    def processes(self) -> list[Any]:
        """All that belong to it: of its session, or with its mark. Those that name themselves lose their marks."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                ours = os.getsid(process.pid) == self.process.pid
                if (ours or process.environ().get(MARK) == str(self.folder)) and process.status() != "zombie":
                    found.append(process)
        return found

    def stop(self) -> None:
        def gone() -> bool:
            self.process.poll()
            for process in self.processes():
                with suppress(psutil.Error):
                    process.kill()
            return not self.processes()

        until(gone, 60, lambda: str(self.processes()))

    def call(self, command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
        """A command in the folder of the project, with other variables where they are given."""
        environment = {**self.environment(), **changes}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=ROOT
        )

    @contextmanager
    def following(self, command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A command that goes on until its job ends."""
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=self.environment(), cwd=ROOT, start_new_session=True
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def driver(self, run: Path) -> Any:
        """The process that the job of a run has started, without the shell around it."""
        words = [(process, _words(process)) for process in self.processes()]
        (found,) = [one for one, said in words if said[1:2] == [SCRIPT] and f"name={run.name}" in said]
        return found


def _words(process: Any) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


@contextmanager
def started() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="head-", ignore_cleanup_errors=True) as name:
        head = Head(Path(name))
        try:
            head.wait()
            yield head
        finally:
            head.stop()
        assert not [words for words in map(_words, psutil.process_iter()) if any(name in word for word in words)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started() as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.vit(folder / "vit", size=16)
    return folder


def settings(run: Path, workers: int) -> list[str]:
    """Of a run whose second task takes much longer than the others: a checkpoint every other step."""
    epochs = 12 if workers == 1 else 40
    return [
        f"name={run.name}", f"folder={run.parent}", f"model.backbone={run.parent / 'vit'}", "stream.tasks=3",
        "stream.rows=64", "stream.test_rows=40", "train.batch=16", f"train.epochs=[1,{epochs},1]",
        "train.checkpoint_every=2", "method.probe_rounds=4", "method.guide.gate=0", f"cluster.workers={workers}",
    ]  # fmt: skip


def by_hand(head: Head, run: Path, workers: int = 2) -> list[str]:
    """As docs/cluster.md has it."""
    send = ["ray", "job", "submit", "--address", head.address, "--working-dir", "."]
    return [*send, "--", "python", SCRIPT, "--config", "quickstart", *settings(run, workers)]


def checked(head: Head, run: Path, *options: str) -> list[str]:
    return ["treelora", "submit", "quickstart", "--address", head.address, *options, *settings(run, 2)]


def progress(run: Path) -> tuple[int, int | None]:
    """How many tasks are learnt, and the step within the next, by the newest checkpoint."""
    for path in reversed(Checkpoints(run / "checkpoints").paths()):
        with suppress(OSError, SnapshotError):  # it has just been removed
            meta = load_snapshot(path)[1]
            return meta["done"], meta["step"]
    return 0, None


def in_the_second_task(run: Path) -> bool:
    done, step = progress(run)
    return done == 1 and step is not None


def assert_unfinished(run: Path) -> None:
    assert in_the_second_task(run), progress(run)
    assert json.loads((run / "result.json").read_text())["finished"] is False


def assert_same(run: Path, other: Path) -> None:
    (tensors, decided), (expected, expected_decided) = state(run), state(other)
    assert decided["finished"]
    assert decided == expected_decided
    assert tensors.keys() == expected.keys()
    assert all(value.equal(tensors[name]) for name, value in expected.items())
    adapters = [path.relative_to(other) for path in (other / "adapters").rglob("*.safetensors")]
    assert len(adapters) == 6
    assert all((run / path).read_bytes() == (other / path).read_bytes() for path in adapters)


def undisturbed(head: Head, runs: Path, workers: int) -> Path:
    """One worker learns what this process does, to the bit."""
    run = runs / f"whole-{workers}"
    if not run.exists() and workers == 1:
        learn(load("quickstart", [*settings(run, 1), "cluster.workers=0"]))
    elif not run.exists():
        done = head.call(by_hand(head, run))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run


def test_by_hand_the_working_folder_leaves_behind_what_treelora_submit_does() -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files

    checks = [_get_excludes(ROOT, get_runtime_env_default_excludes()), *get_excludes_from_ignore_files(ROOT, True)]
    for name in EXCLUDES:
        path = ROOT / name.replace("*", "some").lstrip("/") / "file"
        assert any(check(path) or check(path.parent) for check in checks), name
    for name in (SCRIPT, "treelora_ray/data/task.py", "treelora_ray/configs/quickstart.yaml", "pyproject.toml"):
        assert not any(check(ROOT / name) for check in checks), name


def test_without_its_token_the_head_answers_nobody(head: Head) -> None:
    assert head.get("/api/jobs/", head.token) == 200
    assert head.get("/api/jobs/", secrets.token_hex(32)) == 403
    assert head.get("/api/jobs/", None) == 401


def killed(head: Head, run: Path, _job: str) -> None:
    head.driver(run).kill()


def stopped(head: Head, _run: Path, job: str) -> None:
    done = head.call(["ray", "job", "stop", "--address", head.address, job])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("end", "status", "workers"),
    [
        pytest.param(killed, "failed", 1, marks=pytest.mark.slow),
        pytest.param(killed, "failed", 2, marks=pytest.mark.slow),
        pytest.param(stopped, "was stopped", 2, marks=pytest.mark.slow),
    ],
)
def test_a_job_that_ends_in_mid_run_goes_on_when_the_same_command_is_submitted_again(
    end: Callable[[Head, Path, str], None], status: str, workers: int, head: Head, runs: Path, tmp_path: Path
) -> None:
    run, log = runs / f"{end.__name__}-{workers}", tmp_path / "log"
    command = by_hand(head, run, workers)
    with head.following(command, log) as job:

        def in_progress() -> bool:
            assert job.poll() is None, log.read_text()[-3000:]
            return "task 2 of 3" in log.read_text() and in_the_second_task(run)  # workers are ahead of what is said

        until(in_progress, 240, lambda: log.read_text()[-3000:])
        found = re.search(r"Job '(raysubmit_\w+)' submitted", log.read_text())
        assert found
        end(head, run, found[1])
        job.wait(120)
    said = log.read_text()
    assert f"Job '{found[1]}' {status}" in said
    assert "task 2 of 3" in said
    assert_unfinished(run)
    again = head.call(command)
    said += again.stdout + again.stderr
    assert again.returncode == 0, said[-3000:]
    assert f"going on with {run}, 1 of 3 units learnt" in said
    assert "succeeded" in said
    assert_same(run, undisturbed(head, runs, workers))
    written = [path for folder in (head.folder / "ray", run) for path in folder.rglob("*") if path.is_file()]
    assert any("job-driver" in path.name for path in written)
    assert not [path for path in written if head.token.encode() in path.read_bytes()]
    assert head.token not in said


@pytest.mark.slow
def test_treelora_submit_says_how_to_follow_and_stop_its_job_and_goes_on_with_it(head: Head, runs: Path) -> None:
    run = runs / "checked"
    sent = head.call(checked(head, run, "--detach"))
    assert sent.returncode == 0, sent.stdout + sent.stderr
    follow, stop = (re.search(rf"^{word} it: (ray job .*)$", sent.stdout, re.M) for word in ("follow", "stop"))
    assert follow
    assert stop
    twice = head.call(checked(head, run))
    assert twice.returncode == 2
    assert f"is learning run {run} already" in twice.stderr
    log = shlex.split(follow[1].replace("--follow ", ""))
    until(lambda: in_the_second_task(run), 240, lambda: head.call(log).stdout)
    ended = head.call(shlex.split(stop[1]))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_unfinished(run)
    said = head.call(shlex.split(follow[1])).stdout
    assert "stopping at a checkpoint" in said
    assert "SIGTERM" not in said
    assert f"go on: treelora train quickstart name={run.name}" in said
    again = head.call(checked(head, run))
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert f"going on with {run}, 1 of 3 units learnt" in again.stdout
    assert re.search(r"job checked-\w+ succeeded$", again.stdout.strip())
    assert_same(run, undisturbed(head, runs, 2))


@pytest.mark.parametrize("kind", ["another", "none"])
def test_a_token_that_the_cluster_refuses_is_said_and_not_shown(kind: str, head: Head, tmp_path: Path) -> None:
    other = secrets.token_hex(32)
    (tmp_path / "token").write_text(other if kind == "another" else "")
    mode = {"RAY_AUTH_MODE": "token" if kind == "another" else "disabled", "HOME": str(tmp_path)}
    done = head.call(checked(head, tmp_path / "run"), RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"), **mode)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"error: the cluster at {head.address} refuses the token of this machine: set RAY_")
    assert other not in done.stdout + done.stderr
    assert head.token not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_sweep_is_a_job_and_submitted_again_it_has_nothing_left_to_do(head: Head, runs: Path) -> None:
    sweep = runs / "swept"
    given = [*settings(runs / "base", 1)[:-1], "train.epochs=1"]
    options = ["--space", "smoke", "--trials", "2", "--seeds", "1", "--name", sweep.name]
    send = ["ray", "job", "submit", "--address", head.address, "--working-dir", "."]
    done = head.call([*send, "--", "python", "pipelines/sweep.py", "--config", "quickstart", *given, *options])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((sweep / "sweep.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished"]
    assert load(sweep / "best.yaml").stream.holdout is None
    assert json.loads((sweep / "winner" / "result.json").read_text())["finished"]
    again = head.call(["treelora", "submit", "quickstart", "--sweep", "--address", head.address, *given, *options])
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert re.search(r"job swept-\w+ succeeded$", again.stdout.strip())
    assert json.loads((sweep / "sweep.json").read_text())["winner"] == found["winner"]
