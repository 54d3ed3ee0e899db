"""What most whole runs are made of."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from tests.integration.test_runs import write

    write(tmp_path / "data", 3)
    return tmp_path / "data"
