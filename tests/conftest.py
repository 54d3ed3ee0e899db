"""One thread for torch: the tests' tensors are small, and idle threads spin on a busy machine.

No deadline for hypothesis: on such a machine a slow example is no defect.
"""

from collections.abc import Iterator

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
        yield
