"""What most whole runs are made of."""

from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from tests.integration.test_runs import write

    write(tmp_path / "data", 3)
    return tmp_path / "data"
