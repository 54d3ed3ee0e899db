"""A server of object storage on this machine, and a filesystem that counts and breaks."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@contextmanager
def server() -> Iterator[str]:
    """Its host and port; credentials and region are in the environment meanwhile."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        yield "{}:{}".format(*running.get_host_and_port())
        running.stop()


def filesystem(endpoint: str) -> Any:
    from pyarrow.fs import S3FileSystem

    return S3FileSystem(endpoint_override=endpoint, scheme="http", allow_bucket_creation=True)


class Watched:
    """A filesystem whose changes are noted, without bucket and run; after `at` of them all fail."""

    def __init__(self, inner: Any, at: int | None = None) -> None:
        self.inner, self.at, self.lock = inner, at, threading.Lock()
        self.changes: list[str] = []

    def _change(self, what: str, path: str) -> None:
        with self.lock:
            if self.at is not None and len(self.changes) >= self.at:
                raise OSError(5, "the power is gone")
            self.changes.append(f"{what} {path.split('/', 2)[2]}")

    def open_output_stream(self, path: str) -> Any:
        self._change("put", path)
        return self.inner.open_output_stream(path)

    def delete_file(self, path: str) -> None:
        self._change("remove", path)
        self.inner.delete_file(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
