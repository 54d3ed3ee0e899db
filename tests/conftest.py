"""One thread for torch: the tests' tensors are small, and idle threads spin on a busy machine.

No deadline for hypothesis: on such a machine a slow example is no defect.
"""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is made once and kept is kept for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TREELORA_TRACKING", "none")  # a process a run: tests of tracking ask for it
        yield


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of a few thousand weights; not to be written to."""
    from tests import tiny

    return tiny.vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of a few thousand weights; not to be written to."""
    from tests import tiny

    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray on this machine, started by the first test that needs it."""
    from tests import rays

    with rays.cluster():
        yield


@pytest.fixture(scope="session")
def ray_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import rays

    return rays.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def store_server() -> Iterator[str]:
    """Object storage on this machine."""
    from tests import buckets

    with buckets.server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(store_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket, without options."""
    from tests import buckets

    name = f"b-{secrets.token_hex(4)}"
    buckets.filesystem(store_server).create_dir(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{store_server}")
    return f"s3://{name}"
