"""Delivers a run's journal to MLflow, from a process of its own.

    python -m treelora_ray.tracking.sender FOLDER      it ends when its standard input does, and all is delivered

What was delivered is kept in `tracking.json` (which MLflow run, how far the journal was read) and may lag behind:
an entry that is sent twice is stored once, since MLflow keeps one of equal metrics (name, step, time, value), and
its run is found again by a tag. So each entry is there exactly once, whatever dies when.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from treelora_ray.files import locked, write_atomically
from treelora_ray.tracking.journal import FILE, beginning, read, read_on

CURSOR, LOCK = "tracking.json", ".tracking.lock"
EVERY = 1.0  # seconds between two batches
LONGEST = 15.0  # seconds between two tries while MLflow does not answer
LAST_TRIES = 2  # once the run has ended
ENVIRONMENT = {
    # Bounded calls: with MLflow's own settings one to a dead server takes minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Sender:
    """The process, seen from the one that trains. Nothing here waits, but for `connected` and `finish`."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say, self.said, self.buffer = folder, say, "", b""
        path = os.pathsep.join(dict.fromkeys(sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "treelora_ray.tracking.sender", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which then tells the end
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def look(self, seconds: float = 0.0) -> bool:
        """Passes on what the process says; False once it has ended."""
        out = self.process.stdout
        assert out is not None
        if seconds:
            select.select([out], [], [], seconds)
        try:
            data = os.read(out.fileno(), 65536)
        except BlockingIOError:
            return True
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            kind, _, text = line.decode().partition(" ")
            self.said = kind
            if text:
                self.say(text)
        return bool(data)

    def connected(self, seconds: float) -> bool:
        """Waits until MLflow has taken the run; False if it does not."""
        deadline = time.monotonic() + seconds
        while self.said != "open" and (left := deadline - time.monotonic()) > 0:
            if not self.look(left) or self.said == "trouble":
                return False
        return self.said == "open"

    def finish(self, seconds: float) -> None:
        """Lets it deliver the rest, for so long; what is left then, `treelora track sync` delivers."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self.look(left):
            pass
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()) + 1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.say(
                f"MLflow took more than {seconds:g} s (tracking.wait): deliver the rest with "
                f"`treelora track sync {self.folder}`"
            )


class BusyError(ValueError):
    """Another process delivers the journal."""


def only(folder: Path, wait: bool) -> AbstractContextManager[None]:
    busy = BusyError(f"run {folder} is being delivered by another process: it goes on by itself")
    return locked(folder / LOCK, None if wait else busy)


class Delivery:
    """From the journal to MLflow, as far as it goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sink: Any = None
        self.cursor: dict[str, Any] = {"offset": 0, "run_id": None}
        if (folder / CURSOR).is_file():
            self.cursor |= json.loads((folder / CURSOR).read_text())

    @property
    def waiting(self) -> list[tuple[int, dict[str, Any]]]:
        return read_on(self.folder / FILE, self.cursor["offset"])

    def advance(self) -> bool:
        """Sends what there is; False if there was nothing. Any error leaves the rest for the next time."""
        entries = self.waiting
        if not entries:
            return False
        while entries:
            kind = entries[0][1]["kind"]
            count = 1
            if kind == "step":
                count = next((n for n, (_, entry) in enumerate(entries) if entry["kind"] != "step"), len(entries))
            part, entries = entries[:count], entries[count:]
            self._send(kind, [entry for _, entry in part], last=not entries)
            self._move(part[-1][0])
        return True

    def _send(self, kind: str, entries: list[dict[str, Any]], last: bool) -> None:
        sink = self._open(entries[0] if kind == "begins" else None)
        if kind == "begins":
            sink.begin(entries[0], self.cursor)
        elif kind == "step":
            sink.steps(entries)
        elif kind == "learnt":
            sink.learnt(entries[0], last)
        elif kind == "ends":
            sink.end(entries[0])

    def _open(self, begins: dict[str, Any] | None) -> Any:
        if self.sink is None:
            from treelora_ray.tracking.mlflow_sink import Sink

            begins = begins or beginning(self.folder / FILE)
            assert begins is not None, "a run that has told something has told what it is first"
            self.sink = Sink(self.folder, begins, self.cursor["run_id"])
        return self.sink

    def _move(self, offset: int) -> None:
        assert self.sink is not None
        self.cursor |= {"offset": offset, "run_id": self.sink.run_id, "experiment_id": self.sink.experiment_id}
        write_atomically(self.folder / CURSOR, json.dumps(self.cursor, indent=1).encode())

    def unfinished(self) -> bool:
        """Whether the last that was told is no end."""
        entries = read(self.folder / FILE)
        return bool(entries) and entries[-1]["kind"] != "ends"

    def close(self) -> None:
        """The run's process has gone without a word."""
        self._open(None).close("KILLED")


def serve(folder: Path, gone: Callable[[float], bool], tell: Callable[[str], None]) -> int:
    """Delivers until the run's process is gone and nothing is left; how many entries could not be delivered.

    `gone(seconds)` waits so long for the end. Told: `open` when MLflow takes something, `trouble …` when it stops to.
    """
    delivery, pause, well, over, failures = Delivery(folder), EVERY, None, False, 0
    while True:
        try:
            if delivery.advance():
                if well is not True:
                    tell("open" if well is None else "open MLflow answers again: nothing was lost")
                well, pause, failures = True, EVERY, 0
            if over and not delivery.waiting:
                if delivery.cursor["run_id"] and delivery.unfinished():
                    delivery.close()
                return 0
        except Exception as error:
            if well is not False:
                tell(f"trouble {_what(error)}")
            well, pause, delivery.sink = False, min(pause * 2, LONGEST), None
            failures += over
            if failures == LAST_TRIES:
                return len(delivery.waiting)
        if over:
            time.sleep(EVERY)
        else:
            over = gone(pause)


def sync(folder: Path) -> int:
    """Delivers what is left of a run's journal; how many entries there were. Errors are those of MLflow."""
    _bounded()
    with only(folder, wait=False):
        delivery = Delivery(folder)
        count = len(delivery.waiting)
        delivery.advance()
        if delivery.cursor["run_id"] and delivery.unfinished() and not _trains(folder):
            delivery.close()
        return count


def _trains(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _bounded() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _what(error: Exception) -> str:
    from treelora_ray.tracking.store import explained

    return f"{explained(error)}; the run goes on, its journal is kept, and delivery is tried again"


def main(folder: Path) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _bounded()
    os.nice(5)

    def gone(seconds: float) -> bool:
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(readable)  # only its end can be read

    def tell(text: str) -> None:
        with suppress(BrokenPipeError):
            print(text, flush=True)

    with only(folder, wait=True):
        left = serve(folder, gone, tell)
    if left:
        tell(f"left {left} entries of the journal are not in MLflow: `treelora track sync {folder}` delivers them")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
